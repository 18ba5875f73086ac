"""The fleet by name: labels of devices, which devices a selector means, and what is known of each.

A label is said by the device (`[device] labels`, its birth) or by an operator (`trainer fleet label`), who goes before it.
`device`, `site`, `profile`, `tier` and `group` are there without anybody's doing; only `group` can be changed.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import Connection, select

from trainer.core.selectors import BadLabel, BadSelector, Selector, Term, check_labels, parse
from trainer.database import devices, identities, labels, put

log = logging.getLogger(__name__)

OWN = ("device", "site", "profile", "tier")  # facts, not labels: nobody gives or takes them
LABELS_MAX = 64  # of one device


def good_labels(device: str, born: Mapping[str, str]) -> dict[str, str]:
    """Those of a birth that are labels; what is none is left out and logged, the others count."""
    good: dict[str, str] = {}
    for key, value in list(born.items())[:LABELS_MAX]:
        try:
            check_labels({key: value})
        except BadLabel as error:
            log.warning("%s: %s", device, error)
        else:
            good[key] = value
    return good


def give_labels(connection: Connection, device: str, changes: Mapping[str, str | None]) -> dict[str, str] | str:
    """Set labels of a device, or take them away (None); all its labels afterwards, or why not."""
    known = connection.execute(select(devices.c.device).order_by(devices.c.device)).scalars().all()
    if device not in known:
        return f"device {device!r} was never seen; known: {', '.join(known[:20]) or 'none'}"
    for key in changes:
        if key in OWN:
            return f"label {key!r} of {device} is a fact of the device: change its configuration, or use another name"
    try:
        check_labels({key: value for key, value in changes.items() if value is not None})
    except BadLabel as error:
        return str(error)
    row = connection.execute(select(labels).where(labels.c.device == device)).first()
    born, given = (row.born, row.given) if row is not None else ({}, {})
    # What the device itself says is hidden; what only we said is forgotten.
    after = {**given, **changes}
    after = {key: value for key, value in after.items() if value is not None or key in born}
    if len(after) > LABELS_MAX:
        return f"{device} would have {len(after)} labels, at most {LABELS_MAX}: take some away first (KEY-)"
    put(connection, labels, {"device": device}, {"given": after})
    return _merged(born, after)


def labels_of(connection: Connection, site: str) -> dict[str, dict[str, str]]:
    """Device -> all its labels, facts among them, by name."""
    rows = {row.device: row for row in connection.execute(select(labels))}
    groups = {row.name: row.group for row in connection.execute(select(identities.c.name, identities.c.group))}
    found = {}
    for device in connection.execute(select(devices).order_by(devices.c.device)):
        row = rows.get(device.device)
        said = _merged(row.born, row.given) if row is not None else {}
        if groups.get(device.device) and "group" not in (row.given if row is not None else {}):
            said["group"] = groups[device.device]
        facts = {"device": device.device, "site": site, "profile": device.profile, "tier": device.tier}
        found[device.device] = {**said, **{key: value for key, value in facts.items() if value}}
    return found


def chosen(connection: Connection, site: str, text: str) -> list[str]:
    """The devices that a selector means, by name; raises BadSelector, also for a label that no device has: it is a typing
    mistake more often than a wish, and `!=` would then mean everybody."""
    selector, known = parse(text), labels_of(connection, site)
    check_keys(selector, known)
    return [device for device, its in known.items() if selector.matches(its)]


def check_keys(selector: Selector, known: Mapping[str, Mapping[str, str]]) -> None:
    """Raises BadSelector for a key that no device has."""
    keys = {key for its in known.values() for key in its} | {*OWN, "group"}
    for term in selector.terms:
        if term.key not in keys:
            raise BadSelector(
                f"selector {str(selector)!r}: no device has a label {term.key!r}; there are {', '.join(sorted(keys))}"
            )


def known_labels(connection: Connection, site: str, keys: Iterable[str]) -> None:
    """Raises BadSelector for a label that no device has."""
    check_keys(Selector(tuple(map(Term, keys))), labels_of(connection, site))


def _merged(born: Mapping[str, str], given: Mapping[str, str | None]) -> dict[str, str]:
    return {key: value for key, value in sorted({**born, **given}.items()) if value is not None}


def fleet(connection: Connection, rows: list[dict[str, Any]], site: str, selector: str = "") -> list[dict[str, Any]]:
    """`trainer.status.fleet_status` with the labels, of the devices that a selector means; raises BadSelector."""
    names, known = set(chosen(connection, site, selector)), labels_of(connection, site)
    return [{**row, "labels": known[row["device"]]} for row in rows if row["device"] in names]
