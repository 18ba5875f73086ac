"""The tables that say where items come from: a folder, requests, a camera, a stream."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    field_serializer,
    model_validator,
)

Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")]
Seconds = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Base of every table: an unknown key is a typing mistake and is refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


def _device(value: Any) -> Any:
    text = str(value) if type(value) is int else value
    if not isinstance(text, str) or not text or text.startswith("-"):
        raise ValueError('must be a camera, as "/dev/video0" or 0, or a video file, as "/srv/line.mp4"')
    if "://" in text:
        raise ValueError('is an address: a network camera is type = "rtsp" with url')
    return text


def _rtsp(value: SecretStr) -> SecretStr:
    text = value.get_secret_value()
    try:
        where = urlsplit(text)
        usable = where.scheme == "rtsp" and bool(where.hostname) and where.port != 0
    except ValueError:
        usable = False
    if not usable or any(c.isspace() for c in text) or "@" in where.path + where.query:
        raise ValueError(
            "is no address of a stream: write rtsp://user:password@10.0.0.7:554/path, and what is special in a user or "
            "password (as / @ : and spaces) as %2F %40 %3A %20"
        )
    return value


class DirectorySource(Section):
    """Files that appear in a folder, each exactly one item. Writers rename into place, or close after writing."""

    type: Literal["directory"] = "directory"
    path: Path
    after: Literal["delete", "move"] = "move"  # `move` to `<path>/done`; rejected files always go to `<path>/rejected`


class MqttSource(Section):
    """Requests on `down/infer/{pipeline}`."""

    type: Literal["mqtt"] = "mqtt"


class LiveSource(Section):
    """A stream: only its newest frame counts."""

    fps_max: Annotated[float, Field(gt=0, le=1000)] | None = None  # frames a second given to the pipeline; None: all
    timeout_s: Seconds = 10.0  # so long without a frame and the stream counts as lost


class CameraSource(LiveSource):
    """A V4L2 camera, by its number or its path, or a video file at its own pace. None: as the camera likes."""

    type: Literal["camera"] = "camera"
    device: Annotated[str, BeforeValidator(_device)]
    width: Annotated[int, Field(ge=1, le=65536)] | None = None
    height: Annotated[int, Field(ge=1, le=65536)] | None = None
    fps: Annotated[float, Field(gt=0, le=1000)] | None = None
    fourcc: Annotated[str, Field(pattern=r"^[ -~]{4}$")] | None = None
    loop: bool = False  # a video file starts over at its end

    def is_file(self) -> bool:
        """Whether `device` is a video file."""
        return not (self.device.isdigit() or self.device.startswith("/dev/"))

    @model_validator(mode="after")
    def _camera_or_file(self) -> CameraSource:
        if self.loop and not self.is_file():
            raise ValueError(f"loop = true: {self.device!r} is a camera, only a video file has an end: remove loop")
        for key in ("width", "height", "fps", "fourcc"):
            if self.is_file() and getattr(self, key) is not None:
                raise ValueError(f"{key}: {self.device!r} is a video file and has its own: remove {key}")
        return self

    def check(self) -> Iterator[tuple[str, str, str]]:
        """What `edged check` finds: level, text, fix."""
        from edged.sources.camera import findings

        return findings(self)


class RtspSource(LiveSource):
    """A network camera. Its `url` may hold a user and a password, which are shown nowhere."""

    type: Literal["rtsp"] = "rtsp"
    url: Annotated[SecretStr, AfterValidator(_rtsp)]
    transport: Literal["tcp", "udp"] = "tcp"

    @field_serializer("url")
    def _without_secrets(self, url: SecretStr) -> str:
        # What is shown shall still differ when only the password does: a changed one is to be loaded. Python salts its
        # hashes anew in each process.
        where = urlsplit(url.get_secret_value())
        return f"rtsp://{where.hostname}:{where.port or 554} (#{hash(url) & 0xFFFFFFFF:08x})"

    def check(self) -> Iterator[tuple[str, str, str]]:
        """What `edged check` finds: level, text, fix."""
        from edged.sources.rtsp import findings

        return findings(self)
