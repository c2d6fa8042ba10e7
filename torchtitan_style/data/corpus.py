"""Documents, one text at a time, in a fixed order.

A document is a .jsonl line, a .parquet row, or any other file as a whole.
"""

from __future__ import annotations

import glob
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from torchtitan_style.config.schema import Data
from torchtitan_style.errors import UserError

__all__ = ["corpus_files", "read_documents"]

# Its tests, what pip puts beside it, and generated tables: no code to learn from.
_SKIPPED = re.compile(
    r"(^|/)(test|tests|idle_test|site-packages|dist-packages|encodings|pydoc_data|_sysconfigdata\w*\.py)(/|$)"
)


def corpus_files(config: Data) -> list[Path]:
    """The files of the corpus that ``config`` names, in order. Raises UserError if some are missing."""
    return _standard_library() if config.dataset == "stdlib" else _expand(config.paths)


def read_documents(config: Data) -> Iterator[str]:
    """The texts of the corpus that ``config`` names. Empty documents are left out.

    Raises UserError for files that are missing, cannot be read, or do not hold what they should.
    """
    for path in corpus_files(config):
        try:
            if path.suffix == ".jsonl":
                texts = _read_jsonl(path, config.text_key)
            elif path.suffix == ".parquet":
                texts = _read_parquet(path, config.text_key)
            elif config.dataset == "stdlib":
                # A source file may declare another encoding; its odd bytes become U+FFFD.
                texts = iter([path.read_text(encoding="utf-8", errors="replace")])
            else:
                texts = iter([path.read_text(encoding="utf-8-sig")])  # a byte order mark is no text
            for text in texts:
                if text:
                    yield text
        except UnicodeDecodeError as error:
            raise UserError(f"data.paths: {path}: not UTF-8 text: {error}") from None
        except OSError as error:
            raise UserError(f"data.paths: {path}: cannot be read: {error.strerror or error}") from None


def _standard_library() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for path in root.rglob("*.py"):
        relative = path.relative_to(root).as_posix()
        if not _SKIPPED.search(relative):
            files.append((relative, path))
    if not files:
        raise UserError(
            f"data.dataset: this Python has no source files of its standard library in {root}; "
            'use dataset = "files" and data.paths'
        )
    return [path for _, path in sorted(files)]


def _expand(patterns: list[str]) -> list[Path]:
    """The files that ``patterns`` match, each once: patterns in the order given, matches sorted."""
    found: dict[Path, Path] = {}
    missing = []
    for pattern in patterns:
        expanded = str(Path(pattern).expanduser())
        matches = [p for p in map(Path, sorted(glob.glob(expanded, recursive=True))) if p.is_file()]
        if not matches and Path(expanded).is_file():  # a name with wildcard characters in it
            matches = [Path(expanded)]
        if not matches:
            folder = Path(expanded).is_dir()
            missing.append(f'"{pattern}"' + (" (a folder; add /**/*.txt or the like)" if folder else ""))
        for match in matches:
            found.setdefault(match.resolve(), match)  # one file, however it is named
    if missing:
        raise UserError(f"data.paths: no file matches {', '.join(missing)} (looked in {Path.cwd()})")
    return list(found.values())


def _read_jsonl(path: Path, key: str) -> Iterator[str]:
    with path.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"data.paths: {path}, line {number}: not JSON: {error}") from None
            if not isinstance(record, dict) or not isinstance(record.get(key), str):
                keys = f"; it has {', '.join(record)}" if isinstance(record, dict) else ""
                raise UserError(f'data.text_key: {path}, line {number}: no text under "{key}"{keys}; set data.text_key')
            try:
                record[key].encode()
            except UnicodeEncodeError as error:
                raise UserError(f"data.paths: {path}, line {number}: not Unicode text: {error}") from None
            yield record[key]


def _read_parquet(path: Path, key: str) -> Iterator[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            if key not in file.schema_arrow.names:
                names = ", ".join(file.schema_arrow.names)
                raise UserError(f'data.text_key: {path}: no column "{key}"; it has {names}; set data.text_key')
            for batch in file.iter_batches(batch_size=1024, columns=[key]):
                for value in batch.column(0).to_pylist():
                    if value is not None and not isinstance(value, str):
                        raise UserError(f'data.text_key: {path}: column "{key}" does not hold text')
                    yield value or ""
    except pa.ArrowException as error:
        raise UserError(f"data.paths: {path}: not a readable parquet file: {error}") from None
