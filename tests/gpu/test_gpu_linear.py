"""`linear` and `delta_pair` on a GPU, a launch for each phase, and `linear` with one launch."""

import pytest
import torch
from support.cases import Errors, pairwise
from support.gpu_cases import AXES, add_errors, check_shape, check_variant, kind_id, make_pair, seed_tensor


def test_a_layer_of_a_large_model():
    check_shape("linear", 8192, 4096, 4096, 128, 64, 8, mix="sorted", dtype=torch.bfloat16, seeds=2)


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
def test_a_pair_of_layers_of_a_large_model(kernels):
    errors = Errors()
    pair = make_pair(4096, rows=4096, columns=2048, rank=128, sub_rank=64, tasks=8, mix="runs", dtype=torch.bfloat16)
    add_errors(errors, "pair", pair, 0.05, seed_tensor(-3), ("x", "a", "b0", "u", "v", "fusion"))
    errors.check()


@pytest.mark.parametrize("case", pairwise(AXES, seed=1), ids=kind_id)
def test_outputs_and_gradients_by_phase(case, plan):
    plan("by_phase")
    check_variant("linear", **case)


@pytest.mark.parametrize("rows", [1, 64, 200, 1000])
def test_outputs_and_gradients_of_one_launch(rows, plan):
    plan("one_launch")
    check_shape("linear", rows, 256, 384, 128, 64, 8, dtype=torch.bfloat16)


@pytest.mark.parametrize("kernels", ["triton"], indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("rows", [0, 70, 1000, 3001])
@pytest.mark.parametrize("coefficients", ["fusion", "lora"])
def test_outputs_and_gradients_of_a_pair(coefficients, rows, dtype, kernels):
    errors = Errors()
    for seed, mix in enumerate(("one", "random") * 4):
        shape = {"rows": rows, "columns": 136, "rank": 16, "sub_rank": 8, "tasks": 8, "coefficients": coefficients}
        pair = make_pair(96, **shape, mix=mix, dtype=dtype, seed=seed)
        add_errors(errors, "pair", pair, 0.3, seed_tensor(9), ("x", "a", "b0", "u", "v", "fusion"))
    errors.check()
