"""Makes pictures of the published arrays of MNIST and CIFAR-100, in a folder per class.

    python examples/unpack_images.py DIR

DIR/mnist holds train-images-idx3-ubyte, train-labels-idx1-ubyte, t10k-images-idx3-ubyte and t10k-labels-idx1-ubyte, packed
(.gz) or not; DIR/cifar-100 holds train.bin, test.bin and fine_label_names.txt of the binary version. What is not there is left
out. Pictures go to DIR/mnist/train/<class>/<number>.png, DIR/mnist/test, DIR/cifar-100/train and DIR/cifar-100/test.
"""

import gzip
import sys
from pathlib import Path

import numpy as np
from PIL import Image


def idx(file: Path) -> np.ndarray:
    """The uint8 array of a file in MNIST's format: 0, 0, 8, dimensions, their sizes as 4 bytes each, numbers."""
    content = (
        gzip.decompress(file.with_name(f"{file.name}.gz").read_bytes()) if not file.exists() else file.read_bytes()
    )
    if content[:3] != b"\x00\x00\x08":
        raise ValueError(f"{file} is no file of unsigned bytes in MNIST's format")
    shape = np.frombuffer(content, ">u4", content[3], 4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * content[3]).reshape(shape)


def write(folder: Path, images: np.ndarray, labels: list[str]) -> None:
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        (folder / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / label / f"{number:05}.png")
    print(folder, len(labels))


def mnist(folder: Path) -> None:
    for split, start in (("train", "train"), ("test", "t10k")):
        images, labels = (idx(folder / f"{start}-{kind}-ubyte") for kind in ("images-idx3", "labels-idx1"))
        write(folder / split, images, [str(label) for label in labels])


def cifar_100(folder: Path) -> None:
    names = (folder / "fine_label_names.txt").read_text().split()
    for split in ("train", "test"):
        rows = np.fromfile(folder / f"{split}.bin", np.uint8).reshape(
            -1, 2 + 3 * 32 * 32
        )  # coarse label, label, R, G, B
        write(folder / split, rows[:, 2:].reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), [names[row[1]] for row in rows])


if __name__ == "__main__":
    for name, unpack in (("mnist", mnist), ("cifar-100", cifar_100)):
        if (Path(sys.argv[1]) / name).is_dir():
            unpack(Path(sys.argv[1]) / name)
