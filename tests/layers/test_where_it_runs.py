"""Around the layers: torch.export, tensor and pipeline parallelism, MLPs that others have patched. docs/where-it-runs.md."""

import copy
import io
import types

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import lilora_kernels
from lilora_kernels import LiLoRALinear, RankPoolLinear
from lilora_kernels.layers.rank_pool import Choice

K, N, OUT = 24, 20, 5
IDS, OTHER_IDS = torch.tensor([0, 1, -1, 0]), torch.tensor([1, 0, 1, -1])


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (LiLoRALinear(nn.Linear(*size), r=8, dropout=0.0) for size in ((K, N), (N, OUT)))

    def forward(self, x):
        return self.second(self.first(x).relu())


def adapted(model):
    for layer in model.modules():
        if isinstance(layer, LiLoRALinear):
            for task in ("a", "b"):
                layer.add_task(task)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".lilora_" in name or name.startswith("lilora_"):
                parameter.normal_(std=0.4)
    lilora_kernels.attach(model)
    return model.double().eval()


@pytest.fixture
def model():
    return adapted(Model())


@pytest.fixture
def x():
    return torch.randn(4, K, dtype=torch.float64)


@pytest.fixture
def one_process():
    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


# --- torch.export -------------------------------------------------------------------------------------------------------


def test_an_exported_model_computes_what_it_did(model, x):
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (x,), {"task_ids": IDS}).module()
    for ids in (IDS, OTHER_IDS):
        torch.testing.assert_close(exported(x, task_ids=ids), model(x, task_ids=ids))
    active = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch.export.save(active, file := io.BytesIO())
    file.seek(0)
    more = torch.cat([x, x])
    torch.testing.assert_close(torch.export.load(file).module()(more), model(more))
    merged = copy.deepcopy(model)
    for layer in (merged.first, merged.second):
        layer.merge("b")
    for layer in (model.first, model.second):
        layer.set_task("b")
    exported = torch.export.export(merged, (x,)).module()
    torch.testing.assert_close(exported(x), model(x))
    assert not any("lilora" in str(node.target) for node in exported.graph.nodes if node.op == "call_function")


def test_names_are_constants_of_an_exported_model(model, x):
    exported = torch.export.export(model, (x,), {"task_ids": ["a", "b", None, "a"]}).module()
    torch.testing.assert_close(exported(x, task_ids=["a", "b", None, "a"]), model(x, task_ids=IDS))
    with pytest.raises(AssertionError, match="Guard failed"):
        exported(x, task_ids=["b", "b", None, "a"])


# --- parallelism --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [LiLoRALinear, RankPoolLinear])
def test_a_base_split_by_tensor_parallelism_is_refused(kind, one_process, x):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

    base = parallelize_module(nn.Linear(K, N).double(), init_device_mesh("cpu", (1,)), ColwiseParallel())
    if kind is LiLoRALinear:
        layer = LiLoRALinear(base, r=8)
        layer.add_task("a")
    else:
        layer = RankPoolLinear(base, lambda layer, x: (Choice(((("part",), None),)), None))
        layer.put("part", torch.ones(2, K), torch.ones(N, 2), train=False)
    with pytest.raises(RuntimeError, match=r"a layer: the base weight is a DTensor, .* load the model without tp_plan"):
        layer(x)


def test_a_pipeline_stage_takes_ids_as_a_tensor(model, x, one_process):
    from torch.distributed.pipelining import PipelineStage, ScheduleGPipe

    def halves(task_ids):
        return ScheduleGPipe(PipelineStage(model, 0, 1, torch.device("cpu")), 2).step(x, task_ids=task_ids)

    torch.testing.assert_close(halves(IDS), model(x, task_ids=IDS))
    with pytest.raises(ValueError, match=r"task_ids has the shape \[4\]; it must be \[2\]"):
        halves(["a", "b", None, "a"])  # a schedule splits tensors only


# --- MLPs that others have patched --------------------------------------------------------------------------------------


class MLP(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(K, N), nn.Linear(K, N)
        self.down_proj, self.act_fn = nn.Linear(N, K), nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Product(torch.autograd.Function):
    """A fused activation and product, as Liger's MLPs have one."""

    @staticmethod
    def forward(ctx, gate, up):
        return F.silu(gate) * up


class Patched(MLP):
    def forward(self, x):
        return self.down_proj(Product.apply(self.gate_proj(x), self.up_proj(x)))


def adapted_mlp(kind):
    mlp = kind()
    for name in ("gate_proj", "up_proj"):
        setattr(mlp, name, LiLoRALinear(getattr(mlp, name), r=8, dropout=0.0))
    return mlp


@pytest.mark.parametrize("how", ["class", "instance"])
def test_an_mlp_patched_around_its_layers_keeps_its_adapters_and_is_not_fused(how, x):
    mlp = adapted(nn.Sequential(adapted_mlp(Patched if how == "class" else MLP)))
    plain = copy.deepcopy(mlp)
    plain[0].__class__ = MLP
    if how == "instance":
        mlp[0].forward = types.MethodType(Patched.forward, mlp[0])
    reasons = lilora_kernels.fuse_mlps(mlp)
    assert reasons == {
        "0": {
            "class": "Patched does not compute down_proj(act_fn(gate_proj(x)) * up_proj(x))",
            "instance": "its forward was replaced",
        }[how]
    }
    torch.testing.assert_close(mlp(x, task_ids=IDS), plain(x, task_ids=IDS))


def test_an_mlp_patched_past_its_layers_is_named(x):
    def past(self, x):
        """Reads the weights of the bases, as kernels with a LoRA of their own do."""
        gate, up = (F.linear(x, layer.base_layer.weight) for layer in (self.gate_proj, self.up_proj))
        return self.down_proj(F.silu(gate) * up)

    mlp = nn.ModuleDict({"patched": adapted_mlp(MLP), "head": LiLoRALinear(nn.Linear(K, N), r=8)})
    mlp.forward = lambda x: mlp["head"](mlp["patched"](x))
    adapted(mlp)
    mlp["patched"].forward = types.MethodType(past, mlp["patched"])
    with pytest.warns(UserWarning, match=r"did not run 2 of the adapted layers \(patched.gate_proj, patched.up_proj\)"):
        mlp(x)
