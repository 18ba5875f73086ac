"""What the trainer announces: where it is, what else serves its releases, and the metadata that there is."""

from __future__ import annotations

from dataclasses import dataclass, field

from edged.wire import messages

Announcement = messages.HostState | messages.Metadata


@dataclass(slots=True)
class Trainer:
    """As the control loop heard it. `blocks`: it answers who asks for blocks now; the rest outlives its absence."""

    url: str | None = None
    mirrors: tuple[str, ...] = ()
    blocks: bool = False
    metadata: dict[str, messages.MetadataFile] = field(default_factory=dict)

    def heard(self, said: Announcement) -> None:
        """Take in its presence, or the names of its metadata."""
        if isinstance(said, messages.Metadata):
            self.metadata = said.files
            return
        online = said.state == "online"
        self.blocks = online and said.blocks
        if online and said.url:
            self.url, self.mirrors = said.url, tuple(said.mirrors)
