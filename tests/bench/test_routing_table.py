"""The table of routers on a results file."""

import json

from bench import routing


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
