"""From a model folder in Transformers' format to a checkpoint of ours, however large the model."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import tomli_w
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.planner import WriteItem

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.files import new_folder
from torchtitan_style.data.tokenizer.tokenizer import Tokenizer, copy_pretrained
from torchtitan_style.models.hf_folder import GENERATION, HFFolder

from .manifest import seal
from .reader import without_warnings
from .weights import load_weights, stored_dtypes
from .writer import HashingWriter


def import_hf(source: HFFolder, output: Path, *, advance: Callable[[int], None] = lambda count: None) -> None:
    """Write the checkpoint folder ``output`` with the weights of ``source`` as they are, bit for bit, its
    dimensions and its tokenizer.

    One tensor is held at a time. advance: called with the number of bytes of each tensor written.

    Raises UserError, with nothing left behind, if ``output`` is in use or the folder cannot be used.
    """
    source.check()
    with new_folder(output) as temporary:
        if source.tokenizer is not None:
            copy_pretrained(str(source.tokenizer), temporary / "tokenizer")
            _check_vocabulary(source, Tokenizer(temporary / "tokenizer"))
        if (source.assets / GENERATION).is_file() and not (temporary / "tokenizer" / GENERATION).exists():
            (temporary / "tokenizer").mkdir(exist_ok=True)
            shutil.copyfile(source.assets / GENERATION, temporary / "tokenizer" / GENERATION)
        settings = {
            "job": {"description": f"imported from {source.path.resolve()}"},
            "model": {"name": source.spec.name, **asdict(source.config)},
        }
        (temporary / "config.toml").write_text(tomli_w.dumps(settings), encoding="utf-8")
        # Tensors without data, of which the planner fetches one after the other as they are written.
        shapes = source.spec.parameter_shapes(source.config)
        tensors = {
            f"model.{name}": torch.empty(shapes[name], dtype=dtype, device="meta")
            for name, dtype in stored_dtypes(source).items()
        }
        writer = HashingWriter(temporary, max_file_size=1, one_at_a_time=True)  # a file for each tensor
        planner = _ReadWhenWritten(source, tensors, advance)
        try:
            with without_warnings():
                dcp.save(tensors, storage_writer=writer, planner=planner, no_dist=True)
        except CheckpointException as error:
            raise next(failure for failure, _ in error.failures.values()) from None
        seal(temporary, output, about={"step": 0}, known=writer.entries)


class _ReadWhenWritten(dcp.DefaultSavePlanner):
    """Plans from tensors without data, and reads each when its turn has come."""

    def __init__(self, source: HFFolder, tensors: dict[str, Tensor], advance: Callable[[int], None]) -> None:
        super().__init__()
        self.source, self.tensors, self.advance = source, tensors, advance

    def resolve_data(self, write_item: WriteItem) -> Any:
        planned = self.tensors[write_item.index.fqn]
        tensor = torch.empty_like(planned, device="cpu")
        load_weights(self.source, {write_item.index.fqn.removeprefix("model."): tensor})
        self.advance(tensor.nbytes)
        return tensor


def _check_vocabulary(source: HFFolder, tokenizer: Tokenizer) -> None:
    if tokenizer.num_ids > source.config.vocab_size:
        raise UserError(
            f"{source.path}: the tokenizer's ids go up to {tokenizer.num_ids - 1}, but the model has a vocabulary of "
            f"{source.config.vocab_size}: use the model's own tokenizer"
        )
