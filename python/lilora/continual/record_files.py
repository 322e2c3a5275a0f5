"""Files of records, of which one at a time is in memory: JSON lines, a JSON list, parquet, a folder of `datasets`."""

import codecs
import json
import os
from array import array
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

from lilora.errors import UserError

_WINDOW = 1 << 20  # bytes of a JSON list that are looked at together
_SPACE = " \t\r\n"


class JSONRecords(Sequence[bytes]):
    """The records of a file with one JSON value per line, or with a JSON list of them, as bytes.

    What is kept is where each of them lies. Raises UserError for a file that cannot be read or is no JSON list, and for a
    record that is asked for after the file has changed.
    """

    def __init__(self, path: Path) -> None:
        self.path, self._state = path, _state(path)
        self._starts, self._ends = array("q"), array("q")
        with open(path, "rb") as file:
            start = len(codecs.BOM_UTF8) if file.read(len(codecs.BOM_UTF8)) == codecs.BOM_UTF8 else 0
            file.seek(start)
            while (first := file.read(1)) and first in b" \t\r\n":
                start += 1
            file.seek(start)
            for begin, end in _lines(file, start) if first == b"{" else _list(file, start):
                self._starts.append(begin)
                self._ends.append(end)
        self.is_list = first != b"{"

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> bytes:
        with self._opened() as file:
            return self._record(file, index)

    def __iter__(self) -> Iterator[bytes]:
        with self._opened() as file:
            for index in range(len(self)):
                yield self._record(file, index)

    @contextmanager
    def _opened(self) -> Iterator[BinaryIO]:
        with open(self.path, "rb") as file:
            if _state(file.fileno()) != self._state:
                raise UserError(f"{self.path} has changed since this run read it; run the same command again.")
            yield file

    def _record(self, file: BinaryIO, index: int) -> bytes:
        file.seek(self._starts[index])
        return file.read(self._ends[index] - self._starts[index])

    def place(self, index: int) -> str:
        """What to call a record in print."""
        line = f"line {_line_at(self.path, self._starts[index])}"
        return f"record {index + 1}, {line}" if self.is_list else line


class TableRecords(Sequence[dict[str, Any]]):
    """The rows of a parquet file or of a folder that `datasets` wrote; cells that hold nothing are left out.

    Raises UserError for what `datasets` cannot read, where it is not installed, and for a row that is asked for after a file
    has changed: it is mapped, and what is cut off it would end the process.
    """

    def __init__(self, path: Path) -> None:
        try:
            import datasets
        except ImportError as error:
            raise UserError(
                f"{path} wants the package datasets; pip install datasets, or write the data as JSON lines."
            ) from error
        if (path / "dataset_dict.json").is_file():
            splits = sorted(entry.name for entry in path.iterdir() if entry.is_dir())
            raise UserError(
                f"{path} holds the splits {', '.join(splits)}; name one of its folders, {path / splits[0]}."
            )
        datasets.disable_progress_bars()
        self.path, self._state = path, _state(path)
        try:
            rows = datasets.load_from_disk(str(path)) if path.is_dir() else datasets.Dataset.from_parquet(str(path))
            self._rows = rows.with_format("arrow")  # images as they are stored
        except Exception as error:  # of several libraries
            raise UserError(f"{path} cannot be read ({' '.join(str(error).split())[:300]}); replace it.") from error

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self._checked(self._rows[index : index + 1])[0]

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return (row for part in self._rows.iter(batch_size=64) for row in self._checked(part))

    def _checked(self, part: Any) -> list[dict[str, Any]]:
        """The rows of a table of pyarrow, which reads wherever a damaged file points."""
        if _state(self.path) != self._state:
            raise UserError(f"{self.path} has changed since this run read it; run the same command again.")
        try:
            part.validate(full=True)
            return [_given(row) for row in part.to_pylist()]
        except ValueError as error:  # pyarrow's own are such
            raise UserError(f"{self.path} is damaged ({' '.join(str(error).split())[:300]}); replace it.") from error

    def place(self, index: int) -> str:
        """What to call a record in print."""
        return f"row {index + 1}"


def record_file(path: Path) -> JSONRecords | TableRecords:
    """The records of a file or folder; read once in a process for as long as it does not change."""
    try:
        return _read(path, _state(path))
    except UserError:
        raise
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(
            f"{path} cannot be read ({reason}); put the data there or pass its folder with --data."
        ) from error


@cache
def _read(path: Path, state: tuple) -> JSONRecords | TableRecords:
    return TableRecords(path) if path.is_dir() or path.suffix == ".parquet" else JSONRecords(path)


def _state(file: Path | int) -> tuple:
    """What tells whether a file, or one of a folder, has changed."""
    if isinstance(file, Path) and file.is_dir():
        return tuple(_state(inner) for inner in sorted(file.iterdir()) if inner.is_file())
    status = os.stat(file)
    return status.st_ino, status.st_size, status.st_mtime_ns


def _lines(file: BinaryIO, start: int) -> Iterator[tuple[int, int]]:
    for line in file:
        if line.strip():
            yield start, start + len(line)
        start += len(line)


def _list(file: BinaryIO, start: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each value of the JSON list that starts at byte `start`."""
    decode, text, at, eof, size = json.JSONDecoder().raw_decode, "", 0, False, _WINDOW
    offset = start  # in bytes, of text[at]

    def skip(end: int) -> None:
        nonlocal at, offset
        offset += len(text[at:end].encode("utf-8", "surrogateescape"))
        at = end

    def next_character() -> str:
        nonlocal text, at, eof
        while True:
            end = at
            while end < len(text) and text[end] in _SPACE:
                end += 1
            skip(end)
            if at < len(text) or eof:
                return text[at : at + 1]
            refill()

    def refill() -> None:
        nonlocal text, at, eof
        file.seek(offset)
        content = file.read(size)
        text, at, eof = content.decode("utf-8", "surrogateescape"), 0, len(content) < size

    def wrong(what: str) -> UserError:
        return UserError(f"{file.name} is no JSON list: line {_line_at(Path(file.name), offset)}: {what}; mend it.")

    def end_of_list() -> None:
        skip(at + 1)
        if next_character():
            raise wrong("something follows the list")

    if next_character() != "[":
        raise wrong("it does not start with [")
    skip(at + 1)
    if next_character() == "]":
        end_of_list()
        return
    while True:
        next_character()
        try:
            _, end = decode(text, at)
        except RecursionError as error:
            raise wrong("a record is nested too deeply") from error
        except json.JSONDecodeError as error:
            if eof:
                skip(error.pos)
                raise wrong(error.msg[0].lower() + error.msg[1:]) from error
            end = len(text)
        if end == len(text) and not eof:  # it may go on
            size *= 2 if at == 0 else 1
            refill()
            continue
        begin = offset
        skip(end)
        yield begin, offset
        separator = next_character()
        if separator == "]":
            end_of_list()
            return
        if separator != ",":
            raise wrong("a comma or ] is missing")
        skip(at + 1)


def _line_at(path: Path, offset: int) -> int:
    """The number of the line that byte `offset` is on, from 1."""
    line = 1
    with open(path, "rb") as file:
        while offset > 0 and (content := file.read(min(offset, _WINDOW))):
            line += content.count(b"\n")
            offset -= len(content)
    return line


def _given(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _given(inner) for key, inner in value.items() if inner is not None}
    return [_given(inner) for inner in value] if isinstance(value, list) else value
