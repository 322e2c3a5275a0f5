"""PCLR: compression, integration's loss, and the cycle on a small LLaVA."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.clip_llava import batch, llava
from support.pclr import learn, learned, pclr, rows
from torch.nn.functional import kl_div, normalize

from lilora.errors import UserError
from lilora.methods.base import lora_parameters
from lilora.methods.distillation import divergence
from lilora.methods.pclr import pool as pools
from lilora.methods.pclr.compression import least_redundant, merged_keys, strided
from lilora.methods.pclr.pool import GateRule, Query, RankPool
from lilora.methods.pclr.settings import PRESETS, PCLRSettings
from lilora.methods.redundancy import rank_gram

# --- the model ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"value": "binary", "query": "two"}, {"newest_switch": 2}], ids=str)
def test_each_sample_of_a_batch_gets_what_it_gets_alone(settings):
    method, images = learned(2, **settings), [1, 0, 2, 1]
    inputs = batch(images)
    with torch.no_grad():
        together = method.model(**inputs).logits
        for i in range(len(images)):
            alone = method.model(**rows(inputs, i, images)).logits
            torch.testing.assert_close(together[i : i + 1], alone, rtol=1e-4, atol=1e-4)
        plain = llava()(**inputs).logits
    assert (together - plain).abs().max() > 1e-2


def test_one_gate_per_pool_and_forward_and_none_for_decoding_steps(monkeypatch):
    method, calls, read = learned(2), [], []
    gate, scores = pools.rank_gate, RankPool.scores
    monkeypatch.setattr(pools, "rank_gate", lambda *args: calls.append(1) or gate(*args))
    monkeypatch.setattr(RankPool, "scores", lambda *args: read.append(1) or scores(*args))
    inputs = batch(answer=0)
    inputs.pop("labels")
    with torch.no_grad():
        method.model(**inputs)
        assert len(method.pools) == 3  # two decoder layers and the projector, eight linears
        assert len(calls) == len(method.pools)
        assert len(read) == 2 * len(method.pools)  # old and new keys, once each
        calls.clear()
        method.model.generate(**inputs, max_new_tokens=5, do_sample=False)
        assert len(calls) == len(method.pools)


@pytest.mark.parametrize("beams", [1, 2])
def test_generation_of_a_batch_equals_that_of_its_samples(beams):
    method, images = learned(2), [1, 1, 1]
    inputs = batch(images, answer=0)
    inputs.pop("labels")
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "num_return_sequences": beams}
    with torch.no_grad():
        together = method.model.generate(**inputs, **options)
        for i in range(3):
            alone = method.model.generate(**rows(inputs, i, images), **options)
            assert torch.equal(together[beams * i : beams * (i + 1)], alone)


def test_checkpointed_gradients_are_the_same():
    method = learned(2, value="score")
    (stage,) = method.stages("next")
    method.begin(stage, lambda samples: iter([batch()]))
    inputs = batch([1, 0, 1])
    method.model.train()
    learning = {n: p for n, p in method.model.named_parameters() if p.requires_grad}
    assert any("lora_pools" in name for name in learning)

    def gradients():
        torch.manual_seed(0)
        return torch.autograd.grad(method.model(**inputs).loss, list(learning.values()), allow_unused=True)

    plain = gradients()
    method.model.gradient_checkpointing_enable({"use_reentrant": False})
    for name, a, b in zip(learning, plain, gradients(), strict=True):
        assert (a is None) == (b is None), name
        if a is not None:
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


# --- compression ----------------------------------------------------------------------------------------------------------


def test_a_stride_drops_every_m_th():
    kept = [i for i in range(256) if (i + 1) % 4]
    assert strided(256, 192).tolist() == kept
    assert strided(256, 224).tolist() == [i for i in range(256) if (i + 1) % 8]


@given(st.integers(1, 60), st.data())
def test_a_stride_keeps_as_many_as_it_is_told(total, data):
    keep = data.draw(st.integers(0, total))
    kept = strided(total, keep).tolist()
    assert len(kept) == keep
    assert kept == sorted(set(kept))


def test_ranks_that_others_explain_go_first():
    torch.manual_seed(0)
    a, b = torch.randn(6, 9, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)
    a[4], b[:, 4] = 2 * a[1], 0.1 * b[:, 1]  # the same matrix but for a factor
    a[2], b[:, 2] = 1e-3 * a[2], 1e-3 * b[:, 2]  # next to nothing
    kept = least_redundant(rank_gram(a, b, a, b), 4)
    assert kept.tolist() == [0, 1, 3, 5]


def test_least_redundant_is_greedy_elimination_by_least_squares():
    torch.manual_seed(1)
    vectors = torch.randn(8, 5, dtype=torch.float64) * torch.rand(8, 1, dtype=torch.float64)
    kept: list[int] = []
    for _ in range(5):
        rest = [j for j in range(8) if j not in kept]
        if kept:
            basis = vectors[kept].T
            left = [
                (vectors[j] - basis @ torch.linalg.lstsq(basis, vectors[j, :, None]).solution[:, 0]).norm()
                for j in rest
            ]
        else:
            left = [vectors[j].norm() for j in rest]
        kept.append(rest[int(torch.stack(left).argmax())])
    assert least_redundant(vectors @ vectors.T, 5).tolist() == sorted(kept)


def test_task_queries_are_added_to_their_best_keys():
    """Four tasks of 64 alike keys, every fourth dropped: each task gets its 48 and 16 of its nearest other's."""
    torch.manual_seed(0)
    text, vision = normalize(torch.randn(4, 8), dim=1), normalize(torch.randn(4, 5), dim=1)
    kept = strided(256, 192)
    keys = text.repeat_interleave(64, 0)[kept], vision.repeat_interleave(64, 0)[kept]
    rule = GateRule(64, query="two", vision_weight=0.25)
    got = merged_keys(*keys, Query(text, vision), rule)
    wanted = [key.clone() for key in keys]
    for i in range(4):
        score = keys[0] @ text[i] + 0.25 * keys[1] @ vision[i]
        best = sorted(range(192), key=lambda j: (-score[j].item(), j))[:64]
        # The score of alike keys differs by rounding at most; the two formulations agree on whole tasks.
        assert sum(j // 48 == i for j in best) == 48
        wanted[0][best] += text[i]
        wanted[1][best] += vision[i]
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, normalize(b, dim=1))


@given(st.integers(1, 40), st.integers(0, 60), st.integers(2, 25), st.sampled_from(["progressive", "constant"]))
def test_a_plan_never_exceeds_the_cap(r, more, tasks, schedule):
    settings = PCLRSettings(target_modules="x", r=r, cap=r + more, schedule=schedule)
    ranks = 0
    for learned_tasks in range(tasks):
        keep, new = settings.plan(learned_tasks, ranks)
        assert 0 <= keep <= ranks
        assert 1 <= new <= r or keep + new == settings.cap
        ranks = keep + new
        assert ranks <= settings.cap


def test_the_published_table():
    settings = PCLRSettings.read("pclr", {"target_modules": "x", **make_preset("released")})
    ranks, seen = 0, []
    for i in range(8):
        keep, new = settings.plan(i, ranks)
        ranks = keep + new
        seen.append((keep, new))
    assert seen == [(0, 64), (64, 64), (128, 64), (192, 64), (192, 64), (192, 64), (224, 32), (224, 32)]


def test_the_published_table_of_the_second_suite():
    settings = PCLRSettings.read("pclr", {"target_modules": "x", **make_preset("continual_next")})
    ranks, seen = 0, []
    for i in range(15):
        keep, new = settings.plan(i, ranks)
        seen.append((keep, new))
        ranks = keep + new
    stay = [(192, 64)] * 7 + [(224, 32)] * 4
    assert seen == [(0, 64), (64, 64), (128, 64), (192, 64), *stay]


def make_preset(name):
    from lilora.methods import METHODS

    return METHODS["pclr"].presets[name]


# --- integration ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_divergence_over_the_whole_vocabulary(temperature):
    student = torch.randn(3, 700, 11, requires_grad=True)
    teacher = torch.randn(3, 700, 11)
    log_p, log_q = ((z.double() / temperature).log_softmax(-1) for z in (student, teacher))
    wanted = kl_div(log_p, log_q, log_target=True, reduction="sum") / 2100
    got = divergence(student, teacher, temperature).mean()
    torch.testing.assert_close(got.double(), wanted, rtol=1e-5, atol=1e-7)
    for a, b in zip(torch.autograd.grad(got, student), torch.autograd.grad(wanted, student), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-8)


def test_divergence_over_the_teachers_best_is_that_of_square_rooted_probabilities():
    student, teacher = torch.randn(2, 5, 30, dtype=torch.float64), torch.randn(2, 5, 30, dtype=torch.float64)
    best = teacher.topk(7, -1).indices
    roots = [z.gather(-1, best).softmax(-1).sqrt() for z in (teacher, student)]
    p, q = (root / root.sum(-1, keepdim=True) for root in roots)
    torch.testing.assert_close(
        divergence(student, teacher, 2.0, 7).double(), (p * (p / q).log()).sum(-1), rtol=1e-5, atol=1e-7
    )


@pytest.mark.parametrize("fake_queries", ["keys", "task"])
def test_teacher_of_an_integration_is_the_pool_as_it_was(fake_queries):
    method = learned(3, fake_queries=fake_queries, value="binary")
    inputs = {name: value for name, value in batch().items() if name != "labels"}
    before = method.experts()
    query = Query(method.queries.text[:1], method.queries.vision[:1])
    with torch.no_grad(), method.pool_tasks.querying(query):
        wanted = method.model(**inputs).logits
    integrate, _ = method.stages("next")
    assert integrate.name == "integrate"
    method.begin(integrate, lambda samples: iter([]))
    assert method.experts() < before
    with torch.no_grad():
        with method.pool_tasks.querying(query, teacher=True):
            teacher = method.model(**inputs).logits
        with method.pool_tasks.querying(query):
            student = method.model(**inputs).logits
    torch.testing.assert_close(teacher, wanted)
    assert (student - wanted).abs().max() > 1e-4
    with torch.no_grad():
        for parameter in method.model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
        with method.pool_tasks.querying(query, teacher=True):
            torch.testing.assert_close(method.model(**inputs).logits, wanted)


def test_fake_queries_are_keys_of_the_teacher():
    method = learned(3)
    pools = method.pools.values()
    keys = torch.cat([normalize(pool.keys(part)[0], dim=1) for pool in pools for part in ("old", "new")])
    integrate, _ = method.stages("next")
    method.begin(integrate, lambda samples: iter([]))
    assert torch.equal(method.fakes.text, keys)


def test_fake_queries_are_drawn_by_the_root_of_their_last_loss():
    method = learned(3, fake_queries="task", vocabulary=5, temperature=2.0, train_keys=False)
    integrate, _ = method.stages("next")
    method.begin(integrate, lambda samples: iter([]))
    method.model.train()
    losses = {}
    for _ in range(12):
        before = method.chances.clone()
        loss = method.loss(batch(), None, 1.0)
        changed = (method.chances != before).nonzero().flatten().tolist()
        assert len(changed) <= 1
        for i in changed:
            losses[i] = (loss.item() + 1e-4) ** 0.5
    for i in range(3):
        assert method.chances[i].item() == pytest.approx(losses.get(i, 1.0), rel=1e-5)


@pytest.mark.parametrize("everywhere", [False, True])
def test_distillation_leaves_padding_out_unless_asked_for(everywhere):
    """The loss of a padded batch is the mean of its samples' losses alone, without the tokens that pad them."""
    method = learned(3, fake_queries="task", train_keys=False, distil_padding=everywhere)
    integrate, _ = method.stages("next")
    method.begin(integrate, lambda samples: iter([]))
    method.fakes = Query(method.fakes.text[:1], method.fakes.vision[:1])
    method.chances = torch.ones(1)
    images, lengths, inputs = [1, 1, 1], [12, 7, 9], batch()
    alone = []
    for i, length in enumerate(lengths):
        inputs["attention_mask"][i, length:] = 0
        one = rows(inputs, i, images)
        one |= {name: one[name][:, :length] for name in ("input_ids", "attention_mask", "labels")}
        alone.append(method.loss(one, None, 1.0))
    together = method.loss(inputs, None, 1.0)
    assert torch.isclose(together, torch.stack(alone).mean(), rtol=1e-4) != everywhere


def test_integration_brings_the_student_to_the_teacher():
    method = learned(3, train_keys=False)
    integrate, _ = method.stages("next")
    method.begin(integrate, lambda samples: iter([]))
    method.fakes = Query(method.fakes.text[:4], method.fakes.vision[:4])
    method.chances = torch.ones(4)
    data = [{n: v for n, v in batch().items() if n != "labels"} for _ in range(8)]

    def apart():
        """Mean over fake queries."""
        total = 0.0
        for i in range(len(method.fakes.text)):
            query = Query(method.fakes.text[i : i + 1], method.fakes.vision[i : i + 1])
            with torch.no_grad():
                with method.pool_tasks.querying(query, teacher=True):
                    teacher = method.model(**data[0]).logits
                with method.pool_tasks.querying(query):
                    total += divergence(method.model(**data[0]).logits, teacher).mean().item() / len(method.fakes.text)
        return total

    before = apart()
    method.model.train()
    optimizer = torch.optim.Adam([p for p in method.model.parameters() if p.requires_grad], 1e-2)
    for i in range(60):
        optimizer.zero_grad()
        method.loss(data[i % 3], None, 1.0).backward()
        optimizer.step()
    method.model.eval()
    assert apart() < 0.6 * before


# --- learning -------------------------------------------------------------------------------------------------------------


def test_old_ranks_and_keys_stay_while_a_task_is_learned():
    method = learned(1)
    before = {n: p.clone() for n, p in method.model.named_parameters()}
    old = {path: [t.clone() for t in layer.part("new")] for path, layer in method.layers.items()}
    keys = {name: [k.clone() for k in pool.keys("new")] for name, pool in method.pools.items()}
    learn(method, "next")
    for path, layer in method.layers.items():
        assert all(torch.equal(a, b) for a, b in zip(layer.part("old"), old[path], strict=True))
        assert (layer.part("new")[1] - layer.part("old")[1][:, : layer.part("new")[1].shape[1]]).abs().max() > 0
    for name, pool in method.pools.items():
        assert all(torch.equal(a, b) for a, b in zip(pool.keys("old"), keys[name], strict=True))
    for name, value in method.model.named_parameters():
        if "lora_" not in name:
            assert torch.equal(value, before[name])


def test_new_ranks_start_as_the_nearest_old_ones():
    method = learned(1, key_init="mean", query="two")
    data = [batch() for _ in range(3)]
    old = {path: [t.clone() for t in layer.part("new")] for path, layer in method.layers.items()}
    found = [method.pool_tasks.queries(method.model, inputs) for inputs in data]
    text = normalize(torch.cat([q.text for q in found]).mean(0), dim=0)
    vision = normalize(torch.cat([q.vision for q in found]).mean(0), dim=0)
    scores = {}
    for name, pool in method.pools.items():
        keys = pool.keys("new")
        scores[name] = normalize(keys[0], dim=1) @ text + normalize(keys[1], dim=1) @ vision  # vision_weight 16/16
    (stage,) = method.stages("next")
    method.begin(stage, lambda samples: iter(data))
    for name, pool in method.pools.items():
        order = sorted(range(4), key=lambda j: (-scores[name][j].item(), j))
        torch.testing.assert_close(pool.keys("new")[0], text.expand(4, -1))
        for path in method.members[name]:
            assert torch.equal(method.layers[path].part("new")[0], old[path][0][order])
            assert torch.equal(method.layers[path].part("new")[1], old[path][1][:, order])


@pytest.mark.parametrize("key_loss", ["top_r", "all_new"])
def test_key_loss(key_loss):
    method = learned(2, key_loss=key_loss, query="two")
    query = method.pool_tasks.queries(method.model, batch([1, 0, 1]))
    total = 0.0
    for pool in method.pools.values():
        if key_loss == "all_new":
            text, vision = (normalize(k, dim=1) for k in pool.keys("new"))
            for qt, qv in zip(query.text, query.vision, strict=True):
                n = len(text) * 3
                total += sum((1 - qt @ k) / n for k in text) + (qv.norm() > 0) * sum((1 - qv @ k) / n for k in vision)
        else:
            for i in range(3):
                near = torch.cat([pool.scores(part, query)[i] for part in ("old", "new")])
                total += sum(abs(1 - s) for s in sorted(near.tolist(), reverse=True)[:4]) / 3
    torch.testing.assert_close(method._key_loss(query, "new").item(), float(total / 3), rtol=1e-5, atol=1e-6)


SECOND_SUITE = PRESETS["continual_next"] | {"schedule": [(4, 1.0)] * 3 + [(4, 0.67)], "integration_rate": 1.0}


@pytest.mark.parametrize(
    "settings",
    [{}, {"pools": "global"}, {"shared_learns": "always"}, {"integrate": False}, {"groups": [2, 1]}, SECOND_SUITE],
    ids=["paper", "global", "shared", "not-integrated", "groups", "continual_next"],
)
def test_memory_never_exceeds_the_cap(settings):
    method = pclr(**settings)
    sizes = []
    for i in range(6):
        learn(method, f"task{i}", steps=1)
        assert method.experts() <= 12
        assert method.ranks() <= 12 + 2
        sizes.append(method.parameters())
    pool = sum(t.numel() for name, t in method.tensors("task5")[1].items() if name.endswith((".A", ".B0")))
    linears = [(layer.out_features, layer.in_features) for layer in method.layers.values()]
    assert method.experts() == 12
    learns = method.options.integrate or method.options.shared_learns == "always"
    assert pool == method.inference_parameters(method.options, linears)[0] - (
        0 if learns else lora_parameters(2, linears)
    )
    queries = method.queries.text.numel() // 6 + method.queries.vision.numel() // 6
    assert sizes[-1] - sizes[-2] == queries  # one query a task is all that grows


def test_restored_from_its_tensors():
    method, inputs = learned(4), batch()
    again = pclr()
    again.restore({task: method.tensors(task) for task in method.tasks})
    with torch.no_grad():
        assert torch.equal(again.model(**inputs).logits, method.model(**inputs).logits)
    assert again.fingerprints(again.tasks) == method.fingerprints(method.tasks)
    assert (again.ranks(), again.tasks) == (method.ranks(), method.tasks)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cap": 3}, "cap is 3, less than the 4 ranks of one task; raise cap or lower r"),
        ({"schedule": [(4, 1.5)]}, r"schedule: a line is \(4, 1.5\)"),
        ({"schedule": [(4, 0.0)]}, r"retention in \(0, 1\]"),
        ({"schedule": [(2, 1.0)]}, "r is 4 and the pool has 2 ranks after the first task; r must fit into it"),
        ({"temperature": 0}, "temperature is 0; it must be greater than 0"),
        ({"scope": "token"}, "scope is 'token'"),
        ({"groups": []}, r"groups is \[\]; it must be a number of tasks, at least 1, or a list of such numbers"),
        ({"groups": [2, 0]}, r"groups is \[2, 0\]; it must be a number of tasks"),
        ({"lwf": 0.5}, "lwf is 0.5 and groups is 1; lwf acts within groups of tasks, so give groups too"),
        ({"newest_switch": -1}, "newest_switch is -1"),
        ({"ranks": 4}, "pclr has no setting 'ranks'; it has target_modules, r, cap"),
        ({"target_modules": "nothing"}, "target_modules 'nothing' matches no layer of this model"),
    ],
)
def test_wrong_settings_are_one_sentence(settings, words):
    with pytest.raises(UserError, match=words) as error:
        pclr(**settings)
    assert "\n" not in str(error.value)


def test_a_prompt_without_ids_is_refused():
    method = learned(1)
    with pytest.raises(ValueError, match="pass input_ids"):
        method.model(inputs_embeds=torch.randn(1, 3, 16))
    with pytest.raises(RuntimeError, match="outside the model's forward"):
        next(iter(method.layers.values()))(torch.randn(1, 16))
