"""`delta_pair` with the Triton kernels, in the interpreter."""

import pytest
import torch
from cases import make
from pair_cases import PAIR_CASES, adapters, check_pair, pair_id

import lilora_kernels
from lilora_kernels import functional
from lilora_kernels.ops import triton_runtime
from lilora_kernels.ops.delta import triton_backend as delta_backend
from lilora_kernels.ops.delta import triton_parts, triton_phases
from lilora_kernels.ops.delta_pair import triton_backend


@pytest.mark.parametrize("plan", ["by_phase", "composed"])
@pytest.mark.parametrize("at", range(len(PAIR_CASES)), ids=lambda at: pair_id(PAIR_CASES[at]))
def test_equals_two_calls(at, plan, monkeypatch):
    splits = 1 + at % 2
    tiles = {"BLOCK_M": 32, "BLOCK_K": 32, "BLOCK_N": 16, "phases": {}}
    plans = {
        "forward": {**tiles, "SPLIT_K": splits, "TILES_N": 2},
        "backward": {**tiles, "SPLIT_N": splits, "CHUNK": 32},
    }
    monkeypatch.setattr(triton_runtime, "config", lambda kernel, *_: triton_runtime.Configuration(plans[kernel]))
    by_m = triton_parts.TRITON._replace(forms_m=lambda *_: True)
    for module in (delta_backend, triton_backend):
        monkeypatch.setattr(module, "TRITON", by_m)
    with lilora_kernels.backend("triton"), lilora_kernels.plan(plan):
        check_pair(**PAIR_CASES[at])


def test_x_is_read_by_one_launch_each_way(monkeypatch):
    launches = []
    run = triton_phases.run

    def recording(kernel, device, first, last, items, tensors, *rest):
        given = dict(zip(kernel.arg_names, tensors, strict=False))
        if kernel is triton_phases.kernels.delta_forward and first == 0:
            launches.append("forward")
        read = ("dx", "da_planes", "da_planes_2")
        if kernel is triton_phases.kernels.delta_backward and first == 2 and any(given[n] is not None for n in read):
            launches.append("backward")
        run(kernel, device, first, last, items, tensors, *rest)

    monkeypatch.setattr(triton_phases, "run", recording)
    one, two = (make(rows=40, outputs=n, dtype=torch.float32, seed=n).leaves() for n in (20, 28))
    with lilora_kernels.backend("triton"):
        ys = functional.delta_pair(one.x, adapters(one), adapters(two), task=one.task)
        torch.cat(ys, 1).square().sum().backward()
    assert launches == ["forward", "backward"]
