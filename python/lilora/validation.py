"""What is wrong with data that a pydantic model refused, in a sentence."""

import re
from collections.abc import Callable, Iterable
from difflib import get_close_matches

from pydantic import ValidationError

from lilora.errors import shortened

Location = tuple[int | str, ...]  # the keys and indices that lead to a value; () for all of the data


def first_problem(
    error: ValidationError, keys: Iterable[str] = (), named: Callable[[Location], str] | None = None
) -> str:
    """The first problem, such as `r is 'x'; it must be a valid integer`, without a full stop.

    A misspelt key comes before the key that is missing for it. keys: those that there are, from which an unknown one gets its
    advice. named: what to call a location, by default its parts with dots between them.
    """
    problems = error.errors(include_url=False)
    alternatives = (problem for problem in problems if problem["loc"][:1] == problems[0]["loc"][:1])
    best = max(alternatives, key=lambda problem: len(problem["loc"]))  # that which fits best
    first = next((problem for problem in problems if problem["type"] == "extra_forbidden"), best)
    place = (named or _dotted)(first["loc"])
    if first["type"] == "extra_forbidden":
        known = list(keys)
        advice = nearest(str(first["loc"][-1]), known, f"known are {', '.join(known)}")
        return f"{place} is unknown" + (f"; {advice}" if known else "")
    if first["type"] == "missing":
        return f"{place} is missing"
    said = wanted(first["msg"])
    if said.startswith("it "):
        return f"{place or 'it'} is {shortened(first['input'])}; {said}"
    return f"{place}: {said}" if place else said


def wanted(message: str) -> str:
    """What pydantic says of a value, as the end of a sentence."""
    message = re.sub(
        r"^(Input|List|String|Tuple|Dictionary) should ", "it must ", message.removeprefix("Value error, ")
    )
    message = re.sub(r"a valid dictionary.*", "a mapping of keys to values", message)
    message = re.sub(r" after validation|, unable to parse .*", "", message)
    return message[:1].lower() + message[1:]


def nearest(name: str, known: Iterable[str], otherwise: str) -> str:
    """Advice for a name that is unknown; `otherwise` where none is near."""
    found = get_close_matches(name, known, 1, cutoff=0.7)
    return f"did you mean {found[0]!r}?" if found else otherwise


def _dotted(location: Location) -> str:
    return ".".join(map(str, location))
