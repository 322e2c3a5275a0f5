"""The code blocks of README, CONTRIBUTING and docs/, and what a test needs to run them as a reader would.

A page's Python blocks share one namespace. Where a page needs what a reader has already, or a block cannot run here, an HTML
comment above the block says so: `<!-- given: model, x -->` or `<!-- not run: needs a GPU -->`.
"""

import importlib.util
import json
import re
import shlex
import tomllib
from dataclasses import dataclass
from pathlib import Path

import yaml

ROOT = Path(__file__).parents[2]
PAGES = [
    *("README.md", "CONTRIBUTING.md", "lilora_kernels/ops/README.md", "python/lilora/methods/README.md"),
    *sorted(path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").rglob("*.md")),
]
LANGUAGES = ("python", "bash", "yaml", "json", "toml", "text")

# What a page says, and what stands in for it here. {base} is a tiny LLaVA, {data} the folder of its tasks.
STANDS_IN = {
    '"llava-hf/llava-1.5-7b-hf", dtype="bfloat16", device_map="cuda"': '"{base}"',
    "llava-hf/llava-1.5-7b-hf": "{base}",
    "openai/clip-vit-base-patch16": "{base}",
    "/your/data": "{data}",
    "torch.compile(model, fullgraph=True)": "torch.compile(model, fullgraph=True, backend=graphs)",
}
FENCE = re.compile(
    r"^(?P<comments>(?:<!--[^\n]*-->\n)*)```(?P<language>\w*)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)


@dataclass(frozen=True)
class Block:
    """A fenced block; `given` and `not_run` are what its comment says."""

    page: str
    line: int
    language: str
    code: str
    given: tuple[str, ...] = ()
    not_run: str | None = None

    @property
    def where(self) -> str:
        return f"{self.page}:{self.line}"

    def code_here(self, **places: Path) -> str:
        """The code with what stands in for models and data."""
        code = self.code
        for said, here in STANDS_IN.items():
            code = code.replace(said, here.format(**places))
        return code


def blocks(page: str) -> list[Block]:
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        given = re.search(r"<!-- given: (.+?) -->", match["comments"])
        not_run = re.search(r"<!-- not run: (.+?) -->", match["comments"])
        found.append(
            Block(
                page,
                text.count("\n", 0, match.start("code")),
                match["language"],
                match["code"],
                tuple(given[1].split(", ")) if given else (),
                not_run[1] if not_run else None,
            )
        )
    assert text.count("\n```") == 2 * len(found), f"{page}: a fence is indented, not closed or of no language"
    return found


def commands(code: str) -> list[list[str]]:
    """The words of every command of a block of shell."""
    lines = code.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def without_variables(words: list[str]) -> tuple[list[str], list[str]]:
    """(a command without the environment variables in front of it, their names)"""
    names = []
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        names.append(words[0].partition("=")[0])
        words = words[1:]
    return words, names


def wrong_command(words: list[str]) -> str | None:
    """What is wrong with a command that is not `lilora`, or None; by the files of the repository."""
    program, *arguments = words
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        targets = re.findall(r"^([\w%-]+):", makefile, re.MULTILINE)
        for argument in arguments:
            name, equals, _ = argument.partition("=")
            if (equals and f"({name})" not in makefile and f"({name}," not in makefile) or (
                not equals and name not in targets
            ):
                return f"Makefile has no {argument}"
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        for extra in re.findall(r"\.\[([\w,]+)\]", " ".join(arguments)):
            if missing := set(extra.split(",")) - extras.keys():
                return f"pyproject.toml has no extra {missing}"
    elif program == "pytest":
        options = (ROOT / "bench" / "conftest.py").read_text()
        for argument in arguments:
            known = f'"{argument}"' in options if argument.startswith("--") else (ROOT / argument).exists()
            if not known:
                return f"pytest knows no {argument}"
    elif program == "python" and arguments[0] == "-m":
        if importlib.util.find_spec(arguments[1]) is None:
            return f"there is no module {arguments[1]}"
    elif program == "python":
        if not (ROOT / arguments[0]).is_file():
            return f"there is no {arguments[0]}"
    elif program == "accelerate":
        if not (ROOT / arguments[arguments.index("--config_file") + 1]).is_file():
            return "its config file does not exist"
    else:
        return f"nothing checks {program}"
    return None


def lilora_arguments(words: list[str]) -> list[str] | None:
    """The arguments of the `lilora` command in a command, or None; under accelerate too."""
    if words[0] == "lilora":
        return words[1:]
    if words[0] == "accelerate":
        return words[words.index("lilora") + 1 :]
    return None


def documents(block: Block) -> list:
    """What a block of data holds; raises for one that cannot be read."""
    if block.language == "json":
        return [json.loads(block.code)]
    if block.language == "toml":
        return [tomllib.loads(block.code)]
    return [yaml.safe_load(block.code)]
