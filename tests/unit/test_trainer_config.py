from __future__ import annotations

import re
from pathlib import Path

import pytest

from trainer.config import ConfigError, load_config
from trainer.config_drift import Drift
from trainer.config_fleet import Triggers
from trainer.config_registration import BODY
from trainer.config_rollout import Rollout
from trainer.core.registration import Pace
from trainer.core.triggers import CRON

GOOD = """
name = "host"
data_dir = "data"
[models.digits]
checkpoint = "base.pt"
labels = ["0", "1"]
holdout = "h"
holdout_clean = "hc"
calibration = "c"
"""


def write(folder: Path, text: str) -> Path:
    path = folder / "trainer.toml"
    path.write_text(text)
    return path


def test_paths_start_at_the_file_and_the_environment_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRAINER_MODELS__DIGITS__EPOCHS", "3")
    monkeypatch.setenv("TRAINER_BROKER__PORT", "1999")
    config = load_config(write(tmp_path, GOOD))
    assert config.database_at == tmp_path / "data" / "trainer.sqlite"
    assert config.model("digits").checkpoint == tmp_path / "base.pt"
    assert (config.model("digits").epochs, config.broker.port, config.name) == (3, 1999, "host")


def test_what_the_design_says_of_clocks_is_the_default() -> None:
    """L4, L5, L12: Sunday at two, a look at drift each week, an hour of watching."""
    assert Triggers().cron == CRON == "0 2 * * sun"
    assert Drift().check_s == 604_800
    assert (Rollout().watch_s, Rollout().rules().watches) == (3600.0, (3600.0,))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (GOOD + "imgsz = 161", r"models\.digits\.imgsz = '161'.*multiple of 32"),
        (GOOD + "epoch = 3", r"models\.digits\.epoch = '3'.*fix: remove it, or correct its spelling"),
        (GOOD + "lora = { r = 0 }", r"lora\.r = 0.*fix: use a whole number from 1 to 512"),
        (GOOD + "gate = { image_min = 3 }", r"unknown rule image_min; known: images_min"),
        (GOOD + "gate = { f1_min = 50 }", r"models\.digits\.gate: f1_min = 50.*: use a number from 0 to 1"),
        (GOOD + '[broker]\nhost = "10.0.0.1"', r"'10\.0\.0\.1' without `ca`.*set ca, certificate, key"),
        (GOOD + '[http]\nca = "ca.crt"', r"http.*certificate, key missing: set all"),
        (GOOD.replace('holdout = "h"\n', ""), r"models\.digits\.holdout is missing: add it"),
        ("name = = 3", r"trainer\.toml: .*line 1"),
    ],
)
def test_an_error_names_key_value_and_fix(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text))


def test_a_missing_file_and_an_unknown_model_are_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"nothere\.toml does not exist"):
        load_config(tmp_path / "nothere.toml")
    with pytest.raises(ConfigError, match=r"models\.cats: no such model; configured: digits"):
        load_config(write(tmp_path, GOOD)).model("cats")


def test_gate_rules_come_over_as_the_gate_knows_them(tmp_path: Path) -> None:
    rules = load_config(write(tmp_path, GOOD + "gate = { images_min = 20, f1_min = 0.7 }")).model("digits").gate_rules()
    assert (rules.images_min, type(rules.images_min), rules.f1_min) == (20, int, 0.7)


def test_the_example_loads_with_every_key_switched_on(tmp_path: Path) -> None:
    text = Path("docs/trainer.example.toml").read_text()
    lines = [re.sub(r"^# (?=[a-z_]+ = |\[\[)", "", line) for line in text.splitlines()]
    path = tmp_path / "trainer.toml"
    path.write_text("\n".join(lines) + "\n")
    config = load_config(path)
    assert config.models["defects"].gate["forget_max"] == 0.03
    assert config.models["defects"].threshold == 100
    (told,) = config.registration
    assert (told.body, told.when, told.pace()) == (BODY, "released", Pace())


def test_a_wildcard_host_needs_the_address_that_devices_use(tmp_path: Path) -> None:
    path = tmp_path / "trainer.toml"
    files = 'ca = "a"\ncertificate = "b"\nkey = "c"\n'
    path.write_text(f'[http]\nhost = "0.0.0.0"\n{files}')
    with pytest.raises(ConfigError, match="set url"):
        load_config(path)


TEXT = '[models.clerk]\nkind = "llm"\ncheckpoint = "c"\n'


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("tuning = { nonsense = 3 }", r"models\.clerk.*tuning\.nonsense = 3: no such setting; use epochs, .*beta"),
        ("tuning = { patience = 0 }", r"tuning\.patience = 0: .*greater than or equal to 1"),
        ('lora = { bias = "lora_only" }', r'lora\.bias = "lora_only": an adapter that devices run .*use "none"'),
        ('tuning = { lora = { bias = "all" } }', r'lora\.bias = "all"'),
        ("lora = { lora_alpha = true }", r"lora\.lora_alpha = True: .*no numbers"),
    ],
)
def test_what_a_training_could_not_honour_is_refused_at_load(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said) as error:
        load_config(write(tmp_path, TEXT + line))
    assert "pydantic" not in str(error.value)


def test_the_adapter_to_train_further_lies_beside_the_configuration(tmp_path: Path) -> None:
    given = load_config(write(tmp_path, TEXT + 'tuning = { adapter = "before", patience = 2 }')).text("clerk")
    assert given.tuning == {"adapter": tmp_path / "before", "patience": 2}
    assert given.asked()["adapter"] == tmp_path / "before"
