"""The configuration reference, from the schema:

python docs/make_reference.py > docs/config_reference.md
"""

from __future__ import annotations

import re

from pydantic import BaseModel

from torchtitan_style.config.data import MixtureCorpus, ValidationSet
from torchtitan_style.config.help import Key, keys_of
from torchtitan_style.config.schema import Model, sections_of
from torchtitan_style.models.registry import model_names, spec_of
from torchtitan_style.models.section import schema_of

BEGINNING = """\
# Configuration reference

Every key of every section, with its default. `python -m torchtitan_style --help SECTION` prints the same. This page is
made from the schema, `torchtitan_style/config/schema.py`; after a change there make it anew:

```
python docs/make_reference.py > docs/config_reference.md
```

A key is set in a TOML file, under its section, or on the command line, where it wins:

```
[training]
steps = 100                      ./run_train.sh --config my.toml --training.steps 100
```

Lists take several values on the command line: `--data.paths "a/*.txt" "b/*.txt"`. An unknown key, a value of another
type and a combination that cannot work are errors before anything starts.
"""


def reference() -> str:
    """The page."""
    sections = sections_of(schema_of(spec_of(Model().name)))
    parts = [BEGINNING, "Sections: " + ", ".join(f"[{name}](#{anchor(name)})" for name in sections) + ".\n"]
    for name, section in sections.items():
        keys = [key for key in keys_of(section) if f"{name}.{key.name}" not in sections]
        text = " ".join((section.__doc__ or "").split())
        if name == "model":
            parts += [f"## [{name}]\n\n{prose(text)}\n", *model_tables(keys)]
            continue
        parts.append(f"## [{name}]\n\n{prose(text)}\n\n{table(keys)}")
        if name == "data":
            parts += [list_of_tables("data.mixture", MixtureCorpus, section)]
        if name == "validation":
            parts += [list_of_tables("validation.sets", ValidationSet, sections["data"])]
    return "\n".join(parts)


def model_tables(keys: list[Key]) -> list[str]:
    """The keys of all families, and then what each family adds."""
    common = {key.name for key in keys_of(Model)}
    parts = [table([key for key in keys if key.name in common])]
    seen = set(common)
    for family in model_names():
        own = [key for key in keys_of(sections_of(schema_of(spec_of(family)))["model"]) if key.name not in seen]
        seen |= {key.name for key in own}
        begins = "The dimensions. Left out, they are the flavor's." if len(parts) == 1 else "And in addition:"
        parts.append(f'### name = "{family}"\n\n{begins}\n\n{table(own)}')
    return parts


def list_of_tables(name: str, entry: type[BaseModel], like: type[BaseModel]) -> str:
    """The keys of an entry that the section has not."""
    known = set(like.model_fields)
    text = f"Of `[data]`: {', '.join(f'`{key}`' for key in entry.model_fields if key in known)}. And:"
    return f"### [[{name}]]\n\n{text}\n\n{table([key for key in keys_of(entry) if key.name not in known])}"


def table(keys: list[Key]) -> str:
    rows = [f"| `{key.name}` | {code(key.default)} | {prose(key.type)} | {prose(key.text)} |\n" for key in keys]
    return "| key | default | type | meaning |\n|---|---|---|---|\n" + "".join(rows)


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def prose(text: str) -> str:
    """``text`` with what Markdown would take for marks escaped, and pages of the documentation linked."""
    escaped = re.sub(r"([\\`*\[\]<>|]|\b_|_\b)", r"\\\1", text)
    return re.sub(r"docs/(\w+\.md)", r"[\1](\1)", escaped)


def anchor(section: str) -> str:
    return section.replace(".", "")


if __name__ == "__main__":
    print(reference(), end="")
