"""Cases of `delta_pair` for every backend: it must equal two calls of the single operation."""

import torch

from lilora_kernels import functional
from support.cases import SCALING, base, case_id, gradients, make

FACTORS = ("a", "b0", "u", "v", "fusion")
ALL = ("x", *FACTORS)
PAIR_CASES = [
    {"rows": 40, "mix": "random", "p": 0.3, "wanted": (ALL, ALL), "bases": True},
    {"rows": 40, "mix": "one", "p": 0.0, "wanted": (ALL, ALL), "bases": False},
    {"rows": 33, "mix": "runs", "p": 0.5, "wanted": (("x",), ()), "bases": True},
    {"rows": 33, "mix": "sorted", "p": 0.3, "wanted": ((), ("a", "u")), "bases": True},
    {"rows": 33, "mix": "random", "p": 0.3, "wanted": (("a",), ("b0", "fusion")), "bases": False},
    {"rows": 35, "mix": "same", "p": 0.1, "wanted": (("x", "v"), ("a", "v")), "bases": True, "coefficients": "plain"},
    {"rows": 17, "mix": "random", "p": 0.1, "wanted": (ALL, ALL), "bases": True, "coefficients": "lora"},
    {"rows": 0, "mix": "one", "p": 0.1, "wanted": (ALL, ALL), "bases": True},
]


def pair_id(case):
    return case_id({**case, "wanted": "+".join("".join(names) or "none" for names in case["wanted"])})


def adapters(i):
    return [getattr(i, name) for name in FACTORS]


def check_pair(rows, mix, p, wanted, bases, coefficients="fusion", columns=64):
    given = [make(rows, columns, n, 16, 8, 3, coefficients, mix, dtype=torch.float32, seed=n) for n in (36, 52)]
    given[1].x, given[1].task = given[0].x, given[0].task
    more = {"task": given[0].task, "scaling": SCALING, "p": p, "seed": torch.tensor([77])}
    weights = [base(i, bias=n == 0) for n, i in enumerate(given)]
    ours = [i.leaves(names) for i, names in zip(given, wanted, strict=True)]
    single = [i.leaves(names) for i, names in zip(given, wanted, strict=True)]
    single[1].x = single[0].x
    ys = functional.delta_pair(
        ours[0].x, adapters(ours[0]), adapters(ours[1]), bases=weights if bases else None, **more
    )
    wants = [
        functional.linear(single[0].x, *weights[n], *adapters(i), **more)
        if bases
        else functional.delta(single[0].x, *adapters(i), **more)
        for n, i in enumerate(single)
    ]
    for y, want in zip(ys, wants, strict=True):
        torch.testing.assert_close(y, want)
    dys = [torch.randn_like(y) for y in ys]
    loss = sum((y * dy).sum() for y, dy in zip(ys, dys, strict=True))
    want_loss = sum((y * dy).sum() for y, dy in zip(wants, dys, strict=True))
    if not loss.requires_grad:
        return
    for n in (0, 1):
        names = [name for name in wanted[n] if name != "x" or n == 0]
        got = gradients(loss, ours[n], names, None, True)
        for name, want in gradients(want_loss, single[n], names, None, True).items():
            torch.testing.assert_close(got[name], want, rtol=1e-4, atol=1e-4, msg=lambda m, name=name: f"d{name}: {m}")
