"""Adapters and the models that they are for: no desired state names an adapter beside a model that it does not fit.

A device takes an adapter for exactly the release that serves in its slot. Told one for another release, it goes on bare, or
says `failed` again and again where it never had it (edged/acts.py), which would count against the new model.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.host import Host
from trainer.releases import ReleaseError

Ref = Mapping[str, Any]  # a ReleaseRef's JSON


def base_of(host: Host, adapter: Ref) -> dict[str, Any] | None:
    """The release that an adapter goes onto; None for what is no adapter, or is not registered."""
    try:
        base = host.registry.get(adapter["release"]).manifest.base
    except ReleaseError:
        return None
    return base.model_dump(mode="json") if base is not None else None


def misfits(host: Host, adapter: Ref | None, model: Ref | None) -> bool:
    """Whether this adapter (None: none) does not go onto this model (None: unknown, so that nobody can say)."""
    return adapter is not None and model is not None and base_of(host, adapter) != dict(model)
