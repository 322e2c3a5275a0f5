"""Scores of one answer against its references, each in 0..1; a manifest names one of them per task."""

import re
from collections.abc import Callable
from importlib import import_module
from numbers import Real

from sacrebleu.metrics import CHRF

from lilora.errors import UserError
from lilora.registry import Registry

Scorer = Callable[[str, list[str]], float]
SCORERS: Registry[Scorer] = Registry("scorer", "lilora.scorers")


def register_scorer(function: Scorer) -> Scorer:
    """Decorator: a manifest may say `scorer: NAME` with the function's name from then on.

    function(prediction, references) -> 0..1. A package of its own names the module that registers it in the entry-point
    group `lilora.scorers`, under the function's name.

    Raises:
        UserError: another scorer has the name.
    """
    return SCORERS.register(function.__name__, function)


# What the official VQA evaluation evens out (github.com/GT-Vision-Lab/VQA, vqaEval.py): these marks, full stops that no
# digit follows, articles, number words, and these words with one of their apostrophes missing.
_VQA_MARKS = ';/[]"{}()=+\\_-><@`,?!'
_VQA_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_VQA_WORDS = {word: str(number) for number, word in enumerate(_VQA_NUMBERS)} | {"none": "0"}
_VQA_APOSTROPHES = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd
    he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've
    o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've
    someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
    they'll they're they've wasn't we'd've we've weren't what'll what're what's what've when's where'd where's where've who'd
    who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd
    you'd've you'll you're you've
"""
_VQA_CONTRACTIONS = {"somebody'd": "somebodyd"} | {
    word[:i] + word[i + 1 :]: word
    for word in _VQA_APOSTROPHES.split()
    for i, character in enumerate(word)
    if character == "'"
}

# A letter that nothing but a mark or the end of the line follows; a full stop of `U.S.` or `a.m.` is none.
_CLOSED = r"""["']?(?:[:,)\]]|\.(?![A-Za-z](?![A-Za-z]))|\s*(?:\n|$))"""
_FIRST_LETTER = re.compile(rf"""["'(\[]?([A-Za-z]){_CLOSED}""")
_NAMED_LETTER = {
    lead: re.compile(
        # Behind `answer`, `option` or `choice`: closed as above, or, without a colon, a capital, which is no article there.
        rf"""(?i:\b(?:{lead})\b(?:\s+is)?\s*:?\s*(?:(?:option|choice)\b)?)\s*["'(\[]?\b([A-Za-z]){_CLOSED}"""
        rf"""|(?i:\b(?:{lead})(?:\s+is)?\s+(?:(?:option|choice)\s+)?)\b([A-HJ-Z])(?=\s)"""
    )
    for lead in ("answer", "option|choice")
}
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?|-?\.\d+")
_CHRF = CHRF()


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).rstrip(" .")


@register_scorer
def exact(prediction: str, references: list[str]) -> float:
    """1 when the answer equals a reference, apart from case, spacing and a final full stop. Source: this project."""
    return float(_plain(prediction) in map(_plain, references))


@register_scorer
def containment(prediction: str, references: list[str]) -> float:
    """1 when the answer contains a reference or a reference contains the answer (case ignored). Source: this project."""
    said = _plain(prediction)
    return float(bool(said) and any(r in said or said in r for r in map(_plain, references) if r))


def _letter(text: str) -> str | None:
    text = re.sub(r"[*_`]", "", text).strip()  # **B**
    if found := _FIRST_LETTER.match(text):
        return found[1].upper()
    for pattern in _NAMED_LETTER.values():
        letters = {(found[1] or found[2]).upper() for found in pattern.finditer(text)}
        if letters:
            return letters.pop() if len(letters) == 1 else None
    return None


@register_scorer
def option_letter(prediction: str, references: list[str]) -> float:
    """1 when the answer picks a reference's option: `B`, `(b)`, `B. a cat`, `**B**`, `Option B` or `... the answer is B`.

    An answer that names several options picks none; a word that begins like a letter, or the article `a`, is none.
    Source: LLaVA's evaluation of ScienceQA (eval_science_qa.py), which takes `B`, `B. ...` and `The answer is B.`, and this
    project for the other forms.
    """
    said = _letter(prediction)
    return float(said is not None and said in map(_letter, references))


def _vqa_plain(text: str) -> str:
    text = text.replace("\n", " ").replace("\t", " ").strip()
    together = re.search(r"\d,\d", text) is not None
    evened = text
    for mark in _VQA_MARKS:  # judged by the text as it came
        glued = together or f"{mark} " in text or f" {mark}" in text
        evened = evened.replace(mark, "" if glued else " ")
    evened = re.sub(r"\.(?!\d)", "", evened)
    words = [_VQA_WORDS.get(word, word) for word in evened.lower().split()]
    return " ".join(_VQA_CONTRACTIONS.get(word, word) for word in words if word not in ("a", "an", "the"))


@register_scorer
def vqa_soft(prediction: str, references: list[str]) -> float:
    """VQA accuracy: min(1, agreeing annotators / 3), averaged over leaving each annotator out once.

    Punctuation, articles, number words and contractions are evened out first. Source: the official evaluation of VQA v2
    (github.com/GT-Vision-Lab/VQA, vqaEval.py), with two differences: it evens nothing out where all references are equal,
    which is done here too; and it wants ten references. With fewer than four all the others must agree; with one, the
    answer must equal it.
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


@register_scorer
def iou_50(prediction: str, references: list[str]) -> float:
    """1 when the answer is a box `x0 y0 x1 y1` (any brackets and commas) with IoU > 0.5 with a reference box.

    Source: the accuracy of referring expressions on RefCOCO, as Mao et al. define it (arXiv 1511.02283).
    """
    said = _box(prediction)
    return float(said is not None and any((box := _box(r)) is not None and _iou(said, box) > 0.5 for r in references))


@register_scorer
def chrf(prediction: str, references: list[str]) -> float:
    """Character n-gram F-score of a caption, case ignored. Source: chrF2 of sacrebleu (Popović, 2015)."""
    return _CHRF.sentence_score(_plain(prediction), [_plain(r) for r in references]).score / 100


def scorer(name: str) -> Scorer:
    """The scorer that a manifest calls `name`: one that is registered, or a function `package.module:function`.

    Raises:
        UserError: there is no such scorer. The function that is returned raises it where one of another package fails or
            returns anything but a number from 0 to 1.
    """
    if ":" not in name:
        function = SCORERS.find(name)
        return function if function.__module__ == __name__ else _checked(name, function)
    module, _, attribute = name.partition(":")
    try:
        function = getattr(import_module(module), attribute)
    except Exception as error:  # whatever a module does when it is imported
        raise UserError(
            f"scorer {name!r} cannot be imported ({type(error).__name__}: {error}); write package.module:function, of an "
            "installed package or of a file beside the manifest"
        ) from error
    if not callable(function):
        raise UserError(f"scorer {name!r} is a {type(function).__name__}; name a function")
    return _checked(name, function)


def _checked(name: str, function: Scorer) -> Scorer:
    wanted = "it takes the answer and a list of references and returns a number from 0 to 1"

    def score(prediction: str, references: list[str]) -> float:
        try:
            points = function(prediction, references)
        except Exception as error:
            raise UserError(f"scorer {name!r} raised {type(error).__name__}: {error}; {wanted}") from error
        if not isinstance(points, Real) or not 0 <= points <= 1:
            raise UserError(f"scorer {name!r} returned {points!r} for {prediction[:80]!r}; {wanted}")
        return float(points)

    return score
