"""Features of patches in the plane by t-SNE, one panel for each model, as in Figure 5 of Lee et al. 2023."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

import numpy as np

from data_pipelines.files import atomic_write

PERPLEXITY, ITERATIONS = 50, 500  # Lee et al. 2023, Methods
MOST_POINTS = 4000  # ours: drawn, and laid out, for a figure that can still be read
# ours: colour, marker, area in points², from what lies below to what lies above
STYLES: dict[str, tuple[str, str, float]] = {
    "searched": ("#d5d8de", "o", 5),
    "negative": ("#3aa6b9", "o", 9),
    "positive": ("#d1495b", "o", 9),
    "mined": ("#e08e0b", "^", 22),
    "false positive": ("#1d2733", "*", 60),
}
_OTHER = ("#7a5bc4", "s", 9)


@dataclasses.dataclass(frozen=True)
class Panel:
    """What a model makes of N patches: features float [N, D], kind str [N]; those of STYLES have colours of their own."""

    title: str
    features: np.ndarray
    kind: np.ndarray


def drawn_rows(kind: np.ndarray, *, seed: int, most: int = MOST_POINTS) -> np.ndarray:
    """Rows int [n], ascending, of kinds str [N] for a figure: of each kind all, or an even share of `most` points, at random.

    What a small kind leaves of its share is divided among the larger ones.
    """
    names, counts = np.unique(kind, return_counts=True)
    taken, room = {}, most
    for turn, place in enumerate(np.argsort(counts, kind="stable")):
        taken[names[place]] = min(counts[place], room // (len(names) - turn))
        room -= taken[names[place]]
    random = np.random.default_rng(seed)
    rows = [random.choice(np.flatnonzero(kind == name), taken[name], replace=False) for name in names]
    return np.sort(np.concatenate(rows))


def embed(features: np.ndarray, *, seed: int) -> np.ndarray:
    """float32 [N, 2]: t-SNE of features float [N, D], which begins from the first two principal components.

    With fewer than 151 points the perplexity is a third of their number. ValueError for fewer than four points, or NaN.
    """
    from sklearn.manifold import TSNE

    if len(features) < 4:
        raise ValueError(f"t-SNE needs at least four points, there are {len(features)}")
    perplexity = min(PERPLEXITY, (len(features) - 1) / 3)
    return TSNE(perplexity=perplexity, max_iter=ITERATIONS, init="pca", random_state=seed).fit_transform(features)


def draw_embeddings(path: str | os.PathLike, panels: Sequence[Panel], *, seed: int) -> None:
    """Writes a PNG of the panels beside each other. Panels of the same patches show the same ones where `drawn_rows` chose them."""
    from matplotlib.artist import Artist
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.2 * len(panels), 5.4), layout="constrained", dpi=150)
    labels: dict[str, Artist] = {}
    for axes, panel in zip(np.atleast_1d(figure.subplots(1, len(panels))), panels, strict=True):
        places = embed(panel.features, seed=seed)
        for kind, (colour, marker, area) in _styles(panel.kind).items():
            of_kind = places[panel.kind == kind]
            labels[kind] = axes.scatter(
                of_kind[:, 0], of_kind[:, 1], s=area, c=colour, marker=marker, linewidths=0.2, edgecolors="white"
            )
        axes.set(title=panel.title, xticks=[], yticks=[], aspect="equal", adjustable="datalim")
    figure.legend(list(labels.values()), list(labels), loc="outside lower center", ncols=len(labels), frameon=False)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})


def _styles(kind: np.ndarray) -> Mapping[str, tuple[str, str, float]]:
    """Those of the kinds that are there, in the order in which they are drawn."""
    there = set(kind.tolist())
    others = sorted(there - set(STYLES))
    return {**dict.fromkeys(others, _OTHER), **{name: STYLES[name] for name in STYLES if name in there}}
