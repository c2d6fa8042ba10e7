"""What a file that is no text is, by its first bytes, and what to do about it."""

from __future__ import annotations

HEAD = 4096
"""Bytes at the beginning of a file that are looked at."""

_UNPACK = "unpack it and name the files in it"
_EXTRACT = "extract its text first"
_RENAME = "add {} to its name"
_SIGNATURES: tuple[tuple[int, bytes, str, str], ...] = (
    (257, b"ustar", "a tar archive", "unpack it (tar -xf FILE -C FOLDER) and name the files in it"),
    (0, b"PK\x03\x04", "a zip archive or an Office document", "unpack it (unzip FILE -d FOLDER), or extract its text"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive", _UNPACK),
    (0, b"Rar!\x1a\x07", "a rar archive", _UNPACK),
    (0, b"\x1f\x8b", "gzip data", f"{_RENAME.format('.gz')}; unpack it if it is a .tgz"),
    (4, b"1AY&SY", "bzip2 data", _RENAME.format(".bz2")),
    (0, b"\xfd7zXZ\x00", "xz data", _RENAME.format(".xz")),
    (0, b"\x28\xb5\x2f\xfd", "zstandard data", _RENAME.format(".zst")),
    (0, b"PAR1\x15", "a parquet file", _RENAME.format(".parquet")),
    (0, b"ARROW1\x00", "an Arrow file", "save it as parquet"),
    (0, b"SQLite format 3\x00", "an SQLite database", _EXTRACT),
    (0, b"%PDF-", "a PDF document", _EXTRACT),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", _EXTRACT),
    (0, b"\x89PNG", "a PNG image", "remove it from the corpus"),
    (0, b"\xff\xd8\xff", "a JPEG image", "remove it from the corpus"),
    (0, b"GIF87a", "a GIF image", "remove it from the corpus"),
    (0, b"GIF89a", "a GIF image", "remove it from the corpus"),
    (0, b"\x7fELF", "a program", "remove it from the corpus"),
)
_MARKS = (
    (b"\xff\xfe\x00\x00", "UTF-32"),
    (b"\x00\x00\xfe\xff", "UTF-32"),
    (b"\xff\xfe", "UTF-16"),
    (b"\xfe\xff", "UTF-16"),
)
_CONTROLS = bytes(set(range(32)) - set(b"\b\t\n\v\f\r\x1b"))


def why_not_text(head: bytes, *, json_lines: bool = False) -> str:
    """Why a file that begins with ``head`` cannot be read as UTF-8 text, and what to do; "" if it may be text.

    json_lines: leave control characters to the reader of each line.
    """
    for offset, magic, what, advice in _SIGNATURES:
        if head[offset:].startswith(magic):
            return f"{what}, not text; {advice}"
    encoding = next((name for mark, name in _MARKS if head.startswith(mark)), "") or _without_mark(head)
    if encoding:
        return f"{encoding} text; convert it to UTF-8 (iconv -f {encoding} -t UTF-8 FILE)"
    strange = sum(head.count(byte) for byte in _CONTROLS)
    if not json_lines and (head.count(0) * 100 > len(head) or strange * 20 > len(head)):
        return "binary data, not text; remove it from the corpus"
    return ""


def _without_mark(head: bytes) -> str:
    """UTF-16 or UTF-32 without a byte order mark, by where the NULs of its ASCII characters are."""
    length = len(head) // 4 * 4
    if length < 4:
        return ""
    nuls = [head[at:length:4].count(0) * 4 / length for at in range(4)]
    for name, expected in (("UTF-32LE", "0111"), ("UTF-32BE", "1110"), ("UTF-16LE", "0101"), ("UTF-16BE", "1010")):
        if all(share > 0.4 if nul == "1" else share < 0.05 for share, nul in zip(nuls, expected, strict=True)):
            return name
    return ""


def layout_of_json(head: bytes) -> str:
    """How the JSON values of a file lie: "array", "objects" (over several lines each), or "lines"."""
    begin = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if begin[:1] == b"[" and begin[1:].lstrip()[:1] in (b"{", b"[", b'"', b""):
        return "array"
    return "objects" if begin[:1] == b"{" and begin.partition(b"\n")[0].strip() == b"{" else "lines"
