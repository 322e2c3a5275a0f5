"""What adapted layers cost, counted instead of timed: operations, saved memory, peak memory, graphs.

Every figure is a ceiling. Lower it when a change does better; raise it only with a reason.
"""

import sys

import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, inject_adapter_in_model
from support.counting import Operations, saved
from support.tiny_llava import IMAGE, TASKS, batch, randomise, tiny_llava
from torch import nn
from torch._dynamo.testing import CompileCounter

from lilora_kernels import LiLoRALinear, attach, cpu_library, freeze, plan, route
from lilora_kernels.layers.lilora import set_task

pytestmark = pytest.mark.usefixtures("no_cpu_kernels")  # of the composed plan, but for what says otherwise

R, S = 8, 4
CPU_KERNELS = cpu_library.load()
COLUMNS = 24
FLOAT, ID, SEED = 4, 4, 8  # bytes of an fp32 element, of a row's task id, of a dropout seed


def adapted(columns=96, outputs=64, tasks=1, dropout=0.0, train=True, **options):
    """One adapted linear whose tasks all learn, and A and B0 with them."""
    base = nn.Linear(columns, outputs).requires_grad_(False)
    layer = LiLoRALinear(base, r=R, sub_rank=S, dropout=dropout, **options)
    for i in range(tasks):
        layer.add_task(f"task{i}")
    layer.set_task(*layer.tasks)
    randomise(layer)
    return layer.train(train)


def interleaved(rows, tasks):
    """The tasks in turn, the hardest mix: None stands for the active task."""
    return None if tasks == 1 else torch.arange(rows, dtype=torch.int32) % tasks


# --- operations -------------------------------------------------------------------------------------------------------


def operations(layer, rows):
    """Those of a forward and, in training, of its backward."""
    x, task = torch.randn(rows, layer.in_features, requires_grad=layer.training), interleaved(rows, len(layer.tasks))
    with torch.set_grad_enabled(layer.training):
        layer(x, task=task)  # gathers the bank
        with Operations() as forward:
            y = layer(x, task=task)
    dy = torch.randn_like(y)
    with Operations() as backward:
        if layer.training:
            y.backward(dy)
    return forward.seen, backward.seen


@pytest.mark.parametrize(
    "tasks, dropout, rows, train, forward, backward",
    [
        # f, M_t; h, y, base
        (1, 0.0, 64, False, 5, 0),
        # f, M_t; dq, dM; du, dv 2, dfusion 6, db0; dx, da, base
        (1, 0.0, 64, True, 5, 18),
        # each way 4 for the mask and 2 to apply it and its scale; a seed, or the scale once more
        (1, 0.05, 64, True, 12, 25),
        # 4 to sort the rows by task, 2 to permute them; 5 for every row's f and e; h, y, base; z and y for the tasks at once
        (4, 0.0, 8, False, 19, 0),
        # f, M_t and y for every task; h, base; 6 to sort and permute the rows
        (4, 0.0, 64, False, 23, 0),
        # and three stacks, and the dropout's 7; in backward 18 for every task, 6 to sort and permute the rows
        (4, 0.05, 64, True, 30, 91),
    ],
)
def test_operations_of_one_layer(tasks, dropout, rows, train, forward, backward):
    seen = operations(adapted(tasks=tasks, dropout=dropout, train=train), rows)
    assert seen[0].total() <= forward, seen[0]
    assert seen[1].total() <= backward, seen[1]


@pytest.mark.parametrize(
    "train, forward, backward",
    [
        (False, 3, 0),  # f, M_t, y
        (True, 3, 18),  # f, M_t, dq, dM; du, dv 2, dfusion 6, db0 2 and the places of u, v, fusion 3
    ],
)
def test_operations_of_each_further_task(train, forward, backward):
    few, many = (operations(adapted(tasks=tasks, train=train), 8 * R) for tasks in (4, 8))
    assert many[0].total() - few[0].total() <= 4 * forward, many[0] - few[0]
    assert many[1].total() - few[1].total() <= 4 * backward, many[1] - few[1]


@pytest.mark.parametrize(
    "active, names, limit",
    [
        # seven a layer, in place of the product with the base weight
        (TASKS[:1], None, 8 * 6),
        # five to turn ids of samples into ids of rows, not for every layer; three stacks a layer and two to group the rows;
        # the second task
        (TASKS, ["read", "count"], 8 * 6 + 5 + 8 * 5 + 38),
    ],
)
def test_operations_of_a_whole_model(active, names, limit):
    model, inputs = tiny_llava(), batch([1, 1])
    layers = [module for module in model.modules() if isinstance(module, LiLoRALinear)]
    assert len(layers) == 8
    seen = []
    for tasks, options in (((), {}), (active, {} if names is None else {"task_ids": names})):
        set_task(model, *tasks)
        with torch.no_grad():
            model(**inputs, **options)
            with Operations() as found:
                model(**inputs, **options)
        seen.append(found)
    bare, adapters = seen
    assert adapters.ours == {"linear": 8}
    assert adapters.seen.total() - bare.seen.total() <= limit, adapters.seen - bare.seen


# --- memory between forward and backward ------------------------------------------------------------------------------


def saved_bytes(module, forward):
    return sum(saved(module, forward).values())


def stacked_bytes(tasks, outputs):
    """U, V and fusion of all tasks side by side: mixed training gathers them anew each time."""
    return tasks * (outputs * S + S * R + 1) * FLOAT


@pytest.fixture
def composed():
    """Layers as small as these would take the plan one_launch, which keeps the mask of dropout."""
    with plan("composed"):
        yield


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("tasks", [1, 3])
@pytest.mark.parametrize("shared", ["always", "never"])
def test_a_layer_saves_x_and_h(tasks, dropout, shared):
    """x for the gradient of A alone, h, the seed in place of a mask; of a mixed batch the rows' ids and the stack."""
    layer = adapted(96, 64, tasks, dropout, train_a=shared, train_b0=shared)
    x = torch.randn(4, 16, 96, requires_grad=True)
    task = None if tasks == 1 else torch.tensor([0, 2, -1, 1])
    expected = 64 * R * FLOAT
    if shared == "always":
        expected += 64 * 96 * FLOAT
    if dropout:
        expected += SEED
    if tasks > 1:
        expected += 64 * ID + stacked_bytes(tasks, 64)
    held = saved(layer, lambda: layer(x, task=task))
    assert sum(held.values()) == expected
    assert (x.untyped_storage()._cdata in held) == (shared == "always")  # x itself, which its neighbours hold too


class Block(nn.Module):
    """The linears of a decoder layer in LLaVA-1.5-7B's proportions, 1 to 32: 4096, 11008 and r = 128."""

    def __init__(self, rank, adapt):
        super().__init__()
        hidden, inner = 128, 344
        for name in ("q", "k", "v", "o"):
            setattr(self, name, nn.Linear(hidden, hidden, bias=False))
        self.gate, self.up = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.down = nn.Linear(inner, hidden, bias=False)
        self.requires_grad_(False)
        for name, linear in list(self.named_children()):
            setattr(self, name, adapt(linear, rank))

    def linears(self, x, attended, normed, product):
        """All seven, each with the input that it has in a decoder layer."""
        attention = [linear(x) for linear in (self.q, self.k, self.v)]
        return *attention, self.o(attended), self.gate(normed), self.up(normed), self.down(product)

    def forward(self, x):
        """The MLP."""
        return self.down(F.silu(self.gate(x)) * self.up(x))


def lilora(linear, rank, tasks=("one",)):
    layer = LiLoRALinear(linear, r=rank, sub_rank=rank // 2, dropout=0.05)
    for name in tasks:
        layer.add_task(name)
    layer.set_task(*tasks)
    return layer


def peft(linear, rank):
    config = LoraConfig(r=rank, lora_dropout=0.05, target_modules=["0"])
    layer = inject_adapter_in_model(config, nn.Sequential(linear))[0]
    layer.lora_dropout["default"] = NativeDropout(0.05)
    return layer


class NativeDropout(nn.Dropout):
    """As on a GPU, where the mask takes one byte an element: a CPU keeps it in x's dtype."""

    def forward(self, x):
        return torch.native_dropout(x, self.p, True)[0]


@pytest.mark.usefixtures("composed")
@pytest.mark.parametrize("tasks", [("one",), ("one", "two")])
def test_an_mlp_saves_x_once_and_each_activation_once(tasks):
    rows, rank, names = 2 * 16, 4, None if len(tasks) == 1 else ["two", None]
    mlp = Block(rank, lambda linear, rank: lilora(linear, rank, tasks))
    attach(mlp)
    x = torch.randn(2, 16, 128, requires_grad=True)
    # x, the outputs of gate and up, silu's and the product; then h and a seed of each of the three
    expected = rows * (128 + 4 * 344 + 3 * rank) * FLOAT + 3 * SEED
    if names:
        each = (outputs * 2 + 2 * rank + 1 for outputs in (344, 344, 128))
        expected += rows * ID + len(tasks) * sum(each) * FLOAT  # the three layers share the rows' ids
    options = {} if names is None else {"task_ids": names}
    assert saved_bytes(mlp, lambda: mlp(x, **options)) == expected


@pytest.mark.parametrize(
    "part, widths, limit",
    [
        # Ours: x once for q, k and v, once for gate and up, and every h. LoRA: seven dropped x with their masks, and every h.
        (Block.linears, (128, 128, 128, 344), 0.45),
        # With what both hold: the outputs of gate, up and silu.
        (Block.forward, (128,), 0.79),
    ],
    ids=["linears", "mlp"],
)
def test_saved_memory_as_a_share_of_loras_with_dropout(part, widths, limit):
    inputs = [torch.randn(32, width, dtype=torch.bfloat16, requires_grad=True) for width in widths]
    ours, theirs = (Block(4, adapt).bfloat16() for adapt in (lilora, peft))
    share = saved_bytes(ours, lambda: part(ours, *inputs)) / saved_bytes(theirs, lambda: part(theirs, *inputs))
    assert share <= limit


# --- peak memory ------------------------------------------------------------------------------------------------------


def peak_bytes(call):
    """The most memory that a call takes, its results included; and the results."""
    cpu = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=cpu, profile_memory=True, acc_events=True) as profile:
        result = call()
    now = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            now += event.nbytes()
            peak = max(peak, now)
    return peak, result


@pytest.mark.parametrize(
    "tasks, dropout, wide, forward, backward",
    [
        (1, 0.0, "x", 0, 1),  # dx
        (1, 0.0, "y", 1, 0),  # y: adapter and base write the same tensor
        (1, 0.05, "x", 1.75, 2),  # the dropped x, its random bits (1/2) and comparison (1/4); dx and the mask
        (1, 0.05, "y", 1, 0),
        (3, 0.0, "x", 0, 1),
        (3, 0.0, "y", 2, 1),  # rows permuted to lie task by task: a second y, a second dy
    ],
)
def test_peak_memory_in_units_of_the_wide_tensor(tasks, dropout, wide, forward, backward):
    rows, columns, outputs = 512, *((512, 16) if wide == "x" else (16, 512))
    layer, x = adapted(columns, outputs, tasks, dropout), torch.randn(rows, columns, requires_grad=True)
    leaves = [x, *(parameter for parameter in layer.parameters() if parameter.requires_grad)]
    task = interleaved(rows, tasks)
    unit, dy = rows * 512 * FLOAT, torch.randn(rows, outputs)
    peak, y = peak_bytes(lambda: layer(x, task=task))
    assert peak <= (forward + 0.2) * unit, peak / unit
    peak, _ = peak_bytes(lambda: torch.autograd.grad(y, leaves, dy))
    assert peak <= (backward + 0.2) * unit, peak / unit


# --- graphs -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def compiled():
    """compile(module): the whole forward must be one graph, and stay so."""
    torch.compiler.reset()
    counter = CompileCounter()
    yield lambda module: (torch.compile(module, backend=counter, fullgraph=True), counter)
    torch.compiler.reset()


def some_ids(samples):
    return torch.randint(-1, len(TASKS), (samples,))


def test_twenty_training_steps_of_changing_tasks_compile_once(compiled):
    model = tiny_llava(dropout=0.05, layers=1).train()
    set_task(model, *TASKS)
    run, graphs = compiled(model.model.language_model.layers[0].mlp)

    def step():
        with route(model, some_ids(3)):
            run(torch.randn(3, 5, 24)).sum().backward()

    step()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(20):
            step()
    assert graphs.frame_count == 1


def test_twenty_forwards_of_a_whole_model_compile_once(compiled):
    model = tiny_llava(layers=1)
    run, graphs = compiled(model)

    @torch.no_grad()
    def forward():
        run(**batch([0, 0]), task_ids=some_ids(2), use_cache=False)

    forward()
    with torch.compiler.set_stance("fail_on_recompile"):
        for _ in range(20):
            forward()
    assert graphs.frame_count == 1


class Decoder(nn.Module):
    main_input_name = "input_ids"

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([adapted(16, 8, 3)])

    def forward(self, x):
        return self.layers[0](x)


class Seeing(nn.Module):
    """As much of a multimodal model as routing looks at."""

    def __init__(self):
        super().__init__()
        self.config = type("Config", (), {"image_token_id": IMAGE})
        self.multi_modal_projector, self.language_model = adapted(12, 16, 3), Decoder()

    def get_decoder(self):
        return self.language_model

    def get_image_features(self, pixel_values):
        return self.multi_modal_projector(pixel_values)

    def forward(self, input_ids, pixel_values):
        tokens = F.one_hot(input_ids % 16, 16).float()
        return self.language_model(tokens + self.get_image_features(pixel_values).mean())


def test_images_cost_no_graph_break():
    torch.compiler.reset()
    model = Seeing()
    attach(model)
    inputs = {"input_ids": batch([2, 0])["input_ids"], "pixel_values": torch.randn(2, 1, 4, 12)}
    found = torch._dynamo.explain(model)(**inputs, task_ids=torch.tensor([0, 1]))
    assert found.break_reasons == []
    assert found.graph_count == 1


# --- the host -----------------------------------------------------------------------------------------------------------


def python_calls(function):
    """How many Python functions a call of `function` enters once it is warm; the least of three, for garbage is collected too."""

    def count():
        calls = []
        sys.setprofile(lambda frame, event, argument: calls.append(frame.f_code) if event == "call" else None)
        try:
            function()
        finally:
            sys.setprofile(None)
        return len(calls)

    function()
    return min(count() for _ in range(3))


def served(tasks, deleted=0, frozen=False, layers=2):
    model = nn.Sequential(
        *(LiLoRALinear(nn.Linear(COLUMNS, COLUMNS).requires_grad_(False), R, S) for _ in range(layers))
    ).eval()
    for layer in model:
        for t in range(deleted):
            layer.add_task(f"old{t}")
            layer.delete_task(f"old{t}")
        for t in range(tasks):
            layer.add_task(f"t{t}")
    attach(model)
    if frozen:
        freeze(model)
    ids = torch.tensor([deleted + t % tasks for t in range(8)], dtype=torch.int32)

    def run(**options):
        with torch.no_grad():
            model(torch.zeros(8, 1, COLUMNS), **options)

    return python_calls(run), python_calls(lambda: run(task_ids=ids))


@pytest.mark.parametrize("frozen", [False, True])
def test_python_calls_of_a_forward_do_not_grow_with_tasks(frozen):
    one, mixed = served(8, frozen=frozen)
    assert served(64, frozen=frozen) == (one, mixed)
    assert served(8, deleted=64, frozen=frozen) == (one, mixed)


@pytest.mark.parametrize(
    "backend, frozen, one, mixed",
    [("eager", False, 90, 125), ("eager", True, 90, 101), ("cpu", False, 36, 123), ("cpu", True, 36, 41)],
)
def test_python_calls_of_each_further_layer(backend, frozen, one, mixed, monkeypatch):
    """One task; and 8 rows of 8 tasks, whose factors a layer stacks where it is not frozen."""
    if backend == "cpu":
        if isinstance(CPU_KERNELS, str):
            pytest.skip(CPU_KERNELS)
        monkeypatch.setattr(cpu_library, "load", lambda: CPU_KERNELS)
    few, many = (served(8, frozen=frozen, layers=layers) for layers in (2, 4))
    got = [(after - before) / 2 for before, after in zip(few, many, strict=True)]
    assert got[0] <= one, got
    assert got[1] <= mixed, got
