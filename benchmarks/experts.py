"""Time and memory of a training step with experts: ours, a dense model of ours, and Transformers' Qwen3-MoE.

    python benchmarks/experts.py                            # 90 M parameters, 16 experts, 4 active
    python benchmarks/experts.py --only "ours" --rows 2

All have the same batch, optimizer (fused AdamW on fp32 weights) and clipping, and compute in bf16, or in fp32 on CPUs
without. The dense model has the active floating-point operations of the others: its MLP is as wide as the chosen
experts together. "ours, ep 2" are two processes that share out the experts, with half the threads each. Contenders take
turns, as in train_step.py; ratios are medians over the turns.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import transformers
from race import Racer, Turns, machine, parsed, parser_of, race, serve, start, table, write
from train_step import bare_loop, precision, step_on, tokens

from torchtitan_style.config import Config
from torchtitan_style.config.files import DEFAULT_CONFIG
from torchtitan_style.config.layout import plan_layout
from torchtitan_style.distributed.world import init_world
from torchtitan_style.launch.configure import load_config
from torchtitan_style.models.registry import model_config
from torchtitan_style.models.trained import trained_shapes

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 512, 8, 8, 4, 64, 16_384
EXPERTS, ACTIVE, EXPERT_WIDTH = 16, 4, 384


def make_config(arguments: argparse.Namespace, *more: str, dense: bool = False, world_size: int = 1) -> Config:
    given: dict[str, Any] = {
        "training.seq_len": arguments.seq_len,
        "training.global_batch_size": arguments.rows,
        "training.local_batch_size": -1,
        "optimizer.name": "adamw",
        "lr_scheduler.warmup_steps": 0,
        "training.mixed_precision_param": precision(),
        "model.hidden_size": HIDDEN,
        "model.num_hidden_layers": LAYERS,
        "model.max_window_layers": LAYERS,
        "model.num_attention_heads": HEADS,
        "model.num_key_value_heads": KV_HEADS,
        "model.head_dim": HEAD_DIM,
        "model.vocab_size": VOCABULARY,
        "model.max_position_embeddings": max(512, arguments.seq_len),
        "model.intermediate_size": ACTIVE * EXPERT_WIDTH,
    }
    if not dense:
        given |= {
            "model.name": "qwen3_moe",
            "model.num_experts": EXPERTS,
            "model.num_experts_per_tok": ACTIVE,
            "model.moe_intermediate_size": EXPERT_WIDTH,
        }
    texts = [text for key, value in given.items() for text in (f"--{key}", str(value))]
    return load_config(DEFAULT_CONFIG, [*texts, *more], world_size=world_size)


def ours(arguments: argparse.Namespace, turns: Turns, compile: bool, dense: bool) -> None:
    config = make_config(arguments, "--compile.enable", str(compile).lower(), dense=dense)
    world = init_world(plan_layout(config.parallelism, 1), timeout_seconds=600)
    serve(turns, step_on(tokens(model_config(config.model), arguments, turns.device), config, world))


def ours_shared(arguments: argparse.Namespace, turns: Turns, compile: bool) -> None:
    """Experts over two processes, each of which has half of the rows."""
    more = ["--parallelism.expert_parallel_degree", "2", "--compile.enable", str(compile).lower()]
    config = make_config(arguments, *more, world_size=2)
    world = init_world(plan_layout(config.parallelism, 2), timeout_seconds=600)
    rows = tokens(model_config(config.model), arguments, turns.device).chunk(2)
    serve(turns, step_on(rows[world.dp_rank], config, world))


def hf(arguments: argparse.Namespace, turns: Turns, experts: str, compile: bool) -> None:
    """Transformers' model and losses in a bare loop. experts: its experts_implementation."""
    shape = model_config(make_config(arguments).model)
    transformers.logging.set_verbosity_error()
    config = transformers.Qwen3MoeConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        moe_intermediate_size=EXPERT_WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        head_dim=HEAD_DIM,
        num_experts=EXPERTS,
        num_experts_per_tok=ACTIVE,
        norm_topk_prob=shape.norm_topk_prob,
        output_router_logits=True,
        router_aux_loss_coef=shape.router_aux_loss_coef,
        tie_word_embeddings=shape.tie_word_embeddings,
        max_position_embeddings=shape.max_position_embeddings,
        use_cache=False,
    )
    model = transformers.Qwen3MoeForCausalLM._from_config(
        config, attn_implementation="sdpa", experts_implementation=experts, dtype=torch.float32
    )
    model.to(turns.device).train()
    if compile:
        model.compile()
    ids = tokens(shape, arguments, turns.device)[:, :-1].contiguous()
    bare_loop(turns, model, lambda: model(input_ids=ids, labels=ids).loss)


CONTENDERS: dict[str, tuple[Callable[..., None], tuple[Any, ...]]] = {
    "ours, compiled": (ours, (True, False)),
    "ours, eager": (ours, (False, False)),
    "ours, ep 2, compiled": (ours_shared, (True,)),
    "ours, ep 2, eager": (ours_shared, (False,)),
    "ours, dense, compiled": (ours, (True, True)),
    "ours, dense, eager": (ours, (False, True)),
    **{
        f"HF, {experts}, {'compiled' if compile else 'eager'}": (hf, (experts, compile))
        # batched_mm copies the weights of each token's experts: 1,024 tokens take more than 20 GB here.
        for experts in ("eager", "grouped_mm")
        for compile in (True, False)
    },
}
"""Name → function that serves it, and what it is given. The first is what the others are compared with."""


def main() -> None:
    parser = parser_of(__doc__, CONTENDERS, ["90M"])
    parser.set_defaults(model="90M")
    arguments = parsed(parser)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.serve:
        function, given = CONTENDERS[arguments.serve]
        function(arguments, Turns(device), *given)  # does not return

    def begin(name: str) -> Racer:
        processes = 2 if "ep 2" in name else 1
        threads = max(1, torch.get_num_threads() // 2) if processes > 1 else None
        racer = start(name, __file__, arguments, processes=processes, threads=threads)
        racer.warm_up(3)
        print(f"{name}: first step after {racer.first[0]:.1f} s", flush=True)
        return racer

    shapes = trained_shapes(make_config(arguments))
    total = sum(torch.Size(shape).numel() for shape in shapes.values())
    racers = race(list(CONTENDERS), begin, arguments)
    about = machine(device)
    per_step = arguments.rows * arguments.seq_len
    rows = [
        (
            racer.name,
            f"{per_step / racer.step_seconds:,.0f}",
            f"{racer.ratio:.2f}",
            f"{racer.memory / 2**20:,.0f}",
            f"{racer.memory / racers[0].memory:.2f}",
            f"{racer.first[0]:.1f}",
        )
        for racer in racers
    ]
    print(
        f"\n{total / 1e6:.0f} M parameters, {EXPERTS} experts, {ACTIVE} active, {arguments.rows} rows of "
        f"{arguments.seq_len}, {precision()}; {about['device']}, torch {about['torch']}, transformers "
        f"{transformers.__version__}; medians of {arguments.repeats} turns of {arguments.steps} steps\n"
    )
    heads = ("", "tokens/s", "× time of ours", "peak MiB", "× memory of ours", "first step, s")
    print(table(heads, rows))
    write(arguments, about, racers)


if __name__ == "__main__":
    main()
