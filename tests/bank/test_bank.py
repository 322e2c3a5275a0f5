import json
import re
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test
from safetensors.torch import load_file
from support.banks import BASE, MODULES, K, N, R, S, file_of, files, router_tensors, same, shared_tensors, task_tensors
from torch import nn

from lilora.bank.bank import Bank
from lilora.errors import UserError


# Round trips
def test_newest_state_serves_the_earlier_tasks_too(tmp_path):
    bank = Bank.create(tmp_path / "bank", config={}, base_model=BASE)
    bank.add_task("one", {}, shared_tensors(0), replaces=True)
    bank.add_task("two", {}, shared_tensors(7), replaces=True)
    again = Bank.open(bank.path)
    loaded = again.load_tasks()
    assert list(loaded) == ["one", "two"]
    assert loaded["one"][1] is loaded["two"][1]
    assert same(loaded["one"][1], shared_tensors(7))
    assert len(list(bank.path.glob("shared-*.safetensors"))) == 1


def test_a_methods_own_state_may_have_any_shape(tmp_path):
    bank = Bank.create(tmp_path / "bank", config={}, base_model=BASE)
    shared = shared_tensors(0) | {"state.counts": torch.randn(3), "state.keys.layer-0.new.text": torch.randn(2, 5)}
    bank.add_task("one", {}, shared)
    assert same(Bank.open(bank.path).load_task("one")[1], shared)
    with pytest.raises(UserError, match=r"tensor state.counts is torch.int64; cast it"):
        bank.add_task("two", {}, shared | {"state.counts": torch.ones(3, dtype=torch.int64)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_round_trip(tmp_path, dtype):
    bank = Bank.create(tmp_path / "new" / "bank", config={"r": R, "targets": ["up"]}, base_model=BASE)
    task, shared = task_tensors(1, dtype), shared_tensors(1, torch.float32)
    bank.add_task("one", task, shared, info={"seconds": 1.5, "steps": 20})
    bank.set_scores({"after": [[71.25, None]]})

    again = Bank.open(bank.path)
    got_task, got_shared = again.load_task("one")
    assert same(got_task, task)
    assert same(got_shared, shared)
    assert (again.tasks, again.ids) == (["one"], {"one": 0})
    assert again.config == {"r": R, "targets": ["up"]}
    assert again.scores == {"after": [[71.25, None]]}
    assert again.base_model == BASE
    assert again.task_fingerprint("one") == bank.task_fingerprint("one")


def test_views_tied_and_transposed_tensors_are_stored_by_value(tmp_path):
    bank = Bank.create(tmp_path / "bank", config={}, base_model=BASE)
    task, shared = task_tensors(1), shared_tensors(1)
    first, second = (f"{m}.A" for m in MODULES)
    shared[first] = torch.randn(K, R).T
    shared[second] = shared[first]
    shared[f"{MODULES[0]}.B0"] = nn.Parameter(torch.randn(3, N, R))[1]
    bank.add_task("one", task, shared)
    assert same(bank.load_task("one")[1], shared)


def test_layers_without_fusion(tmp_path):
    bank = Bank.create(tmp_path / "bank", config={}, base_model=BASE)
    task = {name: tensor for name, tensor in task_tensors(1).items() if not name.endswith(".fusion")}
    bank.add_task("one", task, shared_tensors(1))
    assert same(bank.load_task("one")[0], task)


def test_training_on_does_not_change_the_bank_nor_do_loaded_tensors(bank):
    task, shared = bank.load_task("one")
    for tensor in (*task.values(), *shared.values()):
        tensor.add_(1)
    assert same(bank.load_task("one")[0], task_tensors(1))


@pytest.mark.parametrize("change", ["rewritten", "truncated"])
def test_loaded_tensors_do_not_follow_their_files(bank, change):
    bank.set_router("one", router_tensors(0))
    task, shared = bank.load_task("one")
    everything, routers = bank.load_tasks(), bank.load_routers()
    for path in bank.path.rglob("*.safetensors"):
        with open(path, "r+b") as file:  # in place, as no writer of ours does
            size = path.stat().st_size
            file.write(b"\xff" * size) if change == "rewritten" else file.truncate(0)
    assert same(task, task_tensors(1))
    assert same(shared, shared_tensors(0))
    assert same(everything["two"][0], task_tensors(2))
    assert same(routers["one"], router_tensors(0))


def test_equal_shared_sets_are_stored_once_and_others_apart(bank):
    before = files(bank.path)
    bank.add_task("three", task_tensors(3), shared_tensors(7))
    after = files(bank.path)
    assert bank.shared_fingerprint("one") == bank.shared_fingerprint("two") != bank.shared_fingerprint("three")
    assert len([name for name in after if name.startswith("shared-")]) == 2
    assert all(after[name] == before[name] for name in before if name != "bank.json")
    assert same(bank.load_task("one")[1], shared_tensors(0))
    assert same(bank.load_task("three")[1], shared_tensors(7))


def test_fingerprint_changes_with_value_name_dtype_and_shape(tmp_path):
    bank = Bank.create(tmp_path / "bank", config={}, base_model=BASE)
    renamed = [
        {f"x.{key}": value for key, value in tensors.items()} for tensors in (task_tensors(1), shared_tensors(1))
    ]
    reshaped, changed = shared_tensors(1), shared_tensors(1)
    for m in MODULES:
        reshaped[f"{m}.A"] = reshaped[f"{m}.A"][:, :-1]
    changed[f"{MODULES[1]}.B0"][0, 0] += 1e-3
    for name, task, shared in [
        ("plain", task_tensors(1), shared_tensors(1)),
        ("value", task_tensors(1), changed),
        ("name", *renamed),
        ("dtype", task_tensors(1), shared_tensors(1, torch.bfloat16)),
        ("shape", task_tensors(1), reshaped),
    ]:
        bank.add_task(name, task, shared)
    assert len({bank.shared_fingerprint(name) for name in bank.tasks}) == 5
    assert bank.task_fingerprint("plain") == bank.task_fingerprint("value") != bank.task_fingerprint("name")


def test_remove_keeps_ids_and_deletes_only_what_nothing_else_uses(bank):
    bank.add_task("three", task_tensors(3), shared_tensors(7))
    third = f"shared-{bank.shared_fingerprint('three')}.safetensors"
    bank.remove_task("three")
    bank.remove_task("one")
    left = files(bank.path)
    assert third not in left
    assert "tasks/one.safetensors" not in left
    assert same(bank.load_task("two")[1], shared_tensors(0))
    bank.add_task("one", task_tensors(9), shared_tensors(0))
    assert Bank.open(bank.path).ids == {"two": 1, "one": 3}
    assert same(bank.load_task("one")[0], task_tensors(9))


def test_two_open_banks_do_not_undo_each_other(bank):
    other = Bank.open(bank.path)
    other.add_task("three", task_tensors(3), shared_tensors(0))
    bank.set_scores({"x": 1})
    other.add_task("four", task_tensors(4), shared_tensors(0))
    bank.add_task("five", task_tensors(5), shared_tensors(0))
    other.remove_task("one")
    final = Bank.open(bank.path)
    assert final.ids == {"two": 1, "three": 2, "four": 3, "five": 4}
    assert final.scores == {"x": 1}


def test_describe_is_json_with_sizes(bank):
    described = json.loads(json.dumps(bank.describe()))
    assert [task["name"] for task in described["tasks"]] == ["one", "two"]
    want = sum(t.numel() for t in task_tensors(1).values())
    assert (described["tasks"][0]["parameters"], described["tasks"][0]["bytes"]) == (want, 4 * want)
    assert described["shared"][0]["parameters"] == sum(t.numel() for t in shared_tensors(0).values())


def test_a_router_is_stored_with_its_task_and_goes_with_it(bank):
    assert bank.load_routers() == {}
    assert b"router" not in (bank.path / "bank.json").read_bytes()  # as earlier versions wrote it, checksum and all
    fingerprint = bank.task_fingerprint("two")
    for seed, name in ((1, "two"), (2, "one"), (3, "two")):
        bank.set_router(name, router_tensors(seed))
    reopened = Bank.open(bank.path)
    routers = reopened.load_routers()
    assert list(routers) == reopened.routed == ["one", "two"]
    assert same(routers["one"], router_tensors(2))
    assert same(routers["two"], router_tensors(3))
    assert reopened.task_fingerprint("two") == fingerprint
    assert same(reopened.load_task("two")[0], task_tensors(2))
    assert sum("router" in name for name in files(bank.path)) == 2
    bank.remove_task("two")
    assert list(bank.load_routers()) == bank.routed == ["one"]
    bank.add_task("two", task_tensors(2), shared_tensors(0))
    assert list(bank.load_routers()) == ["one"]
    assert [name.split(".")[0] for name in files(bank.path) if "router" in name] == ["tasks/one"]


# Refused input: one sentence, nothing written
def test_bad_routers(bank):
    before = files(bank.path)
    for name, tensors, words in (
        ("three", router_tensors(0), "has no task 'three'"),
        ("one", {}, "router of task 'one' has no tensors"),
        ("one", {"mean": torch.ones(3, dtype=torch.int64)}, "router of task 'one': tensor mean is torch.int64"),
    ):
        with pytest.raises(UserError, match=re.escape(words)):
            bank.set_router(name, tensors)
    assert files(bank.path) == before
    bank.set_router("one", router_tensors(0))
    (file,) = (bank.path / "tasks").glob("one.router-*")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=re.escape(file.name)):
        bank.load_routers()
    file.unlink()
    with pytest.raises(UserError, match=re.escape(file.name)):
        bank.load_routers()
    assert same(bank.load_task("one")[0], task_tensors(1))


@pytest.mark.parametrize("name", ["", "a.b", "../up", "a b", "one", "ONE"])
def test_bad_or_taken_task_name(bank, name):
    before = files(bank.path.parent)
    with pytest.raises(UserError, match="name"):
        bank.add_task(name, task_tensors(3), shared_tensors(0))
    assert files(bank.path.parent) == before


def _drop(task, shared):
    del task[f"{MODULES[1]}.V"]


def _one_fusion_only(task, shared):
    del task[f"{MODULES[1]}.fusion"]


def _extra(task, shared):
    shared[f"{MODULES[1]}.C"] = torch.zeros(1)


def _wrong_shape(task, shared):
    task[f"{MODULES[1]}.V"] = torch.randn(S, R + 1)


def _wrong_rank(task, shared):
    shared[f"{MODULES[1]}.A"] = torch.randn(R + 1, K)


def _wrong_count(task, shared):
    task[f"{MODULES[1]}.fusion"] = torch.randn(2)


def _wrong_ndim(task, shared):
    shared[f"{MODULES[1]}.A"] = torch.randn(R)


def _wrong_dtype(task, shared):
    task[f"{MODULES[1]}.U"] = torch.ones(N, S, dtype=torch.int32)


@pytest.mark.parametrize(
    "spoil, named",
    [
        (_drop, "V"),
        (_one_fusion_only, "fusion"),
        (_extra, "C"),
        (_wrong_shape, "V"),
        (_wrong_rank, "A"),
        (_wrong_count, "fusion"),
        (_wrong_ndim, "A"),
        (_wrong_dtype, "U"),
    ],
)
def test_bad_tensors(bank, spoil, named):
    before = files(bank.path)
    task, shared = task_tensors(3), shared_tensors(3)
    spoil(task, shared)
    with pytest.raises(UserError, match=rf"three.*{MODULES[1]}\.{named}"):
        bank.add_task("three", task, shared)
    assert files(bank.path) == before


def test_no_shared_tensors(bank):
    with pytest.raises(UserError, match="shared"):
        bank.add_task("three", {}, {})


@pytest.mark.parametrize("value", [{"x": float("nan")}, {"x": {1, 2}}, [1]])
def test_scores_config_and_info_must_be_json(bank, tmp_path, value):
    before = files(bank.path)
    with pytest.raises(UserError, match="scores"):
        bank.set_scores(value)
    with pytest.raises(UserError, match="info"):
        bank.add_task("three", task_tensors(3), shared_tensors(0), info=value)
    with pytest.raises(UserError, match="config"):
        Bank.create(tmp_path / "other", config=value, base_model=BASE)
    assert files(bank.path) == before
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("call", ["load_task", "remove_task", "task_fingerprint", "shared_fingerprint"])
def test_unknown_task_lists_the_known(bank, call):
    with pytest.raises(UserError, match=r"'three'.*one, two"):
        getattr(bank, call)("three")


def test_create_refuses_a_folder_in_use(bank, tmp_path):
    before = files(bank.path)
    with pytest.raises(UserError, match="already holds a bank"):
        Bank.create(bank.path, config={}, base_model=BASE)
    assert files(bank.path) == before

    run = tmp_path / "run"
    run.mkdir()
    (run / "trainer_state.json").write_text("{}")
    with pytest.raises(UserError, match=r"trainer_state\.json"):
        Bank.create(run, config={}, base_model=BASE)
    assert list(files(run)) == ["trainer_state.json"]
    with pytest.raises(UserError, match="cannot be written"):
        Bank.create(run / "trainer_state.json", config={}, base_model=BASE)


def test_create_takes_an_empty_folder(tmp_path):
    Bank.create(tmp_path, config={}, base_model=BASE)
    assert Bank.open(tmp_path).tasks == []


def test_open_refuses_what_is_no_bank(tmp_path):
    with pytest.raises(UserError, match="not a bank"):
        Bank.open(tmp_path)
    with pytest.raises(UserError, match="not a bank"):
        Bank.open(tmp_path / "missing")
    (tmp_path / "bank.json").write_text('{"tasks": []}')
    with pytest.raises(UserError, match="format"):
        Bank.open(tmp_path)


def test_newer_format_asks_for_an_upgrade(bank):
    path = bank.path / "bank.json"
    path.write_text(json.dumps({"format": 2, "something": "new"}))
    with pytest.raises(UserError, match=r"format 2.*upgrade"):
        Bank.open(bank.path)


# Against a dictionary
NAMES = st.sampled_from(["a", "b", "C", "d-1"])


class BankMachine(RuleBasedStateMachine):
    @initialize()
    def create(self):
        self.path = Path(tempfile.mkdtemp(dir=self.root))
        self.bank = Bank.create(self.path, config={}, base_model=BASE)
        self.model = {}
        self.next_id = 0

    @rule(name=NAMES, seed=st.integers(0, 5), shared=st.integers(0, 2))
    def add(self, name, seed, shared):
        if name in self.model:
            with pytest.raises(UserError):
                self.bank.add_task(name, task_tensors(seed), shared_tensors(shared))
        else:
            self.bank.add_task(name, task_tensors(seed), shared_tensors(shared))
            self.model[name] = (self.next_id, seed, shared)
            self.next_id += 1

    @rule(name=NAMES)
    def remove(self, name):
        if name in self.model:
            self.bank.remove_task(name)
            del self.model[name]
        else:
            with pytest.raises(UserError):
                self.bank.remove_task(name)

    @rule()
    def reopen(self):
        self.bank = Bank.open(self.path)

    @invariant()
    def agrees(self):
        assert self.bank.tasks == list(self.model)
        assert self.bank.ids == {name: id for name, (id, _, _) in self.model.items()}
        for name, (_, seed, shared) in self.model.items():
            task, common = self.bank.load_task(name)
            assert same(task, task_tensors(seed))
            assert same(common, shared_tensors(shared))
        stored = {path.name for path in self.path.glob("shared-*")}
        assert len(stored) == len({shared for _, _, shared in self.model.values()})


def test_bank_behaves_like_a_dictionary(tmp_path):
    machine = type("Machine", (BankMachine,), {"root": str(tmp_path)})
    run_state_machine_as_test(machine, settings=settings(max_examples=15, stateful_step_count=12, deadline=None))


def test_files_are_plain_safetensors(bank):
    """Any safetensors reader can open a bank's files."""
    assert same(load_file(file_of(bank, "task")), task_tensors(1))
    assert same(load_file(file_of(bank, "shared")), shared_tensors(0))
