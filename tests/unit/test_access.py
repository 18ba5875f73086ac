"""Who may say and hear what: the table itself, and what the broker's plugin is told of it."""

from __future__ import annotations

import itertools
import json

import pytest

from trainer.core.access import ROLES, BadName, Identity, Role
from trainer.core.dynsec import admissions, dismissals, document, tolerated

OWN, BULK = "cam1", "cam1~blk"


def table(*identities: Identity) -> dict[str, dict[str, set[str]]]:
    """By user: kind of right -> topics, as the plugin would add them up."""
    written = json.loads(json.dumps(document(identities)))
    roles = {role["rolename"]: role["acls"] for role in written["roles"]}
    found: dict[str, dict[str, set[str]]] = {}
    for client in written["clients"]:
        mine = found.setdefault(client["username"], {})
        for acl in itertools.chain.from_iterable(roles[role["rolename"]] for role in client["roles"]):
            assert acl["allow"] is True
            mine.setdefault(acl["acltype"], set()).add(acl["topic"])
    return found


def test_a_device_says_what_is_its_own_and_hears_what_is_meant_for_it() -> None:
    may = table(Identity("cam1", "plant", "line-a"))
    heard = {
        "edged/v1/plant/cam1/down/#", "edged/v1/plant/_g/line-a/down/desired", "edged/v1/_host/+/state",
        "edged/v1/_host/+/metadata", "edged/v1/_resp/+/+/+", "edged/v1/_blocks/+/+",
    }  # fmt: skip
    assert may[OWN] == {
        "publishClientSend": {"edged/v1/plant/cam1/up/#"},
        "subscribePattern": heard,
        "publishClientReceive": heard,
    }
    assert may[BULK]["publishClientSend"] == {"edged/v1/plant/cam1/up/want/+", "edged/v1/plant/cam1/up/blob/+/+"}
    assert "edged/v1/plant/cam1/down/#" not in may[BULK]["subscribePattern"]
    assert not any("_g/" in topic for topic in table(Identity("cam1", "plant"))[OWN]["subscribePattern"])


def test_only_a_responder_joins_shared_subscriptions_and_only_of_its_site() -> None:
    everybody = [Identity(role, "plant", roles=(role,)) for role in ROLES]
    joins = {
        name: [topic for topic in kinds.get("subscribePattern", ()) if topic.startswith("$share")]
        for name, kinds in table(*everybody).items()
    }
    assert {name for name, topics in joins.items() if topics} == {"responder"}
    assert joins["responder"] == ["$share/+/edged/v1/plant/+/up/esc/+/+"]


def test_a_peer_asks_and_answers_agents_of_its_site_in_its_own_name_only() -> None:
    may = table(Identity("cam1", "plant", roles=("device", "peer")))
    assert may[OWN]["publishClientSend"] == {
        "edged/v1/plant/cam1/up/#", "edged/v1/plant/+/down/invoke/+/cam1", "edged/v1/plant/+/down/invoked/cam1/+",
    }  # fmt: skip
    assert may[OWN]["subscribePattern"] == table(Identity("cam1", "plant"))[OWN]["subscribePattern"]
    assert may[BULK] == table(Identity("cam1", "plant"))[BULK]


def test_only_the_admin_speaks_to_the_plugin() -> None:
    everybody = [Identity(role, "plant", roles=(role,)) for role in ROLES]
    speak = {
        name
        for name, kinds in table(*everybody).items()
        if any("$CONTROL" in topic for topic in kinds.get("publishClientSend", ()))
    }
    assert speak == {"admin"}


@pytest.mark.parametrize("role", ["responder", "trainer", "observer", "broker"])
def test_nobody_may_speak_for_a_device(role: Role) -> None:
    may = table(Identity("other", "plant", roles=(role,)))["other"]
    assert not any("/up/" in topic and "/other/up/" not in topic for topic in may.get("publishClientSend", ()))


def test_the_same_identities_give_the_same_bytes() -> None:
    some = [Identity(f"cam{n}", "plant", roles=("device",)) for n in range(30)]
    assert json.dumps(document(some)) == json.dumps(document(reversed(some)))


def test_nothing_is_allowed_by_default() -> None:
    assert document([])["defaultACLAccess"] == {
        "publishClientSend": False, "publishClientReceive": False, "subscribe": False, "unsubscribe": True,
    }  # fmt: skip


@pytest.mark.parametrize("name", ["", "_g", "_host", "a/b", "+", "#", "a~blk", "a b", "$share", "x" * 61, "a\n"])
def test_names_that_would_mean_something_else_in_a_topic_are_refused(name: str) -> None:
    with pytest.raises(BadName, match="letters, digits"):
        Identity(name, "plant")
    with pytest.raises(BadName, match="letters, digits"):
        Identity("cam1", name)
    if name:
        with pytest.raises(BadName, match="letters, digits"):
            Identity("cam1", "plant", name)


def test_roles_that_nobody_knows_are_refused() -> None:
    with pytest.raises(BadName, match="roles of cam1: king; known: device"):
        Identity("cam1", roles=("king",))  # type: ignore[arg-type]
    with pytest.raises(BadName, match="roles of cam1: none"):
        Identity("cam1", roles=())


def test_a_running_broker_is_told_of_both_connections_of_a_device() -> None:
    gone = dismissals(Identity("cam1"))
    assert [each["username"] for each in gone if each["command"] == "deleteClient"] == [OWN, BULK]
    come = admissions(Identity("cam1"))
    assert come[: len(gone)] == gone  # what it had before is taken away first
    assert [each["username"] for each in come if each["command"] == "createClient"] == [OWN, BULK]


def test_deleting_what_is_not_there_is_what_was_wanted() -> None:
    assert tolerated({"command": "deleteClient"})
    assert tolerated({"command": "deleteClient", "error": "Client not found"})
    assert not tolerated({"command": "createClient", "error": "Role not found"})
    assert not tolerated({"command": "deleteClient", "error": "Internal error"})
