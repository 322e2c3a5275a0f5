"""Every door through which data comes in, with the files of examples/data."""

import dataclasses
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import yaml

from lilora.continual.images import EmbeddedImage, open_image
from lilora.continual.instructions import instruction_data
from lilora.continual.manifest import load_manifest
from lilora.errors import UserError

DOORS = Path(__file__).parents[2] / "examples" / "data"


@pytest.fixture(autouse=True)
def _cached_here(tmp_path, monkeypatch):
    """What datasets makes of parquet files goes when the test does."""
    if importlib.util.find_spec("datasets"):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def tasks_of(manifest):
    return {task.name: task for task in load_manifest(DOORS / manifest).tasks}


def shown(data):
    """The samples, with their images as pixels."""
    return [
        dataclasses.replace(sample, images=tuple(open_image(image).tobytes() for image in sample.images))
        for sample in data
    ]


@pytest.fixture(scope="module")
def wanted():
    samples = shown(instruction_data(tasks_of("tasks.yaml")["llava"], "train"))
    assert [(s.history, s.question, s.answers) for s in samples] == [
        ((("Which colour is it?", colour),), "And which shape?", (shape,))
        for colour, shape in (("red", "circle"), ("blue", "square"), ("green", "circle"))
    ]
    return [dataclasses.replace(sample, images_ahead=()) for sample in samples]


@pytest.mark.parametrize("door", ["llava", "lines", "sharegpt", "messages", "train-only"])
def test_files_of_text_say_the_same(door, wanted):
    task = tasks_of("tasks.yaml")[door]
    for split in task.splits:
        assert shown(instruction_data(task, split)) == wanted


@pytest.mark.parametrize("door", ["parquet", "folder"])
def test_tables_say_the_same(door, wanted):
    pytest.importorskip("datasets")
    files = {path.name for path in (DOORS / "folder").rglob("*")}
    task = tasks_of("tables.yaml")[door]
    for split in task.splits:
        data = instruction_data(task, split)
        assert all(isinstance(image, EmbeddedImage) for sample in data for image in sample.images)
        assert shown([data[2], data[0]]) == [wanted[2], wanted[0]]
        assert shown(data) == wanted
    assert {path.name for path in (DOORS / "folder").rglob("*")} == files, "datasets leaves nothing beside them"


@pytest.fixture
def copy(tmp_path):
    """A manifest like that of the tables, with files of its own."""
    shutil.copytree(DOORS, tmp_path / "data")
    manifest = tmp_path / "data" / "tables.yaml"

    def edited(**change):
        content = yaml.safe_load(manifest.read_text())
        content["tasks"] = [content["tasks"][0] | change]
        manifest.write_text(yaml.safe_dump(content))
        return manifest

    return edited


def test_a_folder_of_several_splits_names_them(copy):
    pytest.importorskip("datasets")
    with pytest.raises(
        UserError, match=r"task 'parquet': .*folder holds the splits test, train; name one of its folders"
    ):
        load_manifest(copy(train="folder"))


def test_what_datasets_cannot_read_is_one_sentence(copy, tmp_path):
    pytest.importorskip("datasets")
    (tmp_path / "data" / "table.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"^task 'parquet': .*table\.parquet cannot be read \(.*\); replace it\.$"):
        load_manifest(copy())
    (tmp_path / "data" / "empty").mkdir()
    with pytest.raises(UserError, match=r"^task 'parquet': .*empty cannot be read \(.*\); "):
        load_manifest(copy(train="empty"))
    with pytest.raises(UserError, match=r"gone\.parquet cannot be read \(No such file or directory\); .*--data"):
        load_manifest(copy(train="gone.parquet"))


def test_rows_that_are_no_records_are_named(copy, tmp_path):
    datasets = pytest.importorskip("datasets")
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "yes"}]
    rows = {"conversations": [turns, turns[:1]], "answers": [None, None], "image": ["images/red-circle.png", None]}
    datasets.Dataset.from_dict(rows).to_parquet(str(tmp_path / "data" / "rows.parquet"))
    with pytest.raises(UserError, match=r"rows\.parquet: row 2: sample '1' has no answer, neither a gpt turn"):
        load_manifest(copy(train="rows.parquet"))
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(str(tmp_path / "data" / "rows.parquet"))
    with pytest.raises(UserError, match=r"row 1 is no LLaVA instruction record \(conversations is missing\)"):
        load_manifest(copy(train="rows.parquet"))


def test_an_image_in_a_table_that_cannot_be_opened_is_named(copy, tmp_path):
    datasets = pytest.importorskip("datasets")
    turns = [{"from": "human", "value": "?"}, {"from": "gpt", "value": "yes"}]
    rows = {"id": ["x"], "conversations": [turns], "image": [{"bytes": b"no image", "path": None}]}
    table = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image(decode=False))
    table.to_parquet(str(tmp_path / "data" / "rows.parquet"))
    with pytest.raises(UserError, match=r"image 1 of sample 'x' in .*rows\.parquet cannot be opened: it is no "):
        load_manifest(copy(train="rows.parquet"))


@pytest.mark.parametrize("door", ["parquet", "folder"])
def test_tables_without_datasets_say_what_to_install(door, copy, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    path = {"parquet": "table.parquet", "folder": "folder/train"}[door]
    with pytest.raises(
        UserError, match=rf"^task 'parquet': .*{path} wants the package datasets; pip install datasets, or"
    ):
        load_manifest(copy(train=path))


@pytest.mark.parametrize("manifest, order", [("tasks.yaml", "sharegpt,train-only"), ("tables.yaml", "folder")])
def test_a_run_trains_and_answers(manifest, order, suite, tmp_path, lilora, train_options):
    if manifest == "tables.yaml":
        pytest.importorskip("datasets")
    options = ["--model", suite / "base", "--out", tmp_path / "run", "--order", order, *train_options, "--max-steps", 1]
    code, _, err = lilora("train", DOORS / manifest, *options)
    assert code == 0, err
    predictions = tmp_path / "run" / "predictions"
    first = order.split(",")[0]
    assert len((predictions / f"{first}-{first}.jsonl").read_text().splitlines()) == 3
