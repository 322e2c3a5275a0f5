"""Scores of answers against their references; a manifest names a scorer per task.

A scorer judges one answer, as a number in 0..1, or all answers of a split at once.
"""

from . import answers, boxes, captions, similarity, vqa, yes_no
from .registry import SCORERS, Judge, register_corpus_scorer, register_scorer, scorer

__all__ = [
    "SCORERS",
    "Judge",
    "answers",
    "boxes",
    "captions",
    "register_corpus_scorer",
    "register_scorer",
    "scorer",
    "similarity",
    "vqa",
    "yes_no",
]
