"""The state of Mosquitto's dynamic security plugin, written as a whole: adding clients by command saves everything again for
each, and so takes the square of their number.

One role a client, with literal topics: the plugin of Mosquitto 2.0 knows no `%u`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from trainer.core.access import COMMON, Identity, Rights, rights

FLEET = "fleet"  # the role with what every device may hear; its name is no common name's: see `role_name`

Entry = dict[str, Any]


def role_name(common_name: str) -> str:
    """The role of one client."""
    return f"client:{common_name}"


def document(identities: Iterable[Identity]) -> Entry:
    """The plugin's whole state for these identities; the same for the same identities in any order."""
    roles, clients = [_role(FLEET, COMMON)], []
    for identity in identities:
        for role, client in entries(identity):
            roles.append(role)
            clients.append(client)
    # Backwards: the plugin inserts in order into lists that it walks from the front, 0.4 s instead of 3.5 s for 20 000.
    return {
        "defaultACLAccess": {
            "publishClientSend": False, "publishClientReceive": False, "subscribe": False, "unsubscribe": True,
        },
        "clients": sorted(clients, key=lambda entry: str(entry["username"]), reverse=True),
        "groups": [],
        "roles": sorted(roles, key=lambda entry: str(entry["rolename"]), reverse=True),
    }  # fmt: skip


def entries(identity: Identity) -> Iterable[tuple[Entry, Entry]]:
    """The role and the client of each common name of an identity."""
    for common_name, allowed in rights(identity):
        names = [role_name(common_name), *([FLEET] if "device" in identity.roles else [])]
        yield (
            _role(role_name(common_name), allowed),
            {"username": common_name, "roles": [{"rolename": name, "priority": 0} for name in names]},
        )


def admissions(identity: Identity) -> list[Entry]:
    """Commands that make a running broker know an identity as it is now; those that fail are said by `tolerated`."""
    commands = dismissals(identity)
    for role, client in entries(identity):
        commands += [{"command": "createRole", **role}, {"command": "createClient", **client}]
    return commands


def dismissals(identity: Identity) -> list[Entry]:
    """Commands that make a running broker forget an identity, and end its connections.

    Not `disableClient`: a client with a certificate would come back.
    """
    return [
        command
        for name in identity.common_names
        for command in (
            {"command": "deleteClient", "username": name},
            {"command": "deleteRole", "rolename": role_name(name)},
        )
    ]


def tolerated(answer: Entry) -> bool:
    """Whether an answer means that what was wanted is so: what is deleted twice is not there."""
    return "error" not in answer or (str(answer.get("command")).startswith("delete") and "not found" in answer["error"])


def _role(name: str, allowed: Rights) -> Entry:
    acls = [("publishClientSend", topic) for topic in allowed.send]
    for topic in allowed.hear:
        # Also when it is delivered: a session may hold subscriptions from before its client's rights were changed.
        acls += [("subscribePattern", topic), ("publishClientReceive", topic)]
    acls += [("subscribePattern", topic) for topic in allowed.join]
    return {
        "rolename": name,
        "acls": [{"acltype": kind, "topic": topic, "priority": 0, "allow": True} for kind, topic in acls],
    }
