"""Arms of mining compared pair by pair: the same seed, the same test patches, another choice of tiles."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from srcc_jax.methods.negative_mining import METRICS
from srcc_jax.metrics import Interval, percentile_interval

RESAMPLES = 2000  # ours
WEAK = "weak"


@dataclasses.dataclass(frozen=True)
class Result:
    """One model on the test patches of its seed. share: of the hard training patches; arm: "weak" or how its tiles were mined; label,
    probability [n]; mined, false_positives: how many."""

    seed: int
    share: float
    arm: str
    alpha: int
    label: np.ndarray
    probability: np.ndarray
    mined: int = 0
    false_positives: int = 0

    def value(self, metric: str) -> float:
        return float(METRICS[metric](self.label, self.probability))


@dataclasses.dataclass(frozen=True)
class Difference:
    """The mean over seeds of arm less other. seeds: how many have both; ahead: in how many of them the arm is better."""

    interval: Interval
    seeds: int
    ahead: int


def paired(results: Iterable[Result], others: Iterable[Result], metric: str, *, seed: int = 0) -> Difference | None:
    """The mean difference of a metric over the seeds that both have, and its 95 % interval; None where there is no such seed.

    Seeds are resampled, and within each the test patches, the same for both models: the interval tells of both.
    """
    theirs = {other.seed: other for other in others}
    pairs = [(result, theirs[result.seed]) for result in results if result.seed in theirs]
    if not pairs:
        return None
    random = np.random.default_rng(seed)
    found, resampled = [], []
    for ours, other in pairs:
        weight = random.multinomial(len(ours.label), np.full(len(ours.label), 1 / len(ours.label)), RESAMPLES)
        both = [METRICS[metric](each.label, each.probability, weight=weight) for each in (ours, other)]
        resampled.append(both[0] - both[1])
        found.append(ours.value(metric) - other.value(metric))
    drawn = random.integers(len(pairs), size=(RESAMPLES, len(pairs)))
    place = random.integers(RESAMPLES, size=drawn.shape)
    means = np.array(resampled)[drawn, place].mean(1)
    known = means[np.isfinite(means)]
    interval = percentile_interval(float(np.mean(found)), known, iterations=RESAMPLES)
    return Difference(interval, len(pairs), int((np.array(found) > 0).sum()))


def grouped(results: Iterable[Result]) -> dict[tuple[float, str, int], list[Result]]:
    """(share, arm, alpha) -> results by seed, in the order of first appearance."""
    groups: dict[tuple[float, str, int], list[Result]] = {}
    for result in results:
        groups.setdefault((result.share, result.arm, result.alpha), []).append(result)
    return groups


def spread(results: Sequence[Result], metric: str) -> str:
    """Mean ± standard deviation over seeds, as the paper gives them; the mean alone of one seed."""
    values = [result.value(metric) for result in results]
    if len(values) < 2:
        return f"{values[0]:.4f}"
    return f"{np.mean(values):.4f} ± {np.std(values, ddof=1):.4f}"


def table_rows(results: Sequence[Result], metrics: Sequence[str]) -> list[list[str]]:
    """A line for each arm: share, arm, α, seeds, tiles mined, then each metric's mean ± sd."""
    rows = []
    for (share, arm, alpha), group in grouped(results).items():
        mined = f"{np.mean([result.mined for result in group]):.0f}" if arm != WEAK else ""
        about = [f"{share:.0%}", arm, str(alpha) if arm != WEAK else "", str(len(group)), mined]
        rows.append([*about, *(spread(group, metric) for metric in metrics)])
    return rows


def difference_rows(
    results: Sequence[Result], pairs: Mapping[str, tuple[str, str]], metrics: Sequence[str]
) -> list[list[str]]:
    """A line for each share, α and pair of arms (name -> arm, other): seeds, then each metric's difference with its interval, and
    in how many seeds it is above 0. The weak arm is that of the share, whatever α."""
    groups = grouped(results)
    shares = list(dict.fromkeys(share for share, _, _ in groups))
    alphas = sorted({alpha for _, arm, alpha in groups if arm != WEAK})
    rows = []
    for share, alpha, (name, (arm, other)) in itertools.product(shares, alphas, pairs.items()):
        found = [
            paired(
                groups.get((share, arm, alpha), []),
                groups.get((share, other, 0 if other == WEAK else alpha), []),
                metric,
            )
            for metric in metrics
        ]
        if found[0] is not None:
            rows.append([f"{share:.0%}", str(alpha), name, str(found[0].seeds), *map(_words, found)])
    return rows


def _words(found: Difference | None) -> str:
    if found is None:
        return "–"
    interval = found.interval
    return f"{interval.value:+.4f} [{interval.low:+.4f}, {interval.high:+.4f}], {found.ahead} of {found.seeds}"
