"""`warmup` runs what will be run later, and leaves no trace."""

import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.utils.checkpoint
from triton.backends.compiler import BaseBackend
from triton.runtime.interpreter import InterpretedFunction
from triton.runtime.jit import native_specialize_impl

import lilora_kernels
from lilora.methods.pclr.pool import GateRule, RankPool
from lilora.methods.pclr.queries import PoolChooser, PoolTasks
from lilora_kernels import LiLoRALinear, RankPoolLinear
from lilora_kernels.layers.rank_pool import Choice
from lilora_kernels.ops.delta import triton_configs, triton_jobs, triton_parts
from lilora_kernels.ops.delta_pair import triton_backend as delta_pair
from lilora_kernels.ops.rank_gate import eager
from lilora_kernels.routing.context import tasks_of


def model():
    bases = [torch.nn.Linear(24, 20).requires_grad_(False) for _ in range(2)]
    layers = [LiLoRALinear(base, r=8, sub_rank=4, dropout=0.1) for base in bases]
    for layer in layers:
        layer.add_task("one")
        layer.add_task("two")
    return torch.nn.Sequential(*layers, torch.nn.Linear(20, 4))


@pytest.mark.parametrize("train", [True, False])
def test_each_distinct_layer_runs_once_for_each_bucket(train, monkeypatch):
    monkeypatch.setattr(triton_configs, "bucket_rows", lambda device: [2, 5])
    launches, run = set(), triton_jobs.run
    monkeypatch.setattr(triton_jobs, "run", lambda *a: launches.add(a[0].kernel.__name__) or run(*a))
    layers = model()
    for layer in layers[:2]:
        layer.set_task("two", train=train)
    before, state = {n: p.clone() for n, p in layers.named_parameters()}, torch.get_rng_state()
    # Two buckets, with the active task and with ids; evaluation, and training with and without a gradient of x.
    assert lilora_kernels.warmup(layers) == (12 if train else 8)
    assert torch.equal(state, torch.get_rng_state())
    for name, parameter in layers.named_parameters():
        assert torch.equal(parameter, before[name])
        assert parameter.grad is None
    assert launches == ({"delta_forward", "delta_backward"} if train else {"delta_forward"})


def test_a_layer_with_parameters_that_lie_elsewhere_takes_the_same_kernels(monkeypatch):
    """Views of an optimizer's flat buffer are seldom at multiples of 16 bytes, for which Triton would compile otherwise."""
    monkeypatch.setattr(triton_configs, "bucket_rows", lambda device: [2])
    bases = [torch.nn.Linear(24, 24).requires_grad_(False) for _ in range(3)]
    layers = torch.nn.Sequential(*(LiLoRALinear(base, r=8, sub_rank=4, dropout=0.0) for base in bases))
    for layer in layers:
        layer.add_task("one")
    layers.requires_grad_(False).eval()
    assert lilora_kernels.warmup(layers) == 2  # with the active task and with ids
    parameter = layers[2].lilora_V["one"]
    parameter.data = torch.cat([parameter.data.new_zeros(1), parameter.data.flatten()])[1:].view_as(parameter)
    assert lilora_kernels.warmup(layers) == 2
    launch = triton_jobs.launch

    def watching(made, grid, tensors, numbers, groups):
        assert all(t is None or t.data_ptr() % 16 == 0 for group in groups for t in group)
        launch(made, grid, tensors, numbers, groups)

    monkeypatch.setattr(triton_jobs, "launch", watching)
    with lilora_kernels.backend("triton"):
        layers[2](torch.randn(3, 24))


def test_many_rows_of_tasks_that_the_host_knows(monkeypatch):
    """As on a device: the first and the last active task, whose M_t lie where its id says and elsewhere."""
    monkeypatch.setattr(triton_configs, "bucket_rows", lambda device: [300])
    monkeypatch.setattr(sys.modules["lilora_kernels.warmup"], "_knows_more", lambda device: True)
    layers, run, ids = model(), triton_parts.run, set()
    lilora_kernels.attach(layers)
    lilora_kernels.set_task(layers, "one", "two")

    def recording(kernel, programs, tensors, *rest):
        ids.add((kernel.__name__, tensors[kernel.arg_names.index("ids")] is not None))
        run(kernel, programs, tensors, *rest)

    monkeypatch.setattr(triton_parts, "run", recording)
    with torch.autocast("cpu", torch.float16):
        assert lilora_kernels.warmup(layers) > 0
    kernels = ("compose", "u_gradient", "v_gradient_partials", "sum_gradients")
    assert ids == {(kernel, given) for kernel in kernels for given in (True, False)}


def test_merged_layers_routes_and_other_backends(monkeypatch):
    monkeypatch.setattr(triton_configs, "bucket_rows", lambda device: [2])
    layers = model()
    lilora_kernels.attach(layers)
    layers[0].merge("one")
    with lilora_kernels.route(layers, torch.tensor([0, 1, 0])):
        assert lilora_kernels.warmup(layers) == 6  # the other layer
    layers[0].unmerge()
    with lilora_kernels.backend("eager"):
        assert lilora_kernels.warmup(layers) == 0


def test_nothing_to_do():
    assert lilora_kernels.warmup(torch.nn.Linear(3, 3)) == 0
    assert lilora_kernels.warmup(LiLoRALinear(torch.nn.Linear(3, 3), r=2, sub_rank=2)) == 0


def test_a_device_that_cannot_hold_the_grid_runs_job_by_job(monkeypatch):
    launches, run = [], triton_jobs.run

    def refusing(made, items, *rest):
        launches.append(made.kernel.__name__)
        if items is None:
            raise RuntimeError("Triton Error [CUDA]: too many blocks in cooperative launch")
        run(made, items, *rest)

    x, a, b0 = torch.randn(5, 24), torch.randn(4, 24), torch.randn(20, 4)
    with lilora_kernels.backend("triton"):
        want = lilora_kernels.delta(x, a, b0)
        monkeypatch.setattr(triton_jobs, "run", refusing)
        assert torch.equal(lilora_kernels.delta(x, a, b0), want)
    assert launches == ["delta_forward", "shrink", "expand"]


class GatedMLP(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = model()[0], model()[0], torch.nn.Linear(20, 24)
        self.act_fn = torch.nn.SiLU()

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def test_a_fused_mlp_runs_as_a_pair(monkeypatch):
    monkeypatch.setattr(triton_configs, "bucket_rows", lambda device: [2])
    pairs, forward = [], delta_pair.forward
    monkeypatch.setattr(delta_pair, "forward", lambda *a: pairs.append(a[0].shape) or forward(*a))
    mlp = GatedMLP()
    assert lilora_kernels.fuse_mlps(mlp) == {"": None}
    # The pair and its layers alone, with the active task and with ids; evaluation, and training with and without a
    # gradient of x.
    assert lilora_kernels.warmup(mlp) == 12
    assert pairs == [(2, 24)] * 6


def test_the_cuda_library_is_loaded_by_every_plan_and_the_eager_backend_by_none(monkeypatch):
    from lilora_kernels import backends
    from lilora_kernels.ops.linear import cuda_backend

    rows = cuda_backend.rows(torch.device("cpu"))
    args = SimpleNamespace(rank_sizes=(8, 4), u=None, task=None)
    plans = {cuda_backend.plan_of(torch.empty(m, 24), torch.empty(20, 24), args) for m in rows}
    assert plans == {"decode", "one_launch", "composed"}
    asked = []
    monkeypatch.setattr(cuda_backend, "rows", lambda device: asked.append(device) or [3])
    able = replace(backends._table["linear"]["cuda"], unsupported_reason=lambda *_: None)
    ran = []
    able = replace(
        able, forward=lambda x, *rest: ran.append(len(x)) or backends._table["linear"]["eager"].forward(x, *rest)
    )
    monkeypatch.setitem(backends._table["linear"], "cuda", able)
    layers = model()
    layers.requires_grad_(False).eval()
    assert lilora_kernels.warmup(layers) == 2
    assert (ran, len(asked)) == ([3, 3], 1)
    with lilora_kernels.backend("eager"):
        assert lilora_kernels.warmup(layers) == 0


# --- the keys of all launches, in the shipped configurations ----------------------------------------------------------

ROWS = (1, 7, 64, 65, 300, 2000, 4000)
K, N = 128, 64


@pytest.fixture
def variants(monkeypatch):
    """The keys by which Triton would look up compiled kernels, of launches that are not run."""
    found = set()

    def record(kernel, *args, grid, warmup, **options):
        given = dict(zip(kernel.arg_names, args, strict=False)) | options
        apart = kernel.kwargs.get("do_not_specialize") or ()
        constants = [name for name in given if name not in kernel.arg_names[: len(args)]]
        key = [(name, given.pop(name)) for name in sorted(constants)]
        key += [(n, native_specialize_impl(BaseBackend, v, False, n not in apart, True)) for n, v in given.items()]
        found.add((kernel.fn.__name__, *key))
        if kernel.fn.__name__ == "rank_gate":  # what it chooses is an index
            for to, value in zip(args[1:3], eager.forward(args[0], args[4]), strict=True):
                to.copy_(value)

    monkeypatch.setattr(InterpretedFunction, "run", record)
    return found


def adapted(base=None, **options):
    layer = LiLoRALinear(base or torch.nn.Linear(K, N).requires_grad_(False), r=16, sub_rank=8, **options)
    for name in ("one", "two", "three"):
        layer.add_task(name)
    layer.delete_task("two")
    return layer


def plain(**options):
    # The first of two equal layers sees an x that wants no gradient.
    return torch.nn.Sequential(adapted(**options), torch.nn.Linear(N, K).requires_grad_(False), adapted(**options))


def fused(**options):
    class MLP(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = adapted(**options), adapted(**options), torch.nn.Linear(N, K)
            self.act_fn = torch.nn.SiLU()

        forward = GatedMLP.forward

    mlp = MLP()
    mlp.down_proj.requires_grad_(False)
    model = torch.nn.Sequential(mlp)
    assert lilora_kernels.fuse_mlps(model) == {"0": None}
    return model


def unfused(**options):
    layer = plain(**options)
    layer[0].base_layer.register_forward_hook(lambda *_: None)
    return layer


def pooled(scope="sample", value="score", teacher=False):
    tasks, rule = PoolTasks(SimpleNamespace(widths=(6, 4))), GateRule(3, scope, value)
    pool = RankPool(rule, *tasks.source.widths)
    layer = RankPoolLinear(torch.nn.Linear(K, N).requires_grad_(False), PoolChooser(pool), dropout=0.1)
    layer.model_tasks, layer.pool = tasks, pool
    for part, n in (("old", 9), ("new", 5)):
        pool.put(part, torch.randn(n, 6), torch.randn(n, 4), train=part == "new")
        layer.put(part, torch.randn(n, K), torch.randn(N, n), train=part == "new")
        if teacher:
            pool.teacher[part] = torch.randn(2, 6), torch.randn(2, 4)
            layer.teacher[part] = torch.randn(2, K), torch.randn(N, 2)
    return layer


class Router(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(8, K))
        self.register_buffer("count", torch.zeros(()))

    def forward(self, layer, x):
        rows = x.reshape(-1, x.shape[-1])
        self.count += len(rows)
        gate = (rows @ self.weight.T).softmax(1)
        return Choice(((("old",), None),), gate), torch.arange(len(rows), dtype=torch.int32)


def routed_by_row():
    layer = RankPoolLinear(torch.nn.Linear(K, N).requires_grad_(False), Router())
    layer.put("old", torch.randn(8, K), torch.randn(N, 8), train=True)
    return layer


MODELS = {
    "plain": plain,
    "no fusion, A and B0 learn": lambda: plain(fusion=False, train_a="always", train_b0="always", dropout=0.0),
    "one of two is frozen": plain,
    "not fused with its base": unfused,
    "MLP": fused,
    "pool": pooled,
    "pool, one choice": lambda: pooled("batch", "binary"),
    "pool and its teacher": lambda: pooled(teacher=True),
    "experts by row": routed_by_row,
}


def routes(made, rows):
    """The contexts in which a model sees `rows` rows, and the shape of x in each."""
    if isinstance(getattr(made, "model_tasks", None), PoolTasks):
        for samples in {1, 5 if rows % 5 == 0 else 1}:
            x = torch.empty(samples, rows // samples, K)
            for teacher in (False, True) if made.teacher else (False,):
                yield made.model_tasks.use(made.model_tasks.example(x, teacher)), x.shape
        return
    yield nullcontext(), (1, rows, K)
    if isinstance(made, RankPoolLinear):
        return
    # Of the tasks, only that of id 2 trains.
    for ids in (([2, 2 if made.training else 0, -1, 2] * rows)[:rows], [-1] * rows):
        yield lilora_kernels.route(made, torch.tensor(ids)), (rows, K)


def use_all(made, rows, dtype):
    for route, shape in routes(made.eval(), rows):
        with route, torch.inference_mode():
            made(torch.randn(shape, dtype=dtype))
    for x_learns in (False, True):
        for route, shape in routes(made.train(), rows):
            x = torch.randn(shape, dtype=dtype, requires_grad=x_learns)
            with route:
                y = made(x)
            if y.requires_grad:
                y.sum().backward()
    if isinstance(made, torch.nn.Sequential) and rows < 64:
        for reentrant in (True, False):
            x = torch.randn(rows, K, dtype=dtype, requires_grad=True)
            shared = tasks_of(made)
            shared.routed = False  # an earlier forward's route is not this one's
            context = {} if reentrant else {"context_fn": shared.checkpoint_context}
            torch.utils.checkpoint.checkpoint(made, x, use_reentrant=reentrant, **context).sum().backward()


CASES = [(name, torch.float32) for name in MODELS] + [("plain", None), ("pool", None)]  # None: autocast


@pytest.mark.parametrize("name, dtype", CASES, ids=str)
def test_what_is_used_after_warmup_was_compiled_by_it(name, dtype, variants):
    made = MODELS[name]().to(dtype or torch.float32)
    if not isinstance(made, RankPoolLinear):
        lilora_kernels.attach(made)
        lilora_kernels.set_task(made, "three")
        if name == "one of two is frozen":
            made[2].requires_grad_(False)
    with torch.autocast("cpu", torch.float16, enabled=dtype is None):
        lilora_kernels.warmup(made)
        warm = set(variants)
        for rows in ROWS:
            use_all(made, rows, dtype or torch.float32)
    new = variants - warm
    assert not new, f"{len(new)} of {len(variants)}, such as {min(new, key=str)}"
    assert len(warm) > 2


def test_pools_are_left_as_they_were(variants, monkeypatch):
    monkeypatch.setattr(triton_configs, "bucket_rows", lambda device: [2])
    for layer in (routed_by_row(), pooled(teacher=True)):
        layer.train()
        before = {n: t.clone() for n, t in layer.state_dict().items()}, torch.get_rng_state(), layer._gathered
        seen = layer.model_tasks.seen, layer.model_tasks.routed, layer.model_tasks.current
        # One choice and one for each sample, of the layer and of its teacher; in evaluation, and in training with an input
        # that wants a gradient and with one that does not.
        assert lilora_kernels.warmup(layer) == 3 * (4 if layer.teacher else 2)
        for name, tensor in layer.state_dict().items():
            assert torch.equal(tensor, before[0][name])
        assert torch.equal(torch.get_rng_state(), before[1])
        assert layer._gathered is before[2]
        assert (layer.model_tasks.seen, layer.model_tasks.routed, layer.model_tasks.current) == seen
        assert all(module.training for module in layer.modules())
        assert all(parameter.grad is None for parameter in layer.parameters())


def test_modes_come_back_after_an_error():
    def broken(layer, x):
        raise RuntimeError("no choice outside a forward")

    layer = RankPoolLinear(torch.nn.Linear(K, N), broken)
    layer.put("new", torch.randn(2, K), torch.randn(N, 2), train=True)
    with pytest.raises(RuntimeError, match="no choice outside a forward"):
        lilora_kernels.warmup(layer)
    assert all(module.training for module in layer.modules())
