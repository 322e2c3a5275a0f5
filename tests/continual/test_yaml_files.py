"""What is read of a YAML file, and what of it is refused in one sentence."""

import pytest
import yaml

from lilora.errors import UserError
from lilora.yaml_files import read_yaml

MERGED = {
    "an anchor that has merged another": "a: &a {x: 1}\nb: {c: &b {<<: *a, x: 2}}\nd: {<<: *b, y: 3}",
    "in a list": "- a: 1\n  b: &b {<<: {c: 1}}\n- <<: *b\n  c: 3",
    "two at once": "a: &a {x: 1}\nb: &b {x: 2}\nc: {<<: [*a, *b], x: 3}",
}
BAD = {
    "a: 1\nb: 2\na: 3": "has the key 'a' twice, again on line 3; keep one of them",
    "a: {b: 1, b: 2}": "has the key 'b' twice, again on line 1; keep one of them",
    "yes: 1\ntrue: 2": "has the key 'true' twice, again on line 2; keep one of them",
    "1: a\n0x1: b": "has the key '0x1' twice, again on line 2; keep one of them",
    "a: 2024-13-45": "is not YAML (month must be in 1..12); correct it",
    "a: 0b_": "is not YAML (invalid literal for int() with base 2: ''); correct it",
    "a: !!int ''": "is not YAML (string index out of range); correct it",
    "a: [": "is not YAML (line 1: expected the node content, but found '<stream end>'); correct it",
    "? [1]\n: 2": "is not YAML (line 1: found unhashable key); correct it",
}


@pytest.mark.parametrize("text", MERGED.values(), ids=MERGED)
def test_keys_that_come_from_elsewhere_are_not_given_twice(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    assert read_yaml(tmp_path / "a.yaml", "a.yaml", "a file") == yaml.safe_load(text)


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_yaml_is_one_sentence(text, tmp_path):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        read_yaml(tmp_path / "a.yaml", "a.yaml", "a file")
    assert str(error.value) == f"a.yaml {BAD[text]}"
