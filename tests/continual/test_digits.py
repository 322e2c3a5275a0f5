import re
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoProcessor, LlavaForConditionalGeneration

from lilora.continual.scorers import scorer
from lilora.continual.tasks import Collator, InstructionDataset, load_manifest

EXAMPLES = Path(__file__).parents[2] / "examples" / "digits"


@pytest.fixture
def build(monkeypatch):
    """The build program, writing little."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import build

    monkeypatch.setattr(build, "SIZES", {"train": 12, "test": 8})

    def run(out, *arguments):
        monkeypatch.setattr("sys.argv", ["build.py", "--out", str(out), "--steps", "2", *arguments])
        build.main()

    return run


@pytest.fixture
def manifest(build, tmp_path):
    build(tmp_path)
    return load_manifest(EXAMPLES / "tasks.yaml", data=tmp_path / "data")


def test_the_suite_loads_and_its_references_score_and_match_the_format(manifest):
    assert len(manifest.tasks) == 6
    for task in manifest.tasks:
        for split in ("train", "test"):
            for sample in InstructionDataset(task, split):
                assert scorer(task.scorer)(sample.answers[0], list(sample.answers)) == 1
                assert re.fullmatch(task.answer_format, sample.answers[0])


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
    assert task_ids.tolist() == [i for i in range(6) for _ in range(2)]
    model(**inputs).loss.backward()
    prompts = Collator(processor, index, train=False)(batch)
    del prompts["task_ids"]
    answers = model.generate(**prompts, max_new_tokens=2, do_sample=False)
    assert answers.shape[1] <= prompts["input_ids"].shape[1] + 2


def test_every_task_reads_fresh_digits_and_never_shows_the_answer(build):
    from scenes import TASKS, WORDS, pools

    train, test = pools()
    assert len(train.values) + len(test.values) == 1797
    seen = {strokes.tobytes() for strokes in train.strokes}
    rng = np.random.default_rng(3)
    for name, make in TASKS.items():
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
    from scenes import draw, name, pools

    pool, _ = pools()
    scene = name(pool, np.random.default_rng(1))[0]
    expected = make_processor(pool).image_processor(Image.fromarray(draw(scene)), return_tensors="pt")
    torch.testing.assert_close(pixels([scene]), expected["pixel_values"])


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
