"""`lilora analyze` against dense formulas in fp64, on banks written here: it needs no model."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from rich.console import Console
from torch.utils._python_dispatch import TorchDispatchMode

from lilora.bank.bank import Bank
from lilora.bank.index import BaseModelId
from lilora.errors import UserError
from lilora.reports import analysis_figures
from lilora.reports import analyze as analysis_module
from lilora.reports.analyze import DEFINITIONS, analyze, over_pairs, print_analysis, write_analysis

TASKS = ["name", "count", "locate"]
LINEARS = {  # path -> K, N
    "model.layers.2.up_proj": (24, 30),
    "model.layers.10.up_proj": (24, 30),
    "model.projector": (18, 24),
}
R, SUB_RANK = 5, 3


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def shared_set(seed, like=None, by=0.0):
    """Factors of every linear: new ones, or `like` moved at random."""
    shared = {}
    for i, (path, (k, n)) in enumerate(LINEARS.items()):
        for j, (kind, shape) in enumerate({"A": (R, k), "B0": (n, R)}.items()):
            new, name = noise(100 * seed + 10 * i + j, *shape), f"{path}.{kind}"
            shared[name] = new if like is None else like[name] + by * new
    return shared


def own_set(seed, fusion=True):
    own = {}
    for i, (path, (_, n)) in enumerate(LINEARS.items()):
        own[f"{path}.U"] = 0.5 * noise(1000 * seed + 10 * i, n, SUB_RANK)
        own[f"{path}.V"] = 0.5 * noise(1000 * seed + 10 * i + 1, SUB_RANK, R)
        if fusion:
            own[f"{path}.fusion"] = noise(1000 * seed + 10 * i + 2, 1)
    return own


def write_bank(folder, method, tasks):
    bank = Bank.create(
        folder, config={"method": method}, base_model=BaseModelId(id="no/such/model", fingerprint="0" * 16)
    )
    for name, (own, shared) in tasks.items():
        bank.add_task(name, own, shared)
    return bank


def tasks_of(method):
    first = shared_set(1)
    if method == "lilora-frozen":
        return {task: (own_set(i), first) for i, task in enumerate(TASKS)}
    if method == "lilora-paper":
        return {task: (own_set(i, fusion=False), shared_set(i, first, 0.3 * i)) for i, task in enumerate(TASKS)}
    if method == "lilora-released":
        moved = {t: shared_set(i, first, 0.3 * i) for i, t in enumerate(TASKS)}
        return {
            t: (own_set(i), {name: moved[t][name] if name.endswith(".A") else first[name] for name in first})
            for i, t in enumerate(TASKS)
        }
    state = {"state.fisher.up_proj.lora_A": noise(0, 7)} if method == "ewc" else {}  # no factor of a linear
    alike = (shared_set(i, first, 0.8 * i) | state for i in range(len(TASKS)))  # shares between 0 and 1
    return {task: ({}, shared) for task, shared in zip(TASKS, alike, strict=True)}


METHODS = ["lilora-frozen", "lilora-released", "lilora-paper", "lora", "ewc", "dirlora"]


@pytest.fixture(scope="module", params=METHODS)
def case(request, tmp_path_factory):
    """(method, bank, tasks)"""
    tasks = tasks_of(request.param)
    folder = tmp_path_factory.mktemp(request.param) / "run" / "bank"
    return request.param, write_bank(folder, request.param.partition("-")[0], tasks), tasks


# The dense formulation: projectors [D, D], ranks as flattened N x K matrices, least squares


def lora_of(own, shared, path):
    a, b = shared[f"{path}.A"].double(), shared[f"{path}.B0"].double()
    if own:
        uv = own[f"{path}.U"].double() @ own[f"{path}.V"].double()
        fusion = own.get(f"{path}.fusion")
        f = 1 / (1 + np.exp(-fusion.double().item())) if fusion is not None else None
        b = b + uv if f is None else f * b + (1 - f) * uv
    return a, b


def projector(rows):
    q = torch.linalg.qr(rows.T).Q
    return q @ q.T


def dense_overlap(x, y):
    return (projector(x) * projector(y)).sum().item() / R


def dense_cka(x, y):
    """By the centring matrix and the kernels [D, D] of samples."""
    d = x.shape[1]
    centring = torch.eye(d, dtype=torch.float64) - 1 / d
    k, kk = (centring @ rows.T @ rows @ centring for rows in (x, y))
    return (k * kk).sum().item() / (k.norm() * kk.norm()).item()


def dense_share(x, others, threshold):
    residual = x - torch.linalg.lstsq(others.T, x.T).solution.T @ others
    share = residual.square().sum(1) / x.square().sum(1)
    return (share < threshold * (1 - R / x.shape[1])).double().mean().item()


def dense_angle(x, y):
    cosines = torch.linalg.svdvals(torch.linalg.qr(x.T).Q.T @ torch.linalg.qr(y.T).Q)
    return np.degrees(np.arccos(np.clip(cosines.numpy(), 0, 1))).mean()


def test_overlap_and_redundancy_are_those_of_dense_formulas(case):
    _, bank, tasks = case
    threshold = 0.4
    got = analyze(bank, threshold)
    assert got.layers == list(LINEARS), "model order: layer 2 before layer 10"
    between = {"A": 0, "B": 0, "BA": 0}
    for i, path in enumerate(got.layers):
        loras = [lora_of(*tasks[task], path) for task in TASKS]
        for s, (a, b) in enumerate(loras):
            for t, (a2, b2) in enumerate(loras):
                if s == t:
                    continue
                assert got.overlap["A"][i, s, t] == pytest.approx(dense_overlap(a, a2), abs=1e-9)
                assert got.overlap["B"][i, s, t] == pytest.approx(dense_overlap(b.T, b2.T), abs=1e-9)
                assert got.cka["A"][i, s, t] == pytest.approx(dense_cka(a, a2), abs=1e-9)
                assert got.cka["B"][i, s, t] == pytest.approx(dense_cka(b.T, b2.T), abs=1e-9)
                assert got.expected["A"][i, s, t] == R / LINEARS[path][0]
                assert got.expected["B"][i, s, t] == R / LINEARS[path][1]
                ranks, ranks2 = ((y.T[:, :, None] * x[:, None]).flatten(1) for x, y in ((a, b), (a2, b2)))
                for key, x, others in (("A", a, a2), ("B", b.T, b2.T), ("BA", ranks, ranks2)):
                    share = dense_share(x, others, threshold)
                    assert got.redundant[key][i, s, t] == pytest.approx(share, abs=1e-12), key
                    between[key] += 0 < share < 1
    assert between["B"], "shares strictly between 0 and 1 occur"


def test_drift_of_a_shared_basis(case):
    method, bank, tasks = case
    got = analyze(bank).drift
    assert set(got) == (set() if method == "dirlora" else {"A", "B0"})
    for kind, drift in got.items():
        assert drift.shape == (len(LINEARS), len(TASKS), 4)
        if method == "lilora-frozen" or (method, kind) == ("lilora-released", "B0"):
            assert not drift.any(), "exactly zero"
            continue
        for i, path in enumerate(LINEARS):
            states = [shared[f"{path}.{kind}"].double() for _, shared in tasks.values()]
            for t, state in enumerate(states):
                since = states[0], states[max(t - 1, 0)]
                changes = [((state - old).norm() / old.norm()).item() for old in since]
                rows = [x.T if kind == "B0" else x for x in (state, *since)]
                angles = [dense_angle(rows[0], old) for old in rows[1:]]
                assert drift[i, t] == pytest.approx([*changes, *angles], rel=1e-6, abs=1e-5)
                assert drift[i, t].any() == (t > 0)


@pytest.mark.parametrize("method", ["lilora", "dirlora", "slao"])
def test_classifiers_and_other_state_are_no_factors(method, tmp_path):
    tasks = tasks_of("lilora-frozen" if method == "lilora" else "dirlora")
    plain = analyze(write_bank(tmp_path / "plain", method, tasks))
    more = {
        task: (own | {"state.head.weight": noise(7, 3, 5)}, shared | {"state.trained.up_proj.B0": noise(8, 5, R)})
        for task, (own, shared) in tasks.items()
    }
    assert analyze(write_bank(tmp_path / "more", method, more)).to_dict() == plain.to_dict()


def test_the_same_span_in_another_basis(tmp_path):
    shared = shared_set(1)
    mixed = {}
    for i, path in enumerate(LINEARS):
        basis = noise(i, R, R).double()
        mixed[f"{path}.A"] = (basis @ shared[f"{path}.A"].double()).float()
        mixed[f"{path}.B0"] = (shared[f"{path}.B0"].double() @ torch.linalg.inv(basis)).float()
    bank = write_bank(tmp_path / "bank", "dirlora", {"one": ({}, shared), "two": ({}, mixed)})
    got = analyze(bank, 0.01)
    for key in ("A", "B"):
        assert got.overlap[key] == pytest.approx(1, abs=1e-6)
        assert (got.redundant[key] == 1).all()
    assert over_pairs(got.redundant["BA"]).max() < 1, "single ranks do change with the basis"


def test_random_subspaces_have_the_expected_overlap_and_no_redundancy(tmp_path):
    k, n, r = 20, 30, 14
    sets = [{"l.A": noise(2 * i, r, k), "l.B0": noise(2 * i + 1, n, r)} for i in range(12)]
    bank = write_bank(tmp_path / "bank", "dirlora", {f"t{i}": ({}, shared) for i, shared in enumerate(sets)})
    got = analyze(bank)
    for key, want in (("A", r / k), ("B", r / n)):
        assert over_pairs(got.expected[key]) == pytest.approx(want)
        assert over_pairs(got.overlap[key]) == pytest.approx(want, rel=0.02)
        assert over_pairs(got.redundant[key]) < 0.15
        assert over_pairs(got.cka[key]) == pytest.approx(over_pairs(got.expected_cka[key]), rel=0.03)


def test_tasks_of_different_rank_and_a_rank_that_does_nothing(tmp_path):
    wide, narrow = noise(1, 6, 20), noise(2, 2, 20)
    up = noise(3, 30, 6)
    up[:, 4] = 0
    bank = write_bank(
        tmp_path / "bank",
        "dirlora",
        {"wide": ({}, {"l.A": wide, "l.B0": up}), "narrow": ({}, {"l.A": narrow, "l.B0": noise(4, 30, 2)})},
    )
    got = analyze(bank)
    assert got.expected["A"][0, 0, 1] == 6 / 20
    assert got.expected["B"][0, 0, 1] == 5 / 30
    assert got.redundant["BA"][0, 0, 1] == pytest.approx(1 / 6)


def test_no_product_of_input_and_output_size_is_formed(tmp_path):
    k = n = 128
    sets = [{"l.A": noise(i, 4, k), "l.B0": noise(10 + i, n, 4)} for i in range(3)]
    own = [{"l.U": noise(20 + i, n, 2), "l.V": noise(30 + i, 2, 4), "l.fusion": noise(i, 1)} for i in range(3)]
    bank = write_bank(tmp_path / "bank", "lilora", {f"t{i}": (own[i], sets[i]) for i in range(3)})
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, arguments=(), kwargs=None):
            nonlocal largest
            out = function(*arguments, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else (out,):
                largest = max(largest, tensor.numel() if isinstance(tensor, torch.Tensor) else 0)
            return out

    with Watch():
        analyze(bank)
    assert 3 * 4 * k <= largest < n * k / 4


# What is written and printed


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return write_bank(tmp_path_factory.mktemp("run") / "bank", "lilora", tasks_of("lilora-released"))


def test_command_writes_plots_and_numbers_and_prints_them(released, lilora, tmp_path):
    run = released.path.parent
    code, out, err = lilora("analyze", run, "--json", "--threshold", 0.3)
    assert code == 0, err
    numbers = json.loads(out)
    folder = run / "analysis"
    assert json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail) == numbers
    pictures = {"overlap.png", "redundant.png", "depth.png", "drift.png"}
    assert {path.name for path in folder.iterdir()} == pictures | {"metrics.json"}
    for name in pictures:
        with Image.open(folder / name) as picture:
            picture.load()
            assert min(picture.size) > 150
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10, f"{name} is blank"
    got = analyze(released, 0.3)
    assert (numbers["method"], numbers["tasks"], numbers["threshold"]) == ("lilora", TASKS, 0.3)
    assert numbers["definitions"] == DEFINITIONS
    for name, key in (("overlap", "A"), ("overlap", "B"), ("expected", "B"), ("redundant", "BA")):
        values = getattr(got, name)[key]
        assert np.array(numbers[name][key]) == pytest.approx(values.mean(0))
        for i, path in enumerate(got.layers):
            assert numbers["layers"][path][name][key] == pytest.approx(over_pairs(values[i]))
    assert numbers["drift"]["A"]["angle since first"] == pytest.approx(got.drift["A"].mean(0)[:, 2])
    assert numbers["drift"]["B0"]["change since previous"] == [0, 0, 0]

    code, out, err = lilora("analyze", released.path, "--out", tmp_path / "elsewhere")
    assert code == 0, err
    default = analyze(released)
    printed = [line.split() for line in out.splitlines()]
    for key, title, random in (
        ("overlap", "overlap of the column spaces of B", [f"{100 * R * (2 / 30 + 1 / 24) / 3:.1f}"]),
        ("cka", "CKA of B", [f"{100 * R * (2 / (29 + R) + 1 / (23 + R)) / 3:.1f}"]),
        ("redundant", "redundant columns b of B", []),
    ):
        values = 100 * getattr(default, key)["B"].mean(0)
        pairs = {(s, t): values[i, j] for i, s in enumerate(TASKS) for j, t in enumerate(TASKS) if i != j}
        of, against = max(pairs, key=pairs.get)
        mean, highest = (f"{x:.1f}" for x in (np.mean(list(pairs.values())), pairs[of, against]))
        assert [*title.split(), mean, *random, highest, f"{of},", against] in printed
    assert f"{100 * got.drift['A'].mean(0)[2, 0]:.2f}" in out
    assert (tmp_path / "elsewhere" / "metrics.json").exists()


def test_plots_show_the_numbers(released):
    got = analyze(released)
    overlap, _, redundant = analysis_module._matrices(got)
    for matrices, values in ((overlap, [got.overlap[k] for k in "AB"]), (redundant, list(got.redundant.values()))):
        panels = analysis_figures.heatmaps(TASKS, matrices).axes
        for axes, wanted in zip(panels, values, strict=False):
            texts = [text.get_text() for text in axes.texts]
            wanted = [[f"{100 * x:.1f}" for j, x in enumerate(row) if i != j] for i, row in enumerate(wanted.mean(0))]
            assert texts == [text for row in wanted for text in row]
    spans = [analysis_module._by_span(x) for x in (got.overlap, got.expected)]
    panels = analysis_figures.depth(got.layers, *spans).axes
    assert [axes.get_title() for axes in panels] == ["model.layers.*.up_proj", "model.projector"]
    a, random, *_ = panels[0].get_lines()
    assert a.get_ydata() == pytest.approx(100 * over_pairs(got.overlap["A"])[:2])
    assert random.get_ydata() == pytest.approx([100 * R / 24] * 2)
    drift = {factor: values.mean(0) * (100, 100, 1, 1) for factor, values in got.drift.items()}
    change, angle = analysis_figures.drift_curves(TASKS, drift).axes
    assert [line.get_label() for line in change.get_lines()] == [
        f"{factor} since {since}" for factor in ("A", "B0") for since in ("first", "previous")
    ]
    assert change.get_lines()[1].get_ydata() == pytest.approx(100 * got.drift["A"].mean(0)[:, 1])
    assert angle.get_lines()[0].get_ydata() == pytest.approx(got.drift["A"].mean(0)[:, 2])


def test_a_factor_that_stayed_zero_reads_not_available(tmp_path):
    tasks = {task: ({}, shared_set(i)) for i, task in enumerate(TASKS)}
    for _, shared in tasks.values():
        shared["model.projector.B0"].zero_()
    got = analyze(write_bank(tmp_path / "bank", "lora", tasks))
    write_analysis(tmp_path / "out", got)
    numbers = json.loads((tmp_path / "out" / "metrics.json").read_text(), parse_constant=pytest.fail)
    assert numbers["overlap"]["B"][0][1] is None
    assert numbers["layers"]["model.projector"]["overlap"]["B"] is None
    assert numbers["layers"]["model.layers.2.up_proj"]["overlap"]["B"] > 0
    console = Console(file=io.StringIO(), width=80)
    print_analysis(got, console)
    assert "n/a" in console.file.getvalue()


# Bad input


def one_task(folder):
    return write_bank(folder, "dirlora", {"only": ({}, shared_set(0))})


def of_method(method):
    return lambda folder: write_bank(folder, method, tasks_of("dirlora"))


def other_linears(folder):
    fewer = {name: tensor for name, tensor in shared_set(2).items() if not name.startswith("model.projector")}
    return write_bank(folder, "dirlora", {"one": ({}, shared_set(1)), "two": ({}, fewer)})


@pytest.mark.parametrize(
    "make, options, words",
    [
        (of_method("dirlora"), ["--threshold", 0], "--threshold is 0.0; give a share"),
        (of_method("dirlora"), ["--threshold", 1], "--threshold is 1.0; give a share"),
        (of_method("dirlora"), ["--threshold", "nan"], "--threshold is nan; give a share"),
        (one_task, [], "holds 1 task(s) and analyze compares two or more"),
        (
            of_method("pclr"),
            [],
            "method 'pclr', which keeps no LoRA (A, B0) per task; analyze wants a bank of one of lilora",
        ),
        (other_linears, [], "task 'two' adapts other linears than 'one'"),
        (lambda folder: folder.mkdir(), [], "is not a bank"),
    ],
    ids=["threshold 0", "threshold 1", "threshold nan", "one task", "pclr", "other linears", "no bank"],
)
def test_bad_input_is_one_sentence_and_writes_nothing(make, options, words, tmp_path, lilora):
    make(tmp_path / "bank")
    before = sorted(tmp_path.rglob("*"))
    code, out, err = lilora("analyze", tmp_path / "bank", *options)
    assert (code, out.strip()) == (2, "")
    assert words in err
    assert err.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    with pytest.raises(UserError):
        analyze(Bank.open(tmp_path / "bank"), float(options[1]) if options else 0.5)
