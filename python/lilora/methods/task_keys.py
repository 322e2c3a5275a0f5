"""What ProgLoRA and EProj share: blocks of ranks in one pool, a key for every task, and weights of the blocks by the prompt.

In the formula of the gated pool: each sample's gate repeats a block's weight over its ranks. A task's key is the mean of the
queries of its training samples, frozen; queries are those of PCLR, the direction of the prompt's text and of the image.
"""

from typing import Any

import torch
from torch import Tensor, nn

from lilora_kernels.functional import rank_gate
from lilora_kernels.layers.rank_pool import Choice

from .base import Batches, Method, Stage, Tensors, evaluating
from .pclr.pool import Query, normalised
from .pclr.queries import PoolChooser, PoolTasks, attach_pools, query_source
from .pooled import fresh, inject_rank_pools, load_rank_pools, pool_tensors, require_grad_only

KEY_SAMPLES = 256  # training samples of a task that its key is the mean of


class TaskKeys:
    """The keys [tasks, d] of norm 1, the block of each task, and the weights that samples give the blocks by them.

    weights = softmax(cos(query, key) / temperature) over the `top` nearest keys. training: the number of the block that is
    being trained; the newest task is among the nearest then. The model's layers ask for a choice as if of PCLR's pool.
    """

    def __init__(self, keys: Tensor, ranks: int, top: int, temperature: float) -> None:
        self.keys, self.owner = keys, torch.zeros(0, dtype=torch.int64, device=keys.device)
        self.ranks, self.top, self.temperature = ranks, top, temperature
        self.training: int | None = None

    @property
    def blocks(self) -> int:
        return int(self.owner.max()) + 1 if len(self.owner) else 0

    def sizes(self) -> dict[str, int]:
        return {block_name(i): self.ranks for i in range(self.blocks)}

    def put(self, key: Tensor, block: int) -> None:
        """Another task, of this key [1, d] and block."""
        self.keys = torch.cat([self.keys, key])
        self.owner = torch.cat([self.owner, self.owner.new_tensor([block])])

    def weights(self, query: Tensor) -> Tensor:
        """[B, tasks] of queries [B, d] of norm 1."""
        near = query @ self.keys.T
        order = near.clone()
        if self.training is not None:
            order[:, -1] = torch.inf
        chosen = rank_gate(order, min(self.top, len(self.keys)))[0].bool()
        return (near / self.temperature).masked_fill(~chosen, -torch.inf).softmax(1)

    def choose(self, query: Query, teacher: bool = False, newest: Tensor | None = None) -> Choice:
        blocks = list(range(self.blocks))
        if self.training is not None:  # last: those before it cost no gradient
            blocks = [*([] if self.top == 1 else (i for i in blocks if i != self.training)), self.training]
        member = self.owner[:, None] == torch.tensor(blocks, device=self.owner.device)
        weights = self.weights(of_norm_1(query)) @ member.to(self.keys.dtype)  # [B, blocks]
        return Choice(tuple(((block_name(i),), None) for i in blocks), weights.repeat_interleave(self.ranks, 1))


def block_name(number: int) -> str:
    return f"block{number}"


def of_norm_1(query: Query) -> Tensor:
    """Text and vision as one vector of norm 1, [B, d_text + d_vision]."""
    return normalised(torch.cat([query.text, query.vision], 1))


class KeyedLoRAs(Method):
    """Blocks of LoRAs that each sample weighs by the keys of the tasks; top and temperature: see TaskKeys."""

    no_lora = "each sample weighs LoRAs by its prompt and image; use lilora generate and eval"
    mixed_batches = True
    needs_task = False
    one_state = True
    answers_only = True
    top: int
    temperature: float

    def __init__(self, base: nn.Module, settings: dict[str, Any]) -> None:
        super().__init__(base, settings)
        s = self.options = self.read_settings(settings)
        source = query_source(base)
        self.model, self.pool_tasks = base, PoolTasks(source)
        none = torch.zeros(0, sum(source.widths), device=base.device)
        self.keys = TaskKeys(none, s.r, self.top, self.temperature)
        chooser = PoolChooser(self.keys)
        self.layers = inject_rank_pools(base, s.target_modules, lambda *_: chooser, s.alpha / s.r, s.dropout)
        attach_pools(base, self.pool_tasks)
        require_grad_only(base)

    def block_of(self, key: Tensor) -> int:
        """Which block a new task of this key [1, d] trains; one that does not exist yet is made."""
        return self.keys.blocks

    def add(self, task: str) -> None:
        self.tasks.append(task)

    def activate(self, task: str, train: bool) -> None:
        """Every task is served by the same model."""

    def begin(self, stage: Stage, batches: Batches) -> None:
        key = self.mean_query(batches)
        block = self.block_of(key)
        if block == self.keys.blocks:
            for layer in self.layers.values():
                layer.put(block_name(block), *fresh(layer, self.options.r), train=False)
        self.keys.put(key, block)
        self.keys.training = block
        self.add(stage.task)
        require_grad_only(self.model, *self.block(block).values())

    def end(self, stage: Stage, batches: Batches) -> None:
        self.keys.training = None
        require_grad_only(self.model)

    def block(self, number: int) -> Tensors:
        """A and B0 of a block, as the bank names them."""
        ends = tuple(f".{block_name(number)}.{kind}" for kind in ("A", "B0"))
        return {name: tensor for name, tensor in pool_tensors(self.layers).items() if name.endswith(ends)}

    @torch.no_grad()
    def mean_query(self, batches: Batches) -> Tensor:
        """Direction of the mean query of a task's training samples, [1, d]."""
        with evaluating(self.model):
            queries = [of_norm_1(self.pool_tasks.queries(self.model, inputs)) for inputs in batches(KEY_SAMPLES)]
        return normalised(torch.cat(queries).mean(0, keepdim=True))

    # --- the bank ---------------------------------------------------------------------------------------------------

    def tensors(self, task: str) -> tuple[Tensors, Tensors]:
        keys = {"state.keys": self.keys.keys, "state.owner": self.keys.owner.float()}
        return {}, pool_tensors(self.layers) | keys

    def restore(self, tasks: dict[str, tuple[Tensors, Tensors]]) -> None:
        if not tasks:
            return
        self.tasks = list(tasks)
        stored = {name: tensor.to(self.model.device) for name, tensor in tasks[self.tasks[-1]][1].items()}
        load_rank_pools(self.layers, stored)
        self.keys.keys, self.keys.owner = stored["state.keys"], stored["state.owner"].long()

    def ranks(self) -> int:
        return self.options.r * self.keys.blocks
