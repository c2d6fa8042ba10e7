"""``eval`` against a straightforward computation: Transformers' model, one window at a time, a softmax per token.

In fp32 both agree to 1e-6 of the loss. In bf16 a token's logits are rounded to 8 bits in another order: over a few
hundred tokens the mean loss differs by less than 1%.
"""

from __future__ import annotations

import gzip
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import transformers
from tiny_hf import hf_model, write_tokenizer

from torchtitan_style.__main__ import main
from torchtitan_style.evaluation.figures import Document, Sums

END_OF_TEXT = 0
SCRIPTS = {
    "latin": ("naïve café", 12),  # two letters of two bytes
    "cyrillic": ("градиент", 16),
    "chinese": ("学习率", 9),
    "emoji": ("🙂🙂", 8),
}
TEXTS = [
    "def loss(x): return 1234 + 56\n" * 12,
    *(text for text, _ in SCRIPTS.values()),
    "x",
    "  the gradient of the token and its weight\n\n" * 7,
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    hf_model().save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same documents in files of each kind, and each in a text file of its own."""
    corpus = tmp_path_factory.mktemp("corpus")
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS)
    (corpus / "lines.jsonl").write_text(lines, encoding="utf-8")
    (corpus / "packed.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    (corpus / "array.json").write_text(json.dumps([{"text": text} for text in TEXTS]), encoding="utf-8")
    pq.write_table(pa.table({"text": TEXTS}), corpus / "rows.parquet")
    for number, text in enumerate(TEXTS):
        (corpus / f"text{number}.txt").write_text(text, encoding="utf-8")
    return corpus


@torch.no_grad()
def losses_of(model: Any, ids: list[int], *, seq_len: int, stride: int) -> tuple[list[float], int]:
    """The loss of each token, and how many are guessed right: each one alone, its context cut as the windows are."""
    sequence = torch.tensor([END_OF_TEXT, *ids])
    losses, right = [], 0
    for at in range(len(ids)):
        window = 0 if at < seq_len else -(-(at + 1 - seq_len) // stride)  # the first one that reaches this far
        logits = model(sequence[None, window * stride : at + 1]).logits[0, -1].double()
        losses.append(-logits.log_softmax(-1)[ids[at]].item())
        right += int(logits.argmax() == ids[at])
    return losses, right


def reference(folder: Path, **window: int) -> list[dict[str, Any]]:
    """The figures of each document."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    found = []
    for text in TEXTS:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        losses, right = losses_of(model, ids, **window)
        found.append(
            {
                "tokens": len(ids),
                "bytes": len(text.encode()),
                "loss": sum(losses) / len(ids),
                "accuracy": right / len(ids),
            }
        )
    return found


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    main(["eval", *map(str, arguments), "--json"])
    printed = capsys.readouterr()
    assert "warning" not in printed.err
    found: dict[str, Any] = json.loads(printed.out)
    return found


def mean_loss(documents: list[dict[str, Any]]) -> float:
    return sum(each["loss"] * each["tokens"] for each in documents) / sum(each["tokens"] for each in documents)


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[dict[str, Any]]:
    return reference(folder, seq_len=64, stride=64)


def check(found: dict[str, Any], expected: list[dict[str, Any]], tolerance: float = 1e-6) -> None:
    assert found["documents"] == len(expected)
    assert found["tokens"] == sum(each["tokens"] for each in expected)
    assert found["bytes"] == sum(each["bytes"] for each in expected)
    loss = mean_loss(expected)
    assert found["loss"] == pytest.approx(loss, rel=tolerance)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=tolerance * loss * 1.1)
    bits = loss * found["tokens"] / math.log(2) / found["bytes"]
    assert found["bits_per_byte"] == pytest.approx(bits, rel=tolerance)


def test_every_kind_of_file_gives_what_transformers_gives(
    folder: Path, corpus: Path, expected: list[dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = [corpus / name for name in ("lines.jsonl", "packed.jsonl.gz", "array.json", "rows.parquet")]
    found = run(
        capsys, "--checkpoint", folder, "--dtype", "float32", "--seq-len", 64,
        "--data", *named, corpus / "*.txt", "--per-document", tmp_path / "documents.jsonl",
    )  # fmt: skip
    assert len(found["files"]) == 4 + len(TEXTS)
    right = sum(each["accuracy"] * each["tokens"] for each in expected)
    for row in found["files"][:4]:
        check(row, expected)
        assert row["accuracy"] * row["tokens"] == pytest.approx(right)
    for row, each in zip(found["files"][4:], expected, strict=True):
        check(row, [each])
        assert row["loss_standard_error"] is None
    check(found["total"], 5 * expected)
    documents = [json.loads(line) for line in (tmp_path / "documents.jsonl").read_text().splitlines()]
    assert [each["file"] for each in documents[:7]] == [str(corpus / "lines.jsonl")] * 7
    assert [each["place"] for each in documents[:3]] == ["line 1", "line 2", "line 3"]
    for each, wanted in zip(documents, 5 * expected, strict=True):
        assert each["loss"] == pytest.approx(wanted["loss"], rel=1e-6)
        assert (each["tokens"], each["bytes"]) == (wanted["tokens"], wanted["bytes"])
        assert each["accuracy"] == pytest.approx(wanted["accuracy"])


@pytest.mark.parametrize(("seq_len", "stride"), [(16, 16), (16, 5), (24, 1), (512, 512)])
def test_windows_and_strides(
    folder: Path, corpus: Path, seq_len: int, stride: int, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = reference(folder, seq_len=seq_len, stride=stride)
    found = run(
        capsys, "--checkpoint", folder, "--dtype", "float32", "--data", corpus / "lines.jsonl",
        "--seq-len", seq_len, "--stride", stride, "--batch-size", 3,
    )  # fmt: skip
    check(found["total"], wanted)


@pytest.mark.parametrize("batch_size", [1, 50])
def test_the_batch_size_changes_nothing(
    folder: Path, corpus: Path, expected: list[dict[str, Any]], batch_size: int, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(
        capsys, "--checkpoint", folder, "--dtype", "float32", "--data", corpus / "lines.jsonl",
        "--seq-len", 64, "--batch-size", batch_size,
    )  # fmt: skip
    check(found["total"], expected)


def test_in_bf16(
    folder: Path, corpus: Path, expected: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    found = run(
        capsys, "--checkpoint", folder, "--dtype", "bfloat16", "--data", corpus / "lines.jsonl", "--seq-len", 64
    )
    check(found["total"], expected, 0.01)


@pytest.mark.parametrize("tensor_parallel", [1, 2])
def test_on_two_ranks(
    folder: Path,
    corpus: Path,
    expected: list[dict[str, Any]],
    tensor_parallel: int,
    run_ranks: Callable[..., None],
    tmp_path: Path,
) -> None:
    output, documents = tmp_path / "output.json", tmp_path / "documents.jsonl"
    run_ranks(
        Path(__file__).with_name("eval_on_ranks.py"), 2, output,
        "eval", "--checkpoint", folder, "--dtype", "float32", "--seq-len", 64, "--json", "--per-document", documents,
        "--data", corpus / "lines.jsonl", corpus / "text*.txt", "--tensor-parallel", tensor_parallel,
    )  # fmt: skip
    found = json.loads(output.read_text(encoding="utf-8"))  # one object: the other rank prints nothing
    check(found["files"][0], expected)
    check(found["total"], 2 * expected)
    losses = [json.loads(line)["loss"] for line in documents.read_text(encoding="utf-8").splitlines()]
    assert losses == pytest.approx([each["loss"] for each in 2 * expected], rel=1e-6)


def test_bits_per_byte_counts_bytes_of_utf8(folder: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = [corpus / f"text{number}.txt" for number in range(1, 5)]
    found = run(capsys, "--checkpoint", folder, "--dtype", "float32", "--data", *names)
    for row, (_, size) in zip(found["files"], SCRIPTS.values(), strict=True):
        assert row["bytes"] == size
        assert row["bits_per_byte"] == pytest.approx(row["loss"] * row["tokens"] / 0.6931471805599453 / size)


def test_the_standard_error_is_that_of_a_ratio_of_sums() -> None:
    # Documents of one length: the textbook error of a mean of their losses.
    losses = [2.0, 3.0, 7.0, 4.0]
    sums = Sums()
    for loss in losses:
        sums.add(Document(0, 0, "", tokens=10, bytes=10, loss=10 * loss))
    mean = sum(losses) / 4
    deviation = math.sqrt(sum((loss - mean) ** 2 for loss in losses) / 3)
    assert sums.standard_error() == pytest.approx(deviation / 2)
    # A document that has most of the tokens, and the same loss per token as the others, is no reason for doubt.
    same = Sums()
    for tokens in (1, 10, 1000):
        same.add(Document(0, 0, "", tokens=tokens, bytes=tokens, loss=2.5 * tokens))
    assert same.standard_error() == pytest.approx(0, abs=1e-9)


def test_the_table_is_for_people(folder: Path, corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--checkpoint", folder, "--seq-len", 64, "--dtype", "float32"]
    main(["eval", *map(str, arguments), "--data", str(corpus / "lines.jsonl")])
    printed = capsys.readouterr()
    first, heading, row, total = printed.out.splitlines()
    assert first == f"{folder} in float32, windows of 64 tokens, stride 64"
    assert heading.split() == [
        "file",
        "documents",
        "tokens",
        "bytes",
        "loss",
        "±",
        "s.e.",
        "perplexity",
        "bits/byte",
        "accuracy",
    ]
    assert len(heading) == len(row) == len(total)
    assert total.startswith("total")
    assert printed.err == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "{}/nothing.txt"], "--data: no file matches"),
        ([], "--data: name the files"),
        (["--data", "{}/lines.jsonl", "--text-key", "body"], "7 documents cannot be read"),
        (["--data", "{}/lines.jsonl", "--seq-len", "600"], "--seq-len: 600 is more than the 512 positions"),
        (["--data", "{}/lines.jsonl", "--seq-len", "16", "--stride", "17"], "--stride: 17 is more than"),
        (["--data", "{}/lines.jsonl", "--stride", "0"], "--stride: must be at least 1"),
        (["--data", "{}/lines.jsonl", "--per-document", "/nowhere/x.jsonl"], "--per-document /nowhere/x.jsonl"),
        (["--data", "{}/lines.jsonl", "--per-document", "{}"], "must be a file in a folder that exists"),
        (["--data", "{}/empty.txt"], "--data: there is no text in"),
        (["--data", "{}/broken.jsonl.gz"], "--data: {}/broken.jsonl.gz: the file is damaged or cut short"),
    ],
)
def test_mistakes(
    folder: Path, corpus: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (corpus / "empty.txt").write_text("")
    (corpus / "broken.jsonl.gz").write_bytes((corpus / "packed.jsonl.gz").read_bytes()[:-40])
    try:
        with pytest.raises(SystemExit) as exit:
            main(["eval", "--checkpoint", str(folder), *(each.format(corpus) for each in arguments)])
    finally:
        (corpus / "empty.txt").unlink()
    assert exit.value.code == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert message.format(corpus) in error


def test_figures_are_printed_when_the_documents_cannot_be_written(
    folder: Path, corpus: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(
            ["eval", "--checkpoint", str(folder), "--data", str(corpus / "rows.parquet"), "--per-document", "/dev/full"]
        )
    assert exit.value.code == 1
    printed = capsys.readouterr()
    assert printed.out.splitlines()[-1].startswith("total")
    assert printed.err == "error: --per-document /dev/full: cannot be written: No space left on device\n"


def test_single_bad_documents_are_left_out_and_counted(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "some.jsonl"
    file.write_text('{"text": "one"}\n{"body": 2}\n{"text": ""}\n{"text": "the token"}\n', encoding="utf-8")
    main(["eval", "--checkpoint", str(folder), "--data", str(file), "--json"])
    printed = capsys.readouterr()
    total = json.loads(printed.out)["total"]
    assert (total["documents"], total["unreadable"]) == (2, 1)
    assert (
        'some.jsonl: the document at line 2 is left out: no text under "text"; it has body; --text-key names'
        in printed.err
    )
