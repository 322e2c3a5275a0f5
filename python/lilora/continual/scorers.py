"""Scores of one answer against its references, each in 0..1; a manifest names one of them per task."""

import re
from collections.abc import Callable

from sacrebleu.metrics import CHRF

from lilora.errors import UserError

Scorer = Callable[[str, list[str]], float]

_NUMBER_WORDS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_VQA_WORDS = {word: str(number) for number, word in enumerate(_NUMBER_WORDS)} | {
    "none": "0",
    "a": "",
    "an": "",
    "the": "",
}
_LETTER = re.compile(r"^\(?([A-Z])\)?(?:[.:,)\s]*$|[.:,)]\s)|\banswer is:?\s*\(?([A-Z])\b", re.IGNORECASE)
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?|-?\.\d+")
_CHRF = CHRF()


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(" .")


def exact(prediction: str, references: list[str]) -> float:
    """1 when the answer equals a reference, apart from case, spacing and a final full stop."""
    return float(_plain(prediction) in map(_plain, references))


def containment(prediction: str, references: list[str]) -> float:
    """1 when the answer contains a reference or a reference contains the answer (case ignored)."""
    said = _plain(prediction)
    return float(bool(said) and any(r in said or said in r for r in map(_plain, references) if r))


def _letter(text: str) -> str | None:
    found = _LETTER.search(text.strip())
    return (found[1] or found[2]).upper() if found else None


def option_letter(prediction: str, references: list[str]) -> float:
    """1 when the answer picks a reference's option: `B`, `(b)`, `B. a cat` or `... the answer is B`."""
    said = _letter(prediction)
    return float(said is not None and said in map(_letter, references))


def _vqa_plain(text: str) -> str:
    text = re.sub(r"[^\w\s.]|\.(?!\d)", " ", text.lower().replace("'", "").replace(",", ""))
    return " ".join(w for w in (_VQA_WORDS.get(word, word) for word in text.split()) if w)


def vqa_soft(prediction: str, references: list[str]) -> float:
    """VQA accuracy: min(1, agreeing annotators / 3), averaged over leaving each annotator out once.

    Case, punctuation, articles and number words are evened out first. With fewer than four references all the others
    must agree; with one, the answer must equal it.
    """
    said = _vqa_plain(prediction)
    agree = [said == _vqa_plain(r) for r in references]
    others = len(agree) - 1
    if others == 0:
        return float(agree[0])
    return sum(min(1.0, (sum(agree) - left_out) / min(3, others)) for left_out in agree) / len(agree)


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


def iou_50(prediction: str, references: list[str]) -> float:
    """1 when the answer is a box `x0 y0 x1 y1` (any brackets and commas) with IoU > 0.5 with a reference box."""
    said = _box(prediction)
    return float(said is not None and any((box := _box(r)) is not None and _iou(said, box) > 0.5 for r in references))


def chrf(prediction: str, references: list[str]) -> float:
    """Character n-gram F-score of a caption (chrF2 of sacrebleu), case ignored."""
    return _CHRF.sentence_score(_plain(prediction), [_plain(r) for r in references]).score / 100


SCORERS: dict[str, Scorer] = {f.__name__: f for f in (exact, containment, option_letter, vqa_soft, iou_50, chrf)}


def scorer(name: str) -> Scorer:
    """The scorer called `name`: a function (prediction, references) -> float in 0..1."""
    if name not in SCORERS:
        raise UserError(f"scorer {name!r} is unknown; choose one of {', '.join(SCORERS)}.")
    return SCORERS[name]
