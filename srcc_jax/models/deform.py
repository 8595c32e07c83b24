"""Deformable convolution as a layer: where each tap looks is predicted from the same map."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from srcc_jax.kernels.convolution import conv
from srcc_jax.kernels.deform import deform_conv
from srcc_jax.models.layers import draw_kernel, explicit_padding


class DeformConv(nn.Module):
    """Deformable convolution (Dai et al. 2017): [B, H, W, C] -> [B, H', W', features], kernel HWIO, padding (size - 1) // 2.

    A convolution of the same size and stride ("offset") says where the taps look. It starts at zero: a fresh layer is an
    ordinary convolution.
    """

    features: int
    size: int = 3
    stride: int = 1
    use_bias: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        padding = explicit_padding("symmetric", x.shape[1:3], self.size, self.stride)
        offsets = OffsetConv(self.size, self.stride, name="offset")(x)
        shape = (self.size, self.size, x.shape[-1], self.features)
        kernel = self.param("kernel", draw_kernel, shape, jnp.float32).astype(x.dtype)
        x = deform_conv(x, offsets, kernel, stride=self.stride, padding=padding)
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
            x = x + bias.reshape(1, 1, 1, -1).astype(x.dtype)
        return x


class OffsetConv(nn.Module):
    """[B, H, W, C] -> offsets [B, H', W', 2 · size²] in pixels of x, float32, as `deform_conv` takes them; at first all 0."""

    size: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        filters = 2 * self.size**2
        shape = (self.size, self.size, x.shape[-1], filters)
        kernel = self.param("zero_kernel", nn.initializers.zeros, shape, jnp.float32).astype(x.dtype)
        bias = self.param("bias", nn.initializers.zeros, (filters,), jnp.float32)
        padding = explicit_padding("symmetric", x.shape[1:3], self.size, self.stride)
        return conv(x, kernel, stride=self.stride, padding=padding).astype(jnp.float32) + bias.reshape(1, 1, 1, -1)
