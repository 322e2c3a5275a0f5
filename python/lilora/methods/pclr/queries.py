"""Queries of a batch from the frozen parts of a multimodal model, and the forwards that choose ranks by them."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn

from lilora.errors import UserError
from lilora.methods.pclr.pool import Query, RankPool, normalised
from lilora_kernels.attach import attach
from lilora_kernels.layers.rank_pool import Choice, RankPoolLinear
from lilora_kernels.routing.context import BatchContext, Tasks, tokens_of


class QuerySource:
    """Text query: mean of the frozen input embeddings of a prompt's text tokens. Vision query: the first ([CLS]) token
    that `layer`, a layer of the frozen vision tower, puts out, mean over the sample's images.

    image_token: the id that stands for one row of an image in the prompt, which is no text.
    """

    def __init__(
        self, embedding: nn.Embedding, tower: nn.Module, layer: nn.Module, width: int, image_token: int
    ) -> None:
        self.embedding, self.tower, self.layer, self.image_token = embedding, tower, layer, image_token
        self.widths = embedding.weight.shape[1], width

    @torch.no_grad()
    def text(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """[B, d_text] fp32 from input_ids [B, L]; padding and, in training, the answers that labels mark are left out."""
        return prompt_mean(self.embedding, self.image_token, input_ids, attention_mask, labels)

    def vision_tokens(self, input_ids: Tensor) -> list[int]:
        """Image tokens of each sample."""
        return (input_ids == self.image_token).sum(1).tolist()


def query_source(model: nn.Module) -> QuerySource:
    """Where the queries of a rank pool come from: input embeddings, and [CLS] after the last but one layer of the tower.

    UserError for a model without such a vision tower.
    """
    tower = next((module for name, module in model.named_modules() if name.split(".")[-1] == "vision_tower"), None)
    layers = getattr(getattr(tower, "encoder", None), "layers", None)
    has_class = hasattr(getattr(tower, "embeddings", None), "class_embedding")
    if layers is None or len(layers) < 2 or not has_class or model.config.model_type != "llava":
        raise UserError(
            f"{type(model).__name__} has no vision tower with a class token that queries could come from; use a LLaVA "
            "with a CLIP tower"
        )
    embedding = model.get_input_embeddings()
    return QuerySource(embedding, tower, layers[-2], tower.config.hidden_size, model.config.image_token_id)


def prompt_mean(
    embedding: nn.Module,
    image_token: int | None,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
) -> Tensor:
    """Direction of the mean input embedding of each prompt's text tokens, [B, d] fp32 from input_ids [B, L].

    Padding, image tokens and, in training, the answers that labels mark are left out.
    """
    counts = torch.ones_like(input_ids, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    if image_token is not None:
        counts = counts & (input_ids != image_token)
    if labels is not None:
        counts = counts & (labels < 0)
    embedded = embedding(input_ids.masked_fill(~counts, 0)).float() * counts.unsqueeze(-1)
    return normalised(embedded.sum(1))


class PoolContext(BatchContext):
    """The samples of one forward, each a row of the gates; pools choose when the first of their layers runs."""

    def __init__(self, tasks: "PoolTasks", samples: int, length: int | None, vision_tokens: list[int] | None) -> None:
        super().__init__(
            torch.arange(samples, dtype=torch.int32), length, vision_tokens, plain=vision_tokens is None, tasks=tasks
        )
        self.text: Tensor | None = None
        self.images: Tensor | None = None
        self.teacher, self.newest = False, None
        self._query: Query | None = None
        self._choices: dict[RankPool, Choice] = {}

    def query(self) -> Query:
        if self._query is None:
            self._query = Query(self.text, self._vision())
        return self._query

    @torch.no_grad()
    def _vision(self) -> Tensor:
        """Mean over each sample's images, [B, d_vision]; 0 without images."""
        width = self.tasks.source.widths[1]
        if self.images is None:
            return self.text.new_zeros(self.samples, width)
        count, total = self.images.shape[0], sum(self.vision_tokens or ())
        each = total // count
        if (
            self.vision_tokens is None
            or not each
            or total % count
            or any(tokens % each for tokens in self.vision_tokens)
        ):
            raise ValueError(
                f"{count} images do not explain {self.vision_tokens} image tokens per sample; pass input_ids with the images"
            )
        owner = (
            torch.arange(self.samples)
            .repeat_interleave(torch.tensor(self.vision_tokens) // each)
            .to(self.images.device)
        )
        member = (owner == torch.arange(self.samples, device=owner.device)[:, None]).float()
        return normalised(member @ normalised(self.images))

    def choice(self, pool: RankPool) -> Choice:
        """What the pool chooses for this forward, computed once."""
        if pool not in self._choices:
            # A checkpointed layer that asks first must not record the choice as its own: it is not made again.
            with (
                torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t),
                torch.autocast(self.task.device.type, enabled=False),  # rounded scores would tie
            ):
                self._choices[pool] = pool.choose(self.query(), self.teacher, self._newest())
        return self._choices[pool]

    def _newest(self) -> Tensor | None:
        if self.newest is None and not self.teacher:
            return self.tasks.newest(self.query())
        return self.newest

    def of_batch(self, samples: int | None, length: int | None, inputs: dict) -> "PoolContext":
        """The context of a forward inside this one: of beams or returned sequences, every sample's choice for its rows."""
        if samples in (None, self.samples):
            return self
        if samples not in self._repeated:
            self._repeated[samples] = self._repeat(samples)
        return self._repeated[samples]

    def _repeat(self, samples: int) -> "PoolContext":
        times = samples // self.samples
        vision_tokens = None if self.vision_tokens is None else [u for u in self.vision_tokens for _ in range(times)]
        context = PoolContext(self.tasks, samples, None, vision_tokens)
        context.text, context.teacher = self.text.repeat_interleave(times, 0), self.teacher
        context.newest = None if self.newest is None else self.newest.repeat_interleave(times)
        if self.images is not None:
            query = self.query()
            context._query = Query(context.text, query.vision.repeat_interleave(times, 0))
        return context


class PoolTasks(Tasks):
    """What the layers of a model with rank pools share: the queries of the running forward, and its pools' choices."""

    def __init__(self, source: QuerySource) -> None:
        super().__init__()
        self.source = source
        self.given: tuple[Query | None, bool, Tensor | None] = None, False, None  # see `querying`
        self.last: PoolContext | None = None  # of the newest forward
        self.task_queries: Query | None = None  # set: the newest task's experts serve only samples nearest to its query

    @contextmanager
    def querying(self, query: Query | None, teacher: bool = False, newest: Tensor | None = None) -> Iterator[None]:
        """Let the forwards inside use this query [1 or B rows] for their samples, the layers' and pools' snapshots, and the
        new experts for the samples that `newest` [1 or B] bool says."""
        before, self.given = self.given, (query, teacher, newest)
        try:
            yield
        finally:
            self.given = before

    def newest(self, query: Query) -> Tensor | None:
        """[B] bool: samples whose query is nearest to that of the newest task; None without task queries."""
        if self.task_queries is None:
            return None
        near = query.text @ self.task_queries.text.T + query.vision @ self.task_queries.vision.T
        return near.argmax(1) == near.shape[1] - 1

    def context_of(self, model: nn.Module, task_ids: None, args: tuple, kwargs: Mapping) -> PoolContext:
        """The context of a forward or generation with these arguments, or, inside one, that one for its batch."""
        if task_ids is not None:
            raise TypeError("task_ids was given, but a model with rank pools chooses them by the prompt; leave it out")
        if self.current is None:
            return self._of_prompt(args, kwargs)
        return self.current.of_batch(tokens_of(args, kwargs)[1].shape[0], None, {})

    def _of_prompt(self, args: tuple, kwargs: Mapping) -> PoolContext:
        input_ids, _ = tokens_of(args, kwargs)
        if input_ids is None:
            raise ValueError("a model with rank pools chooses them by the prompt; pass input_ids")
        vision_tokens = self.source.vision_tokens(input_ids) if kwargs.get("pixel_values") is not None else None
        context = PoolContext(self, *input_ids.shape, vision_tokens)
        context.task = context.task.to(input_ids.device)
        query, context.teacher, newest = self.given
        if query is None:
            context.text = self.source.text(input_ids, kwargs.get("attention_mask"), kwargs.get("labels"))
        else:
            context.text = query.text.expand(context.samples, -1)
            context._query = Query(context.text, query.vision.expand(context.samples, -1))
        context.newest = None if newest is None else newest.expand(context.samples)
        self.last = context
        return context

    def example(self, x: Tensor, teacher: bool = False) -> PoolContext:
        """The context of a forward with random prompts and images, of which a layer sees x [samples, rows, K]."""
        samples, rows = x.shape[:2]
        context = PoolContext(self, samples, rows, None)
        context.task, context.teacher = context.task.to(x.device), teacher
        context._query = Query(*(torch.randn(samples, width, device=x.device) for width in self.source.widths))
        return context

    @torch.no_grad()
    def queries(self, model: nn.Module, inputs: Mapping) -> Query:
        """The queries of a batch, by the vision tower alone."""
        context = self._of_prompt((), inputs)
        with self.use(context):
            if inputs.get("pixel_values") is not None:
                self.source.tower(inputs["pixel_values"])
        return context.query()


class PoolChooser:
    """Chooses for the layers of a pool by the running forward's queries: see RankPoolLinear."""

    def __init__(self, pool: RankPool) -> None:
        self.pool = pool  # not as a submodule of every layer

    def __call__(self, layer: RankPoolLinear, x: Tensor) -> tuple[Choice | None, Tensor | None]:
        tasks = layer.model_tasks
        if not any(self.pool.sizes().values()) and not tasks.given[1]:
            return None, None
        context = tasks.current
        if context is None:
            raise RuntimeError("a layer with a rank pool runs outside the model's forward; call attach_pools(model)")
        choice = context.choice(self.pool)
        return choice, None if choice.gate.shape[0] == 1 else context.rows(x, layer.place, path=layer.path)


def attach_pools(model: nn.Module, tasks: PoolTasks) -> None:
    """Connect the RankPoolLinear layers of `model` to `tasks`: its forward and generate then choose by their prompts.

    A generation chooses once, for all its steps; beams and returned sequences use their sample's choice.
    """
    attach(model, tasks)
    tasks.source.layer.register_forward_hook(partial(_seen, tasks))


def _seen(tasks: PoolTasks, module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
    context = tasks.current
    if context is not None and context.images is None:
        hidden = output[0] if isinstance(output, tuple) else output
        context.images = hidden[:, 0].detach().float()
