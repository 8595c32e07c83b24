"""Table 1 of Li et al. 2019: collective recall, instance recall, false positives on normal regions and FROC, means of three folds."""

from __future__ import annotations

COLUMNS = ("collective recall", "instance recall", "false positives per normal image", "FROC (mean recall)")

# (mode, training) -> the four numbers, in the order of COLUMNS
TABLE: dict[tuple[str, str], tuple[float, float, float, float]] = {
    ("easy", "full"): (0.626, 0.462, 0.446, 0.462),
    ("easy", "self"): (0.869, 0.673, 2.29, 0.617),
    ("easy", "self_extra"): (0.841, 0.638, 5.22, 0.562),
    ("easy", "cooperative"): (0.881, 0.705, 1.45, 0.692),
    ("hard", "full"): (0.497, 0.325, 0.202, 0.325),
    ("hard", "self"): (0.693, 0.521, 1.18, 0.517),
    ("hard", "self_extra"): (0.670, 0.505, 4.62, 0.451),
    ("hard", "cooperative"): (0.827, 0.658, 0.943, 0.657),
}
