"""The comparison that `MOST_PRODUCTS` and `FORWARD_ROWS` were read from."""

import pytest
import torch

from bench import small_training
from lilora_kernels import cpu_library
from lilora_kernels.ops.cpu_training import OPERANDS

pytestmark = pytest.mark.skipif(isinstance(cpu_library.load(), str), reason=f"{cpu_library.load()}")


def test_both_plans_compute_the_same_beyond_the_limits_of_the_choice_too(monkeypatch):
    monkeypatch.setattr(cpu_library.load(), "outruns", False)
    for name in ("MOST_PRODUCTS", "FORWARD_X", "FORWARD_ROWS"):
        monkeypatch.setattr(small_training.cpu_training, name, 0)
    torch.manual_seed(0)
    runs = small_training.runs(7, 24, 20, 8, 4)
    own, library = (run() for run in runs.values())
    for name, got in zip(OPERANDS, own, strict=True):
        torch.testing.assert_close(got, library[name], rtol=1e-4, atol=1e-4)
    assert all(us > 0 for us in small_training.least(runs, 0).values())
    (own,), library = (run() for run in small_training.runs(7, 24, 20, 8, 4, tasks=3, backward=False).values())
    torch.testing.assert_close(own, library["y"], rtol=1e-4, atol=1e-4)
    own, library = (run() for run in small_training.bare(72, 24, 20).values())
    torch.testing.assert_close(own, library, rtol=1e-4, atol=1e-4)
    own, library = (run()[0] for run in small_training.decoded(5, 24, 20, 8, 4, 3).values())
    own = own[0] if isinstance(own, tuple) else own
    torch.testing.assert_close(own, library, rtol=2e-2, atol=2e-2)
