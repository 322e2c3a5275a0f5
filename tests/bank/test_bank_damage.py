"""A bank whose files are damaged, or whose writing is interrupted or refused."""

import contextlib
import os
import re
import signal
import time

import pytest
import torch
from safetensors.torch import save
from support.banks import BASE, MODULES, file_of, files, in_child, router_tensors, same, shared_tensors, task_tensors

from lilora.bank.atomic import write_atomically
from lilora.bank.bank import Bank
from lilora.continual.checkpoints import sync
from lilora.errors import UserError


# Damaged files
def damage(bank, which, data):
    """The sentence that refuses to load a task while `data` is in place of a file; it must name the file."""
    path = file_of(bank, which)
    good = path.read_bytes()
    path.write_bytes(data)
    with pytest.raises(UserError) as caught:
        Bank.open(bank.path).load_task("one")
    path.write_bytes(good)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("which", ["index", "task", "shared"])
def test_truncated_at_any_length(bank, which):
    data = file_of(bank, which).read_bytes()
    for size in sorted({0, 1, 7, 8, 9, *range(10, len(data), 97), len(data) - 1}):
        damage(bank, which, data[:size])


@pytest.mark.parametrize("which", ["index", "task", "shared"])
def test_any_flipped_bit_shows(bank, which):
    data = file_of(bank, which).read_bytes()
    places = torch.randint(len(data), (100,)).tolist()
    for place in {*range(40), *places, len(data) - 1}:
        flipped = data[place] ^ (1 << place % 8)
        damage(bank, which, data[:place] + bytes([flipped]) + data[place + 1 :])


def test_wrong_tensors_are_named(bank):
    name = f"{MODULES[1]}.V"
    good = task_tensors(1)
    for tensor, words in [
        (good[name].T.contiguous(), r"float32 \[4, 2\].*float32 \[2, 4\]"),
        (good[name].half(), "float16.*float32"),
        (good[name] + 1, "checksum"),
    ]:
        message = damage(bank, "task", save(good | {name: tensor}))
        assert re.search(rf"{name}.*{words}", message)


def test_foreign_file_and_missing_files(bank):
    assert "lm_head.weight" in damage(bank, "task", save({"lm_head.weight": torch.randn(3)} | task_tensors(1)))
    assert "lacks" in damage(bank, "task", save({}))
    damage(bank, "shared", file_of(bank, "task").read_bytes())
    file_of(bank, "shared").unlink()
    with pytest.raises(UserError, match=r"shared-.*missing"):
        bank.load_task("one")
    file_of(bank, "task").unlink()
    with pytest.raises(UserError, match=r"one\.safetensors.*missing"):
        bank.load_task("one")


def test_a_damaged_task_leaves_the_others_readable(bank):
    file_of(bank, "task").write_bytes(b"")
    assert same(bank.load_task("two")[0], task_tensors(2))
    bank.remove_task("one")
    assert Bank.open(bank.path).tasks == ["two"]


def test_adding_a_task_mends_a_damaged_shared_file(bank):
    file_of(bank, "shared").write_bytes(b"")
    bank.add_task("three", task_tensors(3), shared_tensors(0))
    assert same(bank.load_task("one")[1], shared_tensors(0))


# Interruption: the old bank or the new one
OPERATIONS = {
    "add": lambda bank: bank.add_task("three", task_tensors(3), shared_tensors(3)),
    "remove": lambda bank: bank.remove_task("one"),
    "scores": lambda bank: bank.set_scores({"x": 1}),
    "router": lambda bank: bank.set_router("one", router_tensors(1)),
}


def state(folder):
    bank = Bank.open(folder)
    tensors = {name: bank.load_task(name) for name in bank.tasks}
    routers = {name: save(tensors) for name, tensors in bank.load_routers().items()}
    return bank.ids, bank.scores, {name: [save(part) for part in parts] for name, parts in tensors.items()}, routers


def sabotage(monkeypatch, at, act):
    """Call `act` instead of the at-th os.open / os.fsync / os.replace."""
    calls = []
    for function in ("open", "fsync", "replace"):
        real = getattr(os, function)

        def call(*args, real=real, **kwargs):
            calls.append(real.__name__)
            if len(calls) == at:
                act()
            return real(*args, **kwargs)

        monkeypatch.setattr(os, function, call)


def no_space():
    raise OSError(28, "No space left on device")


def succeeds(work):
    with contextlib.suppress(UserError):
        work()
        return True
    return False


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize("how", ["refused", "killed"])
def test_fault_at_every_step(tmp_path, operation, how):
    """The k-th system call fails, or the process dies there, for every k until the operation gets through."""
    states = set()
    for k in range(1, 100):
        bank = Bank.create(tmp_path / str(k), config={}, base_model=BASE)
        bank.add_task("one", task_tensors(1), shared_tensors(0))
        bank.add_task("two", task_tensors(2), shared_tensors(0))
        for name in bank.tasks:
            bank.set_router(name, router_tensors(0))
        old = state(bank.path)

        with pytest.MonkeyPatch.context() as patch:
            if how == "refused":
                sabotage(patch, k, no_space)
                finished = succeeds(lambda bank=bank: OPERATIONS[operation](bank))
            else:
                sabotage(patch, k, lambda: os.kill(os.getpid(), signal.SIGKILL))
                finished = in_child(lambda bank=bank: OPERATIONS[operation](bank)) == 0

        found = state(bank.path)
        bank = Bank.open(bank.path)
        if found == old:
            states.add("old")
            OPERATIONS[operation](bank)
        else:
            states.add("new")
            bank.set_scores(bank.scores)  # the next successful write sweeps
        new = state(bank.path)
        assert found in (old, new)
        assert new != old
        used = {f"tasks/{name}.safetensors" for name in bank.tasks}
        used |= {f"shared-{bank.shared_fingerprint(name)}.safetensors" for name in bank.tasks}
        routers = {name for name in files(bank.path) if ".router-" in name}
        assert {name.split(".")[0] for name in routers} == {f"tasks/{name}" for name in bank.load_routers()}
        assert len(routers) == len(bank.load_routers()) > 0
        assert set(files(bank.path)) == {"bank.json"} | used | routers
        if finished:
            break
    assert finished
    assert states == {"old", "new"}


@pytest.mark.parametrize("how", ["refused", "killed"])
def test_fault_while_creating(tmp_path, how):
    for k in range(1, 100):
        path = tmp_path / str(k)
        with pytest.MonkeyPatch.context() as patch:
            if how == "refused":
                sabotage(patch, k, no_space)
                finished = succeeds(lambda path=path: Bank.create(path, config={}, base_model=BASE))
            else:
                sabotage(patch, k, lambda: os.kill(os.getpid(), signal.SIGKILL))
                finished = in_child(lambda path=path: Bank.create(path, config={}, base_model=BASE)) == 0
        if not (path / "bank.json").exists():
            Bank.create(path, config={}, base_model=BASE)
        assert Bank.open(path).tasks == []
        if finished:
            break
    assert finished
    assert k > 1


def test_killed_at_random_moments(tmp_path):
    """A task whose add_task returned is never lost, one whose add_task did not is there whole or not at all."""
    bank = Bank.create(tmp_path / "bank", config={}, base_model=BASE)
    delays = (torch.rand(12) * 0.06).tolist()
    for delay in delays:
        start = len(Bank.open(bank.path).tasks)
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                mine = Bank.open(bank.path)
                for i in range(start, start + 1000):
                    mine.add_task(f"t{i}", task_tensors(i), shared_tensors(i % 3))
                    os.write(writer, b".")
            finally:
                os._exit(1)
        os.close(writer)
        done = b"" if start else os.read(reader, 1)  # on a slow machine too there is a task to lose
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        with os.fdopen(reader, "rb") as pipe:
            returned = len(done + pipe.read())

        bank = Bank.open(bank.path)
        assert start + returned <= len(bank.tasks) <= start + returned + 1
        assert bank.ids == {f"t{i}": i for i in range(len(bank.tasks))}
        for i in range(start, len(bank.tasks)):
            task, shared = bank.load_task(f"t{i}")
            assert same(task, task_tensors(i))
            assert same(shared, shared_tensors(i % 3))
    assert len(bank.tasks) > 0


def test_leftovers_go_and_foreign_files_stay(bank):
    leftovers = ["tasks/x.safetensors", "tasks/x.safetensors.tmp", f"shared-{'0' * 16}.safetensors", "bank.json.tmp"]
    foreign = ["notes.txt", "shared-ideas.safetensors", "tasks/x.safetensors.bak"]
    for name in leftovers + foreign:
        (bank.path / name).write_bytes(b"x")
    bank.set_scores({})
    left = files(bank.path)
    assert not set(leftovers) & set(left)
    assert set(foreign) <= set(left)


def test_where_no_folder_can_be_opened_a_bank_is_written_all_the_same(tmp_path, monkeypatch):
    """As on Windows, which syncs no file that was opened for reading either."""
    open_, fsync = os.open, os.fsync
    flags = {}

    def opened(path, mode, *rest):
        if os.path.isdir(path):
            raise PermissionError(13, "Permission denied", path)
        descriptor = open_(path, mode, *rest)
        flags[descriptor] = mode
        return descriptor

    def synced(descriptor):
        if flags.get(descriptor, os.O_RDWR) == os.O_RDONLY:
            raise OSError(9, "Bad file descriptor")
        fsync(descriptor)

    monkeypatch.delattr(os, "O_DIRECTORY")
    monkeypatch.setattr(os, "open", opened)
    monkeypatch.setattr(os, "fsync", synced)
    bank = Bank.create(tmp_path / "bank", config={}, base_model=BASE)
    bank.add_task("a", task_tensors(1), shared_tensors(1))
    checkpoint = tmp_path / "checkpoint"
    checkpoint.mkdir()
    (checkpoint / "file").write_bytes(b"x")
    sync(checkpoint)
    assert same(Bank.open(tmp_path / "bank").load_task("a")[0], task_tensors(1))


def test_a_refused_write_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    sabotage(monkeypatch, 1, no_space)
    with pytest.raises(UserError, match="No space left"):
        write_atomically(path, b"new")
    assert files(tmp_path) == {"file": b"old"}
