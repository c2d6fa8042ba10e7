"""``eval --format chat`` against a straightforward computation: what Transformers' ``apply_chat_template`` makes of
each turn and of the messages before it, and its model's softmax for one token at a time."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from tiny_hf import hf_model, write_tokenizer

from tests.data.conversations import SYSTEM, assistant, user
from torchtitan_style.__main__ import main

TALKS = [
    [user("Hi"), assistant("Hello there!")],
    [SYSTEM, user("1+1?"), assistant("2"), user("学习 naïve 🙂"), assistant("γειά 👩\u200d💻 ok"), user("and more?")],
    [user("the weight " * 20), assistant("the gradient of the token " * 12), user("x" * 60), assistant("def loss(x)")],
]
# It renders the thoughts of the last message only, as Qwen3's does.
THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.reasoning_content and loop.last %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    hf_model().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same conversations in files of two kinds and forms."""
    corpus = tmp_path_factory.mktemp("corpus")
    write(corpus / "talks.jsonl", TALKS)
    forms = [[{"from": message["role"], "value": message["content"]} for message in talk] for talk in TALKS]
    pq.write_table(pa.table({"talk": forms}), corpus / "talks.parquet")
    return corpus


def write(path: Path, talks: list[list[dict[str, Any]]]) -> Path:
    path.write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks), encoding="utf-8")
    return path


@torch.no_grad()
def reference(
    folder: Path, talks: list[list[dict[str, Any]]], *, seq_len: int = 512, stride: int = 512, train_on: str
) -> list[dict[str, Any]]:
    """The figures of each conversation. Each token alone, its context cut as the windows are."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)

    def ids(messages: list[dict[str, Any]], prompt: bool = False) -> list[int]:
        found: list[int] = tokenizer.apply_chat_template(messages, add_generation_prompt=prompt, return_dict=False)
        return found

    found = []
    for talk in talks:
        turns = [at for at, message in enumerate(talk) if message["role"] == "assistant"]
        scored = [(ids(talk[: at + 1]), len(ids(talk[:at], prompt=True))) for at in turns]
        scored = {"assistant": scored, "last": scored[-1:], "all": [(ids(talk), 1)]}[train_on]
        losses, right = [], 0
        for sequence, begin in scored:
            for at in range(begin, len(sequence)):
                window = 0 if at <= seq_len else -(-(at - seq_len) // stride)  # the first one that reaches this far
                logits = model(torch.tensor([sequence[window * stride : at]])).logits[0, -1].double()
                losses.append(-logits.log_softmax(-1)[sequence[at]].item())
                right += int(logits.argmax() == sequence[at])
        figures = {"tokens": len(losses), "loss": sum(losses) / len(losses), "accuracy": right / len(losses)}
        # The special tokens, which begin and end each turn, stand for no text.
        texts = [tokenizer.decode(sequence[begin:], skip_special_tokens=True) for sequence, begin in scored]
        found.append(figures | {"bytes": sum(len(text.encode()) for text in texts)})
    return found


def evaluate(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    main(["eval", *map(str, arguments), "--format", "chat", "--dtype", "float32", "--json"])
    printed = capsys.readouterr()
    assert "warning" not in printed.err
    found: dict[str, Any] = json.loads(printed.out)
    return found


def check(found: dict[str, Any], expected: list[dict[str, Any]]) -> None:
    tokens, size = (sum(each[key] for each in expected) for key in ("tokens", "bytes"))
    loss, right = (sum(each[key] * each["tokens"] for each in expected) for key in ("loss", "accuracy"))
    assert (found["documents"], found["tokens"], found["bytes"]) == (len(expected), tokens, size)
    assert found["loss"] == pytest.approx(loss / tokens, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-5)
    assert found["bits_per_byte"] == pytest.approx(loss / math.log(2) / size, rel=1e-6)
    assert found["accuracy"] == pytest.approx(right / tokens)


@pytest.mark.parametrize(("seq_len", "stride"), [(512, 512), (64, 64), (48, 17)])
def test_every_turn_has_the_loss_that_transformers_gives(
    folder: Path, corpus: Path, seq_len: int, stride: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = reference(folder, TALKS, seq_len=seq_len, stride=stride, train_on="assistant")
    # An answer, <|im_end|> and a line end for each turn of the assistant.
    said = [[message["content"] for message in talk if message["role"] == "assistant"] for talk in TALKS]
    assert [each["bytes"] for each in expected] == [sum(len(text.encode()) + 1 for text in texts) for texts in said]
    found = evaluate(
        capsys, "--checkpoint", folder, "--data", corpus / "talks.jsonl", "--seq-len", seq_len, "--stride", stride,
        "--batch-size", 3, "--per-document", tmp_path / "each.jsonl",
    )  # fmt: skip
    assert (found["format"], found["train_on"]) == ("chat", "assistant")
    check(found["total"], expected)
    lines = [json.loads(line) for line in (tmp_path / "each.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [line["place"] for line in lines] == ["line 1", "line 2", "line 3"]
    for line, wanted in zip(lines, expected, strict=True):
        check(line | {"documents": 1}, [wanted])


@pytest.mark.parametrize("train_on", ["last", "all"])
def test_train_on_chooses_the_tokens(
    folder: Path, corpus: Path, train_on: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = evaluate(
        capsys, "--checkpoint", folder, "--data", corpus / "talks.parquet", "--messages-key", "talk",
        "--train-on", train_on,
    )  # fmt: skip
    check(found["total"], reference(folder, TALKS, train_on=train_on))


def test_a_turn_is_scored_in_the_context_that_it_has_in_use(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where the template drops earlier thoughts, a conversation is several samples."""
    thinking = shutil.copytree(folder, tmp_path / "thinking")
    (thinking / "chat_template.jinja").write_text(THOUGHTS, encoding="utf-8")
    turns = [assistant("51", reasoning_content="17*3 = 51"), assistant("no", reasoning_content="a prime is odd")]
    talks = [[user("17*3?"), turns[0], user("a prime?"), turns[1]], *TALKS[:2]]
    found = evaluate(capsys, "--checkpoint", thinking, "--data", write(tmp_path / "talks.jsonl", talks))
    check(found["total"], reference(thinking, talks, train_on="assistant"))


def test_an_answer_of_special_tokens_has_no_bits_per_byte(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = shutil.copytree(folder, tmp_path / "bare")
    template = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    (bare / "chat_template.jinja").write_text(template + "{% if add_generation_prompt %}<|im_start|>{% endif %}")
    data = write(tmp_path / "talks.jsonl", [[user("Hi"), assistant("")]])
    found = evaluate(capsys, "--checkpoint", bare, "--data", data, "--per-document", tmp_path / "each.jsonl")
    for figures in (found["total"], json.loads((tmp_path / "each.jsonl").read_text())):
        assert (figures["tokens"], figures["bytes"], figures["bits_per_byte"]) == (1, 0, None)
        assert figures["loss"] > 0


def test_the_first_line_says_what_is_scored_and_bad_rows_are_left_out(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"messages": TALKS[0]}, {"text": "x"}, {"messages": [user("Hi")]}, {"messages": TALKS[1]}]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = ["--checkpoint", str(folder), "--data", str(tmp_path / "some.jsonl"), "--format", "chat"]
    main(["eval", *options, "--seq-len", "64"])
    printed = capsys.readouterr()
    assert printed.out.splitlines()[0].endswith("windows of 64 tokens, stride 64, --format chat --train-on assistant")
    assert printed.out.splitlines()[-1].split()[:2] == ["total", "2"]
    first, second = printed.err.splitlines()
    assert "some.jsonl: the document at line 2 is left out: no conversation: no field messages" in first
    assert "--messages-key names another" in first
    assert "some.jsonl: the document at line 3 is left out: no assistant turn" in second


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{corpus}/notes.txt", "--format", "chat"], "notes.txt: a file of text; with --format chat, JSON lines or"),
        (["{corpus}/texts.jsonl", "--format", "chat"], "there is no conversation in {corpus}/texts.jsonl; 1 document"),
        (
            ["{corpus}/talks.parquet"],
            '--data: {corpus}/talks.parquet: no column "text"; it has talk; --text-key names the right one',
        ),
        (["{corpus}/talks.parquet", "--format", "chat"], "it has talk"),
        (["{corpus}/talks.jsonl", "--format", "csv"], "--format: invalid choice"),
        (["{corpus}/talks.jsonl", "--train-on", "last"], "--train-on: goes with --format chat only"),
        (["{corpus}/talks.jsonl", "--messages-key", "x"], "--messages-key: goes with --format chat only"),
        (["{corpus}/talks.jsonl", "--format", "chat", "--text-key", "x"], "--text-key: goes with --format text only"),
    ],
)
def test_mistakes(
    folder: Path, corpus: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus / "notes.txt").write_text("text")
    (corpus / "texts.jsonl").write_text('{"text": "text"}\n')
    fail(capsys, folder, [each.format(corpus=corpus) for each in arguments], message.format(corpus=corpus))


def test_templates_that_cannot_be_used(
    folder: Path, corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(folder, tmp_path / "model")
    arguments = [str(corpus / "talks.jsonl"), "--format", "chat"]
    (model / "chat_template.jinja").write_text("{% for m in messages %}\n{{ m.content }")
    fail(capsys, model, arguments, "the chat template, line 2")
    (model / "chat_template.jinja").unlink()
    fail(capsys, model, arguments, f"--format chat: {model} has no chat template; save the one")


def test_conversations_read_as_texts_are_pointed_to_the_format(
    folder: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["eval", "--checkpoint", str(folder), "--data", str(corpus / "talks.jsonl")])
    assert "these are conversations (under messages): --format chat reads them" in capsys.readouterr().err


def fail(capsys: pytest.CaptureFixture[str], model: Path, arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["eval", "--checkpoint", str(model), "--data", *arguments])
    assert exit.value.code == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("warning: ")]
    assert len(errors) == 1
    assert errors[0].startswith("error: ")
    assert message in errors[0]
