"""What transformers' Trainer is to know of a model's loss."""

import inspect

from torch import nn


def tell_of_loss(model: nn.Module) -> None:
    """Let the Trainer know of a model whose forward takes any keyword and returns a mean loss whatever `num_items_in_batch` says.

    T5, BART and their relatives do. It would not divide the losses of a step's batches by the number of these.
    """
    code = getattr(inspect.unwrap(type(model).forward), "__code__", None)
    if code is None or hasattr(model, "accepts_loss_kwargs"):
        return
    named = {*code.co_names, *code.co_varnames, *code.co_consts}
    if "labels" in named and "CrossEntropyLoss" in named and "num_items_in_batch" not in named:
        model.accepts_loss_kwargs = False
