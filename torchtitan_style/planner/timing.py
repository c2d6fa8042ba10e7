"""How long a step takes: for each phase what the device does, and what of the network does not hide behind it.

Needs no torch. A matrix multiplication takes the larger of its floating-point operations and its traffic with memory;
other operations take their traffic with memory; a phase takes at least the host's time for its operations. docs/
planning.md derives the numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from torchtitan_style.config.pipeline import bubble
from torchtitan_style.models.trained import flops_per_token

from .activations import is_recomputed
from .devices import Assumptions, Device
from .memory import checkpoint_bytes
from .parameters import saved_of
from .traffic import Traffic, traffic_of
from .workload import Workload


@dataclass(frozen=True)
class Phase:
    """Part of a step. Seconds of one time."""

    name: str
    times: int
    """How often it comes in a step."""
    compute: float
    """Matrix multiplications and attention."""
    memory: float
    """Everything else that the device does."""
    host: float
    """What the host takes to start all that."""
    network: float
    """All communication."""
    hidden: float
    """Of the network, what runs beside the rest."""

    @property
    def device(self) -> float:
        return max(self.compute + self.memory, self.host)

    @property
    def seconds(self) -> float:
        return self.device + self.network - self.hidden

    @property
    def bound(self) -> str:
        """What it mostly waits for."""
        parts = {"compute": self.compute, "memory": self.memory, "network": self.network - self.hidden}
        if self.host > self.compute + self.memory:
            parts["host"] = self.host
        return max(parts, key=lambda name: parts[name])


@dataclass(frozen=True)
class TimePlan:
    """A step in time."""

    phases: list[Phase]
    bubble: float
    """Seconds of a step that a pipeline stage has nothing to do."""
    tokens: int
    """Of a step, all ranks together."""
    flops: float
    """Of a step by the model's own count, recomputation left out, all ranks together."""
    peak_flops: float
    """Of all devices together."""
    traffic: list[Traffic] = field(repr=False)
    checkpoint_bytes: int
    checkpoint_seconds: float
    """Until it is on disk."""
    checkpoint_wait: float
    """That training waits for it: with asynchronous checkpoints only for the copy to the host's memory."""

    @property
    def step_seconds(self) -> float:
        return sum(phase.times * phase.seconds for phase in self.phases) + self.bubble

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.step_seconds

    @property
    def mfu(self) -> float:
        return self.flops / self.step_seconds / self.peak_flops

    @property
    def hidden_share(self) -> float:
        """Of all time of communication, what is hidden behind computation; 1 if there is none."""
        network = sum(phase.times * phase.network for phase in self.phases)
        return sum(phase.times * phase.hidden for phase in self.phases) / network if network else 1.0


def time_of(work: Workload, device: Device, assumptions: Assumptions, *, ranks_on_device: int = 1) -> TimePlan:
    """The time of a step. ranks_on_device: that share its FLOP/s and bandwidth, as on CPU."""
    clock = _Clock(work, device, assumptions, ranks_on_device)
    microbatches = work.batch.accumulation_steps
    traffic = traffic_of(work)
    phases = [
        clock.phase("forward", microbatches, traffic),
        clock.phase("loss", microbatches, traffic),
    ]
    if microbatches > 1:
        phases.append(clock.phase("backward", microbatches - 1, traffic))
    phases.append(clock.phase("last backward", 1, traffic))
    schedule = work.config.parallelism.pipeline_parallel_schedule
    idle = bubble(schedule, pp=work.layout.pp, microbatches=microbatches)
    passes = sum(phase.seconds for phase in phases[:3])
    phases.append(clock.phase("optimizer", 1, traffic))
    idle_seconds = idle * microbatches * passes
    if work.counting_passes:
        phases.insert(0, clock.phase("counting", work.counting_passes, traffic))
        # The first microbatch comes to the last rank, and with two stages on a rank each comes to it, by way of others.
        waits = work.counting_passes if len(work.stages) > 1 else 1
        idle_seconds += (work.layout.pp - 1) * waits * phases[0].seconds
    tokens = work.batch.global_batch_size * work.config.training.seq_len
    hosts = -(-work.layout.world_size // device.per_host)
    size = checkpoint_bytes(work.config)
    # Replicas of a shard write nothing: at most so many hosts do.
    writing = size / (assumptions.disk_bandwidth * min(hosts, work.layout.fsdp * work.layout.tp))
    copying = saved_of(work.kinds, work.layout) / assumptions.host_copy_bandwidth
    return TimePlan(
        phases=phases,
        bubble=idle_seconds,
        tokens=tokens,
        flops=tokens * flops_per_token(work.config),
        peak_flops=device.flops(work.c) * work.layout.world_size / ranks_on_device,
        traffic=traffic,
        checkpoint_bytes=size,
        checkpoint_seconds=writing,
        checkpoint_wait=copying if work.config.checkpoint.async_mode == "async" else writing,
    )


class _Clock:
    """Seconds of parts of a step on one device."""

    def __init__(self, work: Workload, device: Device, assumptions: Assumptions, sharing: int) -> None:
        self.work, self.assumptions = work, assumptions
        self.device = device
        efficiency = assumptions.matmul_efficiency if device.on_gpu else assumptions.matmul_efficiency_cpu
        self.flops = device.flops(work.c) * efficiency / sharing
        self.memory = device.memory_bandwidth * assumptions.memory_efficiency / sharing

    def phase(self, name: str, times: int, traffic: list[Traffic]) -> Phase:
        kinds = {"last backward": ("backward", "reduce")}.get(name, (name,))
        compute, memory, operations = {
            "counting": self._counting,
            "forward": self._forward,
            "loss": self._loss,
            "backward": self._backward,
            "last backward": self._backward,
            "optimizer": self._optimizer,
        }[name]()
        host = operations * self.assumptions.operation_seconds
        if not self.work.on_gpu:  # the host is the device: it starts an operation when the last one is done
            memory, host = memory + host, 0.0
        waited = sum(self.seconds(each) for each in traffic if each.phase in kinds and not each.hides)
        hiding = sum(self.seconds(each) for each in traffic if each.phase in kinds and each.hides)
        overlap = self.assumptions.overlap if self.work.on_gpu else 0.0  # gloo needs the cores itself
        hidden = min(hiding, overlap * (max(compute + memory, host) + waited))
        return Phase(name, times, compute, memory, host, waited + hiding, hidden)

    def seconds(self, traffic: Traffic) -> float:
        """Of collectives, on rings that use every adapter of a host that a rank of the group is beside."""
        layout = self.work.layout
        stage = self.work.stage_ranks
        ranks, stride = {
            "tp": (layout.tp, 1),
            "cp": (layout.cp, layout.tp),
            "fsdp": (layout.fsdp, layout.tp),
            "ep": (layout.ep, layout.tp),
            "expert_fsdp": (layout.fsdp // layout.ep * layout.tp, layout.ep),
            "dp_replicate": (layout.dp_replicate, layout.tp * layout.fsdp),
            "pp": (2, stage),
            "world": (stage, 1),
        }[traffic.axis]
        together = min(ranks, max(1, self.device.per_host // stride))  # ranks of the group in a host
        link, network = self.device.link_bandwidth, self.device.network_bandwidth
        latency = traffic.count * self._latency(traffic.kind) * (1 + math.log2(ranks) / 4)
        if traffic.kind == "all-to-all":  # each rank sends to those of other hosts through its own adapter
            away = (ranks - together) / ranks
            bandwidth, share = 1.0, max((1 - 1 / ranks) / link, away / network)
        else:
            bandwidth = link if ranks == together else min(link, together * network)
            share = 1.0 if traffic.kind == "send" else (ranks - 1) / ranks * (2 if self._sums_all(traffic.kind) else 1)
        return traffic.bytes * share / (bandwidth * self.assumptions.network_efficiency) + latency

    def _latency(self, kind: str) -> float:
        """Of a collective of two ranks; on CPU, of a message as long as a pipeline's stages have other work."""
        if self.work.on_gpu:
            return self.assumptions.latency
        return self.assumptions.latency_cpu / (4 if kind == "send" else 1)

    def _sums_all(self, kind: str) -> bool:
        """Whether each rank gets all of the sum. gloo does so where only parts are asked for."""
        return kind == "all-reduce" or (kind == "reduce-scatter" and not self.work.on_gpu)

    def _matmul(self, flops: float, moved: float) -> float:
        return max(flops / self.flops, moved / self.memory)

    def _blocks(self, *, flops_factor: float, attention_factor: float, traffic_factor: float) -> tuple[float, float]:
        """Seconds of all blocks: matrix multiplications and attention; the rest."""
        work, n = self.work, self.work.tokens
        products = work.layers * n * (2 * work.queries + 2 * work.keys + 2 * work.hidden)
        products += (work.layers - work.sparse_layers) * n * (3 * work.features + 2 * work.hidden)
        if work.sparse_layers:
            of_experts = work.rows * (3 * work.model.moe_intermediate_size + 2 * work.hidden)
            products += work.sparse_layers * (of_experts + work.scattered_tokens * work.model.num_experts)
        moved = (work.matrices_numbers + products) * work.c
        matmul = self._matmul(2 * n * work.active_numbers * flops_factor, moved * flops_factor)
        attention = n * self._attention_flops() * attention_factor / self.flops
        return matmul + attention, self._elementwise() * traffic_factor / self.memory

    def _attention_flops(self) -> float:
        """Of a token's forward pass in all layers on this rank: half of the model's count, which is without a mask."""
        work = self.work
        counted = work.model.flops_per_token(work.config.training.seq_len) - 6 * work.model.num_matmul_parameters
        return float(counted) * work.share / 3 / 2 / work.layout.tp

    def _elementwise(self) -> float:
        """Bytes that norms, rotation, SiLU and sums of all blocks' forward passes read and write."""
        work, c = self.work, self.work.c
        local, n, heads = work.scattered_tokens, work.tokens, work.queries + work.keys
        # Rows through SiLU and the product.
        features = (work.layers - work.sparse_layers) * n * work.features
        if work.sparse_layers:
            features += work.sparse_layers * work.rows * work.model.moe_intermediate_size
            # Rows are gathered in the order of experts, brought back and added up; with ep also on the other side.
            moves = (5 if work.compiled else 7) + 4 * (work.layout.ep > 1)
            routed = work.rows * moves * c * work.hidden + local * 24 * work.model.num_experts
        else:
            routed = 0.0
        if work.compiled:  # each norm one kernel, with what is around it
            norms = local * 8 * c * work.hidden + n * 4 * c * heads
            return work.layers * norms + 3 * c * features + work.sparse_layers * routed
        norms = local * (48 + 14 * c) * work.hidden + n * (24 + 14 * c) * heads
        return work.layers * norms + 5 * c * features + work.sparse_layers * routed

    def _forward(self) -> tuple[float, float, float]:
        compute, memory = self._blocks(flops_factor=1, attention_factor=1, traffic_factor=1)
        return compute, memory, self._operations()

    def _counting(self) -> tuple[float, float, float]:
        """A forward pass with the loss, without gradients: of the loss's three products the first."""
        passes = zip(self._forward(), self._loss(), strict=True)
        compute, memory, operations = (forward + loss / 3 for forward, loss in passes)
        return compute, memory, operations

    def _operations(self) -> float:
        """Of all blocks' forward passes: counted in a trace."""
        work = self.work
        routing = (30 if work.compiled else 50) + 25 * (work.layout.ep > 1)
        return work.layers * (20 if work.compiled else 90) + work.sparse_layers * routing

    def _backward(self) -> tuple[float, float, float]:
        compute, memory, operations = self._whole_backward()
        schedule = self.work.config.parallelism.pipeline_parallel_schedule
        more = 1 + self.assumptions.split_backward * (bool(self.work.stages) and schedule == "ZBVZeroBubble")
        return more * compute, more * memory, more * operations

    def _whole_backward(self) -> tuple[float, float, float]:
        matmuls, rest = self._recomputed()
        # Two products for each of the forward pass, one of a frozen matrix; flash attention has five for two.
        trained = self.work.trained_blocks_numbers / max(1, self.work.blocks_numbers)
        compute, memory = self._blocks(
            flops_factor=1 + trained + matmuls, attention_factor=2.5 + matmuls, traffic_factor=2 + rest
        )
        return compute, memory, (2 + rest) * self._operations()

    def _recomputed(self) -> tuple[float, float]:
        """Share of the blocks' matrix multiplications, and of the rest, that the backward pass computes again."""
        recompute = self.work.config.activation_checkpoint
        if recompute.mode == "full":
            return 1.0, 1.0
        if recompute.mode == "selective":
            option = recompute.selective_ac_option
            whole = sum(is_recomputed(self.work, place) for place in range(self.work.layers)) / max(1, self.work.layers)
            return (whole, 1.0) if option == "op" else (1 / int(option), 1 / int(option))
        if recompute.mode == "memory_budget":  # what takes least time first
            forgotten = 1 - recompute.memory_budget
            return forgotten**2, min(1.0, 2 * forgotten)
        return 0.0, 0.0

    def _loss(self) -> tuple[float, float, float]:
        """Three products, two if the head is frozen, and the softmax of all logits in chunks."""
        work = self.work
        if not work.has_head:
            return 0.0, 0.0, 0.0
        products = 3 if work.trains_head else 2
        head, logits = work.vocabulary * work.hidden, work.tokens * work.vocabulary
        compute = self._matmul(2 * products * work.tokens * head, products * (head + logits) * work.c)
        passes = 4 * work.c if work.compiled else 6 * 4 + 2 * work.c
        return compute, (logits * passes + 6 * head * 4 * work.trains_head) / self.memory, 40

    def _optimizer(self) -> tuple[float, float, float]:
        """Norm, clipping, AdamW: bandwidth alone. Muon multiplies matrices."""
        work = self.work
        # The weights that are trained take as many bytes as their gradients.
        moved = 5 * work.state.gradients + 2 * work.state.optimizer
        rounds = work.config.optimizer.muon.ns_steps
        flops = 0.0
        for kind in work.kinds:
            if kind.muon:
                width = kind.shape[-1]
                rows, columns = sorted((math.prod(kind.shape) // kind.matrices // width, width))
                # A rank takes its share of all matrices, or those that it holds.
                exchanged = kind.is_exchanged(work.layout)
                ranks = work.stage_ranks if exchanged else work.layout.fsdp * work.layout.tp
                matrices = kind.count * kind.matrices / ranks
                flops += matrices * rounds * 2 * (2 * rows**2 * columns + rows**3)
        return flops / self.flops, moved / self.memory, 6 * work.layers
