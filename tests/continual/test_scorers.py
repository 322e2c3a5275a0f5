import pytest

from lilora.continual.scorers import SCORERS, scorer
from lilora.errors import UserError


@pytest.mark.parametrize(
    "name, prediction, references, score",
    [
        ("exact", " Seven. ", ["seven"], 1),
        ("exact", "seven", ["six", "seven"], 1),
        ("exact", "seventy", ["seven"], 0),
        ("exact", "", ["seven"], 0),
        ("containment", "This is a tabby cat.", ["tabby cat"], 1),
        ("containment", "cat", ["Tabby cat"], 1),
        ("containment", "", ["tabby cat"], 0),
        ("containment", "dog", ["tabby cat"], 0),
        ("option_letter", "B", ["B"], 1),
        ("option_letter", "(b)", ["B"], 1),
        ("option_letter", "B. a cat", ["B"], 1),
        ("option_letter", "The answer is C.", ["C"], 1),
        ("option_letter", "A cat sits there", ["A"], 0),
        ("option_letter", "B", ["C"], 0),
        ("option_letter", "no idea", ["N"], 0),
        ("vqa_soft", "two", ["2"] * 10, 1),
        ("vqa_soft", "The dog.", ["dog"] * 9 + ["cat"], 1),
        ("vqa_soft", "dog", ["dog"] * 2 + ["cat"] * 8, (2 * (1 / 3) + 8 * (2 / 3)) / 10),
        ("vqa_soft", "dont", ["don't"], 1),
        ("vqa_soft", "1.5", ["15"], 0),
        ("vqa_soft", "bird", ["dog"] * 10, 0),
        ("iou_50", "[0, 0, 10, 10]", ["0 0 10 10"], 1),
        ("iou_50", "0.0 0.0 0.4 1.0", ["0 0 1 1"], 0),
        ("iou_50", "(.0, .0, .6, 1.0)", ["0 0 1 1"], 1),
        ("iou_50", "0 0 1 0.5", ["0 0 1 1"], 0),
        ("iou_50", "10 10 0 0", ["0 0 10 10"], 0),
        ("iou_50", "0 0 10", ["0 0 10 10"], 0),
        ("chrf", "A red seven", ["a red seven"], 1),
        ("chrf", "xyz", ["a red seven"], 0),
    ],
)
def test_known_scores(name, prediction, references, score):
    assert scorer(name)(prediction, references) == pytest.approx(score)


def test_chrf_rises_with_the_words_that_are_right():
    scores = [SCORERS["chrf"](said, ["a red seven and a blue two"]) for said in ("", "a red", "a red seven and a two")]
    assert scores == sorted(scores)
    assert 0 == scores[0] < scores[1] < scores[2] < 1


@pytest.mark.parametrize("name", SCORERS)
@pytest.mark.parametrize("prediction", ["", "   ", "?", "...", "[]", "<unk>", "0 0 0 0", "-", "é"])
def test_any_text_gets_a_score(name, prediction):
    assert 0 <= SCORERS[name](prediction, ["0 0 1 1", "B", "a red seven"]) <= 1


def test_an_unknown_scorer_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"'bleu' is unknown; choose one of exact, containment, .*chrf"):
        scorer("bleu")
