"""Parts by name: what this package brings, and what installed packages add by entry points."""

from collections.abc import Iterator, Mapping
from importlib.metadata import EntryPoint, entry_points
from typing import Any, Generic, TypeVar

from lilora.errors import UserError

Part = TypeVar("Part")


def _place(part: Any) -> tuple[str, str]:
    """Where a class or function is defined."""
    return part.__module__, part.__qualname__


class Registry(Mapping[str, Part], Generic[Part]):
    """Name -> part. A module registers its parts when it is imported.

    Another package names its module in the entry-point `group`, `name = "module"`; that is imported when the name is asked
    for, not before.

    what: what a part is called in errors.
    """

    def __init__(self, what: str, group: str) -> None:
        self.what, self.group = what, group
        self._parts: dict[str, Part] = {}

    def register(self, name: str, part: Part) -> Part:
        """Add a class or function; UserError if another one has the name. A module that is imported anew replaces its own."""
        known = self._parts.setdefault(name, part)
        if _place(known) != _place(part):
            raise UserError(f"{self.what} {name!r} exists already, in {known.__module__}; give this one another name")
        self._parts[name] = part
        return part

    def find(self, name: str, option: str | None = None) -> Part:
        """The part of this name; UserError in the words of `option`, such as --method, for an unknown one."""
        try:
            return self[name]
        except KeyError:
            what = self.what + f" {name!r}" if option is None else f"{option} {name}"
            raise UserError(f"{what} is unknown; choose one of {', '.join(self)}") from None

    def __getitem__(self, name: str) -> Part:
        if name not in self._parts:
            self._load(self._others()[name])
        return self._parts[name]

    def __contains__(self, name: object) -> bool:
        return name in self._parts or name in self._others()

    def __iter__(self) -> Iterator[str]:
        yield from dict.fromkeys([*self._parts, *self._others()])

    def __len__(self) -> int:
        return sum(1 for _ in self)

    def _others(self) -> dict[str, EntryPoint]:
        return {point.name: point for point in entry_points(group=self.group)}

    def _load(self, point: EntryPoint) -> None:
        where = f"{self.what} {point.name!r} of the package {point.dist.name if point.dist else point.module}"
        try:
            point.load()
        except Exception as error:  # whatever a module does when it is imported
            raise UserError(
                f"{where} cannot be imported ({type(error).__name__}: {error}); repair or uninstall that package"
            ) from error
        if point.name not in self._parts:
            raise UserError(f"{where} is missing: {point.value} registers nothing of this name; repair or uninstall it")
