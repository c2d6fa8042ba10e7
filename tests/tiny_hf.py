"""Tiny Qwen3 models and tokenizers in Transformers' format, written by Transformers and tokenizers themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

DIMENSIONS: dict[str, Any] = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "max_window_layers": 2,
    "tie_word_embeddings": True,
}
_THETA = 50_000.0
_TEXTS = ["def loss(x): return 1234 + 56\n\n  the gradient of naïve 学习 🙂 don't; the token and its weight"]
_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_CHAT_TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# How Qwen's tokenizers cut text into words.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def hf_config(**changes: Any) -> transformers.Qwen3Config:
    """A small model's configuration, with another rope theta than either side takes where nothing is said."""
    rope = {"rope_type": "default", "rope_theta": changes.pop("rope_theta", _THETA)}
    return transformers.Qwen3Config(**DIMENSIONS | {"rope_parameters": rope} | changes, attn_implementation="eager")


def hf_model(**changes: Any) -> transformers.Qwen3ForCausalLM:
    """Such a model with random weights, none of them at a special value; the same ones each time."""
    model = transformers.Qwen3ForCausalLM(hf_config(**changes)).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.3 if "norm" in name else 0.15, generator=generator)
    return model


def write_tokenizer(folder: Path, *, vocab_size: int = 400, like_qwen: bool = False) -> None:
    """A byte-level BPE with Qwen's special tokens, and all that an instruct model has beside it.

    like_qwen: cut into words as Qwen does, and read by the class that reads Qwen's.
    """
    backend = Tokenizer(models.BPE())
    if like_qwen:
        backend.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(_QWEN_WORDS), "isolated")
        in_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        backend.pre_tokenizer = pre_tokenizers.Sequence([words, in_bytes])
    else:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(_TEXTS * 20, trainer)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    backend.model.save(str(folder))  # vocab.json and merges.txt
    settings = {
        "tokenizer_class": "Qwen2Tokenizer" if like_qwen else "PreTrainedTokenizerFast",
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "clean_up_tokenization_spaces": False,
    }
    special = {role: settings[role] for role in ("eos_token", "pad_token")}
    generation = {"do_sample": True, "temperature": 0.6, "eos_token_id": [2, 0], "pad_token_id": 0}
    for name, content in (
        ("tokenizer_config.json", settings),
        ("special_tokens_map.json", special),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(content), encoding="utf-8")
    (folder / "chat_template.jinja").write_text(_CHAT_TEMPLATE, encoding="utf-8")
