"""What tells one base model from another, whatever is wrapped around it."""

import pytest
import torch
from support.banks import BASE
from torch import nn

from lilora.bank.index import BaseModelId
from lilora.errors import UserError


def test_other_base_model(bank):
    bank.check_base_model(BaseModelId(id="/a/local/copy", fingerprint=BASE.fingerprint))
    with pytest.raises(UserError, match=r"tiny.*big"):
        bank.check_base_model(BaseModelId(id="big", fingerprint="f" * 16))


# Fingerprint of the base model
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.up_proj = nn.Linear(30, 40)
        self.norm = nn.LayerNorm(40)
        self.head = nn.Linear(40, 30, bias=False)
        self.tied = nn.Linear(40, 30, bias=False)
        self.tied.weight = self.head.weight

    def forward(self, x):
        return self.head(self.norm(self.up_proj(x)))


def test_fingerprint_ignores_adapters_and_their_wrapping():
    from peft import LoraConfig, get_peft_model

    net = Net()
    plain = BaseModelId.of(net, "net")
    wrapped = get_peft_model(net, LoraConfig(target_modules=["up_proj", "head"]))
    assert any("base_layer" in name for name, _ in wrapped.named_parameters())
    assert BaseModelId.of(wrapped, "net") == plain


def test_fingerprint_ignores_compilation():
    net = Net()
    plain = BaseModelId.of(net, "net")
    net.up_proj = torch.compile(net.up_proj, backend="eager")
    assert BaseModelId.of(net, "net") == plain
    assert BaseModelId.of(torch.compile(net, backend="eager"), "net") == plain


def test_fingerprint_ignores_lilora_parameters():
    net = Net()
    plain = BaseModelId.of(net, "net")
    net.up_proj.register_parameter("lilora_A", nn.Parameter(torch.randn(4, 30)))
    assert BaseModelId.of(net, "net") == plain


@pytest.mark.parametrize("change", ["value", "dtype", "shape", "name"])
def test_fingerprint_shows_another_base(change):
    net = Net()
    plain = BaseModelId.of(net, "net")
    with torch.no_grad():
        if change == "value":
            net.head.weight[-1, -1] += 1
        elif change == "dtype":
            net.bfloat16()
        elif change == "shape":
            net.norm.weight = nn.Parameter(torch.ones(1, 40))
        else:
            net.norm2 = net.norm
            del net.norm
    assert BaseModelId.of(net, "net").fingerprint != plain.fingerprint


def test_fingerprint_of_a_model_without_weights():
    with torch.device("meta"):
        net = Net()
    with pytest.raises(UserError, match=r"net.*head\.weight"):
        BaseModelId.of(net, "net")
