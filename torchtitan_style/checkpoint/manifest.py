"""The manifest of a checkpoint: what its files were when it was written, and whether they still are.

``manifest.json`` is written last. It has size and SHA-256 of every other file, the step, what a person wants to
know of a checkpoint without opening it (mesh, torch version, tokenizer, data, losses), and a hash of all that.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

from pydantic import AfterValidator, Field

from torchtitan_style.common.errors import UserError, bounded
from torchtitan_style.common.files import digest_of, fsync, sha256
from torchtitan_style.common.reading import read_json_object
from torchtitan_style.common.typed import Content, Count, Seconds, Sha256, typed
from torchtitan_style.config.layout import Layout

MANIFEST = "manifest.json"
_MOST_BYTES = 2**26


def _inside(name: str) -> str:
    path = PurePosixPath(name)
    if not path.parts or path.is_absolute() or ".." in path.parts or "\0" in name:
        raise ValueError("must be the name of a file in the folder")
    return name


def _axes(mesh: dict[str, int]) -> dict[str, int]:
    known = [field.name for field in dataclasses.fields(Layout)]
    if unknown := [axis for axis in mesh if axis not in known]:
        raise ValueError(f"there is no axis {unknown[0][:40]}")
    return mesh


_Degree = Annotated[int, Field(ge=1, lt=2**31)]


class FileEntry(Content):
    """What a manifest says of a file."""

    size: Count
    sha256: Sha256


class Manifest(Content):
    """The manifest of a checkpoint. Not all of them have all of it: an imported model has no losses."""

    files: dict[Annotated[str, AfterValidator(_inside)], FileEntry]
    manifest_sha256: Sha256 | None = None
    step: Count | None = None
    mesh: Annotated[dict[str, Annotated[int, Field(ge=1, lt=2**31)]], AfterValidator(_axes)] = Field(
        default_factory=dict
    )
    """Of an older version it has fewer axes."""
    torch: str = ""
    tokenizer: str = ""
    data: list[str] = Field(default_factory=list)
    time: Seconds | None = None
    figures: dict[str, float | None] = Field(default_factory=dict)
    best: bool = False


def problem_of(
    folder: Path, *, part: int = 0, of: int = 1, hashes: bool = True, advance: Callable[[], None] = lambda: None
) -> str | None:
    """What is wrong with the files of one checkpoint, or None.

    part, of: look at every ``of``-th file only, from number ``part`` on, as one rank of several. hashes: read
    the files; otherwise only their sizes are compared. advance: called as reading gets on, from any thread.
    """
    try:
        content = read_json_object(folder / MANIFEST, most=_MOST_BYTES)
        if not isinstance(content.get("files"), dict):
            raise ValueError("it does not say which files there are")
        if not content["files"]:
            return f"{MANIFEST} lists no files"
        if "manifest_sha256" not in content:
            return f"{MANIFEST} has no hash of itself: it has changed, or is of an older version"
        if content["manifest_sha256"] != _digest(content):
            return f"{MANIFEST} has changed since it was written"
        files = list(typed(Manifest, content).files.items())
        listed = {name for name, _ in files}
        read = (path for path in folder.iterdir() if _is_read(path.name))
        if unlisted := sorted({path.name for path in read} - listed):
            return f"{unlisted[0]} is not in {MANIFEST}"
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError) as error:
        return bounded(f"{MANIFEST} cannot be read: {error}")
    # Hashing is what takes the time, and lets go of Python's lock.
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:
        look = functools.partial(_problem_of_file, folder, hashes=hashes, advance=advance)
        found = pool.map(lambda item: look(*item), files[part::of])
        return next((problem for problem in found if problem), None)


def _is_read(name: str) -> bool:
    """Whether a resume reads a file of this name."""
    return name in (".metadata", "train_state.json") or name.endswith(".distcp")


def _problem_of_file(
    folder: Path, name: str, expected: FileEntry, *, hashes: bool, advance: Callable[[], None]
) -> str | None:
    try:
        size = (folder / name).stat().st_size
        if size != expected.size:
            return f"{name} has {size} bytes instead of {expected.size}"
        if hashes and sha256(folder / name, advance=advance) != expected.sha256:
            return f"{name} has changed since it was written"
    except FileNotFoundError:
        return f"{name} is missing"
    except (OSError, UserError) as error:
        return bounded(f"{name} cannot be read: {error}")
    return None


def read_manifest(folder: Path) -> Manifest:
    """Raises OSError or ValueError if it cannot be read."""
    return typed(Manifest, read_json_object(folder / MANIFEST, most=_MOST_BYTES))


def readable(folder: Path) -> dict[str, Any]:
    """What of a manifest is of the kind that it should be; that the rest is not, ``problem_of`` says."""
    try:
        content = read_json_object(folder / MANIFEST, most=_MOST_BYTES)
    except (OSError, ValueError):
        return {}
    found = {}
    for name, value in content.items():
        try:
            if name in Manifest.model_fields and name != "files":
                typed(Manifest, {"files": {}, name: value})
            elif name == "files":
                typed(Manifest, {"files": value})
            found[name] = value
        except ValueError:
            continue
    return found


def _digest(manifest: Mapping[str, Any]) -> str:
    """Hash of all that a manifest says, but for the hash itself."""
    return digest_of(manifest, but="manifest_sha256")


def file_entry(path: Path) -> dict[str, Any]:
    """What the manifest says of one file."""
    return {"size": path.stat().st_size, "sha256": sha256(path)}


def seal(
    temporary: Path,
    final: Path,
    *,
    about: Mapping[str, Any],
    known: Mapping[str, dict[str, Any]] | None = None,
) -> None:
    """Make a checkpoint of the files in ``temporary``: manifest, to disk, final name, in this order.

    about: what else the manifest says, "step" at least. known: entries of files that were hashed as they were
    written, and are on disk already.
    """
    known = known or {}
    paths = {path.relative_to(temporary).as_posix(): path for path in sorted(temporary.rglob("*"))}
    files = {name: known.get(name) or file_entry(path) for name, path in paths.items() if path.is_file()}
    manifest = {**about, "files": files}
    manifest["manifest_sha256"] = _digest(manifest)
    (temporary / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for name, path in paths.items():
        if name not in known:
            fsync(path)
    fsync(temporary / MANIFEST)
    fsync(temporary)
    _publish(temporary, final)


def aside(path: Path) -> Path:
    """A name for what is to make room at ``path`` and not to be deleted."""
    names = (f"set-aside-{path.name}" + (f"-{number}" if number > 1 else "") for number in itertools.count(1))
    return next(other for name in names if not (other := path.with_name(name)).exists())


def _publish(temporary: Path, final: Path) -> None:
    """Give ``temporary`` its final name; what had that name is deleted only afterwards."""
    replaced = None
    if final.exists():
        replaced = aside(final)  # which nothing deletes, should this be cut short
        final.rename(replaced)
    temporary.rename(final)
    fsync(final.parent)
    if replaced:
        shutil.rmtree(replaced, ignore_errors=True)
