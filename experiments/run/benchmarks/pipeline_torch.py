"""Torch pipelines over the tiles of one slide: whole processes that `pipeline_peers` starts and measures.

The file is run by itself, in environments that have nothing of ours. Its only argument is a job as JSON: `kind`, `slide` and
`slide_mpp`, `tiles` (CSV: u, v in model pixels, x, y in level-0 pixels), `tile`, `stride`, `mpp`, `batch`, `workers`, `out`, and what
its kind needs besides. It leaves x,y,probability in `out`, and how fast it was in .json beside it.
"""

from __future__ import annotations

import collections
import csv
import itertools
import json
import os
import pathlib
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_BLOCK = 8  # tiles along a region that is read at once

Job = Mapping[str, Any]


class Pace:
    """Tiles a second from the end of the first batch to the end of the last: without start-up and compilation."""

    def __init__(self) -> None:
        self._done: list[tuple[float, int]] = []

    def batch(self, tiles: int) -> None:
        """A batch of so many tiles is done now."""
        self._done.append((time.perf_counter(), tiles))

    @property
    def rate(self) -> float:
        """0 where there was one batch only."""
        (began, _), (ended, _) = self._done[0], self._done[-1]
        tiles = sum(count for _, count in self._done[1:])
        return tiles / (ended - began) if tiles else 0.0


def read_tiles(path: str | os.PathLike) -> dict[str, list[int]]:
    """The columns u, v, x, y of a table of tiles, in whole pixels."""
    with open(path, newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return {name: [round(float(row[name])) for row in rows] for name in ("u", "v", "x", "y")}


def write_results(out: str, tiles: Mapping[str, Sequence[int]], probability: Iterable[float], pace: Pace) -> None:
    """The table of probabilities, one for each tile in their order, and the pace beside it."""
    with open(out, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["x", "y", "probability"])
        writer.writerows(zip(tiles["x"], tiles["y"], probability, strict=True))
    pathlib.Path(out).with_suffix(".json").write_text(json.dumps({"tiles_per_second": pace.rate}))


def batches_of(tiles: Mapping[str, Sequence[int]], *, stride: int, batch: int) -> list[list[int]]:
    """Rows of the tiles in batches of neighbours: 8 tiles wide, and as many high as the batch has room for."""
    width, height = _BLOCK * stride, max(1, batch // _BLOCK) * stride
    place = [(v // height, u // width, v, u) for u, v in zip(tiles["u"], tiles["v"])]
    rows = sorted(range(len(place)), key=place.__getitem__)
    return [rows[first : first + batch] for first in range(0, len(rows), batch)]


class Windows:
    """Reads batches of tiles with OpenSlide, at the level whose scale is the model's; one handle for all threads."""

    def __init__(self, job: Job, tiles: Mapping[str, Sequence[int]]):
        import openslide

        self._slide = openslide.OpenSlide(job["slide"])
        self._tiles, self._side, self._batch = tiles, job["tile"], job["batch"]
        scale = job["mpp"] / job["slide_mpp"]
        self._level = min(
            range(self._slide.level_count), key=lambda level: abs(self._slide.level_downsamples[level] - scale)
        )

    def __call__(self, rows: Sequence[int]) -> Any:
        """uint8 [batch, tile, tile, 3]; what no row asks for is 0. Neighbours come out of one region, where that is smaller."""
        import numpy as np

        side, pixels = self._side, np.zeros((self._batch, self._side, self._side, 3), np.uint8)
        u, v, x, y = (np.asarray([self._tiles[name][row] for row in rows]) for name in ("u", "v", "x", "y"))
        width, height = (int(np.ptp(starts)) + side for starts in (u, v))
        if width * height <= len(rows) * side**2:
            region = self._read(x.min(), y.min(), width, height)
            for number, (left, top) in enumerate(zip(u - u.min(), v - v.min())):
                pixels[number] = region[top : top + side, left : left + side]
        else:
            for number, at in enumerate(zip(x, y)):
                pixels[number] = self._read(*at, side, side)
        return pixels

    def _read(self, x: int, y: int, width: int, height: int) -> Any:
        import numpy as np

        return np.asarray(self._slide.read_region((int(x), int(y)), self._level, (width, height)))[..., :3]


def trace(job: Job) -> None:
    """EfficientNet-B1 of torchvision, normalisation included, traced and frozen into `weights`: done once, and not measured."""
    import torch

    torchvision = _torchvision()

    class Scorer(torch.nn.Module):
        mean: torch.Tensor
        scale: torch.Tensor

        def __init__(self) -> None:
            super().__init__()
            self.network = torchvision.models.efficientnet_b1(num_classes=1)
            self.register_buffer("mean", 255 * torch.tensor(MEAN).reshape(1, 3, 1, 1))
            self.register_buffer("scale", 1 / (255 * torch.tensor(STD).reshape(1, 3, 1, 1)))

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            return self.network((image.float() - self.mean) * self.scale)[:, 0].sigmoid()

    scorer: Any = Scorer().eval()
    scorer.to(memory_format=torch.channels_last)
    image = torch.zeros(job["batch"], job["tile"], job["tile"], 3, dtype=torch.uint8).permute(0, 3, 1, 2)
    with torch.no_grad():
        torch.jit.freeze(torch.jit.trace(scorer, image, check_trace=False)).save(job["weights"])


def frozen(job: Job) -> None:
    """The frozen TorchScript, channels last, while threads read ahead. Neither torchvision nor timm is imported."""
    tiles, pace = read_tiles(job["tiles"]), Pace()
    probability = [0.0] * len(tiles["x"])
    batches = batches_of(tiles, stride=job["stride"], batch=job["batch"])
    with ThreadPoolExecutor(job["workers"]) as pool:
        ready = _ahead(pool, Windows(job, tiles), batches, ahead=2 * job["workers"])
        import torch  # while the first tiles are read

        torch.set_num_threads(len(os.sched_getaffinity(0)))
        network = torch.jit.load(job["weights"])
        if job["optimize"]:
            network = torch.jit.optimize_for_inference(network)
        with torch.inference_mode():
            for rows, pixels in zip(batches, ready):
                scored = network(torch.from_numpy(pixels).permute(0, 3, 1, 2)).tolist()
                for row, value in zip(rows, scored):  # the last batch is filled up with zeros
                    probability[row] = value
                pace.batch(len(rows))
    write_results(job["out"], tiles, probability, pace)


def _ahead(pool: ThreadPoolExecutor, read: Windows, batches: Iterable[list[int]], *, ahead: int) -> Iterator[Any]:
    """read(batch) of each batch in order, at most `ahead` of them early. The first are begun at once."""
    remaining = iter(batches)
    pending = collections.deque(pool.submit(read, rows) for rows in itertools.islice(remaining, ahead))

    def results() -> Iterator[Any]:
        while pending:
            done = pending.popleft().result()
            pending.extend(pool.submit(read, rows) for rows in itertools.islice(remaining, 1))
            yield done

    return results()


def tiatoolbox(job: Job) -> None:
    """PatchPredictor with timm's network, over the given tiles in place of its own; with `tuned`, channels last."""
    import torch

    _torchvision()
    from tiatoolbox.models.architecture.vanilla import TimmModel
    from tiatoolbox.models.engine.io_config import IOPatchPredictorConfig
    from tiatoolbox.models.engine.patch_predictor import PatchPredictor

    tiles, pace = read_tiles(job["tiles"]), Pace()
    probability: list[float] = []

    class Scorer(TimmModel):
        @staticmethod
        def infer_batch(model: Any, batch_data: torch.Tensor, device: str = "cpu") -> Any:
            if job["tuned"]:
                with torch.inference_mode():
                    output = model.eval()(batch_data.permute(0, 3, 1, 2).float()).numpy()  # channels last as it comes
            else:
                output = TimmModel.infer_batch(model, batch_data, device)
            pace.batch(len(output))
            probability.extend(output[:, 1].tolist())
            return output

    class GivenTiles(PatchPredictor):
        def get_dataloader(self, **settings: Any) -> Any:
            loader = super().get_dataloader(**settings)
            ends = ([start + job["tile"] for start in tiles[axis]] for axis in ("u", "v"))
            loader.dataset.inputs = [list(box) for box in zip(tiles["u"], tiles["v"], *ends)]
            return loader

    model = Scorer("efficientnet_b1", num_classes=2, pretrained=False)
    if job["tuned"]:
        for module in (model.feat_extract, model.classifier):  # the model's own `to` knows devices only
            module.to(memory_format=torch.channels_last)
    predictor = GivenTiles(model, batch_size=job["batch"], num_workers=job["workers"], verbose=False)
    predictor.run(
        [job["slide"]],
        patch_mode=False,
        ioconfig=IOPatchPredictorConfig(
            input_resolutions=[{"units": "mpp", "resolution": job["mpp"]}],
            patch_input_shape=(job["tile"], job["tile"]),
            stride_shape=(job["stride"], job["stride"]),
        ),
        auto_get_mask=False,
        wsireader_kwargs={"mpp": (job["slide_mpp"], job["slide_mpp"]), "power": 10 / job["slide_mpp"]},
        return_probabilities=True,
        save_dir=pathlib.Path(job["out"]).with_suffix(""),
        output_type="zarr",
    )
    write_results(job["out"], tiles, probability, pace)


def _torchvision() -> Any:
    """torchvision. Beside torch's CPU build a wheel for CUDA lacks its operators, of which only the names are needed."""
    import torch

    try:
        import torchvision
    except RuntimeError:
        _torchvision.library = torch.library.Library("torchvision", "DEF")  # type: ignore[attr-defined]
        for operator in ("nms", "qnms"):
            _torchvision.library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[attr-defined]
        import torchvision
    return torchvision


if __name__ == "__main__":
    given = json.loads(sys.argv[1])
    {"trace": trace, "frozen": frozen, "tiatoolbox": tiatoolbox}[given["kind"]](given)
