"""Tables 2 to 5 of Lee et al. 2023, means of three runs. Its "F1" is accuracy, its "AUPRC" the mean of the AP of both classes."""

from __future__ import annotations

import dataclasses

COLUMNS = ("AUROC", "AP, macro", "accuracy at 0.5", "sensitivity at 0.5", "specificity at 0.5")
HEADINGS = ("AUROC", "AUPRC", "F1 (= accuracy)", "sensitivity", "specificity")

Numbers = tuple[float, float, float, float, float]


@dataclasses.dataclass(frozen=True)
class Row:
    """A setting of a table, and the numbers of COLUMNS of its weak and its strong model. positive, negative: shares of the training
    patches of each class that were used."""

    query: str
    alpha: int
    weak: Numbers
    strong: Numbers
    positive: float = 1.0
    negative: float = 1.0


_L2 = Row("l2", 20, (0.9465, 0.9299, 0.8821, 0.8393, 0.9012), (0.9738, 0.9501, 0.9334, 0.8930, 0.9437))

TABLES: dict[str, tuple[Row, ...]] = {
    "Table 2": (
        _L2,
        Row("cosine", 20, (0.9424, 0.9324, 0.8632, 0.8502, 0.8690), (0.9682, 0.9496, 0.9132, 0.7910, 0.9477)),
    ),
    "Table 3": (
        Row("l2", 5, (0.9422, 0.9304, 0.8513, 0.8573, 0.8497), (0.9601, 0.9412, 0.9080, 0.8416, 0.9299)),
        Row("l2", 10, (0.9362, 0.9190, 0.8650, 0.8151, 0.8882), (0.9600, 0.9412, 0.9110, 0.8193, 0.9391)),
        _L2,
        Row("l2", 50, (0.9444, 0.9279, 0.8735, 0.8690, 0.8770), (0.9783, 0.9494, 0.9423, 0.8395, 0.9617)),
        Row("l2", 100, (0.9454, 0.9256, 0.8667, 0.8871, 0.8587), (0.9836, 0.9535, 0.9510, 0.8692, 0.9661)),
    ),
    "Table 4": (
        Row("l2", 20, (0.6549, 0.6443, 0.6256, 0.5079, 0.6572), (0.8506, 0.7631, 0.7749, 0.7309, 0.7823), 0.1, 0.1),
        Row("l2", 20, (0.8693, 0.8347, 0.7863, 0.8146, 0.7699), (0.9332, 0.8922, 0.8952, 0.6779, 0.9426), 0.3, 0.3),
        Row("l2", 20, (0.8993, 0.8858, 0.8051, 0.8518, 0.7793), (0.9581, 0.9135, 0.9114, 0.7767, 0.9380), 0.5, 0.5),
        Row("l2", 20, (0.9173, 0.9038, 0.8205, 0.8462, 0.8119), (0.9563, 0.9178, 0.9171, 0.8083, 0.9448), 0.7, 0.7),
        _L2,
    ),
    "Table 5": (
        Row("l2", 20, (0.8917, 0.8714, 0.8017, 0.6804, 0.8544), (0.9071, 0.8685, 0.8871, 0.5656, 0.9612), 0.1),
        Row("l2", 20, (0.9156, 0.8966, 0.8188, 0.6957, 0.8724), (0.9151, 0.8788, 0.8853, 0.6226, 0.9519), 0.3),
        Row("l2", 20, (0.9284, 0.9155, 0.8547, 0.8444, 0.8583), (0.9642, 0.9319, 0.9127, 0.7606, 0.9525), 0.5),
        Row("l2", 20, (0.9364, 0.9217, 0.8444, 0.8565, 0.8421), (0.9709, 0.9464, 0.9297, 0.8127, 0.9608), 0.7),
        _L2,
    ),
}
