"""What several processes cannot train together, said before any of them starts."""

from lilora.errors import UserError
from lilora.methods import Method

from . import processes
from .instructions import instruction_data
from .kinds import Kind
from .task_sequence import Manifest


def splits_freely(method: type[Method], kind: Kind) -> bool:
    """Whether it changes nothing but rounding and dropout how the samples of a step are divided into batches."""
    return method.one_process_reason is None and kind.one_process_reason is None


def check_processes(method: type[Method], kind: Kind, batch_size: int) -> None:
    """UserError unless as many processes as were started can train together."""
    for what, reason in (
        (f"--method {method.name}", method.one_process_reason),
        ("these tasks", kind.one_process_reason),
    ):
        if reason is not None and processes.world_size() > 1:
            raise UserError(
                f"{what}: one process alone can train, because {reason}; start the command without a launcher"
            )
    if processes.deepspeed() and method.after_step is not Method.after_step:
        raise UserError(
            f"--method {method.name} cannot train with DeepSpeed, because {method.one_process_reason}; start the command "
            "without a launcher"
        )
    if processes.sharded() and kind.heads:
        raise UserError("FSDP2 would shard the tasks' classifiers too; use examples/accelerate/ddp.yaml")
    if processes.sharded() and not method.sharded_parameters:
        raise UserError(
            f"--method {method.name} reads its parameters outside the forward, where FSDP2 has sharded them; use "
            "examples/accelerate/ddp.yaml"
        )
    if batch_size % processes.world_size():
        raise UserError(
            f"--batch-size {batch_size} cannot be divided among {processes.world_size()} processes; give a multiple of it"
        )


def require_images_alike(manifest: Manifest, mixed: bool) -> None:
    """UserError for images in some samples only: one process would gather a vision tower's shards alone.

    mixed: whether a batch may hold samples of several tasks.
    """
    makes = {spec.name: {images for images, *_ in instruction_data(spec, "train").first} for spec in manifest.tasks}
    if mixed:
        makes = {", ".join(makes): set().union(*makes.values())}
    for names, kinds in makes.items():
        if len(kinds) > 1:
            raise UserError(
                f"task {names!r} has samples with images and without, which FSDP2 cannot train together; use "
                "examples/accelerate/ddp.yaml"
            )
