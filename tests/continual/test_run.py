"""`lilora` end to end on the tiny suite: every command, every method, interruption, and bad input."""

import json
import os
import random
import shutil
import time

import pytest
import torch
import yaml
from PIL import Image
from support.commands import KILLS, code_of, killed_after, spawn
from transformers import CLIPImageProcessorPil

from lilora.bank.bank import Bank
from lilora_kernels import backends

METHODS = {
    "lilora-frozen": ["--preset", "frozen"],
    "lilora-paper": ["--preset", "paper"],
    "lilora-released": ["--preset", "released"],
    "lora": ["--method", "lora"],
    "dirlora": ["--method", "dirlora"],
}


@pytest.fixture(scope="session")
def runs():
    return {}


@pytest.fixture
def trained(runs, suite, tmp_path_factory, train_options, lilora, drawn):
    """trained(method): the folder of a finished run, for tests that only read, and what it printed; each is made once."""

    def run(method):
        if method not in runs:
            folder = tmp_path_factory.mktemp("trained") / "run"
            options = ["--out", folder, "--json", *METHODS[method], *train_options]
            code, out, err = lilora("train", suite / "tasks.yaml", *options)
            assert code == 0, err
            runs[method] = folder, json.loads(out)
        return runs[method]

    return run


@pytest.fixture
def finished(trained):
    return trained("lilora-frozen")[0]


@pytest.mark.parametrize("method", METHODS)
def test_train_evaluates_after_every_task_and_reports(method, trained):
    folder, run = trained(method)
    assert run["method"] == method
    scores = run["matrix"]["scores"]
    assert [len(row) for row in scores] == [1, 2, 3]
    assert all(0 <= cell <= 100 for row in scores for cell in row)
    carried = [cell for row in run["matrix"]["carried_from"] for cell in row if cell is not None]
    assert len(carried) == {"lilora-frozen": 3, "dirlora": 3}.get(method, 0)  # only where the function is unchanged
    assert (folder / "report.html").stat().st_size > 10_000
    bank = Bank.open(folder / "bank")
    assert bank.tasks == ["colour", "count", "name"]
    assert "| after | colour | count | name |" in (folder / "bank" / "README.md").read_text()
    if method == "lilora-frozen":
        assert len({bank.shared_fingerprint(task) for task in bank.tasks}) == 1
        assert run["params_per_task"] < sum(t.numel() for t in bank.load_task("name")[1].values())


def test_old_tasks_stay_bit_for_bit_under_frozen_and_drift_under_released(trained):
    shared = {}
    for preset in ("frozen", "released"):
        bank = Bank.open(trained(f"lilora-{preset}")[0] / "bank")
        shared[preset] = [bank.load_task(task)[1] for task in bank.tasks]
    for name, tensor in shared["frozen"][0].items():
        assert torch.equal(tensor, shared["frozen"][2][name])
        changed = not torch.equal(shared["released"][0][name], shared["released"][2][name])
        assert changed == name.endswith(".A")


@pytest.mark.parametrize("method", ["lilora", "lora", "pclr"])
def test_targets_named_by_the_user_replace_the_preset(method, suite, tmp_path, lilora, train_options):
    pattern = r".*language_model\.layers\.1\.self_attn\.q_proj"
    more = ["--method", method, "--set", f"target_modules={pattern}", "--order", "colour"]
    code, out, err = lilora("train", suite / "tasks.yaml", "--out", tmp_path / "run", *more, *train_options)
    assert code == 0, err
    assert out.splitlines().count(f"adapters: --set 'target_modules={pattern}'") == 1
    tensors = [name for part in Bank.open(tmp_path / "run" / "bank").load_task("colour") for name in part]
    adapted = [name for name in tensors if not name.startswith("state.")]
    assert adapted
    assert all("language_model.layers.1.self_attn.q_proj." in name for name in adapted)


def test_order_decides_the_sequence_and_a_longer_one_goes_on(suite, tmp_path, lilora, train_options):
    run = tmp_path / "run"
    code, _, err = lilora("train", suite / "tasks.yaml", "--out", run, "--order", "name,colour", *train_options)
    assert code == 0, err
    assert Bank.open(run / "bank").tasks == ["name", "colour"]
    before = Bank.open(run / "bank").task_fingerprint("colour")
    code, out, err = lilora(
        "train", suite / "tasks.yaml", "--out", run, "--order", "name,colour,count", "--json", *train_options
    )
    assert code == 0, err
    assert json.loads(out)["matrix"]["tasks"] == ["name", "colour", "count"]
    assert Bank.open(run / "bank").task_fingerprint("colour") == before


def test_eval_of_a_bank_gives_the_scores_of_its_last_stage(suite, finished, lilora):
    want = Bank.open(finished / "bank").scores["matrix"]["scores"][-1]
    for batch in (5, 64):
        code, out, err = lilora(
            "eval", finished, "--tasks", suite / "tasks.yaml", "--batch-size", batch, "--device", "cpu", "--json"
        )
        assert code == 0, err
        assert [cell["score"] for cell in json.loads(out).values()] == want


def test_report_of_several_runs(finished, trained, tmp_path, lilora):
    code, out, err = lilora("report", finished, trained("lora")[0], "--out", tmp_path / "report")
    assert code == 0, err
    assert "lilora-frozen" in out
    page = (tmp_path / "report" / "report.html").read_text()
    assert "lora" in page
    assert "data:image/png;base64" in page


def test_generate_answers_with_the_named_task(suite, finished, lilora):
    image = next((suite / "data" / "images").iterdir())
    code, out, err = lilora(
        "generate", finished, "--task", "name", "--image", image, "--prompt", "name it ?", "--device", "cpu"
    )
    assert code == 0, err
    assert out.strip()


def test_bank_ls_and_info_and_params(finished, lilora):
    code, out, _ = lilora("bank", "ls", finished, "--json")
    assert code == 0
    assert [task["name"] for task in json.loads(out)["tasks"]] == ["colour", "count", "name"]
    code, out, _ = lilora("info", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["torch"] == torch.__version__
    assert facts["backends"]["linear"]["eager"] == "available"
    assert (facts["backends"]["linear"]["cpu"] == "available") == facts["cpu build"].startswith("loaded, ")
    code, out, _ = lilora("params", "--json")
    assert code == 0
    assert json.loads(out)["per_task"] == 54_804_578
    for command in ("bank ls", "info", "params"):
        code, out, _ = lilora(*command.split(), *([finished] if command == "bank ls" else []))
        assert code == 0
        assert out.strip()


def test_labels_and_folders_that_look_like_markup_are_printed_as_they_are(suite, tmp_path, lilora, train_options):
    label, folder = "[/b] [red]mine :smile:", tmp_path / "[b]runs[/i]" / "one"
    brief = ["--order", "colour", *train_options, "--max-steps", "1", "--label", label]
    code, out, err = lilora("train", suite / "tasks.yaml", "--out", folder, *brief)
    assert code == 0, err
    assert f"{label}: task 1 of 1, colour, trained" in out
    assert f"{label}: score on each task" in out
    code, out, err = lilora("bank", "ls", folder)
    assert code == 0, err
    assert "[b]runs[/i]" in out
    code, out, err = lilora("bank", "export", folder, "--out", tmp_path / "[/b]")
    assert code == 0, err
    assert f"colour: {tmp_path / '[/b]' / 'colour'}" in out
    code, _, err = lilora("bank", "ls", tmp_path / "[/nothing]")
    assert (code, f"{tmp_path / '[/nothing]'} is not a bank" in one_sentence(err)) == (2, True)


@pytest.mark.parametrize("tested", [("count",), ()], ids=["one-tested", "none-tested"])
def test_tasks_without_a_test_split_are_trained_and_not_scored(
    tested, suite, tmp_path, lilora, train_options, reported
):
    manifest = yaml.safe_load((suite / "tasks.yaml").read_text()) | {"data": str(suite / "data")}
    for task in manifest["tasks"]:
        for key in () if task["name"] in tested else ("test", "scorer", "answer_format"):
            del task[key]
    path, run = tmp_path / "tasks.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(manifest))
    command = ["train", path, "--model", suite / "base", "--out", run, "--order", "colour,count", *train_options]
    code, out, err = lilora(*command, "--max-steps", 2)
    assert code == 0, err
    assert "task 1 of 2, colour, trained in" in out
    assert "not scored, it has no test split" in out
    untested = [name for name in ("colour", "count") if name not in tested]
    assert f"not scored, for want of a test split: {', '.join(untested)}" in out
    assert f"trained and not scored: {', '.join(untested)}." in (run / "report.html").read_text()
    assert (run / "losses.png").exists()
    bank = Bank.open(run / "bank")
    assert bank.tasks == ["colour", "count"]
    assert bank.scores["matrix"]["unscored"] == untested
    assert lilora(*command, "--max-steps", 2)[0] == 0, "the same command has nothing left to do"
    code, out, err = lilora("eval", run, "--tasks", path, "--device", "cpu", "--json")
    if tested:
        assert (code, list(json.loads(out))) == (0, ["count"])
    else:
        assert (code, "none of the tasks colour, count has a test split" in one_sentence(err)) == (2, True)


# --- interruption -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["lilora-paper", "lora"])
def test_killed_anywhere_the_same_command_ends_with_the_same_scores(method, suite, tmp_path, lilora, train_options):
    def command(folder):
        return ["train", str(suite / "tasks.yaml"), "--out", str(folder), *METHODS[method], *train_options]

    started = time.monotonic()
    assert code_of(spawn(command(tmp_path / "whole"))) == 0
    duration, whole = time.monotonic() - started, Bank.open(tmp_path / "whole")
    rng, kills, folder = random.Random(method), 0, tmp_path / "0"

    def end():
        code, _, err = lilora(*command(folder))
        assert code == 0, err
        resumed = Bank.open(folder)
        assert resumed.scores["matrix"] == whole.scores["matrix"]
        for task in whole.tasks:
            assert resumed.task_fingerprint(task) == whole.task_fingerprint(task)
            assert resumed.shared_fingerprint(task) == whole.shared_fingerprint(task)

    while kills < KILLS:
        if killed_after(rng.uniform(0.1, 0.9) * duration, command(folder)):
            kills += 1
        else:
            end()
            folder = tmp_path / str(kills)
    end()


def test_stopped_in_an_evaluation_the_same_command_goes_on(suite, tmp_path, lilora, train_options, monkeypatch):
    command = ["train", suite / "tasks.yaml", "--out", tmp_path / "run", *train_options]

    def stop(*_):
        raise SystemExit(9)

    with monkeypatch.context() as patch:
        patch.setattr("lilora.continual.run.ContinualRun._evaluate", stop)
        assert lilora(*command)[0] == 9
    assert Bank.open(tmp_path / "run" / "bank").tasks == ["colour"]
    code, _, err = lilora(*command)
    assert code == 0, err
    scores = Bank.open(tmp_path / "run" / "bank").scores
    assert scores["seconds"].keys() == {"colour", "count", "name"}
    assert scores["seconds"]["colour"] > 0


# --- bad input: one sentence, exit code 2, nothing written or lost ------------------------------------------------------


def one_sentence(err):
    lines = [line for line in err.splitlines() if line.startswith("lilora: ")]
    assert len(lines) == 1, err
    assert "Traceback" not in err
    return lines[0]


BAD_TRAIN = {
    "unknown method": (["--method", "magic"], "--method magic is unknown; choose one of lilora, lora, dirlora"),
    "unknown preset": (["--preset", "best"], "--preset best is unknown; choose one of paper, released, frozen"),
    "unknown dtype": (["--dtype", "int8"], "--dtype int8 is unknown"),
    "unknown device": (["--device", "tpu9"], "--device"),
    "no cuda here": (["--device", "cuda"], "--device cuda"),
    "unknown task in order": (["--order", "colour,shape"], "'shape' is unknown"),
    "repeated task in order": (["--order", "colour,colour"], "order"),
    "wrong alpha": (["--alpha", "-1"], "alpha is -1.0; it must be a positive number"),
    "alpha nan": (["--alpha", "nan"], "alpha is nan; it must be a positive number"),
    "alpha text": (["--set", "alpha=x"], "alpha is 'x'; it must be a number"),
    "r true": (["--set", "r=true"], "r is True; it must be an integer of at least 1"),
    "lora r true": (["--method", "lora", "--set", "r=true"], "lora: r is True; it is true or false where"),
    "lora alpha infinite": (
        ["--method", "lora", "--alpha", "inf"],
        "lora: lora_alpha is inf; it must be a finite",
    ),
    "pclr alpha infinite": (["--method", "pclr", "--alpha", "inf"], "pclr: alpha is inf; it must be a finite"),
    "sub_rank above r": (["--sub-rank", "1000"], "sub_rank is 1000 and r is 8"),
    "unknown setting": (["--set", "magic=1"], "lilora has no setting 'magic'"),
    "no epochs": (["--epochs", "0"], "train: epochs is 0.0; it must be greater than 0"),
    "no steps": (["--max-steps", "0"], "max_steps is 0; give at least 1"),
    "huge lr": (["--lr", "1e300"], "learning_rate is 1e+300; it must be less than or equal to 1"),
    "no lr": (["--lr", "0"], "learning_rate is 0.0; it must be greater than 0"),
    "infinite decay": (["--weight-decay", "inf"], "weight_decay is inf; it must be a finite number"),
    "infinite epochs": (["--epochs", "inf"], "epochs is inf; it must be a finite number"),
    "label of two lines": (["--label", "a\nb"], "label is 'a\\nb'; give one line"),
    "targets that match nothing": (
        ["--set", "target_modules=gate_proj"],
        "target_modules 'gate_proj' matches no layer of this model by its whole name; did you mean",
    ),
    "targets of another model": (["--set", 'target_modules=["fc9"]'], "target_modules ['fc9'] matches no layer"),
    "targets that are no expression": (["--set", "target_modules=((("], "target_modules is '(((', which is no regular"),
    "the same of a LoRA": (["--method", "lora", "--set", "target_modules=((("], "lora: target_modules is '(((';"),
    "deep targets": (["--set", f"target_modules={'(' * 9999}"], f"target_modules is '{'(' * 76}..., which is no"),
    "deep number": (["--method", "pclr", "--set", f"cap={'[' * 99999}"], f"pclr: cap is '{'[' * 76}...;"),
    "NUL in targets": (["--set", "target_modules=a\0b"], r"target_modules 'a\x00b' matches no layer"),
    "long folder": (["--out", "/tmp/" + "x" * 300], "x cannot be used (File name too long)"),
    "missing base": (["--model", "./no-such-folder"], "./no-such-folder"),
    "missing data": (["--data", "/no/such/data"], "--data"),
}


@pytest.mark.parametrize("name", BAD_TRAIN)
def test_bad_options_of_train(name, suite, tmp_path, lilora, train_options):
    options, words = BAD_TRAIN[name]
    if "cuda" in options and torch.cuda.is_available():
        options = ["--device", "cuda:99"]
    code, _, err = lilora("train", suite / "tasks.yaml", "--out", tmp_path / "run", *train_options, *options)
    assert code == 2
    assert words.split(";")[0] in one_sentence(err)
    assert not (tmp_path / "run").exists()


def test_an_image_that_the_processor_refuses_is_named_before_training(
    suite, tmp_path, lilora, train_options, monkeypatch
):
    """As several refuse a width of more than 200 heights."""
    data = shutil.copytree(suite / "data", tmp_path / "data")
    Image.new("RGB", (1206, 6)).save(data / "images" / "colour-train-7.png")
    resize = CLIPImageProcessorPil.resize

    def refusing(self, image, *args, **kwargs):
        if image.shape[-1] / image.shape[-2] > 200:
            raise ValueError(f"absolute aspect ratio must be smaller than 200, got {image.shape[-1] / image.shape[-2]}")
        return resize(self, image, *args, **kwargs)

    monkeypatch.setattr(CLIPImageProcessorPil, "resize", refusing)
    code, _, err = lilora("train", suite / "tasks.yaml", "--data", data, "--out", tmp_path / "run", *train_options)
    assert code == 2
    assert "sample '7' of task 'colour': LlavaProcessor refuses it (ValueError: absolute aspect" in one_sentence(err)
    assert not (tmp_path / "run").exists()


def test_a_chat_template_that_loses_samples_is_refused_before_anything_is_written(
    suite, tmp_path, lilora, train_options
):
    base = shutil.copytree(suite / "base", tmp_path / "base")
    text = "{% for m in messages %}{% for part in m['content'] %}{{ part['text'] }}{% endfor %}{% endfor %} :"
    (base / "chat_template.jinja").write_text(text)
    options = ["--out", tmp_path / "run", "--model", base, *train_options]
    code, _, err = lilora("train", suite / "tasks.yaml", *options)
    assert code == 2
    assert "sample '0': the chat template of LlavaProcessor has no place for its image" in one_sentence(err)
    assert not (tmp_path / "run").exists()


def test_a_backend_that_cannot_run_is_refused_before_anything_is_written(
    suite, tmp_path, lilora, train_options, monkeypatch
):
    monkeypatch.setitem(backends.forced, "backend", "cuda")
    code, _, err = lilora("train", suite / "tasks.yaml", "--out", tmp_path / "run", *train_options)
    assert code == 2
    assert "the backend 'cuda' cannot run on cpu" in one_sentence(err)
    assert not (tmp_path / "run").exists()


def test_a_file_as_run_folder_is_refused_and_untouched(suite, tmp_path, lilora, train_options):
    (tmp_path / "file").write_text("mine")
    code, _, err = lilora("train", suite / "tasks.yaml", "--out", tmp_path / "file", *train_options)
    assert code == 2
    assert "is a file" in one_sentence(err)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_folder_with_another_run_or_other_files_is_refused_and_untouched(
    suite, finished, tmp_path, lilora, train_options
):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    for change, words in (
        (["--preset", "paper"], "settings.stability"),
        (["--seed", "3"], "train.seed is 0 and this one's is 3"),
        (["--method", "lora"], "method is 'lilora' and this one's is 'lora'"),
        (["--order", "name,colour"], "which is no beginning of name, colour"),
    ):
        code, _, err = lilora("train", suite / "tasks.yaml", "--out", folder, *train_options, *change)
        assert code == 2
        assert words in one_sentence(err)
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.txt").write_text("mine")
    code, _, err = lilora("train", suite / "tasks.yaml", "--out", other, *train_options)
    assert code == 2
    assert "holds other files and no run" in one_sentence(err)
    assert [p.name for p in other.iterdir()] == ["thesis.txt"]


def test_another_base_model_a_damaged_or_newer_bank_and_an_unknown_task(suite, finished, tmp_path, lilora):
    ask = ["--prompt", "name it ?", "--device", "cpu"]
    code, _, err = lilora("generate", finished, "--task", "shape", *ask)
    assert (code, "--task shape is unknown" in one_sentence(err)) == (2, True)
    code, _, err = lilora("generate", tmp_path, "--task", "name", *ask)
    assert (code, "is not a bank" in one_sentence(err)) == (2, True)
    code, _, err = lilora("generate", finished, "--task", "name", "--model", "./nowhere", *ask)
    assert (code, "--model ./nowhere: there is no such folder" in one_sentence(err)) == (2, True)
    content = yaml.safe_load((suite / "tasks.yaml").read_text())
    content |= {"data": str(suite / content.get("data", ".")), "tasks": content["tasks"][:1]}
    (tmp_path / "few.yaml").write_text(yaml.safe_dump(content))
    code, _, err = lilora("eval", finished, "--tasks", tmp_path / "few.yaml", "--device", "cpu")
    assert (code, f"--tasks {tmp_path / 'few.yaml'} lacks " in one_sentence(err)) == (2, True)
    changed = tmp_path / "base"
    shutil.copytree(suite / "base", changed)
    weights = changed / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-40:] = os.urandom(40)
    weights.write_bytes(content)
    code, _, err = lilora("generate", finished, "--task", "name", "--model", changed, *ask)
    assert (code, "other weights" in one_sentence(err)) == (2, True)
    folder = tmp_path / "run"
    for file, damage, words in (
        ("bank/tasks/name.safetensors", lambda b: b[:-100], "name.safetensors"),
        ("bank/tasks/name.safetensors", lambda b: b[:-1] + bytes([b[-1] ^ 1]), "altered"),
        ("bank/bank.json", lambda b: b[: len(b) // 2], "bank.json"),
        ("bank/bank.json", lambda b: b.replace(b'"format": 1', b'"format": 9'), "upgrade"),
    ):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(finished, folder)
        (folder / file).write_bytes(damage((folder / file).read_bytes()))
        code, _, err = lilora("generate", folder, "--task", "name", *ask)
        assert (code, words in one_sentence(err)) == (2, True)


def test_bad_manifests(suite, tmp_path, lilora, train_options):
    good = yaml.safe_load((suite / "tasks.yaml").read_text()) | {
        "data": str(suite / "data"),
        "model": str(suite / "base"),
    }

    def changed(**changes):
        manifest = json.loads(json.dumps(good))
        manifest["tasks"][0].update(changes)
        return manifest

    misspelt = changed()
    misspelt["tasks"][0]["scorrer"] = "exact"
    empty = tmp_path / "empty.json"
    empty.write_text("[]")
    broken_image = tmp_path / "images"
    shutil.copytree(suite / "data" / "images", broken_image)
    first = sorted(broken_image.glob("colour-train-*"))[0]
    first.write_bytes(first.read_bytes()[:40])
    for manifest, words in (
        (misspelt, "did you mean 'scorer'"),
        (changed(name="count"), "two tasks are called 'count'"),
        (changed(name="lora_A"), "'lora_A'"),
        (changed(name="keys"), "'keys'"),
        (changed(name="a.b"), "'a.b'"),
        (changed(scorer="best"), "'best' is unknown"),
        (changed(train="nothing.json"), "nothing.json"),
        (changed(train=str(empty)), "has no samples"),
        (changed(images=str(tmp_path / "nowhere")), "is missing"),
        (changed(images=str(broken_image)), "cannot be opened"),
    ):
        path = tmp_path / "tasks.yaml"
        path.write_text(yaml.safe_dump(manifest))
        code, _, err = lilora("train", path, "--out", tmp_path / "run", *train_options)
        assert code == 2
        assert words in one_sentence(err)
        assert not (tmp_path / "run").exists()
