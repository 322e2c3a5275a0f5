import gc
import sys

import pytest
import torch


def pytest_collection_finish():
    """What is imported by now stays: accelerate collects garbage twice per training, 0.3 s each over all modules."""
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
    torch.set_num_threads(1)


@pytest.fixture
def lilora(monkeypatch, capsys):
    """Run the command in this process: (exit code, standard output, standard error)."""
    from lilora import cli

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["lilora", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code or 0
        out, err = capsys.readouterr()
        return code, out, err

    return run
