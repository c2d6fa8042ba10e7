"""Text to token ids and back: a byte-level BPE trained on the corpus, or any Hugging Face tokenizer.

Either way the tokenizer ends up as files in the run's ``tokenizer/`` folder, in the format that
``transformers.AutoTokenizer`` reads, and is loaded from there.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as BackendTokenizer

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.hub import fetch
from torchtitan_style.common.native import is_panic, panics_as
from torchtitan_style.models.hf_folder import copy_assets, special_tokens

from .bulk import bulk_encoder
from .file import load_backend

END_OF_TEXT = "<|endoftext|>"
"""The token between documents, as in Qwen's vocabulary."""

SPECIAL_TOKENS = [END_OF_TEXT, "<|im_start|>", "<|im_end|>"]
SPECIAL_TOKENS += [f"<|{name}_{end}|>" for name in ("object_ref", "box", "quad", "vision") for end in ("start", "end")]
SPECIAL_TOKENS += ["<|vision_pad|>", "<|image_pad|>", "<|video_pad|>", "<tool_call>", "</tool_call>"]
SPECIAL_TOKENS += [f"<|fim_{part}|>" for part in ("prefix", "middle", "suffix", "pad")]
SPECIAL_TOKENS += ["<|repo_name|>", "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>"]
"""Qwen3's, in its order. A tokenizer trained here begins with them."""

_HIDDEN = SPECIAL_TOKENS[:14]
"""Those that decoding leaves out; the others are part of an answer."""

_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"  # contractions
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"  # a word, with the space or sign before it
    r"|\p{N}"  # a digit by itself
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*"  # signs
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"  # white space
)
"""What a token never reaches across: the pre-tokenizer of Qwen2 and Qwen3."""


class Tokenizer:
    """A tokenizer read from a folder with ``tokenizer.json`` and, mostly, ``tokenizer_config.json``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.backend, num_ids = load_backend(folder / "tokenizer.json")
            self._special = special_tokens(folder)
            added = self.backend.get_added_tokens_decoder()
        except Exception as error:  # tokenizers raises a plain Exception
            raise UserError(f"{folder}: the tokenizer cannot be read: {error}") from None
        # Qwen's instruct models name <|im_end|>, which ends a turn; a document ends with this one.
        end = self.backend.token_to_id(END_OF_TEXT)
        end = self.special_id("eos_token") if end is None else end
        if end is None:
            raise UserError(f"{folder} has neither {END_OF_TEXT} nor an eos_token to end documents")
        self.end_of_text: int = end
        self._hidden = {token: entry.content for token, entry in added.items() if entry.special}
        self._bulk: Callable[[list[str]], list[NDArray[np.uint32]]] | None = None
        self.num_ids = num_ids
        """One more than the largest id: what the model's vocab_size must be at least."""

    def special_id(self, role: str) -> int | None:
        """The id of the "eos_token" or the "pad_token" that its settings name, or None."""
        token = self._special.get(role)
        return None if token is None else self.backend.token_to_id(token)

    def is_special(self, token: int) -> bool:
        """Whether ``decode`` leaves it out."""
        return token in self._hidden

    def token(self, token: int) -> str:
        """The text of a special token in a prompt."""
        return self._hidden[token]

    @functools.cached_property
    def fingerprint(self) -> str:
        """Changes whenever some text might be tokenized otherwise."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, nothing added. Raises UserError if it has bytes that were no characters."""
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise UserError(f"not UTF-8 text, at character {error.start + 1}") from None
        with self._panics():
            return self.backend.encode(text, add_special_tokens=False).ids

    def _panics(self) -> contextlib.AbstractContextManager[None]:
        return panics_as(UserError, f"{self.folder}: the tokenizer cannot be used")

    def encode_batch(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        """Token ids of each text, nothing added: for many texts, the fastest way that this tokenizer allows."""
        with self._panics():
            if self._bulk is None:
                self._bulk = bulk_encoder(self.backend) or self._encode_all
            return self._bulk(texts)

    @functools.cached_property
    def joins_pieces(self) -> bool:
        """Whether a text may be tokenized in pieces wherever a token ends."""
        self.encode_batch([])
        return self._bulk != self._encode_all

    def added_tokens(self) -> list[str]:
        """The texts of tokens that no other token reaches across, special ones among them."""
        return [token.content for token in self.backend.get_added_tokens_decoder().values()]

    def encode_with_offsets(self, text: str) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        """Token ids of ``text``, [n], and from where to where in it each token is, in characters, [n, 2]."""
        with self._panics():
            encoded = self.backend.encode(text, add_special_tokens=False)
        return np.array(encoded.ids, np.uint32), np.array(encoded.offsets, np.int64).reshape(-1, 2)

    def show(self, ids: list[int]) -> str:
        """Text of ``ids``, special tokens included."""
        return self.backend.decode(ids, skip_special_tokens=False)

    def _encode_all(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        encoded = self.backend.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(e.ids, dtype=np.uint32) for e in encoded]

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``, special tokens left out."""
        with self._panics():
            return self.backend.decode(ids)


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Bytes of UTF-8 that each id stands for, [num_ids]; 0 of special tokens.

    Exact for byte-level BPE, and for SentencePiece with byte fallback. Of other tokenizers, the bytes of the token as
    it is written in the vocabulary.
    """
    backend = tokenizer.backend
    content = json.loads(backend.to_str())
    byte_level = _has_byte_level(content.get("pre_tokenizer")) or _has_byte_level(content.get("decoder"))
    added = backend.get_added_tokens_decoder()
    sizes = np.zeros(tokenizer.num_ids, np.int64)
    for text, token in backend.get_vocab(with_added_tokens=True).items():
        if token in added:
            sizes[token] = 0 if added[token].special else len(added[token].content.encode())
        elif byte_level:
            sizes[token] = len(text)  # a character of its alphabet stands for a byte
        elif re.fullmatch(r"<0x[0-9A-F]{2}>", text):
            sizes[token] = 1
        else:
            sizes[token] = len(text.replace("▁", " ").encode())
    return sizes


def _has_byte_level(part: Any) -> bool:
    """Whether a part of a tokenizer, or one of the parts it consists of, works on bytes."""
    if isinstance(part, dict):
        return part.get("type") == "ByteLevel" or any(map(_has_byte_level, part.values()))
    return isinstance(part, list) and any(map(_has_byte_level, part))


def train(texts: Iterable[str], folder: Path, *, vocab_size: int) -> None:
    """Train a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) on ``texts`` and save it to ``folder``.

    Pieces and special tokens are Qwen3's; texts are taken as they are, without its NFC normalisation. It has at
    most ``vocab_size`` tokens, fewer if the texts have too few repeated pieces.
    """
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(  # type: ignore[assignment]
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True)
    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] in _HIDDEN
    (folder / "tokenizer.json").write_text(json.dumps(content, indent=2, ensure_ascii=False), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def copy_pretrained(source: str, folder: Path) -> None:
    """Save the tokenizer of ``source`` to ``folder``, file for file: a model folder, a Hub name, a run or a checkpoint.

    One without a ``tokenizer.json`` is converted by Transformers. Raises UserError if there is none.
    """
    found = fetch(source, weights=False)
    # A run and each of its checkpoints have a folder for it; beside the checkpoints is the run's.
    places = (found, found / "tokenizer", found.parent / "tokenizer")
    found = next((place for place in places if (place / "tokenizer.json").is_file()), found)
    if (found / "tokenizer.json").is_file():
        Tokenizer(found)  # raises if it cannot be used
        folder.mkdir(parents=True)
        copy_assets(found, folder)
        return
    if not any((found / name).is_file() for name in ("vocab.json", "tokenizer.model")):
        raise UserError(f'no tokenizer in "{source}": there is no tokenizer.json')

    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(found)
    except BaseException as error:  # transformers raises many kinds
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f'no tokenizer in "{source}": {reason}') from None
    tokenizer.save_pretrained(folder)
    if not (folder / "tokenizer.json").exists():
        raise UserError(f'"{source}" has no fast version (tokenizer.json)')
