"""`pytest bench/`: every comparison of this folder. --out FOLDER also keeps the results in FOLDER/results.json.

A case is measured once, all its peers in alternation; each peer then has a test of its own that hands its times to
pytest-benchmark, so that its tables, JSON files and comparisons hold paired figures.
"""

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path

import pytest
import torch

from .environment import environment
from .timing import Ceilings, Machine, ceilings

ROWS = pytest.StashKey[list[dict]]()
BROKEN = pytest.StashKey[bool]()
THREADS = 2  # on a CPU


def pytest_addoption(parser):
    parser.addoption("--out", type=Path, help="folder for results.json")
    parser.addoption("--tiny", action="store_true", help="the smallest shapes: tries every case, times nothing real")
    parser.addoption("--seconds", type=float, default=1.5, help="for the rounds of one case, after its warm-up")


def pytest_configure(config):
    config.stash[ROWS], config.stash[BROKEN] = [], False


@pytest.fixture(scope="session")
def machine(request) -> Iterator[Machine]:
    before = torch.get_num_threads()
    tiny = request.config.getoption("tiny")
    torch.set_num_threads(1 if tiny else THREADS)  # tiny calls would take longer, waiting for the other thread
    torch.manual_seed(0)
    yield Machine.here(21, tiny)
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def ceiling(machine) -> Callable[[torch.dtype], Ceilings]:
    """ceiling(dtype): measured once for each."""
    return cache(partial(ceilings, machine))


@pytest.fixture(scope="session")
def seconds(request) -> float:
    return request.config.getoption("seconds")


@pytest.fixture(scope="session")
def measured(request) -> Callable[[object, Callable[[], Iterator[dict]]], list[dict]]:
    """measured(key, run): the rows of a case, measured when they are first asked for; all rows are kept for --out."""
    known: dict[object, list[dict]] = {}

    def rows(key: object, run: Callable[[], Iterator[dict]]) -> list[dict]:
        if key not in known:
            try:
                known[key] = list(run())
            except BaseException:
                request.config.stash[BROKEN] = True
                raise
            request.config.stash[ROWS].extend(known[key])
        return known[key]

    return rows


class Replay:
    """A clock that a benchmark advances by times that were measured before."""

    def __init__(self) -> None:
        self.seconds = 0.0

    def __call__(self) -> float:
        return self.seconds


clock = Replay()


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.benchmark(timer=clock))


@pytest.fixture
def report(benchmark) -> Callable[[list[dict], str, str], None]:
    """report(rows, implementation, direction): the times of one of them as this test's benchmark.

    Skips, saying why, a peer that cannot run on this machine; fails where it was wrong.
    """

    def of(rows: list[dict], implementation: str, direction: str) -> None:
        found = [row for row in rows if row["implementation"] == implementation]
        for row in found:
            if "unavailable" in row:
                pytest.skip(row["unavailable"])
            assert "error" not in row, row["error"]
        row = next(row for row in found if row["direction"] == direction)
        times = iter(row["times_us"])

        def advance() -> None:
            clock.seconds += 1e-6 * next(times)

        benchmark.extra_info.update({k: v for k, v in row.items() if k != "times_us"})
        benchmark.pedantic(advance, rounds=len(row["times_us"]), iterations=1, warmup_rounds=0)

    return of


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """Write results.json, unless a case broke off or ours was wrong: a wrong peer stands in it with its error."""
    folder = session.config.getoption("out")
    wrong = [row["implementation"] for row in session.config.stash[ROWS] if "error" in row]
    broken = session.config.stash[BROKEN] or any(w in ("base", "base_streamed") or w.startswith("ours") for w in wrong)
    if folder is None or broken or exitstatus not in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
        return
    torch.set_num_threads(THREADS)
    command = shlex.join(["pytest", *sys.argv[1:]])
    rows = [{k: v for k, v in row.items() if k != "times_us"} for row in session.config.stash[ROWS]]
    content = {"environment": environment(command, torch.cuda.is_available()), "results": rows}
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / "results.json.part"
    part.write_text(json.dumps(content, indent=1) + "\n")
    part.replace(folder / "results.json")
