"""What a run prints: a header, a line now and then, a progress bar on a terminal."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from datetime import timedelta
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from torchtitan_style.common.terminal import without_control

__all__ = ["Display"]


class Display:
    """Prints on the main rank and nothing on the others."""

    def __init__(self, *, is_main: bool) -> None:
        self._console = Console(quiet=not is_main, highlight=False, soft_wrap=True)
        self._progress: Progress | None = None

    def say(self, text: str, *, style: str = "") -> None:
        """A line of text, as it is."""
        with _forgiving():
            self._console.print(Text(text, style=style))

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}", style="yellow")

    def start(self, step: int, steps: int) -> None:
        """Show how far the run is, on a terminal."""
        if self._console.is_terminal and not self._console.quiet:
            wide = self._console.width >= 80
            self._progress = Progress(
                *([TextColumn("training")] if wide else []),
                *([BarColumn()] if self._console.width >= 60 else []),
                MofNCompleteColumn(),
                *([TimeElapsedColumn()] if wide else []),
                TextColumn("{task.fields[loss]}"),
                TextColumn("{task.fields[left]}"),
                console=self._console,
                transient=True,
            )
            self._progress.add_task("", total=steps, completed=step, loss="", left="")
            self._progress.start()

    def advance(self, step: int) -> None:
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], completed=step)

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Meanwhile, the bar says what the run does between two steps, in the place of the time left."""
        if self._progress is None:
            yield
            return
        [task] = self._progress.tasks
        left = task.fields["left"]
        self._progress.update(task.id, left=what)
        yield
        self._progress.update(task.id, left=left)

    def stop(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None

    def step(self, record: dict[str, Any], *, steps: int, seconds_left: float | None) -> None:
        """The line of a training step, from its record in metrics.jsonl. seconds_left: None if it is not known yet."""
        left = "" if seconds_left is None else f"{timedelta(seconds=round(seconds_left))} left"
        loss = f"loss {record['loss']:.4f}"
        if self._progress is not None:
            self._progress.update(self._progress.task_ids[0], loss=loss, left=left)
        fields = {
            "step": f"step {record['step']:>{len(str(steps))}}/{steps}",
            "loss": f"loss {record['loss']:7.4f}",
            "grad_norm": f"grad norm {record['grad_norm']:6.3f}",
            "lr": f"lr {record.get('lr_muon', record['lr']):.2e}",  # optimizer.lr is that of the matrices
            "tokens": f"{record['tokens_per_second']:>9,.0f} tokens/s",
            "mfu": "" if record["mfu"] is None else f"MFU {record['mfu']:5.1%}",
            "memory": f"{record['peak_memory_gib']:.2f} GiB",
            "left": left,
        }
        self.say(*self._fitting([fields], less=("memory", "lr", "mfu", "grad_norm", "tokens", "left"), between="  "))

    def _fitting(self, rows: list[dict[str, str]], *, less: Sequence[str], between: str) -> list[str]:
        """Each of ``rows`` as a line. A terminal that is too narrow for one of them goes without some of the fields
        ``less``, the first one first: metrics.jsonl has all."""
        for left_out in range(len(less) + 1):
            kept = [[text for name, text in row.items() if text and name not in less[:left_out]] for row in rows]
            lines = [between.join(texts) for texts in kept]
            if not self._console.is_terminal or max(map(cell_len, lines)) <= self._console.width:
                break
        return lines

    def validation(self, step: int, figures: dict[str, float], *, best: str = "") -> None:
        """The figures by their names in metrics.jsonl, a line for the corpus and one for each further set. best: which
        loss is the lowest so far, if that decides the best checkpoint."""
        names = [key.removeprefix("val_loss") for key in figures if key.partition("/")[0] == "val_loss"]
        alone = names == [""]
        if not alone:
            self.say(f"validation at step {step}", style="bold")
        width = 0 if alone else max(6, *(len(name) - 1 for name in names))
        perplexities = {name: f"{figures[f'val_perplexity{name}']:,.2f}" for name in names}
        longest = max(map(len, perplexities.values()), default=0)
        rows = []
        for name in names:
            bits = figures.get(f"val_bits_per_byte{name}")
            accuracy = f"{figures[f'val_accuracy{name}']:.1%}"
            begin = f"validation at step {step}: " if alone else f"  {name[1:] or 'corpus':<{width}}  "
            rows.append(
                {
                    "loss": f"{begin}loss {figures[f'val_loss{name}']:.4f}",
                    "perplexity": f", perplexity {perplexities[name]:>{longest}}",
                    "accuracy": f", accuracy {accuracy if alone else f'{accuracy:>5}'}",
                    "bits": "" if bits is None else f", {bits:.4f} bits/byte",
                    "note": " (best so far)" if f"val_loss{name}" == best else "",
                }
            )
        for line in self._fitting(rows, less=("accuracy", "perplexity", "bits"), between=""):
            self.say(line, style="bold")

    def sample(self, prompt: str, continuation: str) -> None:
        """Generated text, the prompt set apart."""
        console = self._console
        if console.is_terminal:
            prompt, continuation = without_control(prompt), without_control(continuation)
        text = Text(prompt, style="bold") + Text(continuation, style="cyan")
        # On a terminal, the parts of a long line are indented, too.
        lines = text.wrap(console, max(console.width - 4, 1)) if console.is_terminal else text.split("\n")
        with _forgiving():
            for line in lines:
                console.print(Text("    ") + line)


@contextlib.contextmanager
def _forgiving() -> Iterator[None]:
    """Lines may go to a file on a disk that is full, or to nobody any more; that must not end the run."""
    with contextlib.suppress(OSError):
        yield
