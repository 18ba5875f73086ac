"""The trainer's tables: what must outlive the process. How they are read and written: `trainer.sql`.

`trainer serve` writes, and workers their leases; command lines add rows to `requests` and read the rest.
"""

from __future__ import annotations

from sqlalchemy import JSON, BigInteger, Boolean, Column, Float, Index, Integer, Table
from sqlalchemy.util import OrderedSet

from trainer.schema import String, metadata
from trainer.sql import SCHEMA_VERSION, Changed, Database, DatabaseError, Served, note_changed, parts, put, put_all
from trainer.tables_live import detections, judged, looks, measured

__all__ = [
    "SCHEMA_VERSION", "Changed", "Database", "DatabaseError", "Served", "detections", "judged", "looks", "measured",
    "metadata", "note_changed", "parts", "put", "put_all",
]  # fmt: skip

devices = Table(
    "devices",
    metadata,
    Column("device", String, primary_key=True),
    Column("online", Boolean, nullable=False, default=False),
    Column("boot", String, nullable=False, default=""),
    Column("tier", String, nullable=False, default=""),
    Column("profile", String, nullable=False, default=""),
    Column("capabilities", JSON, nullable=False, default=list),
    Column("desired_rev", Integer, nullable=False, default=0),  # the highest that the device says it has seen
    Column("models", JSON, nullable=False, default=dict),  # slot -> ModelReport
    Column("health", JSON, nullable=False, default=dict),
    Column("seen_at", Float, nullable=False, default=0.0),
    Column("listed_at", Float, nullable=False, default=0.0),  # when its whole catalogue was last asked for
    Index("devices_by_listing", "online", "listed_at"),
)

removed = Table(  # devices that an operator took out for good; see trainer/removed.py
    "removed",
    metadata,
    Column("device", String, primary_key=True),
    Column("at", Float, nullable=False),
    Column("reason", String, nullable=False, default=""),
    Column("known", JSON, nullable=False),  # its row in `devices`, for taking it back
)

desired = Table(
    "desired",
    metadata,
    Column("device", String, primary_key=True),
    Column("rev", Integer, nullable=False),
    Column("models", JSON, nullable=False, default=dict),  # slot -> ReleaseRef
    Column("adapters", JSON, nullable=False, default=dict),
    Column("policy", JSON, nullable=False, default=dict),
)

samples = Table(
    "samples",
    metadata,
    Column("id", String, primary_key=True),
    Column("device", String, nullable=False),
    Column("model", String, nullable=False),
    Column("pipeline", String, nullable=False),
    Column("release", String, nullable=False),
    Column("state", String, nullable=False),
    Column("sha256", String, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("label", JSON, nullable=False, default=list),
    Column("label_confidence", Float, nullable=False, default=0.0),
    Column("provenance", JSON),
    Column("captured", Float, nullable=False),
    Column("entry_ts", Float, nullable=False),  # of the catalogue entry: an older one changes nothing
    Column("job", String),  # the open job that claims it
    Column("tried", Integer, nullable=False, default=0),  # jobs that gave it back: it no longer calls for training
    Column("used_by", String, nullable=False, default=""),  # the release that it trained
    Index("samples_by_state", "model", "state"),
    Index("samples_by_hash", "sha256"),
    Index("samples_by_job", "job"),
)

opinions = Table(  # who else said something about a sample, on the way to its label
    "opinions",
    metadata,
    Column("sample", String, primary_key=True),
    Column("said", JSON, nullable=False),  # as edged.wire.messages.Opinion, the first who was asked first
)

predictions = Table(  # what the device's own model had answered to a text: the other half of a pair
    "predictions",
    metadata,
    Column("sample", String, primary_key=True),
    Column("label", JSON, nullable=False),
)

windows = Table(
    "windows",
    metadata,
    Column("id", String, primary_key=True),  # of the message
    Column("device", String, nullable=False),
    Column("pipeline", String, nullable=False),
    Column("release", String, nullable=False),
    Column("start", Float, nullable=False),
    Column("end", Float, nullable=False),
    Column("items", Integer, nullable=False),
    Column("accepted", Integer, nullable=False),
    Column("audited", Integer, nullable=False),
    Column("escalated", Integer, nullable=False),
    Column("errors", Integer, nullable=False),
    Column("body", JSON, nullable=False),
    Index("windows_by_release", "release", "start"),
    Index("windows_by_device", "device", "start"),
)

jobs = Table(
    "jobs",
    metadata,
    Column("id", String, primary_key=True),
    Column("model", String, nullable=False),
    Column("source", String, nullable=False),
    Column("target", String, nullable=False),
    Column("reason", String, nullable=False),
    Column("status", String, nullable=False),
    Column("detail", String, nullable=False, default=""),  # why it ended as it did
    Column("created", Float, nullable=False),
    Column("claim_until", Float, nullable=False),
    Column("started", Float),  # of the training
    Column("finished", Float),
    Column("starts", Integer, nullable=False, default=0),  # of the training child: stops an endless restart
    Column("manifest", JSON, nullable=False),
    Column("result", JSON, nullable=False, default=dict),  # the run's metadata.json, shortened
    Column("rollout", String),
    Index("jobs_by_model", "model", "created"),
)

leases = Table(  # of jobs in training; changed by `trainer.leases` alone
    "leases",
    metadata,
    Column("job", String, primary_key=True),
    Column("worker", String, nullable=False),
    Column("token", String, nullable=False),  # of this lease: who does not have it any more changes nothing
    Column("taken", Float, nullable=False),
    Column("expires", Float, nullable=False),
    Column("ended", Integer),  # the child's exit status; null: it runs
)

workers = Table(
    "workers",
    metadata,
    Column("name", String, primary_key=True),
    Column("facts", JSON, nullable=False),  # core.placement.HostFacts
    Column("seen", Float, nullable=False),
    Column("job", String),
)

rollouts = Table(
    "rollouts",
    metadata,
    Column("id", String, primary_key=True),
    Column("model", String, nullable=False),
    Column("release", String, nullable=False),
    Column("sha256", String, nullable=False),
    Column("phase", String, nullable=False),
    Column("state", JSON, nullable=False),  # core.rollout.Rollout
    Column("previous", JSON, nullable=False),  # device -> ReleaseRef it ran before, or null
    Column("created", Float, nullable=False),
    Column("updated", Float, nullable=False),
)

commands = Table(
    "commands",
    metadata,
    Column("id", String, primary_key=True),
    Column("device", String, nullable=False),
    Column("type", String, nullable=False),
    Column("body", JSON, nullable=False),
    Column(
        "state", String, nullable=False
    ),  # open | accepted | failed (these are sent again) | done | refused | expired
    Column("reason", String, nullable=False, default=""),
    Column("detail", JSON, nullable=False, default=dict),
    Column("created", Float, nullable=False),
    Column("job", String, nullable=False, default=""),
    Index("commands_in_order", "state", "created", "id"),
)

events = Table(
    "events",
    metadata,
    Column("id", String, primary_key=True),
    Column("ts", Float, nullable=False),
    Column("source", String, nullable=False),  # a device, or the trainer's name
    Column("kind", String, nullable=False),
    Column("text", String, nullable=False),
    Column("detail", JSON, nullable=False, default=dict),
    Column("published", Boolean, nullable=False, default=True),
    Index("events_by_ts", "ts"),
    Index("events_by_published", "published", "ts"),
)

requests = Table(
    "requests",
    metadata,
    Column("id", String, primary_key=True),
    Column("kind", String, nullable=False),
    Column("body", JSON, nullable=False),
    Column("created", Float, nullable=False),
    Column("answer", JSON),  # null: not done yet
)

seen = Table(
    "seen",
    metadata,
    Column("id", String, primary_key=True),  # of a message that was taken in
    Column("ts", Float, nullable=False),
    Index("seen_by_ts", "ts"),
)

identities = Table(  # who has certificates; written by the command line
    "identities",
    metadata,
    Column("name", String, primary_key=True),
    Column("site", String, nullable=False),
    Column("group", String, nullable=False, default=""),
    Column("roles", JSON, nullable=False),
    Column("enrolled", Float, nullable=False),
    Column("revoked", Float),  # null: he may connect
    Column("reason", String, nullable=False, default=""),
    Index("identities_by_revoked", "revoked"),
)

certificates = Table(
    "certificates",
    metadata,
    Column("serial", String, primary_key=True),  # hexadecimal
    Column("name", String, nullable=False),  # of the identity
    Column("cn", String, nullable=False),
    Column("expires", Float, nullable=False),
    Column("revoked", Float),
    Index("certificates_by_name", "name"),
)

pool = Table(  # what was said about pixels and texts that are kept here; see trainer/pool.py
    "pool",
    metadata,
    Column("id", String, primary_key=True),  # of what it says: the same said again is the same row
    Column("sha256", String, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("device", String, nullable=False),
    Column("model", String, nullable=False),
    Column("task", String, nullable=False),
    Column("label", JSON, nullable=False),
    Column("verdict", String, nullable=False),  # labelled | rejected
    Column("kind", String, nullable=False),  # who said it: person | model
    Column("who", String, nullable=False),
    Column("release", String, nullable=False),
    Column("confidence", Float, nullable=False),
    Column("captured", Float, nullable=False),
    Column("origin", String, nullable=False),  # where it came from, in words
    Column("added", Float, nullable=False),
    Column("said", Float, nullable=False),  # when it was last said: a later word of a person counts more
    Index("pool_by_model", "model", "sha256"),
    Index("pool_by_hash", "sha256"),
)

pulls = Table(  # pixels that an operator wants here without a training; see trainer/collect.py
    "pulls",
    metadata,
    Column("id", String, primary_key=True),  # stands in samples.job while a sample is claimed for it
    Column("state", String, nullable=False),  # open | done
    Column("samples", JSON, nullable=False),  # ids
    Column("here", JSON, nullable=False, default=list),  # ids whose pixels are in the pool
    Column("missing", JSON, nullable=False, default=dict),  # id -> why it did not come
    Column("created", Float, nullable=False),
    Column("until", Float, nullable=False),
    Index("pulls_by_state", "state"),
)

registrations = Table(  # which server was told of which release
    "registrations",
    metadata,
    Column("target", String, primary_key=True),  # the server's name in the configuration
    Column("release", String, primary_key=True),
    Column("sha256", String, nullable=False),  # of the release's manifest; with its name the key of idempotency
    Column("state", String, nullable=False),  # core.registration.State
    Column("body", JSON),  # what is sent, the same at every try; null: not made yet
    Column("tries", Integer, nullable=False, default=0),
    Column("due", Float, nullable=False, default=0.0),  # of the next try
    Column("status", Integer),  # of the last answer
    Column("error", String, nullable=False, default=""),  # of the last try
    Column("created", Float, nullable=False),
    Column("updated", Float, nullable=False),
    Index("registrations_by_state", "target", "state"),
)

labels = Table(  # of devices; see trainer/inventory.py
    "labels",
    metadata,
    Column("device", String, primary_key=True),
    Column("born", JSON, nullable=False, default=dict),  # what its birth says
    Column("given", JSON, nullable=False, default=dict),  # what an operator says: goes before; null: not there
)

schedules = Table(  # see trainer/ready.py
    "schedules",
    metadata,
    Column("model", String, primary_key=True),
    Column("rule", String, nullable=False),  # cron and time zone: with another one everything begins anew
    Column("looked", Float, nullable=False),  # the time of the schedule that was dealt with last
)

notices = Table(  # events on their way to people, a row for each address; see trainer/notices.py
    "notices",
    metadata,
    Column("id", String, primary_key=True),  # of the event, and of the address
    Column("target", String, nullable=False),  # which address: a hash of it, for it is secret
    Column("title", String, nullable=False),
    Column("text", String, nullable=False),
    Column("level", String, nullable=False),
    Column("created", Float, nullable=False),
    Column("tries", Integer, nullable=False, default=0),
    Column("due", Float, nullable=False, default=0.0),  # of the next try; of what is sent, when that was
    Column("state", String, nullable=False),  # waiting | sent | summed (another one stood for it) | given_up
    Index("notices_by_state", "target", "state", "due"),
)

for _table in metadata.tables.values():  # by name: the same file at every first start, wherever objects lie in memory
    _table.indexes = OrderedSet(sorted(_table.indexes, key=lambda index: str(index.name)))
