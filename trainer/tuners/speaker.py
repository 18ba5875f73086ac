"""A transformers checkpoint as a `Generator`: an agent on the trainer speaks with the weights that are tuned there.

    from edged.agents import Agent
    from trainer.tuners.speaker import CheckpointGenerator

    agent = Agent(CheckpointGenerator("checkpoints/phi-3"), "You inspect.", output_schema=["verdict"])

Text, conversations and schemas go the way that they go on a device (`edged.engines.token_loop`); only the logits come from
torch. So what an agent does here shows what it will do there, before anything is exported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import AutoTokenizer, DynamicCache

from edged.engines.base import EngineError
from edged.engines.chat import ChatTemplate
from edged.engines.token_loop import TokenGenerator
from edged.engines.vocabulary import Vocabulary
from trainer.checkpoints import find_checkpoint
from trainer.tuners.language import causal_lm, ends_of
from trainer.tuners.settings import SettingsError


class TorchModel:
    """A transformers model with its cache."""

    def __init__(self, net: Any, name: str) -> None:
        self.net, self._name = net.eval(), name
        self.forget()

    def forget(self) -> None:
        """Empty the cache."""
        self._cache: Any = DynamicCache()
        self._held: list[int] = []

    def rewind(self, tokens: Sequence[int]) -> int:
        """As `Causal`."""
        same = 0
        while same < min(len(self._held), len(tokens) - 1) and self._held[same] == tokens[same]:
            same += 1
        if same:
            self._cache.crop(same)
            self._held = self._held[:same]
        else:
            self.forget()
        return same

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """As `Causal`; raises EngineError for logits that are not finite."""
        ids = torch.tensor([list(tokens)], device=self.net.device)
        said = self.net(input_ids=ids, past_key_values=self._cache, use_cache=True)
        self._held += tokens
        logits: NDArray[np.float32] = said.logits[0, -1].float().cpu().numpy()
        if not np.isfinite(logits).all():
            self.forget()
            raise EngineError(f"{self._name}: the model computes numbers that are not finite; its weights are damaged")
        return logits

    def close(self) -> None:
        """Let go of the weights."""
        self.forget()
        self.net = None


class CheckpointGenerator(TokenGenerator):
    """The model of a Hugging Face checkpoint. One worker thread at a time."""

    def __init__(self, model: str | Path, *, device: str = "auto", context_max: int = 0) -> None:
        """`model`: its folder, or an id of the hub. `device`: as torch names it, "auto" is the GPU where there is one.
        `context_max`: tokens, 0 means the model's own. Raises EngineError naming the folder and the reason, CheckpointError
        for a model that is nowhere."""
        folder = find_checkpoint(str(model))
        where = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        try:
            net = causal_lm(folder).to(where)
            words = AutoTokenizer.from_pretrained(folder)
            ends = ends_of(folder, words, net.generation_config)
        except (SettingsError, OSError, ValueError, RuntimeError) as error:
            raise EngineError(f"{folder}: cannot be spoken with: {error}") from None
        vocabulary = Vocabulary(folder / "tokenizer.json")
        name, template = folder.name, None
        if isinstance(words.chat_template, str):
            bos, eos = words.bos_token or "", words.eos_token or ""
            template = ChatTemplate(words.chat_template, name, bos, eos, vocabulary.control)
        context = int(net.config.max_position_embeddings)
        self._torch, self.name = TorchModel(net, name), name
        super().__init__(name, self._torch, vocabulary, template, min(context, context_max or context), ends)

    def attach(self, adapter: Path | None, scale: float = 1.0) -> None:
        """Use this LoRA adapter (PEFT's folder) at `scale` from the next request on, None: the bare base.
        Raises EngineError naming the folder and the reason."""
        if self._model is None:
            raise EngineError(f"{self._name}: the engine is closed")
        self._turn += 1
        self._torch.forget()
        if isinstance(self._torch.net, PeftModel):
            self._torch.net = self._torch.net.unload()
        if adapter is None:
            return
        try:
            tuned = PeftModel.from_pretrained(self._torch.net, str(adapter)).eval()
        except Exception as error:  # PEFT, safetensors and the hub's client each have their own
            raise EngineError(f"{adapter}: not a LoRA adapter for {self._name}: {str(error)[:200]}") from None
        for layer in tuned.modules():
            if isinstance(layer, LoraLayer):
                layer.scale_layer(scale)
        self._torch.net = tuned
