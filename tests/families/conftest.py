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
    config.addinivalue_line("markers", "recorded: a cell of the matrix that runs with --record only")
    if path := config.getoption("record", None):
        config.pluginmanager.register(Recorder(path))


def pytest_collection_modifyitems(config, items):
    left_out = [] if config.getoption("record", None) else [i for i in items if i.get_closest_marker("recorded")]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [item for item in items if item not in set(left_out)]


class Recorder:
    """A cell is what its test named in `record_property("cell", ...)`; "refused" holds the reason of a refusal.

    "structure" is what a test found of families without a tiny model.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.cells, self.structure = path, {}, {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        properties = dict(report.user_properties)
        if report.when == "call" and report.passed:
            self.structure |= properties.get("structure", {})
        if report.when == "call" and "cell" in properties:
            family, behaviour = properties["cell"]
            refused = f"refused: {properties.get('refused')}" if "refused" in properties else None
            self.cells.setdefault(family, {})[behaviour] = (report.passed and refused) or report.outcome

    def pytest_sessionfinish(self) -> None:
        versions = {name: version(name) for name in ("torch", "transformers", "peft")}
        content = {"environment": versions, "structure": self.structure, "families": self.cells}
        self.path.write_text(json.dumps(content, indent=1) + "\n")
