"""DAC against its formulas written out with dense matrices in fp64, and what it costs."""

from itertools import product

import pytest
import torch
from support.counting import Operations
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

from lilora.errors import UserError
from lilora.families import target_modules
from lilora.methods import Stage, make_method
from lilora.methods.dac import PRESETS
from lilora_kernels.layers.rank_pool import RankPoolLinear

B, L, WIDTH, HIDDEN, R, ACTIVE, CRITICAL = 5, 4, 7, 9, 6, 3, 2
TARGETS = r"(up|down|side)"


class Toy(nn.Module):
    """Three linears, two of them of equal output width."""

    def __init__(self):
        super().__init__()
        self.up, self.down, self.side = nn.Linear(WIDTH, HIDDEN), nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.double().requires_grad_(False)

    def forward(self, x):
        return self.down(self.up(x).tanh()) + self.side(x)

    @property
    def device(self):
        return next(self.parameters()).device


def make(**settings):
    torch.manual_seed(1)
    sizes = {"r": R, "alpha": 3.0, "dropout": 0.0, "active": ACTIVE, "critical": CRITICAL, "target_modules": TARGETS}
    return make_method("dac", Toy(), sizes | settings)


def begin(method, task):
    """The task's stage, with factors and routers that are random throughout."""
    method.begin(Stage("learn", task), None)
    for layer in method.layers.values():
        for tensor in (*layer.part("experts"), *layer.choose.parameters()):
            nn.init.normal_(tensor)
    method.model.train()


def learn(method, *tasks, batches=3):
    for task in tasks:
        begin(method, task)
        for _ in range(batches):
            method.model(torch.randn(B, L, WIDTH, dtype=torch.float64))
        method.end(Stage("learn", task), None)


def best(values, count):
    """Indices of the `count` largest, of equal ones the lowest first."""
    return sorted(range(len(values)), key=lambda i: (-float(values[i]), i))[:count]


def chosen(probabilities, scope):
    """(experts of each sample, experts that the forward uses for each sample)."""
    members = [best(row, ACTIVE) for row in probabilities]
    if scope == "sample":
        return members, members
    votes = [sum(j in member for member in members) for j in range(R)]
    return members, [best(votes, ACTIVE)] * len(members)


# --- the layer ----------------------------------------------------------------------------------------------------------


def dense_layer(layer, x, settings):
    """(y, gate [B, r] as a leaf or None, probabilities): every sample has a dense update of its own."""
    a, b = (tensor.detach().clone().requires_grad_() for tensor in layer.part("experts"))
    x = x.detach().clone().requires_grad_()
    router = layer.choose.lora_router
    guide = x.detach()[:, 0] if settings.guide == "first" else x.detach().sum(1) / x.shape[1]
    scores = (guide @ router.weight.detach().T + router.bias.detach()).exp()
    probabilities = scores / scores.sum(1, keepdim=True)
    _, used = chosen(probabilities, settings.scope)
    mean = probabilities.mean(0).expand_as(probabilities) if settings.scope == "batch" else probabilities
    gate = torch.zeros_like(mean)
    for row, experts in enumerate(used):
        for j in experts:
            share = mean[row, j] / sum(mean[row, i] for i in experts)
            gate[row, j] = 1 if settings.weights == "binary" else ACTIVE * share
    gate.requires_grad_()
    rows = []
    for sample, weights in zip(x, gate, strict=True):
        update = layer.scaling * b @ torch.diag(weights) @ a
        rows.append(sample @ (layer.base_layer.weight + update).T + layer.base_layer.bias)
    return torch.stack(rows), a, b, x, gate, probabilities, used


def router_gradient(layer, settings, x, dgate, probabilities, used):
    """(dR, drho, dx through the guide) of a learned router, from the gradient of each sample's gate."""
    dp = torch.zeros_like(probabilities)
    if settings.scope == "batch":
        mean, dmean = probabilities.mean(0), torch.zeros(R, dtype=torch.float64)
        dmean = gate_gradient(mean, dgate.sum(0), used[0], settings.weights)
        dp += dmean / len(probabilities)
    else:
        for row, experts in enumerate(used):
            dp[row] = gate_gradient(probabilities[row], dgate[row], experts, settings.weights)
    dscores = probabilities * (dp - (dp * probabilities).sum(1, keepdim=True))
    guide = x[:, 0] if settings.guide == "first" else x.mean(1)
    dguide = dscores @ layer.choose.lora_router.weight.detach()
    dx = torch.zeros_like(x)
    if settings.guide == "first":
        dx[:, 0] = dguide
    else:
        dx += dguide[:, None] / x.shape[1]
    return dscores.T @ guide, dscores.sum(0), dx


def gate_gradient(probabilities, dgate, experts, weights):
    """d probabilities [r]: straight through for binary gates, else through k p_j / sum over the chosen of p."""
    dp, total = torch.zeros(R, dtype=torch.float64), sum(probabilities[j] for j in experts)
    for j in experts:
        if weights == "binary":
            dp[j] = dgate[j]
        else:
            inner = sum(dgate[i] * probabilities[i] for i in experts)
            dp[j] = ACTIVE * (dgate[j] / total - inner / total**2)
    return dp


REGIMES = list(product(("sample", "batch"), ("probability", "binary"), ("learned", "random"), ("first", "mean")))


@pytest.mark.parametrize("scope, weights, router, guide", REGIMES)
def test_a_layer_is_the_dense_formula_in_forward_and_every_gradient(scope, weights, router, guide):
    method = make(scope=scope, weights=weights, router=router, guide=guide)
    begin(method, "a")
    layer = method.layers["up"]
    x = torch.randn(B, L, WIDTH, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    dy = torch.randn_like(y)
    y.backward(dy)

    settings = method.options
    wanted, a, b, leaf, gate, probabilities, used = dense_layer(layer, x, settings)
    close = {"rtol": 1e-9, "atol": 1e-9}
    torch.testing.assert_close(y, wanted, **close)
    wanted.backward(dy)
    for got, want in zip(layer.part("experts"), (a, b), strict=True):
        torch.testing.assert_close(got.grad, want.grad, **close)
    module = layer.choose.lora_router
    if router == "random":
        assert module.weight.grad is None
        assert module.bias.grad is None
        torch.testing.assert_close(x.grad, leaf.grad, **close)
        return
    weight, bias, dx = router_gradient(layer, settings, x.detach(), gate.grad, probabilities, used)
    torch.testing.assert_close(module.weight.grad, weight, **close)
    torch.testing.assert_close(module.bias.grad, bias, **close)
    torch.testing.assert_close(x.grad, leaf.grad + dx, **close)


def test_the_released_preset_gathers_one_set_of_experts_for_the_batch():
    method = make(**PRESETS["released"] | {"merged": 2})
    begin(method, "a")
    layer = method.layers["down"]
    x = torch.randn(B, L, HIDDEN, dtype=torch.float64)
    scores = x[:, 0] @ layer.choose.lora_router.weight.T + layer.choose.lora_router.bias
    members, used = chosen(scores.softmax(1), "batch")
    assert any(sorted(member) != sorted(used[0]) for member in members), "a vote that changes nothing tests nothing"
    a, b = layer.part("experts")
    update = b[:, used[0]] @ a[used[0]]
    wanted = x @ layer.base_layer.weight.T + layer.base_layer.bias + 3.0 / R * x @ update.T
    torch.testing.assert_close(layer(x), wanted, rtol=1e-9, atol=1e-9)


def test_only_experts_and_a_learned_router_learn_and_unused_experts_stay():
    for router, wanted in (("learned", {"lora_A", "lora_B", "lora_router"}), ("random", {"lora_A", "lora_B"})):
        method = make(router=router)
        begin(method, "a")
        learning = [name for name, p in method.model.named_parameters() if p.requires_grad]
        assert {part for name in learning for part in name.split(".") if part.startswith("lora_")} == wanted
    x = torch.randn(1, L, WIDTH, dtype=torch.float64)
    layer = method.layers["up"]
    layer(x).sum().backward()
    unused = [j for j in range(R) if layer.choose.counts[j] == 0]
    assert len(unused) == R - ACTIVE
    assert not layer.lora_A["experts"].grad[unused].any()
    assert not layer.lora_B["experts"].grad[:, unused].any()


def test_the_guide_is_taken_after_a_dropout_if_asked_for():
    x = torch.randn(B, L, WIDTH, dtype=torch.float64)
    for guide_dropout in (False, True):
        method = make(guide_dropout=guide_dropout, dropout=0.5)
        begin(method, "a")
        layer = method.layers["up"]
        gates = [layer.choose(layer, x)[0].gate for _ in range(2)]
        assert torch.equal(*gates) != guide_dropout
        layer.eval()
        assert torch.equal(*(layer.choose(layer, x)[0].gate for _ in range(2)))


@pytest.mark.parametrize("weights", ["probability", "binary"])
def test_a_mean_leaves_padding_out(weights):
    """Each sample of a padded batch gets what it gets alone, and counts the same experts."""
    method = make(guide="mean", weights=weights)
    # Toy takes no mask.
    method.model.register_forward_pre_hook(lambda model, args, kwargs: (args, {}), with_kwargs=True)
    begin(method, "one")
    x, lengths = torch.randn(B, L, WIDTH, dtype=torch.float64), [4, 1, 3, 2, 4]
    alone = torch.zeros(R, dtype=torch.float64)
    outputs = []
    for row, length in zip(x, lengths, strict=True):
        outputs.append(method.model(row[None, :length])[0])
        alone += method.layers["up"].choose.counts
        method.layers["up"].choose.counts.zero_()
    mask = (torch.arange(L) < torch.tensor(lengths)[:, None]).long()
    y = method.model(x, attention_mask=mask)
    for row, want, length in zip(y, outputs, lengths, strict=True):
        torch.testing.assert_close(row[:length], want, rtol=1e-12, atol=1e-12)
    assert torch.equal(method.layers["up"].choose.counts, alone)


def test_the_mask_of_the_text_says_nothing_of_images():
    class Two(Toy):
        def __init__(self):
            super().__init__()
            self.vision_tower, self.text_model = nn.Linear(WIDTH, HIDDEN).double(), nn.Linear(WIDTH, HIDDEN).double()
            self.text_model.main_input_name = "input_ids"

        def get_decoder(self):
            return self.text_model

        def get_image_features(self, x):
            return self.vision_tower(x)

        def forward(self, x, attention_mask):
            return self.vision_tower(x), self.text_model(x)

    torch.manual_seed(1)
    settings = {"r": R, "active": ACTIVE, "dropout": 0.0, "guide": "mean", "target_modules": "vision_tower|text_model"}
    method = make_method("dac", Two(), settings)
    begin(method, "one")
    x, mask = torch.randn(B, L, WIDTH, dtype=torch.float64), torch.ones(B, L)
    seen, text = method.model(x, attention_mask=mask)
    mask[:, 1:] = 0
    seen_masked, text_masked = method.model(x, attention_mask=mask)
    assert torch.equal(seen, seen_masked)
    assert not torch.equal(text, text_masked)


# --- counts -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_counts_and_weights_are_those_of_a_loop(scope):
    method = make(scope=scope)
    begin(method, "a")
    layer, router = method.layers["up"], method.layers["up"].choose.lora_router
    counts, weights = torch.zeros(2, R, dtype=torch.float64)
    for size in (5, 1, 3):
        x = torch.randn(size, L, WIDTH, dtype=torch.float64)
        layer(x)
        probabilities = (x[:, 0] @ router.weight.T + router.bias).softmax(1).detach()
        members, used = chosen(probabilities, scope)
        mean = probabilities.mean(0).expand_as(probabilities) if scope == "batch" else probabilities
        for row in range(size):
            for j in members[row]:
                counts[j] += 1
            for j in used[row]:
                weights[j] += ACTIVE * mean[row, j] / sum(mean[row, i] for i in used[row])
    assert torch.equal(layer.choose.counts, counts)
    torch.testing.assert_close(layer.choose.weights, weights)
    assert layer.choose.samples.item() == 9
    layer.eval()(x)
    assert layer.choose.samples.item() == 9, "inference counts nothing"


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_once_and_changes_nothing(reentrant):
    method = make(dropout=0.3, guide_dropout=True)
    begin(method, "a")
    x = torch.randn(B, L, WIDTH, dtype=torch.float64, requires_grad=True)
    results = []
    for forward in (method.model, lambda x: checkpoint(method.model, x, use_reentrant=reentrant)):
        for layer in method.layers.values():
            for counted in (layer.choose.counts, layer.choose.weights, layer.choose.samples):
                counted.zero_()
        method.model.zero_grad()
        torch.manual_seed(5)
        forward(x).square().sum().backward()
        gradients = {name: p.grad.clone() for name, p in method.model.named_parameters() if p.grad is not None}
        results.append(gradients | {name: tensor.clone() for name, tensor in method.progress().items()})
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)
    assert results[0]["up.samples"].item() == B


@pytest.mark.parametrize("scope", ["sample", "batch"])
def test_a_training_step_never_waits_for_the_device(scope):
    method = make(scope=scope)  # without dropout, whose seed the eager backend reads on the host
    learn(method, "a")
    begin(method, "b")
    x = torch.randn(B, L, WIDTH, dtype=torch.float64)
    with Operations() as operations:
        loss = method.loss({}, lambda: (method.model(x).square().sum(), None), 1.0)
        loss.backward()
    assert operations.ours["rank_gate"] >= 3
    assert operations.ours["linear"] == 3
    waiting = {"_local_scalar_dense", "item", "is_nonzero", "nonzero", "masked_select", "equal", "_unique2", "cpu"}
    assert not waiting & operations.seen.keys()


# --- the orthogonal loss ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("old_experts", ["critical", "all"])
def test_the_orthogonal_loss_and_its_gradient_are_the_formula(old_experts):
    method = make(old_experts=old_experts, orthogonality=0.3)
    learn(method, "a", "b")
    begin(method, "c")
    x = torch.randn(B, L, WIDTH, dtype=torch.float64)
    plain = method.model(x).square().mean()
    share = 0.25
    loss = method.loss({}, lambda: (torch.zeros((), dtype=torch.float64), None), share)
    loss.backward()
    total = 0.0
    for path, layer in method.layers.items():
        new = layer.part("experts")[1]
        critical = best(layer.choose.counts, CRITICAL)
        wanted = torch.zeros_like(new)
        for task in ("a", "b"):
            stored = method.trained[task]
            old, counts = stored[f"{path}.experts.B0"], stored[f"state.{path}.counts"]
            for i in critical:
                for j in best(counts, CRITICAL) if old_experts == "critical" else range(R):
                    inner = sum(new[n, i].item() * old[n, j].item() for n in range(len(new)))
                    total += abs(inner)
                    wanted[:, i] += (1 if inner > 0 else -1) * old[:, j]
        torch.testing.assert_close(new.grad, share * 0.3 / 3 * wanted, rtol=1e-9, atol=1e-9)
    assert loss.item() == pytest.approx(share * 0.3 / 3 * total, rel=1e-9)
    torch.testing.assert_close(method.loss({}, lambda: (plain, None), share), plain + loss)


def test_there_is_no_orthogonal_loss_in_the_first_task_or_without_weight():
    for method, tasks in ((make(), ()), (make(orthogonality=0.0), ("a",))):
        learn(method, *tasks)
        begin(method, "b")
        assert method.loss({}, lambda: (torch.tensor(2.5), None), 1.0).item() == 2.5


# --- merging ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights, merged", [("probability", None), ("probability", 2), ("binary", 2)])
def test_a_task_is_merged_as_the_sum_of_its_best_experts(weights, merged):
    method = make(weights=weights, merged=merged)
    start = {path: layer.base_layer.weight.clone() for path, layer in method.layers.items()}
    learn(method, "a", "b")
    for path, layer in method.layers.items():
        wanted = start[path].clone()
        for task in ("a", "b"):
            stored = method.trained[task]
            counts, mean = stored[f"state.{path}.counts"], stored[f"state.{path}.weights"]
            assert counts.sum() == 3 * B * ACTIVE
            torch.testing.assert_close(mean.sum(), torch.tensor(R if weights == "binary" else ACTIVE).double())
            for j in best(counts, merged or ACTIVE):
                a, b = stored[f"{path}.experts.A"][j], stored[f"{path}.experts.B0"][:, j]
                wanted += 3.0 / R * mean[j] * torch.outer(b, a)
        torch.testing.assert_close(layer.base_layer.weight, wanted, rtol=1e-9, atol=1e-9)
        assert not layer.lora_A
        x = torch.randn(2, 3, layer.in_features, dtype=torch.float64)
        assert torch.equal(layer(x), layer.base_layer(x))


def test_a_restored_method_is_the_same_model_bit_for_bit():
    method = make()
    learn(method, "a", "b")
    again = make()
    again.restore({task: method.tensors(task) for task in ("a", "b")})
    for path, layer in method.layers.items():
        assert torch.equal(again.layers[path].base_layer.weight, layer.base_layer.weight)
    assert again.tasks == ["a", "b"]
    assert again.fingerprints(["a", "b"]) == method.fingerprints(["a", "b"])
    learn(method, "c")
    assert method.fingerprints(["a"]) != again.fingerprints(["a"]), "a later task changes what is merged"


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"active": 7}, "dac: active is 7 and r is 6; active must be at most r"),
        ({"merged": 7}, "merged is 7 and r is 6"),
        ({"critical": 0}, "dac: critical is 0"),
        ({"scope": "token"}, "dac: scope is 'token'"),
        ({"experts": 3}, "dac has no setting 'experts'; did you mean 'old_experts'?"),
        ({"target_modules": "nothing"}, "'nothing' matches no layer of this model"),
    ],
)
def test_bad_settings_are_one_sentence(settings, words):
    with pytest.raises(UserError) as error:
        make(**settings)
    assert words in str(error.value)
    assert "\n" not in str(error.value)


# --- CLIP ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def clip():
    """(a CLIP before, the same after DAC has learned two tasks)."""
    torch.manual_seed(0)
    encoder = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = encoder | {"vocab_size": 30, "max_position_embeddings": 8, "bos_token_id": 1, "eos_token_id": 3}
    vision = encoder | {"image_size": 16, "patch_size": 8}
    config = CLIPConfig(text_config=text, vision_config=vision, projection_dim=16, initializer_factor=4.0)
    plain, learned = CLIPModel(config).eval(), CLIPModel(config)
    learned.load_state_dict(plain.state_dict())
    method = make_method("dac", learned, {"target_modules": target_modules("clip")})
    inputs = {"input_ids": torch.randint(4, 30, (6, 8)), "pixel_values": torch.randn(6, 3, 16, 16)}
    inputs["input_ids"][:, -1] = 3
    for task in ("a", "b"):
        begin(method, task)
        learned(**inputs)
        method.end(Stage("learn", task), None)
    method.activate("b", train=False)
    return plain, learned.eval(), inputs


def test_inference_costs_what_the_plain_model_costs(clip):
    costs = []
    for model in clip[:2]:
        with torch.inference_mode(), FlopCounterMode(display=False) as flops, Operations() as operations:
            outputs = model(**clip[2])
        costs.append((flops.get_total_flops(), operations.seen))
        assert not operations.ours
    assert costs[0] == costs[1]
    assert costs[0][0] > 0
    layers = [module for module in clip[1].modules() if isinstance(module, RankPoolLinear)]
    assert len(layers) == 2 * 2 * 6
    assert all(not layer.lora_A for layer in layers)
    changed = (outputs.image_embeds - clip[0](**clip[2]).image_embeds).abs().max()
    assert changed > 1e-3, "the tasks are in the weights"


def test_inference_of_a_sample_is_independent_of_its_batch(clip):
    _, model, inputs = clip
    with torch.inference_mode():
        whole = model(**inputs)
        for i in range(6):
            alone = model(**{name: tensor[i : i + 1] for name, tensor in inputs.items()})
            torch.testing.assert_close(alone.image_embeds[0], whole.image_embeds[i], rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(alone.text_embeds[0], whole.text_embeds[i], rtol=1e-5, atol=1e-6)


def test_vit_b_16_has_the_published_linears_and_parameters():
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig(text_config=text, vision_config={"patch_size": 16}))
        parameters = sum(p.numel() for p in model.parameters())
        method = make_method("dac", model, {"target_modules": target_modules(model.config)})
    assert len(method.layers) == 144
    pairs = sum(12 * (layer.in_features + layer.out_features) for layer in method.layers.values())
    routers = sum(p.numel() for layer in method.layers.values() for p in layer.choose.parameters())
    assert (pairs, routers, parameters) == (3_317_760, 1_660_608, 149_620_737)
