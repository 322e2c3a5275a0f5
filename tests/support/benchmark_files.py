"""Tiny files in the layouts in which the authors of benchmarks publish theirs."""

import json

import numpy as np
from PIL import Image

ONE_WORD = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."
CAPTION = "Write a short caption of the picture."

# (train file, test file, folder of train images, of test images, image path in a record, question, answers of the samples)
INSTRUCTIONS = {
    "cvit": [
        (
            "ScienceQA",
            "test",
            "ScienceQA/images/train/1/image.png",
            f"Which one?\nA. a cat\nB. a dog\n{LETTER}",
            ["A", "B"],
        ),
        ("TextVQA", "val", "TextVQA/train_images/0a.png", f"What does it say?\n{ONE_WORD}", ["stop", "go"]),
        (
            "Flickr30k",
            "val",
            "Flickr30k/flickr30k-images/1.png",
            CAPTION,
            [["A dog runs.", "A dog."], ["Two cats sleep."]],
        ),
        ("ImageNet", "test", "ImageNet/train/n01440764/1.png", f"What is it?\n{ONE_WORD}", ["tench", "goldfish"]),
        ("GQA", "test", "GQA/images/1.png", f"Is it red?\n{ONE_WORD}", ["yes", "no"]),
        ("VQAv2", "val", "COCO2014/train2014/1.png", f"How many?\n{ONE_WORD}", ["2", "3"]),
    ],
    "coin": [
        (
            "ScienceQA",
            "test",
            "ScienceQA/images/train/1/image.png",
            f"Which one?\nA. a cat\nB. a dog\n{LETTER}",
            ["A", "B"],
        ),
        ("TextVQA", "val", "./TextVQA/train_images/0a.png", f"What does it say?\n{ONE_WORD}", ["stop", "go"]),
        ("ImageNet", "test", "ImageNet/train/n01440764/1.png", f"What is it?\n{ONE_WORD}", ["tench", "goldfish"]),
        ("GQA", "test", "GQA/images/1.png", f"Is it red?\n{ONE_WORD}", ["yes", "no"]),
        ("VizWiz", "val", "VizWiz/train/1.png", f"What is this?\n{ONE_WORD}", ["a can", "unanswerable"]),
        ("Grounding", "test", "COCO2014/train2014/1.png", "Where is it?", ["[0.1,0.2,0.5,0.6]", "[0.0,0.0,1.0,0.5]"]),
        ("VQAv2", "val", "COCO2014/train2014/1.png", f"How many?\n{ONE_WORD}", ["2", "3"]),
        ("OCRVQA", "test", "OCR-VQA/images/1.png", f"Who wrote it?\n{ONE_WORD}", ["A. Writer", "B. Writer"]),
    ],
    "ucit": [
        ("ImageNet-R", "train", "ImageNet-R/train/n01443537/1.png", f"What is it?\n{ONE_WORD}", ["goldfish", "tench"]),
        ("ArxivQA", "train_4w", "ArxivQA/images/1.png", f"Which curve?\nA. red\nB. blue\n{LETTER}", ["A", "B"]),
        ("VizWiz", "train", "VizWiz/train/1.png", CAPTION, [["A can.", "A red can."], ["A table."]]),
        ("IconQA", "train", "IconQA/iconqa_data/iconqa/1.png", f"How many?\n{ONE_WORD}", ["2", "3"]),
        ("CLEVR", "train_4w", "CLEVR/images/train/1.png", f"How many are left?\n{ONE_WORD}", ["2", "3"]),
        (
            "Flickr30k",
            "train_brief_4w",
            "Flickr30k/train/1.png",
            CAPTION,
            [["A dog runs."], ["Two cats sleep.", "Cats."]],
        ),
    ],
    "mllm_dcl": [
        ("RS", "test", "images/1.png", f"Which ground is it?\n{ONE_WORD}", ["forest", "river"]),
        ("Med", "test", "images/1.png", f"Which organ?\n{ONE_WORD}", ["lung", "liver"]),
        ("AD", "test", "images/1.png", "What is ahead?", ["There is a car.", "Nothing is ahead."]),
        ("Sci", "test", "images/AI2D_1.png", f"Which part?\nA. leaf\nB. root\n{LETTER}", ["A", "B"]),
        ("Fin", "test", "images/1.png", f"Does it rise?\n{ONE_WORD}", ["yes", "no"]),
    ],
    "mllm_acl": [
        ("OCR", "test", "images/1.png", "What is written?", [["Stop", "STOP"], "Go"]),
        ("Math", "test", "images/1.png", "How long is x?", ["4", "7.5"]),
        ("VP", "test", "images/1.png", f"Which is nearer?\n(A) the cat\n(B) the dog\n{LETTER}", ["(A)", "(B)"]),
        ("APP", None, "images/1.png", "Tap the button.", ["[0.1, 0.2]", "[0.3, 0.4]"]),
    ],
}
CLASSES = {"great_white": 0, "other": 1}
IMAGE_SETS = {
    "caltech-101/split_zhou_Caltech101.json": "caltech-101/101_ObjectCategories",
    "dtd/split_zhou_DescribableTextures.json": "dtd/images",
    "eurosat/split_zhou_EuroSAT.json": "eurosat/2750",
    "oxford_flowers/split_zhou_OxfordFlowers.json": "oxford_flowers/jpg",
    "food-101/split_zhou_Food101.json": "food-101/images",
    "oxford_pets/split_zhou_OxfordPets.json": "oxford_pets/images",
    "stanford_cars/split_zhou_StanfordCars.json": "stanford_cars",
    "sun397/split_zhou_SUN397.json": "sun397/SUN397",
}


def picture(path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    colours = np.random.default_rng(len(str(path))).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    Image.fromarray(colours).save(path, format="PNG")


def write(path, content) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))


def training(image, question, answers) -> list[dict]:
    """Records as LLaVA's training reads them."""
    first = [answer[0] if isinstance(answer, list) else answer for answer in answers]
    return [
        {
            "id": str(i),
            "image": image,
            "conversations": [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}],
        }
        for i, answer in enumerate(first)
    ]


def questions(image, question, answers) -> list[dict]:
    """Records as its evaluation reads them."""
    return [{"question_id": i, "image": image, "text": question, "answer": a} for i, a in enumerate(answers)]


def instruction_files(folder, name) -> None:
    """The files of a benchmark of instructions under `folder`."""
    for task, file, image, question, answers in INSTRUCTIONS[name]:
        if name in ("cvit", "coin"):
            place = (
                folder / {"cvit": "CVIT_benchmark/Instructions_Single", "coin": "Instructions_Original"}[name] / task
            )
            picture(folder / {"cvit": "datasets", "coin": "cl_dataset"}[name] / image)
            write(place / "train.json", training(image, question, answers))
            asked = questions(image, question, answers)
            if task == "Grounding":
                asked = [{("answer_bbox" if key == "answer" else key): v for key, v in q.items()} for q in asked]
            write(place / f"{file}.json", asked)
        elif name == "ucit":
            place = folder / "instructions" / task
            picture(folder / "datasets" / image)
            write(place / f"{file}.json", training(image, question, answers))
            captions = isinstance(answers[0], list)
            asked = questions(image, question, [None if captions else answer for answer in answers])
            write(place / "test_3000.json", asked)
            if captions:
                found = [{"image_id": i, "caption": c} for i, own in enumerate(answers, 1) for c in own]
                write(place / "val_coco_type_3000.json", {"images": [{"id": 1}, {"id": 2}], "annotations": found})
        else:
            test = task if name == "mllm_dcl" else f"{task}_test"
            for split in (task, test) if file else (task,):
                picture(folder / split / image)
            write(folder / task / "train.json", training(image, question, answers))
            if file:
                write(folder / test / f"{file}.json", questions(image, question, answers))


def image_files(folder, sets=tuple(IMAGE_SETS)) -> None:
    """Sets of images as CoOp lays them out, and the arrays of MNIST and CIFAR-100."""
    for file in sets:
        rows = [
            [f"{label}/{split}.jpg", number, label] for label, number in CLASSES.items() for split in ("train", "test")
        ]
        for path, _, _ in rows:
            picture(folder / IMAGE_SETS[file] / path)
        splits = {split: [row for row in rows if row[0].endswith(f"{split}.jpg")] for split in ("train", "test")}
        write(folder / file, {"train": splits["train"], "val": [], "test": splits["test"]})
    for split, number in (("train", "0034309"), ("test", "1514522")):
        picture(folder / "fgvc_aircraft" / "images" / f"{number}.jpg")
        write(folder / "fgvc_aircraft" / f"images_variant_{split}.txt", f"{number} 707-320\n")
    for start in ("train", "t10k"):
        images, labels = np.arange(3 * 28 * 28).astype(np.uint8), np.array([7, 0, 7], np.uint8)
        for kind, sizes, content in (("images-idx3", (3, 28, 28), images), ("labels-idx1", (3,), labels)):
            head = bytes([0, 0, 8, len(sizes)]) + np.array(sizes, ">u4").tobytes()
            path = folder / "mnist" / f"{start}-{kind}-ubyte"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(head + content.tobytes())
    cifar = folder / "cifar-100"
    write(cifar / "fine_label_names.txt", "apple\naquarium_fish\n")
    for split in ("train", "test"):
        rows = np.zeros((2, 2 + 3072), np.uint8)
        rows[:, 1], rows[1, 2 : 2 + 1024] = (0, 1), 255  # the second is a red fish
        rows.tofile(cifar / f"{split}.bin")


def next_files(folder, tasks) -> None:
    """Continual-NExT's, as PCLR's scripts name them: conversations as `messages` in training, LLaVA's for the tests; answers by
    what scores a task.
    """
    for task, kind in tasks.items():
        answers = {"letter": ["A", "B"], "box": ["[0.1, 0.2, 0.5, 0.6]"] * 2}.get(kind, ["forest", "a river"])
        picture(folder / "datasets" / "images" / task / "1.png")
        records = training(f"datasets/images/{task}/1.png", "What is it?", answers)
        messages = [
            {
                "images": [record["image"]],
                "messages": [
                    {"role": {"human": "user", "gpt": "assistant"}[turn["from"]], "content": turn["value"]}
                    for turn in record["conversations"]
                ],
            }
            for record in records
        ]
        write(folder / "datasets" / "json" / task / "train.json", messages)
        write(folder / "datasets" / "json" / task / "test.json", records)
