"""Layers that the networks share: convolution with BatchNorm and activation, stochastic depth, and BatchNorm folding.

Arrays are NHWC. Parameters and running statistics are float32; a layer computes in the type of the array it is given.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from srcc_jax.kernels.convolution import Padding, conv, depthwise_conv, pointwise_conv
from srcc_jax.models.architecture import Conventions

_FRESH = {"scale": 1, "bias": 0, "mean": 0, "var": 1}
TRUNCATED_STD = 0.87962566103423978  # standard deviation of a standard normal cut off at ±2


def explicit_padding(convention: str, size: Sequence[int], kernel: int, stride: int) -> Padding:
    """((top, bottom), (left, right)) in pixels for a k×k convolution of an image of `size` (height, width).

    "same": as many outputs as n / stride rounded up, an odd pixel of padding going to the bottom and right.
    "symmetric": (kernel - 1) // 2 on every side whatever the size. At stride 1 both are equal.
    """

    def one(length: int) -> tuple[int, int]:
        if convention == "symmetric":
            return (kernel - 1) // 2, (kernel - 1) // 2
        total = max((-(-length // stride) - 1) * stride + kernel - length, 0)
        return total // 2, total - total // 2

    return one(size[0]), one(size[1])


def kernel_std(shape: tuple[int, ...]) -> float:
    """Standard deviation of a fresh convolution kernel HWIO, as EfficientNet's authors have it: sqrt(2 / fan-out).

    A kernel with one input channel is depthwise: each channel feeds one output, so its fan-out is the window alone.
    """
    height, width, inputs, outputs = shape
    return math.sqrt(2 / (height * width * (1 if inputs == 1 else outputs)))


def _draw_kernel(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return kernel_std(shape) / TRUNCATED_STD * jax.random.truncated_normal(key, -2, 2, shape, dtype)


class Conv(nn.Module):
    """Convolution [B, H, W, C] -> [B, H', W', features], kernel HWIO (depthwise: [k, k, 1, C], features = C)."""

    features: int
    size: int = 1
    stride: int = 1
    padding: str = "same"
    depthwise: bool = False
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        inputs = 1 if self.depthwise else x.shape[-1]
        shape = (self.size, self.size, inputs, self.features)
        kernel = self.param("kernel", _draw_kernel, shape, jnp.float32).astype(x.dtype)
        padding = explicit_padding(self.padding, x.shape[1:3], self.size, self.stride)
        if self.depthwise:
            x = depthwise_conv(x, kernel, stride=self.stride, padding=padding)
        elif self.size == self.stride == 1:
            x = pointwise_conv(x, kernel)
        else:
            x = conv(x, kernel, stride=self.stride, padding=padding)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            x = x + _per_channel(bias).astype(x.dtype)
        return x


class BatchNorm(nn.Module):
    """Batch normalisation over all axes but the last; statistics and arithmetic in float32.

    train: normalises with the mean and the biased variance of the batch and moves the running statistics towards them;
    else normalises with the running statistics. torch's running variance collects the unbiased batch variance
    (`bn_unbiased`), Keras's and flax.linen.BatchNorm's the biased one. Under jit with a batch sharded over devices the
    statistics are those of the global batch.
    """

    conventions: Conventions

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        shape = (x.shape[-1],)
        scale = self.param("scale", nn.initializers.ones, shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, shape, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, shape, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, shape, jnp.float32)
        mean, var = running_mean.value, running_var.value
        if train:
            mean, var = _moments(x)
            if not self.is_initializing():
                keep, count = self.conventions.bn_momentum, math.prod(x.shape[:-1])
                sample_var = var * (count / max(count - 1, 1)) if self.conventions.bn_unbiased else var
                running_mean.value = keep * running_mean.value + (1 - keep) * mean
                running_var.value = keep * running_var.value + (1 - keep) * sample_var
        factor = scale * lax.rsqrt(var + self.conventions.bn_epsilon)
        return (x * _per_channel(factor) + _per_channel(bias - mean * factor)).astype(x.dtype)


class ConvNorm(nn.Module):
    """Convolution without bias, BatchNorm, activation: [B, H, W, C] -> [B, H', W', features].

    folded: the parameters are those that `fold_batch_norm` makes, a convolution with bias. Inference only.
    """

    features: int
    conventions: Conventions
    activation: Callable[[jax.Array], jax.Array] | None = None
    size: int = 1
    stride: int = 1
    depthwise: bool = False
    folded: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if self.folded and train:
            raise ValueError("BatchNorm folded into the weights cannot be trained: build the network with folded=False")
        padding = self.conventions.padding
        x = Conv(self.features, self.size, self.stride, padding, self.depthwise, self.folded, name="conv")(x)
        if not self.folded:
            x = BatchNorm(self.conventions, name="norm")(x, train=train)
        return x if self.activation is None else self.activation(x)


class SqueezeExcite(nn.Module):
    """Gates each channel with two dense layers of the map's mean (Hu et al. 2018): [B, H, W, C] -> the same shape."""

    width: int
    activation: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        squeezed = x.mean((1, 2), keepdims=True)
        squeezed = self.activation(Conv(self.width, use_bias=True, name="reduce")(squeezed))
        return x * nn.sigmoid(Conv(x.shape[-1], use_bias=True, name="expand")(squeezed))


class DropPath(nn.Module):
    """Stochastic depth (Huang et al. 2016): drops a whole sample's branch with probability `rate`, scales the kept ones.

    x [B, ...] -> the same shape. Draws from the "dropout" stream; the identity where not training.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if not train or self.rate == 0:
            return x
        kept = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, (x.shape[0], *(1,) * (x.ndim - 1)))
        return jnp.where(kept, x / (1 - self.rate), 0)


def variable_shapes(model: nn.Module, image: tuple[int, int, int, int] = (1, 32, 32, 3)) -> dict[str, Any]:
    """The network's variables as jax.ShapeDtypeStructs. image: any shape [B, H, W, C] that the network accepts."""
    inputs = jax.ShapeDtypeStruct(image, jnp.float32)
    return jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), inputs)


def init_variables(model: nn.Module, key: jax.Array) -> dict[str, Any]:
    """Fresh variables of a network made of these layers, from the same distributions as `model.init`. Not to be traced.

    All convolution kernels come from one draw: XLA takes a quarter of a second to compile each draw, and `model.init` asks
    for one per kernel (23 s for EfficientNet-B1).
    """
    shapes = flatten_dict(variable_shapes(model))
    size = sum(leaf.size for path, leaf in shapes.items() if path[-1].endswith("kernel") and leaf.ndim == 4)
    draw = np.asarray(jax.random.truncated_normal(key, -2, 2, (size,)))
    variables, start = {}, 0
    for path, leaf in shapes.items():
        if not path[-1].endswith("kernel"):
            values = np.full(leaf.shape, _FRESH[path[-1]], np.float32)
        elif leaf.ndim == 4:
            values = kernel_std(leaf.shape) / TRUNCATED_STD * draw[start : start + leaf.size].reshape(leaf.shape)
            start += leaf.size
        else:
            values = np.asarray(nn.initializers.glorot_uniform()(jax.random.fold_in(key, start), leaf.shape))
        variables[path] = jnp.asarray(values)
    return unflatten_dict(variables)


def fold_batch_norm(variables: Mapping[str, Any], *, epsilon: float) -> dict[str, Any]:
    """Variables {"params", "batch_stats"} -> {"params"} with each BatchNorm folded into the convolution before it.

    For the same network built with folded=True, in eval mode. epsilon is the architecture's `bn_epsilon`.
    """

    def fold(params: Mapping[str, Any], stats: Mapping[str, Any]) -> dict[str, Any]:
        if "norm" in params:
            norm, running = params["norm"], stats["norm"]
            factor = norm["scale"] * lax.rsqrt(running["var"] + epsilon)
            kernel = params["conv"]["kernel"] * _per_channel(factor)
            return {"conv": {"kernel": kernel, "bias": norm["bias"] - running["mean"] * factor}}
        return {
            name: fold(child, stats.get(name, {})) if isinstance(child, Mapping) else child
            for name, child in params.items()
        }

    return {"params": fold(variables["params"], variables["batch_stats"])}


def _moments(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean and biased variance [C] over all axes but the last.

    The variance has no gradient through its mean (deviations sum to 0), so none is computed.
    """
    axes = tuple(range(x.ndim - 1))
    mean = x.mean(axes, dtype=jnp.float32)
    return mean, jnp.square(x - _per_channel(lax.stop_gradient(mean))).mean(axes)


def _per_channel(values: jax.Array) -> jax.Array:
    """[C] -> [1, 1, 1, C], to be combined with NHWC arrays or with kernels."""
    return values.reshape(1, 1, 1, -1)
