"""``python -m torchtitan_style.launch``: what ``run_train.sh`` runs once it has set itself up."""

import sys

from torchtitan_style.common.program import begin_run, delivering_output, start_over_with
from torchtitan_style.cpu.memory import TUNABLES

if __name__ == "__main__":
    start_over_with(*TUNABLES)
    begin_run(sys.argv[1:])  # first of all: the imports below take half a second

    from .launcher import main

    with delivering_output():
        main(sys.argv[1:])
