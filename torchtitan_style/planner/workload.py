"""What one rank computes in a step, in the numbers that all formulas start from. Needs no torch.

The formulas know of axes only through ``Layout``: a rank of a pipeline stage is a ``Workload`` of fewer layers.

Letters in the formulas: n tokens of a microbatch on this rank, C hidden size, Q and KV numbers of a token's queries and
keys on this rank, I of its features in the MLP, V rows of the vocabulary on this rank, c bytes of a number in the type
of computation.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torchtitan_style.config import Config
from torchtitan_style.config.layout import BatchPlan, Layout, plan_batch, reshards_after_forward
from torchtitan_style.config.pipeline import Stage, schedule_problem
from torchtitan_style.models.registry import model_config, spec_of
from torchtitan_style.models.stages import stages_of_ranks
from torchtitan_style.models.trained import DOWN

from .parameters import Kind, State, parameter_kinds, state_of

_OF_MLP = re.compile(r"\.mlp\.\w+_proj\.")
_OF_EXPERTS = re.compile(r"\.mlp\.(gate|experts)\.")


def number_bytes(dtype: str) -> int:
    return 4 if dtype == "float32" else 2


@dataclass(frozen=True)
class Workload:
    """A configuration on a layout, seen from the rank that holds the most. on_gpu: else on CPU."""

    config: Config
    layout: Layout
    on_gpu: bool
    kinds: tuple[Kind, ...]
    stages: tuple[Stage, ...] = ()
    """Of a pipeline, those that the rank has; (): there is none."""

    @classmethod
    def of_ranks(
        cls, config: Config, layout: Layout, *, on_gpu: bool, kinds: tuple[Kind, ...] | None = None
    ) -> list[Workload]:
        """That of each rank of the pp axis, one without a pipeline. Raises ValueError if the batch cannot be shared out
        over the layout. kinds: all of the model's, if they are known."""
        works = []
        for stages in stages_of_ranks(config) if layout.pp > 1 else [()]:
            own = parameter_kinds(config, stages) if kinds is None or stages else kinds
            work = cls(config, layout, on_gpu, own, stages)
            if problem := schedule_problem(config.parallelism, work.batch.accumulation_steps):
                raise ValueError(problem)
            works.append(work)
        return works

    @cached_property
    def model(self) -> Any:
        return model_config(self.config.model)

    @cached_property
    def batch(self) -> BatchPlan:
        return plan_batch(self.config.training, self.layout.dp)

    @cached_property
    def state(self) -> State:
        return state_of(self.kinds, self.layout)

    @property
    def layers(self) -> int:
        """Blocks of this rank."""
        if self.stages:
            return sum(len(stage.blocks) for stage in self.stages)
        return int(self.model.num_hidden_layers)

    @cached_property
    def blocks(self) -> tuple[bool, ...]:
        """Of each block of this rank, whether it has experts."""
        if not spec_of(self.config.model.name).expert_parallel:
            return (False,) * self.layers
        own = [block for stage in self.stages for block in stage.blocks] if self.stages else range(self.layers)
        return tuple(self.model.is_sparse(block) for block in own)

    @property
    def sparse_layers(self) -> int:
        """Blocks of this rank that have experts."""
        return sum(self.blocks)

    @property
    def share(self) -> float:
        """Of all blocks, this rank's."""
        return float(self.layers / self.model.num_hidden_layers)

    @property
    def has_head(self) -> bool:
        return not self.stages or self.stages[-1].is_last

    @property
    def stage_ranks(self) -> int:
        """Ranks that have the same parameters, or shards of them."""
        return self.layout.world_size // self.layout.pp

    @property
    def passes_in_flight(self) -> float:
        """Microbatches whose activations the rank keeps at once; of half of its blocks, where it has two stages."""
        microbatches, pp = self.batch.accumulation_steps, self.layout.pp
        schedule = self.config.parallelism.pipeline_parallel_schedule
        if not self.stages:
            return 1
        if schedule == "GPipe":
            return microbatches
        after = pp - 1 - self.stages[0].index
        if schedule == "Interleaved1F1B":
            return min(microbatches, (2 * after + pp + 1) / 2)
        return min(microbatches, pp if schedule == "ZBVZeroBubble" else after + 1)

    @property
    def sent_forward(self) -> int:
        """Stages whose output goes to another rank."""
        return sum(not stage.is_last and not self._follows(stage.index) for stage in self.stages)

    @property
    def sent_backward(self) -> int:
        """Stages whose input came from another rank."""
        return sum(not stage.is_first and not self._follows(stage.index - 1) for stage in self.stages)

    def _follows(self, index: int) -> bool:
        """Whether the rank has this stage and the next one, as the last rank of a V."""
        return {index, index + 1} <= {stage.index for stage in self.stages}

    @property
    def tokens(self) -> int:
        """n: of a microbatch, on each of the tp ranks."""
        return self.batch.local_batch_size * self.config.training.seq_len // self.layout.cp

    @property
    def scattered_tokens(self) -> float:
        """Of them, those whose residual stream this rank holds: the tp ranks share them out."""
        return self.tokens / self.layout.tp

    @property
    def c(self) -> int:
        """Bytes of a number in the type of computation."""
        return number_bytes(self.config.training.mixed_precision_param)

    @property
    def r(self) -> int:
        """Bytes of a number of a gradient on its way between ranks."""
        return number_bytes(self.config.training.mixed_precision_reduce)

    @property
    def hidden(self) -> int:
        return int(self.model.hidden_size)

    @property
    def heads(self) -> float:
        return float(self.model.num_attention_heads / self.layout.tp)

    @property
    def queries(self) -> float:
        """Q."""
        return self.heads * float(self.model.head_dim)

    @property
    def keys(self) -> float:
        """KV."""
        return float(self.model.num_key_value_heads * self.model.head_dim / self.layout.tp)

    @property
    def features(self) -> float:
        """I, of a dense MLP."""
        return float(self.model.intermediate_size / self.layout.tp)

    @property
    def rows(self) -> float:
        """M: of a microbatch, rows that the experts of a layer are computed on, on this rank: each token once for each
        of its experts, evenly spread over all ranks. Under tensor parallelism each rank routes its own positions."""
        return self.scattered_tokens * float(self.model.num_experts_per_tok) if self.sparse_layers else 0.0

    @property
    def counting_passes(self) -> int:
        """Forward passes of a step that only count how often each expert is chosen; see train/balance.py."""
        has_experts = bool(spec_of(self.config.model.name).expert_parallel)  # of another stage, maybe
        if not has_experts or not self.model.router_aux_loss_coef:
            return 0
        return self.batch.accumulation_steps - (0 if self.stages else 1)

    @property
    def vocabulary(self) -> int:
        """V."""
        return int(self.model.vocab_size) // self.layout.tp

    @property
    def compiled(self) -> bool:
        return self.config.compile.enable

    @property
    def is_sharded(self) -> bool:
        """Whether FSDP2 wraps the model; a single process does without, unless blocks are recomputed."""
        return self.layout.world_size > self.layout.pp or self.config.activation_checkpoint.mode in (
            "selective",
            "full",
        )

    @property
    def keeps_gathered(self) -> bool:
        """Whether gathered parameters stay until their gradients are there."""
        return not reshards_after_forward(self.config.parallelism)

    @cached_property
    def blocks_numbers(self) -> int:
        """Parameters of all blocks on this rank, all their shards together."""
        return self._gathered(in_block=True)

    @cached_property
    def block_numbers(self) -> int:
        """Those of the largest block."""
        return self._largest_block(trained=False)

    @cached_property
    def matrices_numbers(self) -> int:
        """Of the blocks' parameters those that are multiplied with, adapters left out."""
        return sum(k.count * k.gathered(self.layout) for k in self.kinds if k.is_block_matrix)

    @cached_property
    def active_numbers(self) -> float:
        """Those that each of the n tokens meets on a tensor-parallel rank: of experts, only the chosen ones."""
        matrices = [k for k in self.kinds if k.is_block_matrix]
        met = sum(k.count * math.prod(k.shape) for k in matrices if not k.expert)
        experts = sum(k.count * math.prod(k.shape) for k in matrices if k.expert)
        if experts:
            experts = experts * self.model.num_experts_per_tok // self.model.num_experts
        return (met + experts) / self.layout.tp

    @cached_property
    def outer_numbers(self) -> int:
        """Embedding, last norm and head, as ``blocks_numbers``."""
        return self._gathered(in_block=False)

    @property
    def own_groups(self) -> bool:
        """Whether FSDP gathers embedding and head each by itself: not where they are one matrix."""
        return bool(self.stages) or not self.model.tie_word_embeddings

    @property
    def outer_groups(self) -> int:
        """What FSDP gathers outside of blocks on this rank: embedding, head and norm, or all at once."""
        if not self.own_groups:
            return 1
        return (not self.stages or self.stages[0].is_first) + 2 * self.has_head

    @property
    def embedding_numbers(self) -> int:
        """Those of an embedding that is gathered by itself."""
        own = [k for k in self.kinds if k.name == "model.embed_tokens.weight" and self.own_groups]
        return sum(kind.gathered(self.layout) for kind in own)

    @property
    def copied_numbers(self) -> int:
        """Those of them that a process by itself keeps in another type than it computes in."""
        return sum(k.count * k.gathered(self.layout) for k in self.kinds if k.number_bytes > self.c)

    @cached_property
    def trained_blocks_numbers(self) -> int:
        """Those of all blocks that are trained."""
        return self._gathered(in_block=True, trained=True)

    @cached_property
    def trained_block_numbers(self) -> int:
        """Of one block, at most."""
        return self._largest_block(trained=True)

    @property
    def trained_outer_numbers(self) -> int:
        return self._gathered(in_block=False, trained=True)

    @property
    def trains_head(self) -> bool:
        tied = self.model.tie_word_embeddings and not (self.stages and not self.stages[0].is_first)
        head = "model.embed_tokens.weight" if tied else "lm_head.weight"
        return self.has_head and any(kind.trained for kind in self.kinds if kind.name == head)

    @property
    def adapters(self) -> list[tuple[int, int]]:
        """Of a block, the rank and the width of the input of each adapter on a tensor-parallel rank."""
        downs = [kind for kind in self.kinds if kind.name.endswith(DOWN)]
        return [
            (kind.shape[0], kind.gathered(self.layout) // kind.shape[0])
            for kind in downs
            for _ in range(-(-kind.count // max(1, self.layers)))
        ]

    def _gathered(self, *, in_block: bool, trained: bool = False) -> int:
        chosen = [k for k in self.kinds if k.in_block == in_block and (k.trained or not trained)]
        return sum(k.count * k.gathered(self.layout) for k in chosen)

    def _largest_block(self, *, trained: bool) -> int:
        of_blocks = {k.name: k for k in self.kinds if k.in_block and (k.trained or not trained)}  # one of each name
        numbers = {name: kind.gathered(self.layout) for name, kind in of_blocks.items()}
        mlp = sum(size for name, size in numbers.items() if _OF_MLP.search(name))
        experts = sum(size for name, size in numbers.items() if _OF_EXPERTS.search(name))
        return sum(numbers.values()) - min(mlp, experts)  # a block has one or the other
