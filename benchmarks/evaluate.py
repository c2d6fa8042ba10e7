"""Evaluation: the harness's log-probabilities against Transformers', and `eval --data` against validation in training.

    python benchmarks/evaluate.py
    python benchmarks/evaluate.py --flavor 0.6B --questions 20

Needs the eval extra, and accelerate, for the harness's own class. Random weights of one of the published shapes,
exported, and loaded by both sides in bf16 (fp32 where the CPU has no bf16). Questions are like those of HellaSwag: some
70 tokens, four answers of some 20. The contenders take turns; figures are medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from random import Random

import tokenizers
import torch
import transformers
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

from torchtitan_style import Qwen3ForCausalLM, load_model
from torchtitan_style.common.device import current_device, fastest_dtype
from torchtitan_style.evaluation.harness import HarnessModel
from torchtitan_style.evaluation.score import score
from torchtitan_style.evaluation.windows import Window, batches
from torchtitan_style.models.qwen3.config import FLAVORS

REPEATS = 5
DTYPES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def export(folder: Path, flavor: str) -> None:
    """A model with random weights and a tokenizer of words, as Transformers writes them."""
    shape = FLAVORS[flavor]
    words = ["<|endoftext|>", *(f"w{number}" for number in range(2000))]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="w0")
    )
    backend.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "head_dim")  # fmt: skip
    dimensions = {name: getattr(shape, name) for name in names}
    config = transformers.Qwen3Config(**dimensions, tie_word_embeddings=shape.tie_word_embeddings)
    transformers.Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=words[0]).save_pretrained(folder)


def medians(contenders: dict[str, Callable[[], float]]) -> dict[str, float]:
    """The median of what each returns, in turns, after one turn that does not count."""
    found: dict[str, list[float]] = {name: [] for name in contenders}
    for turn in range(REPEATS + 1):
        for name, contender in contenders.items():
            figure = contender()
            if turn:
                found[name].append(figure)
    return {name: statistics.median(figures) for name, figures in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--flavor", default="mini", choices=FLAVORS)
    parser.add_argument("--questions", type=int, default=24)
    parser.add_argument("--batch-size", type=int, default=8)
    options = parser.parse_args()
    random, device = Random(0), current_device()
    dtype = fastest_dtype(device)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        export(folder, options.flavor)
        model = load_model(folder, dtype=DTYPES[dtype], device=device.type)
        ours = HarnessModel(model, world=None, max_length=512, batch_size=options.batch_size)
        theirs = HFLM(pretrained=str(folder), dtype=DTYPES[dtype], device=device.type, batch_size=options.batch_size)
        trained = Qwen3ForCausalLM(model.model.config).to(dtype).to(device).eval()

        def words(least: int, most: int) -> str:
            return " ".join(f"w{random.randrange(2000)}" for _ in range(random.randint(least, most)))

        requests = []
        for number in range(options.questions):
            question = words(40, 100)
            requests += [Instance("loglikelihood", {}, (question, " " + words(10, 30)), number) for _ in range(4)]

        def questions(contender: HarnessModel | HFLM) -> Callable[[], float]:
            def run() -> float:
                begin = time.perf_counter()
                contender.loglikelihood(requests, disable_tqdm=True)
                return len(requests) / (time.perf_counter() - begin)

            return run

        figures = medians({"ours": questions(ours), "Transformers": questions(theirs)})
        print(f"{options.flavor}, {DTYPES[dtype]}, {device}, {torch.get_num_threads()} threads")
        for contender, figure in figures.items():
            print(f"harness, answers a second: {contender:14} {figure:8.1f}")
        print(f"ours / Transformers: {figures['ours'] / figures['Transformers']:.2f}")

        ids = torch.randint(2000, (8, 513))
        rows = [Window(row[:-1].tolist(), row[1:].tolist(), 0, None) for row in ids]

        def evaluated() -> float:
            begin = time.perf_counter()
            list(score(model.model, batches(rows, tokens=8 * 512), device=device))
            return ids[:, 1:].numel() / (time.perf_counter() - begin)

        @torch.no_grad()
        def validated() -> float:
            begin = time.perf_counter()
            loss, _ = trained(ids[:, :-1].to(device), ids[:, 1:].to(device))
            loss.item()
            return ids[:, 1:].numel() / (time.perf_counter() - begin)

        figures = medians({"eval --data": evaluated, "validation": validated})
        for contender, figure in figures.items():
            print(f"tokens a second: {contender:14} {figure:10,.0f}")
        print(f"eval / validation: {figures['eval --data'] / figures['validation']:.2f}")


if __name__ == "__main__":
    main()
