"""``eval``: how good a model is on texts or conversations of your own.

python -m torchtitan_style eval --checkpoint outputs/qwen3 --data "my/*.txt"
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.files import write_text
from torchtitan_style.common.program import environment_number
from torchtitan_style.common.reporting import reported_errors
from torchtitan_style.config.layout import Layout
from torchtitan_style.launch.preflight import check_torch
from torchtitan_style.train.stopping import ending_at_once

from .cli import Arguments
from .text_options import load

if TYPE_CHECKING:
    from torchtitan_style.data.encode import ChatRecipe
    from torchtitan_style.data.sources.corpus import SourceFile
    from torchtitan_style.distributed.world import World
    from torchtitan_style.evaluation.figures import Document, Sums
    from torchtitan_style.inference.generate import TextModel


USAGE = """\
usage: python -m torchtitan_style eval --checkpoint DIR --data FILE ... [...]
       python -m torchtitan_style eval --checkpoint DIR --tasks NAME ... [...]
       torchrun --nproc-per-node N -m torchtitan_style eval [...]      on N devices

Print loss, perplexity, bits per byte and token accuracy of a model, for each file and all together, or how well it
does on tasks of the lm-evaluation-harness (the "eval" extra).

  --checkpoint DIR         a run (its newest verified checkpoint), one checkpoint, or a model folder
  --data FILE ...          text, JSON lines or parquet, also compressed; patterns and URLs as in data.paths
  --text-key NAME          field or column with the text; "text" if left out
  --format FORMAT          text, or chat: each row is a conversation, as with data.format; text if left out
  --messages-key NAME      of chat: field or column with the messages; left out: found by its name
  --train-on TOKENS        of chat: score the tokens that training with this data.train_on would train on: those of
                           "assistant" turns, of the "last" one, or "all"; assistant if left out
  --seq-len N              tokens in a window; left out: what the model was trained on, at most 4096 if unknown
  --stride N               tokens from one window's start to the next; left out: --seq-len, so they don't overlap
  --batch-size N           windows that are computed at once; 8 if left out
  --per-document FILE      write a JSON line for each document
  --json                   print one JSON object instead of a table (docs/evaluation.md)
  --dtype TYPE             bfloat16 or float32; left out: bfloat16 where the hardware computes in it
  --device DEVICE          cpu, cuda, cuda:1; left out: a GPU if there is one
  --tensor-parallel N      under torchrun: split the model over N processes; 1 if left out: each has a copy

Of tasks, --seq-len cuts what is longer on the left; left out: the positions of the model.

  --tasks NAME ...         tasks, groups of them, or patterns, as in --tasks hellaswag arc_easy
  --include-path DIR       a folder with tasks of your own
  --num-fewshot N          examples before each question; left out: as the task has it
  --limit N                the first N questions of each task only; below 1: a share of them
  --chat-template          put questions as a conversation, with the model's chat template
"""

_UNKNOWN_LENGTH = 4096


def main(arguments: list[str]) -> None:
    ranks = environment_number("WORLD_SIZE", 1)
    with ending_at_once() if ranks > 1 else contextlib.nullcontext(), reported_errors():
        options = _parse(arguments, ranks)
        check_torch()
        files = _files(options) if options.data else []
        run = None if options.data else _harness()
        world = _join(options, ranks) if ranks > 1 else None
        model = load(options, world=world)
        if run is not None:
            _run_tasks(run, model, options, world)
            return
        seq_len, stride = _window(options, model)
        sums, documents = _evaluate(model, files, options, world, seq_len=seq_len, stride=stride)
        if world is None or world.is_main:
            about = {
                "checkpoint": str(model.assets.parent if model.assets.name == "tokenizer" else model.assets),
                "dtype": str(next(model.model.parameters()).dtype).removeprefix("torch."),
                "seq_len": seq_len,
                "stride": stride,
                "format": options.format,
            }
            about |= {"train_on": options.train_on} if options.format == "chat" else {}
            _report(files, sums, documents, options, about)
        if world is not None:
            from torchtitan_style.distributed.world import destroy_world

            destroy_world()


def _parse(arguments: list[str], ranks: int) -> argparse.Namespace:
    parser = Arguments(USAGE)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", nargs="+", action="extend", default=[])
    parser.add_argument("--text-key")
    parser.add_argument("--format", choices=("text", "chat"))
    parser.add_argument("--messages-key")
    parser.add_argument("--train-on", choices=("assistant", "last", "all"))
    parser.add_argument("--seq-len", type=int)
    parser.add_argument("--stride", type=int)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--per-document", type=Path)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"))
    parser.add_argument("--device")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--tasks", nargs="+", action="extend", default=[])
    parser.add_argument("--include-path")
    parser.add_argument("--num-fewshot", type=int)
    parser.add_argument("--limit", type=float)
    parser.add_argument("--chat-template", action="store_true")
    parser.set_defaults(compile=False)
    options = parser.parse(arguments)
    for name in ("seq_len", "stride", "batch_size", "tensor_parallel"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name.replace('_', '-')}: must be at least 1, not {value}")
    _check_what(options)
    options.format, options.text_key = options.format or "text", options.text_key or "text"
    options.messages_key, options.train_on = options.messages_key or "", options.train_on or "assistant"
    if ranks > 1 and options.device:
        raise UserError("--device: does not apply under torchrun, where each process has a device of its own")
    if ranks % options.tensor_parallel:
        raise UserError(f"--tensor-parallel {options.tensor_parallel}: does not divide the {ranks} processes")
    if (file := options.per_document) and (file.is_dir() or not file.absolute().parent.is_dir()):
        raise UserError(f"--per-document {file}: must be a file in a folder that exists")
    return options


def _check_what(options: argparse.Namespace) -> None:
    """Raise UserError unless there are either files or tasks, and the options that go with them."""
    if not options.data and not options.tasks:
        raise UserError("--data: name the files to evaluate on, as in --data held_out.txt, or --tasks")
    if options.data and options.tasks:
        raise UserError("--data and --tasks: give one of them")
    of_chat = ("messages_key", "train_on")
    of_data = ("stride", "per_document", "text_key", "format", *of_chat)
    of_tasks = ("include_path", "num_fewshot", "limit", "chat_template")
    refused = dict.fromkeys(of_data, "--data") if options.tasks else dict.fromkeys(of_tasks, "--tasks")
    if options.data and options.format == "chat":
        refused["text_key"] = "--format text"
    elif options.data:
        refused |= dict.fromkeys(of_chat, "--format chat")
    for name, goes_with in refused.items():
        if getattr(options, name) not in (None, False):
            raise UserError(f"--{name.replace('_', '-')}: goes with {goes_with} only")
    if options.include_path and not Path(options.include_path).is_dir():
        raise UserError(f"--include-path {options.include_path}: there is no such folder")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise UserError(f"--num-fewshot: must be at least 0, not {options.num_fewshot}")
    if options.limit is not None and not options.limit > 0:
        raise UserError(f"--limit: must be above 0, not {options.limit}")


def _files(options: argparse.Namespace) -> list[SourceFile]:
    from torchtitan_style.config.schema import Corpus
    from torchtitan_style.data.sources.corpus import source_files

    with _own_names():
        return source_files(Corpus(dataset="files", paths=options.data))


@contextlib.contextmanager
def _own_names() -> Any:
    """Messages about keys of the configuration name the options that stand for them here."""
    try:
        yield
    except UserError as error:
        raise UserError(_in_options(str(error))) from None


def _in_options(message: str) -> str:
    message = message.replace('data.format = "chat"', "--format chat").replace("data.paths", "--data")
    return message.replace("data.text_key", "--text-key").replace("data.messages_key", "--messages-key")


def _join(options: argparse.Namespace, ranks: int) -> World:
    from torchtitan_style.distributed.world import init_world

    tp = options.tensor_parallel
    # Ranks wait for the slowest at the end of a task.
    return init_world(Layout(dp_replicate=ranks // tp, tp=tp), timeout_seconds=12 * 3600 if options.tasks else 600)


def _harness() -> Any:
    """``run_tasks``. Raises UserError if the lm-evaluation-harness is not installed."""
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
    logging.getLogger("lm_eval").setLevel(logging.WARNING)
    try:
        from torchtitan_style.evaluation.harness import run_tasks
    except ModuleNotFoundError as error:
        raise UserError(
            f'--tasks: needs the lm-evaluation-harness ({error.name} is missing); pip install lm-eval (the "eval" '
            "extra) installs it"
        ) from None
    return run_tasks


def _run_tasks(run: Any, model: TextModel, options: argparse.Namespace, world: World | None) -> None:
    positions = model.config.max_position_embeddings
    if (options.seq_len or 1) > positions:
        raise UserError(f"--seq-len: {options.seq_len:,} is more than the {positions:,} positions of the model")
    with contextlib.redirect_stdout(sys.stderr):  # tasks print what they like
        found = run(
            model,
            options.tasks,
            include_path=options.include_path,
            world=world,
            max_length=options.seq_len or positions,
            batch_size=options.batch_size,
            chat_template=options.chat_template,
            num_fewshot=options.num_fewshot,
            limit=options.limit,
        )
    if world is None or world.is_main:
        from lm_eval.utils import make_table

        if options.json:
            print(json.dumps({key: found[key] for key in ("results", "n-shot", "versions")}, default=str))
        else:
            print(make_table(found), *([make_table(found, "groups")] if found.get("groups") else []), sep="\n")
    if world is not None:
        from torchtitan_style.distributed.world import destroy_world

        destroy_world()


def _window(options: argparse.Namespace, model: TextModel) -> tuple[int, int]:
    """Length and stride of the windows."""
    positions = model.config.max_position_embeddings
    seq_len: int = options.seq_len or min(positions, _trained_length(model) or _UNKNOWN_LENGTH)
    if seq_len > positions:
        raise UserError(f"--seq-len: {seq_len:,} is more than the {positions:,} positions of the model")
    stride = options.stride or seq_len
    if stride > seq_len:
        raise UserError(
            f"--stride: {stride:,} is more than --seq-len {seq_len:,}: tokens between windows would be missed"
        )
    return seq_len, stride


def _trained_length(model: TextModel) -> int | None:
    """training.seq_len of the run that a checkpoint is from; None for a model in Transformers' format."""
    from torchtitan_style.config.files import read_toml

    config = model.assets.parent / "config.toml"
    return read_toml(config)["training"]["seq_len"] if config.is_file() else None


def _chat(options: argparse.Namespace, model: TextModel) -> ChatRecipe | None:
    """How conversations are read, None if texts are. Raises UserError if the model has no usable chat template."""
    from torchtitan_style.data.chat.template import TEMPLATE_FILE, ChatTemplate
    from torchtitan_style.data.encode import ChatRecipe

    if options.format == "text":
        return None
    template = ChatTemplate.find(model.assets)
    if template is None:
        raise UserError(
            f"--format chat: {model.assets} has no chat template; save the one that the model is used with as "
            f"{TEMPLATE_FILE} in it"
        )
    template.check()
    return ChatRecipe(options.messages_key, options.train_on, longest=0)


def _evaluate(
    model: TextModel,
    files: list[SourceFile],
    options: argparse.Namespace,
    world: World | None,
    *,
    seq_len: int,
    stride: int,
) -> tuple[list[Sums], list[Document]]:
    from torchtitan_style.evaluation.evaluate import evaluate, gather

    from .progress import progress_bar

    main = world is None or world.is_main
    documents: list[Document] = []
    share = (0, 1) if world is None else (world.dp_rank, world.layout.dp)
    total = sum(file.size for file in files) // share[1]
    with _own_names(), progress_bar("evaluating", total) if main else contextlib.nullcontext() as advance:
        sums = evaluate(
            model,
            files,
            text_key=options.text_key,
            chat=_chat(options, model),
            seq_len=seq_len,
            stride=stride,
            batch_size=options.batch_size,
            share=share,
            on_document=documents.append if options.per_document else lambda document: None,
            advance=advance or (lambda count: None),
            warn=lambda line: print(f"warning: {_in_options(line)}", file=sys.stderr),
        )
    return gather(world, sums, documents)


def _report(
    files: Sequence[SourceFile],
    sums: list[Sums],
    documents: list[Document],
    options: argparse.Namespace,
    about: dict[str, Any],
) -> None:
    """Write the figures where they were asked for."""
    from torchtitan_style.evaluation.figures import Sums
    from torchtitan_style.evaluation.table import document_line, table

    names = [_name(file.url) for file in files]
    total = sum(sums, Sums())
    if not total.tokens:
        where = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
        count = "1 document" if total.unreadable == 1 else f"{total.unreadable:,} documents"
        why = f"; {count} cannot be read, see the warnings" if total.unreadable else ""
        what = "conversation" if options.format == "chat" else "text"
        raise UserError(f"--data: there is no {what} in {where}{why}")
    if options.json:
        rows = [{"file": name} | each.figures() for name, each in zip(names, sums, strict=True)]
        print(json.dumps(about | {"files": rows, "total": total.figures()}, ensure_ascii=False))
    else:
        chat = f", --format chat --train-on {options.train_on}" if options.format == "chat" else ""
        print("{checkpoint} in {dtype}, windows of {seq_len:,} tokens, stride {stride:,}".format(**about) + chat)
        print("\n".join(table([*zip(names, sums, strict=True), ("total", total)])))
    # Last: the figures above are not lost if this file cannot be written.
    if options.per_document:
        lines = (json.dumps(document_line(names[each.file], each), ensure_ascii=False) for each in documents)
        text = "".join(line + "\n" for line in lines)
        write_text(options.per_document, text, called=f"--per-document {options.per_document}")


def _name(url: str) -> str:
    """A file as a person calls it: from the working folder if it is in it."""
    return os.path.relpath(url) if url.startswith(os.getcwd() + os.sep) else url
