"""YAML files of the user."""

from pathlib import Path
from typing import Any

import yaml

from .errors import UserError, shortened


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice in one mapping, of which PyYAML keeps the last without a word."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)  # as it is written: later, `<<` has brought keys of others
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                value = self.construct_object(key)
                if value in seen:
                    line = key.start_mark.line + 1
                    raise UserError(f"has the key {shortened(key.value)} twice, again on line {line}; keep one of them")
                seen.add(value)
        return node


def read_yaml(path: Path, name: str, wanted: str) -> Any:
    """The content of a file; UserError, which calls it `name` and says what is `wanted`, if it cannot be read or is not YAML."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}); give {wanted}") from error
    except UserError as error:
        raise UserError(f"{name} {error}") from None
    except (yaml.YAMLError, ValueError, IndexError, RecursionError) as error:  # also of dates and numbers that are none
        mark = getattr(error, "problem_mark", None)
        said = f"line {mark.line + 1}: {error.problem}" if mark else " ".join(str(error).split())  # type: ignore[union-attr]
        raise UserError(f"{name} is not YAML ({said}); correct it") from error
