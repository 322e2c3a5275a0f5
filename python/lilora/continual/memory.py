"""What to do where a device's memory does not hold a batch."""

import gc
from collections.abc import Callable, Sequence
from typing import Any

import torch
from accelerate.utils.memory import should_reduce_batch_size

from lilora.errors import UserError, print_note


def ran_out(error: Exception) -> bool:
    """Whether an error says that a device, or the host, has no memory left."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or should_reduce_batch_size(error)


class InParts:
    """Calls `run` on batches: on halves of one that memory does not hold, and on no larger ones from then on.

    run: batch -> a list of as many results. what: of the batches, in print. Raises UserError when one sample is too much.
    """

    def __init__(self, run: Callable[[Sequence[Any]], list[Any]], what: str) -> None:
        self.run, self.what = run, what
        self.limit: int | None = None

    def __call__(self, batch: Sequence[Any]) -> list[Any]:
        size = min(len(batch), self.limit or len(batch))
        results: list[Any] = []
        while len(results) < len(batch):
            part = batch[len(results) : len(results) + size]
            try:
                results += self.run(part)
                continue
            except Exception as error:
                if not ran_out(error):
                    raise
            # Outside of the handler, which keeps the tensors of the failed batch.
            if len(part) == 1:
                raise UserError(
                    f"{self.what}: memory does not hold one sample; use a larger device, or a smaller --dtype"
                )
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.limit = size = (len(part) + 1) // 2
            print_note(f"{self.what}: memory does not hold {len(part)} samples at once; going on with {size}")
        return results
