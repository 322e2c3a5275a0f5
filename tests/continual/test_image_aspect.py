"""A run whose images are padded to squares: recorded in its bank, and done by all that reads the bank."""

import json
import shutil

import pytest
import yaml
from PIL import Image

from lilora.bank.bank import Bank
from lilora.continual import images
from lilora.continual.manifest import load_manifest


@pytest.fixture(scope="module")
def wide(suite, tmp_path_factory):
    """The manifest of the suite with `image_aspect: pad`, and pictures twice as wide as high."""
    folder = tmp_path_factory.mktemp("wide")
    shutil.copytree(suite / "data", folder / "data")
    for path in (folder / "data" / "images").iterdir():
        with Image.open(path) as image:
            image.resize((32, 16)).save(path)
    manifest = yaml.safe_load((suite / "tasks.yaml").read_text())
    manifest |= {"model": str(suite / "base"), "image_aspect": "pad", "tasks": manifest["tasks"][:2]}
    (folder / "tasks.yaml").write_text(yaml.safe_dump(manifest))
    return folder


@pytest.fixture
def padded(monkeypatch):
    """The sizes of the images that were padded."""
    found, pad = [], images.padded_to_square
    monkeypatch.setattr(
        images, "padded_to_square", lambda image, colour: found.append(image.size) or pad(image, colour)
    )
    return found


def test_what_a_run_was_trained_with_is_what_all_that_reads_it_does(wide, tmp_path, lilora, quick, padded):
    def count(*command):
        padded.clear()
        code, _, err = lilora(*command)
        assert code == 0, err
        assert set(padded) <= {(32, 16)}
        return len(padded)

    run, manifest = tmp_path / "run", wide / "tasks.yaml"
    train = ["train", manifest, "--out", run, *quick]
    assert count(*train, "--order", "colour") > 24, "of two training batches, the router's and the evaluation's"
    assert Bank.open(run / "bank").config["image_aspect"] == "pad"
    assert "padded to squares" in (run / "bank" / "README.md").read_text()
    assert count(*train) > 24, "a run that goes on"
    assert count("eval", run, "--tasks", manifest, "--routed", "--device", "cpu", "--json") >= 48
    image = next((wide / "data" / "images").iterdir())
    lines = [json.dumps({"image": str(image), "prompt": "name it ?", **more}) for more in ({}, {"task": "count"})]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    assert count("generate", run, "--prompts", tmp_path / "prompts.jsonl", "--device", "cpu") == 3

    code, _, err = lilora(*train, "--image-aspect", "processor")
    assert (code, "its image_aspect is 'pad' and this one's is 'processor'" in err) == (2, True), err
    other = ["train", manifest, "--out", tmp_path / "other", *quick, "--order", "colour"]
    assert count(*other, "--image-aspect", "processor") == 0, "the option wins"
    assert "image_aspect" not in Bank.open(tmp_path / "other/bank").config
    assert "image-aspect: processor" in (tmp_path / "other/run.yaml").read_text()
    code, _, err = lilora(*other, "--image-aspect", "pad")
    assert (code, "its image_aspect is 'processor' and this one's is 'pad'" in err) == (2, True), err


def test_another_aspect_is_one_sentence(wide, tmp_path, lilora):
    code, _, err = lilora("train", wide / "tasks.yaml", "--out", tmp_path / "run", "--image-aspect", "square")
    assert (code, "--image-aspect square is unknown; choose one of processor, pad" in err) == (2, True)
    path = tmp_path / "tasks.yaml"
    path.write_text((wide / "tasks.yaml").read_text().replace("image_aspect: pad", "image_aspect: anyres"))
    with pytest.raises(ValueError, match=r"key 'image_aspect' is .*; it must be 'processor' or 'pad'"):
        load_manifest(path)
