"""Layers that the networks share: convolution with BatchNorm and activation, stochastic depth, and BatchNorm folding.

Arrays are NHWC. Parameters and running statistics are float32; a layer computes in the type of the array it is given.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jax import lax

from srcc_jax.kernels.convolution import Padding, conv, conv_transpose, depthwise_conv, pointwise_conv
from srcc_jax.kernels.resize import bilinear_kernel, upsample_transposed
from srcc_jax.models.architecture import Conventions

# Of arrays that are not drawn: their values before training, from their shape.
_FRESH: Mapping[str, Callable[[tuple[int, ...]], np.ndarray]] = {
    "scale": np.ones,
    "bias": np.zeros,
    "mean": np.zeros,
    "var": np.ones,
    "zero_kernel": np.zeros,
    "bilinear_kernel": lambda shape: bilinear_kernel(shape[0] // 2, shape[2]),
}
_BY_FAN_OUT = ("kernel", "transposed_kernel")  # of four dimensions; all others are drawn by fan-in and fan-out together
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


def draw_kernel(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype) -> jax.Array:
    return kernel_std(shape) / TRUNCATED_STD * jax.random.truncated_normal(key, -2, 2, shape, dtype)


def _parameter(module: nn.Module, name: str, draw: nn.initializers.Initializer, shape: tuple[int, ...]) -> jax.Array:
    """As `module.param` in float32. Flax traces `draw` to compare its shape with that of a value that is there already, which
    takes as long as all the rest of tracing a deep network: here only for one that does not fit, for the error that says so."""
    if module.has_variable("params", name):
        value: jax.Array = module.get_variable("params", name)
        if jnp.shape(value) == shape:
            return value
    return module.param(name, draw, shape, jnp.float32)


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
        kernel = _parameter(self, "kernel", draw_kernel, shape).astype(x.dtype)
        padding = explicit_padding(self.padding, x.shape[1:3], self.size, self.stride)
        if self.depthwise:
            x = depthwise_conv(x, kernel, stride=self.stride, padding=padding)
        elif self.size == self.stride == 1:
            x = pointwise_conv(x, kernel)
        else:
            x = conv(x, kernel, stride=self.stride, padding=padding)
        if self.use_bias:
            bias = _parameter(self, "bias", nn.initializers.zeros, (self.features,))
            x = x + _per_channel(bias).astype(x.dtype)
        return x


class ConvTranspose(nn.Module):
    """Transposed convolution [B, H, W, C] -> [B, H', W', features], H' = (H - 1) · stride - 2 · padding + size.

    The kernel [size, size, C, features] is kept in the form that scatters: pixel i lays x[i] @ kernel[a] on output pixel
    stride · i + a - padding.
    """

    features: int
    size: int
    stride: int
    padding: int = 0
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("transposed_kernel", draw_kernel, shape, jnp.float32).astype(x.dtype)
        x = conv_transpose(x, kernel, stride=self.stride, padding=self.padding)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            x = x + _per_channel(bias).astype(x.dtype)
        return x


class TransposedUpsample(nn.Module):
    """Upsampling of each channel by a transposed convolution that starts bilinear: [B, H, W, C] -> [B, f·H, f·W, C]."""

    factor: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("bilinear_kernel", lambda key: jnp.asarray(bilinear_kernel(self.factor, x.shape[-1])))
        return upsample_transposed(x, kernel.astype(x.dtype))


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
    """Convolution, BatchNorm, activation: [B, H, W, C] -> [B, H', W', features].

    folded: the parameters are those that `fold_batch_norm` makes, a convolution with bias. Inference only.
    use_bias: the convolution has one also before the BatchNorm, which makes it redundant, as Keras's ResNets do.
    """

    features: int
    conventions: Conventions
    activation: Callable[[jax.Array], jax.Array] | None = None
    size: int = 1
    stride: int = 1
    depthwise: bool = False
    folded: bool = False
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> jax.Array:
        if self.folded and train:
            raise ValueError("BatchNorm folded into the weights cannot be trained: build the network with folded=False")
        padding, use_bias = self.conventions.padding, self.folded or self.use_bias
        x = Conv(self.features, self.size, self.stride, padding, self.depthwise, use_bias, name="conv")(x)
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


def check_sides(images: jax.Array, multiple: int) -> None:
    """ValueError where the sides of images [B, H, W, C] cannot be halved as often as a network halves them."""
    _, height, width, _ = images.shape
    if height % multiple or width % multiple:
        raise ValueError(
            f"images of {height} × {width} pixels: this network needs sides that are multiples of {multiple}"
        )


def classify(maps: jax.Array, *, classes: int) -> dict[str, jax.Array]:
    """The end of a classifier, inside its compact method: maps [B, h, w, D] -> "maps", "features" (their mean over the
    pixels, float32) and "logits" [B, classes] of a Dense "classifier". classes: 0 leaves out the classifier and the logits.
    """
    features = maps.mean((1, 2), dtype=jnp.float32)
    outputs = {"features": features, "maps": maps}
    if classes:
        dense = nn.Dense(classes, kernel_init=nn.initializers.glorot_uniform(), name="classifier")
        outputs["logits"] = dense(features)
    return outputs


def rematerialised(module: nn.Module, *inputs: Any, remat: bool, **options: bool) -> jax.Array:
    """module(*inputs, **options). remat: the gradient computes what lies inside the module again instead of keeping it."""
    if not remat:
        return module(*inputs, **options)
    return nn.remat(lambda module, *inputs: module(*inputs, **options))(module, *inputs)


def variable_shapes(model: nn.Module, *inputs: tuple[int, ...]) -> dict[str, Any]:
    """The network's variables as jax.ShapeDtypeStructs. inputs: shapes that it accepts; by default one image of 32 px."""
    return unflatten_dict(_flat_shapes(model, inputs or ((1, 32, 32, 3),)))


@functools.lru_cache(maxsize=64)
def _flat_shapes(model: nn.Module, inputs: tuple[tuple[int, ...], ...]) -> dict[tuple[str, ...], jax.ShapeDtypeStruct]:
    """Kept: to trace a deep network takes up to a second, and every naming that a file might have asks for it."""
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in inputs]
    return flatten_dict(jax.eval_shape(lambda *arrays: model.init(jax.random.key(0), *arrays, train=False), *arrays))


def init_variables(model: nn.Module, key: jax.Array, *inputs: tuple[int, ...]) -> dict[str, Any]:
    """Fresh variables of a network made of these layers, from the same distributions as `model.init`. Not to be traced.

    inputs: as of `variable_shapes`.

    All convolution kernels come from one draw: XLA takes a quarter of a second to compile each draw, and `model.init` asks
    for one per kernel (23 s for EfficientNet-B1).
    """
    shapes = flatten_dict(variable_shapes(model, *inputs))
    by_fan_out = {path for path, leaf in shapes.items() if path[-1] in _BY_FAN_OUT and leaf.ndim == 4}
    size = sum(shapes[path].size for path in by_fan_out)
    draw = np.asarray(jax.random.truncated_normal(key, -2, 2, (size,)))
    variables, start, others = {}, 0, 0
    for path, leaf in shapes.items():
        values: np.ndarray
        if path[-1] in _FRESH:
            values = _FRESH[path[-1]](leaf.shape).astype(np.float32)
        elif path in by_fan_out:
            values = kernel_std(leaf.shape) / TRUNCATED_STD * draw[start : start + leaf.size].reshape(leaf.shape)
            start += leaf.size
        else:
            own_key = jax.random.fold_in(key, start + others)
            values = np.asarray(nn.initializers.glorot_uniform()(own_key, leaf.shape))
            others += 1
        variables[path] = jnp.asarray(values)
    return unflatten_dict(variables)


def fold_batch_norm(variables: Mapping[str, Any], *, epsilon: float) -> dict[str, Any]:
    """Variables {"params", "batch_stats"} with the BatchNorm of each ConvNorm folded into its convolution.

    For the same network built with folded=True, in eval mode. epsilon is the architecture's `bn_epsilon`. A BatchNorm that
    no convolution precedes keeps its arrays; where there is none of those, the result is {"params"} alone.
    """
    params, stats = (flatten_dict(variables.get(name, {})) for name in ("params", "batch_stats"))
    for *module, _, _ in [path for path in params if path[-2:] == ("norm", "scale")]:
        conv, norm = (*module, "conv"), (*module, "norm")
        if (*conv, "kernel") not in params:
            continue
        factor = params.pop((*norm, "scale")) * lax.rsqrt(stats.pop((*norm, "var")) + epsilon)
        mean = stats.pop((*norm, "mean")) - params.get((*conv, "bias"), 0)
        params[*conv, "kernel"] = params[*conv, "kernel"] * _per_channel(factor)
        params[*conv, "bias"] = params.pop((*norm, "bias")) - mean * factor
    folded = {"params": unflatten_dict(params)}
    return folded | {"batch_stats": unflatten_dict(stats)} if stats else folded


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
