"""Tables of Yu et al. 2019 (arXiv 1910.03729v3), beside which ours are set."""

from __future__ import annotations

POSITIVE_SLIDES, NEGATIVE_SLIDES = 102, 838  # of Table 1

# model -> sensitivity and specificity at 0.74, area under the precision-recall curve, and the true positives of the 102 and true
# negatives of the 838 slides that they stand for (the printed shares are cut off after four digits).
SCREENING: dict[str, tuple[float, float, float, int, int]] = {
    "ResNet-34": (0.9118, 0.9427, 0.9017, 93, 790),
    "DenseNet-121": (0.9118, 0.9463, 0.9021, 93, 793),
    "Res2Net-50": (0.9314, 0.9606, 0.9047, 95, 805),
    "EfficientNet-B4": (0.9509, 0.9653, 0.9081, 97, 809),
    "DLA": (0.9314, 0.9582, 0.9038, 95, 803),
    "FCN": (0.9608, 0.8938, 0.9099, 98, 749),
    "U-Net": (0.9608, 0.8914, 0.9117, 98, 747),
    "Ours": (0.9705, 0.9272, 0.9166, 99, 777),
}

# model -> Dice coefficient over pixels, mean and standard deviation of four repeats (§5.2)
SEGMENTATION: dict[str, tuple[float, float]] = {
    "U-Net": (0.7847, 0.0106),
    "FCN": (0.8109, 0.0113),
    "DLA": (0.8248, 0.0094),
    "Ours": (0.8331, 0.0101),
}

# Tables 2 and 3: site, year, slides, positive, negative, sensitivity, specificity
SITES: tuple[tuple[str, str, int, int, int, float, float], ...] = (
    ("SGH", "2015", 2083, 85, 1998, 1.0, 0.7753),
    ("SGH", "2018", 3207, 299, 2908, 0.9967, 0.7995),
    ("SGH", "2019", 3670, 50, 3620, 1.0, 0.7829),
    ("SHSSD", "", 495, 8, 487, 1.0, 0.7371),
    ("SDCH", "", 391, 6, 385, 1.0, 0.6571),
    ("ZPPH", "", 469, 8, 461, 1.0, 0.7527),
)

# --model -> its row of Table 1, and of the Dice coefficients where it segments
ROWS: dict[str, tuple[str, str | None]] = {
    "resnet34": ("ResNet-34", None),
    "densenet121": ("DenseNet-121", None),
    "res2net50": ("Res2Net-50", None),
    "efficientnet_b4": ("EfficientNet-B4", None),
    "dla_single": ("DLA", None),
    "fcn": ("FCN", "FCN"),
    "unet": ("U-Net", "U-Net"),
    "dla": ("DLA (multi-task)", "DLA"),
    "centernet": ("DLA, CenterNet's decoder", None),
    "dla_dcn": ("Ours", "Ours"),
}
