"""The shapes and options that kernels are tried with, whatever stands in for the device."""

from hypothesis import strategies as st

from support.cases import NAMES

# Which gradients somebody wants.
SUBSETS = {
    "all": NAMES,
    "x": ("x",),
    "task": ("x", "u", "v", "fusion"),
    "u": ("u",),
    "v": ("v", "gate"),
    "shared": ("a", "b0"),
    "b0": ("b0", "fusion"),
}
AXES = {
    "rows": [0, 1, 2, 17, 63, 64, 65, 127, 300],
    "columns": [24, 33, 128],
    "outputs": [20, 47, 96],
    "rank": [1, 4, 16, 100, 128],
    "sub_rank": [1, 8, 64],
    "tasks": [1, 3, 8],
    "coefficients": ["fusion", "plain", "lora"],
    "mix": ["one", "same", "distinct", "runs", "sorted", "random"],
    "gate": [False, True],
    "p": [0.0, 0.05, 0.5],
    "wanted": list(SUBSETS),
}
ANY_SHAPE = {
    "rows": st.integers(0, 150),
    "columns": st.integers(1, 70),
    "outputs": st.integers(1, 70),
    "rank": st.integers(1, 20),
    "sub_rank": st.integers(1, 20),
    "tasks": st.integers(1, 5),
    "coefficients": st.sampled_from(AXES["coefficients"]),
    "mix": st.sampled_from(AXES["mix"]),
    "gate": st.booleans(),
}
ANY_DROPOUT = {"p": st.sampled_from((0.0, 0.3)), "seed": st.integers(-(2**63), 2**63 - 1)}
