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
        ("exact", ".5", ["5"], 0),
        ("exact", "5.", ["5"], 1),
        ("containment", ".5", [".5 litres"], 1),
        ("chrf", "A red seven", ["a red seven"], 1),
        ("chrf", "xyz", ["a red seven"], 0),
    ],
)
def test_known_scores(name, prediction, references, score):
    assert scorer(name)(prediction, references) == pytest.approx(score)


@pytest.mark.parametrize(
    "a, b, equal",  # as the official script's own functions make of them
    [
        ("$5", "5", False),
        ("50%", "50", False),
        ("10:30", "10 30", False),
        ("it's", "its", False),
        ("u.s.", "us", True),
        ("U.S.A", "usa", True),
        ("1,000", "1000", True),
        ("1,000 (about)", "1000 about", True),
        ("red,blue", "red blue", True),
        ("red, blue", "red blue", True),
        ("red , blue", "red blue", True),
        ("t-shirt", "t shirt", True),
        ("t-shirt", "tshirt", False),
        ("well - done", "well done", True),
        ("3.5", "35", False),
        ("3.", "3", True),
        (".5", "5", False),
        ("The dog", "dog", True),
        ("a an the", "", True),
        ("none", "0", True),
        ("ten", "10", True),
        ("eleven", "11", False),
        ("dont", "don't", True),
        ("couldnt've", "couldn't've", True),
        ("couldntve", "couldn't've", False),
        ("im", "i'm", False),
        ("lets", "let's", False),
        ("somebody'd", "somebodyd", True),
        ("yall'd've", "y'all'd've", True),
        ("what?", "what", True),
        ("what ?", "what", True),
        ("a/b", "b", True),
        ("yes!no", "yes no", True),
        ("red\nblue", "red blue", True),
        ("{red}", "red", True),
        ("red & blue", "red blue", False),
        ("RED", "red", True),
        ("1, 000", "1000", False),
    ],
)
def test_vqa_evens_out_what_the_official_evaluation_does(a, b, equal):
    for said, reference in ((a, b), (b, a)):
        assert SCORERS["vqa_soft"](said, [reference] * 10) == equal
        assert SCORERS["vqa_soft"](said, [reference]) == equal


@pytest.mark.parametrize("agreeing", range(11))
def test_vqa_leaves_each_of_ten_annotators_out_once(agreeing):
    references = ["dog"] * agreeing + ["cat"] * (10 - agreeing)
    left = [min(1, sum(r == "dog" for r in references[:i] + references[i + 1 :]) / 3) for i in range(10)]
    assert SCORERS["vqa_soft"]("dog", references) == pytest.approx(sum(left) / 10)


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "A",
            "a",
            "A.",
            "(A)",
            "(a)",
            "[A]",
            "'A'",
            '"A"',
            "A. cat",
            "A.cat",
            "A) cat",
            "A)cat",
            "(A) cat",
            "A: cat",
            "A:cat",
        ),
        *(
            "**A**",
            "**A.** cat",
            "__A__",
            "`A`",
            "Answer: A",
            "answer: a",
            "**Answer:** A",
            "Answer: (A) cat",
            "Answer: A.",
        ),
        *("Option A", "option a", "Option (A)", "Option A: cat", "Option A.cat", "Choice A", "The correct option is A"),
        *("The answer is A.", "The answer is A because it purrs", "The correct answer is: A", "The answer is **A**"),
        *("The best answer is option A", "I think the answer is A.", "A\nBecause it purrs.", "Answer: A\nIt purrs."),
        *(
            "Option B is no bird, so the answer is A.",
            "The correct choice is A",
            "The answer is 'A'",
            "Final answer: A",
        ),
    ],
)
def test_an_option_is_found_however_it_is_said(answer):
    assert SCORERS["option_letter"](answer, ["A"]) == 1
    assert SCORERS["option_letter"](answer, ["B"]) == 0


@pytest.mark.parametrize(
    "answer",
    [
        *(
            "A cat sits there",
            "a cat",
            "Apple",
            "Answer: Apple",
            "Answer: A cat",
            "Option apple",
            "The answer is a cat",
        ),
        *(
            "I don't know",
            "I'm not sure",
            "D'oh",
            "A-frame",
            "U.S. flag",
            "e.g. a cat",
            "a.m.",
            "An answer",
            "answers a lot",
        ),
        *(
            "The answer is I think",
            "The options are: all",
            "Option A or option B",
            "The answer is Boston",
            "",
            "?",
            "AB",
        ),
    ],
)
def test_words_that_begin_like_a_letter_are_no_option(answer):
    for letter in "ABDEINSU":
        assert SCORERS["option_letter"](answer, [letter]) == 0, letter


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


def test_every_scorer_names_its_source():
    for name, score in SCORERS.items():
        assert "Source: " in score.__doc__, name
