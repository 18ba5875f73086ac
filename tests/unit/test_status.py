"""`edged status`: what is wrong stands first with its fix, everything fits on a screen, and scripts get an exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import UTC
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
from click.testing import Result
from typer.testing import CliRunner

from edged.beats import Beats
from edged.cli import app
from edged.clock import SystemClock
from edged.metrics import Window
from edged.stamp import Stamp
from edged.status import duration, problems, render, size
from edged.status_socket import StatusSocket
from edged.told import EVENTS_MAX, TEXT_MAX, Told

ROOT = Path(__file__).parents[2]


def document(**more: Any) -> dict[str, Any]:
    """A device that is well."""
    window = Window(0.0)
    for number in range(8):
        action, reason = ("escalate", "unsure") if number < 2 else ("accept", "confident")
        window.answer("line", "toy@1.0", action, reason, 0.5, 1.0)
    window.error("line", "toy@1.0")
    line = {"alive": True, "source_alive": True, "waiting": 3, "queue_max": 64, "breaker": "closed", "slot": "eye",
            "source": "directory", "totals": window.totals("line")}  # fmt: skip
    return {
        "device": "cam-07", "site": "plant", "version": "0.1.0", "profile": "generic", "pid": 12, "since": 1000.0,
        "now": 1000.0 + 3 * 86400 + 4 * 3600 + 5, "broker": "connected",
        "health": {"ready": True, "summary": "serving 1 model; broker: connected", "problems": []},
        "pipelines": {"line": line, "ask": {**line, "source": "mqtt", "totals": Window(0).totals("ask")}}, "responders": {},
        "models": {"eye": {"active": "toy@1.0", "adapter": "lora@2", "update": "idle", "reason": "", "swap_ms": 12.4}},
        "streams": {}, "outbox": {"messages": 2, "bytes": 2048}, "samples": {"escalated": 1, "labelled": 0},
        "outbox_limits": {"messages": 50, "bytes": 9000},
        "storage": {"bytes": 3 << 20, "bytes_max": 1 << 30, "free": 5 << 30, "full": False}, "pace": 1.0,
        "limits": {"why": "", "temperature": {"c": 61.4}}, "stalled": {},
        "usage": {"daemon": {"pss_bytes": 80 << 20}, "engines": {"pss_bytes": 20 << 20}},
        "events": [{"at": 0.0, "kind": f"kind{number}", "text": f"text {number}"} for number in range(8)],
        "counters": {},
        **more,
    }  # fmt: skip


def test_a_healthy_device_fits_on_a_screen() -> None:
    lines = render(document(), zone=UTC)
    assert lines == [
        "cam-07 (plant)   edged 0.1.0   profile generic   pid 12   up 3 d 4 h",
        "healthy   serving 1 model; broker: connected",
        "broker     connected",
        "models     eye: toy@1.0 + lora@2   update: idle   last swap 12 ms",
        "pipelines  line: directory -> eye   3 waiting, 8 answered, 25.0% escalated, 1 errors",
        "           ask: mqtt -> eye   3 waiting, 0 answered, 0 errors",
        "store      3.0 MiB of 1.0 GiB used, 5.0 GiB free on the disk",
        "samples    escalated 1",
        "outbox     2 messages, 2.0 KiB",
        "machine    100.0 MiB of memory, 61 °C, works 100% of the time",
        "events     01-01 00:00:00  kind7: text 7",
        "           01-01 00:00:00  kind6: text 6",
        "           01-01 00:00:00  kind5: text 5",
        "           01-01 00:00:00  kind4: text 4",
        "           01-01 00:00:00  kind3: text 3",
    ]


def with_line(**more: Any) -> dict[str, Any]:
    base = document()
    return {"pipelines": {"line": {**base["pipelines"]["line"], **more}}}


def with_model(**more: Any) -> dict[str, Any]:
    return {"models": {"eye": {**document()["models"]["eye"], **more}}}


@pytest.mark.parametrize(
    ("change", "what", "text"),
    [
        ({"broker": "not connected yet"}, "broker", "not connected: not connected yet"),
        ({"stalled": {"control": 61.2}}, "thread control", "control has stood still for 61 s"),
        (with_line(alive=False), "pipeline line", "line: its threads have ended"),
        (with_line(source_alive=False), "source of line", "line: its source has ended"),
        (with_line(breaker="open"), "pipeline line: questions", "line: nobody answers its questions"),
        (with_model(active=None), "slot eye", "eye: no model answers"),
        (with_model(update="failed", reason="sha256"), "update of eye", "eye: the last update failed: sha256"),
        (with_model(update="reverted"), "update of eye", "eye: the last update reverted: no reason known"),
        ({"outbox": {"messages": 45, "bytes": 0}}, "outbox", "45 of 50 messages wait to be sent: what finds it full"),
        ({"outbox": {"messages": 0, "bytes": 8999}}, "outbox", "8999 of 9000 bytes wait to be sent"),
        ({"storage": {"full": True}}, "store", "nothing is left to evict: no samples are captured"),
        (
            {"pace": 0.4, "limits": {"why": "temperature: 83 °C"}},
            "pace",
            "works 40% of the time, because of temperature: 83",
        ),
        (
            {"health": {"problems": [{"what": "disk", "text": "3 MiB free", "fix": "free some"}]}},
            "disk",
            "3 MiB free",
        ),
    ],
)
def test_what_is_wrong_stands_first_with_its_fix(change: dict[str, Any], what: str, text: str) -> None:
    found = problems(document(**change))
    assert [problem.what for problem in found] == [what]
    assert found[0].text.startswith(text)
    lines = render(document(**change), zone=UTC)
    assert lines[1].startswith("1 problem")
    assert lines[2].startswith(f"  ! {what}: {text}")
    assert lines[3] == f"      fix: {found[0].fix}"
    assert len(found[0].fix) > 5


@pytest.mark.parametrize(
    "change",
    [
        with_model(active=None, update="proving"), with_line(waiting=64), with_line(breaker="probing"),
        {"models": {"spare": {"active": None, "update": "idle"}, **document()["models"]}},
        {"outbox": {"messages": 44, "bytes": 8000}},
        with_model(update="reverted", held="toy@1.1"),  # a person's wish
    ],
)  # fmt: skip
def test_what_passes_or_is_meant_is_no_problem(change: dict[str, Any]) -> None:
    assert problems(document(**change)) == []


def test_what_the_daemon_says_itself_is_not_said_twice() -> None:
    health = {"problems": [{"what": "broker", "text": "not connected: x", "fix": "y"}]}
    assert len(problems(document(broker="x", health=health))) == 1


def test_a_stream_says_how_it_is() -> None:
    streams = {"line": {"stream": "camera 0", "state": "lost", "why": "no frame for 10 s", "frame_age_s": 12.0}}
    assert "streams    line: camera 0   lost: no frame for 10 s   newest frame 12 s ago" in render(
        document(streams=streams)
    )


def test_colours_are_only_for_terminals() -> None:
    assert "\033[32mhealthy\033[0m" in render(document(), colour=True)[1]
    assert "\033" not in "".join(render(document(broker="x")))


def test_an_older_daemons_document_is_shown_too() -> None:
    old = {"device": "d", "site": "s", "pid": 1, "broker": "connected", "models": {}, "pipelines": {}, "samples": {}}
    assert render(old)[0].startswith("d (s)")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (59, "59 s"), (60, "1 min 0 s"), (3725, "1 h 2 min"), (90000, "1 d 1 h"), (-5, "0 s")],
)
def test_times_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 << 40, "3072.0 GiB")])
def test_sizes_for_people(count: int, text: str) -> None:
    assert size(count) == text


@pytest.fixture
def config(tmp_path: Path) -> Path:
    (tmp_path / "state").mkdir()
    path = tmp_path / "edged.toml"
    path.write_text(f'[device]\nid = "dev1"\nstate_dir = "{tmp_path / "state"}"\n')
    return path


@pytest.fixture
def answer(tmp_path: Path, config: Path) -> Iterator[dict[str, Any]]:
    """What a daemon answers; change it."""
    found = document()
    server = StatusSocket(tmp_path / "state", lambda: found, Beats(SystemClock()))
    server.start()
    yield found
    server.stop()


def edged(config: Path, *arguments: str) -> Result:
    return CliRunner().invoke(app, ["status", *arguments, "--config", str(config)])


def test_scripts_see_by_the_exit_status(config: Path, answer: dict[str, Any]) -> None:
    assert edged(config).exit_code == 0
    answer["broker"] = "connection refused"
    done = edged(config)
    assert done.exit_code == 1
    assert "! broker: not connected: connection refused" in done.stdout
    done = edged(config, "--json")
    assert (done.exit_code, json.loads(done.stdout)["broker"]) == (1, "connection refused")


@pytest.mark.parametrize("spoilt", ["[broker]\nport = 'no'\n", "[pipelines.line]\n"])
def test_a_daemon_that_runs_on_with_the_old_file_is_found_beside_a_spoilt_one(
    config: Path, answer: dict[str, Any], spoilt: str
) -> None:
    config.write_text(config.read_text() + spoilt)
    assert "cam-07" in edged(config).stdout
    answer["broker"] = "connection refused"
    assert edged(config).exit_code == 1


def test_a_spoilt_file_without_a_daemon_is_what_is_wrong(config: Path) -> None:
    config.write_text(config.read_text() + "[pipelines.line]\n")
    done = edged(config)
    assert done.exit_code == 2
    assert "pipelines.line.slot is missing: add it" in done.stderr


def test_no_daemon_is_said_with_the_fix(config: Path) -> None:
    done = edged(config)
    assert (done.exit_code, done.stdout) == (3, "")
    assert "no edged runs with state_dir" in done.stderr
    assert "start it with `edged run --config" in done.stderr


def test_events_are_remembered_but_not_without_end() -> None:
    told = Told("plant", "dev1", Stamp(SystemClock()))
    for number in range(EVENTS_MAX + 5):
        message = told.event("kind", f"{number} " + "x" * 2 * TEXT_MAX, detail=1)
    assert message.topic.endswith("/up/event")
    events = told.events()
    assert len(events) == EVENTS_MAX
    assert events[-1]["text"].startswith(f"{EVENTS_MAX + 4} x")
    assert len(events[-1]["text"]) == TEXT_MAX


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become somebody who may not look")
@pytest.mark.parametrize("closed", ["state", "state/status.sock"])
def test_who_may_not_look_is_told_so(closed: str) -> None:
    with TemporaryDirectory() as folder:  # pytest's own folders are closed to others anyway
        Path(folder).chmod(0o755)
        state = Path(folder) / "state"
        state.mkdir(mode=0o755)
        (state / "status.sock").write_text("")
        (Path(folder) / closed).chmod(0o700)
        code = (  # what it needs is imported before it becomes nobody, who may not read it
            "import os\nfrom pathlib import Path\nfrom edged.status import silence\nos.setuid(65534)\n"
            f"print(silence(Path({str(state)!r}), Path('x')))"
        )
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=ROOT
        )  # fmt: skip
    assert "may not" in done.stdout, done.stderr
    assert "run this as root" in done.stdout


def test_whom_a_device_trusts_is_a_line() -> None:
    def line(**trust: Any) -> str:
        lines = render(document(trust=trust), zone=UTC)
        return next(text for text in lines if text.startswith("trust"))

    now = document()["now"]
    checked = {"root_version": 3, "at": now - 7200, "expires": {"root": now + 9e6, "timestamp": now + 79200}}
    assert line(mode="signed", **checked) == "trust      root 3, metadata checked 2 h 0 min ago, good for 22 h 0 min"
    checked["expires"]["timestamp"] = now - 1
    assert line(mode="signed", **checked).endswith("ago, expired since, renewed with the next install")
    assert line(mode="signed") == "trust      signed releases only; no metadata was checked yet"
    assert line(mode="unsigned").startswith("trust      unsigned: ")
    assert line(mode="closed") == "trust      no root: every release is refused; enrol this device"


def test_what_a_person_holds_stands_beside_its_model() -> None:
    lines = render(document(**with_model(pinned="toy@1.0", adapter_held="lora@3")), zone=UTC)
    (line,) = [line for line in lines if line.startswith("models")]
    assert "pinned to toy@1.0" in line
    assert "holds off lora@3" in line
