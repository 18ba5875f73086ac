"""The page for Prometheus: what its own parser makes of it, and what a client cannot do to the daemon."""

from __future__ import annotations

import http.client
import logging
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_open
from prometheus_client.parser import text_string_to_metric_families as parse

from edged import exporter, scrape
from edged.beats import Beats
from edged.clock import SystemClock
from edged.config import Metrics
from edged.exporter import EVENTS_MAX, Exporter, few
from edged.metrics import OTHER, REASONS_MAX, Window


def answered() -> Window:
    window = Window(0.0)
    window.answer("line", "toy@1.0", "accept", "confident", 0.95, 4.0)
    window.answer("line", "toy@1.0", "accept", "confident", 0.97, 30.0)
    window.answer("line", "toy@1.1", "escalate", "unsure", 0.31, 7000.0, suppressed="duplicate", unheard=True)
    window.error("line", "toy@1.1")
    return window


def document(**more: Any) -> dict[str, Any]:
    """A status as the daemon's."""
    line = {
        "alive": True, "source_alive": True, "waiting": 3, "queue_max": 64, "breaker": "open", "slot": "eye",
        "source": "directory", "totals": answered().totals("line"),
    }  # fmt: skip
    return {
        "device": "cam-07", "site": "plant", "version": "0.1.0", "profile": "generic", "since": 1000.0,
        "broker": "connected",
        "health": {"ready": True, "problems": []}, "stalled": {},
        "pipelines": {"line": line}, "responders": {"big": {**line, "totals": Window(0).totals("x")}},
        "models": {"eye": {"active": "toy@1.1", "adapter": None, "update": "committed", "swap_ms": 12.0}},
        "streams": {"line": {"state": "streaming", "times_lost": 2, "frame_age_s": 0.1, "frames_read": 9,
                             "frames_skipped": 4, "frames_in_hand": 1}},
        "outbox": {"messages": 2, "bytes": 100}, "samples": {"escalated": 1, "labelled": 0},
        "outbox_limits": {"messages": 50, "bytes": 9000},
        "storage": {"bytes": 10, "bytes_max": 1000, "free": 123456, "full": False, "broken": "", "set_aside": []},
        "pace": 0.5,
        "limits": {"temperature": {"c": 61.5}, "memory": {"limit_mib": 512}},
        "usage": {"daemon": {"pss_bytes": 5, "cpu_s": 1.5, "threads": 9, "files": 20},
                  "engines": {"pss_bytes": 7, "cpu_s": 2.5, "processes": 1}},
        "counters": {"engine_ends": 3, "swaps": 4, "verdicts": 5},
        **more,
    }  # fmt: skip


@pytest.fixture
def served() -> Iterator[Exporter]:
    running = Exporter("127.0.0.1", 0, document, Beats(SystemClock()))
    running.start()
    yield running
    running.stop()


def ask(port: int, method: str = "GET", path: str = "/metrics", **headers: str) -> tuple[int, str, str]:
    """Status, content type and body."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
    connection.request(method, path, headers=headers)
    response = connection.getresponse()
    return response.status, response.headers["Content-Type"], response.read().decode()


def samples(text: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {(s.name, tuple(sorted(s.labels.items()))): s.value for family in parse(text) for s in family.samples}


def test_prometheus_reads_what_happened(served: Exporter) -> None:
    status, kind, text = ask(served.port)
    assert (status, kind) == (200, "text/plain; version=0.0.4; charset=utf-8")
    found = samples(text)
    line = ("pipeline", "line")
    expected = {
        ("edged_items_total", (("decision", "accept"), line, ("reason", "confident"))): 2,
        ("edged_items_total", (("decision", "escalate"), line, ("reason", "unsure"))): 1,
        ("edged_items_suppressed_total", (line, ("reason", "duplicate"))): 1,
        ("edged_items_unheard_total", (line,)): 1,
        ("edged_item_errors_total", (line,)): 1,
        ("edged_answer_latency_seconds_bucket", (("le", "0.005"), line)): 1,
        ("edged_answer_latency_seconds_bucket", (("le", "5.0"), line)): 2,
        ("edged_answer_latency_seconds_bucket", (("le", "+Inf"), line)): 3,
        ("edged_answer_latency_seconds_count", (line,)): 3,
        ("edged_answer_confidence_ratio_bucket", (("le", "0.4"), line)): 1,
        ("edged_queue_length", (line,)): 3,
        ("edged_breaker_open", (line,)): 1,
        ("edged_pipeline_up", (("pipeline", "responder-big"),)): 1,
        ("edged_frames_total", (("fate", "skipped"), line)): 4,
        ("edged_stream_up", (line,)): 1,
        ("edged_model_info", (("adapter", ""), ("release", "toy@1.1"), ("slot", "eye"))): 1,
        ("edged_update_state", (("slot", "eye"), ("state", "committed"))): 1,
        ("edged_update_state", (("slot", "eye"), ("state", "failed"))): 0,
        ("edged_last_swap_seconds", (("slot", "eye"),)): 0.012,
        ("edged_broker_connected", ()): 1,
        ("edged_ready", ()): 1,
        ("edged_outbox_bytes", ()): 100,
        ("edged_store_limit_bytes", ()): 1000,
        ("edged_store_full", ()): 0,
        ("edged_store_broken", ()): 0,
        ("edged_outbox_limit_bytes", ()): 9000,
        ("edged_disk_free_bytes", ()): 123456,
        ("edged_samples", (("state", "escalated"),)): 1,
        ("edged_memory_pss_bytes", (("process", "engines"),)): 7,
        ("edged_cpu_seconds_total", (("process", "daemon"),)): 1.5,
        ("edged_engine_restarts_total", ()): 3,
        ("edged_swaps_total", ()): 4,
        ("edged_pace_ratio", ()): 0.5,
        ("edged_temperature_celsius", ()): 61.5,
        ("edged_events_total", (("name", "verdicts"),)): 5,
    }
    assert {key: found.get(key) for key in expected} == expected
    assert found[("edged_answer_latency_seconds_sum", (line,))] == pytest.approx(7.034)
    assert all(name.startswith("edged_") for name, _ in found)


def test_a_scraper_that_prefers_open_metrics_gets_them(served: Exporter) -> None:
    status, kind, text = ask(served.port, Accept="application/openmetrics-text; version=1.0.0,text/plain;q=0.5")
    assert (status, kind.split(";")[0]) == (200, "application/openmetrics-text")
    names = {family.name for family in parse_open(text)}  # this parser is strict: it raises
    assert {"edged_items", "edged_answer_latency_seconds", "edged_model", "edged"} <= names


def test_a_status_that_lacks_most_is_still_a_page() -> None:
    """An older daemon's, or one that has only just started."""
    text = "".join(str(family) for family in exporter.families({"device": "d"}))
    assert "edged_broker_connected" in text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/metrics?x=1", 200), ("GET", "/", 200), ("GET", "/other", 404), ("POST", "/metrics", 405)],
)
def test_only_the_page_is_there(served: Exporter, method: str, path: str, status: int) -> None:
    assert ask(served.port, method, path)[0] == status


def test_head_has_no_body(served: Exporter) -> None:
    assert ask(served.port, "HEAD")[::2] == (200, "")


def idle(port: int) -> socket.socket:
    """A client that says half a request and waits."""
    client = socket.create_connection(("127.0.0.1", port), timeout=20)
    client.sendall(b"GET /metrics HTTP/1.1\r\nX: ")
    return client


def test_idle_clients_keep_nobody_out(served: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape, "CONNECTION_S_MAX", 600.0)
    crowd = [idle(served.port) for _ in range(3 * scrape.CONNECTIONS_MAX)]
    assert ask(served.port)[0] == 200
    assert crowd[0].recv(100) == b"", "the oldest had to go"
    for client in crowd:
        client.close()


def test_a_slow_client_is_sent_away(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scrape, "CONNECTION_S_MAX", 0.05)
    served = Exporter("127.0.0.1", 0, document, Beats(SystemClock()))
    served.start()
    with idle(served.port) as client:
        assert client.recv(100) == b""
    served.stop()


def test_too_many_headers_are_refused(served: Exporter) -> None:
    with socket.create_connection(("127.0.0.1", served.port), timeout=20) as client:
        client.sendall(b"GET /metrics HTTP/1.1\r\nX: " + b"x" * scrape.REQUEST_BYTES_MAX)
        assert client.recv(1000).startswith(b"HTTP/1.1 431 ")
    assert ask(served.port)[0] == 200


@given(st.binary(max_size=200))
def test_no_request_ends_the_server(data: bytes) -> None:
    answer = scrape.Scrape._answer(ServerWithoutSocket(), data + b"\r\n\r\n")  # type: ignore[arg-type]
    assert answer.startswith(b"HTTP/1.1 ")


class ServerWithoutSocket:
    """What `Scrape._answer` needs of its server."""

    def _page(self, _accept: str) -> tuple[str, bytes]:
        return "text/plain", b""


def test_a_status_that_fails_costs_one_page() -> None:
    broken = [True]

    def status() -> dict[str, Any]:
        if broken:
            broken.clear()
            raise RuntimeError("no database")
        return document()

    served = Exporter("127.0.0.1", 0, status, Beats(SystemClock()))
    served.start()
    assert [ask(served.port)[0] for _ in range(2)] == [500, 200]
    served.stop()


def test_a_port_in_use_is_said_and_costs_only_the_metrics(served: Exporter, caplog: pytest.LogCaptureFixture) -> None:
    listen = f"127.0.0.1:{served.port}"
    with caplog.at_level(logging.ERROR):
        assert exporter.start(Metrics(listen=listen), document, Beats(SystemClock())) is None
    assert f"{listen}: " in caplog.text
    assert "choose another port in metrics.listen" in caplog.text


def test_nothing_listens_unless_it_is_wanted() -> None:
    assert exporter.start(Metrics(), document, Beats(SystemClock())) is None


@pytest.mark.parametrize(
    ("listen", "said"),
    [
        ("0.0.0.0:9416", "reachable from other machines: use 127.0.0.1"), ("[::]:9416", "reachable from other machines"),
        ("device.plant:9416", "reachable from other machines"), ("9416", "no address and port"),
        ("127.0.0.1:70000", "no address and port"), ("127.0.0.1:", "no address and port"), (":9416", "no address and port"),
    ],
)  # fmt: skip
def test_an_address_that_others_reach_must_be_meant(listen: str, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Metrics(listen=listen)


@pytest.mark.parametrize("listen", ["127.0.0.1:9416", "localhost:1", "[::1]:9416", "127.9.9.9:65535"])
def test_loopback_is_fine(listen: str) -> None:
    assert Metrics(listen=listen).listen == listen
    assert Metrics(listen="0.0.0.0:9416", allow_remote=True).allow_remote


def test_totals_outlive_windows() -> None:
    window = answered()
    window.close(60.0)
    window.answer("line", "toy@1.1", "accept", "confident", 1.0, 1.0)
    totals = window.totals("line")
    assert (totals["items"], totals["errors"], totals["unheard"]) == (4, 1, 1)
    assert totals["decisions"] == {"accept": {"confident": 3}, "escalate": {"unsure": 1}}
    assert window.totals("nobody")["items"] == 0


@given(st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1e6)), max_size=40))
def test_every_item_is_in_exactly_one_bucket(items: list[tuple[float, float]]) -> None:
    window = Window(0)
    for p, latency_ms in items:
        window.answer("line", "toy@1.0", "accept", "confident", p, latency_ms)
    totals = window.totals("line")
    for name in ("confidence", "latency_s"):
        assert sum(totals[name]["counts"]) == len(items)
    assert totals["confidence"]["sum"] == pytest.approx(sum(p for p, _ in items))


def test_labels_are_bounded_and_nothing_is_lost() -> None:
    window = Window(0)
    for number in range(REASONS_MAX + 10):
        window.answer("line", "r", "accept", f"reason {number}", 0.5, 1.0, suppressed=f"limit {number}")
    totals = window.totals("line")
    assert len(totals["decisions"]["accept"]) == REASONS_MAX + 1
    assert (totals["decisions"]["accept"][OTHER], totals["suppressed"][OTHER], totals["items"]) == (10, 10, 42)
    counters = {f"c{number:04}": 1.0 for number in range(EVENTS_MAX + 5)}
    assert few(counters)["other"] == 5
    assert sum(few(counters).values()) == EVENTS_MAX + 5
