"""A bank.json that somebody else wrote, with a right checksum: refused in one sentence, and nothing is written by its names."""

import copy
import hashlib
import json

import pytest
import torch
from support.scored_bank import PATH, scored_bank

from lilora.bank.bank import Bank
from lilora.continual.publish import export_tasks, write_bank_card
from lilora.continual.run_folder import check_folder, remove_task, run_of
from lilora.continual.task_identification import NearestCentroid
from lilora.errors import UserError
from lilora.reports.analyze import analyze


@pytest.fixture
def bank(tmp_path):
    return scored_bank(tmp_path)


def forge(bank, change):
    """Write the index anew, changed, with the checksum that belongs to it."""
    data = json.loads((bank.path / "bank.json").read_bytes())
    change(data["index"])
    data["checksum"] = hashlib.sha256(json.dumps(data["index"]).encode()).hexdigest()
    (bank.path / "bank.json").write_text(json.dumps(data))


def renamed(name):
    def change(index):
        (bank_task,) = (task for task in index["tasks"] if task["name"] == "two")
        bank_task["name"] = name

    return change


def fingerprint(records):
    rows = [[name, record["dtype"], record["shape"], record["sha256"]] for name, record in sorted(records.items())]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def shared_as(key):
    def change(index):
        (records,) = index["shared"].values()
        index["shared"] = {key: records}
        for task in index["tasks"]:
            task["shared"] = key

    return change


def of_tensors(**changes):
    """The records of the first tensor of task two, and the fingerprint to them."""

    def change(index):
        task = index["tasks"][1]
        task["tensors"][f"{PATH}.U"] |= changes
        task["fingerprint"] = fingerprint(task["tensors"])

    return change


def ids(*new):
    def change(index):
        for task, id in zip(index["tasks"], new, strict=True):
            task["id"] = id

    return change


def unknown_tensor(index):
    task = index["tasks"][1]
    task["tensors"]["../x.U"] = task["tensors"].pop(f"{PATH}.U")
    task["fingerprint"] = fingerprint(task["tensors"])


FORGED = {
    "path": (renamed("../../../x"), r"'\.\./\.\./\.\./x' is not allowed"),
    "absolute": (renamed("/tmp/x"), "is not allowed"),
    "dot": (renamed("a.b"), "is not allowed"),
    "reserved": (renamed("lora_A"), "is reserved"),
    "twice": (renamed("one"), "is taken by"),
    "case": (renamed("ONE"), "is taken by"),
    "number": (renamed(7), "valid string"),
    "shared path": (shared_as("../../../../x"), "match pattern"),
    "shared key": (shared_as("0" * 16), "is not that of its tensors"),
    "shared missing": (lambda index: index.update(shared={}), "which is missing"),
    "task fingerprint": (lambda index: index["tasks"][1].update(fingerprint="0" * 16), "is not that of its tensors"),
    "dtype": (of_tensors(dtype="nn"), "'bfloat16', 'float16' or 'float32'"),
    "integers": (of_tensors(dtype="int64"), "'bfloat16', 'float16' or 'float32'"),
    "negative": (of_tensors(shape=[-4, 1]), "greater than or equal to 0"),
    "huge": (of_tensors(shape=[2**70, 1]), "more elements than any memory"),
    "many huge": (of_tensors(shape=[2**31] * 40), "more elements than any memory"),
    "other shape": (of_tensors(shape=[5, 1]), r"has shape \[5, 1\]"),
    "dimensions": (of_tensors(shape=[4]), "wants 2 or 3 dimension"),
    "unknown tensor": (unknown_tensor, "lacks the tensor|holds the unknown tensor"),
    "same ids": (ids(0, 0), "each is given out once"),
    "negative id": (ids(-1, 0), "greater than or equal to 0"),
    "later id": (ids(0, 9), "each is given out once"),
    "base model": (lambda index: index["base_model"].update(id="a\nb"), "cannot be printed"),
    "base fingerprint": (lambda index: index["base_model"].update(fingerprint="?"), "match pattern"),
}


@pytest.mark.parametrize("name", FORGED)
def test_what_writing_would_refuse_is_refused_on_reading(name, bank):
    change, words = FORGED[name]
    forge(bank, change)
    with pytest.raises(UserError, match=words) as caught:
        Bank.open(bank.path)
    assert str(bank.path / "bank.json") in str(caught.value)


def test_an_index_as_deep_as_a_well_is_refused(bank):
    text = (bank.path / "bank.json").read_text()
    (bank.path / "bank.json").write_text(text.replace('"label": "mine"', '"label": ' + "[" * 100_000 + "]" * 100_000))
    with pytest.raises(UserError, match="truncated or altered"):
        Bank.open(bank.path)


def test_export_writes_nothing_outside_its_folder(bank, tmp_path, lilora, monkeypatch):
    forge(bank, renamed("../../../escaped"))
    for source in (bank.path, bank.path.parent):
        code, _, err = lilora("bank", "export", source, "--out", tmp_path / "a" / "b" / "out")
        assert (code, err.count("lilora: "), "Traceback" in err) == (2, 1, False)
    monkeypatch.setattr("lilora.bank.hub.snapshot_download", lambda *_, **__: str(bank.path))
    code, _, err = lilora("bank", "export", "owner/bank", "--out", tmp_path / "a" / "b" / "out")
    assert (code, err.count("lilora: ")) == (2, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def set_in(path, value):
    def change(index):
        for key in path[:-1]:
            index = index[key]
        index[path[-1]] = value

    return change


RECORDED = {
    "method": (("config", "method"), "magic"),
    "method list": (("config", "method"), ["lilora"]),
    "settings": (("config", "settings"), 7),
    "unknown setting": (("config", "settings", "magic"), 1),
    "alpha": (("config", "settings", "alpha"), "x"),
    "r": (("config", "settings", "r"), True),
    "targets": (("config", "settings", "target_modules"), {"a": 1}),
    "train": (("config", "train"), []),
    "dtype": (("config", "train", "dtype"), "int4"),
    "kind": (("config", "kind"), "poetry"),
    "label": (("config", "label"), "a\x1b[31m"),
    "label list": (("config", "label"), ["a"]),
    "info": (("tasks", 0, "info", "parameters"), "many"),
    "scores": (("scores", "matrix"), 7),
    "seconds": (("scores", "seconds"), {"one": "long"}),
    "functions": (("scores", "functions"), {"one": 1}),
}


def readers(bank, folder):
    return {
        "export": lambda: export_tasks(Bank.open(bank.path), None, folder / "out"),
        "report": lambda: run_of(Bank.open(bank.path)),
        "remove": lambda: remove_task(Bank.open(bank.path), "two"),
        "go on": lambda: check_folder(bank.path.parent, Bank.open(bank.path).config, ["one", "two"], True),
    }


@pytest.mark.parametrize("name", RECORDED)
def test_what_no_run_records_is_refused_by_all_who_read_it(name, bank, tmp_path):
    forge(bank, set_in(*RECORDED[name]))
    for read in readers(bank, tmp_path).values():
        with pytest.raises(UserError, match="does not record a run as lilora does"):
            read()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


VALUES = (None, True, -1, 1e308, 10**400, "", "../../../x", "[/b]", [], [[]], {}, {"a": {}})


def places(index, path=()):
    if path:
        yield path
    for key in index if isinstance(index, dict) else range(len(index)) if isinstance(index, list) else ():
        yield from places(index[key], (*path, key))


def test_no_value_at_any_place_gives_more_than_one_sentence(bank, tmp_path):
    text = (bank.path / "bank.json").read_bytes()
    original, tried, refused = json.loads(text)["index"], 0, 0
    for number, place in enumerate(places(original)):
        for value in VALUES[number % 6 :: 6]:
            (bank.path / "bank.json").write_bytes(text)
            forge(bank, set_in(place, copy.deepcopy(value)))
            for name, read in (readers(bank, tmp_path) | {"card": lambda: write_bank_card(run_bank(bank))}).items():
                if name == "remove":
                    continue
                tried += 1
                try:
                    read()
                except UserError:
                    refused += 1
                out = tmp_path / "out"
                for path in sorted(out.rglob("*"), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
                if out.exists():
                    out.rmdir()
    assert refused > tried / 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def run_bank(bank):
    opened = Bank.open(bank.path)
    run_of(opened)
    return opened


def test_analyze_refuses_a_method_that_is_no_name(bank):
    forge(bank, set_in(("config", "method"), ["lilora"]))
    with pytest.raises(UserError, match="is of method"):
        analyze(Bank.open(bank.path))


def statistics(width=3, **changes):
    return {"mean": torch.zeros(width), "variance": torch.ones(width), "count": torch.ones(1)} | changes


@pytest.mark.parametrize(
    "other",
    [statistics(1), statistics(variance=torch.ones(1)), statistics(count=torch.ones(3)), {"mean": torch.zeros(3)}],
)
def test_a_router_of_other_tensors_is_refused(other, bank):
    bank.set_router("one", statistics())
    bank.set_router("two", statistics())
    router = NearestCentroid.load(bank, None)
    assert router.distances(torch.ones(2, 3)).shape == (2, 2)
    with pytest.raises(UserError, match="this model has 5 features and the router's tasks 3"):
        router.distances(torch.ones(2, 5))
    bank.set_router("two", other)
    with pytest.raises(UserError, match="the router of task 'two' has other tensors"):
        NearestCentroid.load(bank, None)
