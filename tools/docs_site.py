"""The documentation website: MkDocs hooks, and a check of what was built.

Pages link to files of the repository outside docs/ as a reader of the repository would, such as ../examples/cvit.yaml. The
hooks bring these files into the site, under repo/ and their own path, Markdown as pages. `python -m tools.docs_site FOLDER`
fails if a built page would load a script, style, font or image from elsewhere.
"""

import os
import posixpath
import re
import sys
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = ("CHANGELOG.md", "CONTRIBUTING.md", "lilora_kernels/ops/README.md", "python/lilora/methods/README.md")
LINK = re.compile(r"(\]\()([^)\s#:]+)((?:#[^)\s]*)?\))")


def uri_of(path: Path) -> str | None:
    """Where a file of the repository is in the site; None for a file that does not exist or lies outside."""
    if not path.is_file() or not path.is_relative_to(ROOT):
        return None
    return (
        path.relative_to(DOCS).as_posix() if path.is_relative_to(DOCS) else f"repo/{path.relative_to(ROOT).as_posix()}"
    )


def links(page: Path) -> Iterator[Path]:
    """The files that a page of Markdown links to or shows."""
    for found in LINK.finditer(page.read_text(encoding="utf-8")):
        yield Path(os.path.normpath(page.parent / found[2]))


def on_files(files, config):
    """Add what pages link to outside docs/, and what these pages link to in turn."""
    from mkdocs.structure.files import File

    queue = [*(Path(file.abs_src_path) for file in files.documentation_pages()), *(ROOT / page for page in PAGES)]
    seen = set()
    while queue:
        path = queue.pop()
        uri = uri_of(path)
        if uri is None or path in seen:
            continue
        seen.add(path)
        if files.get_file_from_path(uri) is None:
            files.append(File.generated(config, uri, abs_src_path=str(path)))
        if path.suffix == ".md":
            queue += links(path)
    return files


def on_page_markdown(markdown, page, config, files):
    """Let the links of a page lead to where their files are in the site."""
    source = Path(page.file.abs_src_path)

    def rewritten(found: re.Match) -> str:
        uri = uri_of(Path(os.path.normpath(source.parent / found[2])))
        if uri is None:
            return found[0]  # for MkDocs to report
        return f"{found[1]}{posixpath.relpath(uri, posixpath.dirname(page.file.src_uri) or '.')}{found[3]}"

    return LINK.sub(rewritten, markdown)


class Loaded(HTMLParser):
    """The addresses that a browser loads by itself on opening a page."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "link" and given.get("rel") in ("canonical", "next", "prev"):
            return
        if tag in ("script", "img", "link", "iframe", "source", "video"):
            self.addresses += [given[name] for name in ("src", "href") if given.get(name)]


def foreign(site: Path) -> list[str]:
    """What pages and styles of a built site would load from elsewhere: `page: address`."""
    found = []
    for path in sorted(site.rglob("*.html")):
        page = Loaded()
        page.feed(path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(site)}: {a}" for a in page.addresses if re.match(r"(https?:)?//", a)]
    for path in sorted(site.rglob("*.css")):
        addresses = re.findall(r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')]+)", path.read_text(encoding="utf-8"))
        found += [f"{path.relative_to(site)}: {address}" for address in addresses]
    return found


def main() -> None:
    site = Path(sys.argv[1])
    pages = len(list(site.rglob("*.html")))
    if not pages:
        raise SystemExit(f"{site} has no pages; build the site first: make docs")
    found = foreign(site)
    if found:
        raise SystemExit(f"{len(found)} addresses would be loaded from elsewhere:\n" + "\n".join(found))
    print(f"{pages} pages in {site}, nothing loaded from elsewhere")


if __name__ == "__main__":
    main()
