"""Image classification with models of images alone: heads per task, and `lilora` end to end on a tiny suite."""

import json

import pytest
import torch
import torch.nn.functional as F
import transformers
import yaml
from peft import PeftModel
from PIL import Image
from support.family_configs import TINY_TEXT, TOWER
from support.labelled_images import CLASSES, make_images, manifest_tasks
from transformers import AutoModel, AutoModelForImageClassification, CLIPImageProcessorPil, configuration_utils

from lilora.bank.bank import Bank
from lilora.continual import vision
from lilora.continual.base_model import load_bank
from lilora.continual.classification import LabelledImages
from lilora.continual.kinds import KINDS
from lilora.continual.manifest import load_manifest
from lilora.continual.process_checks import check_processes
from lilora.continual.task_identification import frozen_features
from lilora.continual.trainer import TaskTrainer
from lilora.errors import UserError
from lilora.methods import METHODS
from lilora.reports.scores import ScoreMatrix

SIZE = TOWER | {"image_size": 16, "patch_size": 8}
MODELS = {  # what its checkpoint holds: a classifier of its own, none, a text tower too, a tower that transformers classifies not
    "vit": lambda: transformers.ViTForImageClassification(transformers.ViTConfig(**SIZE, num_labels=7)),
    "dinov2": lambda: transformers.Dinov2Model(transformers.Dinov2Config(**SIZE, mlp_ratio=2)),
    "siglip": lambda: transformers.SiglipModel(transformers.SiglipConfig(vision_config=SIZE, text_config=TINY_TEXT)),
    "siglip_vision_model": lambda: transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**SIZE)),
}


@pytest.fixture(scope="module")
def suite(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vision")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        make().save_pretrained(folder / name)
        CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16).save_pretrained(folder / name)
    make_images(folder / "data")
    manifest = {"name": "tiny", "kind": "classification", "data": "data", "model": "./vit", "tasks": manifest_tasks()}
    (folder / "tasks.yaml").write_text(yaml.safe_dump(manifest))
    return folder


OPTIONS = "--r 4 --lr 0.02 --max-steps 4 --batch-size 5 --gradient-accumulation 2 --save-steps 1 --device cpu --quiet"


def command(suite, out, *more):
    return ["train", suite / "tasks.yaml", "--out", out, *OPTIONS.split(), *more]


@pytest.fixture(scope="module")
def finished(suite, tmp_path_factory):
    import lilora.cli as cli

    folder = tmp_path_factory.mktemp("finished") / "run"
    cli.app([str(argument) for argument in command(suite, folder)], standalone_mode=False)
    return folder


def one_sentence(err):
    (line,) = [line for line in err.splitlines() if line.startswith("lilora: ")]
    assert "Traceback" not in err
    return line


def images_of(suite, task, processor):
    spec = next(spec for spec in load_manifest(suite / "tasks.yaml").tasks if spec.name == task)
    pictures = [Image.open(sample.path) for sample in LabelledImages(spec, "test")]
    return processor(pictures, return_tensors="pt")["pixel_values"]


def read_by_classifier(name, folder, pixels):
    """The feature [B, D] that the family's paper or transformers' classifier takes, from the plain model."""
    model = AutoModel.from_pretrained(folder).eval()
    tower = model.vision_model if name == "siglip" else model
    outputs = tower(pixel_values=pixels)
    tokens = outputs.last_hidden_state
    if name == "siglip_vision_model":
        return outputs.pooler_output
    if name == "siglip":
        return tokens.mean(1)
    return tokens[:, 0] if name == "vit" else torch.cat([tokens[:, 0], tokens[:, 1:].mean(1)], 1)


@pytest.mark.parametrize("name", MODELS)
def test_the_loss_and_the_gradient_of_a_head_are_those_of_a_linear_classifier(name, suite):
    base, _ = vision.load(str(suite / name), torch.float32)
    base.eval().requires_grad_(False)
    pixels, labels = torch.randn(4, 3, 16, 16), torch.tensor([2, 0, 1, 2])
    vision.train_head(base, "a", list("xyz"), {"pixel_values": pixels[:1]})
    loss = base(pixel_values=pixels, labels=labels, num_items_in_batch=9).loss
    loss.backward()

    with torch.no_grad():
        x = read_by_classifier(name, suite / name, pixels).double()
    head = base.classifier.heads["a"]
    error = (x @ head.weight.double().T + head.bias.double()).softmax(1) - F.one_hot(labels, 3)
    logits = x @ head.weight.double().T + head.bias.double()
    assert loss.item() == pytest.approx(F.cross_entropy(logits, labels, reduction="sum").item() / 9, rel=1e-5)
    torch.testing.assert_close(head.weight.grad.double(), error.T @ x / 9, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(frozen_features(base, {"pixel_values": pixels}), F.normalize(x, dim=1).float())


def test_a_checkpoint_with_a_classifier_loads_without_a_warning(suite, monkeypatch):
    said = []
    monkeypatch.setattr(configuration_utils.logger, "warning", said.append)
    vision.load(str(suite / "vit"), torch.float32)
    assert said == []


def test_rows_of_a_batch_have_the_heads_of_their_own_tasks():
    torch.manual_seed(0)
    heads, sizes = vision.TaskHeads(), {"a": 2, "b": 4, "c": 3}
    for task, size in sizes.items():
        heads.add(task, [f"{i}" for i in range(size)], 5, torch.device("cpu"))
    x, rows = torch.randn(6, 5), ["b", "a", "c", "a", "b", "c"]
    with heads.of_rows(rows):
        logits = heads(x)
    for i, task in enumerate(rows):
        weight, bias = (tensor.detach().double() for tensor in heads.heads[task].parameters())
        torch.testing.assert_close(
            logits[i, : sizes[task]].double(), weight @ x[i].double() + bias, rtol=1e-5, atol=1e-6
        )
        assert logits[i, sizes[task] :].eq(-torch.inf).all()
    assert torch.equal(heads(x), x)


def test_a_run_scores_the_tasks_so_far_and_eval_finds_the_same(suite, finished, lilora):
    bank = Bank.open(finished)
    assert bank.config["kind"] == "vision"
    matrix = ScoreMatrix.from_dict(bank.scores["matrix"])
    assert [len(row) for row in matrix.to_dict()["scores"]] == [1, 2, 3]
    code, out, err = lilora("eval", finished, "--tasks", suite / "tasks.yaml", "--batch-size", 4, "--json")
    assert code == 0, err
    assert [cell["score"] for cell in json.loads(out).values()] == matrix.scores()[-1].tolist()
    sizes = [info["info"]["parameters"] for info in bank.describe()["tasks"]]
    heads = [(16 + 1) * len(CLASSES[task]) for task in CLASSES]
    stored = [task["parameters"] for task in bank.describe()["tasks"]]
    shared = bank.describe()["shared"][0]["parameters"]
    assert sizes == [shared + sum(stored[: i + 1]) for i in range(3)]
    assert [sum(v.numel() for k, v in bank.load_task(t)[0].items() if "head" in k) for t in CLASSES] == heads


def test_an_image_of_no_named_task_has_the_head_of_the_one_that_is_found(suite, finished, tmp_path, lilora):
    code, out, err = lilora(
        "eval", finished, "--tasks", suite / "tasks.yaml", "--routed", "--predictions", tmp_path, "--json"
    )
    assert code == 0, err
    cells = json.loads(out)
    _, method, processor = load_bank(finished, None, "cpu")
    for task in CLASSES:
        assert sum(cells[task]["routes"].values()) == 10
        said = [json.loads(line) for line in (tmp_path / f"{task}-routed.jsonl").read_text().splitlines()]
        names = {name for other in cells[task]["routes"] for name in CLASSES[other]}
        assert {line["answer"] for line in said} <= names
        right = sum(line["answer"] == line["reference"] for line in said)
        assert cells[task]["routed_score"] == pytest.approx(10 * right)
    pixels = images_of(suite, "size", processor)
    plain = read_by_classifier("vit", suite / "vit", pixels)
    torch.testing.assert_close(frozen_features(method.model, {"pixel_values": pixels}), F.normalize(plain, dim=1))


@torch.no_grad()
def test_rows_of_a_mixed_batch_exports_and_merged_models_agree(suite, finished, tmp_path, lilora):
    _, method, processor = load_bank(finished, None, "cpu")
    method.model.eval()
    pixels, rows = images_of(suite, "size", processor), ["size", "colour", "count", "count", "colour"] * 2
    with method.base.classifier.of_rows(rows):
        logits = method.model(pixel_values=pixels, task_ids=rows).logits
    assert lilora("bank", "export", finished, "--out", tmp_path / "loras")[0] == 0
    for task, classes in CLASSES.items():
        own = torch.tensor([name == task for name in rows])
        base = AutoModelForImageClassification.from_pretrained(
            suite / "vit", num_labels=len(classes), ignore_mismatched_sizes=True
        )
        plain = base(pixel_values=pixels).logits[own]
        exported = PeftModel.from_pretrained(base, tmp_path / "loras" / task).eval()(pixel_values=pixels).logits[own]
        torch.testing.assert_close(logits[own, : len(classes)], exported, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(plain, exported, atol=1e-2)
    assert lilora("bank", "merge", finished, "--task", "size", "--out", tmp_path / "merged")[0] == 0
    merged = AutoModelForImageClassification.from_pretrained(tmp_path / "merged").eval()
    own = torch.tensor([name == "size" for name in rows])
    torch.testing.assert_close(merged(pixel_values=pixels).logits[own], logits[own, :3], rtol=1e-4, atol=1e-5)
    assert list(merged.config.id2label.values()) == CLASSES["size"]
    assert merged.config.architectures == ["ViTForImageClassification"]


@pytest.mark.usefixtures("resumed")
def test_an_interrupted_run_ends_with_the_same_heads(suite, finished, tmp_path, lilora, monkeypatch):
    calls, step = [], TaskTrainer.training_step

    def stopping(*args, **kwargs):
        calls.append(None)
        if len(calls) == 13:  # in the second task
            raise SystemExit(9)
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(TaskTrainer, "training_step", stopping)
        assert lilora(*command(suite, tmp_path / "run"))[0] == 9
    code, _, err = lilora(*command(suite, tmp_path / "run"))
    assert code == 0, err
    whole, again = Bank.open(finished), Bank.open(tmp_path / "run")
    assert again.scores["matrix"] == whole.scores["matrix"]
    for task in whole.tasks:
        assert again.task_fingerprint(task) == whole.task_fingerprint(task)


OTHERS = {
    "lora": ["--model", "dinov2"],
    "dirlora": ["--model", "siglip"],
    "olora": ["--model", "siglip_vision_model"],
    "moelora": ["--set", "experts=2", "--model", "dinov2"],
    "dac": ["--set", "active=2", "--set", "critical=2", "--set", "guide=mean", "--model", "siglip"],
}


@pytest.mark.parametrize("method", OTHERS)
def test_every_method_restores_its_heads(method, suite, tmp_path, lilora):
    options = [suite / name if name in MODELS else name for name in OTHERS[method]]
    code, out, err = lilora(
        *command(suite, tmp_path, "--method", method, "--max-steps", 2, *options, "--order", "colour,count", "--json")
    )
    assert code == 0, err
    scores = json.loads(out)["matrix"]["scores"]
    evaluation = ["eval", tmp_path, "--tasks", suite / "tasks.yaml", "--json"]
    code, out, err = lilora(*evaluation)
    assert code == 0, err
    assert [cell["score"] for cell in json.loads(out).values()] == scores[-1]
    code, out, err = lilora(*evaluation, "--routed")
    if method in ("lora", "dirlora"):
        assert all(sum(cell["routes"].values()) == 10 for cell in json.loads(out).values())
    else:  # whose layers cannot be turned off, for the frozen features
        assert "which adds it or says why not" in one_sentence(err)


def test_sharded_classifiers_are_refused(monkeypatch):
    monkeypatch.setattr("lilora.continual.processes.sharded", lambda: True)
    with pytest.raises(UserError, match="FSDP2 would shard the tasks' classifiers too"):
        check_processes(METHODS["lilora"], KINDS["vision"], 8)


@pytest.mark.parametrize("method", ["ewc", "joint", "replay", "zero-shot"])
def test_a_method_that_is_refused_names_those_that_are_not(method):
    with pytest.raises(UserError) as refused:
        KINDS["vision"].check_method(METHODS[method])
    named = {word.strip(",") for word in str(refused.value).partition("choose one of ")[2].split()}
    assert {"lilora", "lora", "xgblora"} <= named
    assert not named & {"ewc", "joint", "replay", "zero-shot"}


def test_what_does_not_go_together_is_one_sentence(suite, finished, tmp_path, lilora):
    other = yaml.safe_load((suite / "tasks.yaml").read_text()) | {"data": str(suite / "data")}
    other["tasks"][1]["classes"] = ["one", "three"]
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(other))
    probe = {name: value for name, value in other["tasks"][1].items() if name != "train"} | {"probe": True}
    (tmp_path / "probe.yaml").write_text(yaml.safe_dump(other | {"tasks": [other["tasks"][0], probe]}))
    out = tmp_path / "out"
    tower = tmp_path / "tower"
    lilora(*command(suite, tower, "--model", suite / "siglip_vision_model", "--order", "count", "--max-steps", 1))
    for arguments, words in (
        (
            command(suite, out, "--method", "ewc"),
            "--method ewc cannot train on tasks of this kind of manifest; choose one of adalora, cia, clora, dac, dirlora, "
            "lilora, lora, moelora, nlora, olora, sdlora, sefe, slao, sora, xgblora",
        ),
        (
            command(suite, out, "--method", "joint"),
            "choose one of adalora, cia, clora, dac, dirlora, lilora, lora, moe",
        ),
        (("generate", finished, "--prompt", "x"), "classifies images and writes no text; use lilora eval"),
        (
            ("eval", finished, "--tasks", tmp_path / "other.yaml"),
            "was trained with the classes one, two, and the manifest has",
        ),
        (("eval", finished, "--tasks", tmp_path / "probe.yaml"), "is a probe, which no classifier is trained for"),
        (("bank", "export", finished, "--format", "lilora", "--out", out), "have classifiers of their own"),
        (
            ("bank", "export", tower, "--task", "count", "--out", out),
            "no image classifier of type 'siglip_vision_model'",
        ),
        (("bank", "merge", finished, "--out", out), "--task is missing"),
    ):
        code, _, err = lilora(*arguments)
        assert (code, words in one_sentence(err)) == (2, True), err
        assert not out.exists()
