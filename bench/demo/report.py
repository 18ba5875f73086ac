"""What a run of the demo shows: a table on the terminal, report.json for scripts, report.html for people."""

from __future__ import annotations

import base64
import html
import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from bench.demo.scenes import LABELS, Scene
from bench.demo.stream import Judged
from edged.engines.base import Detections, Detector, Image

WINDOW = 25  # frames of a device in one point of a curve
EXAMPLES = 4
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e")


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that must hold for the run to count."""

    name: str
    passed: bool
    text: str


def write(folder: Path, report: dict[str, Any], figures: dict[str, bytes]) -> None:
    """Write report.json and report.html into `folder`, whole or not at all."""
    for name, text in (("report.json", json.dumps(report, indent=2) + "\n"), ("report.html", _page(report, figures))):
        beside = folder / f".{name}"
        beside.write_text(text)
        beside.replace(folder / name)


def table(report: dict[str, Any]) -> None:
    """Print the outcome on the terminal."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    rows = Table(title=f"edged demo: shift {report['shift']}, seed {report['seed']}" + _ablated(report))
    for name, justify in (("", "left"), ("before", "right"), ("after", "right"), ("teacher", "right")):
        rows.add_column(name, justify=justify)  # type: ignore[arg-type]  # rich wants literals
    for name, key in (("escalation rate", "escalation_rate"), ("accuracy (F1)", "accuracy"),
                      ("error among accepted", "accepted_error")):  # fmt: skip
        teacher = _percent(report["accuracy_teacher"]) if key == "accuracy" else ""
        rows.add_row(name, _cell(report, key, "before"), _cell(report, key, "after"), teacher)
    console.print(rows)
    devices = Table(title="devices")
    for name in ("device", "releases it ran", "swap", "escalated before -> after", "F1 before -> after"):
        devices.add_column(name)
    for name, device in report["devices"].items():
        devices.add_row(
            name + (" (canary)" if name in report["canary"]["devices"] else ""),
            ", ".join(device["versions"]),
            f"{device['swap_ms']:.1f} ms" if device["swap_ms"] is not None else "none",
            f"{_percent(device['escalation_rate_before'])} -> {_percent(device['escalation_rate_after'])}",
            f"{_percent(device['accuracy_before'])} -> {_percent(device['accuracy_after'])}",
        )
    console.print(devices)
    console.print(
        f"frames: {report['frames_in']} in, {report['frames_out']} out, {report['frames_lost']} lost; "
        f"labels used: {report['labels_used']}; canary: {report['canary']['result'] or 'none'}"
    )
    for check in report["checks"]:
        console.print(f"[green]ok  [/green] {check['text']}" if check["passed"] else f"[red]FAIL[/red] {check['text']}")


def _ablated(report: dict[str, Any]) -> str:
    return f", ablated: {report['ablate']}" if report["ablate"] else ""


def _cell(report: dict[str, Any], key: str, when: str) -> str:
    """A figure of the main table; the error among accepted frames with how many those were."""
    text = _percent(report[f"{key}_{when}"])
    return f"{text} of {report[f'accepted_{when}']}" if key == "accepted_error" else text


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value * 100:.1f} %"


def curves(rows: Sequence[Judged], releases: tuple[str, str | None]) -> bytes:
    """PNG: escalation rate and accuracy of each device over the stream, frame by frame, with phases and swaps marked.

    `rows` in the order in which the frames were handed over; `releases`: the one before and the one after, if any.
    """
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(2, 1, figsize=(9, 6), sharex=True, constrained_layout=True)
    order = {row.frame.name: number for number, row in enumerate(rows)}
    for number, device in enumerate(sorted({row.frame.device for row in rows})):
        mine = [row for row in rows if row.frame.device == device]
        at = [order[row.frame.name] for row in mine][WINDOW - 1 :]
        escalated = [float(row.result.decision == "escalate") for row in mine]
        colour = _COLOURS[number % len(_COLOURS)]
        axes[0].plot(at, _rolling(escalated)[WINDOW - 1 :], color=colour, label=device, linewidth=1.4)
        axes[1].plot(at, _rolling_f1(mine)[WINDOW - 1 :], color=colour, label=device, linewidth=1.4)
        swap = next((order[row.frame.name] for row in mine if row.result.release == releases[1]), None)
        for axis in axes if swap is not None else ():
            axis.axvline(swap, color=colour, linestyle="--", linewidth=1.2)
    starts: dict[str, int] = {}
    for row in rows:
        starts.setdefault(row.frame.phase, order[row.frame.name])
    for axis, title in zip(axes, ("escalation rate", "accuracy (F1 at IoU 0.5)"), strict=True):
        axis.set_ylim(-0.03, 1.12)
        axis.set_ylabel(title)
        axis.grid(alpha=0.3)
        for name, start in starts.items():
            axis.axvline(start, color="#888888", linewidth=0.8)
            axis.annotate(
                name, (start, 1.06), xytext=(3, 0), textcoords="offset points", fontsize=8, color="#444444", va="center"
            )
    axes[0].set_title(
        f"{releases[0]} to {releases[1] or '(no release)'}; moving window of {WINDOW} frames; "
        "dashed: the device swaps its model",
        fontsize=9,
    )
    axes[1].set_xlabel("frames of all devices, in the order in which they were handed over")
    axes[1].legend(loc="lower right")
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    plt.close(figure)
    return out.getvalue()


def _rolling(values: Sequence[float]) -> list[float]:
    return [float(np.mean(values[max(0, n - WINDOW + 1) : n + 1])) for n in range(len(values))]


def _rolling_f1(rows: Sequence[Judged]) -> list[float]:
    out = []
    for n in range(len(rows)):
        part = rows[max(0, n - WINDOW + 1) : n + 1]
        tp, wrong = sum(row.tp for row in part), sum(row.fp + row.fn for row in part)
        out.append(2 * tp / (2 * tp + wrong) if tp + wrong else math.nan)
    return out


def examples(rows: Sequence[Judged], before: Detector, after: Detector, threshold: float) -> bytes:
    """PNG: frames that the old release got wrong, with its boxes above and the new release's boxes below."""
    wrong = [row.frame.scene for row in rows if not row.right and len(row.frame.scene.classes)]
    chosen = [*wrong[:: max(1, len(wrong) // EXAMPLES)][:EXAMPLES]] or [row.frame.scene for row in rows[:EXAMPLES]]
    top, bottom = (
        [_drawn(scene, engine.infer([engine.prepare(scene.image)])[0].above(threshold)) for scene in chosen]
        for engine in (before, after)
    )
    picture = np.vstack([np.hstack(top), np.hstack(bottom)])
    done, data = cv2.imencode(".png", picture)
    assert done, "PNG of uint8 pixels"
    return data.tobytes()


def _drawn(scene: Scene, found: Detections) -> Image:
    picture = cv2.resize(scene.image, None, fx=2, fy=2, interpolation=cv2.INTER_NEAREST)
    for box in scene.boxes:
        x1, y1, x2, y2 = (int(v * 2) for v in box)
        cv2.rectangle(picture, (x1, y1), (x2, y2), (255, 255, 255), 1)
    for box, k, score in zip(found.boxes, found.classes, found.scores, strict=True):
        x1, y1, x2, y2 = (int(v * 2) for v in box)
        cv2.rectangle(picture, (x1, y1), (x2, y2), (0, 200, 255), 2)
        text = f"{LABELS[int(k)]} {score:.2f}"
        (width, height), _ = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)
        top = max(y1 - height - 6, 0)
        cv2.rectangle(picture, (x1, top), (x1 + width + 6, top + height + 6), (0, 200, 255), cv2.FILLED)
        cv2.putText(picture, text, (x1 + 3, top + height + 3), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
    return np.asarray(cv2.copyMakeBorder(picture, 3, 3, 3, 3, cv2.BORDER_CONSTANT, value=(60, 60, 60)), np.uint8)


STYLE = """body { font: 15px/1.45 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; margin: 1rem 0; }
td, th { padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: left; }
img { max-width: 100%; margin: .5rem 0; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.ok::marker { content: "\\2713  "; color: #2a2; }
.fail::marker { content: "\\2717  "; color: #c22; } .fail { color: #c22; }
small { color: #666; }
"""


def _page(report: dict[str, Any], figures: dict[str, bytes]) -> str:
    def image(name: str, alt: str) -> str:
        if name not in figures:
            return ""
        data = base64.b64encode(figures[name]).decode()
        return f'<img alt="{alt}" src="data:image/png;base64,{data}">'

    def row(*cells: str, tag: str = "td") -> str:
        return "<tr>" + "".join(f"<{tag}>{cell}</{tag}>" for cell in cells) + "</tr>"

    def esc(value: object) -> str:
        return html.escape(str(value))

    main = "".join(
        row(
            name,
            _cell(report, key, "before"),
            _cell(report, key, "after"),
            _percent(report["accuracy_teacher"]) if key == "accuracy" else "",
        )
        for name, key in (
            ("Escalation rate", "escalation_rate"),
            ("Accuracy (F1 at IoU 0.5)", "accuracy"),
            ("Error among accepted answers", "accepted_error"),
        )
    )
    devices = "".join(
        row(
            esc(name) + (" (canary)" if name in report["canary"]["devices"] else ""),
            esc(", ".join(d["versions"])),
            f"{d['swap_ms']:.1f} ms" if d["swap_ms"] is not None else "-",
            f"{_percent(d['escalation_rate_before'])} &rarr; {_percent(d['escalation_rate_after'])}",
            f"{_percent(d['accuracy_before'])} &rarr; {_percent(d['accuracy_after'])}",
        )
        for name, d in report["devices"].items()
    )
    checks = "".join(f"<li class={'ok' if c['passed'] else 'fail'}>{esc(c['text'])}</li>" for c in report["checks"])
    language = "".join(
        row(esc(e["prompt"].strip()), esc(e["base"]), esc(e["adapted"])) for e in report["language"]["examples"]
    )
    seconds = "".join(row(esc(name), f"{value:.0f} s") for name, value in report["seconds"].items())
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>edged: one turn of the loop</title>
<style>
{STYLE}</style></head><body>
<h1>One turn of the loop: shift {esc(report["shift"])}, seed {esc(report["seed"])}{esc(_ablated(report))}</h1>
<p>Three devices look at a stream that shifts. They become unsure, ask a larger model, and the trainer makes release
{esc(report["release_after"] or "(none)")} out of {report["labels_used"]} labels. Before and after are frames of the same
distribution; what is scored after shows digits that nothing was trained on. Only the scorer knows the truth.</p>
<table>{row("", "before", "after", "teacher", tag="th")}{main}</table>
<ul>{checks}</ul>
<p>Frames: {report["frames_in"]} in, {report["frames_out"]} out, {report["frames_lost"]} lost, as an independent
subscriber counted them. Target risk of the policy: {_percent(report["target_risk"])}, the same before and after.</p>
<h2>Over time</h2>{image("curves", "escalation rate and accuracy over time")}
<h2>Frames before and after</h2>
<p><small>Above the release before, below the release after, on the same frames. White: the truth. Yellow: the
answer.</small></p>{image("examples", "example frames with boxes before and after")}
<h2>Devices</h2>
<table>{row("device", "releases", "swap", "escalation rate", "accuracy", tag="th")}{devices}</table>
<p>Canary: {esc(", ".join(report["canary"]["devices"]) or "none")}, {esc(report["canary"]["result"] or "not judged")}.</p>
<h2>The language model</h2>
<p>Answers of {esc(report["language"]["device"])} over MQTT, before and after its LoRA adapter was swapped in
({esc(report["language"]["adapter"] or "no adapter")}).</p>
<table>{row("prompt", "base", "with the adapter", tag="th")}{language}</table>
<h2>How long it took</h2><table>{seconds}</table>
</body></html>
"""
