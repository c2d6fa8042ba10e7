"""Loading tokenizer.json, which somebody else may have written, by a library that panics or aborts over some files."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as BackendTokenizer

from torchtitan_style.common.native import panics_as, tried_apart
from torchtitan_style.common.reading import read_bytes

_MOST_BYTES = 2**28

_USUAL = {
    "BPE",
    "ByteLevel",
    "NFC",
    "NFD",
    "NFKC",
    "NFKD",
    "Sequence",
    "Split",
    "TemplateProcessing",
    "WordLevel",
}
"""Parts that cannot do it. Most tokenizers are made of them; others are tried in another process first."""
_UNUSUAL_SETTINGS = ("continuing_subword_prefix", "end_of_word_suffix", "dropout")

_TRIED = "TORCHTITAN_STYLE_TRIED_TOKENIZERS"
"""Environment variable with hashes of files that were tried, for the processes that this one starts."""

_TRY = """\
import sys
import tokenizers
tokenizer = tokenizers.Tokenizer.from_file(sys.argv[1])
tokenizer.no_truncation()
tokenizer.no_padding()
for text in ("", "a", "The quick (brown) fox, 1234.", "n\\u00e4\\u00efve \\u6f22\\u5b57 \\U0001f600\\n\\t <|x|>"):
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    tokenizer.decode(ids)
tokenizer.to_str()
"""


_last: tuple[str, BackendTokenizer, int] | None = None
"""Hash of a file, and what was made of it: a command asks for it several times, and each takes up to half a second."""


def load_backend(path: Path) -> tuple[BackendTokenizer, int]:
    """The tokenizer, not to be changed, as others get the same, and one more than its largest id. Raises an exception,
    of whatever kind, if it cannot be read."""
    global _last
    content = read_bytes(path, most=_MOST_BYTES)
    digest = hashlib.sha256(content).hexdigest()
    if _last is not None and _last[0] == digest:
        return _last[1:]
    name = digest[:16]
    if name not in os.environ.get(_TRIED, "").split(","):
        if not _is_usual(content) and (problem := tried_apart(_TRY, os.path.abspath(path))):
            raise ValueError(problem)
        before = os.environ.get(_TRIED, "").split(",")[-50:]
        os.environ[_TRIED] = ",".join([*filter(None, before), name])
    with panics_as(ValueError, "the library that reads it gives up"):
        backend = BackendTokenizer.from_file(str(path))
        # Settings of the last call before it was saved; Transformers switches both off too unless asked.
        backend.no_truncation()
        backend.no_padding()
        num_ids = max(backend.get_vocab(with_added_tokens=True).values()) + 1
    _last = digest, backend, num_ids
    return backend, num_ids


def _is_usual(content: bytes) -> bool:
    """Whether it has no part that may end the process that loads it."""
    try:
        found = json.loads(content)
        model = found["model"]
        parts = [found.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")]
        return not any(model.get(name) for name in _UNUSUAL_SETTINGS) and all(
            _is_usual_part(part) for part in (*parts, {"type": model["type"]}) if part is not None
        )
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
        return False


def _is_usual_part(part: dict[str, Any]) -> bool:
    if part["type"] not in _USUAL:
        return False
    if part["type"] == "Split" and not all(part["pattern"].values()):
        return False
    inner = [each for name in ("normalizers", "pretokenizers", "processors", "decoders") for each in part.get(name, ())]
    return all(_is_usual_part(each) for each in inner)
