"""The tables of the configuration that are about the whole fleet: when to train, whom to tell, where the rows are."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Annotated, Any
from zoneinfo import ZoneInfo

from pydantic import AfterValidator, Field, SecretStr, field_validator

from trainer.config_parts import Seconds, Section
from trainer.core.triggers import CRON, check_schedule, last_due

URLS_MAX = 32


def _cron(text: str) -> str:
    if text:
        check_schedule(text)
        last_due(text, datetime.UTC, 0.0)  # one that no day fits is found now, not on a Sunday night
    return text


Cron = Annotated[str, AfterValidator(_cron)]


class Triggers(Section):
    """What calls for trainings beside the count of new samples. `cron`: minute, hour, day of month, month, day of week;
    empty: no schedule; a model's own `cron` goes before. `time_zone`: as `Europe/Berlin`; empty: this machine's."""

    cron: Cron = CRON
    time_zone: str = ""
    drift: bool = True

    @field_validator("time_zone")
    @classmethod
    def _known(cls, value: str) -> str:
        try:
            _zone(value)
        except (ValueError, OSError, LookupError):
            raise ValueError(f"no time zone {value!r} is known here: use a name such as Europe/Berlin, or ''") from None
        return value

    def zone(self) -> datetime.tzinfo | None:
        """The time zone of the schedule; None: this machine's own."""
        return _zone(self.time_zone)


def _zone(name: str) -> ZoneInfo | None:
    return ZoneInfo(name) if name else None


class DatabaseAt(Section):
    """Where the rows are. `url` empty: a SQLite file in `data_dir`; else as
    `postgresql://user:password@host/name`. It is never shown."""

    url: SecretStr = SecretStr("")

    @field_validator("url")
    @classmethod
    def _carried(cls, value: SecretStr) -> SecretStr:
        scheme = value.get_secret_value().partition(":")[0]
        if scheme not in ("", "postgresql", "postgresql+psycopg"):
            raise ValueError("this kind of database is not known: use postgresql://user:password@host/name, or ''")
        return value

    def where(self, data_dir: Path) -> Path | str:
        """The SQLite file, or an URL for SQLAlchemy, with the password."""
        url = self.url.get_secret_value()
        return url.replace("postgresql:", "postgresql+psycopg:", 1) if url else data_dir / "trainer.sqlite"


class Storage(Section):
    """An object store that has the releases too, for devices to fetch them from: its URL as fsspec takes it (`s3://`, `gs://`,
    `abfs://`, `file://`), and what its driver takes. Keys belong in the environment, where the driver looks for them."""

    mirror: str = ""
    options: dict[str, Any] = {}

    @field_validator("mirror")
    @classmethod
    def _whole(cls, value: str) -> str:
        if value and "://" not in value:
            raise ValueError("this is no URL: use s3://bucket/prefix, or file:///folder")
        return value


class Notify(Section):
    """Who is told of changes: addresses as apprise takes them (mail, chat, webhooks). They hold secrets and are never
    shown. `kinds`: of events, with `*` at the end for all that begin so, and `device:` before those of devices; at most
    `per_hour` messages about ours and `devices_per_hour` about devices' are sent an hour, and what is more is told in one
    sum. A message that cannot be sent is tried again `tries_max` times."""

    urls: Annotated[list[SecretStr], Field(max_length=URLS_MAX)] = []
    kinds: list[str] = ["training_*", "rollout_*", "drift*", "notice", "*_expires", "metadata_not_renewed"]
    per_hour: Annotated[int, Field(ge=1, le=3600)] = 60
    devices_per_hour: Annotated[int, Field(ge=1, le=3600)] = 10
    tries_max: Annotated[int, Field(ge=1, le=100)] = 8
    retry_s: Seconds = 10.0  # before the first try again; doubled with each, up to an hour
