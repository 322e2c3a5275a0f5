"""Every code block of README and docs/ is run or checked, as a reader would use it; `support.pages` says how.

The model is a tiny LLaVA, and `runs/cvit` a run over two tiny tasks that have the names of the pages' tasks.
"""

import json
import re
import shutil
import sys
from types import SimpleNamespace

import pytest
import torch
import typer
import yaml
from PIL import Image
from support.pages import (
    LANGUAGES,
    PAGES,
    ROOT,
    blocks,
    commands,
    documents,
    lilora_arguments,
    without_variables,
    wrong_command,
)
from support.suite import TASKS, TRAIN_OPTIONS, make_suite
from torch import nn
from torch._dynamo.testing import CompileCounter
from transformers import AutoModelForImageTextToText, AutoProcessor

import lilora as package
from lilora.continual.manifest import MANIFESTS
from lilora.continual.records import InstructionRecord
from lilora.continual.scorers import scorer
from lilora.methods import METHODS
from lilora.reports import report
from lilora_kernels import LiLoRALinear, attach

TASK_OF = {"ScienceQA": "colour", "TextVQA": "count"}  # what the pages' tasks are in the suite
RUN = (
    "--help",
    "--version",
    "info",
    "params",
    "bank ls",
    "bank export",
    "data check examples/cvit",
    "generate",
    "eval",
)  # commands that take a second or less


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """What a reader has: a trained run, a manifest, an image, requests. Every page works on a copy."""
    place = tmp_path_factory.mktemp("reader")
    make_suite(place / "suite")
    suite = yaml.safe_load((place / "suite" / "tasks.yaml").read_text())
    tasks = {task["name"]: task for task in suite["tasks"]}
    suite |= {
        "tasks": [tasks[TASK_OF[name]] | {"name": name} for name in TASK_OF],
        "model": str(place / "suite" / "base"),
        "data": str(place / "suite" / "data"),
    }
    work = place / "work"
    (work / "examples").mkdir(parents=True)
    (work / "examples" / "cvit.yaml").write_text(yaml.safe_dump(suite))
    shutil.copy(place / "suite" / "data" / "images" / "count-test-0.png", work / "cat.png")
    question = {"task": "TextVQA", "image": "cat.png", "prompt": "how many are there ?"}
    (work / "requests.jsonl").write_text(f"{json.dumps(question)}\n" * 3)
    (work / "run.yaml").write_text("seed: 1\n")
    train = ["train", str(work / "examples" / "cvit.yaml"), "--out", str(work / "runs" / "cvit"), *TRAIN_OPTIONS]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "write_report", lambda *_: "none")
        patch.setattr(sys, "argv", ["lilora", *train])
        from lilora import cli

        with pytest.raises(SystemExit) as end:
            cli.main()
        assert not end.value.code
    return SimpleNamespace(work=work, base=place / "suite" / "base", data=place / "suite" / "data")


@pytest.fixture
def here(folder, tmp_path, monkeypatch):
    """The folder of one page, in which it runs."""
    shutil.copytree(folder.work, tmp_path / "work")
    monkeypatch.chdir(tmp_path / "work")
    return tmp_path / "work"


def inputs(folder):
    """Three samples, of the pages' tasks TextVQA and ScienceQA and of none."""
    processor = AutoProcessor.from_pretrained(folder.base)
    questions = [f"<image> {TASKS[task][0]}" for task in (TASK_OF["TextVQA"], TASK_OF["ScienceQA"], "name")]
    image = torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy()
    return processor(text=questions, images=[[image]] * 3, return_tensors="pt", padding=True)


def llava(folder):
    """A LLaVA with the tasks scienceqa and textvqa."""
    from peft import get_peft_model

    config = package.LiLoRAConfig.preset("frozen", r=8)
    base = AutoModelForImageTextToText.from_pretrained(folder.base)
    model = get_peft_model(base, config, adapter_name="scienceqa")
    model.add_adapter("textvqa", config)
    return model.eval()


def layers(folder):
    """A model of one adapted layer with two tasks."""
    model = nn.Sequential(LiLoRALinear(nn.Linear(64, 10), r=8))
    for task in ("a", "b"):
        model[0].add_task(task)
    attach(model)
    return model.eval()


def images(folder):
    return [Image.fromarray(torch.randint(0, 256, (16, 16, 3), dtype=torch.uint8).numpy()) for _ in range(3)]


GIVEN = {"inputs": inputs, "images": images, "llava": llava, "model": layers, "x": lambda folder: torch.randn(3, 64)}


def read(page, folder):
    """Run a page's Python; its namespace afterwards."""
    names = {"__name__": "page", "graphs": CompileCounter()}
    for block in blocks(page):
        if block.language != "python" or block.not_run:
            continue
        names |= {name: GIVEN[name](folder) for name in block.given}
        code = "\n" * block.line + block.code_here(base=folder.base, data=folder.data)
        exec(compile(code, str(ROOT / page), "exec"), names)
    return names


def with_python(page):
    return any(block.language == "python" for block in blocks(page))


def check_readme(names):
    model, inputs = names["model"], names["inputs"]
    assert list(model.peft_config) == ["scienceqa", "textvqa"]
    package.unfreeze(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lilora_" in name:
                parameter.normal_(std=0.5)
    together = model(**inputs, task_ids=["textvqa", "scienceqa", None]).logits
    model.set_adapter("scienceqa")
    torch.testing.assert_close(together[1], model(**inputs).logits[1], rtol=1e-4, atol=1e-4)
    assert (together[0] - together[1]).abs().max() > 1e-2
    check_layers(names["net"])


def check_layers(net):
    """Both tasks were trained, each changes the output, and the base stayed frozen."""
    head, x = net[2], torch.randn(1, 64)
    assert not any(p.requires_grad for p in head.base_layer.parameters())
    assert all(head.lilora_U[task].abs().max() > 0 for task in ("a", "b"))
    a, b, none = (net(x, task_ids=[task]) for task in ("a", "b", None))
    assert min((a - none).abs().max(), (b - none).abs().max(), (a - b).abs().max()) > 1e-5


def check_kernels(names):
    check_layers(names["model"])
    assert names["y"].isfinite().all()
    assert names["a"].grad.abs().max() > 0


def check_serving(names):
    assert len(names["model"].peft_config) == 50
    assert names["names"][:2] == ["TextVQA", "ScienceQA"]


def check_compile(names):
    assert names["graphs"].frame_count == 1
    plain = names["llava"].generate(**names["inputs"], task_ids=["textvqa", "scienceqa", None])
    assert torch.equal(names["answers"], plain)


def check_method(names):
    assert METHODS["decayed"] is names["Decayed"]


CHECKS = {
    "README.md": check_readme,
    "docs/quickstart/kernels.md": check_kernels,
    "docs/quickstart/serving.md": check_serving,
    "docs/guides/compile.md": check_compile,
    "docs/extending/method.md": check_method,
}


@pytest.mark.parametrize("page", [page for page in PAGES if with_python(page)])
def test_the_python_of_a_page_runs(page, folder, here, monkeypatch):
    if page == "docs/extending/method.md":  # what it registers goes with it
        monkeypatch.setattr(METHODS, "_parts", {**METHODS})
    names = read(page, folder)
    CHECKS.get(page, lambda names: None)(names)


def wrong_arguments(arguments):
    """What is wrong with the arguments of `lilora`, or None: they are parsed, and nothing runs."""
    from lilora.cli import app

    command, context = typer.main.get_command(app), None
    if arguments == ["--install-completion"]:  # parsing it would install it
        return (
            None
            if arguments[0] in {option for parameter in command.params for option in parameter.opts}
            else "is unknown"
        )
    try:
        while True:
            context = command.make_context(command.name, list(arguments), parent=context)
            if not hasattr(command, "resolve_command"):
                return None
            _, command, arguments = command.resolve_command(context, [*context._protected_args, *context.args])
    except Exception as end:  # of typer's own copy of click
        if not hasattr(end, "exit_code"):
            raise
        return end.format_message() if end.exit_code else None


def in_shell(page):
    return [block for block in blocks(page) if block.language == "bash" and not block.not_run]


@pytest.mark.parametrize("page", [page for page in PAGES if in_shell(page)])
def test_the_shell_commands_of_a_page_exist_and_the_cheap_ones_run(page, folder, here, lilora):
    variables = (ROOT / "docs" / "environment.md").read_text()
    for block in in_shell(page):
        for words in commands(block.code_here(base=folder.base, data=folder.data)):
            words, names = without_variables(words)
            ours = [name for name in names if name.startswith(("LILORA_", "TORCH_"))]
            assert all(f"`{name}`" in variables for name in ours), (
                f"{block.where}: docs/environment.md lacks one of {ours}"
            )
            missing = [word for word in words if word.startswith("examples/") and not (ROOT / word).exists()]
            assert not missing, f"{block.where}: there is no {missing}"
            arguments = lilora_arguments(words)
            if words[0] != "lilora":
                assert (wrong := wrong_command(words)) is None, f"{block.where}: {' '.join(words)}: {wrong}"
            if arguments is None:
                continue
            wrong = wrong_arguments(arguments)
            assert wrong is None, f"{block.where}: lilora {' '.join(arguments)}: {wrong}"
            if words[0] == "lilora" and " ".join(arguments).startswith(RUN) and "llava-1.5-7b" not in arguments:
                code, _, err = lilora(*arguments)
                assert code == 0, f"{block.where}: lilora {' '.join(arguments)}: {err}"


def records(document):
    """The records in a document, if it holds some."""
    found = document if isinstance(document, list) else [document]
    return [r for r in found if isinstance(r, dict) and {"conversations", "messages", "text"} & r.keys()]


@pytest.mark.parametrize("page", PAGES)
def test_the_data_of_a_page_is_what_the_commands_read(page):
    options = train_options()
    for block in blocks(page):
        assert block.language in LANGUAGES, f"{block.where}: a block of {block.language!r}, which nothing checks"
        if block.language not in ("yaml", "json", "toml") or block.not_run:
            continue
        for document in documents(block):
            for record in records(document):
                InstructionRecord.model_validate(record)
            if block.language == "json" and not records(document):
                assert document.keys() <= {"id", "task", "image", "prompt"}, block.where
            if block.language == "yaml" and isinstance(document.get("tasks"), list):
                manifest = MANIFESTS[document.get("kind", "instruction")].model_validate(document)
                for name in {task.scorer for task in manifest.tasks if getattr(task, "scorer", None)}:
                    judged_by(name, page)
            elif block.language == "yaml" and "scorer" in document:
                judged_by(document["scorer"], page)
            elif block.language == "yaml":
                assert document.keys() <= options, f"{block.where}: lilora train has no {document.keys() - options}"


def judged_by(name, page):
    """A scorer of the package, or a function that the page writes."""
    _, colon, function = name.partition(":")
    if colon:
        assert f"def {function}(" in "".join(block.code for block in blocks(page) if block.language == "python")
    else:
        scorer(name)


def train_options():
    """Names of the options of `lilora train`, as they stand in a file."""
    from lilora.cli import app

    command = typer.main.get_command(app).commands["train"]
    return {option.removeprefix("--") for parameter in command.params for option in parameter.opts}


def test_blocks_that_are_not_run_say_why(capsys):
    found = [block for page in PAGES for block in blocks(page)]
    left = [block for block in found if block.not_run]
    with capsys.disabled():
        print(f"\n{len(found)} code blocks, {len(left)} of them not run:")
        for block in left:
            print(f"  {block.where}: {block.not_run}")
    assert len(left) <= 3, "run it, or say here why one more cannot be run"


@pytest.mark.parametrize("page", [*PAGES, "SECURITY.md", "CHANGELOG.md"])
def test_the_links_of_a_page_lead_somewhere(page):
    text = re.sub(r"```.*?```", "", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        if re.match(r"https?:", target):
            continue
        file = ((ROOT / page).parent / path).resolve() if path else ROOT / page
        assert file.exists(), f"{page}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}
            assert anchor in slugs, f"{page}: {target}"
