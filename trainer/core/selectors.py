"""Which devices are meant: `site=plant1,profile!=pi4,line in (a,b)`.

Terms are separated by commas and all must hold:

    key=value   key!=value   key in (a,b)   key notin (a,b)   key (it is there)   !key (it is not)

`!=` and `notin` also mean devices without the label. Keys and values are letters, digits, `_`, `.`, `-` and `~`, at most 64.
An empty selector means every device.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

WORD = r"[A-Za-z0-9_.~-]{1,64}"
TEXT_MAX = 4096
TERMS_MAX = 64
EXAMPLE = "site=plant1,profile!=pi4,line in (a,b)"
_TOKEN = re.compile(rf"\s*(?:(?P<sign>!=|==|[=!(),])|(?P<word>{WORD})(?![A-Za-z0-9_.~-])|(?P<end>$))")


class BadSelector(ValueError):
    """The text is no selector; the message names it, the place and what to write."""


class BadLabel(ValueError):
    """The text is no label; the message names it and what to write."""


@dataclass(frozen=True, slots=True)
class Term:
    """One condition. `values`: any of them; empty: whether the label is there at all. `holds` False turns it round."""

    key: str
    values: tuple[str, ...] = ()
    holds: bool = True

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether a device with these labels is meant."""
        found = labels.get(self.key)
        return (found is not None if not self.values else found in self.values) is self.holds

    def __str__(self) -> str:
        if not self.values:
            return self.key if self.holds else f"!{self.key}"
        if len(self.values) == 1:
            return f"{self.key}{'=' if self.holds else '!='}{self.values[0]}"
        return f"{self.key} {'in' if self.holds else 'notin'} ({','.join(self.values)})"


@dataclass(frozen=True, slots=True)
class Selector:
    """All terms must hold."""

    terms: tuple[Term, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether a device with these labels is meant."""
        return all(term.matches(labels) for term in self.terms)

    def __str__(self) -> str:
        return ",".join(map(str, self.terms))


def parse(text: str) -> Selector:
    """The selector that a text means; raises BadSelector."""
    if len(text) > TEXT_MAX:
        raise BadSelector(f"selector {text[:40]!r}...: {len(text)} characters, at most {TEXT_MAX}: shorten it")
    if not text.strip():
        return Selector()
    read, terms = _Reader(text), []
    while True:
        terms.append(_term(read))
        if len(terms) > TERMS_MAX:
            raise read.wrong(f"more than {TERMS_MAX} terms")
        if read.take("end"):
            return Selector(tuple(terms))
        read.need(",", "a comma before the next term")


def parse_label(text: str) -> tuple[str, str | None]:
    """`key=value`, or `key-` to take a label away (None); raises BadLabel."""
    key, equals, value = text.partition("=")
    if equals and re.fullmatch(WORD, key) and re.fullmatch(WORD, value):
        return key, value
    if not equals and text.endswith("-") and re.fullmatch(WORD, text[:-1]):
        return text[:-1], None
    raise BadLabel(
        f"label {text!r}: use key=value, or key- to take it away; letters, digits, '_', '.', '-' and '~', at most 64 each"
    )


def check_labels(labels: Mapping[str, str]) -> None:
    """Raises BadLabel for the first pair that is none."""
    for key, value in labels.items():
        parse_label(f"{key}={value}")


def _term(read: _Reader) -> Term:
    if read.take("!"):
        return Term(read.word("a key after '!'"), holds=False)
    key = read.word("a key")
    if read.take("=") or read.take("=="):
        return Term(key, (read.word("a value"),))
    if read.take("!="):
        return Term(key, (read.word("a value"),), holds=False)
    operator = read.peek_word()
    if operator not in ("in", "notin"):
        return Term(key)
    read.word("")
    read.need("(", f"'(' after {operator}")
    values = [read.word("a value")]
    while read.take(","):
        values.append(read.word("a value"))
    read.need(")", "')' or ','")
    return Term(key, tuple(dict.fromkeys(values)), holds=operator == "in")


class _Reader:
    """The tokens of a text, one after another."""

    def __init__(self, text: str) -> None:
        self._text, self._at = text, 0

    def _next(self) -> tuple[str, str, int]:
        """(`sign`, `word` or `end`, its text, where it ends) of what comes next."""
        found = _TOKEN.match(self._text, self._at)
        if found is None:
            raise self.wrong("letters, digits, '_', '.', '-', '~' (at most 64 together), or one of = != ! ( ) ,")
        kind = found.lastgroup
        assert kind is not None
        return kind, found[kind], found.end()

    def take(self, what: str) -> bool:
        """Go past this sign (or the `end`) if it comes next."""
        kind, text, end = self._next()
        if (kind == "sign" and text == what) or kind == what == "end":
            self._at = end
            return True
        return False

    def need(self, sign: str, name: str) -> None:
        if not self.take(sign):
            raise self.wrong(name)

    def peek_word(self) -> str:
        kind, text, _ = self._next()
        return text if kind == "word" else ""

    def word(self, name: str) -> str:
        kind, text, end = self._next()
        if kind != "word":
            raise self.wrong(name)
        self._at = end
        return text

    def wrong(self, expected: str) -> BadSelector:
        place = self._at + len(self._text[self._at :]) - len(self._text[self._at :].lstrip())
        found = repr(self._text[place : place + 12]) if place < len(self._text) else "its end"
        return BadSelector(
            f"selector {self._text!r}: at character {place + 1} {expected} is expected, found {found}; "
            f"write as in {EXAMPLE!r}"
        )
