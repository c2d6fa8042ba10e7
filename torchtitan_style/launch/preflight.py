"""Checks of everything that can be checked before anything is built. Needs no torch."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import math
import shutil
import tempfile
from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from torchtitan_style.checkpoint.folder import CheckpointFolder
from torchtitan_style.checkpoint.saved import find_checkpoint, open_model
from torchtitan_style.common.errors import UserError
from torchtitan_style.common.files import nearest_existing, readable_bytes
from torchtitan_style.common.memory import gpu_memory, host_memory
from torchtitan_style.config import Config
from torchtitan_style.config.layout import Layout, plan_batch, plan_layout
from torchtitan_style.config.pipeline import bubble
from torchtitan_style.models.registry import model_config, spec_of
from torchtitan_style.models.trained import trained_shapes
from torchtitan_style.planner.devices import Assumptions, generic_device
from torchtitan_style.planner.memory import KINDS, checkpoint_bytes, plan_memory
from torchtitan_style.planner.search import nearest_that_fits, overrides_of
from torchtitan_style.train.identity import check_before_start

from .arguments import environment_endpoint
from .run_lock import check_free
from .wandb_login import check_wandb

OLDEST_TORCH = (2, 11)
OLDEST_TORCH_OF = {"ZBVZeroBubble": (2, 13)}
"""Of a pipeline schedule. torch 2.11 ends with an error, or the process with it, as it connects stages in a V."""


def preflight(
    config: Config,
    *,
    world_size: int,
    say: Callable[[str], None],
    is_first: bool = True,
    ranks_here: int = 1,
    on_gpus: bool = False,
    notes: Sequence[str] = (),
) -> None:
    """Raise UserError if the run cannot work.

    Checks the dump folder (writable, not in use, enough disk space, no checkpoints of a different run), the login for
    Weights & Biases, patterns that match no parameter, and memory.

    is_first: whether this host writes the folder. ranks_here: processes on this host. notes: further warnings to print.
    """
    folder = Path(config.job.dump_folder)
    check_writable(folder)
    if is_first:
        check_free(folder, run=environment_endpoint())
        if config.metrics.enable_wandb:  # by the first rank, which is here
            check_wandb()
    check_adapters(config)
    check_patterns(config)
    layout = plan_layout(config.parallelism, world_size)
    check_before_start(config, dp=layout.dp)
    check_memory(config, layout, say, ranks_here=ranks_here, on_gpus=on_gpus)
    check_schedule(config)
    check_pipeline(config, layout, say)
    check_room(config, say)
    for note in notes:
        say(f"warning: {note}")


def check_torch() -> None:
    """Raise UserError if torch is missing or too old, without the seconds that importing it takes."""
    if torch_version() < OLDEST_TORCH:
        raise UserError(_too_old("the oldest that works is", OLDEST_TORCH))


def check_schedule(config: Config) -> None:
    """Raise UserError if torch is too old for the schedule of the pipeline, if there is one."""
    parallelism = config.parallelism
    oldest = OLDEST_TORCH_OF.get(parallelism.pipeline_parallel_schedule)
    if parallelism.pipeline_parallel_degree > 1 and oldest and torch_version() < oldest:
        schedule = parallelism.pipeline_parallel_schedule
        raise UserError(
            f"parallelism.pipeline_parallel_schedule: {_too_old(f'{schedule} needs', oldest)}; or use Interleaved1F1B"
        )


def torch_version() -> tuple[int, int]:
    """Raises UserError if torch is missing."""
    try:
        major, minor = importlib.metadata.version("torch").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        raise UserError("torch is not installed here; ./run_train.sh sets everything up") from None
    return int(major), int(minor)


def _too_old(needs: str, oldest: tuple[int, int]) -> str:
    here = importlib.metadata.version("torch")
    return f"torch {here} is too old: {needs} {oldest[0]}.{oldest[1]}; ./run_train.sh sets everything up"


def check_initial_weights(config: Config) -> None:
    """Raise UserError if the weights that a new run starts from are missing, damaged, or of a different model."""
    source = config.initial_weights
    if source and find_checkpoint(Path(config.job.dump_folder), verify=False) is None:
        found = open_model(source, verify=True)
        found.check(model_config(config.model))


def check_writable(folder: Path) -> None:
    """Raise UserError if ``folder``, which need not exist, cannot be created or written to."""
    try:
        with tempfile.TemporaryFile(dir=nearest_existing(folder)):
            pass
    except OSError as error:
        raise UserError(f"job.dump_folder: {folder} cannot be written: {error.strerror}") from None


def check_patterns(config: Config) -> None:
    """Raise UserError if a pattern matches no parameter name, which silently has no effect, or nothing is trained."""
    trained = trained_shapes(config)
    every = spec_of(config.model.name).parameter_shapes(model_config(config.model))
    for key, patterns, names, what in (
        ("optimizer.no_decay", config.optimizer.no_decay, trained, "parameter that is trained"),
        ("training.freeze", config.training.freeze, every, "parameter"),
    ):
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in names):
                raise UserError(
                    f'{key}: "{pattern}" matches no {what}; names are as {next(iter(names), "?")}, and * matches '
                    "anything, as in *embed_tokens*"
                )
    if not trained:
        raise UserError("training.freeze: freezes every parameter; leave something to train")


def check_adapters(config: Config) -> None:
    """Raise UserError if there are no weights to adapt."""
    if config.lora.rank and not config.initial_weights:
        raise UserError(
            "lora.rank: adapters need base weights: name them with model.hf_assets_path, or "
            "checkpoint.initial_load_path for a checkpoint of this program"
        )


def check_memory(config: Config, layout: Layout, say: Callable[[str], None], *, ranks_here: int, on_gpus: bool) -> None:
    """Raise UserError if weights, gradients and optimizer state exceed the memory of this host's ranks. Warn if they
    exceed what is free, or exceed the memory together with the activations."""
    room = gpu_memory() if on_gpus else host_memory()
    if room is None:
        return
    plan = plan_memory(config, layout, on_gpu=on_gpus)
    sharing = 1 if on_gpus else ranks_here  # each rank has a GPU of its own; on CPU they share the host's memory
    state, total = sharing * plan.state.total, sharing * plan.total
    place = "a GPU" if on_gpus else "this host"
    ranks = f"{sharing} processes: " if sharing > 1 else ""

    def text(how: str, needed: int, parts: dict[str, int]) -> str:
        named = ", ".join(f"{KINDS[kind]} {readable_bytes(sharing * size)}" for kind, size in parts.items() if size)
        return f"training takes {how} {readable_bytes(needed)} of memory on {place} ({ranks}{named})"

    if state > room.total:
        raise UserError(
            f"{text('at least', state, dataclasses.asdict(plan.state))}, but it has {readable_bytes(room.total)}: "
            "choose a smaller model (model.flavor), or split it over more GPUs or hosts (docs/planning.md)"
        )
    if total > room.total:
        what_fits = _what_fits(config, layout, room.total // sharing, on_gpus, ranks_here)
        say(f"warning: {text('about', total, plan.peak)}, but it has {readable_bytes(room.total)}; {what_fits}")
    elif total > room.free:
        say(f"warning: {text('about', total, plan.peak)}, but only {readable_bytes(room.free)} are free")


def check_pipeline(config: Config, layout: Layout, say: Callable[[str], None]) -> None:
    """Warn of a pipeline that stands idle for a third of its time or more."""
    microbatches = plan_batch(config.training, layout.dp).accumulation_steps
    extra = bubble(config.parallelism.pipeline_parallel_schedule, pp=layout.pp, microbatches=microbatches)
    if (idle := extra / (1 + extra)) >= 1 / 3:
        named = "1 microbatch" if microbatches == 1 else f"{microbatches} microbatches"
        say(
            f"warning: with {named} a step the {layout.pp} pipeline ranks stand idle {idle:.0%} of the time; a smaller "
            "training.local_batch_size, or a larger training.global_batch_size, makes more"
        )


def _what_fits(config: Config, layout: Layout, memory: int, on_gpus: bool, ranks_here: int) -> str:
    """The nearest settings that fit into ``memory`` bytes of a rank, in words."""
    device = generic_device(memory, on_gpu=on_gpus, ranks=ranks_here)
    found = nearest_that_fits(config, layout, device, Assumptions())
    if found is None:
        return "no layout of that many processes fits; plan --search finds how many do"
    return f"this fits: {overrides_of(found)}"


def check_room(config: Config, say: Callable[[str], None]) -> None:
    """Print how much disk space the run's checkpoints take; raise UserError if less is free."""
    checkpoint, folder = config.checkpoint, Path(config.job.dump_folder)
    if not checkpoint.enable:
        return
    size, steps = checkpoint_bytes(config), config.training.steps
    saves = math.ceil(steps / checkpoint.interval)
    kept = min(saves, checkpoint.keep_latest_k) if checkpoint.keep_latest_k else saves
    if checkpoint.keep_latest_k and checkpoint.keep_every:
        kept += steps // math.lcm(checkpoint.interval, checkpoint.keep_every)
    kept += config.validation.enable and checkpoint.keep_best
    kept += bool(checkpoint.keep_latest_k)  # an older one is deleted after a newer one is written
    have = len(CheckpointFolder(folder / "checkpoint").steps())
    needed = max(0, kept - have) * size
    free = shutil.disk_usage(nearest_existing(folder)).free
    text = f"checkpoints take about {readable_bytes(size)} each, at most {readable_bytes(kept * size)} at once"
    if needed > free:
        fewer = "lower checkpoint.keep_latest_k" if checkpoint.keep_latest_k else "set checkpoint.keep_latest_k"
        raise UserError(
            f"job.dump_folder: {text}, but only {readable_bytes(free)} are free in {folder}: {fewer}, or use another "
            "--job.dump_folder"
        )
    say(f"{text}; {readable_bytes(free)} are free")
