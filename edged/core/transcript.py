"""A conversation as one text, for a model without a chat template.

Law: devices ask in this form and the trainer trains in it, so an adapter meets what it was trained on. Another form is
another question to every adapter that is out there, and another identity of every conversation in a frozen holdout.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

_HEADS = {"user": "Instruct: ", "assistant": "Output: "}
_HEAD = re.compile(r"^(?=(?:Instruct|Output):)", re.MULTILINE)
STOP = "\nInstruct:"  # where a model without a mark for the end of a turn begins the next one itself


def transcript(turns: Iterable[tuple[str, str]]) -> str:
    """The turns (role, content) in the form that Phi-2 was trained on, up to where the next answer begins.

    What is said stays within its turn: a line of it that begins as a turn does is moved in by a space."""
    said = [f"{_HEADS.get(role, '')}{_HEAD.sub(' ', content)}" for role, content in turns]
    return "\n".join([*said, "Output:"])
