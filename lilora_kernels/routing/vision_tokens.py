"""Whose images: which rows ahead of the language model belong to which sample, counted from what a batch says.

Nothing here is guessed from a product that happens to come out even. Images lie in the order of the samples; how many a
sample has follows from its image tokens and what the family's processor says of sizes.
"""

import inspect
from collections.abc import Callable, Mapping, Sequence
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor, nn

# Arguments that hold tokens, or say something of them: they are one row of each sample.
TEXT_INPUTS = {
    *("input_ids", "inputs_embeds", "position_ids", "token_type_ids", "mm_token_type_ids", "labels"),
    *(
        "decoder_input_ids",
        "decoder_inputs_embeds",
        "decoder_attention_mask",
        "decoder_position_ids",
        "past_key_values",
    ),
    *("cache_position", "logits_to_keep", "num_items_in_batch", "rope_deltas", "shift_labels", "moe_mm_token_type_ids"),
    *("inputs", "encoder_outputs", "negative_prompt_ids", "qformer_input_ids"),
}
# Of images and videos, as processors name what is counted below.
IMAGE_INPUTS = {
    "pixel_values",
    "pixel_values_images",
    "image_sizes",
    "image_grid_thw",
    "image_merge_sizes",
    "batch_num_images",
}
PADDED_INPUTS = {"spatial_shapes", "image_position_ids"}  # pixel_values [images, most patches, K]
VIDEO_INPUTS = {"pixel_values_videos", "video_grid_thw", "video_merge_sizes", "second_per_grid_ts"}
KNOWN_INPUTS = TEXT_INPUTS | IMAGE_INPUTS | PADDED_INPUTS | VIDEO_INPUTS


class VisionTokens(NamedTuple):
    """Of each sample: `images`, which rows [images, n, K] belong to; `packed`, which rows [sum, K] are in proportion to.

    None where rows of that kind cannot be told apart. exact: as many packed rows as `packed` says, no multiple.
    """

    images: list[int] | None
    packed: list[int] | None
    exact: bool = False

    def of(self, shape: Sequence[int]) -> list[int] | None:
        """Rows of each sample where a layer sees rows of this shape (without features); None if that is not known."""
        rows = prod(shape)
        if len(shape) > 1 and self.images is not None:
            each, rest = divmod(rows, max(1, sum(self.images)))
            return [n * each for n in self.images] if sum(self.images) == shape[0] and not rest else None
        if self.packed is None or (len(shape) > 1 and shape[0] != 1):
            return None
        each, rest = divmod(rows, max(1, sum(self.packed)))
        return (
            None
            if rest or each * sum(self.packed) != rows or (self.exact and each != 1)
            else [n * each for n in self.packed]
        )


# What a family's batches hold, by config.model_type.
VisionTokensOf = Callable[[Tensor, Mapping], "VisionTokens | Sequence[int]"]
_TOLD: dict[str, VisionTokensOf] = {}


def tell_vision_tokens(model_type: str, count: VisionTokensOf | None) -> None:
    """Let `count` say the image tokens of each sample of this family's batches; None: the batch alone says them.

    count(input_ids [B, L], inputs): `inputs` are the arguments of the model's forward by name. It returns B numbers of tokens,
    where all images have the same number of them, else a `VisionTokens`; images lie in the order of the samples.
    """
    if count is None:
        _TOLD.pop(model_type, None)
    else:
        _TOLD[model_type] = count


def tells_vision_tokens(model: nn.Module) -> bool:
    """Whether `tell_vision_tokens` was called for this model's family."""
    return getattr(getattr(model, "config", None), "model_type", None) in _TOLD


def _told(model: nn.Module, input_ids: Tensor, inputs: Mapping) -> "VisionTokens | list[int]":
    found = _TOLD[model.config.model_type](input_ids, inputs)
    parts = found[:2] if isinstance(found, VisionTokens) else [found]
    for numbers in parts:
        if numbers is not None and (len(numbers) != len(input_ids) or min(numbers, default=0) < 0):
            raise ValueError(
                f"vision_tokens of model type {model.config.model_type!r} returned {found}; it must return "
                f"{len(input_ids)} numbers, the image tokens of each sample"
            )
    return found if isinstance(found, VisionTokens) else [int(number) for number in found]


def of_equal_size(tokens: list[int], shape: Sequence[int]) -> list[int] | None:
    """`VisionTokens.of` for images or tiles that all have the same number of tokens."""
    images = None
    if len(shape) > 1 and shape[0] > 1:
        each, rest = divmod(sum(tokens), shape[0])
        if not each or rest or any(count % each for count in tokens):
            return None
        images = [count // each for count in tokens]
    return VisionTokens(images, tokens).of(shape)


def contents(names: Mapping[str, object]) -> set[str]:
    """Those of a forward's arguments that hold values and are neither text nor masks."""
    return {
        name for name, value in names.items() if name not in TEXT_INPUTS and "mask" not in name and _holds_values(value)
    }


def _holds_values(value: object) -> bool:
    if isinstance(value, Mapping):
        return any(map(_holds_values, value.values()))
    if isinstance(value, list | tuple):
        return any(map(_holds_values, value))
    return isinstance(value, Tensor) or hasattr(value, "__array_interface__")


def vision_tokens_of_batch(
    model: nn.Module, input_ids: Tensor, inputs: Mapping
) -> "VisionTokens | list[int] | Tensor | None":
    """Of each sample of input_ids [B, L] in a forward with these inputs; None without images and videos.

    Tokens of each, where all images or tiles have the same number of them: a list, or inside a compiled graph, where the
    host does not see them, a tensor [B].

    Raises ValueError for a batch that leaves open which sample an image or video belongs to.
    """
    if tells_vision_tokens(model):
        return _told(model, input_ids, inputs)
    found = (inputs.get(name) for name in ("pixel_values", "pixel_values_images"))  # Video-LLaVA's name is the second
    images, videos = next((x for x in found if x is not None), None), inputs.get("pixel_values_videos")
    if images is not None and videos is not None:
        raise ValueError(
            "the batch has images and videos, and layers ahead of the language model are adapted, which cannot tell the rows "
            "of the one from those of the other; pass them in separate batches"
        )
    if unknown := contents(inputs) - KNOWN_INPUTS:
        raise ValueError(
            f"whose the rows of {', '.join(sorted(unknown))} are is not known; adapt layers of the decoder only, or pass "
            "batches of one task"
        )
    config = getattr(model, "config", None)
    if videos is not None:
        token = getattr(config, "video_token_id", None)
        tokens = _count(input_ids, token)
        if tokens is None or not any(tokens):  # GLM4V writes its videos with image tokens
            tokens = _count(input_ids, getattr(config, "image_token_id", None))
        if tokens is None:
            return None
        if videos.dim() == 2 or inputs.get("video_grid_thw") is not None:
            return _of_grids(inputs.get("video_grid_thw"), tokens, "video_grid_thw")
        # [videos, frames, channels, height, width] are of one size
        number = _of_number(videos.shape[0], tokens, "videos")
        frames = videos.shape[1:-3].numel()
        return VisionTokens([count * frames for count in number], number)
    if images is None:
        return None
    image_token = getattr(config, "image_token_id", None) or getattr(config, "image_token_index", None)
    given = {name for name in IMAGE_INPUTS | PADDED_INPUTS if inputs.get(name) is not None}
    in_graph = (
        torch.compiler.is_compiling()
        and images.dim() != 3
        and given <= {"pixel_values", "pixel_values_images", "image_grid_thw"}
    )
    if image_token is not None and in_graph:
        return (input_ids == image_token).sum(1)
    tokens = _count(input_ids, image_token)
    if tokens is None:
        return None
    if images.dim() == 2 or inputs.get("image_grid_thw") is not None:
        return _of_grids(inputs.get("image_grid_thw"), tokens, "image_grid_thw")
    if images.dim() == 3:  # padded to the patches of the largest
        return _of_padded(images.shape[0], input_ids == image_token, inputs)
    sizes = inputs.get("image_sizes")
    if sizes is None:
        if images.dim() > 4:  # [samples, most tiles, ...]: how many are tiles and not padding, the model finds out
            return tokens
        return VisionTokens(_of_number(images.shape[0], tokens, "images"), tokens)
    # The outer model may have a method of that name too, but not the parameter that the packing needs.
    packs = ("pack_image_features", "image_newline")
    packer = next((module for module in model.modules() if all(hasattr(module, name) for name in packs)), None)
    if packer is not None:
        tiles = _tiles(packer, sizes, inputs.get("batch_num_images"), tokens)
        return VisionTokens(tiles, tiles)
    patch = getattr(getattr(config, "vision_config", None), "patch_size", None)
    if not isinstance(patch, int):
        raise ValueError(
            f"how many tokens {type(model).__name__} makes of an image of image_sizes is not known; adapt layers of the decoder "
            "only, or pass batches of one task"
        )
    unit, sizes = getattr(config, "spatial_merge_size", 1) * patch, torch.as_tensor(sizes)
    if unit > patch:
        _require_whole(sizes, unit)
    lengths = (sizes // unit).prod(-1).tolist()
    return VisionTokens(None, _assigned(lengths, lengths, tokens))


def _count(input_ids: Tensor, token: int | None) -> list[int] | None:
    return None if token is None else (input_ids == token).sum(1).tolist()


def _of_padded(number: int, image: Tensor, inputs: Mapping) -> VisionTokens:
    """Of so many images, all padded to the patches of the largest; image: [B, L] bool, where image tokens are.

    By their true patches, where every token is of the same number of them; else each run of image tokens is an image.
    """
    tokens = image.sum(1).tolist()
    patches = [0]
    if inputs.get("spatial_shapes") is not None:
        patches = torch.as_tensor(inputs["spatial_shapes"]).prod(-1).tolist()
    elif inputs.get("image_position_ids") is not None:
        patches = (inputs["image_position_ids"] >= 0).all(-1).sum(-1).tolist()
    each = max(1, sum(patches) // max(1, sum(tokens)))
    if sum(patches) == each * sum(tokens) and not any(count % each for count in patches):
        return VisionTokens(_assigned([1] * number, [count // each for count in patches], tokens), tokens, exact=True)
    runs = (image[:, :1].sum(1) + (image[:, 1:] & ~image[:, :-1]).sum(1)).tolist()
    if sum(runs) != number:
        raise ValueError(
            f"{number} images padded to one size do not explain {runs} runs of image tokens in {len(runs)} samples; part the "
            "images by a token, or pass batches of one task"
        )
    return VisionTokens(runs, tokens, exact=True)


def _of_number(number: int, tokens: list[int], what: str) -> list[int]:
    """Of so many images or videos of one size, those of each sample."""
    each, rest = divmod(sum(tokens), number) if number else (0, 1)
    if not each or rest or any(count % each for count in tokens):
        raise ValueError(
            f"{number} {what} of one size do not explain {tokens} {what.removesuffix('s')} tokens in {len(tokens)} samples"
        )
    return [count // each for count in tokens]


def _of_grids(grids: Tensor | None, tokens: list[int], name: str) -> VisionTokens:
    """Of patches [sum, K] and their grids [images, 3], where every token is of the same number of patches."""
    if grids is None:
        raise ValueError(f"the batch has patches without {name}; pass both as the model's processor gives them")
    patches = torch.as_tensor(grids).prod(-1).tolist()
    each = max(1, sum(patches) // max(1, sum(tokens)))
    _assigned(patches, [count // each for count in patches], tokens)
    return VisionTokens(None, tokens)


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
    found, left, sample = [0] * len(tokens), list(tokens), 0
    for number, length in zip(tiles, lengths, strict=True):
        while sample < len(left) and left[sample] == 0:
            sample += 1
        if sample == len(left) or left[sample] < length:
            break
        found[sample] += number
        left[sample] -= length
    if sum(found) != sum(tiles) or any(left):
        raise ValueError(
            f"images of {lengths} tokens do not explain {tokens} image tokens in {len(tokens)} samples; check the images of "
            "the batch"
        )
    return found


def _require_whole(sizes: Tensor, unit: int) -> None:
    if (sizes % unit).any():
        raise ValueError(
            f"image_sizes has {sizes.tolist()}, not all multiples of {unit}, so that numbers of patches and image tokens "
            "do not go together; prepare the images with the model's processor"
        )
