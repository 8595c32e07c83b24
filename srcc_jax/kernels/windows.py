"""The sliding-window kernel: windows are cut out of super-tiles on the device and go through a network a few at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

# On CPU few windows at a time stay in cache; an accelerator wants many.
_CHUNK = {"cpu": 2}
_ACCELERATOR_CHUNK = 128

WindowFn = Callable[[Any, jax.Array], Any]
"""(variables, windows uint8 [c, tile, tile, 3]) -> a pytree of arrays [c, ...], each row a function of its own window."""


def make_window_fn(fn: WindowFn, *, tile: int, mesh: Mesh, chunk: int | None = None) -> Callable[..., Any]:
    """Compiles `fn` over the windows of a batch: (variables, image, window, count) -> a pytree of arrays [M, ...].

    image uint8 [b, S, S, 3]: super-tiles; window int32 [M, 3]: (super-tile, top, left) in pixels; count: how many leading
    windows are real. Rows from `count` on are 0. The windows are dealt out over the devices of the mesh in turn, and only the real ones
    are computed, `chunk` at a time, so that padding costs nothing and another count does not compile again.
    """
    devices = mesh.size
    chunk = chunk or _CHUNK.get(mesh.devices.flat[0].platform, _ACCELERATOR_CHUNK)

    def one_device(variables: Any, image: jax.Array, window: jax.Array, count: jax.Array) -> Any:
        windows, mine = window[0], count[0]

        def cut(place: jax.Array) -> jax.Array:
            return lax.dynamic_slice(image, (place[0], place[1], place[2], 0), (1, tile, tile, 3))[0]

        # Under jit its trace serves twice, for the shapes and in the loop: a deep network takes a second.
        @functools.partial(jax.jit, inline=True)
        def score(variables: Any, pixels: jax.Array) -> Any:
            return fn(variables, pixels)

        def compute(begin: jax.Array | int) -> Any:
            return score(variables, jax.vmap(cut)(lax.dynamic_slice_in_dim(windows, begin, chunk)))

        def body(turn: jax.Array, results: Any) -> Any:
            begin = turn * chunk
            real = begin + jnp.arange(chunk) < mine

            def put(result: jax.Array, new: jax.Array) -> jax.Array:
                new = jnp.where(real.reshape(-1, *[1] * (new.ndim - 1)), new, 0)
                return lax.dynamic_update_slice_in_dim(result, new, begin, 0)

            return jax.tree.map(put, results, compute(begin))

        shapes = jax.eval_shape(compute, 0)
        empty = jax.tree.map(lambda s: jnp.zeros((len(windows), *s.shape[1:]), s.dtype), shapes)
        results = lax.fori_loop(0, -(-mine // chunk), body, empty)
        return jax.tree.map(lambda result: result[None], results)

    def all_devices(variables: Any, image: jax.Array, window: jax.Array, count: jax.Array) -> Any:
        total = len(window)
        each = -(-total // (devices * chunk)) * chunk
        dealt = jnp.pad(window, ((0, each * devices - total), (0, 0))).reshape(each, devices, 3).swapaxes(0, 1)
        counts = (count - jnp.arange(devices) + devices - 1) // devices
        spread = jax.shard_map(
            one_device, mesh=mesh, in_specs=(P(), P(), P("data"), P("data")), out_specs=P("data"), check_vma=False
        )
        results = spread(variables, image, dealt, counts)
        return jax.tree.map(lambda r: r.swapaxes(0, 1).reshape(each * devices, *r.shape[2:])[:total], results)

    return jax.jit(all_devices)
