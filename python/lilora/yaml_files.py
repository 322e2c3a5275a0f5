"""YAML files of the user."""

from pathlib import Path
from typing import Any

import yaml

from .errors import UserError, shortened


class _Loader(yaml.SafeLoader):
    """Refuses a key that is given twice in one mapping, of which PyYAML keeps the last without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in seen:
                said = f"the key {shortened(key.value)} is given twice"
                raise yaml.constructor.ConstructorError(None, None, said, key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


def read_yaml(path: Path, name: str, wanted: str) -> Any:
    """The content of a file; UserError, which calls it `name` and says what is `wanted`, if it cannot be read or is not YAML."""
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise UserError(f"{name} cannot be read ({error.strerror}); give {wanted}") from error
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"{name} is not YAML ({' '.join(str(error).split())}); correct it") from error
