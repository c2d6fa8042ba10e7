"""The model on its mesh, and one optimizer step of it.

``trainer.py`` calls these in its loop, and ``verification/layout.py`` on made-up batches: what is
verified is what trains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from torchtitan_style.common import device as devices
from torchtitan_style.common.extensions import LOSSES
from torchtitan_style.config import Config
from torchtitan_style.config.layout import reduces_each_microbatch, reshards_after_forward
from torchtitan_style.config.pipeline import Stage
from torchtitan_style.cpu.half_precision import multiply_in_fp32
from torchtitan_style.cpu.memory import keep_freed_memory
from torchtitan_style.data.loader import Batch, Microbatch
from torchtitan_style.distributed.context import Context
from torchtitan_style.distributed.custom_loss import custom_loss
from torchtitan_style.distributed.experts import expert_mesh
from torchtitan_style.distributed.init import init_weights
from torchtitan_style.distributed.pipeline import Activations, PipelinedModel, keep_stage
from torchtitan_style.distributed.world import World
from torchtitan_style.models.build import build_model
from torchtitan_style.models.lora import add_adapters, initial_std
from torchtitan_style.models.registry import model_config, spec_of
from torchtitan_style.models.stages import stages_of_ranks
from torchtitan_style.models.trained import adapted_modules, is_frozen
from torchtitan_style.optim.build import Optimizers
from torchtitan_style.optim.clip import clip_grad_norm_
from torchtitan_style.optim.guard import StepGuard

from .balance import Balance
from .observer import NO_OBSERVER, Observer

__all__ = [
    "DTYPES",
    "StepResult",
    "build_optimizer",
    "build_training_model",
    "draw_weights",
    "evaluating",
    "freeze",
    "mix",
    "train_step",
    "whole_rows",
]

DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What a step computed: tensors on the device, so that the loop need not wait for it."""

    loss: Tensor
    """Mean over all tokens of the step; 0-dim fp32, the same on all ranks."""
    grad_norm: Tensor
    """Global, before clipping; 0-dim fp32, the same on all ranks."""
    taken: Tensor
    """Whether the weights were updated; 0-dim bool, the same on all ranks."""
    update: Tensor
    """The number of this update (from 1), or that the update would have had; 0-dim int64, the same on all ranks."""
    batch_hash: int
    """This rank's share, signed; the shares of the dp ranks add up modulo 2⁶⁴."""
    padding: int = 0
    """Positions of this rank's rows that are padding."""
    corpus_rows: tuple[int, ...] = ()
    """This rank's rows from each corpus."""
    unreadable: int = 0
    """Documents that this rank could not read."""
    routing: Tensor | None = None
    """Of a model with experts: how they were used, see ``balance.py``; the same on all ranks."""


def build_training_model(config: Config, world: World, *, warn: Callable[[str], None]) -> Any:
    """The model of ``config``, laid out over the mesh, with its initial weights drawn."""
    spec = spec_of(config.model.name)
    param_dtype = DTYPES[config.training.mixed_precision_param]
    multiply_in_fp32(param_dtype, world.device)
    compile = config.compile
    if compile.enable and (problem := devices.compiler_problem(world.device)):
        warn(f"compile.enable: {problem}; training without compilation, which is slower")
        compile = compile.model_copy(update={"enable": False})

    if config.data.document_mask or any(model_config(config.model).windows):
        torch.backends.cuda.enable_cudnn_sdp(False)  # see without_cudnn_attention

    def lay_out(model: Any, stage: Stage | None = None) -> None:
        if stage is not None:
            keep_stage(model, stage)
        freeze(model, config)
        spec.parallelize(
            model,
            world.mesh,
            activation_checkpoint=config.activation_checkpoint,
            compile=compile,
            param_dtype=param_dtype,
            reduce_dtype=DTYPES[config.training.mixed_precision_reduce],
            reshard_after_forward=reshards_after_forward(config.parallelism),
            **({"expert_mesh": experts} if spec.expert_parallel else {}),
            **({"adapt": lambda model: add_adapters(model, config.lora, adapted)} if adapted else {}),
            **({"context": Context.of(world.cp_group)} if spec.context_parallel else {}),
        )

    shape = model_config(config.model)
    adapted = adapted_modules(spec, shape, config.lora)
    experts = expert_mesh(world) if spec.expert_parallel else None

    def build(stage: Stage | None = None) -> Any:
        model = build_model(
            spec,
            shape,
            device=world.device,
            lay_out=partial(lay_out, stage=stage),
            fill=partial(draw_weights, config=config),
            dtype=param_dtype if adapted else torch.float32,
        )
        if model.lm_head is not None:  # its attributes that training sets: see ModelSpec.build
            model.lm_head.z_loss = config.training.z_loss
            if LOSSES.added(config.training.loss):
                function = LOSSES.get(config.training.loss)
                model.lm_head.loss_function = custom_loss(function, world.mesh["tp"].get_group())
        return model

    if world.layout.pp == 1:
        return build().train()
    return PipelinedModel(
        [(stage, build(stage)) for stage in stages_of_ranks(config)[world.stage]],
        world=world,
        schedule=config.parallelism.pipeline_parallel_schedule,
        activations=Activations(shape.hidden_size, param_dtype, world.layout.tp),
        reduce_dtype=DTYPES[config.training.mixed_precision_reduce],
        tied=shape.tie_word_embeddings,
    ).train()


def draw_weights(model: Any, config: Config) -> None:
    """Draw the initial weights of ``model``. Those that LoRA adapts come from elsewhere, and are not drawn."""
    read_later = config.lora.rank and config.initial_weights
    of_base = (lambda name: math.nan) if read_later else None
    init_weights(model, seed=config.training.seed, initial_std=initial_std(model, of_base=of_base))


def freeze(model: Any, config: Config) -> None:
    """Have no gradients computed of parameters that are not trained."""
    embedding = "model.embed_tokens.weight"
    for name, parameter in model.named_parameters():
        # A tied head by itself is the copy of a pipeline's last stage.
        tied = name == "lm_head.weight" and model.config.tie_word_embeddings
        parameter.requires_grad_(not is_frozen(embedding if tied else name, config))


def build_optimizer(model: nn.Module, config: Config, world: World) -> Optimizers:
    """The optimizer of ``config`` for a model that is laid out already."""
    return Optimizers(
        model,
        config.optimizer,
        config.lr_scheduler,
        total_steps=config.training.steps,
        dtype=DTYPES[config.training.mixed_precision_param],
        spec=spec_of(config.model.name),
        head_dim=model_config(config.model).head_dim,
        group=world.stage_group,
    )


def train_step(
    model: nn.Module,
    optimizer: Optimizers,
    batch: Batch,
    *,
    step: int,
    config: Config,
    world: World,
    guard: StepGuard,
    observer: Observer = NO_OBSERVER,
) -> StepResult:
    """Accumulate gradients over the microbatches, clip, update if ``guard`` admits it. ``step`` counts from 1."""
    # Drop-out draws depend on the seed, the step and the rank, so there is no state to save.
    torch.manual_seed(mix(config.training.seed, step, world.rank))

    optimizer.zero_grad()
    # The loss is a mean over all tokens of the step, whichever rank or microbatch has them.
    tokens = torch.stack([(part.labels != -100).sum() for part in batch.microbatches]).sum()
    dist.all_reduce(tokens, group=world.batch_group)
    tokens.clamp_(min=1)  # of rows of conversations that are cut, none may be trained on
    balance = Balance.of(model, batch.microbatches, world)
    reduce_each = reduces_each_microbatch(config.parallelism, world.layout)
    loss = forward_backward(model, batch.microbatches, tokens, balance, reduce_each=reduce_each)
    loss *= world.counts
    observer.after_backward(step, model, loss)
    grad_norm = clip_grad_norm_(model.parameters(), config.training.max_norm, beside=loss)
    taken = guard.admits(loss.float(), grad_norm)
    update = optimizer.updates + 1
    optimizer.step_if(taken)
    keep_freed_memory(world.device)
    return StepResult(
        loss=loss.float(),
        grad_norm=grad_norm,
        taken=taken,
        update=update,
        batch_hash=batch.hash,
        padding=batch.padding,
        corpus_rows=batch.corpus_rows,
        unreadable=len(batch.problems),
        routing=None if balance is None else balance.sums(),
    )


def forward_backward(
    model: nn.Module,
    microbatches: Sequence[Microbatch],
    tokens: Tensor,
    balance: Balance | None = None,
    *,
    reduce_each: bool = False,
) -> Tensor:
    """Add the gradients of this rank's share of the loss to those that are there.

    tokens: how many labels the whole step has; a 0-dim integer. balance: of a model with experts, whose losses have
    their gradients added, but are not part of what is returned. reduce_each: sum sharded gradients over the ranks after
    each microbatch, so that none is held whole; replicas are summed after the last in any case. Returns the share,
    0-dim fp64: the loss is the sum of the shares of all ranks that hold different tokens.
    """
    if isinstance(model, PipelinedModel):
        if balance is None:
            return model.forward_backward(microbatches, tokens)
        return model.forward_backward(microbatches, tokens, start=balance.start, loss_of=balance.loss)
    loss = torch.zeros((), dtype=torch.float64, device=tokens.device)
    if balance is not None:
        balance.start()
    for i, microbatch in enumerate(microbatches, start=1):
        if isinstance(model, FSDPModule):
            last = i == len(microbatches)
            model.set_requires_gradient_sync(last or reduce_each)
            model.set_requires_all_reduce(last)
        loss_sum, _ = model(*microbatch)
        share = loss_sum / tokens
        (share if balance is None else share + balance.loss(model.model)).backward()
        loss += share.detach()
    return loss


@contextlib.contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, no gradients, and no compiled graphs: other shapes would be compiled anew."""
    model.eval()
    if isinstance(model, PipelinedModel):
        model.prepare_evaluation()
    try:
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), devices.without_cudnn_attention():
            yield
    finally:
        model.train()
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()  # no backward pass does it


@contextlib.contextmanager
def whole_rows(model: nn.Module) -> Iterator[None]:
    """Each rank is given whole rows, also where it has a part of each otherwise."""
    parts = [(module, module.part) for module in model.modules() if getattr(module, "part", None) is not None]
    for module, _ in parts:
        module.part = None  # type: ignore[assignment]
    try:
        yield
    finally:
        for module, part in parts:
            module.part = part


def mix(*numbers: int) -> int:
    """A seed of 63 bits from several numbers."""
    digest = hashlib.blake2b("/".join(map(str, numbers)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
