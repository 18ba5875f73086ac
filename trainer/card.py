"""The model card of a run: what was made of what, how it stands beside what runs now, and what it is not good for."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from typing import Any

CARD = "README.md"
_OUTCOMES = {
    "passed": "The gate passed it: it may be released.",
    "refused": "The gate refused it: it is not released.",
    "failed": "The run failed: there is no candidate.",
}
_KINDS = {
    "detect": "object detector",
    "segment": "segmenter",
    "classify": "classifier",
    "llm": "language model adapter",
}
_FIGURES = ("f1", "map50", "map50_95", "frame_accuracy", "top1", "loss", "perplexity", "margin", "preferred",
            "latency_ms_median", "n_images", "n_boxes", "examples", "tokens")  # fmt: skip
_SIDES = ("base", "current", "candidate")
_NAMES = {"base": "bare base"}


def card(metadata: Mapping[str, Any], plots: Sequence[str], command: str) -> str:
    """Markdown from what metadata.json says; `command` is how the run was started."""
    made = time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime(metadata["finished"]))
    kind = _KINDS.get(metadata["kind"], metadata["kind"])
    parts = [
        f"# {metadata['target']}",
        f"A candidate {kind} made from `{metadata['source']}` by the run `{metadata['job']}`, {made}.\n\n"
        f"**{_OUTCOMES.get(metadata['outcome'], metadata['outcome'])}**{_why(metadata)}",
        _section("Base", _base(metadata)),
        _section("Data", _data(metadata)),
        _section("Training", _training(metadata, plots)),
        _section("Results", _results(metadata, plots)),
        _section("Gate", _gate(metadata)),
        _section("Limits", _limits(metadata)),
        _section("How to reproduce", _reproduce(metadata, command)),
        _section("Licence", _licence(metadata)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _why(metadata: Mapping[str, Any]) -> str:
    return "" if metadata["outcome"] == "passed" else f" Why: {metadata['reason']}"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _base(metadata: Mapping[str, Any]) -> str:
    config = metadata["config"]
    rows = [("release", f"`{metadata['source']}`"), ("checkpoint", f"`{config['checkpoint']}`")]
    if metadata["kind"] == "llm":
        rows.append(("what ships", "`adapter.gguf`, which goes onto exactly this release"))
    else:
        rows += [("labels", ", ".join(config["labels"])), ("input", f"{config['imgsz']} px")]
    return _table(("", ""), rows)


def _data(metadata: Mapping[str, Any]) -> str:
    samples = metadata.get("samples")
    if not samples:
        return "None was read."
    rows = [(name.replace("_", " "), value) for name, value in samples.items() if isinstance(value, int)]
    rows += [(f"left out: {reason.replace('_', ' ')}", count) for reason, count in samples["left_out"].items()]
    text = _table(("samples", "number"), rows)
    who = samples.get("provenance") or {}
    if who:
        text += "\n\nWho labelled what was trained on:\n\n" + _table(("labelled by", "samples"), list(who.items()))
    sure = samples.get("label_confidence")
    if sure:
        least, mean = _value(sure["lowest"]), _value(sure["mean"])
        text += f"\n\nConfidence of the labels that models gave: {mean} on average, {least} at least."
    if "dataset_sha256" in samples:
        text += f"\n\nData set: `{metadata['dataset']}`, SHA-256 `{samples['dataset_sha256']}`."
    return text


def _training(metadata: Mapping[str, Any], plots: Sequence[str]) -> str:
    training = metadata.get("training")
    if not training:
        return (
            "Nothing was trained." if metadata["outcome"] == "failed" else "The weights were taken over as they were."
        )
    config = metadata["config"]
    names = ("imgsz", "epochs", "batch", "lr", "lora", "replay_ratio", "label_confidence_min", "seed", "threads")
    settings = training.get("settings") or {name: config[name] for name in names if name in config}
    share = training["trainable"] / training["parameters"] if training.get("parameters") else None
    rows = [("strategy", metadata["strategy"]), ("seed", metadata["seed"])]
    rows.append(("parameters trained", f"{training['trainable']:,}" + (f" ({share:.2%})" if share else "")))
    rows += [(name, _value(value)) for name, value in settings.items() if name != "seed"]
    known = {"strategy", "trainable", "parameters", "settings", *(metadata["history"] or [{}])[-1]}
    rows += [(name.replace("_", " "), _value(value)) for name, value in training.items() if name not in known]
    rows += [(f"seconds: {name}", f"{seconds:.1f}") for name, seconds in metadata["timings_s"].items()]
    picture = "\n\n![loss by epoch](loss.png)" if "loss.png" in plots else ""
    return _table(("setting", "value"), rows) + picture


def _results(metadata: Mapping[str, Any], plots: Sequence[str]) -> str:
    parts = []
    for name, found in (metadata.get("evaluation") or {}).items():
        sides = [side for side in _SIDES if isinstance(found.get(side), Mapping)]
        if not sides:
            continue
        releases = ", ".join(f"{_NAMES.get(side, side)} `{found[side]['release']}`" for side in sides)
        rows = [
            (figure, *(_value(found[side].get(figure)) for side in sides))
            for figure in _FIGURES
            if any(found[side].get(figure) is not None for side in sides)
        ]
        header = ("", *(_NAMES.get(side, side) for side in sides))
        parts.append(f"On the frozen holdout **{name.replace('_', ' ')}**: {releases}.\n\n{_table(header, rows)}")
    if "metrics.png" in plots:
        parts.append("![the candidate beside what runs now](metrics.png)")
    return "\n\n".join(parts)


def _gate(metadata: Mapping[str, Any]) -> str:
    gate = metadata.get("gate")
    if not gate:
        return "It did not come so far."
    rows = [("passed" if each["passed"] else "**REFUSED**", each["name"], each["reason"]) for each in gate["checks"]]
    return _table(("verdict", "check", "found"), rows)


def _limits(metadata: Mapping[str, Any]) -> str:
    lines = ["It was judged on the holdouts above, and on nothing else: what they do not show is not known."]
    calibration = metadata.get("calibration")
    if calibration and calibration.get("method") == "uncalibrated":
        lines.append(
            f"Uncalibrated: {calibration['items']} answers to fit confidence on, {calibration['needed']} are needed. A "
            "device trusts none of its answers by itself."
        )
    elif calibration:
        lines.append(
            f"Confidence was fitted on {calibration.get('items', 'some')} items; expected calibration error "
            f"{_value(calibration.get('ece'))}. Answers above {_value(calibration.get('threshold'))} are accepted at a "
            f"target risk of {_value(calibration.get('target_risk'))}, for inputs like those."
        )
    if metadata["kind"] == "llm":
        lines.append("The loss of held-out answers says how well it imitates them, not whether they are true.")
    for name, found in (metadata.get("evaluation") or {}).items():
        weak = [
            f"{label} ({value:.2f})"
            for label, value in ((found.get("candidate") or {}).get("class_f1") or {}).items()
            if value < 0.5
        ]
        if weak:
            lines.append(f"Weak on these classes of {name} (F1): {', '.join(weak)}.")
    return "\n".join(f"- {line}" for line in lines)


def _reproduce(metadata: Mapping[str, Any], command: str) -> str:
    return (
        f"    {command}\n\nThe same data, configuration and seed ({metadata['seed']}) give the same weights on the same "
        "machine and versions; `metadata.json` has the whole configuration."
    )


def _licence(metadata: Mapping[str, Any]) -> str:
    text = (
        f"The result inherits the licences of its base (`{metadata['config']['checkpoint']}`) and of the data. Whoever "
        "releases it sees to both."
    )
    if metadata["kind"] != "llm":
        text += " It was trained with ultralytics, which is AGPL-3.0."
    return text


def _table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _value(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    return json.dumps(value) if isinstance(value, dict | list) else str(value)
