"""Boxes in answers."""

import re

from .registry import register_scorer

_NUMBER = re.compile(r"-?\d+(?:\.\d+)?|-?\.\d+")


def _box(text: str) -> tuple[float, ...] | None:
    """The four numbers x0, y0, x1, y1 of a box, or None when the text does not hold exactly four."""
    numbers = tuple(float(n) for n in _NUMBER.findall(text))
    return numbers if len(numbers) == 4 else None


def _area(box: tuple[float, ...]) -> float:
    return max(0.0, box[2] - box[0]) * max(0.0, box[3] - box[1])


def _iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    shared = _area((max(a[0], b[0]), max(a[1], b[1]), min(a[2], b[2]), min(a[3], b[3])))
    union = _area(a) + _area(b) - shared
    return shared / union if union else 0.0


@register_scorer
def iou_50(prediction: str, references: list[str]) -> float:
    """1 when the answer is a box `x0 y0 x1 y1` (any brackets and commas) with IoU > 0.5 with a reference box.

    Source: the accuracy of referring expressions on RefCOCO, as Mao et al. define it (arXiv 1511.02283).
    """
    said = _box(prediction)
    return float(said is not None and any((box := _box(r)) is not None and _iou(said, box) > 0.5 for r in references))
