"""Why a sample was kept, on one screen: what was seen, how sure that was, what the rule said, what has become of it."""

from __future__ import annotations

from dataclasses import asdict
from datetime import UTC, datetime
from textwrap import shorten, wrap
from typing import Any

from edged.store import Sample

LINES_MAX, COLUMNS_MAX = 40, 100
BOXES_MAX, FEATURES_MAX, OPINIONS_MAX, WORDS_MAX, TEXT_CHARS_MAX = 5, 5, 4, 3, 60  # shown; --json has all

FEATURES = {
    "min_logit": "its weakest box",
    "mean_logit": "its boxes on average",
    "log_product": "all its boxes at once",
    "kept": "how many boxes it has",
    "empty": "that it has no box",
    "missed_logit": "the strongest weak candidate beside it",
    "missed_count": "how many weak candidates lie beside it",
    "rival_logit": "another class on one of its boxes",
    "overlap": "boxes that overlap each other",
    "novelty": "how far the picture is from the known ones",
}
REASONS = {
    "confident": "sure enough",
    "audit": "sure enough, and drawn by lot to be checked all the same",
    "audit_empty": "sure that there is nothing, and drawn by lot to be checked all the same",
    "unsure": "not sure enough to be accepted",
    "novel": "the picture is unlike those that the release was calibrated on",
    "uncalibrated": "the release has no calibration: nobody knows what its scores mean",
    "lost_track": "an object of the frames before is missing here",
    "weak": "sure enough, but something is nearly a box where nothing was answered",
}
SUPPRESSED = {
    "messages": "the budget of messages a minute was spent",
    "bytes": "the budget of bytes a day was spent",
    "too_large": "it is too large to be sent",
    "full": "the store was full",
}
SIGNS = {
    "lost": "{label} was there for {frames} frames and is gone, not at the border",
    "lost_weak": "{label} was there for {frames} frames; only a weak candidate is left in its place",
    "flicker": "{label} was there in the frame before, and neither earlier nor now",
}


def document(sample: Sample) -> dict[str, Any]:
    """Everything that is known about a sample, as JSON can hold it."""
    return {key: value for key, value in asdict(sample).items() if key != "changed"}


def screen(sample: Sample) -> list[str]:
    """The explanation in plain words, at most LINES_MAX lines of COLUMNS_MAX columns."""
    lines = [
        f"{sample.id}   {sample.state}",
        f"{sample.item} of pipeline {sample.pipeline}, taken {_time(sample.captured)}",
        "",
        *_answered(sample),
        "",
        *_how_sure(sample),
        "",
        *_rule(sample),
        "",
        "What has become of it:",
        *_fate(sample),
    ]
    return [line if len(line) <= COLUMNS_MAX else f"{line[: COLUMNS_MAX - 4]} ..." for line in lines]


def _where(evidence: dict[str, Any]) -> str:
    if not evidence.get("region"):
        return ""
    left, top, right, bottom = evidence["seen"]
    return f" in its region, pixels {left},{top} to {right},{bottom} of the frame"


def _answered(sample: Sample) -> list[str]:
    """What was asked and what the model made of it."""
    text = _text(sample.prediction)
    if text is None:
        return [f"What {sample.release} saw{_where(sample.evidence)}:", *_boxes(sample)]
    asked, size = sample.evidence.get("question", ""), sample.evidence.get("question_chars", 0)
    return [
        f"What {sample.release} was asked, {size} characters:", *_words(asked),
        f"What it answered, {len(text)} characters:", *_words(text),
    ]  # fmt: skip


def _text(label: list[dict[str, Any]]) -> str | None:
    """The words of a label; None when it has boxes."""
    return label[0].get("text") if label else None


def _words(text: str) -> list[str]:
    """The beginning of a text on at most WORDS_MAX lines."""
    return wrap(text, COLUMNS_MAX, initial_indent="  ", subsequent_indent="  ", max_lines=WORDS_MAX) or ["  nothing"]


def _boxes(sample: Sample) -> list[str]:
    if not sample.prediction:
        return ["  nothing"]
    sure = sample.evidence.get("boxes", [])
    lines = []
    for number, box in enumerate(sample.prediction[:BOXES_MAX]):
        right = f", right with {sure[number]:.2f}" if number < len(sure) else ""
        place = ", ".join(f"{value:.0f}" for value in box["box"])
        lines.append(f"  {box['label']:<16} score {box['score']:.2f}{right}   at {place}")
    more = len(sample.prediction) - BOXES_MAX
    return lines + ([f"  and {more} more"] if more > 0 else [])


def _how_sure(sample: Sample) -> list[str]:
    evidence = sample.evidence
    if not evidence:
        return [f"How sure: {sample.confidence:.3f}. What that was made of was not recorded."]
    fitted = f"fitted on {evidence['calibration_items']} items"
    if evidence["method"] == "uncalibrated":
        fitted = "a guess: the release has too little data"
    lines = [f"How sure that the whole answer is right: {sample.confidence:.3f} ({fitted}), because of"]
    rows = sorted(evidence.get("features", {}).items(), key=lambda row: -abs(row[1]["contribution"] or 0.0))
    for name, row in rows[:FEATURES_MAX]:
        change = row["contribution"] or 0.0
        speaks = "for it" if change > 0 else "against it" if change < 0 else "neither way"
        lines.append(f"  {change:+7.2f}  {FEATURES.get(name, name)} ({name} {_number(row['value'])}) speaks {speaks}")
    if not rows:
        lines[-1] = lines[-1].removesuffix(", because of")
    if "mean_logprob" in evidence:
        mean = evidence["mean_logprob"]
        lines.append(f"  its {evidence['answer_tokens']} tokens have a mean log-probability of {_number(mean)}")
    if evidence["novelty_limit"] is not None:
        beyond = "beyond" if (evidence["novelty"] or 0.0) > evidence["novelty_limit"] else "within"
        lines.append(
            f"  distance from known pictures {_number(evidence['novelty'])}, {beyond} {evidence['novelty_limit']:.2f}"
        )
    return lines


def _rule(sample: Sample) -> list[str]:
    evidence, reason = sample.evidence, REASONS.get(sample.reason, sample.reason)
    lines = [f"What the rule said: {sample.decision} ({sample.reason})", f"  {reason}"]
    if not evidence:
        return lines
    policy = evidence["policy"]
    threshold, risk = evidence["threshold"], f"at most {policy['target_risk']:.1%} of what is accepted may be wrong"
    lines.append(
        f"  accepted from {threshold:.3f} on: {risk}" if threshold <= 1 else f"  nothing can be accepted: {risk}"
    )
    if sample.decision == "audit":
        lines.append(
            f"  its lot {evidence['draw']:.4f} is below the share {sample.inclusion_probability:g} that is checked"
        )
    if sample.reason == "weak":
        lines.append(
            f"  a candidate of score {evidence['missed']:.3f}; from {evidence['weak_from']:.3f} on they are asked about"
        )
    lines += [f"  {SIGNS[lost['sign']].format(**lost)}" for lost in evidence.get("lost", [])[:BOXES_MAX]]
    spent = evidence["spent"]
    lines.append(
        f"  spent then: {spent['messages']} of {policy['messages_per_minute']} messages a minute, "
        f"{spent['bytes']} of {policy['bytes_per_day']} bytes a day"
    )
    if evidence["breaker"] != "closed":
        lines.append("  nobody had answered for a while: whoever waited got the local answer")
    return lines


def _fate(sample: Sample) -> list[str]:
    evidence = sample.evidence
    if evidence.get("suppressed"):
        why = SUPPRESSED.get(evidence["suppressed"], evidence["suppressed"])
        lines = [f"  nobody was asked ({evidence['suppressed']}): {why}"]
    elif sample.label_by is None:
        lines = ["  nobody was asked"]
    else:
        asked = f" at {_time(evidence['decided'])}" if evidence else ""
        tiers = f" {' or '.join(evidence['tiers'])}" if evidence else " the next tier"
        lines = [f"  asked{tiers}{asked}; a label is wanted until {_time(sample.label_by)}"]
    if sample.labelled is not None:
        lines += _verdict(sample)
    elif sample.label_reason:
        lines.append(f"  {sample.state}: {sample.label_reason}")
    if sample.job:
        lines.append(f"  claimed by the training {sample.job}")
    if sample.used_by:
        lines.append(f"  it trained {sample.used_by}")
    return lines


def _verdict(sample: Sample) -> list[str]:
    assert sample.labelled is not None
    said = sample.provenance or {}
    who = f"{said.get('kind', 'somebody')} {said.get('who', '')}".strip()
    release = f" with {said['release']}" if said.get("release") else ""
    lines = [
        f"  {_time(sample.labelled)}: {who}{release} says, with {sample.label_confidence:.2f}: {_label(sample.label)}"
    ]
    if sample.label_reason:
        lines.append(f"  because: {sample.label_reason}")
    for opinion in sample.opinions[:OPINIONS_MAX] if len(sample.opinions) > 1 else ():
        lines.append(f"    {opinion['who']} said, with {opinion['confidence']:.2f}: {_label(opinion['label'])}")
    return lines


def _label(label: list[dict[str, Any]]) -> str:
    text = _text(label)
    if text is not None:
        return f'"{shorten(text, TEXT_CHARS_MAX, placeholder=" ...")}"'
    names = [str(box["label"]) for box in label]
    more = f" and {len(names) - BOXES_MAX} more" if len(names) > BOXES_MAX else ""
    return (", ".join(names[:BOXES_MAX]) or "nothing is there") + more


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.2f}"
