"""A JSON file whose long lists never stand in memory: their items are handed on in blocks as they are read."""

import gc
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from lucidetr.errors import InputError

BLOCK = 10_000  # items
WINDOW = 1 << 20  # characters
SPACE = re.compile(r"[ \t\n\r]*")
BETWEEN = re.compile(r"\}[ \t\n\r]*,(?=[ \t\n\r]*\{)")  # two objects of a list
TAIL = 1 << 16  # characters of a window in which its last object begins, as a rule
ENDS = " \t\n\r,:]}"  # what may follow a value
# a list of lists of numbers, whole: three quarters of COCO's own file, and nobody reads them
OUTLINE = re.compile(r'"segmentation"\s*:\s*\[\s*(?:\[[^][{}"]*\][\s,]*)*\]')

Reduce = Callable[[int, list[Any]], Any]


def read_in_blocks(
    path: Path, long: Mapping[str, Reduce], constant: Callable[[str], Any], once: Collection[str] = ()
) -> Any:
    """Return the content of a file, each list that `long` names at the top as what is made of its blocks.

    A block comes with the number of its first item; an empty list is one empty block. Outlines of objects are left
    out. `constant` is called for NaN and the infinities. What is no JSON is a JSONDecodeError with the place in the
    whole file, a list of `once` that stands twice at the top an InputError.
    """
    decoder = json.JSONDecoder(parse_constant=constant)
    with open(path, encoding="utf-8-sig") as file, no_search_for_cycles():
        try:
            return Window(file, decoder).content(long, once)
        except json.JSONDecodeError:
            file.seek(0)
            decoder.decode(file.read())  # which names the place
            raise


@contextmanager
def no_search_for_cycles() -> Iterator[None]:
    """Keep Python from looking for cycles, a seventh of the time of reading: values from JSON cannot have any."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class Window:
    """Read values one after the other from a text of which only a part is in memory."""

    def __init__(self, file: TextIO, decoder: json.JSONDecoder):
        self.file, self.decoder, self.text, self.at = file, decoder, "", 0
        self.new = False  # whether nothing of this window was passed yet

    def more(self) -> bool:
        """Read on, twice as far where one value fills the window; say whether there was more."""
        piece = self.file.read(max(WINDOW, len(self.text) - self.at))
        if piece:
            self.text, self.at = OUTLINE.sub('"segmentation":0', self.text[self.at :] + piece), 0
            self.new = True
        return bool(piece)

    def symbol(self) -> str:
        """Return the next character that is no space without passing it; at the end ""."""
        while True:
            self.at = SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text) or not self.more():
                return self.text[self.at : self.at + 1]

    def passes(self, symbol: str) -> bool:
        """Pass that symbol if it is the next; say whether it was."""
        found = self.symbol() == symbol
        self.at += found
        return found

    def must_pass(self, symbol: str) -> None:
        """Pass that symbol, or refuse the text."""
        if not self.passes(symbol):
            raise json.JSONDecodeError(f"Expecting {symbol!r}", self.text, self.at)

    def value(self) -> Any:
        """Return the next value, whole."""
        self.symbol()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.at)
            except json.JSONDecodeError:
                if not self.more():
                    raise
                continue
            # a number could go on behind the window: 12 of 12.5, with or without its point
            if (end < len(self.text) and self.text[end] in ENDS) or not self.more():
                self.at = end
                return value

    def content(self, long: Mapping[str, Reduce], once: Collection[str]) -> Any:
        """Return the whole text's value; of what may stand in it but once a second one is an InputError."""
        if not self.passes("{"):
            content = self.value()
        else:
            content, empty = {}, self.passes("}")
            while not empty:
                key = self.value() if self.symbol() == '"' else self.must_pass('"')
                self.must_pass(":")
                if key in content and key in once:
                    raise InputError(f"the list {key!r} stands there twice, and only one could count; join them")
                content[key] = self.blocks(long[key]) if key in long and self.symbol() == "[" else self.value()
                if not self.passes(","):
                    self.must_pass("}")
                    break
        if self.symbol():
            raise json.JSONDecodeError("Extra data", self.text, self.at)
        return content

    def blocks(self, reduce: Reduce) -> list[Any]:
        """Return what is made of each block of the list that comes."""
        reduced, first, block = [], 0, []
        for item in self.items():
            block.append(item)
            if len(block) == BLOCK:
                reduced.append(reduce(first, block))
                first, block = first + BLOCK, []
        if block or not reduced:
            reduced.append(reduce(first, block))
        return reduced

    def items(self) -> Iterator[Any]:
        """Yield the items of the list that comes."""
        self.must_pass("[")
        if self.passes("]"):
            return
        more = True
        while more:
            yield from self.whole_items()
            yield self.value()
            more = self.passes(",")
        self.must_pass("]")

    def whole_items(self) -> list[Any]:
        """Pass and return the objects that a new window holds, but for the last; none where they are not plain to see.

        Reading a file with objects decoded at once takes three quarters of the time of one by one.
        """
        tail = max(self.at, len(self.text) - TAIL)
        ends = [found.span() for found in BETWEEN.finditer(self.text, tail)] if self.new else []
        self.new = False
        if not ends:
            return []
        bracket, following = ends[-1]
        try:
            items = self.decoder.decode(f"[{self.text[self.at : bracket + 1]}]")
        except json.JSONDecodeError:  # the list ends in this window, or that bracket stands inside an object
            return []
        self.at = following
        return items
