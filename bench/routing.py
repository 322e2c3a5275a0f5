"""How often routers find the task of a sample, and what that costs in points.

    python -m bench.routing runs/routing/digits-0 runs/routing/digits-clip-0 --out bench/results/routing.json

Each folder holds what `make routing` leaves: a suite's `data` and `base`, and a run of lilora in `run`. All routers see the
same frozen features of the base model; the tasks' training samples are theirs to learn from, the test samples are routed.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

from .report import RESULTS

EXAMPLES = Path(__file__).parent.parent / "examples" / "digits"
MANIFESTS = {"digits": EXAMPLES / "tasks.yaml", "digits-clip": EXAMPLES / "clip.yaml"}
BATCH = 64


def measure(folder: Path) -> list[dict]:
    """A row for each router on the suite of a folder."""
    from lilora.continual.base_model import load_bank
    from lilora.continual.kinds import kind_of
    from lilora.continual.manifest import load_manifest
    from lilora.continual.task_identification import SAMPLES, LinearProbe, NearestCentroid
    from lilora.continual.trainer import StageData

    class OneCentroid(NearestCentroid):
        modes = 1

    routers = {
        "nearest centroid, one a task": OneCentroid,
        f"nearest centroid, up to {NearestCentroid.modes} a task (default)": NearestCentroid,
        "linear probe": LinearProbe,
    }
    bank, method, processor = load_bank(folder / "run", str(folder / "base"), "cpu")
    kind, suite = kind_of(bank.config), bank.config["manifest"]
    tasks = load_manifest(MANIFESTS[suite], bank.tasks, folder / "data").tasks
    given = kind.evaluate(method, processor, tasks, BATCH)
    rows = []
    for name, router_type in routers.items():
        router, started = router_type(method.model), time.process_time()
        for spec in tasks:
            data = StageData(*kind.training_data([spec], processor), BATCH)
            router.fit(spec.name, data.batches(SAMPLES, method.base))
        routed = kind.evaluate_routed(method, processor, router, tasks, given, BATCH)
        rows.append(
            {
                "suite": suite,
                "seed": bank.config["train"]["seed"],
                "router": name,
                "tasks": {
                    r.task: {"accuracy": r.accuracy, "given": r.given.score, "routed": r.routed.score} for r in routed
                },
                "cpu_seconds": round(time.process_time() - started, 1),
            }
        )
        print(suite, rows[-1]["seed"], name, {key: f"{mean:.1f}" for key, mean in means(rows[-1]).items()})
    return rows


def means(row: dict) -> dict[str, float]:
    """Means over the tasks."""
    return {
        key: statistics.fmean(task[key] for task in row["tasks"].values()) for key in ("accuracy", "given", "routed")
    }


def routing() -> str:
    """Routers on the digits suites, mean and deviation over seeds."""
    content = json.loads((RESULTS / "routing.json").read_text())
    lines = [
        "| suite | router | seeds | finds the task, % | points, task given | points, routed |",
        "|---|---|--:|--:|--:|--:|",
    ]
    kinds = dict.fromkeys((row["suite"], row["router"]) for row in content["results"])
    for suite, router in kinds:
        found = [means(row) for row in content["results"] if (row["suite"], row["router"]) == (suite, router)]
        cells = []
        for key in ("accuracy", "given", "routed"):
            values = [row[key] for row in found]
            spread = f" ± {statistics.pstdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.fmean(values):.1f}{spread}")
        lines.append(f"| {suite} | {router} | {len(found)} | {' | '.join(cells)} |")
    environment = content["environment"]
    lines += [
        "",
        "Mean and standard deviation over seeds of data, base model and training, and means over the six "
        "tasks of each suite after the last. From `bench/results/routing.json`, written by `make routing` on "
        f"{environment['device']} with torch {environment['torch']}.",
    ]
    return "\n".join(lines)


def main() -> None:
    from .environment import environment

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", help="with data, base and run")
    parser.add_argument("--out", type=Path, required=True, help="the results file")
    options = parser.parse_args()
    rows = [row for folder in options.folders for row in measure(folder)]
    content = {"environment": environment("make routing", on_gpu=False), "results": rows}
    options.out.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
