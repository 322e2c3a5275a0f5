"""Task routing without a task id: features, statistics, the bank, and `lilora` with tasks found."""

import json
import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from lilora import LiLoRAConfig, LiLoRALinear
from lilora.bank.bank import Bank
from lilora.continual.base_model import load_bank
from lilora.continual.collator import Collator
from lilora.continual.evaluate import answers_to, evaluate, evaluate_routed, limits_of
from lilora.continual.instructions import InstructionDataset, Sample
from lilora.continual.kinds import load_generative
from lilora.continual.manifest import load_manifest
from lilora.continual.task_identification import SHRINKAGE, NearestCentroid, TaskRouter, frozen_features
from lilora.errors import UserError

IMAGE, PATCHES = 4, 4  # of the suite's model
TARGETS = r".*(language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj|multi_modal_projector\.linear_[12])"
COUNTS = [1, 0, 2, 1]  # images of each sample of a batch


@pytest.fixture
def base(suite):
    return load_generative(str(suite / "base"), torch.float32)[0].requires_grad_(False).eval()


def batch(counts, side="left", labels=False):
    """Prompts of different lengths with images, padded on one side; with labels, two tokens of an answer at the end."""
    rows = [
        torch.cat([torch.full((PATCHES * n,), IMAGE), torch.randint(5, 20, (4 + i,))]) for i, n in enumerate(counts)
    ]
    length = max(map(len, rows)) + 2 * labels
    inputs = {name: torch.zeros(len(rows), length, dtype=torch.long) for name in ("input_ids", "attention_mask")}
    if labels:
        inputs["labels"] = torch.full((len(rows), length), -100)
    for i, row in enumerate(rows):
        whole = torch.cat([row, torch.tensor([6, 2])]) if labels else row
        at = slice(length - len(whole), length) if side == "left" else slice(len(whole))
        inputs["input_ids"][i, at], inputs["attention_mask"][i, at] = whole, 1
        if labels:
            inputs["labels"][i, at] = torch.cat([torch.full((len(row),), -100), whole[-2:]])
    if sum(counts):
        inputs["pixel_values"] = torch.randn(sum(counts), 3, 16, 16)
    return inputs


def single(inputs, counts, i, keep=None):
    """Sample i on its own, without its padding."""
    kept = inputs["attention_mask"][i].bool() if keep is None else keep
    one = {name: inputs[name][i : i + 1, kept] for name in inputs if name != "pixel_values"}
    if counts[i]:
        start = sum(counts[:i])
        one["pixel_values"] = inputs["pixel_values"][start : start + counts[i]]
    return one


def features_by_hand(base, inputs, counts):
    """[B, D] fp64, sample by sample, from the weights of the embedding and the model's own image features."""
    table = base.get_input_embeddings().weight.double().numpy()
    rows, start = [], 0
    for i, count in enumerate(counts):
        tokens = [
            int(token)
            for j, token in enumerate(inputs["input_ids"][i])
            if inputs["attention_mask"][i, j]
            and token != IMAGE
            and ("labels" not in inputs or inputs["labels"][i, j] < 0)
        ]
        parts = [table[tokens].mean(0), np.zeros(table.shape[1])]
        if count:
            images = inputs["pixel_values"][start : start + count]
            parts[1] = torch.cat(list(base.get_image_features(images).pooler_output)).double().numpy().mean(0)
        start += count
        rows.append(np.concatenate([part / max(np.linalg.norm(part), 1e-12) for part in parts]))
    return np.stack(rows)


def adapted(base, kind):
    """With tasks a and b (and random adapters), in training mode, b active and learning."""
    if kind == "lilora":
        config = LiLoRAConfig(target_modules=TARGETS, r=4, sub_rank=2, alpha=8, dropout=0.5)
    else:
        config = LoraConfig(target_modules=TARGETS, r=4, lora_alpha=8, lora_dropout=0.5)
    model = get_peft_model(base, config, adapter_name="a")
    model.add_adapter("b", config)
    model.set_adapter("b")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    return model.train()


# --- features and distances ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("labels", [False, True])
def test_features_are_means_of_text_and_image_tokens(base, side, labels):
    inputs = batch(COUNTS, side, labels)
    features = frozen_features(base, inputs)
    assert features.dtype == torch.float32
    np.testing.assert_allclose(features.numpy(), features_by_hand(base, inputs, COUNTS), atol=1e-6)
    for i in range(len(COUNTS)):  # nothing of the others, no padding
        torch.testing.assert_close(frozen_features(base, single(inputs, COUNTS, i))[0], features[i], atol=1e-6, rtol=0)


def test_answers_are_no_part_of_the_features(base):
    inputs = batch(COUNTS, labels=True)
    for i in range(len(COUNTS)):
        prompt = inputs["attention_mask"][i].bool() & (inputs["labels"][i] == -100)
        unanswered = {k: v for k, v in single(inputs, COUNTS, i, prompt).items() if k != "labels"}
        torch.testing.assert_close(frozen_features(base, unanswered)[0], frozen_features(base, inputs)[i])


def test_batches_without_images_and_models_without_a_tower(base):
    inputs = batch([0, 0])
    features = frozen_features(base, inputs)
    width = features.shape[1] // 2
    assert features[:, width:].abs().max() == 0
    assert torch.linalg.vector_norm(features[:, :width], dim=1).allclose(torch.ones(2))
    size = {"hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = LlamaForCausalLM(LlamaConfig(vocab_size=24, **size))
    text.set_input_embeddings(base.get_input_embeddings())
    assert torch.equal(frozen_features(text, inputs), features)
    with pytest.raises(UserError, match=r"LlamaForCausalLM has no vision tower, but the batch has pixel_values"):
        frozen_features(text, batch([1, 0]))


@pytest.mark.parametrize("kind", ["lilora", "lora"])
def test_adapters_have_no_part_in_the_features(base, kind):
    inputs = batch(COUNTS)
    before = frozen_features(base, inputs)
    model = adapted(base, kind)
    requires = [p.requires_grad for p in model.parameters()]
    state = torch.get_rng_state()
    for view in (model, base):
        assert torch.equal(frozen_features(view, inputs), before)
    assert torch.equal(torch.get_rng_state(), state)
    assert model.training
    assert [p.requires_grad for p in model.parameters()] == requires
    rows = torch.cat(list(base.eval().get_image_features(inputs["pixel_values"]).pooler_output))
    assert any(p.requires_grad for p in model.parameters())
    with model.disable_adapter():
        bare = torch.cat(list(base.get_image_features(inputs["pixel_values"]).pooler_output))
    assert not torch.allclose(rows, bare, atol=0.1)  # the adapters are on again, and do something


def test_routes_are_those_of_the_formula(base):
    router = NearestCentroid(base)
    learned = {}
    for parts, task in enumerate(("one", "two", "three"), 1):
        counts = [[0, 1, 2, 1, 1], [1, 1, 3], [0, 0, 1, 1]][:parts]
        batches = [batch(c, "right", labels=True) for c in counts]
        returned = router.fit(task, iter(batches))
        learned[task] = np.concatenate([features_by_hand(base, b, c) for b, c in zip(batches, counts, strict=True)])
        assert returned is router.statistics[task]
        assert {t.dtype for t in returned.values()} == {torch.float32}
        np.testing.assert_allclose(returned["mean"].numpy(), learned[task].mean(0), atol=1e-6)
        np.testing.assert_allclose(returned["variance"].numpy(), learned[task].var(0), atol=1e-6)
        assert returned["count"].tolist() == [sum(map(len, counts))]
    assert router.tasks == ["one", "two", "three"]
    deviations = np.concatenate([x - x.mean(0) for x in learned.values()])
    pooled = (deviations**2).mean(0)
    pooled = (1 - SHRINKAGE) * pooled + SHRINKAGE * pooled.mean()
    counts = [0, 1, 2, 1, 3, 0] * 4
    inputs = batch(counts)
    x = features_by_hand(base, inputs, counts)
    distances = np.stack([((x - f.mean(0)) ** 2 / pooled).sum(1) for f in learned.values()], 1)
    np.testing.assert_allclose(router.distances(frozen_features(base, inputs)).numpy(), distances, rtol=1e-4)
    routed = router.route(inputs)
    assert routed == [router.tasks[i] for i in distances.argmin(1)]
    assert len(set(routed)) > 1
    for i in range(len(counts)):
        assert router.route(single(inputs, counts, i)) == [routed[i]]


def test_what_varies_little_within_tasks_counts_much(base):
    """Long prompts that differ in one word and images that differ much: the word tells the task."""

    def prompts(word, n):
        common = torch.tensor([1, *[7, 8, 9] * 8])
        ids = torch.cat([torch.full((PATCHES,), IMAGE), common, torch.tensor([word])]).repeat(n, 1)
        pixels = torch.randn(n, 3, 16, 16) * torch.rand(n, 1, 1, 1) * 3
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    router = NearestCentroid(base)
    for task, word in (("red", 11), ("blue", 12), ("green", 13)):
        router.fit(task, [prompts(word, 16)])
    for task, word in (("red", 11), ("blue", 12), ("green", 13)):
        assert router.route(prompts(word, 16)) == [task] * 16


def test_a_task_learned_again_starts_afresh_whatever_the_others(base):
    first, second, other = ([batch(COUNTS, labels=True)] for _ in range(3))
    router, fresh = NearestCentroid(base), NearestCentroid(base)
    for task, batches in (("a", first), ("b", other), ("a", second)):
        router.fit(task, batches)
    for task, batches in (("a", second), ("b", other)):
        fresh.fit(task, batches)
    for task in "ab":
        for name, tensor in fresh.statistics[task].items():
            assert torch.equal(router.statistics[task][name], tensor)
    assert not torch.equal(NearestCentroid(base).fit("a", first)["mean"], router.statistics["a"]["mean"])


def test_one_sample_a_task_is_enough(base):
    samples = [batch([1]), batch([0])]
    router = NearestCentroid(base)
    for task, inputs in zip("ab", samples, strict=True):
        router.fit(task, [inputs])
    assert [router.route(inputs) for inputs in samples] == [["a"], ["b"]]


def test_bad_batches(base):
    router = NearestCentroid(base)
    with pytest.raises(UserError, match="this router knows no task"):
        router.route(batch([1]))
    with pytest.raises(UserError, match="no samples of task 'a'"):
        router.fit("a", [])
    assert router.tasks == []
    inputs = batch([1, 1])
    for missing in ({}, {"pixel_values": inputs["pixel_values"]}, {"inputs_embeds": torch.randn(2, 5, 32)}):
        with pytest.raises(UserError, match="routes a batch by its input_ids, which are missing"):
            frozen_features(base, missing)
    with pytest.raises(ValueError, match="the images make 4 image tokens and input_ids hold 8"):
        frozen_features(base, inputs | {"pixel_values": inputs["pixel_values"][:1]})
    projector = base.model.multi_modal_projector
    projector.linear_1 = LiLoRALinear(projector.linear_1, r=2, sub_rank=1)
    with pytest.raises(UserError, match="wants the adapters of get_peft_model"):
        frozen_features(base, inputs)


# --- runs ---------------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(runs, tmp_path):
    """A copy of the lilora run, to change."""
    return Path(shutil.copytree(runs / "lilora", tmp_path / "run"))


def routers(folder):
    return {
        task: {k: v.tolist() for k, v in own.items()} for task, own in Bank.open(folder / "bank").load_routers().items()
    }


def test_from_a_bank_in_python(suite, runs):
    bank, method, processor = load_bank(runs / "lilora", None, "cpu")
    collator = Collator(processor, {"": 0}, train=False)
    specs = load_manifest(suite / "tasks.yaml").tasks
    inputs = collator([("", InstructionDataset(spec, "test")[i]) for i in range(3) for spec in specs])
    del inputs["task_ids"]
    method.model.eval()

    router = NearestCentroid.load(bank, method.model)
    answers = method.model.generate(**inputs, task_ids=router.route(inputs), max_new_tokens=3, do_sample=False)

    assert router.route(inputs) == [spec.name for spec in specs] * 3
    given = method.model.generate(
        **inputs, task_ids=[spec.name for spec in specs] * 3, max_new_tokens=3, do_sample=False
    )
    assert torch.equal(answers, given)


class Fixed(TaskRouter):
    """Takes every second sample for one of `task`."""

    def __init__(self, task):
        super().__init__(None, dict.fromkeys(("colour", "count", "name")))
        self.task, self.seen = task, 0

    def fit(self, task, batches):
        raise AssertionError("it knows all")

    def route(self, inputs):
        self.seen += len(inputs["input_ids"])
        at = range(self.seen - len(inputs["input_ids"]), self.seen)
        return [self.task if i % 2 else self.tasks[i // 12] for i in at]  # 12 samples a task


@pytest.mark.parametrize("method_name", ["lilora", "dirlora"])
def test_routed_scores_are_those_of_the_routed_tasks(suite, runs, method_name):
    _, method, processor = load_bank(runs / method_name, None, "cpu")
    tasks = load_manifest(suite / "tasks.yaml").tasks
    given = evaluate(method, processor, tasks, 8)
    results = evaluate_routed(method, processor, Fixed("count"), tasks, given, 8)
    limits = limits_of(tasks)
    for spec, before, result in zip(tasks, given, results, strict=True):
        samples = InstructionDataset(spec, "test")
        found = ["count" if i % 2 else spec.name for i in range(12)]
        one_by_one = [
            answers_to(method, processor, [pair], limits, 1, None)[0] for pair in zip(found, samples, strict=True)
        ]
        assert [a["answer"] for a in result.routed.answers] == one_by_one
        assert result.given is before
        assert result.routes == Counter(found)
        assert result.accuracy == (100 if spec.name == "count" else 50)
        right = [a["answer"] == a["reference"] for a in result.routed.answers]
        assert result.routed.score == pytest.approx(100 * sum(right) / 12)
    changed = [g.answers != r.routed.answers for g, r in zip(given, results, strict=True)]
    assert changed[0] or changed[2]


@pytest.mark.parametrize("method_name", ["lilora", "dirlora"])
def test_eval_routed(suite, runs, lilora, method_name):
    run = runs / method_name
    command = ("eval", run, "--tasks", suite / "tasks.yaml", "--device", "cpu", "--routed")
    code, out, err = lilora(*command, "--json")
    assert code == 0, err
    cells = json.loads(out)
    want = dict(zip(("colour", "count", "name"), Bank.open(run / "bank").scores["matrix"]["scores"][-1], strict=True))
    assert {task: cell["score"] for task, cell in cells.items()} == want
    for task, cell in cells.items():  # every task of the suite has its own question
        assert cell["routes"] == {task: 12}
        assert cell["routing_accuracy"] == 100
        assert cell["routed_score"] == cell["score"]
    if method_name == "lilora":
        (run / "routes.png").unlink()
        code, out, err = lilora(*command)
        assert code == 0, err
        assert "100.0 %" in out
        assert (run / "routes.png").read_bytes().startswith(b"\x89PNG")


def test_generate_without_a_task_finds_it(suite, runs, lilora):
    image = next((suite / "data" / "images").iterdir())
    for run in ("lilora", "dirlora"):
        for question, task in (("which colour is it ?", "colour"), ("name it ?", "name")):
            command = ("generate", runs / run, "--image", image, "--prompt", question, "--device", "cpu")
            code, found, err = lilora(*command)
            assert code == 0, err
            assert f"task: {task}\n" in err
            code, named, err = lilora(*command, "--task", task)
            assert code == 0
            assert "task:" not in err
            assert named == found


def test_a_text_question_finds_its_task(runs, lilora):
    code, _, err = lilora("generate", runs / "lilora", "--prompt", "how many are there ?", "--device", "cpu")
    assert code == 0
    assert "task: count\n" in err


def test_an_interrupted_run_gets_the_same_router(suite, runs, tmp_path, lilora, quick, monkeypatch):
    command = ["train", suite / "tasks.yaml", "--out", tmp_path / "run", *quick]

    def stop(*_):
        raise SystemExit(9)

    with monkeypatch.context() as patch:  # the second task is in the bank, its router is not
        real, calls = Bank.set_router, []
        patch.setattr(Bank, "set_router", lambda *args: stop() if calls else (calls.append(args), real(*args)))
        assert lilora(*command)[0] == 9
    assert Bank.open(tmp_path / "run" / "bank").tasks == ["colour", "count"]
    assert list(routers(tmp_path / "run")) == ["colour"]
    code, _, err = lilora(*command)
    assert code == 0, err
    assert routers(tmp_path / "run") == routers(runs / "lilora")


def without_router(run):
    """As an earlier version would have left the bank."""
    bank = Bank.open(run / "bank")
    records = bank._index.tasks
    bank._commit(bank._index, tasks=[record.model_copy(update={"router": {}}) for record in records])


def test_a_bank_without_a_router_gets_it_from_the_same_command(suite, run, runs, lilora, quick):
    without_router(run)
    for command in (
        ("eval", run, "--tasks", suite / "tasks.yaml", "--routed"),
        ("generate", run, "--prompt", "name it ?"),
    ):
        code, _, err = lilora(*command, "--device", "cpu")
        assert code == 2
        assert "has no router for colour, count, name; run its `lilora train` command again" in err
    before = Bank.open(run / "bank").task_fingerprint("name")
    code, _, err = lilora("train", suite / "tasks.yaml", "--out", run, *quick)
    assert code == 0, err
    assert routers(run) == routers(runs / "lilora")
    assert Bank.open(run / "bank").task_fingerprint("name") == before


def test_a_removed_task_is_not_routed_to(suite, run, lilora):
    bank, method, processor = load_bank(run, None, "cpu")
    bank.remove_task("count")
    router = NearestCentroid.load(Bank.open(bank.path), method.model)
    assert router.tasks == ["colour", "name"]
    sample = Sample("", (), "how many are there ?", ("",))
    assert router.route(Collator(processor, {"": 0}, train=False)([("", sample)]))[0] in router.tasks


def test_methods_that_need_no_task_have_no_router(suite, tmp_path, lilora, quick):
    options = (*quick, "--order", "colour", "--method", "lora")
    code, _, err = lilora("train", suite / "tasks.yaml", "--out", tmp_path / "run", *options)
    assert code == 0, err
    assert routers(tmp_path / "run") == {}
    code, _, err = lilora("eval", tmp_path / "run", "--tasks", suite / "tasks.yaml", "--device", "cpu", "--routed")
    assert code == 2
    assert re.search(r"lora needs no task.*leave out --routed", err)
