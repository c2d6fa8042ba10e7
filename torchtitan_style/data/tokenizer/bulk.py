"""Byte-level BPE in bulk with tiktoken, several times as fast as tokenizers, for the tokenizers that it fits.

tiktoken knows tokens by their bytes and a rank; it merges the two neighbours whose concatenation has the lowest rank.
That is what a Hugging Face tokenizer does too if its merges are in the order of their results' ids and each token's
own bytes come out as that token: then the only way to the last two parts of a token is the merge that it was made by.
Both are checked here, and everything else that could make a difference; of what does not fit, nothing is guessed.
"""

from __future__ import annotations

import itertools
import json
import unicodedata
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

_GPT2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""The pieces of GPT-2, which tokenizers' ByteLevel has built in."""
_CHECKED = 16
"""Texts that are encoded both ways before the fast way is trusted."""


class BulkEncoder:
    """Texts to token ids, nothing added, exactly as ``backend`` would."""

    def __init__(self, backend: Tokenizer, encoding: Any, *, normalized: bool) -> None:
        self.backend, self.encoding, self.normalized = backend, encoding, normalized
        self._unchecked = _CHECKED

    def __call__(self, texts: list[str]) -> list[NDArray[np.uint32]]:
        found = [self._encode(text) for text in texts]
        if self._unchecked and texts:  # another version of either library may cut texts otherwise
            count = min(self._unchecked, len(texts))
            self._unchecked -= count
            slow = self.backend.encode_batch_fast(texts[:count], add_special_tokens=False)
            if any(ids.tolist() != e.ids for ids, e in zip(found[:count], slow, strict=True)):
                self._encode = self._encode_slowly  # type: ignore[method-assign]
                return self(texts)
        return found

    def _encode(self, text: str) -> NDArray[np.uint32]:
        if self.normalized and not unicodedata.is_normalized("NFC", text):
            return self._encode_slowly(text)
        try:
            return self.encoding.encode_to_numpy(text, allowed_special="all")
        except ValueError:  # its regular expressions give up on a million spaces in a row
            return self._encode_slowly(text)

    def _encode_slowly(self, text: str) -> NDArray[np.uint32]:
        return np.array(self.backend.encode(text, add_special_tokens=False).ids, dtype=np.uint32)


def bulk_encoder(backend: Tokenizer) -> BulkEncoder | None:
    """One that does what ``backend`` does, or None if that cannot be made sure of."""
    content = json.loads(backend.to_str())
    model, normalizer = content["model"], content["normalizer"]
    pattern = _pattern(content["pre_tokenizer"])
    unusual = ("dropout", "unk_token", "continuing_subword_prefix", "end_of_word_suffix", "fuse_unk", "byte_fallback")
    if model["type"] != "BPE" or pattern is None or any(model.get(name) for name in unusual):
        return None
    if normalizer is not None and normalizer != {"type": "NFC"}:
        return None
    added = {token["content"]: token for token in content["added_tokens"]}
    flags = ("lstrip", "rstrip", "single_word", "normalized")
    if any(token[flag] for token in added.values() for flag in flags):
        return None
    if any(other != name and other.startswith(name) for name in added for other in added):
        return None  # which of the two is meant would be for the library to say
    ranks = _ranks({token: id for token, id in model["vocab"].items() if token not in added})
    if ranks is None or not _merges_in_order(backend, model, set(added)):
        return None

    import tiktoken

    special = {name: token["id"] for name, token in added.items()}
    encoding = tiktoken.Encoding("bulk", pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
    return BulkEncoder(backend, encoding, normalized=normalizer is not None)


def _pattern(pre_tokenizer: dict[str, Any] | None) -> str | None:
    """The regular expression whose matches are the pieces, if that is all there is to it."""
    if pre_tokenizer is None:
        return None
    parts = pre_tokenizer["pretokenizers"] if pre_tokenizer["type"] == "Sequence" else [pre_tokenizer]
    *splits, bytes_of = parts
    if bytes_of["type"] != "ByteLevel" or bytes_of["add_prefix_space"] or bytes_of["use_regex"] == bool(splits):
        return None
    if not splits:
        return _GPT2
    if len(splits) > 1 or splits[0]["type"] != "Split" or splits[0]["behavior"] != "Isolated" or splits[0]["invert"]:
        return None
    return splits[0]["pattern"].get("Regex")


def _ranks(vocabulary: dict[str, int]) -> dict[bytes, int] | None:
    """Ids by the bytes of each token, if all 256 bytes are among them."""
    letters = _letters()
    try:
        ranks = {bytes(letters[letter] for letter in token): id for token, id in vocabulary.items()}
    except KeyError:
        return None
    return ranks if all(bytes([byte]) in ranks for byte in range(256)) else None


def _letters() -> dict[str, int]:
    """The byte that each letter of a byte-level vocabulary stands for: printable ones for themselves (Radford et al.
    2019), the others for the letters from U+0100 on."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}


def _merges_in_order(backend: Tokenizer, model: dict[str, Any], added: set[str]) -> bool:
    """Whether merges come in the order of the ids that they make, and every token's bytes make that token."""
    vocabulary = model["vocab"]
    pairs = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    made = [vocabulary["".join(pair)] for pair in pairs]
    if any(later <= earlier for earlier, later in itertools.pairwise(made)):
        return False
    bpe: Any = backend.model
    return all(
        [part.id for part in bpe.tokenize(token)] == [id] for token, id in vocabulary.items() if token not in added
    )
