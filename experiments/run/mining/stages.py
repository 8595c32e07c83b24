"""The stages of hard negative mining on one split: weak model, false positives, features, neighbours, strong models, test."""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from data_pipelines.exports import write_table
from data_pipelines.patch_names import join_patches
from data_pipelines.patches import Patches, PatchesError, PatchReader
from experiments.run.mining.features import ChosenFeatures, FeatureTable
from experiments.run.mining.weak_sets import NEGATIVE, WeakSet
from experiments.run.patch_training import METRIC, PatchTrainer, TrainedPatches
from experiments.run.slide_state import model_hash
from experiments.run.workdir import Workdir
from srcc_jax.kernels.neighbours import nearest
from srcc_jax.methods.negative_mining import (
    Config,
    Union,
    false_positive_rows,
    folds_of,
    random_neighbours,
    random_union,
    split_units,
    union,
)

SPLITS = ("train", "validation", "test")


@dataclasses.dataclass(frozen=True)
class Arm:
    """A way to mine. like: a search whose number of tiles the control `random` takes, so that only which they are differs."""

    query: str
    alpha: int
    like: str | None = None

    @property
    def name(self) -> str:
        return f"{self.query}_{self.alpha}" + (f"_as_{self.like}" if self.like else "")


@dataclasses.dataclass(frozen=True)
class FalsePositives:
    """row int [n] of the hard patches, probability float [n]."""

    row: np.ndarray
    probability: np.ndarray


@dataclasses.dataclass(frozen=True)
class Mined:
    """All neighbours, query by query. weak int [n]: rows of the weak set; query int [n]: of the false positives; rank int [n]; value
    float [n]: distance (l2) or cosine, NaN at random; new bool [n]: no query before had found it, so that it is added."""

    weak: np.ndarray
    query: np.ndarray
    rank: np.ndarray
    value: np.ndarray
    new: np.ndarray


@dataclasses.dataclass
class MiningRun:
    """One split of hard patches (those of `patches`, a split for each) and all models on it, in `folder`. train: the rows trained on;
    None: all of the split. variables: where every fit begins. Raises PatchesError where a split lacks a class."""

    config: Config
    trainer: PatchTrainer
    variables: Mapping[str, Any]
    patches: Patches
    weak_set: WeakSet
    folder: pathlib.Path
    workdir: Workdir
    mesh: Mesh
    train: np.ndarray | None = None

    def __post_init__(self) -> None:
        self.label = self.patches.is_one_of(self.config.positives).astype(int)
        self.rows = {split: self.patches.rows(split) for split in SPLITS}
        for split, rows in self.rows.items():
            _check_classes(split, self.label[rows], self.patches, self.config)
        if self.train is not None:
            self.rows["train"] = self.train
        self.reader = self._reader(self.patches, self.label)

    @functools.cached_property
    def weak(self) -> TrainedPatches:
        """The model of the hard patches alone."""
        return self._fit("weak", self.reader, self.rows["train"], self.rows["validation"])

    @functools.cached_property
    def false_positives(self) -> FalsePositives:
        """Written before they are used."""
        path = self.folder / "false_positives.csv"
        if not path.exists():
            rows, probability = self._judged_negatives()
            chosen = false_positive_rows(self.label[rows], probability, threshold=self.config.threshold)
            rows, probability = rows[chosen], probability[chosen]
            files = [str(self.patches.path[row]) for row in rows]
            columns = {"row": rows, "probability": probability, "path": files, "slide_id": self.patches.slide_id[rows]}
            write_table(path, columns)
        found = _read_columns(path, row=int, probability=float)
        return FalsePositives(found["row"], found["probability"])

    @functools.cached_property
    def candidates(self) -> ChosenFeatures:
        """Features, by the weak model, of the weak tiles that share no patient, slide or file with the validation and test patches."""
        table = self._features
        kept_apart = self.patches.take(np.concatenate([self.rows["validation"], self.rows["test"]]))
        shared = self.weak_set.shared_with(kept_apart)
        if shared.any():
            print(
                f"{shared.sum()} weak tiles are of patients, slides or files of the validation and test: not searched"
            )
        chosen = table.chosen(~shared)
        if not len(chosen.rows):
            raise PatchesError(
                "no weak tile is left to search: all share patients with the validation and test patches"
            )
        return chosen

    @property
    def unreadable(self) -> np.ndarray:
        """Rows int [n] of the weak tiles that have no features."""
        return np.flatnonzero(~self._features.readable)

    def mined(self, arm: Arm) -> Mined:
        """Neighbours of the false positives. Written, with where each is, before they are used."""
        path = self.folder / f"mined_{arm.name}.csv"
        if not path.exists():
            self._write_mined(path, self._search(arm))
        found = _read_columns(path, weak_row=int, query=int, rank=int, value=float, new=int)
        return Mined(found["weak_row"], found["query"], found["rank"], found["value"], found["new"] > 0)

    def strong(self, arm: Arm) -> TrainedPatches:
        """The model of the hard patches and the mined tiles; where none was mined, it is the weak one."""
        tiles = self.mined_patches(arm)
        if not len(tiles):
            return self.weak
        reader = self._with(tiles)
        rows = np.concatenate([self.rows["train"], len(self.patches) + np.arange(len(tiles))])
        return self._fit(f"strong_{arm.name}", reader, rows, self.rows["validation"])

    def mined_patches(self, arm: Arm) -> Patches:
        """The mined tiles as patches in files."""
        mined = self.mined(arm)
        return self.tile_files(mined.weak[mined.new])

    def tile_files(self, rows: np.ndarray) -> Patches:
        """Weak tiles of these rows int [n] as patches in files; those of slides are cut once, for all runs of the work directory."""
        return self.weak_set.files(rows, self.workdir.path / "mined_tiles")

    def test(self, name: str, trained: Callable[[], TrainedPatches]) -> np.ndarray:
        """float [n]: probabilities of the test patches by a model, NaN where unreadable; looked at once, then read from its file."""
        path = self.folder / f"test_{name}.csv"
        rows = self.rows["test"]
        if not path.exists():
            probability = self.trainer.probabilities(trained().variables, self.reader, rows)[:, 1]
            files = [str(self.patches.path[row]) for row in rows]
            write_table(path, {"path": files, "label": self.label[rows], "probability": probability})
        return _read_columns(path, probability=float)["probability"]

    def leaked(self, arm: Arm) -> tuple[np.ndarray, np.ndarray]:
        """Label and probability [n] of the test patches of the released code: mined tiles are added before the split, so that they are
        in the validation and the test, too, and hard slides change places. Splits that were given count for nothing."""
        path = self.folder / f"test_leaked_{arm.name}.csv"
        if not path.exists():
            reader = self._with(self.mined_patches(arm))
            split = split_units(reader.patches.unit, seed=self.config.seed)
            train, validation, test = (np.flatnonzero(split == name) for name in SPLITS)
            fitted = self._fit(f"leaked_{arm.name}", reader, train, validation)
            probability = self.trainer.probabilities(fitted.variables, reader, test)[:, 1]
            write_table(path, {"label": reader.target[test].astype(int), "probability": probability})
        found = _read_columns(path, label=int, probability=float)
        return found["label"], found["probability"]

    @functools.cached_property
    def _features(self) -> FeatureTable:
        digest = hashlib.sha256(
            f"{self.weak_set.digest} {model_hash(self.trainer.architecture, self.weak.variables)}".encode()
        )
        width = self.weak.variables["params"]["classifier"]["kernel"].shape[0]
        table = FeatureTable(self.folder / "features", len(self.weak_set), width, digest.hexdigest()[:16])
        table.fill(self.weak_set.parts, functools.partial(self.weak_set.features, self.weak.variables))
        return table

    def _judged_negatives(self) -> tuple[np.ndarray, np.ndarray]:
        """Rows in which false positives are looked for, and their probabilities."""
        if self.config.false_positives == "validation":
            rows = self.rows["validation"]
            return rows, self.trainer.probabilities(self.weak.variables, self.reader, rows)[:, 1]
        rows = self.rows["train"]
        fold = folds_of(self.patches.unit[rows], self.config.folds, seed=self.config.seed)
        probability = np.full(len(rows), np.nan)
        for number in range(self.config.folds):
            inner, outer = rows[fold != number], fold == number
            _check_classes(f"inner train (fold {number})", self.label[inner], self.patches, self.config)
            fitted = self._fit(f"fold_{number}", self.reader, inner, self.rows["validation"])
            probability[outer] = self.trainer.probabilities(fitted.variables, self.reader, rows[outer])[:, 1]
        return rows, probability

    def _search(self, arm: Arm) -> Mined:
        queries, seed = len(self.false_positives.row), self.config.seed
        if not queries:
            nothing = np.zeros(0, int)
            return Mined(nothing, nothing, nothing, np.zeros(0), nothing > 0)
        count = len(self.candidates.rows)
        if arm.like:
            size = int(self.mined(Arm(arm.like, arm.alpha)).new.sum())
            drawn = random_union(queries, count, size=size, seed=seed)
            everyone = np.ones(len(drawn.row), bool)
            return Mined(
                self.candidates.rows[drawn.row], drawn.query, drawn.rank, np.full(len(drawn.row), np.nan), everyone
            )
        if arm.query == "random":
            index = random_neighbours(queries, count, alpha=arm.alpha, seed=seed)
            value = np.full(index.shape, np.nan)
        else:
            asked = self.trainer.features(self.weak.variables, self.reader, self.false_positives.row)
            found = nearest(asked, self.candidates, k=arm.alpha, metric=arm.query, mesh=self.mesh)
            index, value = found.index, found.value
        query, rank = np.divmod(np.arange(index.size), index.shape[1])
        return Mined(
            self.candidates.rows[index.ravel()], query, rank, value.ravel(), _first_places(union(index), index.shape)
        )

    def _write_mined(self, path: pathlib.Path, mined: Mined) -> None:
        queries = self.false_positives.row[mined.query] if len(mined.query) else mined.query
        columns: dict[str, Any] = {
            "query": mined.query,
            "query_path": [str(self.patches.path[row]) for row in queries],
            "rank": mined.rank,
            "value": mined.value,
            "new": mined.new.astype(int),
            "weak_row": mined.weak,
            **self.weak_set.places(mined.weak),
        }
        write_table(path, columns)

    def _with(self, tiles: Patches) -> PatchReader:
        """The hard patches, then the mined tiles, which are negative."""
        tiles = dataclasses.replace(tiles, label=np.full(len(tiles), NEGATIVE))
        return self._reader(join_patches([self.patches, tiles]), np.append(self.label, np.zeros(len(tiles), int)))

    def _reader(self, patches: Patches, label: np.ndarray) -> PatchReader:
        return PatchReader(patches, label.astype(np.float32), self.config.tile)

    def _fit(self, name: str, reader: PatchReader, train: np.ndarray, validation: np.ndarray) -> TrainedPatches:
        stage = f"{self.folder.name}/{name}"

        def log(step: int, row: dict[str, float]) -> None:
            self.workdir.log(stage, step, row)
            if METRIC in row:
                print(f"{stage} step {step}: validation loss {row[METRIC]:.4f}", flush=True)

        return self.trainer.fit(
            self.variables,
            reader,
            train=train,
            validation=validation,
            folder=self.folder / name,
            seed=self.config.seed,
            log=log,
        )


def _first_places(found: Union, shape: tuple[int, ...]) -> np.ndarray:
    """bool [n], of neighbours query by query: where each was found first."""
    first = np.zeros(shape, bool)
    first[found.query, found.rank] = True
    return first.ravel()


def _check_classes(split: str, label: np.ndarray, patches: Patches, config: Config) -> None:
    counts = {"negative": int((label == 0).sum()), "positive": int(label.sum())}
    missing = [kind for kind, count in counts.items() if not count]
    if missing:
        labels = ", ".join(sorted(set(patches.label.tolist())))
        raise PatchesError(
            f"no {' and no '.join(missing)} hard patch in the {split} split; labels are {labels}: say with --positive which are "
            "positive, give another --seed, or more patches"
        )


def _read_columns(path: pathlib.Path, **types: type) -> dict[str, np.ndarray]:
    """Columns of a table that `write_table` wrote; an empty cell is NaN."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: np.array([row[name] or "nan" for row in rows], np.str_).astype(kind) for name, kind in types.items()}
