"""Bytes that devices and trainers in the field have sent: what is in `golden/` is never changed, only added to.

New code must read every file there: each holds a topic and its payload, and what must be understood of it. A new field
or message type gets a new file; a file that fails means that a fleet would not be understood after an upgrade.
"""

from __future__ import annotations

import hashlib
import json
import re
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from edged.wire import messages, topics
from edged.wire.manifest import ReleaseManifest, TrainingManifest
from edged.wire.messages import InvalidPayload

HERE = Path(__file__).parent
FILES = sorted((HERE / "golden").glob("*.json"))
SEALED = HERE / "golden.sha256"  # `name sha256` of every file, in the order in which they were added


def read(path: Path) -> tuple[str, bytes]:
    case = json.loads(path.read_text())
    return case["topic"], json.dumps(case["payload"]).encode()


def contains(whole: Any, part: Any) -> bool:
    """Whether everything in `part` is in `whole`, down to the leaves."""
    if isinstance(part, dict):
        return isinstance(whole, dict) and all(key in whole and contains(whole[key], part[key]) for key in part)
    if isinstance(part, list):
        return isinstance(whole, list) and len(whole) == len(part) and all(map(contains, whole, part))
    return bool(whole == part)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_old_bytes_are_read_and_nothing_in_them_is_lost(path: Path) -> None:
    topic, payload = read(path)
    route, fields, message = messages.decode(topic, payload)
    assert route(**fields).topic == topic
    # Also what this version does not know is kept and passed on.
    assert contains(json.loads(messages.encode(message)), json.loads(payload))
    assert messages.decode(topic, messages.encode(message))[2] == message


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_fields_of_the_future_are_kept(path: Path) -> None:
    topic, payload = read(path)
    later = json.loads(payload) | {"mood": {"of": ["the", "future"]}}
    again = json.loads(messages.encode(messages.decode(topic, json.dumps(later).encode())[2]))
    assert again["mood"] == {"of": ["the", "future"]}


def test_an_old_device_follows_a_desired_state_of_the_future() -> None:
    topic, payload = read(HERE / "golden" / "desired.json")
    later = json.loads(payload)
    later["models"]["eye"]["mirror"] = "https://elsewhere"
    now, then = (messages.decode(topic, data)[2] for data in (payload, json.dumps(later).encode()))
    assert isinstance(now, messages.Desired)
    assert isinstance(then, messages.Desired)
    assert now.models == then.models


def test_every_message_has_its_golden_bytes() -> None:
    seen = {type(messages.decode(*read(path))[2]) for path in FILES}
    assert seen == {*messages.PAYLOADS.values(), *messages.COMMANDS.values()}


def test_sealed_files_are_never_changed() -> None:
    sealed = dict(line.split() for line in SEALED.read_text().splitlines())
    found = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in FILES}
    changed = {name for name in sealed if found.get(name) != sealed[name]}
    assert not changed, "bytes that are in the field cannot be changed: add a file instead"
    assert found.keys() == sealed.keys(), f"seal the new ones: add their names and hashes to {SEALED.name}"


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("release", ReleaseManifest),
        ("release_risk", ReleaseManifest),  # with a risk table and boxes' scalings
        ("release_reference", ReleaseManifest),  # with the histogram that devices' windows are compared with
        ("release_answers", ReleaseManifest),  # a language model's calibration
        ("training", TrainingManifest),
    ],
)
def test_old_manifests_are_read(name: str, model: type[ReleaseManifest | TrainingManifest]) -> None:
    data = json.loads((HERE / "manifests" / f"{name}.json").read_text())
    assert contains(model.model_validate(data).model_dump(mode="json"), data)


def test_the_schema_is_the_one_that_others_were_built_against() -> None:
    """It may grow: what was a field stays one of the same type, and what was optional stays so."""
    old = json.loads((HERE / "schema" / "v1.json").read_text())
    new = messages.json_schema()
    assert old.keys() <= new.keys()
    for topic, schema in old.items():
        for kind, before in {"": schema, **schema.get("$defs", {})}.items():
            after = new[topic] if not kind else new[topic]["$defs"][kind]
            for name, field in before.get("properties", {}).items():
                assert contains(after["properties"][name], field), f"{topic}: {kind}.{name} is not what it was"
            assert set(after.get("required", [])) <= set(before.get("required", [])), f"{topic}: {kind} requires more"
            assert after.get("additionalProperties", True) is True


def test_the_schema_names_every_topic() -> None:
    described = {re.sub("/cmd/[a-z]+/", "/cmd/{type}/", name) for name in messages.json_schema()}
    assert described == {route.template for route in topics.ROUTES if not route.raw}


STATE = '{"v":1,"id":"m1","ts":1,"boot":"b","seq":1,"state":"online","device":"dev1"}'


@pytest.mark.parametrize(
    ("topic", "payload", "said"),
    [
        ("edged/v1/s/d/up/state", b"", "payload: Invalid JSON"),
        ("edged/v1/s/d/up/state", b"[]", "payload: Input should be an object"),
        ("edged/v1/s/d/up/state", b"\xff\xfe", "payload: Invalid JSON"),
        ("edged/v1/s/d/up/state", b"[" * 100_000, "payload: Invalid JSON"),
        ("edged/v1/s/d/up/state", STATE.replace("online", "up").encode(), r"state: Input should be 'online' or 'offline'"),
        ("edged/v1/s/d/up/state", STATE.replace('"v":1', '"v":2').encode(), r"v: Input should be 1 \(got '2'\)"),
        ("edged/v1/s/d/up/state", STATE.replace('"m1"', '"a/b"').encode(), r"id: .*\(got 'a/b'\)"),
        ("edged/v1/s/d/up/state", STATE.replace('"ts":1', '"ts":NaN').encode(), "ts: Input should be a finite number"),
        ("edged/v1/s/d/up/state", STATE.replace('"boot":"b",', "").encode(), "boot: Field required"),
        ("edged/v1/s/d/down/cmd/dance/c1", STATE.encode(), "unknown command; known: .*samples"),
        ("edged/v2/s/d/up/state", STATE.encode(), "no topic of this protocol"),
        (f"edged/v1/_blocks/{'0' * 64}/3", STATE.encode(), "bytes of a file, no message"),
        (f"edged/v1/s/d/up/want/{'0' * 64}", STATE.replace('"state":"online"', '"blocks":[1024]').encode(), "blocks.0: "),
        (f"edged/v1/s/d/up/want/{'0' * 64}", STATE.replace('"state":"online"', '"blocks":[]').encode(), "blocks: "),
    ],
)  # fmt: skip
def test_what_does_not_validate_is_refused_with_its_topic_field_and_value(
    topic: str, payload: bytes, said: str
) -> None:
    with pytest.raises(InvalidPayload, match=rf"{topic}: .*{said}|{topic}: {said}"):
        messages.decode(topic, payload)


def test_of_a_message_nothing_stays_in_memory() -> None:
    def hear(numbers: range) -> None:
        for number in numbers:
            messages.decode("edged/v1/s/d/up/state", STATE.replace('"m1"', f'"m{number:060}"').encode())
            messages.readable_id(f'{{"id":"r{number:060}"}}'.encode())

    hear(range(10))
    tracemalloc.start()
    try:
        before, _ = tracemalloc.get_traced_memory()
        hear(range(10, 3000))
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 64 << 10  # bytes; a cache of strings takes 300 KiB, and goes on


@pytest.mark.parametrize(
    ("payload", "found"),
    [(b'{"id":"r1"}', "r1"), (b'{"id":7}', None), (b'{"id":"a/b"}', None), (b"[1]", None), (b"{", None), (b"", None)],
)
def test_the_id_of_a_broken_request_is_found_where_it_can_be(payload: bytes, found: str | None) -> None:
    assert messages.readable_id(payload) == found
