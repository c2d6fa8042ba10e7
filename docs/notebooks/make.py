"""Makes the notebooks from the scripts beside this file, without outputs:

python docs/notebooks/make.py

In a script "# %%" begins a cell of code, and "# %% [markdown]" one of text, whose lines begin with "# ".
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
NAMES = ("qwen3_from_scratch", "tensor_parallelism")


def notebook(script: str) -> str:
    """The notebook of a script, in Jupyter's format 4.5."""
    _, *parts = re.split(r"^# %%(.*)\n", script, flags=re.M)
    cells = [cell(number, *pair) for number, pair in enumerate(zip(parts[::2], parts[1::2], strict=True))]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    content = {
        "cells": cells,
        "metadata": {"kernelspec": kernel, "language_info": {"name": "python"}},
        "nbformat": 4,
        "nbformat_minor": 5,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def cell(number: int, kind: str, text: str) -> dict[str, Any]:
    """One cell, as JSON."""
    lines = text.strip("\n").splitlines(keepends=True)
    common: dict[str, Any] = {"id": f"cell-{number}", "metadata": {}}
    if kind.strip() == "[markdown]":
        return common | {"cell_type": "markdown", "source": [re.sub(r"^# ?", "", line) for line in lines]}
    return common | {"cell_type": "code", "execution_count": None, "outputs": [], "source": lines}


if __name__ == "__main__":
    for name in NAMES:
        script = (HERE / f"{name}.py").read_text(encoding="utf-8")
        (HERE / f"{name}.ipynb").write_text(notebook(script), encoding="utf-8")
