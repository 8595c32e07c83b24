"""The doctor: each check finds what would fail or be slow, with its cure, and the exit status tells."""

import dataclasses
import json

import jax
import pytest

from data_pipelines.machine import Machine
from experiments.run import checks
from tests import programs
from tests.programs import tissue
from tests.tiff_files import write_tiff

SOUND = Machine(
    cores=8,
    usable_cores=8,
    cpu_flags=frozenset({"avx2", "avx512f"}),
    memory_free=16 << 30,
    huge_pages="madvise",
    gpus=(),
)
TUNED = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}


def changed(**facts):
    return dataclasses.replace(SOUND, **facts)


def levels(findings):
    return {finding.topic: finding.level for finding in findings}


def the(level, findings):
    """The one finding of this level; what matters has a cure."""
    (found,) = [finding for finding in findings if finding.level == level]
    assert found.cure or level in ("ok", "note")
    return found


def test_sound_machine_has_nothing_to_cure():
    found = [*checks.check_processor(SOUND, TUNED, on_cpu=True), *checks.check_memory(SOUND)]
    assert {finding.level for finding in found} == {"ok"} and len(found) == 3


@pytest.mark.parametrize(
    ("facts", "environment", "level", "words"),
    [
        ({"usable_cores": 1}, TUNED, "slow", "1 of 8 cores"),
        ({"usable_cores": 0.5}, TUNED, "slow", "0.5 of 8 cores"),
        ({"usable_cores": 4}, TUNED, "note", "4 of 8 cores"),
        ({"cpu_flags": frozenset({"avx2"})}, TUNED, "note", "no AVX-512"),
        ({}, {}, "slow", "not asked for"),
        ({}, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, "slow", "not asked for"),
        ({"huge_pages": "never"}, TUNED, "slow", "the kernel gives none"),
    ],
)
def test_what_slows_a_processor_down(facts, environment, level, words):
    assert words in the(level, checks.check_processor(changed(**facts), environment, on_cpu=True)).text


def test_large_pages_and_vectors_matter_only_where_the_model_computes():
    found = checks.check_processor(changed(cpu_flags=frozenset({"sse"}), huge_pages="never"), {}, on_cpu=False)
    assert levels(found) == {"cores": "ok"}


def test_too_little_memory_would_fail():
    assert "0.5 GiB" in the("fail", checks.check_memory(changed(memory_free=1 << 29))).text
    assert the("note", checks.check_memory(changed(memory_free=None)))


def test_gpu_that_jax_does_not_use_is_slow():
    machine = changed(gpus=("/dev/nvidia0",))
    assert levels(checks.check_devices(SOUND, {})) == {"device": "ok"}
    assert "requirements-gpu.txt" in the("slow", checks.check_devices(machine, {})).cure
    assert "JAX_PLATFORMS=cpu" in the("slow", checks.check_devices(machine, {"JAX_PLATFORMS": "cpu"})).cure


def test_devices_that_do_not_start_would_fail(monkeypatch):
    def broken():
        raise RuntimeError("Unable to initialize backend 'cuda': no driver\nmore")

    monkeypatch.setattr(jax, "devices", broken)
    found = the("fail", checks.check_devices(SOUND, {}))
    assert found.text.endswith("no driver")


def test_device_that_computes_nonsense_would_fail(monkeypatch):
    monkeypatch.setattr(jax.lax, "conv_general_dilated", lambda image, *_, **__: image[:, :6, :6, :1] * 0)
    assert "gave 0, not 27" in the("fail", checks.check_devices(SOUND, {})).text


def test_absent_readers():
    found = checks.check_readers({"OpenSlide": "", "cuCIM": "", "tifffile": "1"}, tensorflow=False)
    assert levels(found) == {"OpenSlide": "fail", "cuCIM": "slow", "tifffile": "ok", "TensorFlow": "note"}


def test_folders_that_are_full_far_away_or_closed(tmp_path, monkeypatch):
    assert levels(checks.check_folder("results", tmp_path / "new")) == {"results": "ok"}
    monkeypatch.setattr(checks, "file_system", lambda path: "nfs4")
    assert "network file system (nfs4)" in the("note", checks.check_folder("results", tmp_path)).text
    assert "local folder" in the("slow", checks.check_cache(str(tmp_path))).cure
    monkeypatch.setattr(checks, "disk_free", lambda path: 1000)
    assert the("fail", checks.check_folder("results", tmp_path))
    (tmp_path / "file").touch()
    closed = checks.check_folder("results", tmp_path / "file" / "folder")
    assert "a file stands where a folder is needed" in closed[0].text and closed[0].level == "fail"
    assert the("slow", checks.check_cache(""))


def test_program_tries_slides_and_exits_by_what_it_found(tmp_path):
    slides = tmp_path / "slides"
    slides.mkdir()
    write_tiff(slides / "a.tiff", tissue(300), compression="lzw")
    line = {"slides": slides, "out": tmp_path / "out", "json": tmp_path / "found.json"}
    with programs.imported("doctor") as doctor:
        sound = programs.start(doctor, **line)
        (slides / "b.svs").write_text("no slide")
        broken = programs.start(doctor, **line)
        fewer = programs.start(doctor, most=1, **line)
    assert sound.status == 0 and "openslide agrees within 0.0 grey values on 4 regions" in sound.out
    assert broken.status == 1 and broken.out.rstrip().splitlines()[-2].startswith(
        f"fail  slide: {slides / 'b.svs'}: cannot be"
    )
    assert fewer.status == 0 and "1 of 2 were tried" in fewer.out
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["counts"]["fail"] == 0 and found["slides"][0]["backend"] == "tifffile"
    assert set(found["findings"][0]) == {"level", "topic", "text", "cure"} and found["versions"]["jax"]
