"""A model that writes text, from wherever weights are saved.

from torchtitan_style import load_model
model = load_model("outputs/qwen3")
print(model.generate("def main("))
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh

from torchtitan_style.checkpoint.saved import SavedModel, open_model, with_model
from torchtitan_style.checkpoint.weights import load_weights, stored_dtypes
from torchtitan_style.common.device import available_memory, compiler_problem, current_device, fastest_dtype
from torchtitan_style.common.errors import UserError, shown
from torchtitan_style.common.extensions import import_modules
from torchtitan_style.common.reading import read_json_object
from torchtitan_style.common.sizes import generation_bytes
from torchtitan_style.cpu.half_precision import multiply_in_fp32
from torchtitan_style.data.tokenizer.tokenizer import Tokenizer, copy_pretrained
from torchtitan_style.distributed.world import World, on_main
from torchtitan_style.models.build import build_model
from torchtitan_style.models.hf_folder import GENERATION, HFFolder

from .generate import TextModel
from .settings import Sampling
from .step import DecodingStep

__all__ = ["load_model"]


def load_model(
    source: str | Path,
    *,
    dtype: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    compile: bool = False,
    world: World | None = None,
    say: Callable[[str], None] = lambda line: None,
    custom_import: Sequence[str] = (),
) -> TextModel:
    """The model in ``source``: a run folder, a checkpoint, or a model folder in Transformers' format.

    dtype: to compute in and to keep the weights in, as torch.float32 or "float32"; None: bf16 where the hardware
    multiplies it, else fp32.
    device: None: the GPU if there is one, else the CPU. compile: the steps of decoding, which takes a while before the
    first text, once more before the first of several at once, and makes each of them faster; not with several ranks.
    world: the ranks to split the model over, each of which calls this; data-parallel ones have a
    copy each. say: told of checkpoints that were passed over.
    custom_import: modules that register the model's family, if it is one of your own.

    Raises UserError if there is none, it is damaged, has no tokenizer, does not fit into memory, or cannot be compiled.
    """

    import_modules(custom_import, key="custom_import")
    wanted = _dtype(dtype)

    def load(found: HFFolder | SavedModel) -> TextModel:
        return _load(found, str(source), dtype=wanted, device=device, compile=compile, world=world)

    if world is None:
        return with_model(str(source), load, say=say)
    path = on_main(lambda: open_model(str(source), verify=True, say=say).path)
    return load(open_model(str(path), verify=False))


def _load(
    found: HFFolder | SavedModel,
    source: str,
    *,
    dtype: torch.dtype | None,
    device: torch.device | str | None,
    compile: bool,
    world: World | None,
) -> TextModel:
    tokenizer = _tokenizer(found)
    device = _device(device) if world is None else world.device
    tp_mesh = None if world is None or world.layout.tp == 1 else world.mesh["tp"]
    dtype = dtype or fastest_dtype(device)
    ranks = 1 if tp_mesh is None else tp_mesh.size()
    form = found.spec.inference() if found.spec.inference else None
    problem = form.split_problem(found.config, ranks) if form else "this model family cannot be split for generation"
    if ranks > 1 and problem:
        raise UserError(f"{source}: {problem}; start a number of processes that divides it, or one")
    if compile and (problem := compiler_problem(device)):
        raise UserError(f"--compile: {problem}; leave it out")
    packs_twice = compile and form is not None and form.packs(dtype, device)
    copies = 1 if world is None else world.layout.dp
    _check_memory(found.config, source, dtype=dtype, device=device, ranks=ranks, copies=copies, packs_twice=packs_twice)
    stored_dtypes(found)  # raises if a tensor is missing
    stop_tokens, sampling = _generation_settings(found.assets, tokenizer)
    model = _build(found, dtype=dtype, device=device, tp_mesh=tp_mesh, compile=compile)
    return TextModel(
        model,
        found.config,
        tokenizer,
        assets=found.assets,
        device=device,
        stop_tokens=stop_tokens,
        sampling=sampling,
        step=_step(model, found, device, compile=compile) if ranks == 1 else None,
        group=None if tp_mesh is None else tp_mesh.get_group(),
    )


@torch.no_grad()
def _build(
    found: HFFolder | SavedModel,
    *,
    dtype: torch.dtype,
    device: torch.device,
    tp_mesh: DeviceMesh | None,
    compile: bool,
) -> Any:
    multiply_in_fp32(dtype, device)
    torch.backends.cuda.enable_cudnn_sdp(False)  # see without_cudnn_attention
    form = found.spec.inference() if found.spec.inference else None

    def split(model: Any) -> None:
        if tp_mesh is not None and form is not None:
            form.split(model, tp_mesh)

    def read(model: Any) -> None:
        load_weights(found, dict(model.named_parameters()))

    model = build_model(found.spec, found.config, device=device, lay_out=split, fill=read, dtype=dtype)
    model.eval()
    if form is not None:
        form.fuse(model, group=None if tp_mesh is None else tp_mesh.get_group(), compile=compile)
    return model


def _step(model: Any, found: HFFolder | SavedModel, device: torch.device, *, compile: bool) -> DecodingStep | None:
    """How to decode a token on one device other than by calling the model; None: by that."""
    form = found.spec.inference() if found.spec.inference else None
    replay = device.type == "cuda" and form is not None and form.replays
    if not compile and not replay:
        return None
    return DecodingStep(model, found.config, device, compile=compile, replay=replay)


def _dtype(named: torch.dtype | str | None) -> torch.dtype | None:
    """Raises UserError if it is no type to compute in."""
    dtype = getattr(torch, named, None) if isinstance(named, str) else named
    if named is None or (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        return dtype
    raise UserError(f"dtype: must be bfloat16, float16 or float32, not {named}")


def _device(name: torch.device | str | None) -> torch.device:
    """Raises UserError if there is no such device here."""
    if name is None:
        return current_device()
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f'there is no device "{name}"; cpu, cuda and cuda:1 are names of devices') from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"there is no device {name}: torch sees {torch.cuda.device_count()} GPUs")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"{name}: text is generated on cpu or cuda")
    return device


def _check_memory(
    config: Any, source: str, *, dtype: torch.dtype, device: torch.device, ranks: int, copies: int, packs_twice: bool
) -> None:
    """ranks: that share a copy of the weights. copies: there are so many."""
    needed = generation_bytes(
        parameters=config.num_parameters,
        head=config.vocab_size * config.hidden_size if config.tie_word_embeddings else 0,
        packed=config.num_matmul_parameters if packs_twice else 0,
        number_bytes=dtype.itemsize,
        ranks=ranks,
        sharing=ranks * copies if device.type == "cpu" else 1,
    )
    available = available_memory(device)
    if needed > available:
        raise UserError(
            f"{source}: the weights need {needed / 2**30:.1f} GiB in {str(dtype).removeprefix('torch.')}, and "
            f"{available / 2**30:.1f} GiB are free; split them over several GPUs with torchrun --nproc-per-node N"
        )


def _tokenizer(found: HFFolder | SavedModel) -> Tokenizer:
    if found.tokenizer is None:
        raise UserError(f"{found.path}: has no tokenizer, so its tokens cannot be decoded to text")
    if (found.tokenizer / "tokenizer.json").is_file():
        return Tokenizer(found.tokenizer)
    with tempfile.TemporaryDirectory() as temporary:  # an older format, which Transformers converts
        copy_pretrained(str(found.tokenizer), Path(temporary) / "tokenizer")
        return Tokenizer(Path(temporary) / "tokenizer")


def _generation_settings(assets: Path, tokenizer: Tokenizer) -> tuple[set[int], Sampling]:
    """The tokens that end a text, and how tokens are to be chosen: what generation_config.json recommends."""
    path = assets / GENERATION
    settings: dict[str, Any] = {}
    if path.is_file():
        try:
            settings = read_json_object(path)
        except (OSError, ValueError) as error:
            raise UserError(f"{path}: cannot be read: {error}") from None
    ends = settings.get("eos_token_id")
    ends = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(type(end) is int for end in ends):
        raise UserError(f"{path}: eos_token_id: must be a token's number, or a list of such, not {shown(ends)}")
    stop = {end for end in (*ends, tokenizer.special_id("eos_token"), tokenizer.end_of_text) if end is not None}
    if not isinstance(settings.get("do_sample"), bool | None):
        raise UserError(f"{path}: do_sample: must be true or false, not {shown(settings['do_sample'])}")
    if not settings.get("do_sample"):
        return stop, Sampling()
    fields: dict[str, Any] = {"temperature": 1.0, "top_k": 50}  # Transformers' own, where the file leaves them out
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        if (value := settings.get(name)) is None:
            continue
        if type(value) not in (int, float):
            raise UserError(f"{path}: {name}: must be a number, not {shown(value)}")
        fields[name] = int(value) if name == "top_k" and float(value).is_integer() else value
    sampling = Sampling(**fields)
    sampling.check(f"{path}: ")
    return stop, sampling
