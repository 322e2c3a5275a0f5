"""A copy or a pickle of a method's model computes the same and lives on its own: it asks nothing of the original."""

import copy
import io

import pytest
import torch
from support.clip_llava import TARGETS, batch, llava

from lilora.methods import METHODS, make_method

SIZES = {
    "lilora": {"r": 4, "sub_rank": 2},
    "dac": {"r": 4, "active": 2, "merged": 2, "critical": 2},
    "pclr": {"r": 4, "cap": 12, "shared": 2},
    "moelora": {"r": 4, "experts": 2},
}


def method(name):
    sizes = {} if name == "zero-shot" else {"r": 4}
    made = make_method(name, llava(), sizes | {"target_modules": TARGETS} | SIZES.get(name, {}))
    data = [batch(images=(0, 0, 0))]  # by images the vision tower would run: see below
    for stage in made.stages("one"):
        made.begin(stage, lambda samples, size=None: iter(data))
    with torch.no_grad():
        for parameter in made.model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return made.model.eval()


def pickled(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def logits(model, inputs):
    with torch.no_grad():
        return model(**{name: value for name, value in inputs.items() if name != "labels"}).logits


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", METHODS)
def test_a_copy_of_a_methods_model(name, copied):
    model, inputs = method(name), batch()
    twin = copied(model)  # before a forward: in it transformers adds hooks that cannot be pickled
    wanted = logits(model, inputs)
    assert torch.equal(logits(twin, inputs), wanted)
    with torch.no_grad():
        for module in model.modules():
            for parameter in module.parameters(recurse=False):
                parameter.zero_()
    assert torch.count_nonzero(logits(model, inputs)) == 0
    assert torch.equal(logits(twin, inputs), wanted)
