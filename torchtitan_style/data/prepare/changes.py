"""Whether a prepared folder is still what its configuration and its corpus ask for."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.files import sha256
from torchtitan_style.common.reading import open_regular
from torchtitan_style.config.schema import Corpus, Data

from ..sources.corpus import SourceFile, source_files
from ..tokenizer.tokenizer import Tokenizer
from .prepared import Prepared, template_hash

_SAMPLE, _SAMPLES = 2**16, 16
"""Bytes and number of the pieces of a streamed file that stand for the whole of it."""


def change_of(present: Prepared, config: Data, settings: dict[str, Any]) -> str | None:
    """What has changed since ``present`` was made with other ``settings`` or of other files; None: nothing has."""
    names = {"vocab_size": "model.vocab_size (or model.flavor)", "longest": "training.seq_len (or data.packing)"}
    before = present.manifest["settings"]
    if before.get("validation_fraction") == 0:
        names["validation_fraction"] = "validation.enable (no documents were held out while it was false)"
    elif settings["validation_fraction"] == 0:
        names["validation_fraction"] = "validation.enable (documents were held out while it was true)"
    if before["corpora"].keys() != settings["corpora"].keys():
        return "data.mixture changed" if settings["corpora"].keys() - {""} else "data.dataset changed"
    changed = [
        f"data.{key}"
        for name, new in settings["corpora"].items()
        # What paths match is compared, however they are spelled.
        for key in sorted((new.keys() | before["corpora"][name].keys()) - {"paths"})
        if before["corpora"][name].get(key) != new.get(key)
    ]
    changed += [
        names.get(key, f"data.{key}") for key, new in settings.items() if key != "corpora" and before.get(key) != new
    ]
    if changed:
        return f"{', '.join(dict.fromkeys(changed))} changed"
    if problem := present.problem():
        return problem
    if tokenizer_in_folder(config) not in (None, present.manifest["tokenizer_sha256"]):
        return f"the tokenizer {config.tokenizer} changed"
    if config.has_chat and template_in_folder(config) not in (None, present.manifest.get("chat_template")):
        return f"the chat template of {config.tokenizer} changed"
    sources = json.dumps(present.manifest["corpora"])
    for name, corpus in config.corpora().items():
        entry = present.manifest["corpora"][name]
        paths = before["corpora"][name].get("paths", corpus.paths)
        if what := _source_change(entry["sources"], corpus, paths=paths, streaming=config.streaming):
            return what
    if json.dumps(present.manifest["corpora"]) != sources:
        with contextlib.suppress(OSError):  # files that were only touched need not be read again next time
            present.save()
    return None


def tokenizer_in_folder(config: Data) -> str | None:
    """Fingerprint of the tokenizer that is taken from a folder; None if it is not, or cannot be read."""
    source = Path(os.path.expanduser(config.tokenizer))
    try:
        return Tokenizer(source).fingerprint if (source / "tokenizer.json").is_file() else None
    except UserError:
        return None


def template_in_folder(config: Data) -> str | None:
    """Fingerprint of the chat template of a tokenizer that is taken from a folder; None if it has none."""
    source = Path(os.path.expanduser(config.tokenizer))
    return template_hash(source) if config.has_chat and (source / "tokenizer.json").is_file() else None


def _source_change(before: list[dict[str, Any]], corpus: Corpus, *, paths: list[str], streaming: bool) -> str | None:
    """How the files of ``corpus`` are others now. Prepared once, files that are gone are not needed any more.

    paths: what ``before`` was found by. Raises UserError if other paths lead nowhere.
    """
    if not streaming and all("://" in source["url"] for source in before):  # no reason to ask a server
        return None if corpus.paths == paths else "data.paths changed"
    try:
        files = source_files(corpus)
    except UserError:
        if streaming or corpus.paths != paths:
            raise
        return None
    if [[file.url, file.size, file.version] for file in files] == [
        [source["url"], source["size"], source["version"]] for source in before
    ]:
        return None
    if len(files) != len(before):
        return f"the corpus's files changed ({len(files)} instead of {len(before)})"
    digest = sample_hash if streaming else sha256
    now = [source_entry(file, "" if file.is_remote else digest(Path(file.url))) for file in files]
    for old, new in zip(before, now, strict=True):
        if [old["size"], old["digest"] or old["version"]] != [new["size"], new["digest"] or new["version"]]:
            return f"the corpus's files changed ({new['url']})"
    before[:] = now
    return None


def sample_hash(path: Path) -> str:
    """Hash of pieces all over a file: a streamed corpus is not read whole to see whether it has changed."""
    digest = hashlib.sha256()
    size = path.stat().st_size
    with open_regular(path) as file:
        for number in range(_SAMPLES):
            file.seek(max(size - _SAMPLE, 0) * number // (_SAMPLES - 1))
            digest.update(file.read(_SAMPLE))
    return digest.hexdigest()


def source_entry(file: SourceFile, digest: str) -> dict[str, Any]:
    """What a manifest says of a file of the corpus."""
    return {"url": file.url, "size": file.size, "version": file.version, "digest": digest}
