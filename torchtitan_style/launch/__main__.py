"""``python -m torchtitan_style.launch``: what ``run_train.sh`` runs once it has set itself up."""

import sys

from .launcher import main

if __name__ == "__main__":
    main(sys.argv[1:])
