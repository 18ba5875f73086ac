"""Tools of agents: what the model is told of them, and that no call can harm the run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from datetime import datetime
from typing import Any, Literal, Optional

import pytest

from edged.agents import BadSchema, Tool
from edged.agents.apart import STUCK_MAX
from edged.agents.tools import OUTPUT_CHARS_MAX, tools_of


def get_current_time(timezone: Optional[str] = None) -> str:  # noqa: UP045 - as in the seed's example
    """Returns the current date and time, optionally for a specific timezone."""
    return f"The current date and time is: {datetime.now().isoformat()}"


def measure(part: str, unit: Literal["mm", "in"] = "mm", *, times: int = 1) -> dict[str, Any]:
    """Measure a part with the caliper.

    It takes a second or so.

    Args:
        part: the part's number,
            as it stands on the tray
        unit (str): of the answer
        times: how often; the mean is answered

    Returns:
        The length.
    """
    return {"part": part, "length": 12.5, "unit": unit, "times": times}


def test_the_schema_comes_from_signature_and_docstring() -> None:
    """A3."""
    assert Tool("measure", measure).schema == {
        "type": "function",
        "function": {
            "name": "measure",
            "description": "Measure a part with the caliper. It takes a second or so.",
            "parameters": {
                "type": "object",
                "properties": {
                    "part": {"type": "string", "description": "the part's number, as it stands on the tray"},
                    "unit": {"enum": ["mm", "in"], "default": "mm", "description": "of the answer"},
                    "times": {"type": "integer", "default": 1, "description": "how often; the mean is answered"},
                },
                "required": ["part"],
                "additionalProperties": False,
            },
        },
    }


def test_the_seeds_tool() -> None:
    tool = Tool("get_current_time_tool", get_current_time)
    assert tool.description == "Returns the current date and time, optionally for a specific timezone."
    assert tool.parameters["required"] == []
    for arguments in ({}, {"timezone": None}, {"timezone": "UTC"}):
        seen = asyncio.run(tool.call(arguments))
        assert seen.ok and seen.text.startswith("The current date and time is: ")


def test_sphinx_docstrings() -> None:
    def weigh(part: str, tare_g: float) -> float:
        """Weigh a part.

        :param part: its number
        :param float tare_g: what the tray weighs
        :returns: grams
        """
        return 1.0 - tare_g

    tool = Tool("weigh", weigh)
    assert tool.description == "Weigh a part."
    assert {name: each["description"] for name, each in tool.parameters["properties"].items()} == {
        "part": "its number", "tare_g": "what the tray weighs",
    }  # fmt: skip


@pytest.mark.parametrize(
    "arguments",
    [{}, {"part": 5}, {"part": "a", "unit": "ft"}, {"part": "a", "more": 1}, "a", None, {"part": "a", "times": 1.5}],
)
def test_wrong_arguments_never_reach_the_function(arguments: Any) -> None:
    called = []

    def spy(part: str, unit: Literal["mm", "in"] = "mm", times: int = 1) -> None:
        called.append(part)

    seen = asyncio.run(Tool("spy", spy).call(arguments))
    assert not seen.ok and "spy was not called: its arguments are wrong" in seen.text
    assert called == []


def test_an_exception_is_an_observation() -> None:
    def broken() -> None:
        raise OSError("the caliper is not connected")

    async def broken_too() -> None:
        raise KeyError("port")

    def leaves() -> None:
        raise SystemExit(3)

    assert asyncio.run(Tool("a", broken).call({})).text == "a failed: OSError: the caliper is not connected"
    assert asyncio.run(Tool("b", broken_too).call({})).text == "b failed: KeyError: 'port'"
    assert not asyncio.run(Tool("c", leaves).call({})).ok


def test_what_cannot_say_what_it_is_is_an_observation_too() -> None:
    class Mute(Exception):
        def __str__(self) -> str:
            raise RuntimeError("not even this")

    class MuteToo:
        __str__ = Mute.__str__

    def raises() -> None:
        raise Mute

    seen = asyncio.run(Tool("a", raises).call({}))
    assert (seen.ok, seen.text) == (False, "a failed: Mute, whose text cannot be had")
    seen = asyncio.run(Tool("b", MuteToo).call({}))
    assert (seen.ok, seen.text) == (False, "b failed: RuntimeError: not even this")


def test_a_time_limit_of_the_tools_own_is_told_as_what_it_is() -> None:
    def asks() -> None:
        raise TimeoutError("the gauge at 10.0.0.7 did not answer")

    async def asks_too() -> None:
        async with asyncio.timeout(0):
            await asyncio.sleep(30)

    for tool in (Tool("ask", asks), Tool("ask", asks_too)):
        seen = asyncio.run(tool.call({}))
        assert not seen.ok and seen.text.startswith("ask failed: TimeoutError"), seen
    assert "10.0.0.7" in asyncio.run(Tool("ask", asks).call({})).text


def test_a_large_result_is_not_written_out_whole() -> None:
    """Only as far as it is shown: what lies behind is never looked at."""
    looked = []

    class Rows(list[Any]):
        def __iter__(self) -> Iterator[Any]:
            for number in range(10**9):
                looked.append(number)
                yield {"row": number}

    seen = asyncio.run(Tool("rows", lambda: Rows([1])).call({}))
    assert seen.ok and seen.text.startswith('[{"row": 0}, {"row": 1}') and seen.text.endswith("[cut: more, 4000 shown]")
    assert len(looked) < OUTPUT_CHARS_MAX
    on_loop = []
    asyncio.run(Tool("slow", lambda: Telling(on_loop)).call({}))
    assert on_loop == [False], "what writes it out does not hold up the agents' loop"


class Telling:
    """Notes whether it was asked for its text on an event loop."""

    def __init__(self, said: list[bool]) -> None:
        self._said = said

    def __str__(self) -> str:
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            self._said.append(False)
        else:
            self._said.append(True)
        return "telling"


def test_what_takes_too_long_is_left_behind_and_not_for_ever() -> None:
    go_on = threading.Event()

    def stuck() -> str:
        go_on.wait(30)
        return "late"

    async def stuck_too() -> None:
        await asyncio.sleep(30)

    tool = Tool("stuck", stuck, seconds_max=0.05)

    async def all_of_it() -> None:
        for _ in range(STUCK_MAX):
            assert (await tool.call({})).text == "stuck did not end within 0.05 s"
        assert "earlier calls ran out of time and still run" in (await tool.call({})).text
        assert not (await Tool("stuck_too", stuck_too, seconds_max=0.05).call({})).ok
        go_on.set()
        while not (seen := await tool.call({})).ok:  # the threads end
            assert "still run" in seen.text or "did not end" in seen.text
        assert seen.text == "late"

    asyncio.run(all_of_it())


class Slow:
    """Takes its time to say what it is."""

    def __init__(self, go_on: threading.Event) -> None:
        self._go_on = go_on

    def __str__(self) -> str:
        return f"shown {self._go_on.wait(20)}"


@pytest.mark.parametrize("kind", ["function", "coroutine function", "result", "error"])
def test_a_tool_that_blocks_holds_up_nobody_and_its_time_ends_the_wait(kind: str) -> None:
    """The loop goes on in the meantime, in which all agents of a device run."""
    go_on = threading.Event()

    def function() -> str:
        return f"shown {go_on.wait(20)}"

    async def coroutine_function() -> str:
        return function()

    def error() -> None:
        raise RuntimeError(Slow(go_on))

    blocking: Any = {"function": function, "coroutine function": coroutine_function, "result": lambda: Slow(go_on),
                     "error": error}[kind]  # fmt: skip

    async def all_of_it() -> None:
        assert (await Tool("stuck", blocking, seconds_max=0.05).call({})).text == "stuck did not end within 0.05 s"
        assert not go_on.is_set()
        waiting = asyncio.create_task(Tool("waits", blocking).call({}))
        quick = await Tool("quick", lambda: "done").call({})
        assert (quick.text, waiting.done()) == ("done", False)
        go_on.set()
        assert (await waiting).text.endswith("shown True")

    asyncio.run(all_of_it())


def test_a_run_has_no_more_time_for_a_tool_than_for_itself() -> None:
    seen = asyncio.run(Tool("waits", lambda: threading.Event().wait(20)).call({}, within_s=0.05))
    assert (seen.ok, seen.text) == (False, "waits did not end within 0.05 s")


def test_a_coroutine_function_of_the_callers_loop_runs_there() -> None:
    async def where() -> bool:
        return asyncio.get_running_loop() is outer[0]

    async def both() -> list[str]:
        outer.append(asyncio.get_running_loop())
        return [(await Tool("t", where, in_callers_loop=here).call({})).text for here in (True, False)]

    outer: list[asyncio.AbstractEventLoop] = []
    assert asyncio.run(both()) == ["true", "false"]


def test_output_is_limited_and_says_so() -> None:
    seen = asyncio.run(Tool("talk", lambda: "x" * 10_000).call({}))
    assert seen.ok and seen.text.endswith("[cut: 10000 characters, 4000 shown]")
    assert len(seen.text) < OUTPUT_CHARS_MAX + 60


@pytest.mark.parametrize(
    ("result", "text"),
    [
        ("as it is", "as it is"),
        ({"a": [1, None]}, '{"a": [1, null]}'),
        (None, "null"),
        (float("nan"), "nan"),
        (b"b", "b'b'"),
    ],
)
def test_results_as_the_model_sees_them(result: Any, text: str) -> None:
    assert asyncio.run(Tool("say", lambda: result).call({})).text == text


@pytest.mark.parametrize(
    ("name", "function", "said"),
    [
        ("2fast", measure, "tool '2fast': a name is"),
        ("x", 5, "5 cannot be called"),
        ("x", lambda *parts: parts, "has no name to call it by"),
        ("x", lambda **parts: parts, "has no name to call it by"),
    ],
)
def test_a_function_that_no_model_could_call_is_refused(name: str, function: Any, said: str) -> None:
    with pytest.raises(BadSchema) as error:
        Tool(name, function)
    assert said in str(error.value)


def test_tools_by_name_or_by_themselves() -> None:
    assert list(tools_of({"caliper": measure})) == ["caliper"]
    assert list(tools_of([measure, get_current_time])) == ["measure", "get_current_time"]
    assert tools_of(None) == {}


def test_a_tool_does_not_hold_up_the_others() -> None:
    first, second = threading.Event(), threading.Event()

    def meet(mine: int) -> bool:
        (first, second)[mine].set()
        return (second, first)[mine].wait(20)

    async def both() -> list[str]:
        tool = Tool("meet", meet)
        return [seen.text for seen in await asyncio.gather(tool.call({"mine": 0}), tool.call({"mine": 1}))]

    assert asyncio.run(both()) == ["true", "true"]
