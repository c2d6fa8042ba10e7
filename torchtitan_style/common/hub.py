"""Folders of the Hugging Face Hub, by their path here or by their name there."""

from __future__ import annotations

import difflib
import os
import re
from pathlib import Path

from .errors import UserError

_SMALL = ["*.json", "*.txt", "*.jinja"]
"""Configuration and tokenizer. In safetensors, weights are all that is large."""

FILE_ENDINGS = {
    *(".txt", ".md", ".json", ".jsonl", ".ndjson", ".parquet", ".csv", ".gz", ".zst", ".bz2", ".xz"),
    *(".toml", ".safetensors", ".bin", ".pt", ".pth", ".model"),
}
"""Endings of files, which names on the Hub do not have."""


def fetch(source: str, *, weights: bool) -> Path:
    """The folder ``source``, or what the Hub has under that name, downloaded into the Hub's own cache.

    weights: whether the weights are wanted too. Raises UserError, saying what is wrong with ``source``.
    """
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{source} is a file; name the folder it is in")
    near = similar_folder(folder)
    hint = f"; did you mean {near}?" if near else ""
    if looks_like_path(source):
        raise UserError(f"there is no folder {source}{hint}")

    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, HFValidationError, RepositoryNotFoundError

    try:
        return Path(
            huggingface_hub.snapshot_download(
                source, allow_patterns=[*_SMALL, "*.safetensors"] if weights else _SMALL, ignore_patterns=["*/*"]
            )
        )
    except GatedRepoError:
        why = "on the Hub it is behind an agreement: accept it there, then run `hf auth login`"
    except (RepositoryNotFoundError, HFValidationError):
        why = "the Hub has no model of that name that you may read (a private one needs `hf auth login`)"
    except Exception as error:  # no network, offline mode, a full disk: many kinds
        cause = _first_cause(error)
        why = f"it could not be fetched from the Hub: {cause}; without a network, name a folder that has a copy"
    if near:
        raise UserError(f"there is no folder {source}{hint}")
    raise UserError(f"there is no folder {source} here, and {why}")


def _first_cause(error: BaseException) -> str:
    """The first line of what made ``error``: the Hub's libraries wrap "Name or service not known" several times."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error).strip().partition("\n")[0] or type(error).__name__


def looks_like_path(source: str) -> bool:
    """Whether ``source`` cannot be meant as "name" or "owner/name" on the Hub."""
    if source.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        return True
    return Path(source.lower()).suffix in FILE_ENDINGS


def similar_folder(folder: Path) -> Path | None:
    """A folder beside ``folder``, which does not exist, with almost its name; or its name beside a folder almost so
    named. None if there is none."""
    parent = folder.parent
    if not parent.is_dir():
        parent = similar_folder(parent) or parent
        if (found := parent / folder.name).is_dir():
            return found
    try:
        names = [path.name for path in parent.iterdir() if path.is_dir()]
    except OSError:
        return None
    close = difflib.get_close_matches(folder.name, names, n=1, cutoff=0.7)
    return parent / close[0] if close else None
