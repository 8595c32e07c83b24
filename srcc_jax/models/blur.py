"""Whether an image is out of focus: the small network of Yu et al. 2019, §6.1."""

import flax.linen as nn
import jax

from srcc_jax.models.layers import Conv


class BlurNet(nn.Module):
    """x [B, H, W, 3], -1 to 1 -> logits [B, 1], float32: positive where the image is out of focus.

    Two 5×5 convolutions and one fully connected layer (Yu et al. 2019, §6.1). Strides, widths and the mean over all pixels before
    the last layer, by which images may have any size, are ours.
    """

    widths: tuple[int, int] = (16, 32)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        del train  # it is the same network in training
        for number, width in enumerate(self.widths, start=1):
            x = nn.relu(Conv(width, 5, 2, "symmetric", use_bias=True, name=f"conv{number}")(x))
        dense = nn.Dense(1, kernel_init=nn.initializers.glorot_uniform(), name="classifier")
        return {"logits": dense(x.mean((1, 2)))}
