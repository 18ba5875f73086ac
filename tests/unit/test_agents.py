"""Agents: steps, tools, peers, schemas and limits, with a model that says what the test wrote down."""

from __future__ import annotations

import asyncio
import gc
import json
import threading
import time
from dataclasses import asdict
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edged.agents import Agent, AgentRegistry, Message, ModelConfig, NameTaken, RequestContext, RunLimits, Tool
from edged.agents.models import WAITING_MAX, LentModel, OwnEngine, Said, _where
from edged.agents.steps import read_step
from edged.engines.base import EngineOptions, Finished, GenerateRequest, NoTemplate, PromptTooLong, Token
from tests.support.bad_server import BadServer, chat, reply
from tests.support.scripted import Scripted, ask, call, final


def run(agent: Agent, request: Any, **more: Any) -> Message:
    return asyncio.run(agent.auto_run(request, **more))


def add(a: int, b: int) -> int:
    """Add two numbers."""
    return a + b


def test_a_run_calls_a_tool_and_answers() -> None:
    model = Scripted(call("add", a=2, b=3), final("5"))
    agent = Agent(model, "You add.", tools={"add": add})
    answer = run(agent, "What is 2 + 3?")
    assert (answer.role, answer.content, str(answer)) == ("assistant", "5", "5")
    first, second = model.asked
    assert first.messages[0].role == "system" and "You add." in first.messages[0].content
    assert "- add: Add two numbers." in first.messages[0].content
    assert [turn.role for turn in second.messages] == ["system", "user", "assistant", "user"]
    assert second.messages[-1].content == "result of add: 5"
    assert second.messages[: len(first.messages)] == first.messages, "what was read once is not read again"


def test_each_request_begins_a_conversation_of_its_own_where_that_is_asked_for() -> None:
    model = Scripted(call("add", a=2, b=3), final("5"), final("7"))
    agent = Agent(model, "You add.", tools={"add": add}, memory_type="single_request")
    run(agent, "What is 2 + 3?")
    run(agent, "What is 3 + 4?")
    assert [turn.role for turn in model.asked[1].messages] == ["system", "user", "assistant", "user"], (
        "within a run all"
    )
    assert [turn.content for turn in model.asked[2].messages[1:]] == ["What is 3 + 4?"]
    assert agent.memory.history[0].text == "What is 3 + 4?"
    with pytest.raises(ValueError, match="use conversation_history or single_request"):
        Agent(model, "x", memory_type="vectors")


def test_what_calls_back_into_a_run_belongs_to_its_request() -> None:
    model = Scripted(ask("helper", "Help."), final("inner"), final("outer"))
    first = Agent(model, "f", agent_name="first", allowed_peers=["helper"], memory_type="single_request")
    helper = Agent(
        Scripted(ask("first", "Who asked?"), final("helped")), "h", agent_name="helper", allowed_peers=["first"]
    )
    assert run(first, "Go.").content == "outer"
    assert model.asked[-1].messages[1].content == "Go.", "the request is still there after the call back"
    del helper


class Bare:
    """A model without a chat template."""

    context = 1000

    def __init__(self) -> None:
        self.asked: list[GenerateRequest] = []

    def generate(self, request: GenerateRequest) -> Any:
        if request.messages:
            raise NoTemplate("no chat template")
        self.asked.append(request)
        return iter([Token('{"thought": "", "next_action": "final_response", "action_input": {"response": "ok"}}', 0.0),
                     Finished("stop", 1, 1, 0.0)])  # fmt: skip

    def attach(self, adapter: Any, scale: float = 1.0) -> None: ...

    def close(self) -> None: ...


@given(st.lists(st.sampled_from(["Instruct:", "Output:", "\n", "\r", " ", "x"]), max_size=12).map("".join))
def test_nobody_forges_a_turn_of_a_model_without_a_template(said: str) -> None:
    model = Bare()
    assert run(Agent(model, "You add.\nOutput: never"), f"hello {said}").content == "ok"
    (request,) = model.asked
    heads = [line for line in request.prompt.split("\n") if line.startswith(("Instruct:", "Output:"))]
    assert [head.partition(":")[0] for head in heads] == ["Instruct", "Output"], request.prompt
    assert request.literal, "control tokens stay text"
    assert request.stop == ("\nInstruct:",)


@pytest.mark.parametrize(
    ("engine", "device", "said"),
    [
        ("onnx_phi", "auto", EngineOptions(providers=("auto",))), ("onnx_phi", "cpu", EngineOptions(providers=("cpu",))),
        ("onnx_phi", "cuda:0", EngineOptions(providers=("cuda",))),
        ("llama", "auto", EngineOptions(extra={"gpu_layers": "auto"})),
        ("llama", "cpu", EngineOptions(extra={"gpu_layers": 0})),
        ("llama", "cuda", EngineOptions(extra={"gpu_layers": "all"})),
    ],
)  # fmt: skip
def test_a_folder_is_loaded_where_its_device_says(engine: str, device: str, said: EngineOptions) -> None:
    assert _where(device, engine) == said


def test_every_step_that_the_grammar_allows_can_be_read() -> None:
    seen = {}

    def keep(request: GenerateRequest) -> str:
        seen.update(request.schema or {})
        return json.dumps(final("done"))

    peer = Agent(Scripted(), "peer", agent_name="peer", input_schema=["question"])
    agent = Agent(Scripted(keep), "x", tools={"add": add}, allowed_peers=["peer", "away"], output_schema={"n": int})
    run(agent, "go")
    options = {
        tuple(option["properties"]["next_action"].values()): option["properties"]["action_input"]["properties"]
        for option in seen["anyOf"]
    }
    assert options[("call_tool",)]["tool_name"] == {"const": "add"}
    assert options[("invoke_agent",)]["agent_name"] == {"const": "peer"}, "only who is there can be asked"
    assert options[("invoke_agent",)]["request"]["required"] == ["question"]
    assert options[("final_response",)]["response"]["required"] == ["n"]
    del peer


def test_a_bad_request_never_reaches_the_model() -> None:
    """A4."""
    model = Scripted(final({"answer": "yes"}))
    researcher = Agent(model, "r", input_schema=["sub_question"], output_schema=["answer"], agent_name="Researcher")
    orchestrator = Agent(
        Scripted(), "o", input_schema=["main_query"], agent_name="Orchestrator", allowed_peers=["Researcher"]
    )
    refused = asyncio.run(orchestrator.invoke_agent("Researcher", {"wrong_field": "value"}, RequestContext()))
    assert refused.role == "error" and refused.content.startswith("Request validation failed")
    assert "'sub_question' is a required property" in refused.content and model.asked == []
    assert run(researcher, {"wrong_field": "value"}).role == "error" and model.asked == []
    answer = asyncio.run(orchestrator.invoke_agent("Researcher", {"sub_question": "What?"}, RequestContext()))
    assert (answer.role, answer.content) == ("assistant", {"answer": "yes"})


def test_a_bad_answer_is_repaired_once_with_the_error_and_then_an_error() -> None:
    model = Scripted(final({"answer": 5}), final({"answer": "five"}))
    agent = Agent(model, "x", output_schema=["answer"])
    assert run(agent, "?").content == {"answer": "five"}
    assert "/answer: 5 is not of type 'string'" in model.asked[1].messages[-1].content
    stubborn = Agent(Scripted(final({"answer": 5}), final({"answer": 6})), "x", output_schema=["answer"])
    answer = run(stubborn, "?")
    assert answer.role == "error" and answer.content.startswith("Response validation failed")


def test_steps_that_cannot_be_read_are_said_to_be_wrong() -> None:
    model = Scripted("no json", {"next_action": "dance"}, {"next_action": "call_tool", "action_input": {}},
                     call("fly"), call("add", a="x"), final("done"))  # fmt: skip
    agent = Agent(model, "x", tools={"add": add})
    assert run(agent, "go").content == "done"
    told = [request.messages[-1].content for request in model.asked[1:]]
    assert (
        "is no JSON" in told[0] and "next_action is none of" in told[1] and "needs tool_name and arguments" in told[2]
    )
    assert "there is no tool 'fly'; there are: add" in told[3] and "its arguments are wrong" in told[4]


HALVES = st.text(st.characters(categories=["Cs", "Ll"]), max_size=3).map(lambda text: f"{text}\ud800")


@settings(max_examples=8)
@given(texts=st.lists(HALVES, min_size=6, max_size=6))
def test_halves_of_surrogate_pairs_end_no_run(texts: list[str]) -> None:
    """A file name as os.listdir gives it, what a server's model says, what somebody asks: whatever comes is kept, recorded
    and answered as Unicode."""
    name, failure, argument, request, response, key = texts
    kept, recorded = [], []

    def listed(folder: str) -> list[str]:
        kept.append(folder)
        return [name]

    def fails() -> None:
        raise OSError(failure)

    class Keeps:
        def record(self, execution: Any) -> str:
            recorded.append(json.dumps(asdict(execution), ensure_ascii=False, default=str).encode())
            return "1"

        def feedback(self, sample_id: str, feedback: Any) -> None: ...

    model = Scripted(call("listed", folder=argument), call("fails"), final({key: response}))
    agent = Agent(model, "x", [listed, fails], recorder=Keeps())
    answer = run(agent, {"q": request})
    assert answer.role == "assistant" and len(recorded) == 1
    json.dumps(answer.content, ensure_ascii=False).encode()
    "".join(kept).encode()
    json.dumps([message.to_dict() for message in agent.memory.history], ensure_ascii=False).encode()
    assert len(agent.memory.history) == 6
    assert "\ufffd" in model.asked[1].messages[-1].content and "OSError" in model.asked[2].messages[-1].content


def test_a_run_ends_after_its_steps() -> None:
    """A8."""
    agent = Agent(Scripted(*[call("add", a=1, b=1)] * 20), "x", tools={"add": add})
    answer = run(agent, "go", max_steps=3)
    assert answer.role == "error" and "no final response within 3 steps" in answer.content
    for steps in (0, 51):
        with pytest.raises(ValueError, match=r"limits\.steps_max"):
            run(agent, "go", max_steps=steps)


def test_tokens_of_a_run_are_limited() -> None:
    model = Scripted(*[call("add", a=1, b=1)] * 20, tokens=40)
    agent = Agent(model, "x", tools={"add": add}, limits=RunLimits(tokens_max=100), max_tokens=64)
    answer = run(agent, "go")
    assert answer.role == "error" and "has used its 100 tokens" in answer.content
    assert [request.tokens_max for request in model.asked] == [64, 60, 20]


def test_the_time_of_a_run_is_limited_also_while_the_model_speaks() -> None:
    def slow(request: GenerateRequest) -> str:
        while not request.halt():
            time.sleep(0.005)
        return json.dumps(final("late"))

    answer = run(Agent(Scripted(slow), "x", limits=RunLimits(seconds_max=0.1)), "go")
    assert answer.role == "error" and "its time is over (0.1 s at most)" in answer.content


def test_the_time_of_a_run_is_limited_also_while_a_tool_works() -> None:
    go_on, ended = threading.Event(), list[bool]()
    model = Scripted(call("waits"), final("late"))
    tools = {"waits": lambda: ended.append(go_on.wait(20))}
    answer = run(Agent(model, "x", tools=tools, limits=RunLimits(seconds_max=0.3)), "go")
    assert answer.role == "error" and "its time is over (0.3 s at most)" in answer.content
    assert ended == [] and len(model.asked) == 1
    go_on.set()


def test_an_agent_whose_tool_blocks_the_thread_goes_on_and_so_do_the_others() -> None:
    """Also when the tool says that it does not block."""
    go_on = threading.Event()

    async def measure() -> bool:
        return go_on.wait(20)

    tool = Tool("measure", measure, seconds_max=0.3)
    model = Scripted(call("measure"), lambda request: json.dumps(final(request.messages[-1].content)))
    stuck, other = Agent(model, "x", tools={"measure": tool}), Agent(Scripted(final("I am here")), "x")

    async def both() -> list[Message]:
        return await asyncio.gather(stuck.auto_run("go"), other.auto_run("Are you there?"))

    answers = asyncio.run(both())
    assert not go_on.is_set(), "nobody waited for it to end"
    assert [answer.content for answer in answers] == ["error of measure: measure did not end within 0.3 s", "I am here"]
    go_on.set()


def test_a_run_can_be_cancelled() -> None:
    speaking = threading.Event()

    def endless(request: GenerateRequest) -> str:
        speaking.set()
        while not request.halt():
            time.sleep(0.005)
        return ""

    agent = Agent(Scripted(endless, final("next")), "x")

    async def both() -> Message:
        task = asyncio.create_task(agent.auto_run("go"))
        await asyncio.to_thread(speaking.wait, 20)
        assert agent.cancel()
        return await task

    answer = asyncio.run(both())
    assert answer.role == "error" and "was cancelled" in answer.content
    assert not agent.cancel(), "nothing runs any more"
    assert run(agent, "again").content == "next"


def test_only_allowed_peers_that_are_there_are_asked() -> None:
    """A7."""
    agent = Agent(Scripted(), "x", agent_name="asker", allowed_peers=["gone", "friend"])
    friend = Agent(Scripted(final("hello")), "f", agent_name="friend")
    stranger = Agent(Scripted(final("secret")), "s", agent_name="stranger")
    assert (
        "may not invoke 'stranger'; its allowed_peers: friend, gone"
        in asyncio.run(agent.invoke_agent("stranger", "x")).content
    )
    assert "no agent 'gone' is registered" in asyncio.run(agent.invoke_agent("gone", "x")).content
    assert asyncio.run(agent.invoke_agent("friend", "x")).content == "hello"
    del friend, stranger


def test_agents_that_ask_each_other_without_end_are_stopped() -> None:
    """A9."""
    limits = RunLimits(depth_max=5)
    one = Agent(Scripted(*[ask("two", "your turn")] * 50), "x", agent_name="one", allowed_peers=["two"], limits=limits)
    two = Agent(Scripted(*[ask("one", "your turn")] * 50), "x", agent_name="two", allowed_peers=["one"], limits=limits)
    answer = asyncio.run(asyncio.wait_for(one.auto_run("go", max_steps=2), 60))
    assert answer.role == "error"
    said = "\n".join(turn.content for agent in (one, two) for request in agent.model.asked for turn in request.messages)  # type: ignore[attr-defined]
    assert "agents wait for one another, at most 5 may (one > two > one" in said


def test_an_agent_that_asks_again_and_again_is_stopped_by_the_count() -> None:
    context = RequestContext(interaction_count=32)
    peer = Agent(Scripted(final("x")), "p", agent_name="much-asked")
    agent = Agent(Scripted(), "x", allowed_peers=["much-asked"])
    answer = asyncio.run(agent.invoke_agent("much-asked", "x", context))
    assert answer.role == "error" and "33 calls between agents, at most 32" in answer.content
    del peer


def test_names_are_unique_until_the_agent_is_gone() -> None:
    """A6."""
    first = Agent(Scripted(final("first")), "x", agent_name="only-one")
    with pytest.raises(NameTaken, match="'only-one' is registered already"):
        Agent(Scripted(), "x", agent_name="only-one")
    assert AgentRegistry.get("only-one") is first
    del first
    gc.collect()
    assert AgentRegistry.get("only-one") is None
    second = Agent(Scripted(), "x", agent_name="only-one")
    generated = Agent(Scripted(), "x")
    assert generated.name.startswith("Agent-") and AgentRegistry.get(generated.name) is generated
    with pytest.raises(ValueError, match="use 1 to 64"):
        Agent(Scripted(), "x", agent_name="a b")
    del second


def test_the_name_of_an_agent_that_only_a_circle_of_references_holds_is_free() -> None:
    gc.disable()
    try:
        first = Agent(Scripted(), "x", agent_name="circular")
        first.itself = first  # type: ignore[attr-defined]
        del first
        assert AgentRegistry.get("circular") is not None
        second = Agent(Scripted(), "x", agent_name="circular")
        assert AgentRegistry.get("circular") is second
    finally:
        gc.enable()


def test_an_agent_remembers_from_one_run_to_the_next() -> None:
    model = Scripted(final("Hello."), final("Blue."))
    agent = Agent(model, "x")
    run(agent, "Hi there! My favorite color is blue.")
    assert run(agent, "What was my favorite color?").content == "Blue."
    assert "favorite color is blue" in model.asked[1].messages[1].content


def test_a_conversation_longer_than_the_context_goes_on() -> None:
    def picky(request: GenerateRequest) -> str:
        if sum(len(turn.content) for turn in request.messages[1:]) > 400:
            raise PromptTooLong("the prompt has 500 tokens, the context 400")
        return json.dumps(final("ok"))

    agent = Agent(Scripted(*[picky] * 60), "x")
    for number in range(12):
        assert run(agent, f"message {number} " + "x" * 60).content == "ok"
    alone = run(agent, "y" * 500)
    assert alone.role == "error" and "500 tokens" in alone.content
    assert run(agent, "and on").content == "ok"


def test_an_answer_that_the_end_of_the_context_cut_off_is_asked_for_again_with_less_shown() -> None:
    def full(request: GenerateRequest) -> Any:
        if len(request.messages) > 3:
            return Said('{"thought": "and th', Finished("truncated", 90, 10, -0.1))
        return json.dumps(final("ok"))

    agent = Agent(Scripted(*[full] * 20), "x", max_tokens=64)
    for number in range(4):
        assert run(agent, f"message {number}").content == "ok"
    assert "Earlier messages of this conversation are left out" in agent.model.asked[-1].messages[1].content  # type: ignore[attr-defined]
    # Where its own limit cut it off, or nothing can be left out, it is an error.
    for used in (10, 9):
        cut = Said("{", Finished("truncated", 90, used, -0.1))
        lone = Agent(Scripted(lambda _request, cut=cut: cut), "x", max_tokens=10)
        assert "was cut off" in run(lone, "?").content


def test_a_swap_between_two_steps_is_not_noticed() -> None:
    class Swapped:
        """Another model from the second request on."""

        def __init__(self) -> None:
            self.lent_out = 0

        def lent(self, halt: Any = None) -> Any:
            from contextlib import nullcontext

            self.lent_out += 1
            return nullcontext((Speaker(self.lent_out), f"phi@1.{self.lent_out}", ""))

    class Speaker:
        context = 100

        def __init__(self, number: int) -> None:
            self.number = number

        def generate(self, request: GenerateRequest) -> Any:
            from edged.engines.base import Token

            step = call("add", a=1, b=1) if self.number == 1 else final(f"from {self.number}")
            yield Token(json.dumps(step), -0.1)
            yield Finished("stop", 1, 1, -0.1)

    assert run(Agent(LentModel(Swapped()), "x", tools={"add": add}), "go").content == "from 2"


def test_one_generation_at_a_time_first_come_first_served() -> None:
    order: list[str] = []
    at_work = threading.Lock()

    class One:
        context = 100

        def generate(self, request: GenerateRequest) -> Any:
            from edged.engines.base import Token

            assert at_work.acquire(blocking=False), "two generations at once"
            order.append(request.messages[-1].content)
            time.sleep(0.02)
            at_work.release()
            yield Token(json.dumps(final("x")), -0.1)
            yield Finished("stop", 1, 1, -0.1)

    class Lessor:
        def lent(self, halt: Any = None) -> Any:
            from contextlib import nullcontext

            return nullcontext((One(), "one@1.0", ""))

    model = LentModel(Lessor())
    agents = [Agent(model, "") for _ in range(6)]

    async def all_at_once() -> None:
        tasks = []
        for number, agent in enumerate(agents):
            tasks.append(asyncio.create_task(agent.auto_run(f"{number}")))
            await asyncio.sleep(0.005)
        assert all(answer.content == "x" for answer in await asyncio.gather(*tasks))

    asyncio.run(all_at_once())
    assert order == [f"{number}" for number in range(6)]


def test_those_who_wait_for_a_slow_model_keep_nobody_from_another_and_are_so_many_at_most() -> None:
    begun, go_on = threading.Event(), threading.Event()

    class Slow:
        context = 100

        def generate(self, request: GenerateRequest) -> Any:
            from edged.engines.base import Token

            begun.set()
            go_on.wait(60)
            yield Token(json.dumps(final("x")), -0.1)
            yield Finished("stop", 1, 1, -0.1)

    slow = LentModel(OwnEngine(Slow(), "slow@1.0"))  # type: ignore[arg-type]
    agents = [Agent(slow, "") for _ in range(WAITING_MAX + 3)]

    async def all_at_once() -> list[Message]:
        runs = [asyncio.create_task(agent.auto_run("go")) for agent in agents]
        try:
            await asyncio.to_thread(begun.wait, 60)
            other = Agent(Scripted(final("at once")), "")
            assert (await asyncio.wait_for(other.auto_run("go"), 60)).text == "at once"
            while sum(run.done() for run in runs) < 2:  # for whom there is no room
                await asyncio.sleep(0.01)
        finally:
            go_on.set()
        return await asyncio.gather(*runs)

    answers = [answer.text for answer in asyncio.run(asyncio.wait_for(all_at_once(), 120))]
    assert answers.count("x") == WAITING_MAX + 1
    assert sum(f"{WAITING_MAX} requests wait for this model already" in answer for answer in answers) == 2


def test_what_a_model_cannot_answer_is_an_error_message() -> None:
    cut = Said("{", Finished("truncated", 1, 5, -0.1))
    answer = run(Agent(Scripted(lambda _: cut), "x"), "go")  # type: ignore[arg-type,return-value]
    assert answer.role == "error" and "was cut off" in answer.content
    assert "the script is over" in run(Agent(Scripted(), "x"), "go").content


@pytest.mark.parametrize(
    ("text", "value"),
    [('```json\n{"next_action": "final_response", "action_input": {"response": "a"}}\n```', "a"),
     ('{"thought": 5, "next_action": "final_response", "action_input": {"response": {"b": 1}}}', {"b": 1})],
)  # fmt: skip
def test_steps_of_models_elsewhere(text: str, value: Any) -> None:
    assert read_step(text).value == value


def test_each_key_and_each_address_is_a_model_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(**config: Any) -> bytes:
        with BadServer(reply(200, chat(json.dumps(final("x"))))) as server:
            monkeypatch.setenv("OPENAI_BASE_URL", server.url)
            for key in ("sk-one", "sk-two"):
                agent = Agent(ModelConfig(type="api", name="large", api_key=key, **config), "x")
                assert run(agent, "?").content == "x"
            return b"".join(request for _, request in server.requests)

    for _ in range(2):  # another server each time
        said = asked()
        assert said.count(b"Bearer sk-one\r\n") == said.count(b"Bearer sk-two\r\n") == 1


def test_a_model_configuration_says_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="needs a model"):
        Agent(description="x")
    with pytest.raises(ValueError, match="type"):
        ModelConfig(type="magic", name="x")  # type: ignore[arg-type]
    from edged.engines.base import EngineError

    with pytest.raises(EngineError, match=r"local model 'nowhere': not one of the daemon's slots .*release.json"):
        Agent(ModelConfig(type="local", name="nowhere"), "x")
    with pytest.raises(EngineError, match=r"provider 'anthropics' .* set base_url"):
        Agent(ModelConfig(type="api", name="x", provider="anthropics"), "x")
