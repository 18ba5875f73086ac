"""The metrics for Prometheus, made at each scrape from the status document. The only importer of prometheus_client.

Names carry the prefix `edged_` and base units. Every label has few values: pipelines and slots are those of the
configuration, reasons are those of the policy, states are those of the tables; whatever else comes is summed up.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import choose_encoder

from edged.beats import Beats
from edged.config import Metrics, endpoint
from edged.core.update import State
from edged.scrape import Scrape
from edged.status import problems

log = logging.getLogger(__name__)

NAMES_MAX = 64  # pipelines, responders or slots that are told apart
EVENTS_MAX = 200  # counters that are told apart; the rest are summed up as `other`
FRESH_S = 1.0  # several scrapers in one second are shown the same
STILL_S_MAX = 60.0
BEAT = "metrics"

Document = Mapping[str, Any]


def start(config: Metrics, status: Callable[[], Document], beats: Beats) -> Exporter | None:
    """Serve the metrics as configured; None when they are not wanted, or when the address cannot be had, which is said:
    a device without metrics still does its work."""
    if config.listen is None:
        return None
    host, port = endpoint(config.listen)
    try:
        exporter = Exporter(host, port, status, beats)
    except OSError as error:
        log.error(
            "metrics: %s: %s; choose another port in metrics.listen: until then there are none", config.listen, error
        )
        return None
    exporter.start()
    log.info("metrics: http://%s/metrics", config.listen)
    return exporter


class Exporter:
    """Serves the metrics of a running daemon. Nothing of it runs on a worker's thread."""

    def __init__(self, host: str, port: int, status: Callable[[], Document], beats: Beats) -> None:
        """Listens; raises OSError when the address cannot be had."""
        self._status, self._beats = status, beats
        self._lock = threading.Lock()
        self._families: list[Metric] = []
        self._made = float("-inf")
        self._registry = CollectorRegistry(auto_describe=False)
        self._registry.register(_Collector(self._collect))
        self._server = Scrape(host, port, self.page, lambda: beats.beat(BEAT))
        self.port = self._server.port

    def start(self) -> None:
        """Begin to answer."""
        self._beats.watch(BEAT, STILL_S_MAX)
        self._server.start()

    def stop(self) -> None:
        """Close the port."""
        self._beats.forget(BEAT)
        self._server.stop()

    def page(self, accept: str) -> tuple[str, bytes]:
        """The content type and the text, in the format that the scraper prefers."""
        encode, kind = choose_encoder(accept)
        return kind, encode(self._registry)

    def _collect(self) -> Iterable[Metric]:
        with self._lock:
            if time.monotonic() - self._made >= FRESH_S:
                started = time.monotonic()
                self._families = list(families(self._status()))
                self._made = time.monotonic()
                cost = GaugeMetricFamily("edged_scrape_duration_seconds", "Time that it took to collect these metrics.")
                cost.add_metric([], self._made - started)
                self._families.append(cost)
            return self._families


class _Collector:
    def __init__(self, collect: Callable[[], Iterable[Metric]]) -> None:
        self.collect = collect


def families(status: Document) -> Iterator[Metric]:
    """Every metric family of a status document. What the document lacks is left out."""
    yield from _device(status)
    yield from _pipelines(status)
    yield from _streams(status)
    yield from _models(status)
    yield from _kept(status)
    yield from _machine(status)
    events = CounterMetricFamily("edged_events", "Everything that the daemon counts, by name.", labels=["name"])
    for name, count in few(status.get("counters") or {}).items():
        events.add_metric([name], count)
    yield events


def few(counters: Mapping[str, float]) -> dict[str, float]:
    """The first EVENTS_MAX counters by name, and the sum of the rest as `other`."""
    names = sorted(counters)
    out = {name: counters[name] for name in names[:EVENTS_MAX]}
    if names[EVENTS_MAX:]:
        out["other"] = out.get("other", 0) + sum(counters[name] for name in names[EVENTS_MAX:])
    return out


def _gauge(name: str, text: str, value: Any) -> Iterator[Metric]:
    """One number without labels; nothing when it is not known."""
    if value is not None:
        family = GaugeMetricFamily(f"edged_{name}", text)
        family.add_metric([], float(value))
        yield family


def _device(status: Document) -> Iterator[Metric]:
    labels = {key: str(status.get(key, "")) for key in ("device", "site", "version", "profile")}
    yield InfoMetricFamily("edged", "Which device this is, and what runs on it.", labels)
    yield from _gauge("start_time_seconds", "When the daemon started, since the epoch.", status.get("since"))
    yield from _gauge("broker_connected", "1: the device is connected.", status.get("broker") == "connected")
    yield from _gauge("problems", "What `edged status` would list as problems.", len(problems(status)))
    ready = (status.get("health") or {}).get("ready")
    yield from _gauge("ready", "1: every model that this device has answers.", ready)
    stalled = status.get("stalled")
    yield from _gauge("stalled_loops", "Loops that stand still.", None if stalled is None else len(stalled))


def _rows(status: Document) -> list[tuple[str, Document]]:
    """Pipelines, and responders by `responder-NAME`, as the messages of metrics name them."""
    rows = [(name, row) for name, row in (status.get("pipelines") or {}).items()]
    rows += [(f"responder-{name}", row) for name, row in (status.get("responders") or {}).items()]
    return rows[:NAMES_MAX]


def _pipelines(status: Document) -> Iterator[Metric]:
    by = ["pipeline"]
    items = CounterMetricFamily(
        "edged_items", "Items answered, by what the policy decided and why.", labels=[*by, "decision", "reason"]
    )
    suppressed = CounterMetricFamily(
        "edged_items_suppressed", "Escalations and audits that a limit held back.", labels=[*by, "reason"]
    )
    unheard = CounterMetricFamily("edged_items_unheard", "Answered at once: nobody answers the questions.", labels=by)
    errors = CounterMetricFamily("edged_item_errors", "Items that could not be answered.", labels=by)
    latency = HistogramMetricFamily("edged_answer_latency_seconds", "From the model's start to its answer.", labels=by)
    confidence = HistogramMetricFamily("edged_answer_confidence_ratio", "Calibrated confidence.", labels=by)
    waiting = GaugeMetricFamily("edged_queue_length", "Items that wait.", labels=by)
    room = GaugeMetricFamily("edged_queue_limit", "Items that may wait.", labels=by)
    up = GaugeMetricFamily("edged_pipeline_up", "1: its threads and its source run.", labels=by)
    breaker = GaugeMetricFamily("edged_breaker_open", "1: nobody answers its questions.", labels=by)
    for name, row in _rows(status):
        totals = row.get("totals") or {}
        for decision, reasons in (totals.get("decisions") or {}).items():
            for reason, count in reasons.items():
                items.add_metric([name, decision, reason], count)
        for reason, count in (totals.get("suppressed") or {}).items():
            suppressed.add_metric([name, reason], count)
        unheard.add_metric([name], totals.get("unheard", 0))
        errors.add_metric([name], totals.get("errors", 0))
        for family, key in ((latency, "latency_s"), (confidence, "confidence")):
            if key in totals:
                family.add_metric([name], *_histogram(totals[key]))
        waiting.add_metric([name], row.get("waiting", 0))
        if "queue_max" in row:
            room.add_metric([name], row["queue_max"])
        up.add_metric([name], bool(row.get("alive")) and bool(row.get("source_alive", True)))
        breaker.add_metric([name], row.get("breaker", "closed") != "closed")
    yield from (items, suppressed, unheard, errors, latency, confidence, waiting, room, up, breaker)


def _histogram(document: Document) -> tuple[list[tuple[str, float]], float]:
    """Cumulative buckets up to each bound, and the sum."""
    total, buckets = 0, []
    for bound, count in zip([*document["bounds"], float("inf")], document["counts"], strict=True):
        total += count
        buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
    return buckets, document["sum"]


def _streams(status: Document) -> Iterator[Metric]:
    by = ["pipeline"]
    frames = CounterMetricFamily("edged_frames", "Frames of a stream, by what became of them.", labels=[*by, "fate"])
    up = GaugeMetricFamily("edged_stream_up", "1: frames come.", labels=by)
    age = GaugeMetricFamily("edged_stream_frame_age_seconds", "Since the newest frame.", labels=by)
    lost = CounterMetricFamily("edged_stream_losses", "How often the stream was lost.", labels=by)
    for name, stream in list((status.get("streams") or {}).items())[:NAMES_MAX]:
        up.add_metric([name], stream.get("state") == "streaming")
        lost.add_metric([name], stream.get("times_lost", 0))
        if stream.get("frame_age_s") is not None:
            age.add_metric([name], stream["frame_age_s"])
        for key, count in stream.items():
            if key.startswith("frames_") and key != "frames_in_hand":
                frames.add_metric([name, key.removeprefix("frames_")], count)
    yield from (frames, up, age, lost)


def _models(status: Document) -> Iterator[Metric]:
    info = InfoMetricFamily("edged_model", "What serves in a slot.", labels=["slot"])
    up = GaugeMetricFamily("edged_model_up", "1: a model serves.", labels=["slot"])
    state = GaugeMetricFamily("edged_update_state", "1: the update of the slot is there.", labels=["slot", "state"])
    swap = GaugeMetricFamily("edged_last_swap_seconds", "How long the last swap took.", labels=["slot"])
    for name, model in list((status.get("models") or {}).items())[:NAMES_MAX]:
        release, adapter = model.get("active") or "", model.get("adapter") or ""
        info.add_metric([name], {"release": release, "adapter": adapter})
        up.add_metric([name], bool(release))
        for each in State:
            state.add_metric([name, each.value], model.get("update") == each.value)
        if model.get("swap_ms") is not None:
            swap.add_metric([name], model["swap_ms"] / 1000)
    yield from (info, up, state, swap)
    counters = status.get("counters") or {}
    for name, text, counter in (
        ("edged_swaps", "Models that replaced another.", "swaps"),
        ("edged_engine_restarts", "Processes of engines that ended without having been asked.", "engine_ends"),
    ):
        family = CounterMetricFamily(name, text)
        family.add_metric([], counters.get(counter, 0))
        yield family


def _kept(status: Document) -> Iterator[Metric]:
    storage, outbox = status.get("storage") or {}, status.get("outbox") or {}
    limits = status.get("outbox_limits") or {}
    yield from _gauge("outbox_messages", "Messages that wait for the broker.", outbox.get("messages"))
    yield from _gauge("outbox_messages_limit", "Messages that may wait.", limits.get("messages"))
    yield from _gauge("outbox_bytes", "Their bytes.", outbox.get("bytes"))
    yield from _gauge("outbox_limit_bytes", "Bytes that may wait.", limits.get("bytes"))
    yield from _gauge("store_bytes", "Bytes of the images kept.", storage.get("bytes"))
    yield from _gauge("store_limit_bytes", "Bytes of images that may be kept.", storage.get("bytes_max"))
    yield from _gauge("disk_free_bytes", "Free on the disk of state_dir.", storage.get("free"))
    yield from _gauge("store_full", "1: nothing is left to evict, no samples are kept.", storage.get("full"))
    broken = storage.get("broken")
    yield from _gauge("store_broken", "1: the database is damaged.", None if broken is None else bool(broken))
    aside = storage.get("set_aside")
    text = "Broken databases that were set aside."
    yield from _gauge("store_set_aside", text, None if aside is None else len(aside))
    samples = GaugeMetricFamily("edged_samples", "Samples kept, by state.", labels=["state"])
    for name, count in (status.get("samples") or {}).items():
        samples.add_metric([name], count)
    yield samples


def _machine(status: Document) -> Iterator[Metric]:
    memory = GaugeMetricFamily("edged_memory_pss_bytes", "Proportional set size.", labels=["process"])
    cpu = CounterMetricFamily("edged_cpu_seconds", "Processor time used.", labels=["process"])
    usage = status.get("usage") or {}
    for process in ("daemon", "engines"):
        if process in usage:
            memory.add_metric([process], usage[process]["pss_bytes"])
            cpu.add_metric([process], usage[process]["cpu_s"])
    yield from (memory, cpu)
    yield from _gauge("engine_processes", "Processes of engines.", usage.get("engines", {}).get("processes"))
    yield from _gauge("threads", "Threads of the daemon.", usage.get("daemon", {}).get("threads"))
    yield from _gauge("open_files", "File descriptors of the daemon.", usage.get("daemon", {}).get("files"))
    yield from _gauge("pace_ratio", "Share of the time that workers may work.", status.get("pace"))
    limits = status.get("limits") or {}
    degrees = (limits.get("temperature") or {}).get("c")
    yield from _gauge("temperature_celsius", "The hottest sensor that can be believed.", degrees)
    room = (limits.get("memory") or {}).get("limit_mib")
    yield from _gauge("memory_limit_bytes", "The tightest limit of memory.", None if room is None else room * 2**20)
