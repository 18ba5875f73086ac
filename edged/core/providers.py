"""The execution providers of ONNX Runtime that a profile may name, best first as they usually are."""

from __future__ import annotations

# Short name -> ONNX Runtime's own name, and the pip package that brings it.
PROVIDERS = {
    "tensorrt": ("TensorrtExecutionProvider", "onnxruntime-gpu"),
    "cuda": ("CUDAExecutionProvider", "onnxruntime-gpu"),
    "openvino": ("OpenVINOExecutionProvider", "onnxruntime-openvino"),
    "cpu": ("CPUExecutionProvider", "onnxruntime"),
}
_SUFFIX = "ExecutionProvider"


def long_name(name: str) -> str:
    """ONNX Runtime's own name of a provider, given that or its short one; raises ValueError for neither."""
    if name in PROVIDERS:
        return PROVIDERS[name][0]
    if name.endswith(_SUFFIX) and name != _SUFFIX:
        return name
    raise ValueError(
        f"execution provider {name!r} is unknown; use {', '.join(PROVIDERS)}, or ONNX Runtime's own name of another, "
        "such as CoreMLExecutionProvider"
    )


def package(name: str) -> str | None:
    """The pip package that brings the provider of this ONNX Runtime name; None where it is not known."""
    return dict(PROVIDERS.values()).get(name)
