from importlib.util import find_spec

# PEFT imports torchao where it is installed, which takes every process seconds; see `test` in the Makefile.
collect_ignore_glob = [] if find_spec("torchao") else ["test_*.py"]
