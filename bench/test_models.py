"""An MLP, a decoder layer, a training step and generation of a LLaVA: of 7B shape on a GPU, a small one on a CPU."""

import pytest
import torch

from . import models

TRIED = {
    "MLP": [("forward", n) for n in ("base", "ours", "peft", "peft_names")]
    + [("both", n) for n in ("base", "ours", "peft")],
    "training step": [("step", n) for n in ("base", "ours", "peft", "peft_split")],
    "generate": [("generate", n) for n in ("base", "ours", "peft_names")],
}
TRIED["decoder layer"] = TRIED["MLP"]
PARAMETERS = [(part, direction, name) for part in models.PARTS for direction, name in TRIED[part]]


@pytest.mark.parametrize("part, direction, name", PARAMETERS)
def test_model(part, direction, name, machine, seconds, measured, report, benchmark):
    size = models.TINY if machine.tiny else models.SMALL
    if machine.on_gpu:
        size = models.llava_7b(torch.cuda.get_device_properties(machine.device).total_memory)
    benchmark.group = f"{part}, {direction}"
    rows = measured(part, lambda: models.time_part(part, size, machine, seconds))
    report(rows, name, direction)
