"""Orders of operators and agents: a command line or a tool places one as a row, the running `trainer serve` carries it out.

It is carried out and answered in one transaction: a kill in between leaves neither, and no order is carried out twice.

Law of this file: whoever asks gets no further than `trainer.core.triggers` and `trainer.core.guards` let him (L15).
"""

from __future__ import annotations

import logging
import time
from typing import Any

from sqlalchemy import Connection, delete, insert, select, update
from sqlalchemy.exc import DataError, DBAPIError

from trainer import archive
from trainer.adapters import misfits
from trainer.collect import Collect
from trainer.config import ConfigError
from trainer.core.guards import may_deploy
from trainer.core.rollout import Event
from trainer.database import Database, Served, devices, requests
from trainer.fleet import ORDERS, desire, desired_of
from trainer.host import Host, new_id
from trainer.inventory import give_labels
from trainer.jobs import Jobs
from trainer.registration import retry
from trainer.releases import ReleaseError, StoredRelease
from trainer.removed import readmit, remove, removed_names, stranger
from trainer.rollouts import Rollouts, start_rollout
from trainer.signing import installable
from trainer.telling import runs_now

log = logging.getLogger(__name__)

KEEP_S = 86400.0
POLL_S = 0.1


def place(database: Database, kind: str, body: dict[str, Any]) -> str:
    """Store an order and return its id."""
    order = new_id()
    with database.write() as connection:
        connection.execute(insert(requests).values(id=order, kind=kind, body=body, created=time.time()))
    return order


def await_answer(database: Database, order: str, seconds: float) -> dict[str, Any] | None:
    """The answer to an order; None when there was none in time. The order stays, and is carried out later."""
    deadline = time.monotonic() + seconds
    while True:
        with database.read() as connection:
            answer: dict[str, Any] | None = connection.execute(
                select(requests.c.answer).where(requests.c.id == order)
            ).scalar_one_or_none()
        if answer is not None or time.monotonic() >= deadline:
            return answer
        time.sleep(POLL_S)


def withdraw(database: Database, order: str) -> bool:
    """Take back an order that was not carried out; False: it was, and has its answer."""
    with database.write() as connection:
        answer = connection.execute(select(requests.c.answer).where(requests.c.id == order)).scalar_one_or_none()
        if answer is not None:
            return False
        connection.execute(delete(requests).where(requests.c.id == order))
        return True


class Orders:
    """Carries out what was placed, oldest first; `tick` is called by the coordinator's thread."""

    def __init__(self, host: Host, jobs: Jobs, rollouts: Rollouts, collect: Collect | None = None) -> None:
        self._host, self._jobs, self._rollouts = host, jobs, rollouts
        self._collect = collect or Collect(host)

    def tick(self) -> None:
        """Carry out every order that has no answer yet."""
        database = self._host.database
        with database.read() as connection:
            waiting = connection.execute(select(requests).order_by(requests.c.created)).all()
        for row in waiting:
            if row.answer is None:
                with database.write() as connection:
                    answer = self._answer(row)
                    connection.execute(update(requests).where(requests.c.id == row.id).values(answer=answer))
            elif row.created < self._host.now() - KEEP_S:
                with database.write() as connection:
                    connection.execute(delete(requests).where(requests.c.id == row.id))

    def _answer(self, row: Any) -> dict[str, Any]:
        """What came of an order; one that failed has changed nothing."""
        try:
            with self._host.database.write():
                return self._carry_out(row.kind, row.body)
        except (ConfigError, ReleaseError, KeyError, ValueError) as error:
            return {"error": str(error)}
        except DataError as error:
            return {"error": f"{row.kind}: the database does not take these words: {error.orig}"}
        except (DBAPIError, Served):
            raise  # the database's trouble, not the order's: it is carried out later
        except Exception as error:  # one broken order must not keep all later ones waiting
            log.exception("order %s", row.kind)
            return {"error": f"{row.kind} failed: {type(error).__name__}: {error}"}

    def _carry_out(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        if kind == "train":
            return self._jobs.train_now(body["model"], "agent" if body.get("by") == "agent" else "operator")
        if kind == "rollout_start":
            return self._start(body["release"], body.get("unjudged", ""), body.get("by", "operator"))
        if kind == "rollout_abort":
            return self._rollouts.order(body["rollout"], Event.ABORT, "aborted by an operator")
        if kind == "rollout_pause":
            return self._rollouts.order(body["rollout"], Event.PAUSE, "paused by an operator")
        if kind == "rollout_resume":
            return self._rollouts.order(body["rollout"], Event.RESUME, "resumed by an operator")
        if kind == "rollout_promote":
            return self._rollouts.order(body["rollout"], Event.PROMOTE, "promoted by an operator")
        if kind == "desire":
            return self._desire(body["device"], body["models"], body["adapters"])
        if kind == "pull":
            return self._collect.start(body["samples"], body["seconds"])
        if kind == "registration_retry":
            return retry(self._host, body["release"], body["target"])
        if kind == "archive":
            return self._archive(body)
        if kind == "label":
            return self._label(body["device"], body["labels"])
        if kind in ("remove", "readmit"):
            return self._remove(kind, body)
        if kind == "notify":
            return self._notify(body["title"], body["text"], body["level"])
        if kind in ORDERS:
            return self._command(kind, body["device"], {k: v for k, v in body.items() if k != "device"})
        return {"error": f"order {kind!r} is unknown: the command line and `trainer serve` are of different versions"}

    def _start(self, release: str, unjudged: str, by: str) -> dict[str, Any]:
        stored = self._host.registry.get(release)
        installable(self._host.config, stored)
        refused = may_deploy(release, stored.manifest.evaluation.get("gate"), unjudged, by)
        if refused:
            return {"error": refused}
        with self._host.database.write() as connection:
            started = start_rollout(self._host, connection, stored.ref)
            if isinstance(started, str):
                return {"error": started}
            if unjudged:
                self._host.announce(connection, "rollout_unjudged", f"{release}: {unjudged}", rollout=started.id)
        fields = {"release": release, "canary": list(started.canary), "devices": list(started.devices)}
        return {"rollout": started.id, **fields}

    def _label(self, device: str, changes: dict[str, str | None]) -> dict[str, Any]:
        with self._host.database.write() as connection:
            if removed_names(connection, [device]):
                return {"error": stranger(connection, device)}
            after = give_labels(connection, device, changes)
        return {"error": after} if isinstance(after, str) else {"device": device, "labels": after}

    def _remove(self, kind: str, body: dict[str, Any]) -> dict[str, Any]:
        with self._host.database.write() as connection:
            if kind == "readmit":
                return readmit(self._host, connection, body["device"])
            return remove(self._host, connection, body["device"], body.get("reason", ""))

    def _archive(self, body: dict[str, Any]) -> dict[str, Any]:
        with self._host.database.write() as connection:
            return archive.order(self._host, connection, **body)

    def _notify(self, title: str, text: str, level: str) -> dict[str, Any]:
        with self._host.database.write() as connection:
            self._host.announce(connection, "notice", text, title=title, level=level)
        return {"notified": True}

    def _command(self, kind: str, device: str, body: dict[str, Any]) -> dict[str, Any]:
        """Pass a person's order on to a device; a release is named to it with its hash."""
        host = self._host
        if kind == "pin" and body.get("release"):
            body |= {"release": host.registry.get(body["release"]).ref.model_dump(mode="json")}
        with host.database.write() as connection:
            reported = {
                row.device: row.models for row in connection.execute(select(devices.c.device, devices.c.models))
            }
            if device not in reported:
                return {"error": stranger(connection, device)}
            if kind != "forget" and body["slot"] not in reported[device]:
                return {
                    "error": f"{device} has no slot {body['slot']!r}; it has {', '.join(reported[device]) or 'none'}"
                }
            command = host.command_slot(connection, device, kind, body)
            text = f"{device}: {kind} {body.get('slot') or body['release']}"
            host.announce(connection, f"device_{kind}", text, device=device, command=command)
        return {"device": device, "command": command, "state": "sent"}

    def _desire(
        self, device: str, wanted_models: dict[str, str], wanted_adapters: dict[str, str | None]
    ) -> dict[str, Any]:
        host = self._host
        models = {slot: host.registry.get(release) for slot, release in wanted_models.items()}
        adapters = {slot: host.registry.get(name) if name else None for slot, name in wanted_adapters.items()}
        for stored in (*models.values(), *filter(None, adapters.values())):
            installable(host.config, stored)
        for stored in (*models.values(), *filter(None, adapters.values())):
            verdict = stored.manifest.evaluation.get("gate")
            # One device, by an operator's hand: unjudged is his to answer for, refused is not.
            refused = may_deploy(stored.ref.release, verdict, "told to one device", "operator")
            if refused:
                return {"error": refused}
        for slot, stored in models.items():
            if stored.manifest.kind == "lora":
                return {"error": f"{slot}: {stored.ref.release} is an adapter; use --adapter"}
        for slot, adapter in adapters.items():
            if adapter is not None and adapter.manifest.kind != "lora":
                return {
                    "error": f"{slot}: {adapter.ref.release} is no adapter but a {adapter.manifest.kind}; use --model"
                }
        with host.database.write() as connection:
            known = connection.execute(select(devices.c.device)).scalars().all()
            if device not in known:
                return {"error": stranger(connection, device)}
            refused = self._off_base(connection, device, models, adapters)
            if refused:
                return {"error": refused}
            off = self._misfits(connection, device, {s: each for s, each in models.items() if s not in adapters})
            adapters |= dict.fromkeys(off)
            rev = desire(
                connection,
                device,
                models={slot: stored.ref.model_dump(mode="json") for slot, stored in models.items()},
                adapters={slot: each.ref.model_dump(mode="json") if each else None for slot, each in adapters.items()},
                start_from=runs_now(host, connection, device),
            )
            text = ", ".join([*wanted_models.values(), *(name or "no adapter" for name in wanted_adapters.values())])
            text += "".join(f", {release} off {slot}: it is for another model" for slot, release in off.items())
            host.announce(connection, "desired_set", f"{device}: {text}", device=device, rev=rev)
        return {"device": device, "rev": rev, **({"adapters_off": off} if off else {})}

    def _off_base(
        self, connection: Connection, device: str, models: dict[str, StoredRelease],
        adapters: dict[str, StoredRelease | None],
    ) -> str:  # fmt: skip
        """Why an adapter is not for the model that the device shall run in its slot, or runs; empty when it may go there."""
        runs = runs_now(self._host, connection, device)["models"]
        runs |= (desired_of(connection, device) or {"models": {}})["models"]
        runs |= {slot: stored.ref.model_dump(mode="json") for slot, stored in models.items()}
        for slot, adapter in adapters.items():
            if adapter is not None and misfits(self._host, adapter.ref.model_dump(mode="json"), runs.get(slot)):
                base = adapter.manifest.base.release if adapter.manifest.base else "another model"
                model = runs[slot]["release"]
                return (
                    f"{slot}: {adapter.ref.release} is an adapter for {base}, and {device} runs {model} there: "
                    f"add --model {slot}={base}, or train one for {model}"
                )
        return ""

    def _misfits(self, connection: Connection, device: str, models: dict[str, StoredRelease]) -> dict[str, str]:
        """slot -> the adapter that is desired of a device, or that it runs, and is for another model than these."""
        runs = desired_of(connection, device) or runs_now(self._host, connection, device)
        found = {slot: runs["adapters"].get(slot) for slot in models}
        return {
            slot: str(adapter["release"])
            for slot, adapter in found.items()
            if adapter is not None and misfits(self._host, adapter, models[slot].ref.model_dump(mode="json"))
        }
