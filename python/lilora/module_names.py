"""Names of the parts of a model, as it was before torch wrapped them."""

WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


def unwrapped(name: str) -> str:
    """The name of a module or tensor without the wrappers that torch puts around parts of a model in place."""
    return ".".join(part for part in name.split(".") if part not in WRAPPERS)
