"""The stages of gastric screening one after the other, over one division of a cohort."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipelines.cohort import Cohort, CohortError, SlideRecord, read_columns, write_cohort
from data_pipelines.exports import write_json, write_table, write_text
from data_pipelines.tiles import Grid
from experiments.run.model import WEIGHTS
from experiments.run.scoring import probability
from experiments.run.screening.blur import blur_stage
from experiments.run.screening.examples import Examples, TiledCohort, tile_cohort
from experiments.run.screening.features import (
    PatchNetwork,
    SlideFeatures,
    keep_features_of,
    patch_scorer,
    read_features,
    write_features,
)
from experiments.run.screening.fitting import Fitter, Stage, Trained
from experiments.run.screening.foreground import foreground_stage, write_pairs
from experiments.run.screening.judging import REVIEWED, JudgedSlides, read_results
from experiments.run.screening.model import PICTURE, GateSpec, ScreeningModel, ScreeningSpec, fresh_screening
from experiments.run.screening.origins import adopt, changed, write_record
from experiments.run.screening.page import render_run
from experiments.run.screening.patch_chain import RESULTS, Network, judged_patches, stands
from experiments.run.screening.refining import MaskFolder, proposals_of
from experiments.run.screening.stages import multitask_stage, screening_stage
from experiments.run.workdir import Workdir, WorkdirError, versions
from srcc_jax.methods.gastric_screening import Config, youden_threshold
from srcc_jax.models.blur import BlurNet
from srcc_jax.models.foreground import ForegroundNet
from srcc_jax.models.layers import init_variables

STAGES = ("refine", "pairs", "foreground", "multitask", "features", "screening", "blur")
SHARED = ("refine", "pairs")  # those that need no splits: once, however many repeats there are
NETWORKS = ("multitask", "screening", "foreground", "blur")


@dataclasses.dataclass
class SlideRun:
    """All stages over a cohort with splits. shared: folder of what does not depend on the splits: masks, tiles and pairs."""

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
        if wanted not in SHARED:
            write_cohort(self.workdir.path / "cohort.csv", self.cohort)
        adopt(self._features_folder, "*.npz", self._fitter.checksums("multitask"))
        adopt(self.workdir.path, RESULTS, self._fitter.checksums(*NETWORKS))
        stages: dict[str, Callable[[], object]] = {
            "refine": self._refine,
            "pairs": self._pairs,
            "foreground": self._foreground,
            "multitask": self._multitask,
            "features": self._features,
            "screening": self._screening,
            "blur": self._blur,
        }
        for name in STAGES if wanted == "all" else (wanted,):
            stages[name]()
            self._tell(name)
        if wanted == "all":
            return self._judge()
        others = changed(self.workdir.path, self._fitter.checksums(*NETWORKS))
        if others and (self.workdir.path / RESULTS).exists():
            print(f"{RESULTS} and {WEIGHTS} are of another {' and '.join(others)} network: --stage=all makes them anew")
        return None

    def _tell(self, name: str) -> None:
        """Which network a stage left."""
        if trained := self._fitter.finished(name) if name in NETWORKS else None:
            numbers = ", ".join(f"{key.replace('_', ' ')} {value:.4g}" for key, value in trained.metrics.items())
            print(f"{name}: {self.workdir.path / name / WEIGHTS}: step {trained.step}, {numbers}", flush=True)

    @property
    def _features_folder(self) -> pathlib.Path:
        return self.workdir.path / "features"

    @property
    def _pairs_folder(self) -> pathlib.Path:
        """Where thumbnails and their masks are: for all repeats, and in runs of older versions in the stage's own folder."""
        own = self.workdir.path / "foreground"
        return own if (own / "tissue").is_dir() else self.shared / "pairs"

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
        found = self._masks.refine(self.cohort.records, positive=self.config.positive, threads=self.threads)
        print(f"refined masks: {len(found)} slides, listed in {self.shared / 'refine.csv'}", flush=True)

    def _pairs(self) -> None:
        print(
            f"pairs: {self._write_pairs()} in {self._pairs_folder}: delete the masks in tissue/ that are wrong",
            flush=True,
        )

    def _write_pairs(self) -> int:
        slides = self.tiled.slides.records
        return write_pairs(self.config, slides, self.tiled.shelf, self._pairs_folder, threads=self.threads)

    def _foreground(self) -> None:
        self._write_pairs()
        stage = foreground_stage(self.config, self.tiled.slides.records, self._pairs_folder)
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
        folder = self._features_folder
        keep_features_of(self._fitter.checksums("multitask"), folder)
        failed = write_features(self.tiled, network, folder, threads=self.threads, stop=self.stop)
        for name, reason in failed.items():
            print(f"no features: {name}: {reason}", flush=True)
        print(f"features: {len(list(folder.glob('*.npz')))} slides in {folder}", flush=True)

    def _slide_features(self) -> tuple[SlideFeatures, np.ndarray]:
        """Of all slides that have them, and the split of each."""
        tiled = self.tiled
        names = [record.slide_id for record in tiled.slides.records]
        found = read_features(self._features_folder, names, tiled.label, self.config)
        network = self._fitter.checksums("multitask")
        if network and changed(self._features_folder, network):
            raise WorkdirError(
                f"{self._features_folder} holds features of another multi-task network than {self.workdir.path / 'multitask'}: run "
                "--stage=features first"
            )
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
        """Writes the model, then looks at the test split; once, whatever is run again, but for networks that are new."""
        networks = self._fitter.checksums(*NETWORKS)
        if stands(self.workdir, networks):
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
        chosen = youden_threshold(validation["label"], probability(validation["logit"]))
        thresholds = {"fixed": self.config.threshold, "validation": chosen}
        self._save(slides, chosen)
        result: dict[str, Any] = {"examples": self._examples()[1].counts(), "thresholds": thresholds}
        if "test" in found:
            result |= self._judged_test(slides, found["test"], thresholds)
            result["largest patch"] = self._largest_patch(slides, found)
        write_json(self.workdir.path / RESULTS, {**result, "settings": self.settings, "versions": versions()})
        write_record(self.workdir.path, networks)
        return result

    def _judged_test(
        self, slides: SlideFeatures, found: Mapping[str, np.ndarray], thresholds: Mapping[str, float]
    ) -> dict[str, Any]:
        judged = JudgedSlides.of(
            self._records_of(slides, found["row"]), found["label"], found["logit"], read_columns(self.table, REVIEWED)
        )
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
            result["patches"] = judged_patches(self._fitter, stage, trained, examples, self.config)
        return result

    def _largest_patch(self, slides: SlideFeatures, found: Mapping[str, Mapping[str, np.ndarray]]) -> dict[str, Any]:
        """The obvious baseline: a slide's score is that of its most malignant patch, the threshold that of the validation slides."""
        validation, test = (
            (each["label"], slides.largest[each["row"]]) for each in (found["validation"], found["test"])
        )
        thresholds = {"validation": youden_threshold(validation[0], probability(validation[1]))}
        judged = JudgedSlides.of(self._records_of(slides, found["test"]["row"]), *test, {})
        return judged.merit(thresholds, seed=self.config.seed)

    def _records_of(self, slides: SlideFeatures, rows: np.ndarray) -> list[SlideRecord]:
        records = {record.slide_id: record for record in self.tiled.slides.records}
        return [records[slides.slide_id[row]] for row in rows]

    def _save(self, slides: SlideFeatures, chosen: float) -> None:
        config = self.config
        trained = {name: found for name in NETWORKS if (found := self._fitter.finished(name))}
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
