"""Bytes of the text that each token stands for, for figures per byte."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .tokenizer import Tokenizer


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Of each id, in UTF-8, [num_ids]; 0 of special tokens.

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
