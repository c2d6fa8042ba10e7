"""``import-hf``: a model in Transformers' format becomes a checkpoint of ours.

python -m torchtitan_style import-hf --hf Qwen/Qwen3-0.6B --output checkpoints/qwen3-0.6b
"""

from __future__ import annotations

from pathlib import Path

from torchtitan_style.common.files import readable_bytes
from torchtitan_style.common.reporting import reported_errors
from torchtitan_style.launch.preflight import check_torch
from torchtitan_style.models.spec import describe_size

from .cli import Arguments, hf_folder

USAGE = """\
usage: python -m torchtitan_style import-hf --hf DIR_OR_REPO --output DIR

Make a verified checkpoint of a Qwen3 model in Transformers' format, bit for bit, with its dimensions
and its tokenizer. Needs memory for one tensor of it.

  --hf DIR_OR_REPO   a folder with config.json and safetensors, or a name on the Hugging Face Hub
  --output DIR       the checkpoint, a new folder

A training run can start from such a folder without this: model.hf_assets_path.
"""


def main(arguments: list[str]) -> None:
    with reported_errors():
        parser = Arguments(USAGE)
        parser.add_argument("--hf", required=True)
        parser.add_argument("--output", required=True, type=Path)
        options = parser.parse(arguments)
        check_torch()
        source = hf_folder(options.hf)

        from torchtitan_style.checkpoint.hf_import import import_hf

        from .progress import progress_bar

        size = sum(tensor.stop - tensor.start for tensor in source.tensors.values())
        with progress_bar("importing", size) as advance:
            import_hf(source, options.output, advance=advance)
        figures = f"{describe_size(source.config)}, {readable_bytes(size)}"
        print(f"{options.output}: {figures}" + ("" if source.tokenizer else "; no tokenizer"))
