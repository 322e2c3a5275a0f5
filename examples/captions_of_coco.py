"""Puts the captions of val_coco_type_3000.json into test_3000.json, whose samples they are numbered like, from 1.

    python examples/captions_of_coco.py DIR/instructions/VizWiz DIR/instructions/Flickr30k

writes test_captions.json into each folder: the samples of test_3000.json with `answers`, a list of captions.
"""

import json
import sys
from collections import defaultdict
from pathlib import Path


def joined(questions: list[dict], coco: dict) -> list[dict]:
    """The questions with their captions as `answers`; ValueError if some have none or captions are left over."""
    captions = defaultdict(list)
    for annotation in coco["annotations"]:
        captions[annotation["image_id"]].append(annotation["caption"])
    if set(captions) != set(range(1, len(questions) + 1)):
        raise ValueError(f"{len(questions)} samples and captions of {len(captions)} images: these are not of one split")
    return [
        {key: value for key, value in question.items() if key != "answer"} | {"answers": captions[number]}
        for number, question in enumerate(questions, 1)
    ]


if __name__ == "__main__":
    for folder in map(Path, sys.argv[1:]):
        questions, coco = (
            json.loads((folder / f"{name}.json").read_text()) for name in ("test_3000", "val_coco_type_3000")
        )
        (folder / "test_captions.json").write_text(json.dumps(joined(questions, coco)))
        print(folder / "test_captions.json", len(questions))
