"""Where a language model's weights come from: a folder here, or a model of the Hugging Face hub by its id."""

from __future__ import annotations

from pathlib import Path

MODEL_ID = "microsoft/phi-2"  # what is taken unless another one is named
_FILES = ("*.json", "*.safetensors", "*.jinja")  # weights, configuration, tokenizer and chat template


class CheckpointError(Exception):
    """A checkpoint cannot be had; the message names it, why, and the fix."""


def find_checkpoint(model_id: str = MODEL_ID) -> Path:
    """The folder of a checkpoint: `model_id` itself when it is one, else the hub's, downloaded once and kept in its cache.

    Needs no network when the cache has it. Raises CheckpointError.
    """
    folder = Path(model_id)
    if folder.is_dir():
        return folder
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(model_id, allow_patterns=list(_FILES)))
    except (OSError, ValueError) as error:  # what is no id, what the hub does not have, and what the network does
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(
            f"{model_id}: neither a folder here nor to be had from the hub: {reason} Download it where there is a network "
            "and name its folder"
        ) from None
