"""Whether an answer has the form that was asked for: rules by name, and regular expressions."""

from collections.abc import Callable, Sequence

import regex

from lilora.errors import UserError


def _short_answer(answer: str, references: Sequence[str]) -> bool:
    """At most two words, or a reference (case ignored)."""
    return len(answer.split()) <= 2 or answer.lower() in map(str.lower, references)


def _caption(answer: str, references: Sequence[str]) -> bool:
    """A full stop at the end of more than four words, or of a part of a reference (case ignored)."""
    if not answer.endswith("."):
        return False
    return len(answer.split()) > 4 or any(answer.lower() in reference.lower() for reference in references)


def _one_letter(answer: str, references: Sequence[str]) -> bool:
    """One letter from A to Z, large or small, and nothing else."""
    return len(answer) == 1 and answer.isascii() and answer.isalpha()


# The rules of MIF in the released code of LiLoRA (arXiv 2508.06202): eval_vqa_instruction.py, eval_caption_instruction.py,
# eval_scienceqa_instruction.py.
RULES: dict[str, Callable[[str, Sequence[str]], bool]] = {
    "short_answer": _short_answer,
    "caption": _caption,
    "one_letter": _one_letter,
}


def check_format(wanted: str) -> None:
    """Raise ValueError for what is neither the name of a rule nor a regular expression."""
    try:
        regex.compile(wanted)
    except (regex.error, OverflowError, RecursionError) as error:
        raise ValueError(f"{wanted[:80]!r} is not a regular expression: {error}") from error


def in_format(wanted: str, answer: str, references: Sequence[str]) -> bool:
    """Whether an answer keeps the rule of RULES called `wanted`, or matches that regular expression in full.

    Raises:
        UserError: matching takes more than a second.
    """
    if wanted in RULES:
        return RULES[wanted](answer.strip(), references)
    try:
        return regex.fullmatch(wanted, answer, timeout=1) is not None
    except TimeoutError as error:
        raise UserError(
            f"answer_format {wanted!r} takes more than a second on an answer of {len(answer)} characters; write it without a "
            "repetition of what can be read in several ways."
        ) from error
