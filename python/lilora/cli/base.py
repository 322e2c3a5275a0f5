"""`lilora base`: base models made of their parts."""

import json
from pathlib import Path
from typing import Annotated

import typer

from .options import App, Json, NewFolder
from .output import console_line

app = App(no_args_is_help=True, help="Assemble base models of their parts.")


@app.callback()
def _group() -> None:
    """Assemble base models of their parts."""  # with a callback, typer keeps a single command's name


@app.command("llava")
def llava(
    language: Annotated[str, typer.Option(help="Vicuna or another Llama: a folder or a hub id.")],
    vision: Annotated[str, typer.Option(help="A CLIP, whose vision tower is taken: a folder or a hub id.")],
    projector: Annotated[Path, typer.Option(help="mm_projector.bin of LLaVA's first stage; read as plain tensors.")],
    out: NewFolder,
    as_json: Json = False,
) -> None:
    """Write a LLaVA-1.5 that is not instruction-tuned yet.

    From a language model, a vision tower and the projector that was trained between them: the base that papers train.
    """
    from lilora.importers.llava_base import assemble_llava

    assemble_llava(language, vision, projector, out)
    if as_json:
        print(json.dumps({"folder": str(out)}))
    else:
        console_line(f"base model: {out}")
