"""Conversations as people have them: rows of every form, bad ones, those that are too long; what is told of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.data.conversations import CHATML, TOOLS, assistant, call, user
from tests.tiny_hf import write_tokenizer
from torchtitan_style.common.errors import UserError
from torchtitan_style.config.schema import Data
from torchtitan_style.data.chat.conversations import Conversations, NoConversation, contents_of
from torchtitan_style.data.prepare.prepared import Prepared
from torchtitan_style.data.prepare.store import CorpusStore
from torchtitan_style.data.rows import NO_LABEL, PADDING, Rows
from torchtitan_style.data.streams import Stream
from torchtitan_style.data.tokenizer.tokenizer import Tokenizer
from torchtitan_style.launch.configure import load_config

TALK = [user("2+2?"), assistant("4")]

FORMS: dict[str, tuple[dict[str, Any], list[dict[str, Any]]]] = {
    "messages": ({"id": 3, "messages": TALK, "tools": None}, TALK),
    "parts": ({"messages": [user([{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]), TALK[1]]}, TALK),
    "a list as JSON": ({"messages": json.dumps(TALK)}, TALK),
    "nulls": ({"messages": [{**TALK[0], "tool_calls": None, "name": None}, TALK[1]]}, TALK),
    "names and thoughts": (
        {"messages": [{**TALK[0], "name": "Ann"}, {**TALK[1], "reasoning_content": "two, two"}]},
        [{**TALK[0], "name": "Ann"}, {**TALK[1], "reasoning_content": "two, two"}],
    ),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}], "system": "Add."},
        [{"role": "system", "content": "Add."}, *TALK],
    ),
    "ShareGPT, tools": (
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "human", "value": "q"},
                {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "R"}}'},
                {"from": "observation", "value": "sun"},
                {"from": "gpt", "value": "a"},
            ]
        },
        [
            {"role": "system", "content": "s"},
            user("q"),
            assistant("", tool_calls=[call("weather", city="R")]),
            {"role": "tool", "content": "sun"},
            assistant("a"),
        ],
    ),
    "conversation, of roles": ({"conversation": TALK}, TALK),
    "prompt and completion": ({"prompt": "2+2?", "completion": "4"}, TALK),
    "lists of both": ({"prompt": TALK[:1], "completion": TALK[1:]}, TALK),
    "instruction": ({"instruction": "2+2?", "input": "", "output": "4"}, TALK),
    "instruction, input": ({"instruction": "Add", "input": "2, 2", "output": "4"}, [user("Add\n\n2, 2"), TALK[1]]),
    "messages first": ({"prompt": "other", "completion": "x", "messages": TALK}, TALK),
    "null content of a call": (
        {"messages": [user("q"), {"role": "assistant", "content": None, "tool_calls": [call("weather")]}]},
        [user("q"), assistant("", tool_calls=[call("weather")])],
    ),
}


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_every_form(form: str) -> None:
    row, messages = FORMS[form]
    assert json.loads(Conversations().text_of(row)) == {"messages": messages}


def test_tools_and_a_column_of_another_name() -> None:
    text = Conversations("chat").text_of({"chat": TALK, "messages": 3, "tools": json.dumps(TOOLS)})
    assert json.loads(text) == {"messages": TALK, "tools": TOOLS}
    assert contents_of(text) == "2+2?\n4"


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"text": "x"}, "no conversation: no field messages.*it has text"),
        ({"messages": []}, "it has no messages"),
        ({"messages": "hello"}, '"messages" must be a list of messages, not text'),
        ({"messages": ["hello"]}, "message 1 must be an object, not text"),
        (
            {"messages": [user("a"), {"role": "moderator", "content": "b"}]},
            'message 2 has the unknown role "moderator"',
        ),
        ({"messages": [{"content": "b"}]}, "message 1 has the unknown role null"),
        ({"messages": [{"role": "user", "content": None}]}, r"the content of message 1 \(user\) is null, not text"),
        (
            {"messages": [user([{"type": "image_url", "image_url": "x"}])]},
            'message 1 is of type "image_url"; only text',
        ),
        ({"messages": TALK, "tools": [3]}, '"tools" must be a list of JSON schemas'),
        ({"instruction": "a", "output": None}, r"the content of message 2 \(assistant\) is null"),
        ({"prompt": "a", "completion": 3}, '"completion" must be a list of messages, not a number'),
    ],
)
def test_rows_that_are_no_conversations(row: dict[str, Any], problem: str) -> None:
    with pytest.raises(NoConversation, match=problem):
        Conversations().text_of(row)


# Whole corpora

BAD = {
    3: ({"text": "no conversation"}, "no conversation: no field messages"),
    5: ({"messages": [user("a"), {"role": "moderator", "content": "b"}]}, 'unknown role "moderator"'),
    6: ({"messages": [user("a"), {"role": "assistant", "content": None}]}, "is null, not text"),
    7: ({"messages": [{"role": "tool", "content": "a"}, assistant("b")]}, "rejects it: no tools here"),
    8: ({"messages": [user("a")]}, "no assistant turn"),
    9: ({"messages": [user("a" * 80), assistant("b")]}, "no token to train on within the 60 tokens of a row"),
}
KEPT = {
    10: ({"messages": [user("a"), user("b"), assistant("c")]}, "kept: two user messages in a row"),
    11: ({"messages": [user("a"), assistant("b" * 90)]}, "kept: 112 tokens, cut at the 60 of a row"),
    12: (
        {"messages": [user("a"), assistant("b", reasoning_content="hm")]},
        "kept: the template leaves out its reasoning_content",
    ),
}
GOOD = {
    1: {"messages": TALK},
    2: {"prompt": "x", "completion": "y"},
    4: {"messages": [*TALK, user("!"), assistant("ok")]},
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_tokenizer(tmp_path / "tokenizer", vocab_size=259, like_qwen=True)  # a token for each byte
    refusing = "{% if messages[0].role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}" + CHATML
    (tmp_path / "tokenizer/chat_template.jinja").write_text(refusing, encoding="utf-8")
    lines = {**GOOD, **{line: row for line, (row, _) in (BAD | KEPT).items()}}
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(lines[n]) + "\n" for n in sorted(lines)), encoding="utf-8")
    return tmp_path


def settings(folder: Path, **changes: Any) -> Data:
    section: dict[str, Any] = {"dataset": "files", "paths": [str(folder / "rows.jsonl")], "format": "chat"}
    return Data(**section | {"tokenizer": str(folder / "tokenizer"), "validation_fraction": 0.0} | changes)


def store(data: Data, folder: Path, *, seq_len: int = 60) -> CorpusStore:
    return CorpusStore(data, folder, vocab_size=512, seq_len=seq_len, validates=data.validation_fraction > 0)


def prepare(data: Data, folder: Path, **options: Any) -> tuple[Prepared, list[str]]:
    said: list[str] = []
    return store(data, folder, **options).get(say=said.append, processes=1), said


def problems(path: Path) -> dict[int, str]:
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["line"]: line["problem"] for line in lines}


def test_bad_conversations_are_named_and_others_kept(folder: Path) -> None:
    prepared, said = prepare(settings(folder), folder / "run")
    found = problems(folder / "run/data_errors.jsonl")
    assert found.keys() == (BAD | KEPT).keys()
    for line, (_, problem) in (BAD | KEPT).items():
        assert problem in found[line]
    assert prepared.manifest["corpora"][""]["documents"]["train"] == len(GOOD) + len(KEPT)
    text = "\n".join(said)
    assert "6 conversations, 7 turns of the assistant" in text
    assert "1 sample cut at the end of a row" in text
    assert "warning: 6 documents cannot be read" in text
    rows = prepared.rows("", "train", seq_len=60, packing="best_fit")
    every = rows.rows(np.arange(rows.num_rows))
    counts = prepared.manifest["corpora"][""]["counts"]
    assert counts["trained"] == (every.labels != NO_LABEL).sum()
    assert prepared.tokens("train") == (every.documents != PADDING).sum() + counts["cut"]  # its last label
    tokens, trained = prepared.tokens("train"), counts["trained"]
    assert f"{tokens} tokens, {trained / tokens:.1%} of them trained on" in text


def test_what_a_limit_leaves_room_for(folder: Path) -> None:
    """Those that are kept do not count."""
    prepare(settings(folder, max_bad_documents=len(BAD)), folder / "run")
    with pytest.raises(UserError, match=r"6 documents cannot be read, and data\.max_bad_documents is 5"):
        prepare(settings(folder, max_bad_documents=len(BAD) - 1), folder / "other")


def test_streams_have_the_same_samples_and_problems(folder: Path) -> None:
    prepared, _ = prepare(settings(folder), folder / "run")
    rows = prepared.rows("", "train", seq_len=60, packing="best_fit")
    every = samples(rows.rows(np.arange(rows.num_rows)))
    data = settings(folder, streaming=True)
    streamed, _ = prepare(data, folder / "stream")
    for packing in ("best_fit", "concat"):
        corpora = store(data.model_copy(update={"packing": packing}), folder / "stream").streamed(streamed)
        tokenizer = Tokenizer(streamed.tokenizer)
        options: dict[str, Any] = {"num_streams": 1, "packing": packing, "seq_len": 60, "seed": 0}
        stream = Stream(0, corpora, [1.0], None, tokenizer=tokenizer, **options)
        taken = [stream.row()[0] for _ in range(30)]
        noted = {problem["line"]: problem["problem"] for problem in stream.take_problems()}
        assert noted.keys() == (BAD | KEPT).keys()
        # From any point on: the rows that would have come anyway.
        again = Stream(0, corpora, [1.0], None, tokenizer=tokenizer, **options)
        for _ in range(7):
            again.row()
        later = Stream(0, corpora, [1.0], again.state, tokenizer=tokenizer, **options)
        for row in taken[7:20]:
            other = later.row()[0]
            assert all(
                np.array_equal(getattr(row, key), getattr(other, key)) for key in ("inputs", "labels", "documents")
            )
        if packing == "best_fit":
            assert set(samples(Rows.join(taken))) == set(every)


def samples(rows: Rows) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    return [
        (tuple(ids[own].tolist()), tuple(labels[own].tolist()))
        for ids, labels, numbers in zip(rows.inputs, rows.labels, rows.documents, strict=True)
        for number in np.unique(numbers[numbers != PADDING])
        for own in [numbers == number]
    ]


def test_concatenated_conversations_predict_nothing_across_their_borders(folder: Path) -> None:
    data = settings(folder, packing="concat", max_bad_documents=10)
    prepared, _ = prepare(data, folder / "run", seq_len=16)
    source = prepared.rows("", "train", seq_len=16, packing="concat")
    rows = source.rows(np.arange(source.num_rows))
    flat, labels, documents = rows.inputs.ravel(), rows.labels.ravel(), rows.documents.ravel()
    known = (labels[:-1] != NO_LABEL) & (documents[1:] != PADDING)  # the next token is there
    assert (labels[:-1][known] == flat[1:][known]).all()
    starts = np.flatnonzero(flat == 1)  # <|im_start|>
    assert (labels[starts - 1][1:] == NO_LABEL).all()
    counts = prepared.manifest["corpora"][""]["counts"]
    assert counts["cut"] == 0
    assert (labels != NO_LABEL).sum() == counts["trained"]
    begins = sum(len(np.unique(row[row != PADDING])) for row in rows.documents)
    assert begins >= counts["samples"]
    assert documents.max() > 0


def test_parquet_is_read_alike(folder: Path) -> None:
    rows = [GOOD[1], {"messages": [user("q"), {"role": "assistant", "content": "a", "reasoning_content": "t"}]}]
    pq.write_table(pa.Table.from_pylist(rows), folder / "rows.parquet")
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    shards = []
    for name in ("rows.parquet", "rows.jsonl"):
        prepared, _ = prepare(settings(folder, paths=[str(folder / name)]), folder / f"run {name}")
        place = prepared.folder
        shards.append([(place / f"train-00000.{kind}").read_bytes() for kind in ("bin", "marks", "index")])
    assert shards[0] == shards[1]
    pq.write_table(pa.table({"text": ["a"]}), folder / "other.parquet")
    with pytest.raises(UserError, match=r"no conversation: no column messages.*it has text"):
        prepare(settings(folder, paths=[str(folder / "other.parquet")]), folder / "none")


def test_too_few_conversations_to_hold_out_whole_ones(folder: Path) -> None:
    talks = [{"prompt": f"{n}", "completion": "y" * 5} for n in range(5)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in talks), encoding="utf-8")
    prepared, _ = prepare(settings(folder, validation_fraction=0.0001), folder / "run")
    found = []
    for part in ("train", "validation"):
        source = prepared.rows("", part, seq_len=60, packing="best_fit")
        found.append(samples(source.rows(np.arange(source.num_rows))))
    assert [len(part) for part in found] == [4, 1]
    assert not set(found[0]) & set(found[1])
    (folder / "rows.jsonl").write_text(json.dumps(talks[0]) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="one conversation only"):
        prepare(settings(folder, validation_fraction=0.0001), folder / "one")


def test_template_and_mask_are_part_of_what_a_corpus_is(folder: Path) -> None:
    def fingerprint(run: str, **changes: Any) -> str:
        return prepare(settings(folder, **changes), folder / run)[0].fingerprint("")

    first = fingerprint("a")
    assert fingerprint("b") == first
    assert fingerprint("c", train_on="last") != first
    shared = {"prepared_folder": str(folder / "shared")}
    prepare(settings(folder, **shared), folder / "d")
    for changes, problem in (({"train_on": "all"}, "data.train_on changed"), ({"format": "text"}, "data.format, ")):
        with pytest.raises(UserError, match=problem):
            prepare(settings(folder, **shared | changes), folder / "d")
    with pytest.raises(UserError, match=r"training.seq_len \(or data.packing\) changed"):
        prepare(settings(folder, **shared), folder / "d", seq_len=61)
    template = folder / "tokenizer/chat_template.jinja"
    template.write_text(template.read_text(encoding="utf-8") + "{{ '' }}", encoding="utf-8")
    with pytest.raises(UserError, match=r"the chat template of .* changed"):
        prepare(settings(folder, **shared), folder / "d")
    assert fingerprint("e") != first
    streaming = {"streaming": True}
    assert fingerprint("f", **streaming) != fingerprint("g", **streaming | {"train_on": "all"})


def test_a_template_with_a_mistake_is_named_with_its_line(folder: Path) -> None:
    template = folder / "tokenizer/chat_template.jinja"
    template.write_text("a\n{% for m in messages %}\n{{ m.content }\n{% endfor %}", encoding="utf-8")
    with pytest.raises(UserError, match=r"chat_template\.jinja: the chat template, line 3: "):
        prepare(settings(folder), folder / "run")


def test_chatml_stands_in_where_there_is_no_template(folder: Path) -> None:
    (folder / "tokenizer/chat_template.jinja").unlink()
    prepared, said = prepare(settings(folder), folder / "run")
    assert "the tokenizer has no chat template: conversations are written in ChatML" in said
    assert (folder / "run/tokenizer/chat_template.jinja").is_file()  # chat and export have it
    rows = prepared.rows("", "train", seq_len=60, packing="best_fit")
    ids = [sample[0] for sample in samples(rows.rows(np.arange(rows.num_rows)))]
    expected = "<|im_start|>user\n2+2?<|im_end|>\n<|im_start|>assistant\n4<|im_end|>\n"
    assert tuple(Tokenizer(prepared.tokenizer).encode(expected)) in ids


@pytest.mark.parametrize(
    ("section", "problem"),
    [
        ({"messages_key": "m"}, 'data.messages_key: is only read with format = "chat"'),
        ({"train_on": "all"}, 'data.train_on: is only read with format = "chat"'),
        ({"format": "chat", "text_key": "t"}, "data.text_key: is not read with"),
        ({"format": "chat", "dataset": "stdlib", "paths": []}, '"stdlib" gives texts'),
        ({"format": "chat", "dataset": "mixture", "paths": []}, "each corpus of a mixture has a format of its own"),
        ({"format": "chats"}, "must be one of text, chat"),
    ],
)
def test_keys_that_do_not_apply(section: dict[str, Any], problem: str, tmp_path: Path) -> None:
    import tomli_w

    path = tmp_path / "config.toml"
    path.write_text(tomli_w.dumps({"data": {"dataset": "files", "paths": ["x.jsonl"]} | section}), encoding="utf-8")
    with pytest.raises(UserError) as raised:
        load_config(path)
    assert problem in str(raised.value)


def test_whole_conversations_that_do_not_see_each_other_are_the_default() -> None:
    chat = {"name": "a", "dataset": "files", "paths": ["x"], "format": "chat"}
    text = {"name": "b", "dataset": "files", "paths": ["y"]}
    for section in ({"format": "chat"}, {"dataset": "mixture", "mixture": [text, chat]}):
        data = Data.model_validate(section)
        assert (data.packing, data.document_mask, data.has_chat) == ("best_fit", True, True)
    data = Data.model_validate({"format": "chat", "packing": "concat", "document_mask": False})
    assert (data.packing, data.document_mask) == ("concat", False)
    data = Data.model_validate({"dataset": "mixture", "mixture": [text]})
    assert (data.packing, data.document_mask, data.has_chat) == ("concat", False, False)


def test_text_among_conversations_is_named(folder: Path) -> None:
    (folder / "notes.txt").write_text("some text", encoding="utf-8")
    with pytest.raises(UserError, match="a file of text; with data"):
        prepare(settings(folder, paths=[str(folder / "notes.txt")]), folder / "run")
    with pytest.raises(UserError, match=r'these are conversations \(under messages\): data.format = "chat" reads them'):
        prepare(settings(folder, format="text", max_bad_documents=0), folder / "text")
