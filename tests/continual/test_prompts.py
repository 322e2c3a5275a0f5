"""`lilora generate --prompts` and `lilora eval --predictions`: many answers with one load."""

import json
import shutil
from collections import Counter

import pytest

from lilora.continual import base_model, evaluate
from lilora.continual.prompts import read_prompts

QUESTIONS = {"colour": "which colour is it ?", "count": "how many are there ?", "name": "name it ?"}


@pytest.fixture
def images(suite):
    return sorted((suite / "data" / "images").iterdir())


@pytest.fixture
def loads(monkeypatch):
    """How often a base model was loaded, and the tasks of every batch."""
    seen = {"models": 0, "batches": []}
    load, generate = base_model.load_base, evaluate.generate

    def counted(*arguments):
        seen["models"] += 1
        return load(*arguments)

    def batched(method, processor, collator, batch, limits):
        seen["batches"].append([task for task, _ in batch])
        return generate(method, processor, collator, batch, limits)

    monkeypatch.setattr(base_model, "load_base", counted)
    monkeypatch.setattr(evaluate, "generate", batched)
    return seen


def write(path, lines):
    path.write_text("".join(f"{line if isinstance(line, str) else json.dumps(line)}\n" for line in lines))
    return path


@pytest.mark.parametrize("kind", ["lilora", "dirlora"])
def test_many_prompts_are_answered_in_their_order_in_mixed_batches(kind, runs, images, tmp_path, lilora, loads):
    tasks = ["count", "colour", "name", "colour", None, "count", "name"]
    asked = ["count", "colour", "name", "colour", "name", "count", "name"]
    lines = [
        {"prompt": QUESTIONS[of], "image": str(images[i])} | ({"task": task} if task else {})
        for i, (task, of) in enumerate(zip(tasks, asked, strict=True))
    ]
    lines[1] |= {"id": "mine"}
    lines[5] |= {"image": []}
    file = write(tmp_path / "prompts.jsonl", [*lines[:3], "", *lines[3:]])
    command = (
        "generate",
        runs / kind,
        "--prompts",
        file,
        "--batch-size",
        "4",
        "--device",
        "cpu",
        "--max-new-tokens",
        "3",
    )
    code, out, err = lilora(*command)
    assert code == 0, err
    answers = [json.loads(line) for line in out.splitlines()]
    assert [answer["id"] for answer in answers] == [1, "mine", 3, 5, 6, 7, 8]
    assert [answer["task"] for answer in answers] == asked
    assert loads["models"] == 1
    if kind == "lilora":
        assert loads["batches"] == [asked[:4], asked[4:]]
    else:
        assert Counter(map(tuple, loads["batches"])) == Counter([("count",) * 2, ("colour",) * 2, ("name",) * 3])
    for i in (0, 4, 5):
        image = ["--image", images[i]] if lines[i]["image"] else []
        one = ("generate", runs / kind, "--task", asked[i], "--prompt", QUESTIONS[asked[i]], *image)
        code, out, _ = lilora(*one, "--device", "cpu")  # the manifest says 3 of each task
        assert (code, out.strip()) == (0, answers[i]["answer"])
    code, out, _ = lilora(*command, "--out", tmp_path / "answers.jsonl")
    assert (code, out) == (0, f"answers: {tmp_path / 'answers.jsonl'}\n")
    assert [json.loads(line) for line in (tmp_path / "answers.jsonl").read_text().splitlines()] == answers


def test_scoring_looks_at_the_manifest_before_it_loads_anything(runs, suite, tmp_path, lilora, loads):
    other = tmp_path / "tasks.yaml"
    other.write_text((suite / "tasks.yaml").read_text().replace("name: count", "name: many"))
    for manifest, words in ((tmp_path / "nowhere.yaml", "cannot be read"), (other, "lacks count of")):
        code, out, err = lilora("eval", runs / "lilora", "--tasks", manifest, "--device", "cpu")
        assert (code, out, loads["models"]) == (2, "", 0)
        assert words in err
        assert len(err.splitlines()) == 1


def test_images_lie_beside_the_file_and_a_task_is_for_lines_without(runs, images, tmp_path, lilora):
    (tmp_path / "cat.png").write_bytes(images[0].read_bytes())
    file = write(tmp_path / "prompts.jsonl", [{"prompt": "name it ?", "image": ["cat.png"]}])
    code, out, err = lilora("generate", runs / "lilora", "--prompts", file, "--task", "count", "--device", "cpu")
    assert code == 0, err
    assert json.loads(out)["task"] == "count"


def test_only_a_line_feed_ends_a_line(tmp_path):
    text = "a\u2028b\u2029c\x85d"
    (tmp_path / "prompts.jsonl").write_text(f'{{"prompt": "{text}"}}\r\n{{"prompt": "next"}}\n', encoding="utf-8")
    assert [(found.id, found.text) for found in read_prompts(tmp_path / "prompts.jsonl")] == [(1, text), (2, "next")]


GOOD = {"prompt": "name it ?", "task": "name"}
BAD = {
    "no json": ("{", "line 2 is no JSON"),
    "no object": (3, "line 2: the line is 3; it must be a mapping of keys to values"),
    "no prompt": ({"task": "name"}, "line 2: key 'prompt' is missing"),
    "number": ({**GOOD, "prompt": 3}, "line 2: key 'prompt' is 3; it must be a valid string"),
    "key": ({**GOOD, "promt": "x"}, "line 2: key 'promt' is unknown; did you mean 'prompt'?"),
    "image list": ({**GOOD, "image": [1]}, "line 2: key 'image' is 1; it must be a valid string"),
    "no image": ({**GOOD, "image": "nowhere.png"}, "line 2: image "),
    "broken image": ({**GOOD, "image": "broken.png"}, "line 2: image "),
    "task": ({**GOOD, "task": "shape"}, "line 2: task 'shape' is unknown"),
    "empty task": ({**GOOD, "task": ""}, "line 2: task '' is unknown"),
    "key twice": ('{"prompt": "x", "task": "name", "task": "count"}', "line 2: the key 'task' is given 2 times"),
    "list": ([GOOD], "line 2: the line is [{"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_line_is_refused_by_its_number_before_anything_is_loaded(name, runs, tmp_path, lilora, loads):
    line, words = BAD[name]
    (tmp_path / "broken.png").write_bytes(b"GIF89a")
    file = write(tmp_path / "prompts.jsonl", [GOOD, line])
    code, out, err = lilora("generate", runs / "lilora", "--prompts", file, "--device", "cpu")
    assert (code, out, loads["models"]) == (2, "", 0)
    assert f"{file} {words}" in err
    assert len(err.splitlines()) == 1


def test_what_does_not_go_together(runs, images, tmp_path, lilora):
    file = write(tmp_path / "prompts.jsonl", [])
    (tmp_path / "there").mkdir()
    image = shutil.copy(images[0], tmp_path / "there")
    asked = write(tmp_path / "asked.jsonl", [GOOD | {"image": str(image)}])
    (tmp_path / "linked.jsonl").symlink_to(asked)
    for options, words in (
        ([], "give either --prompt with one question or --prompts"),
        (["--prompts", file, "--prompt", "x"], "give either"),
        (["--prompts", file, "--image", "x.png"], "--image goes with --prompt"),
        (["--prompt", "x", "--out", tmp_path / "x"], "--out goes with --prompts"),
        (["--prompts", file], "holds no questions"),
        (["--prompts", tmp_path / "none"], "cannot be read"),
        (["--prompts", asked, "--out", tmp_path / "there" / ".." / "asked.jsonl"], "--out would write"),
        (["--prompts", asked, "--out", tmp_path / "linked.jsonl"], f"over {asked}, which the command reads"),
        (["--prompts", asked, "--out", image], f"over {image}, which the command reads"),
    ):
        code, _, err = lilora("generate", runs / "lilora", *options)
        assert (code, words in err) == (2, True), err


@pytest.mark.parametrize("name", ["count", "count-routed"])
def test_predictions_are_not_written_over_what_is_asked(name, suite, runs, tmp_path, lilora):
    (tmp_path / f"{name}.jsonl").hardlink_to(asked := suite / "data" / "count-test.json")
    command = ("eval", runs / "lilora", "--tasks", suite / "tasks.yaml", "--device", "cpu")
    code, out, err = lilora(*command, "--predictions", tmp_path)
    assert (code, out, f"over {asked}, which the command reads" in err) == (2, "", True)


def test_predictions_are_every_answer(suite, runs, tmp_path, lilora):
    command = ("eval", runs / "lilora", "--tasks", suite / "tasks.yaml", "--device", "cpu", "--json", "--routed")
    code, _, err = lilora(*command, "--predictions", tmp_path / "answers")
    assert code == 0, err
    names = {f"{task}{kind}.jsonl" for task in QUESTIONS for kind in ("", "-routed")}
    assert {path.name for path in (tmp_path / "answers").iterdir()} == names
    for task in QUESTIONS:
        kept = (runs / "lilora" / "predictions" / f"{task}-{task}.jsonl").read_text()
        assert (tmp_path / "answers" / f"{task}.jsonl").read_text() == kept
        assert (tmp_path / "answers" / f"{task}-routed.jsonl").read_text() == kept  # every task is found
