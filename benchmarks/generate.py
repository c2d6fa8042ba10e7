"""Tokens per second of generation: ours against Transformers' ``generate``, side by side.

    python benchmarks/generate.py                                  # Qwen3-0.6B's shape, batch 1 and 8
    python benchmarks/generate.py --flavor small --dtype float32
    python benchmarks/generate.py --compile --repeats 2            # compiled ones too: minutes

Weights are random and the same on both sides, prompts are random tokens, tokens are chosen greedily, and as many are
drawn everywhere. Contenders take turns within one process; figures are medians. Prefill is the time to the first
new token, decode all the later ones. At batch 1 each token needs every weight once: what is printed beside it is
the share of the memory's bandwidth, measured in turns with them, that this amounts to.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import transformers

from torchtitan_style.common.device import current_device, fastest_dtype, name, synchronize, without_cudnn_attention
from torchtitan_style.cpu.half_precision import multiply_in_fp32
from torchtitan_style.inference.cache import KVCache
from torchtitan_style.inference.decode import Decoder
from torchtitan_style.inference.sampling import Sampler
from torchtitan_style.inference.settings import Sampling
from torchtitan_style.inference.step import DecodingStep
from torchtitan_style.models.qwen3.config import FLAVORS, Qwen3Config
from torchtitan_style.models.qwen3.hf import to_hf
from torchtitan_style.models.qwen3.inference import fuse
from torchtitan_style.models.qwen3.model import Qwen3ForCausalLM

Run = Callable[[torch.Tensor, int], tuple[float, float, torch.Tensor]]
"""(prompts [B, T], new tokens) → seconds of prefill, seconds of decode, new tokens [B, N]."""


def ours(
    model: Qwen3ForCausalLM, config: Qwen3Config, *, step: DecodingStep | None = None, compile: bool = False
) -> Run:
    def run(prompts: torch.Tensor, new: int) -> tuple[float, float, torch.Tensor]:
        for layer in model.model.layers:  # of one that is fused to be compiled
            layer.compiles = compile and prompts.is_cuda  # type: ignore[assignment]
        sampler = Sampler(Sampling(temperature=0.0), seeds=range(len(prompts)))
        cache = KVCache(config.windows, capacity=prompts.shape[1] + new)
        decoder = Decoder(model, prompts.tolist(), sampler, cache=cache, device=prompts.device, step=step)
        with without_cudnn_attention():  # as load_model does
            tokens = [drawn for _, drawn in zip(range(new), decoder, strict=False)]  # and no step beyond
        return decoder.speed.prefill_seconds, decoder.speed.decode_seconds, torch.tensor(tokens).T

    return run


def theirs(model: transformers.Qwen3ForCausalLM, *, cache: str, compile: bool) -> Run:
    def run(prompts: torch.Tensor, new: int) -> tuple[float, float, torch.Tensor]:
        settings = transformers.GenerationConfig(
            do_sample=False, max_new_tokens=new, min_new_tokens=new, pad_token_id=0, eos_token_id=0,
            cache_implementation=cache, disable_compile=not compile,
        )  # fmt: skip
        if compile:
            settings.compile_config = transformers.CompileConfig(fullgraph=False)
            settings.compile_config._compile_all_devices = True  # it compiles on accelerators alone otherwise
        clock = _Clock()
        begin = time.perf_counter()
        text = model.generate(
            prompts, attention_mask=torch.ones_like(prompts), generation_config=settings, streamer=clock
        )
        _, first, *_, last = clock.times  # the prompt is "streamed" too
        return first - begin, last - first, text[:, prompts.shape[1] :].cpu()

    return run


class _Clock:
    """When each token came; ``generate`` has moved it to the CPU by then."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, _tokens: torch.Tensor) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


def build(
    config: Qwen3Config, dtype: torch.dtype, device: torch.device, *, compile: bool
) -> tuple[Qwen3ForCausalLM, torch.nn.Module]:
    """Both models with the same random weights."""
    torch.manual_seed(0)
    # What has no weights, such as the rotary frequencies, stays fp32.
    model = Qwen3ForCausalLM(config).to(dtype)
    arguments = to_hf(config)
    hf = transformers.AutoModelForCausalLM.from_config(transformers.Qwen3Config(**arguments), dtype=dtype).eval()
    hf.load_state_dict(model.state_dict(), strict=True)
    model, hf = model.to(device), hf.to(device)
    fuse(model.eval(), compile=compile)
    return model, hf


class Bandwidth:
    """Bytes per second that a matrix too large for any cache is read with: the best of sums and products."""

    def __init__(self, device: torch.device) -> None:
        self.matrix, self.vector = torch.ones(2**18, 1024, device=device), torch.ones(1024, device=device)  # 1 GiB
        self.best = 0.0

    def measure(self) -> None:
        """Take a turn, as the contenders do: what else a machine does changes from one minute to the next."""
        for action in (self.matrix.sum, lambda: torch.mv(self.matrix, self.vector)) * 2:
            synchronize(self.matrix.device)
            begin = time.perf_counter()
            action()
            synchronize(self.matrix.device)
            self.best = max(self.best, self.matrix.nbytes / (time.perf_counter() - begin))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--flavor", choices=FLAVORS, default="0.6B")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="left out: as generate chooses it")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of a prompt")
    parser.add_argument("--new", type=int, default=256, help="tokens to generate")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true", help="ours and Transformers' static cache compiled too")
    parser.add_argument("--without", action="append", default=[], help="leave out contenders with this in their name")
    options = parser.parse_args()
    config, device = FLAVORS[options.flavor], current_device()
    dtype = getattr(torch, options.dtype) if options.dtype else fastest_dtype(device)
    options.dtype = str(dtype).removeprefix("torch.")
    multiply_in_fp32(dtype, device)  # for Transformers too, which has much to gain
    model, hf = build(config, dtype, device, compile=options.compile)
    on_gpu = device.type == "cuda"
    replayed = DecodingStep(model, config, device, compile=False, replay=True) if on_gpu else None
    contenders = {
        "ours": ours(model, config, step=replayed),
        "HF, dynamic cache": theirs(hf, cache="dynamic", compile=False),
        "HF, static cache": theirs(hf, cache="static", compile=False),
    }
    if options.compile:
        begin = time.perf_counter()
        step = DecodingStep(model, config, device, compile=True, replay=on_gpu)
        for rows in options.batch:
            step.prepare(rows)
        print(f"compiled in {time.perf_counter() - begin:.1f} s", flush=True)
        contenders["ours, compiled"] = ours(model, config, step=step, compile=True)
        contenders["HF, static cache, compiled"] = theirs(hf, cache="static", compile=True)

    for left_out in [who for who in contenders if any(text in who for text in options.without)]:
        del contenders[left_out]
    if "ours" not in contenders or not any(who.startswith("HF") for who in contenders):
        parser.error("--without: ours and one of Transformers' must be left")
    print(
        f"{options.flavor}, {options.dtype}, prompt {options.prompt}, {options.new} new tokens, {name(device)}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, medians of {options.repeats}",
        flush=True,
    )
    bandwidth = Bandwidth(device)
    weights = config.num_matmul_parameters * dtype.itemsize
    for batch in options.batch:
        prompts = torch.randint(0, config.vocab_size, (batch, options.prompt), device=device)
        runs: dict[str, list[tuple[float, float, torch.Tensor]]] = {contender: [] for contender in contenders}
        for repeat in range(options.repeats + 1):
            for contender, run in contenders.items():
                # The first is to warm up; a static cache is compiled for its size.
                result = run(prompts, options.new if repeat or options.compile else 8)
                runs[contender] += [result] if repeat else []
            bandwidth.measure()
        report(batch, options, runs, bandwidth.best / weights)
    print(
        f"\nmemory was read at {bandwidth.best / 1e9:.1f} GB/s: at batch 1 the {weights / 1e9:.2f} GB of weights allow "
        f"{bandwidth.best / weights:,.1f} tokens/s"
    )


def report(
    batch: int,
    options: argparse.Namespace,
    runs: dict[str, list[tuple[float, float, torch.Tensor]]],
    limit: float,
) -> None:
    """limit: decode steps per second if nothing but reading the weights took time."""
    prefill = {who: batch * options.prompt / statistics.median(run[0] for run in found) for who, found in runs.items()}
    decode = {
        who: batch * (options.new - 1) / statistics.median(run[1] for run in found) for who, found in runs.items()
    }
    best_prefill, best_decode = (max(v for who, v in x.items() if who.startswith("HF")) for x in (prefill, decode))
    print(
        f"\nbatch {batch:<20} {'prefill':>10} {'of HF best':>11} {'decode':>10} {'of HF best':>11} {'of bandwidth':>13}"
    )
    for who in runs:
        share = f"{decode[who] / batch / limit:12.0%}"
        print(
            f"{who:<26} {prefill[who]:>10,.0f} {prefill[who] / best_prefill:>10.2f}× {decode[who]:>10,.1f} "
            f"{decode[who] / best_decode:>10.2f}× {share:>13}"
        )
    own = runs["ours"][0][2]
    for who, found in runs.items():
        if who != "ours":
            same = (own == found[0][2]).float().mean().item()
            print(f"{who}: {same:.1%} of its tokens are ours" if same < 1 else f"{who}: the same tokens")


if __name__ == "__main__":
    main()
