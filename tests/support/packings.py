"""Pictures packed as the processors of the families pack them: pictures of each sample -> (their image tokens, inputs)."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Pictures = list[list[dict]]  # of each sample


@dataclass(frozen=True)
class Packing:
    """draw(kind): the picture of a kind (0, 1, 2), of random pixels. pack(pictures): tokens of each, and inputs."""

    draw: Callable[[int], dict]
    pack: Callable[[Pictures], tuple[list[list[int]], dict[str, Tensor]]]


def flat(pictures: Pictures, key: str) -> list:
    return [picture[key] for sample in pictures for picture in sample]


def counted(pictures: Pictures) -> list[list[int]]:
    return [[picture["tokens"] for picture in sample] for sample in pictures]


def text_alone() -> Packing:
    return Packing(lambda kind: {"tokens": 0}, lambda pictures: (counted(pictures), {}))


def stacked(tokens: int, tiles: Sequence[int] = (1, 1, 1), side: int = 8, name: str = "pixel_values") -> Packing:
    """[tiles, 3, side, side], every tile of the same number of tokens."""

    def draw(kind: int) -> dict:
        return {"tokens": tokens * tiles[kind], "pixels": torch.randn(tiles[kind], 3, side, side)}

    def pack(pictures: Pictures) -> tuple:
        pixels = flat(pictures, "pixels")
        return counted(pictures), {name: torch.cat(pixels)} if pixels else {}

    return Packing(draw, pack)


# Height and width; tiles with the overview; tokens: the overview's 4, and the unpadded grid with a column of line ends.
ANYRES = [((16, 16), 5, 4 + 4 * 5), ((8, 8), 3, 4 + 2 * 3), ((8, 16), 3, 4 + 2 * 5)]


def anyres(together: bool) -> Packing:
    """[images, most tiles, 3, 8, 8] and image_sizes. together: pictures that share a sample are one tile each."""

    def draw(kind: int) -> dict:
        return {"kind": kind, "pixels": torch.randn(5, 3, 8, 8)}

    def pack(pictures: Pictures) -> tuple:
        tokens, tiles, sizes = [], [], []
        for sample in pictures:
            cut = [
                ANYRES[p["kind"]] if len(sample) == 1 or not together else (ANYRES[p["kind"]][0], 1, 5) for p in sample
            ]
            tokens.append([length for _, _, length in cut])
            sizes += [size for size, _, _ in cut]
            tiles += [
                torch.cat([p["pixels"][:n], torch.zeros(5 - n, 3, 8, 8)])
                for p, (_, n, _) in zip(sample, cut, strict=True)
            ]
        if not tiles:
            return tokens, {}
        inputs = {"pixel_values": torch.stack(tiles), "image_sizes": torch.tensor(sizes)}
        return tokens, inputs | ({"batch_num_images": torch.tensor([len(s) for s in pictures])} if together else {})

    return Packing(draw, pack)


def tiled(tokens: int = 4) -> Packing:
    """[samples, most tiles, 3, 16, 16], padded with black tiles, and a mask of their pixels."""

    def draw(kind: int) -> dict:
        return {"tokens": tokens * (kind + 1), "pixels": torch.randn(kind + 1, 3, 16, 16)}

    def pack(pictures: Pictures) -> tuple:
        tiles = [torch.cat([torch.zeros(0, 3, 16, 16), *(p["pixels"] for p in sample)]) for sample in pictures]
        if not (most := max(map(len, tiles))):
            return counted(pictures), {}
        pixels = torch.stack([torch.cat([t, torch.zeros(most - len(t), 3, 16, 16)]) for t in tiles])
        return counted(pictures), {
            "pixel_values": pixels,
            "pixel_attention_mask": torch.ones(*pixels.shape[:2], 16, 16).bool(),
        }

    return Packing(draw, pack)


GRIDS = [(1, 4, 8), (1, 6, 4), (1, 4, 4)]


def gridded(
    kind_of_input: str = "image", frames: int = 1, patch: Sequence[int] = (3 * 2 * 4 * 4,), sizes: bool = False
) -> Packing:
    """[sum of patches, *patch] and the grids; 4 patches a token, which lie together. sizes: also image_merge_sizes."""

    def draw(kind: int) -> dict:
        _, height, width = GRIDS[kind]
        patches = frames * height * width
        grid = torch.tensor([frames, height, width])
        return {"tokens": patches // 4, "pixels": torch.randn(patches, *patch), "grid": grid}

    def pack(pictures: Pictures) -> tuple:
        pixels = flat(pictures, "pixels")
        if not pixels:
            return counted(pictures), {}
        names = (
            ("pixel_values", "image_grid_thw")
            if kind_of_input == "image"
            else ("pixel_values_videos", "video_grid_thw")
        )
        inputs = dict(zip(names, (torch.cat(pixels), torch.stack(flat(pictures, "grid"))), strict=True))
        return counted(pictures), inputs | ({"image_merge_sizes": torch.tensor([2] * len(pixels))} if sizes else {})

    return Packing(draw, pack)


SIZES = [(16, 8), (8, 8), (8, 24)]


def sized(unit: int) -> Packing:
    """[images, 3, most height, most width] and image_sizes; a token for every unit x unit pixels."""

    def draw(kind: int) -> dict:
        height, width = SIZES[kind]
        size = torch.tensor([height, width])
        return {"tokens": height * width // unit**2, "pixels": torch.randn(3, height, width), "size": size}

    def pack(pictures: Pictures) -> tuple:
        pixels = flat(pictures, "pixels")
        if not pixels:
            return counted(pictures), {}
        height, width = (max(p.shape[i] for p in pixels) for i in (1, 2))
        padded = [torch.nn.functional.pad(p, (0, width - p.shape[2], 0, height - p.shape[1])) for p in pixels]
        return counted(pictures), {
            "pixel_values": torch.stack(padded),
            "image_sizes": torch.stack(flat(pictures, "size")),
        }

    return Packing(draw, pack)


PATCHES = [(4, 6), (2, 4), (4, 4)]


def padded(shape_of: Callable[[list[tuple[int, int]]], dict[str, Tensor]]) -> Packing:
    """[images, 24, 48]: images of up to 24 patches, 4 of them a token. shape_of: what says how many are none."""

    def draw(kind: int) -> dict:
        height, width = PATCHES[kind]
        pixels = torch.randn(height * width, 48)
        return {"tokens": len(pixels) // 4, "pixels": pixels, "shape": PATCHES[kind]}

    def pack(pictures: Pictures) -> tuple:
        pixels = [torch.cat([p, torch.zeros(24 - len(p), 48)]) for p in flat(pictures, "pixels")]
        inputs = {"pixel_values": torch.stack(pixels)} | shape_of(flat(pictures, "shape")) if pixels else {}
        return counted(pictures), inputs

    return Packing(draw, pack)


def by_shapes(shapes: list[tuple[int, int]]) -> dict[str, Tensor]:
    """As LFM2-VL's processor says it."""
    masks = [torch.arange(24) < height * width for height, width in shapes]
    return {"spatial_shapes": torch.tensor(shapes), "pixel_attention_mask": torch.stack(masks).long()}


def by_positions(shapes: list[tuple[int, int]]) -> dict[str, Tensor]:
    """As Gemma 4's processor says it: column and row of each patch, -1 for none."""

    def positions(height: int, width: int) -> Tensor:
        grid = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1)
        return torch.cat([grid.reshape(-1, 2), -torch.ones(24 - height * width, 2).long()])

    return {"image_position_ids": torch.stack([positions(*shape) for shape in shapes])}


def aspect_ratios() -> Packing:
    """[samples, most images, 2, 3, 16, 16], tiles of images that are attended to and take one token, as Mllama's."""

    def pack(pictures: Pictures) -> tuple:
        most = max(map(len, pictures))
        if not most:
            return counted(pictures), {}
        pixels = torch.zeros(len(pictures), most, 2, 3, 16, 16)
        there = torch.zeros(len(pictures), most, 2).long()
        for i, sample in enumerate(pictures):
            for j, picture in enumerate(sample):
                pixels[i, j], there[i, j] = picture["pixels"], 1
        return counted(pictures), {
            "pixel_values": pixels,
            "aspect_ratio_ids": 2 * there[..., 0],  # the second of the supported ones: two tiles
            "aspect_ratio_mask": there,
        }

    return Packing(lambda kind: {"tokens": 1, "pixels": torch.randn(2, 3, 16, 16)}, pack)


def cropped() -> Packing:
    """[images, 1 + crops, 3, 16, 16], the overview first, with sizes and a mask of patches, as Phi-4's."""

    def draw(kind: int) -> dict:
        crops = 1 + kind % 2
        tokens = 2 * (2 * crops + 1) + 1 + 2 * 3  # the crops' lines with their ends, a separator, the overview's
        return {"tokens": tokens, "pixels": torch.randn(1 + crops, 3, 16, 16), "crops": crops}

    def pack(pictures: Pictures) -> tuple:
        crops = flat(pictures, "crops")
        if not crops:
            return counted(pictures), {}
        most = 1 + max(crops)
        pixels = [torch.cat([p, torch.zeros(most - len(p), 3, 16, 16)]) for p in flat(pictures, "pixels")]
        return counted(pictures), {
            "image_pixel_values": torch.stack(pixels),
            "image_sizes": torch.tensor([[16, 16 * n] for n in crops]),
            "image_attention_mask": torch.ones(len(crops), most, 4, 4).long(),
        }

    return Packing(draw, pack)


def flattened() -> Packing:
    """[images, 8, 2 + 48]: row and column of each patch ahead of its pixels; 4 tokens an image, as Kosmos-2.5's."""
    places = torch.stack(torch.meshgrid(torch.arange(1.0, 3), torch.arange(1.0, 5), indexing="ij"), -1).reshape(-1, 2)

    def pack(pictures: Pictures) -> tuple:
        pixels = flat(pictures, "pixels")
        return counted(pictures), {"flattened_patches": torch.stack(pixels)} if pixels else {}

    return Packing(lambda kind: {"tokens": 4, "pixels": torch.cat([places, torch.randn(8, 48)], 1)}, pack)
