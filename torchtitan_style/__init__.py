"""Native torch.distributed training of Qwen3 language models.

A trained model generates text, a configuration is read and checked as the commands do it, and the model classes work
by themselves, as in a notebook:

    from torchtitan_style import load_model
    print(load_model("outputs/qwen3").generate("def main("))

    from torchtitan_style import load_config
    config = load_config("qwen3", ["--training.steps", "100"])

    from torchtitan_style import Qwen3Config, Qwen3ForCausalLM
    model = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=2))

docs/extending.md has models, losses, optimizers, data sources and a training loop of your own.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .common.errors import UserError
    from .common.extensions import register_loss, register_optimizer, register_schedule, register_source
    from .inference.load import load_model
    from .launch.configure import load_config
    from .models.qwen3.config import Qwen3Config
    from .models.qwen3.model import Qwen3ForCausalLM, Qwen3Model
    from .models.registry import register_model
    from .models.spec import ModelSpec

__version__ = "0.2.0"

# Imported when asked for: --help and a typo in a config need not wait for torch.
_FROM = {
    "ModelSpec": "models.spec",
    "Qwen3Config": "models.qwen3.config",
    "Qwen3ForCausalLM": "models.qwen3.model",
    "Qwen3Model": "models.qwen3.model",
    "UserError": "common.errors",
    "load_config": "launch.configure",
    "load_model": "inference.load",
    "register_loss": "common.extensions",
    "register_model": "models.registry",
    "register_optimizer": "common.extensions",
    "register_schedule": "common.extensions",
    "register_source": "common.extensions",
}
__all__ = [
    "ModelSpec",
    "Qwen3Config",
    "Qwen3ForCausalLM",
    "Qwen3Model",
    "UserError",
    "load_config",
    "load_model",
    "register_loss",
    "register_model",
    "register_optimizer",
    "register_schedule",
    "register_source",
]


def __getattr__(name: str) -> Any:
    if name in _FROM:
        return getattr(importlib.import_module(f".{_FROM[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
