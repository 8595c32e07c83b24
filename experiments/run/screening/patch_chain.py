"""The multi-task network alone, over a list of patches; and what a run over slides has in common with that."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from data_pipelines.exports import write_json
from data_pipelines.patches import Patches
from experiments.run.screening.examples import Examples, listed_examples
from experiments.run.screening.fitting import Fitter, Stage, Trained
from experiments.run.screening.judging import judge_patches, read_results
from experiments.run.screening.origins import Checksums, adopt, changed, write_record
from experiments.run.screening.stages import multitask_stage
from experiments.run.workdir import Workdir, versions
from srcc_jax.methods.gastric_screening import Config
from srcc_jax.models.architecture import Architecture

RESULTS = "metrics.json"

Network = tuple[Architecture, Mapping[str, Any]]
"""The network of the patches before training: architecture, variables."""


@dataclasses.dataclass
class PatchRun:
    """The multi-task network over a list of patches with splits."""

    config: Config
    network: Network
    mesh: Mesh
    workdir: Workdir
    listing: pathlib.Path
    patches: Patches
    threads: int
    stop: Callable[[], bool]

    def run(self) -> dict[str, Any]:
        """Trains it and judges it on the test patches, unless that is done. Returns the numbers of merit."""
        fitter = Fitter(self.config, self.mesh, self.workdir, self.threads, self.stop)
        adopt(self.workdir.path, RESULTS, fitter.checksums("multitask"))
        if stands(self.workdir, fitter.checksums("multitask")):
            return read_results(self.workdir.path / RESULTS)
        architecture, variables = self.network
        examples = listed_examples(self.listing, self.patches, self.config)
        examples.check()
        stage = multitask_stage(self.config, architecture, examples)
        trained = fitter.trained(stage, variables)
        result = {
            "patches": judged_patches(fitter, stage, trained, examples, self.config),
            "examples": examples.counts(),
        }
        write_json(self.workdir.path / RESULTS, {**result, "step": trained.step, "versions": versions()})
        write_record(self.workdir.path, fitter.checksums("multitask"))
        return result


def stands(workdir: Workdir, networks: Checksums) -> bool:
    """Whether there are results, and of these networks."""
    if not (workdir.path / RESULTS).exists():
        return False
    if others := changed(workdir.path, networks):
        print(f"{workdir.path / RESULTS} is of another {' and '.join(others)} network: judged again", flush=True)
    return not others


def judged_patches(
    fitter: Fitter, stage: Stage, trained: Trained, examples: Examples, config: Config
) -> dict[str, Any]:
    """What the network is worth on the test patches, as `judge_patches` says."""
    found = fitter.judged(stage, trained.variables, examples.rows["test"])
    return judge_patches(found, examples.unit[found["row"]], seed=config.seed)
