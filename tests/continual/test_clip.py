"""Image classification with CLIP: manifests, the loss, the zero-shot heads, and `lilora` end to end on a tiny suite."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from PIL import Image
from support.labelled_images import CLASSES
from support.tiny_clip import Plain
from transformers import CLIPModel, CLIPProcessor

from lilora.bank.bank import Bank
from lilora.continual import clip
from lilora.continual.base_model import load_bank
from lilora.continual.classification import ImageTask, LabelledImages
from lilora.continual.manifest import load_manifest
from lilora.continual.run import ContinualRun
from lilora.continual.trainer import TaskTrainer
from lilora.errors import UserError
from lilora.reports.report import write_report
from lilora.reports.runs import Run
from lilora.reports.scores import ScoreMatrix

# --- manifests ----------------------------------------------------------------------------------------------------------


def first(**changes):
    return lambda content: content["tasks"][0].update(changes)


def second(**changes):
    return lambda content: content["tasks"][1].update(changes)


def test_folders_and_lists_and_the_ways_to_name_classes(images, written, tmp_path):
    manifest = load_manifest(images / "clip.yaml", order=["size", "colour"])
    assert [task.name for task in manifest.tasks] == ["size", "colour"]
    size, colour = (LabelledImages(task, "train") for task in manifest.tasks)
    assert size.classes == CLASSES["size"]
    assert colour.classes == sorted(CLASSES["colour"])
    for data in (size, colour):
        assert len(data) == 10
        for sample in data:
            assert sample.path.parent.name.replace("_", " ") == data.classes[sample.label]
    (tmp_path / "names.txt").write_text("\n".join(CLASSES["count"]) + "\n\n", encoding="utf-8-sig")
    (tmp_path / "names.json").write_text(json.dumps(CLASSES["count"]), encoding="utf-8-sig")
    for file in ("names.txt", "names.json"):
        task = written(second(classes=str(tmp_path / file))).tasks[1]
        assert LabelledImages(task, "test").classes == CLASSES["count"]
    task = written(first(classes={"red": "crimson", "blue": "azure", "green": "lime"})).tasks[0]
    data = LabelledImages(task, "test")
    assert data.classes == ["crimson", "azure", "lime"]
    assert {(s.path.parent.name, s.label) for s in data} == {("red", 0), ("blue", 1), ("green", 2)}


def test_labels_may_be_names_or_numbers(images, written, tmp_path):
    records = [{"image": f"{name}/x.png", "label": name} for name in ("two", "one")]
    (tmp_path / "list.json").write_text("\n".join(map(json.dumps, records)))  # JSON lines
    task = ImageTask(
        name="a", train=tmp_path / "list.json", test=tmp_path / "list.json", classes=["one", "two"], images=tmp_path
    )
    assert [(s.path.parent.name, s.label) for s in LabelledImages(task, "train")] == [("two", 1), ("one", 0)]


def test_integers_where_names_are_numbers_too(images, tmp_path):
    """Written as text it is a name."""
    file = tmp_path / "list.json"
    path = str(next((images / "data" / "count").rglob("*.png")).relative_to(images / "data"))
    for labels in ([0, 1, 2], ["2", "0", "1"]):
        file.write_text(json.dumps([{"image": path, "label": label} for label in labels]))
        task = ImageTask(name="a", train=file, test=file, classes=["2", "0", "1"], images=images / "data")
        if labels == [0, 1, 2]:
            with pytest.raises(UserError, match="may be the names of classes or their numbers; write them as text"):
                LabelledImages(task, "train")
        else:
            assert [sample.label for sample in LabelledImages(task, "train")] == [0, 1, 2]
    file.write_text(json.dumps([{"image": path, "label": label} for label in (1, 2, 3)]))
    task = ImageTask(name="a", train=file, test=file, classes=["1", "2", "3"], images=images / "data")
    assert [sample.label for sample in LabelledImages(task, "train")] == [0, 1, 2]
    few = tmp_path / "few.json"  # what its labels are the other split tells
    few.write_text(json.dumps([{"image": path, "label": label} for label in (1, 2)]))
    task = ImageTask(name="a", train=file, test=few, classes=["1", "2", "3"], images=images / "data")
    assert [sample.label for sample in LabelledImages(task, "test")] == [0, 1]
    file.write_text(json.dumps([{"image": path, "label": label} for label in (0, 1, 2)]))
    task = ImageTask(name="a", train=file, test=file, classes=["1", "2", "3"], images=images / "data")
    assert [sample.label for sample in LabelledImages(task, "train")] == [0, 1, 2]
    file.write_text(json.dumps([{"image": path, "label": label} for label in range(12)]))
    task = ImageTask(name="a", train=file, test=file, images=images / "data")  # names in the order of text
    assert [task.class_names()[sample.label] for sample in LabelledImages(task, "train")] == list(map(str, range(12)))


def test_a_class_that_spells_a_control_token_is_text(images):
    processor = CLIPProcessor.from_pretrained(images / "base")
    ids = clip.tokenised(processor, ["a </s> red", "a red"])["input_ids"]
    end = processor.tokenizer.eos_token_id
    assert (ids == end).sum(1).tolist() == [1, 1]


def test_shots_are_the_same_images_in_every_run_and_only_of_training(written):
    task = written(lambda content: content.update(shots=2)).tasks[0]
    data = LabelledImages(task, "train")
    assert [s.label for s in data] == [0, 0, 1, 1, 2, 2]
    assert [s.index for s in data] == list(range(6))
    assert len({s.path for s in data}) == 6
    assert LabelledImages(task, "train").samples == data.samples
    assert len(LabelledImages(task, "test")) == 10
    assert len(LabelledImages(task.model_copy(update={"shots": 100}), "train")) == 10


def test_defaults_of_the_manifest_and_what_a_task_sets_itself(written):
    def change(content):
        content.update(shots=1, template_per="task")
        content["tasks"][1].update(shots=3, templates=["one {}"])

    tasks = written(change).tasks
    assert [task.shots for task in tasks] == [1, 3, 1]
    assert [task.template_per for task in tasks] == ["task"] * 3
    assert [task.templates for task in tasks] == [("a {}", "a photo of a {}"), ("one {}",), ("a {}", "a photo of a {}")]
    assert len(written(lambda content: content.pop("templates")).tasks[0].templates) > 1


@pytest.mark.parametrize(
    "change, sentence",
    [
        (lambda m: m.update(kind="segmentation"), "kind 'segmentation' is unknown; choose one of instruction, class"),
        (lambda m: m.update(kind=[1]), "kind '[1]' is unknown"),
        (lambda m: m.update(template=["{}"]), "key 'template' is unknown; did you mean 'templates'?"),
        (first(scorer="exact"), "key 'scorer' of task number 1 is unknown; known are name, train, validation"),
        (first(class_names=[]), "key 'class_names' of task number 1 is unknown"),
        (lambda m: m.update(shots=0), "key 'shots' is 0; it must be greater than or equal to 1"),
        (first(shots=-1), "key 'shots' of task number 1 is -1; it must be"),
        (lambda m: m.update(templates=["a photo"]), "key 'templates': template 'a photo' must have one {}"),
        (first(templates=["{} {}"]), "key 'templates' of task number 1: template '{} {}' must have one {}"),
        (first(templates=[]), "key 'templates' of task number 1 is []; it must have at least 1 item, not 0"),
        (
            first(template_per="epoch"),
            "key 'template_per' of task number 1 is 'epoch'; it must be 'sample' or 'task'",
        ),
        (
            lambda m: m.update(label_space="every"),
            "key 'label_space' is 'every'; it must be 'task', 'all' or 'seen'",
        ),
        (first(label_space="all"), "key 'label_space' of task number 1 is unknown"),
        (lambda m: m.update(tasks=[3]), "task number 1 is 3; it must be a mapping"),
        (first(train="colour/nothing"), "nothing cannot be read (No such file or directory)"),
        (first(train="colour"), "colour has no images; add some"),
        (first(classes=["red", "green"]), "has the label 'blue', no class of the task (0, 1, red, green)"),
        (second(classes=["one"]), "has the label 1, no class of the task (0, one)"),
        (second(classes=["one", "one"]), "task 'count' has two classes called 'one'"),
        (second(classes=[]), "task 'count' has no classes; name them"),
        (second(classes="gone.json"), "gone.json cannot be read"),
        (second(classes="gone.txt"), "gone.txt cannot be read"),
        (second(classes="count/train.json"), "train.json is not a list of class names or a mapping"),
        (second(images="nowhere"), "0.png is missing; add it or pass its folder with --data"),
        (first(test="colour/train/red"), "red has no images"),
    ],
)
def test_a_wrong_manifest_is_one_sentence(written, change, sentence):
    with pytest.raises(UserError) as error:
        written(change)
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["[]", "{", '[{"image": "x.png"}]', '[{"image": 1, "label": 0}]'])
def test_a_broken_list_or_image_is_named(content, written, tmp_path):
    (tmp_path / "list.json").write_text(content)
    with pytest.raises(
        UserError,
        match=r"task 'count': .*list\.json( has no images|: (record 1, )?line 1 is no \{image, label\})",
    ):
        written(second(test=str(tmp_path / "list.json")))
    (tmp_path / "broken.png").write_bytes(b"\x89PNG")
    (tmp_path / "list.json").write_text(json.dumps([{"image": str(tmp_path / "broken.png"), "label": 0}]))
    with pytest.raises(UserError, match=r"broken\.png cannot be opened"):
        written(second(test=str(tmp_path / "list.json")))


# --- loss and heads -----------------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_pairs_whose_classes_match(images):
    logits = torch.randn(7, 7, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([2, 0, 2, 1, 0, 2, 5])
    wanted = 0.0
    for side in (logits, logits.T):
        for i in range(7):
            matching = [j for j in range(7) if labels[j] == labels[i]]
            wanted = wanted - sum(side[i].log_softmax(0)[j] for j in matching) / len(matching) / 7 / 2
    torch.testing.assert_close(clip.contrastive_loss(logits, labels).double(), wanted, rtol=1e-6, atol=1e-6)
    unlike = torch.arange(7)
    plain = (F.cross_entropy(logits, unlike) + F.cross_entropy(logits.T, unlike)) / 2
    torch.testing.assert_close(clip.contrastive_loss(logits, unlike).double(), plain, rtol=1e-6, atol=1e-6)


def test_the_model_is_clip_with_a_loss_of_the_pairs_of_a_step(images):
    model, processor = clip.load(str(images / "base"), torch.float32)
    data, collate = clip.training_data(load_manifest(images / "clip.yaml").tasks[:1], processor)
    inputs = collate([data[i] for i in (0, 3, 5, 7)])
    labels = inputs.pop("labels")
    plain = CLIPModel.from_pretrained(images / "base")(**inputs)
    outputs = model(**inputs, labels=labels)
    torch.testing.assert_close(outputs.logits_per_image, plain.logits_per_image)
    torch.testing.assert_close(outputs.loss, clip.contrastive_loss(plain.logits_per_image, labels))
    torch.testing.assert_close(model(**inputs, labels=labels, num_items_in_batch=8).loss, outputs.loss / 2)
    assert model(**inputs).loss is None


def test_pairs_have_a_prompt_of_their_class_and_templates_that_a_resumed_run_draws_again(images, written):
    _, processor = clip.load(str(images / "base"), torch.float32)
    data, collate = clip.training_data(load_manifest(images / "clip.yaml").tasks[2:], processor)
    classes = data.parts[0].classes
    decode = processor.tokenizer.batch_decode
    seen = set()
    for seed in range(20):
        batch = random.Random(seed).sample(list(data), 6)
        inputs = collate(batch)
        for text, (_, sample) in zip(decode(inputs["input_ids"], skip_special_tokens=True), batch, strict=True):
            name = classes[sample.label]
            assert text in (f"a {name}", f"a photo of a {name}")
            seen.add((sample.index, text))
        assert inputs["labels"].tolist() == [sample.label for _, sample in batch]
        torch.testing.assert_close(collate(batch), inputs)
    assert len(seen) == 2 * len(data), "every image is seen with both templates"
    task = written(lambda content: content.update(template_per="task")).tasks[2]
    per_task = []
    for seed in range(6):
        torch.manual_seed(seed)
        data, collate = clip.training_data([task], processor)
        texts = decode(collate(list(data))["input_ids"], skip_special_tokens=True)
        per_task.append({"photo" in text for text in texts})
    assert sorted(map(sorted, {frozenset(kinds) for kinds in per_task})) == [[False], [True]]


def test_zero_shot_scores_are_those_of_normalised_mean_prompts(images):
    model, processor = clip.load(str(images / "base"), torch.float32)
    model.eval()

    method = Plain(model)
    tasks = load_manifest(images / "clip.yaml").tasks
    scores = [clip.evaluate(method, processor, tasks, batch_size) for batch_size in (3, 64)]
    for spec, small, large in zip(tasks, *scores, strict=True):
        data = LabelledImages(spec, "test")
        head = []
        for name in data.classes:
            texts = processor.tokenizer(
                [t.replace("{}", name) for t in spec.templates], padding=True, return_tensors="pt"
            )
            features = model.get_text_features(**texts).pooler_output
            mean = (features / features.norm(dim=1, keepdim=True)).mean(0)
            head.append(mean / mean.norm())
        right = 0
        for sample, answer in zip(data, small.answers, strict=True):
            pixels = processor.image_processor([Image.open(sample.path)], return_tensors="pt")["pixel_values"]
            feature = model.get_image_features(pixels).pooler_output[0]
            said = int((100 * torch.stack(head) @ (feature / feature.norm())).argmax())
            assert answer["answer"] == data.classes[said]
            right += said == sample.label
        assert small.score == large.score == pytest.approx(100 * right / len(data))


# --- metrics ------------------------------------------------------------------------------------------------------------

BY_HAND = [[90, 40, 50, 20], [70, 80, 30, 10], [60, 75, 95, 30], [50, 70, 85, 99]]


def full(tasks="abcd"):
    matrix = ScoreMatrix(list(tasks), unseen=True)
    for after, row in zip(tasks, BY_HAND, strict=True):
        for task, score in zip(tasks, row, strict=True):
            matrix.set(after, task, score)
    return matrix


def test_metrics_of_a_matrix_computed_by_hand():
    metrics = full().metrics()
    assert metrics["Transfer"] == pytest.approx((40 + (50 + 30) / 2 + (20 + 10 + 30) / 3) / 3)
    assert metrics["Avg"] == pytest.approx((200 + 190 + 260 + 304) / 16)
    assert metrics["Last"] == pytest.approx(304 / 4)
    assert metrics["Forgetting"] == pytest.approx((40 + 10 + 10) / 3)
    assert metrics["New"] == pytest.approx((90 + 80 + 95 + 99) / 4)
    assert "AP" not in metrics
    one = ScoreMatrix(["a"], unseen=True)
    one.set("a", "a", 10)
    assert one.undefined()["Transfer"] == "Transfer needs at least 2 tasks, this run has 1"


def test_a_full_matrix_survives_json_and_knows_what_is_missing():
    matrix = ScoreMatrix(list("abcd"), unseen=True)
    assert len(matrix.missing()) == 16
    matrix.set("a", "d", 7)
    matrix.copy("b", "d", from_after="a")
    again = ScoreMatrix.from_dict(json.loads(json.dumps(matrix.to_dict())))
    assert again.to_dict() == matrix.to_dict()
    assert again.carried_from("b", "d") == "a"
    assert again.undefined()["Transfer"].startswith(
        "Transfer needs cells that are missing: b after a, c after a, c after b"
    )
    assert "| b | n/a | n/a | n/a | 7.0* |" in matrix.markdown()
    with pytest.raises(UserError, match=r"rows of length \[1, 1\]; the tasks want \[2, 2\]"):
        ScoreMatrix.from_dict(ScoreMatrix(["a", "b"], unseen=True).to_dict() | {"scores": [[1], [2]]})


def test_a_matrix_of_an_earlier_version_is_read():
    old = {"tasks": ["a", "b"], "scores": [[1.0], [2.0, 3.0]], "format_shares": [[None], [None, None]]}
    matrix = ScoreMatrix.from_dict(old | {"carried_from": [[None], [None, None]]})
    assert not matrix.unseen
    assert matrix.metrics()["AP"] == 2.5


def test_runs_scored_on_unseen_tasks_are_not_reported_with_others(tmp_path):
    with pytest.raises(UserError, match="one was scored on tasks before it was trained on them and one was not"):
        write_report(tmp_path / "out", [Run("dac", 0, full()), Run("lora", 0, ScoreMatrix(list("abcd")))])
    assert not (tmp_path / "out").exists()
    page = write_report(tmp_path, [Run("dac", 0, full())]).read_text()
    for score in itertools.chain(*BY_HAND):
        assert f">{score:.1f}<" in page


# --- the command --------------------------------------------------------------------------------------------------------

OPTIONS = (
    "--r 4 --alpha 4 --dropout 0.1 --lr 0.01 --max-steps 4 --batch-size 5 --gradient-accumulation 2 --save-steps 1"
)
METHODS = {
    "dac": ["--set", "active=2", "--set", "critical=2"],
    "lora": [],
    "dirlora": [],
    "lilora": ["--sub-rank", "2"],
    "olora": [],
    "moelora": ["--set", "experts=2"],
    "joint": [],
    "replay": ["--set", "memory=3"],
    "sdlora": [],
    "sora": [],
}


def command(images, out, method="dac"):
    options = ["--method", method, *OPTIONS.split(), *METHODS[method], "--device", "cpu", "--quiet"]
    return ["train", images / "clip.yaml", "--out", out, *options]


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory):
    import lilora.cli as cli

    folder = tmp_path_factory.mktemp("finished") / "run"
    cli.app([str(argument) for argument in command(images, folder)], standalone_mode=False)
    return folder


@pytest.mark.parametrize("method", [name for name in METHODS if name != "dac"])
def test_every_method_scores_all_tasks_after_each(method, images, tmp_path, lilora):
    code, out, err = lilora(*command(images, tmp_path / "run", method), "--max-steps", "2", "--json")
    assert code == 0, err
    run = json.loads(out)
    assert [len(row) for row in run["matrix"]["scores"]] == [3, 3, 3]
    assert list(run["metrics"])[:3] == ["Transfer", "Avg", "Last"]
    assert not any(value is None for value in run["metrics"].values())
    carried = run["matrix"]["carried_from"]
    if method in ("dirlora", "lilora"):  # the base until a task is learned, the task's adapter from then on
        assert carried == [[None] * 3, ["colour", None, "colour"], ["colour", "count", None]]
    elif method == "joint":  # one training
        assert carried == [[None] * 3, ["colour"] * 3, ["colour"] * 3]
    else:
        assert not any(cell for row in carried for cell in row)
    assert len(list((tmp_path / "run" / "predictions").iterdir())) == 9 - sum(c is not None for r in carried for c in r)


def test_eval_and_report_of_a_bank(images, finished, tmp_path, lilora, reported):
    code, out, err = lilora("eval", finished, "--tasks", images / "clip.yaml", "--device", "cpu", "--json")
    assert code == 0, err
    matrix = ScoreMatrix.from_dict(Bank.open(finished / "bank").scores["matrix"])
    assert not matrix.missing()
    assert len(list((finished / "predictions").iterdir())) == 9
    want = matrix.scores()[-1].tolist()
    assert [cell["score"] for cell in json.loads(out).values()] == want
    code, out, err = lilora("report", finished, "--out", tmp_path, "--json")
    assert code == 0, err
    assert json.loads(out)["runs"][0]["metrics"]["Last"] == pytest.approx(np.mean(want))
    page = (tmp_path / "report.html").read_text()
    assert "Transfer" in page
    assert page.count('class="cell"') == 9
    assert "Transfer" in json.loads((tmp_path / "metrics.json").read_text())["definitions"]


def test_images_of_any_task_are_routed_by_the_frozen_encoder(images, tmp_path, lilora):
    options = ("--order", "colour,count", "--max-steps", "2", "--lr", "0.1")
    code, _, err = lilora(*command(images, tmp_path / "run", "lilora"), *options)
    assert code == 0, err
    code, out, err = lilora(
        "eval", tmp_path / "run", "--tasks", images / "clip.yaml", "--device", "cpu", "--routed", "--json"
    )
    assert code == 0, err
    cells = json.loads(out)

    model, processor = clip.load(str(images / "base"), torch.float32)
    model.eval()

    def features(spec, split):
        pictures = [Image.open(sample.path) for sample in LabelledImages(spec, split)]
        pixels = processor.image_processor(pictures, return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            return F.normalize(model.get_image_features(pixels).pooler_output, dim=1).double().numpy()

    specs = load_manifest(images / "clip.yaml").tasks
    learned = [features(spec, "train") for spec in specs[:2]]
    pooled = np.mean([x.var(0) for x in learned], 0)
    pooled = 0.99 * pooled + 0.01 * pooled.mean()
    for spec in specs:
        x = features(spec, "test")
        nearest = np.argmin([((x - own.mean(0)) ** 2 / pooled).sum(1) for own in learned], 0)
        counts = {name: int((nearest == i).sum()) for i, name in enumerate(("colour", "count")) if (nearest == i).any()}
        assert cells[spec.name]["routes"] == counts
        right = None if spec.name == "size" else pytest.approx(10 * counts.get(spec.name, 0))
        assert cells[spec.name]["routing_accuracy"] == right
        assert 0 <= cells[spec.name]["routed_score"] <= 100

    _, method, processor = load_bank(tmp_path / "run", None, "cpu")
    with torch.no_grad():
        for name, parameter in method.model.named_parameters():
            if "lilora_" in name:
                parameter.normal_()
    data = LabelledImages(specs[2], "test")
    mixed = ["colour", "count", "count", "size", "colour"] * 2
    said = {
        name: clip.zero_shot(method, processor, specs[2], data, [name] * 10, 4, None)
        for name in ("colour", "count", "size")
    }
    assert len(set(map(tuple, said.values()))) > 1
    got = clip.zero_shot(method, processor, specs[2], data, mixed, 4, None)
    assert got == [said[name][i] for i, name in enumerate(mixed)]


@pytest.mark.usefixtures("resumed")
def test_interrupted_in_steps_and_evaluations_the_run_ends_the_same(images, finished, tmp_path, lilora, monkeypatch):
    def stopping(method, call):
        """The method, stopped in its call of this number, from 1."""
        calls = []

        def run(*args, **kwargs):
            calls.append(None)
            if len(calls) == call:
                raise SystemExit(9)
            return method(*args, **kwargs)

        return run

    step, evaluation = (TaskTrainer, "training_step"), (ContinualRun, "_evaluate")
    for (owner, name), call in ((step, 4), (evaluation, 1), (step, 6), (step, 8)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stopping(getattr(owner, name), call))
            assert lilora(*command(images, tmp_path / "run"))[0] == 9
    code, _, err = lilora(*command(images, tmp_path / "run"))
    assert code == 0, err
    whole, resumed = Bank.open(finished / "bank"), Bank.open(tmp_path / "run" / "bank")
    assert resumed.scores["matrix"] == whole.scores["matrix"]
    for task in whole.tasks:
        assert resumed.shared_fingerprint(task) == whole.shared_fingerprint(task)


def test_a_probe_is_classified_by_the_base_and_then_with_the_newest_task(images, tmp_path, lilora):
    content = yaml.safe_load((images / "clip.yaml").read_text())
    content |= {"data": str(images / "data"), "model": str(images / "base")}
    content["tasks"][2] |= {"probe": True}
    del content["tasks"][2]["train"]
    (tmp_path / "clip.yaml").write_text(yaml.safe_dump(content))
    run = tmp_path / "run"
    train = ["train", tmp_path / "clip.yaml", "--out", run, *command(images, run, "dirlora")[4:], "--lr", 0.1]
    code, _, err = lilora(*train)
    assert code == 0, err
    bank, method, processor = load_bank(run, device="cpu")
    assert bank.scores["zero_shot"].keys() == {"size"}
    assert {after: set(scores) for after, scores in bank.scores["probes"].items()} == {
        "colour": {"size"},
        "count": {"size"},
    }
    (spec,) = load_manifest(tmp_path / "clip.yaml").probes
    data = LabelledImages(spec, "test")
    said = {}
    for stage in ("before", "colour", "count"):
        lines = (run / "predictions" / f"{stage}-size.jsonl").read_text().splitlines()
        said[stage] = [json.loads(line)["answer"] for line in lines]
        wanted = clip.zero_shot(method, processor, spec, data, [stage] * len(data), 4, None)  # of no task: the base
        assert said[stage] == wanted
    assert len(set(map(tuple, said.values()))) > 1


def one_sentence(err):
    (line,) = [line for line in err.splitlines() if line.startswith("lilora: ")]
    assert "Traceback" not in err
    return line


def test_what_does_not_go_together_is_one_sentence(images, suite, finished, tmp_path, lilora):
    out = tmp_path / "run"
    train = command(images, out)
    for arguments, words in (
        ((*train, "--model", suite / "base"), "is of type 'llava'; classification tasks want a model of type 'clip'"),
        (("train", suite / "tasks.yaml", "--out", out, "--model", images / "base"), "--model"),
        (
            (*command(images, out, "lora"), "--method", "ewc"),
            "--method ewc cannot train on tasks of this kind of manifest; choose one of adalora, ",
        ),
        ((*command(images, out, "lora"), "--method", "pclr"), "--method pclr cannot train"),
        (("generate", finished, "--task", "count", "--prompt", "x"), "classifies images and writes no text"),
        (("eval", finished, "--tasks", suite / "tasks.yaml"), "is of kind 'instruction' and"),
    ):
        code, _, err = lilora(*arguments)
        assert (code, words in one_sentence(err)) == (2, True), err
        assert not out.exists()


def test_a_longer_sequence_wants_a_new_run(images, tmp_path, lilora):
    run = tmp_path / "run"
    train = [*command(images, run), "--max-steps", "1"]
    assert lilora(*train, "--order", "colour,count")[0] == 0
    code, _, err = lilora(*train)
    assert code == 2
    assert "start a new run" in one_sentence(err)


# --- the ready manifest -------------------------------------------------------------------------------------------------


EXAMPLES = Path(__file__).parents[2] / "examples"


def picture(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.zeros((8, 8, 3), dtype=np.uint8)).save(path)


def test_the_digits_suite_loads_and_its_base_knows_every_word(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES / "digits")
    import build

    monkeypatch.setitem(
        build.SUITES, "digits-clip", build.SUITES["digits-clip"]._replace(sizes={"train": 40, "test": 9})
    )
    monkeypatch.setattr("sys.argv", ["build.py", "--suite", "digits-clip", "--out", str(tmp_path), "--steps", "2"])
    build.main()
    manifest = load_manifest(EXAMPLES / "digits" / "clip.yaml", data=tmp_path / "data")
    assert [task.name for task in manifest.tasks] == list(build.SUITES["digits-clip"].tasks)
    _, processor = clip.load(str(tmp_path / "base"), "auto")
    for task in manifest.tasks:
        assert len(LabelledImages(task, "test")) == 9
        data, collate = clip.training_data([task], processor)
        assert {sample.label for _, sample in data} == set(range(len(data.parts[0].classes)))
        inputs = collate(list(data))
        assert processor.tokenizer.unk_token_id not in inputs["input_ids"]
        assert inputs["pixel_values"].shape == (40, 3, 32, 32)
