"""The suite of `support.suite`, once for all tests here; runs without their reports."""

import pytest
import yaml
from support import tiny_clip
from support.suite import TRAIN_OPTIONS, make_suite
from support.suite import train_options as options_of_training

from lilora.cli import app
from lilora.continual import run as train
from lilora.continual.manifest import load_manifest
from lilora.reports import report

WRITE_REPORT = report.write_report


@pytest.fixture(scope="module", autouse=True)
def _unreported():
    """Runs without their reports, whose plots take as long as the rest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", lambda *_: "none")
        yield


@pytest.fixture
def resumed(monkeypatch):
    """Every checkpoint of the test is whole: to pass over one, which ends with the same bank, fails it."""
    monkeypatch.setattr(train, "print_note", pytest.fail)


@pytest.fixture
def drawn(monkeypatch):
    """Runs with their reports."""
    monkeypatch.setattr(report, "write_report", WRITE_REPORT)


@pytest.fixture
def reported(monkeypatch, drawn):
    """Runs with their reports, whose figures are made and not drawn."""
    monkeypatch.setattr(report, "png", lambda figure: b"")


@pytest.fixture(scope="session")
def suite(tmp_path_factory):
    """The folder of the suite; `tasks.yaml` is its manifest."""
    folder = tmp_path_factory.mktemp("suite")
    make_suite(folder)
    return folder


@pytest.fixture(scope="session")
def train_options():
    """Options of `lilora train` that train each task of the suite in a second."""
    return TRAIN_OPTIONS


@pytest.fixture(scope="session")
def quick():
    """Few steps, large ones: routing does not depend on how well tasks were trained, but they shall differ."""
    return options_of_training(max_steps=2, save_steps=9, lr=0.1)


@pytest.fixture(scope="session")
def runs(suite, tmp_path_factory, quick):
    folder = tmp_path_factory.mktemp("routed")
    for method in ("lilora", "dirlora"):
        options = ["--out", str(folder / method), "--method", method, *quick]
        app(["train", str(suite / "tasks.yaml"), *options], standalone_mode=False)
    return folder


@pytest.fixture(scope="session")
def images(tmp_path_factory):
    """The folder of a suite of image classification; `clip.yaml` is its manifest."""
    folder = tmp_path_factory.mktemp("images")
    tiny_clip.make_suite(folder)
    return folder


@pytest.fixture
def written(images, tmp_path):
    """Write the manifest, changed by a function of its content, and load it."""

    def load(change, **options):
        content = yaml.safe_load((images / "clip.yaml").read_text())
        content |= {"data": str(images / "data"), "model": str(images / "base")}
        change(content)
        (tmp_path / "clip.yaml").write_text(yaml.safe_dump(content, sort_keys=False))
        return load_manifest(tmp_path / "clip.yaml", **options)

    return load
