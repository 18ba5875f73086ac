"""Servers that are told of releases: the decisions row by row, and what real sockets carry."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import insert, select, update

from tests.support.models import write_manifest
from tests.support.told_server import Told
from tests.support.trusted import Owner
from trainer.config import ConfigError, load_config
from trainer.core.registration import (
    Pace,
    answered,
    first_states,
    is_due,
    reached_all,
    render,
    revocation,
    unanswered,
    unknown_placeholders,
)
from trainer.database import SCHEMA_VERSION, Database, devices, events, metadata, put, registrations, rollouts
from trainer.files import sha256_of
from trainer.host import Host
from trainer.jobs import Jobs
from trainer.orders import Orders, await_answer, place
from trainer.registration import Registrations, listing
from trainer.releases import Registry, build_manifest, reference
from trainer.rollouts import Rollouts
from trainer.signing import register, repository_of

PACE = Pace(first_s=5.0, longest_s=60.0, tries_max=4)


@pytest.mark.parametrize(
    ("status", "tries", "state", "pause_s"),
    [
        (200, 1, "done", None),
        (201, 1, "done", None),
        (202, 1, "done", None),
        (204, 3, "done", None),
        (409, 1, "done", None),
        (301, 1, "refused", None),
        (400, 1, "refused", None),
        (401, 1, "refused", None),
        (404, 1, "refused", None),
        (422, 1, "refused", None),
        (408, 1, "waiting", 5.0),
        (425, 1, "waiting", 5.0),
        (429, 1, "waiting", 5.0),
        (500, 1, "waiting", 5.0),
        (500, 2, "waiting", 10.0),
        (503, 3, "waiting", 20.0),
        (503, 4, "gave_up", None),
    ],
)
def test_what_an_answer_means(status: int, tries: int, state: str, pause_s: float | None) -> None:
    told = answered(status, "why", tries, PACE, 100.0, 0.0)
    assert told.state == state
    assert told.due == (0.0 if pause_s is None else 100.0 + pause_s)
    assert ("why" in told.error) == (state != "done")


@pytest.mark.parametrize(
    ("retry_after", "pause_s"),
    [("30", 30.0), ("1", 5.0), ("999999", 60.0), ("Wed, 21 Oct 2026 07:28:00 GMT", 5.0), ("-3", 5.0), ("²", 5.0)],
)
def test_a_pause_that_the_server_asks_for_is_kept_within_the_longest(retry_after: str, pause_s: float) -> None:
    assert answered(429, "", 1, PACE, 0.0, 0.0, retry_after).due == pause_s


def test_chance_only_shortens_a_pause_by_a_quarter_and_no_number_of_tries_breaks_it() -> None:
    assert unanswered("gone", 1, PACE, 0.0, 1.0).due == 3.75
    assert unanswered("gone", 900, Pace(5.0, 60.0, 1000), 0.0, 0.0).due == 60.0


def test_a_clock_that_was_set_back_does_not_keep_a_release_waiting() -> None:
    assert not is_due(130.0, PACE, 100.0)
    assert is_due(100.0, PACE, 100.0)
    assert is_due(1e9, PACE, 100.0)


def test_a_template_is_filled_in_with_values_of_their_own_type() -> None:
    template = {"a": "{bytes}", "b": "{name} of {bytes}", "c": ["{files}", 3, None], "{name}": True}
    filled = render(template, {"bytes": 7, "name": "phi", "files": {"model": 1}})
    assert filled == {"a": 7, "b": "phi of 7", "c": [{"model": 1}, 3, None], "{name}": True}
    assert unknown_placeholders({"a": ["{releese}", {"b": "{url}"}]}) == ["releese"]


def test_a_new_server_is_told_of_the_newest_and_an_old_one_of_each() -> None:
    found = ["phi@1.9", "phi@1.10", "clerk@1.0"]
    assert first_states(found, []) == {"phi@1.9": "skipped", "phi@1.10": "waiting", "clerk@1.0": "waiting"}
    assert first_states(found, ["phi@1.9"]) == {"phi@1.10": "waiting", "clerk@1.0": "waiting"}
    assert first_states(found, found) == {}


# Configuration.


def settings(folder: Path, url: str, more: str = "") -> Path:
    path = folder / "trainer.toml"
    path.write_text(
        f'data_dir = "data"\n[http]\nport = 0\n[broker]\nport = 1\n[[registration]]\nname = "farm"\nurl = "{url}"\n'
        f"retry_s = 0.01\nretry_s_max = 0.01\n{more}\n"
    )
    return path


@pytest.mark.parametrize(
    ("url", "more", "message"),
    [
        (
            "http://farm.example/v1",
            "",
            r"registration.*plain HTTP to farm\.example.*use https, or set allow_plain = true",
        ),
        ("https://user:pw@farm.example", "", r"a password has no place in an address"),
        ("ftp://farm.example", "", r"expected an address such as https"),
        ("https://{name}.example", "", r"a placeholder cannot stand in the server's name"),
        ("https://farm", 'body = { a = "{modle}" }', r"unknown placeholder \{modle\}; known: release"),
        ("https://farm", 'headers = { Authorization = "Bearer x" }', r"a key belongs into a file.*use token_file"),
        ("https://farm", 'headers = { Host = "x" }', r"header Host is set by the trainer"),
        ("https://farm", 'certificate = "x"', r"certificate and key belong together"),
        ("https://farm", '[registration.revocation]\nurl = "https://b/{release}"', r"another server than url's"),
        (
            "https://farm",
            '[registration.revocation]\nurl = "https://farm/{raeson}"',
            r"revocation\.unknown placeholder",
        ),
        ("https://farm", "retries = 3", r"registration\.0\.retries.*remove it, or correct its spelling"),
        ("https://farm", '[[registration]]\nname = "farm"\nurl = "https://b"', r"two of them have the same name"),
    ],
)
def test_a_wrong_configuration_names_the_fix(tmp_path: Path, url: str, more: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(settings(tmp_path, url, more))
    assert "user:pw" not in str(caught.value)


def test_files_of_a_registration_start_at_the_configurations_folder(tmp_path: Path) -> None:
    (target,) = load_config(settings(tmp_path, "https://farm", 'token_file = "farm.key"')).registration
    assert target.token_file == tmp_path / "farm.key"


# On real sockets.


class World:
    """A trainer with a registry, that tells the server at `told`."""

    def __init__(self, folder: Path, told: Told, more: str = "") -> None:
        self.folder = folder
        self.path = settings(folder, told.url, more)
        self.restart()

    def restart(self) -> None:
        """As a new process would begin."""
        config = load_config(self.path)
        self.host = Host(config, self.path, Database(config.database_at), Registry(config.releases))
        self.telling = Registrations(self.host, lambda: "https://trainer.example:8443", lambda: 0.0)
        (self.target,) = config.registration

    def make(self, release: str, kind: str = "llm", **more: Any) -> Path:
        folder = self.folder / "made" / release
        folder.mkdir(parents=True)
        (folder / "model.gguf").write_bytes(b"GGUF" + release.encode())
        role = "adapter" if kind == "lora" else "model"
        manifest = build_manifest(folder, release, kind=kind, engine="llama", roles={role: "model.gguf"}, **more)
        write_manifest(folder, manifest)
        return folder

    def release(self, release: str, kind: str = "llm", **more: Any) -> Path:
        folder = self.make(release, kind, **more)
        register(self.host.config, self.host.registry, folder)
        return folder

    def look(self, times: int = 1) -> None:
        import time

        for _ in range(times):
            self.telling.look(self.target)
            time.sleep(0.015)

    def rows(self) -> dict[str, dict[str, Any]]:
        with self.host.database.read() as connection:
            return {row["release"]: row for row in listing(connection)}

    def said(self) -> list[str]:
        with self.host.database.read() as connection:
            return [f"{r.kind}: {r.text}" for r in connection.execute(select(events).order_by(events.c.ts))]


@pytest.fixture
def told() -> Iterator[Told]:
    with Told() as server:
        yield server


@pytest.fixture
def world(tmp_path: Path, told: Told) -> World:
    return World(tmp_path, told)


def test_a_release_is_told_once_with_everything_that_a_server_needs(world: World, told: Told) -> None:
    folder = world.release("phi@1.0")
    world.release("eyes@1.0", kind="detect")
    world.look(3)
    (request,) = told.requests
    digest = sha256_of(folder / "model.gguf")
    assert (request["method"], request["path"]) == ("POST", "/v1/models")
    assert request["body"] == {
        "model": "phi@1.0", "file": "model.gguf", "sha256": digest, "bytes": (folder / "model.gguf").stat().st_size,
        "url": f"https://trainer.example:8443/blobs/{digest}", "base": "",
    }  # fmt: skip
    assert request["headers"]["idempotency-key"] == f"phi@1.0:{reference(folder).sha256}"
    assert request["headers"]["content-type"] == "application/json"
    assert "authorization" not in request["headers"]
    row = world.rows()["phi@1.0"]
    assert (row["state"], row["tries"], row["status"], row["error"]) == ("done", 1, 201, "")
    assert world.said() == ["release_told: phi@1.0: farm was told"]


def test_own_words_headers_and_an_adapters_base(tmp_path: Path, told: Told) -> None:
    (tmp_path / "farm.key").write_text("s3cret-key\n")
    (tmp_path / "farm.key").chmod(0o600)
    more = (
        'method = "PUT"\ntoken_file = "farm.key"\nheaders = { X-Team = "line 3" }\n'
        'body = { id = "{name}", on = "{base}", at = "{path}", files = "{files}", kind = "{kind} {version}" }'
    )
    world = World(tmp_path, told, more)
    world.path.write_text(world.path.read_text().replace("/v1/models", "/v1/models/{release}"))
    world.restart()
    base = reference(world.release("phi@1.0"))
    world.release("tone@2.1", kind="lora", base=base)
    world.look()
    first, second = sorted(told.requests, key=lambda request: request["body"]["id"])
    assert (second["method"], second["path"]) == ("PUT", "/v1/models/tone@2.1")
    assert second["headers"]["authorization"] == "Bearer s3cret-key"
    assert second["headers"]["x-team"] == "line 3"
    body = second["body"]
    assert (body["id"], body["on"], body["kind"], first["body"]["on"]) == ("tone", "phi@1.0", "lora 2.1", "")
    assert Path(body["at"]).read_bytes() == b"GGUFtone@2.1"
    assert body["files"]["adapter"]["sha256"] == sha256_of(Path(body["at"]))
    assert b"s3cret-key" not in world.host.config.database_at.read_bytes()


def test_what_passes_is_tried_again_and_its_last_error_is_to_be_seen(world: World, told: Told) -> None:
    told.answers.extend([500, (503, "loading\nanother", {"retry-after": "0"}), (429, "busy", {})])
    world.release("phi@1.0")
    world.look()
    row = world.rows()["phi@1.0"]
    assert (row["state"], row["tries"], row["error"]) == ("waiting", 1, "it answered 500: not now")
    world.look()
    assert world.rows()["phi@1.0"]["error"] == "it answered 503: loading another"
    world.look(3)
    row = world.rows()["phi@1.0"]
    assert (row["state"], row["tries"], row["error"]) == ("done", 4, "")
    assert {request["headers"]["idempotency-key"] for request in told.requests} == {f"phi@1.0:{row['sha256']}"}
    assert len({str(request["body"]) for request in told.requests}) == 1


def test_a_server_that_is_down_is_told_when_it_is_up_again(world: World, told: Told) -> None:
    told.stop()
    world.release("phi@1.0")
    world.look(2)
    row = world.rows()["phi@1.0"]
    assert (row["state"], row["tries"], row["status"]) == ("waiting", 2, None)
    assert "ConnectError" in row["error"]
    told.start()
    world.look()
    assert world.rows()["phi@1.0"]["state"] == "done"
    assert len(told.models) == 1


def test_tries_have_an_end_and_a_person_may_begin_again(tmp_path: Path, told: Told) -> None:
    world = World(tmp_path, told, "tries_max = 3")
    told.answers.extend([500] * 3)
    world.release("phi@1.0")
    world.look(6)
    assert len(told.requests) == 3
    row = world.rows()["phi@1.0"]
    assert (row["state"], row["error"]) == ("gave_up", "it answered 500: not now; given up after 3 tries")
    assert world.said()[-1].startswith("release_gave_up: phi@1.0: farm was not told: it answered 500")
    assert order(world, "phi@1.0") == {"release": "phi@1.0", "again": ["farm"], "done_before": []}
    world.look()
    assert world.rows()["phi@1.0"]["state"] == "done"
    assert order(world, "phi@1.0") == {"release": "phi@1.0", "again": [], "done_before": ["farm"]}


def order(world: World, release: str, target: str | None = None) -> dict[str, Any] | None:
    jobs, rolled = Jobs(world.host), Rollouts(world.host)
    placed = place(world.host.database, "registration_retry", {"release": release, "target": target})
    Orders(world.host, jobs, rolled).tick()
    return await_answer(world.host.database, placed, 0.0)


def test_retrying_what_is_not_there_says_what_is(world: World) -> None:
    world.release("phi@1.0")
    world.look()
    assert order(world, "phi@2.0") == {"error": "phi@2.0 is to be told to nobody; there are phi@1.0"}
    assert order(world, "phi@1.0", "barn") == {"error": "--target barn: no such [[registration]]; there are farm"}


def test_a_refused_body_is_not_sent_for_ever_and_goes_out_anew_when_it_was_mended(world: World, told: Told) -> None:
    told.answers.append((422, '{"detail": "field id is missing"}', {}))
    world.release("phi@1.0")
    world.look(3)
    row = world.rows()["phi@1.0"]
    assert (row["state"], row["status"], len(told.requests)) == ("refused", 422, 1)
    assert row["error"] == 'it answered 422: {"detail": "field id is missing"}'
    assert world.said()[-1].startswith("release_refused: phi@1.0: farm was not told: it answered 422")
    world.path.write_text(world.path.read_text() + 'body = { id = "{release}" }\n')
    world.restart()
    order(world, "phi@1.0")
    world.look()
    assert told.requests[-1]["body"] == {"id": "phi@1.0"}
    assert world.rows()["phi@1.0"]["state"] == "done"


def test_a_redirect_is_not_followed_because_the_key_is_for_one_address(world: World, told: Told) -> None:
    told.answers.append((307, "", {"location": "http://127.0.0.1:1/other"}))
    world.release("phi@1.0")
    world.look(2)
    assert len(told.requests) == 1
    assert world.rows()["phi@1.0"]["error"] == "it answered 307"


def test_a_server_that_knows_the_release_is_done(world: World, told: Told) -> None:
    told.answers.append(409)
    world.release("phi@1.0")
    world.look(2)
    assert world.rows()["phi@1.0"]["state"] == "done"
    assert world.said() == ["release_told: phi@1.0: farm knew it already"]


def test_a_key_that_others_may_read_or_that_is_not_there_is_said_and_not_sent(tmp_path: Path, told: Told) -> None:
    world = World(tmp_path, told, 'token_file = "farm.key"')
    world.release("phi@1.0")
    world.look()
    row = world.rows()["phi@1.0"]
    assert row["state"] == "refused"
    assert re.search(r"farm\.key: No such file.*--retry phi@1\.0", row["error"])
    (tmp_path / "farm.key").write_text("s3cret-key")
    (tmp_path / "farm.key").chmod(0o644)
    order(world, "phi@1.0")
    world.look()
    assert re.search(r"others may read it \(mode 644\); chmod 600", world.rows()["phi@1.0"]["error"])
    assert told.requests == []
    (tmp_path / "farm.key").chmod(0o600)
    order(world, "phi@1.0")
    told.answers.append((401, "wrong key s3cret-key", {}))
    world.look()
    assert world.rows()["phi@1.0"]["error"] == "it answered 401: wrong key ***"


def test_a_server_that_was_just_configured_is_told_of_the_newest_only(world: World, told: Told) -> None:
    for release in ("phi@1.9", "phi@1.10"):
        world.release(release)
    world.look()
    assert [request["body"]["model"] for request in told.requests] == ["phi@1.10"]
    assert world.rows()["phi@1.9"]["state"] == "skipped"
    world.release("phi@1.11")
    world.release("phi@1.8")
    world.look()
    assert [request["body"]["model"] for request in told.requests[1:]] == ["phi@1.8", "phi@1.11"]
    order(world, "phi@1.9")
    world.look()
    assert told.requests[-1]["body"]["model"] == "phi@1.9"


def test_only_the_models_that_are_named(tmp_path: Path, told: Told) -> None:
    world = World(tmp_path, told, 'models = ["phi"]')
    world.release("phi@1.0")
    world.release("clerk@1.0")
    world.look()
    assert [request["body"]["model"] for request in told.requests] == ["phi@1.0"]


def test_promoted_means_that_a_rollout_reached_everybody(tmp_path: Path, told: Told) -> None:
    world = World(tmp_path, told, 'when = "promoted"')
    folder = world.release("phi@1.0")
    ref = reference(folder)
    row = {
        "id": "r1", "model": "phi", "release": ref.release, "sha256": ref.sha256, "phase": "watching", "state": {},
        "previous": {}, "created": 0.0, "updated": 0.0,
    }  # fmt: skip
    with world.host.database.write() as connection:
        connection.execute(insert(rollouts).values(**row))
    world.look()
    assert told.requests == []
    with world.host.database.write() as connection:
        connection.execute(update(rollouts).values(phase="aborted"))
    world.look()
    assert told.requests == []
    with world.host.database.write() as connection:
        connection.execute(update(rollouts).values(phase="done"))
    world.look(2)
    assert [request["body"]["model"] for request in told.requests] == ["phi@1.0"]


def report(world: World, device: str, slot: str, **fields: Any) -> None:
    """What a device says of a slot."""
    with world.host.database.write() as connection:
        put(connection, devices, {"device": device}, {"models": {slot: fields}})


def test_an_adapter_is_promoted_when_every_slot_with_its_base_runs_it(tmp_path: Path, told: Told) -> None:
    world = World(tmp_path, told, 'when = "promoted"\nkinds = ["lora"]')
    base = reference(world.release("phi@1.0"))
    world.release("tone@1.0", kind="lora", base=base)
    world.look()
    assert told.requests == []  # nobody runs it
    report(world, "cam1", "llm", active="phi@1.0", adapter="tone@1.0")
    report(world, "cam2", "llm", active="phi@1.0")
    report(world, "cam3", "llm", active="phi@0.9", adapter="old@1.0")  # of another base: not for this adapter
    world.look()
    assert told.requests == []
    report(world, "cam2", "llm", active="phi@1.0", adapter="tone@1.0")
    world.look(2)
    assert [request["body"]["model"] for request in told.requests] == ["tone@1.0"]
    report(world, "cam2", "llm", active="phi@1.0")  # taken off again: what was said was true
    world.look()
    assert world.rows()["tone@1.0"]["state"] == "done"


@pytest.mark.parametrize(
    ("slots", "reached"),
    [
        ([], False),
        ([{"active": "phi@1.0", "adapter": "tone@1.0"}], True),
        ([{"active": "phi@1.0", "adapter": "tone@1.0"}, {"active": "phi@1.0", "adapter": None}], False),
        ([{"active": "phi@1.0", "adapter": "tone@1.0"}, {"active": "phi@1.0", "adapter": "tone@0.9"}], False),
        ([{"active": "phi@1.0", "adapter": "tone@1.0"}, {"active": "eye@1.0"}], True),
        ([{"active": "phi@1.1", "adapter": "tone@1.0"}], False),
        # A person keeps one on another adapter.
        ([{"active": "phi@1.0", "adapter": "a@1.0", "adapter_pinned": "a@1.0"}], False),
        (
            [
                {"active": "phi@1.0", "adapter": "tone@1.0"},
                {"active": "phi@1.0", "adapter": "a@1.0", "adapter_pinned": "a@1.0"},
            ],
            True,
        ),
        ([{"active": "phi@1.0", "adapter": None, "adapter_pinned": "tone@1.0"}], False),
    ],
)
def test_whether_an_adapter_has_reached_all(slots: list[dict[str, Any]], reached: bool) -> None:
    assert reached_all("tone@1.0", "phi@1.0", slots) is reached


REVOCATION = """
[registration.revocation]
url = "{url}/{{release}}"
[trust]
folder = "owner/trust"
"""


def revoke(world: World, release: str) -> None:
    repository = repository_of(world.host.config)
    assert repository is not None
    repository.revoke(release, "it swears")


@pytest.mark.parametrize(
    ("state", "sent", "configured", "becomes"),
    [
        ("done", True, True, "revoking"),
        ("done", True, False, "still_there"),
        ("waiting", False, True, "withdrawn"),
        ("waiting", True, True, "revoking"),
        ("waiting", True, False, "withdrawn"),
        ("refused", True, True, "revoking"),
        ("gave_up", True, True, "revoking"),
        ("gave_up", True, False, None),
        ("refused", False, True, None),
        ("skipped", False, True, None),
        ("withdrawn", False, True, None),
        ("revoking", True, True, None),
        ("revoked", True, True, None),
        ("still_there", True, True, None),
    ],
)
def test_what_a_revocation_makes_of_a_row(state: str, sent: bool, configured: bool, becomes: str | None) -> None:
    assert revocation(state, sent=sent, told_of_revocations=configured) == becomes


def test_a_server_is_told_of_a_revocation_and_tried_again(tmp_path: Path, told: Told) -> None:
    Owner(tmp_path / "owner")
    (tmp_path / "farm.key").write_text("s3cret-key")
    (tmp_path / "farm.key").chmod(0o600)
    world = World(tmp_path, told, 'token_file = "farm.key"' + REVOCATION.format(url=told.url))
    for release in ("phi@1.0", "phi@1.1"):
        world.release(release)
        world.look()
    assert len(told.models) == 2
    told.answers.extend([503, (409, "in use", {})])
    revoke(world, "phi@1.1")
    world.look()
    assert world.rows()["phi@1.1"]["state"] == "revoking"
    world.restart()  # as after a kill: it is not forgotten
    world.look(3)
    row = world.rows()["phi@1.1"]
    assert (row["state"], row["tries"], row["status"], row["error"]) == ("revoked", 3, 200, "")
    assert [model["model"] for model in told.models.values()] == ["phi@1.0"]
    asked = told.requests[2:]
    assert {(each["method"], each["path"], each["body"]) for each in asked} == {("DELETE", "/v1/models/phi@1.1", None)}
    assert {each["headers"]["idempotency-key"] for each in asked} == {f"phi@1.1:{row['sha256']}:revoked"}
    assert {each["headers"]["authorization"] for each in asked} == {"Bearer s3cret-key"}
    assert world.said()[-1] == "release_revoked_there: phi@1.1: farm was told that it is revoked"
    world.look(2)
    assert len(told.requests) == 5  # once it is said it is said
    assert world.rows()["phi@1.0"]["state"] == "done"


def test_what_a_server_may_have_heard_is_revoked_there_too(tmp_path: Path, told: Told) -> None:
    Owner(tmp_path / "owner")
    world = World(tmp_path, told, REVOCATION.format(url=told.url))
    told.answers.append(500)  # perhaps after its work was done
    world.release("phi@1.0")
    world.look()
    revoke(world, "phi@1.0")
    world.look()
    assert (told.requests[-1]["method"], world.rows()["phi@1.0"]["state"]) == (
        "DELETE",
        "revoked",
    )  # 404: it has it not
    # What nobody has said is not taken back.
    told.stop()
    world.release("phi@1.1")
    revoke(world, "phi@1.1")
    told.start()
    world.look()
    assert "phi@1.1" not in world.rows()


def test_a_server_that_does_not_take_a_revocation_is_shown_and_may_be_told_again(tmp_path: Path, told: Told) -> None:
    Owner(tmp_path / "owner")
    own = 'method = "POST"\nbody = { drop = "{release}", why = "{reason}" }\n[trust]'
    world = World(tmp_path, told, REVOCATION.format(url=told.url).replace("[trust]", own))
    world.release("phi@1.0")
    world.look()
    told.answers.append((400, "no such path", {}))
    revoke(world, "phi@1.0")
    world.look(2)
    row = world.rows()["phi@1.0"]
    assert (row["state"], row["status"]) == ("still_there", 400)
    assert told.requests[-1]["body"] == {"drop": "phi@1.0", "why": "it swears"}
    assert world.said()[-1].startswith("release_still_there: phi@1.0: farm may still serve it: it answered 400")
    assert order(world, "phi@1.0") == {"release": "phi@1.0", "again": ["farm"], "done_before": []}
    world.look()
    assert world.rows()["phi@1.0"]["state"] == "revoked"


def test_without_words_for_it_a_person_is_told_that_a_server_still_has_what_was_revoked(
    tmp_path: Path, told: Told
) -> None:
    Owner(tmp_path / "owner")
    world = World(tmp_path, told, '[trust]\nfolder = "owner/trust"')
    world.release("phi@1.0")
    world.look()
    revoke(world, "phi@1.0")
    world.look(2)
    assert len(told.requests) == 1
    assert world.rows()["phi@1.0"]["state"] == "still_there"
    (said,) = [text for text in world.said() if text.startswith("release_still_there")]
    assert "[registration.revocation] is not configured: take it out of the server by hand" in said


def test_only_what_devices_may_install_is_told(tmp_path: Path, told: Told) -> None:
    world = World(tmp_path, told, '[trust]\nfolder = "owner/trust"')
    Owner(tmp_path / "owner")
    world.host.registry.register(world.make("phi@1.0"))  # registered, and not signed
    world.look()
    assert world.rows() == {}
    world.release("phi@1.1")
    told.answers.append(500)
    world.look()
    assert world.rows()["phi@1.1"]["state"] == "waiting"
    repository = repository_of(world.host.config)
    assert repository is not None
    repository.revoke("phi@1.1", "it swears")
    world.look(2)
    assert world.rows()["phi@1.1"]["state"] == "withdrawn"
    assert told.models == {}
    # The signatures cannot be read: nobody is told of anything, and nothing is given up.
    world.release("phi@1.2")
    os.rename(tmp_path / "owner/trust/metadata/timestamp.json", tmp_path / "kept")
    (tmp_path / "owner/trust/metadata/timestamp.json").write_text("{")
    world.look(2)
    assert "phi@1.2" not in world.rows()
    os.rename(tmp_path / "kept", tmp_path / "owner/trust/metadata/timestamp.json")
    world.look()
    assert world.rows()["phi@1.2"]["state"] == "done"


def test_a_database_of_the_schema_before_gets_the_table_and_keeps_its_rows(tmp_path: Path, told: Told) -> None:
    old = Database(tmp_path / "old.sqlite")
    with old.write() as connection:
        registrations.drop(connection)
        connection.exec_driver_sql("PRAGMA user_version = 1")
        row = {"id": "e", "ts": 1.0, "source": "x", "kind": "k", "text": "kept"}
        connection.execute(insert(events).values(**row))
    old.close()
    new = Database(tmp_path / "old.sqlite")
    with new.read() as connection:
        assert connection.execute(select(registrations)).all() == []
        assert connection.execute(select(events.c.text)).scalar_one() == "kept"
        assert connection.exec_driver_sql("PRAGMA user_version").scalar_one() == SCHEMA_VERSION
    assert set(metadata.tables) >= {"registrations", "jobs"}
    new.close()


def test_a_release_that_is_gone_keeps_the_others_from_nothing(world: World, told: Told) -> None:
    told.answers.append(500)
    world.release("phi@1.0")
    world.look()
    shutil.rmtree(world.host.config.releases / "phi@1.0")
    world.restart()
    world.look(2)
    assert world.rows()["phi@1.0"]["state"] == "withdrawn"
