"""Combinations of settings that cannot work, found before anything heavy is imported."""

from __future__ import annotations

import difflib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torchtitan_style.common.extensions import LOSSES, OPTIMIZERS, SCHEDULES, SOURCES
from torchtitan_style.common.hub import FILE_ENDINGS

from .layout import Layout, plan_batch, plan_layout, plan_streams, reshards_after_forward
from .pipeline import schedule_problem
from .schema import Config, Corpus, Data, Muon, Validation

_TAKEN_NAMES = ("tokenizer", "manifest", "plan", "data_errors")
"""What else is in a prepared folder, beside a folder for each corpus."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong. ``keys``: the settings concerned as "section.key", the culprit first."""

    keys: tuple[str, ...]
    text: str


def cross_checks(config: Config, world_size: int | None) -> list[Problem]:
    """Everything that is wrong between settings that are right by themselves."""
    layout = [] if world_size is None else _layout(config, world_size)
    return [*layout, *_rest(config)]


def _layout(config: Config, world_size: int) -> Iterator[Problem]:
    degrees = tuple(
        f"parallelism.{key}"
        for key in (
            "tensor_parallel_degree",
            "pipeline_parallel_degree",
            "data_parallel_shard_degree",
            "data_parallel_replicate_degree",
            "context_parallel_degree",
            "expert_parallel_degree",
        )
    )
    try:
        layout = plan_layout(config.parallelism, world_size)
    except ValueError as error:
        yield Problem(degrees, str(error))
        return
    try:
        batch = plan_batch(config.training, layout.dp)
    except ValueError as error:
        yield Problem(("training.global_batch_size", "training.local_batch_size", *degrees), str(error))
        return
    if text := schedule_problem(config.parallelism, batch.accumulation_steps):
        yield Problem(
            ("parallelism.pipeline_parallel_schedule", "training.global_batch_size", "training.local_batch_size"), text
        )
    yield from _sharded_pipeline(config, layout)
    if config.data.streaming:
        try:
            plan_streams(config.data, batch.global_batch_size, layout.dp)
        except ValueError as error:
            yield Problem(("data.num_streams", "training.global_batch_size", *degrees), str(error))


def _sharded_pipeline(config: Config, layout: Layout) -> Iterator[Problem]:
    """How FSDP treats the stages of a pipeline."""
    parallelism = config.parallelism
    if layout.pp == 1:
        return
    if parallelism.fsdp_reduce_gradients == "each_microbatch":
        yield Problem(
            ("parallelism.fsdp_reduce_gradients", "parallelism.pipeline_parallel_degree"),
            '"each_microbatch" is not possible with a pipeline, whose stages sum their gradients once a step: leave it '
            'out, or set "last_microbatch"',
        )
    if parallelism.pipeline_parallel_schedule == "ZBVZeroBubble" and reshards_after_forward(parallelism):
        yield Problem(
            ("parallelism.fsdp_reshard_after_forward", "parallelism.pipeline_parallel_schedule"),
            "ZBVZeroBubble computes the gradients of weights after those of inputs, and needs the weights gathered: "
            'leave it out, or set "never"',
        )


def _pipeline(config: Config) -> Iterator[Problem]:
    """What a pipeline cannot be combined with, whatever the number of processes."""
    parallelism = config.parallelism
    if parallelism.pipeline_parallel_degree == 1:
        for key in ("pipeline_parallel_schedule", "pipeline_parallel_blocks"):
            if getattr(parallelism, key) != type(parallelism).model_fields[key].default:
                yield Problem(
                    (f"parallelism.{key}", "parallelism.pipeline_parallel_degree"),
                    "is only read with pipeline_parallel_degree of 2 or more",
                )
        return
    if parallelism.pipeline_parallel_schedule == "ZBVZeroBubble" and config.compile.enable:
        yield Problem(
            ("parallelism.pipeline_parallel_schedule", "compile.enable"),
            "ZBVZeroBubble computes the gradients of inputs and of weights apart, which a compiled block does at once: "
            "set compile.enable = false, or use Interleaved1F1B",
        )


def _names(config: Config) -> Iterator[Problem]:
    """Names of what can be registered (docs/extending.md) that were not."""
    for registry, key, name in (
        (LOSSES, "training.loss", config.training.loss),
        (OPTIMIZERS, "optimizer.name", config.optimizer.name),
        (SCHEDULES, "lr_scheduler.decay_type", config.lr_scheduler.decay_type),
        (SCHEDULES, "optimizer.muon.decay_type", config.optimizer.muon.decay_type),
    ):
        if name is not None and (text := registry.problem(name)):
            yield Problem((key,), text)
    if config.training.z_loss and config.training.loss != "cross_entropy":
        yield Problem(("training.z_loss", "training.loss"), 'is only added to loss = "cross_entropy"')


def _rest(config: Config) -> Iterator[Problem]:
    yield from _names(config)
    yield from _pipeline(config)
    tp, cp = config.parallelism.tensor_parallel_degree, config.parallelism.context_parallel_degree
    seq_len = config.training.seq_len
    if cp > 1 and seq_len % (2 * cp * tp):
        multiple = 2 * cp * tp
        fitting = sorted({max(seq_len // multiple, 1) * multiple, (seq_len // multiple + 1) * multiple})
        yield Problem(
            ("training.seq_len", "parallelism.context_parallel_degree", "parallelism.tensor_parallel_degree"),
            f"a row of {seq_len} positions cannot be split evenly over context_parallel_degree {cp} and "
            f"tensor_parallel_degree {tp}: it must be a multiple of 2 × {cp} × {tp} = {multiple}, as "
            f"{' or '.join(map(str, fitting))}",
        )
    elif seq_len % tp:
        yield Problem(
            ("parallelism.tensor_parallel_degree", "training.seq_len"),
            f"{tp} ranks cannot share the {seq_len} positions of a row (training.seq_len) evenly",
        )
    yield from _data(config.data, config.validation)
    yield from _validation_sets(config)
    if config.model.hf_assets_path and config.checkpoint.initial_load_path:
        yield Problem(
            ("checkpoint.initial_load_path", "model.hf_assets_path"),
            "a run starts from this or from model.hf_assets_path, not from both",
        )
    if config.validation.enable and config.validation.steps == 0:
        yield Problem(("validation.steps",), "must be -1 or at least 1; validation.enable = false turns it off")
    if config.optimizer.name != "muon" and config.optimizer.muon != Muon():
        changed = [key for key, value in config.optimizer.muon if value != getattr(Muon(), key)]
        yield Problem(
            (f"optimizer.muon.{changed[0]}", "optimizer.name"),
            f'is only read with optimizer.name = "muon", not with "{config.optimizer.name}"',
        )
    yield from _lora(config)
    option = config.activation_checkpoint.selective_ac_option
    if option != "op" and not (option.isdecimal() and int(option) >= 1):
        yield Problem(
            ("activation_checkpoint.selective_ac_option",),
            f'must be "op" or a number of blocks as "2", not "{option}"',
        )
    recompute, compiled = config.activation_checkpoint, config.compile
    if recompute.mode == "memory_budget" and not compiled.enable:
        yield Problem(
            ("activation_checkpoint.mode", "compile.enable"),
            '"memory_budget" is the compiler\'s choice: it needs compile.enable = true',
        )
    for axis, degree in (("tensor", tp), ("context", cp)):
        if recompute.mode == "memory_budget" and degree > 1:
            yield Problem(
                ("activation_checkpoint.mode", f"parallelism.{axis}_parallel_degree"),
                f'torch cannot weigh the activations of {axis}-parallel blocks: use "selective" or "full"',
            )
    if config.checkpoint.load_step > config.training.steps:
        yield Problem(
            ("checkpoint.load_step", "training.steps"),
            f"step {config.checkpoint.load_step} is past the {config.training.steps} training steps",
        )


def _lora(config: Config) -> Iterator[Problem]:
    if not config.lora.rank:
        return
    if config.training.freeze:
        yield Problem(
            ("training.freeze", "lora.rank"),
            "with adapters all weights are frozen; lora.target_modules says where there are adapters",
        )


def _data(data: Data, validation: Validation) -> Iterator[Problem]:
    yield from _corpus(data, "data.")
    if data.dataset == "mixture" and not data.mixture:
        yield Problem(
            ("data.mixture", "data.dataset"), 'dataset = "mixture" needs corpora: [[data.mixture]] with name and weight'
        )
    if data.dataset != "mixture" and data.mixture:
        yield Problem(
            ("data.dataset", "data.mixture"),
            f'[[data.mixture]] is only read with dataset = "mixture", not with "{data.dataset}"',
        )
    for number, corpus in enumerate(data.mixture, start=1):
        if corpus.name in [other.name for other in data.mixture[: number - 1]]:
            yield Problem(("data.mixture",), f'two corpora have the name "{corpus.name}"')
        if corpus.name.partition(".")[0] in _TAKEN_NAMES:
            yield Problem(("data.mixture",), f'the name "{corpus.name}" is taken; call the corpus something else')
        if corpus.dataset == "mixture":
            yield Problem(("data.mixture",), f"{corpus.name}: a mixture cannot be part of a mixture")
        for problem in _corpus(corpus, ""):
            yield Problem(("data.mixture",), f"{corpus.name}: {problem.keys[0]}: {problem.text}")
    if not data.streaming and data.num_streams != -1:
        yield Problem(("data.num_streams", "data.streaming"), "is only read with data.streaming = true")
    if data.streaming and data.prepared_folder:
        yield Problem(("data.prepared_folder", "data.streaming"), "is not used with data.streaming = true")
    if validation.enable and data.validation_fraction == 0 and not validation.sets:
        yield Problem(
            ("data.validation_fraction", "validation.enable"),
            "0 holds nothing out to validate on: raise it, or set validation.enable = false",
        )
    if validation.enable and data.validation_fraction > 0 and data.streaming and validation.steps == -1:
        yield Problem(
            ("validation.steps", "data.streaming"),
            "-1 would read a whole stream for its held-out rows: say how many batches, as 20",
        )


def _validation_sets(config: Config) -> Iterator[Problem]:
    sets, metric = config.validation.sets, config.checkpoint.best_metric
    names = [each.name for each in sets]
    for number, each in enumerate(sets):
        if each.name in names[:number]:
            yield Problem(("validation.sets",), f'two sets have the name "{each.name}"')
        if each.name.endswith(".tmp"):
            yield Problem(("validation.sets",), f'"{each.name}": a name that ends in .tmp is taken; choose another')
        if each.dataset == "mixture":
            yield Problem(("validation.sets",), f"{each.name}: a set cannot be a mixture; make it several sets")
            continue
        for problem in _corpus(each, ""):
            yield Problem(("validation.sets",), f"{each.name}: {problem.keys[0]}: {problem.text}")
    known = [*(["val_loss"] if config.data.validation_fraction else []), *(f"val_loss/{name}" for name in names)]
    if not known and metric == "val_loss":
        return  # nothing to validate on, which is told elsewhere
    if metric not in known and (config.validation.enable or metric != "val_loss"):
        near = difflib.get_close_matches(metric, known, n=1)
        hint = f"; did you mean {near[0]}?" if near and metric != "val_loss" else ""
        nothing = "; nothing of the corpus is held out (data.validation_fraction = 0)" if metric == "val_loss" else ""
        yield Problem(
            ("checkpoint.best_metric", "validation.sets", "data.validation_fraction"),
            f'must be {" or ".join(known) or "val_loss"}, not "{metric}"{nothing}{hint}',
        )


def _is_file(name: str) -> bool:
    """Whether ``name`` is a file, or a pattern or a name of files, where a dataset of the Hub could be meant."""
    path = os.path.expanduser(name)
    if os.path.isdir(path):
        return False
    return os.path.isfile(path) or "*" in name or "://" in name or Path(name.lower()).suffix in FILE_ENDINGS


def _corpus(corpus: Corpus, prefix: str) -> Iterator[Problem]:
    """What is wrong with one corpus; its keys begin with ``prefix``."""
    name = corpus.dataset
    if name == "files" and not corpus.paths:
        yield Problem(
            (f"{prefix}paths", f"{prefix}dataset"),
            'dataset = "files" needs the files: paths = ["my/*.txt", "more.jsonl"]',
        )
    if name != "files" and corpus.paths and not SOURCES.added(name):
        yield Problem(
            (f"{prefix}dataset", f"{prefix}paths"), f'paths is only read with dataset = "files", not with "{name}"'
        )
    if name not in SOURCES.names() and _is_file(name):
        yield Problem(
            (f"{prefix}dataset",),
            f'"{name}" is a file, not a dataset of the Hub: set dataset = "files" and paths = ["{name}"]',
        )
    elif name not in SOURCES.names() and "/" not in name and not os.path.isdir(name):
        near = difflib.get_close_matches(name, SOURCES.names(), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        yield Problem(
            (f"{prefix}dataset",),
            f'must be "stdlib", "files", "mixture" or a dataset of the Hub as "owner/name", not "{name}"{hint}',
        )
    yield from _keys_of_rows(corpus, prefix)
    if name in SOURCES.names() and not SOURCES.added(name):
        for key, default in (("subset", ""), ("split", "train")):
            if getattr(corpus, key) != default:
                yield Problem(
                    (f"{prefix}{key}", f"{prefix}dataset"), f'is only read with a dataset of the Hub, not "{name}"'
                )


def _keys_of_rows(corpus: Corpus, prefix: str) -> Iterator[Problem]:
    """Keys that say what of a row is read, where they do not apply."""

    def changed(*keys: str) -> list[str]:
        return [key for key in keys if getattr(corpus, key) != type(corpus).model_fields[key].default]

    if corpus.dataset == "mixture":
        for key in changed("text_key", "format", "messages_key", "train_on"):
            yield Problem((f"{prefix}{key}", f"{prefix}dataset"), f"each corpus of a mixture has a {key} of its own")
        return
    unread = ("text_key",) if corpus.format == "chat" else ("messages_key", "train_on")
    for key in changed(*unread):
        wanted = 'is not read with data.format = "chat"' if key == "text_key" else 'is only read with format = "chat"'
        instead = "; data.messages_key names the field with the messages" if key == "text_key" else ""
        yield Problem((f"{prefix}{key}", f"{prefix}format"), wanted + instead)
    if corpus.format == "chat" and (corpus.dataset == "stdlib" or SOURCES.added(corpus.dataset)):
        yield Problem(
            (f"{prefix}format", f"{prefix}dataset"),
            f'"{corpus.dataset}" gives texts; conversations come from files or a dataset of the Hub',
        )
