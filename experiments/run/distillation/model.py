"""A finished model of reverse distillation on disk: weights.npz with teacher, bottleneck and student, and model.json, the card."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Mapping
from typing import Any

import flax.traverse_util

from data_pipelines.weights import WeightsError, read_weights
from experiments.run.model import LAYOUT, WEIGHTS, check, checksum, flatten, read_card, write
from experiments.run.workdir import WorkdirError
from srcc_jax.methods.reverse_distillation import Teacher
from srcc_jax.models import distillation, zoo
from srcc_jax.models.distillation import DistillationArchitecture
from srcc_jax.models.layers import variable_shapes
from srcc_jax.models.teachers import cut

KIND = "reverse distillation"


@dataclasses.dataclass(frozen=True)
class DistillationModel:
    """variables: {"params", "batch_stats"} of bottleneck and student, and "teacher". tile, mpp: side in pixels and µm per pixel of
    a patch as the networks see it. positive: the label that high scores mean. thresholds: name -> lowest score of a patch that is
    called positive. slide_threshold: lowest map value that counts in a slide's score. about: where it comes from."""

    teacher: Teacher
    student: DistillationArchitecture
    variables: Mapping[str, Any]
    tile: int
    mpp: float
    positive: str
    thresholds: Mapping[str, float]
    slide_threshold: float
    about: Mapping[str, Any]

    def save(self, folder: pathlib.Path) -> None:
        """Writes both files into the work directory."""
        flat = flatten(self.variables)
        fields = ("tile", "mpp", "positive", "thresholds", "slide_threshold", "about")
        card = {
            "kind": KIND,
            "teacher": self.teacher.as_dict(),
            "student": self.student.as_dict(),
            "layout": LAYOUT,
            "checksum": checksum(flat, self.teacher.as_dict(), self.student.as_dict()),
            **{name: getattr(self, name) for name in fields},
        }
        write(folder, flat, card)

    @classmethod
    def load(cls, folder: str | pathlib.Path) -> DistillationModel:
        """What `save` wrote. Raises WorkdirError where there is no such model, or card and weights do not belong together."""
        folder = pathlib.Path(folder)
        card = read_card(folder)
        if card.get("kind") != KIND:
            raise WorkdirError(f"{folder} holds no model of {KIND}: train one with experiments.reverse_distillation")
        try:
            teacher = cut(zoo.from_dict(card["teacher"]))
            student = DistillationArchitecture.from_dict(card["student"])
            flat = read_weights(folder / WEIGHTS)
            check(flat, lambda: _shapes(teacher, student), card, networks=("teacher", "student"))
            rest = {field.name: card[field.name] for field in dataclasses.fields(cls) if field.name in card}
            variables = flax.traverse_util.unflatten_dict(dict(flat), sep="/")
            return cls(**{**rest, "teacher": teacher, "student": student, "variables": variables})
        except (KeyError, TypeError, ValueError, WeightsError) as error:
            raise WorkdirError(f"{folder} holds a model this version cannot read: {error}") from error


def _shapes(teacher: Teacher, student: DistillationArchitecture) -> dict[str, Any]:
    maps = distillation.map_shapes(student, side=8)
    ours = variable_shapes(distillation.build(student), *maps)
    return {**ours, "teacher": variable_shapes(zoo.build(teacher))}
