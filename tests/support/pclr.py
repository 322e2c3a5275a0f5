"""PCLR on a small LLaVA, trained for a few steps."""

import torch

from lilora.methods import make_method

from .clip_llava import TARGETS, batch, llava


def rows(inputs, i, images):
    first = sum(images[:i])
    one = {name: value[i : i + 1] for name, value in inputs.items() if name != "pixel_values"}
    if images[i]:
        one["pixel_values"] = inputs["pixel_values"][first : first + images[i]]
    return one


def pclr(**settings):
    small = {"r": 4, "alpha": 8.0, "cap": 12, "shared": 2, "target_modules": TARGETS}
    return make_method("pclr", llava(), small | settings)


def learn(method, task, steps=2, data=None):
    """The stages of a task, with a few steps of SGD each."""
    data = data or [batch() for _ in range(4)]
    for stage in method.stages(task):
        method.begin(stage, lambda samples: iter(data))
        method.model.train()
        learning = [p for p in method.model.parameters() if p.requires_grad]
        for _ in range(steps):
            inputs = data[0]

            def cross_entropy(inputs=inputs):
                outputs = method.model(**inputs)
                return outputs.loss, outputs

            grads = torch.autograd.grad(method.loss(inputs, cross_entropy, 1.0), learning, allow_unused=True)
            with torch.no_grad():
                for p, g in zip(learning, grads, strict=True):
                    p -= 0.05 * (0 if g is None else g)
        method.end(stage, lambda samples: iter(data))
        method.model.eval()


def learned(tasks=2, **settings):
    method = pclr(**settings)
    for i in range(tasks):
        learn(method, f"task{i}")
    for layer in method.layers.values():  # away from where every rank is nearly nothing
        for b in layer.lora_B.values():
            b.data.normal_(std=0.3)
    return method
