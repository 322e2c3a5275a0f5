"""Which sample an image or a video belongs to, where numbers of rows alone do not say: right, or refused."""

from dataclasses import replace

import pytest
import torch
from support.families import adapted, alone, base, batch, rows_are_those_of_single_tasks, with_tasks
from support.family_configs import IMAGE, VIDEO
from support.packings import by_shapes, gridded

NAMES = ["count", "where"]


@pytest.fixture
def model(request):
    return adapted(request.param, "projector")


def forward(model, inputs):
    with torch.no_grad():
        return model(**inputs, task_ids=NAMES).logits


@pytest.mark.parametrize("name, model", [("llava_next", "llava_next")], indirect=["model"])
def test_tiles_that_make_other_numbers_of_tokens_in_other_samples(name, model):
    """As many rows as image tokens in all, 44, but 20 rows and 24 tokens in one sample, 24 and 20 in the other."""
    samples = batch(name, [[0], [1, 1]])
    inputs = samples.inputs()
    tokens = (inputs["input_ids"] == IMAGE).sum(1)
    rows = []
    layer = model.get_submodule("base_model.model.model.multi_modal_projector.linear_1")
    hook = layer.register_forward_hook(lambda layer, args, y: rows.append(args[0].shape[:2].numel()))
    forward(model, inputs)
    hook.remove()
    assert rows == [tokens.sum()] == [44]
    assert tokens.tolist() == [24, 20]
    rows_are_those_of_single_tasks(model, samples, NAMES)


@pytest.mark.parametrize("images", [[[0, 1], [2]], [[0], [1]], [[], [1]], [[0, 1, 2], []]], ids=str)
@pytest.mark.parametrize("name, model", [(n, n) for n in ("llava_next", "llava_onevision")], indirect=["model"])
def test_tiles_of_unpadded_images(name, model, images):
    rows_are_those_of_single_tasks(model, batch(name, images), NAMES)


@pytest.mark.parametrize("model", ["llava_next"], indirect=True)
def test_images_that_do_not_fill_their_samples_raise(model):
    inputs = batch("llava_next", [[0], [1]]).inputs()
    inputs["input_ids"] = inputs["input_ids"].flip(0)
    with pytest.raises(
        ValueError, match=r"images of \[24, 10\] tokens do not explain \[10, 24\] image tokens in 2 samples"
    ):
        forward(model, inputs)


@pytest.mark.parametrize("model", ["llava_onevision"], indirect=True)
def test_counts_of_images_that_are_not_those_of_the_sizes_raise(model):
    inputs = batch("llava_onevision", [[0], [1]]).inputs() | {"batch_num_images": torch.tensor([1, 2])}
    with pytest.raises(ValueError, match="batch_num_images counts 3 images, image_sizes has 2"):
        forward(model, inputs)


@pytest.mark.parametrize("model", ["mistral3"], indirect=True)
def test_sizes_that_make_patches_without_tokens_raise(model):
    inputs = batch("mistral3", [[0], [1]]).inputs()
    inputs["image_sizes"][1] = torch.tensor([12, 8])
    with pytest.raises(ValueError, match=r"image_sizes has \[\[16, 8\], \[12, 8\]\], not all multiples of 8"):
        forward(model, inputs)


@pytest.mark.parametrize("name, model", [(n, n) for n in ("llava_next", "qwen2_5_vl")], indirect=["model"])
def test_beams_and_returned_sequences_follow_their_samples(name, model):
    samples = batch(name, [[0, 1], [2]])
    options = {"max_new_tokens": 3, "num_beams": 2, "num_return_sequences": 2, "do_sample": False}
    got = model.generate(**samples.inputs(), task_ids=NAMES, **options)
    wanted = [alone(model, samples, i, n, lambda x: [model.generate(**x, **options)]) for i, n in enumerate(NAMES)]
    assert torch.equal(got, torch.cat(wanted))


# --- videos -----------------------------------------------------------------------------------------------------------


VIDEOS = [[[0], [1]], [[1, 2], []], [[], [2]]]


@pytest.mark.parametrize("videos", VIDEOS, ids=str)
@pytest.mark.parametrize("name, model", [(n, n) for n in ("qwen2_vl", "qwen2_5_vl")], indirect=["model"])
def test_videos_of_patches(name, model, videos):
    rows_are_those_of_single_tasks(model, batch(name, videos, gridded("video", frames=2), VIDEO), NAMES)


@pytest.mark.parametrize("videos", VIDEOS, ids=str)
@pytest.mark.parametrize("model", ["glm4v"], indirect=True)
def test_videos_written_with_image_tokens(model, videos):
    """As GLM4V's processor does it: the type of a token, not its id, says that it belongs to a video."""
    samples = batch("glm4v", videos, gridded("video"))
    samples.family = replace(samples.family, beside=lambda ids: {"mm_token_type_ids": 2 * (ids == IMAGE).int()})
    rows_are_those_of_single_tasks(model, samples, NAMES)


@pytest.mark.parametrize("model", ["llava_onevision"], indirect=True)
def test_videos_of_frames(model):
    """The projector sees 4 rows a frame, of which one token is left, and a line end for each video."""
    inputs = batch("llava_onevision", [[], []]).inputs()
    videos = torch.randn(3, 2, 3, 8, 8).double()
    inputs["input_ids"] = torch.randint(3, 30, (2, 12))
    inputs["input_ids"][0, 1:4] = VIDEO
    inputs["input_ids"][1, [1, 2, 3, 6, 7, 8]] = VIDEO
    inputs["attention_mask"] = torch.ones(2, 12, dtype=torch.long)
    model.base_model.model.config.video_token_id = VIDEO
    got = forward(model, inputs | {"pixel_values_videos": videos})
    for i, own in enumerate((videos[:1], videos[1:])):
        model.set_adapter(NAMES[i])
        one = {key: inputs[key][i : i + 1] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            wanted = model(**one, pixel_values_videos=own).logits
        torch.testing.assert_close(got[i : i + 1], wanted, rtol=1e-9, atol=1e-9)
    model.set_adapter("read")
    inputs["input_ids"][1, 1] = 5
    with pytest.raises(ValueError, match=r"3 videos of one size do not explain \[3, 5\] video tokens in 2 samples"):
        forward(model, inputs | {"pixel_values_videos": videos})


@pytest.mark.parametrize("model", ["qwen2_vl"], indirect=True)
def test_images_and_videos_in_one_batch_are_refused(model):
    images, videos = batch("qwen2_vl", [[0], []]), batch("qwen2_vl", [[], [1]], gridded("video"), VIDEO)
    _, pixels = videos.packing.pack(videos.pictures)
    with pytest.raises(ValueError, match=r"has images and videos.*pass them in separate batches"):
        forward(model, images.inputs() | pixels)


# --- images padded to one number of patches ---------------------------------------------------------------------------


def padded(name, target):
    return with_tasks(base(name), target)


@pytest.mark.parametrize("name, target", [("gemma4", "all-linear"), ("lfm2_vl", ["q_proj", "v_proj"])])
def test_images_padded_to_equal_patches(name, target):
    """Images of 6 and of 2 tokens, all of 24 patches: rows do not follow the tokens."""
    model = padded(name, target)
    for images in ([[0], [1]], [[1, 0], [1]], [[1, 1, 1], [0]]):
        rows_are_those_of_single_tasks(model, batch(name, images), NAMES)


def test_images_without_a_token_between_them_are_told_by_their_patches():
    model = padded("lfm2_vl", ["q_proj", "v_proj"])
    ids = torch.randint(3, 30, (2, 10))
    ids[0, 1:5], ids[1, 1:5] = IMAGE, IMAGE  # two images of 2 tokens, and one of 4
    grids, pixels = [(2, 4), (2, 4), (4, 4)], torch.randn(3, 24, 48).double()
    got = forward(model, {"input_ids": ids, "pixel_values": pixels} | by_shapes(grids))
    for i, images in enumerate((slice(0, 2), slice(2, 3))):
        one = {"input_ids": ids[i : i + 1], "pixel_values": pixels[images]} | by_shapes(grids[images])
        with torch.no_grad():
            wanted = model(**one, task_ids=NAMES[i : i + 1]).logits
        torch.testing.assert_close(got[i : i + 1], wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(
    "grids, why",
    [
        ([(2, 4), (4, 4), (2, 4)], r"images of \[2, 4, 2\] tokens do not explain \[4, 4\] image tokens"),
        ([(1, 5), (3, 3), (1, 4)], r"3 images padded to one size do not explain \[1, 1\] runs of image tokens"),
    ],
    ids=["patches", "runs"],
)
def test_padded_images_that_do_not_fill_their_samples_are_refused(grids, why):
    model = padded("lfm2_vl", ["q_proj", "v_proj"])
    ids = torch.randint(3, 30, (2, 10))
    ids[0, 1:5], ids[1, 1:5] = IMAGE, IMAGE
    with pytest.raises(ValueError, match=rf"q_proj.*{why}"):
        forward(model, {"input_ids": ids, "pixel_values": torch.randn(3, 24, 48).double()} | by_shapes(grids))


def test_a_projector_that_runs_once_for_each_image_is_refused():
    model = padded("lfm2_vl", r".*multi_modal_projector\.linear_\d")
    ids = torch.randint(3, 30, (2, 10))
    ids[0, 1:7], ids[1, 1:3] = IMAGE, IMAGE
    inputs = {"input_ids": ids, "pixel_values": torch.randn(2, 24, 48).double()} | by_shapes([(4, 6), (2, 4)])
    with pytest.raises(ValueError, match=r"multi_modal_projector\.linear_1.*pass batches of one task"):
        forward(model, inputs)
    with torch.no_grad():
        model(**inputs, task_ids=["count", "count"])
