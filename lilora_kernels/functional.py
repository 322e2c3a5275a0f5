"""The public functions. Shapes and formula: ops/README.md.

x [..., K] rows, M of them; weight [N, K], bias [N]; a [R, K] and b0 [N, R] shared by all tasks; u [T, N, S], v [T, S, R],
fusion [T] per task, or u [N, S], v [S, R], fusion [1] of one task for all rows; task [M] int32, the row's task or -1 for
rows without an adapter; gate [G, R] and gate_row [M] int32.
Parameters may have another floating dtype than x (fp32 masters under bf16 activations): they are cast inside.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .ops.delta.register import delta as _delta
from .ops.delta_pair.register import delta_pair as _delta_pair
from .ops.experts.register import expert_linear as _expert_linear
from .ops.linear.register import linear as _linear
from .ops.operation import Operation
from .ops.rank_gate.register import rank_gate as _rank_gate


def delta(
    x: Tensor,
    a: Tensor,
    b0: Tensor,
    u: Tensor | None = None,
    v: Tensor | None = None,
    fusion: Tensor | None = None,
    *,
    task: Tensor | None = None,
    gate: Tensor | None = None,
    gate_row: Tensor | None = None,
    seed: Tensor | None = None,
    scaling: float = 1.0,
    p: float = 0.0,
    ranks: Sequence[int] | None = None,
) -> Tensor:
    """The adapter alone: scaling * (h * g) M_t^T with h = D(x) a^T and M_t = f_t b0 + e_t u_t v_t -> [..., N].

    fusion given: f = sigmoid(fusion), e = 1 - f (LiLoRA, arXiv 2508.06202). fusion None: f = e = 1. u and v None: M = b0.
    task may be None for a single task: every row is its own. Dropout with probability p needs `seed` (see `draw_seed`);
    the same seed gives the same mask. ranks = (lo, hi) limits the gradients of a and b0 to these ranks; the rest get zeros.

    Under autocast x is cast to the autocast dtype. Deterministic; gradients nobody asks for are not computed.
    Raises ValueError for shapes and ranges, TypeError for dtypes.
    """
    check_task("delta", task)
    return of_rows(_delta, autocast(x), a, b0, u, v, fusion, task, gate, gate_row, seed, scaling, p, ranks)


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b0: Tensor,
    u: Tensor | None = None,
    v: Tensor | None = None,
    fusion: Tensor | None = None,
    *,
    task: Tensor | None = None,
    gate: Tensor | None = None,
    gate_row: Tensor | None = None,
    seed: Tensor | None = None,
    scaling: float = 1.0,
    p: float = 0.0,
    ranks: Sequence[int] | None = None,
) -> Tensor:
    """x weight^T + bias + delta(x, ...) -> [..., N], the base product included; weight and bias are frozen.

    Arguments as in `delta`. Without autocast x and weight must have the same dtype, as in torch.nn.functional.linear.
    """
    cast = autocast(x)
    check_dtypes("linear", x, cast, weight)
    check_task("linear", task)
    return of_rows(_linear, cast, weight, bias, a, b0, u, v, fusion, task, gate, gate_row, seed, scaling, p, ranks)


def delta_pair(
    x: Tensor,
    first: Sequence[Tensor | None],
    second: Sequence[Tensor | None],
    *,
    bases: Sequence[tuple[Tensor, Tensor | None]] | None = None,
    task: Tensor | None = None,
    seed: Tensor | None = None,
    scaling: float = 1.0,
    p: float = 0.0,
    ranks: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Two adapters of one x with one dropout mask, as gate_proj and up_proj of an MLP -> ([..., N_1], [..., N_2]).

    first and second: (a, b0, u, v, fusion) each, of equal r, sub_rank and tasks, the last three None as in `delta`.
    bases: their frozen (weight, bias), added to the results as `linear` does; without them the adapters alone.
    On a GPU the adapters' kernels read x once in forward and once in backward. Other arguments, casts and errors as in `delta`.
    """
    for name, factors in (("first", first), ("second", second)):
        if len(factors) != 5:
            raise ValueError(f"delta_pair: {name} has {len(factors)} entries; it must be (a, b0, u, v, fusion)")
    bases = ((None, None),) * 2 if bases is None else bases
    if len(bases) != 2 or any(not isinstance(base, tuple | list) or len(base) != 2 for base in bases):
        raise ValueError("delta_pair: bases must be two pairs (weight, bias), the bias possibly None")
    (weight_1, bias_1), (weight_2, bias_2) = bases
    cast = autocast(x)
    for weight in (weight_1, weight_2):
        check_dtypes("delta_pair", x, cast, weight)
    check_task("delta_pair", task)
    return of_rows(
        _delta_pair, cast, weight_1, bias_1, *first, weight_2, bias_2, *second, task, seed, scaling, p, ranks
    )


def expert_linear(
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    a: Tensor,
    b0: Tensor,
    u: Tensor,
    v: Tensor,
    fusion: Tensor | None = None,
    *,
    seed: Tensor | None = None,
    scaling: float = 1.0,
    p: float = 0.0,
) -> Tensor:
    """`linear` with a weight and an adapter for each expert: x W_e^T + scaling * D(x) A_e^T M_{e,t}^T -> [M, N].

    x: [M, K] in the order of `lilora_kernels.group_rows`, whose `ends` says how many rows each group has: [E] where all rows
    belong to one task, else [E, T + 1], int32. weight: [E, N, K], frozen. a [E, R, K] and b0 [E, N, R] shared by all tasks;
    u [T, E, N, S], v [T, E, S, R] and fusion [T, E] per task, without T where ends is [E].

    Other arguments, casts and errors as in `linear`. On a GPU the host waits for `ends` where torch._grouped_mm does not take
    the products: in other types than bf16, and with sizes that are no multiples of 8.
    """
    cast = autocast(x)
    check_dtypes("expert_linear", x, cast, weight)
    return _expert_linear(cast, weight, ends, a, b0, u, v, fusion, seed, scaling, p)[0]


def rank_gate(scores: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """The r ranks of highest score in each row -> (gate [G, n], 1 at these and 0 elsewhere; chosen [G, r] int64).

    scores [G, n] of any floating dtype, which gate has too; 1 <= r <= n. chosen lists the best rank first; of equal scores the
    lowest index comes first, and NaN counts as -inf. gate has no gradient. Autocast leaves scores alone: rounding would make
    ties.
    Raises ValueError for shapes and ranges, TypeError for dtypes.
    """
    return _rank_gate(scores.detach(), r)


def of_rows(operation: Operation, x: Tensor, *args: Any, known: bool = False) -> Tensor | tuple[Tensor, Tensor]:
    """The y of an operation, or both, that takes x [..., K] as [M, K]; `known` as for the operation."""
    if x.dim() == 2:
        y, *more = operation(x, *args, known=known)
        return y if len(more) == 1 else (y, more[0])
    y, *more = operation(x.reshape(-1, x.shape[-1]), *args, known=known)
    y = y.view(*x.shape[:-1], y.shape[-1])
    return y if len(more) == 1 else (y, more[0].view(*x.shape[:-1], more[0].shape[-1]))


def check_task(op: str, task: Tensor | None) -> None:
    if task is not None and not isinstance(task, Tensor):
        raise TypeError(
            f"{op}: task is {task!r}; pass an int32 tensor [M] with the id of each row's task, -1 for none: names and lists are "
            "for task_ids of an attached model"
        )


def check_dtypes(op: str, x: Tensor, cast: Tensor, weight: Tensor | None) -> None:
    if weight is not None and cast.dtype != weight.dtype and not autocasts(x):
        raise TypeError(f"{op}: x is {x.dtype} and weight is {weight.dtype}; cast one of them or use torch.autocast")


def autocasts(x: Tensor) -> bool:
    if not (torch.compiler.is_compiling() or torch._C._is_any_autocast_enabled()):
        return False
    return not x.is_meta and torch.is_autocast_enabled(x.device.type)  # torch raises for the meta device


def autocast(x: Tensor) -> Tensor:
    """x in the autocast dtype of its device; fp64 and x itself outside autocast are left alone."""
    if autocasts(x) and x.dtype in (torch.float32, torch.bfloat16, torch.float16):
        return x.to(torch.get_autocast_dtype(x.device.type))
    return x


def draw_seed(device: torch.device) -> Tensor:
    """A dropout seed [1] int64 from torch's generator of `device`: checkpointing and manual_seed reproduce it."""
    return torch.randint(2**63 - 1, (1,), device=device)
