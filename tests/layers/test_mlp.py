"""fuse_mlps: gate_proj and up_proj in one operation compute what the two layers compute apart."""

import copy
import pickle

import pytest
import torch
from support.counting import Operations
from support.layers import Quantised
from support.tiny_llava import TASKS, batch, randomise, tiny_llava
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend

from lilora_kernels import (
    LiLoRALinear,
    attach,
    cpu_library,
    explain,
    freeze,
    functional,
    fuse_mlps,
    route,
    set_task,
    unfuse_mlps,
)
from lilora_kernels.attach import detach
from lilora_kernels.layers.mlp import FORMULA, gate_and_up

K, N = 24, 20


class GatedMLP(nn.Module):
    """As HuggingFace writes it; its children are in double precision."""

    def __init__(self, bias=False, **options):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(K, N, bias=bias), nn.Linear(K, N, bias=bias)
        self.down_proj, self.act_fn = nn.Linear(N, K, bias=bias), nn.SiLU()
        self.requires_grad_(False).double()
        for name in ("gate_proj", "up_proj", "down_proj"):
            self.adapt(name, **options)

    def adapt(self, name, tasks=TASKS, **options):
        layer = getattr(self, name)
        base = layer.base_layer if isinstance(layer, LiLoRALinear) else layer
        options = {"r": 8, "sub_rank": 4, "dropout": 0.0, "train_a": "always", "train_b0": "always", **options}
        adapted = LiLoRALinear(base, **options)
        for task in tasks:
            adapted.add_task(task)
        randomise(adapted)
        setattr(self, name, adapted.double())

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


class Limited(GatedMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=7) * self.up_proj(x))


class Swapped(GatedMLP):
    def forward(self, hidden_states):
        product = self.up_proj(hidden_states) * self.act_fn(self.gate_proj(hidden_states))
        return self.down_proj(product)


class TwoInputs(GatedMLP):
    def forward(self, x, scale=1.0):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) * scale


class Branching(GatedMLP):
    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x)) if x.sum() > 0 else x


def twins(kind=GatedMLP, **options):
    """A fused MLP and the same apart, each attached."""
    model = nn.Sequential(kind(**options))
    fused = copy.deepcopy(model)
    assert fuse_mlps(fused) == {"0": None}
    for each in (fused, model):
        attach(each)
    return fused, model


def step(model, x, names=None):
    """Output, gradient of x and gradients of the parameters by name."""
    model.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = model(x) if names is None else model(x, task_ids=names)
    (y * torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)).sum().backward()
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def same(got, wanted, tolerance=1e-10):
    assert got.keys() == wanted.keys()
    for name, want in wanted.items():
        assert want.abs().max() > 0 or "lilora_" in name  # a task may be absent from the batch
        torch.testing.assert_close(
            got[name], want, rtol=0, atol=tolerance * want.abs().max().item(), msg=lambda m, name=name: f"{name}: {m}"
        )


def ours(call):
    with Operations() as found:
        call()
    return dict(found.ours)


FUSED, APART = {"delta_pair": 1, "linear": 1}, {"linear": 3}

# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [None, ["count", None, "read", "count"]], ids=["one", "mixed"])
@pytest.mark.parametrize("kind", [GatedMLP, Swapped])
@pytest.mark.parametrize("options", [{}, {"bias": True}, {"fusion": False}], ids=["plain", "bias", "no-fusion"])
def test_output_and_every_gradient_are_those_apart(names, kind, options):
    fused, apart = twins(kind, **options)
    for each in (fused, apart):
        set_task(each, *(TASKS if names else ["where"]))
    x = torch.randn(4, 3, K).double()
    same(step(fused, x, names), step(apart, x, names))
    with torch.no_grad():
        fused(x[:1]) if names is None else fused(x, task_ids=names)
        assert ours(lambda: fused(x, task_ids=names)) == FUSED
        assert ours(lambda: apart(x, task_ids=names)) == APART


@pytest.mark.parametrize("names", [None, ["count", None, "read", "count"]], ids=["one", "mixed"])
def test_dropout_draws_one_mask_for_both(names, monkeypatch):
    """Apart, the layers agree with it when their seeds are equal."""
    fused, apart = twins(dropout=0.4)
    seeds = []
    monkeypatch.setattr(functional, "draw_seed", lambda device: seeds.append(device) or torch.tensor([5]))
    for each in (fused, apart):
        set_task(each, *(TASKS if names else ["where"]))
    x = torch.randn(4, 3, K).double()
    got, drawn = step(fused, x, names), len(seeds)
    same(got, step(apart, x, names))
    assert (drawn, len(seeds) - drawn) == (2, 3)
    assert not torch.equal(fused(x, task_ids=names), fused.eval()(x, task_ids=names))


def test_a_whole_model_in_mixed_batches_and_generation():
    model = tiny_llava().double()
    fused, inputs = copy.deepcopy(model), batch([1, 0, 2])
    inputs["pixel_values"] = inputs["pixel_values"].double()
    assert set(fuse_mlps(fused).values()) == {None}
    for each in (fused, model):
        set_task(each, *TASKS)
    options = {"task_ids": ["where", None, "read"], "max_new_tokens": 5}
    got, wanted = (
        m.generate(**inputs, **options, output_logits=True, return_dict_in_generate=True) for m in (fused, model)
    )
    assert torch.equal(got.sequences, wanted.sequences)
    torch.testing.assert_close(torch.stack(got.logits), torch.stack(wanted.logits), rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        assert ours(lambda: fused(**inputs, task_ids=options["task_ids"])) == {"delta_pair": 2, "linear": 4}


@pytest.mark.parametrize("reentrant", [None, False, True], ids=["plain", "non-reentrant", "reentrant"])
@pytest.mark.filterwarnings("ignore:.*checkpoint.*:FutureWarning")
def test_checkpointing_with_dropout(reentrant):
    """Two forwards before two backwards: each recomputation has the route and the mask of its forward."""
    torch.manual_seed(1)
    model, inputs, found = tiny_llava(dropout=0.3, train_a="always").train(), batch([2, 0]), []
    fuse_mlps(model)
    set_task(model, *TASKS)
    for checkpointed in (False, reentrant is not None):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.zero_grad(set_to_none=True)
        torch.manual_seed(2)
        losses = [
            model(**inputs, task_ids=names).logits.square().mean() for names in (["count", "where"], ["where", None])
        ]
        for loss in losses:
            loss.backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    same(*found, tolerance=1e-4)


def test_a_task_set_between_forward_and_backward_raises():
    fused, _ = twins()
    set_task(fused, "count")
    outputs = gate_and_up(fused[0].gate_proj, fused[0].up_proj, torch.randn(2, K).double())
    set_task(fused, "where")
    for y in outputs:
        with pytest.raises(RuntimeError, match="set between a forward and its backward"):
            y.sum().backward(retain_graph=True)


@pytest.mark.skipif(isinstance(cpu_library.load(), str), reason=f"{cpu_library.load()}")
@pytest.mark.parametrize("served", [False, True])
def test_the_cpu_kernels_take_both_in_one_call(served, monkeypatch):
    """Bound from the second call on; the bits of the two layers, whatever changes in between."""
    fused, apart = (model.float().eval() for model in twins(bias=True))
    library, calls = cpu_library.load(), []
    run = library.decode
    monkeypatch.setattr(library, "decode", lambda call, sides: calls.append(sides) or run(call, sides))
    options = {"task_ids": ["count", None, "where"]} if served else {}
    x = torch.randn(3, 2, K)

    def other_memory(mlp):
        mlp.up_proj.base_layer.weight.data = mlp.up_proj.base_layer.weight.data + 1
        mlp.gate_proj.lilora_A["count"].data = mlp.gate_proj.lilora_A["count"].data * 2

    changes = [
        lambda mlp: None,
        lambda mlp: freeze(fused if mlp is fused[0] else apart) if served else set_task(mlp, "where"),
        lambda mlp: mlp.up_proj.lilora_V["count"].data.mul_(3),
        other_memory,
        lambda mlp: [setattr(layer, "alpha", 7.0) for layer in (mlp.gate_proj, mlp.up_proj)],
    ]
    for change in changes:
        for model in (fused, apart):
            change(model[0])
        for rows in (x, x, x):
            with torch.no_grad():
                calls.clear()
                got = fused(rows, **options)
                assert calls == [2, 1]
                assert torch.equal(got, apart(rows, **options))
    with torch.no_grad():
        many = torch.randn(3, 30, K)
        same({"y": fused(many, **options)}, {"y": apart(many, **options)}, tolerance=1e-4)
    wanting = x.requires_grad_()
    assert fused(wanting, **options).grad_fn is not None


def test_autocast_and_fp32_adapters_on_a_bf16_base():
    fused, apart = (m.float() for m in twins())
    x = torch.randn(4, 3, K)
    results = []
    for each in (fused, apart):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            results.append(step(each, x))
    same(*results, tolerance=2e-2)
    assert results[0]["y"].dtype == torch.bfloat16
    for layer in fused.modules():
        if isinstance(layer, nn.Linear):
            layer.bfloat16()
    assert fused(x.bfloat16()).dtype == torch.bfloat16


# --- when it runs apart -----------------------------------------------------------------------------------------------


def merged(mlp):
    for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj):
        layer.merge("count")


def hooked(mlp):
    mlp.up_proj.register_forward_hook(lambda module, args, y: 2 * y)


def trained(mlp):
    mlp.gate_proj.base_layer.requires_grad_(True)


def unadapted(mlp):
    mlp.gate_proj = mlp.gate_proj.base_layer


def tuned(mlp):
    mlp.gate_proj.dropout = 0.2
    mlp.gate_proj.eval()


def uneven(mlp):
    mlp.gate_proj.add_task("one")
    mlp.up_proj.add_task("two")


@pytest.mark.parametrize("change", [merged, hooked, trained, unadapted, tuned, uneven], ids=lambda f: f.__name__)
def test_what_happens_later_is_respected(change):
    fused, apart = twins()
    x = torch.randn(4, 3, K).double()
    for each in (fused, apart):
        set_task(each, "where")
        change(each[0])
    names = ["where", None, "where", None] if change is uneven else None
    with torch.no_grad():
        fused(x, task_ids=names)
        assert "delta_pair" not in ours(lambda: fused(x, task_ids=names))
        torch.testing.assert_close(fused(x, task_ids=names), apart(x, task_ids=names), rtol=1e-10, atol=1e-10)
    if change is not merged:
        same(step(fused, x, names), step(apart, x, names))


def test_merged_and_back():
    fused, _ = twins()
    x = torch.randn(4, K).double()
    set_task(fused, "count")
    want = fused(x)
    merged(fused[0])
    torch.testing.assert_close(fused(x), want)
    for layer in (fused[0].gate_proj, fused[0].up_proj, fused[0].down_proj):
        layer.unmerge()
    torch.testing.assert_close(fused(x), want)
    with torch.no_grad():
        assert ours(lambda: fused(x)) == FUSED


def other_rank(mlp):
    mlp.adapt("up_proj", r=4)


def other_dropout(mlp):
    mlp.adapt("gate_proj", dropout=0.1)


def other_tasks(mlp):
    mlp.adapt("up_proj", tasks=TASKS[:2])


def replaced(mlp):
    mlp.forward = lambda x: 3 * GatedMLP.forward(mlp, x)


def quantised(mlp):
    mlp.gate_proj.base_layer = Quantised()


@pytest.mark.parametrize(
    "kind, change, reason",
    [
        (GatedMLP, other_rank, "rank is 8 in gate_proj and 4 in up_proj"),
        (GatedMLP, other_dropout, "dropout is 0.1 in gate_proj and 0.0 in up_proj"),
        (GatedMLP, other_tasks, f"gate_proj has the tasks {list(TASKS)} and up_proj {list(TASKS[:2])}"),
        (GatedMLP, replaced, "its forward was replaced"),
        (GatedMLP, quantised, "in gate_proj the base is a Quantised"),
        (GatedMLP, hooked, "up_proj has hooks"),
        (GatedMLP, unadapted, "gate_proj is not adapted"),
        (GatedMLP, merged, "gate_proj has a merged task"),
        (Limited, None, f"Limited does not compute {FORMULA}"),
        (TwoInputs, None, f"TwoInputs does not compute {FORMULA}"),
        (Branching, None, f"Branching does not compute {FORMULA}"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_what_is_left_as_it_is(kind, change, reason):
    model = nn.Sequential(kind())
    if change is not None:
        change(model[0])
    before = dict(model[0].__dict__)
    assert fuse_mlps(model) == {"0": reason}
    assert model[0].__dict__ == before
    assert f"because {reason}" in explain(model)


# --- the model around it ----------------------------------------------------------------------------------------------


def test_explain_says_what_is_together():
    model = nn.Sequential(GatedMLP())
    assert "apart from up_proj, because fuse_mlps was not called" in explain(model).splitlines()[0]
    fuse_mlps(model)
    gate, up, down = explain(model).splitlines()[:3]
    assert "base and adapter in one operation, together with up_proj" in gate
    assert "together with gate_proj" in up
    assert "proj," not in down
    hooked(model[0])
    assert "apart from gate_proj, because up_proj has hooks" in explain(model).splitlines()[1]


def test_it_is_undone_and_leaves_no_trace():
    fused, apart = twins()
    assert fused.state_dict().keys() == apart.state_dict().keys()
    x = torch.randn(4, K).double()
    twin = copy.deepcopy(fused)
    unpickled = pickle.loads(pickle.dumps(fused))
    same(step(unpickled, x), step(apart, x))
    assert ours(lambda: unpickled(x)) == FUSED
    unfuse_mlps(fused)
    assert fused[0].__dict__.keys() == apart[0].__dict__.keys()
    with torch.no_grad():
        assert ours(lambda: fused(x)) == APART
        for p in fused.parameters():
            p.zero_()
        assert ours(lambda: twin(x)) == FUSED
    same(step(twin, x), step(apart, x))  # the copy computes with its own layers
    assert fuse_mlps(twin) == {"0": None}
    detach(twin)
    assert "forward" not in twin[0].__dict__


def test_new_tasks_and_loaded_parameters_need_no_new_call():
    fused, apart = twins()
    for each in (fused, apart):
        for layer in (each[0].gate_proj, each[0].up_proj, each[0].down_proj):
            layer.add_task("new")
    randomise(apart)
    fused.load_state_dict(apart.state_dict())
    x = torch.randn(2, 3, K).double()
    for names in (None, ["new", "read"]):
        for each in (fused, apart):
            set_task(each, *(["new"] if names is None else ["new", *TASKS]))
        same(step(fused, x, names), step(apart, x, names))


# --- torch.compile ----------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled():
    torch.compiler.reset()
    counter = CompileCounterWithBackend("aot_eager")
    yield lambda module: (torch.compile(module, backend=counter, fullgraph=True), counter)
    torch.compiler.reset()


def test_twenty_steps_of_changing_tasks_compile_once(compiled):
    fused, apart = twins()
    for each in (fused, apart):
        set_task(each, *TASKS)
    run, graphs = compiled(fused)
    for i in range(20):
        x, ids = torch.randn(4, 3, K).double(), torch.randint(-1, 3, (4,))
        fused.zero_grad(set_to_none=True)
        y = run(x, task_ids=ids)
        y.square().sum().backward()
        if i % 10 == 0:
            torch.testing.assert_close(y, apart(x, task_ids=ids), rtol=1e-10, atol=1e-10)
    assert graphs.frame_count == 1
    assert all(p.grad is not None for name, p in fused.named_parameters() if "lilora_" in name)


def test_twelve_tasks_added_and_trained_make_at_most_two_graphs(compiled):
    model = nn.Sequential(GatedMLP(tasks=()))
    attach(model)
    run, graphs = compiled(model)
    for i in range(12):
        for layer in (model[0].gate_proj, model[0].up_proj, model[0].down_proj):
            layer.add_task(f"task{i}")
        randomise(model)
        if i == 0:
            fuse_mlps(model)
        set_task(model, f"task{i}")
        x = torch.randn(5, K).double()
        run(x).square().sum().backward()
        torch.testing.assert_close(run(x), model(x), rtol=1e-10, atol=1e-10)
    assert graphs.frame_count <= 2


def test_routes_in_inference_compile_once(compiled):
    fused, apart = twins()
    run, graphs = compiled(fused.eval())
    x = torch.randn(4, 3, K).double()
    with torch.no_grad():
        for names in (["read", "count", "where", None], ["count"] * 4):
            with route(fused, names), route(apart, names):
                torch.testing.assert_close(run(x), apart(x), rtol=1e-10, atol=1e-10)
    assert graphs.frame_count == 1


def test_inductor():
    torch.compiler.reset()
    fused, apart = twins()
    run = torch.compile(fused.eval(), fullgraph=True)
    x, ids = torch.randn(4, 3, K).double(), torch.tensor([0, -1, 2, 0])
    with torch.no_grad():
        torch.testing.assert_close(run(x, task_ids=ids), apart(x, task_ids=ids), rtol=1e-10, atol=1e-10)


def test_any_activation_module_will_do():
    fused, apart = twins()
    for each in (fused, apart):
        each[0].act_fn = nn.PReLU(dtype=torch.float64)
    x = torch.randn(4, K).double()
    same(step(fused, x), step(apart, x))


def test_layers_that_stack_other_tasks_are_computed_apart():
    fused, apart = twins()
    for each in (fused, apart):
        tasks = each[0].gate_proj.tasks[:2]
        set_task(each, *tasks)
        for parameter in each[0].gate_proj.parameters():
            parameter.requires_grad_(False)
    x, ids = torch.randn(4, K).double(), torch.tensor([1, 0, 1, 1])
    torch.testing.assert_close(fused.train()(x, task_ids=ids), apart.train()(x, task_ids=ids))


def test_a_freeze_between_the_two_layers_leaves_both_with_their_own_rows():
    fused, _ = twins()
    x, ids = torch.randn(4, K).double(), torch.tensor([1, 0, -1, 1])
    gate = fused[0].gate_proj
    with torch.no_grad():
        for task in gate.tasks[:1]:
            for layer in fused[0].children():
                if isinstance(layer, LiLoRALinear):
                    layer.delete_task(task)  # from now on a frozen layer's positions are others than a stack's
        ids = torch.where(ids == 0, 1, ids)
        wanted = fused(x, task_ids=ids)
        adapter = gate._adapter

        def then_freeze(*args):
            found = adapter(*args)
            gate._adapter = adapter
            freeze(fused)
            return found

        gate._adapter = then_freeze
        torch.testing.assert_close(fused(x, task_ids=ids), wanted)
