"""Tokens per second of a training step: ours against Hugging Face Transformers' Qwen3, side by side.

    python benchmarks/train_step.py                       # the default model and batch
    python benchmarks/train_step.py --rows 4 --seq-len 512 --repeats 20

All contenders have the same dimensions, batch, optimizer (fused AdamW), clipping and bf16 compute
with fp32 master weights, and take turns step by step in one process, so that a slow moment of the
machine hits all of them. Figures are medians. Also measured: the share of the machine's own bf16
matrix-multiplication rate, and what our wrapping costs on one process against the bare model.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch
import transformers
from torch import nn

from torchtitan_style.config.layout import Layout
from torchtitan_style.config.schema import ActivationCheckpoint, Compile, Optimizer
from torchtitan_style.distributed.device import name, peak_flops, synchronize
from torchtitan_style.distributed.loss import chunked_cross_entropy
from torchtitan_style.distributed.world import World, init_world
from torchtitan_style.models.qwen3.config import FLAVORS, Qwen3Config
from torchtitan_style.models.qwen3.model import Qwen3ForCausalLM
from torchtitan_style.models.qwen3.parallelize import parallelize_qwen3
from torchtitan_style.optim.adamw import build_optimizer, step_if_finite
from torchtitan_style.optim.clip import clip_grad_norm_

Step = Callable[[], None]


def ours(config: Qwen3Config, world: World, batch: torch.Tensor, *, compile: bool) -> Step:
    """The training step of ``Trainer.train_step`` on one process."""
    model = Qwen3ForCausalLM(config).to(world.device)
    parallelize_qwen3(
        model,
        world.mesh,
        activation_checkpoint=ActivationCheckpoint(),
        compile=Compile(enable=compile),
        param_dtype=torch.bfloat16,
        reduce_dtype=torch.float32,
        reshard_after_forward=True,
    )
    return _our_step(model, batch)


def bare(config: Qwen3Config, world: World, batch: torch.Tensor, *, compile: bool) -> Step:
    """The same model, loss and optimizer in a bare loop: autocast makes the bf16 copies of the weights."""
    model = Qwen3ForCausalLM(config).to(world.device)
    model.lm_head.loss_function = chunked_cross_entropy(world.mesh["tp"].get_group(), compiled=compile)
    head = model.lm_head
    head.forward = lambda hidden, labels: head.loss_function(hidden, head.weight.to(torch.bfloat16), labels)
    if compile:
        for layer in model.model.layers:
            layer.forward = torch.compile(layer.forward)
    return _our_step(model, batch, autocast=True)


def _our_step(model: nn.Module, batch: torch.Tensor, *, autocast: bool = False) -> Step:
    optimizer = build_optimizer(model, Optimizer())
    inputs, labels = batch[:, :-1].contiguous(), batch[:, 1:].contiguous()

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(batch.device.type, torch.bfloat16, enabled=autocast):
            loss, _ = model(inputs, labels)
        (loss / labels.numel()).backward()
        step_if_finite(optimizer, clip_grad_norm_(model.parameters(), 1.0))

    return step


def hugging_face(config: Qwen3Config, world: World, batch: torch.Tensor, *, compile: bool) -> Step:
    """Transformers' model with its own loss, in a bare loop."""
    hf_config = transformers.Qwen3Config(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        tie_word_embeddings=config.tie_word_embeddings,
        max_position_embeddings=config.max_position_embeddings,
        use_cache=False,
    )
    model = transformers.Qwen3ForCausalLM(hf_config).to(world.device).train()
    if compile:
        model.compile()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-4, fused=True)
    inputs = batch[:, :-1].contiguous()

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(batch.device.type, torch.bfloat16):
            loss = model(input_ids=inputs, labels=inputs).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flavor", default="small", choices=FLAVORS)
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=256)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", help="also write the figures to this file")
    arguments = parser.parse_args()

    config = FLAVORS[arguments.flavor]
    world = init_world(Layout(1, 1, 1), timeout_seconds=600)
    shape = (arguments.rows, arguments.seq_len + 1)
    batch = torch.randint(0, config.vocab_size, shape, generator=torch.Generator().manual_seed(0)).to(world.device)
    build = {
        "ours, compiled": lambda: ours(config, world, batch, compile=True),
        "ours, eager": lambda: ours(config, world, batch, compile=False),
        "ours, unwrapped, compiled": lambda: bare(config, world, batch, compile=True),
        "ours, unwrapped, eager": lambda: bare(config, world, batch, compile=False),
        "HF Transformers, compiled": lambda: hugging_face(config, world, batch, compile=True),
        "HF Transformers, eager": lambda: hugging_face(config, world, batch, compile=False),
    }
    steps, seconds = {}, {}
    for label, make in build.items():
        steps[label] = make()
        start = time.perf_counter()
        for _ in range(3):
            steps[label]()
        synchronize(world.device)
        print(f"warmed up {label} in {time.perf_counter() - start:.1f} s", flush=True)
        seconds[label] = []
    for _ in range(arguments.repeats):
        for label, step in steps.items():
            start = time.perf_counter()
            step()
            synchronize(world.device)
            seconds[label].append(time.perf_counter() - start)

    peak = peak_flops(world.device, torch.bfloat16)
    tokens = arguments.rows * arguments.seq_len
    flops = config.flops_per_token(arguments.seq_len)
    figures = {label: tokens / statistics.median(times) for label, times in seconds.items()}
    best_hf = max(figures["HF Transformers, compiled"], figures["HF Transformers, eager"])
    print(
        f"\n{arguments.flavor}, {arguments.rows} rows of {arguments.seq_len}, {name(world.device)}, torch "
        f"{torch.__version__}, transformers {transformers.__version__}, medians of {arguments.repeats}"
    )
    print(f"{'':30} {'tokens/s':>10} {'of HF best':>11} {'of peak':>8}")
    for label, speed in figures.items():
        share = f"{speed * flops / peak:8.1%}" if peak else "       ?"
        print(f"{label:30} {speed:10,.0f} {speed / best_hf:10.2f}× {share}")
    for kind in ("compiled", "eager"):
        pairs = zip(seconds[f"ours, {kind}"], seconds[f"ours, unwrapped, {kind}"], strict=True)
        print(f"wrapping on one process, {kind}: {statistics.median(a / b for a, b in pairs) - 1:+.1%} time")
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"tokens_per_second": figures, "peak_flops": peak, "arguments": vars(arguments)}, file, indent=2)


if __name__ == "__main__":
    main()
