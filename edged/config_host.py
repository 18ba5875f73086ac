"""Where releases come from, over which carrier, and how much of the link they may take."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from edged.config_sources import Seconds, Section
from edged.wire.messages import MIRRORS_MAX

Hour = Annotated[int, Field(ge=0, le=24)]


class Host(Section):
    """The trainer: `url` overrides the address that it announces, `urls` are further ones that serve releases.

    `metered`: the link is paid for by the byte; a release that misses more than `metered_mib_max` waits for `metered_hours`
    (from, to: hours of the local day).
    """

    url: str | None = None
    urls: Annotated[list[str], Field(max_length=MIRRORS_MAX)] = []
    carrier: Literal["auto", "mqtt", "https"] = "auto"  # what brings releases here; auto: mqtt up to 64 MiB
    fetch_retry_s: Seconds = 10.0
    bandwidth_kib_s: Annotated[int, Field(ge=0)] = 0  # of releases and samples together; 0: no limit
    metered: bool = False
    metered_mib_max: Annotated[float, Field(ge=0)] = 8.0
    metered_hours: tuple[Hour, Hour] | None = None
