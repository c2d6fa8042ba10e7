"""What happened to a run, beside its figures: a JSON object a line in ``events.jsonl``.

Each has "event", "step" and "time" (seconds since the epoch). Unlike metrics.jsonl it is only ever added to.

| event      | and                                            |
|------------|------------------------------------------------|
| start      | "layout", "processes"; with "step" 0 a new run |
| rewind     | "to", the step that it went back to            |
| checkpoint |                                                |
| sample     | "prompt", "text"                               |
"""

from __future__ import annotations

import contextlib
import json
import time
from pathlib import Path
from typing import Any

EVENTS = "events.jsonl"


def add_event(folder: Path, event: str, step: int, **fields: Any) -> None:
    """Add a line; a new run begins the file anew. A disk that is full does not end a run."""
    line = json.dumps({"event": event, "step": step, "time": time.time()} | fields)
    with contextlib.suppress(OSError), (folder / EVENTS).open("a", encoding="utf-8") as file:
        if event == "start" and not step:
            file.truncate(0)
        file.write(line + "\n")
