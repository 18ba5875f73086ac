"""What an engine is: two protocols, the values they exchange, and the registry that opens one for a release."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from edged.wire.manifest import ReleaseManifest

Image = NDArray[np.uint8]  # (height, width, 3), BGR, as OpenCV decodes it


class EngineError(Exception):
    """An engine could not load a release or answer an item; the message names what and why."""


class Unsuitable(EngineError):
    """This model cannot answer this request: the fault of whoever sent it, not of the release."""


class Unanswered(EngineError):
    """Whoever runs the model elsewhere did not answer: neither the request nor a release here is to blame."""


class NoTemplate(Unsuitable):
    """The model has no chat template: it takes prompts, not conversations."""


class PromptTooLong(Unsuitable):
    """The prompt does not fit the model's context; the message names both numbers."""


@dataclass(frozen=True, slots=True)
class ImageStats:
    """Cheap statistics of the pixels the model sees, for novelty: all of the grey image scaled to 0..1."""

    brightness: float  # mean
    contrast: float  # standard deviation
    sharpness: float  # of the Laplacian's magnitude, the level that 0.2 % of the pixels pass: the sharpest edges
    low: float = 0.0  # the level that 0.2 % of the pixels do not reach: how dark the dark is
    high: float = 1.0  # the level that 0.2 % of the pixels pass: how light the light is


@dataclass(frozen=True, slots=True)
class Prepared:
    """One image ready for `Detector.infer`; `spec` says for which input it was prepared."""

    image: Image  # the decoded original, kept so that another model can prepare it again after a swap
    tensor: NDArray[
        Any
    ]  # what the model takes, without the batch: (3, height, width) float32 or (height, width, 3) uint8
    spec: tuple[
        int, int, str
    ]  # (height, width, form) of `tensor`; the form tells its type and how the image was fitted
    scale: float  # model pixels per image pixel
    pad: tuple[float, float]  # (left, top) padding in model pixels
    stats: ImageStats


@dataclass(frozen=True, slots=True)
class Detections:
    """Boxes of one image after non-maximum suppression, best first, down to the engine's weak floor.

    `boxes` (n, 4) float32 x1 y1 x2 y2 in pixels of the original image; `scores` (n,) float32 in 0..1, not calibrated;
    `classes` (n,) int64, indices into the release's labels. The answer is `above(thresholds.score)`; what lies below it
    are weak candidates, which tell the confidence of what may have been missed.

    A classifier's answer is a box around the whole image (docs/decisions/0009). A segmenter adds `outlines`: of each box
    the (k, 2) float32 polygon of its mask in pixels of the original image, empty (0, 2) for weak candidates.
    """

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    classes: NDArray[np.int64]
    outlines: tuple[NDArray[np.float32], ...] | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def above(self, score: float) -> Detections:
        """The boxes whose score is at least `score`."""
        keep = self.scores >= score
        outlines = None if self.outlines is None else tuple(self.outlines[n] for n in np.flatnonzero(keep))
        return Detections(self.boxes[keep], self.scores[keep], self.classes[keep], outlines)


@dataclass(frozen=True, slots=True)
class ChatMessage:
    """One turn of a conversation; `role` is system, user or assistant."""

    role: str
    content: str


def _go_on() -> str:
    return ""


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """A prompt for a `Generator`. `tokens_max` 0 means: as many as the context leaves room for.

    `literal`: control tokens that `prompt` spells out stay text; without, they are what they spell.
    `messages`: a conversation instead of `prompt`, put into the model's own chat template. `schema`: the answer must be
    JSON that this JSON Schema allows; then it is valid, or it ends with the reason `truncated` (or `invalid`, where another
    machine's model did not keep to it). `halt` is asked between the steps of the work: it answers "" to go on, or the reason
    to end with (`cancelled`, `deadline`).
    """

    prompt: str = ""
    messages: tuple[ChatMessage, ...] = ()
    tokens_max: int = 0
    temperature: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    literal: bool = False
    schema: dict[str, Any] | None = None
    halt: Callable[[], str] = field(default=_go_on, compare=False, repr=False)


@dataclass(frozen=True, slots=True)
class Token:
    """A piece of the answer as it is made; `logprob` is the natural logarithm of the token's probability."""

    text: str
    logprob: float


@dataclass(frozen=True, slots=True)
class Finished:
    """The end of an answer: why it ended (`stop`, `length`, `truncated`, `invalid`, `cancelled`, `deadline`) and what it
    used. `who`, `model`: whose answer it is where another machine runs the model; empty: this device's, of its release."""

    reason: str
    prompt_tokens: int  # of which `reused_tokens` needed no work, because the request before began with them too
    answer_tokens: int
    mean_logprob: float
    reused_tokens: int = 0
    who: str = ""
    model: str = ""


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """What the device decides, not the release: threads, execution providers in order, further engine keys."""

    threads: int = 1
    providers: tuple[str, ...] = ("cpu",)
    extra: dict[str, Any] = field(default_factory=dict)


class Engine(Protocol):
    """A loaded release. `infer`/`generate` are called by one worker thread at a time; `close` frees everything."""

    def close(self) -> None: ...


@runtime_checkable
class Detector(Protocol):
    """Finds labelled boxes in images."""

    labels: tuple[str, ...]

    def prepare(self, image: Image) -> Prepared:
        """Letterbox `image` for this model; safe to call from another thread than `infer`."""
        ...

    def infer(self, batch: Sequence[Prepared]) -> list[Detections]:
        """Detect in every image of `batch`; raises EngineError."""
        ...

    def close(self) -> None: ...


@runtime_checkable
class Generator(Protocol):
    """Continues text."""

    context: int  # tokens, prompt and answer together

    def generate(self, request: GenerateRequest) -> Iterator[Token | Finished]:
        """Yield tokens, then one Finished; raises PromptTooLong or EngineError before the first token."""
        ...

    def attach(self, adapter: Path | None, scale: float = 1.0) -> None:
        """Use this LoRA adapter from the next request on (None: the bare base); raises EngineError."""
        ...

    def close(self) -> None: ...


# One row an engine; the module is imported when a release first asks for it, so that a vision device never pays for
# llama.cpp and the command line never pays for either.
ENGINES: dict[str, str] = {
    "onnx_detect": "edged.engines.onnx_detect:OnnxDetector",
    "onnx_segment": "edged.engines.onnx_segment:OnnxSegmenter",
    "onnx_classify": "edged.engines.onnx_classify:OnnxClassifier",
    "onnx_phi": "edged.engines.onnx_phi:OnnxPhiGenerator",
    "llama": "edged.engines.llama:LlamaGenerator",
    "openai": "edged.engines.openai:OpenAiGenerator",
}
# Of those, the ones whose model runs on another machine: nothing is loaded here, and no answer can be promised.
ELSEWHERE = frozenset({"openai"})


def open_engine(folder: Path, manifest: ReleaseManifest, options: EngineOptions) -> Detector | Generator:
    """Load the release in `folder` with the engine that its manifest names; raises EngineError."""
    try:
        module, name = ENGINES[manifest.engine].split(":")
    except KeyError:
        raise EngineError(
            f"release {manifest.release}: engine {manifest.engine!r} is unknown; known: {', '.join(sorted(ENGINES))}"
        ) from None
    opener: Callable[[Path, ReleaseManifest, EngineOptions], Detector | Generator] = getattr(
        import_module(module), name
    )
    return opener(folder, manifest, options)


def installed_engines() -> list[str]:
    """The libraries that run models here, with their versions: another version may answer differently."""
    found = []
    for name in ("onnxruntime", "llama-cpp-python"):
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            continue
    return found


def generate_all(
    engine: Generator, request: GenerateRequest, hear: Callable[[str], None] | None = None
) -> tuple[str, Finished]:
    """The whole answer to a request, and how it ended; `hear` gets each piece of it as it is made."""
    parts: list[str] = []
    for event in engine.generate(request):
        if isinstance(event, Token):
            parts.append(event.text)
            if hear is not None:
                hear(event.text)
        else:
            return "".join(parts), event
    raise EngineError("the generator ended without saying why")
