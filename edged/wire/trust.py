"""What host and device agree on about signed metadata (TUF): names, paths and how large each file may be."""

from __future__ import annotations

import re

MODELS = "models"  # the role that signs releases; it may speak for MODELS_PATHS alone
MODELS_PATHS = f"{MODELS}/*"
# In a root's metadata: when it was signed (seconds since the epoch). A clock before it is wrong.
SIGNED_AT = "x-edged-signed-at"

# Endless data ends here, whoever sends it and whatever a stolen key signed.
METADATA_BYTES_MAX = {
    "root": 64 << 10,
    "timestamp": 16 << 10,
    "snapshot": 64 << 10,
    "targets": 256 << 10,
    MODELS: 2 << 20,  # of about ten thousand releases
}
ROOT_ROTATIONS_MAX = 256  # that a device catches up with at once

_NAME = re.compile(rf"(?:\d{{1,9}}\.)?(root|timestamp|snapshot|targets|{MODELS})\.json", re.ASCII)


def target_path(release: str) -> str:
    """The target that stands for a release; its bytes are those of the release's `release.json`."""
    return f"{MODELS}/{release}"


def role_of(name: str) -> str | None:
    """The role that the metadata file `name` belongs to (`7.snapshot.json`: snapshot); None: it is no such name."""
    found = _NAME.fullmatch(name)
    return found[1] if found else None
