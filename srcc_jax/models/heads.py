"""What dense networks end in: a classifier of pixels, and one of the whole image beside it."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from srcc_jax.kernels.convolution import conv, pointwise_conv
from srcc_jax.models.architecture import Conventions
from srcc_jax.models.layers import BatchNorm, explicit_padding


class PixelHead(nn.Module):
    """Scores of each pixel by a convolution with bias: [B, H, W, C] -> logits [B, H, W, classes], float32.

    Drawn by fan-in and fan-out: by fan-out alone, as other convolutions are, few classes would mean huge scores.
    """

    classes: int
    size: int = 1

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.size, self.size, x.shape[-1], self.classes)
        kernel = self.param("score_kernel", nn.initializers.glorot_uniform(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (self.classes,), jnp.float32)
        x, padding = x.astype(jnp.float32), explicit_padding("symmetric", x.shape[1:3], self.size, 1)
        x = pointwise_conv(x, kernel) if self.size == 1 else conv(x, kernel, stride=1, padding=padding)
        return x + bias.reshape(1, 1, 1, -1)


class ClassHead(nn.Module):
    """Scores of the image from the encoder's pooled features (Yu et al. 2019): [B, D] -> logits [B, classes], float32.

    BatchNorm and leaky ReLU of slope 0.01, together the function of InPlace-ABN, then a dense layer.
    """

    classes: int
    conventions: Conventions

    @nn.compact
    def __call__(self, features: jax.Array, *, train: bool) -> jax.Array:
        x = BatchNorm(self.conventions, name="norm")(features[:, None, None], train=train)[:, 0, 0]
        dense = nn.Dense(self.classes, kernel_init=nn.initializers.glorot_uniform(), name="dense")
        return dense(nn.leaky_relu(x, 0.01))
