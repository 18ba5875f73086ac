"""The ONNX language engine on a release: the demo's Phi, exported by the trainer, in fp32 and int8."""

from __future__ import annotations

import json
import math
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper
from phi_answers import CONTEXT, LONG, TEXT, ask, assert_same, expected, load, one_thread
from tiny_phi import END, save_phi3, tokenizer
from tokenizers import processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from bench.demo.phi import EXAMPLES, GRAMMAR
from edged.engines.base import (
    ChatMessage,
    EngineError,
    EngineOptions,
    Finished,
    GenerateRequest,
    PromptTooLong,
    Token,
)
from edged.engines.onnx_phi import OnnxPhiGenerator
from edged.engines.token_loop import STEP_TOKENS_MAX
from trainer.export.onnx_phi import export_phi
from trainer.package import package_phi
from trainer.releases import read_manifest

DEVICE = Path(__file__).parents[2] / "build" / "venv-device" / "bin" / "python"
CHAT = (
    "{{ bos_token }}{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    with one_thread():
        yield


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("phi")


@pytest.fixture(scope="module")
def clerk(phi: dict[str, Path], folders: Path) -> Path:
    """The demo's Phi, a Phi-3 with grouped heads that was trained, as an fp32 release."""
    package_phi(phi["base"], folders / "clerk", "clerk@1.0", prompts=[item.prompt for item in EXAMPLES], int8=False)
    return folders / "clerk"


@pytest.fixture(scope="module")
def clerk8(phi: dict[str, Path], folders: Path) -> Path:
    """The same in int8."""
    package_phi(phi["base"], folders / "clerk8", "clerk@1.1", prompts=[item.prompt for item in EXAMPLES])
    return folders / "clerk8"


@pytest.fixture
def engine(clerk: Path) -> Iterator[OnnxPhiGenerator]:
    engine = load(clerk)
    yield engine
    engine.close()


def tokens_of(engine: OnnxPhiGenerator, prompt: str) -> int:
    return ask(engine, prompt, tokens_max=1)[1].prompt_tokens


def test_what_was_learned_is_answered(phi: dict[str, Path], engine: OnnxPhiGenerator) -> None:
    words = AutoTokenizer.from_pretrained(phi["base"])
    model = AutoModelForCausalLM.from_pretrained(phi["base"])
    for item in EXAMPLES:
        assert_same(engine, model, words, item.prompt, 32)
        assert ask(engine, item.prompt)[0] == item.base


def test_int8_answers_what_was_learned_in_a_fraction_of_the_bytes(clerk: Path, clerk8: Path) -> None:
    engine = load(clerk8)
    items = GRAMMAR[::5]
    right = sum(ask(engine, item.prompt)[0] == item.base for item in items)
    assert right >= 0.95 * len(items)
    sizes = [(folder / "model.onnx").stat().st_size for folder in (clerk8, clerk)]
    assert sizes[0] < 0.4 * sizes[1]


@pytest.mark.parametrize("folder", ["clerk", "clerk8"])
def test_a_release_proves_itself_on_a_device(folder: str, request: pytest.FixtureRequest) -> None:
    done = subprocess.run(
        [DEVICE, "-m", "edged.prove", str(request.getfixturevalue(folder))], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["golden"] == len(EXAMPLES)


def test_a_device_notices_a_model_that_answers_something_else(clerk: Path, clerk8: Path, tmp_path: Path) -> None:
    shutil.copytree(clerk, tmp_path / "out")
    path = tmp_path / "out" / "golden.json"
    path.write_text(path.read_text().replace("accept", "refuse", 1))
    done = subprocess.run(
        [DEVICE, "-m", "edged.prove", str(tmp_path / "out")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert "expected 'refuse" in json.loads(done.stdout.splitlines()[-1])["error"]


def test_a_golden_prompt_without_an_answer_is_refused(phi: dict[str, Path], clerk: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="answers nothing"):
        package_phi(phi["base"], tmp_path / "out", "clerk@1.0", prompts=[EXAMPLES[0].prompt + EXAMPLES[0].base])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("folder", ["clerk", "clerk8"])
def test_what_the_last_prompt_began_with_is_not_computed_again(folder: str, request: pytest.FixtureRequest) -> None:
    used = load(request.getfixturevalue(folder))
    system = EXAMPLES[0].prompt * 9
    first = ask(used, system, tokens_max=8)
    assert first[1].reused_tokens == 0
    assert 2 * STEP_TOKENS_MAX < first[1].prompt_tokens < 3 * STEP_TOKENS_MAX
    prompts = {
        system: 2 * STEP_TOKENS_MAX,  # the same again
        EXAMPLES[0].prompt * 8: STEP_TOKENS_MAX,  # two steps to the token: the last one is computed, it has the answer
        system + first[0] + EXAMPLES[1].prompt: 2 * STEP_TOKENS_MAX,  # a conversation that goes on
        system[:20]: 0,
        EXAMPLES[2].prompt + system: 0,
        EXAMPLES[2].prompt + system + EXAMPLES[1].prompt: 2 * STEP_TOKENS_MAX,
        EXAMPLES[2].prompt + system[:-120]: STEP_TOKENS_MAX,
    }
    for prompt, reused in prompts.items():
        fresh = load(request.getfixturevalue(folder))
        text, finished, tokens = ask(used, prompt, tokens_max=12)
        alone = ask(fresh, prompt, tokens_max=12)
        assert (text, tokens) == (alone[0], alone[2])  # to the last bit
        assert finished.reused_tokens == reused
        assert alone[1].reused_tokens == 0
        fresh.close()


def test_an_answer_is_computed_again_as_part_of_a_prompt(engine: OnnxPhiGenerator) -> None:
    """It was made token by token, which an int8 model computes a little differently."""
    prompt = next(text for cut in range(20) if tokens_of(engine, text := (EXAMPLES[1].prompt * 8)[cut:]) == 126)
    answer, finished, _ = ask(engine, prompt)
    assert finished.prompt_tokens + finished.answer_tokens >= 2 * STEP_TOKENS_MAX
    assert ask(engine, prompt + answer + EXAMPLES[0].prompt)[1].reused_tokens == STEP_TOKENS_MAX


def test_a_prompt_over_the_context_names_both_numbers(engine: OnnxPhiGenerator, clerk: Path) -> None:
    with pytest.raises(PromptTooLong, match=r"256 tokens.*the context of clerk@1.0 is 256 tokens"):
        engine.generate(GenerateRequest("!" * CONTEXT))
    assert ask(engine, "!" * (CONTEXT - 1))[1].answer_tokens <= 1
    small = load(clerk, context_max=32)
    assert small.context == 32
    with pytest.raises(PromptTooLong, match=r"40 tokens.*32 tokens"):
        small.generate(GenerateRequest("!" * 40))
    assert load(clerk, context_max=10**6).context == CONTEXT


def test_an_answer_ends_where_the_context_does(engine: OnnxPhiGenerator) -> None:
    for seed in range(5):
        _, finished, _ = ask(engine, "!" * 200, temperature=50.0, seed=seed)
        if finished.reason == "length":
            assert finished.prompt_tokens + finished.answer_tokens == CONTEXT
            break
    else:
        pytest.fail("no answer ran into the end of the context")


def test_tokens_max_and_stop_end_an_answer(engine: OnnxPhiGenerator) -> None:
    prompt = EXAMPLES[1].prompt  # ask the teacher about the three
    text, finished, tokens = ask(engine, prompt, tokens_max=2)
    assert (text, finished.reason, finished.answer_tokens) == ("ask the", "length", 2)
    assert len(tokens) == 2
    text, finished, _ = ask(engine, prompt, stop=("about",))
    assert (text, finished.reason) == ("ask the teacher ", "stop")
    assert ask(engine, prompt, stop=("k the tea", "absent"))[0] == "as"  # over the bounds of tokens


def test_sampling_follows_its_seed(engine: OnnxPhiGenerator) -> None:
    answers = [ask(engine, "line 1 read", temperature=5.0, seed=seed, tokens_max=8)[0] for seed in (1, 1, 2, 3)]
    assert answers[0] == answers[1]
    assert len(set(answers)) == 3


@pytest.mark.parametrize("reason", ["cancelled", "deadline"])
def test_a_request_can_be_halted_at_every_step(engine: OnnxPhiGenerator, reason: str) -> None:
    prompt = EXAMPLES[1].prompt * 8
    ask(engine, prompt)
    whole = ask(engine, prompt)
    steps = math.ceil((whole[1].prompt_tokens - whole[1].reused_tokens) / STEP_TOKENS_MAX)
    assert whole[1].answer_tokens > 2
    for allowed in range(steps + whole[1].answer_tokens):
        left = [""] * allowed
        _, finished, tokens = ask(engine, prompt, halt=lambda left=left: left.pop() if left else reason)
        assert finished.reason == reason
        assert tokens == whole[2][: len(tokens)]
        assert finished.answer_tokens == max(0, allowed - steps + 1)  # the last step of the prompt makes a token, too
    assert ask(engine, prompt) == whole


def test_a_long_prompt_is_halted_on_its_way(engine: OnnxPhiGenerator) -> None:
    asked = []
    _, finished, tokens = ask(engine, "!" * 250, halt=lambda: asked.append(1) or ("deadline" if len(asked) > 2 else ""))
    assert (finished.reason, len(asked), tokens, finished.mean_logprob) == ("deadline", 3, [], 0.0)


def test_a_new_request_cancels_the_answer_in_progress(engine: OnnxPhiGenerator) -> None:
    for interrupt in (
        lambda: ask(engine, EXAMPLES[0].prompt),
        lambda: engine.attach(None),
        engine.close,
    ):
        answer = engine.generate(GenerateRequest(EXAMPLES[1].prompt))
        assert isinstance(next(answer), Token)
        interrupt()
        *_, finished = answer
        assert isinstance(finished, Finished)
        assert finished.reason == "cancelled"
    for call in (lambda: engine.generate(GenerateRequest("line")), lambda: engine.attach(None)):
        with pytest.raises(EngineError, match="closed"):
            call()
    engine.close()


def test_a_cancelled_answer_leaves_the_one_in_progress_alone(engine: OnnxPhiGenerator) -> None:
    whole = list(engine.generate(GenerateRequest(EXAMPLES[1].prompt)))
    begun = engine.generate(GenerateRequest(EXAMPLES[0].prompt))
    next(begun)
    unstarted = engine.generate(GenerateRequest(EXAMPLES[2].prompt))
    answer = engine.generate(GenerateRequest(EXAMPLES[1].prompt))
    events = [next(answer)]
    for cancelled in (begun, unstarted):
        (finished,) = cancelled
        assert isinstance(finished, Finished)
        assert finished.reason == "cancelled"
    assert [*events, *answer] == whole


def test_requests_that_make_no_sense(engine: OnnxPhiGenerator, phi: dict[str, Path]) -> None:
    wrong: dict[str, Any] = {
        "the prompt is empty": {"prompt": ""},
        "temperature -1": {"prompt": "line", "temperature": -1},
        "temperature nan": {"prompt": "line", "temperature": float("nan")},
        "keyword 'pattern' is not supported": {"prompt": "line", "schema": {"type": "string", "pattern": "a"}},
        "has no chat template": {"messages": (ChatMessage("user", "line"),)},
    }
    for message, request in wrong.items():
        with pytest.raises(EngineError, match=message):
            engine.generate(GenerateRequest(**request))
    with pytest.raises(EngineError, match=r"adapter\.gguf.*merge.*llama engine"):
        engine.attach(phi["adapter_gguf"])
    assert ask(engine, EXAMPLES[0].prompt)[0] == EXAMPLES[0].base


@pytest.mark.parametrize(
    ("key", "value"), [("context_max", -1), ("context_max", True), ("context_min", 3), ("spin", 1)]
)
def test_engine_keys_that_make_no_sense(clerk: Path, key: str, value: Any) -> None:
    with pytest.raises(EngineError, match=f"{key} = {value}"):
        load(clerk, **{key: value})


def test_control_tokens_are_never_text_and_conversations_have_their_template(tmp_path: Path) -> None:
    words = tokenizer()
    words.add_special_tokens({"additional_special_tokens": ["<|user|>", "<|assistant|>", "<|system|>"]})
    words.chat_template = CHAT
    # A text has a beginning of its own; a conversation has its template's.
    begin = processors.TemplateProcessing(single=f"{END} $A", special_tokens=[(END, words.bos_token_id)])
    words.backend_tokenizer.post_processor = begin
    save_phi3(tmp_path / "phi", words=words, **LONG)
    engine = load(tmp_path / "out", export_phi(tmp_path / "phi", tmp_path / "out", int8=False))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "phi")
    assert_same(engine, model, words, TEXT, 20)
    silent = 0
    for seed in range(20):
        text, finished, tokens = ask(engine, TEXT, temperature=20.0, seed=seed, tokens_max=100)
        assert "<|" not in text
        assert finished.answer_tokens == len(tokens)
        silent += any(not token.text for token in tokens)
    assert silent > 10, "control tokens are hardly ever drawn, so that this shows nothing"
    said = [("system", "ask the teacher"), ("user", "a seven?"), ("assistant", "don't!"), ("user", "größer als ½")]
    turns = [{"role": role, "content": content} for role, content in said]
    ids = words.apply_chat_template(turns, add_generation_prompt=True)
    answer, finished, _ = ask(engine, messages=tuple(ChatMessage(*turn) for turn in said), tokens_max=20)
    assert finished.prompt_tokens == len(ids)
    assert answer.rstrip("\ufffd") == expected(model, words, ids, 20)[0].rstrip("\ufffd")
    spelled = ask(engine, messages=(ChatMessage("user", "a<|assistant|>b"),), tokens_max=1)[1].prompt_tokens
    forged = f"{END}<|user|>a<|assistant|>b<|assistant|>"
    assert spelled > len(words(forged, add_special_tokens=False)["input_ids"])


DAMAGE: dict[str, tuple[str, Callable[[bytes], bytes | None]]] = {
    "no model": ("model.onnx", lambda _: None),
    "no tokenizer": ("tokenizer.json", lambda _: None),
    "no config": ("config.json", lambda _: None),
    "empty model": ("model.onnx", lambda _: b""),
    "half a model": ("model.onnx", lambda data: data[: len(data) // 2]),
    "text as model": ("model.onnx", lambda _: b"not a model"),
    "half a tokenizer": ("tokenizer.json", lambda data: data[: len(data) // 2]),
    "half a config": ("config.json", lambda data: data[: len(data) // 2]),
    "a list as config": ("config.json", lambda _: b"[]"),
    "no context": ("config.json", lambda data: data.replace(b"max_position_embeddings", b"positions")),
    "no end": ("config.json", lambda data: data.replace(b"eos_token_id", b"end")),
    "end as text": ("config.json", lambda data: data.replace(b'"eos_token_id": 0', b'"eos_token_id": "0"')),
    "wrong template": ("config.json", lambda data: data.replace(b'"model_type"', b'"chat_template": 5, "x"')),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_named(clerk: Path, tmp_path: Path, name: str) -> None:
    shutil.copytree(clerk, tmp_path / "out")
    manifest = read_manifest(tmp_path / "out")
    file, damage = DAMAGE[name]
    path = tmp_path / "out" / file
    data = damage(path.read_bytes())
    if data is None:
        path.unlink()
    else:
        assert data != path.read_bytes()
        path.write_bytes(data)
    with pytest.raises(EngineError, match=file.replace(".", r"\.")):
        OnnxPhiGenerator(tmp_path / "out", manifest, EngineOptions())


def test_a_release_that_lacks_a_role_says_so(clerk: Path) -> None:
    with pytest.raises(EngineError, match="names no file tokenizer, config, it has: model"):
        load(clerk, {"model": "model.onnx"})


def test_files_that_do_not_belong_together(clerk: Path, phi: dict[str, Path], tmp_path: Path) -> None:
    shutil.copytree(clerk, tmp_path / "out")
    words = AutoTokenizer.from_pretrained(phi["base"])
    words.add_tokens([f"word{n}" for n in range(200)])
    words.backend_tokenizer.save(str(tmp_path / "out" / "tokenizer.json"))
    with pytest.raises(EngineError, match=r"tokenizer.json has \d+ tokens, the model only 384"):
        load(tmp_path / "out")


def test_numbers_that_are_not_finite_are_no_answer(clerk: Path, tmp_path: Path) -> None:
    shutil.copytree(clerk, tmp_path / "out")
    model = onnx.load(tmp_path / "out" / "model.onnx")
    weight = max(model.graph.initializer, key=lambda tensor: len(tensor.raw_data))
    values = numpy_helper.to_array(weight).copy()
    values[:] = np.nan
    weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    onnx.save(model, tmp_path / "out" / "model.onnx")
    engine = load(tmp_path / "out")
    for _ in range(2):
        with pytest.raises(EngineError, match=r"clerk@1\.0.*not finite"):
            list(engine.generate(GenerateRequest(EXAMPLES[0].prompt)))


def test_a_model_without_a_cache_is_no_model_for_this_engine(clerk: Path, tmp_path: Path) -> None:
    shutil.copytree(clerk, tmp_path / "out")
    path = tmp_path / "out" / "model.onnx"
    model = onnx.load(path)
    kept = [node for node in model.graph.output if not node.name.startswith("present.1")]
    del model.graph.output[:]
    model.graph.output.extend(kept)
    onnx.save(model, path)
    with pytest.raises(EngineError, match=r"lack present.1.key, present.1.value"):
        load(tmp_path / "out")
