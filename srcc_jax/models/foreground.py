"""Where the tissue is on a small picture of a whole slide: the foreground network of Yu et al. 2019."""

import flax.linen as nn
import jax

from srcc_jax.kernels.resize import resize_bilinear
from srcc_jax.models.heads import PixelHead
from srcc_jax.models.layers import Conv, check_sides

_STRIDES = (2, 2, 1)  # of the convolutions before the last


class ForegroundNet(nn.Module):
    """x [B, H, W, 3], -1 to 1 -> dense [B, H, W, 1], logits of tissue, float32. H and W are multiples of 4.

    Four 3×3 convolutions, two of them of stride 2, and one bilinear upsampling by 4 (Yu et al. 2019, §4 gives these counts; sizes,
    strides and widths are ours).
    """

    widths: tuple[int, ...] = (16, 32, 32)

    @nn.compact
    def __call__(self, x: jax.Array, *, train: bool) -> dict[str, jax.Array]:
        del train  # it is the same network in training
        check_sides(x, 4)
        size = x.shape[1:3]
        for number, (width, stride) in enumerate(zip(self.widths, _STRIDES, strict=True), start=1):
            x = nn.relu(Conv(width, 3, stride, "symmetric", use_bias=True, name=f"conv{number}")(x))
        x = PixelHead(1, size=3, name="classifier")(x)
        return {"dense": resize_bilinear(x, size, align_corners=False)}
