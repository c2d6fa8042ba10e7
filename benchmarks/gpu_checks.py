"""What must hold on a GPU: the checks of gpu_first.py."""

from __future__ import annotations

import json
import math
import os
import time
from pathlib import Path
from typing import Any

from gpu_run import Failed, Figures, Part, Run, largest_difference, losses


def about(run: Run) -> tuple[str, Figures]:
    """Versions, the compiler, and whether the data sheet's rate is known."""
    import torch
    from race import machine

    from torchtitan_style.common.device import compiler_problem, current_device, peak_flops

    device = current_device()
    figures: Figures = machine(device.type) | {"compiler": compiler_problem(device) or "works"}
    if device.type == "cuda":
        figures |= {
            "nccl": ".".join(map(str, nccl_version())),
            "cudnn": torch.backends.cudnn.version(),
            "data_sheet_flops": peak_flops(device, torch.bfloat16),
            "memory_gib": round(torch.cuda.mem_get_info()[1] / 2**30, 1),
        }
    return ", ".join(f"{key} {value}" for key, value in figures.items()), figures


def cuda_tests(run: Run) -> tuple[str, Figures]:
    """The tests that need a GPU: the curve of the CPU, no waiting within a step."""
    printed = run.python("-m", "pytest", "-p", "no:cacheprovider", "-n0", "--tb=short", "tests/test_cuda.py")
    return printed.strip().splitlines()[-1], {}


def masks(run: Run) -> tuple[str, Figures]:
    """Attention with each kind of mask against its definition in fp64, with all gradients; and cuDNN's, which is not
    used with a mask because its gradients were not finite at T mod 128 = 64."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from torchtitan_style.common.device import current_device
    from torchtitan_style.models.qwen3.attention import attend, attention_mask

    device = current_device()
    figures: Figures = {}
    for t in (192, 1000):
        torch.manual_seed(t)
        q, k, v = (torch.randn(2, heads, t, 128, device=device).bfloat16() for heads in (16, 8, 8))
        documents = (torch.arange(t, device=device) // 70).expand(2, t).contiguous()
        weights = torch.randn(2, 16, t, 128, device=device)
        for kind, given, window in (("causal", None, None), ("documents", documents, None), ("window", None, 50)):
            for flex in (False, True) if given is not None and device.type == "cuda" else (False,):
                allowed = attention_mask(given, t, window, flex=False, device=device)
                want = _by_definition(q, k, v, allowed, weights)
                mask = attention_mask(given, t, window, flex=flex, device=device)
                inputs = [x.clone().requires_grad_() for x in (q, k, v)]
                y = attend(inputs[0], inputs[1], inputs[2], mask)
                (y.float() * weights).sum().backward()
                got = [y.detach(), *(x.grad for x in inputs)]
                name = f"{kind}{', flex' if flex else ''}, T = {t}"
                figures[name] = max(_relative(a, b) for a, b in zip(got, want, strict=True))
        if device.type == "cuda":
            allowed = attention_mask(documents, t, None, flex=False, device=device)
            assert isinstance(allowed, torch.Tensor)
            query, key, value = (
                x.clone().requires_grad_() for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1))
            )
            try:
                with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                    y = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=allowed)
                    gradients = torch.autograd.grad((y.float() * weights).sum(), (query, key, value))
                finite = all(bool(x.isfinite().all()) for x in gradients)
                figures[f"cuDNN with a mask, T = {t}"] = "finite" if finite else "gradients not finite"
            except RuntimeError as error:
                figures[f"cuDNN with a mask, T = {t}"] = str(error).splitlines()[0][:80]
    worst = max(x for x in figures.values() if isinstance(x, float))
    if not worst < 0.02:
        raise Failed(f"not the definition's: {figures}")
    others = "; ".join(f"{key}: {value}" for key, value in figures.items() if isinstance(value, str))
    return f"bf16 within {worst:.1e} of the definition{'; ' if others else ''}{others}", figures


def _by_definition(q: Any, k: Any, v: Any, allowed: Any, weights: Any) -> list[Any]:
    """Output and gradients of q, k, v in fp64. allowed: booleans that broadcast to [B, H, T, T]; None: causal."""
    import torch

    inputs = [x.double().requires_grad_() for x in (q, k, v)]
    query, key, value = inputs
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    t = query.shape[2]
    if allowed is None:
        allowed = torch.ones(t, t, dtype=torch.bool, device=q.device).tril()
    scores = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).masked_fill(~allowed, -math.inf)
    y = scores.softmax(-1) @ value
    (y * weights).sum().backward()
    return [y.detach(), *(x.grad for x in inputs)]


def _relative(a: Any, b: Any) -> float:
    difference = float((a.double() - b.double()).norm() / b.double().norm())
    return difference if math.isfinite(difference) else math.inf


def resume(run: Run) -> tuple[str, Figures]:
    """Document masks, selective recomputation, compiled, saved in the background: a run of 12 steps, and one that is
    resumed after 6."""
    settings = [
        "--model.flavor", run.flavor, "--data.document_mask", "true", "--data.packing", "best_fit",
        "--training.seq_len", "256" if run.tiny else "2048", "--training.local_batch_size", "2",
        "--training.global_batch_size", "4", "--activation_checkpoint.mode", "selective", "--compile.enable", "true",
        "--checkpoint.interval", "6", "--checkpoint.async_mode", "async", "--lr_scheduler.total_steps", "12",
        "--lr_scheduler.warmup_steps", "4", "--validation.steps", "2", "--metrics.log_freq", "1",
    ]  # fmt: skip
    whole = run.train("resume-whole", *settings, "--training.steps", 12)
    run.train("resume-parts", *settings, "--training.steps", 6)
    parts = run.train("resume-parts", *settings, "--training.steps", 12)
    difference = largest_difference(losses(whole), losses(parts))
    if not difference < 5e-3:
        raise Failed(f"the resumed run's losses differ by {difference:.1e}")
    peak = max(record.get("peak_memory_gib", 0) for record in whole)
    printed = run.program("plan", *run.common, *settings, "--training.steps", 12, "--json")
    planned = json.loads(printed[printed.index("{") :])
    figures = {"difference": difference, "peak_gib": peak, "plan": planned, "last": whole[-1]}
    return f"losses of the resumed run within {difference:.1e}; {peak:.2f} GiB at most", figures


def deterministic(run: Run) -> tuple[str, Figures]:
    """Twice the same run, and one resumed in between, with debug.deterministic: bit for bit."""
    settings = [
        "--debug.deterministic", "true", "--compile.enable", "true",
        "--checkpoint.interval", "4", "--metrics.log_freq", "1", "--lr_scheduler.total_steps", "8",
    ]  # fmt: skip
    curves = [losses(run.train_small(f"deterministic-{name}", *settings, "--training.steps", 8)) for name in "ab"]
    run.train_small("deterministic-c", *settings, "--training.steps", 4)
    curves.append(losses(run.train_small("deterministic-c", *settings, "--training.steps", 8)))
    if not curves[0] == curves[1] == curves[2]:
        raise Failed(f"losses differ: {curves}")
    return "the same losses bit for bit, resumed too", {"losses": curves[0]}


def text(run: Run) -> tuple[str, Figures]:
    """A small model, trained here; its greedy texts after prompts of several lengths on GPU, compiled on GPU, and on
    CPU, in fp32."""
    run.train_small("text", "--training.steps", 60)
    options = ["generate", "--checkpoint", run.out / "text", "--temperature", 0, "--max-new-tokens", 400, "--json",
               "--dtype", "float32", "--prompt", "def f(", "--prompt", "import os, sys\n\nclass A"]  # fmt: skip
    printed = {
        "CPU": run.program(*options, environment={"CUDA_VISIBLE_DEVICES": ""}),
        "GPU": run.program(*options),
        "GPU, compiled": run.program(*options, "--compile"),
    }
    texts = {
        where: [json.loads(line)["text"] for line in lines.splitlines() if line.startswith("{")]
        for where, lines in printed.items()
    }
    if not texts["CPU"] == texts["GPU"] == texts["GPU, compiled"] or len(texts["CPU"]) != 2:
        raise Failed(f"the texts differ: {texts}")
    return "the same greedy texts on GPU, compiled, and on CPU", {"texts": texts["CPU"]}


def verify(run: Run) -> tuple[str, Figures]:
    """``verify`` on one process: plain (with Muon), with all that a GPU takes other kernels for, AdamW, experts."""
    kernels = [
        "--compile.enable", "true", "--data.document_mask", "true", "--data.packing", "best_fit",
        "--activation_checkpoint.mode", "selective",
    ]  # fmt: skip
    kinds = {
        "plain": [],
        "compiled, documents, selective": kernels,
        "adamw": ["--optimizer.name", "adamw"],
        "experts": ["--model.name", "qwen3_moe"],
        "experts, compiled": ["--model.name", "qwen3_moe", *kernels],
    }
    failed = {}
    for name, settings in kinds.items():
        try:
            run.program("verify", "--world-size", 1, *settings, "--model.flavor", "debug")
        except Failed as error:
            failed[name] = str(error)
    if failed:
        raise Failed(str(failed))
    return f"everything agrees: {', '.join(kinds)}", {}


def against_transformers(run: Run) -> tuple[str, Figures]:
    """``verify --hf`` of a small model: logits, greedy text, loss, gradients."""
    run.train_small("hf", "--training.steps", 20)
    run.program("export-hf", "--checkpoint", run.out / "hf", "--output", run.out / "hf" / "exported")
    for dtype in ("float32", "bfloat16"):
        run.program("verify", "--hf", run.out / "hf" / "exported", "--dtype", dtype)
    return "agrees with Transformers in float32 and bfloat16", {}


def lora(run: Run) -> tuple[str, Figures]:
    """Adapters on the exported model of a run, compiled."""
    run.train_small("lora-base", "--training.steps", 10)
    run.program("export-hf", "--checkpoint", run.out / "lora-base", "--output", run.out / "lora-base" / "exported")
    metrics = run.train("lora", "--model.hf_assets_path", run.out / "lora-base" / "exported", "--lora.rank", 8,
                        "--training.steps", 10, "--training.seq_len", 128, "--compile.enable", "true",
                        "--validation.enable", "false", "--metrics.log_freq", 1)  # fmt: skip
    curve = losses(metrics)
    if not all(map(math.isfinite, curve.values())):
        raise Failed(f"losses: {curve}")
    return f"loss {curve[1]:.3f} to {curve[10]:.3f}", {"losses": curve}


def experts(run: Run) -> tuple[str, Figures]:
    """A mixture of experts, compiled, 20 steps."""
    curve = losses(
        run.train("experts", "--model.name", "qwen3_moe", "--model.flavor", "debug" if run.tiny else "small",
                  "--training.steps", 20, "--compile.enable", "true", "--metrics.log_freq", 1,
                  "--validation.enable", "false", "--training.seq_len", "128" if run.tiny else "512")
    )  # fmt: skip
    if not curve[20] < curve[1]:
        raise Failed(f"losses: {curve}")
    return f"loss {curve[1]:.3f} to {curve[20]:.3f}", {"losses": curve}


LAYOUTS: dict[str, list[str]] = {
    "dp2": [],
    "dp2, compiled": ["--compile.enable", "true"],
    "replicas": ["--parallelism.data_parallel_replicate_degree", "2"],
    "tp2": ["--parallelism.tensor_parallel_degree", "2"],
    "tp2, compiled": ["--parallelism.tensor_parallel_degree", "2", "--compile.enable", "true"],
    "cp2, documents": ["--parallelism.context_parallel_degree", "2", "--data.document_mask", "true"],
    "pp2": ["--parallelism.pipeline_parallel_degree", "2", "--training.local_batch_size", "2"],
    "pp2, ZBV": ["--parallelism.pipeline_parallel_degree", "2", "--training.local_batch_size", "2",
                 "--parallelism.pipeline_parallel_schedule", "ZBVZeroBubble"],
    "experts, ep2": ["--model.name", "qwen3_moe", "--parallelism.expert_parallel_degree", "2"],
    "adamw, dp2": ["--optimizer.name", "adamw"],
}  # fmt: skip


def nccl_version() -> tuple[int, int, int]:
    """Of the library that is loaded: torch tells which it was built with."""
    import ctypes

    import torch

    number = ctypes.c_int()
    try:
        library = ctypes.CDLL("libnccl.so.2")
    except OSError:
        return torch.cuda.nccl.version()
    library.ncclGetVersion(ctypes.byref(number))
    return number.value // 10000, number.value // 100 % 100, number.value % 100


def nccl(run: Run) -> tuple[str, Figures]:
    """``verify`` of layouts of two ranks, over NCCL where it lets them share one GPU (2.30, by
    NCCL_MULTI_RANK_GPU_ENABLE). On a CPU: over gloo."""
    import torch

    os.environ["NCCL_MULTI_RANK_GPU_ENABLE"] = "1"
    on_gpu = torch.cuda.is_available()
    if on_gpu and torch.cuda.device_count() < 2 and nccl_version() < (2, 30):
        raise Failed(f"NCCL {nccl_version()} lets no two ranks share a GPU; 2.30 does")
    from torchtitan_style.config.files import DEFAULT_CONFIG
    from torchtitan_style.launch.configure import load_config
    from torchtitan_style.launch.torchrun import start_ranks
    from torchtitan_style.verification.report import print_checks
    from torchtitan_style.verification.run import compare_layout

    def start(folder: Path) -> None:
        module = "torchtitan_style.commands.verify_rank"
        start_ranks(module, [str(folder)], nproc=2, on_gpus=on_gpu)

    found: dict[str, str] = {}
    for name, settings in LAYOUTS.items():
        config = load_config(DEFAULT_CONFIG, ["--model.flavor", "debug", *settings], world_size=2)
        begin = time.perf_counter()
        try:
            checks = compare_layout(config, 2, on_gpus=on_gpu, start=start, say=print)
            found[name] = "agrees" if sum(map(print_checks, checks, checks.values())) == len(checks) else "differs"
        except (Exception, SystemExit) as error:
            found[name] = f"failed: {error}"
        print(f"== {name}: {found[name]}, {time.perf_counter() - begin:.0f} s", flush=True)
    if wrong := {name: said for name, said in found.items() if said != "agrees"}:
        raise Failed(f"{wrong}; the others agree: {[name for name in found if name not in wrong]}")
    return f"agree with one process: {', '.join(found)}", found


def two_ranks(run: Run) -> tuple[str, Figures]:
    """A whole run of two ranks that share a GPU: trained, saved in the background, resumed on one."""
    if run.tiny:
        return "not with --tiny", {}
    environment = {"NCCL_MULTI_RANK_GPU_ENABLE": "1"}
    settings = [
        "--model.flavor", "debug", "--training.seq_len", 128,
        "--checkpoint.interval", 4, "--checkpoint.async_mode", "async", "--metrics.log_freq", 1,
        "--lr_scheduler.total_steps", 12, "--training.global_batch_size", 8, "--training.local_batch_size", 4,
    ]  # fmt: skip
    # By torchrun itself: the launcher refuses more processes than there are GPUs.
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "torchtitan_style", "train"]
    torchrun += ["--job.dump_folder", run.out / "two-ranks", *run.common, *settings]
    run.python(*torchrun, "--training.steps", 6, environment=environment)
    run.python(*torchrun, "--training.steps", 8, "--parallelism.tensor_parallel_degree", 2, environment=environment)
    curve = losses(run.train("two-ranks", *settings, "--training.steps", 12))
    alone = losses(run.train("one-rank", *settings, "--training.steps", 12))
    difference = largest_difference(alone, curve)
    if not difference < 5e-3:
        raise Failed(f"dp2, then tp2, then one rank: losses differ from one rank's by {difference:.1e}")
    return f"dp2, then tp2, then one rank: losses within {difference:.1e} of one rank's", {"losses": curve}


CHECKS = {
    "about": Part(about, 60),
    "cuda_tests": Part(cuda_tests, 330),
    "masks": Part(masks, 200),
    "resume": Part(resume, 330),
    "deterministic": Part(deterministic, 300),
    "text": Part(text, 300),
    "verify": Part(verify, 330),
    "against_transformers": Part(against_transformers, 200),
    "lora": Part(lora, 200),
    "experts": Part(experts, 200),
    "nccl": Part(nccl, 400),
    "two_ranks": Part(two_ranks, 250),
}
