"""Tasks of image classification on noise: `colour` in folders of classes, the others in lists."""

import json

import numpy as np
from PIL import Image

CLASSES = {"colour": ["red", "green", "blue"], "count": ["one", "two"], "size": ["small", "big", "very big"]}


def make_images(folder, samples=10):
    """Write <task>/<split>/<class>/<number>.png and <task>/<split>.json into the folder."""
    rng = np.random.default_rng(0)
    for task, names in CLASSES.items():
        for split in ("train", "test"):
            records = []
            for i in range(samples):
                label = i % len(names)
                path = folder / task / split / names[label].replace(" ", "_") / f"{i}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
                records.append({"image": str(path.relative_to(folder / task)), "label": label})
            (folder / task / f"{split}.json").write_text(json.dumps(records))


def manifest_tasks():
    """What a manifest says of them."""
    tasks = [{"name": "colour", "train": "colour/train", "test": "colour/test"}]
    for name in ("count", "size"):
        lists = {split: f"{name}/{split}.json" for split in ("train", "test")}
        tasks.append({"name": name, **lists, "images": name, "classes": CLASSES[name]})
    return tasks
