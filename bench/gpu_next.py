"""The second command on a GPU, chosen by what the first one found: python -m bench.gpu_next RESULTS.JSON --out FOLDER

Red, when a test, a memory checker or a first call failed: the failing test files alone, each up to its first failure, and
the memory checkers. Green: Nsight Compute on two calls, then a search of launch configurations at 8192 rows; on a GPU with
room for it the MLP and the decoder layer of a LLaVA instead of the search.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
ROOMY_MIB = 120_000


def failing(content: dict) -> list[str] | None:
    """The test files that failed, perhaps none where a checker or a first call did; None when all was well."""
    first, tests = (content["stages"].get(name, {"status": "not run"}) for name in ("first", "0"))
    if first["status"] == tests["status"] == "ok":
        return None
    rows = [row for row in tests.get("results", []) if row.get("exit_code") != 0 or "error" in row]
    return [row["case"] for row in rows if row["case"].startswith("test_")]


def memory_mib(content: dict) -> float:
    named = content["environment"].get("memory, max clocks of SM and memory, power limit") or ["0"]
    return float(named[0].split()[0])


def choose(content: dict) -> list[str]:
    """Arguments of the next run of bench.gpu_evidence."""
    files = failing(content)
    if files is not None:
        return ["--stages", "0", *(word for name in files for word in ("--only", f"tests/gpu/{name}"))]
    return ["--stages", "8,7" if memory_mib(content) >= ROOMY_MIB else "8,6"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="results.json of the first command")
    options, rest = parser.parse_known_args()
    try:
        content = json.loads(options.results.read_text())
        chosen = choose(content)
    except (OSError, ValueError, KeyError) as error:
        parser.error(f"{options.results} is no results.json of bench.gpu_evidence: {type(error).__name__}: {error}")
    print(f"chosen: {' '.join(chosen)}", flush=True)
    command = [sys.executable, "-m", "bench.gpu_evidence", *chosen, *rest]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
