"""Whether an answer says what a reference says."""

import re

from .registry import register_scorer

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


def plain(text: str) -> str:
    """Lower case, single spaces, no full stop at the end."""
    return " ".join(text.lower().split()).rstrip(" .")


@register_scorer
def exact(prediction: str, references: list[str]) -> float:
    """1 when the answer equals a reference, apart from case, spacing and a final full stop. Source: this project."""
    return float(plain(prediction) in map(plain, references))


@register_scorer
def containment(prediction: str, references: list[str]) -> float:
    """1 when the answer contains a reference or a reference contains the answer (case ignored). Source: this project."""
    said = plain(prediction)
    return float(bool(said) and any(r in said or said in r for r in map(plain, references) if r))


@register_scorer
def contains_reference(prediction: str, references: list[str]) -> float:
    """1 when the answer contains a reference, case and line breaks ignored.

    Source: OCRBench (arXiv 2305.07895), and the evaluation of Med, OCR and VP in MLLM-CL's code (eval_pvqa.py, eval_ocr.py,
    eval_sat.py; arXiv 2506.05453).
    """
    said = plain(prediction)
    return float(any(r in said for r in map(plain, references) if r))


@register_scorer
def contains_word(prediction: str, references: list[str]) -> float:
    """1 when the answer contains a reference, one of a single word beside a space, or before a full stop or comma.

    An answer of one word need only contain it. Case is ignored. Source: the evaluation of RS and AD in MLLM-CL's code
    (eval_ai2d.py; arXiv 2506.05453).
    """
    said = prediction.lower()
    return float(any(_has_word(said, reference.lower()) for reference in references))


def _has_word(said: str, wanted: str) -> bool:
    if " " in wanted:
        return wanted in said
    word = wanted.replace(".", "")
    if not word:
        return False
    return (
        word in said
        if " " not in said
        else any(form in said for form in (f" {word}", f"{word} ", f"{word}.", f"{word},"))
    )


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
