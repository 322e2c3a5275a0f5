"""A decode step never waits for the device. On the meta device, which has no values, whatever reads one raises."""

from contextlib import nullcontext

import pytest
import torch
from support.counting import Operations
from support.tiny_llava import TASKS, tiny_llava
from torch import nn
from torch.utils._pytree import tree_leaves
from transformers import DynamicCache

from lilora.methods.pclr.pool import GateRule, Query, RankPool
from lilora_kernels import LiLoRALinear, fuse_mlps, route, set_task
from lilora_kernels.layers.rank_pool import RankPoolLinear


class OnDevice(Operations):
    """Runs the bodies of our operations as an accelerator without kernels would; no operation may copy from or to the host."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = super().__torch_dispatch__(operation, types, args, kwargs)
        places = {t.device.type for t in tree_leaves((args, kwargs, result)) if isinstance(t, torch.Tensor)}
        assert len(places) <= 1, f"{operation} copies between {places}"
        return result


@pytest.fixture(scope="module")
def model():
    return tiny_llava(dropout=0.1).to("meta")


def ids(*shape, dtype=torch.long):
    return torch.zeros(shape, dtype=dtype, device="meta")


def counted(step):
    step()  # fills what is kept between steps
    with OnDevice() as found:
        step()
    assert found.seen["sigmoid"] > 0  # the bodies of our operations ran
    return dict(found.ours)


@pytest.mark.parametrize("how", ["plain", "fused", "deleted"])
@pytest.mark.parametrize("mixed", [False, True], ids=["active", "mixed"])
def test_a_decode_step(model, mixed, how):
    if how == "deleted":  # ids and places in the bank differ
        model = tiny_llava().to("meta")
        for layer in [m for m in model.modules() if isinstance(m, LiLoRALinear)]:
            layer.delete_task("count")
    if how == "fused":
        model = tiny_llava().to("meta")
        fuse_mlps(model)
    set_task(model.eval(), "where", train=False)
    cache = DynamicCache(config=model.config.text_config)
    options = {"task_ids": ids(3, dtype=torch.int32)} if mixed else {}
    with torch.no_grad():
        model(input_ids=ids(3, 5), past_key_values=cache, **options)
        ours = counted(lambda: model(input_ids=ids(3, 1), past_key_values=cache, **options))
    assert ours == ({"delta_pair": 2, "linear": 2} if how == "fused" else {"linear": 6})


@pytest.mark.parametrize("mixed", [False, True], ids=["active", "mixed"])
def test_a_training_step(model, mixed):
    """Of an MLP: for the mask of a model's training forward transformers reads the positions on the host."""
    set_task(model.train(), *(TASKS if mixed else ["where"]))
    mlp, x = model.model.language_model.layers[0].mlp, torch.randn(3, 5, 24, device="meta", requires_grad=True)

    def step():
        with route(model, ids(3, dtype=torch.int32)) if mixed else nullcontext():
            mlp(x).sum().backward()

    assert counted(step) == {"linear": 3, "linear_backward": 3}


@pytest.mark.parametrize("value", ["score", "binary"])
def test_a_decode_step_with_a_pool_of_ranks(value):
    pool = RankPool(GateRule(rank=3, value=value), 8, 4).eval()
    pool.put("old", torch.randn(6, 8), torch.randn(6, 4), train=False)
    query, rows = Query(ids(2, 8).float(), ids(2, 4).float()), ids(2, dtype=torch.int32)
    layer = RankPoolLinear(nn.Linear(12, 16), lambda layer, x: (pool.choose(query), rows))
    layer.put("old", torch.randn(6, 12), torch.randn(16, 6), train=False)
    for module in (pool, layer):
        module.to("meta")
    with torch.no_grad(), OnDevice() as found:
        assert layer(torch.randn(2, 12, device="meta")).shape == (2, 16)
    assert dict(found.ours) == {"rank_gate": 1, "linear": 1}


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: bool(x.any()),
        lambda x: x.nonzero(),
        lambda x: x.cpu(),
        lambda x: x.new_tensor([1]) + torch.tensor(2),
    ],
)
def test_what_waits_would_be_seen(read):
    x = ids(3)
    with pytest.raises((NotImplementedError, RuntimeError, AssertionError)), OnDevice():
        read(x)
