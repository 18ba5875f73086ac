"""A checkpoint made into a release folder: the first release of a model, before there is anything to compare it with.

    .pt -> ONNX -> int8 -> calibration -> golden set -> release.json

Later releases come from training jobs, which do the same and pass the gate.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from edged.engines.base import EngineOptions, GenerateRequest, Generator, generate_all, open_engine
from edged.wire.manifest import Calibration, ReleaseManifest, ReleaseRef, Thresholds
from trainer import calibrate
from trainer.candidate import detector
from trainer.core.parity import PARITY_KEY, Exported
from trainer.evaluate import Labelled, calibration_items, observe
from trainer.export.golden_images import APART_KEY, part
from trainer.files import sha256_of, write_whole
from trainer.golden import write_detect_golden, write_prompt_golden
from trainer.releases import MANIFEST, ReleaseError, build_manifest, canonical_bytes

GOLDEN_PROMPTS = (
    "The benefits of running a model on the device are",
    "Instruct: Name three colours.\nOutput:",
    "def add(a, b):\n",
)
GOLDEN_TOKENS = 32  # of an answer: as many as a device asks for when it checks a golden prompt

Expected = tuple[str, str]  # a prompt, and the one right answer to it


def package_vision(
    checkpoint: Path,
    folder: Path,
    release: str,
    *,
    labels: Sequence[str],
    imgsz: int,
    calibration: Sequence[Labelled],
    thresholds: Thresholds | None = None,
    lineage: dict[str, Any] | None = None,
    seed: int = 0,
    precision: str = "int8",
) -> ReleaseManifest:
    """Export a YOLO checkpoint (detect, segment or classify) as a release into `folder` (made anew).

    `calibration` are labelled images that trained nothing: all fit the confidence, a few are the golden set, on which parity
    is judged, and others set the ranges of int8. Of a classifier each has one box around the whole image. The lineage says
    the parity, and how many images of each there were. Raises EngineError, ExportError, ReleaseError, ParityFailed, or
    ValueError for other labels than the checkpoint's or too few images.
    """
    from trainer.export.vision import export_vision, vision_manifest, vision_model

    thresholds = thresholds or Thresholds()
    model = vision_model(checkpoint)
    if tuple(labels) != model.labels:
        raise ValueError(f"labels {list(labels)}: {checkpoint} has {list(model.labels)}; name them in its order")
    with _beside(folder) as beside:
        images = [item.image for item in calibration]
        parts = part(images, int8=precision == "int8")
        exported = export_vision(
            checkpoint,
            beside,
            precision,
            golden=parts.golden,
            calibration=parts.ranges,
            imgsz=imgsz,
            thresholds=thresholds,
            seed=seed,
        ).check()
        common: dict[str, Any] = {"labels": labels, "imgsz": imgsz, "thresholds": thresholds}
        with detector(beside, vision_manifest(beside, release, model.kind, **common)) as engine:
            observed = observe(engine, images)
            fitted = calibrate.fit(calibration_items(observed, calibration, thresholds), thresholds)
            roles = write_detect_golden(beside, engine, parts.golden, thresholds.score)
        told = {"checkpoint": checkpoint.name, "checkpoint_sha256": sha256_of(checkpoint), "seed": seed}
        told = (lineage or told) | {PARITY_KEY: exported.lineage(), APART_KEY: parts.lineage()}
        manifest = vision_manifest(beside, release, model.kind, roles=roles, calibration=fitted, lineage=told, **common)
        return _finish(beside, folder, manifest)


def package_language(
    source: Path,
    folder: Path,
    release: str,
    *,
    checkpoint: Path,
    golden: Sequence[Expected],
    adapter: Path | None = None,
    base: ReleaseRef | None = None,
    lineage: dict[str, Any] | None = None,
) -> ReleaseManifest:
    """Put a GGUF file that is there already into a release in `folder` (made anew): a whole model of the Hugging Face folder
    `checkpoint`, or, with `base`, the PEFT `adapter` for that.

    `golden` are prompts with the greedy answers that they must get. The file is compared with what it was made of, on them
    too, and the lineage says the parity; of one that is quantised already only what it is, not what it was made of, which
    `package_gguf` does. Raises ExportError, ReleaseError, ParityFailed, ValueError.
    """
    from trainer.export.language import adapter_parity, file_parity
    from trainer.export.parity import GOLDEN_TEXTS

    if (base is None) != (adapter is None):
        raise ValueError(
            f"{source}: an adapter's release needs both, its base's release and the PEFT folder; give both"
        )
    role = "model" if base is None else "adapter"
    texts = (*GOLDEN_TEXTS, *(f"{prompt}{answer}" for prompt, answer in golden))
    with _beside(folder) as beside:
        if adapter is None:
            report = file_parity(checkpoint, source, texts)
        else:
            report = adapter_parity(adapter, checkpoint, source, beside, texts)
        exported = Exported({role: f"{role}.gguf"}, (report,)).check()
        shutil.copyfile(source, beside / f"{role}.gguf")
        manifest = build_manifest(
            beside,
            release,
            kind="llm" if base is None else "lora",
            engine="llama",
            roles={**exported.roles, **write_prompt_golden(beside, golden)},
            base=base,
            lineage=(lineage or {}) | {PARITY_KEY: exported.lineage()},
        )
        return _finish(beside, folder, manifest)


def package_phi(
    checkpoint: Path,
    folder: Path,
    release: str,
    *,
    prompts: Sequence[str],
    int8: bool = True,
    calibration: Sequence[Expected] = (),
    lineage: dict[str, Any] | None = None,
) -> ReleaseManifest:
    """Export a Phi checkpoint (a Hugging Face folder) as an ONNX release into `folder` (made anew).

    The golden set are `prompts` with what the exported file answers on the device's engine; `calibration` as in
    `answers_calibration`. Raises ExportError, EngineError, ReleaseError, ParityFailed, or ValueError for a prompt without
    an answer.
    """
    from trainer.export.onnx_phi import ENGINE as ONNX_PHI
    from trainer.export.onnx_phi import export_phi_as

    with _beside(folder) as beside:
        exported = export_phi_as(checkpoint, beside, "int8-dynamic" if int8 else "fp32").check()
        return _finish_language(beside, folder, release, ONNX_PHI, exported, prompts, calibration, lineage)


def package_gguf(
    checkpoint: Path,
    folder: Path,
    release: str,
    *,
    prompts: Sequence[str],
    quantization: str = "Q4_K_M",
    calibration: Sequence[Expected] = (),
    lineage: dict[str, Any] | None = None,
) -> ReleaseManifest:
    """Export a Phi, Llama, Mistral or Qwen checkpoint (a Hugging Face folder) as a GGUF release into `folder` (made anew).

    The golden set are `prompts` with what the quantised file answers on the device's engine; `calibration` as in
    `answers_calibration`. Raises ExportError, EngineError, ReleaseError, ParityFailed, or ValueError for a prompt without
    an answer.
    """
    from trainer.export.language import export_text_gguf
    from trainer.export.parity import GOLDEN_TEXTS

    with _beside(folder) as beside:
        exported = export_text_gguf(checkpoint, beside, quantization, (*GOLDEN_TEXTS, *prompts)).check()
        return _finish_language(beside, folder, release, "llama", exported, prompts, calibration, lineage)


def read_expected(path: Path) -> list[Expected]:
    """What a model is asked and must answer, one JSON object `{"prompt": ..., "answer": ...}` a line.

    Raises ValueError naming the first line that is none; a half-read file would calibrate on a draw that nobody chose.
    """
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            prompt, answer = row["prompt"], row["answer"]
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path}:{number}: no object with prompt and answer ({error}): correct the line") from None
        if not (isinstance(prompt, str) and isinstance(answer, str) and prompt.strip() and answer.strip()):
            raise ValueError(f"{path}:{number}: prompt and answer must be texts that are not empty: correct the line")
        found.append((prompt, answer))
    return found


def answers_calibration(engine: Generator, expected: Sequence[Expected]) -> Calibration:
    """How sure this model's answers are, from what it answers (greedy) to prompts with a known answer.

    Right means the expected text, spaces at its ends aside. Too few give an `uncalibrated` one, as for images.
    Raises EngineError, and ValueError for an answer without a probability.
    """
    pairs = []
    for prompt, answer in expected:
        # As many tokens as the right answer has bytes are always enough to be right.
        request = GenerateRequest(prompt, tokens_max=len(answer.encode()) + 1)
        text, end = generate_all(engine, request)
        pairs.append((end.mean_logprob, text.strip() == answer.strip()))
    return calibrate.fit_answers(pairs)


@contextmanager
def _beside(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` to make a release in; nothing of one that failed stays. Raises ReleaseError."""
    _may_be_replaced(folder)
    beside = folder.with_name(folder.name + ".new")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir(parents=True)
    try:
        yield beside
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # where it is done it lies at `folder`


def _finish_language(
    beside: Path,
    folder: Path,
    release: str,
    engine: str,
    exported: Exported,
    prompts: Sequence[str],
    expected: Sequence[Expected],
    lineage: dict[str, Any] | None,
) -> ReleaseManifest:
    """Golden set, calibration and manifest of the exported files in `beside`, by the engine that devices run."""
    roles, lineage = dict(exported.roles), (lineage or {}) | {PARITY_KEY: exported.lineage()}
    common: dict[str, Any] = {"kind": "llm", "engine": engine}
    options = EngineOptions(threads=os.cpu_count() or 1)
    running = open_engine(beside, build_manifest(beside, release, roles=roles, **common), options)
    assert isinstance(running, Generator)
    try:
        golden = write_prompt_golden(beside, [(prompt, _answer(running, prompt)) for prompt in prompts])
        calibration = answers_calibration(running, expected)
    finally:
        running.close()
    manifest = build_manifest(beside, release, roles=roles | golden, calibration=calibration, lineage=lineage, **common)
    return _finish(beside, folder, manifest)


def _answer(engine: Generator, prompt: str) -> str:
    answer, _ = generate_all(engine, GenerateRequest(prompt, tokens_max=GOLDEN_TOKENS))
    if not answer.strip():
        raise ValueError(f"golden prompt {prompt!r}: the model answers nothing, which proves nothing; choose another")
    return answer


def _may_be_replaced(folder: Path) -> None:
    if folder.is_dir() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise ReleaseError(f"{folder} is not empty and no release: name a new folder")


def _finish(beside: Path, folder: Path, manifest: ReleaseManifest) -> ReleaseManifest:
    write_whole(beside / MANIFEST, canonical_bytes(manifest))
    _may_be_replaced(folder)
    shutil.rmtree(folder, ignore_errors=True)
    beside.rename(folder)
    return manifest
