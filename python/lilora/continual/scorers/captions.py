"""Captions against several references."""

import math
import re
from collections import Counter

from sacrebleu.metrics import CHRF

from .answers import plain
from .registry import register_corpus_scorer, register_scorer

_CHRF = CHRF()
# Words as the Penn Treebank has them: `isn't` is two, `well-known` is one; marks are none.
_WORD = re.compile(r"\w+(?=n't\b)|n't\b|'\w+|\w+(?:-\w+)*")
_LONGEST = 4  # words of an n-gram
_SIGMA = 6.0  # words


@register_scorer
def chrf(prediction: str, references: list[str]) -> float:
    """Character n-gram F-score of a caption, case ignored. Source: chrF2 of sacrebleu (Popović, 2015)."""
    return _CHRF.sentence_score(plain(prediction), [plain(r) for r in references]).score / 100


@register_corpus_scorer
def cider(predictions: list[str], references: list[list[str]]) -> float:
    """CIDEr-D of the captions of a split, 0..10, so up to 1000 points (a CIDEr of 0.8 is 80).

    10 times the mean, over samples, their references and n = 1..4, of
    exp(-(l_c - l_r)^2 / 72) sum_g min(c_g, r_g) r_g / (|c| |r|), where c and r are the n-grams of the answer and of a
    reference, counted and weighted with the logarithm of (samples / samples with g in a reference), and l their lengths in
    words. A split of one sample has no weights and gets 0.

    Source: Vedantam, Zitnick and Parikh, arXiv 1411.5726, with counts as they are, as the caption evaluation of COCO has them.
    It differs from that one in the splitting into words, which is done by a regular expression in place of Stanford's
    tokenizer.
    """
    wanted = [[_grams(r) for r in own] for own in references]
    frequency = Counter(gram for own in wanted for gram in set().union(*own))
    weights = {gram: math.log(len(wanted) / samples) for gram, samples in frequency.items()}
    unseen = math.log(max(1, len(wanted)))
    total = 0.0
    for said, own in zip(map(_grams, predictions), wanted, strict=True):
        total += sum(_alike(said, reference, weights, unseen) for reference in own) / len(own)
    return 10 * total / len(wanted)


def _grams(text: str) -> Counter[tuple[str, ...]]:
    words = _WORD.findall(text.lower())
    return Counter(tuple(words[i : i + n]) for n in range(1, _LONGEST + 1) for i in range(len(words) - n + 1))


def _alike(said: Counter, wanted: Counter, weights: dict[tuple[str, ...], float], unseen: float) -> float:
    """The mean over n of the clipped cosine of weighted n-grams, with the penalty for their lengths."""
    lengths = [sum(count for gram, count in grams.items() if len(gram) == 1) for grams in (said, wanted)]
    products, norms = [0.0] * _LONGEST, [[0.0] * _LONGEST, [0.0] * _LONGEST]
    for side, grams in enumerate((said, wanted)):
        for gram, count in grams.items():
            norms[side][len(gram) - 1] += (count * weights.get(gram, unseen)) ** 2
    for gram, count in wanted.items():
        products[len(gram) - 1] += min(said[gram], count) * count * weights[gram] ** 2
    cosines = (p / math.sqrt(a * b) if a and b else 0.0 for p, a, b in zip(products, *norms, strict=True))
    return math.exp(-((lengths[0] - lengths[1]) ** 2) / (2 * _SIGMA**2)) * sum(cosines) / _LONGEST
