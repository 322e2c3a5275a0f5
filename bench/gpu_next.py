"""The second command on a GPU, chosen by what the first one found: python -m bench.gpu_next RESULTS.JSON --out FOLDER

Red, when tests or a first call failed: the failing test files alone, each up to its first failure, and the memory
checkers. Green: Nsight Compute on two calls, then a search of launch configurations for the most rows; on a GPU with room for
it the MLP and the decoder layer of a LLaVA instead of the search. Memory checkers that failed alone run again first.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from .gpu_correctness import CHECKERS

ROOT = Path(__file__).parent.parent
ROOMY_MIB = 120_000


def failing(content: dict) -> list[str]:
    """The test files and memory checkers that failed."""
    rows = content["stages"].get("0", {}).get("results", [])
    wrong = [row["case"] for row in rows if row.get("exit_code", 0) != 0 and "unavailable" not in row]
    return [case for case in wrong if case.startswith("test_") or case in CHECKERS]


def memory_mib(content: dict) -> float:
    named = content["environment"].get("memory, max clocks of SM and memory, power limit") or ["0"]
    return float(named[0].split()[0])


def choose(content: dict) -> list[str]:
    """Arguments of the next run of bench.gpu_evidence."""
    failed = failing(content)
    files = [f"tests/gpu/{case}" for case in failed if case not in CHECKERS]
    green = "8,7" if memory_mib(content) >= ROOMY_MIB else "8,6"
    if files or content["stages"].get("first", {}).get("status") != "ok":
        return ["--stages", "0", *(word for file in files for word in ("--only", file))]
    if failed:
        return ["--stages", f"0,{green}", *(word for name in failed for word in ("--only", name))]
    return ["--stages", green]


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
