"""The documented examples of agents, one by one, with nothing changed but their import lines (agent_examples.txt).

A cloud's model is a server on loopback that says what the test wrote down, asked over real sockets; a local one is a slot
of the daemon. What an example shows as comments is run too.
"""

from __future__ import annotations

import ast
import asyncio
import hashlib
import inspect
import json
import re
import textwrap
import typing
from abc import ABC
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pydantic import BaseModel

import edged.agents as ours
from edged.agents import AgentRegistry, GuildBuilder, Message, ModelConfig, RequestContext
from edged.agents.models import offer_slot
from edged.engines.base import EngineError, Finished, GenerateRequest, Token
from tests.support.bad_server import BadServer, chat, reply
from tests.support.scripted import Scripted, ask, call, final

SOURCE = (Path(__file__).parent / "agent_examples.txt").read_text()
EXAMPLES: dict[str, str] = {
    name.strip(): code for name, _, code in (part.partition("\n") for part in SOURCE.split("=== ")[1:])
}
# Of the documents' blocks of Python in their order, each behind its name, without the lines that import the originals.
AS_DOCUMENTED = "969a3a692994b1cb14d2e2baa054adf97884673eb0413e7f718831c682e0d223"
# Names that the examples use and never import.
ASSUMED = {name: getattr(typing, name) for name in ("Any", "Dict", "List", "Optional", "Union")} | {
    "ABC": ABC, "BaseAgent": ours.BaseAgent, "BaseModel": BaseModel, "LogLevel": ours.LogLevel, "Orchestra": ours.Orchestra,
    "PyTorchAgentProps": ours.PyTorchAgentProps, "json": json, "ModelConfig": ModelConfig, "Agent": ours.Agent,
    "GenerationPromptResponse": ours.GenerationPromptResponse,
}  # fmt: skip


def uncommented(code: str) -> str:
    """With what stands in comments at the left edge as code; prose begins with a capital letter."""
    return re.sub(r"^#(?! [A-Z]) ?(.*)$", r"\1", code, flags=re.MULTILINE)


def run(name: str, **given: Any) -> dict[str, Any]:
    """Run an example, with what it assumes is there; answers its names."""
    code = compile(uncommented(EXAMPLES[name]), name, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    names = ASSUMED | given
    waits = eval(code, names)
    if inspect.iscoroutine(waits):
        asyncio.run(waits)
    return names


@contextmanager
def cloud(*steps: Any, model: str = "gpt-4-turbo") -> Iterator[BadServer]:
    """The provider's server: it says these steps, one after the other. A pair names another model."""
    named = [step if isinstance(step, tuple) else (model, step) for step in steps]
    acts = [reply(200, chat(json.dumps(step), model=name)) for name, step in named]
    with BadServer(*acts, reply(500, b"the script is over")) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_BASE_URL", server.url)
        patch.setenv("OPENAI_API_KEY", "sk-from-the-environment")
        yield server


def questions(server: BadServer) -> list[dict[str, Any]]:
    """What the server was asked."""
    return [json.loads(request.partition(b"\r\n\r\n")[2]) for _, request in server.requests]


class Slot:
    """A slot of the daemon whose model says one thing."""

    def __init__(self, text: str) -> None:
        self.text, self.asked = text, list[GenerateRequest]()

    @contextmanager
    def lent(self, halt: Any = None) -> Any:
        yield self, "small@1.0", ""

    def generate(self, request: GenerateRequest) -> Any:
        self.asked.append(request)
        yield Token(self.text, -0.1)
        yield Finished("stop", 1, 1, -0.1)


@contextmanager
def slot(name: str, text: str) -> Iterator[Slot]:
    made = Slot(text)
    offer_slot(name, made)  # type: ignore[arg-type]
    try:
        yield made
    finally:
        offer_slot(name, None)


def test_base_learnable_agent_has_this_signature() -> None:
    made = ast.parse(EXAMPLES["base_learnable_agent"].rstrip() + ":\n        ...").body[1]
    assert isinstance(made, ast.ClassDef) and isinstance(made.body[0], ast.FunctionDef)
    shown = made.body[0].args
    defaults = [ast.literal_eval(each) for each in shown.defaults]
    signature = inspect.signature(ours.BaseLearnableAgent.__init__).parameters
    assert list(signature) == [*(each.arg for each in shown.args), "kwargs"]
    assert [signature[each.arg].default for each in shown.args[-len(defaults) :]] == defaults
    assert [base.id for base in made.bases if isinstance(base, ast.Name)] == [
        each.__name__ for each in ours.BaseLearnableAgent.__bases__
    ]


def test_learnable_agent() -> None:
    def search_function(query: str) -> str:
        """Search."""
        return f"found {query}"

    local_llm = Scripted(call("search", query="x"), final("found it"))
    agent = run("learnable_agent", local_llm=local_llm, search_function=search_function)["agent"]
    assert agent is AgentRegistry.get("MyLearnableAgent")
    assert (agent.peft_config.r, agent.peft_config.target_modules) == (16, ("q_proj", "v_proj"))
    assert asyncio.run(agent.auto_run("?")).content == "found it"
    assert "result of search: found x" in local_llm.asked[1].messages[-1].content


def test_peft_configuration() -> None:
    names = run("peft_configuration", local_model=Scripted(), LearnableAgent=ours.LearnableAgent)
    assert names["agent"].learning_head_config == names["learning_head_config"]


def test_a_topology_of_a_learnable_agent() -> None:
    with slot("mistralai/Mistral-7B-v0.1", json.dumps(final("Line 3 divides by zero."))) as model:
        result = run("topology")["result"]
    assert (str(result), result.ok) == ("Line 3 divides by zero.", True)
    assert "1. CodeReviewer: done" in result.trace_text
    assert model.asked[0].messages[-1].content == "Review this Python code for bugs"


def test_a_local_model_that_is_not_there_is_named() -> None:
    with pytest.raises(EngineError, match=r"local model 'mistralai/Mistral-7B-v0\.1': not one of the daemon's slots"):
        run("topology")


def test_a_basic_agent(capsys: pytest.CaptureFixture[str]) -> None:
    with cloud(final("I am your assistant.")) as server:
        run("basic_agent")
    assert capsys.readouterr().out == "I am your assistant.\n"
    (asked,) = questions(server)
    assert (asked["model"], asked["temperature"], asked["max_tokens"]) == ("gpt-4-turbo", 0.7, 1500)
    assert b"Bearer sk-from-the-environment" in server.requests[0][1]
    assert asked["messages"][1] == {"role": "user", "content": "Hello, who are you?"}


def test_an_agent_with_tools(capsys: pytest.CaptureFixture[str]) -> None:
    steps = call("get_current_time_tool", timezone="UTC"), final("It is noon.")
    with cloud(*steps, *steps) as server:
        names = run("agent_with_tools")
        run("tool_usage", **{"researcher_agent": names["researcher_agent"]})
    assert capsys.readouterr().out == "It is noon.\n" * 2
    asked = questions(server)
    assert (
        "Returns the current date and time, optionally for a specific timezone." in asked[0]["messages"][0]["content"]
    )
    assert "The current date and time is: " in asked[1]["messages"][-1]["content"]


def fits(agent: Any, request: Any, response: Any) -> Message:
    """What the agent answers to a request when its model gives this response."""
    with cloud(final(response), final(response), model="gpt-4o"):
        agent.model = ours.Agent(ModelConfig(type="api", provider="openai", name="gpt-4o"), "x").model
        return asyncio.run(agent.auto_run(request))


def test_a_schema_as_a_list() -> None:
    agent = run("schema_list")["researcher_agent"]
    assert fits(agent, {"sub_question": "What?"}, {"answer": "That."}).content == {"answer": "That."}
    assert fits(agent, {"wrong_field": "value"}, {"answer": "That."}).role == "error"
    assert fits(agent, {"sub_question": "What?"}, {"answer": 5}).role == "error"


def test_a_schema_of_types() -> None:
    agent = run("schema_types")["synthesizer_agent"]
    request = {"user_query": "q", "validated_data": [1, "two"], "priority": 3}
    assert fits(agent, request, {"report": "r", "confidence": 0.9}).content == {"report": "r", "confidence": 0.9}
    assert fits(agent, request | {"priority": "high"}, {"report": "r", "confidence": 0.9}).role == "error"
    assert fits(agent, request, {"report": "r", "confidence": "high"}).role == "error"


def test_a_json_schema() -> None:
    agent = run("schema_json")["advanced_agent"]
    request = {"document": "long enough a text", "metadata": {"source": "s", "timestamp": 5}}
    whole = {"summary": "It says so.", "key_points": ["one"]}
    assert fits(agent, request, whole).content == whole
    assert fits(agent, request | {"document": "short"}, whole).role == "error"
    assert fits(agent, request | {"metadata": {}}, whole).role == "error"
    assert fits(agent, request, whole | {"key_points": []}).role == "error"


def test_schemas_in_practice() -> None:
    answers: list[Message] = []

    class Watched(ours.Agent):
        async def invoke_agent(self, *given: Any, **more: Any) -> Message:
            answers.append(await super().invoke_agent(*given, **more))
            return answers[-1]

    config = ModelConfig(type="api", provider="openai", name="gpt-4o")
    with cloud(final({"answer": "Learning from data."}), model="gpt-4o") as server:
        given = {"model_config": config, "request_context": RequestContext(), "Agent": Watched}
        result = run("schema_in_practice", **given)["result"]
    works, fails = answers
    assert (works.role, works.content) == ("assistant", {"answer": "Learning from data."})
    assert fails is result and result.role == "error" and result.content.startswith("Request validation failed")
    assert len(server.requests) == 1, "the wrong request never reached the model"


def test_a_custom_agent(capsys: pytest.CaptureFixture[str]) -> None:
    with cloud() as server:
        run("custom_agent")
    assert capsys.readouterr().out == "Custom agent CustomBot processed: Hello custom agent!\n"
    assert server.requests == [], "its own _run answers"


def test_auto_run(capsys: pytest.CaptureFixture[str]) -> None:
    summarizer = ours.Agent(Scripted(final("Smaller models.")), "I summarize.", agent_name="SummarizerAgent")
    model = Scripted(ask("SummarizerAgent", "the trends"), final("In 2025: smaller models."))
    assistant = ours.Agent(model, "I help.", allowed_peers=["SummarizerAgent"])
    run("auto_run", assistant_agent=assistant)
    assert capsys.readouterr().out == "Final response from auto_run: In 2025: smaller models.\n"
    assert "Smaller models." in model.asked[1].messages[-1].content
    del summarizer


def test_one_agent_asks_another(capsys: pytest.CaptureFixture[str]) -> None:
    with cloud(
        ask("ResearcherAgent", "quantum computing"), final("1000 qubits"), final("They have 1000 qubits.")
    ) as server:
        run("inter_agent")
    assert capsys.readouterr().out == "They have 1000 qubits.\n"
    assert [asked["messages"][0]["content"].splitlines()[0] for asked in questions(server)] == [
        "I coordinate tasks and can talk to other agents.", "I find information.",
        "I coordinate tasks and can talk to other agents.",
    ]  # fmt: skip
    assert "1000 qubits" in questions(server)[2]["messages"][-1]["content"]


def test_the_description_is_the_system_prompt() -> None:
    with cloud(final("Use a context manager.")) as server:
        names = run("description")
        assert asyncio.run(names["code_reviewer_agent"].auto_run("open('x')")).content == "Use a context manager."
    assert questions(server)[0]["messages"][0]["content"].startswith(names["code_reviewer_description"].strip())


def test_the_registry(capsys: pytest.CaptureFixture[str]) -> None:
    with cloud():
        run("registry")
    assert capsys.readouterr().out == "Agent 'MyHelperAgent' is registered and retrieved.\n"


def test_memory(capsys: pytest.CaptureFixture[str]) -> None:
    with cloud(final("Hi."), final("Blue."), model="gpt-4.1-mini") as server:
        run("memory")
    assert capsys.readouterr().out == "Response 1: Hi.\nResponse 2: Blue.\n"
    assert "My favorite color is blue." in questions(server)[1]["messages"][1]["content"]


def test_composition(capsys: pytest.CaptureFixture[str]) -> None:
    with cloud(
        ask("ResearchWriterAgent", "draft"), final("A draft."), ask("EditorAgent", "A draft."),
        ("gpt-4.1-mini", final("A fine text.")), final("A fine text."),
    ):  # fmt: skip
        run("composition")
    assert capsys.readouterr().out == "--- Final Article ---\nA fine text.\n"


@pytest.mark.parametrize(
    ("example", "mine"),
    [
        ("phi_configuration", ours.PhiAgentProps),
        ("phi_request", ours.GenerationPromptRequest),
        ("phi_response", ours.GenerationPromptResponse),
    ],
)
def test_the_phi_agents_messages_have_these_fields(example: str, mine: type[BaseModel]) -> None:
    """P1, P3."""
    shown = run(example)[mine.__name__]
    for name, field in shown.model_fields.items():
        if name in shown.__annotations__:
            assert (mine.model_fields[name].annotation, mine.model_fields[name].default) == (
                field.annotation, field.default,
            )  # fmt: skip
    needed = {name for name, field in mine.model_fields.items() if field.is_required()}
    assert needed == {name for name, field in shown.model_fields.items() if field.is_required()}


@pytest.mark.parametrize("gpu", [True, False])
def test_where_a_phi_agents_model_runs(gpu: bool) -> None:
    """P2. The document's default is decided when the class is made; here "auto" is, when the model is loaded."""
    torch = SimpleNamespace(cuda=SimpleNamespace(is_available=lambda: gpu))
    shown = run("phi_device", torch=torch, BaseAgentProps=BaseModel)["PyTorchAgentProps"]
    assert list(shown.model_fields) == list(ours.PyTorchAgentProps.model_fields) == ["torch_device"]
    assert ours.PyTorchAgentProps(**shown().model_dump()).torch_device == ("cuda" if gpu else "cpu")
    assert ours.PyTorchAgentProps().torch_device == "auto"
    assert issubclass(ours.PhiAgentProps, ours.PyTorchAgentProps)


def test_the_phi_agent_in_a_guild() -> None:
    """P4."""
    builder = GuildBuilder()
    spec = run("phi_agent", guild_builder=builder)["phi_agent_spec"]
    assert (spec.id, spec.name, spec.properties.torch_device) == ("phi_agent", "Phi-2 LLM", "cuda:0")
    with pytest.raises(EngineError, match=r"model_id 'microsoft/phi-2': .*nothing is downloaded here"):
        builder.launch()

    async def send() -> Any:
        async with builder.launch() as client:
            names = ASSUMED | {"client": client}
            exec(EXAMPLES["phi_asked"], names)
            return names["request"], await client.receive()

    with slot("microsoft/phi-2", " more heads than one.") as model:
        request, response = asyncio.run(send())
    assert type(response) is ours.GenerationPromptResponse
    assert response.generation_prompt == request.generation_prompt == model.asked[0].prompt
    assert response.generated_response == " more heads than one."
    assert response.confidence == pytest.approx(0.9, abs=0.01)
    assert AgentRegistry.get("phi_agent") is None


def test_a_phi_agents_answer() -> None:
    made = eval(textwrap.dedent(EXAMPLES["phi_answered"]), ASSUMED)
    assert set(made.model_dump(exclude_none=True)) == {"generation_prompt", "generated_response"}


def test_the_examples_are_the_documents_own() -> None:
    """Word for word, but for the lines that import what is ours here."""
    text = re.sub(r"^from edged\.agents import .*\n", "", SOURCE, flags=re.MULTILINE)
    assert hashlib.sha256(text.encode()).hexdigest() == AS_DOCUMENTED


def test_every_example_has_its_test() -> None:
    tests = Path(__file__).read_text()
    assert [name for name in EXAMPLES if f'"{name}"' not in tests] == []
