"""Queries of a batch from the frozen parts of a multimodal model, and the forwards that choose ranks by them."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn

from .rank_pool import Choice, Query, RankPool, RankPoolLinear, normalised
from .routing import Route, Routes, gradient_checkpointing_enable, restore_routes, sees_images


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

    def units(self, input_ids: Tensor) -> list[int]:
        """Image tokens of each sample."""
        return (input_ids == self.image_token).sum(1).tolist()


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


class PoolRoute(Route):
    """The samples of one forward, each a row of the gates; pools choose when the first of their layers runs."""

    def __init__(self, routes: "PoolRoutes", samples: int, length: int | None, units: list[int] | None) -> None:
        super().__init__(torch.arange(samples, dtype=torch.int32), length, units)
        self.routes = routes
        self.text: Tensor | None = None
        self.images: Tensor | None = None
        self.snapshot, self.newest = False, None
        self._query: Query | None = None
        self._choices: dict[RankPool, Choice] = {}

    @property
    def samples(self) -> int:
        return self.task.shape[0]

    def query(self) -> Query:
        if self._query is None:
            self._query = Query(self.text, self._vision())
        return self._query

    @torch.no_grad()
    def _vision(self) -> Tensor:
        """Mean over each sample's images, [B, d_vision]; 0 without images."""
        width = self.routes.source.widths[1]
        if self.images is None:
            return self.text.new_zeros(self.samples, width)
        count, total = self.images.shape[0], sum(self.units or ())
        each = total // count
        if self.units is None or not each or total % count or any(units % each for units in self.units):
            raise ValueError(
                f"{count} images do not explain {self.units} image tokens per sample; pass input_ids with the images"
            )
        owner = torch.arange(self.samples).repeat_interleave(torch.tensor(self.units) // each).to(self.images.device)
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
                self._choices[pool] = pool.choose(self.query(), self.snapshot, self._newest())
        return self._choices[pool]

    def _newest(self) -> Tensor | None:
        if self.newest is None and not self.snapshot:
            return self.routes.newest(self.query())
        return self.newest

    def repeated(self, times: int) -> "PoolRoute":
        """The route of beams or returned sequences: every sample's choice, for `times` rows each."""
        units = None if self.units is None else [u for u in self.units for _ in range(times)]
        route = PoolRoute(self.routes, self.samples * times, None, units)
        route.text, route.snapshot = self.text.repeat_interleave(times, 0), self.snapshot
        route.newest = None if self.newest is None else self.newest.repeat_interleave(times)
        if self.images is not None:
            query = self.query()
            route._query = Query(route.text, query.vision.repeat_interleave(times, 0))
        return route


class PoolRoutes(Routes):
    """What the layers of a model with rank pools share: the queries of the running forward, and its pools' choices."""

    def __init__(self, source: QuerySource) -> None:
        super().__init__()
        self.source = source
        self.given: tuple[Query | None, bool, Tensor | None] = None, False, None  # see `querying`
        self.last: PoolRoute | None = None  # of the newest forward
        self.task_queries: Query | None = None  # set: the newest task's experts serve only samples nearest to its query
        self.beams: tuple[Route, PoolRoute] | None = None

    @contextmanager
    def querying(self, query: Query | None, snapshot: bool = False, newest: Tensor | None = None) -> Iterator[None]:
        """Let the forwards inside use this query [1 or B rows] for their samples, the layers' and pools' snapshots, and the
        new experts for the samples that `newest` [1 or B] bool says."""
        before, self.given = self.given, (query, snapshot, newest)
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

    def route(self, model: nn.Module, args: tuple, kwargs: Mapping) -> PoolRoute:
        """The route of a forward or generation with these arguments."""
        input_ids = kwargs.get("input_ids", args[0] if args else None)
        if input_ids is None:
            raise ValueError("a model with rank pools chooses them by the prompt; pass input_ids")
        units = self.source.units(input_ids) if kwargs.get("pixel_values") is not None else None
        route = PoolRoute(self, *input_ids.shape, units)
        route.task = route.task.to(input_ids.device)
        query, route.snapshot, newest = self.given
        if query is None:
            route.text = self.source.text(input_ids, kwargs.get("attention_mask"), kwargs.get("labels"))
        else:
            route.text = query.text.expand(route.samples, -1)
            route._query = Query(route.text, query.vision.expand(route.samples, -1))
        route.newest = None if newest is None else newest.expand(route.samples)
        self.last = route
        return route

    def example(self, x: Tensor, snapshot: bool = False) -> PoolRoute:
        """The route of a forward with random prompts and images, of which a layer sees x [samples, rows, K]."""
        samples, rows = x.shape[:2]
        route = PoolRoute(self, samples, rows, [rows] * samples)
        route.task, route.snapshot = route.task.to(x.device), snapshot
        route._query = Query(*(torch.randn(samples, width, device=x.device) for width in self.source.widths))
        return route

    @torch.no_grad()
    def queries(self, model: nn.Module, inputs: Mapping) -> Query:
        """The queries of a batch, by the vision tower alone."""
        route = self.route(model, (), inputs)
        with self.use(route):
            if inputs.get("pixel_values") is not None:
                self.source.tower(inputs["pixel_values"])
        return route.query()

    def choose(self, pool: RankPool):
        """A chooser for the layers of a pool: see RankPoolLinear."""

        def choose(layer: RankPoolLinear, x: Tensor) -> tuple[Choice | None, Tensor | None]:
            if not any(pool.sizes().values()) and not self.given[1]:
                return None, None
            if self.current is None:
                raise RuntimeError(
                    "a layer with a rank pool runs outside the model's forward; call attach_pools(model)"
                )
            choice = self.current.choice(pool)
            return choice, None if choice.gate.shape[0] == 1 else self.current.rows(x, layer.vision)

        return choose


def attach_pools(model: nn.Module, routes: PoolRoutes) -> None:
    """Connect the RankPoolLinear layers of `model` to `routes`: its forward and generate then choose by their prompts.

    A generation chooses once, for all its steps; beams and returned sequences use their sample's choice.
    """
    has_text_part = any("language_model" in name.split(".") for name, _ in model.named_modules())
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, RankPoolLinear)]
    for name, layer in layers:
        layer.routes, layer.vision = routes, sees_images(name, has_text_part)
    model.lilora_routes, model.lilora_layers = routes, [layer for _, layer in layers]
    forward = type(model).forward

    def pooled_forward(self, *args, **kwargs):
        with routes.use(_running(self, routes, args, kwargs)):
            return forward(self, *args, **kwargs)

    pooled_forward.__signature__ = inspect.signature(forward)
    model.forward = MethodType(pooled_forward, model)

    def generate(self, *args, **kwargs):
        prompt = (kwargs["inputs"],) if "inputs" in kwargs else args
        with routes.use(routes.route(self, prompt, kwargs)):
            return type(self).generate(self, *args, **kwargs)

    model.generate = MethodType(generate, model)
    model.gradient_checkpointing_enable = MethodType(gradient_checkpointing_enable, model)
    restore_routes(model)
    routes.source.layer.register_forward_hook(lambda module, inputs, output: _seen(routes, output))


def _running(model: nn.Module, routes: PoolRoutes, args: tuple, kwargs: Mapping) -> Route:
    """The route of a forward: its own, or the running generation's, repeated for beams."""
    outer = routes.current
    if outer is None:
        return routes.route(model, args, kwargs)
    tokens = kwargs.get("input_ids", args[0] if args else None)
    tokens = kwargs["inputs_embeds"] if tokens is None else tokens
    if tokens.shape[0] == outer.samples:
        return outer
    if routes.beams is None or routes.beams[0] is not outer:
        routes.beams = outer, outer.repeated(tokens.shape[0] // outer.samples)
    return routes.beams[1]


def _seen(routes: PoolRoutes, output: Tensor | tuple) -> None:
    if routes.current is not None and routes.current.images is None:
        hidden = output[0] if isinstance(output, tuple) else output
        routes.current.images = hidden[:, 0].detach().float()
