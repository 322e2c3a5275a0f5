"""No file that the product reads can run code: a pickle that would is planted in the place of each."""

import ast
import io
import os
import pickle
import shutil
import sys
from contextlib import suppress
from pathlib import Path
from types import ModuleType

import pytest
import torch
from peft import PeftModel, get_peft_model
from support.checkpoints import latest, write
from support.scored_bank import scored_bank
from transformers import AutoConfig, AutoModelForImageTextToText

from lilora import LiLoRAConfig, hotswap
from lilora.bank.bank import Bank
from lilora.continual.base_model import load_base
from lilora.continual.images import open_image
from lilora.continual.kinds import KINDS
from lilora.continual.manifest import load_manifest
from lilora.continual.prompts import read_prompts
from lilora.continual.record_files import record_file
from lilora.errors import UserError
from lilora.importers.dac import read_dac
from lilora.importers.lilora import read_lilora
from lilora.importers.pclr import read_pclr
from lilora.importers.peft_folder import read_peft

ROOT = Path(__file__).parents[2]


@pytest.fixture
def bank(tmp_path):
    return scored_bank(tmp_path)


class Hostile:
    """Whoever unpickles it makes a folder."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def raw(hostile):
    return pickle.dumps(hostile)


def zipped(hostile):
    stream = io.BytesIO()
    torch.save({"format": "lilora-task-bank-v2", "weights": hostile}, stream)
    return stream.getvalue()


def legacy(hostile):
    stream = io.BytesIO()
    torch.save({"weights": hostile}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


@pytest.fixture(params=[raw, zipped, legacy])
def plant(request, tmp_path):
    """plant(file) makes it a hostile pickle; its code must not have run when the test ends."""
    marker = tmp_path / "it-ran"
    data = request.param(Hostile(marker))

    def planted(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    yield planted
    assert not marker.exists()


def test_the_plant_is_poison(tmp_path):
    pickle.loads(raw(Hostile(tmp_path / "raw")))
    for form in (zipped, legacy):
        torch.load(io.BytesIO(form(Hostile(tmp_path / form.__name__))), weights_only=False)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["legacy", "raw", "zipped"]


FILES = (
    "trainable.safetensors",
    "optimizer.pt",
    "scheduler.pt",
    "rng_state.pth",
    "trainer_state.json",
    "checksums.json",
)


@pytest.mark.parametrize("name", FILES)
def test_a_checkpoint_is_passed_over(name, plant, tmp_path):
    write(tmp_path / "stage" / "checkpoint-2", 2)
    plant(tmp_path / "stage" / "checkpoint-2" / name)
    assert latest(tmp_path / "stage")[0] is None


def test_what_fsdp2_left_under_earlier_versions_is_passed_over(plant, tmp_path):
    checkpoint = tmp_path / "stage" / "checkpoint-2"
    write(checkpoint, 2)
    for name in ("trainable.safetensors", "optimizer.pt"):
        (checkpoint / name).unlink()
    for name in ("pytorch_model_fsdp_0/.metadata", "pytorch_model_fsdp_0/__0_0.distcp", "optimizer_0/.metadata"):
        plant(checkpoint / name)
    found, said = latest(tmp_path / "stage")
    assert (found, "it lacks trainable.safetensors" in said[0]) == (None, True)


def test_what_deepspeed_wrote_is_read_only_if_it_needs_no_more_than_its_own_classes(plant, tmp_path, monkeypatch):
    class LossScaler:
        def __init__(self):
            self.scale = 1.0

    places = {
        "LossScaler": "deepspeed.runtime.fp16.loss_scaler",
        "ZeroStageEnum": "deepspeed.runtime.zero.config",
        "fragment_address": "deepspeed.utils.tensor_fragment",
    }
    for name, place in places.items():
        parts = place.split(".")
        for depth in range(1, len(parts) + 1):
            module = ".".join(parts[:depth])
            monkeypatch.setitem(sys.modules, module, sys.modules.get(module) or ModuleType(module))
        made = LossScaler if name == "LossScaler" else type(name, (), {})
        made.__module__, made.__qualname__ = place, name
        setattr(sys.modules[place], name, made)
    folder = tmp_path / "stage" / "checkpoint-2"
    write(folder, 2)
    optimizer = folder / "global_step2" / "zero_pp_rank_0_mp_rank_00_optim_states.pt"
    optimizer.parent.mkdir()
    torch.save({"optimizer_state_dict": {"loss_scaler": LossScaler(), "a": torch.ones(2)}}, optimizer)
    assert latest(tmp_path / "stage", deepspeed=True) == ("checkpoint-2", [])
    plant(optimizer)
    found, said = latest(tmp_path / "stage", deepspeed=True)
    assert (found, "optim_states.pt is truncated, or holds more than plain tensors" in said[0]) == (None, True)


def test_banks(bank, plant):
    for path in [*bank.path.rglob("*.safetensors"), bank.path / "bank.json"]:
        before = path.read_bytes()
        plant(path)
        with pytest.raises(UserError):
            read_all(bank.path)
        path.write_bytes(before)


def read_all(folder):
    opened = Bank.open(folder)
    return opened.load_tasks(), opened.load_routers()


def test_checkpoints_of_other_programs(plant, tmp_path, suite):
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(suite / "base"))
    plant(tmp_path / "lilora" / "lilora_task_bank.bin")
    plant(tmp_path / "lrp.bin")
    plant(tmp_path / "peft" / "adapter_config.json")
    for read in (
        lambda: read_lilora([tmp_path / "lilora" / "lilora_task_bank.bin"], model),
        lambda: read_pclr([tmp_path / "lrp.bin"], model),
        lambda: read_peft([tmp_path / "peft"], model),
    ):
        with pytest.raises(UserError):
            read()
    torch.save({"format": "lilora-task-bank-v2"}, tmp_path / "lilora_task_bank.bin")
    plant(tmp_path / "non_lora_trainables.bin")
    with pytest.raises(UserError, match="non_lora_trainables"):
        read_lilora([tmp_path / "lilora_task_bank.bin"], model)
    model.config.model_type = "clip"  # read_dac looks at the file after that
    plant(tmp_path / "Aircraft.pt")
    with pytest.raises(UserError, match="Aircraft"):
        read_dac([tmp_path / "Aircraft.pt"], model)


def test_a_base_model_and_its_processor(plant, tmp_path, suite):
    for path in [*(suite / "base").iterdir(), Path("pytorch_model.bin")]:
        folder = tmp_path / path.name
        folder.mkdir()
        for other in (suite / "base").iterdir():
            weights = path.name == "pytorch_model.bin" and other.name == "model.safetensors"
            if other.name != path.name and not weights:
                os.link(other, folder / other.name) if other.stat().st_dev == folder.stat().st_dev else (
                    folder / other.name
                ).write_bytes(other.read_bytes())
        plant(folder / path.name)
        with suppress(UserError):
            load_base(str(folder), "auto", "cpu", KINDS["instruction"])


def test_adapters_of_peft(plant, tmp_path, suite):
    config = LiLoRAConfig(target_modules=r".*language_model\.layers\.0\.mlp\.up_proj", r=4, sub_rank=2)
    base = AutoModelForImageTextToText.from_pretrained(suite / "base")
    model = get_peft_model(base, config, "one")
    model.save_pretrained(tmp_path)
    for name in ("adapter_model.safetensors", "adapter_model.bin"):
        (tmp_path / "one" / "adapter_model.safetensors").unlink(missing_ok=True)
        plant(tmp_path / "one" / name)
        for read in (
            lambda: hotswap(model, tmp_path / "one", "one"),
            lambda: model.load_adapter(tmp_path / "one", "two"),
            lambda: PeftModel.from_pretrained(base, tmp_path / "one"),
        ):
            with suppress(Exception):  # PEFT's own
                read()


def test_manifests_and_their_data(plant, tmp_path, suite, lilora):
    plant(tmp_path / "tasks.yaml")
    with pytest.raises(UserError):
        load_manifest(tmp_path / "tasks.yaml", None, None)
    (tmp_path / "tasks.yaml").write_text("name: !!python/object/apply:os.mkdir [it-ran]\ntasks: []\n")
    with pytest.raises(UserError):
        load_manifest(tmp_path / "tasks.yaml", None, None)
    for name in ("colour-train.json", "images/colour-train-0.png"):
        data = tmp_path / name.replace("/", "-")
        for other in (suite / "data").rglob("*"):
            if other.is_file():
                (data / other.relative_to(suite / "data")).parent.mkdir(parents=True, exist_ok=True)
                (data / other.relative_to(suite / "data")).write_bytes(other.read_bytes())
        plant(data / name)
        command = ["train", suite / "tasks.yaml", "--data", data, "--out", tmp_path / "run", "--order", "colour"]
        code, _, err = lilora(*command, "--r", "8", "--sub-rank", "4", "--device", "cpu")
        assert (code, err.count("lilora: ")) == (2, 1), err


def test_options_of_a_run_and_questions(plant, tmp_path, suite, lilora):
    for content in (None, "lr: !!python/object/apply:os.mkdir [it-ran]\n"):
        plant(tmp_path / "run.yaml") if content is None else (tmp_path / "run.yaml").write_text(content)
        code, _, err = lilora("train", "--config", tmp_path / "run.yaml", suite / "tasks.yaml")
        assert (code, err.count("lilora: ")) == (2, 1), err
    plant(tmp_path / "prompts.jsonl")
    with pytest.raises(UserError, match=r"prompts\.jsonl"):
        read_prompts(tmp_path / "prompts.jsonl")
    plant(tmp_path / "a.png")
    with pytest.raises(UserError, match=r"a\.png"):
        open_image(tmp_path / "a.png")


def test_what_lies_beside_a_bank(bank, plant, lilora, tmp_path):
    run = bank.path.parent
    names = ("predictions/two-one.jsonl", "metrics.json", "report.html", "bank/README.md", "run.yaml")
    for name in (*names, "bank/tasks/three.safetensors", "checkpoints/two/learn/checkpoint-2/optimizer.pt"):
        plant(run / name)
    for command in (["bank", "ls", run], ["bank", "export", run, "--out", tmp_path / "out"], ["report", run]):
        assert lilora(*command)[0] == 0
    for command in (["analyze", run], ["bank", "rm", run, "--task", "two"]):
        assert lilora(*command)[0] == 0


def test_record_files_and_folders_of_datasets(plant, tmp_path):
    pytest.importorskip("datasets")
    for name in ("lines.jsonl", "llava.json", "table.parquet", "folder/train"):
        source = ROOT / "examples" / "data" / name
        for file in source.iterdir() if source.is_dir() else [source]:
            place = tmp_path / file.name
            shutil.copytree(ROOT / "examples" / "data", place)
            plant(place / file.relative_to(ROOT / "examples" / "data"))
            with suppress(UserError):
                list(record_file(place / name))


UNSAFE = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "torch.distributed.checkpoint"}


def test_the_source_unpickles_nothing_in_full():
    loads = 0
    for path in [*(ROOT / "python").rglob("*.py"), *(ROOT / "lilora_kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert not UNSAFE & {alias.name for alias in node.names}, path
            if isinstance(node, ast.ImportFrom):
                assert node.module not in UNSAFE, path
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("torch.load", "np.load", "numpy.load"):
                given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert given.get("weights_only") == "True", f"{path}:{node.lineno}"
                loads += 1
    assert loads > 0
