"""Images as models are shown them: upright, RGB, 8 bits a channel."""

import io
import itertools
import os
import struct
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lilora.errors import UserError

# Pillow's others run programs (EPS) or are no pictures of a data set.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TGA", "TIFF", "WEBP")

ImageAspect = Literal["processor", "pad"]
_PADDED_WITH = "_lilora_padded_with"  # an attribute of the processor

# Up to this many images per split are opened before anything runs; those of larger ones when they are read.
_OPENED_UP_FRONT = 2_000


class EmbeddedImage(NamedTuple):
    """An image whose file is a part of its record."""

    name: str  # in print
    content: bytes

    def __str__(self) -> str:
        return self.name


def open_image(path: Path | EmbeddedImage) -> Image.Image:
    """The image at `path` as RGB, as transformers' `load_image` reads it: turned as its EXIF orientation says.

    Grey images of 16 bits are scaled to 8, with one warning; a file's format is found from its content, not its name.

    Raises UserError when the file is missing or broken, is none of FORMATS, has more pixels than PIL.Image.MAX_IMAGE_PIXELS,
    or holds numbers that say nothing of brightness: 32 bits a pixel, whole or with a point.
    """
    with _opened(path) as image:
        return _eight_bits(ImageOps.exif_transpose(image), image.format, path).convert("RGB")


def images_for(processor: Any, paths: Iterable[Path | EmbeddedImage]) -> list[Image.Image]:
    """The images as a processor is to get them: `set_image_aspect` says how."""
    mean = getattr(processor, _PADDED_WITH, None)
    images = map(open_image, paths)
    return list(images) if mean is None else [padded_to_square(image, mean) for image in images]


def set_image_aspect(processor: Any, aspect: ImageAspect) -> None:
    """Let `images_for` leave images as they are ("processor"), or "pad" them to squares with the processor's mean colour.

    Raises UserError for "pad" where the processor takes no images or has no mean colour.
    """
    if aspect == "pad":
        mean = getattr(getattr(processor, "image_processor", processor), "image_mean", None)
        if mean is None:
            raise UserError(
                f"image_aspect is 'pad', and {type(processor).__name__} has no images with a mean colour to pad with; use "
                "--image-aspect processor"
            )
        setattr(processor, _PADDED_WITH, tuple(int(255 * channel) for channel in mean))


def padded_to_square(image: Image.Image, colour: tuple[int, ...]) -> Image.Image:
    """The image in the middle of a square of its longer side, as LLaVA-1.5 (arXiv 2310.03744) has it with the mean colour of
    its image processor."""
    side = max(image.size)
    square = Image.new("RGB", (side, side), colour)
    square.paste(image, tuple((side - length) // 2 for length in image.size))
    return square


@contextmanager
def _opened(path: Path | EmbeddedImage) -> Iterator[Image.Image]:
    """The image, of which the header alone is read yet; UserError as `open_image` raises it, in the block too."""
    Image.init()
    file = io.BytesIO(path.content) if isinstance(path, EmbeddedImage) else path
    try:
        with Image.open(file, formats=[name for name in FORMATS if name in Image.OPEN]) as image:
            pixels, limit = image.width * image.height, Image.MAX_IMAGE_PIXELS
            if limit is not None and pixels > limit:
                raise UserError(
                    f"image {path} has {pixels / 1e6:.1f} megapixels, and {limit / 1e6:.1f} are allowed; scale it down."
                )
            yield image
    except UserError:
        raise
    except UnidentifiedImageError as error:
        raise UserError(f"image {path} cannot be opened: it is no {', '.join(FORMATS)}; replace it.") from error
    except (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError) as error:
        raise UserError(f"image {path} cannot be opened ({error}); replace it.") from error


def _eight_bits(image: Image.Image, format: str, path: Path | EmbeddedImage) -> Image.Image:
    sixteen = image.mode.startswith("I;16") or (image.mode == "I" and format in ("PNG", "PPM"))  # which Pillow widens
    if sixteen:
        warnings.warn("images of 16 bits are scaled to the 8 that models are shown", stacklevel=2)
        return Image.fromarray(((np.asarray(image).astype(np.uint32) + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise UserError(
            f"image {path} holds {'whole' if image.mode == 'I' else 'fractional'} numbers of 32 bits, whose brightness is not "
            "known; convert it to 8 bits a channel."
        )
    return image


def check_images(images: Iterable[Path | EmbeddedImage], where: str) -> None:
    """Raise UserError at the first image that is missing or, if there are not very many, cannot be opened.

    Of embedded images the first ones are opened.
    """
    paths, embedded = {}, 0
    for image in images:
        if isinstance(image, EmbeddedImage):
            embedded += 1
            if embedded <= _OPENED_UP_FRONT:
                open_image(image)
        elif image not in paths:
            paths[image] = None
            if not os.path.isfile(image):
                raise UserError(f"{where}: image {image} is missing; add it or pass its folder with --data.")
    if len(paths) <= _OPENED_UP_FRONT:
        for image in paths:
            open_image(image)


def extreme_images(images: Iterable[tuple[int, Path | EmbeddedImage]]) -> list[int]:
    """Of the first images, numbered, those that a processor may refuse: the widest, the tallest and the smallest.

    Raises UserError as `open_image` does for what their headers tell.
    """
    sizes = {}
    for number, image in itertools.islice(images, _OPENED_UP_FRONT):
        with _opened(image) as opened:
            sizes[number] = opened.size
    if not sizes:
        return []
    most = (lambda wh: wh[0] / wh[1], lambda wh: wh[1] / wh[0], lambda wh: -min(wh))
    return [max(sizes, key=lambda number: of(sizes[number])) for of in most]
