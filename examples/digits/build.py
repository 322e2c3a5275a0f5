"""Write a digits suite: DIR/data (images and JSON lists of its tasks) and DIR/base (a small trained LLaVA or CLIP).

    python examples/digits/build.py [--suite digits] [--out runs/digits] [--seed 0]

Suite `digits` has the six tasks of tasks.yaml, `digits-long` the twelve of long.yaml, `digits-wide` eight of these for a model
four times as wide, `digits-clip` those of clip.yaml, for CLIP. Needs no network: the images are scikit-learn's handwritten
digits. About two minutes on one CPU core, `digits-wide` about ten; a second call with the same settings finds everything in
place and does nothing.
"""

import argparse
import hashlib
import json
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import clip
import numpy as np
from base import build_base
from once import built_once
from PIL import Image
from scenes import LONG_TASKS, TASKS, Pool, Task, draw, pools
from tqdm import tqdm

HERE = Path(__file__).parent


def instruction(id: str, image: str, question: str, answer: str) -> dict[str, Any]:
    turns = [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]
    return {"id": id, "image": image, "conversations": turns}


class Suite(NamedTuple):
    tasks: dict[str, Task]
    sizes: dict[str, int]  # samples of each task's splits
    record: Callable[[str, str, str, str], dict[str, Any]] = instruction  # (id, image, question, answer) in JSON
    build_base: Callable[[Path, Pool, Iterable[Task], int, int], None] = build_base


SUITES = {
    "digits": Suite(TASKS, {"train": 1600, "test": 160}),
    # A method that changes old tasks is tested on 78 pairs of stage and task, not on 21.
    "digits-long": Suite(LONG_TASKS, {"train": 1600, "test": 100}),
    # Linears much wider than the ranks of a pool, among which some can then be redundant.
    "digits-wide": Suite(LONG_TASKS, {"train": 1600, "test": 100}, build_base=partial(build_base, width=384)),
    "digits-clip": Suite(clip.TASKS, {"train": 800, "test": 200}, clip.record, clip.build_base),
}


def write_task(folder: Path, suite: Suite, name: str, split_pools: dict[str, Pool], seed: int) -> None:
    """Write one task: folder/<split>.json and folder/images."""
    (folder / "images").mkdir(parents=True)
    for split, pool in split_pools.items():
        rng = np.random.default_rng([seed, list(suite.tasks).index(name), list(suite.sizes).index(split)])
        records = []
        for i in range(suite.sizes[split]):
            scene, question, answer = suite.tasks[name](pool, rng)
            image = f"{split}-{i:04d}.png"
            Image.fromarray(draw(scene)).save(folder / "images" / image)
            records.append(suite.record(f"{name}-{split}-{i}", image, question, answer))
        (folder / f"{split}.json").write_text(json.dumps(records, indent=1))


def write_data(folder: Path, suite: Suite, seed: int) -> None:
    train, test = pools()
    for name in tqdm(suite.tasks, desc="tasks"):
        write_task(folder / name, suite, name, {"train": train, "test": test}, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", choices=SUITES, default="digits", help="which tasks (default: digits)")
    parser.add_argument("--out", type=Path, help="folder to write to (default: runs/<suite>)")
    parser.add_argument("--seed", type=int, default=0, help="seed of data and base model")
    parser.add_argument("--steps", type=int, default=900, help="training steps of the base model")
    args = parser.parse_args()
    sources = b"".join((HERE / name).read_bytes() for name in ("scenes.py", "base.py", "clip.py", "build.py"))
    suite, out = SUITES[args.suite], args.out or Path("runs", args.suite)
    settings = {"suite": args.suite, "seed": args.seed, "sources": hashlib.sha256(sources).hexdigest()}
    try:
        built_once(out / "data", settings, lambda folder: write_data(folder, suite, args.seed))
        built_once(
            out / "base",
            settings | {"steps": args.steps},
            lambda folder: suite.build_base(folder, pools()[0], suite.tasks.values(), args.seed, args.steps),
        )
    except FileExistsError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
