"""``checkpoint``: list the checkpoints of a run, show what one holds, and verify them.

python -m torchtitan_style checkpoint list outputs/qwen3
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from torchtitan_style.checkpoint.base import Base
from torchtitan_style.checkpoint.folder import CheckpointFolder
from torchtitan_style.checkpoint.manifest import MANIFEST, problem_of, readable
from torchtitan_style.checkpoint.saved import SavedModel
from torchtitan_style.common.errors import UserError
from torchtitan_style.common.files import readable_bytes
from torchtitan_style.common.hub import similar_folder
from torchtitan_style.common.reporting import reported_errors
from torchtitan_style.config import Config
from torchtitan_style.config.files import flat, read_toml
from torchtitan_style.config.layout import Layout
from torchtitan_style.models.registry import model_names, spec_of
from torchtitan_style.models.trained import adapter_shapes

from .cli import Arguments

USAGE = """\
usage: python -m torchtitan_style checkpoint list|verify|show DIR [--quick] [--json]

  list DIR      the checkpoints of a run: step, size, layout, losses at the time, whole or not
  verify DIR    read all files of a run's checkpoints, or of one, and compare them with what was written;
                status 1 if one of them is not whole
  show DIR      all that is known of one checkpoint (of a run: of its newest one), its files, and the settings
                that are not the defaults

  --quick       compare the sizes of files only, and do not read them
  --json        one JSON object a line instead of a table
"""


def main(arguments: list[str]) -> None:
    """Run the command."""
    with reported_errors():
        parser = Arguments(USAGE)
        parser.add_argument("action", choices=("list", "verify", "show"))
        parser.add_argument("folder", metavar="DIR", type=Path)
        parser.add_argument("--quick", action="store_true")
        parser.add_argument("--json", action="store_true")
        options = parser.parse(arguments)
        found = _find(options.folder)
        if options.action == "show":
            _show(found[0], as_json=options.json, hashes=not options.quick)
            return
        damaged = 0
        if options.action == "list" and not options.json:
            damaged = _list(found, hashes=not options.quick)
        else:
            for path in found:
                about = _about(path, hashes=not options.quick)
                damaged += about["problem"] is not None
                print(json.dumps(about) if options.json else f"{path}: {about['problem'] or 'whole'}", flush=True)
        if damaged and options.action == "verify":
            raise SystemExit(1)


def _find(folder: Path) -> list[Path]:
    """The checkpoint that ``folder`` is, or those that it holds, newest first. Raises UserError if there are none."""
    if (folder / MANIFEST).is_file() or (folder / "train_state.json").is_file():
        return [folder]
    checkpoints = CheckpointFolder.within(folder)
    if checkpoints is None:
        near = None if folder.is_dir() else similar_folder(folder)
        hint = f"; did you mean {near}?" if near else ""
        raise UserError(f"{folder}: {'has no checkpoints' if folder.is_dir() else 'there is no such folder'}{hint}")
    return [checkpoints.path(step) for step in checkpoints.steps()]


def _about(path: Path, *, hashes: bool) -> dict[str, Any]:
    """What the manifest says, as far as it can be read, and what is wrong."""
    problem = problem_of(path, hashes=hashes)
    manifest = readable(path)
    files = manifest.pop("files", {})
    size = sum(entry["size"] for entry in files.values())
    if not manifest:
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    best = CheckpointFolder(path.parent).best() == manifest.get("step", -1)
    return {"path": str(path), "problem": problem, "bytes": size, **manifest, "best": best, "files": files}


def _list(paths: list[Path], *, hashes: bool) -> int:
    """Print a table; returns how many are not whole."""
    table = Table(box=None, pad_edge=False)
    for name in ("step", "size", "layout", "loss", "val. loss", "saved", "files", ""):
        table.add_column(name, justify="right" if name in ("step", "size", "loss", "val. loss") else "left")
    damaged = 0
    for path in paths:
        about = _about(path, hashes=hashes)
        figures = about.get("figures", {})
        damaged += about["problem"] is not None
        table.add_row(
            path.name.removeprefix("step-"),
            readable_bytes(about["bytes"]),
            str(Layout(**about["mesh"])) if about.get("mesh") else "",
            *(f"{figures[key]:.4f}" if figures.get(key) is not None else "" for key in ("loss", "val_loss")),
            _date(about),
            about["problem"] or ("whole" if hashes else "sizes are right"),
            "best" if about["best"] else "",
        )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200  # rich takes 80, and would cut what is wrong
    console.print(table)
    return damaged


def _show(path: Path, *, as_json: bool, hashes: bool) -> None:
    about = _about(path, hashes=hashes)
    if as_json:
        print(json.dumps(about))
        return
    figures = about.get("figures", {})
    lines = {
        "checkpoint": path,
        "step": about.get("step", "unknown"),
        "saved": _date(about),
        "layout": Layout(**about["mesh"]) if about.get("mesh") else "",
        "loss": _rounded(figures.get("loss")),
        "validation loss": _rounded(figures.get("val_loss")),
        "best so far": "yes" if about["best"] else "no",
        "torch": about.get("torch", ""),
        "tokenizer": about.get("tokenizer", ""),
        "data": ", ".join(about.get("data", [])),
        "adapters": _adapters(path),
        "files": about["problem"] or ("whole" if hashes else "sizes are right"),
    }
    for name, value in lines.items():
        if value not in ("", None):
            print(f"{name:<16}{value}")
    for name, entry in about["files"].items():
        print(f"  {readable_bytes(entry['size']):>8}  {entry['sha256'][:16]}  {name}")
    settings = path / "config.toml"
    if settings.is_file():
        print(f"\nsettings that differ from the defaults (all are in {settings}):")
        for line in _changed(settings):
            print(f"  {line}")


def _adapters(path: Path) -> str:
    """What adapters a checkpoint holds and of which weights, if that is what it holds."""
    try:
        model = SavedModel(path)
        if not model.lora.rank:
            return ""
        count = sum(map(math.prod, adapter_shapes(model.spec, model.config, model.lora).values()))
        return f"{count / 1e6:,.2f} M parameters of rank {model.lora.rank}, for the weights of {Base.read(path).source}"
    except UserError:
        return ""


def _rounded(figure: float | None) -> str:
    return "" if figure is None else f"{figure:.4f}"


def _changed(path: Path) -> list[str]:
    """The settings in a config.toml that differ from the schema's defaults, as "optimizer.lr = 0.002".

    The model's dimensions are those that its flavor does not have.
    """
    try:
        settings = flat(read_toml(path))
    except UserError as error:
        return [str(error)]
    defaults = flat(Config().model_dump())
    name, flavor = (str(settings.get(f"model.{key}", getattr(Config().model, key))) for key in ("name", "flavor"))
    shape = spec_of(name).flavors.get(flavor) if name in model_names() else None
    if shape is not None:
        defaults |= flat({"model": dataclasses.asdict(shape)})
    return [f"{key} = {json.dumps(value)}" for key, value in settings.items() if value != defaults.get(key)]


def _date(about: dict[str, Any]) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(about["time"])) if about.get("time") else ""
