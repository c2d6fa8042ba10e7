"""Text from whole models: what Transformers generates from the same weights, alone or in a batch."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_hf import hf_model, write_tokenizer

from torchtitan_style import load_model
from torchtitan_style.checkpoint.hf_export import export_hf
from torchtitan_style.checkpoint.hf_import import import_hf
from torchtitan_style.checkpoint.saved import SavedModel, open_model, with_model
from torchtitan_style.common.errors import UserError
from torchtitan_style.inference.generate import TextModel
from torchtitan_style.inference.settings import Sampling
from torchtitan_style.models.hf_folder import HFFolder

PROMPTS = [
    "def loss(x): return",
    "the gradient of naïve",
    "1234",
    "学习 🙂 token and its weight; don't",
    "def",
    "56 + 56 + 56",
    "\n\n",
    "it",
]
GREEDY: dict[str, Any] = {"temperature": 0.0, "max_new_tokens": 24}
VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "one key/value head": {"num_key_value_heads": 1},
    "bias": {"attention_bias": True},
    "sliding window": {"use_sliding_window": True, "sliding_window": 6, "max_window_layers": 1},
}


def write_model(folder: Path, **changes: Any) -> Path:
    hf_model(**changes).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer. Not to be changed."""
    return write_model(tmp_path_factory.mktemp("hf") / "model")


@pytest.fixture(scope="module")
def model(folder: Path) -> TextModel:
    return load_model(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, launch: Callable[..., Any]) -> Path:
    """A short training run of a tiny model."""
    folder = tmp_path_factory.mktemp("run")
    text = "the loss goes down. the gradient goes to zero. naïve tokens are drawn.\n"
    (folder / "corpus.txt").write_text(text * 200, encoding="utf-8")
    done = launch(
        "--model.flavor", "debug", "--training.steps", 60, "--training.seq_len", 32, "--training.global_batch_size", 8,
        "--optimizer.lr", 3e-3, "--lr_scheduler.warmup_steps", 5, "--metrics.enable_tensorboard", "false",
        "--data.dataset", "files", "--data.paths", folder / "corpus.txt", "--validation.enable", "false",
        "--job.dump_folder", folder / "run", "--generation.max_new_tokens", 8,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return folder / "run"


def assert_greedy_is_that_of_transformers(model: TextModel, hf_folder: Path, prompts: list[str]) -> None:
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        hf_folder, dtype=torch.float32, attn_implementation="eager"
    )
    assert model.generate(prompts, **GREEDY) == [hf_text(theirs, model, prompt) for prompt in prompts]


def hf_text(theirs: Any, model: TextModel, prompt: str) -> str:
    ids = torch.tensor([model.tokenizer.encode(prompt)])
    text = theirs.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        generation_config=transformers.GenerationConfig(
            do_sample=False,
            max_new_tokens=GREEDY["max_new_tokens"],
            eos_token_id=sorted(model.stop_tokens),
            pad_token_id=0,
        ),
    )
    return model.tokenizer.decode(text[0, ids.shape[1] :].tolist())


# What is generated


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_greedy_text_of_a_batch_is_that_of_transformers_for_each_prompt(
    tmp_path: Path, changes: dict[str, Any]
) -> None:
    write_model(tmp_path, **changes)
    assert_greedy_is_that_of_transformers(load_model(tmp_path, dtype=torch.float32), tmp_path, PROMPTS)


def test_a_trained_model_writes_what_it_writes_in_transformers(run: Path, tmp_path: Path) -> None:
    source = open_model(str(run), verify=True)
    assert isinstance(source, SavedModel)
    export_hf(source, tmp_path / "exported")
    for where in (run, source.path, tmp_path / "exported"):
        model = load_model(where, dtype=torch.float32)
        assert_greedy_is_that_of_transformers(
            model, tmp_path / "exported", ["the loss", "naïve", "the gradient goes to"]
        )
    assert "the loss" in model.generate("naïve tokens are drawn.\n", **GREEDY)  # it has learnt something


def test_bf16_where_the_hardware_has_it_and_the_text_hardly_changes(run: Path) -> None:
    model = load_model(run)
    assert "gradient" in model.generate("the loss goes down. the", **GREEDY)


@pytest.mark.parametrize("options", [GREEDY, {"temperature": 1.0, "top_k": 0, "seed": 3}], ids=["greedy", "drawn"])
def test_a_prompt_has_the_same_text_alone_and_among_eight(model: TextModel, options: dict[str, Any]) -> None:
    assert model.generate(PROMPTS, **options) == [model.generate(prompt, **options) for prompt in PROMPTS]


def test_the_same_seed_the_same_text(model: TextModel) -> None:
    first, again, other = (model.generate("def", temperature=1.0, seed=seed) for seed in (1, 1, 2))
    assert first == again != other


def test_samples_of_a_prompt_differ_and_do_not_depend_on_their_number(model: TextModel) -> None:
    options = {"temperature": 1.0, "max_new_tokens": 12}
    texts = model.generate(["def", "it"], num_samples=3, **options)
    assert len(set(texts[:3])) == 3
    assert texts[0] == model.generate("def", **options)
    assert texts[3:5] == model.generate("it", num_samples=2, **options)


def test_the_stream_is_the_text_in_whole_characters(model: TextModel) -> None:
    pieces = list(model.stream("学", temperature=1.5, max_new_tokens=60, seed=4))
    assert len(pieces) > 10
    assert "".join(pieces) == model.generate("学", temperature=1.5, max_new_tokens=60, seed=4)


# Where it ends


def test_a_stop_token_ends_a_text_and_is_no_part_of_it(folder: Path, tmp_path: Path) -> None:
    shutil.copytree(folder, tmp_path / "model")
    free, ids = load_model(folder, dtype=torch.float32), list[int]()
    prompt = free.encode("def")
    sampling = Sampling(temperature=0.0)
    list(free.continue_ids([prompt], sampling=sampling, max_new_tokens=24, cache=free.new_cache(), cached=ids))
    ids = ids[len(prompt) :]  # what is drawn if nothing ends it
    end = ids[5]
    settings = {"eos_token_id": [3, end]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    model = load_model(tmp_path / "model", dtype=torch.float32)
    assert model.stop_tokens == {3, end, 2, 0}  # the tokenizer's end of a turn and end of a text
    *_, last = model.pieces(["def"], **GREEDY)
    assert last.finish == "stop"
    assert last.tokens == ids.index(end) + 1
    assert model.generate("def", **GREEDY) == model.tokenizer.decode(ids[: ids.index(end)])


def test_a_stop_string_ends_a_text(model: TextModel) -> None:
    whole = model.generate("def", **GREEDY)
    stop = whole[7:10]
    *_, last = model.pieces(["def"], stop=[stop], **GREEDY)
    assert last.finish == "stop"
    assert model.generate("def", stop=[stop], **GREEDY) == whole[: whole.index(stop)]


def test_enough_tokens_or_the_last_position_ends_a_text(tmp_path: Path) -> None:
    model = load_model(write_model(tmp_path, max_position_embeddings=24), dtype=torch.float32)
    short, long = "def", "def loss(x): return 1234 + 56"
    length = len(model.encode(long))
    ends = {
        p.row: (p.finish, p.tokens) for p in model.pieces([short, long], temperature=0.0, max_new_tokens=20) if p.finish
    }
    assert ends == {0: ("length", 20), 1: ("positions", 24 - length)}


# Where it comes from


def test_an_imported_checkpoint_writes_what_its_source_writes(folder: Path, model: TextModel, tmp_path: Path) -> None:
    import_hf(HFFolder(folder), tmp_path / "imported")
    imported = load_model(tmp_path / "imported", dtype=torch.float32)
    assert imported.generate(PROMPTS, **GREEDY) == model.generate(PROMPTS, **GREEDY)
    assert imported.stop_tokens == model.stop_tokens


def test_a_models_own_recommendation_is_the_default(model: TextModel, run: Path) -> None:
    # generation_config.json says do_sample and temperature 0.6; what it leaves out is as in Transformers.
    assert model.sampling == Sampling(temperature=0.6, top_k=50)
    assert load_model(run).sampling == Sampling()
    assert model.settings(top_p=0.5) == Sampling(temperature=0.6, top_k=50, top_p=0.5)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_said(folder: Path, temperature: float) -> None:
    model = load_model(folder, dtype=torch.float32)
    model.model.model.norm.weight[0] = torch.nan
    with pytest.raises(UserError, match="the model's logits contain NaN or infinity"):
        model.generate("def", temperature=temperature)


def test_one_stop_string_may_be_given_as_it_is(model: TextModel) -> None:
    whole = model.generate("def", **GREEDY)
    assert model.generate("def", stop=whole[7:10], **GREEDY) == model.generate("def", stop=[whole[7:10]], **GREEDY)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"do_sample": True, "temperature": "0.6"}, 'temperature: must be a number, not "0.6"'),
        ({"do_sample": True, "top_p": True}, "top_p: must be a number, not true"),
        ({"do_sample": True, "min_p": 7}, "min_p: must be from 0"),
        ({"eos_token_id": "</s>"}, "eos_token_id: must be a token's number"),
    ],
)
def test_a_recommendation_that_means_nothing_is_said(
    folder: Path, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=re.escape(f"generation_config.json: {message}")):
        load_model(tmp_path / "model")


def damaged(folder: Path) -> None:
    weights = next((folder / "checkpoint").rglob("*.distcp"))
    data = bytearray(weights.read_bytes())
    data[len(data) // 2] ^= 1
    weights.write_bytes(data)


def half_written(folder: Path) -> None:
    for step in list((folder / "checkpoint").glob("step-*")):
        step.rename(step.with_name(f"tmp-{step.name}"))


def without_tokenizer(folder: Path) -> None:
    for name in ("checkpoint", "data"):
        shutil.rmtree(folder / name)
    write_model(folder)
    for name in ("tokenizer.json", "vocab.json", "merges.txt"):
        (folder / name).unlink()


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (damaged, "none of its .* checkpoints? is whole|SHA-256|does not match"),
        (half_written, "never finished"),
        (without_tokenizer, "has no tokenizer"),
        (shutil.rmtree, "there is no folder"),
    ],
)
def test_a_source_that_cannot_be_used_is_one_clear_message(
    run: Path, tmp_path: Path, harm: Callable[[Path], None], message: str
) -> None:
    shutil.copytree(run, tmp_path / "run")
    harm(tmp_path / "run")
    with pytest.raises(UserError, match=message):
        load_model(tmp_path / "run")


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "the prompt is empty"),
        ("def " * 600, {}, r"the prompt has [\d,]+ tokens, but the model has only 512 positions"),
        ("def", {"max_new_tokens": 0}, "max_new_tokens: must be at least 1"),
        ("def", {"temperature": -1.0}, "temperature: must be"),
    ],
)
def test_what_cannot_be_asked_is_one_clear_message(
    model: TextModel, prompt: str, options: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        model.generate(prompt, **options)


def test_a_checkpoint_that_its_run_deletes_meanwhile_is_followed_by_the_next(run: Path, tmp_path: Path) -> None:
    shutil.copytree(run, tmp_path / "run")
    seen = []

    def use(found: Any) -> str:
        seen.append(found.path.name)
        if len(seen) == 1:
            step = int(found.path.name.removeprefix("step-"))
            found.path.rename(found.path.with_name(f"step-{step + 1}"))
            (found.path / ".metadata").read_bytes()
        return "used"

    assert with_model(str(tmp_path / "run"), use, say=pytest.fail) == "used"
    assert len(set(seen)) == 2
    with pytest.raises(ZeroDivisionError):  # what has another cause is not tried again
        with_model(str(tmp_path / "run"), lambda _: 1 / 0, say=pytest.fail)


def test_types_by_name(folder: Path) -> None:
    assert next(load_model(folder, dtype="bfloat16").model.parameters()).dtype == torch.bfloat16
    for wrong in ("int8", "half-precision"):
        with pytest.raises(UserError, match=f"dtype: must be bfloat16, float16 or float32, not {wrong}"):
            load_model(folder, dtype=wrong)


def test_devices_that_there_are_not(folder: Path) -> None:
    with pytest.raises(UserError, match="there is no device"):
        load_model(folder, device="cuda:99")
    with pytest.raises(UserError, match="there is no device"):
        load_model(folder, device="gpu")


def test_a_tokenizer_of_another_model(folder: Path, tmp_path: Path) -> None:
    small = write_model(tmp_path, vocab_size=300)
    model = load_model(small, dtype=torch.float32)
    with pytest.raises(UserError, match="the tokenizer belongs to another model"):
        model.generate(" ".join(PROMPTS))


def test_an_option_that_there_is_not_is_answered_with_the_nearest_and_all(model: TextModel) -> None:
    with pytest.raises(TypeError, match="no option max_new_token; did you mean max_new_tokens") as raised:
        model.generate("def", max_new_token=3)
    for option in ("num_samples", "seed", "stop", "temperature", "min_p"):
        assert option in str(raised.value)
    with pytest.raises(TypeError, match=r"no option zzz\. The options are max_new_tokens"):
        model.generate("def", zzz=3)
