"""Language models: LoRA adapters for a base that stays as it is, by imitation (`lora`) or by preference (`dpo`).

dataset.jsonl -> adapter (PEFT) -> adapter.gguf -> losses of held-out answers, by the engine that devices run -> gate
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from edged.core.confidence import accept_threshold
from edged.engines.base import GenerateRequest, generate_all
from edged.wire.manifest import Calibration, ReleaseId, ReleaseManifest
from trainer import calibrate, likelihood, text_holdout
from trainer.core.gate import Verdict
from trainer.core.gate_text import Evidence, Scores, judge
from trainer.core.near_texts import Known
from trainer.core.targets import Target
from trainer.core.text_split import Seen
from trainer.datasets import DatasetError
from trainer.files import sha256_of, write_whole
from trainer.footprint import read_profile
from trainer.golden import write_prompt_golden
from trainer.kinds import catalogue, measures, texts, tuning
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
    calibration: Calibration
    ece: float | None  # expected calibration error on answers not fitted; None: too few
    evidence: Evidence

    def __init__(self, run: Run) -> None:
        self.run, self.job = run, run.job
        self.settings = self.job.config.text(self.job.model)
        # Without a data set the manifest names what devices keep, and one is made of that in the run's folder.
        self.dataset: Path = self.job.dataset or self.run.folder / catalogue.DATASET
        self.tuner = tuning.tuner_for(self.job.strategy, "llm")
        self.base = Registry(self.job.config.releases).get(self.job.manifest.source)
        if self.base.manifest.kind != "llm" or self.base.manifest.engine != "llama":
            raise DatasetError(
                f"models.{self.job.model}.base = {self.base.ref.release}: adapters are for whole models of kind llm and "
                f"engine llama, it is {self.base.manifest.kind} for {self.base.manifest.engine}"
            )
        self.current = current_adapter(self.job.config.releases, self.job.manifest.target, self.base)
        self.golden: dict[str, str] | None = None
        self.targets: list[Target] = []
        self.names = (self.job.model, ReleaseId(self.job.manifest.target).name)  # whose own answers are no labels

    def read(self) -> int:
        config, model, settings = self.job.config, self.job.model, self.settings
        missing: dict[str, int] = {}
        if self.job.dataset is None:
            missing = catalogue.write_dataset(self.job.manifest, self.job.samples, self.dataset)
            self.run.facts["dataset"] = str(self.dataset)
        found, bad = texts.read(self.dataset, self.job.strategy)
        for line in bad[: texts.BAD_SHOWN_MAX]:
            log.warning("%s: left out: %s", self.dataset, line)
        adapters = Registry(config.releases).list(self.names[1])
        if odd := text_holdout.check_releases(config, model, adapters):
            raise DatasetError(
                f"{config.holdouts}: {odd[0]} was judged on another set than the ledger of {model} holds: restore it from a "
                "copy"
            )
        frozen, trained = text_holdout.read_sets(config, model), text_holdout.read_trained(config, model)
        fresh = self._of_file(frozen, trained)
        frozen["holdout"] += fresh
        self.sets = texts.arrange(
            found, bad, frozen=frozen, trained=trained, rules=settings.split_rules(), names=self.names,
            confidence_min=settings.label_confidence_min, validation_share=settings.validation_share,
            judge="gate" if settings.holdout is None else "holdout", resemblance=settings.resemblance,
        )  # fmt: skip
        sets = self.sets
        self.fresh = {**sets.new, "holdout": fresh}
        self.judging = [each for each in sets.holdout if (each.other is not None) == (self.job.strategy == "dpo")]
        self.run.facts["samples"] = {
            "named": len(found) + len(bad) + sum(missing.values()),
            "training": len(sets.training),
            "validation": len(sets.validation),
            "holdout": len(self.judging),
            "calibration": len(sets.calibration),
            "test": len(sets.test),
            "left_out": missing | sets.left_out,
            "bad_lines": sets.bad,
            "provenance": texts.provenance([*sets.training, *sets.validation]),
            "label_confidence": texts.sureness([*sets.training, *sets.validation]),
            "dataset_sha256": sha256_of(self.dataset),
        }
        return sets.usable

    def _of_file(self, frozen: Mapping[str, Sequence[Text]], trained: Sequence[Seen]) -> list[Text]:
        """What the configured holdout adds to what is frozen of it."""
        settings = self.settings
        if settings.holdout is None:
            return []
        held_out, broken = texts.read(settings.holdout, self.job.strategy)
        if broken or not held_out:
            what = f"{broken[0]}: every line of a holdout must count" if broken else "no example is in it"
            raise DatasetError(f"{settings.holdout}: {what}; correct it")
        others = [*frozen["calibration"], *frozen["test"]]
        return text_holdout.check_file(
            settings.holdout, held_out, frozen["holdout"], trained, self.names, settings.label_confidence_min, others,
            settings.resemblance,
        )  # fmt: skip

    def tune(self) -> None:
        if not self.sets.training:
            raise DatasetError(f"{self.dataset}: nothing is left to train on: {self.run.facts['samples']}")
        if not (self.settings.checkpoint / "config.json").is_file():
            raise DatasetError(
                f"models.{self.job.model}.checkpoint = {self.settings.checkpoint}: no config.json is there; name the "
                f"Hugging Face checkpoint that {self.base.ref.release} was exported from"
            )
        # Before anything is trained: what judges is frozen, and that these train is known whatever becomes of it.
        config, model = self.job.config, self.job.model
        self.frozen = text_holdout.freeze(config, model, self.fresh, time.time())
        text_holdout.remember(config, model, [*self.sets.training, *self.sets.validation])
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
        """On the examples that are kept for it, the newest first; too few leave the adapter uncalibrated."""
        newest = {(each.prompt, each.wanted): each for each in reversed(self.sets.calibration)}
        self.calibrating = list(newest.values())[: self.settings.calibration_max]
        self.run.progress("calibrate", what=f"{len(self.calibrating)} answers")
        with measures.generator(self.base) as engine:
            engine.attach(self.run.candidate / ADAPTER_FILE)
            fitting = [each for each in self.calibrating if likelihood.llama_fits(engine, each.said)]
            pairs = measures.answered(engine, fitting)
        self.calibration, self.ece = calibrate.fit_answers(pairs), None
        found: dict[str, Any] = {"items": len(pairs), "right": sum(good for _, good in pairs)}
        if len(pairs) >= calibrate.ITEMS_MIN:
            report = measures.cross_validate_answers(pairs)
            self.ece = report.ece
            threshold = accept_threshold(self.calibration, self.settings.target_risk)
            found |= {**report.to_dict(), "target_risk": self.settings.target_risk, "threshold": threshold}
            if threshold > 1:
                log.warning(
                    "no answer of this adapter may be accepted at a target risk of %g: calibrate on more, or allow more",
                    self.settings.target_risk,
                )
        else:
            found |= {"method": "uncalibrated", "needed": calibrate.ITEMS_MIN}
            log.warning("uncalibrated: %d answers to fit confidence on, %d are needed", len(pairs), calibrate.ITEMS_MIN)
        self.run.facts["calibration"] = found

    def evaluate(self) -> None:
        base, held_out = self.base, self._fitting()
        shipped = self.run.candidate / ADAPTER_FILE
        sides: dict[str, Path | None] = {"base": None, "candidate": shipped}
        if self.current is not None:
            sides["current"] = self.current.folder / self.current.manifest.files["adapter"].path
        scores: dict[str, Scores] = {}
        for name, adapter in sides.items():
            self.run.progress("evaluate", what=f"the {name} on {len(held_out)} held-out examples")
            release = {"base": base.ref.release, "candidate": self.job.manifest.target}.get(name)
            with likelihood.shipped(base.folder, base.manifest, adapter) as scorer:
                scores[name] = score(scorer, held_out, release or (self.current or base).ref.release)
        with measures.generator(base) as engine:
            took = measures.latencies(engine, sides, held_out)
        before = "base" if self.current is None else "current"
        learned = (*self.sets.training, *self.sets.validation, *self.calibrating)
        seen = Known((each.sketch for each in learned), self.settings.resemblance)
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
            near_duplicates=frozenset(each.identity for each in held_out if seen.near(each.sketch) >= 0),
            calibration_method=self.calibration.method,
            calibration_items=self.calibration.items,
            calibration_ece=self.ece,
            latency_ms=took["candidate"],
            before_latency_ms=took[before],
            model_bytes=measures.shipped_bytes(base, shipped),
            **self._parity(held_out, scores),
        )
        self._measure_footprints()
        held: dict[str, Any] = {
            name: {**each.summary(), "latency_ms_median": took[name]} for name, each in scores.items()
        }
        self.run.facts["evaluation"] = {"held_out": held}

    def _parity(self, held_out: Sequence[Text], scores: Mapping[str, Scores]) -> dict[str, Any]:
        """The losses of some examples on the checkpoint that was trained, and by the files that ship."""
        self.run.progress("evaluate", what="the trained adapter on the checkpoint")
        some = sorted(held_out, key=lambda each: each.identity)[:PARITY_EXAMPLES_MAX]
        known = {each.identity for each in some}
        found: dict[str, Any] = {}
        for name, adapter in (("base", None), ("adapter", self.run.folder / "adapter")):
            with likelihood.checkpoint(self.settings.checkpoint, adapter) as scorer:
                found[f"checkpoint_{name}"] = score(scorer, some, "checkpoint").loss
        found |= {"shipped_base": _part(scores["base"], known), "shipped_adapter": _part(scores["candidate"], known)}
        self.run.facts["parity"] = {"examples": len(some), **found}
        return found

    def _measure_footprints(self) -> None:
        """What the adapter and what runs now take, for each profile that is configured."""
        profiles = [read_profile(name, "lora") for name in self.settings.profiles]
        self.targets = [each.target for each in profiles]
        if not profiles:
            return
        self.run.progress("evaluate", what=f"memory and time on {', '.join(self.settings.profiles)}")
        self.evidence = replace(
            self.evidence,
            footprints=measures.footprints(self.run.candidate, self._manifest(), self.base, profiles),
            before_footprints=measures.before_footprints(self.current, self.base, profiles),
        )

    def _fitting(self) -> list[Text]:
        """The held-out examples that fit the model's context; raises DatasetError when there is none."""
        with likelihood.shipped(self.base.folder, self.base.manifest, None) as scorer:
            held_out = [each for each in self.judging if scorer.fits(each.said) and scorer.fits(each.avoided)]
        long = len(self.judging) - len(held_out)
        if long:
            log.warning("%d held-out examples judge nothing: they do not fit the model's context", long)
            self.run.facts["samples"]["left_out"]["holdout_too_long"] = long
        if not held_out:
            raise DatasetError(
                f"{self.dataset}: no example is held out: what judges needs an answer of a person, or of a model that says "
                "its release; give more such examples, or set models.NAME.holdout"
            )
        return held_out

    def judge(self) -> Verdict:
        chance = np.random.default_rng(self.settings.seed)
        return judge(self.evidence, self.settings.gate_rules(), chance, self.targets)

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
        evaluation = {
            **self.run.facts["evaluation"],
            "parity": self.run.facts["parity"],
            "calibration": self.run.facts["calibration"],
            "holdout_sets": self.frozen,
            "gate": verdict.to_dict(),
        }
        manifest = self._manifest(evaluation=evaluation, lineage=self._lineage())
        write_whole(self.run.candidate / MANIFEST, canonical_bytes(manifest))

    def _manifest(self, **more: Any) -> ReleaseManifest:
        """The release as it ships; the golden set is made where it is not there yet."""
        if self.golden is None:
            self.golden = write_prompt_golden(self.run.candidate, self._golden())
        return build_manifest(
            self.run.candidate,
            self.job.manifest.target,
            kind="lora",
            engine="llama",
            roles={"adapter": ADAPTER_FILE, **self.golden},
            base=self.base.ref,
            calibration=self.calibration,
            **more,
        )

    def _golden(self) -> list[tuple[str, str]]:
        """Prompts that judged nothing, with what the base answers to them with the adapter on it."""
        prompts = dict.fromkeys(each.prompt for each in (*self.sets.validation, *self.sets.training) if each.prompt)
        found: list[tuple[str, str]] = []
        with measures.generator(self.base) as engine:
            engine.attach(self.run.candidate / ADAPTER_FILE)
            for prompt in prompts:
                answer, _ = generate_all(engine, GenerateRequest(prompt, tokens_max=GOLDEN_TOKENS))
                if answer.strip():
                    found.append((prompt, answer))
                if len(found) == GOLDEN_PROMPTS_MAX:
                    break
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
