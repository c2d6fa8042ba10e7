"""Who may import whom, and what is imported before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = "torchtitan_style"
ROOT = Path(__file__).parents[1]

# The lowest first: a module may import from its own layer and from lower ones. Of the names here that a module's
# name starts with, the longest counts.
LAYERS = [
    ["errors", "folders", "hub", "signals"],
    ["models.qwen3.config", "models.qwen3.hf"],  # plain data
    ["models.qwen3.model", "models.qwen3.attention"],  # plain PyTorch, of use without the rest
    [
        "models.hf_folder",
        "checkpoint.folder",
        "checkpoint.manifest",
        "checkpoint.saved",
    ],  # files: what a model's folder says of itself
    ["config", "memory"],
    ["distributed"],
    ["models"],  # what makes models parallel, and the registry of all
    ["optim", "data", "checkpoint", "metrics", "inference"],
    [
        "ending",
        "preempted",
        "preflight",
        "preparation",
        "resuming",
        "run_data",
        "run_lock",
        "step",
        "train_state",
        "trainer",
    ],
    ["verification"],
    ["commands"],
    ["launch", "__main__", "train", "__init__"],  # what is started, and what `import torchtitan_style` offers
]


def module_name(path: Path) -> str:
    """As in "config.load"; a package has its folder's name, the outermost "__init__"."""
    parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)


FILES = {module_name(path): path for path in sorted((ROOT / PACKAGE).rglob("*.py"))}


def imports(name: str) -> set[str]:
    """Full names of all modules that module ``name`` imports, anywhere in its source."""
    path = FILES[name]
    folder = [PACKAGE, *path.parent.relative_to(ROOT / PACKAGE).parts]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            start = folder[: len(folder) - node.level + 1] if node.level else []
            base = ".".join([*start, *([node.module] if node.module else [])])
            for alias in node.names:
                deeper = f"{base}.{alias.name}"
                found.add(deeper if deeper.removeprefix(f"{PACKAGE}.") in FILES else base)
    return found


def imports_of_ours(name: str) -> set[str]:
    ours = {full for full in imports(name) if full.partition(".")[0] == PACKAGE}
    return {full.removeprefix(PACKAGE).removeprefix(".") or "__init__" for full in ours}


def layer(name: str) -> int:
    matches = [(len(start), i) for i, row in enumerate(LAYERS) for start in row if f"{name}.".startswith(f"{start}.")]
    assert matches, f"{name} is in none of LAYERS"
    return max(matches)[1]


def test_every_module_and_every_layer_is_looked_at() -> None:
    assert {layer(name) for name in FILES} == set(range(len(LAYERS)))
    assert "errors" in imports_of_ours("config.load")  # by its full name
    assert "config.schema" in imports_of_ours("config.load")  # by a relative one
    assert "commands.train" in imports_of_ours("launch")  # a module out of its package
    assert "preparation" in imports_of_ours("launch")  # inside of a function


@pytest.mark.parametrize("name", FILES)
def test_a_module_imports_from_its_own_layer_and_below(name: str) -> None:
    upward = {other for other in imports_of_ours(name) if layer(other) > layer(name)}
    assert not upward


def test_the_model_needs_torch_and_its_configuration_alone() -> None:
    assert imports_of_ours("models.qwen3.config") == set()
    assert imports_of_ours("models.qwen3.model") == {"models.qwen3.config", "models.qwen3.attention"}
    assert imports_of_ours("errors") == set()
    for name, allowed in (
        ("models.qwen3.config", set()),
        ("models.qwen3.hf", set()),
        ("models.qwen3.model", {"torch"}),
        ("models.qwen3.attention", {"torch"}),
    ):
        outside = {full.partition(".")[0] for full in imports(name)} - {PACKAGE}
        assert outside - set(sys.stdlib_module_names) == allowed


@pytest.mark.parametrize(
    ("module", "unwanted"),
    [
        (PACKAGE, {"torch", "transformers", "pyarrow", "numpy", "pydantic"}),
        (f"{PACKAGE}.__main__", {"torch", "transformers", "huggingface_hub", "pyarrow", "numpy", "pydantic"}),
        (f"{PACKAGE}.launch", {"torch", "transformers", "huggingface_hub", "pyarrow", "numpy"}),
        (f"{PACKAGE}.train", {"torch", "transformers", "huggingface_hub", "pyarrow", "numpy"}),
        (f"{PACKAGE}.preparation", {"torch", "transformers", "pyarrow", "datasets", "fsspec"}),
        (f"{PACKAGE}.inference.settings", {"torch", "transformers", "numpy"}),
        (f"{PACKAGE}.inference.load", {"transformers", "jinja2"}),
    ],
)
def test_nothing_heavy_is_imported_before_it_is_needed(module: str, unwanted: set[str]) -> None:
    code = f"import sys, {module}; print(*sorted({unwanted!r} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_package_offers_the_model() -> None:
    import torchtitan_style
    from torchtitan_style.inference.load import load_model
    from torchtitan_style.models.qwen3 import config, model

    assert torchtitan_style.Qwen3Config is config.Qwen3Config
    assert torchtitan_style.Qwen3ForCausalLM is model.Qwen3ForCausalLM
    assert torchtitan_style.Qwen3Model is model.Qwen3Model
    assert torchtitan_style.load_model is load_model
    with pytest.raises(AttributeError, match="no attribute 'Qwen4'"):
        _ = torchtitan_style.Qwen4
