"""What gets installed, and what importing it costs."""

import ast
import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]


def python(*arguments, cwd=None):
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=cwd, check=False)


@pytest.mark.parametrize("flags", [[], ["-O"]])
def test_importing_the_kernels_imports_torch_only(flags, tmp_path):
    heavy = ("transformers", "peft", "triton", "accelerate", "matplotlib")
    code = f"import sys, lilora_kernels; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, *flags, "-c", code], capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert result.stdout.strip() == "[]", result.stderr


@pytest.mark.parametrize("argv", ["lilora", "/usr/bin/lilora", "script.py"])
def test_without_the_packages_of_the_extra_the_command_is_one_sentence(argv):
    command = [argv, "params"]
    code = f"import sys; sys.modules['peft'] = None; sys.argv = {command}; from lilora.__main__ import main; main()"
    result = python("-c", code)
    sentence = 'lilora needs peft, which is not installed; run pip install ".[hf]" in a checkout of lilora-kernels\n'
    if argv == "script.py":
        assert result.stderr.endswith(f"\nImportError: {sentence}")
    else:
        assert (result.returncode, result.stdout, result.stderr) == (2, "", f"lilora: {sentence}")


def test_help_banks_and_data_wait_for_no_package_but_torch():
    """PEFT and transformers take seconds."""
    heavy = ("transformers", "peft", "accelerate", "matplotlib")
    modules = "lilora.cli, lilora.bank.hub, lilora.continual.manifest, lilora.continual.data_check"
    code = f"import sys; sys.argv = ['lilora']; import {modules}; print([m for m in {heavy} if m in sys.modules])"
    result = python("-c", f"{code}; import lilora; print(lilora.LiLoRAConfig.__name__, lilora.hotswap.__name__)")
    assert result.stdout.splitlines() == ["[]", "LiLoRAConfig hotswap"], result.stderr


@pytest.mark.parametrize("arguments", [["-m", "mine", "-m", "lilora"], ["mine/__main__.py", "-m", "lilora"]])
def test_a_program_that_imports_it_has_peft_taught_whatever_its_options(arguments, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "__init__.py").write_text("import lilora")
    code = "import lilora, peft; print('LILORA' in peft.PeftType.__members__)"
    (tmp_path / "mine" / "__main__.py").write_text(code)
    result = python(*arguments, cwd=tmp_path)
    assert result.stdout == "True\n", result.stderr


@pytest.mark.parametrize("arguments", [["-mlilora"], ["-um", "lilora"]])
def test_the_command_is_known_however_it_is_run(arguments, tmp_path):
    (tmp_path / "peft.py").write_text("raise ModuleNotFoundError(name='peft')")
    result = python(*arguments, "params", cwd=tmp_path)
    assert (result.returncode, result.stderr.partition(",")[0]) == (2, "lilora: lilora needs peft"), result.stderr


def test_what_a_machine_can_use_is_told_with_torch_alone():
    missing = "import sys; sys.modules.update(dict.fromkeys(('peft', 'transformers', 'typer', 'rich')));"
    command = python("-c", f"{missing} sys.argv = ['lilora', 'info']; from lilora.__main__ import main; main()")
    assert (command.returncode, "python -m lilora_kernels" in command.stderr) == (2, True)
    run = "from runpy import run_module; run_module('lilora_kernels', run_name='__main__')"
    shown = python("-c", f"{missing} sys.argv[1:] = []; {run}")
    assert re.search(r"^linear: eager +available$", shown.stdout, re.MULTILINE), shown.stderr
    told = json.loads(python("-c", f"{missing} sys.argv[1:] = ['--json']; {run}").stdout)
    assert told["backends"]["linear"]["eager"] == "available"


def test_a_package_that_only_the_command_needs_is_one_sentence_too(monkeypatch, capsys):
    from lilora.__main__ import main

    monkeypatch.setitem(sys.modules, "typer", None)
    for name in [name for name in sys.modules if name == "lilora.cli" or name.startswith("lilora.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    with pytest.raises(SystemExit, match="2"):
        main()
    assert capsys.readouterr().err.startswith("lilora: lilora needs typer, which is not installed; run pip install")


def test_no_hint_names_an_entry_of_an_index_that_does_not_exist():
    names = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    for name in names:
        if name.endswith((".py", ".md", ".html", ".toml", ".yaml")):
            text = (ROOT / name).read_text()
            assert not re.search(r"(pip install|uv add) (-\S+ )*['\"]?lilora-kernels\b", text), name


def test_the_digits_suite_says_what_it_needs():
    code = "import sys; sys.modules['sklearn'] = None; import scenes"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT / "examples/digits", check=False
    )
    assert result.stderr == "the digits suite draws on scikit-learn's images; run pip install scikit-learn\n"


def imported(path):
    """Modules that a file imports anywhere, absolute."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module


def test_kernels_never_depend_on_the_learners_side():
    for path in (ROOT / "lilora_kernels").rglob("*.py"):
        for module in imported(path):
            assert module.split(".")[0] not in ("lilora", "transformers", "peft", "accelerate"), path


def test_the_wheel_holds_code_and_data_of_both_packages_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.setenv("LILORA_CPU", "0")
    # Built from a copy: setuptools leaves its build folder beside the sources.
    files = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT, check=True).stdout.split()
    source = tmp_path / "source"
    for name in files:
        if name.startswith(("lilora_kernels/", "python/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    result = python("-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(tmp_path), str(source))
    assert result.returncode == 0, result.stderr
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    want = {n for n in files if n.startswith("lilora_kernels/") and n.endswith((".py", ".json", ".typed"))}
    want |= {
        n.removeprefix("python/")
        for n in files
        if n.startswith("python/") and Path(n).suffix in (".py", ".html", ".json", ".typed")
    }
    record = "lilora_kernels/ops/RESOURCES.json"  # of tools/, for the tests
    assert want - {record} <= names
    assert record not in names
    assert {name.split("/")[0] for name in names} <= {
        "lilora",
        "lilora_kernels",
        wheel.name.rsplit("-", 3)[0] + ".dist-info",
    }


def test_the_citation_has_the_version_of_the_package():
    from lilora_kernels import __version__

    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert str(citation["version"]) == __version__
    assert citation["license"] == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["license"]
