import base64
import io
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from lilora.errors import UserError
from lilora.reports import figures, report
from lilora.reports.report import print_tables, write_report
from lilora.reports.runs import Run, by_method, differences, read_runs
from lilora.reports.scores import ScoreMatrix, cell_text
from lilora.terminal import plain_console

TASKS = ["name", "caption", "count"]


def matrix(rng, tasks=TASKS, carried=False, hole=None):
    scores = ScoreMatrix(tasks)
    for j, after in enumerate(tasks):
        for i, task in enumerate(tasks[: j + 1]):
            if carried and i < j:
                scores.copy(after, task, from_after=tasks[j - 1])
            elif (after, task) != hole:
                scores.set(after, task, rng.uniform(0, 100), rng.uniform())
    return scores


@pytest.fixture(scope="module")
def runs():
    rng = np.random.default_rng(0)
    runs = [Run("lilora", seed, matrix(rng, carried=True), 1_234_567, 61.0 + seed, {"steps": 200}) for seed in range(3)]
    return [*runs, Run("<lora & co>", 7, matrix(rng, hole=("count", "name")))]


@pytest.fixture(scope="module")
def folder(runs, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "made" / "here"
    assert write_report(out, runs, "Digits <b>suite</b>", {"torch": "2.13.0"}) == out / "report.html"
    return out


class Page(HTMLParser):
    """The links, pictures and cell texts of a page."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.pictures, self.cells, self.text = set(), [], [], [], ""
        self.headers, self.captions = [], 0
        self.in_cell = False
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset"):
                (self.pictures if tag == "img" else self.links).append(value)
        if tag == "th":
            self.headers.append(dict(attributes).get("scope"))
        self.captions += tag == "caption"
        if tag == "td":
            self.in_cell = True
            self.cells.append("")

    def handle_endtag(self, tag):
        self.in_cell &= tag != "td"

    def handle_data(self, data):
        self.text += data
        if self.in_cell:
            self.cells[-1] += data


def test_files(folder):
    pictures = {"summary.png", "curves.png", "heatmap-lilora.png", "heatmap-lora-co.png"}
    assert {path.name for path in folder.iterdir()} == {"report.html", "metrics.json"} | pictures
    for name in pictures:
        with Image.open(folder / name) as picture:
            picture.load()
            assert min(picture.size) > 150
            assert len(picture.convert("RGB").getcolors(1 << 24)) > 10, f"{name} is blank"


def test_page_is_self_contained(folder):
    html = (folder / "report.html").read_text()
    page = Page(html)
    assert page.links == []
    assert not page.tags & {"script", "link", "iframe", "b"}
    assert "url(" not in html
    assert "@import" not in html
    assert "Digits <b>suite</b>" in page.text
    head = "data:image/png;base64,"
    assert [base64.b64decode(picture.removeprefix(head)) for picture in page.pictures] == [
        (folder / name).read_bytes() for name in ("summary.png", "curves.png")
    ]


def test_page_shows_every_number(folder, runs):
    page = Page((folder / "report.html").read_text())
    cells = {cell.strip() for cell in page.cells}
    for name in ("AP", "MAP", "BWT", "Forgetting", "Forgetting_max", "New", "MIF"):
        values = [run.matrix.metrics()[name] for run in runs[:3]]
        assert f"{np.mean(values):.1f} ± {np.std(values, ddof=1):.1f}".replace("-0.0 ", "0.0 ") in cells
        assert name in page.text
    for j, after in enumerate(TASKS):
        for i, task in enumerate(TASKS[: j + 1]):
            mean = np.mean([run.matrix.get(after, task) for run in runs[:3]])
            assert (f"{mean:.1f}*" if i < j else f"{mean:.1f}") in cells
    assert "AP needs cells that are missing: name after count (<lora & co> seed 7)" in page.text
    assert {"n/a", "1.2 M", "62 s", "1,234,567", "steps 200", "2.13.0"} <= cells


def test_tables_have_headers_and_captions_for_screen_readers(folder):
    html = (folder / "report.html").read_text()
    page = Page(html)
    assert set(page.headers) == {"row", "col"}
    assert page.captions == html.count("<table") > 4
    assert html.count('<svg class="swatch" aria-hidden="true"') == 4, "the look of a method says nothing to them"
    assert "prefers-color-scheme: dark" in html
    assert "width=device-width" in html


def with_settings(method, seed, **settings):
    train = {"learning_rate": settings.pop("learning_rate", 1e-3), "seed": seed, "epochs": 1.0}
    extra = {
        "model": "base",
        "settings": settings,
        "train": train,
        "sizes": {"parameters": [1] * 3, "ranks": [seed] * 3},
    }
    return Run(method, seed, matrix(np.random.default_rng(0)), extra=extra)


@pytest.mark.parametrize("key, values, words", [
    ("manifest", ("mine", "other"), "different manifests, mine and other, and would be averaged as seeds"),
    ("label_space", ("task", "all"), "in the label space 'all' and lilora in another"),
])  # fmt: skip
def test_runs_that_are_no_seeds_of_one_another_are_not_averaged(key, values, words):
    runs = [with_settings("lilora", seed, r=64) for seed in (0, 1)]
    for run, value in zip(runs, values, strict=True):
        run.extra[key] = value
    with pytest.raises(UserError, match=words):
        by_method(runs)


def test_settings_that_differ_are_said(tmp_path):
    compared = [
        with_settings("lilora", 0, r=64, alpha=128.0, sub_rank=26),
        with_settings("lilora", 1, r=64, alpha=128.0, sub_rank=26, learning_rate=3e-3),
        with_settings("lora", 0, r=64, lora_alpha=16.0),
    ]
    wanted = {
        "alpha": {"lilora": "128.0", "lora": "16.0"},
        "learning_rate": {"lilora": "0.001 (seed 0), 0.003 (seed 1)", "lora": "0.001"},
    }
    assert differences(compared) == wanted
    page = Page(write_report(tmp_path, compared).read_text())
    assert "Settings that differ" in page.text
    cells = [cell.strip() for cell in page.cells]
    assert cells[cells.index("128.0") + 1] == "16.0"
    console = Console(file=io.StringIO(), width=200)
    print_tables(compared, console)
    assert "differs: alpha is 128.0 in lilora, 16.0 in lora" in console.file.getvalue()
    assert "Settings that differ" not in write_report(tmp_path, compared[:1]).read_text()


def test_losses_are_drawn_over_the_steps_of_all_stages_as_the_mean_of_the_seeds(tmp_path):
    one = {"name": {"warm": [(2, 4.0), (4, 2.0)], "join": [(5, 1.0)]}, "count": {"warm": [(2, 8.0)]}}
    two = {"name": {"warm": [(1, 8.0), (4, 4.0)], "join": [(5, 3.0)]}}  # resumed: it logged at other steps
    scores = matrix(np.random.default_rng(0))
    compared = [Run("a", 0, scores, losses=one), Run("a", 1, scores, losses=two), Run("b", 0, scores)]
    panels = figures.losses(by_method(compared)).axes
    line, other = panels[0].get_lines()
    np.testing.assert_array_equal(line.get_xdata(), [2, 4, 9])
    np.testing.assert_allclose(line.get_ydata(), [(4 + 20 / 3) / 2, 3, 2])
    assert len(other.get_xdata()) == 0
    assert [len(axes.get_lines()[0].get_xdata()) for axes in panels] == [3, 0, 1]
    page = Page(write_report(tmp_path, compared).read_text())
    assert "Training loss" in page.text
    assert (tmp_path / "losses.png").exists()
    assert "losses" not in json.loads((tmp_path / "metrics.json").read_text())["runs"][0]


@pytest.mark.parametrize("unscored", [["caption"], TASKS])
def test_tasks_without_a_test_split_are_named_and_have_no_column(unscored, tmp_path):
    scores = ScoreMatrix(TASKS, unscored=unscored)
    for j, after in enumerate(TASKS):
        for task in scores.scored(j):
            scores.set(after, task, 10 * j + 5)
    curve = {task: {"train": [(1, 2.0)]} for task in TASKS}
    page = Page(write_report(tmp_path, [Run("a", 0, scores, losses=curve)]).read_text())
    assert f"trained and not scored: {', '.join(unscored)}." in page.text
    assert ("Score matrices" in page.text) == (len(unscored) == 1)
    assert (tmp_path / "curves.png").exists() == (len(unscored) == 1)
    assert (tmp_path / "losses.png").exists()
    console = Console(file=io.StringIO(), width=100)
    print_tables([Run("a", 0, scores)], console)
    assert f"not scored, for want of a test split: {', '.join(unscored)}" in console.file.getvalue()
    with pytest.raises(UserError, match="report runs with the same test splits together"):
        write_report(tmp_path, [Run("a", 0, scores), Run("b", 0, ScoreMatrix(TASKS))])


def test_metrics_file_holds_means_spreads_and_runs(folder, runs):
    saved = json.loads((folder / "metrics.json").read_text(), parse_constant=pytest.fail)
    news = [run.matrix.metrics()["New"] for run in runs[:3]]
    assert saved["methods"]["lilora"]["New"] == pytest.approx(
        {"mean": np.mean(news), "deviation": np.std(news, ddof=1)}
    )
    assert saved["methods"]["<lora & co>"]["AP"] == {"mean": None, "deviation": None}
    assert saved["environment"] == {"torch": "2.13.0"}
    assert [Run.from_dict(run).to_dict() for run in saved["runs"]] == [run.to_dict() for run in runs]


def test_plots_draw_the_means(runs):
    lilora, lora = by_method(runs)
    mean = np.mean([run.matrix.scores() for run in runs[:3]], axis=0)
    panels = figures.curves([lilora, lora]).axes
    assert [axes.get_title() for axes in panels] == ["1. name", "2. caption", "3. count"]
    for i, axes in enumerate(panels):
        line, other = axes.get_lines()
        np.testing.assert_array_equal(line.get_xdata(), range(i + 1, 4))
        np.testing.assert_allclose(line.get_ydata(), mean[i:, i])
        assert (line.get_color(), line.get_marker()) != (other.get_color(), other.get_marker())
    assert np.isnan(panels[0].get_lines()[1].get_ydata()[-1]), "a missing cell leaves a gap"
    texts = [text.get_text() for text in figures.heatmap(lora).axes[0].texts]
    assert texts == [cell_text(lora.scores[j, i]) for j, i in zip(*np.tril_indices(3), strict=True)]
    assert texts.count("n/a") == 1
    bars = {
        axes.get_title(): [bar.get_width() for bar in axes.patches] for axes in figures.summary([lilora, lora]).axes
    }
    assert bars["New ↑"] == pytest.approx([lilora.metrics["New"].mean, lora.metrics["New"].mean])


@pytest.mark.parametrize("tasks", [["only"], [f"task-{i}" for i in range(4)]], ids=len)
def test_any_number_of_tasks_and_an_empty_matrix(tmp_path, tasks):
    rng = np.random.default_rng(1)
    page = write_report(tmp_path, [Run("a", 0, matrix(rng, tasks)), Run("b", 0, ScoreMatrix(tasks))])
    assert "b seed 0" in page.read_text()


def test_terminal_tables(runs):
    console = Console(file=io.StringIO(), width=80)
    print_tables(runs, console)
    printed = console.file.getvalue()
    news = [run.matrix.metrics()["New"] for run in runs[:3]]
    assert f"{np.mean(news):.1f}±{np.std(news, ddof=1):.1f}" in printed
    assert f"{np.mean([run.matrix.get('count', 'name') for run in runs[:3]]):.1f}*" in printed
    assert "AP needs cells that are missing: name after count" in " ".join(printed.split())
    assert "Forgettin" not in printed.split()  # a heading is cut between words


def test_probes_and_scores_before_any_training_are_shown_apart(tmp_path):
    tasks, seeds = ["read", "count"], []
    for seed, shift in enumerate((0.0, 10.0)):
        probes = {"read": {"yes-no": 40.0 + shift, "late": 1.0}, "count": {"yes-no": 21.0 + shift, "late": 2.0}}
        before = {"read": 11.0 + shift, "count": 12.0 + shift, "yes-no": 50.0 + shift}
        numbers = matrix(np.random.default_rng(seed), tasks)
        seeds.append(Run("lora", seed, numbers, zero_shot=before, probes=probes))
    plain = Run("plain", 0, matrix(np.random.default_rng(3), tasks))
    (lora, _), metrics = by_method([*seeds, plain]), [run.matrix.metrics() for run in seeds]
    assert lora.metrics["AP"].mean == pytest.approx(np.mean([values["AP"] for values in metrics]))
    console = Console(file=io.StringIO(), width=200)
    print_tables([*seeds, plain], console)
    rows = [line.split() for line in console.file.getvalue().splitlines()]
    assert rows.count(["(before)", "16.0", "17.0"]) == 1, "of the mean over seeds, and of no method without"
    assert ["probe", "(before)", "read", "count", "change"] in rows
    assert ["yes-no", "55.0", "45.0", "26.0", "-29.0"] in rows
    assert ["late", "n/a", "1.0", "2.0", "n/a"] in rows
    text = write_report(tmp_path, [*seeds, plain]).read_text()
    page = Page(text)
    assert page.captions == text.count("<table")
    assert set(page.headers) == {"row", "col"}
    cells = [cell.strip() for cell in page.cells]
    assert [cells[i : i + 4] for i in range(len(cells)) if cells[i] == "55.0"] == [["55.0", "45.0", "26.0", "-29.0"]]
    assert [cells[i : i + 2] for i in range(len(cells)) if cells[i] == "16.0"] == [["16.0", "17.0"]]
    saved = json.loads((tmp_path / "metrics.json").read_text())["runs"]
    assert [Run.from_dict(run).probes for run in saved] == [run.probes for run in (*seeds, plain)]
    read = read_runs(tmp_path / "metrics.json")
    assert [(run.zero_shot, run.probes) for run in read] == [(run.zero_shot, run.probes) for run in (*seeds, plain)]


@pytest.mark.parametrize("width", [40, 80, 300])
def test_terminal_tables_leave_no_column_out(width):
    tasks = [f"task-{i}" for i in range(14)]
    long = [Run(f"method-{i}", 0, matrix(np.random.default_rng(i), tasks)) for i in range(8)]
    console = Console(file=io.StringIO(), width=width)
    print_tables(long, console)
    printed = console.file.getvalue()
    assert max(map(len, printed.splitlines())) <= width
    tables = re.split(r"method-\d: score", printed)

    def numbers(table, name):
        """Of a row, over all parts of the table."""
        rows = (line.split() for line in table.splitlines())
        return [cell for row in rows if row[:1] == [name] for cell in row[1:] if re.fullmatch(r"-?\d+\.\d", cell)]

    for run, table in zip(long, tables[1:], strict=True):
        assert numbers(tables[0], run.method) == [f"{value:.1f}" for value in run.matrix.metrics().values()]
        for j, after in enumerate(tasks):
            assert numbers(table, after) == [f"{run.matrix.get(after, task):.1f}" for task in tasks[: j + 1]]


def test_names_of_any_length_fit_the_terminal():
    tasks = [f"{'long-' * 12}{i}" for i in range(3)]
    console = Console(file=io.StringIO(), width=80)
    print_tables([Run("method-" * 15, 0, matrix(np.random.default_rng(0), tasks))], console)
    printed = console.file.getvalue()
    assert max(map(len, printed.splitlines())) <= 80
    scores = matrix(np.random.default_rng(0), tasks)
    assert all(f" {scores.get(tasks[2], task):.1f} " in printed for task in tasks)


@pytest.mark.parametrize(
    "bad, words",
    [
        (lambda rng: [], "there are no runs"),
        (
            lambda rng: [Run("a", 0, matrix(rng)), Run("b", 0, matrix(rng, TASKS[::-1]))],
            "report runs of one task order",
        ),
        (lambda rng: [Run("a", 0, matrix(rng)), Run("a", 0, matrix(rng))], "a has two runs with seed 0"),
        (lambda rng: [Run("a b", 0, matrix(rng)), Run("a/b", 0, matrix(rng))], "a b, a/b differ only in punctuation"),
    ],
)
def test_runs_that_do_not_go_together_write_nothing(tmp_path, bad, words):
    with pytest.raises(UserError, match=words):
        write_report(tmp_path / "out", bad(np.random.default_rng(2)))
    assert not (tmp_path / "out").exists()


def test_a_failing_write_keeps_the_old_page(tmp_path, runs, monkeypatch):
    page = tmp_path / "report.html"
    page.write_text("old")

    def full_disk(source, target):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    with pytest.raises(UserError, match="No space left on device"):
        write_report(tmp_path, runs[:1], "new")
    assert page.read_text() == "old"
    assert not list(tmp_path.glob("*.tmp"))


def test_an_extra_that_is_not_json_writes_nothing(tmp_path, runs):
    with pytest.raises(TypeError):
        write_report(tmp_path / "out", [Run("a", 0, runs[0].matrix, extra={"model": object()})])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("label", ["[/b]", "[red]x", "a :smile: b", "\\[b]", "$\\frac$", "x[/not] 5$"])
def test_a_label_is_printed_and_drawn_as_it_is(label, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    labelled = [Run(label, 0, matrix(np.random.default_rng(0)))]
    print_tables(labelled, plain_console())
    out = capsys.readouterr().out
    assert f"{label}: score on each task" in out
    assert out.count(label) == 2
    write_report(tmp_path, labelled)
    assert json.loads((tmp_path / "metrics.json").read_text())["runs"][0]["method"] == label


def test_the_references_likelihood_stands_in_page_and_tables_where_it_was_measured(tmp_path):
    measured, plain = ScoreMatrix(["one", "two"]), ScoreMatrix(["one", "two"])
    for scores, nlls in ((measured, (0.5, 1.5, 0.25)), (plain, (None, None, None))):
        for (after, task), nll in zip((("one", "one"), ("two", "one"), ("two", "two")), nlls, strict=True):
            scores.set(after, task, 50, nll=nll)
    runs = [Run("measured", 0, measured), Run("plain", 0, plain)]
    console = Console(file=io.StringIO(), width=120)
    print_tables(runs, console)
    rows = [line.split() for line in console.file.getvalue().split("negative log-likelihood")[1].splitlines()]
    assert ["measured", "0.375", "0.875", "1.500", "0.250"] in rows
    assert ["plain", *["n/a"] * 4] in rows
    page = Page(write_report(tmp_path, runs).read_text())
    assert "Negative log-likelihood" in page.text
    assert "0.875" in page.cells
    print_tables(runs[1:], console := Console(file=io.StringIO(), width=120))
    assert "likelihood" not in console.file.getvalue()


def test_a_report_is_made_of_the_metrics_files_of_runs(runs, tmp_path, lilora, monkeypatch):
    monkeypatch.setattr(report, "png", lambda figure: b"")
    for run in runs:
        write_report(tmp_path / f"{run.seed}", [run])
    files = [tmp_path / f"{run.seed}" / "metrics.json" for run in runs]
    code, out, err = lilora("report", *files, "--out", tmp_path / "all", "--json")
    assert code == 0, err
    assert json.loads(out)["runs"] == [run.to_dict() for run in runs]
    assert [run.to_dict() for run in read_runs(tmp_path / "all" / "metrics.json")] == [run.to_dict() for run in runs]
    code, _, err = lilora("report", *files)
    assert (code, "give its folder as --out" in err) == (2, True)
    code, _, err = lilora("report", *files, "--out", files[1].parent)
    assert (code, f"over {files[1]}, which the command reads" in err) == (2, True)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", "holds no runs"),
        ("[]", "holds no runs"),
        ('{"runs": [{"method": "a"}]}', "runs.0.seed is missing"),
        (
            '{"runs": [{"method": "a", "seed": 0, "matrix": {}, "params_per_task": null, "seconds": null, "extra": {}}]}',
            "score matrix",
        ),
        (
            '{"runs": [{"method": "a", "seed": 0, "matrix": {}, "params_per_task": 1, "seconds": 1, "extra": {"train": 3}}]}',
            "runs.0.extra.train",
        ),
    ],
)
def test_a_file_that_holds_no_runs_is_one_sentence(content, words, tmp_path, lilora):
    (tmp_path / "metrics.json").write_text(content)
    code, out, err = lilora("report", tmp_path / "metrics.json", "--out", tmp_path)
    assert (code, out) == (2, "")
    assert words in err
    assert err.count("\n") == 1
