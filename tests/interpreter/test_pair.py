"""`delta_pair` with the Triton kernels, in the interpreter."""

import pytest
import torch
from support.cases import make
from support.pair_cases import PAIR_CASES, adapters, check_pair, pair_id

import lilora_kernels
from lilora_kernels import functional
from lilora_kernels.ops.delta import triton_backend as delta_backend
from lilora_kernels.ops.delta import triton_configs, triton_jobs, triton_parts
from lilora_kernels.ops.delta_pair import triton_backend


@pytest.mark.parametrize("plan", ["by_phase", "composed"])
@pytest.mark.parametrize("at", range(len(PAIR_CASES)), ids=lambda at: pair_id(PAIR_CASES[at]))
def test_equals_two_calls(at, plan, monkeypatch):
    splits = 1 + at % 2
    sizes = {
        "BLOCK_M": 32,
        "BLOCK_K": 32,
        "BLOCK_N": 16,
        "SPLIT_K": splits,
        "SPLIT_N": splits,
        "TILES_N": 2,
        "CHUNK": 32,
    }
    monkeypatch.setattr(triton_configs, "configuration", lambda *_: triton_configs.Configuration(sizes))
    by_m = triton_parts.TRITON._replace(forms_m=lambda *_: True)
    for module in (delta_backend, triton_backend):
        monkeypatch.setattr(module, "TRITON", by_m)
    with lilora_kernels.backend("triton"), lilora_kernels.plan(plan):
        check_pair(**PAIR_CASES[at])


def test_x_is_read_by_one_launch_each_way(monkeypatch):
    launches, run = [], triton_jobs.run

    def recording(made, items, device, groups, *rest):
        of_both = all(any(t is not None for t in group) for group in groups[:2])
        launches.append((made.kernel.__name__, of_both))
        run(made, items, device, groups, *rest)

    monkeypatch.setattr(triton_jobs, "run", recording)
    one, two = (make(rows=40, outputs=n, dtype=torch.float32, seed=n).leaves() for n in (20, 28))
    with lilora_kernels.backend("triton"):
        ys = functional.delta_pair(one.x, adapters(one), adapters(two), task=one.task)
        torch.cat(ys, 1).square().sum().backward()
    once = {"shrink": [True], "from_x": [True, False]}  # of both adapters; then the second one's sums over rows
    for kernel, of_both in once.items():
        assert [both for name, both in launches if name == kernel] == of_both
