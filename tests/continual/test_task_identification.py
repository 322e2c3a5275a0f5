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
from lilora.continual import task_identification
from lilora.continual.base_model import load_bank
from lilora.continual.collator import Collator
from lilora.continual.evaluate import answers_to, evaluate, evaluate_routed, limits_of
from lilora.continual.instructions import InstructionDataset, Sample
from lilora.continual.kinds import load_multimodal
from lilora.continual.manifest import load_manifest
from lilora.continual.task_identification import (
    KEPT,
    SHRINKAGE,
    LinearProbe,
    NearestCentroid,
    TaskRouter,
    frozen_features,
)
from lilora.errors import UserError

IMAGE, PATCHES = 4, 4  # of the suite's model
TARGETS = r".*(language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj|multi_modal_projector\.linear_[12])"
COUNTS = [1, 0, 2, 1]  # images of each sample of a batch


@pytest.fixture
def base(suite):
    return load_multimodal(str(suite / "base"), torch.float32)[0].requires_grad_(False).eval()


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


# --- several modes, and the linear probe --------------------------------------------------------------------------------


def as_features(monkeypatch):
    """Batches are their features."""
    monkeypatch.setattr(task_identification, "frozen_features", lambda model, inputs: inputs["x"])


def clusters(seed, centres, n=60, width=24, noise=0.3):
    """[n * centres, width] around centres, each a number at its own place."""
    g = torch.Generator().manual_seed(seed)
    x = noise * torch.randn(len(centres) * n, width, generator=g)
    for i, (place, value) in enumerate(centres):
        x[i * n : (i + 1) * n, place] += value
    return x


def test_a_task_of_several_modes_has_a_centroid_for_each(monkeypatch):
    as_features(monkeypatch)
    router = NearestCentroid(None)
    found = router.fit("two", [{"x": x} for x in clusters(0, [(0, 3.0), (0, -3.0)]).split(17)])
    assert found["mean"].shape == (2, 24)
    assert sorted(found["count"].tolist()) == [60, 60]
    torch.testing.assert_close(found["mean"][:, 0].sort().values, torch.tensor([-3.0, 3.0]), rtol=0, atol=0.15)
    assert found["variance"].max() < 0.2
    assert router.fit("one", [{"x": clusters(1, [(1, 3.0)])}])["mean"].shape == (24,)
    single = type("Single", (NearestCentroid,), {"modes": 1})(None)
    assert single.fit("two", [{"x": clusters(0, [(0, 3.0), (0, -3.0)])}])["mean"].shape == (24,)
    assert NearestCentroid(None).fit("noise", [{"x": clusters(2, [(2, 0.0)], n=200)}])["mean"].shape == (24,)
    # A task in the middle of the other's two modes, whose mean is the same.
    router.fit("middle", [{"x": clusters(3, [(0, 0.0)])}])
    for at, name in ((0, "two"), (1, "middle")):
        x = clusters(10 + at, [(0, 3.0), (0, -3.0)] if name == "two" else [(0, 0.0)])
        assert set(router.route({"x": x})) == {name}


def test_a_centroid_for_each_mode_depends_on_no_other_task_and_is_found_again(monkeypatch):
    as_features(monkeypatch)
    x = clusters(0, [(0, 3.0), (1, 3.0), (2, 3.0)])
    first, second = NearestCentroid(None), NearestCentroid(None)
    second.fit("other", [{"x": clusters(5, [(3, 1.0)])}])
    for router in (first, second):
        router.fit("three", [{"x": x}])
    assert first.statistics["three"]["mean"].shape == (3, 24)
    for name, tensor in first.statistics["three"].items():
        assert torch.equal(tensor, second.statistics["three"][name])


def test_a_linear_probe_tells_tasks_that_centroids_do_not(monkeypatch):
    """What tells the tasks is the difference of two numbers that vary together, each much more than they differ."""
    as_features(monkeypatch)

    def samples(seed, shift):
        x = clusters(seed, [(2, 0.0)], n=300)
        x[:, 1] = x[:, 0] * 10 + 0.1 * x[:, 1] + shift
        x[:, 0] *= 10
        return x

    centroid, probe = NearestCentroid(None), LinearProbe(None)
    for router in (centroid, probe):
        for task, shift in (("low", -0.2), ("high", 0.2)):
            router.fit(task, [{"x": samples(len(task), shift)}])
    assert probe.statistics["low"]["features"].shape == (KEPT, 24)
    tests = {task: samples(7 + len(task), shift) for task, shift in (("low", -0.2), ("high", 0.2))}

    def right(router):
        return sum(router.route({"x": x}).count(task) for task, x in tests.items())

    assert right(centroid) < 400  # of 600, by chance 300
    assert right(probe) > 550
    for x in tests.values():  # each sample alone, and the same again from what a bank keeps
        again = LinearProbe(None, probe.statistics)
        assert probe.route({"x": x}) == [again.route({"x": row[None]})[0] for row in x]


def test_a_linear_probe_is_trained_again_when_a_task_comes(monkeypatch):
    as_features(monkeypatch)
    probe = LinearProbe(None)
    with pytest.raises(UserError, match="this router knows no task"):
        probe.route({"x": torch.zeros(1, 24)})
    with pytest.raises(UserError, match="no samples of task 'a'"):
        probe.fit("a", [])
    tasks = {name: clusters(i, [(i, 2.0)]) for i, name in enumerate("abc")}
    for name, x in tasks.items():
        probe.fit(name, [{"x": x}])
        assert set(probe.route({"x": x})) == {name}
    for name, x in tasks.items():
        assert set(probe.route({"x": x})) == {name}
    with pytest.raises(UserError, match="this model has 5 features and the router's tasks 24"):
        probe.route({"x": torch.zeros(1, 5)})


def test_a_run_with_the_probe_is_routed_by_it(suite, tmp_path, lilora, quick):
    options = ["--out", tmp_path / "run", *quick, "--task-identifier", "linear-probe"]
    assert lilora("train", suite / "tasks.yaml", *options)[0] == 0
    code, _, err = lilora("eval", tmp_path / "run", "--tasks", suite / "tasks.yaml", "--routed", "--device", "cpu")
    assert code == 0, err
    bank = Bank.open(tmp_path / "run" / "bank")
    assert {name: list(t.shape) for name, t in bank.load_routers()["count"].items()} == {"features": [12, 64]}
    file = next((tmp_path / "run/bank/tasks").glob("count.router-*"))
    bank.set_router("count", {"features": torch.zeros(3)})
    assert not file.exists()
    with pytest.raises(UserError, match=r"the router of task 'count' has other tensors than features \[n, 64\]"):
        LinearProbe.load(bank, None)
