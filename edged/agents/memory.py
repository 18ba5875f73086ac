"""What an agent remembers of its conversation: kept whole, shown to the model as far as its context reaches.

Law of this file: a message is kept before anybody acts on it, and it is shown whole or not at all. What no longer fits is
left out from the oldest on, so much at once that the next requests begin with the same messages: what an engine has read
already it need not read again (docs/agents.md). Of what is left out at least the newest message is kept for as long as
anything is shown besides the last one: so it is known, after a restart too, that there was something.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

from edged.agents.messages import Message

if TYPE_CHECKING:
    from edged.store import Conversations

MESSAGES_MAX = 1000  # kept of one conversation
BYTES_MAX = 4 << 20
KEPT_SHARE = 0.5  # of what is shown, when it becomes too much
# Without their number: that would change the first turn whenever one more is left out.
NOTE = "[Earlier messages of this conversation are left out.]"


class MemoryFull(ValueError):
    """One message alone is more than the model's context, or more than a conversation may hold."""


class Conversation(Protocol):
    """Where a conversation is kept beyond the process; every call is on the disk when it returns."""

    def load(self) -> tuple[list[Message], int]:
        """The messages, oldest first, and how many of the oldest are not shown."""
        ...

    def append(self, message: Message) -> None: ...

    def drop(self, count: int, hidden: int) -> None:
        """Forget the `count` oldest; of those that are left the `hidden` oldest are not shown."""
        ...


class Kept:
    """The conversation of one agent in the device's store."""

    def __init__(self, conversations: Conversations, agent: str) -> None:
        self.conversations, self.agent = conversations, agent

    def load(self) -> tuple[list[Message], int]:
        """As Conversation."""
        messages, hidden = self.conversations.load(self.agent)
        return [Message(**message) for message in messages], hidden

    def append(self, message: Message) -> None:
        """As Conversation."""
        self.conversations.append(self.agent, message.to_dict())

    def drop(self, count: int, hidden: int) -> None:
        """As Conversation."""
        self.conversations.drop(self.agent, count, hidden)


class MemoryManager:
    """One agent's conversation, oldest first. Not for several threads at once: an agent does one thing at a time."""

    def __init__(
        self, conversation: Conversation | None = None, *, messages_max: int = MESSAGES_MAX, bytes_max: int = BYTES_MAX
    ) -> None:
        self._conversation, self._messages_max, self._bytes_max = conversation, messages_max, bytes_max
        self._history, self._hidden = conversation.load() if conversation else ([], 0)

    @property
    def conversation(self) -> Conversation | None:
        """Where it is kept beyond the process; None: it ends with it."""
        return self._conversation

    @property
    def history(self) -> list[Message]:
        """Everything that is kept, as a list of its own: what is done to it changes no memory."""
        return list(self._history)

    @property
    def shown(self) -> list[Message]:
        """What the model gets to see."""
        return self._history[self._hidden :]

    def update_memory(self, message: Message) -> None:
        """Keep a message, and forget old ones where there are too many. Raises MemoryFull for one that is too large."""
        if _bytes(message) > self._bytes_max:
            raise MemoryFull(f"a message of {_bytes(message)} bytes; a conversation holds at most {self._bytes_max}")
        if self._conversation:
            self._conversation.append(message)
        self._history.append(message)
        sizes = list(map(_bytes, self._history))
        if self._too_much(len(sizes), sum(sizes), 1.0):
            self._forget(sizes)

    def retrieve_recent(self, limit: int) -> list[Message]:
        """The newest `limit` messages, oldest first."""
        return self._history[-limit:] if limit > 0 else []

    def to_llm_format(self) -> list[dict[str, Any]]:
        """What is shown, as chat models take it, with a note where something is left out."""
        note = [{"role": "user", "content": NOTE}] if self._hidden else []
        return note + [message.to_llm_dict() for message in self.shown]

    def make_room(self) -> int:
        """Show less: leave out the oldest until KEPT_SHARE of the characters is left, never the last message. Answers how
        many are left out by it; raises MemoryFull when there is nothing to leave out."""
        shown = self.shown
        if len(shown) < 2:
            raise MemoryFull("the last message alone is more than the model's context")
        sizes = [len(message.text) for message in shown]
        left, gone = sum(sizes), 0
        while gone < len(shown) - 1 and (gone == 0 or left > KEPT_SHARE * sum(sizes)):
            left -= sizes[gone]
            gone += 1
        hidden = self._beginning(self._hidden + gone)
        gone = hidden - self._hidden
        self._drop(0, hidden)
        return gone

    def clear(self) -> None:
        """Forget everything."""
        self._drop(len(self._history), 0)

    def _forget(self, sizes: list[int]) -> None:
        """Forget what is left out already; where that is not enough, so much that the next time is far away."""
        count, hidden = max(0, self._hidden - 1), self._hidden
        size = sum(sizes[count:])
        if self._too_much(len(sizes) - count, size, 1.0):
            while count < len(sizes) - 1 and self._too_much(len(sizes) - count, size, KEPT_SHARE):
                size -= sizes[count]
                count += 1
            hidden = self._beginning(min(count + 1, len(sizes) - 1))
        self._drop(count, hidden - count)

    def _too_much(self, messages: int, size: int, share: float) -> bool:
        """Whether this is more than that share of what may be kept."""
        return messages > share * self._messages_max or size > share * self._bytes_max

    def _beginning(self, start: int) -> int:
        """Where what is shown may begin, from `start` on: an answer without what was asked is no use to the model."""
        while start < len(self._history) - 1 and self._history[start].role != "user":
            start += 1
        return start

    def _drop(self, count: int, hidden: int) -> None:
        if self._conversation:
            self._conversation.drop(count, hidden)
        del self._history[:count]
        self._hidden = hidden


def _bytes(message: Message) -> int:
    return len(message.text.encode())
