"""The command line and the environment variables of a run."""

from __future__ import annotations

import difflib
import os
import re
from dataclasses import dataclass

from torchtitan_style.common.errors import UserError
from torchtitan_style.config.files import DEFAULT_CONFIG

from .configure import help_of

OPTIONS = ("--config", "--max-restarts", "--dry-run", "--help")


@dataclass(frozen=True)
class ConfigArguments:
    """``--config FILE`` and the overrides beside it."""

    path: str
    overrides: list[str]
    chosen: str | None
    """The value of --config; None if it was left out and ``path`` is the default."""


def parse_config_arguments(arguments: list[str], *, usage: str) -> ConfigArguments:
    """Take ``--config`` out of ``arguments``. ``--help [SECTION]`` prints help and exits."""
    path = None
    overrides = []
    rest = list(arguments)
    if rest[:1] == ["train"]:
        raise UserError("argument train: leave it out; this command trains already")
    if rest and rest[0].endswith(".toml") and not rest[0].startswith("--"):
        raise UserError(f"argument {rest[0]}: write --config {rest[0]}")
    while rest:
        argument = rest.pop(0)
        if argument in ("--help", "-h"):
            print(help_of(rest[0]) if rest and not rest[0].startswith("-") else usage)
            raise SystemExit(0)
        if argument == "--config":
            if not rest or rest[0].startswith("--"):
                raise UserError("--config needs a file, as in --config train_configs/qwen3.toml")
            path = rest.pop(0)
        elif argument.startswith("--config="):
            path = argument.partition("=")[2]
        elif near := _option_near(argument):
            raise UserError(f"there is no option {argument.partition('=')[0]}; did you mean {near}?")
        else:
            overrides.append(argument)
    return ConfigArguments(os.path.relpath(DEFAULT_CONFIG) if path is None else path, overrides, path)


def _option_near(argument: str) -> str:
    """The option that ``argument`` misspells; empty if there is none, as for overrides."""
    name = argument.partition("=")[0]
    if not name.startswith("--") or "." in name:
        return ""
    return "".join(difflib.get_close_matches(name, OPTIONS, n=1, cutoff=0.75))


def take_restarts(arguments: list[str]) -> tuple[list[str], int | None]:
    """``arguments`` without --max-restarts, and its value or that of MAX_RESTARTS; None if neither is given."""
    rest, text, name = [], os.environ.get("MAX_RESTARTS", ""), "MAX_RESTARTS"
    given = iter(arguments)
    for argument in given:
        if argument.partition("=")[0] != "--max-restarts":
            rest.append(argument)
            continue
        name = "--max-restarts"
        text = argument.partition("=")[2] if "=" in argument else next(given, "nothing")
    if not text and name == "MAX_RESTARTS":
        return rest, None
    if not _is_number(text):
        raise UserError(f'{name}: must be a whole number, 0 or more, not "{text}"')
    return rest, int(text)


@dataclass(frozen=True)
class Hosts:
    """The processes of a run: how many on each host, and which host this is."""

    gpus: int
    """Of this host."""
    nproc: int
    """Processes on this host."""
    nnodes: int
    """Hosts; of a run whose hosts may change in number, the most."""
    node_rank: int
    endpoint: str
    """host:port of the first host; empty for a single one."""
    least: int = 0
    """Hosts that the run can go on with when others are lost; 0: with all of them only."""

    @property
    def world_size(self) -> int:
        return self.nproc * self.nnodes

    @property
    def is_first(self) -> bool:
        """Whether this host writes the dump folder and prepares the data."""
        return self.node_rank == 0

    @property
    def is_elastic(self) -> bool:
        """Whether the number of hosts may change during the run."""
        return self.least > 0


def read_environment(*, gpus: int, default_nproc: int) -> Hosts:
    """Read NPROC (or NGPU), NNODES, NODE_RANK and RDZV_ENDPOINT. Raises UserError if a value is invalid."""
    nproc = _positive("NPROC", _positive("NGPU", default_nproc))
    least, nnodes = _read_nnodes()
    if gpus and nproc > gpus:
        raise UserError(
            f"NPROC: {nproc} processes need as many GPUs, but this host has {gpus}; "
            "with CUDA_VISIBLE_DEVICES= in front they train on the CPU"
        )
    node_rank = os.environ.get("NODE_RANK", "0")
    if not _is_number(node_rank) or int(node_rank) >= nnodes:
        raise UserError(f'NODE_RANK: must be a whole number from 0 to {nnodes - 1}, not "{node_rank}"')
    endpoint = environment_endpoint()
    port = re.fullmatch(r"[^\s\0]+:([0-9]{1,5})", endpoint)
    if nnodes > 1 and not (port and int(port[1]) < 2**16):
        raise UserError("RDZV_ENDPOINT: several hosts need the first one's address, as RDZV_ENDPOINT=node0:29500")
    return Hosts(gpus, nproc, nnodes, int(node_rank), endpoint, least)


def environment_endpoint() -> str:
    """host:port where the hosts of this run meet; empty for a run on one host."""
    return os.environ.get("RDZV_ENDPOINT", "") if _read_nnodes()[1] > 1 else ""


def _read_nnodes() -> tuple[int, int]:
    """The least number of hosts (0 unless a range is given) and the most."""
    text = os.environ.get("NNODES", "")
    if ":" not in text:
        return 0, _positive("NNODES", 1)
    bounds = text.split(":")
    if len(bounds) != 2 or not all(_is_number(bound) for bound in bounds) or not 1 <= int(bounds[0]) <= int(bounds[1]):
        raise UserError(f'NNODES: must be a number of hosts, or a range of them as 2:4, not "{text}"')
    least, most = map(int, bounds)
    return (least if least < most else 0), most


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) < 10


def _positive(name: str, default: int) -> int:
    text = os.environ.get(name, "")
    if not text:
        return default
    if not _is_number(text) or int(text) < 1:
        raise UserError(f'{name}: must be a whole number of at least 1, not "{text}"')
    return int(text)
