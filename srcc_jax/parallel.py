"""Devices and processes: one mesh axis, "data". A batch is split over it by rows; all else is whole on every device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def make_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of these devices (None: of all, in all processes)."""
    devices = jax.devices() if devices is None else list(devices)
    # Auto is not jax's default: over Explicit axes top-k, gathers and dropout of a split batch fail
    return jax.make_mesh((len(devices),), ("data",), axis_types=(AxisType.Auto,), devices=devices)


def by_rows(mesh: Mesh) -> NamedSharding:
    """How a batch lies on the mesh: axis 0 in equal parts, one per device."""
    return NamedSharding(mesh, PartitionSpec("data"))


def whole(mesh: Mesh) -> NamedSharding:
    """How all else lies on the mesh: a copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def put(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """A batch on the devices: of each array [B, ...] this process gives its own rows (see `process_rows`).

    Raises ValueError naming an array whose rows cannot be dealt out evenly.
    """
    devices = mesh.local_mesh.size
    for name, array in batch.items():
        shape = np.shape(array)
        if not shape or shape[0] % devices:
            raise ValueError(
                f"batch[{name!r}] has shape {shape}: its rows cannot be split over {devices} devices; "
                f"pad the batch to a multiple of {devices} rows, with weight 0"
            )
    return {name: jax.make_array_from_process_local_data(by_rows(mesh), array) for name, array in batch.items()}


def replicate(tree: Any, mesh: Mesh) -> Any:
    """Every array of the tree (the same in all processes) whole on every device. It may share memory with the tree."""
    return jax.device_put(tree, whole(mesh))


def process_rows(size: int, mesh: Mesh) -> np.ndarray:
    """Which rows of a global batch of `size` rows this process has to read and `put`: int [size / processes]."""
    if size % mesh.size:
        raise ValueError(f"a batch of {size} rows cannot be split over {mesh.size} devices: choose a multiple of those")
    mine = [device.process_index == jax.process_index() for device in mesh.devices.flat]
    return np.arange(size).reshape(mesh.size, -1)[mine].ravel()


def any_process(flag: bool, mesh: Mesh) -> bool | jax.Array:
    """Whether the flag is up in any process, the same answer in all. It is not waited for; its bool() waits."""
    if jax.process_count() == 1:
        return flag
    return _any(put({"flag": np.full(mesh.local_mesh.size, flag)}, mesh)["flag"])


_any = jax.jit(jnp.any)


def start_distributed(
    coordinator: str | None = None, *, processes: int | None = None, process: int | None = None
) -> None:
    """Join the other processes of this run, before anything else of jax is used.

    coordinator: "host:port" of process 0.  processes: how many.  process: which one this is, from 0.
    All None: found from the cluster (Slurm, Open MPI, Kubernetes, cloud TPU).
    """
    jax.distributed.initialize(coordinator, num_processes=processes, process_id=process)


def set_cpu_devices(count: int) -> None:
    """Split the CPU into this many devices. Raises RuntimeError once jax has started its devices."""
    jax.config.update("jax_num_cpu_devices", count)
