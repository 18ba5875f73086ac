"""ONNX Runtime: the model file of a release, opened as the device decides. The only file here that imports onnxruntime."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from edged.core.providers import long_name, package
from edged.engines.base import EngineError, EngineOptions
from edged.wire.manifest import ReleaseManifest

_CPU = long_name("cpu")
_CUDA = long_name("cuda")
_GRAPH = {
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}

log = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Value:
    """An input or output of a model; a side of `shape` that is not fixed is a string or None."""

    name: str
    type: str  # such as tensor(float)
    shape: tuple[int | str | None, ...]

    def __str__(self) -> str:
        return f"{self.type} {list(self.shape)}"


@dataclass(frozen=True, slots=True)
class _Keys:
    """Engine keys of every ONNX engine: `spin`: idle threads spin, which is some percent faster and burns a core while
    idle; `arena`: freed memory is kept for the next run; `graph`: how much ONNX Runtime rewrites the graph at loading."""

    spin: bool = False
    arena: bool = True
    graph: str = "all"

    @classmethod
    def parse(cls, extra: dict[str, Any]) -> _Keys:
        known = ("spin", "arena", "graph")
        for key, value in extra.items():
            if key not in known:
                raise EngineError(f"engine key {key} = {value!r} is unknown to ONNX engines; known: {', '.join(known)}")
            if key == "graph" and value not in tuple(_GRAPH):  # a list of it, say, is no key of a table
                raise EngineError(f"engine key graph = {value!r}: use one of {', '.join(_GRAPH)}")
            if key != "graph" and not isinstance(value, bool):
                raise EngineError(f"engine key {key} = {value!r}: use true or false")
        return cls(**extra)


class Session:
    """A loaded model. `run` and `feed` are called by one thread at a time."""

    def __init__(
        self, folder: Path, manifest: ReleaseManifest, options: EngineOptions, *, shapes_vary: bool = False
    ) -> None:
        """Load files["model"] of the release in `folder`; raises EngineError naming the file and the reason.

        `shapes_vary`: inputs have another shape at each call, so that plans for each of them are not worth their memory.
        """
        self._release = manifest.release
        self._session: ort.InferenceSession | None = _open(folder, manifest, options, shapes_vary)
        self.inputs = _values(self._session.get_inputs())
        self.outputs = _values(self._session.get_outputs())
        self.metadata: dict[str, str] = dict(self._session.get_modelmeta().custom_metadata_map)

    def run(self, tensor: NDArray[Any]) -> list[Any]:
        """Every output for `tensor`, the only input with its batch; raises EngineError."""
        return self.feed({self.inputs[0].name: tensor})

    def each(
        self, tensors: Sequence[NDArray[Any]], read: Callable[[list[Any], int], Sequence[T]], *, batched: bool
    ) -> list[T]:
        """What `read` makes of the outputs for each of `tensors` (without the batch's axis). With `batched` all go in one
        run, else one by one. `read(outputs, count)` gives one result for each of `count` inputs. Raises EngineError."""
        if batched and len(tensors) > 1:
            return list(read(self.run(np.stack(tensors)), len(tensors)))
        return [read(self.run(tensor[None]), 1)[0] for tensor in tensors]

    def feed(self, tensors: dict[str, NDArray[Any]]) -> list[Any]:
        """Every output for `tensors`, the inputs by name; raises EngineError."""
        if self._session is None:
            raise EngineError(f"release {self._release} was closed: take a new lease")
        try:
            outputs: list[Any] = self._session.run(None, tensors)
        except Exception as error:  # the runtime raises a class of its own for every status
            raise EngineError(f"release {self._release}: inference failed: {error}") from error
        return outputs

    def close(self) -> None:
        """Free the model; further calls raise EngineError."""
        self._session = None


def _values(nodes: Sequence[Any]) -> tuple[Value, ...]:
    return tuple(Value(node.name, node.type, tuple(node.shape)) for node in nodes)


def _open(folder: Path, manifest: ReleaseManifest, options: EngineOptions, shapes_vary: bool) -> ort.InferenceSession:
    entry = manifest.files.get("model")
    if entry is None:
        raise EngineError(f"release {manifest.release}: no file with the role 'model'; it has {sorted(manifest.files)}")
    path = folder / entry.path
    if not path.is_file():
        raise EngineError(f"release {manifest.release}: {path} is missing; fetch the release again")
    keys = _Keys.parse(options.extra)
    settings = ort.SessionOptions()
    settings.intra_op_num_threads = max(options.threads, 1)
    settings.inter_op_num_threads = 1
    settings.enable_cpu_mem_arena = keys.arena
    settings.enable_mem_pattern = not shapes_vary
    settings.graph_optimization_level = _GRAPH[keys.graph]
    settings.add_session_config_entry("session.intra_op.allow_spinning", str(int(keys.spin)))
    settings.log_severity_level = 3
    providers = choose_providers(options.providers, ort.get_available_providers())
    try:
        session = ort.InferenceSession(str(path), settings, providers=providers)
    except Exception as error:  # the runtime raises a class of its own for every status
        raise EngineError(f"release {manifest.release}: {path.name} does not load: {error}") from error
    for lost in set(providers) - set(session.get_providers()):
        log.warning("release %s: execution provider %s did not start; going on without", manifest.release, lost)
    return session


def choose_providers(wanted: Sequence[str], available: Sequence[str]) -> list[str]:
    """ONNX Runtime's names of the wanted execution providers that are there, in order; the CPU is always the last.

    "auto" is the GPU where ONNX Runtime was built for one, and says nothing elsewhere. What else is missing is a warning
    that names its package. Raises EngineError for a name that is none.
    """
    try:
        found = {_CUDA} & set(available)
        names = list(
            dict.fromkeys(name for each in wanted for name in (found if each == "auto" else [long_name(each)]))
        )
    except ValueError as error:
        raise EngineError(str(error)) from None
    chosen = []
    for name in names:
        if name == _CPU:
            continue
        if name in available:
            chosen.append(name)
            continue
        brings = package(name)
        fix = f"pip install {brings} brings it" if brings else "this build of onnxruntime lacks it"
        log.warning("execution provider %s is not available: %s; using the next", name, fix)
    return [*chosen, _CPU]
