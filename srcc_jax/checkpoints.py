"""The checkpoints of one run in one folder: written whole or not at all, each with the metrics of its evaluation."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping
from typing import Any, Self

import jax
import jax.numpy as jnp


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found, or read into this model; says which, where and what to do."""


class Checkpoints:
    """A folder of checkpoints, one per step. A context manager; all processes of a run open it together.

    directory: an absolute path, made if it is missing, unless read_only.
    read_only: for a look into a run that may be going on: nothing is made, and no half-written rest cleaned away.
    Raises CheckpointError for a folder that cannot be used.
    """

    def __init__(self, directory: str, *, read_only: bool = False) -> None:
        # Here, as programs that only predict do without it; in Orbax 0.12.8 v1 is an attribute: `import ...v1` does not find it.
        from orbax.checkpoint import v1 as ocp

        folder = ocp.path.Path(directory)
        if not folder.is_absolute():
            raise CheckpointError(f"the folder of checkpoints must be an absolute path, not {directory}")
        if read_only and not folder.is_dir():
            raise CheckpointError(f"no checkpoints at {directory}: there is no such folder")
        context = ocp.Context()
        context.pytree.loading.partial_load = True  # `restore` reads parts, and checks structures itself
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._orbax = ocp.training.Checkpointer(folder, context=context, cleanup_tmp_directories=not read_only)
        except OSError as error:
            raise CheckpointError(f"cannot keep checkpoints in {directory}: {error}") from error
        self.directory = directory

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._orbax.close()

    @property
    def metrics(self) -> dict[int, dict[str, float]]:
        """The metrics kept with every step, in the order of the steps.

        A deletion cut short by a kill leaves a rest without metrics; it is never the latest step, nor the best.
        """
        return {saved.step: saved.metrics or {} for saved in self._orbax.checkpoints}

    @property
    def latest(self) -> int | None:
        """The last step saved, None if there is none."""
        return max(self.metrics, default=None)

    def save(self, step: int, state: Any, metrics: Mapping[str, float], *, keep: Collection[int] = ()) -> None:
        """Write a pytree of arrays with its metrics, wait until they are there, then delete all steps not in `keep`.

        Raises CheckpointError when it cannot be written (disk full, say); the earlier ones are then still there.
        """
        try:
            with _without_tracebacks():
                self._orbax.save(step, state, metrics=dict(metrics), force=True)
        except (OSError, ValueError) as error:  # a full disk is a ValueError of tensorstore
            with contextlib.suppress(OSError, ValueError), _without_tracebacks():
                self._orbax.wait()  # raises the same once more, here rather than at the next save or close
            reason = str(error).splitlines()[0]
            raise CheckpointError(
                f"cannot write the checkpoint of step {step} in {self.directory}: {reason}. "
                "Make room or choose another work directory; the earlier checkpoints are untouched"
            ) from error
        for old in self.metrics.keys() - {step, *keep}:
            self._orbax.delete(old)

    def resume(self, state: Any) -> Any:
        """The latest checkpoint, like `state`; or `state` itself where there is none yet."""
        return state if self.latest is None else self.restore(state, self.latest)

    def restore(self, like: Any, step: int) -> Any:
        """The checkpoint of a step with the structure, types and shardings of `like`.

        like: a tree as it was saved, or a dict of some of its top-level names, as {"params": ..., "stats": ...}.
        Raises CheckpointError that names the steps there are, or the first arrays that differ from `like`.
        """
        if step not in self.metrics:
            raise CheckpointError(f"no checkpoint of step {step} in {self.directory}; there are {list(self.metrics)}")
        wanted, saved = _forms(like), _forms(self._orbax.metadata(step).metadata)
        parts = {path.split("/")[0] for path in wanted}
        wrong = [
            f"{path} is {saved.get(path, 'absent')} in the checkpoint and {wanted.get(path, 'absent')} in the model"
            for path in sorted(saved.keys() | wanted.keys())
            if path.split("/")[0] in parts and saved.get(path) != wanted.get(path)
        ]
        if wrong:
            raise CheckpointError(
                f"the checkpoint of step {step} in {self.directory} is of another model: {'; '.join(wrong[:3])} "
                f"({len(wrong)} arrays differ). Give the model it was trained with, or an empty work directory"
            )
        return self._orbax.load(step, like)


def _forms(tree: Any) -> dict[str, str]:
    """As "float32[3, 3, 1, 32]", by path, what every leaf (an array or a description of one) looks like on disk."""

    def form(leaf: Any) -> str:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.eval_shape(jax.random.key_data, leaf)
        return f"{leaf.dtype}{list(leaf.shape)}"

    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): form(leaf) for path, leaf in leaves}


@contextlib.contextmanager
def _without_tracebacks() -> Iterator[None]:
    """Orbax logs a failed write many times over, a thousand lines in all, before it raises it: the raise is enough."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
