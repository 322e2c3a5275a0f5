import math
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from support.text_encoder import make_encoder
from transformers import AutoModel, AutoTokenizer

from lilora.continual.answer_formats import in_format
from lilora.continual.evaluate import score
from lilora.continual.instructions import Sample, TaskSpec
from lilora.continual.scorers import SCORERS, Judge, scorer
from lilora.errors import UserError
from lilora.reports.scores import ScoreMatrix


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
        ("contains_reference", "It is a Tabby cat.", ["tabby cat"], 1),
        ("contains_reference", "tabby", ["tabby cat"], 0),
        ("contains_reference", "", [""], 0),
        ("contains_word", "It is a forest, I think", ["Forest."], 1),
        ("contains_word", "It is reforested", ["forest"], 0),
        ("contains_word", "deforested", ["forest"], 1),
        ("contains_word", "there is a red car ahead", ["a red car"], 1),
        ("contains_word", "a car", ["a red car"], 0),
        ("contains_word", "no idea", ["."], 0),
        ("yes_no", "Yes, there is.", ["yes"], 1),
        ("yes_no", "no", ["Yes"], 0),
        ("yes_no", "There is no dog.", ["No"], 1),
        ("yes_no", "There isn\u2019t. Yes", ["no"], 1),
        ("yes_no", "I would say yes", ["yes"], 1),
        ("yes_no", "a dog", ["yes"], 0),
        ("yes_no", "nobody knows", ["no"], 0),
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


WANTED = {"yes_no": ["no"], "yes_no_f1": ["yes"]}


@pytest.mark.parametrize(
    "name", [name for name in SCORERS if not name.startswith("similarity") and "pairs" not in name]
)
@pytest.mark.parametrize("prediction", ["", "   ", "?", "...", "[]", "<unk>", "0 0 0 0", "-", "\xe9"])
def test_any_text_gets_a_score(name, prediction):
    references = WANTED.get(name, ["0 0 1 1", "B", "a red seven"])
    assert 0 <= Judge(name)([prediction] * 2, [references] * 2) <= 1


# --- of all answers of a split -------------------------------------------------------------------------------------------

CAPTIONS = ["a man is speaking", "rain falls"]
REFERENCES = [
    ["a man speaks.", "someone speaks.", "a man is speaking while a bird is chirping in the background"],
    ["rain is falling hard on a surface"],
]


def test_cider_is_what_is_published_for_an_example():
    """From the README of the package aac-metrics 0.5, whose CIDEr-D is that of the caption evaluation of COCO."""
    assert Judge("cider")(CAPTIONS, REFERENCES) == pytest.approx(0.9614, abs=5e-5)
    assert 2 * Judge("cider")([CAPTIONS[0], ""], REFERENCES) == pytest.approx(1.3641, abs=5e-5)
    assert 2 * Judge("cider")(["", CAPTIONS[1]], REFERENCES) == pytest.approx(0.5587, abs=5e-5)


def test_the_score_of_a_task_is_that_of_the_whole_split():
    spec = TaskSpec(name="a", train="x", test="x", scorer="cider", answer_format="caption")
    samples = [Sample(str(i), (), "?", tuple(own)) for i, own in enumerate(REFERENCES)]
    result = score(spec, samples, [{"answer": said} for said in CAPTIONS])
    assert result.score == pytest.approx(96.14, abs=5e-3)
    assert result.format_share == 0
    perfect = score(spec, samples, [{"answer": own[0]} for own in REFERENCES])
    matrix = ScoreMatrix(["a"])
    matrix.set("a", "a", perfect.score, perfect.format_share)
    assert matrix.get("a", "a") > 100


def dense_cider(predictions, references, longest=4, sigma=6.0):
    """The formula of arXiv 1411.5726 with vectors over the whole vocabulary, in fp64; words between spaces."""

    def grams(text, n):
        words = text.split()
        return [" ".join(words[i : i + n]) for i in range(len(words) - n + 1)]

    total = 0.0
    for n in range(1, longest + 1):
        texts = [*predictions, *(text for own in references for text in own)]
        vocabulary = sorted({gram for text in texts for gram in grams(text, n)})
        found = [{gram for text in own for gram in grams(text, n)} for own in references]
        samples = torch.tensor([sum(gram in own for own in found) for gram in vocabulary], dtype=torch.float64)
        weight = math.log(len(references)) - samples.clamp_min(1).log()

        def vector(text, n=n, vocabulary=vocabulary, weight=weight):
            counts = Counter(grams(text, n))
            return torch.tensor([float(counts[gram]) for gram in vocabulary], dtype=torch.float64) * weight

        for said, own in zip(predictions, references, strict=True):
            for wanted in own:
                c, r = vector(said), vector(wanted)
                norm = float(c.norm() * r.norm())
                apart = len(said.split()) - len(wanted.split())
                cosine = float(torch.minimum(c, r) @ r) / norm if norm else 0.0
                total += 10 * cosine * math.exp(-(apart**2) / (2 * sigma**2)) / longest / len(own) / len(predictions)
    return total


@pytest.mark.parametrize("seed", range(3))
def test_cider_equals_its_formula_over_the_whole_vocabulary(seed):
    generator = torch.Generator().manual_seed(seed)
    words = ["a", "the", "red", "blue", "dog", "cat", "sits", "runs", "on", "under", "grass", "house"]

    def text(least):
        length = int(torch.randint(least, 12, (1,), generator=generator))
        return " ".join(words[int(i)] for i in torch.randint(len(words), (length,), generator=generator))

    references = [[text(1) for _ in range(1 + i % 5)] for i in range(8)]
    predictions = [own[0] + " " + text(1) for own in references[:5]] + [text(0) for _ in references[5:]]
    wanted = dense_cider(predictions, references)
    assert wanted > 0.1
    assert Judge("cider")(predictions, references) == pytest.approx(wanted, rel=1e-9)


def test_cider_reads_captions_without_marks_and_case():
    references = [["A well-known dog isn't here."], ["two cats"]]
    assert Judge("cider")(["a well-known dog is n't here", "x"], references) == pytest.approx(5)
    assert Judge("cider")(["a well known dog isn't here", "x"], references) < 4
    assert Judge("cider")(["two cats"], [["two cats"]]) == 0, "one sample has no document frequencies"


def test_f1_and_pairs_of_yes_and_no_by_hand():
    wanted = [["yes"], ["no"], ["no"], ["yes"], ["yes"], ["no"]]
    said = ["Yes.", "No", "yes", "yes", "no", "it is red"]
    precision, recall = 2 / 3, 2 / 3
    assert Judge("yes_no_f1")(said, wanted) == pytest.approx(2 * precision * recall / (precision + recall))
    assert Judge("yes_no_f1")(["no"] * 6, wanted) == 0
    assert Judge("yes_no_pairs")(said, wanted) == pytest.approx(1 / 3)
    assert Judge("yes_no")(said, wanted) == pytest.approx(3 / 6)


@pytest.mark.parametrize(
    "name, wanted, sentence",
    [
        ("yes_no", [["a dog"]], "neither yes nor no"),
        ("yes_no", [["yes", "no"]], "neither yes nor no"),
        ("yes_no_pairs", [["yes"], ["yes"]], "samples 1 and 2 are no pair"),
        ("yes_no_pairs", [["yes"], ["no"], ["no"]], "samples 3 and 4 are no pair"),
    ],
)
def test_references_that_do_not_suit_are_named(name, wanted, sentence):
    with pytest.raises(UserError, match=sentence):
        Judge(name)(["yes"] * len(wanted), wanted)


# --- similarity ----------------------------------------------------------------------------------------------------------

TEXTS = ["a red dog", "a blue dog", "two cats run", "nothing"]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """The folder of a tiny text encoder."""
    folder = tmp_path_factory.mktemp("encoder")
    make_encoder(folder, TEXTS)
    return folder


def test_similarity_is_the_cosine_of_mean_hidden_states(encoder):
    model, tokenizer = AutoModel.from_pretrained(encoder).eval(), AutoTokenizer.from_pretrained(encoder)

    def row(text):  # alone, so that nothing is padded
        return model(**tokenizer([text], return_tensors="pt")).last_hidden_state[0].mean(0)

    with torch.no_grad():
        cosine = {(a, b): float(F.cosine_similarity(row(a), row(b), dim=0)) for a in TEXTS for b in TEXTS}
    said, wanted = TEXTS[:3], [[TEXTS[1], TEXTS[2]], [TEXTS[3]], [TEXTS[2]]]
    best = [max(cosine[a, b] for b in own) for a, own in zip(said, wanted, strict=True)]
    assert Judge("similarity", encoder)(said, wanted) == pytest.approx(sum(max(0, b) for b in best) / 3, abs=1e-5)
    assert Judge("similarity_80", encoder)(said, wanted) == sum(b >= 0.8 for b in best) / 3
    assert Judge("similarity_80", encoder)(said, [[text] for text in said]) == 1
    assert any(b < 0.8 for b in best)


@pytest.mark.parametrize(
    "files, sentence",
    [
        (None, "is no folder"),
        ({}, "holds no readable text encoder"),
        ({"modules.json": "{"}, "has broken files"),
        ({"modules.json": '[{"type": "a.Transformer"}, {"type": "a.Dense"}]'}, "give a model that averages tokens"),
        ({"1_Pooling/config.json": '{"pooling_mode_cls_token": true}'}, "give a model that averages tokens"),
    ],
)
def test_a_folder_that_is_no_such_encoder_is_named(files, sentence, tmp_path):
    folder = tmp_path / "model"
    for name, text in (files or {}).items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    if files == {}:
        folder.mkdir()
    with pytest.raises(UserError, match=sentence):
        Judge("similarity", folder).suits([["a"], ["b"]])


def test_a_model_is_named_where_a_scorer_wants_one_and_nowhere_else(tmp_path):
    with pytest.raises(UserError, match="scorer 'similarity_80' wants the key scorer_model"):
        Judge("similarity_80")
    with pytest.raises(UserError, match="scorer 'exact' takes no model"):
        Judge("exact", tmp_path)


# --- formats -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "rule, answer, kept",
    [
        ("short_answer", "two words", True),
        ("short_answer", "three words here", False),
        ("short_answer", "A Stop sign there", True),  # right
        ("short_answer", "", True),
        ("caption", "A dog runs on the grass.", True),
        ("caption", "A dog runs on the grass", False),
        ("caption", "Four words are few.", False),
        ("caption", "sign there.", True),  # a part of a reference
        ("one_letter", "b", True),
        ("one_letter", "B.", False),
        ("one_letter", "\xe9", False),
        ("one_letter", " B ", True),
    ],
)
def test_the_released_rules_of_mif(rule, answer, kept):
    assert in_format(rule, answer, ["a stop sign there", "A red sign there."]) is kept


def test_an_unknown_scorer_is_refused_with_the_known_ones():
    with pytest.raises(UserError, match=r"'bleu' is unknown; choose one of exact, containment, .*chrf"):
        scorer("bleu")


def test_every_scorer_names_its_source():
    for name, function in SCORERS.items():
        assert not function.__module__.startswith("lilora.") or "Source: " in function.__doc__, name
