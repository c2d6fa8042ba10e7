"""``report``: how runs went, as one HTML file.

python -m torchtitan_style report outputs/qwen3
"""

from __future__ import annotations

import os
from pathlib import Path

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.files import write_text
from torchtitan_style.common.hub import similar_folder
from torchtitan_style.common.reporting import reported_errors

from .cli import Arguments

USAGE = """\
usage: python -m torchtitan_style report RUN [RUN ...] [--output FILE]

Write one HTML file about runs, finished or going on: curves, what happened, settings, samples of text. It can be read
without a network, and sent to others.

  RUN                      the folder of a run, as outputs/qwen3
  --output FILE            left out: report.html in the folder of the run; of several, in the working folder
"""


def main(arguments: list[str]) -> None:
    with reported_errors():
        parser = Arguments(USAGE)
        parser.add_argument("runs", nargs="+")
        parser.add_argument("--output", type=Path)
        options = parser.parse(arguments)
        folders = list(dict.fromkeys(Path(os.path.expanduser(run)) for run in options.runs))
        for folder in folders:
            if folder.is_file():
                raise UserError(f"{folder}: is a file; name the folder of the run")
            if not folder.is_dir():
                near = similar_folder(folder)
                raise UserError(f"{folder}: there is no such folder" + (f"; did you mean {near}?" if near else ""))
        output = options.output or (folders[0] if len(folders) == 1 else Path()) / "report.html"
        if output.is_dir() or not output.absolute().parent.is_dir():
            raise UserError(f"--output {output}: must be a file in a folder that exists")

        from torchtitan_style.report.page import page
        from torchtitan_style.report.run import Run

        text = page([Run(folder, name) for folder, name in zip(folders, _names(folders), strict=True)])
        write_text(output, text, called=str(output))
        print(f"the report is {output}")


def _names(folders: list[Path]) -> list[str]:
    """The last parts of the paths, as many as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return ["/".join(part) for part in parts]
