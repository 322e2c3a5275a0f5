"""The Hugging Face hub's side of a folder: its model card, and reading one by the name of its repository."""

from pathlib import Path

from huggingface_hub import ModelCard, ModelCardData, snapshot_download
from huggingface_hub.utils import HFValidationError, validate_repo_id

from lilora.errors import UserError

from .atomic import write_atomically
from .bank import Bank
from .index import INDEX

CARD = "README.md"


def is_hub_id(name: str) -> bool:
    """Whether a name is of the form owner/name, and of nothing on this machine."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return "/" in name and not Path(name).exists()


def downloaded(path: Path) -> Path:
    """`path`; or, if nothing is there and it reads as owner/name, the local copy of that repository's bank.

    Raises:
        UserError: there is no such repository, or no way to it.
    """
    name = path.as_posix()
    if not is_hub_id(name):
        return path
    try:
        # The index first: a repository that holds something else, a whole model perhaps, is not downloaded for nothing.
        found = Path(snapshot_download(name, allow_patterns=[INDEX, f"bank/{INDEX}"]))
        for index in (found / INDEX, found / "bank" / INDEX):
            if index.exists():
                snapshot_download(name, allow_patterns=[f"{index.parent.relative_to(found) / '*.safetensors'}"])
        return found
    except OSError as error:  # all errors of the hub, too
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{name} is no folder here, and as a repository of the hub it cannot be read ({reason}); give a bank's folder or "
            "the repository of one"
        ) from error


def open_bank(path: str | Path) -> Bank:
    """The bank in a folder (its own or a run's), or in a repository of the hub."""
    return Bank.open(downloaded(Path(path)))


def write_card(
    folder: Path,
    title: str,
    *,
    base_model: str | None,
    library: str,
    tags: list[str],
    sections: dict[str, str],
    relation: str = "adapter",
    pipeline: str | None = None,
) -> None:
    """Make the README.md of `folder` a model card: what the hub reads of it as YAML, then a heading for each section.

    relation: what the folder is of its base model, "adapter" or "finetune". A base model that is a folder is named in no
    metadata: the hub takes its own ids only.
    """
    on_hub = base_model is not None and is_hub_id(base_model)
    data = ModelCardData(
        base_model=base_model if on_hub else None,
        base_model_relation=relation if on_hub else None,
        library_name=library,
        pipeline_tag=pipeline,
        tags=tags,
    )
    text = "\n\n".join(f"## {heading}\n\n{section}" for heading, section in sections.items())
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{text}\n")
    write_atomically(folder / CARD, str(card).encode())
