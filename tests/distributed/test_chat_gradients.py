"""Loss and every gradient of packed conversations against Transformers on each conversation by itself, in fp32."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file

from tests.data.conversations import assistant, user
from tests.tiny_hf import hf_model, write_tokenizer
from torchtitan_style.data.prepare.store import CorpusStore
from torchtitan_style.launch.configure import load_config

LAYOUTS: dict[str, tuple[int, list[str]]] = {
    "one process": (1, []),
    "two microbatches": (1, ["--training.local_batch_size", "2"]),
    "dp2": (2, []),
    "tp2": (2, ["--parallelism.tensor_parallel_degree", "2"]),
}
WORDS = ["loss", "gradient", "token", "weight", "naïve", "学习", "🙂", "1234"]


def talks() -> list[list[dict[str, Any]]]:
    """Of one to three turns, some so long that they fill most of a row."""
    draw = random.Random(0)

    def words(most: int) -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, most)))

    return [[m for _ in range(draw.randint(1, 3)) for m in (user(words(6)), assistant(words(5)))] for _ in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("conversations")
    hf_model().save_pretrained(folder / "model")
    write_tokenizer(folder / "model", like_qwen=True)
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks()))
    config: dict[str, Any] = {
        "job": {"dump_folder": str(folder / "run")},
        "model": {"hf_assets_path": str(folder / "model")},
        "data": {
            "dataset": "files",
            "paths": [str(folder / "talks.jsonl")],
            "format": "chat",
            "tokenizer": str(folder / "model"),
            "prepared_folder": str(folder / "prepared"),
        },
        "training": {"seq_len": 256, "local_batch_size": -1, "mixed_precision_param": "float32"},
        "validation": {"enable": False},
        "checkpoint": {"enable": False},
    }
    (folder / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
    loaded = load_config(folder / "config.toml", ["--training.global_batch_size", "4"])
    prepared = CorpusStore.of(loaded, for_run=False).get(say=lambda line: None, processes=1)
    rows = prepared.rows("", "train", seq_len=256, packing="best_fit").num_rows
    assert rows == 4, "one batch is all of them, each once"
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> dict[str, torch.Tensor]:
    """Sum of the losses of all turns over the number of their tokens, and its gradients, one conversation at a time."""
    model = transformers.Qwen3ForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "model")
    encoded = [labelled(talk, tokenizer) for talk in talks()]
    tokens = sum(int((labels != -100).sum()) for _, labels in encoded)
    total = 0.0
    for ids, labels in encoded:
        logits = model(ids[None]).logits[0]
        loss = F.cross_entropy(logits[:-1], labels[1:], ignore_index=-100, reduction="sum") / tokens
        loss.backward()
        total += loss.item()
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return found | {"loss": torch.tensor(total), "tokens": torch.tensor(float(tokens))}


def labelled(talk: list[dict[str, Any]], tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids of a conversation, and as labels those of its turns of the assistant."""
    ids: list[int] = []
    labels: list[int] = []
    for message in talk:
        header = tokenizer.encode(f"<|im_start|>{message['role']}\n", add_special_tokens=False)
        body = tokenizer.encode(message["content"] + "<|im_end|>\n", add_special_tokens=False)
        ids += header + body
        labels += [-100] * len(header) + (body if message["role"] == "assistant" else [-100] * len(body))
    assert ids == tokenizer.apply_chat_template(talk)["input_ids"]
    return torch.tensor(ids), torch.tensor(labels)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_packed_conversations_are_as_each_alone(
    folder: Path, expected: dict[str, torch.Tensor], run_ranks: Callable[..., None], tmp_path: Path, layout: str
) -> None:
    ranks, overrides = LAYOUTS[layout]
    output = tmp_path / "gradients.safetensors"
    script = Path(__file__).with_name("gradients_of_conversations.py")
    run_ranks(script, ranks, folder / "config.toml", output, "--training.global_batch_size", "4", *overrides)
    found = load_file(output)
    assert found.keys() == expected.keys()
    assert found["tokens"] == expected["tokens"]
    torch.testing.assert_close(found["loss"], expected["loss"], rtol=1e-5, atol=0)
    for name, grad in expected.items():
        error = (found[name] - grad).norm() / grad.norm()
        assert error < 1e-5, f"{name}: {error}"
