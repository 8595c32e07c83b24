"""What a finished run of hard negative mining found, as negatives for other methods: files for patches, rows for tiles of slides."""

from __future__ import annotations

import csv
import dataclasses
import json
import pathlib
from collections.abc import Mapping

import numpy as np

from data_pipelines.patches import Patches
from experiments.run.program import UsageError
from experiments.run.slides import SlideSet
from experiments.run.workdir import file_hash


@dataclasses.dataclass(frozen=True, eq=False)
class MinedTiles:
    """n tiles, each once. path: of the image file [n]; slide_id str [n]; x, y float [n] of the top-left corner in level-0 px, NaN for
    patches that were not cut from slides; side_um: of a tile; digest: changes with what was mined."""

    path: tuple[pathlib.Path, ...]
    slide_id: np.ndarray
    x: np.ndarray
    y: np.ndarray
    side_um: float
    digest: str

    def __len__(self) -> int:
        return len(self.path)

    def patches(self, *, label: str, apart: Patches) -> Patches:
        """The tiles as training patches of this label, without those of a file or a slide that patches `apart`, the judged ones, are of."""
        files = {path.resolve() for path in apart.path}
        shared = np.isin(self.slide_id, apart.slide_id[apart.slide_id != ""])
        shared |= np.array([path.resolve() in files for path in self.path], bool)
        rows, unknown = np.flatnonzero(~shared), np.full(int((~shared).sum()), "")
        files_kept = tuple(self.path[row] for row in rows)
        return Patches(files_kept, np.full(len(rows), label), self.slide_id[rows], unknown, np.full(len(rows), "train"))


def read_mined(workdir: str) -> MinedTiles:
    """Of the work directory of negative_mining. Raises UsageError where it is not finished, or nothing was mined."""
    folder = pathlib.Path(workdir)
    try:
        settings = json.loads((folder / "metrics.json").read_text())["settings"]
        table = folder / f"seed_{settings['seed']}" / f"mined_{settings['query']}_{settings['alpha']}.csv"
        with open(table, newline="", encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["new"] == "1"]
    except (FileNotFoundError, NotADirectoryError, KeyError, json.JSONDecodeError):
        raise UsageError(f"--mine_negatives={workdir} is no finished work directory of negative_mining") from None
    if not rows:
        raise UsageError(f"--mine_negatives={workdir}: nothing was mined in that run: leave the flag out")
    x, y = (np.array([float(row[name] or "nan") for row in rows]) for name in ("x", "y"))
    cut = folder / "mined_tiles"
    files = tuple(
        cut / f"{row['slide_id']}_{float(row['x']):.0f}_{float(row['y']):.0f}.png"
        if row["x"]
        else pathlib.Path(row["path"])
        for row in rows
    )
    slide_id = np.array([row["slide_id"] for row in rows], np.str_)
    return MinedTiles(files, slide_id, x, y, settings["tile"] * settings["mpp"], file_hash(table))


def rows_on_slides(mined: MinedTiles, slides: SlideSet, negative: np.ndarray) -> Mapping[int, np.ndarray]:
    """Slide number -> rows of its tiles at places that were mined: of a tile and a mined one, the larger holds the other's centre.

    negative bool [S]: slides that may have any. Raises UsageError where none has.
    """
    tiles, found = slides.tiles, {}
    for number, record in enumerate(slides.records):
        places = np.flatnonzero((mined.slide_id == record.slide_id) & np.isfinite(mined.x))
        if not negative[number] or not len(places):
            continue
        rows = slides.rows(number)
        side = tiles.side[rows][:, None]
        mined_side = mined.side_um / (tiles.tile * tiles.mpp) * side
        reach = np.maximum(side, mined_side) / 2
        away = [
            np.abs(at[rows][:, None] + side / 2 - corner[places] - mined_side / 2)
            for at, corner in ((tiles.x, mined.x), (tiles.y, mined.y))
        ]
        found[number] = rows[((away[0] < reach) & (away[1] < reach)).any(1)]
    found = {number: rows for number, rows in found.items() if len(rows)}
    if not found:
        raise UsageError(
            "--mine_negatives: none of the mined tiles lies on a negative slide of the train split: the run must have searched slides "
            "of this cohort, under the same slide_id"
        )
    return found
