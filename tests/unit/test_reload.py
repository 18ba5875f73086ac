"""What a new configuration changes in a running daemon, and what is refused before anything is touched."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from edged.config import Settings, load
from edged.core.reload import Parts, compare
from edged.reload import Refused, decide
from tests.support.device import merged, toml
from tests.support.models import make_release

BASE: dict[str, Any] = {
    "device": {"id": "dev1", "site": "plant"},
    "broker": {"port": 1883},
    "slots": {"eye": {"threads": 1}, "ear": {"threads": 1}},
    "pipelines": {
        "line": {"slot": "eye", "source": {"type": "directory", "path": "in"}},
        "ask": {"slot": "eye", "source": {"type": "mqtt"}},
    },
    "responders": {"big": {"tier": "big", "slot": "eye"}},
}
GONE = object()


def settings(folder: Path, *changes: dict[str, Any]) -> Settings:
    """`BASE` with changes laid over it; GONE takes a table out."""

    def pruned(table: Any) -> Any:
        return {k: pruned(v) for k, v in table.items() if v is not GONE} if isinstance(table, dict) else table

    tables = merged(BASE, {"device": {"state_dir": folder / "state"}})
    tables["pipelines"]["line"]["source"]["path"] = folder / "in"
    for change in changes:
        tables = merged(tables, change)
    path = folder / "edged.toml"
    path.write_text(toml(pruned(tables)))
    return load(path)


@pytest.mark.parametrize(
    ("change", "keys", "restart", "part", "expected"),
    [
        ({}, [], [], "slots", Parts()),
        ({"delivery": {"retry_s": 3.0}}, ["delivery.retry_s"], [], "slots", Parts()),
        ({"host": {"url": "https://trainer"}}, ["host.url"], [], "slots", Parts()),
        ({"store": {"outbox_rows_max": 50}}, ["store.outbox_rows_max"], [], "slots", Parts()),
        ({"device": {"group": "b"}}, ["device.group"], [], "slots", Parts()),
        # What no running daemon takes on.
        ({"device": {"id": "dev2"}}, ["device.id"], ["device.id"], "slots", Parts()),
        ({"device": {"site": "s2"}}, ["device.site"], ["device.site"], "slots", Parts()),
        ({"device": {"state_dir": "/else"}}, ["device.state_dir"], ["device.state_dir"], "slots", Parts()),
        ({"broker": {"port": 1884}}, ["broker.port"], ["broker.port"], "slots", Parts()),
        # Slots: an engine's option loads it anew, the others are read when they are needed.
        ({"slots": {"new": {"threads": 2}}}, ["slots.new"], [], "slots", Parts(added=("new",))),
        ({"slots": {"ear": GONE}}, ["slots.ear"], [], "slots", Parts(removed=("ear",))),
        ({"slots": {"eye": {"threads": 2}}}, ["slots.eye.threads"], [], "slots", Parts(changed=("eye",))),
        ({"slots": {"eye": {"extra": {"x": 1}}}}, ["slots.eye.extra.x"], [], "slots", Parts(changed=("eye",))),
        ({"slots": {"eye": {"probation_s": 9.0}}}, ["slots.eye.probation_s"], [], "slots", Parts(adjusted=("eye",))),
        ({"slots": {"eye": {"seed": "/x"}}}, ["slots.eye.seed"], [], "slots", Parts(adjusted=("eye",))),
        # Pipelines: a policy is read at each item, anything else makes a new pipeline.
        (
            {"pipelines": {"line": {"policy": {"audit_share": 0.5}}}},
            ["pipelines.line.policy.audit_share"], [], "pipelines", Parts(adjusted=("line",)),
        ),
        (
            {"pipelines": {"line": {"policy": {"audit_share": 0.5}, "slot": "ear"}}},
            ["pipelines.line.policy.audit_share", "pipelines.line.slot"], [], "pipelines", Parts(changed=("line",)),
        ),
        (
            {"pipelines": {"line": {"source": {"path": "/in2"}}}},
            ["pipelines.line.source.path"], [], "pipelines", Parts(changed=("line",)),
        ),
        (
            {"pipelines": {"line": GONE, "fresh": {"slot": "eye", "source": {"type": "mqtt"}}}},
            ["pipelines.fresh", "pipelines.line"], [], "pipelines", Parts(("fresh",), ("line",)),
        ),
        ({"responders": {"big": {"wait_s": 5.0}}}, ["responders.big.wait_s"], [], "responders", Parts(adjusted=("big",))),
        ({"responders": {"big": {"tier": "top"}}}, ["responders.big.tier"], [], "responders", Parts(changed=("big",))),
        ({"responders": {"big": GONE}}, ["responders.big"], [], "responders", Parts(removed=("big",))),
    ],
)  # fmt: skip
def test_what_a_change_means(
    tmp_path: Path, change: dict[str, Any], keys: list[str], restart: list[str], part: str, expected: Parts
) -> None:
    old, new = (s.model_dump(mode="json") for s in (settings(tmp_path), settings(tmp_path, change)))
    found = compare(old, new)
    assert list(found.keys) == keys
    assert list(found.restart) == restart
    assert getattr(found, part) == expected


def test_a_key_that_nobody_knows_to_apply_needs_a_restart() -> None:
    tables: dict[str, Any] = {"slots": {}, "pipelines": {}, "responders": {}}
    assert compare({**tables, "future": {"a": 1}}, {**tables, "future": {"a": 2}}).restart == ("future.a",)


def test_what_needs_a_restart_is_refused_whole_and_named(tmp_path: Path) -> None:
    changed = settings(tmp_path, {"broker": {"port": 1884}, "device": {"id": "dev2"}, "delivery": {"retry_s": 3.0}})
    with pytest.raises(Refused, match=r"broker\.port, device\.id cannot change while edged runs: restart edged"):
        decide(settings(tmp_path), changed)


def test_a_seed_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    add = {"slots": {"new": {"seed": tmp_path / "missing"}}}
    with pytest.raises(Refused, match=r"slots\.new\.seed: .*missing"):
        decide(settings(tmp_path), settings(tmp_path, add))
    make_release(tmp_path / "release")
    (tmp_path / "release" / "model.onnx").write_bytes(b"half")
    add = {"slots": {"new": {"seed": tmp_path / "release"}}}
    with pytest.raises(Refused, match=r"slots\.new\.seed: .*model\.onnx: not there with its \d+ bytes"):
        decide(settings(tmp_path), settings(tmp_path, add))


def test_isolation_that_the_seed_cannot_have_is_refused(tmp_path: Path) -> None:
    make_release(tmp_path / "release")
    add = {"slots": {"new": {"seed": tmp_path / "release", "isolation": "process"}}}
    with pytest.raises(Refused, match=r"slots\.new\.isolation"):
        decide(settings(tmp_path), settings(tmp_path, add))


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (
            {"pipelines": {"two": {"slot": "eye", "source": {"type": "directory", "path": "in"}}}},
            r"pipelines\.two\.source\.path is the folder of pipelines\.line too",
        ),
        (
            {"pipelines": {"two": {"slot": "eye", "source": {"type": "directory", "path": "file/in"}}}},
            r"pipelines\.two\.source\.path = .*file is no folder that edged may write to",
        ),
        ({"responders": {"two": {"tier": "big", "slot": "eye"}}}, r"responders\.two answers the same tier and task"),
    ],
)
def test_what_cannot_work_together_is_refused(tmp_path: Path, change: dict[str, Any], why: str) -> None:
    (tmp_path / "file").write_text("no folder")
    for pipeline in change.get("pipelines", {}).values():
        pipeline["source"]["path"] = tmp_path / pipeline["source"]["path"]
    with pytest.raises(Refused, match=why):
        decide(settings(tmp_path), settings(tmp_path, change))
