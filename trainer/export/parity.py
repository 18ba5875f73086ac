"""Runs an exported file and its checkpoint on the same golden inputs, and says how far they are apart.

The file runs as devices run it: images on the device's own engine, texts in llama.cpp (with float32 keys and values, so that
what is measured is the file) or on ONNX Runtime. The checkpoint runs in its own library, on the GPU where there is one.
Metrics and tolerances: `trainer.core.parity`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edged.engines.base import Detector, EngineOptions, Image, open_engine
from edged.engines.letterbox import Letterbox
from edged.wire.manifest import ReleaseManifest
from trainer.core.parity import (
    FLOOR,
    IMAGE_TOLERANCES,
    TEXT_TOLERANCES,
    Answer,
    ParityReport,
    compare_boxes,
    compare_labels,
    compare_logits,
    effect_off,
    rows_of,
    text_tolerances,
)
from trainer.export.gguf_architectures import ExportError

TOKENS_MAX = 256  # of one text: enough to see a wrong rotation, and logits of a large vocabulary stay below 256 MB
TEXTS_MAX = 16
IMAGES_MAX = 32

# Long enough for positions to count, of several scripts and code, so that every part of a tokenizer is met.
PROBE = (
    "A gateway in the north hall counts parcels as they pass. On Monday it read 1,204 labels and was sure of all but 37; "
    "those it sent to a larger model, which answered within two seconds.\n\n"
    "def read(line: str) -> int:\n    return int(line.split()[-1])  # the last word is the number\n\n"
    "Größe: 12,5 cm; prix: 40 €; 日本語のラベル; naïve café. "
    'It isn\'t sure: {"boxes": [[10, 20, 30, 40]], "score": 0.41}. What should the operator do next, and why?'
)
GOLDEN_TEXTS = (PROBE, "Instruct: Name three colours.\nOutput:", "The benefits of running a model on the device are")


@dataclass(frozen=True, slots=True)
class TextReference:
    """What a checkpoint makes of golden texts: their `tokens`, and logits (tokens, vocabulary) of each; `adapted`: the same
    with an adapter on it."""

    texts: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    logits: tuple[NDArray[np.float32], ...]
    adapted: tuple[NDArray[np.float32], ...] = ()


def load_checkpoint(checkpoint: Path) -> tuple[Any, Any]:
    """A Hugging Face folder in float32, and its tokenizer; raises ExportError for one that is not whole."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
        tokenizer = AutoTokenizer.from_pretrained(checkpoint, local_files_only=True)
    except Exception as error:  # transformers, safetensors and tokenizers each have their own
        raise ExportError(f"{checkpoint}: not a whole checkpoint ({error}); save it with save_pretrained()") from error
    if report["missing_keys"]:
        lost = ", ".join(sorted(report["missing_keys"])[:5])
        raise ExportError(f"{checkpoint}: lacks weights, among them {lost}; save it with save_pretrained()")
    return model.eval(), tokenizer


def text_reference(
    checkpoint: Path, texts: Sequence[str] = GOLDEN_TEXTS, *, adapter: Path | None = None, context: int = TOKENS_MAX
) -> TextReference:
    """Run the Hugging Face checkpoint (and the PEFT `adapter` on it) on `texts`, each cut to `context` tokens.

    Raises ExportError for a checkpoint or an adapter that is not whole, ValueError for a text without tokens.
    """
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model, words = load_checkpoint(checkpoint)
    limit = min(context, TOKENS_MAX, int(model.config.max_position_embeddings))
    tokens = tuple(tuple(words(text)["input_ids"][:limit]) for text in texts[:TEXTS_MAX])
    if not tokens or not all(tokens):
        raise ValueError("a golden text has no tokens; give texts that are not empty")
    model = model.to(device)

    def run() -> tuple[NDArray[np.float32], ...]:
        with torch.no_grad():
            return tuple(
                model(input_ids=torch.tensor([row], device=device), use_cache=False).logits[0].float().cpu().numpy()
                for row in tokens
            )

    logits = run()
    if adapter is None:
        return TextReference(tuple(texts[:TEXTS_MAX]), tokens, logits)
    from peft import PeftModel

    try:
        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    except Exception as error:  # peft, safetensors and torch each have their own
        raise ExportError(f"{adapter}: not a whole adapter for {checkpoint} ({error}); save it again") from error
    return TextReference(tuple(texts[:TEXTS_MAX]), tokens, logits, run())


def gguf_parity(path: Path, reference: TextReference, form: str) -> ParityReport:
    """Compare a GGUF model with its checkpoint, tokenizer included; `form` names the row of tolerances (F16, Q4_K_M)."""
    tolerances = text_tolerances(form)
    with _llama(path, reference) as model:
        found = np.concatenate([_logits(model, row) for row in reference.tokens])
        pairs = zip(reference.texts, reference.tokens, strict=True)
        others = [_tokens(model, text, len(row)) != row for text, row in pairs]
    values = compare_logits(np.concatenate(reference.logits), _cut(found, reference))
    rows = rows_of("logits", values, tolerances)
    rows += rows_of("tokens", {"tokens_changed": float(np.mean(others))}, tolerances)
    return ParityReport(form, len(reference.tokens), rows)


def lora_parity(base: Path, adapter: Path, reference: TextReference) -> ParityReport:
    """Compare a GGUF adapter on its GGUF `base` (F32 or F16) with the PEFT adapter that `reference` was made with.

    Judged is what the adapter does too, because one that does little would hide in the tolerance of the whole.
    """
    tolerances = TEXT_TOLERANCES["lora"]
    with _llama(base, reference) as model:
        plain = np.concatenate([_logits(model, row) for row in reference.tokens])
        _attach(model, adapter)
        adapted = np.concatenate([_logits(model, row) for row in reference.tokens])
    expected = np.concatenate(reference.adapted)
    rows = rows_of("logits", compare_logits(expected, _cut(adapted, reference)), tolerances)
    off = effect_off(np.concatenate(reference.logits), expected, _cut(plain, reference), _cut(adapted, reference))
    return ParityReport("lora", len(reference.tokens), rows + rows_of("adapter", {"effect_off": off}, tolerances))


def image_parity(
    checkpoint: Path, folder: Path, manifest: ReleaseManifest, images: Sequence[Image], form: str
) -> ParityReport:
    """Compare the vision release in `folder` on the device's engine with ultralytics' prediction by its .pt checkpoint.

    `form` is fp32, fp16, int8 or int8-dynamic. Raises EngineError for a file that does not run, ValueError without images.
    """
    images = images[:IMAGES_MAX]
    if not images:
        raise ValueError(f"{folder}: parity needs golden images, none were given")
    expected = _checkpoint_answers(checkpoint, manifest, images)
    engine = open_engine(folder, manifest, EngineOptions())
    assert isinstance(engine, Detector)
    try:
        found = [_engine_answer(engine, manifest, image) for image in images]
    finally:
        engine.close()
    if manifest.kind == "classify":
        values = compare_labels(expected, found)
    else:
        values = compare_boxes(expected, found, manifest.thresholds.score)
    return ParityReport(form, len(images), rows_of(manifest.kind, values, IMAGE_TOLERANCES[form]))


def _cut(found: NDArray[np.float32], reference: TextReference) -> NDArray[np.float32]:
    """Without the columns that llama.cpp has beyond the checkpoint's vocabulary."""
    return found[:, : reference.logits[0].shape[1]]


@contextmanager
def _llama(path: Path, reference: TextReference) -> Iterator[Any]:
    import llama_cpp

    f32 = llama_cpp.GGML_TYPE_F32
    longest = max(len(row) for row in reference.tokens)
    try:
        model = llama_cpp.Llama(
            str(path), n_ctx=longest, n_batch=longest, logits_all=True, verbose=False, type_k=f32, type_v=f32
        )
    except ValueError as error:
        raise ValueError(f"{path}: llama.cpp does not load it: {error}") from None
    try:
        yield model
    finally:
        model.close()


def _logits(model: Any, tokens: Sequence[int]) -> NDArray[np.float32]:
    model.reset()
    model.eval(list(tokens))
    return np.array(model.scores[: len(tokens)], np.float32)


def _tokens(model: Any, text: str, count: int) -> tuple[int, ...]:
    return tuple(model.tokenize(text.encode(), special=True)[:count])


def _attach(model: Any, adapter: Path) -> None:
    import ctypes

    import llama_cpp

    loaded = llama_cpp.llama_adapter_lora_init(model.model, str(adapter).encode())
    if not loaded:
        raise ValueError(f"{adapter}: llama.cpp refuses the adapter for this base")
    adapters = (llama_cpp.llama_adapter_lora_p_ctypes * 1)(loaded)
    if llama_cpp.llama_set_adapters_lora(model.ctx, adapters, 1, (ctypes.c_float * 1)(1.0)) != 0:
        raise ValueError(f"{adapter}: llama.cpp cannot attach the adapter")


def _checkpoint_answers(checkpoint: Path, manifest: ReleaseManifest, images: Sequence[Image]) -> list[Answer]:
    from trainer.tuners.yolo import prepare_process

    prepare_process()
    from ultralytics.models.yolo import YOLO

    network = YOLO(checkpoint)
    assert manifest.input_size is not None
    settings: dict[str, Any] = {
        "imgsz": list(manifest.input_size), "conf": FLOOR, "iou": manifest.thresholds.iou, "rect": False,
        "nms": False,  # of an end-to-end network the head that is exported; others are suppressed all the same
        "verbose": False, "save": False,
    }  # fmt: skip
    return [_told(network.predict(image, **settings)[0], manifest) for image in images]


def _told(result: Any, manifest: ReleaseManifest) -> Answer:
    """Ultralytics' result of one image; of a classifier every label."""
    if manifest.kind == "classify":
        scores = result.probs.data.float().cpu().numpy()
        return Answer(np.empty((0, 4), np.float32), scores, np.arange(len(scores)))
    scores = result.boxes.conf.cpu().numpy()
    masks: list[NDArray[np.bool_] | None] = []
    if manifest.kind == "segment":
        given = [] if result.masks is None else result.masks.data.cpu().numpy() > 0
        inside = _inside(result.orig_shape, manifest)
        masks = [
            mask & inside if score >= manifest.thresholds.score else None
            for mask, score in zip(given, scores, strict=True)
        ]
    boxes = result.boxes.xyxy.cpu().numpy()
    return Answer(boxes, scores, result.boxes.cls.cpu().numpy().astype(np.int64), masks)


def _engine_answer(engine: Detector, manifest: ReleaseManifest, image: Image) -> Answer:
    found = engine.infer([engine.prepare(image)])[0]
    if found.outlines is None:
        return Answer(found.boxes, found.scores, found.classes)
    assert manifest.input_size is not None
    place = Letterbox.fit((image.shape[0], image.shape[1]), manifest.input_size)
    scale = np.array([place.width / image.shape[1], place.height / image.shape[0]])
    masks = [
        _surrounded(outline * scale + [place.left, place.top], manifest.input_size) if len(outline) else None
        for outline in found.outlines
    ]
    return Answer(found.boxes, found.scores, found.classes, masks)


def _inside(shape: tuple[int, int], manifest: ReleaseManifest) -> NDArray[np.bool_]:
    """The pixels of the model's input that are the image, not its border."""
    assert manifest.input_size is not None
    place = Letterbox.fit(shape, manifest.input_size)
    inside = np.zeros(manifest.input_size, dtype=bool)
    inside[place.rows, place.columns] = True
    return inside


def _surrounded(polygon: NDArray[Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """The pixels (height, width) whose centres the polygon (k, 2) surrounds, by the even-odd rule."""
    height, width = size
    out = np.zeros((height, width), dtype=bool)
    start, end = polygon, np.roll(polygon, -1, axis=0)
    centres = np.arange(width) + 0.5
    for row in range(max(0, int(polygon[:, 1].min())), min(height, int(polygon[:, 1].max()) + 1)):
        y = row + 0.5
        crossed = (start[:, 1] < y) != (end[:, 1] < y)
        along = (y - start[crossed, 1]) / (end[crossed, 1] - start[crossed, 1])
        places = start[crossed, 0] + along * (end[crossed, 0] - start[crossed, 0])
        out[row] = (places[None] < centres[:, None]).sum(axis=1) % 2 == 1
    return out
