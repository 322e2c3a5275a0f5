"""`pytest bench/` prints what it measured; LILORA_BENCH_OUT=FOLDER also writes it there, one JSON file per module."""

import json
import os
from pathlib import Path

import pytest
import torch

from .pairs import environment

RESULTS = pytest.StashKey[dict]()


def pytest_configure(config):
    config.stash[RESULTS] = {}


@pytest.fixture(scope="module")
def record(request):
    """record(case, figures): keep the figures of one case."""
    cases = {}
    request.config.stash[RESULTS][request.module.__name__.split(".")[-1].removeprefix("test_")] = cases
    yield cases.__setitem__


@pytest.fixture(autouse=True)
def two_threads():
    """The same number of threads on every machine; LILORA_BENCH_THREADS changes it."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
