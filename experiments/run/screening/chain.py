"""The stages of gastric screening one after the other, over one division of a cohort, or of a list of patches."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipelines.cohort import Cohort, CohortError, read_columns, write_cohort
from data_pipelines.exports import write_json, write_table, write_text
from data_pipelines.patches import Patches
from data_pipelines.tiles import Grid
from experiments.run.screening.blur import blur_stage
from experiments.run.screening.examples import Examples, TiledCohort, listed_examples, tile_cohort
from experiments.run.screening.features import PatchNetwork, SlideFeatures, patch_scorer, read_features, write_features
from experiments.run.screening.fitting import Fitter, Stage, Trained
from experiments.run.screening.foreground import foreground_stage
from experiments.run.screening.judging import REVIEWED, JudgedSlides, judge_patches, read_results
from experiments.run.screening.model import PICTURE, GateSpec, ScreeningModel, ScreeningSpec, fresh_screening
from experiments.run.screening.page import render_run
from experiments.run.screening.refining import MaskFolder, proposals_of
from experiments.run.screening.stages import multitask_stage, screening_stage
from experiments.run.workdir import Workdir, versions
from srcc_jax.methods.gastric_screening import Config, youden_threshold
from srcc_jax.models.architecture import Architecture
from srcc_jax.models.blur import BlurNet
from srcc_jax.models.foreground import ForegroundNet
from srcc_jax.models.layers import init_variables

STAGES = ("refine", "foreground", "multitask", "features", "screening", "blur")
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
        if (self.workdir.path / RESULTS).exists():
            return read_results(self.workdir.path / RESULTS)
        architecture, variables = self.network
        examples = listed_examples(self.listing, self.patches, self.config)
        examples.check()
        fitter = Fitter(self.config, self.mesh, self.workdir, self.threads, self.stop)
        stage = multitask_stage(self.config, architecture, examples)
        trained = fitter.trained(stage, variables)
        result = {
            "patches": _judged_patches(fitter, stage, trained, examples, self.config),
            "examples": examples.counts(),
        }
        write_json(self.workdir.path / RESULTS, {**result, "step": trained.step, "versions": versions()})
        return result


@dataclasses.dataclass
class SlideRun:
    """All stages over a cohort with splits. shared: folder of what does not depend on the splits: masks and tiles."""

    config: Config
    network: Network
    mesh: Mesh
    workdir: Workdir
    shared: pathlib.Path
    cohort: Cohort
    table: pathlib.Path
    settings: Mapping[str, Any]
    mpp_override: float | None
    threads: int
    stop: Callable[[], bool]

    def __post_init__(self) -> None:
        self._fitter = Fitter(self.config, self.mesh, self.workdir, self.threads, self.stop)
        proposals = proposals_of(self.table)
        self._masks = MaskFolder(self.shared / "masks", self.config.mask_mpp, self.mpp_override, proposals)
        self._tiled: TiledCohort | None = None

    def run(self, wanted: str) -> dict[str, Any] | None:
        """Does one stage, or all of them, and judges the test split where that is what is left to do: then its numbers of merit."""
        write_cohort(self.workdir.path / "cohort.csv", self.cohort)
        stages: dict[str, Callable[[], object]] = {
            "refine": self._refine,
            "foreground": self._foreground,
            "multitask": self._multitask,
            "features": self._features,
            "screening": self._screening,
            "blur": self._blur,
        }
        for name in STAGES if wanted == "all" else (wanted,):
            stages[name]()
        return self._judge() if wanted == "all" else None

    @property
    def tiled(self) -> TiledCohort:
        """The slides with their tiles and the lesion on these."""
        if self._tiled is None:
            self._tiled = tile_cohort(
                self.cohort,
                self._masks.masks(self.cohort.records),
                self.config,
                cache=self.shared / "tiles",
                mpp_override=self.mpp_override,
                threads=self.threads,
            )
        return self._tiled

    def _refine(self) -> None:
        found = self._masks.refine(self.cohort.records, threads=self.threads)
        print(f"refined masks: {len(found)} slides, listed in {self.shared / 'refine.csv'}", flush=True)

    def _foreground(self) -> None:
        folder, slides = self.workdir.path / "foreground", self.tiled
        stage = foreground_stage(self.config, slides.slides.records, slides.shelf, folder, threads=self.threads)
        self._fitter.trained(stage, init_variables(ForegroundNet(), self._key(2), PICTURE))

    def _examples(self) -> tuple[Stage, Examples]:
        examples = self.tiled.examples()
        examples.check()
        return multitask_stage(self.config, self.network[0], examples), examples

    def _multitask(self) -> Trained:
        return self._fitter.trained(self._examples()[0], self.network[1])

    def _features(self) -> None:
        trained = self._fitter.finished("multitask")
        if trained is None:
            raise CohortError(f"{self.workdir.path} holds no multi-task network yet: run --stage=multitask first")
        scorer = patch_scorer(self.network[0], tile=self.config.tile, mesh=self.mesh)
        network = PatchNetwork(scorer, scorer.fold(trained.variables))
        folder = self.workdir.path / "features"
        failed = write_features(self.tiled, network, folder, threads=self.threads, stop=self.stop)
        for name, reason in failed.items():
            print(f"no features: {name}: {reason}", flush=True)

    def _slide_features(self) -> tuple[SlideFeatures, np.ndarray]:
        """Of all slides that have them, and the split of each."""
        tiled = self.tiled
        names = [record.slide_id for record in tiled.slides.records]
        found = read_features(self.workdir.path / "features", names, tiled.label, self.config)
        split = {record.slide_id: str(record.split) for record in tiled.slides.records}
        return found, np.asarray([split[name] for name in found.slide_id])

    def _screening(self) -> Trained:
        slides, splits = self._slide_features()
        fresh = fresh_screening(self.config.width, slides.features.shape, self._key(3))
        return self._fitter.trained(screening_stage(self.config, slides, splits), fresh)

    def _blur(self) -> None:
        self._fitter.trained(blur_stage(self.config, self.tiled), init_variables(BlurNet(), self._key(4), PICTURE))

    def _key(self, purpose: int) -> jax.Array:
        return jax.random.fold_in(jax.random.key(self.config.seed), purpose)

    def _judge(self) -> dict[str, Any]:
        """Writes the model, then looks at the test split; once, whatever is run again."""
        if (self.workdir.path / RESULTS).exists():
            return read_results(self.workdir.path / RESULTS)
        slides, splits = self._slide_features()
        stage = screening_stage(self.config, slides, splits)
        trained = self._screening()
        found = {
            split: self._fitter.judged(stage, trained.variables, np.flatnonzero(splits == split))
            for split in ("validation", "test")
            if (splits == split).any()
        }
        validation = found["validation"]
        chosen = youden_threshold(validation["label"], 1 / (1 + np.exp(-validation["logit"].astype(np.float64))))
        thresholds = {"fixed": self.config.threshold, "validation": chosen}
        self._save(slides, chosen)
        result: dict[str, Any] = {"examples": self._examples()[1].counts(), "thresholds": thresholds}
        if "test" in found:
            result |= self._judged_test(slides, found["test"], thresholds)
        write_json(self.workdir.path / RESULTS, {**result, "settings": self.settings, "versions": versions()})
        return result

    def _judged_test(
        self, slides: SlideFeatures, found: Mapping[str, np.ndarray], thresholds: Mapping[str, float]
    ) -> dict[str, Any]:
        records = {record.slide_id: record for record in self.tiled.slides.records}
        chosen = [records[slides.slide_id[row]] for row in found["row"]]
        judged = JudgedSlides.of(chosen, found["label"], found["logit"], read_columns(self.table, REVIEWED))
        write_table(self.workdir.path / "slides.csv", judged.table(thresholds))
        merit = judged.merit(thresholds, seed=self.config.seed)
        failed = [f"{record.slide_id}: {reason}" for record, reason in self.tiled.slides.failed]
        page = render_run(judged, merit, self.workdir, self.settings, failed=failed)
        write_text(self.workdir.path / "report.html", page)
        result: dict[str, Any] = {"slides": merit}
        result["sites"] = judged.sites(self.config.threshold)
        result["errors"] = judged.errors(self.config.threshold)
        stage, examples = self._examples()
        if len(examples.rows["test"]):
            trained = self._multitask()
            result["patches"] = _judged_patches(self._fitter, stage, trained, examples, self.config)
        return result

    def _save(self, slides: SlideFeatures, chosen: float) -> None:
        config, names = self.config, ("multitask", "screening", "foreground", "blur")
        trained = {name: found for name in names if (found := self._fitter.finished(name))}
        variables = {"patches" if n == "multitask" else n: found.variables for n, found in trained.items()}
        spec = ScreeningSpec(config.top_k, slides.features.shape[-1], config.width, config.threshold, chosen)
        gates = GateSpec(config.thumbnail, config.thumbnail_mpp, config.blur_side, config.blur_radius)
        about = {
            "name": f"gastric screening, {config.model}",
            "steps": {name: found.step for name, found in trained.items()},
            "validation": {name: dict(found.metrics) for name, found in trained.items()},
            "settings": dict(self.settings),
            "versions": versions(),
        }
        grid = Grid(tile=config.tile, stride=config.stride, mpp=config.mpp)
        model = ScreeningModel(self.network[0], variables, grid, config.min_tissue, config.positive, spec, gates, about)
        model.save(self.workdir.path)


def _judged_patches(
    fitter: Fitter, stage: Stage, trained: Trained, examples: Examples, config: Config
) -> dict[str, Any]:
    found = fitter.judged(stage, trained.variables, examples.rows["test"])
    return judge_patches(found, examples.unit[found["row"]], seed=config.seed)
