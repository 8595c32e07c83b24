"""The examples in docs/ do what they say: their flags exist, their shards make up the whole, their links lead somewhere."""

import os
import pathlib
import re
import shutil
import subprocess

import pytest
import yaml
from absl import flags

from experiments.run.cohort_summary import shard_of
from tests import programs

DOCS = pathlib.Path(__file__).resolve().parents[1] / "docs"
EXAMPLES = DOCS / "examples"
FLAG = re.compile(r"(?<![\w-])--([a-z][a-z_]*)")

pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="the examples are shell scripts")


def line_of(script, folder, **environment):
    """The arguments that a shell script calls python with."""
    (folder / "python").write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    (folder / "python").chmod(0o755)
    path = f"{folder}{os.pathsep}{os.environ['PATH']}"
    result = subprocess.run(
        ["bash", "-c", script], env={**environment, "PATH": path}, capture_output=True, text=True, check=True
    )
    return result.stdout.split()


def slurm(name, folder, index):
    script = (EXAMPLES / name).read_text()
    first, last = map(int, re.search(r"--array=(\d+)-(\d+)", script).groups())
    numbers = {
        "SLURM_ARRAY_TASK_ID": first + index,
        "SLURM_ARRAY_TASK_COUNT": last - first + 1,
        "SLURM_CPUS_PER_TASK": 8,
    }
    return last - first + 1, line_of(script, folder, **{key: str(value) for key, value in numbers.items()})


def kubernetes(folder, index):
    spec = yaml.safe_load((EXAMPLES / "kubernetes_job.yaml").read_text())["spec"]
    (script,) = spec["template"]["spec"]["containers"][0]["args"]
    return spec["completions"], line_of(script, folder, JOB_COMPLETION_INDEX=str(index))


def flag(line, name):
    return next(word.split("=", 1)[1] for word in line if word.startswith(f"--{name}="))


def test_shards_of_the_examples_are_the_whole_cohort(tmp_path):
    records = list(range(50))
    for run in (lambda index: slurm("slurm_array.sh", tmp_path, index), lambda index: kubernetes(tmp_path, index)):
        count, _ = run(0)
        parts = [shard_of(records, flag(run(index)[1], "shard")) for index in range(count)]
        assert sorted(record for part in parts for record in part) == records


def test_commands_of_the_examples_are_understood(tmp_path):
    lines = [
        slurm("slurm_array.sh", tmp_path, 0)[1],
        slurm("slurm_claim.sh", tmp_path, 0)[1],
        kubernetes(tmp_path, 0)[1],
    ]
    with programs.imported("predict_slides"):
        for line in lines:
            assert line[:2] == ["-m", "experiments.predict_slides"]
            values = flags.FlagValues()
            for name in {word.removeprefix("--").split("=")[0] for word in line[2:]}:
                values[name] = flags.FLAGS[name]  # KeyError: no such flag


def test_flags_named_in_the_docs_exist():
    """Those of our programs; the lines of other programs are in code blocks and named here."""
    others = {"array", "gres", "dependency", "parsable", "wrap"}
    known = set()
    programs_named = (
        "predict_slides",
        "extract_features",
        "doctor",
        "slide_classification",
        "import_weights",
        "export_model",
        "gastric_screening",
        "propose_annotations",
    )
    for module in programs_named:
        with programs.imported(module):
            known |= set(flags.FLAGS)
    for page in DOCS.glob("*.md"):
        named = set(FLAG.findall(page.read_text()))
        assert named <= known | others, page.name


def test_links_of_the_docs_lead_to_files():
    for page in DOCS.glob("*.md"):
        targets = re.findall(r"\]\(([^)#]+)\)", page.read_text())
        assert not [target for target in targets if not (page.parent / target).exists()], page.name
