"""JSON files read piece by piece: what is held at a time is one entry, however large the file."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

_CHUNK = 2**20
_LONGEST_ENTRY = 2**28
_SPACE = " \t\n\r"
_GOES_ON = ("", *"0123456789.eE+-")
_MARK = re.compile(r'[\[\]{}",]')
_STRING_END = re.compile(r'(?:[^"\\]|\\.)*"', re.DOTALL)


class Entry(NamedTuple):
    """An element of a list in a JSON file, or another value of its outermost object.

    Attributes:
        key: the key of the list or value in the outermost object; None where the file is a list.
        value: the element, decoded; None where it is nested too deep, or holds a number of too many digits.
        text: the element as it stands in the file.
    """

    key: str | None
    value: Any
    text: str


def read_entries(path: str | Path) -> Iterator[Entry]:
    """The elements of a JSON file that is a list, or an object of lists and other values, in the file's order.

    Args:
        path: path of the file, UTF-8 with or without a byte order mark.

    Raises:
        ValueError: the file is not JSON, is neither a list nor an object, or has an element of more than 2**28
            characters; the message names the file and the position.
    """
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        scanner = _Scanner(file, path)
        opening = scanner.take("[{")
        if opening == "[":
            for value, text in scanner.elements():
                yield Entry(None, value, text)
        elif not scanner.found("}"):
            while True:
                key, _ = scanner.value()
                if not isinstance(key, str):
                    scanner.refuse(f"a key must be a string, got {key!r:.80}")
                scanner.take(":")
                if scanner.found("["):
                    for value, text in scanner.elements():
                        yield Entry(key, value, text)
                else:
                    yield Entry(key, *scanner.value())
                if scanner.take(",}") == "}":
                    break
        scanner.end()


def read_lines(path: str | Path) -> Iterator[str]:
    """The lines of a text file that are not blank. A line ends at a line feed alone: JSON may hold any other separator
    (U+2028) inside of a string."""
    with open(path, "rb") as file:
        for number, line in enumerate(file):
            if number == 0:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield line.rstrip(b"\r\n").decode("utf-8", errors="replace")


class _Scanner:
    """A window that moves over a text file."""

    def __init__(self, file: Any, path: str | Path):
        self.file, self.path = file, path
        self.window, self.at, self.passed = "", 0, 0
        self.ended = False
        self.decode = json.JSONDecoder().raw_decode

    def refuse(self, reason: str) -> NoReturn:
        raise ValueError(f"{str(self.path)!r} cannot be read as JSON at character {self.passed + self.at}: {reason}.")

    def more(self) -> bool:
        """Widens the window, by as much as it holds and by a chunk at least, and drops what lies behind."""
        if self.ended:
            return False
        rest = self.window[self.at :]
        if len(rest) > _LONGEST_ENTRY:
            self.refuse(f"an entry has more than {_LONGEST_ENTRY} characters")
        chunk = self.file.read(max(_CHUNK, len(rest)))
        if not chunk:
            self.ended = True
            return False
        self.passed += self.at
        self.window, self.at = rest + chunk, 0
        return True

    def skip_space(self) -> None:
        while True:
            while self.at < len(self.window) and self.window[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self.window) or not self.more():
                return

    def found(self, character: str) -> bool:
        """Whether this character comes next; it is then behind."""
        self.skip_space()
        if self.window[self.at : self.at + 1] != character:
            return False
        self.at += 1
        return True

    def take(self, characters: str) -> str:
        """The next character, which must be one of these."""
        for character in characters:
            if self.found(character):
                return character
        expected = " or ".join(map(repr, characters))
        self.refuse(f"expected {expected}, got {self.window[self.at : self.at + 20] or 'the end'!r}")

    def value(self) -> tuple[Any, str]:
        """The next value, decoded and as it stands there."""
        self.skip_space()
        while True:
            try:
                value, end = self.decode(self.window, self.at)
            except json.JSONDecodeError as error:
                if not self.more():
                    self.refuse(str(error))
            except (ValueError, RecursionError) as error:  # too deep, or a number of too many digits
                self.skip_value(str(error))
                return None, "null"
            else:
                # A number at the end of the window may go on behind it: "1", "1." and "1e+" are the start of one.
                if self.window[end : end + 1] not in _GOES_ON or not self.more():
                    text = self.window[self.at : end]
                    self.at = end
                    return value, text

    def skip_value(self, reason: str) -> None:
        """Goes behind a list or object, or a number, without decoding it; `reason` says why, where it has no end."""
        depth, at = 0, self.at
        while True:
            found = _MARK.search(self.window, at)
            if found is not None and found.group() == '"':
                found = _STRING_END.match(self.window, found.end())
                if found is not None:
                    at = found.end()
                    continue
            if found is None:
                dropped = self.at
                if not self.more():
                    self.refuse(reason)
                at = max(at - dropped, 0)
                continue
            mark, at = found.group(), found.end()
            depth += (mark in "[{") - (mark in "]}")
            if depth < 0 or (depth == 0 and mark == ","):  # a number ends where the next thing begins
                self.at = found.start()
                return
            if depth == 0 and mark in "]}":
                self.at = at
                return

    def elements(self) -> Iterator[tuple[Any, str]]:
        """The elements of a list whose bracket is behind."""
        if self.found("]"):
            return
        while True:
            yield self.value()
            if self.take(",]") == "]":
                return

    def end(self) -> None:
        self.skip_space()
        if self.at < len(self.window):
            self.refuse(f"expected the end of the file, got {self.window[self.at : self.at + 20]!r}")
