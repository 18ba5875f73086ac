"""What the Phi agent of the design's row P promises, each row where a user can do it: from the checkpoint to the reply."""

from __future__ import annotations

import base64
import json
import math
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import llama_cpp
import pytest
from typer.testing import CliRunner

from edged.engines.base import EngineError, EngineOptions, GenerateRequest, Generator, generate_all, open_engine
from edged.wire.messages import Escalation, Partial
from tests.support.babble import make_babbler
from tests.support.device import Bus, Device, clean_env, tables
from tests.support.models import STRANGE, picture, write_manifest
from tests.system.broker import Broker
from tests.trainer.tiny_phi import save_phi2, save_phi3
from trainer.checkpoints import MODEL_ID
from trainer.cli import app
from trainer.export.gguf import export_gguf
from trainer.golden import write_prompt_golden
from trainer.releases import build_manifest, read_manifest

PROMPT, ANSWER = "line 1 read a 7 with score 0.9. What to do?\n", "accept the seven"
SMALL_CONTEXT = 256
NOWHERE = 9  # a port that nobody listens on


@pytest.fixture(scope="module")
def releases(tmp_path_factory: pytest.TempPathFactory, phi: dict[str, Path]) -> Path:
    """`clerk`: the demo's Phi. `small`: one that babbles until its context is full."""
    folder = tmp_path_factory.mktemp("releases")
    clerk = folder / "clerk"
    clerk.mkdir()
    shutil.copy(phi["model_gguf"], clerk / "model.gguf")
    roles = {"model": "model.gguf", **write_prompt_golden(clerk, [(PROMPT, ANSWER)])}
    write_manifest(clerk, build_manifest(clerk, "clerk@1.0", kind="llm", engine="llama", roles=roles))
    make_babbler(folder / "small", "small@1.0", SMALL_CONTEXT)
    return folder


@pytest.fixture(scope="module")
def bus(tmp_path_factory: pytest.TempPathFactory, releases: Path, toy: Path) -> Iterator[Bus]:
    """A device runs, and this hears all that it says."""
    folder = tmp_path_factory.mktemp("device")
    with Broker(folder / "broker") as broker:
        listening = Bus(broker)
        plan = tables(folder, "dev1", broker, toy)
        plan["slots"] |= {"tongue": {"seed": releases / "clerk"}, "small": {"seed": releases / "small"}}
        names = {"look": "eye", "chat": "tongue", "babble": "small"}
        plan["pipelines"] = {name: {"slot": slot, "source": {"type": "mqtt"}} for name, slot in names.items()}
        with Device(folder, plan):
            yield listening
        listening.close()


def device_tables(folder: Path, release: Path) -> Path:
    """A configuration whose broker is not there."""
    config = folder / "edged.toml"
    config.write_text(
        f'[device]\nid = "dev9"\nstate_dir = "{folder / "state"}"\n[broker]\nport = {NOWHERE}\n'
        f'[slots.tongue]\nseed = "{release}"\n'
    )
    return config


def infer(config: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    edged = Path("build/venv-device/bin/edged").absolute()
    command = [str(edged), "infer", "tongue", *arguments, "-c", str(config)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env=clean_env(), check=False)


def test_p1_the_first_release_is_of_phi_2_unless_another_phi_is_named(tmp_path: Path) -> None:
    # The hub's own cache, as a download leaves it.
    hub = tmp_path / "hub" / f"models--{MODEL_ID.replace('/', '--')}"
    save_phi2(hub / "snapshots" / "abc")
    (hub / "refs").mkdir()
    (hub / "refs" / "main").write_text("abc")
    offline = os.environ | {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "trainer", "release", "make-phi", str(tmp_path / "phi2")]
    made = subprocess.run(command, capture_output=True, text=True, env=offline, check=False)
    assert made.returncode == 0, made.stderr
    manifest = read_manifest(tmp_path / "phi2")
    assert (manifest.release, manifest.lineage["source"]) == ("phi-2@1.0", "microsoft/phi-2")
    missing = CliRunner().invoke(app, ["release", "make-phi", str(tmp_path / "none"), "--model-id", "no such model"])
    assert missing.exit_code != 0
    assert "no such model: neither a folder here nor" in missing.stderr

    save_phi3(tmp_path / "Tiny3")
    named = ["--model-id", str(tmp_path / "Tiny3"), "--prompt", "a"]
    done = CliRunner().invoke(app, ["release", "make-phi", str(tmp_path / "phi3"), *named])
    assert done.exit_code == 0, done.output
    assert read_manifest(tmp_path / "phi3").release == "tiny3@1.0"

    for name in ("phi2", "phi3"):
        answered = infer(device_tables(tmp_path, tmp_path / name), "--prompt", "the line", "--tokens-max", "8")
        assert answered.returncode == 0, answered.stderr
        assert json.loads(answered.stdout)["answer_tokens"] > 0


@pytest.mark.parametrize(
    ("extra", "gpu", "layers"),
    [
        ({}, False, 0), ({}, True, -1), ({"gpu_layers": "auto"}, True, -1), ({"gpu_layers": 0}, True, 0),
        ({"gpu_layers": 7}, False, 7),
    ],
)  # fmt: skip
def test_p2_the_gpu_is_used_where_there_is_one_unless_the_device_says_otherwise(
    releases: Path, monkeypatch: pytest.MonkeyPatch, extra: dict[str, Any], gpu: bool, layers: int
) -> None:
    asked = []
    load = llama_cpp.llama_model_load_from_file

    def spy(path: bytes, params: Any) -> Any:
        asked.append(params.n_gpu_layers)
        return load(path, params)

    monkeypatch.setattr(llama_cpp, "llama_supports_gpu_offload", lambda: gpu)
    monkeypatch.setattr(llama_cpp, "llama_model_load_from_file", spy)
    manifest = read_manifest(releases / "clerk")
    engine = open_engine(releases / "clerk", manifest, EngineOptions(extra=extra))
    assert isinstance(engine, Generator)
    assert generate_all(engine, GenerateRequest(PROMPT))[0] == ANSWER, "wherever it runs"
    engine.close()
    assert asked == [layers]
    for wrong in ("cuda", True, -2):
        with pytest.raises(EngineError, match=f"engine key gpu_layers = {wrong!r}"):
            open_engine(releases / "clerk", manifest, EngineOptions(extra={"gpu_layers": wrong}))


def test_p3_p4_the_prompt_goes_in_and_comes_back_beside_the_answer(bus: Bus) -> None:
    reply = bus.reply(bus.ask("dev1", "chat", generation_prompt=PROMPT))
    assert (reply.generation_prompt, reply.generated_response, reply.error) == (PROMPT, ANSWER, None)
    assert (reply.release, reply.decided_by, reply.finish_reason) == ("clerk@1.0", "dev1", "stop")


def test_p5_prompt_and_answer_have_the_whole_context_and_no_special_tokens(bus: Bus) -> None:
    full = bus.reply(bus.ask("dev1", "babble", generation_prompt="the line reads"))
    assert (full.finish_reason, full.error) == ("length", None)
    assert (full.prompt_tokens or 0) + (full.answer_tokens or 0) == SMALL_CONTEXT
    ended = bus.reply(bus.ask("dev1", "chat", generation_prompt=PROMPT))
    assert "<|" not in (ended.generated_response or ""), "the end token is none of its text"
    over = bus.reply(bus.ask("dev1", "babble", generation_prompt="the line reads a seven " * 200))
    assert "the context of small@1.0 is 256 tokens" in (over.error or "")
    assert "the prompt has " in (over.error or "")
    assert over.generated_response is None


def test_p6_without_a_network_it_answers_and_without_a_policy_nothing_leaves(
    bus: Bus, releases: Path, tmp_path: Path
) -> None:
    alone = infer(device_tables(tmp_path, releases / "clerk"), "--prompt", PROMPT)
    assert alone.returncode == 0, alone.stderr
    assert json.loads(alone.stdout)["generated_response"] == ANSWER

    secret = "line 3 read a 0 with score 0.6. What to do?\n"
    bus.reply(bus.ask("dev1", "chat", generation_prompt=secret, stream=True))
    unsure = bus.reply(bus.ask("dev1", "babble", generation_prompt=secret, tokens_max=30))
    assert (unsure.confidence or 0) < 0.5
    strange = base64.b64encode(picture(STRANGE)).decode()
    looked = bus.reply(bus.ask("dev1", "look", image=strange))
    assert (looked.confidence or 0) < 0.5
    assert not bus.of(Escalation), "who is unsure and may ask nobody keeps it to himself"
    said = [topic for topic, _, message in bus.heard if secret.strip() in message.model_dump_json()]
    assert {topic.split("/")[5] for topic in said} <= {"infer", "reply"}
    assert not [
        topic for topic, _, message in bus.heard if strange in message.model_dump_json() and "/down/" not in topic
    ]


def test_p7_quantised_streaming_and_with_a_confidence(bus: Bus, releases: Path, tmp_path: Path) -> None:
    """That it learns too is test_device_text.py: an adapter changes its answers, and comes off again."""
    save_phi3(tmp_path / "phi")
    whole = export_gguf(tmp_path / "phi", tmp_path / "whole.gguf")
    arguments = ["release", "make-phi", str(tmp_path / "small"), "--model-id", str(tmp_path / "phi"), "--prompt", "a"]
    assert CliRunner().invoke(app, [*arguments, "--quantization", "Q8_0"]).exit_code == 0
    assert read_manifest(tmp_path / "small").files["model"].bytes < 0.75 * whole.stat().st_size

    request = bus.ask("dev1", "babble", generation_prompt="the line reads", tokens_max=100, stream=True)
    reply = bus.reply(request)
    parts = [part.text for part in bus.of(Partial) if part.request == request]
    assert "".join(parts) == reply.generated_response
    engine = open_engine(releases / "small", read_manifest(releases / "small"), EngineOptions())
    assert isinstance(engine, Generator)
    try:
        _, end = generate_all(engine, GenerateRequest("the line reads", tokens_max=100))
    finally:
        engine.close()
    assert reply.confidence == pytest.approx(math.exp(end.mean_logprob), rel=0.01), "of the tokens' own probabilities"


def test_options_of_a_request_work_on_the_command_line_too(releases: Path, tmp_path: Path) -> None:
    config = device_tables(tmp_path, releases / "small")
    turns, schema = tmp_path / "turns.json", tmp_path / "schema.json"
    turns.write_text('[{"role": "user", "content": "A seven?"}]')
    schema.write_text('{"enum": ["keep", "drop"]}')

    def lines(*arguments: str, status: int = 0) -> list[Any]:
        done = infer(config, *arguments)
        assert done.returncode == status, done.stderr
        return [json.loads(line) for line in done.stdout.splitlines()]

    *parts, last = lines("--messages", str(turns), "--temperature", "1", "--seed", "5", "--tokens-max", "9", "--stream")
    assert "".join(part["text"] for part in parts) == last["generated_response"]
    assert (last["answer_tokens"], last["finish_reason"]) == (9, "length")
    _, cut = lines("--prompt", "x", "--schema", str(schema), "--tokens-max", "1", "--stream", status=1)
    assert cut["error"] == "truncated"
    schema.write_text("[")
    broken = infer(config, "--prompt", "x", "--schema", str(schema))
    assert broken.returncode == 1
    assert f"{schema}: Invalid JSON" in broken.stderr
    assert infer(config, "--prompt", "x", "--messages", str(turns)).returncode == 2
