"""`lilora train --config run.yaml`: options from a file, and those of a run in one."""

import json
from pathlib import Path
from typing import Any

import typer
import yaml

from lilora.errors import UserError
from lilora.validation import nearest, wanted
from lilora.yaml_files import read_yaml

HEADER = """\
# The options of this run. `lilora train --config THIS-FILE` goes on with it; with `--out FOLDER` it runs once more, there.
"""
NOT_OF_THE_RUN = ("config", "quiet", "json", "help")  # what is printed is not part of a run


def read_config(context: typer.Context, path: Path | None) -> Path | None:
    """Let the options in a file be the defaults of the command, whose own options win.

    The file is a mapping from options to values, as on the command line without `--`; `tasks` is the manifest, and `set` a
    mapping from settings to values. Paths are relative to the working directory.

    Raises:
        UserError: the file cannot be read, or has a key that is no option or a value that is none for it.
    """
    if path is None:
        return None
    content = read_yaml(path, f"--config {path}", "a YAML file of options")
    if not isinstance(content, dict):
        raise UserError(f"--config {path} is no mapping from options to values; write lines such as `r: 64`")
    options = options_of(context)
    defaults, given = {}, set()
    for key, value in content.items():
        name = str(key).replace("_", "-")
        if name not in options:
            known = nearest(name, options, f"known are {', '.join(options)}")
            raise UserError(f"--config {path}: key {str(key)!r} is unknown; {known}")
        if name in given:
            raise UserError(f"--config {path} has the key {name!r} twice, with - and with _; keep one of them")
        given.add(name)
        if value is not None:
            option, where = options[name], f"--config {path}: {key}"
            defaults[option.name] = given_as = _value(where, option, value)
            try:
                option.process_value(context, given_as)
            except typer.BadParameter as error:
                raise UserError(f"{where} is {value!r}; {wanted(error.message)}") from error
    context.default_map = defaults
    return path


def config_text(context: typer.Context, resolved: dict[str, Any]) -> str:
    """What `read_config` reads: the options of a command as they were given, but those that are `resolved`, by option."""
    lines = {}
    for name, option in options_of(context).items():
        value = resolved.get(name, context.params.get(option.name))
        if value not in (None, [], {}):
            lines[name] = str(value) if isinstance(value, Path) else value
    return HEADER + yaml.safe_dump(lines, sort_keys=False, allow_unicode=True)


def options_of(context: typer.Context) -> dict[str, Any]:
    """Name on the command line without `--` -> click's parameter."""
    named = {option.opts[0].lstrip("-"): option for option in context.command.params}
    return {name: option for name, option in named.items() if name not in NOT_OF_THE_RUN}


def _value(where: str, option: Any, value: Any) -> Any:
    if option.opts[0] == "--set":
        if not isinstance(value, dict):
            raise UserError(f"{where} is {value!r}; write settings below it, such as `cap: 256`")
        return [f"{key}={json.dumps(setting)}" for key, setting in value.items()]
    flag = getattr(option, "is_flag", False)  # an argument has none
    if flag or isinstance(value, bool):
        if flag and isinstance(value, bool):
            return value
        raise UserError(f"{where} is {value!r}; it must {'be' if flag else 'not be'} true or false")
    if isinstance(value, dict):
        raise UserError(f"{where} is {value!r}; it must be one value")
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)
