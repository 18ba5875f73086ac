"""The life of a training job: claim samples, wait for their pixels, have a worker train, release or give back.

    claiming -> training -> deploying -> completed | rolled_back
             -> failed   -> refused | failed

Each step is one transaction, and what it asks of devices (claim, used, release) are rows in it. Training is a worker's
(`trainer.worker`), who leases the job; here the result is taken that its child left.
"""

from __future__ import annotations

import datetime
import logging
import shutil
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, insert, select, update

from edged.wire.manifest import TrainingManifest, TrainingSample
from trainer import leases
from trainer.child import EXIT_UNWRITTEN, Outcome, read_outcome
from trainer.claims import by_device, end_claims, forget_pixels, give_back, refused
from trainer.config_text import own_names
from trainer.core.rollout import ENDED, Phase, Rollout
from trainer.core.triggers import Fire, Wait, Wish
from trainer.database import jobs, parts, rollouts, samples
from trainer.faults import Faults
from trainer.fleet import answers_of, current_release, members, opinions_of, trainable
from trainer.host import Host, new_id
from trainer.keys import TrustError
from trainer.ready import OPEN, decision, note_schedule, to_note
from trainer.releases import ReleaseError
from trainer.rollouts import start_rollout
from trainer.signing import register
from trainer.worker import Worker

log = logging.getLogger(__name__)


class Jobs:
    """Drives every job; `tick` is called about once a second by the coordinator's thread."""

    def __init__(self, host: Host, worker: Worker | None = None) -> None:
        """`worker`: trains in this process's own child; None: others lease the jobs."""
        self._host, self._worker = host, worker
        self.faults = Faults(host, "job")
        self._waits: dict[str, str] = {}  # model -> why it does not train; said once

    def tick(self) -> None:
        """Start what a trigger asks for, and move every open job on by what has happened."""
        for model in self._host.config.models:
            with self.faults.of(model):
                self._trigger(model)
        if self._worker is not None:
            with self.faults.of("worker"):
                self._worker.tick()
        with self._host.database.read() as connection:
            rows = [dict(row._mapping) for row in connection.execute(select(jobs).where(jobs.c.status.in_(OPEN)))]
        self.faults.keep(["worker", *self._host.config.models, *(row["id"] for row in rows)])
        for row in sorted(rows, key=lambda row: row["created"]):
            with self.faults.of(row["id"]):
                self._go_on(row)

    def _go_on(self, row: dict[str, Any]) -> None:
        if row["status"] == "claiming":
            self._claiming(row)
        elif row["status"] == "training":
            self._training(row)
        else:
            self._deploying(row)

    def stop(self) -> None:
        """End the training child; its job is leased again, by another worker or with the next `trainer serve`."""
        if self._worker is not None:
            self._worker.stop()

    def train_now(self, model: str, wish: Wish = "operator") -> dict[str, Any]:
        """Train at somebody's wish; the answer to show (L16), or an `error`. Only an operator's goes before the threshold
        and the minimum interval."""
        decided = self._decide(model, wish)
        if isinstance(decided, Wait):
            return {"error": f"{model} is not trained: {decided.reason}"}
        return self._open_job(model, decided.reason)

    def _trigger(self, model: str) -> None:
        host, reason = self._host, ""
        decided = self._decide(model)
        with host.database.read() as connection:
            note = to_note(connection, host.config, model, decided, host.now())
        if note or isinstance(decided, Fire):
            with host.database.write() as connection:
                answer = self._open_job(model, decided.reason) if isinstance(decided, Fire) else {}
                reason = answer.get("error", "")
                if note and not reason:
                    note_schedule(connection, host.config, model, host.now())
        if reason and reason != self._waits.get(model):
            log.warning("model %s is due for training, but: %s", model, reason)
        self._waits[model] = reason

    def _decide(self, model: str, wish: Wish = "") -> Fire | Wait:
        settings = self._host.config.any_model(model)
        with self._host.database.read() as connection:
            rules = settings.trigger_rules()
            return decision(connection, self._host.config, model, rules, now=self._host.now(), wish=wish)

    def _open_job(self, model: str, reason: str) -> dict[str, Any]:
        """Write the manifest, claim its samples, and return the answer to a trigger (L16), or an `error`."""
        host, settings, now = self._host, self._host.config.any_model(model), self._host.now()
        names = own_names(model, settings)
        with host.database.write() as connection:
            source = current_release(members(connection, model, settings.tier))
            if source is None:
                return {"error": f"no device reports an active release in a slot {model!r}"}
            base = getattr(settings, "base", "")
            if base and base != source:
                return {
                    "error": f"the fleet runs {source}, and models.{model}.base = {base}: an adapter fits one of them"
                }
            try:
                host.registry.get(source)
                target = str(host.registry.next_version(names[-1]))
            except ReleaseError as error:
                return {"error": f"the fleet runs a release that cannot be improved: {error}"}
            query = select(samples).where(*trainable(model, settings.label_confidence_min, names))
            rows = connection.execute(query.order_by(samples.c.captured.desc()).limit(settings.samples_max)).all()
            said = opinions_of(connection, [row.id for row in rows])
            own = answers_of(connection, [row.id for row in rows])
            job = f"{model}-{new_id()}"
            manifest = TrainingManifest(
                job=job,
                model=model,
                source=source,
                target=target,
                created=_iso(now),
                config=settings.model_dump(mode="json"),
                samples=[_training_sample(row, said.get(row.id), own.get(row.id)) for row in rows],
                adapter=_adapter_on(connection, model, settings.tier, source),
            )
            for part in parts([row.id for row in rows]):
                connection.execute(update(samples).where(samples.c.id.in_(part)).values(job=job))
            for device, ids in by_device(manifest.samples):
                host.command_samples(connection, device, "claim", ids, job=job)
            connection.execute(
                insert(jobs).values(
                    id=job,
                    model=model,
                    source=source,
                    target=target,
                    reason=reason,
                    status="claiming",
                    created=now,
                    claim_until=now + settings.claim_s_max,
                    manifest=manifest.model_dump(mode="json"),
                )
            )
            ready = now + _training_s(connection, model, settings.training_s_estimate)
            answer = {
                "action": "training_triggered",
                "reason": reason,
                "samples_collected": len(rows),
                "training_job_id": job,
                "target_model": target,
                "estimated_completion": _iso(ready),
            }
            host.announce(connection, "training_triggered", f"{target} from {len(rows)} samples: {reason}", **answer)
        return answer

    def _claiming(self, row: dict[str, Any]) -> None:
        host, now = self._host, self._host.now()
        manifest = TrainingManifest.model_validate(row["manifest"])
        missing = {each.id for each in manifest.samples if not (host.config.samples / each.sha256).is_file()}
        if missing:
            with host.database.read() as connection:
                lost = missing if now >= row["claim_until"] else missing & refused(connection, row["id"]).keys()
            if lost:
                self._drop(row, manifest, lost)
            return
        with host.database.write() as connection:
            _set(connection, row["id"], status="training")
            host.announce(
                connection,
                "training_samples_ready",
                f"{row['id']}: {len(manifest.samples)} samples are here",
                job=row["id"],
            )

    def _drop(self, row: dict[str, Any], manifest: TrainingManifest, lost: set[str]) -> None:
        """Go on without samples that their devices do not hand over, or fail when too few are left."""
        host = self._host
        kept = [each for each in manifest.samples if each.id not in lost]
        rules = host.config.any_model(row["model"]).trigger_rules()
        needed = {"operator": 0, "sample_threshold": rules.threshold}.get(row["reason"], rules.called - 1)
        with host.database.write() as connection:
            text = f"{row['id']}: {len(lost)} of {len(manifest.samples)} samples did not come"
            if len(kept) <= needed:
                self._end(connection, row, "failed", f"{text}; {len(kept)} are left, more than {needed} are needed")
                return
            if host.now() >= row["claim_until"]:
                end_claims(connection, row["id"])
            given = [each for each in manifest.samples if each.id in lost]
            give_back(host, connection, row["id"], given, tried=1)
            reduced = manifest.model_copy(update={"samples": kept})
            _set(connection, row["id"], manifest=reduced.model_dump(mode="json"))
            host.announce(connection, "training_samples_missing", text, job=row["id"])

    def _training(self, row: dict[str, Any]) -> None:
        """A worker trains it (`trainer.worker`); here is seen what came of it."""
        run, now = self._host.config.runs / row["id"], self._host.now()
        with self._host.database.read() as connection:
            lease = leases.of(connection, row["id"])
        if lease is not None and lease.ended is None and lease.expires > now:
            return
        outcome = read_outcome(run)
        if outcome is not None:
            self._finish(row, run, outcome)
        elif lease is not None and lease.ended is not None:
            self._child_ended(row, run, lease.ended)
        elif row["starts"] >= leases.STARTS_MAX:
            text = f"the training was started {leases.STARTS_MAX} times and never ended; see {run}"
            with self._host.database.write() as connection:
                self._end(connection, row, "failed", text)

    def _child_ended(self, row: dict[str, Any], run: Path, code: int) -> None:
        if code < 0:  # killed, by hand or for memory: it may go better another time
            log.warning("training %s was ended by signal %d; it is started again", row["id"], -code)
            with self._host.database.write() as connection:
                leases.drop(connection, row["id"])
            return
        last = self._log_end(run) if code != EXIT_UNWRITTEN else f"{run} cannot be written; is its disk full?"
        with self._host.database.write() as connection:
            self._end(connection, row, "failed", f"the training ended with {code} and left no result: {last}")

    def _finish(self, row: dict[str, Any], run: Path, outcome: Outcome) -> None:
        host = self._host
        if outcome.status != "passed":
            with host.database.write() as connection:
                self._end(connection, row, outcome.status, outcome.reason, outcome.summary)
            return
        try:
            # All are idempotent: after a crash before the commit they are done again.
            ref = register(host.config, host.registry, run / "candidate")
            if host.registry.get(ref.release).manifest.kind != "lora":  # an adapter's weights are the release itself
                host.config.checkpoints.mkdir(parents=True, exist_ok=True)
                beside = host.config.checkpoints / f".{row['target']}.pt"
                shutil.copyfile(run / "model.pt", beside)
                beside.replace(host.config.checkpoints / f"{row['target']}.pt")
        except (ReleaseError, TrustError, OSError) as error:
            with host.database.write() as connection:
                self._end(connection, row, "failed", f"the release could not be registered: {error}", outcome.summary)
            return
        with host.database.write() as connection:
            started = start_rollout(host, connection, ref)
            if isinstance(started, str):
                self._end(
                    connection,
                    row,
                    "failed",
                    f"{ref.release} is registered, but not rolled out: {started}",
                    outcome.summary,
                )
                return
            changes = {"status": "deploying", "rollout": started.id, "finished": host.now(), "result": outcome.summary}
            _set(connection, row["id"], **changes)
            leases.drop(connection, row["id"])
            host.announce(
                connection, "training_passed", f"{ref.release} passed the gate", job=row["id"], **outcome.summary
            )

    def _deploying(self, row: dict[str, Any]) -> None:
        host = self._host
        this = rollouts.c.id == row["rollout"]
        with host.database.read() as connection:  # twice a second: its state is as large as the fleet
            phase = connection.execute(select(rollouts.c.phase).where(this)).scalar_one()
        if phase not in ENDED:
            return
        with host.database.write() as connection:
            if phase == Phase.DONE:
                self._confirm(connection, row, f"the fleet runs {row['target']}")
            else:
                rollout = Rollout.from_dict(connection.execute(select(rollouts.c.state).where(this)).scalar_one())
                self._end(connection, row, "rolled_back", rollout.reason)

    def _confirm(self, connection: Connection, row: dict[str, Any], told: str) -> None:
        """The fleet runs the release: its samples are used up."""
        manifest = TrainingManifest.model_validate(row["manifest"])
        used = {"state": "used", "used_by": row["target"], "job": None}
        for part in parts([each.id for each in manifest.samples]):
            connection.execute(update(samples).where(samples.c.id.in_(part)).values(**used))
        for device, ids in by_device(manifest.samples):
            self._host.command_samples(connection, device, "used", ids, job=row["id"], release=row["target"])
        _set(connection, row["id"], status="completed", detail=told)
        self._host.announce(connection, "training_completed", told, job=row["id"])
        forget_pixels(connection, self._host.config.samples, [each.sha256 for each in manifest.samples])

    def _end(
        self,
        connection: Connection,
        row: dict[str, Any],
        status: str,
        reason: str,
        summary: dict[str, Any] | None = None,
    ) -> None:
        """A job that changes nothing in the fleet: its samples may train again."""
        manifest = TrainingManifest.model_validate(row["manifest"])
        leases.drop(connection, row["id"])
        end_claims(connection, row["id"])
        give_back(self._host, connection, row["id"], manifest.samples, tried=1)
        changes: dict[str, Any] = {"status": status, "detail": reason, "finished": row["finished"] or self._host.now()}
        if summary is not None:
            changes["result"] = summary
        _set(connection, row["id"], **changes)
        self._host.announce(connection, f"training_{status}", f"{row['target']}: {reason}", job=row["id"])
        forget_pixels(connection, self._host.config.samples, [each.sha256 for each in manifest.samples])

    @staticmethod
    def _log_end(run: Path) -> str:
        try:
            lines = (run / "log.txt").read_text(errors="replace").strip().splitlines()
        except OSError:
            lines = []
        return lines[-1][:500] if lines else "it wrote nothing"


def _training_sample(row: Any, opinions: list[dict[str, Any]] | None, answered: str | None) -> TrainingSample:
    """`answered`: the device's own answer, of a text."""
    label = {"boxes": row.label, "confidence": row.label_confidence}
    if any("text" in part for part in row.label):
        label = {"text": row.label[0]["text"], "other": answered, "confidence": row.label_confidence}
    provenance = {
        **(row.provenance or {}),
        "release": (row.provenance or {}).get("release", ""),
        "asked_by": row.release,
        "captured": row.captured,
        **({"opinions": opinions} if opinions else {}),
    }
    return TrainingSample(id=row.id, device=row.device, sha256=row.sha256, label=label, provenance=provenance)


def _adapter_on(connection: Connection, model: str, tier: str, source: str) -> str:
    """The adapter that most devices run on this release; "" where most run the bare one."""
    fleet = [each for each in members(connection, model, tier, "adapters") if each.base == source]
    adapted = current_release(fleet)
    return adapted if adapted and 2 * sum(each.active == adapted for each in fleet) > len(fleet) else ""


def _set(connection: Connection, job: str, **values: Any) -> None:
    connection.execute(update(jobs).where(jobs.c.id == job).values(**values))


def _training_s(connection: Connection, model: str, otherwise: float) -> float:
    """How long the last jobs of this model took, in seconds."""
    query = select(jobs.c.created, jobs.c.finished).where(jobs.c.model == model, jobs.c.finished.is_not(None))
    took = [row.finished - row.created for row in connection.execute(query.order_by(jobs.c.created.desc()).limit(5))]
    return sum(took) / len(took) if took else otherwise


def _iso(seconds: float) -> str:
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
