"""The plan composed on a GPU, where the host knows whose rows are whose: every M_t formed, also of runs that lie apart."""

import pytest
import torch
from support.cases import Errors, case_id, pairwise
from support.gpu_cases import add_errors, assert_equal, make_on_gpu, make_pair, run_all, seed_tensor

import lilora_kernels
from lilora_kernels import LiLoRALinear
from lilora_kernels.ops.delta import composed_kernels, task_rows, triton_backward, triton_forward

KERNELS = [triton_forward.shrink, triton_backward.from_x, triton_backward.add_partials, composed_kernels.compose]
KERNELS += [composed_kernels.u_gradient, composed_kernels.v_gradient_partials, composed_kernels.sum_gradients]
AXES = {
    "op": ["delta", "linear", "pair"],
    "mix": ["same", "runs", "sorted", "random"],
    "ranks": [(16, 8), (128, 64), (250, 128)],
    "coefficients": ["fusion", "plain", "lora"],
    "p": [0.0, 0.3],
    "dtype": [torch.bfloat16, torch.float16, torch.float32],
}
ROWS, TASKS = 1601, 3


def laid_out(i):
    """With its rows' layout kept, as those of a layer's context."""
    i.task.layouts = [task_rows.layout(i.task.cpu(), TASKS, i.task.device)]
    return i


@pytest.mark.parametrize("case", pairwise(AXES), ids=case_id)
def test_outputs_and_gradients(case, plan):
    plan("composed")
    case = dict(case)
    (rank, sub_rank), op, p = case.pop("ranks"), case.pop("op"), case.pop("p")
    errors, names = Errors(), ("x", "a", "b0", "u", "v", "fusion")
    shape = {"rows": ROWS, "columns": 136, "rank": rank, "sub_rank": sub_rank, "tasks": TASKS, **case}
    for seed in range(2):
        if op == "pair":
            inputs = make_pair(96, seed=seed, **shape)
        else:
            inputs, names = [make_on_gpu(outputs=104, gate=True, seed=seed, **shape)], (*names[:6], "gate")
        laid_out(inputs[0])
        add_errors(errors, op, inputs, p, seed_tensor(5) if p else None, names)
    errors.check()


def test_two_runs_are_equal_bit_for_bit(plan):
    plan("composed")
    i = laid_out(make_on_gpu(ROWS, 136, 104, 128, 64, TASKS, mix="runs", gate=True, dtype=torch.bfloat16))
    assert_equal(run_all("linear", i, 0.1, seed_tensor(5)), run_all("linear", i, 0.1, seed_tensor(5)))


def test_a_broken_task_stays_alone(plan):
    plan("composed")
    i = laid_out(make_on_gpu(ROWS, 136, 104, 16, 8, TASKS, mix="random", dtype=torch.bfloat16))
    i.u[1] = float("nan")
    y, dx, *_ = run_all("delta", i)
    for rows in (y, dx):
        assert torch.equal(rows.isfinite().all(1), i.task != 1)
        assert torch.equal(rows.isnan().all(1), i.task == 1)


def test_warmup_has_compiled_what_a_mixed_training_step_takes():
    base = torch.nn.Linear(136, 104).requires_grad_(False)
    model = torch.nn.Sequential(LiLoRALinear(base, r=16, sub_rank=8, dropout=0.1))
    for task in ("one", "two"):
        model[0].add_task(task)
    model.to("cuda", torch.bfloat16)
    lilora_kernels.attach(model)
    lilora_kernels.set_task(model, "one", "two")
    lilora_kernels.warmup(model)

    def compiled():
        return [len(cache[0]) for kernel in KERNELS for cache in kernel.device_caches.values()]

    before = compiled()
    for names in (("one", "two"), ("two", "two"), ("one", "one")):
        x = torch.randn(2, 800, 136, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        with lilora_kernels.route(model, names):
            model(x).sum().backward()
    assert compiled() == before
