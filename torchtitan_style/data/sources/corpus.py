"""Which files a corpus is made of: the standard library's, your own, or those of a dataset on the Hub."""

from __future__ import annotations

import os
import re
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torchtitan_style.common.errors import UserError, cut
from torchtitan_style.common.extensions import SOURCES
from torchtitan_style.common.hub import looks_like_path, similar_folder
from torchtitan_style.common.reading import file_problem
from torchtitan_style.config.schema import Corpus

from .network import patiently
from .wildcards import expand

# Its tests, what pip puts beside it, and generated tables: no code to learn from.
_SKIPPED = re.compile(
    r"(^|/)(test|tests|idle_test|site-packages|dist-packages|encodings|pydoc_data|_sysconfigdata\w*\.py)(/|$)"
)
_COMPRESSIONS = {".gz", ".zst", ".bz2", ".xz"}
_FORMATS = {".jsonl": "jsonl", ".json": "jsonl", ".ndjson": "jsonl", ".parquet": "parquet"}
_VERSION_FIELDS = ("ETag", "etag", "blob_id", "xet_hash", "generation", "LastModified", "mtime")
"""What file systems call that which changes with a file's content."""


@dataclass(frozen=True)
class SourceFile:
    """One file of a corpus."""

    url: str
    """A local path, or scheme://…"""
    size: int
    """Bytes; 0 if the server does not tell."""
    version: str
    """Changes when the file does: its time of change, or what its server calls its version."""
    format: str
    """"jsonl", "parquet", "text", "source" (text whose odd bytes become U+FFFD), or the name of a registered source."""
    compression: str
    """"", or ".gz", ".zst", ".bz2" or ".xz"."""

    @property
    def is_remote(self) -> bool:
        return "://" in self.url


def source_files(corpus: Corpus) -> list[SourceFile]:
    """The files of ``corpus``, in order. Raises UserError if some are missing."""
    if corpus.dataset == "stdlib":
        return [_local(path, format="source") for path in _standard_library()]
    if corpus.dataset == "files":
        return [_remote(match) if isinstance(match, str) else _local(match) for match in _expand(corpus.paths)]
    if SOURCES.added(corpus.dataset):
        return [_of_source(path, corpus.dataset) for path in SOURCES.get(corpus.dataset).files(corpus)]
    return [_remote(url) if "://" in url else _local(Path(url)) for url in _dataset_files(corpus)]


def _of_source(path: str | Path, source: str) -> SourceFile:
    """A file of a registered source, whose own reader opens it. Raises UserError if it is not there."""
    try:
        return replace(_local(Path(path), format=source), compression="")
    except OSError as error:
        raise UserError(f'data.dataset: "{source}" names {path}: {error.strerror or error}') from None


def _local(path: Path, format: str | None = None) -> SourceFile:
    stat = path.stat()
    own_format, compression = _kind(path.name)
    url = str(path.resolve())
    return SourceFile(url, stat.st_size, str(stat.st_mtime_ns), format or own_format, compression)


def _remote(url: str) -> SourceFile:
    import fsspec

    def ask() -> dict[str, Any]:
        file_system, path = fsspec.core.url_to_fs(url)
        return file_system.info(path)

    try:
        info = patiently(ask, url)
    except FileNotFoundError:
        raise UserError(f"data.paths: there is no {url}") from None
    except (ImportError, ValueError, PermissionError) as error:  # a protocol that needs another package, or none at all
        raise UserError(f"data.paths: {url}: {error}") from None
    version = next((str(info[field]) for field in _VERSION_FIELDS if info.get(field)), "")
    return SourceFile(url, info.get("size") or 0, version, *_kind(url.partition("?")[0]))


def _kind(name: str) -> tuple[str, str]:
    """Format and compression, by the name's endings."""
    stem, suffix = os.path.splitext(name.lower())
    compression = suffix if suffix in _COMPRESSIONS else ""
    suffix = os.path.splitext(stem)[1] if compression else suffix
    return _FORMATS.get(suffix, "text"), compression


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        inside = Path(folder).relative_to(root)
        folders[:] = [name for name in folders if not _SKIPPED.search(name)]  # what pip has put there is large
        files += [(inside / name).as_posix() for name in names if name.endswith(".py") and not _SKIPPED.search(name)]
    if not files:
        raise UserError(
            f"data.dataset: this Python has no source files of its standard library in {root}; "
            'use dataset = "files" and data.paths'
        )
    return [root / relative for relative in sorted(files)]


def _expand(patterns: list[str]) -> list[Path | str]:
    """The files that ``patterns`` match, each once: patterns in the order given, matches sorted."""
    found: dict[Path | str, Path | str] = {}
    missing = []
    for pattern in patterns:
        if "://" in pattern:
            found |= {url: url for url in _expand_url(pattern)}
            continue
        expanded = os.path.expanduser(pattern)
        matches = [Path(match) for match in expand(expanded)]
        if not matches:
            missing.append(f'"{cut(pattern, 300)}"' + _why_no_file(expanded))
        for match in matches:
            found.setdefault(match.resolve(), match)  # one file, however it is named
    if missing:
        more = f" and {len(missing) - 10:,} more" if len(missing) > 10 else ""
        raise UserError(f"data.paths: no file matches {', '.join(missing[:10])}{more} (looked in {Path.cwd()})")
    return list(found.values())


def _why_no_file(path: str) -> str:
    """What is there instead of a file, if anything."""
    if os.path.isdir(path):
        return " (a folder; add /**/*.txt or the like)"
    problem = file_problem(path) if os.path.exists(path) else None
    return f" ({problem.strerror})" if problem else ""


def _expand_url(pattern: str) -> list[str]:
    """Wildcards in a URL. A web server cannot list its files, and there a ? begins a query."""
    if "*" not in pattern or pattern.startswith(("http://", "https://")):
        return [pattern]

    import fsspec

    def find() -> list[str]:
        file_system, path = fsspec.core.url_to_fs(pattern)
        return [file_system.unstrip_protocol(match) for match in file_system.glob(path)]

    matches = sorted(patiently(find, pattern))
    if not matches:
        raise UserError(f'data.paths: no file matches "{pattern}"')
    return matches


def _dataset_files(corpus: Corpus) -> list[str]:
    """The files of a dataset on the Hub, or in a folder laid out like one, as its README or its file names have it."""
    import datasets

    source = os.path.expanduser(corpus.dataset)
    named = f'data.dataset: "{corpus.dataset}"'
    if not os.path.isdir(source) and looks_like_path(corpus.dataset):
        near = similar_folder(Path(source))
        raise UserError(f"{named}: there is no such folder" + (f"; did you mean {near}?" if near else ""))
    try:
        builder = datasets.load_dataset_builder(source, corpus.subset or None)
    except Exception as error:  # not found, no such subset, no network, offline mode: many kinds
        if not os.path.isdir(source) and (near := similar_folder(Path(source))):
            raise UserError(f"{named}: there is no such folder; did you mean {near}?") from None
        if isinstance(error, ConnectionError):  # whose text names the class of another error, and no reason
            raise UserError(f"{named}: the Hub cannot be reached, and its cache here has no copy") from None
        raise UserError(f"{named}: {_reason(error)}") from None
    splits = {str(name): files for name, files in (builder.config.data_files or {}).items()}
    if corpus.split not in splits:
        raise UserError(f'data.split: {named} has no split "{corpus.split}"; it has {", ".join(splits) or "none"}')
    # Those with their revision in the name stay the same, whatever is uploaded later.
    files = [str(file) for file in splits[corpus.split]]
    plain = {Path(file).name.removesuffix(_kind(file)[1]) for file in files if _kind(file)[0] == "text"}
    unread = sorted({Path(name).suffix for name in plain} - {".txt", ".md"})
    if unread:
        raise UserError(
            f"{named} is made of {', '.join(unread)} files; what can be read is parquet, JSON lines and text"
        )
    return files


def _reason(error: Exception) -> str:
    """The first lines of an error, which are what concerns a person."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__
