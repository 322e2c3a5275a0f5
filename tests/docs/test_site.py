"""What the website is made of, without building it: `make docs` does, and fails on a broken link or name."""

import importlib
import re
from pathlib import Path
from types import SimpleNamespace

import pytest

import lilora
import lilora_kernels
from tools import docs_site

ROOT = Path(__file__).parents[2]


def documented(page):
    """The objects that a page of the API reference shows."""
    for path in re.findall(r"^::: ([\w.]+)$", (ROOT / "docs" / "api" / page).read_text(), re.MULTILINE):
        module, _, name = path.rpartition(".")
        try:
            yield getattr(importlib.import_module(module), name)
        except AttributeError:
            yield importlib.import_module(path)


def test_the_api_reference_shows_every_public_name():
    shown = {page: list(documented(page)) for page in ("lilora_kernels.md", "lilora.md")}
    public = {name: getattr(lilora_kernels, name) for name in lilora_kernels.__all__ if name != "__version__"}
    assert [name for name, thing in public.items() if thing not in shown["lilora_kernels.md"]] == []
    own = set(lilora.__all__) - set(lilora_kernels.__all__) - {"PRESETS"}
    assert [name for name in own if getattr(lilora, name) not in shown["lilora.md"]] == []


def test_every_environment_variable_is_on_its_page():
    told = set(re.findall(r"`(LILORA_\w+)`", (ROOT / "docs" / "environment.md").read_text()))
    files = [path for folder in ("lilora_kernels", "python", "tools") for path in (ROOT / folder).rglob("*.py")]
    files += [ROOT / "setup.py", ROOT / "Makefile", ROOT / "bench" / "external.py"]
    read = set().union(*(re.findall(r"\"(LILORA_[A-Z_]+)\"|\b(LILORA_\w+)=", path.read_text()) for path in files))
    read = {name for pair in read for name in pair if name}
    assert read - told - {"LILORA_HOPPER"} == set()  # a macro of the C++ sources


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("a.html", '<script src="https://elsewhere.example/x.js"></script>'),
        ("a.html", '<link rel="stylesheet" href="//fonts.example/css">'),
        ("a.html", '<img src="http://elsewhere.example/x.png">'),
        ("a.css", '@import url("https://fonts.example/css");'),
    ],
)
def test_what_a_page_would_load_from_elsewhere_is_found(tmp_path, file, text):
    (tmp_path / "b.html").write_text(
        '<a href="https://elsewhere.example">x</a><script src="x.js"></script><img src="y.png">'
    )
    (tmp_path / "c.css").write_text("body { background: url(data:image/png;base64,AA) }")
    assert docs_site.foreign(tmp_path) == []
    (tmp_path / file).write_text(text)
    (found,) = docs_site.foreign(tmp_path)
    assert found.startswith(f"{file}: ")


@pytest.mark.parametrize(
    ("page", "link", "wanted"),
    [
        ("docs/families.md", "../examples/cvit.yaml", "repo/examples/cvit.yaml"),
        ("docs/guides/gpu.md", "../results.md#on-an-nvidia-gpu", "../results.md#on-an-nvidia-gpu"),
        ("CONTRIBUTING.md", "docs/glossary.md", "../glossary.md"),
        ("lilora_kernels/ops/README.md", "RESOURCES.md", "RESOURCES.md"),
        ("docs/families.md", "no_such_file.md", "no_such_file.md"),
        ("docs/families.md", "https://elsewhere.example/a", "https://elsewhere.example/a"),
    ],
)
def test_links_lead_to_where_the_files_are_in_the_site(page, link, wanted):
    path = ROOT / page
    file = SimpleNamespace(abs_src_path=str(path), src_uri=docs_site.uri_of(path))
    assert docs_site.on_page_markdown(f"[x]({link})", SimpleNamespace(file=file), None, None) == f"[x]({wanted})"
