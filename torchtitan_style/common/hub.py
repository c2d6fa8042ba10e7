"""Folders of the Hugging Face Hub, by their path here or by their name there."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .errors import UserError

__all__ = ["fetch"]

_SMALL = ["*.json", "*.txt", "*.jinja"]
"""Configuration and tokenizer. In safetensors, weights are all that is large."""


def fetch(source: str, *, weights: bool) -> Path:
    """The folder ``source``, or what the Hub has under that name, downloaded into the Hub's own cache.

    weights: whether the weights are wanted too. Raises UserError, saying what is wrong with ``source``.
    """
    folder = Path(os.path.expanduser(source))
    if folder.is_dir():
        return folder
    if folder.exists():
        raise UserError(f"{source} is a file; name the folder it is in")
    if source.startswith((".", "/", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source):
        raise UserError(f"there is no folder {source}")

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
        why = f"it could not be fetched from the Hub: {str(error).strip().partition(chr(10))[0]}"
    raise UserError(f"there is no folder {source} here, and {why}")
