"""Runs that start from weights, as whole processes: what they start from is the model in the folder, on every
layout, and what they end with is a model that Transformers computes the same with."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from tiny_hf import hf_model, write_tokenizer

from tests.data.corpora import words, write_jsonl
from torchtitan_style import Qwen3ForCausalLM
from torchtitan_style.checkpoint.hf_export import export_hf
from torchtitan_style.checkpoint.hf_import import import_hf
from torchtitan_style.checkpoint.saved import SavedModel, open_model
from torchtitan_style.checkpoint.weights import load_weights, stored_dtypes
from torchtitan_style.data.rows import row_order
from torchtitan_style.data.tokenizer.tokenizer import Tokenizer
from torchtitan_style.models.hf_folder import HFFolder

Launch = Callable[..., subprocess.CompletedProcess[str]]
SEQ_LEN, ROWS, STEPS = 32, 8, 3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The settings of a short run in fp32 on a made-up corpus. They say nothing of the model."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "corpus.jsonl", words(100, lengths=(10, 60)))
    path = folder / "config.toml"
    path.write_text(f"""
[data]
dataset = "files"
paths = ["{folder}/corpus.jsonl"]
validation_fraction = 0.2
[training]
steps = {STEPS}
seq_len = {SEQ_LEN}
global_batch_size = {ROWS}
local_batch_size = -1
mixed_precision_param = "float32"
[optimizer]
lr = 1e-3
[lr_scheduler]
warmup_steps = 0
total_steps = {STEPS}
[validation]
steps = 2
[generation]
enable = false
[metrics]
enable_tensorboard = false
""")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with everything that can be sharded, in several files, with a tokenizer of its own."""
    path = tmp_path_factory.mktemp("hf") / "model"
    model = hf_model(tie_word_embeddings=False, attention_bias=True, use_sliding_window=True, sliding_window=9,
                     max_window_layers=1)  # fmt: skip
    model.save_pretrained(path, max_shard_size="150KB")
    assert len(list(path.glob("*.safetensors"))) > 2
    write_tokenizer(path)
    return path


def succeed(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout


def fail(process: subprocess.CompletedProcess[str]) -> str:
    """The one message of a process that a mistake has ended."""
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stdout + process.stderr
    assert process.stderr.count("error: ") == 1
    return process.stderr


def records(run: Path, key: str) -> dict[int, Any]:
    """``key`` by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


def token_ids(run: Path, part: str) -> np.ndarray:
    shards = [np.fromfile(path, dtype="<u2") for path in sorted((run / "data").glob(f"{part}-*.bin"))]
    return np.concatenate(shards).astype(np.int64)


def rows(run: Path, part: str, numbers: np.ndarray) -> torch.Tensor:
    """Rows of a run's corpus, cut as the documentation says: each begins with the last token of the one before."""
    ids = token_ids(run, part)
    return torch.from_numpy(np.stack([ids[n * SEQ_LEN : (n + 1) * SEQ_LEN + 1] for n in numbers]))


def loss_in_transformers(folder: Path, ids: torch.Tensor) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    with torch.no_grad():
        return float(model(ids, labels=ids).loss)  # which shifts the labels itself


# The same model on every layout

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "1 process": (1, []),
    "dp2": (2, []),
    "tp2": (2, ["--parallelism.tensor_parallel_degree", "2"]),
    "tp4": (4, ["--parallelism.tensor_parallel_degree", "4"]),
    "dp2 × tp2": (4, ["--parallelism.tensor_parallel_degree", "2"]),
}


# Its shards are smaller than those of tp2, and nothing else.
NIGHTLY = {"tp4"}


def layouts(*, but: str = "") -> list[Any]:
    marks = {name: [pytest.mark.nightly] for name in NIGHTLY}
    return [pytest.param(name, marks=marks.get(name, [])) for name in LAYOUTS if name != but]


class Runs(dict[str, Path]):
    """A run from the folder for each layout that is asked for."""

    def __init__(self, start: Callable[[str], Path]) -> None:
        self._start = start

    def __missing__(self, layout: str) -> Path:
        self[layout] = self._start(layout)
        return self[layout]


@pytest.fixture(scope="module")
def runs(launch: Launch, config: Path, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    def start(layout: str) -> Path:
        nproc, options = LAYOUTS[layout]
        run = tmp_path_factory.mktemp("run") / "run"
        arguments = ["--config", config, "--model.hf_assets_path", folder, "--job.dump_folder", run, *options]
        output = succeed(launch(*arguments, nproc=nproc))
        assert f"starting from the weights of {folder}" in output.replace("\n", " ")
        return run

    return Runs(start)


def test_the_first_losses_are_those_of_transformers(runs: dict[str, Path], folder: Path) -> None:
    run = runs["1 process"]
    held_out = (len(token_ids(run, "validation")) - 1) // SEQ_LEN
    assert held_out > ROWS
    expected = loss_in_transformers(folder, rows(run, "validation", np.arange(min(held_out, 2 * ROWS))))
    # fp32, and sums of some hundred token losses in another order.
    assert records(run, "val_loss")[0] == pytest.approx(expected, rel=1e-6)

    count = -(-(len(token_ids(run, "train")) - 1) // SEQ_LEN)
    batch = rows(run, "train", row_order(np.arange(ROWS), num_rows=count, key="0"))
    assert records(run, "loss")[1] == pytest.approx(loss_in_transformers(folder, batch), rel=1e-6)


@pytest.mark.parametrize("layout", layouts(but="1 process"))
def test_every_layout_starts_from_the_same_weights(runs: dict[str, Path], layout: str) -> None:
    one, other = runs["1 process"], runs[layout]
    assert records(other, "val_loss")[0] == pytest.approx(records(one, "val_loss")[0], rel=1e-6)
    assert records(other, "loss")[1] == pytest.approx(records(one, "loss")[1], rel=1e-6)
    assert records(other, "grad_norm")[1] == pytest.approx(records(one, "grad_norm")[1], rel=1e-5)
    assert records(other, "loss") == pytest.approx(records(one, "loss"), rel=1e-5)
    assert records(other, "batch_hash") == records(one, "batch_hash")


def test_it_is_not_a_random_start(launch: Launch, config: Path, runs: dict[str, Path], tmp_path: Path) -> None:
    # The same dimensions and the same corpus in the same tokens, but nothing to start from.
    started = runs["1 process"]
    text = (started / "config.toml").read_text()
    assert text.count("hf_assets_path = ") == 1
    lines = [line for line in text.splitlines() if not line.startswith(("hf_assets_path = ", "dump_folder = "))]
    (tmp_path / "config.toml").write_text("\n".join(lines))
    succeed(launch("--config", tmp_path / "config.toml", "--job.dump_folder", tmp_path / "run", "--training.steps", 1))
    assert np.array_equal(token_ids(tmp_path / "run", "train"), token_ids(started, "train"))
    random_start, start = records(tmp_path / "run", "val_loss")[0], records(started, "val_loss")[0]
    assert random_start == pytest.approx(np.log(512), rel=0.02)  # knows nothing
    assert abs(start - random_start) > 0.1


@pytest.mark.parametrize("layout", layouts())
def test_the_tokenizer_is_the_folders(runs: dict[str, Path], folder: Path, layout: str) -> None:
    run = runs[layout]
    for tokenizer in (run / "tokenizer", run / "checkpoint" / f"step-{STEPS}" / "tokenizer"):
        assert {path.name for path in tokenizer.iterdir()} >= {"tokenizer.json", "chat_template.jinja"}
        for path in tokenizer.iterdir():
            assert path.read_bytes() == (folder / path.name).read_bytes(), path.name


def test_an_imported_folder_starts_the_same_run(
    launch: Launch, config: Path, folder: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    import_hf(HFFolder(folder), tmp_path / "imported")
    options = ["--checkpoint.initial_load_path", tmp_path / "imported", "--parallelism.tensor_parallel_degree", 2]
    succeed(launch("--config", config, "--job.dump_folder", tmp_path / "run", *options, nproc=2))
    for key in ("val_loss", "loss", "grad_norm"):
        assert records(tmp_path / "run", key) == records(runs["tp2"], key), key


def test_a_run_in_bf16_starts_from_the_same_weights(
    launch: Launch, config: Path, folder: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    options = ["--model.hf_assets_path", folder, "--training.mixed_precision_param", "bfloat16"]
    succeed(launch("--config", config, "--job.dump_folder", tmp_path, *options, "--training.steps", 1))
    # bf16 rounds to 2⁻⁸, and that averages out over the tokens.
    assert records(tmp_path, "val_loss")[0] == pytest.approx(records(runs["1 process"], "val_loss")[0], rel=1e-2)


def test_weights_stored_in_bf16_are_kept_in_fp32(launch: Launch, config: Path, tmp_path: Path) -> None:
    hf_model().to(torch.bfloat16).save_pretrained(tmp_path / "hf")
    write_tokenizer(tmp_path / "hf")
    options = ["--model.hf_assets_path", tmp_path / "hf", "--training.steps", 1, "--optimizer.lr", "1e-5"]
    succeed(launch("--config", config, "--job.dump_folder", tmp_path / "run", *options))
    held_out = (len(token_ids(tmp_path / "run", "validation")) - 1) // SEQ_LEN
    ids = rows(tmp_path / "run", "validation", np.arange(min(held_out, 2 * ROWS)))
    expected = loss_in_transformers(tmp_path / "hf", ids)
    assert records(tmp_path / "run", "val_loss")[0] == pytest.approx(expected, rel=1e-6)
    saved = open_model(str(tmp_path / "run"), verify=True)
    assert set(stored_dtypes(saved).values()) == {torch.float32}
    ours = Qwen3ForCausalLM(saved.config)
    load_weights(saved, dict(ours.named_parameters()))
    # A step of 1e-5 is less than bf16 can tell apart.
    weight = ours.model.layers[0].mlp.gate_proj.weight
    assert not torch.equal(weight, weight.to(torch.bfloat16).float())


# What they end with


def test_what_was_trained_in_parallel_is_the_same_model_in_transformers(
    launch: Launch, runs: dict[str, Path], folder: Path, tmp_path: Path
) -> None:
    source = open_model(str(runs["dp2 × tp2"]), verify=True)
    assert isinstance(source, SavedModel)
    assert source.path.name == f"step-{STEPS}"
    export_hf(source, tmp_path / "exported", max_shard_size="100KB")
    before = {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
    after = {
        name: tensor
        for file in (tmp_path / "exported").glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    assert after.keys() == before.keys()
    assert {tensor.dtype for tensor in after.values()} == {torch.float32}
    assert all(not torch.equal(after[name], before[name]) for name in before)  # each has learned

    ours = Qwen3ForCausalLM(source.config).eval()
    load_weights(source, dict(ours.named_parameters()))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", attn_implementation="eager")
    theirs.eval()
    ids = torch.randint(0, 512, (4, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(ours(ids), theirs(ids).logits, rtol=1e-5, atol=1e-5)

    # And in words.
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "exported")
    prompt = tokenizer("the gradient of", return_tensors="pt").input_ids
    theirs.generation_config.eos_token_id = None
    output = theirs.generate(prompt, max_new_tokens=20, do_sample=False)
    mine = prompt
    with torch.no_grad():
        for _ in range(20):
            mine = torch.cat((mine, ours(mine)[:, -1:].argmax(-1)), dim=1)
    assert mine.tolist() == output.tolist()
    decoded = Tokenizer(runs["dp2 × tp2"] / "tokenizer").decode(mine[0].tolist())
    assert decoded == tokenizer.decode(output[0], skip_special_tokens=True)
    assert decoded.startswith("the gradient of")


# From one run to another


@pytest.fixture(scope="module")
def first(launch: Launch, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that started from nothing, with dimensions and a tokenizer of its own."""
    run = tmp_path_factory.mktemp("first") / "run"
    options = ["--model.flavor", "debug", "--model.num_hidden_layers", 3, "--model.dropout", 0.1]
    options += ["--model.vocab_size", 384, "--checkpoint.interval", 2]
    succeed(launch("--config", config, "--job.dump_folder", run, *options))
    return run


@pytest.mark.parametrize(
    ("named", "nproc"),
    [(".", 1), ("checkpoint", 2), (f"checkpoint/step-{STEPS}", 1)],
    ids=["run", "folder", "checkpoint"],
)
def test_a_run_goes_on_where_another_ended(
    launch: Launch, config: Path, first: Path, tmp_path: Path, named: str, nproc: int
) -> None:
    options = ["--checkpoint.initial_load_path", first / named, "--training.steps", 1]
    options += ["--parallelism.tensor_parallel_degree", nproc]
    succeed(launch("--config", config, "--job.dump_folder", tmp_path / "run", *options, nproc=nproc))
    assert records(tmp_path / "run", "val_loss")[0] == pytest.approx(records(first, "val_loss")[STEPS], rel=1e-6)
    assert records(tmp_path / "run", "val_loss")[0] != pytest.approx(records(first, "val_loss")[0], rel=1e-6)

    started = open_model(str(tmp_path / "run"), verify=True)
    before = open_model(str(first), verify=True)
    assert started.config == before.config
    assert (started.config.num_hidden_layers, started.config.vocab_size, started.config.dropout) == (3, 384, 0.1)
    for path in (first / "tokenizer").iterdir():
        assert (tmp_path / "run" / "tokenizer" / path.name).read_bytes() == path.read_bytes()


def test_a_damaged_checkpoint_is_passed_over_and_named(
    launch: Launch, config: Path, first: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(first, tmp_path / "source")
    flip(source / "checkpoint" / f"step-{STEPS}" / "__0_0.distcp")
    options = ["--checkpoint.initial_load_path", source, "--training.steps", 1]
    process = launch("--config", config, "--job.dump_folder", tmp_path / "run", *options)
    output = succeed(process) + process.stderr
    assert f"step-{STEPS}: __0_0.distcp has changed since it was written" in output.replace("\n", " ")
    older = tmp_path / "older"
    options[1] = first / "checkpoint" / "step-2"
    succeed(launch("--config", config, "--job.dump_folder", older, *options))
    assert records(tmp_path / "run", "val_loss") == records(older, "val_loss")


def test_resuming_needs_the_source_no_more(
    launch: Launch, config: Path, folder: Path, runs: dict[str, Path], tmp_path: Path
) -> None:
    source = shutil.copytree(folder, tmp_path / "source")
    common = ["--config", config, "--job.dump_folder", tmp_path / "run", "--model.hf_assets_path", source]
    succeed(launch(*common, "--training.steps", 2))
    shutil.rmtree(source)
    assert "resuming after step 2" in succeed(launch(*common, "--training.steps", STEPS))
    # And is the run without a break, bit for bit.
    for key in ("loss", "grad_norm"):
        assert records(tmp_path / "run", key) == records(runs["1 process"], key), key


def test_resuming_a_run_from_a_run_that_is_gone(launch: Launch, config: Path, first: Path, tmp_path: Path) -> None:
    source = shutil.copytree(first, tmp_path / "source")
    common = ["--config", config, "--job.dump_folder", tmp_path / "run", "--checkpoint.initial_load_path", source]
    succeed(launch(*common, "--training.steps", 1, nproc=2))
    shutil.rmtree(source)
    assert "resuming after step 1" in succeed(launch(*common, "--training.steps", 2))
    # The resolved settings of the run alone do as well.
    resolved = ["--config", tmp_path / "run" / "config.toml", "--training.steps", 3]
    assert "resuming after step 2" in succeed(launch(*resolved, nproc=2))


def test_a_run_from_weights_without_a_tokenizer_is_resumed_with_its_own(
    launch: Launch, config: Path, folder: Path, tmp_path: Path
) -> None:
    source = shutil.copytree(folder, tmp_path / "source", ignore=shutil.ignore_patterns("*token*", "vocab*", "merges*"))
    common = ["--config", config, "--job.dump_folder", tmp_path / "run", "--model.hf_assets_path", source]
    assert "has no tokenizer: one was trained" in succeed(launch(*common, "--training.steps", 1)).replace("\n", " ")
    assert "resuming after step 1" in succeed(launch(*common, "--training.steps", 2))


# Mistakes


def flip(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 2] ^= 1
    path.write_bytes(raw)


def truncate(folder: Path) -> Path:
    path = sorted(folder.glob("*.safetensors"))[-1]
    path.write_bytes(path.read_bytes()[:-1])
    return path


@pytest.mark.parametrize("key", ["model.hf_assets_path", "checkpoint.initial_load_path"])
@pytest.mark.parametrize("nproc", [1, 2])
def test_a_truncated_file_ends_the_run_before_it_begins(
    launch: Launch, config: Path, folder: Path, tmp_path: Path, nproc: int, key: str
) -> None:
    broken = shutil.copytree(folder, tmp_path / "broken")
    file = truncate(broken)
    process = launch("--config", config, f"--{key}", broken, "--job.dump_folder", tmp_path / "out" / "run", nproc=nproc)
    assert f"{file}: is truncated" in fail(process)
    assert "tokenized" not in process.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["broken"]


@pytest.mark.parametrize("nproc", [1, 2])
def test_a_single_damaged_checkpoint_is_one_message(
    launch: Launch, config: Path, first: Path, tmp_path: Path, nproc: int
) -> None:
    source = shutil.copytree(first / "checkpoint" / f"step-{STEPS}", tmp_path / "source")
    flip(source / "__0_0.distcp")
    options = ["--checkpoint.initial_load_path", source, "--job.dump_folder", tmp_path / "run"]
    process = launch("--config", config, *options, nproc=nproc)
    assert f"{source}: __0_0.distcp has changed since it was written" in fail(process)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


MISTAKES: dict[str, tuple[list[str], str]] = {
    "two sources": (
        ["--model.hf_assets_path", "{folder}", "--checkpoint.initial_load_path", "{first}"],
        "a run starts from this or from model.hf_assets_path, not from both",
    ),
    "misspelled folder": (["--model.hf_assets_path", "{folder}s"], "did you mean {folder}?"),
    "misspelled run": (["--checkpoint.initial_load_path", "{first}s"], "did you mean {first}?"),
    "not on the Hub": (["--model.hf_assets_path", "someone/model"], "there is no folder someone/model here"),
    "another size": (
        ["--model.hf_assets_path", "{folder}", "--model.intermediate_size", "128"],
        "The [model] section overrides what config.json says",
    ),
    "another size than the run's": (
        ["--checkpoint.initial_load_path", "{first}", "--model.hidden_size", "128"],
        "its model.hidden_size is 64, not 128",
    ),
    "longer than the model is meant for": (
        ["--model.hf_assets_path", "{folder}", "--training.seq_len", "1024"],
        "model.max_position_embeddings = 512",
    ),
    "heads that cannot be shared": (
        ["--model.hf_assets_path", "{folder}", "--parallelism.tensor_parallel_degree", "16"],
        "16 ranks cannot share the 8 query heads",
    ),
}


@pytest.mark.parametrize(("options", "message"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_message_and_nothing_is_written(
    launch: Launch, config: Path, folder: Path, first: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    options = [option.format(folder=folder, first=first) for option in options]
    process = launch("--config", config, *options, "--job.dump_folder", tmp_path / "run")
    assert message.format(folder=folder, first=first) in fail(process)
    assert list(tmp_path.iterdir()) == []
