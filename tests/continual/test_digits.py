import re
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from lilora.continual.collator import Collator
from lilora.continual.instructions import InstructionDataset
from lilora.continual.manifest import load_manifest
from lilora.continual.scorers import scorer

EXAMPLES = Path(__file__).parents[2] / "examples" / "digits"
MANIFESTS = {"digits": "tasks.yaml", "digits-long": "long.yaml"}


@pytest.fixture
def build(monkeypatch):
    """The build program, writing little."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import build

    for name, suite in build.SUITES.items():
        monkeypatch.setitem(build.SUITES, name, suite._replace(sizes={"train": 12, "test": 8}))

    def run(out, *arguments):
        monkeypatch.setattr("sys.argv", ["build.py", "--out", str(out), "--steps", "2", *arguments])
        build.main()

    return run


@pytest.fixture(params=MANIFESTS)
def manifest(request, build, tmp_path):
    build(tmp_path, "--suite", request.param)
    return load_manifest(EXAMPLES / MANIFESTS[request.param], data=tmp_path / "data")


def test_the_suite_loads_and_its_references_score_and_match_the_format(manifest, tmp_path):
    assert {task.name for task in manifest.tasks} == {p.name for p in (tmp_path / "data").iterdir() if p.is_dir()}
    assert len(manifest.tasks) == {"digits": 6, "digits-long": 12}[manifest.name]
    for task in manifest.tasks:
        for split in ("train", "test"):
            for sample in InstructionDataset(task, split):
                assert scorer(task.scorer)(sample.answers[0], list(sample.answers)) == 1
                assert task.in_format(sample.answers[0], [])


def test_the_base_is_a_standard_folder_that_learns_and_answers_from_the_suite(manifest, tmp_path):
    model = LlavaForConditionalGeneration.from_pretrained(tmp_path / "base")
    processor = AutoProcessor.from_pretrained(tmp_path / "base")
    batch = [(task.name, InstructionDataset(task, "train")[i]) for task in manifest.tasks for i in range(2)]
    index = {task.name: i for i, task in enumerate(manifest.tasks)}
    inputs = Collator(processor, index, train=True)(batch)
    assert processor.tokenizer.unk_token_id not in inputs["input_ids"]
    longest = max(task.max_new_tokens for task in manifest.tasks)
    assert (inputs["labels"] != -100).sum(1).max() <= longest + 1  # the end-of-sequence token may be cut
    task_ids = inputs.pop("task_ids")
    assert task_ids.tolist() == [i for i in range(len(manifest.tasks)) for _ in range(2)]
    model(**inputs).loss.backward()
    prompts = Collator(processor, index, train=False)(batch)
    del prompts["task_ids"]
    answers = model.generate(**prompts, max_new_tokens=2, do_sample=False)
    assert answers.shape[1] <= prompts["input_ids"].shape[1] + 2


def test_every_task_reads_fresh_digits_and_never_shows_the_answer(build):
    from scenes import LONG_TASKS, WORDS, pools

    train, test = pools()
    assert len(train.values) + len(test.values) == 1797
    seen = {strokes.tobytes() for strokes in train.strokes}
    rng = np.random.default_rng(3)
    for name, make in LONG_TASKS.items():
        answers = set()
        for _ in range(60):
            scene, question, answer = make(test, rng)
            answers.add(answer)
            assert not {d.strokes.tobytes() for d in scene} & seen
            assert answer not in question.lower().split()
            assert len({(d.row, d.column) for d in scene}) == len(scene)
        assert len(answers) > 1, name
    assert len(WORDS) == 10


def test_the_pictures_for_the_base_are_what_the_processor_makes(build):
    from base import make_processor, pixels
    from PIL import Image
    from scenes import TASKS, draw, name, pools

    pool, _ = pools()
    scene = name(pool, np.random.default_rng(1))[0]
    expected = make_processor(pool, TASKS.values()).image_processor(Image.fromarray(draw(scene)), return_tensors="pt")
    torch.testing.assert_close(pixels([scene]), expected["pixel_values"])


def expected_answers(scene):
    """What each task of the long suite alone must answer to a picture."""
    values, inks = [d.value for d in scene], [d.ink for d in scene]
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
    return {
        "successor": words[values[0] + 1],
        "tally": words[inks.count("red")],
        "upper": ["yes", "yes", "no", "no"][scene[0].row],
        "smaller": inks[np.argmin(values)],
        "row": ["first", "second", "third", "fourth"][scene[0].row],
        "greatest": str(np.max(values)),
    }


def test_the_tasks_that_the_long_suite_adds_are_answered_right(build):
    from scenes import LONG_TASKS, TASKS, pools

    pool, rng = pools()[1], np.random.default_rng(5)
    for name in LONG_TASKS.keys() - TASKS.keys():
        for _ in range(60):
            scene, _, answer = LONG_TASKS[name](pool, rng)
            assert answer == expected_answers(scene)[name], name


def test_questions_of_different_tasks_share_few_words(build):
    """Methods that take the task from the question must be able to."""
    from scenes import LONG_TASKS, pools

    pool, rng = pools()[1], np.random.default_rng(6)
    words = {name: set(re.findall(r"\w+", make(pool, rng)[1].lower())) for name, make in LONG_TASKS.items()}
    for (name, own), (other, theirs) in combinations(words.items(), 2):
        assert len(own & theirs) <= min(len(own), len(theirs)) / 2, (name, other)


def test_the_long_suite_begins_with_the_samples_of_the_six_tasks(build, tmp_path):
    from scenes import TASKS

    import build as module

    for name in MANIFESTS:
        module.write_data(tmp_path / name, module.SUITES[name], seed=0)
    for file in (Path(task, f"{split}.json") for task in TASKS for split in ("train", "test")):
        assert (tmp_path / "digits" / file).read_bytes() == (tmp_path / "digits-long" / file).read_bytes()


def test_a_second_run_does_nothing_and_another_seed_writes_anew(build, tmp_path):
    build(tmp_path)
    files = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    build(tmp_path)
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == files
    first = (tmp_path / "data" / "name" / "train.json").read_text()
    build(tmp_path, "--seed", "1")
    assert (tmp_path / "data" / "name" / "train.json").read_text() != first
    assert sorted(p.name for p in tmp_path.iterdir()) == ["base", "data"]


def test_the_same_seed_writes_the_same_files(build, tmp_path):
    build(tmp_path / "a")
    build(tmp_path / "b")
    for part in ("data", "base"):
        a, b = (
            {p.relative_to(tmp_path / side): p.read_bytes() for p in (tmp_path / side / part).rglob("*") if p.is_file()}
            for side in "ab"
        )
        assert a == b


def test_a_folder_of_somebody_else_is_left_alone(build, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "thesis.txt").write_text("mine")
    with pytest.raises(SystemExit) as exit_:
        build(tmp_path)
    assert exit_.value.code == 2
    assert "was not written by this program" in capsys.readouterr().err
    assert (tmp_path / "data" / "thesis.txt").read_text() == "mine"


def test_a_failed_build_leaves_nothing_behind(build, tmp_path, monkeypatch):
    import build as module

    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(module, "write_task", fail)
    with pytest.raises(KeyboardInterrupt):
        build(tmp_path)
    assert list(tmp_path.iterdir()) == []
