"""What is measured on a GPU: the figures of gpu_first.py."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

from gpu_run import Figures, Part, Run


def peak(run: Run) -> tuple[str, Figures]:
    run.python("benchmarks/device_peak.py", "--json", run.out / "device_peak.json")
    figures = json.loads((run.out / "device_peak.json").read_text())
    return f"{figures['flops'] / 1e12:,.1f} TFLOP/s, {figures['bytes_per_second'] / 1e9:,.0f} GB/s", figures


def step(flavor: str, rows: int) -> Callable[[Run], tuple[str, Figures]]:
    def measure(run: Run) -> tuple[str, Figures]:
        name, size = (run.flavor, 128) if run.tiny else (flavor, 4096)
        path = run.out / f"train_step-{flavor}.json"
        contenders = ("ours, a graph per block", "HF loop, eager", "large matmuls")  # compiled takes minutes
        only = [part for contender in contenders for part in ("--only", contender)]
        printed = run.python(
            "benchmarks/train_step.py", "--model", name, "--rows", rows, "--seq-len", size, "--repeats", 3,
            "--steps", 4, *only, "--json", path,
        )  # fmt: skip
        lines = [line.strip() for line in printed.splitlines() if line.startswith(("ours", "HF"))]
        return " | ".join(line for line in lines if "first step after" not in line), json.loads(path.read_text())

    measure.__doc__ = f"A step of {flavor} beside Transformers' and large matrix products."
    return measure


def profiled(action: Callable[[], Any], times: int) -> Any:
    """The profiler of so many calls; prints what took most of the time."""
    from torch.profiler import ProfilerActivity, profile

    from torchtitan_style.common.device import current_device, synchronize

    device = current_device()
    with profile(activities=[ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")) as profiler:
        for _ in range(times):
            action()
        synchronize(device)
    sort = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    print(profiler.key_averages().table(sort_by=sort, row_limit=45, max_name_column_width=90))
    return profiler


def kernels(run: Run) -> tuple[str, Figures]:
    """Where a step's time goes: its kernels, by time, and how long the GPU stood still."""
    from train_step import make_config, step_on, tokens

    from torchtitan_style.common.device import current_device, synchronize
    from torchtitan_style.config.layout import plan_layout
    from torchtitan_style.distributed.world import init_world
    from torchtitan_style.models.registry import model_config

    rows, size = (2, 128) if run.tiny else (4, 4096)
    arguments = argparse.Namespace(model=run.flavor, rows=rows, seq_len=size, recompute="none", ours=[])
    device = current_device()
    config = make_config(arguments, "--compile.enable", "true")
    world = init_world(plan_layout(config.parallelism, 1), timeout_seconds=600)
    take = step_on(tokens(model_config(config.model), arguments, device.type), config, world)
    for _ in range(4):
        take()
    synchronize(device)
    begin = time.perf_counter()
    for _ in range(3):
        take()
    synchronize(device)
    plain = (time.perf_counter() - begin) / 3
    profiler = profiled(take, 3)
    if device.type == "cuda":
        profiler.export_chrome_trace(str(run.out / "step.trace.json.gz"))
        busy = sum(event.self_device_time_total for event in profiler.key_averages()) / 3 / 1e6
        return f"a step takes {plain * 1e3:.1f} ms, kernels {busy * 1e3:.1f} ms of it", {"step": plain, "busy": busy}
    return f"a step takes {plain * 1e3:.1f} ms", {"step": plain}


def decoding(run: Run) -> tuple[str, Figures]:
    """Where a new token's time goes: the step alone, with the draw after it, and its kernels."""
    import generate as benchmark
    import torch

    from torchtitan_style.common.device import current_device, fastest_dtype, synchronize
    from torchtitan_style.inference.cache import KVCache
    from torchtitan_style.inference.decode import Decoder
    from torchtitan_style.inference.sampling import Sampler
    from torchtitan_style.inference.settings import Sampling
    from torchtitan_style.inference.step import DecodingStep
    from torchtitan_style.models.qwen3.config import FLAVORS

    device, config = current_device(), FLAVORS[run.flavor]
    model, _ = benchmark.build(config, fastest_dtype(device), device, compile=True)
    settings = {
        "greedy": Sampling(temperature=0.0),
        "top-k and top-p": Sampling(temperature=0.6, top_k=20, top_p=0.95),
        "all tokens": Sampling(temperature=1.0),
    }
    figures: Figures = {}

    def note(name: str, seconds: float) -> None:
        figures[name] = seconds
        print(f"{name}: {seconds * 1e3:.3f} ms", flush=True)

    torch.backends.cuda.enable_cudnn_sdp(False)  # as load_model does
    for compiled in (False, True):
        layer: Any  # of models/qwen3/inference.py, not the trained one
        for layer in model.model.layers:
            layer.compiles = compiled and device.type == "cuda"
        step = DecodingStep(model, config, device, compile=compiled, replay=device.type == "cuda")
        begin = time.perf_counter()
        step.prepare(1)
        note("compiling", time.perf_counter() - begin)
        kind = "compiled" if compiled else "as it is"
        for prompt in (100, 2100):  # no graph is recorded anew while the clock runs
            cache = KVCache(config.windows, capacity=prompt + 600)
            with torch.inference_mode():
                ids = torch.zeros(1, prompt, dtype=torch.long, device=device)
                model(ids, positions=cache.positions(ids), cache=cache)
                cache.advance(prompt)
                for count in (5, 50):
                    synchronize(device)
                    begin = time.perf_counter()
                    for _ in range(count):
                        step(ids[:, :1], cache=cache)
                        cache.advance(1)
                    synchronize(device)
                note(f"step, {kind}, after {prompt}", (time.perf_counter() - begin) / 50)
        for name, sampling in settings.items():
            decoder = Decoder(model, [[1] * 100], Sampler(sampling, seeds=[0]), cache=KVCache(config.windows),
                              device=device, step=step)  # fmt: skip
            tokens = iter(decoder)
            for _ in range(10):
                next(tokens)
            begin = time.perf_counter()
            for _ in range(100):
                next(tokens)
            note(f"token, {kind}, {name}", (time.perf_counter() - begin) / 100)
        profiled(lambda: next(tokens), 10)  # noqa: B023
    return " | ".join(f"{key}: {value * 1e3:.3f} ms" for key, value in figures.items()), figures


def generation(run: Run) -> tuple[str, Figures]:
    """Prefill and decoding beside Transformers with its cache that grows."""
    small = ["--new", 16, "--repeats", 1, "--prompt", 16] if run.tiny else ["--new", 128, "--repeats", 2]
    printed = run.python(
        "benchmarks/generate.py", "--flavor", run.flavor, *small, "--compile", "--without", "HF, static"
    )
    lines = [line for line in printed.splitlines() if line.startswith(("batch", "ours", "HF", "memory"))]
    return " | ".join(" ".join(line.split()) for line in lines), {"printed": printed}


def checkpoint(run: Run) -> tuple[str, Figures]:
    """How long training waits for a checkpoint, and how long one takes."""
    printed = run.python("benchmarks/checkpoint.py", "--repeats", 2, "--folder", run.out,
                         "--layers", 2 if run.tiny else 12, "--output", run.out / "checkpoints.json")  # fmt: skip
    return " | ".join(printed.strip().splitlines()[-6:]), {"printed": printed}


SPEED = {
    "peak": Part(peak, 60),
    "decoding": Part(decoding, 150),
    "step-0.6B": Part(step("0.6B", 4), 150),
    "generation": Part(generation, 200),
    "kernels": Part(kernels, 100),
    "step-1.7B": Part(step("1.7B", 2), 150),
    "checkpoint": Part(checkpoint, 100),
}
