"""`lilora generate`."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from lilora.errors import UserError

from .options import AnyBank, Base, Device, check_not_read
from .output import console_line


def generate(
    bank: AnyBank,
    prompt: Annotated[str | None, typer.Option(help="One question.")] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Many questions: a file with a JSON object per line, with prompt and, where wanted, task, image (a path or "
            "several, from the file's folder) and id."
        ),
    ] = None,
    task: Annotated[
        str | None, typer.Option(help="Which task answers where none is named. Default: the one that the bank finds.")
    ] = None,
    image: Annotated[
        list[Path] | None, typer.Option(help="Image file of --prompt; may be given several times, or not at all.")
    ] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(
            min=1, help="Most tokens of an answer. Default: as the manifest of the training says for the task."
        ),
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Questions per batch; tasks are mixed.")] = 16,
    out: Annotated[
        Path | None, typer.Option(help="File for the answers to --prompts, as JSON lines. Default: standard output.")
    ] = None,
    model: Base = None,
    device: Device = "auto",
) -> None:
    """Answer questions with the tasks of a bank.

    An answer to --prompts is a JSON object with id, task and answer. They come in the order of the questions, whose id is
    by default the number of their line.
    """
    from rich.console import Console
    from rich.progress import Progress

    from lilora.bank.atomic import write_atomically
    from lilora.continual.base_model import load_bank, open_trained
    from lilora.continual.prompts import Prompt, answer_prompts, check_prompts, read_prompts

    if (prompt is None) == (prompts is None):
        raise UserError("give either --prompt with one question or --prompts with a file of many")
    if prompts is not None and image:
        raise UserError("--image goes with --prompt; name the images of --prompts in its lines")
    if prompt is not None and out is not None:
        raise UserError("--out goes with --prompts; one answer is printed")
    if prompts is None:
        questions = [Prompt("--prompt", "prompt", task, tuple(image or ()), prompt)]
    else:
        questions = read_prompts(prompts, task)
    check_prompts(questions, open_trained(bank))
    if out is not None and prompts is not None:
        check_not_read("--out", out, [prompts, *(image for question in questions for image in question.images)])
    opened, method, processor = load_bank(bank, model, device, answers=True)
    with Progress(console=Console(stderr=True), transient=True, disable=prompts is None) as progress:
        answers = answer_prompts(opened, method, processor, questions, max_new_tokens, batch_size, progress)
    if prompts is None:
        (chosen, answer), *_ = answers
        if task is None and method.needs_task:
            print(f"task: {chosen}", file=sys.stderr)
        print(answer)
        return
    lines = [
        json.dumps({"id": question.id, "task": routed, "answer": answer}, ensure_ascii=False)
        for question, (routed, answer) in zip(questions, answers, strict=True)
    ]
    if out is None:
        print("\n".join(lines))
    else:
        write_atomically(out, ("\n".join(lines) + "\n").encode())
        console_line(f"answers: {out}")
