"""`LiLoRAConfig`: what PEFT needs to know to adapt a model with LoRA in LoRA, one adapter per task."""

from copy import copy
from dataclasses import dataclass, field
from typing import Any, Literal

from peft import LoraConfig, PeftConfig

from lilora.errors import UserError, shortened
from lilora.families import pattern_error
from lilora_kernels.layers.base import is_number
from lilora_kernels.layers.lilora import DROPOUT, POLICIES, RANK, default_alpha, default_sub_rank

from .peft_type import LILORA

# What trains after the first task. `paper`: the basis may move, held by the stability loss. `released`: as the published
# code does, A moves and old tasks drift. `frozen`: nothing shared moves, so old tasks stay bit for bit.
PRESETS: dict[str, dict[str, str | float]] = {
    "frozen": {"train_a": "first", "train_b0": "first", "stability": 0.0},
    "paper": {"train_a": "always", "train_b0": "always", "stability": 1.0},
    "released": {"train_a": "always", "train_b0": "first", "stability": 0.0},
}
# What a LoraConfig calls otherwise or LiLoRA does not have, and what to do instead.
OF_LORA = {
    "lora_alpha": "it is alpha here, and scales by alpha / r as there",
    "lora_dropout": "it is dropout here",
    "use_rslora": "to scale by alpha / sqrt(r), give alpha times sqrt(r)",
    "init_lora_weights": "B0 and U start at zero, A and V are drawn as LoRA's A; leave it out",
    "target_parameters": "of Parameters LiLoRA adapts those of routed experts, with experts=True",
    "rank_pattern": "r is that of all layers; adapt fewer with target_modules",
    "alpha_pattern": "alpha is that of all layers; adapt fewer with target_modules",
}
SAME_FOR_ALL_TASKS = (
    "r", "sub_rank", "alpha", "dropout", "fusion", "experts", "expert_r", "expert_sub_rank", "train_a", "train_b0", "stability",
)  # fmt: skip


@dataclass
class LiLoRAConfig(PeftConfig):
    """y = x W^T + b + alpha / r * D(x) A^T (f B0 + (1 - f) U V)^T with f = sigmoid(fusion) (arXiv 2508.06202).

    A [r, in] and B0 [out, r] are shared by all tasks of a model; U [out, sub_rank], V [sub_rank, r] and fusion [1] belong
    to one task. In PEFT's words a task is an adapter.

    experts=True also adapts the routed experts of the language model: each linear of each expert has factors of its own, of the
    ranks expert_r and expert_sub_rank and the scale alpha / r. That is many parameters: Qwen3-30B-A3B, with 128 experts in
    each of 48 layers, gets 88 million a task at the default sub-rank 4, and 1.5 billion at 64.
    `lilora params --set experts=true` counts them.
    """

    r: int = field(default=RANK, metadata={"help": "Rank of the shared factors A and B0."})
    sub_rank: int | None = field(default=None, metadata={"help": "Rank of a task's own U V.", "default": "r // 2"})
    alpha: float | None = field(
        default=None,
        metadata={"help": "The adapter's output is scaled by alpha / r.", "default": "2 r"},
    )
    dropout: float = field(default=DROPOUT, metadata={"help": "Dropout probability on the adapter's input."})
    fusion: bool = field(default=True, metadata={"help": "Train how much of B0 a task uses; False gives B0 + U V."})
    experts: bool = field(default=False, metadata={"help": "Adapt the routed experts too, each with its own factors."})
    expert_r: int = field(default=8, metadata={"help": "Rank of the shared factors of each expert."})
    expert_sub_rank: int | None = field(
        default=None, metadata={"help": "Rank of a task's own U V in each expert.", "default": "expert_r // 2"}
    )
    target_modules: list[str] | str | None = field(
        default=None,
        metadata={"help": "Names or a full-match regular expression; None: the language model's MLPs, by model type."},
    )
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave alone."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Only these layer indices."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Name of the list of layers."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Other modules to train and save."})
    bias: Literal["none", "all", "lilora_only"] = field(default="none", metadata={"help": "Biases to train."})
    train_a: Literal["always", "first", "never"] = field(
        default="first", metadata={"help": "Tasks in which A is trained."}
    )
    train_b0: Literal["always", "first", "never"] = field(
        default="first", metadata={"help": "Tasks in which B0 is trained."}
    )
    stability: float = field(
        default=0.0, metadata={"help": "Weight of the basis stability loss, which `lilora train` adds; 0 turns it off."}
    )
    on_shared_mismatch: Literal["error", "replace"] = field(
        default="error",
        metadata={"help": "Loading a task made with other shared factors: 'error', or 'replace' those of the model."},
    )
    shared_fingerprint: str | None = field(
        default=None, metadata={"help": "Written on saving: tells which A and B0 the task was made with."}
    )
    first_of_chain: bool | None = field(
        default=None,
        metadata={"help": "Written on saving: whether A and B0 were made with this task, and train with it."},
    )

    def __new__(cls, *args: Any, **kwargs: Any) -> "LiLoRAConfig":
        # Others are left to TypeError: PEFT drops what a newer version has written into a file.
        for name in kwargs.keys() & LoraConfig.__dataclass_fields__.keys() - cls.__dataclass_fields__.keys():
            instead = OF_LORA.get(name, f"the settings are {', '.join(OF_METHOD)}")
            raise UserError(f"{name} is no setting of LiLoRAConfig; {instead}")
        return super().__new__(cls)

    @classmethod
    def preset(cls, name: str, **changes: Any) -> "LiLoRAConfig":
        """The config of a preset (`paper`, `released` or `frozen`), with changes."""
        if name not in PRESETS:
            raise UserError(f"preset is {name!r}; it must be one of {list(PRESETS)}")
        return cls(**{**PRESETS[name], **changes})

    def require_same_settings(self, other: "LiLoRAConfig") -> None:
        """UserError unless a task with this config can live beside one with the `other`."""
        for name in SAME_FOR_ALL_TASKS:
            new, old = getattr(self, name), getattr(other, name)
            if new != old:
                raise UserError(f"{name} is {new!r}, but the model's other tasks have {old!r}; all tasks share it")

    def of_experts(self) -> "LiLoRAConfig":
        """The config of the experts' linears: their ranks, and the same scale."""
        config = copy(self)
        config.r, config.sub_rank = self.expert_r, self.expert_sub_rank
        alpha = default_alpha(self.r) if self.alpha is None else self.alpha
        config.alpha = alpha / self.r * self.expert_r
        return config

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = LILORA
        # shared_fingerprint and first_of_chain when the task's tensors were last taken out: PEFT saves the config after them.
        self.taken_with: tuple[str | None, bool] | None = None
        for name in ("target_modules", "exclude_modules", "layers_pattern", "modules_to_save"):
            value = getattr(self, name)
            if not (value is None or isinstance(value, str) or _all(value, str)):
                raise UserError(f"{name} is {value!r}; it must be a string or a list of strings")
            if isinstance(value, str) and (reason := pattern_error(value)):
                raise UserError(f"{name} is {shortened(value)}, which is no regular expression ({reason}); mend it")
        if not (self.layers_to_transform is None or _all(self.layers_to_transform, int)):
            raise UserError(
                f"layers_to_transform is {self.layers_to_transform!r}; it must be an integer or a list of them"
            )
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        for rank, sub in (("r", "sub_rank"), ("expert_r", "expert_sub_rank")):
            for name in (rank, sub) if rank == "r" or self.experts else ():
                if name == sub and getattr(self, sub) is None:
                    setattr(self, sub, default_sub_rank(getattr(self, rank)))
                size = getattr(self, name)
                if not isinstance(size, int) or isinstance(size, bool) or not 1 <= size < 2**31:
                    raise UserError(f"{name} is {size!r}; it must be an integer of at least 1")
            if (getattr(self, sub) or 0) > getattr(self, rank):
                raise UserError(
                    f"{sub} is {getattr(self, sub)} and {rank} is {getattr(self, rank)}, the most that the rank of U V can be; "
                    f"give at most {rank}"
                )
        self.alpha = default_alpha(self.r) if self.alpha is None else self.alpha
        for name in ("alpha", "dropout", "stability"):
            value = getattr(self, name)
            if not is_number(value) or abs(value) > 2**1000:
                raise UserError(f"{name} is {value!r}; it must be a number")
        for name in ("fusion", "experts"):
            if not isinstance(getattr(self, name), bool):
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be true or false")
        for name, choices in (
            ("train_a", POLICIES),
            ("train_b0", POLICIES),
            ("on_shared_mismatch", ("error", "replace")),
            ("bias", ("none", "all", "lilora_only")),
        ):
            if getattr(self, name) not in choices:
                raise UserError(f"{name} is {getattr(self, name)!r}; it must be one of {list(choices)}")
        if not 0 < self.alpha < float("inf"):
            raise UserError(f"alpha is {self.alpha}; it must be a positive number")
        if not 0 <= self.dropout < 1:
            raise UserError(f"dropout is {self.dropout}; it must be in [0, 1)")
        if not 0 <= self.stability < float("inf"):
            raise UserError(f"stability is {self.stability}; it must be a number of at least 0")
        if self.experts and self.layers_to_transform is not None:
            raise UserError(
                "layers_to_transform does not choose among experts; give exclude_modules, or leave experts out"
            )
        if self.layers_pattern and self.layers_to_transform is None:
            raise UserError("layers_pattern is given without layers_to_transform; give both or neither")
        if isinstance(self.target_modules, str) and self.layers_to_transform is not None:
            raise UserError(
                "layers_to_transform cannot be used with a regular expression in target_modules; list names"
            )

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        if self.taken_with is not None:
            fingerprint, self.first_of_chain = self.taken_with
            self.shared_fingerprint = fingerprint or self.shared_fingerprint
        super().save_pretrained(save_directory, **kwargs)
        # True of the files: A and B0 may go on training, and the config be used again.
        self.shared_fingerprint = self.first_of_chain = None
        self.taken_with = None


def _all(value: object, kind: type) -> bool:
    values = value if isinstance(value, list | tuple | set) else [value]
    return all(isinstance(one, kind) and not isinstance(one, bool) for one in values)


# The fields that are settings of the method, and not PEFT's own or of one saved task.
OF_FILES = ("shared_fingerprint", "first_of_chain", "on_shared_mismatch")
OF_METHOD = tuple(name for name in LiLoRAConfig.__annotations__ if name not in OF_FILES)
