"""EWC, LwF, O-LoRA and MoELoRA against their formulas, written out with dense matrices in fp64."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from support.toy import HIDDEN, SCALING, TARGETS, VOCABULARY, WIDTH, Toy

from lilora.bank.index import BaseModelId
from lilora.errors import UserError
from lilora.methods import Stage, make_method
from lilora_kernels.layers.base import Factors

R = 8
PEFT_NAMES = ("ewc", "lwf")


class Dense:
    """The same model with the LoRAs {path: (A, B)} multiplied out."""

    def __init__(self, toy):
        self.weights = {name: tensor.clone() for name, tensor in toy.state_dict().items()}

    def linear(self, path, x, lora):
        weight = self.weights[f"{path}.weight"]
        if path in lora:
            a, b = lora[path]
            weight = weight + SCALING * b @ a
        return x @ weight.T + self.weights[f"{path}.bias"]

    def logits(self, input_ids, lora):
        x = self.linear("up", self.weights["embedding.weight"][input_ids], lora).tanh()
        return self.linear("head", self.linear("down", x, lora), lora)


def make(name, **settings):
    """(method on a toy, the dense model)."""
    torch.manual_seed(1)
    toy = Toy()
    dense = Dense(toy)
    prefix = "lora_" if name in PEFT_NAMES else ""
    sizes = {"r": R, f"{prefix}alpha": SCALING * R, f"{prefix}dropout": 0.0, "target_modules": TARGETS}
    return make_method(name, toy, sizes | settings), dense


def sample(rows=1, length=8):
    """Random tokens; the answers of the rows begin at different places."""
    input_ids = torch.randint(VOCABULARY, (rows, length))
    labels = input_ids.clone()
    for row, start in zip(labels, torch.randint(2, length - 1, (rows,)).tolist(), strict=True):
        row[:start] = -100
        row[length - row[0] % 2 :] = -100
    return {"input_ids": input_ids, "labels": labels}


@torch.no_grad()
def randomise(method):
    """New values for all that learns, where the optimiser would write them."""
    for p in method.model.parameters():
        if p.requires_grad:
            p.copy_(0.4 * torch.randn_like(p))


def factors(method):
    """{path: (A, B)} of a LoRA in the model, as leaves of their own."""
    stored = {name: t.detach().clone().requires_grad_() for name, t in method.tensors(method.tasks[-1])[1].items()}
    return {path: (stored[f"{path}.A"], stored[f"{path}.B0"]) for path in ("up", "down", "idle")}


def named(lora):
    return {f"{path}.{kind}": t for path, pair in lora.items() for kind, t in zip(("A", "B0"), pair, strict=True)}


def no_batches(samples, size=None):
    raise AssertionError("no batches are wanted")


def begin(method, task):
    method.begin(Stage("learn", task), no_batches)
    randomise(method)


def close(got, want, tolerance=1e-9):
    assert got.shape == want.shape
    assert (got - want).abs().max() <= tolerance * want.abs().max().clamp_min(1e-3)


# --- EWC --------------------------------------------------------------------------------------------------------------


def log_likelihood(dense, inputs, lora):
    """log p(answer | prompt) of one sample, token by token."""
    log_p = dense.logits(inputs["input_ids"], lora)[0].log_softmax(-1)
    labels = inputs["labels"][0].tolist()
    return sum(log_p[i - 1, label] for i, label in enumerate(labels) if i and label != -100)


def dense_fisher(dense, data, lora):
    total = {name: torch.zeros_like(t) for name, t in named(lora).items()}
    for inputs in data:
        leaves = list(named(lora).values())
        gradients = torch.autograd.grad(log_likelihood(dense, inputs, lora), leaves, allow_unused=True)
        for name, gradient in zip(total, gradients, strict=True):
            total[name] += 0 if gradient is None else gradient**2 / len(data)
    return total


def test_ewc_sums_the_fisher_diagonals_of_the_tasks_sample_by_sample_and_without_dropout():
    method, dense = make("ewc", fisher_samples=5, lora_dropout=0.5)
    want = dict.fromkeys(named_paths(), 0)
    for task in ("first", "second"):
        begin(method, task)
        data, asked = [sample() for _ in range(5)], []

        def batches(samples, size=None, data=data, asked=asked):
            asked.append((samples, size))
            return iter(data)

        method.model.train()
        method.end(Stage("learn", task), batches)
        assert asked == [(5, 1)]
        assert method.model.training
        assert all(p.grad is None for p in method.model.parameters())
        for name, fisher in dense_fisher(dense, data, factors(method)).items():
            want[name] = want[name] + fisher
        stored = method.tensors(task)[1]
        for name, fisher in want.items():
            close(stored[f"state.fisher.{name}"], fisher)
            assert (fisher.max() > 0) == (not name.startswith("idle"))


def named_paths():
    return [f"{path}.{kind}" for path in ("up", "down", "idle") for kind in ("A", "B0")]


def test_ewc_adds_the_quadratic_penalty_of_the_formula():
    method, _ = make("ewc", penalty=3.0)
    begin(method, "first")
    ce = torch.randn((), dtype=torch.float64)
    assert method.loss({}, lambda: (ce, None), 0.25) == ce  # nothing to hold in the first task
    for fisher in method.fisher.values():
        fisher.copy_(torch.rand_like(fisher))
    anchor = factors(method)
    method.begin(Stage("learn", "second"), no_batches)
    assert method.loss({}, lambda: (ce, None), 0.25) == ce  # theta = theta*
    randomise(method)
    loss = method.loss({}, lambda: (ce, None), 0.25)
    now = named(factors(method))
    want = ce + sum(
        0.25 * 3.0 / 2 * (method.fisher[name] * (now[name] - old.detach()) ** 2).sum()
        for name, old in named(anchor).items()
    )
    close(loss, want)
    gradients = torch.autograd.grad(loss, [method.tensors("second")[1][name] for name in now])
    for got, expected in zip(gradients, torch.autograd.grad(want, list(now.values())), strict=True):
        close(got, expected)


def test_ewc_counts_the_lora_alone_and_resumes_with_the_fisher_and_the_anchor_of_its_bank():
    method, _ = make("ewc")
    begin(method, "first")
    for fisher in method.fisher.values():
        fisher.copy_(torch.rand_like(fisher))
    assert method.parameters() == sum(t.numel() for t in named(factors(method)).values())
    again, _ = make("ewc")
    again.restore({"first": method.tensors("first")})
    losses = []
    for m in (method, again):
        m.begin(Stage("learn", "second"), no_batches)
        torch.manual_seed(7)
        randomise(m)
        losses.append(m.loss({}, lambda: (torch.zeros((), dtype=torch.float64), None), 1.0).item())
    assert losses[0] == losses[1] > 0


# --- LwF --------------------------------------------------------------------------------------------------------------


def dense_divergence(dense, inputs, teacher, student, temperature):
    """Mean over the answers' tokens of sum p log(p / q), token by token."""
    terms = []
    logits = [dense.logits(inputs["input_ids"], lora) / temperature for lora in (teacher, student)]
    for row, labels in enumerate(inputs["labels"].tolist()):
        for i in range(1, len(labels)):
            if labels[i] != -100:
                p, q = (z[row, i - 1].exp() / z[row, i - 1].exp().sum() for z in logits)
                terms.append((p * (p / q).log()).sum())
    return torch.stack(terms).mean()


def test_lwf_distils_the_model_before_the_task_at_the_answers():
    method, dense = make("lwf", distillation=0.7, temperature=2.0, lora_dropout=0.5)
    begin(method, "first")
    inputs = sample(rows=3)
    ce = torch.randn((), dtype=torch.float64)
    assert method.loss(inputs, lambda: (ce, None), 0.25) == ce  # no task to keep
    teacher = factors(method)
    begin(method, "second")
    student = factors(method)
    method.model.train()
    outputs = SimpleNamespace(logits=dense.logits(inputs["input_ids"], student))  # without dropout, as the teacher
    loss = method.loss(inputs, lambda: (ce, outputs), 0.25)
    assert method.model.training
    want = ce + 0.25 * 0.7 * dense_divergence(dense, inputs, teacher, student, 2.0)
    assert want - ce > 0.01
    close(loss, want, 1e-6)  # the divergence is an fp32 scalar
    leaves = [t for path in ("up", "down") for t in student[path]]
    gradients = torch.autograd.grad(loss, leaves, retain_graph=True)
    for got, expected in zip(gradients, torch.autograd.grad(want, leaves), strict=True):
        close(got, expected, 1e-5)


def test_lwf_takes_the_student_from_the_model_and_the_teacher_from_the_bank():
    method, dense = make("lwf")
    begin(method, "first")
    teacher = factors(method)
    again, _ = make("lwf")
    again.restore({"first": method.tensors("first")})
    begin(again, "second")
    inputs = sample(rows=2)
    model = again.model.eval()
    loss = again.loss(inputs, lambda: ((out := model(**inputs)).loss, out), 1.0)
    loss.backward()
    assert not model.training
    student = factors(again)
    logits = dense.logits(inputs["input_ids"], student)
    want = F.cross_entropy(logits[:, :-1].flatten(0, 1), inputs["labels"][:, 1:].flatten())
    want = want + dense_divergence(dense, inputs, teacher, student, 2.0)
    close(loss.detach(), want.detach(), 1e-6)
    want.backward()
    own = again.tensors("second")[1]
    for name, leaf in named(student).items():
        if not name.startswith("idle"):
            close(own[name].grad, leaf.grad, 1e-5)


# --- O-LoRA -----------------------------------------------------------------------------------------------------------


def test_olora_sums_the_loras_of_all_tasks_and_only_the_newest_learns(monkeypatch):
    method, dense = make("olora")
    layer, learned = method.layers["up"], []
    seen = []
    run = Factors.run
    monkeypatch.setattr(Factors, "run", lambda *args: seen.append(args[-1]) or run(*args))
    for number, task in enumerate(("first", "second", "third")):
        begin(method, task)
        assert method.ranks() == R * (number + 1)
        assert sum(p.requires_grad for p in method.model.parameters()) == 6
        new = layer.part("new")
        x = torch.randn(2, 5, WIDTH, dtype=torch.float64, requires_grad=True)
        dy = torch.randn(2, 5, HIDDEN, dtype=torch.float64)
        y = layer(x)
        assert seen[-1] == ((R * number, R * (number + 1)) if number else None)  # earlier ranks cost no gradient
        leaves = [t.detach().clone().requires_grad_() for t in new]
        want = dense.linear("up", x, {})
        for a, b in [*learned, leaves]:
            want = want + SCALING * x @ a.T @ b.T
        close(y, want)
        got = torch.autograd.grad(y, [x, *new], dy)
        for one, other in zip(got, torch.autograd.grad(want, [x, *leaves], dy), strict=True):
            close(one, other)
        learned.append([t.detach() for t in leaves])
    old_a, old_b = layer.part("old")
    assert torch.equal(old_a, torch.cat([learned[0][0], learned[1][0]]))
    assert torch.equal(old_b, torch.cat([learned[0][1], learned[1][1]], 1))


@pytest.mark.parametrize("products", ["absolute", "squared"])
def test_olora_penalises_every_inner_product_of_an_old_and_a_new_row(products):
    method, _ = make("olora", orthogonality=0.3, products=products, l2=0.2)
    ce = torch.randn((), dtype=torch.float64)
    for number, task in enumerate(("first", "second", "third")):
        begin(method, task)
        want, leaves = ce, []
        for layer in method.layers.values():
            a, b = (t.detach().clone().requires_grad_() for t in layer.part("new"))
            leaves += [a, b]
            want = want + 0.25 * 0.2 * ((a**2).sum() ** 0.5 + (b**2).sum() ** 0.5)
            for old in layer.part("old")[0]:
                for new in a:
                    inner = (old * new).sum()
                    want = want + 0.25 * 0.3 * (inner**2 if products == "squared" else inner.abs())
        assert len(method.layers["up"].part("old")[0]) == number * R
        loss = method.loss({}, lambda: (ce, None), 0.25)
        close(loss, want)
        gradients = torch.autograd.grad(loss, list(method.new().values()))
        for got, expected in zip(gradients, torch.autograd.grad(want, leaves), strict=True):
            close(got, expected)


def test_olora_starts_where_the_earlier_tasks_ended_and_its_norms_have_gradients_there():
    method, _ = make("olora", l2=0.1)
    begin(method, "first")
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    before = method.layers["up"](x)
    method.begin(Stage("learn", "second"), no_batches)
    close(method.layers["up"](x), before)
    loss = method.loss({}, lambda: (torch.zeros((), dtype=torch.float64), None), 1.0)
    for gradient in torch.autograd.grad(loss, list(method.new().values())):
        assert gradient.isfinite().all()  # B = 0


# --- MoELoRA ----------------------------------------------------------------------------------------------------------


def dense_moe(dense, path, x, a, b, router, experts):
    """One expert after the other."""
    y = dense.linear(path, x, {})
    weights = (x @ router.T).exp()
    weights = weights / weights.sum(-1, keepdim=True)
    for e, (a_e, b_e) in enumerate(zip(a.chunk(experts), b.chunk(experts, 1), strict=True)):
        y = y + SCALING * weights[..., e : e + 1] * (x @ a_e.T @ b_e.T)
    return y


@pytest.mark.parametrize("shape", [(1,), (6,), (2, 5), (0,)], ids=str)
@pytest.mark.parametrize("experts", [1, 2, 8])
def test_moelora_weighs_the_experts_of_every_token(experts, shape):
    method, dense = make("moelora", experts=experts)
    begin(method, "first")
    for path, width, out in (("up", WIDTH, HIDDEN), ("down", HIDDEN, WIDTH)):
        layer = method.layers[path]
        own = [*layer.part("experts"), layer.choose.lora_router.weight]
        assert [list(t.shape) for t in own] == [[R, width], [out, R], [experts, width]]
        x = torch.randn(*shape, width, dtype=torch.float64, requires_grad=True)
        dy = torch.randn(*shape, out, dtype=torch.float64)
        leaves = [t.detach().clone().requires_grad_() for t in own]
        got, want = layer(x), dense_moe(dense, path, x, *leaves, experts)
        assert got.shape == want.shape
        pairs = [(got, want)]
        pairs += zip(torch.autograd.grad(got, [x, *own], dy), torch.autograd.grad(want, [x, *leaves], dy), strict=True)
        for one, other in pairs if x.numel() else ():
            close(one, other)


def test_moelora_goes_on_with_one_set_of_experts_and_routers():
    method, _ = make("moelora")
    begin(method, "first")
    x = torch.randn(3, WIDTH, dtype=torch.float64)
    before, count = method.layers["up"](x), method.parameters()
    method.begin(Stage("learn", "second"), no_batches)
    assert torch.equal(method.layers["up"](x), before)
    assert method.parameters() == count == sum(p.numel() for p in method.model.parameters() if p.requires_grad)
    assert method.ranks() == R
    again, _ = make("moelora")
    again.restore(dict.fromkeys(("first", "second"), method.tensors("second")))
    assert torch.equal(again.layers["up"](x), before)
    assert again.fingerprints(["first"]) == method.fingerprints(["first"])


@pytest.mark.parametrize("autocast", [False, True])
def test_moelora_keeps_gate_and_router_in_fp32_beside_a_bf16_model(autocast):
    toy = Toy().to(torch.float32 if autocast else torch.bfloat16)
    method = make_method("moelora", toy, {"r": R, "experts": 2, "target_modules": TARGETS})
    begin(method, "first")
    layer = method.layers["up"]
    x = torch.randn(5, WIDTH, dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        choice, rows = layer.choose(layer, x)
        y = layer(x)
    assert (choice.gate.dtype, rows.dtype, y.dtype) == (torch.float32, torch.int32, torch.bfloat16)
    assert layer.choose.lora_router.weight.dtype == torch.float32
    close(choice.gate.sum(1), torch.full((5,), R / 2), 1e-6)
    y.float().square().sum().backward()
    assert layer.choose.lora_router.weight.grad.abs().max() > 0


# --- all --------------------------------------------------------------------------------------------------------------

METHODS = ("ewc", "lwf", "olora", "moelora")


@pytest.mark.parametrize("name", METHODS)
def test_adapters_do_not_change_the_fingerprint_of_the_base(name):
    torch.manual_seed(1)
    plain = BaseModelId.of(Toy().float(), "toy")
    torch.manual_seed(1)
    toy = Toy().float()
    method = make_method(name, toy, {"r": R, "target_modules": TARGETS})
    begin(method, "first")
    assert BaseModelId.of(method.model, "toy") == plain


@pytest.mark.parametrize("name", METHODS)
def test_every_random_number_is_drawn_at_the_beginning_of_a_task(name):
    """A run seeds torch's generator for each stage: whatever was drawn before must not matter."""
    ends = []
    for drawn in (0, 5):
        torch.manual_seed(1)
        torch.rand(drawn)
        toy = Toy()
        for p in toy.parameters():
            p.data.fill_(0.1)
        settings = {"r": R, "target_modules": TARGETS}
        method = make_method(name, toy, settings)
        torch.manual_seed(2)
        method.begin(Stage("learn", "first"), no_batches)
        ends.append(method.fingerprints(["first"]))
    assert ends[0] == ends[1]


BAD = {
    "ewc": [("penalty", -1.0), ("penalty", float("nan")), ("fisher_samples", 0), ("lora_alpha", 0), ("alpha", 2.0)],
    "lwf": [("distillation", -1), ("temperature", 0), ("temperature", float("inf")), ("lora_dropout", 1.0)],
    "olora": [("orthogonality", -0.1), ("products", "cubed"), ("l2", -1), ("dropout", -0.5), ("alpha", "much")],
    "moelora": [("experts", 0), ("experts", 3), ("r", 0), ("r", 2.5), ("router", "topk")],
    "lora": [("r", "many"), ("bias", "all")],
    "dirlora": [("r", -1), ("target_modules", 3)],
}


@pytest.mark.parametrize(("name", "key", "value"), [(name, *pair) for name, pairs in BAD.items() for pair in pairs])
def test_a_wrong_setting_is_one_sentence(name, key, value):
    toy = Toy()
    modules = dict(toy.named_modules())
    with pytest.raises(UserError) as caught:
        make_method(name, toy, {"r": 8, "target_modules": TARGETS, key: value})
    text = str(caught.value)
    assert name in text
    assert key in text
    assert "\n" not in text
    assert dict(toy.named_modules()) == modules


@pytest.mark.parametrize("name", ["olora", "moelora"])
def test_a_pattern_without_linears_is_refused(name):
    with pytest.raises(UserError, match=r"matches no layer of this model"):
        make_method(name, Toy(), {"r": 8, "target_modules": "missing"})


def test_a_lora_per_task_starts_where_the_first_did_if_asked():
    def starts(seed=0, **settings):
        torch.manual_seed(3)
        method = make_method("dirlora", Toy(), {"r": R, "target_modules": TARGETS} | settings)
        method.seed = seed
        for task in ("one", "two"):
            method.add(task)
        drawn = torch.rand(1).item()
        return [method.tensors(task)[1] for task in ("one", "two")], drawn

    (one, two), _ = starts()
    assert not any(torch.equal(one[name], two[name]) for name in one if name.endswith(".A"))
    (one, two), drawn = starts(same_start=True)
    assert all(torch.equal(one[name], two[name]) for name in one)
    (other, _), _ = starts(seed=1, same_start=True)
    assert not any(torch.equal(one[name], other[name]) for name in one if name.endswith(".A"))
    torch.manual_seed(3)
    Toy()
    assert torch.rand(1).item() == drawn, "nothing else draws other numbers for it"
    with pytest.raises(UserError, match="same_start"):
        make_method("lora", Toy(), {"r": R, "target_modules": TARGETS, "same_start": True})
