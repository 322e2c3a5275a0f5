"""A model class that transformers does not have: `python examples/outside_model.py`.

Its decoder is found by its structure, and so are the linear layers of the MLPs there. What structure cannot tell,
`register_family` says: which layer is the projector, and how many image tokens each sample has. Batches that mix tasks may
then reach the projector and the tower too.
"""

import torch
from peft import get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig, PreTrainedModel

import lilora
from lilora.families import target_modules

IMAGE, TOKENS = 3, 4  # the id of an image token; how many an image has


class SketchConfig(PreTrainedConfig):
    model_type = "sketch"


class SketchModel(PreTrainedModel):
    """Sketches [images, 4, 8] seen by a tower, and a Llama that reads them where the text has image tokens."""

    config_class = SketchConfig

    def __init__(self, config: SketchConfig) -> None:
        super().__init__(config)
        self.tower = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))
        self.bridge = nn.Linear(8, 16)
        text = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            pad_token_id=0,
        )
        self.language_model = LlamaForCausalLM(text)
        self.post_init()

    def forward(self, input_ids: Tensor, sketches: Tensor | None = None, labels: Tensor | None = None):
        embeddings = self.language_model.get_input_embeddings()(input_ids)
        if sketches is not None:
            for layer in self.tower:
                sketches = sketches + layer(sketches).relu()
            seen = self.bridge(sketches).flatten(0, 1)
            embeddings = embeddings.masked_scatter((input_ids == IMAGE).unsqueeze(-1), seen)
        return self.language_model(inputs_embeds=embeddings, labels=labels)


def image_tokens(input_ids: Tensor, inputs: dict) -> list[int]:
    """Of each sample of input_ids [B, L]; every sketch has the same number of them, and they lie in the samples' order."""
    return (input_ids == IMAGE).sum(1).tolist()


lilora.register_family("sketch", projector="bridge", vision_tokens=image_tokens)


def adapted() -> nn.Module:
    """The model with two tasks, in the MLPs of its Llama, the projector and the tower."""
    torch.manual_seed(0)
    model = SketchModel(SketchConfig())
    pattern = target_modules(model, projector=True) + r"|(.*\.)?tower\.\d+"
    config = lilora.LiLoRAConfig(r=4, sub_rank=2, target_modules=pattern)
    model = get_peft_model(model, config, adapter_name="name")
    model.add_adapter("count", config)
    for name, parameter in model.named_parameters():  # as if it were trained
        if "lilora_" in name:
            nn.init.normal_(parameter, std=0.3)
    return model.eval()


def batch() -> dict[str, Tensor]:
    """Two samples: two sketches in the first, one in the second."""
    ids = torch.randint(4, 32, (2, 12), generator=torch.Generator().manual_seed(1))
    ids[0, 1:9], ids[1, 2:6] = IMAGE, IMAGE
    return {"input_ids": ids, "sketches": torch.randn(3, TOKENS, 8, generator=torch.Generator().manual_seed(2))}


@torch.no_grad()
def main() -> None:
    model, inputs = adapted(), batch()
    mixed = model(**inputs, task_ids=["name", "count"]).logits
    first = model(inputs["input_ids"][:1], sketches=inputs["sketches"][:2], task_ids=["name"]).logits
    second = model(inputs["input_ids"][1:], sketches=inputs["sketches"][2:], task_ids=["count"]).logits
    print(f"a mixed batch differs from single ones by {(mixed - torch.cat([first, second])).abs().max():.0e}")


if __name__ == "__main__":
    main()
