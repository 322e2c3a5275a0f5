"""How likely the references are: `--nll` of train and eval against a sum over single samples in fp64, and its refusals."""

import json

import pytest
import torch
from PIL import Image

from lilora.bank.bank import Bank
from lilora.cli import app
from lilora.continual.base_model import load_bank
from lilora.continual.evaluate import answer_nll
from lilora.continual.instructions import Sample, instruction_data
from lilora.continual.kinds import KINDS
from lilora.continual.manifest import load_manifest
from lilora.errors import Diverged, UserError
from lilora.reports.scores import ScoreMatrix


@pytest.fixture(scope="module")
def measured(suite, tmp_path_factory, train_options):
    """A run of one LoRA on two tasks, measured."""
    out = tmp_path_factory.mktemp("likelihood") / "run"
    options = ["--out", out, "--method", "lora", "--order", "colour,count", "--nll", *train_options]
    app(["train", *map(str, [suite / "tasks.yaml", *options])], standalone_mode=False)
    return out


def dense(method, processor, sample):
    """(sum of -log p of the tokens of the last answer and of the end, how many) of one sample, in fp64."""
    turns = [*(text for turn in sample.history for text in turn), sample.question]
    tokens = processor.tokenizer
    image = "<image>" * 4 if sample.images else ""
    words = [image + turns[0], *turns[1:]]
    ids = [i for word in words for i in tokens(word, add_special_tokens=False)["input_ids"]]
    if not sample.history:
        ids += tokens(":", add_special_tokens=False)["input_ids"]
    answer = [*tokens(sample.answers[0], add_special_tokens=False)["input_ids"], tokens.eos_token_id]
    inputs = {"input_ids": torch.tensor([[*ids, *answer]])}
    if sample.images:
        pictures = [Image.open(path).convert("RGB") for path in sample.images]
        inputs["pixel_values"] = processor.image_processor(pictures, return_tensors="pt")["pixel_values"].double()
    logits = method.model(**inputs).logits[0].double()
    said = logits.log_softmax(-1)[len(ids) - 1 : -1].gather(1, torch.tensor(answer)[:, None])
    return -said.sum().item(), len(answer)


@torch.no_grad()
def test_it_is_the_mean_over_the_tokens_of_all_references(measured, suite):
    bank, method, processor = load_bank(measured)
    method.model.double().eval()
    matrix = ScoreMatrix.from_dict(bank.scores["matrix"])
    for spec in load_manifest(suite / "tasks.yaml", ["colour", "count"]).tasks:
        method.activate(spec.name, train=False)
        losses, tokens = zip(*(dense(method, processor, s) for s in instruction_data(spec, "test")), strict=True)
        assert matrix.nll("count", spec.name) == pytest.approx(sum(losses) / sum(tokens), rel=1e-4)
    assert matrix.nll("colour", "colour") != pytest.approx(matrix.nll("count", "colour"), rel=1e-3)


@torch.no_grad()
def test_earlier_answers_are_given_and_do_not_count(measured):
    _, method, processor = load_bank(measured)
    method.model.double().eval()
    processor.chat_template = processor.tokenizer.chat_template = (
        "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }} {% endfor %}{% endfor %}"
    )
    samples = [
        Sample("0", (), "how many are there ?", ("two",), history=(("name it ?", "yes no red"),)),
        Sample("1", (), "which colour is it ?", ("green blue",), history=(("is it red ?", "no"),)),
        Sample("2", (), "how many ?", ("three",), history=(("name it ?", "no"), ("is it ?", "red blue"))),
    ]
    losses, tokens = zip(*(dense(method, processor, sample) for sample in samples), strict=True)
    got = answer_nll(method, processor, "count", samples, 8 * len(samples), None)
    assert got == pytest.approx(sum(losses) / sum(tokens), rel=1e-6)


@torch.no_grad()
def test_a_model_whose_outputs_are_not_finite_is_said_to_have_diverged(measured):
    _, method, processor = load_bank(measured)
    for parameter in method.model.parameters():
        parameter.fill_(torch.nan)
    with pytest.raises(Diverged, match="'count' diverged"):
        answer_nll(method, processor, "count", [Sample("0", (), "how many ?", ("two",))], 8, None)


def test_eval_measures_the_same_and_refuses_to_route_with_it(measured, suite, lilora):
    code, out, err = lilora("eval", measured, "--tasks", suite / "tasks.yaml", "--nll", "--json", "--device", "cpu")
    assert code == 0, err
    matrix = ScoreMatrix.from_dict(Bank.open(measured).scores["matrix"])
    assert {name: cell["nll"] for name, cell in json.loads(out).items()} == {
        name: pytest.approx(matrix.nll("count", name), rel=1e-4) for name in ("colour", "count")
    }
    code, out, err = lilora("eval", measured, "--tasks", suite / "tasks.yaml", "--nll", "--device", "cpu")
    assert code == 0, err
    assert f"{matrix.nll('count', 'colour'):.3f}" in out
    code, _, err = lilora("eval", measured, "--tasks", suite / "tasks.yaml", "--nll", "--routed")
    assert (code, err) == (
        2,
        "lilora: --nll measures answers with the task given and --routed without; give one of them\n",
    )


def test_images_to_classify_have_no_answers():
    with pytest.raises(UserError, match="--nll measures answers"):
        KINDS["classification"].measures(nll=True)
    assert KINDS["text"].measures(nll=False) == {}
