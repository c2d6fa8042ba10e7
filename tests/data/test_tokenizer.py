"""The tokenizer trained here, against Transformers, and against Qwen's pre-tokenizer by another engine."""

from __future__ import annotations

import json
import random
import shutil
import sys
import unicodedata
from pathlib import Path

import pytest
import regex
import transformers

from torchtitan_style.common.errors import UserError
from torchtitan_style.data.tokenizer.tokenizer import Tokenizer, train

# As in https://huggingface.co/Qwen/Qwen3-0.6B, tokenizer_config.json, from <|endoftext|> on.
QWEN3 = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
    "<tool_response>",
    "</tool_response>",
    "<think>",
    "</think>",
]

# As in Qwen/Qwen3-0.6B, tokenizer.json, pre_tokenizer.
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)

SCRIPTS = {
    "code": "def f(x):\n\treturn {'a': x ** 2}  # 0x1F, 12345\n",
    "contractions": "I'm, we'LL, they'd; it's 'round",
    "whitespace": "  two  \t\ttabs\r\n\r\n\n   end ",
    "Latin": "Straße, naïve, Łódź, e\u0301 (decomposed), ﬁ",
    "Greek, Cyrillic": "Ελληνικά, русский, українська",
    "right to left": "العربية, עברית, فارسی ١٢٣",
    "Indic": "हिन्दी, தமிழ், বাংলা १२३",
    "East Asian": "日本語のテキスト、中文，한국어 １２",
    "emoji": "🙂👩‍👩‍👧🏽🇺🇳 ❤️",
    "control": "\x00\x01\x7f\ufeff\u200b\u2028\x85",
    "beyond the BMP": "𝔘𝔫𝔦 𒀀 𐍈",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained") / "tokenizer"
    train([*SCRIPTS.values()] * 3 + [Path(random.__file__).read_text(encoding="utf-8")], folder, vocab_size=700)
    return folder


@pytest.fixture(scope="module")
def qwen_like(folder: Path) -> transformers.PreTrainedTokenizerBase:
    return transformers.AutoTokenizer.from_pretrained(folder)


def arbitrary(seed: int, length: int = 300) -> str:
    """Any characters but surrogates, half of them ASCII."""
    rng = random.Random(seed)
    points = [rng.randrange(128) if rng.random() < 0.5 else rng.randrange(sys.maxunicode + 1) for _ in range(length)]
    return "".join(chr(p) for p in points if not 0xD800 <= p < 0xE000)


def old_enough(text: str) -> str:
    """Without characters that some engine's version of Unicode may not know yet."""
    old = unicodedata.ucd_3_2_0.category
    return "".join(c for c in text if c.isascii() or old(c) == unicodedata.category(c) != "Cn")


TEXTS = [*SCRIPTS.values(), *map(arbitrary, range(10)), ""]


def test_special_tokens_are_qwen3s_in_its_order(folder: Path, qwen_like: transformers.PreTrainedTokenizerBase) -> None:
    own = Tokenizer(folder)
    assert [own.backend.id_to_token(i) for i in range(26)] == QWEN3
    assert qwen_like.convert_tokens_to_ids(QWEN3) == list(range(26))
    assert len(QWEN3) == 26
    assert (own.end_of_text, own.num_ids) == (0, 700)
    assert own.special_id("eos_token") == own.special_id("pad_token") == 0
    assert (qwen_like.eos_token, qwen_like.pad_token, len(qwen_like)) == ("<|endoftext|>", "<|endoftext|>", 700)


@pytest.mark.parametrize("text", TEXTS)
def test_transformers_agrees_and_text_comes_back(
    text: str, folder: Path, qwen_like: transformers.PreTrainedTokenizerBase
) -> None:
    own = Tokenizer(folder)
    ids = own.encode(text)
    assert qwen_like.encode(text, add_special_tokens=False) == qwen_like.encode(text) == ids
    assert [found.tolist() for found in own.encode_batch([text, "other", text])] == [ids, own.encode("other"), ids]
    assert own.decode(ids) == qwen_like.decode(ids) == text


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_are_qwens(text: str, folder: Path) -> None:
    text = old_enough(text)
    pieces = [text[a:b] for _, (a, b) in Tokenizer(folder).backend.pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == regex.findall(PIECES, text)


def test_no_token_reaches_across_pieces(folder: Path) -> None:
    own = Tokenizer(folder)
    for text in map(old_enough, TEXTS):
        joined = [i for piece in regex.findall(PIECES, text) for i in own.encode(piece)]
        assert own.encode(text) == joined


def test_decoding_leaves_turns_out_and_keeps_what_belongs_to_an_answer(
    folder: Path, qwen_like: transformers.PreTrainedTokenizerBase
) -> None:
    text = "<|im_start|>user\nhi<|im_end|><think>\nso\n</think>\n<tool_call>x</tool_call><|fim_pad|><|endoftext|>"
    own = Tokenizer(folder)
    ids = own.encode(text)
    assert [i for i in ids if i < 26] == [QWEN3.index(token) for token in regex.findall(r"<[^\s>]+>", text)]
    expected = "user\nhi<think>\nso\n</think>\n<tool_call>x</tool_call><|fim_pad|>"
    assert own.decode(ids) == qwen_like.decode(ids, skip_special_tokens=True) == expected


def test_few_texts_make_a_small_vocabulary_and_training_is_repeatable(tmp_path: Path) -> None:
    for name in ("a", "b"):
        train(["ab"] * 5, tmp_path / name, vocab_size=1000)
    assert Tokenizer(tmp_path / "a").num_ids == 26 + 256 + 1
    assert Tokenizer(tmp_path / "a").fingerprint == Tokenizer(tmp_path / "b").fingerprint
    train(["ac"] * 5, tmp_path / "c", vocab_size=1000)
    assert Tokenizer(tmp_path / "c").fingerprint != Tokenizer(tmp_path / "a").fingerprint


@pytest.mark.parametrize("content", [None, "", "{}", "not JSON"])
def test_a_folder_without_a_tokenizer_is_a_user_error(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match="the tokenizer cannot be read"):
        Tokenizer(tmp_path)


@pytest.mark.parametrize("decoder", [False, True], ids=["older", "lists the added tokens"])
@pytest.mark.parametrize("configured", [None, "<|im_start|>"])
def test_special_tokens_map_counts_where_transformers_reads_it(
    folder: Path, tmp_path: Path, configured: str | None, decoder: bool
) -> None:
    for path in folder.iterdir():
        shutil.copy(path, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings.pop("eos_token")
    if configured:
        settings["eos_token"] = configured
    if decoder:
        settings["added_tokens_decoder"] = {}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "<|im_end|>"}}))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert Tokenizer(tmp_path).special_id("eos_token") == theirs.eos_token_id
