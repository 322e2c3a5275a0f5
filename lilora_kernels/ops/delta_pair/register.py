"""`lilora::delta_pair`: two adapters (and, if given, their frozen bases) of one x, as gate_proj and up_proj of an MLP."""

from collections.abc import Sequence

import torch
from torch import Tensor

from ... import backends
from .. import cuda_runtime, triton_runtime
from ..call import Call
from ..checks import check_delta, check_linear
from . import eager

backends.register(
    "delta_pair", "eager", backends.Implementation(eager.forward, eager.backward, lambda *_: None, "torch operations")
)
backends.register(
    "delta_pair",
    "cuda",
    backends.lazy(
        "lilora_kernels.ops.delta_pair.cuda_backend", cuda_runtime.refusal, "one launch per phase of each adapter"
    ),
)
backends.register(
    "delta_pair",
    "triton",
    backends.lazy(
        "lilora_kernels.ops.delta_pair.triton_backend",
        triton_runtime.refusal,
        "one launch per phase, x read once each way",
    ),
)

NAME = "lilora::delta_pair"
FACTORS = ("a", "b0", "u", "v", "fusion")  # of one adapter, in the order of the gradients
OUTPUTS = (("b0", 0), ("u", 1))  # the dimensions that may differ between the two: N


def check(x, base_1, adapter_1, base_2, adapter_2, task, seed, p, ranks) -> None:
    for (weight, bias), factors in ((base_1, adapter_1), (base_2, adapter_2)):
        check_delta(NAME, x, *factors, task, None, None, seed, p, ranks)
        if weight is not None:
            check_linear(NAME, x, weight, bias, factors[1])
        elif bias is not None:
            raise ValueError(f"{NAME}: a bias is given without its weight; give the weight too")
    for name, first, second in zip(FACTORS, adapter_1, adapter_2, strict=True):
        got = [None if t is None else list(t.shape) for t in (first, second)]
        kept = [None if t is None else [size for i, size in enumerate(t) if (name, i) not in OUTPUTS] for t in got]
        if kept[0] != kept[1]:
            raise ValueError(
                f"{NAME}: {name}_1 is {got[0]} and {name}_2 is {got[1]}; r, sub_rank and tasks must be equal, "
                "and u, v, fusion given to both or neither"
            )


def calls(adapter_1, adapter_2, task, seed, scaling, p, ranks) -> tuple[Call, Call]:
    first, second = (Call(*adapter, task, None, None, seed, scaling, p, ranks) for adapter in (adapter_1, adapter_2))
    return first, second


@torch.library.custom_op(NAME, mutates_args=())
def delta_pair(
    x: Tensor,
    weight_1: Tensor | None,
    bias_1: Tensor | None,
    a_1: Tensor,
    b0_1: Tensor,
    u_1: Tensor | None,
    v_1: Tensor | None,
    fusion_1: Tensor | None,
    weight_2: Tensor | None,
    bias_2: Tensor | None,
    a_2: Tensor,
    b0_2: Tensor,
    u_2: Tensor | None,
    v_2: Tensor | None,
    fusion_2: Tensor | None,
    task: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    p: float,
    ranks: Sequence[int] | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y_1 [M, N_1], y_2 [M, N_2], h_1 [M, R], h_2 [M, R]) in x's dtype; the weights are frozen, the h not differentiable."""
    one, two = (a_1, b0_1, u_1, v_1, fusion_1), (a_2, b0_2, u_2, v_2, fusion_2)
    check(x, (weight_1, bias_1), one, (weight_2, bias_2), two, task, seed, p, ranks)
    pair = calls(one, two, task, seed, scaling, p, ranks)
    return backends.choose("delta_pair", x, *pair[0].rank_sizes).forward(
        x, (weight_1, weight_2), (bias_1, bias_2), pair
    )


@delta_pair.register_fake
def _(
    x, weight_1, bias_1, a_1, b0_1, u_1, v_1, fusion_1, weight_2, bias_2, a_2, b0_2, u_2, v_2, fusion_2,
    task, seed, scaling, p, ranks,
):  # fmt: skip
    one, two = (a_1, b0_1, u_1, v_1, fusion_1), (a_2, b0_2, u_2, v_2, fusion_2)
    check(x, (weight_1, bias_1), one, (weight_2, bias_2), two, task, seed, p, ranks)
    rows = x.shape[0]
    return tuple(x.new_empty(rows, size) for size in (b0_1.shape[0], b0_2.shape[0], a_1.shape[0], a_2.shape[0]))


@torch.library.custom_op(NAME + "_backward", mutates_args=())
def delta_pair_backward(
    dy_1: Tensor,
    dy_2: Tensor,
    x: Tensor | None,
    weight_1: Tensor | None,
    weight_2: Tensor | None,
    h_1: Tensor | None,
    h_2: Tensor | None,
    a_1: Tensor,
    b0_1: Tensor,
    u_1: Tensor | None,
    v_1: Tensor | None,
    fusion_1: Tensor | None,
    a_2: Tensor,
    b0_2: Tensor,
    u_2: Tensor | None,
    v_2: Tensor | None,
    fusion_2: Tensor | None,
    task: Tensor | None,
    seed: Tensor | None,
    scaling: float,
    p: float,
    ranks: Sequence[int] | None,
    needs: Sequence[bool],
) -> list[Tensor]:
    """The gradients asked for by `needs`: of x, then of the FACTORS of the first adapter, then of the second."""
    pair = calls((a_1, b0_1, u_1, v_1, fusion_1), (a_2, b0_2, u_2, v_2, fusion_2), task, seed, scaling, p, ranks)
    wanted = tuple(
        frozenset(name for name, need in zip(("x", *FACTORS), (needs[0], *own), strict=True) if need)
        for own in (needs[1:6], needs[6:])
    )
    implementation = backends.choose("delta_pair", dy_1, *pair[0].rank_sizes)
    grads = implementation.backward((dy_1, dy_2), x, (weight_1, weight_2), (h_1, h_2), pair, wanted)
    dx = [grads[0]["x"]] if needs[0] else []
    return dx + [grad[name] for grad, own in zip(grads, wanted, strict=True) for name in FACTORS if name in own]


@delta_pair_backward.register_fake
def _(
    dy_1, dy_2, x, weight_1, weight_2, h_1, h_2, a_1, b0_1, u_1, v_1, fusion_1, a_2, b0_2, u_2, v_2, fusion_2,
    task, seed, scaling, p, ranks, needs,
):  # fmt: skip
    factors = (a_1, b0_1, u_1, v_1, fusion_1, a_2, b0_2, u_2, v_2, fusion_2)
    dx = [dy_1.new_empty(dy_1.shape[0], a_1.shape[1])] if needs[0] else []
    return dx + [t.new_empty(t.shape) for t, need in zip(factors, needs[1:], strict=True) if need]


def _setup_context(ctx, inputs, output):
    x, weight_1, _, *one = inputs[:8]
    weight_2, _, *two = inputs[8:15]
    task, seed, ctx.scaling, ctx.p, ctx.ranks = inputs[15:]
    asked = ctx.needs_input_grad
    if any(asked[i] for i in (1, 2, 8, 9)):
        raise ValueError(
            f"{NAME}: a weight or bias requires a gradient, but the bases are frozen here; "
            "leave them out and add F.linear(x, weight, bias) to train it"
        )
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2], output[3])
    ctx.needs = [asked[0], *asked[3:8], *asked[10:15]]
    own = ctx.needs[1:6], ctx.needs[6:]
    ctx.save_for_backward(
        x if own[0][0] or own[1][0] else None,
        *(weight if asked[0] else None for weight in (weight_1, weight_2)),
        *(h if any(needs[1:]) else None for h, needs in zip(output[2:], own, strict=True)),
        *one, *two, task, seed,
    )  # fmt: skip


def _backward(ctx, dy_1, dy_2, *_):
    none = (None,) * 20
    if (dy_1 is None and dy_2 is None) or not any(ctx.needs):
        return none
    x, weight_1, weight_2, h_1, h_2, *rest = ctx.saved_tensors
    some = dy_1 if dy_1 is not None else dy_2
    dy_1, dy_2 = (
        some.new_zeros(some.shape[0], b0.shape[0]) if dy is None else dy
        for dy, b0 in ((dy_1, rest[1]), (dy_2, rest[6]))
    )
    grads = delta_pair_backward(
        dy_1, dy_2, x, weight_1, weight_2, h_1, h_2, *rest, ctx.scaling, ctx.p, ctx.ranks, ctx.needs
    )
    found = iter(grads)
    dx, *factors = (next(found) if need else None for need in ctx.needs)
    return (dx, None, None, *factors[:5], None, None, *factors[5:], None, None, None, None, None)


delta_pair.register_autograd(_backward, setup_context=_setup_context)
