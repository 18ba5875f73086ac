"""Examples that do not fit a model's context are counted and left out before anything is trained."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bench.demo.phi import GRAMMAR, PhiExample
from tests.support.trained import EXAMPLES, text_trainer, write_dataset
from trainer.config import load_config
from trainer.jobfile import TrainJob, dataset_job
from trainer.kinds import begin
from trainer.run import Run
from trainer.train import train
from trainer.trained import had
from trainer.tuners.lora.data import Example
from trainer.tuners.lora.settings import LanguageSettings

HELD_OUT = [each for each in GRAMMAR[3::15] if each not in EXAMPLES]


def longer(example: PhiExample, words: str) -> PhiExample:
    """The same question behind more words than the demo's Phi has room for (256 tokens)."""
    return replace(example, prompt=f"{words} " * 120 + example.prompt)


def planned(
    folder: Path, phi: dict[str, Path], examples: list[PhiExample], held_out: list[PhiExample], **settings: str
) -> TrainJob:
    folder.mkdir(exist_ok=True)
    write_dataset(folder / "holdout.jsonl", held_out)
    data = write_dataset(folder / "dataset.jsonl", examples)
    config = load_config(text_trainer(folder, phi, holdout=f'"{folder / "holdout.jsonl"}"', **settings))
    return dataset_job(config, "clerk", "lora", data, folder / "run", created="2026", job="run")


def read(job: TrainJob) -> tuple[Any, dict[str, Any]]:
    """The training as it is before it trains, and what is known of its samples."""
    job.run.mkdir()
    run = Run(job)
    training: Any = begin(run, "llm")
    training.read()
    training.check()
    return training, run.facts["samples"]


def test_they_are_left_out_and_counted_by_set(tmp_path: Path, phi: dict[str, Path]) -> None:
    """Of the two lists the short ones are all that is left, whatever set the split puts the long ones in."""
    long = [longer(each, "shelf") for each in EXAMPLES[:6]]
    judged = [longer(HELD_OUT[0], "yard"), longer(HELD_OUT[1], "gate"), *HELD_OUT[2:]]
    training, samples = read(planned(tmp_path, phi, [*EXAMPLES, *long], judged))
    told = samples["left_out"]
    assert told["holdout_too_long"] == 2
    assert sum(told.get(f"{name}_too_long", 0) for name in ("train", "validation", "calibration")) == 6
    assert samples["holdout"] == len(training.judging) == len(HELD_OUT) - 2
    assert samples["training"] == len(training.sets.training)
    kept = [*training.sets.training, *training.sets.validation, *training.sets.calibration, *training.judging]
    assert not any(each.prompt.startswith(("shelf shelf", "yard yard", "gate gate")) for each in kept)
    assert {name: samples[name] for name in ("training", "validation", "calibration")} == {
        "training": len(training.sets.training),
        "validation": len(training.sets.validation),
        "calibration": len(training.sets.calibration),
    }


def test_the_tuner_would_leave_out_just_those(phi: dict[str, Path]) -> None:
    """To the token: the demo's questions and answers have from 20 to 23 of them."""
    from trainer.tuners.language import fitting, load
    from trainer.tuners.lora.tune import encode

    given = [Example(prompt=each.prompt, answer=each.base) for each in GRAMMAR[::3]]
    asked = [(each["prompt"], [], [each["answer"]]) for each in given]
    loaded, seen = load(phi["base"], LanguageSettings()), set()
    for context in range(19, 25):
        fits = fitting(phi["base"], LanguageSettings(context=context), asked)
        rows, left_out = encode(replace(loaded, context=context), given)
        assert (sum(fits), fits.count(False)) == (len(rows), left_out)
        seen.add(sum(fits))
    assert {0, len(given)} < seen, "it was asked where some fit and some do not"


@pytest.mark.parametrize(
    ("held_out", "settings", "said"),
    [
        ([longer(each, "yard") for each in HELD_OUT], {},
         f"0 examples are held out, 10 must judge (left out: {len(HELD_OUT)} holdout_too_long"),
        (HELD_OUT, {"tuning": "{ context = 8 }"}, "nothing is left to train on"),
    ],
)  # fmt: skip
def test_too_little_that_fits_ends_the_job_before_it_trains(
    tmp_path: Path, phi: dict[str, Path], held_out: list[PhiExample], settings: dict[str, str], said: str
) -> None:
    job = planned(tmp_path, phi, list(EXAMPLES), held_out, **settings)
    told = train(job)
    assert (told["outcome"], "train" in told["timings_s"]) == ("failed", False)
    assert said in told["reason"]
    assert had(job.config, "clerk") == set()
    assert not list((job.config.data_dir / "trained").rglob("*")), "no sample was used"
