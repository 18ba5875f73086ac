"""Whether a model's answers follow from the questions. Pure.

A model that only learned what answers look like finds every one of them likelier than before, whatever was asked. So two and
two held-out examples are paired, and each answer is scored for its own question and for the other's: what a model thinks of
an answer whatever was asked cancels out of the `lead` of a pair,

    lead = log p(a|A) + log p(b|B) - log p(b|A) - log p(a|B)

in nats, of the questions A and B and their answers a and b. It is the log of the odds that the answers are not exchanged,
with even odds before: the log odds ratio of a table of two by two (Agresti 2013, Categorical Data Analysis, section 2.2).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

PAIRS_MAX = 64  # four answers are scored for each


@dataclass(frozen=True, slots=True)
class Crossed:
    """The leads of pairs of examples, in order; `pairs`: the identities of the two."""

    pairs: tuple[tuple[str, str], ...]
    leads: tuple[float, ...]


def pair_up(answers: Sequence[str], pairs_max: int = PAIRS_MAX) -> list[tuple[int, int]]:
    """Places of examples with different answers, two by two, none twice, as many pairs as there can be.

    Upper case and spaces make no other answer. The same answers give the same pairs.
    """
    groups: dict[str, list[int]] = {}
    for place, answer in enumerate(answers):
        groups.setdefault(" ".join(answer.casefold().split()), []).append(place)
    found: list[tuple[int, int]] = []
    while len(found) < pairs_max:
        # From the two largest groups: what is left over then has one answer, and could be paired with nothing.
        most = sorted((group for group in groups.values() if group), key=lambda group: (-len(group), group[0]))[:2]
        if len(most) < 2:
            break
        first, second = most[0].pop(0), most[1].pop(0)
        found.append((min(first, second), max(first, second)))
    return found
