"""Fine-tuning with adapters, or with weights frozen, as whole processes: what is saved, how a run goes on, and what
PEFT and Transformers make of what it leaves."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
import transformers
from safetensors.torch import load_file, save_file
from tiny_hf import hf_model, write_tokenizer

from tests.conftest import ENVIRONMENT, Forks, Python
from tests.data.corpora import words, write_jsonl
from torchtitan_style.checkpoint.peft_export import export_adapter
from torchtitan_style.checkpoint.reader import SafeReader
from torchtitan_style.checkpoint.saved import SavedModel
from torchtitan_style.common.errors import UserError
from torchtitan_style.inference.load import load_model
from torchtitan_style.models.qwen3_moe.spec import QWEN3_MOE

Launch = Callable[..., subprocess.CompletedProcess[str]]
SEQ_LEN, STEPS = 32, 4
TARGETS = ("q_proj", "v_proj", "down_proj")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights to adapt, in several files. Not to be changed."""
    path = tmp_path_factory.mktemp("hf") / "model"
    hf_model(tie_word_embeddings=True).save_pretrained(path, max_shard_size="150KB")
    write_tokenizer(path)
    return path


@pytest.fixture(scope="module")
def config(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The settings of a short run in fp32 on a made-up corpus."""
    folder = tmp_path_factory.mktemp("corpus")
    write_jsonl(folder / "corpus.jsonl", words(100, lengths=(10, 60)))
    path = folder / "config.toml"
    path.write_text(f"""
[model]
hf_assets_path = "{base}"
[data]
dataset = "files"
paths = ["{folder}/corpus.jsonl"]
validation_fraction = 0.2
prepared_folder = "{folder}/prepared"
[training]
steps = {STEPS}
seq_len = {SEQ_LEN}
global_batch_size = 4
local_batch_size = -1
mixed_precision_param = "float32"
[lora]
rank = 4
alpha = 32
target_modules = {json.dumps(TARGETS)}
[optimizer]
lr = 1e-2
[lr_scheduler]
warmup_steps = 0
total_steps = {STEPS}
[checkpoint]
interval = 2
async_mode = "async"
[validation]
freq = 2
steps = 2
[generation]
max_new_tokens = 2
[metrics]
enable_tensorboard = false
""")
    return path


def succeed(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout


def fail(process: subprocess.CompletedProcess[str]) -> str:
    """The one message of a process that a mistake has ended."""
    assert process.returncode == 2, process.stdout + process.stderr
    assert "Traceback" not in process.stdout + process.stderr
    return " ".join(process.stderr.split())


def records(run: Path, key: str) -> dict[int, Any]:
    """``key`` by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return {line["step"]: line[key] for line in lines if key in line}


@pytest.fixture(scope="module")
def run(launch: Launch, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run on one process. Not to be changed."""
    folder = tmp_path_factory.mktemp("run") / "run"
    output = succeed(launch("--config", config, "--job.dump_folder", folder))
    # 2 layers × 4 × (64 + 128, 64 + 64, 96 + 64)
    trained = 2 * 4 * (64 + 128 + 64 + 64 + 96 + 64)
    everything = " ".join(output.split())
    assert f"training {trained / 1e6:.2f} M of" in everything
    assert "adapters of rank 4 on q_proj, v_proj, down_proj" in everything
    return folder


def tensors_in(checkpoint: Path) -> dict[str, Any]:
    return SafeReader(checkpoint).read_metadata().state_dict_metadata


def test_a_checkpoint_holds_adapters_and_their_optimizer_state_alone(run: Path) -> None:
    checkpoint = run / "checkpoint" / f"step-{STEPS}"
    names = set(tensors_in(checkpoint))
    weights = {name.removeprefix("model.") for name in names if name.startswith("model.")}
    modules = [f"model.layers.{i}.{m}" for i in (0, 1)
               for m in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")]  # fmt: skip
    assert weights == {f"{module}.lora_{factor}.weight" for module in modules for factor in "AB"}
    state = {f"optimizer.{name}.{key}" for name in weights for key in ("step", "exp_avg", "exp_avg_sq")}
    assert names == state | {f"model.{name}" for name in weights}
    assert (run / "checkpoint" / "best").exists()
    held = json.loads((checkpoint / "base.json").read_text())["hashes"]
    assert len(held) == sum(1 for _ in hf_model(tie_word_embeddings=True).named_parameters())


def test_losses_fall_and_layouts_agree(launch: Launch, config: Path, run: Path, tmp_path: Path) -> None:
    losses = records(run, "loss")
    assert losses[STEPS] < losses[1]
    options = ["--parallelism.tensor_parallel_degree", 2]
    succeed(launch("--config", config, "--job.dump_folder", tmp_path / "run", *options, nproc=4))
    assert records(tmp_path / "run", "loss") == pytest.approx(losses, rel=1e-5)
    assert records(tmp_path / "run", "grad_norm") == pytest.approx(records(run, "grad_norm"), rel=1e-4)
    assert records(tmp_path / "run", "batch_hash") == records(run, "batch_hash")


def test_a_run_resumes_on_another_layout_and_only_with_the_same_base(
    launch: Launch, config: Path, base: Path, run: Path, tmp_path: Path
) -> None:
    shutil.copytree(run, tmp_path / "run")
    for name in ("checkpoint/step-4", "checkpoint/best"):
        path = tmp_path / "run" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    shutil.copytree(base, tmp_path / "base")
    arguments = ["--config", config, "--job.dump_folder", tmp_path / "run", "--model.hf_assets_path", tmp_path / "base",
                 "--data.tokenizer", base]  # fmt: skip

    file = next(
        path for path in sorted((tmp_path / "base").glob("*.safetensors")) if "model.norm.weight" in load_file(path)
    )
    original, tensors = file.read_bytes(), load_file(file)
    tensors["model.norm.weight"][0] += 1
    save_file(tensors, file, metadata={"format": "pt"})
    message = fail(launch(*arguments))
    assert f"other weights than those now in {tmp_path / 'base'}: 1 of" in message
    assert "tensors differ: model.norm.weight;" in message

    file.write_bytes(original)
    for changed in (["--lora.rank", 8], ["--lora.alpha", 8]):
        assert "belongs to a different run: lora." in fail(launch(*arguments, *changed))
    pipeline = ["--parallelism.pipeline_parallel_degree", 2, "--training.local_batch_size", 1]
    succeed(launch(*arguments, *pipeline, nproc=2))
    assert list(records(tmp_path / "run", "loss")) == [3, 4]
    for step, loss in records(tmp_path / "run", "loss").items():
        assert loss == pytest.approx(records(run, "loss")[step], rel=1e-5)


def logits_of(model: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(ids).logits


def test_exports_are_what_was_trained(python: Python, base: Path, run: Path, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    ids = torch.arange(1, 41)[None]
    plain = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    before = logits_of(plain, ids)

    export = ["-m", "torchtitan_style", "export-hf", "--checkpoint", run, "--output"]
    succeed(python(*export, tmp_path / "adapter", "--adapter"))
    settings = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(settings["target_modules"]) == sorted(TARGETS)
    assert settings["base_model_name_or_path"] == str(base)
    adapted = peft.PeftModel.from_pretrained(plain, tmp_path / "adapter")
    by_peft = logits_of(adapted, ids)
    assert (by_peft - before).abs().max() > 1e-2

    # The adapters beside the weights, by hand.
    adapters = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert len(adapters) == 2 * 2 * len(TARGETS)

    succeed(python(*export, tmp_path / "merged", "--dtype", "float32"))
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    scale = by_peft.abs().max()
    assert (logits_of(merged, ids) - by_peft).abs().max() < 1e-5 * scale

    ours = load_model(run, dtype="float32")
    with torch.no_grad():
        assert (ours.model(ids) - by_peft).abs().max() < 1e-5 * scale
    assert "has no adapters" in fail(python(*export[:4], base, "--output", tmp_path / "none", "--adapter"))


def test_commands_take_a_checkpoint_of_adapters(python: Python, config: Path, base: Path, run: Path) -> None:
    output = " ".join(succeed(python("-m", "torchtitan_style", "checkpoint", "show", run)).split())
    assert "adapters 0.00 M parameters of rank 4" in output
    assert f"for the weights of {base}" in output
    succeed(python("-m", "torchtitan_style", "generate", "--checkpoint", run, "--prompt", "def", "--max-new-tokens", 3))
    data = config.with_name("corpus.jsonl")
    succeed(python("-m", "torchtitan_style", "eval", "--checkpoint", run, "--data", data, "--json"))


def test_frozen_parameters_stay_and_have_no_state(launch: Launch, config: Path, base: Path, tmp_path: Path) -> None:
    frozen = ["model.embed_tokens.weight", "model.layers.0.*"]
    arguments = ["--config", config, "--lora.rank", 0, "--training.steps", 2, "--training.freeze", *frozen]
    losses = []
    for nproc, options in ((1, []), (2, ["--parallelism.tensor_parallel_degree", 2])):
        folder = tmp_path / str(nproc)
        output = succeed(launch(*arguments, *options, "--job.dump_folder", folder, nproc=nproc))
        assert "training 0.0" in output
        losses.append(records(folder, "loss"))
        tensors = tensors_in(folder / "checkpoint" / "step-2")
        start, end = load_model(base, dtype="float32").model, load_model(folder, dtype="float32").model
        assert not any(f"optimizer.{name}.exp_avg" in tensors for name in tensors if ".layers.0." in name)
        assert "optimizer.model.layers.1.mlp.up_proj.weight.exp_avg" in tensors
        assert "model.model.layers.0.mlp.up_proj.weight" in tensors
        assert torch.equal(start.lm_head.matrix.weight, end.lm_head.matrix.weight)
        assert torch.equal(start.model.layers[0].qkv_proj.weight, end.model.layers[0].qkv_proj.weight)
        assert not torch.equal(start.model.layers[1].qkv_proj.weight, end.model.layers[1].qkv_proj.weight)
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


@pytest.mark.parametrize(("options", "message"), [
    (["--model.hf_assets_path", ""], "lora.rank: adapters need base weights"),
    (["--lora.target_modules", "lm_head"], '"lm_head" names no linear layer of attention or MLP: there are q_proj'),
    (["--training.freeze", "*norm*"], "training.freeze: with adapters all weights are frozen"),
    (["--optimizer.no_decay", "*norm*"], '"*norm*" matches no parameter that is trained'),
    (["--lora.rank", -1], "lora.rank: must be at least 0"),
    (["--model.hf_assets_path", "", "--model.name", "qwen3_moe", "--lora.target_modules", "*experts*"],
     "experts and their router cannot be adapted"),
])  # fmt: skip
def test_mistakes_are_named(launch: Launch, config: Path, tmp_path: Path, options: list[Any], message: str) -> None:
    assert message in fail(launch("--config", config, "--job.dump_folder", tmp_path / "run", *options))
    assert not (tmp_path / "run").exists()


def test_what_peft_would_take_for_experts_is_not_exported(tmp_path: Path) -> None:
    shape = {"name": "qwen3_moe", **asdict(QWEN3_MOE.flavors["debug"]), "mlp_only_layers": [1]}
    (tmp_path / "config.toml").write_text(tomli_w.dumps({"model": shape, "lora": {"rank": 4}}))
    with pytest.raises(UserError, match=r"PEFT mistakes model.layers.1.mlp.gate_proj for an expert"):
        export_adapter(SavedModel(tmp_path), tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_loading_a_base_holds_no_more_than_its_weights_in_bf16(
    forks: Forks, config: Path, base: Path, tmp_path: Path
) -> None:
    """Of a run on a base of 60 million parameters, beyond one on a tiny base: 2 bytes a parameter, and 1 to spare.
    Memory of the process's own; pages of the mapped file are the system's, which takes them back when it needs them."""
    large = hf_model(
        hidden_size=768, intermediate_size=3072, num_hidden_layers=6, num_attention_heads=12, num_key_value_heads=12,
        head_dim=64, max_window_layers=6, tie_word_embeddings=True,
    )  # fmt: skip
    parameters = sum(parameter.numel() for parameter in large.parameters())
    large.save_pretrained(tmp_path / "large")
    write_tokenizer(tmp_path / "large")
    peaks = []
    nothing = os.open(os.devnull, os.O_RDWR)
    for number, weights in enumerate((base, tmp_path / "large")):
        command = [
            "-m", "torchtitan_style", "train", "--config", str(config), "--job.dump_folder",
            str(tmp_path / f"run-{number}"), "--model.hf_assets_path", str(weights), "--training.steps", "1",
            "--training.mixed_precision_param", "bfloat16", "--checkpoint.async_mode", "disabled",
            "--training.local_batch_size", "1", "--validation.enable", "false",
            "--data.prepared_folder", str(tmp_path / f"prepared-{number}"),
        ]  # fmt: skip
        process, peak = forks.start(command, ENVIRONMENT, None, [nothing, nothing, nothing]), 0
        status = None
        while status is None:
            with contextlib.suppress(OSError, LookupError, ValueError):  # it has ended meanwhile
                found = Path(f"/proc/{process.pid}/status").read_text()
                peak = max(peak, 1024 * int(found.partition("RssAnon:")[2].split(maxsplit=1)[0]))
            with contextlib.suppress(TimeoutError):
                status = process.wait(0.01)
        process.close()
        assert status == 0
        peaks.append(peak)
    os.close(nothing)
    assert 1.9 * parameters < peaks[1] - peaks[0] < 3 * parameters, (parameters, peaks)
