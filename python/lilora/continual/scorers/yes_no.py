"""Questions that want yes or no, as POPE and MME ask them."""

import re

from lilora.errors import UserError

from .registry import register_corpus_scorer, register_scorer


def _said(text: str) -> str | None:
    """`yes` or `no`: the first word, else what the first sentence holds; None if neither."""
    words = re.findall(r"[a-z]+(?:'t)?", text.lower().split(".")[0].replace("\u2019", "'"))
    if words and words[0] in ("yes", "no"):
        return words[0]
    if any(word in ("no", "not") or word.endswith("n't") for word in words):
        return "no"
    return "yes" if "yes" in words else None


def _wanted(references: list[str]) -> str:
    wanted = {_said(reference) for reference in references}
    only = wanted.pop() if len(wanted) == 1 else None
    if only is None:
        raise UserError(
            f"the references {references[:3]!r} of a question are neither yes nor no; choose another scorer"
        )
    return only


@register_scorer
def yes_no(prediction: str, references: list[str]) -> float:
    """1 when the answer says yes or no as the reference does: the accuracy of POPE and MME.

    Source: POPE (arXiv 2305.10355) and MME (arXiv 2306.13394). An answer with neither is wrong; POPE takes it for a yes.
    """
    return float(_said(prediction) == _wanted(references))


@register_corpus_scorer
def yes_no_f1(predictions: list[str], references: list[list[str]]) -> float:
    """F1 of the answer yes over a split; 0 without a right yes. Source: POPE (arXiv 2305.10355); neither is not a yes here."""
    pairs = [(_said(said), _wanted(own)) for said, own in zip(predictions, references, strict=True)]
    right = pairs.count(("yes", "yes"))
    said, wanted = (sum(pair[side] == "yes" for pair in pairs) for side in (0, 1))
    return 2 * right / (said + wanted) if right else 0.0


@register_corpus_scorer
def yes_no_pairs(predictions: list[str], references: list[list[str]]) -> float:
    """The share of pictures whose two questions, one after the other, are both right: MME's acc+.

    Source: MME (arXiv 2306.13394), where a picture has one question with the answer yes and one with no.

    Raises:
        UserError: samples that are not such pairs.
    """
    wanted = [_wanted(own) for own in references]
    for i in range(0, len(wanted), 2):
        if sorted(wanted[i : i + 2]) != ["no", "yes"]:
            raise UserError(
                f"samples {i + 1} and {i + 2} are no pair of one yes and one no; let the two questions of each picture follow "
                "each other"
            )
    right = [_said(said) == own for said, own in zip(predictions, wanted, strict=True)]
    return sum(one and other for one, other in zip(right[::2], right[1::2], strict=True)) / (len(right) // 2)
