"""What of a configuration is verified: all of it where that fits the machine, else a small copy of the model."""

from __future__ import annotations

import dataclasses
from fnmatch import fnmatchcase
from typing import Any

from torchtitan_style.config import Config
from torchtitan_style.config.layout import Layout, plan_batch
from torchtitan_style.config.pipeline import num_stages
from torchtitan_style.config.schema import Data, Lora
from torchtitan_style.models.registry import model_config, spec_of
from torchtitan_style.models.trained import adaptable_modules, selects
from torchtitan_style.planner.memory import reference_bytes

from .layout import STEPS

_ROW = 256
"""Tokens of a row at most: longer ones show no more, and take longer."""


def for_verification(
    config: Config, layout: Layout, *, memory: int, alone: int, flops: float
) -> tuple[Config, list[str]]:
    """``config`` with rows, batch and, if it must be, model made small; and what was changed, in words.

    Layout, microbatches, compilation, recomputation and precision stay as they are. memory: bytes that
    may be used by all ranks; alone: by the one process that they are compared with. flops: floating-point operations
    that may be spent.
    """
    notes = []
    shape = model_config(config.model)
    lora = config.lora
    if shape.dropout or shape.attention_dropout or (lora.rank and lora.dropout):
        lora = lora.model_copy(update={"dropout": 0.0})
        shape = dataclasses.replace(shape, dropout=0.0, attention_dropout=0.0)
        notes.append("without dropout, which every layout draws differently")
    parallelism, plan = config.parallelism, plan_batch(config.training, layout.dp)
    # With a pipeline twice as many microbatches as stages, so that its schedule has a middle.
    local, accumulation = min(plan.local_batch_size, 2), min(plan.accumulation_steps, 2 * layout.pp)
    rows = local * accumulation * layout.dp
    multiple = layout.tp * (2 * layout.cp if layout.cp > 1 else 1)
    seq_len = min(config.training.seq_len, max(_ROW // multiple, 1) * multiple)
    if shape.use_sliding_window and shape.sliding_window >= seq_len > 1:
        shape = dataclasses.replace(shape, sliding_window=max(1, seq_len // 2))
        notes.append(f"with a sliding window of {shape.sliding_window} tokens, so that it matters in rows of {seq_len}")

    freeze = config.training.freeze
    passes = 1 if config.training.mixed_precision_param == "float32" else 2
    work = shape.flops_per_token(seq_len) * seq_len * rows * STEPS * (1 + passes)
    needed, needed_alone = reference_bytes(shape.num_parameters, layout)
    limits = (
        (needed > memory, f"{needed / 2**30:,.0f} GiB of memory"),
        (needed_alone > alone, f"{needed_alone / 2**30:,.0f} GiB of one device's memory"),
        (work > flops, f"{work / 1e12:,.0f} TFLOP of computation"),
    )
    if reason := next((text for exceeded, text in limits if exceeded), ""):
        small = _small_copy(shape, layout, config)
        notes.append(
            f"on a small copy of the model, since the full one needs {reason}: {small.num_hidden_layers} of "
            f"{shape.num_hidden_layers} layers, {small.hidden_size} wide instead of {shape.hidden_size}, heads of "
            f"{small.head_dim} instead of {shape.head_dim}, {small.vocab_size} of {shape.vocab_size} tokens; the same "
            f"{small.num_attention_heads} query and {small.num_key_value_heads} key/value heads, and what does not "
            "divide evenly by the ranks still does not"
        )
        shape = small
        lora, freeze, left_out = _patterns_of(small, config)
        notes += [f"without the pattern {pattern}, which matches nothing there" for pattern in left_out]
        parallelism = parallelism.model_copy(update={"pipeline_parallel_blocks": []})
    dimensions = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(shape).items()}
    update = {
        "model": config.model.model_copy(update={"hf_assets_path": "", **dimensions}),
        "training": config.training.model_copy(
            update={
                "freeze": freeze,
                "seq_len": seq_len,
                "local_batch_size": local,
                "global_batch_size": rows,
                "steps": max(config.training.steps, STEPS),
            }
        ),
        "lora": lora,
        "parallelism": parallelism,
        # Within the few steps that are compared the rate goes all the way up.
        "lr_scheduler": config.lr_scheduler.model_copy(
            update={"warmup_steps": min(config.lr_scheduler.warmup(config.training.steps), STEPS)}
        ),
        # No corpus is read.
        "data": Data(
            tokenizer="none",
            validation_fraction=config.data.validation_fraction,
            document_mask=config.data.document_mask,
        ),
        "checkpoint": config.checkpoint.model_copy(update={"initial_load_path": "", "load_step": -1}),
    }
    return config.model_copy(update=update), notes


def _small_copy(shape: Any, layout: Layout, config: Config) -> Any:
    """A model with the same heads, ties and windows, and dimensions that leave the same remainders."""
    ranks = layout.fsdp * layout.tp
    option = config.activation_checkpoint.selective_ac_option
    stages = num_stages(config.parallelism)
    layers = min(shape.num_hidden_layers, max(4, int(option) if option.isdecimal() else 0, stages + stages // 2))
    experts: dict[str, Any] = {}
    if hasattr(shape, "num_experts"):
        experts = {
            "moe_intermediate_size": min(shape.moe_intermediate_size, 64),
            "mlp_only_layers": tuple(layer for layer in shape.mlp_only_layers if layer < layers - 1),
            "decoder_sparse_step": min(shape.decoder_sparse_step, layers),
        }
    return dataclasses.replace(
        shape,
        **experts,
        num_hidden_layers=layers,
        max_window_layers=min(shape.max_window_layers, layers // 2 if shape.use_sliding_window else layers),
        hidden_size=_like(shape.hidden_size, 256, ranks),
        intermediate_size=_like(shape.intermediate_size, 512, ranks),
        vocab_size=_like(shape.vocab_size, 1024, ranks),
        head_dim=_like(shape.head_dim, 16, 2),
        max_position_embeddings=min(shape.max_position_embeddings, 40_960),
    )


def _like(size: int, target: int, ranks: int) -> int:
    """About ``target``, with the remainder that ``size`` has when divided by ``ranks``; at most ``size``."""
    return min(size, max(target // ranks, 1) * ranks + size % ranks)


def _patterns_of(shape: Any, config: Config) -> tuple[Lora, list[str], list[str]]:
    """[lora], without dropout, and training.freeze for a model of ``shape``; patterns that match nothing in it."""
    spec, lora = spec_of(config.model.name), config.lora
    modules, names = adaptable_modules(spec, shape), spec.parameter_shapes(shape)
    targets = [pattern for pattern in lora.target_modules if any(selects(pattern, module) for module in modules)]
    freeze = [pattern for pattern in config.training.freeze if any(fnmatchcase(name, pattern) for name in names)]
    given = (lora.target_modules if lora.rank else []) + config.training.freeze
    update = {"dropout": 0.0, "target_modules": targets or ["*"]}
    return lora.model_copy(update=update), freeze, [p for p in given if p not in [*targets, *freeze]]
