"""Queries of a batch from the frozen parts of a multimodal model, and the forwards that choose ranks by them."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from lilora.errors import UserError
from lilora.families import vision_tower
from lilora.methods.pclr.pool import Query, RankPool, normalised
from lilora_kernels.attach import attach
from lilora_kernels.layers.base import AdaptedLinear
from lilora_kernels.layers.rank_pool import Choice, RankPoolLinear
from lilora_kernels.routing.context import AHEAD, BatchContext, Tasks, tokens_of


class VisionSource:
    """What of a frozen vision tower the vision query of a sample is made of, by the tower's structure.

    "tokens": its last block but one. Where the tower has a class token (CLIP, InternVL) that is an image's feature, as PCLR
    has it; elsewhere the mean of the image's tokens (our reading), of the tower's output where it is in stages (Florence-2).
    "pooled": the tower's pooled output, as PCLR's second suite has it. Features are at norm 1, their mean over the images of
    a sample too; where a tower packs all images into one row of tokens (Pixtral, Qwen-VL), the sample's mean is over all of
    its tokens.

    module: whose output `take` reads. owner: the module that makes features of images; feature: "class", "mean" or "pooled".
    """

    def __init__(self, owner: nn.Module, tower: nn.Module, blocks: nn.ModuleList | None, pooled: bool) -> None:
        # Elsewhere than among the embeddings it need not be the first token: Llama 4 puts it behind the others.
        has_class = any(name.endswith(CLASS_TOKENS) for name, _ in tower.named_parameters())
        self.owner, self.whole = owner, pooled or blocks is None
        self.module = tower if self.whole else blocks[-2]
        self.feature = "pooled" if pooled else "class" if has_class and not self.whole else "mean"
        linears = [m for m in (blocks or [tower])[-1].modules() if isinstance(m, nn.Linear | AdaptedLinear)]
        self.width = linears[-1].out_features  # of a block's MLP

    def take(self, output: Any, context: "PoolContext") -> tuple[Tensor, Tensor]:
        """(features [n, d] fp32, the sample [n] of each) from an output of `module`; those of images are at norm 1."""
        pooled = getattr(output, "pooler_output", None) if self.feature == "pooled" else None
        hidden = output.last_hidden_state if self.whole else output
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        if hidden.dim() == 4 and hidden.shape[-1] != self.width:  # a map [images, d, height, width]
            hidden = hidden.movedim(1, -1)
        if self.feature == "pooled" and (pooled is None or pooled.shape != (len(hidden), self.width)):
            raise UserError(
                f"the vision tower of {type(self.owner).__name__} has no pooled output for each image; leave out "
                "vision_query=pooled"
            )
        hidden = hidden.detach().float()
        sample = context.rows(hidden, AHEAD, path="the vision tower").view(hidden.shape[:-1])
        images = hidden.dim() > 2 and (len(hidden) > 1 or self.feature != "mean" or context.padded is not None)
        if not images:  # packed tokens
            return hidden.flatten(0, -2), sample.flatten()
        if pooled is not None:
            features = pooled.detach().float()
        elif self.feature == "class":
            features = hidden[:, 0]
        else:
            features = (hidden.flatten(1, -2) * context.patches(hidden.shape[:-1])).sum(1)
        return normalised(features), sample.flatten(1)[:, 0]


CLASS_TOKENS = ("embeddings.class_embedding", "embeddings.cls_token")


class QuerySource:
    """Text query: mean of the frozen input embeddings of a prompt's text tokens. Vision query: see VisionSource.

    image_token: the id that stands for one row of an image in the prompt, which is no text.
    """

    def __init__(self, model: nn.Module, vision: VisionSource) -> None:
        self.embedding, self.vision, self.image_token = model.get_input_embeddings(), vision, image_token_of(model)
        self.answers_apart = getattr(model.config, "is_encoder_decoder", False)
        self.widths = self.embedding.weight.shape[1], vision.width

    @torch.no_grad()
    def text(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Tensor:
        """[B, d_text] fp32 from input_ids [B, L]; padding and, in training, the answers that labels mark are left out."""
        labels = None if self.answers_apart else labels
        return prompt_mean(self.embedding, self.image_token, input_ids, attention_mask, labels)


def query_source(model: nn.Module, vision_query: str = "tokens") -> QuerySource:
    """Where the queries of a rank pool come from, by the model's structure.

    UserError for a model without a vision tower of blocks with attention.
    """
    owner, tower, blocks = vision_tower(model)
    if tower is None:
        raise UserError(
            f"{type(model).__name__} has no vision tower of transformer blocks that queries could come from; use a model of "
            "text and images that has one"
        )
    vision = VisionSource(owner, tower, blocks, vision_query == "pooled")
    return QuerySource(model, vision)


def image_token_of(model: nn.Module) -> int | None:
    """The id of a prompt's tokens that stand for images."""
    return getattr(model.config, "image_token_id", None) or getattr(model.config, "image_token_index", None)


def padding_of(inputs: Mapping) -> Tensor | None:
    """What of a batch's images is padding, 0 there, as its processor says it; None where nothing is."""
    mask = inputs.get("pixel_attention_mask")
    if inputs.get("image_position_ids") is not None:
        mask = (inputs["image_position_ids"] >= 0).all(-1)
    return None if mask is None or bool(mask.all()) else mask


def image_features(owner: nn.Module, inputs: Mapping[str, Tensor]) -> Any:
    """What a model's own get_image_features makes of those of a batch's inputs that it takes."""
    wanted = inspect.signature(owner.get_image_features).parameters
    return owner.get_image_features(**{name: value for name, value in inputs.items() if name in wanted})


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

    def __init__(self, tasks: "PoolTasks", samples: int, length: int | None, **inputs: Any) -> None:
        super().__init__(torch.arange(samples, dtype=torch.int32), length, **{"plain": True} | inputs, tasks=tasks)
        self.text: Tensor | None = None
        self.images: tuple[Tensor, Tensor] | None = None  # features [n, d], and whose each is [n]
        self.padded: Tensor | None = None  # 0 at patches [images, n], or pixels [..., H, W], that are padding
        self.teacher, self.newest = False, None
        self._query: Query | None = None
        self._choices: dict[RankPool, Choice] = {}

    def query(self) -> Query:
        if self._query is None:
            self._query = Query(self.text, self._vision())
        return self._query

    def patches(self, shape: torch.Size) -> Tensor:
        """1 for each row of a tower [images, n] that is a patch of an image, 0 for padding: [images, n or 1, 1] fp32."""
        mask = self.padded
        if mask is None:
            return torch.ones(shape[0], 1, 1, device=self.text.device)
        if mask.dim() > 2:  # a square of pixels to a patch; of images that are there
            mask = mask.flatten(0, -3)
            mask = mask[mask.flatten(1).any(1)].unsqueeze(1).float()
            side = round((mask[0].numel() / shape[1:].numel()) ** 0.5)
            mask = nn.functional.max_pool2d(mask, side).flatten(1)
        if mask.shape != (shape[0], shape[1:].numel()):
            raise ValueError(
                f"the vision tower sees {list(shape)} rows, and the mask of padding is {list(self.padded.shape)}; pass both as "
                "the model's processor gives them"
            )
        return mask.float().unsqueeze(-1)

    @torch.no_grad()
    def _vision(self) -> Tensor:
        """Direction of the mean over each sample's features, [B, d_vision]; 0 without images."""
        if self.images is None:
            if not self.plain:
                raise ValueError(
                    "a model with rank pools chooses them by what its vision tower sees, which has not run before the first of "
                    f"their layers; pass images with the prompt, not {self.others}"
                )
            return self.text.new_zeros(self.samples, self.tasks.source.widths[1])
        features, sample = self.images
        member = (sample == torch.arange(self.samples, device=sample.device)[:, None]).float()
        return normalised(member @ features)

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
        context = PoolContext(self.tasks, samples, None, plain=self.plain, others=self.others)
        context.text, context.teacher = self.text.repeat_interleave(times, 0), self.teacher
        context.newest = None if self.newest is None else self.newest.repeat_interleave(times)
        if self.images is not None or self._query is not None:
            context._query = Query(context.text, self.query().vision.repeat_interleave(times, 0))
        return context


class PoolTasks(Tasks):
    """What the layers of a model with rank pools share: the queries of the running forward, and its pools' choices."""

    def __init__(self, source: QuerySource) -> None:
        super().__init__()
        self.source = source
        self.given: tuple[Query | None, bool, Tensor | None] = None, False, None  # see `querying`
        self.last: PoolContext | None = None  # of the newest forward
        # Set: new experts serve only samples nearest to a task from newest_task on.
        self.task_queries: Query | None = None
        self.newest_task = 0

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
        """[B] bool: samples whose query is nearest to that of a task from newest_task on; None without task queries."""
        if self.task_queries is None:
            return None
        near = query.text @ self.task_queries.text.T + query.vision @ self.task_queries.vision.T
        return near.argmax(1) >= self.newest_task

    def context_of(self, model: nn.Module, task_ids: None, args: tuple, kwargs: Mapping) -> PoolContext:
        """The context of a forward or generation with these arguments, or, inside one, that one for its batch."""
        if task_ids is not None:
            raise TypeError("task_ids was given, but a model with rank pools chooses them by the prompt; leave it out")
        if self.current is None:
            return self._of_prompt(model, args, kwargs)
        return self.current.of_batch(tokens_of(args, kwargs)[1].shape[0], None, {})

    def _of_prompt(self, model: nn.Module, args: tuple, kwargs: Mapping) -> PoolContext:
        input_ids, _ = tokens_of(args, kwargs)
        if input_ids is None:
            raise ValueError("a model with rank pools chooses them by the prompt; pass input_ids")
        context = PoolContext(self, *input_ids.shape, **self.explained(model, input_ids, args, dict(kwargs)))
        context.task, context.padded = context.task.to(input_ids.device), padding_of(kwargs)
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
        context = PoolContext(self, samples, rows)
        context.task, context.teacher = context.task.to(x.device), teacher
        context._query = Query(*(torch.randn(samples, width, device=x.device) for width in self.source.widths))
        return context

    @torch.no_grad()
    def queries(self, model: nn.Module, inputs: Mapping) -> Query:
        """The queries of a batch, without the language model."""
        context = self._of_prompt(model, (), inputs)
        with self.use(context):
            if not context.plain:
                image_features(self.source.vision.owner, inputs)
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
    tasks.packed = True  # images matter, wherever the layers are
    tasks.source.vision.module.register_forward_hook(partial(_seen, tasks))


def _seen(tasks: PoolTasks, module: nn.Module, inputs: tuple, output: Any) -> None:
    context = tasks.current
    unasked = context is None or context.plain or tasks.given[0] is not None
    if unasked or torch._C._current_graph_task_id() != -1:  # the latter where a backward recomputes
        return
    if context.images is not None and not context.generating:
        raise ValueError(
            "the vision tower runs more than once in a forward, and nothing tells whose images it sees each time; pass batches "
            "of which it sees all at once"
        )
    if context.images is None:
        context.images = tasks.source.vision.take(output, context)
