"""One process writes into a folder, the others are refused by its pid; readers need no lock and see whole states."""

import os
import signal
import threading
import time

import pytest
import torch
from support.banks import BASE, in_child, same, shared_tensors, task_tensors

from lilora.bank import lock
from lilora.bank.atomic import new_folder, write_atomically
from lilora.bank.bank import Bank
from lilora.bank.lock import locked
from lilora.errors import UserError


@pytest.fixture
def holder(tmp_path):
    """holder(folder): the pid of a process that holds the folder's lock until it is killed."""
    children = []

    def hold(folder):
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            with locked(folder):
                os.write(writer, b".")
                time.sleep(60)
            os._exit(0)
        children.append(child)
        os.close(writer)  # a child that dies ends the read
        assert os.read(reader, 1) == b"."
        os.close(reader)
        return child

    yield hold
    for child in children:
        kill(child)


def kill(child):
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ChildProcessError, ProcessLookupError):
        pass


def test_a_second_writer_is_refused_with_the_pid_of_the_first_until_that_is_gone(tmp_path, holder):
    bank = Bank.create(tmp_path / "bank", config={}, base_model=BASE)
    bank.add_task("one", task_tensors(1), shared_tensors(0))
    child = holder(bank.path)
    for change in (
        lambda: bank.add_task("two", task_tensors(2), shared_tensors(0)),
        lambda: bank.remove_task("one"),
        lambda: bank.set_scores({}),
        lambda: bank.set_router("one", shared_tensors(0)),
        lambda: Bank.create(bank.path, config={}, base_model=BASE),
    ):
        with pytest.raises(UserError, match=f"is being written by process {child};"):
            change()
    assert same(Bank.open(bank.path).load_task("one")[0], task_tensors(1))
    kill(child)
    bank.add_task("two", task_tensors(2), shared_tensors(0))
    assert not (bank.path / ".lock").exists()


def test_four_processes_that_add_to_one_bank_lose_nothing(tmp_path):
    bank = Bank.create(tmp_path / "bank", config={}, base_model=BASE)
    children = []
    for first in range(0, 12, 3):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                mine, left = Bank.open(bank.path), list(range(first, first + 3))
                while left:
                    try:
                        mine.add_task(f"t{left[0]}", task_tensors(left[0]), shared_tensors(left[0] % 3))
                        del left[0]
                    except UserError as error:
                        if "is being written by process" not in str(error):
                            raise
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    while children:  # and this one reads meanwhile
        bank = Bank.open(bank.path)
        for name, (task, shared) in bank.load_tasks().items():
            assert same(task, task_tensors(int(name[1:])))
            assert same(shared, shared_tensors(int(name[1:]) % 3))
        for child in children:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                children = [other for other in children if other != child]
                assert status == 0
    bank = Bank.open(bank.path)
    assert sorted(bank.ids.values()) == list(range(12))
    assert {name: int(name[1:]) for name in bank.load_tasks()} == {f"t{i}": i for i in range(12)}


def test_a_bank_object_reads_one_state_while_another_process_replaces_all_of_it(tmp_path):
    def filled(tensors, value):
        return {name: torch.full_like(tensor, value) for name, tensor in tensors.items()}

    bank = Bank.create(tmp_path / "bank", config={}, base_model=BASE)
    bank.add_task("t", filled(task_tensors(0), 0), filled(shared_tensors(0), 0))
    child = os.fork()
    if child == 0:
        writer = Bank.open(bank.path)
        for value in range(1, 10_000):
            writer.remove_task("t")
            writer.add_task("t", filled(task_tensors(0), value), filled(shared_tensors(0), value))
    try:
        states, until = set(), time.monotonic() + 20
        while len(states) < 10 and time.monotonic() < until:
            for task, shared in Bank.open(bank.path).load_tasks().values():
                (value,) = {float(number) for tensor in (task | shared).values() for number in tensor.flatten()}
                states.add(value)
        assert len(states) == 10
    finally:
        kill(child)


def test_a_child_that_outlives_the_holder_does_not_hold_on(tmp_path):
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(tmp_path):
            grandchild = os.fork()
            if grandchild == 0:
                time.sleep(60)
            os.write(writer, str(grandchild).encode())
            os.kill(os.getpid(), signal.SIGKILL)
    os.close(writer)
    os.waitpid(child, 0)
    grandchild = int(os.read(reader, 20))
    os.close(reader)
    try:
        with locked(tmp_path):
            pass
    finally:
        os.kill(grandchild, signal.SIGKILL)


def test_a_thread_may_take_its_lock_again_and_another_thread_may_not(tmp_path):
    refused = []

    def other():
        try:
            with locked(tmp_path):
                pass
        except UserError as error:
            refused.append(str(error))

    with locked(tmp_path):
        with locked(tmp_path):
            pass
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        assert in_child(lambda: locked(tmp_path).__enter__()) != 0
    assert len(refused) == 1
    assert f"process {os.getpid()};" in refused[0]
    with locked(tmp_path):
        pass


def test_what_was_made_for_the_lock_alone_goes(tmp_path):
    with locked(tmp_path / "a" / "b"):
        assert (tmp_path / "a" / "b" / ".lock").read_text() == str(os.getpid())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="cannot be written"), locked(tmp_path / "file" / "bank"):
        pass
    assert (tmp_path / "file").read_text() == "mine"


def test_systems_without_fcntl_write_without_a_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "fcntl", None)
    bank = Bank.create(tmp_path / "bank", config={}, base_model=BASE)
    bank.add_task("one", task_tensors(1), shared_tensors(0))
    assert Bank.open(bank.path).tasks == ["one"]


def test_a_file_system_without_locks_is_told_of(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(lock.fcntl, "flock", unsupported)
    with pytest.warns(UserWarning, match="no lock is possible"), locked(tmp_path):
        pass
    assert list(tmp_path.iterdir()) == []


def test_processes_that_write_one_file_at_once_leave_it_whole(tmp_path):
    path, children = tmp_path / "report.html", []
    for mark in (b"a", b"b", b"c"):
        child = os.fork()
        if child == 0:
            code = 1
            try:
                for _ in range(40):
                    write_atomically(path, mark * 300_000)
                code = 0
            finally:
                os._exit(code)
        children.append(child)
    while children:
        if path.exists():
            content = path.read_bytes()
            assert len(content) == 300_000
            assert len(set(content)) == 1
        for child in children:
            ended, status = os.waitpid(child, os.WNOHANG)
            if ended:
                children = [other for other in children if other != child]
                assert status == 0
    assert [entry.name for entry in tmp_path.iterdir()] == ["report.html"]


# Folders that a killed process leaves unfinished


def killed_while_writing(path):
    """A process that is killed inside `new_folder(path)`."""

    def work():
        with new_folder(path) as folder:
            (folder / "half").write_bytes(b"x" * 1000)
            os.kill(os.getpid(), signal.SIGKILL)

    assert in_child(work) == signal.SIGKILL


def test_what_a_killed_export_left_is_swept_by_the_next(tmp_path):
    killed_while_writing(tmp_path / "out")
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".out-")
    with new_folder(tmp_path / "another") as folder:
        (folder / "file").write_text("whole")
        assert not left.exists()
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")} == {"another", "another/file"}


STEPS = ("mkdir", "open", "replace", "rename", "unlink", "rmdir", "pwrite", "ftruncate", "close", "fsync")


@pytest.mark.parametrize("full", [False, True])
def test_killed_at_every_step_nothing_is_left_that_the_next_does_not_sweep(tmp_path, full):
    """full: the disk is, so that the folder is being deleted."""
    for k in range(1, 100):
        parent = tmp_path / str(k)

        def work(k=k, parent=parent):
            calls = []
            for name in STEPS:
                real = getattr(os, name)

                def call(*args, real=real, **options):
                    calls.append(real)
                    if len(calls) == k:
                        os.kill(os.getpid(), signal.SIGKILL)
                    return real(*args, **options)

                setattr(os, name, call)
            with new_folder(parent / "out") as folder:
                (folder / "file").write_text("whole")
                (folder / "part").mkdir()
                if full:
                    raise SystemExit

        ended = in_child(work)
        parent.mkdir(exist_ok=True)
        for left in parent.iterdir():
            os.utime(left, (0, 0))
        _one(parent / "next")
        assert {path.name for path in parent.iterdir()} - {"out"} == {"next"}, k
        assert not (parent / "out").exists() or (parent / "out" / "part").is_dir()
        if ended != signal.SIGKILL:
            break
    assert 5 < k < 99


def test_a_folder_that_is_about_to_be_locked_stays(tmp_path):
    young = tmp_path / ".out-abcdefgh.lilora"
    young.mkdir()
    _one(tmp_path / "one")
    (young / ".lock").touch()
    _one(tmp_path / "two")
    assert young.exists()


def test_only_folders_of_its_kind_that_no_process_holds_are_swept(tmp_path):
    killed_while_writing(tmp_path / "out")
    (left,) = tmp_path.iterdir()
    (left / "thesis.txt").write_text("mine")  # no process of ours writes there
    others = [".out-notaunit", ".cache-abcdefgh"]
    for name in others:
        (tmp_path / name / "new").mkdir(parents=True)
    with new_folder(tmp_path / "live") as live:
        (live / "file").write_text("whole")
        assert in_child(lambda: _one(tmp_path / "second")) == 0  # sweeps meanwhile
        assert (live / "file").exists()
    assert (left / "thesis.txt").exists()
    assert all((tmp_path / name / "new").exists() for name in others)
    assert {path.name for path in tmp_path.iterdir()} == {"live", "second", left.name, *others}


def _one(path):
    with new_folder(path) as folder:
        (folder / "file").write_text("whole")


def test_without_locks_nothing_is_swept(tmp_path, monkeypatch):
    killed_while_writing(tmp_path / "out")
    (left,) = tmp_path.iterdir()
    monkeypatch.setattr(lock, "fcntl", None)
    _one(tmp_path / "out")
    assert left.exists()
    assert (tmp_path / "out" / "file").exists()
