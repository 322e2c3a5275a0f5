"""Images as models are shown them, whatever the file holds."""

import subprocess
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil
from transformers.image_utils import load_image

from lilora.continual import images
from lilora.continual.images import (
    check_images,
    extreme_images,
    images_for,
    open_image,
    padded_to_square,
    set_image_aspect,
)
from lilora.errors import UserError

GREY = np.arange(0, 65536, 257, dtype=np.uint16).reshape(16, 16)  # every level of 8 bits


def coloured(size=(6, 4)):
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    return Image.fromarray(pixels)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["jpg", "png", "tif", "webp"])
def test_an_image_stands_as_its_orientation_says(tmp_path, orientation, ending):
    path = tmp_path / f"phone.{ending}"
    exif = Image.Exif()
    exif[0x0112] = orientation
    coloured().save(path, exif=exif)
    assert open_image(path).size == ((4, 6) if orientation > 4 else (6, 4))
    assert np.array_equal(np.asarray(open_image(path)), np.asarray(load_image(str(path))))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK"])
def test_every_8_bit_mode_is_read_as_transformers_does(tmp_path, mode):
    path = tmp_path / "image.tif"
    image = coloured().convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10))
    image.save(path)
    opened = open_image(path)
    assert opened.mode == "RGB"
    assert np.array_equal(np.asarray(opened), np.asarray(load_image(str(path))))


@pytest.mark.parametrize("ending", ["png", "tif", "pgm"])
def test_16_bits_are_scaled_to_8_and_said_once(tmp_path, ending):
    path = tmp_path / f"grey.{ending}"
    if ending == "pgm":
        path.write_bytes(b"P5 16 16 65535\n" + GREY.astype(">u2").tobytes())
    else:
        Image.fromarray(GREY).save(path)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("default")
        opened = [open_image(path) for _ in range(3)]
    assert len(said) == 1
    assert "16 bits are scaled to the 8" in str(said[0].message)
    assert np.array_equal(np.asarray(opened[0])[..., 0], np.arange(256).reshape(16, 16))


@pytest.mark.parametrize("kind, said", [(np.float32, "fractional"), (np.int32, "whole")])
def test_numbers_without_a_known_brightness_are_refused(tmp_path, kind, said):
    path = tmp_path / "depth.tif"
    Image.fromarray((GREY / 65535).astype(kind)).save(path)
    with pytest.raises(UserError, match=rf"depth\.tif holds {said} numbers of 32 bits, .* convert it to 8 bits"):
        open_image(path)


@pytest.mark.parametrize("name", ["figure.png", "figure.eps", "figure.jpg"])
def test_postscript_reaches_no_interpreter_whatever_its_name(tmp_path, monkeypatch, name):
    path = tmp_path / name
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n")
    for call in ("Popen", "run", "call", "check_call", "check_output"):
        monkeypatch.setattr(subprocess, call, lambda *_, **__: pytest.fail("a program was started"))
    with pytest.raises(UserError, match=rf"image .*{name} cannot be opened: it is no .*JPEG.*PNG.*; replace it"):
        open_image(path)


def test_a_name_that_does_not_fit_the_format_is_read_by_its_content(tmp_path):
    coloured().save(tmp_path / "image.bmp")
    (tmp_path / "image.bmp").rename(tmp_path / "image.png")
    assert np.array_equal(np.asarray(open_image(tmp_path / "image.png")), np.asarray(coloured()))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("limit", [23, 11])  # Pillow itself refuses twice its limit
def test_an_image_of_too_many_pixels_is_refused_before_it_is_read(tmp_path, monkeypatch, limit):
    path = tmp_path / "large.png"
    coloured().save(path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 24)
    assert open_image(path).size == (6, 4)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("the pixels were read"))
    with pytest.raises(UserError, match=r"image .*large\.png (has 0\.0 megapixels|cannot be opened .*24 pixels)"):
        open_image(path)


def test_a_format_that_this_pillow_does_not_know_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(images, "FORMATS", ("NEWEST", "PNG"))
    coloured().save(tmp_path / "image.png")
    assert open_image(tmp_path / "image.png").size == (6, 4)


@pytest.mark.parametrize("name", ["x" * 300, "no\0thing.png", "absent.png", "."])
def test_a_path_that_is_no_file_is_missing(tmp_path, name):
    with pytest.raises(UserError, match=r"task 'a': image .* is missing"):
        check_images([tmp_path / name], "task 'a'")


@pytest.mark.parametrize("size", [(32, 16), (16, 32), (17, 8), (9, 9)])
def test_padding_puts_the_image_into_the_middle_of_a_square_of_the_mean_colour(size):
    image, square = coloured(size), padded_to_square(coloured(size), (122, 116, 104))
    side = max(size)
    assert square.size == (side, side)
    pixels = np.asarray(square).copy()
    left, top = (side - size[0]) // 2, (side - size[1]) // 2
    inner = pixels[top : top + size[1], left : left + size[0]]
    assert np.array_equal(inner, np.asarray(image))
    inner[:] = (122, 116, 104)
    assert (pixels == (122, 116, 104)).all()


def test_the_outer_quarters_of_a_wide_picture_reach_the_model_if_it_is_padded(tmp_path):
    wide = np.zeros((16, 32, 3), np.uint8)
    for name, outer in (("dark", 0), ("light", 255)):
        wide[:, :8], wide[:, 24:] = outer, outer
        Image.fromarray(wide).save(tmp_path / f"{name}.png")
    paths = [tmp_path / "dark.png", tmp_path / "light.png"]
    processor = SimpleNamespace(image_processor=CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=16))

    def shown():
        return processor.image_processor(images_for(processor, paths), return_tensors="pt")["pixel_values"]

    dark, light = shown()
    assert (dark == light).all()
    set_image_aspect(processor, "processor")
    assert (shown()[0] == dark).all()
    set_image_aspect(processor, "pad")
    dark, light = shown()
    assert (dark[:, 4:12] != light[:, 4:12]).any(1).any(0)[[0, 1, 2, 13, 14, 15]].all()
    assert dark[:, [0, 1, 14, 15]].abs().max() < 0.02, "the mean colour is 0 to the model"


def test_padding_without_a_mean_colour_is_one_sentence():
    with pytest.raises(UserError, match="image_aspect is 'pad', and SimpleNamespace has no images with a mean colour"):
        set_image_aspect(SimpleNamespace(), "pad")


def test_extreme_images_are_found_and_broken_ones_among_them_named(tmp_path):
    sizes = [(20, 30), (300, 20), (20, 310), (9, 9), (40, 40)]
    for number, size in enumerate(sizes):
        Image.new("RGB", size).save(tmp_path / f"{number}.png")
    numbered = [(10 + number, tmp_path / f"{number}.png") for number in range(len(sizes))]
    assert extreme_images(numbered) == [11, 12, 13]
    assert extreme_images([]) == []
    (tmp_path / "4.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"image .*4\.png cannot be opened: it is no AVIF"):
        extreme_images(numbered)
