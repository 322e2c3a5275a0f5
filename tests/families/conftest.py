"""`--record FILE` writes the outcome of every cell of the matrix, for README's table."""

import json
from importlib.metadata import version
from pathlib import Path

import pytest


def pytest_addoption(parser):
    parser.addoption("--record", type=Path, metavar="FILE", help="write the outcome of every family's behaviours")


def pytest_configure(config):
    if path := config.getoption("record", None):
        config.pluginmanager.register(Recorder(path))


class Recorder:
    """A cell is what its test named in `record_property("cell", ...)`; "refused" holds the reason of a refusal."""

    def __init__(self, path: Path) -> None:
        self.path, self.cells = path, {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if report.when == "call" and "cell" in properties:
            family, behaviour = properties["cell"]
            outcome = report.outcome if "refused" not in properties else f"refused: {properties['refused']}"
            self.cells.setdefault(family, {})[behaviour] = outcome

    def pytest_sessionfinish(self) -> None:
        versions = {name: version(name) for name in ("torch", "transformers", "peft")}
        self.path.write_text(json.dumps({"environment": versions, "families": self.cells}, indent=1) + "\n")
