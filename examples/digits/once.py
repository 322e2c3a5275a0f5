"""Folders that a program of examples/ writes once."""

import json
import tempfile
from collections.abc import Callable
from pathlib import Path

STAMP = "built.json"


def built_once(folder: Path, settings: dict, build: Callable[[Path], None]) -> None:
    """Have `build` fill `folder`, unless it already did with these settings; all or nothing."""
    stamp = folder / STAMP
    if stamp.exists() and json.loads(stamp.read_text()) == settings:
        print(f"{folder} is up to date")
        return
    if folder.exists() and not stamp.exists():
        raise FileExistsError(f"{folder} was not written by this program; move it away or choose another --out")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as scratch:
        new = Path(scratch) / "new"
        new.mkdir()
        build(new)
        (new / STAMP).write_text(json.dumps(settings))
        if folder.exists():
            folder.rename(Path(scratch) / "old")
        new.rename(folder)
    print(f"{folder} written")
