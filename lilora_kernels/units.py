"""Units of packed vision rows: how much of a batch's images or videos belongs to each sample, by the batch itself.

A unit is what every layer ahead of the language model sees the same number of rows of: an image token, or a tile or a
video where a model makes numbers of tokens from them that its rows do not follow.
"""

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, nn


def units_of_batch(model: nn.Module, input_ids: Tensor, inputs: Mapping) -> list[int] | Tensor | None:
    """Units of each sample of input_ids [B, L] for a forward with these inputs; None without images and videos.

    A tensor [B] inside a compiled graph, where the host does not see them.

    Raises ValueError for a batch that leaves open which sample an image or video belongs to.
    """
    images, videos = inputs.get("pixel_values"), inputs.get("pixel_values_videos")
    if images is not None and videos is not None:
        raise ValueError(
            "the batch has images and videos, and layers ahead of the language model are adapted, which cannot tell the rows "
            "of the one from those of the other; pass them in separate batches"
        )
    config = getattr(model, "config", None)
    if videos is not None:
        tokens = _count(input_ids, getattr(config, "video_token_id", None))
        if tokens is None or not any(tokens):  # GLM4V writes its videos with image tokens
            tokens = _count(input_ids, getattr(config, "image_token_id", None))
        # [videos, frames, channels, height, width] are of one size; patches [sum, K] follow the tokens
        return tokens if tokens is None or videos.dim() == 2 else _of_equal_size(videos.shape[0], tokens)
    if images is None:
        return None
    image_token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    sizes = inputs.get("image_sizes")
    if image_token is not None and sizes is None and torch.compiler.is_compiling():
        return (input_ids == image_token).sum(1)
    tokens = _count(input_ids, image_token)
    if tokens is None or sizes is None:
        return tokens
    # The outer model may have a method of that name too, but not the parameter that the packing needs.
    packs = ("pack_image_features", "image_newline")
    packer = next((module for module in model.modules() if all(hasattr(module, name) for name in packs)), None)
    if packer is not None:
        return _tiles(packer, sizes, inputs.get("batch_num_images"), tokens)
    merge = getattr(config, "spatial_merge_size", 1)
    if merge > 1:
        _require_whole(torch.as_tensor(sizes), merge * config.vision_config.patch_size)
    return tokens


def _count(input_ids: Tensor, token: int | None) -> list[int] | None:
    return None if token is None else (input_ids == token).sum(1).tolist()


def _of_equal_size(number: int, tokens: list[int]) -> list[int]:
    each, rest = divmod(sum(tokens), number)
    if not each or rest or any(count % each for count in tokens):
        raise ValueError(f"{number} videos of one size do not explain {tokens} video tokens in {len(tokens)} samples")
    return [count // each for count in tokens]


def _tiles(packer: nn.Module, sizes: Tensor, images_of_sample: Tensor | None, tokens: list[int]) -> list[int]:
    """Tiles of each sample of a model that cuts images into tiles and unpads the tiles' tokens.

    sizes [images, 2]: height and width. Only the model's own functions know its numbers of tiles and tokens; they run on
    the meta device, where one call of them costs no arithmetic.
    """
    count_tiles = vars(inspect.getmodule(packer.pack_image_features))["image_size_to_num_patches"]
    config = packer.config
    side, patch = config.vision_config.image_size, config.vision_config.patch_size
    whole = [True] * len(sizes)
    if images_of_sample is not None:  # a sample with several images has one tile for each
        whole = [int(n) == 1 for n in images_of_sample for _ in range(int(n))]
        if len(whole) != len(sizes):
            raise ValueError(
                f"batch_num_images counts {len(whole)} images, image_sizes has {len(sizes)}; pass both as the model's "
                "processor gives them"
            )
    tiles = [
        count_tiles(size, config.image_grid_pinpoints, side) if cut else 1
        for size, cut in zip(sizes, whole, strict=True)
    ]
    options = {
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "vision_aspect_ratio": getattr(config, "vision_aspect_ratio", None),
    }
    wanted = inspect.signature(packer.pack_image_features).parameters
    packed, _ = packer.pack_image_features(
        [torch.empty(n, (side // patch) ** 2, 1, device="meta") for n in tiles],
        sizes,
        image_newline=torch.empty(1, device="meta"),
        **{name: value for name, value in options.items() if name in wanted},
    )
    return _assigned(tiles, [len(image) for image in packed], tokens)


def _assigned(tiles: list[int], lengths: list[int], tokens: list[int]) -> list[int]:
    """Tiles of each sample: images lie in the order of the samples, and a sample's tokens are those of its images."""
    units, left, sample = [0] * len(tokens), list(tokens), 0
    for number, length in zip(tiles, lengths, strict=True):
        while sample < len(left) and left[sample] == 0:
            sample += 1
        if sample == len(left) or left[sample] < length:
            break
        units[sample] += number
        left[sample] -= length
    if sum(units) != sum(tiles) or any(left):
        raise ValueError(
            f"images of {lengths} tokens do not explain {tokens} image tokens in {len(tokens)} samples; check the images of "
            "the batch"
        )
    return units


def _require_whole(sizes: Tensor, unit: int) -> None:
    if (sizes % unit).any():
        raise ValueError(
            f"image_sizes has {sizes.tolist()}, not all multiples of {unit}, so that numbers of patches and image tokens "
            "do not go together; prepare the images with the model's processor"
        )
