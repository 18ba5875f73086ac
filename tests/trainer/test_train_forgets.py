"""A planted failure: an adapter that learns its lesson and forgets what it could do before is refused, for that alone."""

from __future__ import annotations

import json
from pathlib import Path

from bench.demo.phi import GRAMMAR
from tests.support.trained import EXAMPLES, line, run_trainer, summary, text_trainer, write_dataset
from trainer.config import load_config
from trainer.text_holdout import read_sets


def test_an_adapter_that_forgets_is_refused(tmp_path: Path, phi: dict[str, Path]) -> None:
    # Of other digits the base's answers were to stay; the adapter's training has the new rule's only.
    kept = [each for each in GRAMMAR if each not in EXAMPLES][::8]
    (tmp_path / "general.jsonl").write_text("".join(f"{line(each, each.base)}\n" for each in kept))
    config = text_trainer(tmp_path, phi, holdout_base=f'"{tmp_path / "general.jsonl"}"')
    dataset = write_dataset(tmp_path / "dataset.jsonl", EXAMPLES, line(kept[0]))
    done = run_trainer(config, "train", "--strategy", "lora", "--dataset", dataset)
    said = summary(done)
    assert said["outcome"] == "refused", done.stderr[-2000:]
    run = Path(said["run"])
    metadata = json.loads((run / "metadata.json").read_text())
    checks = {each["name"]: each for each in metadata["gate"]["checks"]}
    assert {name for name, each in checks.items() if not each["passed"]} == {"forgetting"}
    assert checks["base_examples"]["value"] == len(kept)
    assert checks["forgetting"]["value"] > 1.0, "nats a token: it says something else altogether"
    assert metadata["samples"]["base"] == len(kept)
    # A question of the base set neither trains nor judges, whatever the answer is.
    assert metadata["samples"]["left_out"] in ({"near_holdout": 1}, {"near_other_set": 1})
    base = metadata["evaluation"]["base"]
    assert base["base"]["loss"] < 0.1 < base["candidate"]["loss"]
    assert not (run / "candidate" / "release.json").exists()
    assert "what must not be forgotten" in (run / "README.md").read_text()
    frozen = read_sets(load_config(config), "clerk")["base"]
    assert {each.prompt for each in frozen} == {each.prompt for each in kept}
