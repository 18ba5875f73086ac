"""Language models: LoRA adapters for a base that stays as it is, by imitation (`lora`) or by preference (`dpo`).

dataset.jsonl -> adapter (PEFT) -> adapter.gguf -> losses of held-out answers, by the engine that devices run -> gate
"""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import BaseModel

from edged.core.confidence import accept_threshold
from edged.wire.manifest import Calibration, ReleaseId, ReleaseManifest
from trainer import calibrate, text_holdout
from trainer.core.crossed import pair_up
from trainer.core.gate import Verdict
from trainer.core.gate_text import Evidence, judge
from trainer.core.near_texts import Known
from trainer.core.parity import PARITY_KEY
from trainer.core.targets import Target
from trainer.core.text_split import Seen
from trainer.datasets import DatasetError
from trainer.files import sha256_of, write_whole
from trainer.footprint import read_profile
from trainer.golden import write_prompt_golden
from trainer.kinds import catalogue, measures, scored, texts, too_long, tuning
from trainer.kinds.texts import Text, Texts
from trainer.releases import MANIFEST, Registry, StoredRelease, build_manifest, canonical_bytes
from trainer.run import Run
from trainer.tuners.base import Work
from trainer.tuners.settings import parse_settings

log = logging.getLogger(__name__)

ADAPTER_FILE = "adapter.gguf"


def begin(run: Run) -> Language:
    """The training of an adapter; raises DatasetError, ReleaseError, ConfigError or ValueError."""
    return Language(run)


class Language:
    """`trainer.kinds.base.Training` of an adapter."""

    sets: Texts
    calibration: Calibration
    ece: float | None  # expected calibration error on answers not fitted; None: too few
    evidence: Evidence
    tuning: BaseModel  # the tuner's settings

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
        told = self.job.manifest.adapter
        self.current = current_adapter(self.job.config.releases, self.job.manifest.target, self.base, told)
        self.golden: dict[str, str] | None = None
        self.targets: list[Target] = []
        self.names = (self.job.model, ReleaseId(self.job.manifest.target).name)  # whose own answers are no labels

    def read(self) -> int:
        config, model, settings = self.job.config, self.job.model, self.settings
        missing: dict[str, int] = {}
        if self.job.dataset is None:
            missing = catalogue.write_dataset(self.job.manifest, self.job.samples, self.dataset)
            self.run.facts["dataset"] = str(self.dataset)
        found, bad, unpaired = texts.read(self.dataset, self.job.strategy)
        for line in bad[: texts.BAD_SHOWN_MAX]:
            log.warning("%s: left out: %s", self.dataset, line)
        adapters = Registry(config.releases).list(self.names[1])
        if odd := text_holdout.check_releases(config, model, adapters):
            raise DatasetError(
                f"{config.holdouts}: {odd[0]} was judged on another set than the ledger of {model} holds: restore it from a "
                "copy"
            )
        frozen, trained = text_holdout.read_sets(config, model), text_holdout.read_trained(config, model)
        fresh = {
            "holdout": self._of_file(settings.holdout, "holdout", self.job.strategy, frozen, trained),
            "base": self._of_file(settings.holdout_base, "base", "lora", frozen, trained),
        }
        for name, rows in fresh.items():
            frozen[name] += rows
        self.sets = texts.arrange(
            found, bad, frozen=frozen, trained=trained, rules=settings.split_rules(), names=self.names,
            confidence_min=settings.label_confidence_min, validation_share=settings.validation_share,
            judge="gate" if settings.holdout is None else "holdout", resemblance=settings.resemblance,
        )  # fmt: skip
        sets = self.sets
        self.fresh = {**sets.new, **fresh}
        self.keeping = frozen["base"]
        self.judging = [each for each in sets.holdout if (each.other is not None) == (self.job.strategy == "dpo")]
        self.run.facts["samples"] = {
            "named": len(found) + len(bad) + sum(missing.values()) + sum(unpaired.values()),
            "training": len(sets.training),
            "validation": len(sets.validation),
            "holdout": len(self.judging),
            "base": len(self.keeping),
            "calibration": len(sets.calibration),
            "test": len(sets.test),
            "left_out": missing | unpaired | sets.left_out,
            "bad_lines": sets.bad,
            "provenance": texts.provenance([*sets.training, *sets.validation]),
            "label_confidence": texts.sureness([*sets.training, *sets.validation]),
            "dataset_sha256": sha256_of(self.dataset),
        }
        return sets.usable

    def _of_file(
        self, path: Path | None, name: str, strategy: str, frozen: Mapping[str, Sequence[Text]], trained: Sequence[Seen]
    ) -> list[Text]:
        """What a configured file adds to what is frozen of its set."""
        if path is None:
            return []
        others = [*frozen["calibration"], *frozen["test"]]
        return text_holdout.check_file(
            path, text_holdout.read_file(path, strategy), frozen[name], trained, self.names,
            self.settings.label_confidence_min, others, self.settings.resemblance,
        )  # fmt: skip

    def check(self) -> None:
        model = f"models.{self.job.model}"
        self._check_training()
        if not (self.settings.checkpoint / "config.json").is_file():
            wanted = f"name the Hugging Face checkpoint that {self.base.ref.release} was exported from"
            raise DatasetError(f"{model}.checkpoint = {self.settings.checkpoint}: no config.json is there; {wanted}")
        self.tuning = parse_settings(self.tuner.settings, self.settings.asked(), f"{model}.tuning")
        self._check_sizes()  # what is too little needs no tokenizer to be seen
        self._leave_out_too_long()
        self._check_sizes()
        tuning.check_adapter(self.settings.checkpoint, self.tuning)

    def _leave_out_too_long(self) -> None:
        """What does not fit the context trains, calibrates and judges nothing."""
        given = {"training": self.sets.training, "validation": self.sets.validation, "holdout": self.judging,
                 "base": self.keeping, "calibration": self.sets.calibration}  # fmt: skip
        fitting = too_long.fitting(self.base, self.settings.checkpoint, self.tuning, given)
        self.judging, self.keeping = fitting.sets["holdout"], fitting.sets["base"]
        self.sets = replace(
            self.sets,
            training=fitting.sets["training"],
            validation=fitting.sets["validation"],
            calibration=fitting.sets["calibration"],
        )
        self.run.facts["samples"] |= {name: len(rows) for name, rows in fitting.sets.items()}
        self.run.facts["samples"]["left_out"] |= fitting.left_out

    def _check_training(self) -> None:
        if not self.sets.training:
            raise DatasetError(f"{self.dataset}: nothing is left to train on: {self.run.facts['samples']}")

    def _check_sizes(self) -> None:
        """Raises DatasetError where too little would judge or calibrate."""
        self._check_training()
        rules, model, samples = self.settings.gate_rules(), f"models.{self.job.model}", self.run.facts["samples"]
        long = ", ".join(f"{count} {name}" for name, count in samples["left_out"].items() if "_too_long" in name)
        told = f" (left out: {long})" if long else ""
        if len(self.judging) < rules.examples_min:
            raise DatasetError(
                f"{self.dataset}: {len(self.judging)} examples are held out, {rules.examples_min} must judge{told}: what "
                f"judges needs an answer of a person, or of a model that says its release; give more such examples, or set "
                f"{model}.holdout"
            )
        pairs = len(pair_up([each.wanted for each in self.judging], rules.matching_pairs_min))
        if self.job.strategy != "dpo" and pairs < rules.matching_pairs_min:
            raise DatasetError(
                f"{self.dataset}: {pairs} pairs of held-out examples have different answers, {rules.matching_pairs_min} "
                "must show that answers follow from their questions; hold out questions with other answers too"
            )
        if len(self.keeping) < rules.kept_examples_min:
            raise DatasetError(
                f"{len(self.keeping)} examples of what must not be forgotten, {rules.kept_examples_min} are needed{told}: "
                f"freeze some with `trainer holdout freeze {self.job.model} --set base --from FILE`, or set "
                f"{model}.gate.kept_examples_min = 0"
            )
        if len(self.sets.calibration) < rules.calibration_items_min:
            raise DatasetError(
                f"{len(self.sets.calibration)} examples calibrate, {rules.calibration_items_min} are needed{told} "
                f"({model}.gate.calibration_items_min): give more examples with an answer of a person"
            )

    def tune(self) -> None:
        # Before anything is trained: what judges is frozen, and that these train is known whatever becomes of it.
        config, model = self.job.config, self.job.model
        self.frozen = text_holdout.freeze(config, model, self.fresh, time.time())
        text_holdout.remember(config, model, [*self.sets.training, *self.sets.validation])
        settings = self.tuning
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
            pairs = measures.answered(engine, self.calibrating)
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
        base, held_out, kept, current = self.base, self.judging, self.keeping, self.current
        shipped, heeds = self.run.candidate / ADAPTER_FILE, self.job.strategy != "dpo"
        adapters: dict[str, Path | None] = {"base": None, "candidate": shipped}
        if current is not None:
            adapters["current"] = current.folder / current.manifest.files["adapter"].path
        sides: dict[str, scored.Side] = {}
        for name, adapter in adapters.items():
            self.run.progress("evaluate", what=f"the {name} on {len(held_out)} held-out examples, {len(kept)} others")
            if current is not None and name == "current":
                sides[name] = scored.side(base, adapter, current.ref.release, held_out, heeds=False)
                continue
            release = base.ref.release if adapter is None else self.job.manifest.target
            sides[name] = scored.side(base, adapter, release, held_out, kept, heeds=heeds)
        with measures.generator(base) as engine:
            took = measures.latencies(engine, adapters, held_out)
        before = "base" if self.current is None else "current"
        learned = (*self.sets.training, *self.sets.validation, *self.calibrating)
        seen = Known((each.sketch for each in learned), self.settings.resemblance)
        self.evidence = Evidence(
            held_out=frozenset(each.identity for each in held_out),
            trained=frozenset(each.identity for each in (*self.sets.training, *self.sets.validation)),
            candidate=sides["candidate"].scores,
            base=sides["base"].scores,
            current=sides["current"].scores if "current" in sides else None,
            pairs=held_out[0].other is not None,
            has_current=self.current is not None,
            adapter_sha256=sha256_of(shipped),
            current_sha256=self.current.manifest.files["adapter"].sha256 if self.current else "",
            kept_out=frozenset(each.identity for each in kept),
            matching=sides["candidate"].matching,
            base_matching=sides["base"].matching,
            kept=sides["candidate"].kept,
            kept_base=sides["base"].kept,
            near_duplicates=frozenset(each.identity for each in (*held_out, *kept) if seen.near(each.sketch) >= 0),
            calibration_method=self.calibration.method,
            calibration_items=self.calibration.items,
            calibration_ece=self.ece,
            latency_ms=took["candidate"],
            before_latency_ms=took[before],
            model_bytes=measures.shipped_bytes(base, shipped),
            **self._parity(sides),
        )
        self._measure_footprints()
        held: dict[str, Any] = {
            name: {**each.scores.summary(), "latency_ms_median": took[name]} for name, each in sides.items()
        }
        not_forgotten = {name: each.kept.summary() for name, each in sides.items() if each.kept is not None}
        self.run.facts["evaluation"] = {"held_out": held} | ({"base": not_forgotten} if not_forgotten else {})

    def _parity(self, sides: Mapping[str, scored.Side]) -> dict[str, Any]:
        """The shipped adapter beside the trained one: by losses, on the base as it ships, and by logits, on one that nothing
        rounds."""
        self.run.progress("evaluate", what="the trained adapter on the checkpoint")
        checkpoint, trained = self.settings.checkpoint, self.run.folder / "adapter"
        shipped = self.run.candidate / ADAPTER_FILE
        losses = scored.loss_parity(checkpoint, trained, self.judging, sides["base"].scores, sides["candidate"].scores)
        report = scored.logits_parity(checkpoint, trained, shipped, self.run.folder, self.judging)
        self.run.facts["parity"] = losses
        self.run.facts[PARITY_KEY] = [report.to_dict()]
        return {**losses, "parity": report.rows}

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
            prompts = dict.fromkeys(each.prompt for each in (*self.sets.validation, *self.sets.training) if each.prompt)
            answers = measures.golden_answers(self.base, self.run.candidate / ADAPTER_FILE, prompts)
            self.golden = write_prompt_golden(self.run.candidate, answers)
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

    def _lineage(self) -> dict[str, Any]:
        return {
            "job": self.job.manifest.job,
            "parent": self.base.ref.model_dump(mode="json"),
            "before": self.current.ref.model_dump(mode="json") if self.current else None,
            "samples": {key: value for key, value in self.run.facts["samples"].items() if key != "bad_lines"},
            "training_manifest_sha256": sha256(self.job.manifest.model_dump_json().encode()).hexdigest(),
            "training": {**self.run.facts["training"], "seed": self.settings.seed},
            "export": {"precision": "float32", **self.run.facts["parity"]},
            PARITY_KEY: self.run.facts[PARITY_KEY],
        }


def current_adapter(releases: Path, target: str, base: StoredRelease, told: str | None = None) -> StoredRelease | None:
    """The adapter `told` that runs on exactly this base ("": none does); where nobody says (None), the newest registered one
    of the same name. None: there is none."""
    if told is not None:
        running = Registry(releases).get(told) if told else None
        return running if running is not None and running.manifest.base == base.ref else None
    stored = Registry(releases).list(ReleaseId(target).name)
    fitting = [each for each in stored if each.manifest.kind == "lora" and each.manifest.base == base.ref]
    return fitting[-1] if fitting else None
