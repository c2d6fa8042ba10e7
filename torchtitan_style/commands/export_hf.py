"""``export-hf``: a checkpoint becomes a model folder in Transformers' format.

python -m torchtitan_style export-hf --checkpoint outputs/qwen3 --output exported --dtype bfloat16
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from torchtitan_style.checkpoint.saved import SavedModel, with_model
from torchtitan_style.common.errors import UserError
from torchtitan_style.common.reporting import reported_errors
from torchtitan_style.launch.preflight import check_torch
from torchtitan_style.models.hf_folder import HFFolder
from torchtitan_style.models.spec import describe_size

from .cli import Arguments

USAGE = """\
usage: python -m torchtitan_style export-hf --checkpoint DIR --output DIR [--dtype TYPE] [--max-shard-size SIZE]
       python -m torchtitan_style export-hf --checkpoint DIR --output DIR --adapter [--dtype TYPE]

Write a folder that Transformers, vLLM and SGLang load: config.json, safetensors, tokenizer. Needs
memory for one file of it. Adapters are merged into the weights that they belong to.

  --checkpoint DIR        a run (its newest verified checkpoint), one checkpoint, or a model folder
  --output DIR            the model folder, a new one
  --dtype TYPE            bfloat16, float16 or float32; as they are stored if left out (training stores float32)
  --max-shard-size SIZE   of one file, as in 500MB; 5GB if left out
  --adapter               of a run with lora.rank: the adapters alone, as a folder that PEFT loads
"""


def main(arguments: list[str]) -> None:
    with reported_errors():
        parser = Arguments(USAGE)
        parser.add_argument("--checkpoint", required=True)
        parser.add_argument("--output", required=True, type=Path)
        parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"))
        parser.add_argument("--max-shard-size")
        parser.add_argument("--adapter", action="store_true")
        options = parser.parse(arguments)
        if options.adapter and options.max_shard_size is not None:
            raise UserError("--max-shard-size: adapters are one file; leave it out with --adapter")
        max_shard_size = _bytes("5GB" if options.max_shard_size is None else options.max_shard_size)
        check_torch()

        def export(source: HFFolder | SavedModel) -> None:
            import torch

            from torchtitan_style.checkpoint.hf_export import export_hf
            from torchtitan_style.checkpoint.peft_export import export_adapter

            from .progress import progress_bar

            dtype = getattr(torch, options.dtype) if options.dtype else None
            if options.adapter:
                count = export_adapter(source, options.output, dtype=dtype)
                print(f"{options.output}: adapters of {count / 1e6:,.1f} M parameters of {source.path}")
                return
            bytes_each = dtype.itemsize if dtype else 4
            with progress_bar("exporting", source.config.num_parameters * bytes_each) as advance:
                export_hf(source, options.output, dtype=dtype, max_shard_size=max_shard_size, advance=advance)
            print(f"{options.output}: {describe_size(source.config)} of {source.path}")

        with_model(options.checkpoint, export, say=lambda line: print(line, file=sys.stderr))


def _bytes(text: str) -> int:
    """ "500MB" as a number of bytes. Raises UserError."""
    units = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?B)", text.strip(), flags=re.IGNORECASE)
    size = float(match[1]) * units[match[2].upper()] if match else 0
    if not 1 <= size < 2**63:
        raise UserError(f"--max-shard-size {text}: must be a size as 500MB or 5GB")
    return int(size)
