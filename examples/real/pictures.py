"""Real pictures from packages, 64 x 64, and what they show: the raw material of the visual suite.

Clothes, flags and stamps lie in Debian packages, which need no root: they are downloaded and unpacked into a folder. Digits are
scikit-learn's; words are written in the DejaVu fonts that matplotlib carries; discs are drawn.
"""

import gzip
import shutil
import subprocess
from collections.abc import Callable
from functools import cache
from pathlib import Path

import matplotlib
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from sklearn.datasets import load_digits

SIZE = 64
PACKAGES = ["dataset-fashion-mnist", "iso-flags-png-320x240", "tuxpaint-stamps-default"]  # 197 MB; the stamps are GPL-2

Rng = np.random.Generator
Shown = tuple[Image.Image, str]  # a picture and the name of what it shows
Maker = Callable[[Rng, bool], Shown]  # of training or of the test

CLOTHES = ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
COLOURS = {"red": (200, 40, 40), "green": (40, 150, 60), "blue": (50, 80, 210), "yellow": (235, 200, 40)}
FONTS = ["DejaVuSans", "DejaVuSans-Bold", "DejaVuSerif", "DejaVuSerif-Bold", "DejaVuSansMono"]
_FLAGS = (
    "fr:France,jp:Japan,br:Brazil,ca:Canada,gr:Greece,ke:Kenya,in:India,se:Sweden,vn:Vietnam,za:South Africa,us:America,"
    "ch:Switzerland,tr:Turkey,cu:Cuba,kr:Korea,ng:Nigeria"
)
FLAGS = dict(pair.split(":") for pair in _FLAGS.split(","))
_OTHER_FLAGS = (
    "de:Germany,it:Italy,es:Spain,pt:Portugal,at:Austria,pl:Poland,hu:Hungary,ie:Ireland,gb:Britain,be:Belgium,dk:Denmark,"
    "no:Norway,fi:Finland,ru:Russia,ua:Ukraine,ro:Romania,bg:Bulgaria,eg:Egypt,ma:Morocco,tn:Tunisia,et:Ethiopia,gh:Ghana,"
    "sn:Senegal,cn:China,np:Nepal,th:Thailand,id:Indonesia,ph:Philippines,au:Australia,mx:Mexico,pe:Peru,cl:Chile,"
    "ar:Argentina,uy:Uruguay,co:Colombia,ve:Venezuela,ir:Iran,lb:Lebanon,jo:Jordan,is:Iceland,ee:Estonia,il:Israel"
)
OTHER_FLAGS = dict(pair.split(":") for pair in _OTHER_FLAGS.split(","))
_WORDS = "apple,river,stone,cloud,tiger,music,bread,chair,paint,queen,sugar,watch"
_OTHER_WORDS = (
    "house,train,light,plant,horse,water,night,green,money,table,smile,earth,knife,ocean,piano,storm,wheel,fruit,clock,"
    "sheep,dream,glass,heart,beach,candy,field,ghost,hotel,jelly,lemon,mouse,north,olive,pearl,robot,shirt,truck,uncle,voice,zebra"
)
WORDS, OTHER_WORDS = _WORDS.split(","), _OTHER_WORDS.split(",")
KINDS = (
    "animals",
    "clothes",
    "food",
    "household",
    "plants",
    "town",
    "vehicles",
)  # folders of stamps that show one thing
STAMPS = 16  # of the task; the others are for the tower and the projector


def fetch(folder: Path) -> None:
    """Download the Debian packages and unpack them into `folder`; FileNotFoundError where there is no apt-get or dpkg."""
    for program in ("apt-get", "dpkg"):
        if not shutil.which(program):
            raise FileNotFoundError(f"{program} is not on this machine")
    subprocess.run(["apt-get", "download", "-q", *PACKAGES], cwd=folder, check=True)
    for package in sorted(folder.glob("*.deb")):
        subprocess.run(["dpkg", "-x", package, folder], check=True)
        package.unlink()


def laid(
    thing: Image.Image, rng: Rng, turn: float = 12, smallest: float = 0.65, plain: int | None = None
) -> Image.Image:
    """A thing with transparency on a plain ground, somewhat turned, scaled and shifted. plain: the ground's grey level."""
    scale = SIZE * rng.uniform(smallest, 1) / max(thing.size)
    thing = thing.resize([max(1, round(scale * side)) for side in thing.size], Image.Resampling.BILINEAR)
    thing = thing.rotate(rng.uniform(-turn, turn), Image.Resampling.BILINEAR, expand=False)
    ground = rng.integers(120, 256, 3).tolist() if plain is None else [plain] * 3
    picture = Image.new("RGB", (SIZE, SIZE), tuple(ground))
    place = [int(rng.integers(0, SIZE - side + 1)) for side in thing.size]
    picture.paste(thing, tuple(place), thing)
    return picture


@cache
def _opened(path: Path) -> Image.Image:
    thing = Image.open(path).convert("RGBA")
    thing.thumbnail((2 * SIZE, 2 * SIZE))
    return thing


def of_files(names: dict[Path, str], turn: float = 12) -> Maker:
    """One picture for each name, laid anew each time: tests show the same things laid otherwise."""
    files = list(names)

    def make(rng: Rng, train: bool) -> Shown:
        file = files[rng.integers(len(files))]
        return laid(_opened(file), rng, turn), names[file]

    return make


def clothing(packages: Path) -> Maker:
    """Fashion-MNIST, its own split; 28 x 28 grey, put on a darker or lighter black."""
    folder = packages / "usr" / "share" / "datasets" / "fashion-mnist"

    @cache
    def part(train: bool) -> tuple[np.ndarray, np.ndarray]:
        name = "train" if train else "t10k"
        images = gzip.decompress((folder / f"{name}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((folder / f"{name}-labels-idx1-ubyte.gz").read_bytes())[8:]
        return np.frombuffer(images, np.uint8).reshape(-1, 28, 28), np.frombuffer(labels, np.uint8)

    def make(rng: Rng, train: bool) -> Shown:
        images, labels = part(train)
        i = rng.integers(len(labels))
        return Image.fromarray(images[i]).resize((SIZE, SIZE), Image.Resampling.BILINEAR).convert("RGB"), CLOTHES[
            labels[i]
        ]

    return make


def flags(packages: Path, names: dict[str, str]) -> Maker:
    folder = packages / "usr" / "share" / "iso-flags-png-320x240"
    return of_files({folder / f"{code}.png": name for code, name in names.items()}, turn=8)


@cache
def captioned(packages: Path) -> dict[Path, str]:
    """The stamps of KINDS by file, with captions that are one article and at most two words, each once."""
    folder = packages / "usr" / "share" / "tuxpaint" / "stamps"
    found: dict[str, Path] = {}
    for kind in KINDS:
        for file in sorted((folder / kind).rglob("*.png")):
            text = file.with_suffix(".txt")
            said = text.read_text(errors="replace").splitlines()[0].strip().rstrip(".!") if text.exists() else ""
            words = said.split()
            if 2 <= len(words) <= 3 and words[0] in ("A", "An") and said.isascii() and "(" not in said:
                found.setdefault(said[0].lower() + said[1:], file)
    return {file: said for said, file in found.items()}


def stamps(packages: Path, of_task: bool) -> Maker:
    names = captioned(packages)
    chosen = list(names)[:: len(names) // STAMPS][:STAMPS]
    return of_files({file: said for file, said in names.items() if (file in chosen) == of_task})


def any_stamp(packages: Path) -> Maker:
    """All stamps but those of the task, whatever they are called."""
    names = captioned(packages)
    chosen = set(list(names)[:: len(names) // STAMPS][:STAMPS])
    files = sorted((packages / "usr" / "share" / "tuxpaint" / "stamps").rglob("*.png"))
    return of_files({file: file.stem for file in files if file not in chosen})


@cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    data = load_digits()
    return (data.images * 255 / 16).astype(np.uint8), data.target


def digit(rng: Rng, train: bool) -> Shown:
    """scikit-learn's digits; every fifth is for tests."""
    images, values = _digits()
    i = int(rng.choice(np.flatnonzero((np.arange(len(values)) % 5 != 0) == train)))
    side = int(rng.integers(40, 57))
    strokes = Image.fromarray(images[i]).resize((side, side), Image.Resampling.BICUBIC)
    picture = Image.new("RGB", (SIZE, SIZE))
    picture.paste(strokes, tuple(rng.integers(0, SIZE - side + 1, 2).tolist()))
    return picture, NUMBERS[values[i]]


def words(known: list[str], anywhere: bool) -> Maker:
    """anywhere: else about the middle."""

    def make(rng: Rng, train: bool) -> Shown:
        word = known[rng.integers(len(known))]
        picture = Image.new("RGB", (SIZE, SIZE), tuple(rng.integers(190, 256, 3).tolist()))
        draw = ImageDraw.Draw(picture)
        font = _font(FONTS[rng.integers(len(FONTS))], int(rng.integers(14, 19)))
        left, top, right, bottom = draw.textbbox((0, 0), word, font=font)
        free = [max(0, SIZE - side) for side in (right - left, bottom - top)]
        x, y = (int(rng.integers(0, f + 1) if anywhere else f // 2 + rng.integers(-2, 3)) for f in free)
        draw.text((x - left, y - top), word, fill=tuple(rng.integers(0, 100, 3).tolist()), font=font)
        return picture, word

    return make


@cache
def _font(name: str, size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts" / "ttf" / f"{name}.ttf", size)


def discs(rng: Rng, train: bool) -> Shown:
    """One to five discs of one colour that do not touch: how many there are, and their colour."""
    number, colour = int(rng.integers(1, 6)), str(rng.choice(list(COLOURS)))
    picture = Image.new("RGB", (SIZE, SIZE), tuple(rng.integers(220, 256, 3).tolist()))
    draw = ImageDraw.Draw(picture)
    cells = rng.choice(9, number, replace=False)  # of a grid of 3 x 3
    for cell in cells:
        radius = int(rng.integers(6, 9))
        x, y = (int(21 * part + 11 + rng.integers(-2, 3)) for part in (cell % 3, cell // 3))
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLOURS[colour])
    return picture, f"{NUMBERS[number]} {colour}"
