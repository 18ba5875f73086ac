"""A conversation put into a model's own chat template (Jinja), safe against the template and against what is said.

The template is data from outside: it runs in Jinja's sandbox, sees the messages and nothing else, and its output has a
limit. What is said is data from further outside: a control token that somebody spells out in a message ("<|end|>") must
stay text, or it would end that turn and begin another one in somebody else's name. So every such spelling is broken in
two with `BREAK` before the template runs, and the parts are tokenized one by one. A harmless message is not touched:
it is tokenized in one piece with the template around it, exactly as in training.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any, NoReturn, Protocol

from jinja2 import TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from edged.engines.base import ChatMessage, EngineError, Unsuitable

ROLES = ("system", "user", "assistant")
RENDERED_CHARS_MAX = 4 * 1024 * 1024  # far above any context; a template that loops stops here
BREAK = "\ufdd0"  # a code point that Unicode keeps out of texts; one in a message only breaks that message once more
_GLOBALS = ("range", "namespace", "dict")  # of Jinja's own, what templates of models use


class Tokenize(Protocol):
    """The tokens of a text; `whole`: with what the model wants at its ends."""

    def __call__(self, text: str, *, whole: bool) -> list[int]: ...


class ChatTemplate:
    """One model's template, compiled."""

    def __init__(self, source: str, name: str, bos: str, eos: str, control: Iterable[str]) -> None:
        """`control`: how the vocabulary spells its control tokens; `name` (of the release) is for errors.

        Raises EngineError for a template that is not valid.
        """
        self._name = name
        self._context = {"bos_token": bos, "eos_token": eos}
        self._markers = Markers(control)
        try:
            self._template = _sandbox().from_string(source)
        except Exception as error:  # a template can make the parser itself fail in many ways
            raise EngineError(
                f"{name}: its chat template is not valid ({_reason(error)}); export the model anew"
            ) from None

    def render(self, messages: Sequence[ChatMessage], *, asks: bool = True) -> list[str]:
        """The prompt that asks for the next turn, as the parts to be tokenized one by one, special tokens included; not
        `asks`: the conversation so far and nothing more.

        Raises EngineError: an unknown role, a template that refuses the conversation, fails, or writes without end.
        """
        for message in messages:
            if message.role not in ROLES:
                raise Unsuitable(f"message role {message.role!r} is unknown; use one of: {', '.join(ROLES)}")
        said = [{"role": message.role, "content": self._markers.break_up(message.content)} for message in messages]
        text: list[str] = []
        size = 0
        try:
            for part in self._template.generate(messages=said, add_generation_prompt=asks, **self._context):
                text.append(part)
                size += len(part)
                if size > RENDERED_CHARS_MAX:
                    raise TemplateError(f"it writes more than {RENDERED_CHARS_MAX} characters")
        except Exception as error:  # the code that runs here came with the model
            raise Unsuitable(f"{self._name}: its chat template fails on this conversation: {_reason(error)}") from None
        return [part for part in "".join(text).split(BREAK) if part]


class Markers:
    """Finds spellings of control tokens in what is said."""

    def __init__(self, control: Iterable[str]) -> None:
        # A token of one character has no inside to break; vocabularies have none.
        markers = sorted({text for text in control if len(text) > 1}, key=len, reverse=True)
        # Looking ahead finds spellings that overlap, too.
        self._pattern = re.compile(f"(?={'|'.join(map(re.escape, markers))})") if markers else None
        self._heads = {text[:length] for text in markers for length in range(1, len(text))}
        self._tails = {text[length:] for text in markers for length in range(1, len(text))}
        self._longest = len(markers[0]) if markers else 0

    def literal(self, text: str, tokenize: Tokenize) -> list[int]:
        """The tokens of a prompt in which control tokens stay text: it is tokenized in parts."""
        first, *rest = self.break_up(text).split(BREAK)
        return [*tokenize(first, whole=True), *(token for part in rest for token in tokenize(part, whole=False))]

    def break_up(self, text: str) -> str:
        """`text` with a BREAK inside each spelling, and at an end that could become one with what stands beside it."""
        if self._pattern is None:
            return text
        begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
        breaks = {match.start() + 1 for match in self._pattern.finditer(text)}
        if any(text[begin : begin + length] in self._tails for length in range(1, self._longest)):
            breaks.add(begin)
        if any(text[max(begin, end - length) : end] in self._heads for length in range(1, self._longest)):
            breaks.add(end)
        bounds = [0, *sorted(breaks), len(text)]
        return BREAK.join(text[first:last] for first, last in pairwise(bounds))


def _sandbox() -> ImmutableSandboxedEnvironment:
    # Blocks are trimmed because transformers trims them, which templates are written for.
    sandbox = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"], autoescape=False
    )
    sandbox.globals = {name: sandbox.globals[name] for name in _GLOBALS} | {"raise_exception": _raise_exception}
    sandbox.filters["tojson"] = _to_json
    return sandbox


def _raise_exception(message: str) -> NoReturn:
    raise TemplateError(str(message))


def _to_json(value: Any, indent: int | None = None) -> str:
    # Jinja's own writes for HTML pages: it escapes <, > and every letter outside ASCII.
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error)[:200]}"
