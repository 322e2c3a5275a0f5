"""The command itself: its help on a narrow terminal, its version, and its options from a file."""

import re
import sys
from pathlib import Path

import pytest
import torch
import typer
import yaml
from support.suite import TRAIN_OPTIONS

from lilora import __version__, cli
from lilora.bank.bank import Bank
from lilora.bank.index import BaseModelId
from lilora.cli import app, output
from lilora.cli.method_options import methods_list, train_options
from lilora.cli.run_config import config_text
from lilora.continual.run import ContinualRun
from lilora.continual.run_record import TrainSettings
from lilora.errors import UserError
from lilora.methods import METHODS

COMMANDS = typer.main.get_command(app).commands
ALL = COMMANDS | {
    f"{group} {name}": command for group in ("bank", "data") for name, command in COMMANDS[group].commands.items()
}


@pytest.fixture
def narrow(monkeypatch):
    monkeypatch.setattr(output.console, "width", 80)
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TERMINAL_WIDTH", "80")


def test_version(lilora):
    assert lilora("--version") == (0, f"lilora {__version__}\n", "")


@pytest.mark.parametrize(
    "words, notes",
    [
        ("train gone --lr 1e-3 --lr 1e-2 --set a=1 --set b=2 --quiet --quiet", ["--lr is given 2 times; {}, 0.01"]),
        ("train gone --projector --no-projector", ["--projector is given 2 times; {}, --no-projector"]),
        ("train gone --lr 1e-3 --order a", []),
        ("train {tasks} --set rr=1 --set rr=2", ["--set rr is given 2 times; {}, 2"]),
        ("tune gone --lr 1,2 --r 4 --lr 1,3 --r 8", ["--lr is given 2 times; {}, 1,3", "--r is given 2 times; {}, 8"]),
        ("bank rm gone --task a --task a --task b", ["--task is given 3 times; {}, b"]),
    ],
)
def test_of_an_option_given_twice_the_last_counts_and_that_is_said(words, notes, suite, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["lilora", *words.format(tasks=suite / "tasks.yaml").split()])
    with pytest.raises(SystemExit):
        cli.main()
    said = [line for line in capsys.readouterr().err.splitlines() if " is given " in line]
    assert said == [f"lilora: {note.format('the last one counts')}" for note in notes]
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit):
        cli.main()
    assert " is given " not in capsys.readouterr().err, "by the first process alone"


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("name", ["", *ALL])
def test_help_fits_80_columns_and_cuts_nothing(name, lilora):
    code, out, _ = lilora(*name.split(), "--help")
    assert code == 0
    assert max(map(len, out.splitlines())) <= 80
    assert not re.search(r"…|[a-z]\.\.\.$", out, re.M)
    if name in ALL:
        for option in ALL[name].params:
            flags = [flag for flag in (*option.opts, *option.secondary_opts) if flag.startswith("--")]
            assert all(flag in out for flag in flags), option.name


def test_arguments_are_called_in_help_what_the_guide_calls_them():
    guide = (Path(__file__).parents[2] / "docs" / "guides" / "cli.md").read_text()
    named = dict(re.findall(r"`lilora ([a-z ]+) ([A-Z]+)", guide))
    assert named == {"train": "MANIFEST", "eval": "BANK", "data check": "MANIFEST", "generate": "BANK"} | {
        "tune": "MANIFEST",
        "report": "RUN",
        "analyze": "BANK",
    }
    for name, argument in named.items():
        usage = " ".join(ALL[name].get_usage(typer.Context(ALL[name], info_name=name)).split())
        assert argument in usage.replace("{", " ").replace("}", " ").split(), usage


def test_the_help_of_train_describes_the_methods(lilora):
    _, out, _ = lilora("train", "--help")
    text = " ".join(out.split())
    assert (
        "Presets: frozen, paper, released. Defaults: r 128, sub_rank r // 2, alpha 2 r, dropout 0.05, lr 2e-05" in text
    )
    assert "Defaults: r 12, alpha 1.0, dropout 0.2, lr 0.002, weight_decay 0.01" in text


@pytest.mark.parametrize("words, completed", [("lilora tr", "train"), ("lilora train --method ol", "olora")])
def test_shells_complete_commands_and_methods(words, completed, lilora, monkeypatch):
    given = {"_LILORA_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": words.count(" ")}
    for name, value in given.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(sys.modules["__main__"], "__package__", None)  # what runs is `lilora`, no `python -m pytest`
    _, out, err = lilora()
    assert out.split() == [completed], err


LONG = "a-long-name-of-a-task-that-goes-on-and-on-and-on-to-the-end-of-a-line"


@pytest.mark.usefixtures("narrow")
def test_a_bank_of_50_tasks_is_readable(tmp_path, lilora):
    base = BaseModelId(id="llava-hf/llava-1.5-7b-hf", fingerprint="0" * 16)
    bank = Bank.create(tmp_path / "bank", config={}, base_model=base)
    shared = {"p.A": torch.zeros(2, 4), "p.B0": torch.zeros(4, 2)}
    names = [f"task-{i}" for i in range(49)] + [LONG]
    for name in names:
        bank.add_task(name, {"p.U": torch.zeros(4, 1), "p.V": torch.zeros(1, 2)}, shared)
    code, out, err = lilora("bank", "ls", tmp_path / "bank")
    assert code == 0, err
    head, *lines = out.splitlines()
    assert head.endswith("on llava-hf/llava-1.5-7b-hf: 50 task(s)")
    assert max(map(len, lines)) <= 80
    assert len(lines) < 60
    assert "…" not in out
    for i, name in enumerate(names[:-1]):
        assert re.search(rf"^ *{i} +{name} +[0-9a-f]{{16}} +6 +0\.00 *$", out, re.M), name
    assert LONG in re.sub(r"\s+|[0-9a-f]{16}.*", "", out[out.index(" 49 ") :])
    assert re.search(r"^ +all +316 ", out, re.M)


@pytest.mark.usefixtures("narrow")
@pytest.mark.parametrize("command", ["info", "params"])
def test_tables_fit_80_columns(command, lilora):
    code, out, _ = lilora(command)
    assert code == 0
    lines = [line for line in out.splitlines() if not line.startswith("adapters: --set ")]  # whole, for a shell
    assert max(map(len, lines)) <= 80
    assert "…" not in out


# --- options from a file ------------------------------------------------------------------------------------------------


def parsed(*arguments):
    return COMMANDS["train"].make_context("train", [str(argument) for argument in arguments])


def test_the_file_gives_defaults_and_the_command_wins(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "tasks: my.yaml\nr: 64\nlr: 1e-3\nmax_steps: 7\nprojector: false\norder: [b, a]\nset: {cap: 3, pools: global}\nlabel:\n"
    )
    got = parsed("--config", file, "--r", "4").params
    assert str(got["tasks"]) == "my.yaml"
    assert (got["r"], got["learning_rate"], got["max_steps"], got["projector"]) == (4, 1e-3, 7, False)
    assert (got["order"], got["label"], got["epochs"]) == ("b,a", None, 1.0)
    assert list(got["pairs"]) == ["cap=3", 'pools="global"']
    assert str(parsed("--config", file, "other.yaml", "--projector").params["tasks"]) == "other.yaml"


def suits(option, value):
    try:
        return parsed("x", option, value)
    except typer.BadParameter:
        return False


def test_every_option_of_a_run_goes_through_a_file(tmp_path):
    """Values that differ from all defaults come back as they were."""
    given = ["tasks.yaml", "--set", "a=1", "--set", "b=[1, null]"]
    options = [option for option in COMMANDS["train"].params if option.opts[0].startswith("--")]
    for option in options:
        if option.opts[0] in ("--config", "--set", "--help", "--json", "--quiet"):
            continue
        if getattr(option, "is_flag", False):
            given.append((option.secondary_opts or option.opts)[0] if option.default else option.opts[0])
            continue
        given += [option.opts[0], next(value for value in ("text", "0.5", "3") if suits(option.opts[0], value))]
    before = parsed(*given)
    file = tmp_path / "run.yaml"
    file.write_text(config_text(before, {"set": {"a": 1, "b": [1, None]}}))
    after = parsed("--config", file)
    assert len(yaml.safe_load(file.read_text())) == 1 + len(options) - len(("config", "json", "quiet"))
    assert {k: v for k, v in after.params.items() if k not in ("config", "pairs")} == {
        k: v for k, v in before.params.items() if k not in ("config", "pairs")
    }
    assert list(after.params["pairs"]) == ["a=1", "b=[1, null]"]


BAD = {
    "key": ("lerning-rate: 1", "key 'lerning-rate' is unknown; known are tasks"),
    "near key": ("max-step: 1", "key 'max-step' is unknown; did you mean 'max-steps'?"),
    "json": ("json: true", "key 'json' is unknown"),
    "no mapping": ("- r", "is no mapping from options to values"),
    "no yaml": ("r: [", "is not YAML"),
    "key twice": ("r: 8\nset:\n  cap: 1\n  cap: 2", "has the key 'cap' twice, again on line 4"),
    "two spellings": (
        "max-steps: 1\nmax_steps: 2",
        "has the key 'max-steps' twice, with - and with _; keep one of them",
    ),
    "type": ("r: eight", "r is 'eight'; "),
    "fraction": ("max-steps: 4.5", "max-steps is 4.5; "),
    "truth": ("r: true", "r is True; it must not be true or false"),
    "no truth": ("projector: 3", "projector is 3; it must be true or false"),
    "mapping": ("r: {a: 1}", "r is {'a': 1}; it must be one value"),
    "set": ("set: cap", "set is 'cap'; write settings below it"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_one_sentence(name, tmp_path):
    text, words = BAD[name]
    (tmp_path / "run.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        parsed("--config", tmp_path / "run.yaml")
    assert words in str(error.value)
    assert "\n" not in str(error.value)


def test_a_file_that_is_not_there_and_a_value_of_another_type(tmp_path, lilora):
    code, _, err = lilora("train", "--config", tmp_path / "run.yaml")
    assert (code, "cannot be read (No such file or directory)" in err) == (2, True)
    (tmp_path / "run.yaml").write_text("tasks: x\nr: many")
    code, _, err = lilora("train", "--config", tmp_path / "run.yaml")
    assert code == 2
    assert f"--config {tmp_path / 'run.yaml'}: r is 'many'; it must be a valid integer" in err


def test_a_run_is_repeated_from_its_folder(suite, tmp_path, lilora, train_options):
    first, second = tmp_path / "first", tmp_path / "second"
    options = [*train_options, "--max-steps", "1", "--order", "colour", "--set", "fusion=false"]
    code, _, err = lilora("train", suite / "tasks.yaml", "--out", first, *options)
    assert code == 0, err
    kept = yaml.safe_load((first / "run.yaml").read_text())
    assert (kept["method"], kept["preset"], kept["r"], kept["lr"], kept["weight-decay"]) == (
        "lilora",
        "frozen",
        8,
        0.01,
        0.01,
    )
    assert kept["set"] == {"fusion": False}
    assert kept["tasks"] == str(suite / "tasks.yaml")
    code, _, err = lilora("train", "--config", first / "run.yaml", "--out", second)
    assert code == 0, err
    one, two = Bank.open(first / "bank"), Bank.open(second / "bank")
    assert two.config == one.config
    assert two.task_fingerprint("colour") == one.task_fingerprint("colour")
    assert yaml.safe_load((second / "run.yaml").read_text()) == kept | {"out": str(second)}
    code, _, err = lilora("train", "--config", first / "run.yaml")  # goes on: there is nothing left to do
    assert code == 0, err
    code, _, err = lilora("train", "--config", first / "run.yaml", "--r", "4")
    assert (code, "its settings.r is 8 and this one's is 4" in err) == (2, True)


def test_what_is_not_given_is_what_train_settings_say():
    """Where no method or preset says otherwise: as an option's own default, or in its help."""
    defaults = {name: field.default for name, field in TrainSettings.model_fields.items()}
    options = {option.name: option for option in COMMANDS["train"].params if option.name in defaults}
    assert set(defaults) - set(options) == {"learning_rates"}  # of the manifest alone
    for name, option in options.items():
        told = re.search(r"Default: ([\d.]+), or what the preset says", option.help or "")
        assert option.default == (None if told or name in ("learning_rate", "weight_decay") else defaults[name])
        assert told is None or float(told[1]) == defaults[name]


def test_a_preset_says_how_it_trains():
    released = train_options(METHODS["pclr"], "released", {})
    assert released == {"learning_rate": 2e-4, "weight_decay": 0.0, "max_grad_norm": 0.0}
    assert train_options(METHODS["pclr"], None, {}) == {"learning_rate": 2e-4, "weight_decay": 0.0}
    assert train_options(METHODS["dac"], "released", {"max_grad_norm": 2.0})["max_grad_norm"] == 2.0
    assert dict(methods_list())["dac"].count("released (max_grad_norm 0.0)") == 1


def test_an_interrupted_training_says_how_to_go_on(suite, tmp_path, lilora, monkeypatch):
    def stop(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(ContinualRun, "train", stop)
    code, _, err = lilora("train", suite / "tasks.yaml", *TRAIN_OPTIONS, "--out", tmp_path / "run")
    assert code != 0
    assert err.endswith(f"lilora: {tmp_path / 'run'}: interrupted; the same command goes on with this run\n")
