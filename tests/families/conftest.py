"""`--record FILE` writes the outcome of every cell of the matrix, for the table of docs/families.md."""

import json
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[2]))


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
            refused = f"refused: {properties.get('refused')}" if "refused" in properties else None
            self.cells.setdefault(family, {})[behaviour] = (report.passed and refused) or report.outcome

    def pytest_sessionfinish(self) -> None:
        versions = {name: version(name) for name in ("torch", "transformers", "peft")}
        self.path.write_text(json.dumps({"environment": versions, "families": self.cells}, indent=1) + "\n")
