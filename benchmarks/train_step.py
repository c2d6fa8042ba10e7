"""Time and memory of a training step: ours against Hugging Face Transformers' Qwen3 and LitGPT's, side by side.

    python benchmarks/train_step.py                                  # the default model and batch
    python benchmarks/train_step.py --model 100M --rows 4 --seq-len 1024
    python benchmarks/train_step.py --model 1.7B --rows 2 --seq-len 4096   # on a GPU

All contenders have the same dimensions, batch, optimizer (fused AdamW on fp32 weights), clipping, and compute in bf16,
or in fp32 on CPUs without bf16. Each has a process of its own and takes turns with ours; ratios are medians over the
turns. What a process can reach at most, the rate of one large matrix multiplication, takes its turns too. Memory is
what a step takes at most beyond what the libraries take. LitGPT takes part where it is installed, the Trainer where
accelerate is, which it needs.
"""

from __future__ import annotations

import argparse
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from race import Racer, Turns, machine, parsed, parser_of, race, serve, start, table, write

from torchtitan_style.common.device import current_device, fastest_dtype
from torchtitan_style.config import Config
from torchtitan_style.config.files import DEFAULT_CONFIG
from torchtitan_style.config.layout import plan_layout
from torchtitan_style.data.loader import Batch, Microbatch
from torchtitan_style.distributed.world import World, init_world
from torchtitan_style.launch.configure import load_config
from torchtitan_style.models.qwen3.attention import document_positions
from torchtitan_style.models.qwen3.config import FLAVORS, Qwen3Config
from torchtitan_style.models.registry import model_config
from torchtitan_style.optim.guard import StepGuard
from torchtitan_style.train.step import build_optimizer, build_training_model, train_step

SHAPES = {"100M": (768, 2048, 12, 12, 4, 64, 32_768)}
"""Beside the flavors: hidden and intermediate size, layers, heads, key/value heads, head size, vocabulary."""

LR = 3e-4


def overrides(arguments: argparse.Namespace) -> list[str]:
    """The command line that sets the shape, for our config."""
    given = {
        "training.seq_len": arguments.seq_len,
        "training.global_batch_size": arguments.rows,
        "training.local_batch_size": -1,
        "optimizer.name": "adamw",
        "optimizer.lr": LR,
        "lr_scheduler.warmup_steps": 0,
        "activation_checkpoint.mode": arguments.recompute,
        "training.mixed_precision_param": precision(),
    }
    if arguments.model in FLAVORS:
        given["model.flavor"] = arguments.model
    else:
        hidden, intermediate, layers, heads, kv_heads, head_dim, vocabulary = SHAPES[arguments.model]
        given |= {
            "model.hidden_size": hidden,
            "model.intermediate_size": intermediate,
            "model.num_hidden_layers": layers,
            "model.max_window_layers": layers,
            "model.num_attention_heads": heads,
            "model.num_key_value_heads": kv_heads,
            "model.head_dim": head_dim,
            "model.vocab_size": vocabulary,
        }
    if FLAVORS.get(arguments.model, FLAVORS["small"]).max_position_embeddings < arguments.seq_len:
        given["model.max_position_embeddings"] = arguments.seq_len
    return [text for key, value in given.items() for text in (f"--{key}", str(value))] + arguments.ours


def precision() -> str:
    """What all contenders compute in: the fastest there is."""
    return str(fastest_dtype(current_device())).removeprefix("torch.")


def make_config(arguments: argparse.Namespace, *more: str, world_size: int = 1) -> Config:
    return load_config(DEFAULT_CONFIG, [*overrides(arguments), *more], world_size=world_size)


def tokens(config: Qwen3Config, arguments: argparse.Namespace, device: str) -> torch.Tensor:
    """[rows, seq_len + 1]"""
    generator = torch.Generator().manual_seed(0)
    shape = (arguments.rows, arguments.seq_len + 1)
    return torch.randint(0, config.vocab_size, shape, generator=generator).to(device)


# The contenders, each in its own process


def ours(arguments: argparse.Namespace, turns: Turns, compile: str) -> None:
    """What ``train`` runs at each step, without logging and data."""
    serve(turns, our_step(arguments, turns.device, *our_compile(compile)))


def ours_on_documents(arguments: argparse.Namespace, turns: Turns, compile: str) -> None:
    """The same rows as documents that do not see each other, of 50 to 250 tokens."""
    more = [*our_compile(compile), "--data.document_mask", "true"]
    serve(turns, our_step(arguments, turns.device, *more, documents=True))


def our_compile(compile: str) -> list[str]:
    """The command line of our config that compiles nothing ("eager") or the blocks ("block")."""
    if compile == "eager":
        return ["--compile.enable", "false"]
    return ["--compile.enable", "true"]


def our_step(
    arguments: argparse.Namespace,
    device: str,
    *more: str,
    world_size: int = 1,
    microbatches: int = 1,
    documents: bool = False,
) -> Callable[[], None]:
    """A step of this rank's rows. more: of the command line, for our config."""
    config = make_config(arguments, *more, world_size=world_size)
    world = init_world(plan_layout(config.parallelism, world_size), timeout_seconds=600)
    rows = tokens(model_config(config.model), arguments, device).chunk(world.layout.dp)
    return step_on(rows[world.dp_rank], config, world, microbatches=microbatches, documents=documents)


def step_on(
    ids: torch.Tensor, config: Config, world: World, *, microbatches: int = 1, documents: bool = False
) -> Callable[[], None]:
    """What ``train`` does at each step, on the same rows [B, T + 1] each time. documents: of several of them each."""
    model = build_training_model(config, world, warn=print)
    optimizer = build_optimizer(model, config, world)
    guard = StepGuard(config.training.spike_sigma, config.training.spike_window, world.device)
    rows = []
    for part in ids.chunk(microbatches):
        inputs, labels = part[:, :-1].contiguous(), part[:, 1:].contiguous()
        rows.append(Microbatch(inputs, labels, *(of_documents(inputs) if documents else ())))
    batch = Batch([microbatch.of_part(world.part) for microbatch in rows], hash=0)
    step = 0

    def run() -> None:
        nonlocal step
        step += 1
        train_step(model, optimizer, batch, step=step, config=config, world=world, guard=guard)

    return run


def of_documents(inputs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Numbers of made-up documents, and positions in them, [B, T] both."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(50, 250, (inputs.numel(),), generator=generator)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), lengths)[: inputs.numel()].view_as(inputs)
    numbers = numbers.to(inputs.device)
    return numbers, document_positions(numbers)


def hf_model(arguments: argparse.Namespace, attention: str) -> Any:
    """Transformers' Qwen3 with fp32 weights, and our config of it."""
    import transformers

    config = model_config(make_config(arguments).model)
    transformers.logging.set_verbosity_error()
    model = transformers.Qwen3ForCausalLM._from_config(
        transformers.Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            tie_word_embeddings=config.tie_word_embeddings,
            max_position_embeddings=config.max_position_embeddings,
            use_cache=False,
        ),
        attn_implementation=attention,
        dtype=torch.float32,
    )
    if arguments.recompute == "full":
        model.gradient_checkpointing_enable()
    return model.train(), config


def hf(arguments: argparse.Namespace, turns: Turns, attention: str, compile: str) -> None:
    """Transformers' model and loss in a bare loop."""
    model, config = hf_model(arguments, attention)
    model.to(turns.device)
    if compile == "compiled":
        model.compile()
    ids = tokens(config, arguments, turns.device)[:, :-1].contiguous()
    bare_loop(turns, model, lambda: model(input_ids=ids, labels=ids).loss)


def trainer(arguments: argparse.Namespace, turns: Turns, attention: str, compile: str) -> None:
    """Transformers' Trainer."""
    import tempfile

    import transformers

    class TakeTurns(transformers.TrainerCallback):  # type: ignore[misc]
        def on_step_end(self, *_arguments: Any, **_named: Any) -> None:
            turns.step_is_done()

    model, config = hf_model(arguments, attention)
    ids = tokens(config, arguments, "cpu")[:, :-1]
    with tempfile.TemporaryDirectory() as folder:
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(
                folder,
                per_device_train_batch_size=arguments.rows,
                max_steps=10**6,
                learning_rate=LR,
                bf16=precision() == "bfloat16",
                optim="adamw_torch_fused",
                max_grad_norm=1.0,
                torch_compile=compile == "compiled",
                use_cpu=turns.device == "cpu",
                dataloader_pin_memory=False,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
                logging_steps=10**6,
            ),
            train_dataset=[{"input_ids": row, "labels": row} for row in ids],
            callbacks=[TakeTurns()],
        )
        turns.wait()
        trainer.train()


def litgpt(arguments: argparse.Namespace, turns: Turns, compile: str) -> None:
    """LitGPT's model and its chunked loss, as its ``pretrain`` calls them."""
    from litgpt.config import Config as LitConfig
    from litgpt.model import GPT
    from litgpt.utils import chunked_cross_entropy

    config = model_config(make_config(arguments).model)
    model = GPT(
        LitConfig(
            name="qwen3",
            block_size=arguments.seq_len,
            vocab_size=config.vocab_size,
            padded_vocab_size=config.vocab_size,
            n_layer=config.num_hidden_layers,
            n_head=config.num_attention_heads,
            n_query_groups=config.num_key_value_heads,
            n_embd=config.hidden_size,
            head_size=config.head_dim,
            intermediate_size=config.intermediate_size,
            rotary_percentage=1.0,
            rope_base=int(config.rope_theta),
            parallel_residual=False,
            bias=False,
            norm_class_name="RMSNorm",
            norm_qk=True,
            norm_eps=config.rms_norm_eps,
            mlp_class_name="LLaMAMLP",
        )
    )
    if config.tie_word_embeddings:
        model.lm_head.weight = model.transformer.wte.weight
    model.to(turns.device)
    forward = torch.compile(model) if compile == "compiled" else model
    ids = tokens(config, arguments, turns.device)
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    bare_loop(turns, model, lambda: chunked_cross_entropy(forward(inputs), labels))


def bare_loop(turns: Turns, model: Any, loss: Callable[[], torch.Tensor]) -> None:
    """The step that people write by hand: autocast, fused AdamW, clipping."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    autocasts = precision() == "bfloat16"

    def step() -> None:
        optimizer.zero_grad()
        with torch.autocast(turns.device, torch.bfloat16, enabled=autocasts):
            value = loss()
        value.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    serve(turns, step)


def matmul(arguments: argparse.Namespace, turns: Turns) -> None:
    """What one process can do: as many operations as a step of the model has, in large square matrices."""
    size = 8192 if turns.device == "cuda" else 2048
    a, b = (torch.randn(size, size, device=turns.device, dtype=getattr(torch, precision())) for _ in range(2))
    out = torch.empty_like(a)
    count = max(1, round(step_flops(arguments) / (2 * size**3)))

    def step() -> None:
        for _ in range(count):
            torch.mm(a, b, out=out)

    serve(turns, step)


def step_flops(arguments: argparse.Namespace) -> float:
    config = model_config(make_config(arguments).model)
    return config.flops_per_token(arguments.seq_len) * arguments.rows * arguments.seq_len


CONTENDERS: dict[str, tuple[Callable[..., None], tuple[str, ...]]] = {
    "ours, a graph per block": (ours, ("block",)),
    "ours, eager": (ours, ("eager",)),
    "ours, documents masked": (ours_on_documents, ("block",)),
    "HF loop, compiled": (hf, ("sdpa", "compiled")),
    "HF loop, compiled, attention as matmuls": (hf, ("eager", "compiled")),
    "HF loop, eager": (hf, ("sdpa", "eager")),
    "HF Trainer, compiled": (trainer, ("sdpa", "compiled")),
    "HF Trainer, eager": (trainer, ("sdpa", "eager")),
    "LitGPT, compiled": (litgpt, ("compiled",)),
    "LitGPT, eager": (litgpt, ("eager",)),
    "large matmuls": (matmul, ()),
}
"""Name → function that serves it, and what it is given. The first is what the others are compared with."""

NEEDED = {"LitGPT": "litgpt", "Trainer": "accelerate"}
"""Package that contenders of this name cannot do without."""


def main() -> None:
    parser = parser_of(__doc__, CONTENDERS, [*FLAVORS, *SHAPES])
    parser.add_argument("--recompute", default="none", choices=["none", "full"], help="activation checkpointing")
    arguments = parsed(parser)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.serve:
        function, given = CONTENDERS[arguments.serve]
        function(arguments, Turns(device), *given)  # does not return
    make_config(arguments)  # so that a mistake shows at once

    absent = [text for text, package in NEEDED.items() if not importlib.util.find_spec(package)]
    names = [name for name in CONTENDERS if not any(text in name for text in absent)]
    racers = race(names, lambda name: begin(name, arguments), arguments)
    about = machine(device)
    report(arguments, racers, about)
    write(arguments, about, racers)


def begin(name: str, arguments: argparse.Namespace) -> Racer:
    """Start a contender and let it compile."""
    racer = start(name, __file__, arguments, "--recompute", arguments.recompute)
    racer.warm_up(3)
    print(f"{name}: first step after {racer.first[0]:.1f} s", flush=True)
    return racer


def report(arguments: argparse.Namespace, racers: list[Racer], about: dict[str, str]) -> None:
    import transformers

    per_step = arguments.rows * arguments.seq_len
    peak = next((racer.step_seconds for racer in racers if racer.name == "large matmuls"), None)
    rows = [
        (
            racer.name,
            f"{per_step / racer.step_seconds:,.0f}",
            f"{racer.ratio:.2f}",
            f"{peak / racer.step_seconds:.0%}" if peak else "?",
            f"{racer.memory / 2**20:,.0f}",
            f"{racer.memory / racers[0].memory:.2f}",
            f"{racer.first[0]:.1f}",
        )
        for racer in racers
        if racer.name != "large matmuls"
    ]
    print(
        f"\n{arguments.model}, {arguments.rows} rows of {arguments.seq_len}, {precision()}; {about['device']}, "
        f"torch {about['torch']}, transformers {transformers.__version__}; "
        f"medians of {arguments.repeats} turns of {arguments.steps} steps\n"
    )
    heads = ("", "tokens/s", "× time of ours", "of matmul rate", "peak MiB", "× memory of ours", "first step, s")
    print(table(heads, rows))
    if peak:
        print(f"\nlarge {precision()} matmuls: {step_flops(arguments) / peak / 1e9:,.0f} GFLOP/s")


if __name__ == "__main__":
    main()
