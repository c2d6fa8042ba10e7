"""The weights that adapters belong to, which their checkpoints do not hold: where they are, and what they were.

A checkpoint of adapters has ``base.json``: the source as it was configured, its path at the time, and a hash of every
tensor in it (of a checkpoint of ours: of every file). Adapters are of use with these weights alone, so others are
refused.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.reading import read_json_object
from torchtitan_style.common.typed import Content, Sha256, typed
from torchtitan_style.models.hf_folder import HFFolder, StoredTensor, blocks

from .manifest import MANIFEST, read_manifest

if TYPE_CHECKING:
    from .saved import SavedModel

BASE = "base.json"


class _Saved(Content):
    """As it is saved."""

    source: str
    path: str
    on_hub: bool
    hashes: dict[str, Sha256]


@dataclasses.dataclass(frozen=True)
class Base:
    """Weights that a run of adapters has started from."""

    source: str
    """As in the configuration: a folder or a Hub name."""
    path: str
    """Where they were then, absolute: of a run the very checkpoint, of a Hub name the downloaded folder."""
    on_hub: bool
    """Whether ``source`` is a name on the Hub."""
    hashes: Mapping[str, str]
    """SHA-256 by tensor, or by file."""

    @classmethod
    def of(cls, source: str, found: HFFolder | SavedModel, *, advance: Callable[[], None] = lambda: None) -> Base:
        """Reads all of the weights if they are in Transformers' format."""
        return cls("", "", False, hashes_of(found, advance=advance)).moved_to(source, found.path)

    def moved_to(self, source: str, path: Path) -> Base:
        """The same weights in another place."""
        on_hub = not Path(os.path.expanduser(source)).exists()
        return dataclasses.replace(self, source=source, path=str(path.resolve()), on_hub=on_hub)

    @classmethod
    def read(cls, checkpoint: Path) -> Base:
        """That of a checkpoint. Raises UserError if it has none."""
        try:
            content = typed(_Saved, read_json_object(checkpoint / BASE, most=2**26))
            return cls(**content.model_dump())
        except (OSError, ValueError) as error:
            raise UserError(
                f"{checkpoint / BASE}: does not say which weights the adapters belong to: {error}"
            ) from None

    def to_json(self) -> str:
        return json.dumps(dataclasses.asdict(self), indent=2) + "\n"

    def change(self, found: HFFolder | SavedModel, *, advance: Callable[[], None] = lambda: None) -> str | None:
        """What is different about the weights in ``found``, in words; None if they are the same."""
        now = hashes_of(found, advance=advance)
        changed = [name for name, value in self.hashes.items() if now.get(name) != value]
        changed += [name for name in now if name not in self.hashes]
        if not changed:
            return None
        return f"{len(changed)} of {len(now)} {'tensors' if isinstance(found, HFFolder) else 'files'} differ: " + (
            ", ".join(changed[:3]) + (", …" if len(changed) > 3 else "")
        )


def hashes_of(found: HFFolder | SavedModel, *, advance: Callable[[], None]) -> dict[str, str]:
    """A checkpoint's manifest has them, and is verified when the checkpoint is opened."""
    if not isinstance(found, HFFolder):
        try:
            files = read_manifest(found.path).files
        except (OSError, ValueError) as error:
            raise UserError(f"{found.path}: its {MANIFEST} cannot be used: {error}") from None
        read = (name for name in files if name in (".metadata", BASE) or name.endswith(".distcp"))
        return {name: files[name].sha256 for name in read}
    tensors = found.tensors
    with ThreadPoolExecutor(max(1, os.cpu_count() or 1)) as pool:  # hashing lets go of Python's lock
        return dict(zip(tensors, pool.map(lambda tensor: _hash(tensor, advance), tensors.values()), strict=True))


def _hash(tensor: StoredTensor, advance: Callable[[], None]) -> str:
    digest = hashlib.sha256(f"{tensor.dtype} {tensor.shape}".encode())
    for block in blocks(tensor):
        digest.update(block)
        advance()
    return digest.hexdigest()
