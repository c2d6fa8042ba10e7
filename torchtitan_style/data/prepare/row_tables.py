"""The tables of ``packing = "best_fit"``: which pieces of documents make up which row. Verified before they are used.

train.pieces    start and count of every piece, as two int64
train.rows      number of pieces up to the end of every row, as int64
train.done      what they were made from, and size and SHA-256 of both; written last
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.files import digest_of, fsync, sha256, write_in_one_go
from torchtitan_style.common.reading import read_json_object
from torchtitan_style.common.typed import Content, Count, Sha256, typed

from ..packing import Piece

_KINDS = ("pieces", "rows")


class _Table(Content):
    size: Count
    sha256: Sha256


class _Stamp(Content):
    key: str
    pieces: _Table
    rows: _Table


def write_tables(folder: Path, part: str, key: str, rows: Iterable[list[Piece]], *, base: int) -> None:
    """Write the tables of a part of a corpus, "train" or "validation".

    key: what they are made from. rows: the pieces of each, whose places count from ``base``.
    """
    folder.mkdir(exist_ok=True)
    (folder / f"{part}.done").unlink(missing_ok=True)
    paths = {kind: folder / f"{part}.{kind}" for kind in _KINDS}
    with paths["pieces"].open("wb") as pieces, paths["rows"].open("wb") as ends:
        count = 0
        for row in rows:
            count += len(row)
            pieces.write(np.array([(start - base, n) for start, n in row], dtype="<i8").tobytes())
            ends.write(np.array([count], dtype="<i8").tobytes())
    tables = {kind: {"size": path.stat().st_size, "sha256": sha256(path)} for kind, path in paths.items()}
    for path in paths.values():
        fsync(path)
    stamp = {"key": key, **tables}
    write_in_one_go(folder / f"{part}.done", json.dumps(stamp | {"stamp_sha256": digest_of(stamp)}))


def tables_problem(folder: Path, part: str, key: str) -> str | None:
    """Why the tables of a part cannot be used as they are; "" if they were never made, or of something else; None if
    they can."""
    stamp = folder / f"{part}.done"
    try:
        content = read_json_object(stamp)
        if content.get("stamp_sha256") != digest_of(content, but="stamp_sha256"):
            return f"{stamp} has changed"
        found = typed(_Stamp, content)
        if found.key != key:
            return ""
        for kind, table in (("pieces", found.pieces), ("rows", found.rows)):
            path = folder / f"{part}.{kind}"
            if path.stat().st_size != table.size or sha256(path) != table.sha256:
                return f"{path} has changed"
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, UserError) as error:
        return f"{stamp} cannot be read: {error}"
    return None
