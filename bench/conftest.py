"""`pytest bench/` prints what it measured; LILORA_BENCH_OUT=FOLDER also writes it there, one JSON file per module."""

import json
import os
from pathlib import Path

import pytest
import torch

from .pairs import environment

RESULTS = pytest.StashKey[dict[str, dict]]()


def pytest_configure(config):
    config.stash[RESULTS] = {}


@pytest.fixture
def record(request):
    """record(case, figures) keeps the figures of one case."""
    module = request.module.__name__.rpartition(".")[2].removeprefix("test_")
    return request.config.stash[RESULTS].setdefault(module, {}).__setitem__


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(before)


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session, exitstatus):
    """Write nothing unless every case passed: a file never mixes figures of two runs or hides a failed case."""
    folder = os.environ.get("LILORA_BENCH_OUT")
    if folder and exitstatus == pytest.ExitCode.OK:
        Path(folder).mkdir(parents=True, exist_ok=True)
        for module, cases in session.config.stash[RESULTS].items():
            text = json.dumps({"environment": environment(), "cases": cases}, indent=2)
            (Path(folder) / f"{module}.json").write_text(text + "\n")


def pytest_terminal_summary(terminalreporter, config):
    for cases in config.stash[RESULTS].values():
        for case, figures in cases.items():
            terminalreporter.section(case)
            terminalreporter.line(json.dumps(figures, indent=2))
