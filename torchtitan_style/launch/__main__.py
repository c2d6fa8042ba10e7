"""``python -m torchtitan_style.launch``: what ``run_train.sh`` runs once it has set itself up."""

import sys

from torchtitan_style.common.program import begin_run, delivering_output

if __name__ == "__main__":
    begin_run(sys.argv[1:])  # first of all: the imports below take half a second

    from .launcher import main

    with delivering_output():
        main(sys.argv[1:])
