"""What `experiments.doctor` looks at: each check gives findings, and each finding that matters its cure."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from data_pipelines.cohort import SlideRecord
from data_pipelines.files import OutputError, check_writable
from data_pipelines.machine import NETWORK_FILE_SYSTEMS, Machine, disk_free, file_system
from data_pipelines.readers import RegionError, SlideError
from data_pipelines.slide_check import SlideCheck, check_slide

Level = Literal["ok", "note", "slow", "fail"]
GIB = 1 << 30
NEEDED_MEMORY = GIB  # ours: prediction with EfficientNet-B1 peaks at 0.8 GB on CPU
NEEDED_DISK = GIB  # ours: the files of some 200 slides
SLOW_TISSUE_MEGAPIXELS = 200.0  # ours: seconds of decoding for one slide's tissue
_HUGE_PAGES = "glibc.malloc.hugetlb"


@dataclasses.dataclass(frozen=True)
class Finding:
    """level: "ok", "note" (to know), "slow" or "fail" (something would not run). cure: what to do about it, "" for nothing."""

    level: Level
    topic: str
    text: str
    cure: str = ""


def check_devices(machine: Machine, environment: Mapping[str, str]) -> list[Finding]:
    """Which devices JAX has, whether they compute, and whether an accelerator lies idle. Starts JAX's devices."""
    try:
        devices = jax.devices()
        wrong = _miscalculation()
    except RuntimeError as error:
        cure = "unset JAX_PLATFORMS, or install the drivers and requirements-gpu.txt"
        return [Finding("fail", "device", f"JAX cannot start its devices: {str(error).splitlines()[0]}", cure)]
    if wrong:
        return [Finding("fail", "device", wrong, "install the versions of requirements.txt or requirements-gpu.txt")]
    found = [_device(devices)]
    if devices[0].platform == "cpu" and machine.gpus:
        forced = environment.get("JAX_PLATFORMS", "")
        cure = f"unset JAX_PLATFORMS={forced}" if forced else "install requirements-gpu.txt into .venv"
        found.append(Finding("slow", "device", f"{', '.join(machine.gpus)} is here, but JAX computes on the CPU", cure))
    return found


def _miscalculation() -> str:
    """A convolution with a known result: it needs the libraries that the models need. In words what is wrong, "" for nothing."""
    image, kernel = jnp.ones((1, 8, 8, 3), jnp.float32), jnp.ones((3, 3, 3, 4), jnp.float32)
    convolve = jax.jit(
        functools.partial(jax.lax.conv_general_dilated, dimension_numbers=("NHWC", "HWIO", "NHWC")),
        static_argnums=(2, 3),
    )
    found = np.asarray(convolve(image, kernel, (1, 1), "VALID"))
    return (
        ""
        if found.shape == (1, 6, 6, 4) and np.allclose(found, 27)
        else f"a convolution of ones gave {found.flat[0]:g}, not 27"
    )


def _device(devices: Sequence[jax.Device]) -> Finding:
    kind = f"{len(devices)} × {devices[0].platform} ({devices[0].device_kind})"
    memory = devices[0].memory_stats() if devices[0].platform != "cpu" else None
    if not memory:
        return Finding("ok", "device", kind)
    free = memory.get("bytes_limit", 0) - memory.get("bytes_in_use", 0)
    text = f"{kind}, {free / GIB:.1f} GiB free of its memory for JAX"
    if free < NEEDED_MEMORY:
        return Finding("fail", "device", text, "end the other programs on it, or raise XLA_PYTHON_CLIENT_MEM_FRACTION")
    return Finding("ok", "device", text)


def check_processor(machine: Machine, environment: Mapping[str, str], *, on_cpu: bool) -> list[Finding]:
    """Cores, vectors and large pages. on_cpu: the model computes on the CPU, too."""
    cores = f"{machine.usable_cores:g} of {machine.cores} cores may be used"
    if machine.usable_cores <= 1:
        cure = "ask for more (taskset, --cpus-per-task of Slurm, the limits of the container): reading and the model share it"
        found = [Finding("slow", "cores", cores, cure)]
    elif machine.usable_cores < machine.cores:
        found = [
            Finding("note", "cores", cores, "where that is not meant: taskset, --cpus-per-task, the container's limits")
        ]
    else:
        found = [Finding("ok", "cores", cores)]
    if not on_cpu:
        return found
    if machine.cpu_flags and "avx512f" not in machine.cpu_flags:
        text = "this CPU has no AVX-512: the model is slower than the tables of BENCHMARKS.md"
        found.append(Finding("note", "vectors", text, "a newer CPU, or a GPU"))
    return [*found, *_large_pages(machine, environment)]


def _large_pages(machine: Machine, environment: Mapping[str, str]) -> list[Finding]:
    if machine.huge_pages == "never":
        cure = "as root: echo madvise > /sys/kernel/mm/transparent_hugepage/enabled"
        return [Finding("slow", "large pages", "the kernel gives none: training takes a quarter longer", cure)]
    if machine.huge_pages and f"{_HUGE_PAGES}=1" not in environment.get("GLIBC_TUNABLES", ""):
        cure = f"start with GLIBC_TUNABLES={_HUGE_PAGES}=1 in the environment, as the Makefile does"
        return [Finding("slow", "large pages", "not asked for: training takes a quarter longer", cure)]
    return [Finding("ok", "large pages", "asked for")] if machine.huge_pages else []


def check_memory(machine: Machine) -> list[Finding]:
    """Whether the model and its slides fit."""
    if machine.memory_free is None:
        return [Finding("note", "memory", "how much is free is not known on this system")]
    text = f"{machine.memory_free / GIB:.1f} GiB free"
    if machine.memory_free < NEEDED_MEMORY:
        cure = f"end other programs, or ask for more: prediction needs about {NEEDED_MEMORY / GIB:g} GiB"
        return [Finding("fail", "memory", text, cure)]
    return [Finding("ok", "memory", text)]


def check_folder(topic: str, folder: pathlib.Path) -> list[Finding]:
    """Whether results can be written to `folder` (made if it is not there), how much fits, and how near it is."""
    try:
        check_writable(folder)
    except OutputError as error:
        return [Finding("fail", topic, str(error))]
    free = disk_free(folder)
    text = f"{folder}: {free / GIB:.1f} GiB free"
    if free < NEEDED_DISK:
        return [Finding("fail", topic, text, "free space, or write to another disk: a slide's files take about 5 MB")]
    return [Finding("ok", topic, text), *_distance(topic, folder)]


def check_cache(folder: str) -> list[Finding]:
    """folder: --compilation_cache."""
    if not folder:
        cure = "leave --compilation_cache at its default, or name a folder"
        return [Finding("slow", "compilation", "nothing is kept: every start compiles the model again", cure)]
    return check_folder("compilation", pathlib.Path(folder).expanduser())


_OVER_A_NETWORK: dict[str, tuple[Level, str]] = {
    "slides": ("slow", "copy the slides to a local disk, or read with more --threads"),
    "compilation": ("slow", "name a local folder with --compilation_cache"),
    "results": ("note", ""),  # as it has to be where several machines share them
}


def _distance(topic: str, path: pathlib.Path) -> list[Finding]:
    kind = file_system(path)
    if kind not in NETWORK_FILE_SYSTEMS:
        return []
    level, cure = _OVER_A_NETWORK[topic]
    return [Finding(level, topic, f"{path} lies on a network file system ({kind})", cure)]


_WITHOUT = {
    "OpenSlide": Finding(
        "fail",
        "OpenSlide",
        "absent: MRXS, NDPI, SCN, BIF and DICOM are refused, and no fast reader is checked",
        "pip install openslide-python openslide-bin",
    ),
    "cuCIM": Finding(
        "slow",
        "cuCIM",
        "absent: JPEG and JPEG 2000 slides are read by OpenSlide, up to 7 times slower",
        "pip install --no-deps -r requirements-cucim.txt (Linux only)",
    ),
}


def check_readers(readers: Mapping[str, str], *, tensorflow: bool) -> list[Finding]:
    """readers: name -> version, "" where absent (slide_check.reader_versions). tensorflow: whether it is installed."""
    found = [Finding("ok", name, version) if version else _WITHOUT[name] for name, version in readers.items()]
    if not tensorflow:
        found.append(Finding("note", "TensorFlow", "absent: prediction runs, training does not", "make env"))
    return found


def check_slides(
    records: Sequence[SlideRecord], *, mpp_override: float | None, most: int, seed: int
) -> tuple[list[Finding], list[SlideCheck]]:
    """Tries at most `most` slides, evenly spread over `records`: opens each, and compares random regions with a second reader."""
    step = max(1, -(-len(records) // most))
    chosen = records[::step]
    findings, checks = _distance("slides", chosen[0].path), []
    for record in chosen:
        try:
            check = check_slide(record.path, mpp_cohort=record.mpp, mpp_override=mpp_override, seed=seed)
        except (SlideError, RegionError) as error:
            findings.append(Finding("fail", "slide", str(error)))
            continue
        checks.append(check)
        findings.append(_slide(check))
        if check.tissue_megapixels > SLOW_TISSUE_MEGAPIXELS:
            text = f"{check.path}: {check.tissue_megapixels:.0f} megapixels are decoded to find its tissue: it has no small level"
            findings.append(Finding("slow", "slide", text, "convert it to a pyramid (vips tiffsave --tile --pyramid)"))
    if len(chosen) < len(records):
        findings.append(Finding("note", "slides", f"{len(chosen)} of {len(records)} were tried", "--most tries more"))
    return findings, checks


def _slide(check: SlideCheck) -> Finding:
    about = f"{check.path}: {check.backend}, {check.mpp:.4g} µm per pixel from {check.mpp_source}, {check.read_ms:.0f} ms a region"
    if check.unreadable:
        text = f"{len(check.unreadable)} of the tried regions cannot be decoded: {check.unreadable[0]}"
        return Finding("fail", "slide", text, "copy the slide again; as it is, tiles there are missing")
    if not check.agrees:
        text = f"{about}; differs from {check.second} by up to {max(check.differences):.1f} grey values"
        return Finding("fail", "slide", text, "convert the slide, and tell us: its pixels cannot be trusted")
    if not check.differences:
        return Finding("note", "slide", f"{about}; no second reader knows it", "")
    text = f"{about}; {check.second} agrees within {max(check.differences):.1f} grey values on {len(check.differences)} regions"
    return Finding("ok", "slide", text)
