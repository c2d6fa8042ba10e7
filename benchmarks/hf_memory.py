"""Peak memory of import-hf and export-hf, against what they promise: one file of the model, not all of it.

    python benchmarks/hf_memory.py

Makes a random bf16 model of 0.8 GB in files of about 100 MB, imports it, exports it in files of the same size,
compares the two folders bit for bit, and exits with 1 if more memory was taken than one file and the
largest tensor (beyond what a model of no size takes).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from torchtitan_style import Qwen3Config
from torchtitan_style.models.qwen3.hf import parameter_shapes

MODEL = Qwen3Config(vocab_size=32_768, num_hidden_layers=24, tie_word_embeddings=True)
NOTHING = Qwen3Config(
    vocab_size=64, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
)
FILE_BYTES = 100 * 2**20
SLACK = 16 * 2**20
"""For buffers, and for what the allocator keeps."""


def write_model(config: Qwen3Config, folder: Path) -> tuple[int, int]:
    """A model folder with random weights. Returns the sizes of its largest file and its largest tensor."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(asdict(config) | {"model_type": "qwen3"}))
    weight_map: dict[str, str] = {}
    sizes: list[int] = []
    largest = 0
    part: dict[str, torch.Tensor] = {}
    names = parameter_shapes(config)
    for name, shape in names.items():
        part[name] = torch.randn(shape).bfloat16()
        largest = max(largest, part[name].nbytes)
        size = sum(tensor.nbytes for tensor in part.values())
        if size >= FILE_BYTES or name == list(names)[-1]:
            file = f"part-{len(sizes)}.safetensors"
            save_file(part, folder / file)
            weight_map |= dict.fromkeys(part, file)
            sizes.append(size)
            part = {}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return max(sizes), largest


MEASURED = """
import re, sys
from pathlib import Path
from torchtitan_style.__main__ import main
main(sys.argv[1:])
print(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
"""


def peak(*arguments: str) -> int:
    """Most bytes in memory of one command, by its own account: what its parent held does not count."""
    done = subprocess.run([sys.executable, "-c", MEASURED, *arguments], stdout=subprocess.PIPE, text=True, check=True)
    return int(done.stdout.split()[-1]) * 1024


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def main() -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(NOTHING, folder / "nothing")
        file, tensor = write_model(MODEL, folder / "model")
        peaks = {}
        for name in ("nothing", "model"):
            paths = [str(folder / f"{name}{suffix}") for suffix in ("", "-imported", "-exported")]
            peaks[name, "import-hf"] = peak("import-hf", "--hf", paths[0], "--output", paths[1])
            shard = ["--max-shard-size", f"{FILE_BYTES // 2**20}MB"]
            peaks[name, "export-hf"] = peak("export-hf", "--checkpoint", paths[1], "--output", paths[2], *shard)
        before, after = all_tensors(folder / "model"), all_tensors(folder / "model-exported")
        same = before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)

    total = 2 * MODEL.num_parameters
    print(f"model {total / 2**20:,.0f} MiB, largest file {file / 2**20:,.0f}, largest tensor {tensor / 2**20:,.0f}")
    fits = True
    for command in ("import-hf", "export-hf"):
        taken = peaks["model", command] - peaks["nothing", command]
        fits &= taken <= file + tensor + SLACK
        print(
            f"{command}: peak {peaks['model', command] / 2**20:,.0f} MiB, of which {taken / 2**20:,.0f} MiB for the "
            f"weights; promised {(file + tensor + SLACK) / 2**20:,.0f}"
        )
    print(f"imported and exported again: {'bit for bit the same' if same else 'DIFFERENT'}")
    raise SystemExit(0 if fits and same else 1)


if __name__ == "__main__":
    main()
