"""Settings: bounds, flags made of them, and the work directory that holds a run to them."""

import dataclasses
import errno
import json
import os
import subprocess
import sys

import pytest
from absl import flags

from data_pipelines.files import OutputError
from experiments.run.program import UsageError
from experiments.run.settings import config_from_flags, define_flags
from experiments.run.workdir import Workdir, WorkdirError, file_hash
from srcc_jax.methods.slide_classification import Config
from srcc_jax.settings import check_settings, setting


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    way: str = setting("left", "which way", choices=("left", "right"))
    name: str = setting("n", "a name")
    steps: int = setting(3, "how many", least=1)
    rate: float = setting(0.5, "how fast", above=0, most=1)
    momentum: float | None = setting(None, "none: the source's", least=0, below=1)
    fast: bool = setting(True, "or slow")

    def __post_init__(self):
        check_settings(self)


def parsed(config, *line):
    values = flags.FlagValues()
    define_flags(config, values)
    values(["program", *line])
    return values


def test_flags_have_the_types_defaults_choices_and_help_of_the_fields():
    values = parsed(Sample)
    assert config_from_flags(Sample, values) == Sample()
    kinds = {name: values[name].flag_type() for name in ("way", "name", "steps", "rate", "momentum", "fast")}
    wanted = ("string enum", "string", "int", "float", "float", "bool")
    assert tuple(kinds.values()) == wanted and values["way"].parser.enum_values == ["left", "right"]
    assert values["rate"].help == "how fast" and values["momentum"].value is None


def test_the_command_line_decides():
    line = ("--way=right", "--steps=7", "--rate=1e-3", "--momentum=0.9", "--nofast", "--name=x")
    found = config_from_flags(Sample, parsed(Sample, *line))
    assert found == Sample(way="right", name="x", steps=7, rate=1e-3, momentum=0.9, fast=False)


@pytest.mark.parametrize("line", ["--way=up", "--steps=1.5", "--rate=fast", "--steps="])
def test_values_of_another_kind_are_refused(line):
    with pytest.raises(flags.IllegalFlagValueError, match=line[2:6]):
        parsed(Sample, line)


def test_values_out_of_bounds_are_named_together():
    line = ("--steps=0", "--rate=1.5", "--momentum=1")
    with pytest.raises(UsageError) as error:
        config_from_flags(Sample, parsed(Sample, *line))
    assert str(error.value) == (
        "--steps=0 must be at least 1; --rate=1.5 must be at most 1; --momentum=1.0 must be below 1"
    )


@pytest.mark.parametrize(
    "values, message",
    [
        ({"rate": 0.0}, "--rate=0.0 must be above 0"),
        ({"rate": float("nan")}, "--rate=nan must be a finite number"),
        ({"momentum": -0.1}, "--momentum=-0.1 must be at least 0"),
        ({"way": "up"}, "--way=up must be one of left, right"),
    ],
)
def test_bounds_hold_without_flags_too(values, message):
    with pytest.raises(ValueError, match=message):
        Sample(**values)


def test_unknown_bounds_are_a_mistake_of_the_programmer():
    with pytest.raises(TypeError, match="greatest"):
        setting(1, "", greatest=2)


def test_every_number_of_the_paper_is_a_flag_with_help_and_its_default():
    values = parsed(Config)
    for field in dataclasses.fields(Config):
        assert values[field.name].default == field.default
        assert len(field.metadata["help"]) > 10
    assert config_from_flags(Config, values) == Config()
    paper = {"tile": 224, "stride": 112, "batch": 32, "tiles_per_slide": 40, "top_k": 1, "buffer": 128, "patience": 10}
    assert {name: values[name].default for name in paper} == paper


@pytest.mark.parametrize(
    "line",
    [
        "--tile=0", "--stride=-1", "--mpp=-1", "--mpp=0", "--mpp=inf", "--min_tissue=1.5", "--min_annotated=-0.1", "--top_k=0",
        "--tiles_per_slide=0", "--buffer=0", "--batch=-32", "--learning_rate=-1", "--decay=0", "--decay_epochs=0",
        "--adam_b1=1", "--adam_b2=-1", "--adam_epsilon=0", "--frozen_epochs=-1", "--patience=0", "--max_epochs=0",
        "--dropout=1", "--drop_path=-0.1", "--bn_momentum=2", "--translation=-1", "--brightness=-1", "--contrast=1",
        "--saturation=2", "--hue=-1", "--seed=-1",
    ],
)  # fmt: skip
def test_nonsense_is_refused_by_the_name_of_its_flag(line):
    with pytest.raises(UsageError, match=line.partition("=")[0] + "=.* must be"):
        config_from_flags(Config, parsed(Config, line))


def test_settings_that_do_not_fit_together_are_refused_by_name():
    with pytest.raises(UsageError, match=r"--stride=300 is larger than --tile=224"):
        config_from_flags(Config, parsed(Config, "--stride=300"))
    with pytest.raises(UsageError, match=r"--buffer=100 must be a multiple of --top_k=1 and of --batch=32"):
        config_from_flags(Config, parsed(Config, "--buffer=100"))


# Work directories

SETTINGS = {"mode": "ws", "mpp": 1.0, "seed": 0, "pretrained": None, "cohort": "ab12"}


def test_a_work_directory_goes_on_with_the_same_settings(tmp_path):
    first = Workdir.open(tmp_path / "a" / "b", SETTINGS)
    again = Workdir.open(str(tmp_path / "a" / "b"), dict(reversed(SETTINGS.items())))
    assert first == again and first.path.is_absolute()
    assert sorted(p.name for p in first.path.iterdir()) == [".lock_0", "settings.json"]


def test_a_work_directory_refuses_other_settings_and_names_each(tmp_path):
    Workdir.open(tmp_path, SETTINGS)
    other = {**SETTINGS, "mpp": 0.5, "pretrained": "cd34", "dtype": "float32"}
    with pytest.raises(WorkdirError) as error:
        Workdir.open(tmp_path, other)
    message = str(error.value)
    assert "mpp: 1.0 there, 0.5 asked for" in message and "pretrained: None there, 'cd34' asked for" in message
    assert "dtype: None there, 'float32' asked for" in message
    assert "seed" not in message and "--workdir" in message and "\n" not in message
    assert json.loads((tmp_path / "settings.json").read_text()) == SETTINGS


def test_damaged_settings_are_refused(tmp_path):
    (tmp_path / "settings.json").write_text('{"mode": ')
    with pytest.raises(WorkdirError, match=r"settings\.json is not JSON.*--workdir"):
        Workdir.open(tmp_path, SETTINGS)


def test_a_folder_that_cannot_be_written_is_one_clear_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="a file stands where a folder is needed") as error:
        Workdir.open(tmp_path / "file" / "run", SETTINGS)
    assert "\n" not in str(error.value)
    Workdir.open(tmp_path / "run", SETTINGS)

    def refuse(path):  # as a read-only folder would; root may write anywhere
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr("data_pipelines.files._flush_to_disk", refuse)
    with pytest.raises(OutputError, match=r"run.*Permission denied; give yourself the right"):
        Workdir.open(tmp_path / "run", SETTINGS)  # even where its settings are there already


def test_the_log_keeps_the_later_of_two_lines_and_outlives_a_kill(tmp_path):
    workdir = Workdir.open(tmp_path, SETTINGS)
    assert not workdir.begun
    for loss in (0.5, 0.4):
        workdir.log("fs", 1, {"loss": loss})
    workdir.log("ws", 1, {"loss": 0.1})
    workdir.log("fs", 2, {"loss": 0.3})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"time": 1, "sta')
    assert workdir.begun
    assert [(row["step"], row["loss"]) for row in workdir.history("fs")] == [(1, 0.4), (2, 0.3)]


def test_a_log_that_cannot_be_written_says_so(tmp_path):
    workdir = Workdir.open(tmp_path, SETTINGS)
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(OutputError, match=r"metrics\.jsonl: .*--workdir"):
        workdir.log("fs", 1, {"loss": 0.5})


def test_the_hash_of_a_file_follows_its_content(tmp_path):
    file = tmp_path / "cohort.csv"
    file.write_text("slide_id,path,label\na,a.svs,srcc\n")
    before = file_hash(file)
    assert len(before) == 16 and file_hash(file) == before
    file.write_text("slide_id,path,label\na,a.svs,normal\n")
    assert file_hash(file) != before


def test_a_work_directory_belongs_to_one_process_until_it_ends(tmp_path):
    line = f"import sys; from experiments.run.workdir import Workdir; Workdir.open({str(tmp_path)!r}, {{}}); print('open', flush=True); "
    with subprocess.Popen(
        [sys.executable, "-c", line + "sys.stdin.read()"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout.readline() == b"open\n"
        with pytest.raises(WorkdirError, match=f"in use by process {other.pid}"):
            Workdir.open(tmp_path, {})
        other.kill()
    assert Workdir.open(tmp_path, {}).path == Workdir.open(tmp_path, {}).path == tmp_path
