"""A slot whose model is a server's: a real one around llama.cpp, and one that misbehaves in every way."""

from __future__ import annotations

import datetime
import gzip
import json
import math
import re
import ssl
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from edged import golden
from edged.check_server import finding
from edged.config import ConfigError, Slot, load
from edged.config_server import SEED, Server
from edged.engines.base import (
    ChatMessage,
    EngineError,
    EngineOptions,
    GenerateRequest,
    Generator,
    Unanswered,
    Unsuitable,
    generate_all,
    open_engine,
)
from edged.engines.host import ProcessGenerator
from edged.releases import read_manifest, reference
from edged.slot import load as load_slot
from tests.support.bad_server import BadServer, chat, drip, endless, raw, reply, silent
from tests.support.openai_server import OpenAiServer

PROMPT, PLAIN = "line 1 read a 7 with score 0.9. What to do?\n", "accept the seven"
KEY = "sk-s3cret-0123456789"
ONCE = {"tries_max": 1, "timeout_s": 0.6, "patience_s": 5.0}
SOON_S = 5.0  # far more than any of these needs, and less than a hanging one takes


def engine(url: str, **keys: Any) -> Generator:
    slot = Slot(server=Server(url=url, model="large", **keys))
    made = open_engine(SEED, read_manifest(SEED), EngineOptions(extra=slot.engine_keys()))
    assert isinstance(made, Generator)
    return made


def ask(made: Generator, prompt: str = "hi", **request: Any) -> tuple[str, Any]:
    return generate_all(made, GenerateRequest(prompt, **request))


def failure(made: Generator, **request: Any) -> EngineError:
    """The error that a question ends with, soon."""
    began = time.monotonic()
    with pytest.raises(EngineError) as caught:
        ask(made, **request)
    assert time.monotonic() - began < SOON_S
    return caught.value


# A real server.


@pytest.fixture(scope="module")
def large(phi: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenAiServer]:
    with OpenAiServer(tmp_path_factory.mktemp("large"), phi["model_gguf"], key=KEY) as server:
        yield server


@pytest.fixture
def key_file(tmp_path: Path) -> Path:
    path = tmp_path / "large.key"
    path.write_text(KEY + "\n")
    path.chmod(0o600)
    return path


def test_a_real_model_answers_and_says_how_sure_it_is(
    large: OpenAiServer, key_file: Path, phi: dict[str, Path]
) -> None:
    here = engine(large.url, api_key_file=key_file, prompts="completion", name="farm")
    text, end = ask(here, PROMPT, tokens_max=40)
    assert (text.strip(), end.reason, end.who, end.model) == (PLAIN, "stop", "farm", "large")
    # The same model in this process is as sure (its mean also covers the token that ends the text).
    from edged.engines.llama import LlamaGenerator
    from tests.support.hosted import manifest

    local = LlamaGenerator(phi["model_gguf"].parent, manifest(phi["model_gguf"]), EngineOptions())
    same, local_end = ask(local, PROMPT, tokens_max=40)
    local.close()
    assert same.strip() == PLAIN
    assert math.exp(end.mean_logprob) == pytest.approx(math.exp(local_end.mean_logprob), abs=0.05)
    assert end.prompt_tokens == local_end.prompt_tokens


def test_a_conversation_and_an_answer_that_a_limit_cuts_off(large: OpenAiServer, key_file: Path) -> None:
    turns = (ChatMessage("user", "line 1 read a 7"),)
    text, end = ask(engine(large.url, api_key_file=key_file), "", messages=turns, tokens_max=5)
    assert text
    assert (end.reason, end.who) == ("length", large.url.split("/")[2])
    assert end.mean_logprob < 0
    _, cut = ask(engine(large.url, api_key_file=key_file, tokens_max=3), "", messages=turns)
    assert cut.reason == "truncated"


VERDICT = {
    "type": "object",
    "properties": {"verdict": {"enum": ["accept", "reject"]}, "sure": {"type": "boolean"}},
    "required": ["verdict", "sure"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("prompts", ["chat", "completion"])
def test_a_real_model_keeps_to_the_schema_that_it_is_given(large: OpenAiServer, key_file: Path, prompts: str) -> None:
    text, end = ask(engine(large.url, api_key_file=key_file, prompts=prompts), PROMPT, schema=VERDICT)
    jsonschema.validate(json.loads(text), VERDICT)
    assert end.reason == "stop"
    _, cut = ask(engine(large.url, api_key_file=key_file, prompts=prompts), PROMPT, schema=VERDICT, tokens_max=2)
    assert cut.reason == "truncated"


def test_a_server_that_knows_no_schemas_gives_no_answer_under_one(phi: dict[str, Path], tmp_path: Path) -> None:
    with OpenAiServer(tmp_path, phi["model_gguf"], ignore_schema=True) as server:
        text, end = ask(engine(server.url, prompts="completion"), PROMPT, schema=VERDICT)
        assert (text.strip(), end.reason) == (PLAIN, "invalid")


@pytest.mark.parametrize(
    ("said", "finish", "reason"),
    [
        ('{"verdict": "accept", "sure": true}', "stop", "stop"),
        ('{"verdict": "accept", "sure": true}', "length", "stop"),  # whole at the very limit
        ('{"verdict": "maybe", "sure": true}', "stop", "invalid"),
        ('{"verdict": "maybe"', "length", "truncated"),
        ("Sure! Here it is.", "stop", "invalid"),
    ],
)
def test_what_a_server_says_is_held_against_the_schema(said: str, finish: str, reason: str) -> None:
    choices = [{"message": {"content": said}, "finish_reason": finish}]
    with BadServer(reply(200, chat(choices=choices))) as server:
        text, end = ask(engine(server.url), schema=VERDICT, tokens_max=9)
    assert (text, end.reason) == (said, reason)


def test_what_does_not_fit_the_servers_context_is_left_to_somebody_else(large: OpenAiServer, key_file: Path) -> None:
    error = failure(engine(large.url, api_key_file=key_file, prompts="completion"), prompt="word " * 2000)
    assert isinstance(error, Unsuitable)
    assert "answered 400" in str(error)


def test_without_the_key_or_the_model_the_reason_says_so_and_no_key(
    large: OpenAiServer, key_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    error = failure(engine(large.url))
    assert isinstance(error, Unanswered)
    assert "answered 401" in str(error)
    key_file.write_text("sk-wrong-9876543210")
    error = failure(engine(large.url, api_key_file=key_file))
    assert "Incorrect API key: Bearer ***" in str(error)
    assert "9876543210" not in str(error)
    key_file.write_text(KEY)
    wrong = open_engine(
        SEED, read_manifest(SEED),
        EngineOptions(extra=Slot(server=Server(url=large.url, model="huge", api_key_file=key_file)).engine_keys()),
    )  # fmt: skip
    assert isinstance(wrong, Generator)
    assert "'huge' does not exist" in str(failure(wrong))
    # A new key in the file, or in the environment, needs no restart.
    made = engine(large.url, api_key_env="FARM_KEY", prompts="completion")
    assert "FARM_KEY: not set" in str(failure(made))
    monkeypatch.setenv("FARM_KEY", KEY)
    assert ask(made, PROMPT)[0].strip() == PLAIN


def test_edged_check_asks_for_the_models(large: OpenAiServer, key_file: Path) -> None:
    def look(**keys: Any) -> tuple[str, str]:
        found = finding("slots.farm", Server(**({"url": large.url, "model": "large", "api_key_file": key_file} | keys)))
        return found.level, found.text

    assert look()[0] == "ok"
    level, text = look(model="huge")
    assert level == "warning"
    assert "does not name the model 'huge'; it has large" in text
    assert look(api_key_file=None)[0] == "error"
    level, text = look(url=large.url.removesuffix("/v1"))
    assert level == "warning"
    assert "answered 404" in text
    assert look(url="http://127.0.0.1:1/v1")[0] == "error"


# One that misbehaves. The rows say what it does and what comes of it.

HEAD = b"HTTP/1.1 200 OK\r\n"
ZIPPED = gzip.compress(b" " * (32 << 20))


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (silent, "no whole answer within 0.6 s"),
        (drip(HEAD + b"X-Slow: "), "no whole answer within 0.6 s"),
        (drip(HEAD + b"Content-Length: 999999\r\n\r\n{"), "no whole answer within 0.6 s"),
        (endless, "longer than 8388608 bytes"),
        (raw(b""), "RemoteProtocolError|ReadError"),
        (raw(b"SSH-2.0-OpenSSH_9.2\r\n"), "RemoteProtocolError"),
        (raw(HEAD + b"Content-Length: 500\r\n\r\n{"), "RemoteProtocolError"),
        (raw(HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n" % len(ZIPPED) + ZIPPED), "compressed"),
        (raw(HEAD + b"X: " + b"y" * 200_000), "RemoteProtocolError|no whole answer"),
        (reply(500, b"<b>oops</b>\n"), "answered 500: <b>oops</b>"),
        (reply(503, b"\x00\xff\x1b[31m"), "answered 503"),
        (reply(429, b"slow down"), "answered 429: slow down"),
        (reply(200, b"<html>"), "is no answer: it is no JSON"),
        (reply(200, chat(model="tiny")), "is no answer: it answers as model 'tiny'"),
        (reply(200, chat(choices=[])), "is no answer: it has no list `choices`"),
        (reply(307, b"", "Location: http://127.0.0.1:1/\r\n"), "answered 307"),
        (reply(401, b"no"), "answered 401: no; see url, model and the key"),
        (reply(404, b""), "answered 404: nothing"),
    ],
)  # fmt: skip
def test_a_server_that_misbehaves_leaves_a_question_unanswered_and_nothing_hangs(act: Any, reason: str) -> None:
    with BadServer(act) as server:
        error = failure(engine(server.url, **ONCE))
    assert isinstance(error, Unanswered)
    assert re.search(reason, str(error)), error
    assert str(error).isprintable()


@pytest.mark.parametrize(
    ("act", "reason"),
    [
        (reply(400, {"error": {"code": "context_length_exceeded"}}), "context_length_exceeded"),
        (reply(413, b""), "answered 413"),
        (reply(422, b"field"), "answered 422: field"),
        (reply(200, chat(choices=[{"message": {}, "finish_reason": "content_filter"}])), "its filter refused"),
    ],
)  # fmt: skip
def test_what_a_server_will_not_answer_is_not_asked_again(act: Any, reason: str) -> None:
    with BadServer(act) as server:
        error = failure(engine(server.url))
        assert isinstance(error, Unsuitable)
        assert reason in str(error)
        assert len(server.requests) == 1


def test_what_passes_is_asked_again_after_a_pause_and_no_sooner_than_the_server_says() -> None:
    acts = (reply(503, b""), reply(429, b"", "Retry-After: 2\r\n"), reply(200, chat("maybe")))
    with BadServer(*acts) as server:
        text, end = ask(engine(server.url, api_key_file=None))
        first, second, third = (at for at, _ in server.requests)
    assert (text, end.who) == ("maybe", f"127.0.0.1:{server.port}")
    assert second - first >= 0.5
    assert third - second >= 2.0


def test_a_pause_beyond_its_patience_is_not_waited_for() -> None:
    with BadServer(reply(429, b"", "Retry-After: 3600\r\n")) as server:
        assert "answered 429" in str(failure(engine(server.url, patience_s=10.0)))
        assert len(server.requests) == 1


def test_tries_end(tmp_path: Path) -> None:
    with BadServer(reply(500, b"")) as server:
        assert "(after 2 tries)" in str(failure(engine(server.url, tries_max=2)))
        assert len(server.requests) == 2


def test_without_log_probabilities_the_stated_confidence_is_noted() -> None:
    with BadServer(reply(200, chat())) as server:
        _, end = ask(engine(server.url, confidence=0.3))
    assert math.exp(end.mean_logprob) == pytest.approx(0.3)


def test_who_does_not_want_to_wait_is_let_go_at_once() -> None:
    with BadServer(silent) as server:
        late = time.monotonic() + 0.3
        began = time.monotonic()
        text, end = ask(engine(server.url, timeout_s=60), halt=lambda: "deadline" if time.monotonic() > late else "")
        assert (text, end.reason) == ("", "deadline")
        assert time.monotonic() - began < SOON_S
    with BadServer(reply(503, b"", "Retry-After: 30\r\n")) as server:  # between two tries
        late = time.monotonic() + 0.3
        _, end = ask(engine(server.url), halt=lambda: "cancelled" if time.monotonic() > late else "")
        assert end.reason == "cancelled"


def test_one_question_at_a_time_reaches_a_server_and_a_late_answer_is_nobodys() -> None:
    with BadServer(drip(HEAD + b"Content-Length: 999999\r\n\r\n{"), reply(200, chat("second"))) as server:
        made = engine(server.url, **ONCE)
        assert isinstance(failure(made), Unanswered)
        assert ask(made)[0] == "second"


def test_threads_do_not_pile_up() -> None:
    with BadServer(reply(200, chat())) as server:
        made = engine(server.url)
        ask(made)
        before = threading.active_count()
        for _ in range(20):
            ask(made)
        assert threading.active_count() <= before + 2


# TLS.


def certificate(folder: Path) -> tuple[Path, ssl.SSLContext]:
    """A certificate for this machine that only who is given it trusts, and a server's side of it."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "large")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
        .serial_number(1).not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )  # fmt: skip
    (folder / "ca.pem").write_bytes(made.public_bytes(serialization.Encoding.PEM))
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / "key.pem").write_bytes(private)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "ca.pem", folder / "key.pem")
    return folder / "ca.pem", context


def test_only_a_server_that_is_trusted_is_asked_and_gets_the_key(tmp_path: Path, key_file: Path) -> None:
    ca, context = certificate(tmp_path)
    with BadServer(reply(200, chat()), context=context) as server:
        error = failure(engine(server.url, api_key_file=key_file, **ONCE))
        assert isinstance(error, Unanswered)
        assert "certificate" in str(error).lower()
        assert server.requests == []
        assert ask(engine(server.url, api_key_file=key_file, ca=ca))[0] == "yes"
        assert f"Authorization: Bearer {KEY}".encode() in server.requests[0][1]
    with BadServer(raw(b"HTTP/1.1 200 OK\r\n\r\n")) as plain:
        assert isinstance(failure(engine(plain.url.replace("http:", "https:"), **ONCE)), Unanswered)
    with BadServer(silent, context=context) as server:
        assert "no whole answer" in str(failure(engine(server.url, ca=ca, **ONCE)))
    with pytest.raises(EngineError, match=r"TLS files ca=.*nothere"):
        engine("https://127.0.0.1:1/v1", ca=tmp_path / "nothere.pem")


# The slot.


def test_a_slot_with_a_server_loads_without_it_and_in_this_process() -> None:
    slot = Slot(server=Server(url="http://127.0.0.1:1/v1", model="large"))
    assert slot.seed == SEED
    manifest, ref = read_manifest(SEED), reference(SEED)
    loaded = load_slot(ref, SEED, manifest, EngineOptions(extra=slot.engine_keys()))
    assert not isinstance(loaded.engine, ProcessGenerator)
    assert golden.check(loaded.engine, SEED, manifest) == 0
    loaded.engine.close()
    with pytest.raises(EngineError, match="closed"):
        ask(loaded.generator)
    with pytest.raises(EngineError, match=r"needs a table `server` with url and model"):
        load_slot(ref, SEED, manifest, EngineOptions())


def test_what_cannot_be_promised_is_refused() -> None:
    made = engine("http://127.0.0.1:1/v1")
    error = failure(made, schema={"type": "string", "pattern": "^a"})
    assert isinstance(error, Unsuitable)
    assert "keyword 'pattern' is not supported" in str(error)
    with pytest.raises(EngineError, match="takes no adapter"):
        made.attach(Path("x.gguf"))
    made.attach(None)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('url = "http://llm.example/v1"\nmodel = "m"', r"plain HTTP to llm\.example.*use https, or set allow_plain = true"),
        ('url = "https://u:sk-1@llm.example"\nmodel = "m"', r"a password has no place in an address"),
        ('url = "https://llm.example/v1?key=sk-1"\nmodel = "m"', r"expected no \? and no #"),
        ('url = "https://llm.example"', r"server\.model is missing: add it"),
        ('url = "https://llm.example"\nmodel = "m"\napi_key = "sk-1"', r"server\.api_key is no known key"),
        ('url = "https://llm.example"\nmodel = "m"\napi_key_file = "a"\napi_key_env = "B"', r"set one of them"),
        ('url = "https://llm.example"\nmodel = "m"\n[slots.farm.extra]\ncontext_max = 3', r"mean nothing to a server"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_names_the_fix_and_shows_no_key(tmp_path: Path, lines: str, message: str) -> None:
    path = tmp_path / "edged.toml"
    path.write_text(f'[device]\nid = "d"\n[slots.farm.server]\n{lines}\n')
    with pytest.raises(ConfigError, match=message) as caught:
        load(path)
    assert "sk-1" not in str(caught.value)


def test_only_a_server_is_asked_several_questions_at_once(tmp_path: Path) -> None:
    path = tmp_path / "edged.toml"
    path.write_text(
        '[device]\nid = "d"\n[slots.tongue]\n'
        '[responders.r]\ntier = "host"\ntask = "generate"\nslot = "tongue"\nconcurrency = 2\n'
    )
    with pytest.raises(ConfigError, match=r"responders\.r\.concurrency=2: the model of slots\.tongue is here.*remove"):
        load(path)


def test_images_are_not_sent_and_the_reason_is_said(tmp_path: Path) -> None:
    path = tmp_path / "edged.toml"
    path.write_text(
        '[device]\nid = "d"\n[slots.farm.server]\nurl = "https://llm.example/v1"\nmodel = "m"\n'
        '[responders.r]\ntier = "host"\ntask = "detect"\nslot = "farm"\n'
    )
    with pytest.raises(ConfigError, match=r"responders\.r\.task='detect'.*labels no images.*use task = \"generate\""):
        load(path)


def test_a_profile_adds_no_keys_of_an_engine_to_a_server(tmp_path: Path) -> None:
    path = tmp_path / "edged.toml"
    text = '[device]\nid = "d"\nprofile = "{}"\n[slots.farm.server]\nurl = "https://llm.example/v1"\nmodel = "m"\n'
    for profile in ("raspberry-pi-5", "gpu-host"):
        path.write_text(text.format(profile) + '[responders.r]\ntier = "host"\ntask = "generate"\nslot = "farm"\n')
        assert load(path).slots["farm"].extra == {}
