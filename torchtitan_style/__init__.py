"""Native torch.distributed training of Qwen3 language models.

A trained model generates text, a configuration is read and checked as the commands do it, and the model classes work
by themselves, as in a notebook:

    from torchtitan_style import load_model
    print(load_model("outputs/qwen3").generate("def main("))

    from torchtitan_style import load_config
    config = load_config("qwen3", ["--training.steps", "100"])

    from torchtitan_style import Qwen3Config, Qwen3ForCausalLM
    model = Qwen3ForCausalLM(Qwen3Config(num_hidden_layers=2))
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .inference.load import load_model
    from .launch.configure import load_config
    from .models.qwen3.config import Qwen3Config
    from .models.qwen3.model import Qwen3ForCausalLM, Qwen3Model

__all__ = ["Qwen3Config", "Qwen3ForCausalLM", "Qwen3Model", "load_config", "load_model"]
__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    # Imported when asked for: --help and a typo in a config need not wait for torch.
    if name == "Qwen3Config":
        from .models.qwen3.config import Qwen3Config

        return Qwen3Config
    if name in ("Qwen3ForCausalLM", "Qwen3Model"):
        from .models.qwen3 import model

        return getattr(model, name)
    if name == "load_model":
        from .inference.load import load_model

        return load_model
    if name == "load_config":
        from .launch.configure import load_config

        return load_config
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
