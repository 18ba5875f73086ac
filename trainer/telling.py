"""What devices run, and telling many of them to run something else, with few statements for all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy import Connection, select

from trainer.adapters import base_of, misfits
from trainer.database import desired, devices, note_changed, parts, put_all
from trainer.fleet import desired_after
from trainer.host import Host
from trainer.releases import ReleaseError
from trainer.removed import removed_names


def runs_now(host: Host, connection: Connection, device: str) -> dict[str, Any]:
    """What all slots of a device run, as the start of its first desired state."""
    return _runs(host, connection.execute(select(devices.c.models).where(devices.c.device == device)).scalar())


def references(
    host: Host, connection: Connection, names: Sequence[str], slot: str, part: str = "models"
) -> dict[str, dict[str, str] | None]:
    """The release to go back to, of each device: what it runs, else what it was last told; None when both are unknown. Of
    `part` "adapters" what it runs, and None is the bare base: what was told and does not run is no place to go back to."""
    found: dict[str, dict[str, str] | None] = {}
    for some in parts(names):
        reported, told = _rows(connection, some)
        for name in some:
            now = _runs(host, reported[name].models if name in reported else None)[part].get(slot)
            last = told[name]["models"].get(slot) if name in told and part == "models" else None
            found[name] = now or last
    return found


def tell(
    host: Host, connection: Connection, slot: str, wanted: Mapping[str, Mapping[str, str] | None], part: str = "models"
) -> None:
    """Change one slot (its model, or with `part` "adapters" its adapter) of the desired states of many devices, each as
    `fleet.desire` does. With another model goes the adapter that is not for it; an adapter brings its model along to a
    device that was told of none."""
    for some in parts(list(wanted)):
        reported, told = _rows(connection, some)
        out, rows = removed_names(connection, some), []
        for name in (each for each in some if each not in out):
            its = reported.get(name)
            now = _runs(host, its.models if its is not None else None)
            before, ref = told.get(name, now), wanted[name]
            changed: dict[str, Any] = {part: {slot: ref}}
            if part == "models" and misfits(host, before["adapters"].get(slot), ref):
                changed["adapters"] = {slot: None}
            if part == "adapters" and slot not in told.get(name, {"models": {}})["models"]:
                # A device takes an adapter off only where its base is desired by name.
                base = (base_of(host, ref) if ref is not None else None) or now["models"].get(slot)
                changed["models"] = {slot: base} if base is not None else {}
            after = desired_after(
                told.get(name),
                its.desired_rev if its is not None else 0,
                models=changed.get("models"),
                adapters=changed.get("adapters"),
                start_from=None if name in told else now,
            )
            if after is not None:
                rows.append({"device": name, **after})
        note_changed(connection, desired, [row["device"] for row in rows])
        put_all(connection, desired, ["device"], rows)


def _runs(host: Host, reported: Mapping[str, Any] | None) -> dict[str, Any]:
    found: dict[str, Any] = {"models": {}, "adapters": {}}
    for slot, report in (reported or {}).items():
        for name, release in (("models", report.get("active")), ("adapters", report.get("adapter"))):
            if release:
                try:
                    found[name][slot] = host.registry.get(release).ref.model_dump(mode="json")
                except ReleaseError:
                    continue  # not ours to name: without an entry the device keeps it
    return found


def _rows(connection: Connection, names: Sequence[str]) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """(what these devices report, what they were told)."""
    query = select(devices.c.device, devices.c.desired_rev, devices.c.models).where(devices.c.device.in_(names))
    reported = {row.device: row for row in connection.execute(query)}
    said = connection.execute(select(desired).where(desired.c.device.in_(names)))
    return reported, {row.device: dict(row._mapping) for row in said}
