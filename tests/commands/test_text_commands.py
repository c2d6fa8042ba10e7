"""``generate`` and ``chat`` as a person runs them: real processes, pipes and a pseudo-terminal."""

from __future__ import annotations

import contextlib
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_hf import hf_model, write_tokenizer

from tests.conftest import ENVIRONMENT, Python
from torchtitan_style import load_model
from torchtitan_style.__main__ import main
from torchtitan_style.commands.chat import _CtrlC, _show
from torchtitan_style.commands.screen import Screen

PROMPTS = ["def loss(x)", "naïve 学习"]
GREEDY = ["--temperature", "0", "--max-new-tokens", "16", "--dtype", "float32"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    hf_model(max_position_embeddings=4096).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[str]:
    return load_model(folder, dtype=torch.float32).generate(PROMPTS, temperature=0.0, max_new_tokens=16)


@pytest.fixture(scope="module")
def command(python: Python) -> Python:
    """Run ``python -m torchtitan_style``, or ranks of it: command("generate", …)."""

    def run(*arguments: object, input: str = "", ranks: int = 0, status: int = 0) -> subprocess.CompletedProcess[str]:
        line = ["-m", "torchtitan_style", *map(str, arguments)]
        if ranks:
            line = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *line]
        done = python(*line, input=input, timeout=200)
        assert done.returncode == status, done.stderr[-2000:]
        return done

    return run


def mistake(*arguments: object, capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command says before it exits with status 2."""
    with pytest.raises(SystemExit) as exit:
        main(list(map(str, arguments)))
    assert exit.value.code == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.startswith("error: ")
    assert printed.err.count("\n") == 1
    return printed.err


# generate


def test_one_prompt_is_text_and_nothing_else(command: Python, folder: Path, expected: list[str]) -> None:
    done = command("generate", "--checkpoint", folder, "--prompt", PROMPTS[0], "--seed", 5, *GREEDY)
    assert done.stdout == f"{PROMPTS[0]}{expected[0]}\n"
    assert re.fullmatch(
        r"prefill [\d,]+ tokens at [\d,]+ tokens/s; decode 15 tokens at [\d,.]+ tokens/s; seed 5\n", done.stderr
    )


def test_standard_input_is_one_prompt(command: Python, folder: Path, expected: list[str]) -> None:
    done = command("generate", "--checkpoint", folder, *GREEDY, input=PROMPTS[1] + "\n")
    assert done.stdout == f"{PROMPTS[1]}{expected[1]}\n"


def test_json_has_a_line_for_each_sample_of_each_prompt(
    command: Python, folder: Path, expected: list[str], tmp_path: Path
) -> None:
    file = tmp_path / "prompts.txt"
    file.write_text("\n".join([PROMPTS[0], "", *PROMPTS[1:], PROMPTS[0]]), encoding="utf-8")
    done = command(
        "generate", "--checkpoint", folder, "--prompts-file", file, "--json", "--seed", 7, "--num-samples", 2,
        "--batch-size", 2, *GREEDY,
    )  # fmt: skip
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert [(line["prompt"], line["sample"]) for line in lines] == [
        (prompt, sample) for prompt in (*PROMPTS, PROMPTS[0]) for sample in (0, 1)
    ]
    assert [line["text"] for line in lines[::2]] == [*expected, expected[0]]
    assert {line["seed"] for line in lines} == {7}
    for line in lines:
        assert line.keys() == {
            "prompt", "text", "sample", "seed", "prompt_tokens", "new_tokens", "finish",
            "prefill_tokens_per_second", "decode_tokens_per_second",
        }  # fmt: skip
        assert line["finish"] in ("stop", "length")
        assert 1 <= line["new_tokens"] <= 16


def test_only_a_line_break_parts_prompts(command: Python, folder: Path, tmp_path: Path) -> None:
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\r\ntwo\x0c\u2028three\n".encode())
    done = command("generate", "--checkpoint", folder, "--prompts-file", file, "--json", *GREEDY)
    lines = done.stdout.strip().split("\n")
    assert [json.loads(line)["prompt"] for line in lines] == ["one", "two\x0c\u2028three"]


def test_without_standard_output_nothing_is_said(folder: Path) -> None:
    line = f"exec {sys.executable} -m torchtitan_style generate --checkpoint {folder} --prompt x --max-new-tokens 2"
    done = subprocess.run(["sh", "-c", f"{line} >&- <&-"], env=ENVIRONMENT, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr


def test_several_prompts_are_shown_one_after_the_other(command: Python, folder: Path, expected: list[str]) -> None:
    named = [argument for prompt in PROMPTS for argument in ("--prompt", prompt)]
    done = command("generate", "--checkpoint", folder, *named, *GREEDY)
    assert done.stdout == (f"--- 1 of 2 ---\n{PROMPTS[0]}{expected[0]}\n--- 2 of 2 ---\n{PROMPTS[1]}{expected[1]}\n")


def test_two_ranks_write_what_one_process_writes(command: Python, folder: Path, expected: list[str]) -> None:
    named = [argument for prompt in PROMPTS for argument in ("--prompt", prompt)]
    done = command("generate", "--checkpoint", folder, *named, "--json", *GREEDY, ranks=2)
    assert [json.loads(line)["text"] for line in done.stdout.splitlines()] == expected


def test_ranks_that_cannot_share_the_heads_say_so_once(command: Python, folder: Path) -> None:
    done = command("generate", "--checkpoint", folder, "--prompt", "x", ranks=3, status=1)
    assert done.stderr.count("error: ") == 1
    assert "3 ranks cannot share the model's num_key_value_heads of 4 evenly" in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", ""], "--prompt: is empty"),
        (["--prompt", "x", "--temperature", "-1"], "--temperature: must be a number of at least 0"),
        (["--prompt", "x", "--temperature", "warm"], "--temperature: invalid float value: 'warm'"),
        (["--prompt", "x", "--top-p", "0"], "--top-p: must be above 0"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens: must be at least 1"),
        (["--prompt", "x", "--num-samples", "0"], "--num-samples: must be at least 1"),
        (["--prompt", "x", "--stop", ""], "--stop: is empty"),
        (["--prompt", "x", "--prompts-file", "y"], "give one of them"),
        (["--prompts-file", "/nowhere/prompts.txt"], "--prompts-file /nowhere/prompts.txt: cannot be read"),
        (["--prompt", "x", "--tempratur", "1"], "did you mean --temperature?"),
        (["--prompt", "--x"], "there is no option --x; if it is the value of --prompt, write --prompt=--x"),
        (["--prompt", "def " * 2500], "the prompt has 5,000 tokens, but the model has only 4,096 positions"),
        (["--prompt", "x", "--device", "gpu"], 'there is no device "gpu"'),
        (["--prompt", "a\udcff"], "text is not UTF-8, at character 2"),
        (["--prompt", "x", "--stop", "\udcff"], "--stop: text is not UTF-8"),
        (["--prompt", "x", "--num-samples", "100000000"], "100,000,000 texts at once need"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_mistakes_are_one_message(folder: Path, arguments: list[str], message: str, capsys: Any) -> None:
    assert message in mistake("generate", "--checkpoint", folder, *arguments, capsys=capsys)


def test_a_model_that_is_split_is_not_compiled(folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("torchtitan_style.commands.generate.ending_at_once", contextlib.nullcontext)
    found = mistake("generate", "--checkpoint", folder, "--prompt", "x", "--compile", capsys=capsys)
    assert "--compile: does not apply to a model that is split over processes" in found


def test_an_unknown_checkpoint_is_one_message(folder: Path, capsys: Any) -> None:
    found = mistake("generate", "--checkpoint", f"{folder.parent}/modle", "--prompt", "x", capsys=capsys)
    assert f"did you mean {folder}?" in found


def test_a_mistake_is_found_before_torch_is_imported() -> None:
    code = (
        "import sys\nfrom torchtitan_style.__main__ import main\n"
        "try: main(['generate', '--checkpoint', '.', '--prompt', 'x', '--top-p', '7'])\n"
        "except SystemExit as e: print(e.code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"


# chat


class Terminal:
    """A program in a pseudo-terminal."""

    def __init__(self, *arguments: object) -> None:
        self.pid, self.master = pty.fork()
        if self.pid == 0:
            signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a script leaves it to what it starts in the background
            os.execve(
                sys.executable, [sys.executable, "-m", "torchtitan_style", *map(str, arguments)],
                ENVIRONMENT | {"TERM": "xterm-256color", "COLUMNS": "200"},
            )  # fmt: skip
        self.output = ""

    def wait_for(self, text: str, *, timeout: float = 60) -> str:
        """What is printed up to ``text`` and not yet returned, without colours."""
        end = time.monotonic() + timeout
        while text not in self.output:
            ready, _, _ = select.select([self.master], [], [], max(0, end - time.monotonic()))
            assert ready, f"{text!r} did not come: {self.output!r}"
            try:
                data = os.read(self.master, 4096)
            except OSError:
                data = b""
            assert data, f"it ended before {text!r}: {self.output!r}"
            self.output += re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", data.decode(errors="replace")).replace("\r", "")
        before, _, self.output = self.output.partition(text)
        return before

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def status(self) -> int:
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


@pytest.fixture
def terminal(folder: Path) -> Iterator[Any]:
    started = []

    def start(*arguments: object) -> Terminal:
        started.append(Terminal("chat", "--checkpoint", folder, "--dtype", "float32", *arguments))
        return started[-1]

    yield start
    for program in started:
        os.close(program.master)
        try:
            os.kill(program.pid, signal.SIGKILL)
            os.waitpid(program.pid, 0)
        except OSError:
            pass  # it has ended


def test_a_chat_in_a_terminal(terminal: Any, tmp_path: Path) -> None:
    chat = terminal("--temperature", 0, "--max-new-tokens", 8)
    assert "its chat template. /help for help." in chat.wait_for("> ")
    chat.type("def loss\n")
    chat.wait_for("tokens/s")
    chat.wait_for("> ")
    chat.type('"""\nthe gradient\nof naïve\n"""\n')  # several lines
    chat.wait_for("tokens/s")
    chat.wait_for("> ")
    chat.type(f"/save {tmp_path}/talk.json\n")
    chat.wait_for("saved to")
    messages = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert [m["role"] for m in messages] == ["user", "assistant"] * 2
    assert messages[0]["content"] == "def loss"
    assert messages[2]["content"] == "the gradient\nof naïve"
    chat.type("/reset\n")
    chat.wait_for("a new conversation")
    chat.type("def loss\n")  # the same question, as the first one
    chat.wait_for("tokens/s")
    chat.wait_for("> ")
    chat.type(f"/save {tmp_path}/again.json\n")
    chat.wait_for("saved to")
    assert json.loads((tmp_path / "again.json").read_text(encoding="utf-8")) == messages[:2]
    chat.type(f"/save {tmp_path}/again.json\n")
    chat.wait_for("is there already")
    chat.type("/nothing\n")
    chat.wait_for("there is no /nothing")
    chat.type("/help\n")
    chat.wait_for("/reset        start another conversation")
    chat.type("/exit\n")
    assert chat.status() == 0


def test_ctrl_c_stops_the_answer_and_not_the_program(terminal: Any) -> None:
    chat = terminal("--temperature", 0, "--max-new-tokens", 4000, "--plain")
    chat.wait_for("> ")
    chat.type("def\n")  # the model has no end to what it says to this
    chat.wait_for("def\n")
    time.sleep(0.3)
    chat.type("\x03")
    chat.wait_for("stopped; prefill", timeout=10)
    chat.wait_for("> ")
    chat.type("half a question")
    chat.wait_for("half a question")
    time.sleep(0.3)  # readline misses a signal in the moment between two keys
    chat.type("\x03")  # at the prompt it drops what was written
    chat.wait_for("/exit or Ctrl-D to leave")
    chat.wait_for("> ")
    chat.type("\x04")
    assert chat.status() == 0


def test_a_ctrl_c_is_heard_where_its_exception_is_lost_and_the_next_ends_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def answer() -> Generator[tuple[str, bool], None, None]:
        try:
            yield "one", False
            with contextlib.suppress(KeyboardInterrupt):  # as C++ does where it calls Python
                signal.raise_signal(signal.SIGINT)
            yield "two", False
            yield "three", False
        finally:
            signal.raise_signal(signal.SIGINT)

    said: list[str] = []
    monkeypatch.setattr(Screen, "write", lambda _, text, _style="": said.append(text))
    ctrl_c = _CtrlC()
    before = signal.signal(signal.SIGINT, ctrl_c)
    try:
        _show(answer(), Screen(), ctrl_c)
    finally:
        signal.signal(signal.SIGINT, before)
    assert said == ["one", "two", "\n"]


def test_what_a_model_writes_does_not_steer_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    text = "a\x1b[31mb\r\x07c\x9b\n\td"
    Screen().write(text)
    assert capsys.readouterr().out == text  # in a pipe it is left as it is
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FORCE_COLOR", "1")
        Screen().write(text)
    assert capsys.readouterr().out == "a\ufffd[31mb\ufffd\ufffdc\ufffd\n        d"


def test_a_chat_through_a_pipe(command: Python, folder: Path) -> None:
    model = load_model(folder, dtype=torch.float32)
    first = model.generate("def", temperature=0.0, max_new_tokens=16)
    second = model.generate("def" + first + "it", temperature=0.0, max_new_tokens=16)
    done = command("chat", "--checkpoint", folder, "--plain", *GREEDY, input="def\nit")
    assert done.stdout == f"{first}\n{second}\n"
    assert done.stderr.count("tokens/s") == 4


def test_what_begins_with_a_slash_can_be_said_too(command: Python, folder: Path, tmp_path: Path) -> None:
    lines = f'//etc\n"""\n/* two\nlines */\n"""\n/save {tmp_path}/talk.json\n'
    command("chat", "--checkpoint", folder, "--plain", *GREEDY, input=lines)
    said = json.loads((tmp_path / "talk.json").read_text(encoding="utf-8"))
    assert [m["content"] for m in said if m["role"] == "user"] == ["/etc", "/* two\nlines */"]


@pytest.mark.parametrize("unfinished", ['"""\ndef', "def\\\n"], ids=["block", "line that goes on"])
def test_the_end_of_the_input_ends_a_message(command: Python, folder: Path, unfinished: str) -> None:
    done = command("chat", "--checkpoint", folder, "--plain", *GREEDY, input=unfinished)
    assert done.stdout.strip()
    assert "tokens/s" in done.stderr


def test_what_is_not_utf8_is_refused_and_the_chat_goes_on(folder: Path) -> None:
    line = [sys.executable, "-m", "torchtitan_style", "chat", "--checkpoint", str(folder), "--plain", *GREEDY]
    environment = ENVIRONMENT | {"PYTHONIOENCODING": "ascii:strict"}
    done = subprocess.run(
        list(map(str, line)), input=b"\xff\xfe\ndef\n", env=environment, capture_output=True, timeout=200, check=False
    )
    assert done.returncode == 2, done.stderr.decode()
    assert b"Traceback" not in done.stderr
    assert done.stderr.count(b"tokens/s") == 2  # prefill and decode of the second


def test_a_conversation_beyond_the_models_positions_is_said(command: Python, tmp_path: Path) -> None:
    hf_model(max_position_embeddings=32).save_pretrained(tmp_path)
    write_tokenizer(tmp_path)
    lines = "def\n" + "it is a long question " * 20 + "\n/reset\nit\n"
    done = command("chat", "--checkpoint", tmp_path, "--plain", *GREEDY, input=lines, status=2)
    assert "error: the conversation has " in done.stderr
    assert "the model has only 32 positions; /save FILE saves it, /reset starts a new one" in done.stderr
    assert done.stderr.count("tokens/s") == 4  # the turn before and the one after


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--thinking"], "--thinking: the model's chat template has no thinking mode"),
        (["--plain", "--no-thinking"], "--no-thinking: does not apply without a chat template"),
        (["--plain", "--system", "x"], "--system: does not apply without a chat template"),
        (["--min-p", "7"], "--min-p: must be from 0"),
    ],
)
def test_mistakes_of_a_chat(folder: Path, arguments: list[str], message: str, capsys: Any) -> None:
    assert message in mistake("chat", "--checkpoint", folder, *arguments, capsys=capsys)
