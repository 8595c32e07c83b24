"""The runs behind the screening part of RESULTS.md: networks on GlaS, the whole chain on a mosaic cohort, both gates.

    python -m experiments.screening_study --workdir=runs/screening --glas=glas --patches=<train/<class>, test/<class>> \\
        --slide=slide.tiff --slide_tissue=tissue.png

Every network is trained by the command that a user runs, one row after the other; a study that was cut off goes on with the first row
that is not finished, inside it. table.md is written after each row.
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from absl import flags

from data_pipelines.cohort import read_cohort
from data_pipelines.exports import write_json, write_text
from data_pipelines.lesion_masks import read_mask
from data_pipelines.mosaics import MosaicPlan, folder_patches
from data_pipelines.slides import open_slide
from data_pipelines.synthetic import mosaic_cohort
from experiments.run.program import UsageError, command, run, start_devices
from experiments.run.screening.blur import focus_reader
from experiments.run.screening.examples import tile_cohort
from experiments.run.screening.gates import ForegroundFinder, blur_by_radius, tissue_agreement, turning_radius
from experiments.run.screening.glas import write_glas
from experiments.run.screening.judging import read_results
from experiments.run.screening.model import ScreeningModel
from experiments.run.screening.tables import (
    SCREENING_COLUMNS,
    SEGMENTATION_COLUMNS,
    row_name,
    screening_rows,
    segmentation_row,
    spread,
)
from srcc_jax.methods.gastric_screening import Config
from srcc_jax.report import markdown_table

_WORKDIR = flags.DEFINE_string("workdir", None, "folder for patches, cohort, runs and the table", required=True)
_GLAS = flags.DEFINE_string("glas", None, "folder of GlaS images with Grade.csv; none: without these rows")
_PATCHES = flags.DEFINE_string(
    "patches", None, "folder train/<class> and test/<class> for the mosaic cohort; none: without"
)
_POSITIVE = flags.DEFINE_list("positive_classes", ["AC"], "classes of patches that make a slide malignant")
_SLIDE = flags.DEFINE_string("slide", None, "a slide to find the tissue of; none: without this row")
_TISSUE = flags.DEFINE_string("slide_tissue", None, "its mask of tissue (PNG)")
_MPP_OVERRIDE = flags.DEFINE_float("mpp_override", 0.5, "µm per pixel of that slide, where it does not say it")
_GLAS_MODELS = flags.DEFINE_list("glas_models", ["dla", "dla_dcn", "fcn", "unet"], "networks trained on GlaS")
_MOSAIC_MODELS = flags.DEFINE_list(
    "mosaic_models", ["dla_dcn", "dla", "dla_single", "resnet34"], "rows of Table 1 on the mosaic cohort"
)
_GLAS_EPOCHS = flags.DEFINE_integer("glas_epochs", 40, "epochs of each network on GlaS (the paper: 100)")
_MOSAIC_EPOCHS = flags.DEFINE_integer("mosaic_epochs", 10, "epochs of each network on the mosaic cohort")
_SLIDES = flags.DEFINE_list(
    "slides", ["16", "16", "6", "6", "16", "16"], "positive and negative slides of the three splits"
)

LABELS = ("malignant", "benign")
MPP = 0.5  # of the mosaic's slides
REDUCE, SIDE = 3, 128  # GlaS at a third of its scale (1.9 µm per pixel), in crops that take seconds on two cores
RADII_UM = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
GLAS: dict[str, object] = {"tile": SIDE, "multitask_batch": 8, "repeats": 4}
# A patch is 224 px of level 0, a tile 256: a malignant tile is a fifth tumour. Slides of some thirty tiles have a top 8, not a top 64.
MOSAIC: dict[str, object] = {
    "tile": 128, "stride": 128, "mpp": 1.0, "min_lesion": 0.2, "top_k": 8, "screening_epochs": 30, "screening_batch": 4,
    "thumbnail": 256, "foreground_batch": 8, "foreground_epochs": 30, "blur_side": 128, "blur_epochs": 10,
}  # fmt: skip


@dataclasses.dataclass
class Study:
    """What is known so far, in one folder. found: "glas" and "mosaic", model -> numbers of merit of its repeats; "gates"."""

    workdir: pathlib.Path
    found: dict[str, Any] = dataclasses.field(default_factory=dict)

    def glas(self) -> None:
        """The networks on GlaS; trains what is not finished."""
        listing = write_glas(pathlib.Path(str(_GLAS.value)), self.workdir / "glas", reduce=REDUCE, side=SIDE)
        for model in _GLAS_MODELS.value:
            self._row("glas", model, patches=listing, multitask_epochs=_GLAS_EPOCHS.value, **GLAS)

    def mosaic(self, cohort: pathlib.Path) -> None:
        """The whole chain on the mosaic cohort; trains what is not finished."""
        for model in _MOSAIC_MODELS.value:
            self._row("mosaic", model, cohort=cohort, multitask_epochs=_MOSAIC_EPOCHS.value, **MOSAIC)

    def _row(self, kind: str, model: str, **values: object) -> None:
        folder = self.workdir / "runs" / f"{kind}_{model}"
        if not (folder / "summary.json").exists():
            command("gastric_screening", workdir=folder, model=model, **values)
        self.found.setdefault(kind, {})[model] = read_results(folder / "summary.json")["repeats"]
        self.write()

    def gates(self, cohort: pathlib.Path) -> None:
        """The blur gate of the first model on the cohort's test slides, and its foreground network on a slide with known tissue."""
        name = _MOSAIC_MODELS.value[0]
        model = ScreeningModel.load(self.workdir / "runs" / f"mosaic_{name}")
        config = Config(**{**MOSAIC, "model": name, "blur_patches": 24})  # type: ignore[arg-type]
        cache = self.workdir / "gates" / "tiles"
        tiled = tile_cohort(read_cohort(cohort).split("test"), {}, config, cache=cache, mpp_override=None, threads=2)
        reader = focus_reader(tiled, config, RADII_UM)
        blur = blur_by_radius(model.variables["blur"], reader, reader.radius_um, np.arange(len(reader.tile)))
        found: dict[str, Any] = {"blur": blur, "turning radius in µm": turning_radius(blur)}
        if _SLIDE.value:
            finder = ForegroundFinder(model.variables["foreground"], model.gates)
            with open_slide(_SLIDE.value, mpp_override=_MPP_OVERRIDE.value) as slide:
                found["tissue"] = tissue_agreement(finder, slide, read_mask(str(_TISSUE.value)))
        write_json(self.workdir / "gates.json", found)
        self.found["gates"] = found
        self.write()

    def write(self) -> None:
        """table.md with all that is known."""
        text: list[str] = []
        for title, columns, rows in self._tables():
            if rows:
                text += [f"## {title}", "", markdown_table(rows, columns)]
        write_text(self.workdir / "table.md", "\n".join(text))
        print(self.workdir / "table.md", flush=True)

    def _tables(self) -> Iterator[tuple[str, Sequence[str], list[list[Any]]]]:
        """(title, columns, rows) of each table."""
        glas, mosaic, gates = (self.found.get(name, {}) for name in ("glas", "mosaic", "gates"))
        columns = (*SEGMENTATION_COLUMNS, "average precision of patches", "ROC AUC of patches")
        yield "GlaS: glands, and benign or malignant", columns, [_glas_row(*row) for row in glas.items()]
        slides = [row for model, found in mosaic.items() for row in screening_rows(row_name(model), found)]
        yield "Mosaic cohort, slides", SCREENING_COLUMNS, slides
        dense = [segmentation_row(row_name(model), found) for model, found in mosaic.items()]
        yield "Mosaic cohort, lesion", SEGMENTATION_COLUMNS, [row for row in dense if row]
        for name, title in (("blur", "Blur gate by radius of defocus"), ("tissue", "Tissue of the slide")):
            rows = gates.get(name, [])
            keys = list(dict.fromkeys(key for row in rows for key in row))
            yield title, keys, [[row.get(key, "") for key in keys] for row in rows]


def _glas_row(model: str, repeats: list[dict[str, Any]]) -> list[str]:
    segmentation = segmentation_row(row_name(model), repeats)
    if segmentation is None:
        raise UsageError(f"--glas_models={model} gives no map of pixels: give networks that do")
    areas = [spread([found["patches"][name].value for found in repeats]) for name in ("average precision", "ROC AUC")]
    return [*segmentation, *areas]


def make_cohort(folder: pathlib.Path) -> pathlib.Path:
    """The mosaic cohort, written once."""
    if (folder / "cohort.csv").exists():
        return folder / "cohort.csv"
    patches = folder_patches(str(_PATCHES.value), seed=0)
    counts = [int(number) for number in _SLIDES.value]
    return mosaic_cohort(
        folder,
        patches=patches,
        positive_classes=_POSITIVE.value,
        negative_classes=[name for name in sorted(patches["train"]) if name not in _POSITIVE.value],
        slides={split: (counts[2 * n], counts[2 * n + 1]) for n, split in enumerate(("train", "validation", "test"))},
        mpp=MPP,
        plan=MosaicPlan(tissue_patches=(24, 32), positive_fraction=(0.05, 0.25)),
        labels=LABELS,
        workers=2,
    )


def main() -> None:
    """Runs what is not finished."""
    if not (_GLAS.value or _PATCHES.value):
        raise UsageError("give --glas, --patches or both: there is nothing to run")
    if bool(_SLIDE.value) != bool(_TISSUE.value):
        raise UsageError("--slide and --slide_tissue belong together")
    study = Study(pathlib.Path(_WORKDIR.value).absolute())
    if _PATCHES.value:
        cohort = make_cohort(study.workdir / "cohort")
        study.mosaic(cohort)
        start_devices()
        study.gates(cohort)
    if _GLAS.value:
        study.glas()


if __name__ == "__main__":
    run(main)
