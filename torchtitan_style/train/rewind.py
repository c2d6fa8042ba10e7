"""Going back to the newest checkpoint after a loss spike, and on from there with later data.

(PaLM, Chowdhery et al. 2022, section 5.1.) ``policy.py`` decides when.
"""

from __future__ import annotations

from torchtitan_style.distributed.world import on_main

from .policy import StepPolicy
from .resume import Resume
from .state import TrainState


def rewind(state: TrainState, policy: StepPolicy, resume: Resume) -> bool:
    """Set ``state`` and the parts that ``resume`` knows back to the newest checkpoint. Called by all ranks.

    The data continues after the present step. Checkpoints of later steps are renamed. Returns False if there is no
    checkpoint. Raises RunError if the policy says that it is enough.
    """
    checkpointer, warn = resume.checkpointer, resume.display.warn
    resume.observer.before_rewind(state.step)
    checkpointer.finish()
    found = checkpointer.find(-1)
    if found is None:
        policy.cannot_rewind()
        return False
    policy.rewind()
    warn(f"rewinding to step {found}; the data continues after step {state.step}")
    saved, saved_identity = resume.read(found)
    state.rewind_to(saved)
    resume.restore(found, state, saved_identity)
    checkpointer.saved_step = None  # the position in the data is ahead of that checkpoint
    on_main(lambda: checkpointer.folder.set_aside_after(found, warn))
    return True
