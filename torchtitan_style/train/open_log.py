"""What a run prints and writes before its first step: the header, config.toml, and the log."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from pathlib import Path

from torchtitan_style.common import device as devices
from torchtitan_style.config import Config, to_toml
from torchtitan_style.cpu.half_precision import multiply_in_fp32
from torchtitan_style.distributed.world import World
from torchtitan_style.metrics.display import Display
from torchtitan_style.metrics.experts import ExpertUse
from torchtitan_style.metrics.log import DescribeRouting, TrainingLog
from torchtitan_style.metrics.planned import MakePlan
from torchtitan_style.metrics.throughput import Meter
from torchtitan_style.models.registry import model_config, spec_of
from torchtitan_style.models.spec import describe_size
from torchtitan_style.models.trained import adapted_modules, trained_shapes

from .data import RunData
from .preempted import clear_preempted
from .state import TrainState
from .step import DTYPES


def open_log(
    config: Config,
    world: World,
    state: TrainState,
    data: RunData,
    *,
    display: Display,
    meter: Meter,
    learning_rates: Callable[[int], dict[str, float]],
    plan: MakePlan | None,
) -> TrainingLog:
    """Print the header, and open the log for the steps after ``state.step``. Called by all ranks.

    plan: compared once with what is measured.
    """
    folder = Path(config.job.dump_folder)
    if world.is_main:
        (folder / "config.toml").write_text(to_toml(config), encoding="utf-8")
        clear_preempted(folder)
    for line in _header(config, world, state, data, meter):
        display.say(line)
    return TrainingLog(
        config.metrics,
        world,
        display,
        folder,
        first_step=state.step,
        last_step=config.training.steps,
        tokens_per_step=data.batch_plan.global_batch_size * config.training.seq_len,
        meter=meter,
        learning_rates=learning_rates,
        settings=config.model_dump(),
        corpora=data.mixture,
        report_padding=config.data.packing == "best_fit",
        plan=plan,
        describe_routing=_describe_routing(config, display),
    )


def _describe_routing(config: Config, display: Display) -> DescribeRouting | None:
    """How the log reads ``StepResult.routing``; None if the model has no experts."""
    if not spec_of(config.model.name).expert_parallel:
        return None
    shape = model_config(config.model)
    return functools.partial(
        ExpertUse(display.warn).figures,
        sparse_layers=[layer for layer in range(shape.num_hidden_layers) if shape.is_sparse(layer)],
        experts_per_token=shape.num_experts_per_tok,
    )


def _header(config: Config, world: World, state: TrainState, data: RunData, meter: Meter) -> Iterator[str]:
    """Lines about the model, the hardware, the steps and the data; where the run resumes, if it does."""
    layout, training, plan = world.layout, config.training, data.batch_plan
    processes = f"{layout.world_size} × " if layout.world_size > 1 else ""
    precision: str = training.mixed_precision_param
    if multiply_in_fp32(DTYPES[precision], world.device):
        precision += " (multiplied in float32, as this CPU has no instructions for it)"
    yield (
        f"{config.model.name} {config.initial_weights or config.model.flavor}, "
        f"{describe_size(model_config(config.model))}, {precision}, on {processes}{devices.name(world.device)}"
        + (f" ({layout})" if processes else "")
    )
    if config.lora.rank or training.freeze:
        yield _describe_trained(config)
    if peak := meter.describe_peak():
        yield peak
    microbatches = f" in {plan.accumulation_steps} microbatches" if plan.accumulation_steps > 1 else ""
    yield (
        f"{training.steps} steps of {plan.global_batch_size} rows of {training.seq_len} tokens{microbatches}, "
        f"{data.describe()}, into {config.job.dump_folder}"
    )
    yield from data.describe_chat()
    if state.step:
        yield f"resuming after step {state.step}{data.resuming(state.data)}"


def _describe_trained(config: Config) -> str:
    """How many of the parameters are trained."""
    spec, shape = spec_of(config.model.name), model_config(config.model)
    trained = sum(math.prod(size) for size in trained_shapes(config).values())
    adapted = adapted_modules(spec, shape, config.lora)
    adapters = trained if adapted else 0
    text = f"training {trained / 1e6:,.2f} M of {(shape.num_parameters + adapters) / 1e6:,.2f} M parameters"
    if not adapted:
        return text
    kinds = ", ".join(dict.fromkeys(module.rpartition(".")[2] for module in adapted))
    return f"{text}: adapters of rank {config.lora.rank} on {kinds}"
