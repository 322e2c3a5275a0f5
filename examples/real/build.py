"""Write a suite of a real language model, SmolLM2-135M-Instruct: DIR/data (its tasks, JSON lists and pictures) and DIR/base.

    python examples/real/build.py [--suite text] [--out runs/real-text] [--seed 0]

Suite `text` has the tasks of text.yaml; its base is the model in fp32 (0.5 GB), half a minute. Suite `visual` has those of
visual.yaml; its base is a LLaVA of the model, a vision tower and a projector that are trained here, tens of minutes on one CPU
core. Its pictures come from Debian packages (197 MB), which are downloaded and unpacked to DIR/packages; without apt-get the
tasks that need none are written. A second call with the same settings finds everything in place and does nothing.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import language
import numpy as np
from tasks import TASKS

sys.path.append(str(Path(__file__).parents[1] / "digits"))
from once import built_once

HERE = Path(__file__).parent
SIZES = {"train": 480, "test": 100}
Builders = dict[str, tuple[dict[str, Any], Callable[[Path], None]]]  # folder -> its settings, and what fills it


def write_data(folder: Path, seed: int, sizes: dict[str, int] = SIZES) -> None:
    for number, (name, make) in enumerate(TASKS.items()):
        for part, (split, size) in enumerate(sizes.items()):
            rng = np.random.default_rng([seed, number, part])
            records = []
            for i in range(size):
                question, answer = make(rng, split == "train")
                turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
                records.append({"id": f"{name}-{split}-{i}", "conversations": turns})
            (folder / name).mkdir(exist_ok=True)
            (folder / name / f"{split}.json").write_text(json.dumps(records, indent=1))


def write_base(folder: Path) -> None:
    """The model as transformers' own folder."""
    for part in language.language_model():
        part.save_pretrained(folder)


def sources(*names: str) -> str:
    return hashlib.sha256(b"".join((HERE / name).read_bytes() for name in names)).hexdigest()


def text(out: Path, seed: int) -> Builders:
    return {
        "data": ({"seed": seed, "sources": sources("tasks.py", "build.py")}, lambda folder: write_data(folder, seed)),
        "base": ({"file": language.FILE, "template": language.CHAT_TEMPLATE}, write_base),
    }


def visual(out: Path, seed: int) -> Builders:
    import visual
    from pictures import PACKAGES, fetch

    try:
        built_once(out / "packages", {"packages": PACKAGES}, fetch)
        packages = out / "packages"
    except FileNotFoundError as error:
        packages = None
        names = ",".join([*visual.visual_tasks(None), *visual.TEXT])
        print(f"{error}, so the tasks on clothes, flags and stamps are left out; train the others with --order {names}")
    of_data = ("pictures.py", "tasks.py", "visual.py")
    settings = {"seed": seed, "packages": packages is not None}

    def base(folder: Path) -> None:
        from projector import build_base

        build_base(folder, out / "tower", packages, seed)

    def tower(folder: Path) -> None:
        from tower import build_tower

        build_tower(folder, packages, seed)

    return {
        "data": (
            settings | {"sources": sources(*of_data)},
            lambda folder: visual.write_data(folder, packages, seed),
        ),
        "tower": (settings | {"sources": sources("pictures.py", "tower.py")}, tower),
        "base": (settings | {"sources": sources(*of_data, "tower.py", "projector.py", "language.py")}, base),
    }


SUITES = {"text": text, "visual": visual}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="text", help="which tasks (default: text)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: runs/real-<suite>)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and base model")
    args = parser.parse_args()
    out = args.out or Path(f"runs/real-{args.suite}")
    if not all(map(find_spec, language.PACKAGES)):
        parser.error(language.INSTALL)
    try:
        for name, (settings, build) in SUITES[args.suite](out, args.seed).items():
            built_once(out / name, settings, build)
    except (FileExistsError, ModuleNotFoundError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
