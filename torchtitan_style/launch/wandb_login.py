"""Whether Weights & Biases can start, found out as the wandb package does it but without its two seconds of import."""

from __future__ import annotations

import configparser
import importlib.util
import netrc
import os
from pathlib import Path
from urllib.parse import urlsplit

from torchtitan_style.common.errors import UserError

_HOSTS = ("api.wandb.ai", "api.forge.coreweave.com")
"""Where wandb logs in if nothing else is set, by version."""
_NO_LOGIN = ("offline", "dryrun", "disabled")
_SHORTEST_KEY = 40


def check_wandb() -> None:
    """Raise UserError if metrics.enable_wandb cannot work: the package is missing, or there is no login."""
    spec = importlib.util.find_spec("wandb")
    if spec is None or spec.origin is None:  # a folder "wandb" of earlier runs looks like a package without a file
        raise UserError(
            'metrics.enable_wandb: the wandb package is not installed; install it (pip install wandb, or the "wandb" '
            "extra), or set metrics.enable_wandb = false"
        )
    settings = _settings()
    if os.environ.get("WANDB_MODE", settings.get("mode", "online")) in _NO_LOGIN:
        return
    key = os.environ.get("WANDB_API_KEY")
    if key and len(key) < _SHORTEST_KEY:
        raise UserError(
            f"metrics.enable_wandb: WANDB_API_KEY has {len(key)} characters; a key has {_SHORTEST_KEY} or more "
            "(https://wandb.ai/authorize shows yours)"
        )
    base = os.environ.get("WANDB_BASE_URL", settings.get("base_url", ""))
    if not (key or os.environ.get("WANDB_IDENTITY_TOKEN_FILE") or settings.get("api_key") or _is_in_netrc(base)):
        raise UserError(
            "metrics.enable_wandb: there is no login for Weights & Biases; run `wandb login`, set WANDB_API_KEY, set "
            "WANDB_MODE=offline to keep the run on this machine, or set metrics.enable_wandb = false"
        )


def _settings() -> dict[str, str]:
    """What wandb's own settings files say, of the user and of the working folder (`wandb offline` writes there)."""
    folder = Path(os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb")).expanduser()
    local = Path(os.environ.get("WANDB_DIR", "."))
    found: dict[str, str] = {}
    for file in (folder / "settings", local / ".wandb/settings", local / "wandb/settings"):
        parser = configparser.ConfigParser(interpolation=None)
        try:
            parser.read(file, encoding="utf-8")
            found |= parser["default"] if parser.has_section("default") else {}
        except (configparser.Error, UnicodeDecodeError, OSError):
            continue  # wandb says what is wrong with it
    return found


def _is_in_netrc(base_url: str) -> bool:
    """Whether the user's netrc file has a key for the host of ``base_url``; if that is "", for wandb's own host."""
    try:
        hosts = netrc.netrc(_netrc_file()).hosts
    except (netrc.NetrcParseError, OSError, UnicodeDecodeError):
        return False
    if base_url:
        return urlsplit(base_url).netloc in hosts
    # The default host depends on the version of wandb, which always writes this name.
    return any(host in _HOSTS or login == "user" for host, (login, _, _) in hosts.items())


def _netrc_file() -> Path:
    named = os.environ.get("NETRC")
    candidates = [Path(name).expanduser() for name in ([named] if named else ["~/.netrc", "~/_netrc"])]
    return next((path for path in candidates if path.exists()), candidates[0])
