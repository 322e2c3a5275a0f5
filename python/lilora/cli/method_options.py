"""A method's settings from the options of `lilora train`."""

import json
import textwrap
from typing import Any

from lilora.continual.run_record import TrainSettings
from lilora.errors import UserError
from lilora.methods import METHODS, Method

from .options import choice


def method_settings(
    method: type[Method], preset: str | None, options: dict[str, Any], more: dict[str, Any]
) -> dict[str, Any]:
    """The settings that `make_method` takes: sizes with their defaults, those of the preset, and what --set gave.

    options: values of OPTIONS that were given; those that the method does not have mean nothing to it.

    Raises:
        UserError: the method has no such preset or setting, or the value is none for it.
    """
    names = method.settings_type.options()
    if preset is not None:
        if not method.presets:
            raise UserError(f"--preset {preset}: {method.name} has no presets; leave it out")
        choice("--preset", preset, tuple(method.presets))
    of_preset = method.presets[preset or next(iter(method.presets))] if method.presets else {}
    given = {names[option]: value for option, value in options.items() if option in names}
    try:
        read = method.read_settings({**given, **of_preset, **more})
    except UserError as error:
        raise UserError(f"{error}{settings_list(method)}" if more else str(error)) from error
    numbers = {name: own for name in more if isinstance(own := getattr(read, name, None), int | float)}
    more = more | numbers  # YAML has 1e4 as text
    return {**{name: getattr(read, name) for name in names.values()}, **of_preset, **more}


def train_options(method: type[Method], preset: str | None, given: dict[str, Any]) -> dict[str, Any]:
    """Values of TrainSettings: those that were given, then the preset's and the method's."""
    preset = preset or next(iter(method.presets), "")
    return method.train_defaults | method.train_presets.get(preset, {}) | given


def settings_list(method: type[Method]) -> str:
    """The method's settings with their types and defaults, a line of at most 80 columns each or several."""
    rows = method.settings_type.table()
    indent = max(len(name) for name, *_ in rows) + 4
    lines = [f"\nWhat --set takes for {method.name}: settings with their types and defaults"]
    for name, kind, default in rows:
        text = f"  {name}".ljust(indent) + kind + (f" = {default}" if default else "")
        lines += textwrap.wrap(text, 80, subsequent_indent=" " * indent)
    return "\n".join(lines)


def methods_list() -> list[tuple[str, str]]:
    """(name, what it does, its presets and the defaults of the options) of every method."""
    lines = []
    for name, method in METHODS.items():
        defaults = {field: default for field, _, default in method.settings_type.table()}
        sizes = [f"{option} {defaults[field]}" for option, field in method.settings_type.options().items()]
        trained = {field: TrainSettings.model_fields[field].default for field in ("learning_rate", "weight_decay")}
        trained |= method.train_defaults
        sizes += [f"lr {trained['learning_rate']}", f"weight_decay {trained['weight_decay']}"]
        named = ", ".join(_preset_text(method, preset) for preset in method.presets)
        presets = f" Presets: {named}." if named else ""
        summary = " ".join((method.__doc__ or "").partition("\n\n")[0].split())
        lines.append((name, f"{summary}{presets} Defaults: {', '.join(sizes)}."))
    return lines


def _preset_text(method: type[Method], preset: str) -> str:
    of_training = ", ".join(f"{name} {value}" for name, value in method.train_presets.get(preset, {}).items())
    return f"{preset} ({of_training})" if of_training else preset


def setting(text: str) -> tuple[str, Any]:
    """A `key=value` of --set; the value is JSON, or else a string."""
    key, equals, value = text.partition("=")
    if not key or not equals:
        raise UserError(f"--set {text} is not key=value; for example --set cap=256")
    try:
        return key, json.loads(value)
    except (ValueError, RecursionError):
        return key, value
