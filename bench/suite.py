"""A suite of runs, each of which leaves a small file of its scores: python -m bench.suite digits [--jobs 2] [--only LABEL ...]

bench/suites/<suite>.yaml says what is run. Each run is a `lilora train`, in runs/<suite>/<label>-<seed>; when it has ended, its
scores go to bench/results/<suite>/<label>-<seed>.json. A run that has such a file is left out, so the same command goes on
where it was interrupted, in another clone too once the files are committed. A learning rate that the suite does not name is
found first by `lilora tune`, on a seed and on samples that are not reported, and is kept in
bench/results/<suite>/tune/<label>.json. `make readme` makes the tables from the files.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field
from rich.progress import Progress

from lilora.bank.atomic import write_atomically
from lilora.errors import UserError, print_error
from lilora.reports.report import write_report
from lilora.reports.runs import Run, read_runs
from lilora.yaml_files import read_yaml

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"
ANALYSED = "threshold", "overlap", "expected", "cka", "redundant"  # of what `lilora analyze` says
Options = dict[str, Any]  # of `lilora train`, as in a file for --config


class Suite(BaseModel):
    """options: of all runs. runs: what each label has beside them. rates: that are tried where neither names `lr`; rate_of:
    labels that take the rate found for another, of which they change one thing. analyse: labels whose tasks are compared by
    `lilora analyze`, too. build: the program, with its arguments, that writes the data."""

    model_config = ConfigDict(extra="forbid")

    name: str
    title: str
    manifest: str
    build: str
    options: Options
    runs: dict[str, Options] = Field(min_length=1)
    seeds: list[int] = [0, 1, 2]
    rates: list[float] = []
    rate_of: dict[str, str] = {}
    analyse: list[str] = []

    @classmethod
    def read(cls, name: str) -> "Suite":
        return cls(name=name, **read_yaml(ROOT / "bench" / "suites" / f"{name}.yaml", name, "a suite"))

    @property
    def results(self) -> Path:
        return RESULTS / self.name

    def options_of(self, label: str) -> Options:
        """All options of a label's runs but its seed, without `lr` where that is not found yet."""
        options, tuning = self.options | self.runs[label], self.tuning(label)
        if "lr" not in options and tuning.exists():
            options["lr"] = json.loads(tuning.read_text())["best"]["candidate"]["learning_rate"]
        return options

    def tuning(self, label: str) -> Path:
        return self.results / "tune" / f"{self.rate_of.get(label, label)}.json"

    def file(self, label: str, seed: int) -> Path:
        return self.results / f"{label}-{seed}.json"

    def analysis(self, label: str, seed: int) -> dict[str, Any] | None:
        """What `lilora analyze` has said of a run; None while there is no such file, or one that lacks some of it."""
        if not (file := self.file(label, seed)).exists():
            return None
        found = json.loads(file.read_text()).get("analysis", {})
        return found if found.keys() >= set(ANALYSED) else None

    def done(self, label: str, seed: int) -> bool:
        """Whether the run has left all that is wanted of it; UserError if that was with other options than the suite's."""
        if not (file := self.file(label, seed)).exists():
            return False
        held, wanted = json.loads(file.read_text())["options"], self.options_of(label)
        wanted.setdefault("lr", held.get("lr"))
        if held != wanted:
            differ = ", ".join(
                f"{key} {held.get(key)} and {wanted.get(key)}"
                for key in sorted(held.keys() | wanted.keys())
                if held.get(key) != wanted.get(key)
            )
            raise UserError(
                f"{file.relative_to(ROOT)} has other options than its suite ({differ}); delete the file to run it again"
            )
        return label not in self.analyse or self.analysis(label, seed) is not None

    def finished(self, labels: Iterable[str] | None = None) -> list[Run]:
        """The runs that have left their files, label by label."""
        files = (self.file(label, seed) for label in labels or self.runs for seed in self.seeds)
        return [run for file in files if file.exists() for run in read_runs(file)]


def words_of(options: Options) -> list[str]:
    """As options of the command line."""
    words = []
    for name, value in options.items():
        if name == "set":
            words += [word for key, setting in value.items() for word in ("--set", f"{key}={json.dumps(setting)}")]
        elif value is True:
            words.append(f"--{name}")
        else:
            words += [f"--{name}", str(value)]
    return words


def lilora(command: str, *words: Any, log: Path) -> str:
    """The output of a `lilora` command, one thread for it alone: small models gain little from a second.

    Raises UserError with its last line if it fails; `log` keeps what it said.
    """
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("w") as said:
        done = subprocess.run(
            [sys.executable, "-m", "lilora", command, *map(str, words)], cwd=ROOT, env=environment, stdout=subprocess.PIPE,
            stderr=said, text=True,
        )  # fmt: skip
    if done.returncode:
        last = (log.read_text().strip().splitlines() or ["it said nothing"])[-1].removeprefix("lilora: ")
        raise UserError(f"lilora {command} ended with {done.returncode}: {last}; all that it said is in {log}")
    return done.stdout


def without_root(text: str) -> bytes:
    """JSON whose paths are relative to the repository."""
    return text.replace(f"{ROOT}/", "").encode()


def tuned(suite: Suite, label: str, runs: Path) -> str:
    """Find the label's learning rate; what it is."""
    options, out = suite.options | suite.runs[label], runs / "tune" / label
    words = ["--lr", ",".join(f"{rate:g}" for rate in suite.rates), "--out", out, "--json"]
    text = lilora("tune", suite.manifest, *words_of(options), *words, log=runs / "tune" / f"{label}.log")
    write_atomically(suite.tuning(label), without_root(text))
    return f"lr {suite.options_of(label)['lr']:g}"


def trained(suite: Suite, label: str, seed: int, runs: Path) -> str:
    """Train and evaluate one run, and leave its file; its scores in a line."""
    options, out = suite.options_of(label), runs / f"{label}-{seed}"
    words = [*words_of(options), "--out", out, "--label", label, "--seed", seed, "--json"]
    lilora("train", suite.manifest, *words, log=runs / f"{label}-{seed}.log")
    metrics = json.loads((out / "metrics.json").read_text())
    content = {"options": options, "environment": metrics["environment"], "runs": metrics["runs"]}
    if label in suite.analyse:
        analysis = json.loads(lilora("analyze", out, "--json", log=runs / f"{label}-{seed}-analysis.log"))
        content["analysis"] = {key: analysis[key] for key in ANALYSED}
    write_atomically(suite.file(label, seed), without_root(f"{json.dumps(content)}\n"))
    scores = metrics["runs"][0]["metrics"]
    return ", ".join(f"{name} {scores[name]:.1f}" for name in ("New", "AP", "Forgetting"))


def in_turn(jobs: int, title: str, work: dict[str, Callable[[], str]]) -> None:
    """Run all, `jobs` at once, with a line for each; after a failure none is begun, and the first is raised."""
    if not work:
        return
    failures: list[Exception] = []
    with Progress(disable=None) as progress, ThreadPoolExecutor(jobs) as pool:
        bar = progress.add_task(title, total=len(work))

        def one(name: str, run: Callable[[], str]) -> None:
            if failures:
                return
            started = time.monotonic()
            try:
                said = run()
            except Exception as error:
                failures.append(error)
                return
            progress.advance(bar)
            count = f"{int(progress.tasks[bar].completed)} of {len(work)}"
            print(f"{title}: {name}: {said}, {time.monotonic() - started:.0f} s ({count})", flush=True)

        list(pool.map(one, work, work.values()))
    if failures:
        raise failures[0]


def run(suite: Suite, labels: list[str], jobs: int, runs: Path) -> None:
    """All that has left no file yet, then the report of everything that has, in the order of the first run's tasks."""
    left = [(label, seed) for seed in suite.seeds for label in labels if not suite.done(label, seed)]
    if left:
        subprocess.run([sys.executable, *suite.build.split()], cwd=ROOT, check=True)
    rateless = [label for label in labels if label in dict(left) and "lr" not in suite.options_of(label)]
    rateless = list(dict.fromkeys(suite.rate_of.get(label, label) for label in rateless))
    in_turn(jobs, f"{suite.name}, rates", {label: partial(tuned, suite, label, runs) for label in rateless})
    in_turn(jobs, suite.name, {f"{label}-{seed}": partial(trained, suite, label, seed, runs) for label, seed in left})
    finished = suite.finished()
    of_one_order = [run for run in finished if run.matrix.tasks == finished[0].matrix.tasks]
    print(f"report: {write_report(runs / 'report', of_one_order, suite.title)}")


def main() -> None:
    names = sorted(path.stem for path in (ROOT / "bench" / "suites").glob("*.yaml"))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", choices=names)
    parser.add_argument("--jobs", type=int, default=2, help="runs at once, one thread each (default: 2)")
    parser.add_argument("--only", nargs="+", metavar="LABEL", help="these runs alone")
    parser.add_argument("--seeds", nargs="+", type=int, help="these of the suite's seeds alone")
    args = parser.parse_args()
    try:
        suite = Suite.read(args.suite)
        labels, seeds = args.only or list(suite.runs), args.seeds or suite.seeds
        for name, wanted, known in (("--only", labels, suite.runs), ("--seeds", seeds, suite.seeds)):
            if not set(wanted) <= set(known):
                parser.error(f"{name}: {args.suite} has {', '.join(map(str, known))}")
        run(suite.model_copy(update={"seeds": seeds}), labels, args.jobs, ROOT / "runs" / suite.name)
    except UserError as error:
        print_error(str(error))
        sys.exit(2)


if __name__ == "__main__":
    main()
