"""Pipeline parallelism: a rank holds some blocks of the model, and microbatches pass from rank to rank.

Huang et al. 2019 (GPipe); Narayanan et al. 2019 (1F1B) and 2021 (interleaved stages); Qi et al. 2023 (zero bubble).
The order of passes is that of ``torch.distributed.pipelining``. A stage is the whole model with parts missing, so
parameters have the names that they have in the whole model, and nothing else need know of stages.

A tied embedding is needed on two stages. The first stage has the parameter. The last one's head is a copy, without
optimizer state: each step begins by sending it the weights and ends by sending back its gradient, which is added to
the embedding's. So the parameter is counted, updated and saved once. With a V of stages both are on the same rank.

Shapes: B rows of a microbatch, T positions, C hidden size.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from torchtitan_style.config.kinds import PipelineSchedule
from torchtitan_style.config.pipeline import Stage, rank_of_stage

from .local import local_tensor
from .tensor import with_gradient
from .weight_gradients import WeightGradients
from .world import World


def keep_stage(model: Any, stage: Stage) -> None:
    """Leave of ``model``, on the meta device, what ``stage`` has, in place: all else is None."""
    for i in range(len(model.model.layers)):
        if i not in stage.blocks:
            model.model.layers[i] = None
    if not stage.is_first:
        model.model.embed_tokens = None
        if stage.is_last and model.config.tie_word_embeddings:  # the copy is a parameter of its own
            model.lm_head.weight = nn.Parameter(torch.empty_like(model.lm_head.weight))
    if not stage.is_last:
        model.model.norm = model.lm_head = None


@dataclass(frozen=True)
class Activations:
    """What passes from stage to stage, as a rank sees it."""

    hidden_size: int
    dtype: torch.dtype
    tp: int
    """Ranks that share the positions of a row between blocks."""

    def empty(self, like: Tensor, *, device: torch.device | str) -> Tensor:
        """Hidden states for token ids like ``like`` [B, T]: [B, T / tp, C]."""
        b, t = like.shape
        return torch.empty(b, t // self.tp, self.hidden_size, dtype=self.dtype, device=device)


class PipelinedModel(nn.Module):
    """This rank's stages, in the place of the model. Its parameters are those of its stages, under their names in the
    whole model, a tied head's copy left out. Methods are called by all ranks together.

    parts: each stage of this rank, laid out and with weights, by its description, in the order of the pipeline.
    reduce_dtype: what FSDP reduces gradients in. tied: whether the head uses the embedding's matrix.
    """

    def __init__(
        self,
        parts: Sequence[tuple[Stage, Any]],
        *,
        world: World,
        schedule: PipelineSchedule,
        activations: Activations,
        reduce_dtype: torch.dtype,
        tied: bool,
    ) -> None:
        super().__init__()
        self.config = parts[0][1].config
        self.stages = [stage for stage, _ in parts]
        self.parts = nn.ModuleList(part for _, part in parts)
        self.loss_of: Callable[[Any], Tensor] | None = None
        """What a part of the model adds to the loss of its last forward pass, while training; None: nothing."""
        for _, part in parts:
            part.model.register_forward_hook(self._add_loss)
        self.schedule, self.activations, self.device = schedule, activations, world.device
        self.pp_group = world.pp_group
        self.first = next((part for stage, part in parts if stage.is_first), None)
        self.last = next((part for stage, part in parts if stage.is_last), None)
        if self.first is not None and not self.first.model.embed_tokens.weight.requires_grad:
            # torch has every stage send gradients back to the one before, and compute some itself.
            self.first.model.embed_tokens.register_forward_hook(with_gradient)
        self.tied = _TiedHead(self.first, self.last, self.rank_of(0), self.rank_of(-1), self.pp_group) if tied else None
        self.postponed: list[WeightGradients] | None = None
        """What the backward passes of each part leave for later."""
        if schedule == "ZBVZeroBubble":
            self.postponed = [WeightGradients(part, reduce_dtype) for part in self.parts]
        self._schedules: dict[tuple[int, torch.Size], Any] = {}
        self._tokens = torch.ones(())
        self._sent: list[tuple[dist.Work, Tensor]] = []
        """Hidden states of the last forward pass that are on their way."""

    def named_parameters(self, *args: Any, **named: Any) -> Iterator[tuple[str, nn.Parameter]]:
        for part in self.parts:
            for name, parameter in part.named_parameters(*args, **named):
                if self.tied is None or parameter is not self.tied.copy:
                    yield name, parameter

    @property
    def stage_of(self) -> dict[str, int]:
        """The stage of each parameter of this rank, by name."""
        parts = zip(self.stages, self.parts, strict=True)
        return {name: stage.index for stage, part in parts for name, _ in part.named_parameters()}

    def rank_of(self, stage: int) -> int:
        """The rank on the pp axis that runs ``stage``; -1: the last."""
        stages = self.stages[0].count
        return rank_of_stage(stage % stages, pp=self.pp_group.size(), schedule=self.schedule)

    @property
    def source(self) -> int:
        """A rank, of all, that has the output of the last stage."""
        group = dist.get_process_group_ranks(self.pp_group)
        # The first rank of the last stage: stages are the outermost axis.
        return group[self.rank_of(-1)] - group[0] % (dist.get_world_size() // self.pp_group.size())

    # Training

    def forward_backward(
        self,
        microbatches: Sequence[Sequence[Tensor | None]],
        tokens: Tensor,
        *,
        start: Callable[[], None] | None = None,
        loss_of: Callable[[Any], Tensor] | None = None,
    ) -> Tensor:
        """Add the gradients of the loss of ``microbatches`` to those that are there, summed over FSDP's ranks.

        microbatches: (token ids, labels, documents or None, positions or None), each [B, T]. tokens: what the loss is
        divided by. start: called before the first microbatch, once the copy of a tied embedding is up to date: a pass
        before that would leave FSDP with old weights. loss_of: what each stage adds to the loss by itself, given its
        ``model.model`` after each forward pass; its gradients are added, but it is not part of what is returned.
        Returns the loss, 0-dim fp64; 0 but on the ranks of the last stage.
        """
        self.loss_of = loss_of
        self.wait()
        if self.tied is not None:
            self.tied.send_weights()
        if start is not None:
            start()
            self.wait()
        self._tokens = tokens
        inputs, labels, documents, positions = (
            None if parts[0] is None else torch.cat(parts) for parts in zip(*map(_four, microbatches), strict=True)
        )
        if positions is None:  # a row for each microbatch, which stands for all its rows
            positions = _positions(inputs).expand(len(microbatches), -1)
        named = {"labels": labels, "documents": documents, "positions": positions}
        losses: list[Tensor] = []
        self._schedule_for(len(microbatches), microbatches[0][0]).step(
            *([inputs] if self.first is not None else []),
            target=labels if self.last is not None else None,
            losses=losses,
            return_outputs=False,
            **{name: value for name, value in named.items() if value is not None},
        )
        if self.tied is not None:
            self.tied.sum_gradients()
        if not losses:
            return torch.zeros((), dtype=torch.float64, device=self.device)
        return torch.stack([loss.detach().double() for loss in losses]).sum()

    def _schedule_for(self, microbatches: int, ids: Any) -> Any:
        """torch's schedule for so many microbatches of the shape of ``ids``."""
        from torch.distributed import pipelining  # a quarter of a second that runs without a pipeline save

        # When a rank is gone, the others would print the whole schedule above the error.
        logging.getLogger("torch.distributed.pipelining.schedules").setLevel(logging.CRITICAL)
        key = microbatches, ids.shape
        if key not in self._schedules:
            stages: list[Any] = [self._pipeline_stage(i, ids) for i in range(len(self.stages))]
            options: dict[str, Any] = {"loss_fn": self._loss, "scale_grads": False}
            if self.schedule == "ZBVZeroBubble":
                self._schedules[key] = pipelining.ScheduleZBVZeroBubble(stages, microbatches, **options)
            elif self.schedule == "Interleaved1F1B":
                self._schedules[key] = pipelining.ScheduleInterleaved1F1B(stages, microbatches, **options)
            elif self.schedule == "GPipe" or microbatches < self.pp_group.size():
                # With fewer microbatches than stages 1F1B is GPipe, and torch has it as that alone.
                self._schedules[key] = pipelining.ScheduleGPipe(stages[0], microbatches, **options)
            else:
                self._schedules[key] = pipelining.Schedule1F1B(stages[0], microbatches, **options)
        return self._schedules[key]

    def _pipeline_stage(self, i: int, ids: Tensor) -> Any:
        """Shapes are given, so that torch need not run the model to find them."""
        from torch.distributed.pipelining import PipelineStage

        stage = self.stages[i]
        hidden = self.activations.empty(ids, device="meta").requires_grad_()
        loss = torch.empty((), device="meta", requires_grad=True)
        return PipelineStage(
            self.parts[i],
            stage.index,
            stage.count,
            self.device,
            input_args=(torch.empty_like(ids, device="meta") if stage.is_first else hidden,),
            output_args=(loss, ids.new_empty((), device="meta")) if stage.is_last else (hidden,),
            group=self.pp_group,
            dw_builder=None if self.postponed is None else self.postponed[i].take,
        )

    def _loss(self, output: tuple[Tensor, Tensor], _labels: Tensor) -> Tensor:
        return output[0] / self._tokens

    def _add_loss(self, module: nn.Module, _inputs: Any, hidden: Tensor) -> Tensor:
        """Torch's schedules know of one loss, that of the last stage. What another stage adds joins the backward pass
        where the gradient of its output comes in."""
        if self.loss_of is None or not torch.is_grad_enabled():
            return hidden
        joined: Tensor = _WithLoss.apply(hidden, self.loss_of(module))
        return joined

    # Evaluation

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        documents: Tensor | None = None,
        positions: Tensor | None = None,
        *,
        cache: Any = None,
    ) -> Any:
        """As the model's, without gradients; all ranks are given the same rows. Ranks without the last stage return
        (0, 0) for the loss, and None for logits."""
        assert not torch.is_grad_enabled(), "forward_backward trains"
        self.wait()
        if positions is None:
            positions = _positions(input_ids)
        output: Any = None
        for stage, part in zip(self.stages, self.parts, strict=True):
            x = input_ids if stage.is_first else self._received(stage, output, input_ids)
            output = part(x, labels, documents, positions, cache=cache)
            if not stage.is_last:
                self._pass_on(stage, output)
        if self.last is not None:
            return output
        return None if labels is None else (torch.zeros((), device=self.device), labels.new_zeros(()))

    def _received(self, stage: Stage, output: Tensor | None, ids: Tensor) -> Tensor:
        """What the stage before ``stage`` has computed; ``output``, if that stage is on this rank."""
        source = self.rank_of(stage.index - 1)
        if source == self.pp_group.rank():
            assert output is not None
            return output
        hidden = self.activations.empty(ids, device=self.device)
        dist.recv(hidden, group=self.pp_group, group_src=source)
        return hidden

    def _pass_on(self, stage: Stage, output: Tensor) -> None:
        target = self.rank_of(stage.index + 1)
        if target != self.pp_group.rank():
            work = dist.isend(output.contiguous(), group=self.pp_group, group_dst=target)
            assert work is not None
            self._sent.append((work, output))

    def wait(self) -> None:
        """Wait until what was sent has gone out."""
        for work, _ in self._sent:
            work.wait()
        self._sent.clear()

    def prepare_evaluation(self) -> None:
        """Bring the copy of a tied embedding up to date."""
        if self.tied is not None:
            self.tied.send_weights()


class _WithLoss(torch.autograd.Function):
    """Hidden states as they are. In the backward pass ``loss`` gets the gradient 1, as a part of the loss."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(torch.ones_like(loss))
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor]:
        (one,) = ctx.saved_tensors
        return grad_outputs[0], one


class _TiedHead:
    """The last stage's copy of the embedding. first, last: those stages, on the ranks that have them."""

    def __init__(self, first: Any, last: Any, first_rank: int, last_rank: int, group: dist.ProcessGroup) -> None:
        self.weight = None if first is None else first.model.embed_tokens.weight
        self.copy = None if last is None else last.lm_head.weight
        held = self.weight if self.weight is not None else self.copy
        self.trained = held is not None and held.requires_grad
        self._is_sent = False
        self.first_rank, self.last_rank, self.group = first_rank, last_rank, group
        self._sending: tuple[dist.Work, Tensor] | None = None

    @torch.no_grad()
    def send_weights(self) -> None:
        """Give the copy the weights, once if they are frozen. The first stage need not wait until they have arrived."""
        self._wait()
        if self._is_sent and not self.trained:
            return
        self._is_sent = True
        if self.copy is not None:
            self._to_last(self.weight, local_tensor(self.copy))
        elif self.weight is not None:
            self._to_last(self.weight, None)

    @torch.no_grad()
    def sum_gradients(self) -> None:
        """Add the copy's gradient to the embedding's, each rank its shard."""
        self._wait()
        if not self.trained:
            return
        mine = None if self.weight is None else local_tensor(self.weight.grad)
        theirs = None if self.copy is None else local_tensor(self.copy.grad)
        if mine is not None and theirs is None and mine.numel():
            theirs = torch.empty_like(mine)
            dist.recv(theirs, group=self.group, group_src=self.last_rank)
        elif mine is None and theirs is not None and theirs.numel():
            dist.send(theirs, group=self.group, group_dst=self.first_rank)
        if mine is not None and theirs is not None:
            mine.add_(theirs)
        if self.copy is not None:
            self.copy.grad = None

    def _to_last(self, weight: Tensor | None, into: Tensor | None) -> None:
        if weight is None:
            assert into is not None
            if into.numel():
                arrived = torch.empty_like(into)
                dist.recv(arrived, group=self.group, group_src=self.first_rank)
                into.copy_(arrived)
        elif into is not None:
            into.copy_(local_tensor(weight))
        elif local_tensor(weight).numel():
            local = local_tensor(weight)
            work = dist.isend(local, group=self.group, group_dst=self.last_rank)
            assert work is not None
            self._sending = work, local

    def _wait(self) -> None:
        if self._sending is not None:
            self._sending[0].wait()
            self._sending = None


def _four(microbatch: Sequence[Tensor | None]) -> tuple[Tensor | None, ...]:
    return (*microbatch, None, None)[:4]


def _positions(ids: Any) -> Tensor:
    """Counted from the first of the row, [1, T]."""
    return torch.arange(ids.shape[1], device=ids.device)[None]
