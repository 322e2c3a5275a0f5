"""Scorers by name: of one answer, and of all answers of a split at once."""

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from importlib import import_module
from numbers import Real
from pathlib import Path

from lilora.errors import UserError
from lilora.registry import Registry

Scorer = Callable[[str, list[str]], float]
CorpusScorer = Callable[..., float]  # (predictions, references), some with a keyword `model`
SCORERS: Registry[Scorer | CorpusScorer] = Registry("scorer", "lilora.scorers")

_OF_CORPUS = "lilora_corpus_scorer"
_TOP = {False: 1, True: 10}  # CIDEr-D goes to 10


def register_scorer(function: Scorer) -> Scorer:
    """Decorator: a manifest may say `scorer: NAME` with the function's name from then on.

    function(prediction, references) -> 0..1. A package of its own names the module that registers it in the entry-point
    group `lilora.scorers`, under the function's name.

    Raises:
        UserError: another scorer has the name.
    """
    return SCORERS.register(function.__name__, function)


def register_corpus_scorer(function: CorpusScorer) -> CorpusScorer:
    """The same for a function of all answers of a split: (predictions, references) -> the task's score, 1 for 100 points.

    predictions: a list of answers; references: for each its list. The result lies in 0..10, as that of CIDEr does. A
    function with a keyword `model` gets the folder that the task names as `scorer_model`.
    """
    setattr(function, _OF_CORPUS, True)
    return SCORERS.register(function.__name__, function)


def of_corpus(function: Scorer | CorpusScorer) -> bool:
    """Whether a scorer wants all answers of a split at once."""
    return getattr(function, _OF_CORPUS, False)


def scorer(name: str) -> Scorer | CorpusScorer:
    """The scorer that a manifest calls `name`: one that is registered, or a function `package.module:function`.

    Raises:
        UserError: there is no such scorer. The function that is returned raises it where one of another package fails or
            returns anything but a number in its range.
    """
    if ":" not in name:
        function = SCORERS.find(name)
        return function if function.__module__.startswith(f"{__package__}.") else _checked(name, function)
    module, _, attribute = name.partition(":")
    try:
        function = getattr(import_module(module), attribute)
    except Exception as error:  # whatever a module does when it is imported
        raise UserError(
            f"scorer {name!r} cannot be imported ({type(error).__name__}: {error}); write package.module:function, of an "
            "installed package or of a file beside the manifest"
        ) from error
    if not callable(function):
        raise UserError(f"scorer {name!r} is a {type(function).__name__}; name a function")
    return _checked(name, function)


class Judge:
    """The score of a split's answers by the scorer `name`: (predictions, references) -> 1 for 100 points.

    model: the folder that the task names as `scorer_model`. Raises UserError for an unknown scorer, one that wants a model
    where none is named, and a model that none wants.
    """

    def __init__(self, name: str, model: Path | None = None) -> None:
        function: Callable[..., float] = scorer(name)
        wants = "model" in inspect.signature(function).parameters
        if wants and model is None:
            raise UserError(f"scorer {name!r} wants the key scorer_model, the folder of a model; add it")
        if model is not None and not wants:
            raise UserError(f"scorer {name!r} takes no model; leave out the key scorer_model")
        self.function = partial(function, model=model) if wants else function
        self.of_corpus = of_corpus(function)

    def __call__(self, predictions: Sequence[str], references: Sequence[Sequence[str]]) -> float:
        lists = [list(own) for own in references]
        if self.of_corpus:
            return self.function(list(predictions), lists)
        points = [self.function(said, own) for said, own in zip(predictions, lists, strict=True)]
        return sum(points) / len(points)

    def suits(self, answers: Iterable[Sequence[str]]) -> bool:
        """Whether the references of samples, the first of each as the answer, get any points."""
        if self.of_corpus:
            every = list(answers)
            return self([own[0] for own in every], every) > 0
        return any(self([own[0]], [own]) > 0 for own in answers)


def _checked(name: str, function: Callable[..., float]) -> Callable[..., float]:
    corpus = of_corpus(function)
    takes = "all answers and, for each, a list of references" if corpus else "the answer and a list of references"
    wanted = f"it takes {takes} and returns a number from 0 to {_TOP[corpus]}"

    def score(prediction: str | list[str], references: list, **model: Path) -> float:
        try:
            points = function(prediction, references, **model)
        except Exception as error:
            raise UserError(f"scorer {name!r} raised {type(error).__name__}: {error}; {wanted}") from error
        if not isinstance(points, Real) or not 0 <= points <= _TOP[corpus]:
            raise UserError(f"scorer {name!r} returned {points!r} for {prediction[:80]!r}; {wanted}")
        return float(points)

    score.__signature__ = inspect.signature(function)  # type: ignore[attr-defined]
    setattr(score, _OF_CORPUS, corpus)
    return score
