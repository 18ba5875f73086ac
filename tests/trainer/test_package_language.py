"""A language model's file becomes a release only beside what it was made of."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from bench.demo.phi import EXAMPLES
from edged.wire.manifest import ReleaseRef
from tests.support.broken_adapters import rewrite, without
from trainer.cli import app
from trainer.core.parity import PARITY_KEY, ParityFailed
from trainer.export.gguf import quantize_gguf
from trainer.export.gguf_lora import export_lora_gguf
from trainer.export.language import adapter_parity, gguf_form
from trainer.export.parity import lora_parity, text_reference
from trainer.package import package_language
from trainer.releases import read_manifest, reference

PLAIN = [(each.prompt, each.base) for each in EXAMPLES[:2]]
ADAPTED = [(each.prompt, each.adapter) for each in EXAMPLES[:2]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory, phi: dict[str, Path]) -> ReleaseRef:
    folder = tmp_path_factory.mktemp("release") / "clerk"
    package_language(phi["model_gguf"], folder, "clerk@1.0", checkpoint=phi["base"], golden=PLAIN)
    (report,) = read_manifest(folder).lineage[PARITY_KEY]
    assert (report["format"], report["items"], report["passed"]) == ("F16", 5, True)
    assert {row["metric"] for row in report["metrics"]} > {"logits_max", "kl", "tokens_changed"}
    return reference(folder)


def test_a_quantised_file_is_judged_as_what_it_is(tmp_path: Path, phi: dict[str, Path]) -> None:
    quantize_gguf(phi["model_gguf"], tmp_path / "small.gguf", "Q8_0")
    assert [gguf_form(each) for each in (phi["model_gguf"], tmp_path / "small.gguf")] == ["F16", "Q8_0"]
    manifest = package_language(
        tmp_path / "small.gguf", tmp_path / "out", "clerk@1.0", checkpoint=phi["base"], golden=PLAIN,
        lineage={"source": "a bench"},
    )  # fmt: skip
    assert [each["format"] for each in manifest.lineage[PARITY_KEY]] == ["Q8_0"]
    assert manifest.lineage["source"] == "a bench"


def test_an_adapter_is_compared_on_its_base(tmp_path: Path, phi: dict[str, Path], base: ReleaseRef) -> None:
    manifest = package_language(
        phi["adapter_gguf"], tmp_path / "out", "style@1.0", checkpoint=phi["base"], adapter=phi["adapter"],
        golden=ADAPTED, base=base, lineage={"source": "a bench"},
    )  # fmt: skip
    assert [(each["format"], each["passed"]) for each in manifest.lineage[PARITY_KEY]] == [("lora", True)]
    assert (manifest.base, manifest.lineage["source"]) == (base, "a bench")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(
        {entry.path for entry in manifest.files.values()} | {"release.json"}
    )


def test_a_file_of_something_else_makes_no_release(tmp_path: Path, phi: dict[str, Path], base: ReleaseRef) -> None:
    lost = rewrite(phi["adapter_gguf"], tmp_path / "lost.gguf", without("blk.1.attn_output"))
    out = tmp_path / "out"
    with pytest.raises(ParityFailed, match=r"the exported lora file computes something else .*adapter effect_off"):
        package_language(
            lost, out, "style@1.0", checkpoint=phi["base"], adapter=phi["adapter"], golden=ADAPTED, base=base
        )
    with pytest.raises(ValueError, match="needs both"):
        package_language(lost, out, "style@1.0", checkpoint=phi["base"], golden=ADAPTED, base=base)
    (tmp_path / "text.gguf").write_text("not one")
    with pytest.raises(ValueError, match=r"text.gguf: no GGUF file that can be read"):
        package_language(tmp_path / "text.gguf", out, "clerk@1.0", checkpoint=phi["base"], golden=PLAIN)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lost.gguf", "text.gguf"]


def test_make_phi_says_how_near_its_file_is(tmp_path: Path, phi: dict[str, Path]) -> None:
    command = ["release", "make-phi", str(tmp_path / "out"), "--model-id", str(phi["base"]), "--name", "clerk",
               "--quantization", "Q8_0", "--prompt", EXAMPLES[0].prompt]  # fmt: skip
    done = CliRunner().invoke(app, [*command, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert [(each["format"], each["items"], each["passed"]) for each in told["parity"]] == [
        ("F16", 4, True),
        ("Q8_0", 4, True),
    ]
    assert told["parity"] == read_manifest(tmp_path / "out").lineage[PARITY_KEY]
    said = CliRunner().invoke(app, command)
    assert "as its checkpoint on 4 texts (F16, Q8_0), uncalibrated" in said.stdout


def test_an_adapter_that_does_little_is_told_from_one_that_is_wrong(tmp_path: Path, phi: dict[str, Path]) -> None:
    """16 bits of the base round away more than a tenth of what it does; 32 have the last word."""
    faint = tmp_path / "faint"
    shutil.copytree(phi["adapter"], faint)
    held = load_file(faint / "adapter_model.safetensors")
    changed = {name: values * 0.0005 if ".lora_B." in name else values for name, values in held.items()}
    save_file(changed, faint / "adapter_model.safetensors", {"format": "pt"})
    file = export_lora_gguf(faint, phi["base"], tmp_path / "faint.gguf")
    on_16_bits = lora_parity(phi["model_gguf"], file, text_reference(phi["base"], adapter=faint))
    assert [row.metric for row in on_16_bits.rows if not row.passed] == ["effect_off"]
    assert adapter_parity(faint, phi["base"], file, tmp_path).passed
    lost = rewrite(file, tmp_path / "lost.gguf", without("blk.1.attn_qkv"))
    report = adapter_parity(faint, phi["base"], lost, tmp_path)
    assert [row.metric for row in report.rows if not row.passed] == ["effect_off"]
