"""Devices with their published figures, and everything else that a plan assumes. Needs no torch.

Bytes are as the driver reports them, rates are per second, links are one direction.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass

from torchtitan_style.common.errors import UserError

MiB = 2**20
GiB = 2**30


@dataclass(frozen=True)
class Device:
    """One GPU, or a rank's share of a host's CPU."""

    name: str
    memory: int
    """Bytes."""
    bf16_flops: float
    """Dense, without sparsity."""
    fp32_flops: float
    """Without TF32, which torch does not use by itself."""
    memory_bandwidth: float
    """Of the device's own memory, bytes/s."""
    link_bandwidth: float
    """From one device to others of its host, bytes/s."""
    network_bandwidth: float
    """Between hosts, a device's share, bytes/s."""
    per_host: int
    """Devices in a host."""
    on_gpu: bool = True

    def flops(self, number_bytes: int) -> float:
        return self.fp32_flops if number_bytes == 4 else self.bf16_flops


def _gpu(name: str, mib: int, bf16: float, fp32: float, memory: float, link: float, network: float) -> Device:
    return Device(name, mib * MiB, bf16 * 1e12, fp32 * 1e12, memory * 1e9, link * 1e9, network * 1e9, 8)


DEVICES = {
    device.name: device
    for device in (
        # name, MiB, bf16 and fp32 TFLOP/s, then GB/s: memory, link, network
        _gpu("A100-40", 40_960, 312, 19.5, 1555, 300, 25),
        _gpu("A100-80", 81_920, 312, 19.5, 2039, 300, 25),
        _gpu("H100", 81_559, 989, 67, 3350, 450, 50),
        _gpu("H200", 143_771, 989, 67, 4800, 450, 50),
        _gpu("B200", 183_359, 2250, 75, 8000, 900, 50),
        _gpu("MI300X", 196_592, 1307, 163.4, 5300, 448, 50),
        _gpu("RTX4090", 24_564, 165, 82.6, 1008, 25, 1.5),
    )
}
"""Data sheets of the SXM or OAM modules in hosts of eight with a 200 (A100) or 400 Gb/s adapter each. RTX 4090: PCIe
4.0 without peer-to-peer, and one adapter of 100 Gb/s in a host."""


@dataclass(frozen=True)
class Assumptions:
    """What no data sheet says. Each can be set with ``--assume NAME=VALUE``, and so can a device's figures."""

    matmul_efficiency: float = 0.5
    """Share of the device's FLOP/s that matrix multiplications reach, under the power limit of a long run."""
    matmul_efficiency_cpu: float = 0.75
    """As matmul_efficiency, of the rate that is measured on this machine's CPU."""
    memory_efficiency: float = 0.8
    """Share of the memory's bandwidth that other operations reach."""
    network_efficiency: float = 0.8
    """Share of the links' bandwidth that collectives reach."""
    overlap: float = 0.9
    """Share of a pass during which FSDP's collectives can run beside it."""
    latency: float = 2e-5
    """Seconds that a collective takes at least."""
    latency_cpu: float = 2e-3
    """As latency, where the processes that meet share their cores with the threads that send."""
    split_backward: float = 0.3
    """How much longer a backward pass takes whose schedule has gradients of inputs and of weights apart: measured on
    CPU."""
    operation_seconds: float = 6e-6
    """Seconds of the host's time for one operation."""
    allocator_slack: float = 0.05
    """What the CUDA allocator reserves beyond what is in use, of all that comes and goes."""
    allocator_slack_cpu: float = 0.1
    """As allocator_slack, of what the C library's heap takes on CPU (docs/planning.md)."""
    fsdp_slack_cpu: float = 0.65
    """As allocator_slack_cpu, with FSDP: its buffers, each of a whole block, do not fit where activations were, and
    gradients stay between them."""
    library_gib: float = 0.6
    """CUDA context and cuBLAS workspace, on each GPU."""
    library_gib_cpu: float = 0.38
    """Python, torch and the run's own data, in each process on CPU."""
    expert_kernels_gib_cpu: float = 0.1
    """oneDNN's kernels for experts, in each process on CPU: one for each number of rows (``cpu/grouped.py``)."""
    nccl_bytes: float = 0.2 * GiB
    """Buffers of NCCL for one group of ranks."""
    disk_bandwidth: float = 2e9
    """To where checkpoints are written, of each host."""
    host_copy_bandwidth: float = 2e10
    """From a device to its host's memory."""

    def library_bytes(self, *, on_gpu: bool, experts: bool) -> int:
        """experts: whether the model has some."""
        on_cpu = self.library_gib_cpu + self.expert_kernels_gib_cpu * experts
        return int((self.library_gib if on_gpu else on_cpu) * GiB)


def device_named(name: str) -> Device:
    """A device of the table. Raises UserError, with the nearest name, if there is none."""
    for known, device in DEVICES.items():
        if _plain(known) == _plain(name):
            return device
    near = difflib.get_close_matches(_plain(name), [_plain(known) for known in DEVICES], n=1, cutoff=0.5)
    names = [known for known in DEVICES if _plain(known) in near]
    hint = f"did you mean {names[0]}?" if names else f"there are {', '.join([*DEVICES, 'cpu'])}"
    raise UserError(f'--device: there is no device "{name}"; {hint} (--assume sets other figures)')


def generic_device(memory: int, *, on_gpu: bool, ranks: int) -> Device:
    """A device that only its memory is known of, to compare layouts on. ranks: of this host."""
    if on_gpu:
        return dataclasses.replace(DEVICES["H100"], name="GPU", memory=memory)
    return Device("cpu", memory, 1e12, 1e11, 1e10, 1e9, 1e8, ranks, on_gpu=False)


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())


def with_assumptions(device: Device, settings: list[str]) -> tuple[Device, Assumptions]:
    """``device`` and the defaults with NAME=VALUE settings applied. Raises UserError if one makes no sense."""
    own: dict[str, float] = {}
    others: dict[str, float] = {}
    of_device = {f.name for f in dataclasses.fields(Device)} - {"name", "on_gpu"}
    of_all = {f.name for f in dataclasses.fields(Assumptions)}
    for setting in settings:
        name, _, text = setting.partition("=")
        if name not in of_device | of_all:
            near = difflib.get_close_matches(name, sorted(of_device | of_all), n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(sorted(of_device | of_all))}"
            raise UserError(f'--assume: there is no assumption "{name}"; {hint}')
        try:
            value = float(text)
        except ValueError:
            value = -1.0
        if not 0 <= value < float("inf"):
            raise UserError(f'--assume: {name} must be a number, as {name}=0.5, not "{text}"')
        if value == 0 and name not in ("overlap", "latency", "operation_seconds", "nccl_bytes") and "slack" not in name:
            raise UserError(f"--assume: {name} must be above 0")
        if name in of_device:
            own[name] = int(value) if name in ("memory", "per_host") else value
        else:
            others[name] = value
    return dataclasses.replace(device, **own), Assumptions(**others)  # type: ignore[arg-type]
