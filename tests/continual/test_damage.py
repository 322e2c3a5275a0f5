"""Any damage to any file: what was there comes back, or one sentence names the file; never a traceback or another result."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.banks import in_child
from support.checkpoints import latest, write
from support.scored_bank import scored_bank

from lilora.bank.bank import Bank
from lilora.continual.base_model import load_base
from lilora.continual.checkpoints import seal
from lilora.continual.instructions import instruction_data
from lilora.continual.kinds import KINDS
from lilora.continual.manifest import load_manifest
from lilora.continual.prompts import read_prompts
from lilora.continual.record_files import record_file
from lilora.continual.run_record import train_settings
from lilora.errors import UserError
from lilora.importers.peft_folder import read_peft

SOME = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
FEW = settings(SOME, max_examples=25)

# --- what can become of a file ------------------------------------------------------------------------------------------

PIECES = st.sampled_from(
    [b"\0", b"\xff\xfe", b"[" * 3000, b"9" * 400, b'"', b"}", b"null", b"-1", b"NaN", b"\n", b"{}"]
)


@st.composite
def damages(draw):
    """(kind, numbers): what `damaged` makes of a file's content."""
    kind = draw(st.sampled_from(["flip", "cut", "empty", "zeros", "insert", "drop", "twice", "swap"]))
    return kind, draw(st.floats(0, 1, exclude_max=True)), draw(st.floats(0, 1)), draw(st.integers(0, 7)), draw(PIECES)


def damaged(data, how, others):
    """The content of a file after the damage, never the same; others: the contents of the files beside it."""
    kind, at, length, bit, piece = how
    place = int(at * len(data))
    end = min(len(data), place + 1 + int(length * 40))
    if kind == "swap":
        return others[place % len(others)] if others else b""
    return {
        "flip": data[:place] + bytes([data[place] ^ (1 << bit)]) + data[place + 1 :],
        "cut": data[:place],
        "empty": b"",
        "zeros": bytes(len(data)),
        "insert": data[:place] + piece + data[place:],
        "drop": data[:place] + data[end:],
        "twice": data[:end] + data[place:],
    }[kind]


class Folder:
    """A folder of files, put back after each damage."""

    def __init__(self, path, names=None):
        self.path = path
        files = {str(file.relative_to(path)): file for file in path.rglob("*") if file.is_file()}
        self.content = {name: file.read_bytes() for name, file in files.items() if names is None or name in names}

    def damage(self, name, how):
        """Whether the file is another one now."""
        others = [data for other, data in sorted(self.content.items()) if other != name]
        data = damaged(self.content[name], how, others)
        (self.path / name).write_bytes(data)
        return data != self.content[name]

    def mend(self):
        for name, data in self.content.items():
            (self.path / name).parent.mkdir(parents=True, exist_ok=True)
            (self.path / name).write_bytes(data)


def sentence_of(read):
    """(what `read` returns, None), or (None, the sentence that it raises)."""
    try:
        return read(), None
    except UserError as error:
        return None, str(error)


def same(got, want):
    return got.keys() == want.keys() and all(torch.equal(got[name], want[name]) for name in want)


# --- what we write: checksums tell --------------------------------------------------------------------------------------


def test_a_bank(tmp_path):
    bank = scored_bank(tmp_path)
    bank.set_router("two", {"mean": torch.randn(3)})
    folder = Folder(bank.path)

    def read():
        opened = Bank.open(bank.path)
        return opened.load_tasks(), opened.load_routers(), train_settings(opened), opened.describe()

    tasks, routers, settings_, told = read()

    @SOME
    @given(st.sampled_from(sorted(folder.content)), damages())
    def check(name, how):
        folder.damage(name, how)
        found, said = sentence_of(read)
        folder.mend()
        if said is not None:
            assert Path(name).name in said
            return
        assert found[2:] == (settings_, told)
        assert all(same(found[0][task][i], tasks[task][i]) for task in tasks for i in range(2))
        assert all(same(found[1][task], routers[task]) for task in routers)

    check()


def test_a_checkpoint(tmp_path):
    checkpoint = tmp_path / "stage" / "checkpoint-2"
    write(checkpoint, 2)
    seal(checkpoint)
    folder = Folder(checkpoint)
    assert "checksums.json" in folder.content

    @SOME
    @given(st.sampled_from(sorted(folder.content)), damages())
    def check(name, how):
        changed = folder.damage(name, how)
        found, said = latest(tmp_path / "stage")
        assert (found is None) == changed, f"{name} was read though it is altered"
        if changed:
            assert len(said) == 2
            assert str(checkpoint) in said[0]
        folder.mend()

    check()


def test_a_checkpoint_without_checksums_is_read_or_passed_over(tmp_path):
    checkpoint = tmp_path / "stage" / "checkpoint-2"
    write(checkpoint, 2)
    folder = Folder(checkpoint)

    @SOME
    @given(st.sampled_from(sorted(folder.content)), damages())
    def check(name, how):
        folder.damage(name, how)
        latest(tmp_path / "stage")  # raises nothing
        folder.mend()

    check()


# --- what others write: no traceback ------------------------------------------------------------------------------------


def readable(read, name, folder, how, where):
    """Read a damaged folder: the reader returns, or one sentence names the file or `where`."""
    folder.damage(name, how)
    _, said = sentence_of(read)
    folder.mend()
    assert said is None or Path(name).name in said or str(where) in said, said
    assert "\n" not in (said or "")


def test_adapters_of_peft(tmp_path, suite):
    path = "model.language_model.layers.0.mlp.up_proj"
    base, _ = load_base(str(suite / "base"), "auto", "cpu", KINDS["instruction"])
    n, k = base.get_submodule(path).weight.shape
    shapes = {"A": (4, k), "B": (n, 4), "U": (n, 2), "V": (2, 4), "fusion": (1,)}
    tensors = {f"base_model.model.{path}.lilora_{kind}": torch.randn(shape) for kind, shape in shapes.items()}
    config = {"peft_type": "LILORA", "r": 4, "sub_rank": 2, "alpha": 8.0, "target_modules": [path]}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert set(load_file(tmp_path / "adapter_model.safetensors")) == set(tensors)
    folder = Folder(tmp_path)
    read_peft([tmp_path], base)

    @SOME
    @given(st.sampled_from(sorted(folder.content)), damages())
    def check(name, how):
        readable(lambda: read_peft([tmp_path], base), name, folder, how, tmp_path)

    check()
    values = [None, -1, 0.5, True, "[", "(", [], ["x", 1], {"a": 1}, 10**400, "../x", [[]]]
    for key in (*config, "bias", "modules_to_save", "train_a", "fusion", "layers_to_transform", "on_shared_mismatch"):
        for value in values:
            (tmp_path / "adapter_config.json").write_text(json.dumps(config | {key: value}))
            _, said = sentence_of(lambda: read_peft([tmp_path], base))
            assert said is None or str(tmp_path) in said, (key, value, said)


def test_a_base_model(tmp_path, suite):
    shutil.copytree(suite / "base", tmp_path / "base")
    folder = Folder(tmp_path / "base")

    def read():
        load_base(str(tmp_path / "base"), "auto", "cpu", KINDS["instruction"])

    @FEW
    @given(st.sampled_from(sorted(folder.content)), damages())
    def check(name, how):
        readable(read, name, folder, how, tmp_path / "base")

    check()


def test_a_manifest_its_records_and_images(tmp_path, suite):
    for name in ("tasks.yaml", "data/colour-train.json", "data/colour-test.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(suite / name, tmp_path / name)
    shutil.copytree(suite / "data" / "images", tmp_path / "data" / "images")
    records = json.loads((tmp_path / "data/colour-train.json").read_text())
    lines = "\n".join(json.dumps(record) for record in records[:6])
    (tmp_path / "data/lines.jsonl").write_text(lines)
    manifest = yaml.safe_load((tmp_path / "tasks.yaml").read_text())
    manifest["tasks"] = manifest["tasks"][:1]
    (tmp_path / "tasks.yaml").write_text(yaml.safe_dump(manifest))
    manifest["tasks"][0]["train"] = "lines.jsonl"
    (tmp_path / "lines.yaml").write_text(yaml.safe_dump(manifest))
    names = ["tasks.yaml", "lines.yaml", "data/colour-train.json", "data/lines.jsonl", "data/images/colour-train-0.png"]
    folder = Folder(tmp_path, names)

    def read():
        for file in ("tasks.yaml", "lines.yaml"):
            for task in load_manifest(tmp_path / file).tasks:
                for split in ("train", "test"):
                    list(instruction_data(task, split))

    read()

    @SOME
    @given(st.sampled_from(names), damages())
    def check(name, how):
        readable(read, name, folder, how, "task")

    check()


def test_tables(tmp_path):
    pytest.importorskip("datasets")
    data = Path(__file__).parents[2] / "examples" / "data"
    shutil.copytree(data, tmp_path, dirs_exist_ok=True)
    folder = Folder(tmp_path, ["table.parquet", *(f"folder/train/{f.name}" for f in (data / "folder/train").iterdir())])

    def read():
        for file in ("tasks.yaml", "tables.yaml"):
            for task in load_manifest(tmp_path / file).tasks:
                list(instruction_data(task, "train"))

    @FEW
    @given(st.sampled_from(sorted(folder.content)), damages())
    def check(name, how):
        readable(read, name, folder, how, "task")

    check()


def test_a_table_that_is_cut_while_it_is_read(tmp_path):
    """Its file is mapped: to read beyond the end would end the process, so a child does."""
    pytest.importorskip("datasets")
    shutil.copytree(Path(__file__).parents[2] / "examples" / "data" / "folder", tmp_path / "folder")
    (file,) = (tmp_path / "folder" / "train").glob("*.arrow")

    def work():
        rows = record_file(tmp_path / "folder" / "train")
        assert rows[0]
        with open(file, "r+b") as opened:
            opened.truncate(0)
        for read in (lambda: rows[0], lambda: list(rows), lambda: record_file(tmp_path / "folder" / "train")):
            assert "folder" in sentence_of(read)[1]

    assert in_child(work) == 0


def test_prompts(tmp_path):
    lines = [{"prompt": "what ?", "task": "one", "image": "a.png", "id": 7}, {"prompt": "which ?", "image": ["a.png"]}]
    (tmp_path / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)))
    folder = Folder(tmp_path)

    @SOME
    @given(damages())
    def check(how):
        readable(lambda: read_prompts(tmp_path / "prompts.jsonl"), "prompts.jsonl", folder, how, "prompts")

    check()


def test_options_of_a_run(tmp_path, suite, lilora, monkeypatch):
    """run.yaml is the user's to change: what it says then is an option, or a sentence."""
    config = {"tasks": str(suite / "tasks.yaml"), "out": str(tmp_path / "run"), "r": 8, "lr": 0.01, "device": "cpu"}
    config |= {"set": {"fusion": True}, "quiet": None}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({k: v for k, v in config.items() if v is not None}))
    folder = Folder(tmp_path)

    def opened(*_):
        raise UserError("the run would start")

    monkeypatch.setattr("lilora.continual.run.ContinualRun.open", opened)
    monkeypatch.chdir(tmp_path)

    @FEW
    @given(damages())
    def check(how):
        folder.damage("run.yaml", how)
        code, _, err = lilora("train", "--config", tmp_path / "run.yaml")
        assert code == 2
        assert "Traceback" not in err
        folder.mend()

    check()
    assert os.listdir(tmp_path) == ["run.yaml"]
