"""Language models: LoRA adapters for a base that stays as it is, by imitation (`lora`) or by preference (`dpo`).

dataset.jsonl -> adapter (PEFT) -> adapter.gguf -> losses of held-out answers, by the engine that devices run -> gate
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Iterable, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from edged.engines.base import EngineOptions, GenerateRequest, Generator, generate_all, open_engine
from edged.wire.manifest import ReleaseId
from trainer import likelihood
from trainer.core.gate import Verdict
from trainer.core.gate_text import Evidence, Scores, judge
from trainer.datasets import DatasetError
from trainer.files import sha256_of, write_whole
from trainer.golden import write_prompt_golden
from trainer.kinds import texts, tuning
from trainer.kinds.texts import Text, Texts
from trainer.releases import MANIFEST, Registry, StoredRelease, build_manifest, canonical_bytes
from trainer.run import Run
from trainer.tuners.base import Work

log = logging.getLogger(__name__)

ADAPTER_FILE = "adapter.gguf"
GOLDEN_PROMPTS_MAX = 4
GOLDEN_TOKENS = 32  # of an answer: as many as a device asks for when it checks a golden prompt
PARITY_EXAMPLES_MAX = 32  # the checkpoint computes in float32 and may be large


def begin(run: Run) -> Language:
    """The training of an adapter; raises DatasetError, ReleaseError, ConfigError or ValueError."""
    return Language(run)


class Language:
    """`trainer.kinds.base.Training` of an adapter."""

    sets: Texts
    evidence: Evidence

    def __init__(self, run: Run) -> None:
        self.run, self.job = run, run.job
        self.settings = self.job.config.text(self.job.model)
        if self.job.dataset is None:
            raise DatasetError(f"models.{self.job.model} is a language model: --dataset names its dataset.jsonl")
        self.dataset: Path = self.job.dataset
        self.tuner = tuning.tuner_for(self.job.strategy, "llm")
        self.base = Registry(self.job.config.releases).get(self.job.manifest.source)
        if self.base.manifest.kind != "llm" or self.base.manifest.engine != "llama":
            raise DatasetError(
                f"models.{self.job.model}.base = {self.base.ref.release}: adapters are for whole models of kind llm and "
                f"engine llama, it is {self.base.manifest.kind} for {self.base.manifest.engine}"
            )
        self.current = current_adapter(self.job.config.releases, self.job.manifest.target, self.base)

    def read(self) -> int:
        settings = self.settings
        found, bad = texts.read(self.dataset, self.job.strategy)
        for line in bad[: texts.BAD_SHOWN_MAX]:
            log.warning("%s: left out: %s", self.dataset, line)
        held_out = None
        if settings.holdout is not None:
            held_out, broken = texts.read(settings.holdout, self.job.strategy)
            if broken:
                raise DatasetError(f"{settings.holdout}: {broken[0]}: every line of a holdout must count; correct it")
            frozen = self.job.config.data_dir / "holdouts.json"
            frozen.parent.mkdir(parents=True, exist_ok=True)
            texts.check_frozen(frozen, f"{self.job.model}/{self.job.strategy}", held_out)
        self.sets = texts.split(
            found, bad, held_out=held_out, holdout_share=settings.holdout_share,
            validation_share=settings.validation_share,
        )  # fmt: skip
        sets = self.sets
        self.run.facts["samples"] = {
            "named": len(found) + len(bad),
            "training": len(sets.training),
            "validation": len(sets.validation),
            "holdout": len(sets.holdout),
            "left_out": sets.left_out,
            "bad_lines": sets.bad,
            "provenance": texts.provenance(sets.training),
            "dataset_sha256": sha256_of(self.dataset),
        }
        return sets.usable if held_out is None else len(sets.training) + len(sets.validation)

    def tune(self) -> None:
        if not self.sets.training:
            raise DatasetError(f"{self.dataset}: nothing is left to train on: {self.run.facts['samples']}")
        if not (self.settings.checkpoint / "config.json").is_file():
            raise DatasetError(
                f"models.{self.job.model}.checkpoint = {self.settings.checkpoint}: no config.json is there; name the "
                f"Hugging Face checkpoint that {self.base.ref.release} was exported from"
            )
        settings = self.tuner.settings.model_validate(self.settings.asked())
        scratch = self.run.folder / "scratch"
        work = Work(
            base=self.settings.checkpoint,
            data=[each.given for each in self.sets.training],
            out=self.run.folder / "adapter",
            scratch=scratch,
            settings=settings,
            seed=self.settings.seed,
            held_out=[each.given for each in self.sets.validation],
            report=self.run.epoch,
        )
        if self.settings.threads:
            import torch

            torch.set_num_threads(self.settings.threads)
        tuned = self.tuner.tune(work)
        self.run.facts["training"] = {
            "strategy": self.job.strategy,
            "trainable": tuned.trainable,
            "parameters": tuned.parameters,
            "settings": settings.model_dump(mode="json"),
            **tuned.facts,
        }
        shutil.rmtree(scratch, ignore_errors=True)

    def export(self) -> None:
        from trainer.export.gguf_lora import export_lora_gguf

        self.run.candidate.mkdir(parents=True, exist_ok=True)
        export_lora_gguf(self.run.folder / "adapter", self.settings.checkpoint, self.run.candidate / ADAPTER_FILE)

    def calibrate(self) -> None:
        """Nothing yet: devices trust the answers of an adapted base only as far as an uncalibrated model's."""

    def evaluate(self) -> None:
        base, held_out = self.base, self._fitting()
        shipped = self.run.candidate / ADAPTER_FILE
        sides: list[tuple[str, Path | None]] = [("base", None), ("candidate", shipped)]
        if self.current is not None:
            sides.append(("current", self.current.folder / self.current.manifest.files["adapter"].path))
        scores: dict[str, Scores] = {}
        for name, adapter in sides:
            self.run.progress("evaluate", what=f"the {name} on {len(held_out)} held-out examples")
            release = {"base": base.ref.release, "candidate": self.job.manifest.target}.get(name)
            with likelihood.shipped(base.folder, base.manifest, adapter) as scorer:
                scores[name] = score(scorer, held_out, release or (self.current or base).ref.release)
        self.run.progress("evaluate", what="the trained adapter on the checkpoint")
        some = sorted(held_out, key=lambda each: each.identity)[:PARITY_EXAMPLES_MAX]
        known = {each.identity for each in some}
        with likelihood.checkpoint(self.settings.checkpoint, None) as scorer:
            checkpoint_base = score(scorer, some, "checkpoint").loss
        with likelihood.checkpoint(self.settings.checkpoint, self.run.folder / "adapter") as scorer:
            checkpoint_adapter = score(scorer, some, "checkpoint").loss
        self.evidence = Evidence(
            held_out=frozenset(each.identity for each in held_out),
            trained=frozenset(each.identity for each in (*self.sets.training, *self.sets.validation)),
            candidate=scores["candidate"],
            base=scores["base"],
            current=scores.get("current"),
            pairs=held_out[0].other is not None,
            has_current=self.current is not None,
            adapter_sha256=sha256_of(shipped),
            current_sha256=self.current.manifest.files["adapter"].sha256 if self.current else "",
            checkpoint_base=checkpoint_base,
            checkpoint_adapter=checkpoint_adapter,
            shipped_base=_part(scores["base"], known),
            shipped_adapter=_part(scores["candidate"], known),
        )
        held: dict[str, Any] = {name: each.summary() for name, each in scores.items()}
        self.run.facts["evaluation"] = {"held_out": held}
        self.run.facts["parity"] = {
            "examples": len(some), "checkpoint_base": checkpoint_base, "checkpoint_adapter": checkpoint_adapter,
            "shipped_base": self.evidence.shipped_base, "shipped_adapter": self.evidence.shipped_adapter,
        }  # fmt: skip

    def _fitting(self) -> list[Text]:
        """The held-out examples that fit the model's context; raises DatasetError when there is none."""
        with likelihood.shipped(self.base.folder, self.base.manifest, None) as scorer:
            held_out = [each for each in self.sets.holdout if scorer.fits(each.said) and scorer.fits(each.avoided)]
        long = len(self.sets.holdout) - len(held_out)
        if long:
            log.warning("%d held-out examples judge nothing: they do not fit the model's context", long)
            self.run.facts["samples"]["left_out"]["holdout_too_long"] = long
        if not held_out:
            raise DatasetError(f"{self.dataset}: no example is held out; give more, or set models.NAME.holdout")
        return held_out

    def judge(self) -> Verdict:
        return judge(self.evidence, self.settings.gate_rules(), np.random.default_rng(self.settings.seed))

    def summary(self) -> dict[str, Any]:
        """Losses on the held-out answers in nats a token, after and before."""
        new, base, current = self.evidence.candidate, self.evidence.base, self.evidence.current
        assert new is not None and base is not None
        return {
            "loss": round(new.loss, 4),
            "loss_before": round((current or base).loss, 4),
            "loss_base": round(base.loss, 4),
            "samples_used": len(self.sets.training),
        }

    def complete(self, verdict: Verdict) -> None:
        folder = self.run.candidate
        roles = {"adapter": ADAPTER_FILE, **write_prompt_golden(folder, self._golden())}
        manifest = build_manifest(
            folder,
            self.job.manifest.target,
            kind="lora",
            engine="llama",
            roles=roles,
            base=self.base.ref,
            evaluation={**self.run.facts["evaluation"], "parity": self.run.facts["parity"], "gate": verdict.to_dict()},
            lineage=self._lineage(),
        )
        write_whole(folder / MANIFEST, canonical_bytes(manifest))

    def _golden(self) -> list[tuple[str, str]]:
        """Prompts that judged nothing, with what the base answers to them with the adapter on it."""
        prompts = dict.fromkeys(each.prompt for each in (*self.sets.validation, *self.sets.training) if each.prompt)
        engine = open_engine(self.base.folder, self.base.manifest, EngineOptions())
        assert isinstance(engine, Generator)
        try:
            engine.attach(self.run.candidate / ADAPTER_FILE)
            found = []
            for prompt in prompts:
                answer, _ = generate_all(engine, GenerateRequest(prompt, tokens_max=GOLDEN_TOKENS))
                if answer.strip():
                    found.append((prompt, answer))
                if len(found) == GOLDEN_PROMPTS_MAX:
                    break
        finally:
            engine.close()
        if not found:
            raise ValueError("with the adapter the model answers nothing to any prompt: there is no golden set to make")
        return found

    def _lineage(self) -> dict[str, Any]:
        return {
            "job": self.job.manifest.job,
            "parent": self.base.ref.model_dump(mode="json"),
            "before": self.current.ref.model_dump(mode="json") if self.current else None,
            "samples": {key: value for key, value in self.run.facts["samples"].items() if key != "bad_lines"},
            "training_manifest_sha256": sha256(self.job.manifest.model_dump_json().encode()).hexdigest(),
            "training": {**self.run.facts["training"], "seed": self.settings.seed},
            "export": {"precision": "float32", **self.run.facts["parity"]},
        }


def current_adapter(releases: Path, target: str, base: StoredRelease) -> StoredRelease | None:
    """The newest registered adapter of the same name for exactly this base; None: there is none."""
    stored = Registry(releases).list(ReleaseId(target).name)
    fitting = [each for each in stored if each.manifest.kind == "lora" and each.manifest.base == base.ref]
    return fitting[-1] if fitting else None


def score(scorer: likelihood.Scorer, held_out: Sequence[Text], release: str) -> Scores:
    """What a model makes of examples; raises EngineError."""
    wanted = scorer.score([each.said for each in held_out])
    margins: Iterable[float] = ()
    if held_out and held_out[0].other is not None:
        others = scorer.score([each.avoided for each in held_out])
        margins = (other - loss for (loss, _), (other, _) in zip(wanted, others, strict=True))
    return Scores(
        release,
        tuple(each.identity for each in held_out),
        tuple(tokens for _, tokens in wanted),
        tuple(loss for loss, _ in wanted),
        tuple(margins),
    )


def _part(scores: Scores, known: set[str]) -> float:
    """The loss a token on some of the examples."""
    chosen = [place for place, identity in enumerate(scores.examples) if identity in known]
    return sum(scores.losses[place] for place in chosen) / sum(scores.tokens[place] for place in chosen)
