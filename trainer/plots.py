"""Pictures of a run: how the loss went, and how the candidate stands beside the release that runs now."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.files import write_whole

LOSS, METRICS = "loss.png", "metrics.png"
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#8c564b")
_SIDES = {"base": "#bbbbbb", "current": "#888888", "candidate": "#1f77b4"}
_NOT_LOSSES = frozenset({"epoch", "epochs", "step", "steps", "lr", "learning_rate", "grad_norm", "num_tokens"})
# Of each set of the evaluation: what is shown, and whether more is better.
_FIGURES = {
    "f1": True, "map50": True, "map50_95": True, "frame_accuracy": True, "top1": True, "loss": False, "margin": True,
    "preferred": True,
}  # fmt: skip
_SHARES = frozenset({"f1", "map50", "map50_95", "frame_accuracy", "top1", "preferred"})


def draw(folder: Path, metadata: Mapping[str, Any]) -> list[str]:
    """Write what there is to show of a run into `folder`; the names of the files."""
    made = {LOSS: loss(metadata.get("history") or []), METRICS: metrics(metadata.get("evaluation") or {})}
    for name, data in made.items():
        if data is not None:
            write_whole(folder / name, data)
        else:
            (folder / name).unlink(missing_ok=True)
    return [name for name, data in made.items() if data is not None]


def loss(history: Sequence[Mapping[str, float]]) -> bytes | None:
    """PNG: every loss by epoch; None when no epoch told one."""
    names = sorted({name for row in history for name in row if name not in _NOT_LOSSES and "loss" in name})
    if not names:
        return None
    plt = _pyplot()
    figure, axis = plt.subplots(figsize=(7, 4), constrained_layout=True)
    for number, name in enumerate(names):
        points = [(row.get("epoch", place + 1), row[name]) for place, row in enumerate(history) if name in row]
        marker = "o" if len(points) < 40 else None
        axis.plot(*zip(*points, strict=True), color=_COLOURS[number % len(_COLOURS)], marker=marker, label=name)
    axis.set_xlabel("epoch")
    axis.set_ylabel("loss")
    axis.set_ylim(bottom=0)
    axis.xaxis.get_major_locator().set_params(integer=True)
    axis.grid(alpha=0.3)
    axis.legend()
    return _png(plt, figure)


def metrics(evaluation: Mapping[str, Mapping[str, Mapping[str, Any] | None]]) -> bytes | None:
    """PNG: the figures of each set, of the candidate beside the others; None when nothing was measured."""
    panels = []
    for name, sides in evaluation.items():
        known = {side: values for side, values in sides.items() if isinstance(values, Mapping)}
        for figure_name, more in _FIGURES.items():
            found = {side: values.get(figure_name) for side, values in known.items()}
            if any(value is not None for value in found.values()):
                panels.append((name, figure_name, more, found))
    if not panels:
        return None
    plt = _pyplot()
    columns = min(4, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(
        rows, columns, figsize=(2.6 * columns, 2.7 * rows), constrained_layout=True, squeeze=False
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_axis_off()
    for axis, (name, figure_name, more, figures) in zip(axes.flat, panels, strict=False):
        shown = [side for side in _SIDES if figures.get(side) is not None]
        values = [float(figures[side] or 0) for side in shown]
        bars = axis.bar(shown, values, color=[_SIDES[side] for side in shown], width=0.6)
        axis.bar_label(bars, labels=[f"{value:.3g}" for value in values], padding=2, fontsize=9)
        axis.set_title(
            f"{name.replace('_', ' ')}: {figure_name}\n({'higher' if more else 'lower'} is better)", fontsize=9
        )
        if figure_name in _SHARES:
            axis.set_ylim(0, 1.15)
        else:
            axis.margins(y=0.2)
        axis.tick_params(labelsize=8)
        axis.grid(axis="y", alpha=0.3)
        axis.set_axisbelow(True)
    return _png(plt, figure)


def _pyplot() -> Any:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _png(plt: Any, figure: Any) -> bytes:
    out = io.BytesIO()
    figure.savefig(out, format="png", dpi=110)
    plt.close(figure)
    return out.getvalue()
