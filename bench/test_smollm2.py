"""A real language model with eight tasks, on a CPU; with --tiny a Llama of random weights in its place."""

import pytest

from . import smollm2


@pytest.mark.parametrize("name", smollm2.IMPLEMENTATIONS)
def test_smollm2(name, machine, seconds, measured, report, benchmark):
    reason = "it is measured on a CPU" if machine.on_gpu else smollm2.missing(machine.tiny)
    if reason is not None:
        pytest.skip(reason)
    benchmark.group = "SmolLM2-135M, generate"
    problem = smollm2.tiny if machine.tiny else smollm2.load
    found = measured("SmolLM2-135M", lambda: smollm2.rows(problem(), machine, seconds))
    report([row for row in found if row["samples"] > 1], name, "generate")
