"""``chat``: talk to a model.

python -m torchtitan_style chat --checkpoint Qwen/Qwen3-0.6B
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
from collections.abc import Generator, Iterator
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.program import environment_number
from torchtitan_style.common.reporting import reported_errors
from torchtitan_style.launch.preflight import check_torch
from torchtitan_style.models.spec import describe_size

from .cli import Arguments
from .screen import Screen
from .text_options import TEXT_OPTIONS, add_text_options, check_text_options, compile_steps, load, sampling_of

if TYPE_CHECKING:
    from torchtitan_style.inference.conversation import Conversation

USAGE = f"""\
usage: python -m torchtitan_style chat --checkpoint DIR [...]

Talk to a model: with its chat template if it has one, else it goes on from the text so far.

  --checkpoint DIR         a run (its newest verified checkpoint), one checkpoint, or a model folder
  --thinking, --no-thinking   whether the model thinks first, where its template has that (Qwen3)
  --system TEXT            the first message of the conversation
  --plain                  without the chat template
  --max-new-tokens N       of an answer; 1024 if left out
{TEXT_OPTIONS}
"""

HELP = """\
/reset        start another conversation
/save FILE    write this one to a new file: messages if it ends with .json, else text
/help         this
/exit         leave, as does Ctrl-D
A line that ends with \\ goes on in the next one; so does all that is between two lines of \"\"\".
A line that begins with // is a message that begins with /.
Ctrl-C stops an answer, or drops what you are writing."""


def main(arguments: list[str]) -> None:
    with reported_errors():
        options = _parse(arguments)
        check_torch()
        model = load(options)

        from torchtitan_style.data.chat.template import ChatTemplate
        from torchtitan_style.inference.conversation import Conversation

        template = None if options.plain else ChatTemplate.find(model.assets)
        mode = "--no-thinking" if options.thinking is False else "--thinking"
        for given, name in ((options.thinking is not None, mode), (options.system, "--system")):
            if given and template is None:
                raise UserError(f"{name}: does not apply without a chat template, and {model.assets} has none in use")
        if options.thinking is not None and template is not None and not template.thinks:
            raise UserError(f"{mode}: the model's chat template has no thinking mode")
        conversation = Conversation(model, template=template, thinking=options.thinking, system=options.system)
        sampling = model.settings(**sampling_of(options))
        compile_steps(model, 1)
        screen = Screen()
        kind = "its chat template" if template else "no chat template: it goes on from the text so far"
        screen.say(f"{options.checkpoint}, {describe_size(model.config)}, {kind}. /help for help.")
        ctrl_c, mistakes = _CtrlC(), list[UserError]()
        for turn, text in enumerate(_inputs(ctrl_c)):
            slash = text.startswith("/") and "\n" not in text
            with _said(mistakes, screen):
                if slash and not text.startswith("//"):
                    if _command(text, conversation, screen):
                        break
                    continue
                answer = conversation.ask(
                    text[1:] if slash else text,
                    sampling=sampling,
                    max_new_tokens=options.max_new_tokens,
                    seed=options.seed + turn,
                )
                _show(answer, screen, ctrl_c)
                note = {
                    "length": f"stopped after {options.max_new_tokens:,} tokens (--max-new-tokens); ",
                    "positions": "no position left; /reset; ",
                    None: "stopped; ",
                }
                screen.say(note.get(conversation.finish, "") + str(conversation.speed))
        if mistakes and not sys.stdin.isatty():
            sys.exit(2)  # a script has no other way to know


def _parse(arguments: list[str]) -> argparse.Namespace:
    if environment_number("WORLD_SIZE", 1) > 1:
        raise UserError("chat runs in one process; generate splits a model over several")
    parser = Arguments(USAGE)
    parser.add_argument("--thinking", action=argparse.BooleanOptionalAction)
    parser.add_argument("--system")
    parser.add_argument("--plain", action="store_true")
    add_text_options(parser, max_new_tokens=1024)
    options = parser.parse(arguments)
    check_text_options(options)
    return options


class _CtrlC:
    """What Ctrl-C does: it drops what is being written or stops an answer, and at no moment ends the program."""

    def __init__(self) -> None:
        self.pressed = False
        """Since the last prompt."""
        self.raises = False

    def __call__(self, _number: int, _frame: FrameType | None) -> None:
        self.pressed = True
        if self.raises:
            self.raises = False  # once: what cleans up is not interrupted
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def at_prompt(self) -> Iterator[None]:
        """Ctrl-C raises KeyboardInterrupt in here, and calls this object from then on.

        Python has set no handler if SIGINT was ignored at its start: it is for what a shell script starts in the
        background, and for all that is started from there, as by a terminal multiplexer or a suite of tests.
        """
        self.pressed = False
        # A function of C's: at a second Ctrl-C ``input`` calls it with an exception set, which Python code cannot bear.
        signal.signal(signal.SIGINT, signal.default_int_handler)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, self)


# What the user writes


def _inputs(ctrl_c: _CtrlC) -> Iterator[str]:
    """What is written, message by message, until the input ends. From a pipe each line is a message."""
    interactive = sys.stdin.isatty()
    if reconfigure := getattr(sys.stdin, "reconfigure", None):
        reconfigure(errors="surrogateescape")  # what is not UTF-8 is refused as a message
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # arrow keys, and earlier lines
    while True:
        try:
            with ctrl_c.at_prompt() if interactive else contextlib.nullcontext():
                text = _message("> " if interactive else "", ". " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            if not interactive:
                raise
            print("\n(/exit or Ctrl-D to leave)")
            continue
        if text.strip():
            yield text


def _message(prompt: str, more: str) -> str:
    line, lines = input(prompt), []
    with contextlib.suppress(EOFError):  # which ends a message too
        if line.strip() == '"""':
            while (line := input(more)).strip() != '"""':
                lines.append(line)
        else:
            lines.append(line)
            while lines[-1].endswith("\\"):
                lines[-1] = lines[-1][:-1]
                lines.append(input(more))
    return "\n".join(lines)


def _command(text: str, conversation: Conversation, screen: Screen) -> bool:
    """Do what /… says; whether to leave. Raises UserError for what there is not."""
    name, _, argument = text.strip().partition(" ")
    if name == "/exit":
        return True
    if name == "/help":
        screen.say(HELP)
    elif name == "/reset":
        conversation.reset()
        screen.say("a new conversation")
    elif name == "/save" and not conversation.messages:
        raise UserError("/save: nothing has been said yet")
    elif name == "/save":
        _save(conversation.messages, conversation.transcript(), argument.strip())
        screen.say(f"saved to {argument.strip()}")
    else:
        raise UserError(f"there is no {name}; /help lists what there is")
    return False


def _save(messages: list[dict[str, str]], transcript: str, name: str) -> None:
    if not name:
        raise UserError("/save: needs a file, as in /save talk.txt")
    text = json.dumps(messages, indent=2, ensure_ascii=False) + "\n" if name.endswith(".json") else transcript
    try:
        with Path(name).expanduser().open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UserError(f"/save: {name} is there already") from None
    except (OSError, RuntimeError, ValueError) as error:
        raise UserError(f"/save {name}: {getattr(error, 'strerror', None) or error}") from None


# What is shown


@contextlib.contextmanager
def _said(mistakes: list[UserError], screen: Screen) -> Iterator[None]:
    """A mistake is said, and the conversation goes on."""
    try:
        yield
    except UserError as error:
        screen.say(f"error: {error}", style="red")
        mistakes.append(error)


def _show(answer: Generator[tuple[str, bool], None, None], screen: Screen, ctrl_c: _CtrlC) -> None:
    """Show an answer as it comes, thoughts dim. Ctrl-C stops it."""
    try:
        ctrl_c.raises = True
        for text, thought in answer:
            screen.write(text, "dim italic" if thought else "")
            if ctrl_c.pressed:  # just before, or where an exception got lost
                break
    except KeyboardInterrupt:
        pass
    finally:
        ctrl_c.raises = False
        answer.close()
        screen.write("\n")
