"""Names that the code gave up for the field's own (docs/glossary.md) do not come back."""

import io
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
GIVEN_UP = {
    "refusal": "unsupported_reason",
    "refusals": "unsupported_reasons",
    "unfit": "unsupported_call",
    "planes": "partials",
    "take_back": "rollback",
    "put_pools": "inject_rank_pools",
    "take_pools": "remove_rank_pools",
    "left_apart": "unfused_mlp_reason",
    "Units": "VisionTokens",
    "units_of_batch": "vision_tokens_of_batch",
    "fitted": "shrink_tiles",
    "fitting": "cast_parameter",
    "by_first": "on_rank0",
    "astray": "misrouted",
    "snapshot": "teacher",
    "learned": "trained",
    "drop_below": "dropout threshold",
}


def test_names_that_were_given_up_stay_away():
    found = Counter()
    for folder in ("lilora_kernels", "python", "bench", "tools"):
        for file in (ROOT / folder).rglob("*.py"):
            for token in tokenize.generate_tokens(io.StringIO(file.read_text()).readline):
                if token.type == tokenize.NAME and token.string in GIVEN_UP:
                    found[f"{file.relative_to(ROOT)}: {token.string}, now {GIVEN_UP[token.string]}"] += 1
    assert not found
