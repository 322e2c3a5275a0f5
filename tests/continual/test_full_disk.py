"""A disk that is full at any moment: one sentence, what was there stays, and the same command ends when there is room."""

import json
import resource
import shutil
import signal
from functools import partial

import pytest
from support.commands import code_of, said_by, spawn

# Bytes that a file may have, in place of a full disk: the first file that is larger is refused in the middle.
SIZES = (0, 300, 5_000, 15_000)
SLOW = ("routes", "analyze", "report")  # for the plots


def room(size):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def place(suite, quick, tmp_path_factory):
    """A folder with a run of two tasks, their adapters as PEFT's folders, and questions for them."""
    folder = tmp_path_factory.mktemp("place")
    train = ["train", suite / "tasks.yaml", "--out", folder / "run", "--order", "colour,count", *quick]
    assert code_of(spawn(train)) == 0
    assert code_of(spawn(["bank", "export", folder / "run", "--format", "lilora", "--out", folder / "peft"])) == 0
    asked = [{"prompt": "which colour is it ?", "task": "colour", "id": "x" * 400}] * 3
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, asked)))
    return folder


COMMANDS = {
    "train": lambda at, suite, quick: ["train", suite / "tasks.yaml", "--out", at / "new", "--order", "name", *quick],
    "train on": lambda at, suite, quick: ["train", suite / "tasks.yaml", "--out", at / "run", *quick],
    "eval": lambda at, suite, quick: [
        "eval", at / "run", "--tasks", suite / "tasks.yaml", "--predictions", at / "new", "--device", "cpu"
    ],
    "routes": lambda at, suite, quick: [
        "eval", at / "run", "--tasks", suite / "tasks.yaml", "--routed", "--device", "cpu"
    ],
    "report": lambda at, suite, quick: ["report", at / "run", "--out", at / "new"],
    "analyze": lambda at, suite, quick: ["analyze", at / "run"],
    "generate": lambda at, suite, quick: [
        "generate", at / "run", "--prompts", at / "prompts.jsonl", "--out", at / "new.jsonl", "--device", "cpu"
    ],
    "export": lambda at, suite, quick: ["bank", "export", at / "run", "--out", at / "new"],
    "merge": lambda at, suite, quick: ["bank", "merge", at / "run", "--task", "count", "--out", at / "new"],
    "import": lambda at, suite, quick: [
        "bank", "import", "peft", at / "peft/colour", "--model", suite / "base", "--out", at / "new"
    ],
    "rm": lambda at, suite, quick: ["bank", "rm", at / "run", "--task", "count"],
}  # fmt: skip


@pytest.mark.parametrize("name", COMMANDS)
def test_one_sentence_and_nothing_is_lost(name, place, suite, quick, tmp_path, request):
    if name == "report":
        request.getfixturevalue("drawn")
    at = tmp_path / "at"
    shutil.copytree(place, at)
    before, arguments = content(at), COMMANDS[name](at, suite, quick)
    refused = 0
    for size in SIZES[1:2] if name in SLOW else SIZES:
        code, said = said_by(arguments, partial(room, size))
        if code == 0:
            break
        refused += 1
        assert code == 2, said
        assert said.count("lilora: ") == 1 + said.count(" is passed over ") + said.count(" starts anew"), said
        assert "Traceback" not in said
        assert str(at) in said
        after = content(at)
        lost = {file for file in before if after.get(file) != before[file]}
        assert lost <= ({"run/run.yaml", "run/bank/bank.json"} if name in ("train on", "rm") else set()), lost
    assert refused > 0
    if code:
        code, said = said_by(arguments)
        assert code == 0, said
    assert not [file for file in content(at) if file.endswith(".tmp") or ".lilora/" in file]
