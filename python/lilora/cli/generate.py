"""`lilora generate`."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from .options import AnyBank, Device, bank_router


def generate(
    bank: AnyBank,
    prompt: Annotated[str, typer.Option(help="The question.")],
    task: Annotated[
        str | None, typer.Option(help="Which task's adapter answers; default: the one that the bank's router finds.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Image file; may be given several times, or not at all.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    model: Annotated[str | None, typer.Option(help="Base model; default: the one the bank was made with.")] = None,
    device: Device = "auto",
) -> None:
    """Answer one question with one task of a bank."""
    import torch

    from lilora.continual import evaluate as evaluation
    from lilora.continual.base_model import load_bank
    from lilora.continual.collator import Collator
    from lilora.continual.images import open_image
    from lilora.continual.instructions import Sample

    for path in image or ():
        open_image(path)
    opened, method, processor = load_bank(bank, model, device, task, answers=True)
    sample = Sample("prompt", tuple(image or ()), prompt, ("",))
    if task is None and method.needs_task:
        router = bank_router(opened, method)
        (task,) = router.route(Collator(processor, {"": 0}, train=False)([("", sample)]))
        print(f"task: {task}", file=sys.stderr)
    task = task or opened.tasks[-1]
    if not method.mixed_batches:
        method.activate(task, train=False)
    method.model.eval()
    collator = Collator(processor, {task: 0}, train=False)
    with torch.inference_mode():
        print(evaluation.generate(method, processor, collator, [(task, sample)], {task: max_new_tokens})[0])
