"""The tables of python/lilora/methods/README.md say what the code does: settings, and their values by preset."""

import json
import re
from pathlib import Path

import pytest

from lilora.continual.run_record import TrainSettings
from lilora.methods import METHODS

README = Path(__file__).parents[2] / "python" / "lilora" / "methods" / "README.md"
OWN = [name for name, method in METHODS.items() if method.__module__.startswith("lilora.")]
PRESETS = [name for name in OWN if METHODS[name].presets]


def rows(text: str, method: str) -> list[list[tuple[str, list[str]]]]:
    """Of each row of a method's table: (setting, its values by preset, or none) of all that its last column names."""
    sections = re.split(r"^## ", text, flags=re.M)
    section = next((s for s in sections if s.lower().startswith(f"{method} (")), "")
    cells = [line.rstrip("|").rsplit("|", 1)[1] for line in section.splitlines() if line.startswith("| ")]
    if not cells or cells[0].strip() != "setting":
        return []
    return [[(name, _values(values)) for name, values in re.findall(r"`(\w+)`([^`]*)", cell)] for cell in cells[1:]]


def _values(text: str) -> list[str]:
    return [value for value in text.strip(" ,").split(" / ") if value]


def value(text: str):
    try:
        return json.loads(text)
    except ValueError:
        return text


def settings(method: str) -> list[dict]:
    """Of each preset, as the first of them is what no preset says: all settings of the method and of its training."""
    kind = METHODS[method]
    found = []
    for name, preset in (kind.presets or {"": {}}).items():
        of_method = kind.read_settings({"target_modules": "x", **preset})
        own = {field: getattr(of_method, field) for field in kind.settings_type.model_fields}
        training = TrainSettings.of(kind.train_defaults | kind.train_presets.get(name, {})).model_dump()
        found.append(json.loads(json.dumps(training | own, default=list)))
    return found


def differences(text: str, method: str) -> list[str]:
    """What a method's table says otherwise than the code, or leaves out."""
    by_preset, named, wrong = settings(method), {}, []
    for row in rows(text, method):
        for name, values in row:
            named[name] = values
            if name not in by_preset[0]:
                wrong.append(f"{name} is no setting of {method}")
            elif values and [value(v) for v in values] != [preset[name] for preset in by_preset]:
                wrong.append(f"{name} is {values} and in the code {[preset[name] for preset in by_preset]}")
    differing = {name for name in by_preset[0] if any(preset[name] != by_preset[0][name] for preset in by_preset)}
    return wrong + [f"{name} differs and its values are missing" for name in sorted(differing) if not named.get(name)]


@pytest.mark.parametrize("method", OWN)
def test_a_table_says_what_the_code_does(method):
    assert bool(rows(README.read_text(), method)) or method not in PRESETS
    assert not differences(README.read_text(), method)


def test_what_a_table_says_wrongly_is_found():
    text = README.read_text()
    for old, new, words in (
        ("`train_b0` first / always / first", "`train_b0` first / always / always", "train_b0 is"),
        ("`temperature` 1 / 2 / 2", "`temprature` 1 / 2 / 2", "temprature is no setting of pclr"),
        ("`max_grad_norm` 1 / 0, ", "", "max_grad_norm differs and its values are missing"),
        ("`merged` null / 4", "`merged`", "merged differs"),
    ):
        assert text.count(old) == 1
        changed = text.replace(old, new)
        assert any(words in wrong for method in PRESETS for wrong in differences(changed, method))
