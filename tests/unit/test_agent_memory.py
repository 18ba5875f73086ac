"""The memory of an agent: whole messages, limits that hold, and the newest ones always shown."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edged.agency import Agency
from edged.agents import MemoryManager, Message
from edged.agents.feedback import Feedback
from edged.agents.lessons import KeptLessons, LearningMemory, Lesson
from edged.agents.memory import KEPT_SHARE, NOTE, Kept, MemoryFull
from edged.config_agents import Agent as AgentConfig
from edged.store import Store, StoreError


def test_what_was_said_is_shown_in_order() -> None:
    memory = MemoryManager()
    memory.update_memory(Message("user", "My favourite colour is blue."))
    memory.update_memory(Message("assistant", {"ok": True}))
    memory.update_memory(Message("tool", "12.5", name="measure"))
    assert [(said["role"], said["content"]) for said in memory.to_llm_format()] == [
        ("user", "My favourite colour is blue."), ("assistant", '{"ok": true}'), ("user", "12.5"),
    ]  # fmt: skip
    assert [message.role for message in memory.retrieve_recent(2)] == ["assistant", "tool"]
    assert memory.retrieve_recent(0) == []


@given(sizes=st.lists(st.integers(0, 60), max_size=40), messages_max=st.integers(1, 10), bytes_max=st.integers(60, 300))
def test_limits_hold_and_the_newest_stay(sizes: list[int], messages_max: int, bytes_max: int) -> None:
    memory = MemoryManager(messages_max=messages_max, bytes_max=bytes_max)
    texts = [f"{number}".ljust(size, "x") for number, size in enumerate(sizes)]
    for text in texts:
        memory.update_memory(Message("user", text))
        kept = [message.text for message in memory.history]
        assert len(kept) <= messages_max and sum(map(len, kept)) <= bytes_max
    assert [message.text for message in memory.history] == texts[len(texts) - len(memory.history) :]
    if texts:
        assert memory.history[-1].text == texts[-1]


@given(
    turns=st.lists(
        st.tuples(st.sampled_from(["user", "assistant", "tool"]), st.integers(1, 50)), min_size=2, max_size=30
    )
)
def test_making_room_leaves_out_whole_messages_until_one_is_left(turns: list[tuple[str, int]]) -> None:
    memory = MemoryManager()
    for role, size in turns:
        memory.update_memory(Message(role, "x" * size))  # type: ignore[arg-type]
    everything = memory.history
    while len(memory.shown) > 1:
        before = sum(len(message.text) for message in memory.shown)
        gone = memory.make_room()
        assert gone >= 1
        assert list(memory.shown) == everything[len(everything) - len(memory.shown) :]
        after = sum(len(message.text) for message in memory.shown)
        assert after <= before / 2 or len(memory.shown) == 1
        assert memory.to_llm_format()[0]["content"] == NOTE
    assert memory.history == everything, "what is not shown is still kept"
    with pytest.raises(MemoryFull):
        memory.make_room()


def test_what_is_left_begins_with_a_question_where_it_can() -> None:
    memory = MemoryManager()
    for role in ("user", "assistant", "tool", "assistant", "user", "assistant"):
        memory.update_memory(Message(role, "x" * 10))  # type: ignore[arg-type]
    memory.make_room()
    assert [message.role for message in memory.shown] == ["user", "assistant"]


@given(
    said=st.lists(st.tuples(st.sampled_from(["user", "assistant"]), st.integers(1, 30)), min_size=1, max_size=120),
    room=st.sets(st.integers(0, 119), max_size=4), messages_max=st.integers(4, 20), bytes_max=st.integers(60, 400),
)  # fmt: skip
def test_a_request_begins_like_the_one_before(
    said: list[tuple[str, int]], room: set[int], messages_max: int, bytes_max: int
) -> None:
    """So that an engine need not read it again, unless room was made; forgetting does that too, and seldom: only after
    as much as it leaves to be kept has come."""
    memory = MemoryManager(messages_max=messages_max, bytes_max=bytes_max)
    before: list[object] = []
    since: list[int] | None = None  # the sizes of what has come since something that was shown was forgotten
    for number, (role, size) in enumerate(said):
        text = f"{number}".ljust(size, "x")
        memory.update_memory(Message(role, text))  # type: ignore[arg-type]
        request = memory.to_llm_format()
        since = None if since is None else [*since, len(text)]
        if request[: len(before)] != before:
            if since is not None:
                enough = len(since) >= (1 - KEPT_SHARE) * messages_max or sum(since) >= (1 - KEPT_SHARE) * bytes_max
                assert enough, "it is forgotten in blocks"
            since = []
            assert request[0]["content"] == NOTE or len(request) == 1
        if number in room and len(memory.shown) > 1:
            memory.make_room()
            request = memory.to_llm_format()
        before = request


def test_forgotten_messages_are_forgotten_from_what_is_left_out_too() -> None:
    memory = MemoryManager(messages_max=4)
    for number in range(4):
        memory.update_memory(Message("user", str(number)))
    memory.make_room()
    shown = [message.text for message in memory.shown]
    memory.update_memory(Message("user", "4"))
    assert [message.text for message in memory.shown] == [*shown, "4"]
    memory.clear()
    assert memory.history == [] and memory.to_llm_format() == []


def test_a_message_larger_than_the_memory_is_refused() -> None:
    memory = MemoryManager(bytes_max=10)
    with pytest.raises(MemoryFull, match="20 bytes; a conversation holds at most 10"):
        memory.update_memory(Message("user", "x" * 20))
    assert memory.history == []


@given(acts=st.lists(st.one_of(st.text(max_size=20), st.just(None)), max_size=15))
def test_a_conversation_survives_a_restart_as_it_was(
    tmp_path_factory: pytest.TempPathFactory, acts: list[str | None]
) -> None:
    """A5."""
    folder = tmp_path_factory.mktemp("store")
    store = Store(folder)
    memory = MemoryManager(Kept(store.conversations, "clerk"), messages_max=5)
    other = MemoryManager(Kept(store.conversations, "other"))
    other.update_memory(Message("user", "of somebody else"))
    for act in acts:
        if act is not None:
            memory.update_memory(Message("user", {"said": act}))
        elif len(memory.shown) > 1:
            memory.make_room()
    store.close()
    again = MemoryManager(Kept(Store(folder).conversations, "clerk"), messages_max=5)
    assert again.history == memory.history
    assert again.to_llm_format() == memory.to_llm_format()
    assert len(MemoryManager(Kept(Store(folder).conversations, "other")).history) == 1


def test_the_same_message_is_kept_once(tmp_path: Path) -> None:
    kept = Kept(Store(tmp_path).conversations, "clerk")
    message = Message("user", "once")
    kept.append(message)
    kept.append(message)
    assert kept.load() == ([message], 0)


def test_what_an_agent_said_that_is_there_no_longer_is_forgotten(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for name in ("clerk", "gone", "quiet"):
        memory = MemoryManager(Kept(store.conversations, name))
        for text in ("one", "two"):
            memory.update_memory(Message("user", text))
        memory.make_room()
    for agent in ("clerk", "gone"):
        LearningMemory(kept=KeptLessons(store.conversations, agent)).keep(Lesson("run", Feedback(score=1, who="ann")))
    assert store.conversations.keep_only(["clerk", "new"]) == ["gone", "gone:lessons", "quiet"]
    assert store.conversations.names() == ["clerk", "clerk:lessons"]
    assert store.conversations.load("gone") == ([], 0), "one of the same name begins anew"
    assert len(Kept(store.conversations, "clerk").load()[0]) == 2
    assert store.conversations.keep_only([]) == ["clerk", "clerk:lessons"] and store.conversations.keep_only([]) == []


def test_a_start_forgets_what_agents_said_that_are_there_no_longer(tmp_path: Path) -> None:
    """Also where none is configured any more; a store that fails does not keep the device from starting."""
    store = Store(tmp_path)
    for name in ("clerk", "forgetful", "gone"):
        store.conversations.append(name, Message("user", "hello").to_dict())
    settings = SimpleNamespace(agents={}, peers={})
    agency = Agency(SimpleNamespace(settings=settings, store=store), None, None)  # type: ignore[arg-type]
    settings.agents = {"clerk": AgentConfig(slot="tongue"), "forgetful": AgentConfig(slot="tongue", remember=False)}
    agency.start()
    assert store.conversations.names() == ["clerk"]
    settings.agents = {}
    agency.start()
    assert store.conversations.names() == []
    store.close()
    broken = SimpleNamespace(conversations=SimpleNamespace(keep_only=fails))
    Agency(SimpleNamespace(settings=settings, store=broken), None, None).start()  # type: ignore[arg-type]


def fails(_agents: Any) -> Any:
    raise StoreError("the disk is full")
