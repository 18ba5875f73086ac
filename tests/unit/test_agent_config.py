"""`[agents.NAME]` and `[peers.NAME]`: what is refused and in which words, what `edged check` finds, what they become."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema_specifications import REGISTRY

from edged.agents import Agent, AgentRegistry, LearnableAgent, PhiAgent
from edged.agents.building import BadAgent, build
from edged.agents.memory import MemoryManager
from edged.agents.models import offer_slot
from edged.agents.recorded import StoreRecorder
from edged.check_agents import agents
from edged.clock import SystemClock
from edged.config import ConfigError, Settings, load
from edged.config_agents import Agent as AgentConfig
from edged.config_agents import form
from edged.engines import token_mask
from edged.findings import Look
from edged.outgoing import Outgoing
from edged.reload import Refused, decide
from edged.stamp import Stamp
from edged.store import Store
from tests.support.device import toml
from tests.support.models import write_manifest
from trainer.releases import build_manifest

BASE: dict[str, Any] = {"device": {"id": "dev1"}, "slots": {"tongue": {"threads": 1}}}
MODULE = '''
from edged.agents import Agent

def count(part: int) -> int:
    """How many scratches a part has."""
    return 3

def anything(*values):
    return values

class Shy(Agent):
    def __init__(self, model, agent_name, description, tools, output_schema, limits, max_tokens):
        raise RuntimeError("no")

def nameless(**given):
    return Agent(given["model"])

def broken(**given):
    raise RuntimeError("no such sensor")
'''


@pytest.fixture
def modules(tmp_path: Path) -> Iterator[str]:
    """The name of a module beside the configuration file."""
    folder = tmp_path / "modules"
    folder.mkdir()
    name = f"plant_{tmp_path.name}"
    (folder / f"{name}.py").write_text(MODULE)
    before = list(sys.path)
    yield name
    sys.path[:] = before


def settings(tmp_path: Path, **more: Any) -> Settings:
    path = tmp_path / "edged.toml"
    path.write_text(toml(BASE | more))
    return load(path)


@pytest.mark.parametrize(
    ("tables", "said"),
    [
        ({"agents": {"a": {"slot": "eye"}}}, r"agents.a.slot='eye': no such slot; add \[slots.eye\] \(known: tongue\)"),
        ({"agents": {"a": {"slot": "tongue", "tool": []}}}, "agents.a.tool is no known key"),
        ({"agents": {"a": {"slot": "tongue", "factory": "magic"}}}, "factory = 'magic': write one of agent, learnable, phi"),
        ({"agents": {"a": {"slot": "tongue", "tools": ["count"]}}}, r"agents.a.tools.0 = 'count': String should match"),
        ({"agents": {"a": {"slot": "tongue", "tools": ["x:count", "y:count"]}}}, "two of them are called 'count'"),
        ({"agents": {"a": {"slot": "tongue", "max_steps": 60}}}, "max_steps 60 is more than limits.steps_max 50"),
        ({"agents": {"a": {"slot": "tongue", "limits": {"seconds_max": 0}}}}, "seconds_max = 0: Input should be greater"),
        ({"agents": {"a": {"slot": "tongue", "input_schema": {"type": "string", "part": "integer"}}}},
         "'type' makes it a JSON Schema, and 'part' reads as a field"),
        ({"agents": {"a": {"slot": "tongue", "input_schema": {"type": "string", "title": "string"}}}}, "'title' reads as"),
        ({"peers": {"p": {"device": "d", "agent": "x", "output_schema": {"enum": ["a"], "why": "b"}}}}, "'why' reads as"),
        ({"agents": {"a": {"slot": "tongue", "output_schema": {"n": "text"}}}}, "field 'n' is 'text'; use string, integer"),
        ({"agents": {"a": {"slot": "tongue", "allowed_peers": ["b"]}}},
         r"allowed_peers: 'b' is no agent here; add \[agents.b\], or \[peers.b\] for one of another device \(known: a\)"),
        ({"agents": {"a": {"slot": "tongue", "callers": ["dev1"]}}}, "agents.a.callers: 'dev1' is this device"),
        ({"agents": {"a": {"slot": "tongue"}}, "peers": {"a": {"device": "d", "agent": "x"}}}, "agents.a has this name too"),
        ({"peers": {"p": {"device": "d"}}}, "peers.p.agent is missing: add it"),
        ({"peers": {"p": {"device": "d", "agent": "x", "deadline_s": 0}}}, "deadline_s = 0: Input should be greater"),
    ],
)  # fmt: skip
def test_what_cannot_be_meant_is_named_with_its_fix(tmp_path: Path, tables: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings(tmp_path, **tables)


def test_schemas_are_written_in_three_forms() -> None:
    whole = {"type": "object", "properties": {"n": {"type": "integer"}}}
    assert form(["a"]) == ["a"] and form(None) is None and form(whole) is whole
    assert form({"n": "integer", "t": "string"}) == {"n": int, "t": str}


def test_every_word_of_json_schema_is_known() -> None:
    """A word that the metaschema has may stand in a schema; each of its vocabularies is asked."""
    words = {"type", "const", "default"}
    for vocabulary in REGISTRY.contents("https://json-schema.org/draft/2020-12/schema")["allOf"]:
        words |= set(REGISTRY.contents(f"https://json-schema.org/draft/2020-12/{vocabulary['$ref']}")["properties"])
    assert {"minLength", "$dynamicRef", "contentSchema", "deprecated", "format"} <= words
    schema = dict.fromkeys(sorted(words), 1) | {"x-of-the-plant": 1}
    assert AgentConfig(slot="tongue", input_schema=schema).input_schema == schema


def found(tmp_path: Path, **more: Any) -> list[tuple[str, str, str]]:
    look = Look(settings(tmp_path, **more), 0.0, tmp_path / "edged.toml", {}, None, False)
    return [(finding.level, finding.name, finding.text) for finding in agents(look)]


def test_check_finds_what_is_wrong_before_the_daemon_does(tmp_path: Path, modules: str, toy: Path) -> None:
    whole = {"slot": "tongue", "tools": [f"{modules}:count"], "output_schema": ["verdict"]}
    assert found(tmp_path, agents={"a": whole}) == [
        ("ok", "agents.a", "edged.agents:Agent on slot tongue, tools count")
    ]
    for changes, said in (
        ({"tools": ["nowhere:count"]}, "agents.a.tools = 'nowhere:count': module nowhere cannot be imported (Mod"),
        ({"tools": [f"{modules}:coun"]}, "has no callable 'coun'; it has: Agent, Shy, anything, broken, count, nameless"),
        ({"tools": [f"{modules}:anything"]}, "parameter *values has no name to call it by"),
        ({"input_schema": {"type": "nonsense"}}, "agents.a.input_schema/type: 'nonsense' is not valid"),
        ({"factory": f"{modules}:Shy"}, "cannot be called as an agent is made: got an unexpected keyword argument 'memory'"),
    ):  # fmt: skip
        ((level, name, text),) = found(tmp_path, agents={"a": whole | changes})
        assert (level, name) == ("error", "agents.a") and said in text, text
    eye = {"slots": {"eye": {"seed": toy}}, "agents": {"a": {"slot": "eye"}}}
    ((level, _, text),) = found(tmp_path, **eye)
    assert (
        level == "error" and "its seed toy@1.0 is of kind detect; an agent needs a slot with a language model" in text
    )
    peer = {"p": {"device": "d", "agent": "x", "output_schema": {"type": "nonsense"}}}
    assert found(tmp_path, peers=peer)[0][:2] == ("error", "peers.p")
    assert found(tmp_path) == []


def test_check_says_when_an_onnx_model_cannot_be_held_to_steps(
    tmp_path: Path, modules: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    seed = tmp_path / "phi"
    seed.mkdir()
    (seed / "model").write_bytes(b"x")
    for engine, there, level in (
        ("onnx_phi", True, "ok"), ("onnx_phi", False, "error"), ("llama", False, "ok"),
    ):  # fmt: skip
        write_manifest(seed, build_manifest(seed, "phi@1.0", kind="llm", engine=engine, roles={"model": "model"}))
        monkeypatch.setattr(token_mask, "find_spec", lambda name, there=there: object() if there else None)
        ((said, name, text),) = found(tmp_path, slots={"tongue": {"seed": seed}}, agents={"a": {"slot": "tongue"}})
        assert (said, name) == (level, "agents.a")
        if level == "error":
            assert "phi@1.0 is an ONNX model" in text and "llguidance" in text and "pip install edged[agents]" in text


class Nowhere:
    """A slot that has no model yet."""

    def lent(self, halt: Any = None) -> Any:
        raise AssertionError("nobody asks it")


def test_agents_are_made_as_they_are_described(tmp_path: Path, modules: str) -> None:
    """P5: a Phi agent answers in the whole context unless it is told otherwise."""
    table = {
        "slot": "tongue", "instruction": "You inspect.", "tools": [f"{modules}:count"], "input_schema": {"part": "integer"},
        "output_schema": ["verdict"], "limits": {"tokens_max": 99}, "max_tokens": 7,
    }  # fmt: skip
    phi = {"slot": "tongue", "factory": "phi"}
    learns = table | {"factory": "learnable", "options": {"learning_head": "peft", "learning_head_config": {"r": 4}}}
    bad, odd = (table | {"factory": f"{modules}:{name}"} for name in ("broken", "nameless"))
    configs = settings(tmp_path, agents={"a": table, "bad": bad, "odd": odd, "phi": phi, "learns": learns}).agents
    found(tmp_path, agents={"a": table})  # finds the modules
    clock = SystemClock()
    store = Store(tmp_path / "state")
    recorder = StoreRecorder(store, clock, Outgoing("plant", "dev1", Stamp(clock)))
    offer_slot("tongue", Nowhere())
    try:
        agent = build("a", configs["a"], MemoryManager(), recorder)
        assert isinstance(agent, Agent) and (agent.name, agent.description, agent.max_tokens) == (
            "a",
            "You inspect.",
            7,
        )
        assert agent.limits.tokens_max == 99 and list(agent.tools) == ["count"] and agent.recorder is recorder
        assert agent.input_schema and json.dumps(agent.input_schema["properties"]) == '{"part": {"type": "integer"}}'
        phi_agent = build("phi", configs["phi"], MemoryManager(), recorder)
        assert isinstance(phi_agent, PhiAgent) and phi_agent.props.max_tokens == 0
        AgentRegistry.unregister("phi", phi_agent)
        short = build("phi", configs["phi"].model_copy(update={"max_tokens": 512}), MemoryManager(), recorder)
        assert isinstance(short, PhiAgent) and short.props.max_tokens == 512, "unless it is told otherwise"
        learnable = build("learns", configs["learns"], MemoryManager(), recorder)
        assert isinstance(learnable, LearnableAgent) and learnable.recorder is recorder
        assert learnable.peft_config is not None and learnable.peft_config.r == 4 and learnable.max_tokens == 7
        with pytest.raises(BadAgent, match=r"agents.bad: .* failed: RuntimeError: no such sensor"):
            build("bad", configs["bad"], MemoryManager(), recorder)
        with pytest.raises(BadAgent, match=r"made an agent called 'Agent-.*must make an agent with the agent_name"):
            build("odd", configs["odd"], MemoryManager(), recorder)
    finally:
        offer_slot("tongue", None)
        store.close()


def test_agents_change_with_a_restart_and_a_running_daemon_says_so(tmp_path: Path) -> None:
    before = settings(tmp_path, agents={"a": {"slot": "tongue"}})
    after = settings(tmp_path, agents={"a": {"slot": "tongue", "instruction": "Be brief."}})
    with pytest.raises(Refused, match=r"agents\.a\.instruction cannot change while edged runs: restart edged"):
        decide(before, after)
