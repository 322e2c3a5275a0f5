"""What a method says that inference keeps is what it keeps."""

import pytest
from support import toy

from lilora.methods import METHODS, make_method

LINEARS = [(toy.HIDDEN, toy.WIDTH), (toy.WIDTH, toy.HIDDEN), (3, toy.WIDTH)]
SIZES = {"lilora": {"sub_rank": 2}, "moelora": {"experts": 2}, "dac": {"active": 2, "merged": 2, "critical": 2}}
UNKNOWN = ("pclr", "proglora", "eproj", "loda")  # the first three want a model that sees images
KNOWN = [name for name in METHODS if name not in UNKNOWN]


@pytest.mark.parametrize("name", KNOWN)
def test_parameters_are_what_the_sizes_of_the_linears_tell(name):
    sizes = {} if name == "zero-shot" else {"r": 4}
    settings = {"target_modules": toy.TARGETS} | sizes | SIZES.get(name, {})
    method = make_method(name, toy.Toy(), settings)
    of_all, of_each = METHODS[name].inference_parameters(METHODS[name].read_settings(settings), LINEARS)
    for number, task in enumerate(("a", "b"), 1):
        stages = method.stages(task)
        if not stages:
            method.add(task)
        for stage in stages:
            method.begin(stage, batches)
            toy.randomise(method)
            method.end(stage, batches)
        assert method.parameters() == of_all + number * of_each


def batches(samples, size=None):
    return iter([toy.sample(rows=1)])
