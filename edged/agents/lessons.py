"""What an agent has been told about its runs: its experience, which outlives the process where there is a store.

It lies where the agent's conversation does, as one of its own, and in the same order: what a training was asked for with is
what the model is no longer shown. Law: a lesson is on the disk before anybody acts on it.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from edged.agents.feedback import Feedback, Preference
from edged.agents.messages import new_id

if TYPE_CHECKING:
    from edged.store import Conversations

LESSONS_MAX = 1000  # that an agent remembers; the recorder keeps all
LESSONS_BYTES_MAX = 4 << 20  # of them, but for the newest
CONVERSATION = "{agent}:lessons"  # no agent has such a name


@dataclass(frozen=True, slots=True)
class Lesson:
    """One piece of feedback that was taken: of which recorded run, and under which release and adapter it was given."""

    execution: str
    feedback: Feedback
    release: str = ""
    adapter: str = ""
    id: str = field(default_factory=new_id, compare=False)


class Lessons(Protocol):
    """Where lessons are kept beyond the process; every call is on the disk when it returns."""

    def load(self) -> tuple[list[Lesson], int]:
        """The lessons, oldest first, and for how many of the oldest a training has been asked."""
        ...

    def append(self, lesson: Lesson) -> None: ...

    def drop(self, count: int, asked: int) -> None:
        """Forget the `count` oldest; with the `asked` oldest of those that are left a training has been asked for."""
        ...


class KeptLessons:
    """The lessons of one agent in the device's store."""

    def __init__(self, conversations: Conversations, agent: str) -> None:
        self._all, self._name = conversations, CONVERSATION.format(agent=agent)

    def load(self) -> tuple[list[Lesson], int]:
        """As Lessons."""
        rows, asked = self._all.load(self._name)
        return [_lesson(row) for row in rows], asked

    def append(self, lesson: Lesson) -> None:
        """As Lessons."""
        row = asdict(lesson)
        self._all.append(self._name, {"message_id": row.pop("id"), **row})

    def drop(self, count: int, asked: int) -> None:
        """As Lessons."""
        self._all.drop(self._name, count, asked)


def _lesson(row: dict[str, Any]) -> Lesson:
    said = row["feedback"]
    preference = said.pop("preference")
    feedback = Feedback(preference=Preference(**preference) if preference else None, **said)
    return Lesson(row["execution"], feedback, row["release"], row["adapter"], row["message_id"])


class LearningMemory:
    """Lessons, oldest first, the newest of them. Safe to use from any thread."""

    def __init__(
        self, lessons_max: int = LESSONS_MAX, *, bytes_max: int = LESSONS_BYTES_MAX, kept: Lessons | None = None
    ) -> None:
        """`kept`: where they are beyond the process; None: they end with it."""
        self._max, self._bytes_max, self._kept = lessons_max, bytes_max, kept
        self._lessons, self._asked = kept.load() if kept else ([], 0)
        self._lock = threading.Lock()

    def keep(self, lesson: Lesson) -> None:
        """Remember a lesson; the oldest make room. Raises StoreError."""
        with self._lock:
            if self._kept:
                self._kept.append(lesson)
            self._lessons.append(lesson)
            gone, sizes = 0, [_bytes(each) for each in self._lessons]
            left = sum(sizes)
            while gone < len(sizes) - 1 and (len(sizes) - gone > self._max or left > self._bytes_max):
                left -= sizes[gone]
                gone += 1
            if gone:
                self._drop(gone, max(0, self._asked - gone))

    @property
    def lessons(self) -> tuple[Lesson, ...]:
        """All that are remembered."""
        with self._lock:
            return tuple(self._lessons)

    @property
    def fresh(self) -> tuple[Lesson, ...]:
        """Those that no training has been asked for yet."""
        with self._lock:
            return tuple(self._lessons[self._asked :])

    def asked(self, lessons: Sequence[Lesson]) -> None:
        """A training has been asked for with these, the oldest that were fresh. Raises StoreError."""
        with self._lock:
            ids = {lesson.id for lesson in lessons}
            self._drop(0, max([self._asked, *(n for n, each in enumerate(self._lessons, 1) if each.id in ids)]))

    def _drop(self, count: int, asked: int) -> None:
        if self._kept:
            self._kept.drop(count, asked)
        del self._lessons[:count]
        self._asked = asked


def _bytes(lesson: Lesson) -> int:
    return len(json.dumps(asdict(lesson), default=str))
