"""One tiny LLaVA for the tests of a module."""

import pytest
import torch
from support.tiny_llava import tiny_llava

from lilora_kernels.layers.lilora import set_task


@pytest.fixture(scope="module")
def shared():
    torch.manual_seed(0)
    return tiny_llava()


@pytest.fixture
def model(shared):
    """The model of the module, whose values no test changes."""
    set_task(shared, "read")
    return shared
