"""Fused MLPs in a model adapted through PEFT: adapters on, off, switched, merged and unloaded."""

import pytest
import torch
from support.habits import adapted, assert_close, ids, logits

from lilora_kernels import fuse_mlps
from lilora_kernels.layers.mlp import is_fused

pytestmark = [
    pytest.mark.filterwarnings("ignore:Adapter name:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*checkpointing:FutureWarning"),
]


def test_every_state_computes_what_it_did_apart():
    model, x = adapted(), ids()
    with model.disable_adapter():
        base = logits(model, x)
    wanted = {task: (model.set_adapter(task), logits(model, x))[1] for task in ("a", "b")}
    mixed = logits(model, x, adapter_names=["a", "__base__", "b"])
    keys = model.state_dict().keys()
    assert fuse_mlps(model) == {f"base_model.model.model.layers.{i}.mlp": None for i in range(2)}
    assert model.state_dict().keys() == keys
    for task, want in wanted.items():
        model.set_adapter(task)
        assert_close(logits(model, x), want)
        with model.disable_adapter():
            assert torch.equal(logits(model, x), base)
        model.merge_adapter()
        assert_close(logits(model, x), want)
        model.unmerge_adapter()
    assert_close(logits(model, x, adapter_names=["a", "__base__", "b"]), mixed)
    unloaded = model.unload()
    assert not any(is_fused(module) for module in unloaded.modules())
    assert_close(logits(unloaded, x), base)
