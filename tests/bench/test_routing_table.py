"""The routers on a run, and their table on a results file."""

import json

import yaml
from support.suite import TRAIN_OPTIONS, make_suite

from bench import routing


def test_every_router_learns_from_the_tasks_of_a_run(tmp_path, lilora, monkeypatch):
    make_suite(tmp_path)
    manifest = tmp_path / "tasks.yaml"
    name = yaml.safe_load(manifest.read_text())["name"]
    monkeypatch.setitem(routing.MANIFESTS, name, manifest)
    train = ["train", manifest, "--out", tmp_path / "run", *TRAIN_OPTIONS, "--max-steps", 1, "--order", "colour,count"]
    code, _, err = lilora(*train)
    assert code == 0, err
    rows = routing.measure(tmp_path)
    assert [row["router"].partition(",")[0] for row in rows] == ["nearest centroid", "nearest centroid", "linear probe"]
    assert all(row["tasks"].keys() == {"colour", "count"} for row in rows)
    assert all(routing.means(row)["accuracy"] > 50 for row in rows)


def test_the_table_has_means_over_tasks_and_seeds(tmp_path, monkeypatch):
    rows = [
        {
            "suite": "digits",
            "seed": seed,
            "router": "linear probe",
            "tasks": {
                "a": {"accuracy": 100.0, "given": 90.0, "routed": 90.0},
                "b": {"accuracy": 40.0 + 20 * seed, "given": 80.0, "routed": 60.0},
            },
        }
        for seed in (0, 1)
    ]
    content = {"environment": {"device": "some CPU", "torch": "2"}, "results": rows}
    (tmp_path / "routing.json").write_text(json.dumps(content))
    monkeypatch.setattr(routing, "RESULTS", tmp_path)
    lines = routing.routing().splitlines()
    assert lines[2] == "| digits | linear probe | 2 | 75.0 ± 5.0 | 85.0 ± 0.0 | 75.0 ± 0.0 |"
