import sys
from importlib.util import find_spec
from pathlib import Path

# torchao takes each process that imports PEFT seven seconds, so it is kept apart: see `test` in the Makefile.
collect_ignore_glob = [] if find_spec("torchao") else ["test_*.py"]
sys.path.append(str(Path(__file__).parents[1] / "peft_habits"))
