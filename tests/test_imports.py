"""Who may import whom, and what is imported before it is needed."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = "torchtitan_style"
ROOT = Path(__file__).parents[1]

# The lowest first: a module may import from its own layer and from lower ones. A package is a group; the plain data of
# model families, which need no torch, are one of their own.
LAYERS = [
    ["common"],
    ["config"],
    ["models (data)"],
    ["cpu"],
    ["distributed"],
    ["models"],
    ["optim", "data", "checkpoint", "metrics", "inference"],
    ["train"],
    ["planner", "verification", "evaluation", "report"],
    ["launch"],
    ["commands"],
    ["torchtitan_style"],  # what `import torchtitan_style` and `python -m torchtitan_style` offer
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


def group(name: str) -> str:
    """The group that module ``name`` is in."""
    package, _, module = name.partition(".")
    if package == "models" and module.rpartition(".")[2] in ("config", "hf"):
        return "models (data)"
    return package if not package.startswith("__") else PACKAGE


def layer(name: str) -> int:
    [found] = [number for number, groups in enumerate(LAYERS) if group(name) in groups]
    return found


def test_every_module_and_every_layer_is_looked_at() -> None:
    assert {group(name) for name in FILES} == {group for groups in LAYERS for group in groups}
    assert "common.errors" in imports_of_ours("config.load")  # by its full name
    assert "config.schema" in imports_of_ours("config.load")  # by a relative one
    assert "common.device" in imports_of_ours("train.step")  # a module out of its package
    assert "data.prepare.store" in imports_of_ours("launch.launcher")  # inside of a function


@pytest.mark.parametrize("name", FILES)
def test_a_module_imports_from_its_own_layer_and_below(name: str) -> None:
    upward = {other for other in imports_of_ours(name) if layer(other) > layer(name)}
    assert not upward


def test_no_groups_import_each_other_in_a_circle() -> None:
    arrows: dict[str, set[str]] = {}
    for name in FILES:
        arrows.setdefault(group(name), set()).update(group(other) for other in imports_of_ours(name))
    for each, others in arrows.items():
        others.discard(each)
    list(TopologicalSorter(arrows).static_order())  # raises CycleError, which names the circle


def test_folders_of_data_import_in_the_order_that_its_docstring_gives() -> None:
    docstring = ast.get_docstring(ast.parse(FILES["data"].read_text(encoding="utf-8"))) or ""
    order = re.findall(r"^    (\S+) ", docstring, re.MULTILINE)
    modules = {name for name in FILES if group(name) == "data"}

    def place(name: str) -> int:
        folder = FILES[name].parent.name
        return order.index("*.py" if folder == "data" else f"{folder}/")

    assert {place(name) for name in modules} == {*range(len(order))}
    for name in modules:
        assert not {other for other in imports_of_ours(name) & modules if place(other) > place(name)}, name


def test_files_are_short_and_in_groups() -> None:
    assert {name for name in FILES if "." not in name and FILES[name].name != "__init__.py"} <= {"__main__"}
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in FILES.items()}
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_the_model_needs_torch_and_its_configuration_alone() -> None:
    assert imports_of_ours("models.qwen3.config") == set()
    assert imports_of_ours("models.qwen3.model") == {
        "models.qwen3.config",
        "models.qwen3.attention",
        "models.qwen3.rotary",
    }
    assert imports_of_ours("common.errors") == set()
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
        (f"{PACKAGE}.launch.launcher", {"torch", "transformers", "huggingface_hub", "pyarrow", "numpy"}),
        (f"{PACKAGE}.launch.configure", {"torch", "transformers", "huggingface_hub", "pyarrow", "numpy"}),
        (f"{PACKAGE}.data.prepare.store", {"torch", "transformers", "pyarrow", "datasets", "fsspec"}),
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
    assert torchtitan_style.load_config("qwen3", ["--training.steps", "7"]).training.steps == 7
    with pytest.raises(AttributeError, match="no attribute 'Qwen4'"):
        _ = torchtitan_style.Qwen4


def test_the_package_lists_what_it_offers() -> None:
    import torchtitan_style

    assert set(torchtitan_style.__all__) <= set(dir(torchtitan_style))
