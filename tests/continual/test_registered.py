"""Methods, scorers and task identifiers from outside the package do all that those inside do."""

import json
import sys

import pytest
import yaml
from torch import nn

from lilora.bank.bank import Bank
from lilora.cli.method_options import method_settings
from lilora.continual.manifest import load_manifest
from lilora.continual.scorers import SCORERS, scorer
from lilora.continual.task_identification import TASK_IDENTIFIERS
from lilora.errors import UserError
from lilora.methods import METHODS, register_method
from lilora.methods.base import Method
from lilora.peft.config import LiLoRAConfig
from lilora.registry import Registry
from lilora_kernels import LiLoRALinear

OFFSET = '''
import re

import torch
from pydantic import Field
from torch import nn

from lilora.methods.base import Method, register_method
from lilora.methods.settings import MethodSettings


class OffsetSettings(MethodSettings):
    scale: float = Field(1.0, gt=0)


@register_method
class Offset(Method):
    """A vector for each task that is added to the output of each adapted linear."""

    name = "offset"
    settings_type = OffsetSettings
    no_lora = "it moves outputs"
    train_defaults = {"learning_rate": 0.3}

    def __init__(self, base, settings):
        super().__init__(base, settings)
        self.options = self.read_settings(settings)
        self.model, self.active = base, None
        base.lora_offsets = nn.ParameterDict()
        self.paths = [
            path
            for path, module in base.named_modules()
            if isinstance(module, nn.Linear) and re.fullmatch(self.options.target_modules, path)
        ]
        for path in self.paths:
            base.get_submodule(path).register_forward_hook(lambda m, args, y, path=path: y + self.offset(path))

    def key(self, task, path):
        return f"{task}/{path}".replace(".", "-")

    def offset(self, path):
        return self.options.scale * self.model.lora_offsets[self.key(self.active, path)] if self.active else 0

    def add(self, task):
        for path in self.paths:
            weight = self.model.get_submodule(path).weight
            self.model.lora_offsets[self.key(task, path)] = nn.Parameter(weight.new_zeros(len(weight)))
        self.tasks.append(task)

    def activate(self, task, train):
        self.active = task
        for key, offset in self.model.lora_offsets.items():
            offset.requires_grad_(train and key.startswith(f"{task}/"))

    def tensors(self, task):
        own = {f"state.{path}.offset": self.model.lora_offsets[self.key(task, path)] for path in self.paths}
        return own, {"state.scale": torch.tensor([self.options.scale])}

    def ranks(self):
        return 0
'''


def install(folder, monkeypatch, modules, entry_points):
    """As pip would: modules, and what a package says of itself."""
    about = folder / "outside-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: outside\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(entry_points)
    for name, text in modules.items():
        (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(folder)


@pytest.fixture
def forgotten(monkeypatch):
    """What a test registers is unknown to the others."""
    monkeypatch.setattr(METHODS, "_parts", dict(METHODS._parts))


@pytest.mark.usefixtures("forgotten")
def test_a_method_of_another_package_trains_reports_and_is_in_a_bank(
    suite, tmp_path, lilora, train_options, monkeypatch
):
    install(tmp_path, monkeypatch, {"outside_offset": OFFSET}, "[lilora.methods]\noffset = outside_offset\n")
    run = tmp_path / "run"
    more = ["--method", "offset", "--set", "scale=2.0", "--order", "colour,count", "--out", run, *train_options]
    code, _, err = lilora("train", suite / "tasks.yaml", *[o for o in more if o not in ("--lr", "0.01")])
    assert code == 0, err
    bank = Bank.open(run / "bank")
    assert bank.tasks == ["colour", "count"]
    assert bank.config["settings"]["scale"] == 2.0
    assert bank.config["train"]["learning_rate"] == 0.3
    assert all(offset.any() for offset in bank.load_task("count")[0].values())
    assert [len(row) for row in bank.scores["matrix"]["scores"]] == [1, 2]
    assert bank.scores["matrix"]["carried_from"][1][0] == "colour"  # its function is unchanged

    code, out, err = lilora("report", run, "--json", "--out", tmp_path / "report")
    assert code == 0, err
    assert json.loads(out)["runs"][0]["method"] == "offset"
    code, out, err = lilora("eval", run, "--tasks", suite / "tasks.yaml", "--device", "cpu", "--json")
    assert code == 0, err
    assert [cell["score"] for cell in json.loads(out).values()] == bank.scores["matrix"]["scores"][-1]
    for command, words in (
        (["analyze", run], "is of method 'offset', which keeps no LoRA"),
        (["bank", "export", run, "--out", tmp_path / "lora"], "offset is no plain LoRA: it moves outputs"),
        (["bank", "export", run, "--out", tmp_path / "x", "--format", "lilora"], "tasks of offset"),
    ):
        code, _, err = lilora(*command)
        assert (code, words in err) == (2, True), err


@pytest.mark.usefixtures("forgotten")
@pytest.mark.parametrize(
    "module, words",
    [
        ("import no_such_module", "'mine' of the package outside cannot be imported (ModuleNotFoundError"),
        ("1 / 0", "(ZeroDivisionError: division by zero); repair or uninstall that package"),
        ("", "'mine' of the package outside is missing: outside_broken registers nothing of this name"),
    ],
)
def test_a_broken_package_is_one_sentence_and_the_other_methods_work(module, words, tmp_path, monkeypatch):
    install(tmp_path, monkeypatch, {"outside_broken": module}, "[lilora.methods]\nmine = outside_broken\n")
    monkeypatch.delitem(sys.modules, "outside_broken", raising=False)
    assert next(iter(METHODS)) == "lilora"
    assert "mine" in METHODS
    with pytest.raises(UserError) as error:
        METHODS.find("mine")
    assert words in str(error.value)
    METHODS.find("lora")


def test_a_name_is_registered_once_and_a_module_may_be_imported_anew():
    parts = Registry("part", "lilora.no_such_group")

    def one(): ...

    def other(): ...

    first = parts.register("a", one)
    with pytest.raises(UserError, match=r"part 'a' exists already, in .*; give this one another name"):
        parts.register("a", other)
    anew = type(one)(one.__code__, {"__name__": __name__})
    anew.__qualname__ = one.__qualname__
    assert parts.register("a", anew) is parts.find("a") is not first
    with pytest.raises(UserError, match=r"^--part b is unknown; choose one of a$"):
        parts.find("b", "--part")
    with pytest.raises(UserError, match="method 'lora' exists already"):
        register_method(type("Other", (Method,), {"name": "lora"}))


# --- defaults -----------------------------------------------------------------------------------------------------------

SETTINGS = {  # of r 8 alone
    "lilora": {"alpha": 16.0, "sub_rank": 4, "dropout": 0.05},
    "pclr": {"alpha": 16.0, "dropout": 0.0},
    "dac": {"alpha": 1.0, "dropout": 0.2},
}
POOLS = ("moelora", "olora", "nlora", "sefe", "sdlora", "loda", "proglora", "eproj", "adalora", "sora", "xgblora")
SETTINGS |= {name: {"alpha": 16.0, "dropout": 0.05} for name in POOLS}
ONE_LORA = ("lora", "dirlora", "ewc", "lwf", "joint", "replay", "slao", "clora", "cia", "ortholora")
SETTINGS |= {name: {"lora_alpha": 16.0, "lora_dropout": 0.05} for name in ONE_LORA}


@pytest.mark.parametrize("name", SETTINGS)
def test_what_is_not_given_follows_from_r(name):
    got = method_settings(METHODS[name], None, {"r": 8}, {"target_modules": "x"})
    assert {key: got[key] for key in SETTINGS[name]} == SETTINGS[name]
    assert METHODS[name].read_settings(got) == METHODS[name].read_settings({**got, **SETTINGS[name]})
    assert method_settings(METHODS[name], None, {}, {"target_modules": "x", "r": 8}) == got  # --set r=8


@pytest.mark.parametrize("r", [1, 8, 128, None])
def test_the_command_peft_and_plain_layers_have_the_same_defaults(r):
    sizes = {} if r is None else {"r": r}
    got = method_settings(METHODS["lilora"], None, sizes, {"target_modules": "x"})
    config, layer = LiLoRAConfig(**sizes), LiLoRALinear(nn.Linear(3, 3).requires_grad_(False), **sizes)
    wanted = {"r": r or 128, "alpha": 2.0 * (r or 128), "sub_rank": max(1, (r or 128) // 2), "dropout": 0.05}
    assert {key: got[key] for key in wanted} == wanted
    assert {key: getattr(config, key) for key in wanted} == wanted
    assert (layer.rank, layer.alpha, layer.sub_rank, layer.dropout) == tuple(wanted.values())


def test_a_wrong_setting_lists_those_of_the_method():
    for more, words in (({"capp": 3}, "pclr has no setting 'capp'; did you mean 'cap'?"), ({"cap": "x"}, "cap is 'x'")):
        with pytest.raises(UserError) as error:
            method_settings(METHODS["pclr"], None, {}, {"target_modules": "x", **more})
        sentence, _, table = str(error.value).partition("\n")
        assert words in sentence
        assert "\n  cap                 int = 256\n" in table
        assert "\n  pools               layer | global = layer\n" in table
        assert "\n  alpha               float = 2 r\n" in table
        assert max(map(len, table.splitlines())) <= 80


# --- scorers and task identifiers ---------------------------------------------------------------------------------------

SCORERS_BESIDE = """
def half(prediction, references):
    return 0.5

def broken(prediction, references):
    return references["first"]

def percent(prediction, references):
    return 50

points = 0.5
"""


def manifest_with(suite, folder, scorer):
    content = yaml.safe_load((suite / "tasks.yaml").read_text())
    content |= {"data": str(suite / "data"), "model": str(suite / "base")}
    content["tasks"] = [{**content["tasks"][0], "scorer": scorer}]
    (folder / "tasks.yaml").write_text(yaml.safe_dump(content))
    return folder / "tasks.yaml"


def test_a_scorer_beside_the_manifest(suite, tmp_path, lilora, train_options, monkeypatch):
    (tmp_path / "beside.py").write_text(SCORERS_BESIDE)
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    path = list(sys.path)
    train = ["--out", tmp_path / "run", *train_options, "--max-steps", "1"]
    code, _, err = lilora("train", manifest_with(suite, tmp_path, "beside:half"), *train)
    assert code == 0, err
    assert Bank.open(tmp_path / "run").scores["matrix"]["scores"] == [[50.0]]
    assert sys.path == path
    for name, words in (
        ("beside:broken", "scorer 'beside:broken' raised TypeError: list indices must be integers"),
        ("beside:percent", "scorer 'beside:percent' returned 50 for"),
        ("beside:points", "scorer 'beside:points' is a float; name a function"),
        ("beside:none", "scorer 'beside:none' cannot be imported (AttributeError"),
        ("nowhere:half", "cannot be imported (ModuleNotFoundError: No module named 'nowhere')"),
        ("best", "scorer 'best' is unknown; choose one of exact, containment"),
    ):
        with pytest.raises(UserError) as error:
            load_manifest(manifest_with(suite, tmp_path, name))
        assert words in str(error.value)
        assert str(error.value).startswith("task 'colour': ")


def test_a_registered_scorer(suite, tmp_path, monkeypatch):
    monkeypatch.setattr(SCORERS, "_parts", dict(SCORERS._parts))
    text = "from lilora.continual.scorers import register_scorer\n@register_scorer\ndef longest(a, b):\n    return 1\n"
    install(tmp_path, monkeypatch, {"outside_scorer": text}, "[lilora.scorers]\nlongest = outside_scorer\n")
    assert load_manifest(manifest_with(suite, tmp_path, "longest")).tasks[0].scorer == "longest"
    assert scorer("longest")("", []) == 1


LAST = """
import torch

from lilora.continual.task_identification import TaskRouter, register_task_identifier


@register_task_identifier
class Last(TaskRouter):
    name = "last"

    def fit(self, task, batches):
        self.statistics[task] = {"samples": torch.tensor([sum(float(len(b["input_ids"])) for b in batches)])}
        return self.statistics[task]

    def route(self, inputs):
        return [self.tasks[-1]] * len(inputs["input_ids"])
"""


def test_a_task_identifier_of_another_package(suite, tmp_path, lilora, train_options, monkeypatch):
    monkeypatch.setattr(TASK_IDENTIFIERS, "_parts", dict(TASK_IDENTIFIERS._parts))
    monkeypatch.delitem(sys.modules, "outside_last", raising=False)
    install(tmp_path, monkeypatch, {"outside_last": LAST}, "[lilora.task_identifiers]\nlast = outside_last\n")
    run = tmp_path / "run"
    train = [suite / "tasks.yaml", "--out", run, "--order", "colour,count", *train_options, "--max-steps", "1"]
    code, _, err = lilora("train", *train, "--task-identifier", "magic")
    assert (code, "--task-identifier magic is unknown; choose one of nearest-centroid, linear-probe, last" in err) == (
        2,
        True,
    )
    code, _, err = lilora("train", *train, "--task-identifier", "last")
    assert code == 0, err
    assert Bank.open(run).config["task_identifier"] == "last"
    assert Bank.open(run).load_routers()["count"]["samples"] > 0
    code, _, err = lilora("generate", run, "--prompt", "which colour is it ?", "--device", "cpu")
    assert (code, "task: count\n" in err) == (0, True)
    code, _, err = lilora("train", *train)
    assert (code, "its task_identifier is 'last'" in err) == (2, True)
