"""Fine-tuning on conversations as whole processes: the walk-through of docs/finetuning.md, and rows shown."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.data.conversations import assistant, user

DOCS = Path(__file__).parents[1] / "docs/finetuning.md"
Run = Callable[..., subprocess.CompletedProcess[str]]


def made_up(folder: Path) -> Path:
    """The corpus of the documentation."""
    code = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)[0]
    path = folder / "conversations.jsonl"
    exec(code.replace('"conversations.jsonl"', repr(str(path))), {})
    return path


def succeed(process: subprocess.CompletedProcess[str]) -> str:
    assert process.returncode == 0, process.stdout[-3000:] + process.stderr[-3000:]
    return process.stdout


@pytest.mark.nightly
def test_a_model_that_learns_from_conversations_answers_in_kind(launch: Run, python: Run, tmp_path: Path) -> None:
    made_up(tmp_path)
    run = tmp_path / "outputs/qwen3_small_chat"
    arguments = ["--config", "qwen3_small_chat", "--data.paths", "conversations.jsonl"]
    output = succeed(launch(*arguments, cwd=tmp_path))
    assert re.search(
        r"2,000 conversations, \d,\d{3} turns of the assistant, .* tokens, \d\d\.\d% of them trained", output
    )
    questions = {
        "What is three plus four?": "three plus four is seven.",
        "How much is nine and nine?": "nine plus nine is eighteen.",
        "zero plus five?": "zero plus five is five.",
        "Add two and six.": "two plus six is eight.",
    }
    chat = ["-m", "torchtitan_style", "chat", "--checkpoint", run, "--temperature", "0"]
    answers = [succeed(python(*chat, input=question + "\n")).strip() for question in questions]
    right = sum(answer == wanted for answer, wanted in zip(answers, questions.values(), strict=True))
    assert right >= 3, answers
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [record["val_loss"] for record in records if "val_loss" in record][-1] < 0.1


def test_a_few_steps_of_a_run_and_a_resume_on_two_ranks(launch: Run, tmp_path: Path) -> None:
    made_up(tmp_path)
    arguments = ["--config", "qwen3_small_chat", "--data.paths", "conversations.jsonl", "--model.flavor", "debug"]
    arguments += ["--training.steps", "4", "--lr_scheduler.total_steps", "4", "--lr_scheduler.warmup_steps", "1"]
    arguments += ["--checkpoint.interval", "2", "--validation.steps", "1", "--generation.max_new_tokens", "2"]
    arguments += ["--training.mixed_precision_param", "float32", "--data.prepared_folder", "prepared"]

    def losses(run: str) -> dict[int, tuple[str, float]]:
        lines = (tmp_path / run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        return {each["step"]: (each["batch_hash"], each["loss"]) for each in records if "loss" in each}

    whole = ["--job.dump_folder", "whole"]
    output = succeed(launch(*arguments, *whole, cwd=tmp_path))
    assert "of them trained on" in output
    parts = ["--job.dump_folder", "parts"]
    succeed(launch(*arguments, *parts, "--training.steps", "2", cwd=tmp_path, nproc=2))
    succeed(launch(*arguments, *parts, "--data.num_workers", "1", cwd=tmp_path))
    found, expected = losses("parts"), losses("whole")
    assert {step: hash for step, (hash, _) in found.items()} == {step: hash for step, (hash, _) in expected.items()}
    assert [loss for _, loss in found.values()] == pytest.approx([loss for _, loss in expected.values()], rel=1e-5)


def test_rows_are_shown_as_text_and_as_json(python: Run, tmp_path: Path) -> None:
    talks = [[user("2+2?"), assistant("4"), user("sure?"), assistant("yes")], [user("a\nb"), assistant("c\nd")]]
    lines = [json.dumps({"messages": talk}) + "\n" for talk in talks for _ in range(20)]
    (tmp_path / "talks.jsonl").write_text("".join(lines), encoding="utf-8")
    command = ["-m", "torchtitan_style", "prepare", "--config", "qwen3_small_chat", "--data.paths", "talks.jsonl"]
    shown = succeed(python(*command, "--show", 2, cwd=tmp_path))
    assert "conversations, " in shown
    assert "<|im_start|>assistant⏎\nyes<|im_end|>⏎\n~~~~~~~~~~~~~~\n" in shown
    assert "<|im_start|>user⏎\na⏎\nb<|im_end|>⏎\n<|im_start|>assistant⏎\nc⏎\n~~\nd<|im_end|>⏎\n~~~~~~~~~~~~\n" in shown
    assert re.search(r"── padding: positions \d+ … 127", shown)
    printed = python(*command, "--show", 2, "--json", cwd=tmp_path)
    rows = [json.loads(line) for line in succeed(printed).splitlines()]
    assert len(rows) == 2
    assert all(set(row) == {"ids", "labels", "documents"} for row in rows)
    assert {len(row[key]) for row in rows for key in row} == {128}
    for arguments in (["--json"], ["--show", "0"]):
        refused = python(*command, *arguments, cwd=tmp_path)
        assert refused.returncode == 2
        assert refused.stderr.count("\n") == 1
