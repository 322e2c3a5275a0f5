"""What a merge, a copy of a saved module or a disabled adapter may not change without a word."""

import pytest
import torch
import transformers
from support.habits import (
    IMAGE,
    TEXT,
    adapted,
    assert_close,
    ids,
    llama,
    llava,
    llava_batch,
    logits,
    mlp,
    of_task,
    output,
    sample,
)
from torch import nn
from torch.nn.utils import parametrizations, prune, spectral_norm

from lilora import hotswap
from lilora.errors import UserError
from lilora_kernels import LiLoRALinear
from lilora_kernels.routing.context import AHEAD
from lilora_kernels.routing.placement import places, sees_images

pytestmark = pytest.mark.filterwarnings("ignore:Adapter name:UserWarning", "ignore:.*weight_norm:FutureWarning")


# --- merging --------------------------------------------------------------------------------------------------------------


class Twice(nn.Module):
    """One linear layer in two places, of which one is adapted."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(7, 9), nn.Linear(9, 9)
        self.third = self.second

    def forward(self, x):
        return self.third(torch.tanh(self.second(torch.tanh(self.first(x)))))


def test_a_layer_that_lies_in_two_places_is_not_merged():
    model = adapted(base=Twice().double(), target_modules=["second"])
    assert isinstance(model.get_base_model().third, nn.Linear)
    with pytest.raises(UserError, match="second and third share one weight"):
        model.merge_adapter()


class Repeated(nn.Module):
    """A block that runs twice, adapted in both places by one adapter."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"inner": nn.Linear(7, 7)})] * 2)

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block["inner"](x))
        return x


def test_a_block_that_runs_twice_is_merged():
    model, x = adapted(base=Repeated().double(), target_modules=["inner"]), torch.randn(3, 7, dtype=torch.float64)
    before = output(model, {"x": x})
    model.merge_adapter()
    assert_close(output(model, {"x": x}), before)


DERIVED = {
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": spectral_norm,
    "parametrized": parametrizations.weight_norm,
}


@pytest.mark.parametrize("kind", DERIVED)
def test_a_weight_that_is_made_anew_in_every_forward_is_not_merged(kind):
    base = mlp()
    DERIVED[kind](base.second)
    model = adapted(base=base, target_modules=["first", "second"])
    x = torch.randn(3, 7, dtype=torch.float64)
    before = output(model, {"x": x})
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match="second: the base weight is made anew in every forward"):
            merge()
        assert_close(output(model, {"x": x}), before)


def test_a_plain_layer_is_not_merged_into_such_a_weight():
    layer = LiLoRALinear(prune.l1_unstructured(nn.Linear(8, 8), "weight", 0.5), r=2)
    layer.add_task("a")
    with pytest.raises(RuntimeError, match="is made anew in every forward"):
        layer.merge("a")
    assert layer.merged_task is None


def test_a_merge_between_a_forward_and_its_backward_raises():
    model = adapted(base=mlp(), target_modules=["first", "second"])
    loss = model(torch.randn(3, 7, dtype=torch.float64)).square().sum()
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("targets", [["up_proj"], ["q_proj", "v_proj"]], ids=str)
def test_a_backward_with_adapters_disabled_raises(targets):
    """PEFT turns all their gradients off, so it would leave none."""
    model, x = adapted(target_modules=targets), ids()
    loss = model(input_ids=x, labels=x).loss
    with model.disable_adapter(), pytest.raises(RuntimeError, match="or adapters were disabled"):
        loss.backward()
    loss = model(input_ids=x, labels=x).loss
    with model.disable_adapter():
        logits(model, x)  # as a reference is asked
    loss.backward()
    assert any(p.grad is not None and p.grad.any() for name, p in model.named_parameters() if "lilora_U.a" in name)


# --- modules_to_save --------------------------------------------------------------------------------------------------------


def with_projectors():
    model = adapted(base=llava(), modules_to_save=["linear_1", "linear_2"])
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.normal_(std=0.5)
    return model


@pytest.mark.parametrize("images", [(1, 1, 1), (2, 0, 1), (0, 3, 0)], ids=str)
def test_a_projector_s_copy_runs_the_images_of_its_task(images):
    torch.manual_seed(0)
    model, batch, names = with_projectors(), llava_batch(images), ["a", "b", "b"]
    mixed = output(model, batch, task_ids=names)
    for i, name in enumerate(names):
        assert_close(mixed[i : i + 1], of_task(model, name, sample(batch, i)))


@pytest.mark.parametrize("images", [(1, 1, 1), (2, 0, 1)], ids=str)
def test_a_head_behind_a_model_that_sees_images_has_its_samples(images):
    torch.manual_seed(0)
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.Gemma3Config(
        text_config=TEXT | {"head_dim": 8, "num_labels": 3},
        vision_config=vision | {"image_size": 8, "patch_size": 4},
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
    )
    base = transformers.Gemma3ForSequenceClassification(config).double().eval()
    base.config.pad_token_id = base.config.text_config.pad_token_id = 0
    model = adapted(base=base, target_modules=r".*language_model.*q_proj", modules_to_save=["score"])
    for name, parameter in model.named_parameters():
        if "modules_to_save" in name:
            parameter.data.normal_()
    batch, names = llava_batch(images), ["a", "b", "b"]
    mixed = output(model, batch, task_ids=names)
    for i, name in enumerate(names):
        assert_close(mixed[i : i + 1], of_task(model, name, sample(batch, i)))


def test_a_tower_that_gets_features_itself_is_not_what_sees_the_images():
    """Around the decoder is what counts: a projector beside such a tower is ahead of the text all the same."""
    base = llava()
    base.model.vision_tower.get_image_features = lambda *_: None
    assert sees_images(base) is base.model
    assert places(base, ["model.multi_modal_projector.linear_1"]) == {"model.multi_modal_projector.linear_1": AHEAD}
    model = adapted(base=base, modules_to_save=["linear_1", "linear_2"])
    batch = llava_batch((2, 0, 1))
    assert_close(output(model, batch, task_ids=["b"] * 3), of_task(model, "b", batch))
    hooks = model.get_base_model().model.multi_modal_projector.linear_1._forward_pre_hooks.values()
    assert [hook.args[2] for hook in hooks] == [AHEAD]


def test_its_gradients_are_those_of_its_own_images():
    torch.manual_seed(0)
    model, batch, names = with_projectors(), llava_batch((2, 0, 1)), ["a", "b", "b"]
    model.set_adapter(["a", "b"])
    saved = {name: p for name, p in model.named_parameters() if "modules_to_save" in name and p.requires_grad}
    assert len(saved) == 8
    mixed = torch.autograd.grad(model(**batch, task_ids=names).logits.square().sum(), [*saved.values()])
    alone = [torch.zeros_like(p) for p in saved.values()]
    for i, name in enumerate(names):
        y = model(**sample(batch, i), task_ids=[name]).logits.square().sum()
        for total, grad in zip(alone, torch.autograd.grad(y, [*saved.values()], allow_unused=True), strict=True):
            total += 0 if grad is None else grad
    for got, wanted in zip(mixed, alone, strict=True):
        assert_close(got, wanted)


def test_batches_of_one_task_have_any_number_of_images():
    model, batch = with_projectors(), llava_batch((2, 0, 0))
    assert_close(output(model, batch, task_ids=["b"] * 3), of_task(model, "b", batch))


def test_a_copy_sees_no_rows_of_several_tasks_together():
    model, x = adapted(base=llama(), modules_to_save=["lm_head"]), ids()
    with pytest.raises(UserError, match="sees rows of several tasks together"):
        logits(model, x, task_ids=[["a", "b", "a", "b", "a"]] * 3)


def test_a_hotswap_takes_the_saved_modules_along(tmp_path):
    model, x = adapted(base=llama(), modules_to_save=["lm_head"]), ids()
    before = of_task(model, "a", x)
    model.save_pretrained(tmp_path)
    wanted = of_task(model, "b", x)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("lilora_U.b", "modules_to_save.b.weight")):
                parameter.normal_()
    assert not torch.allclose(of_task(model, "b", x), wanted)
    hotswap(model, tmp_path / "b", "b")
    assert_close(of_task(model, "b", x), wanted)
    assert_close(of_task(model, "a", x), before)
