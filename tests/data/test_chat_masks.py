"""Which tokens of a conversation are trained on, in which context, against what is written down by hand."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tomli_w
import transformers

from tests.data.conversations import (
    CHATML,
    CONVERSATIONS,
    MARKED,
    TRIMS,
    Segment,
    Writer,
    user,
    write_chatml,
    write_qwen3,
    write_trims,
)
from tests.data.conversations import assistant as said
from tests.tiny_hf import write_tokenizer
from torchtitan_style.data.chat.conversations import Conversations
from torchtitan_style.data.chat.samples import BEGINS, TRAINED, Sampler, Unusable
from torchtitan_style.data.chat.template import ChatTemplate
from torchtitan_style.data.prepare.show import as_json, first_rows
from torchtitan_style.data.prepare.store import CorpusStore
from torchtitan_style.data.tokenizer.tokenizer import Tokenizer
from torchtitan_style.launch.configure import load_config

QWEN3 = Path(__file__).parents[3] / "shared/qwen3-tokenizer"
Samples = list[tuple[tuple[int, ...], tuple[bool, ...]]]


def folder_with(template: str, folder: Path) -> Path:
    write_tokenizer(folder, vocab_size=480, like_qwen=True)
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("tokenizers")
    found = {name: folder_with(source, root / name) for name, source in (("chatml", CHATML), ("trims", TRIMS))}
    found["marked"] = folder_with(MARKED, root / "marked")
    if QWEN3.is_dir():
        found["qwen3"] = QWEN3
    return found


def by_hand(writer: Writer) -> Callable[[Any, Any, Any], Samples]:
    def samples(messages: Any, tools: Any, tokenizer: Any) -> Samples:
        return [tokens_of(segments, tokenizer) for segments in writer(messages, tools)]

    return samples


def tokens_of(segments: list[Segment], tokenizer: Any) -> tuple[tuple[int, ...], tuple[bool, ...]]:
    """The text as a whole through Transformers; a token is trained on if its characters are."""
    text = "".join(part for part, _ in segments)
    trained = [flag for part, flag in segments for _ in part]
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    flags = [trained[begin] for begin, _ in encoded["offset_mapping"]]
    return tuple(encoded["input_ids"]), tuple(flags)


def by_transformers(messages: Any, tools: Any, tokenizer: Any) -> Samples:
    """The marks of the template, as Transformers reads them."""
    found = tokenizer.apply_chat_template(messages, tools=tools, return_dict=True, return_assistant_tokens_mask=True)
    return [(tuple(found["input_ids"]), tuple(flag == 1 for flag in found["assistant_masks"]))]


EXPECTED = {
    "chatml": by_hand(write_chatml),
    "trims": by_hand(write_trims),
    "marked": by_transformers,
    "qwen3": by_hand(write_qwen3),
}


@pytest.fixture(params=list(EXPECTED))
def template(request: pytest.FixtureRequest, folders: dict[str, Path]) -> str:
    if request.param not in folders:
        pytest.skip(f"no tokenizer of Qwen3 in {QWEN3}")
    return str(request.param)


def test_rows_have_the_samples_and_masks_that_are_written_down(
    template: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    rows = [{"messages": messages} | ({"tools": tools} if tools else {}) for messages, tools in CONVERSATIONS.values()]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    config = {
        "job": {"dump_folder": str(tmp_path / "run")},
        "model": {"flavor": "debug", "vocab_size": 151_680 if template == "qwen3" else 512},
        "data": {
            "dataset": "files",
            "paths": [str(tmp_path / "rows.jsonl")],
            "format": "chat",
            "tokenizer": str(folders[template]),
        },
        "training": {"seq_len": 512},
        "validation": {"enable": False},
    }
    (tmp_path / "config.toml").write_text(tomli_w.dumps(config), encoding="utf-8")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folders[template])
    for streaming in (False, True) if template != "qwen3" else (False,):  # a large tokenizer takes its time
        overrides = ["--data.streaming", "--data.num_streams", "1"] * streaming
        loaded = load_config(tmp_path / "config.toml", overrides, world_size=1)
        store = CorpusStore.of(loaded, for_run=False)
        prepared = store.get(say=lambda line: None, processes=1)
        count = prepared.rows("", "train", seq_len=512, packing="best_fit").num_rows if not streaming else 64
        shown = list(as_json(first_rows(loaded, store, prepared, count)))
        found = Counter(each for row in shown for each in documents_of(row))
        expected = Counter(
            labelled(ids, flags)
            for messages, tools in CONVERSATIONS.values()
            for ids, flags in EXPECTED[template](messages, tools, tokenizer)
        )
        if streaming:  # a block of rows is packed at once, of several epochs
            assert set(found) == set(expected)
        else:
            assert found == expected
        shutil.rmtree(tmp_path / "run")


def labelled(ids: tuple[int, ...], flags: tuple[bool, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """A sample with the label of each token: the one behind it, where that is trained on."""
    pairs = zip(ids[1:], flags[1:], strict=True)
    return ids, (*(id if flag else -100 for id, flag in pairs), -100)


def documents_of(row: dict[str, list[int]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    ids, labels, documents = (np.array(row[key]) for key in ("ids", "labels", "documents"))
    assert len(ids) == len(labels) == len(documents) == 512
    assert set(labels[documents == -1]) <= {-100}
    assert (np.diff(documents[documents != -1]) >= 0).all()
    return [
        (tuple(ids[documents == number].tolist()), tuple(labels[documents == number].tolist()))
        for number in np.unique(documents)
        if number != -1
    ]


def sampler(folder: Path, train_on: str = "assistant") -> tuple[Sampler, Tokenizer]:
    tokenizer, template = Tokenizer(folder), ChatTemplate.find(folder)
    assert template is not None
    return Sampler(template, tokenizer, train_on), tokenizer


def conversation(*messages: Any, **more: Any) -> str:
    return Conversations().text_of({"messages": list(messages), **more})


def trained_text(sample: Any, tokenizer: Tokenizer) -> str:
    return tokenizer.show(sample.ids[sample.marks == TRAINED].tolist())


def test_the_last_turn_and_all_tokens(folders: dict[str, Path]) -> None:
    talk = conversation(user("a"), said("b"), user("c"), said("d"), user("e"))
    last, tokenizer = sampler(folders["chatml"], "last")
    [sample] = last(talk).samples
    assert trained_text(sample, tokenizer) == "d<|im_end|>\n"
    for name in ("chatml", "marked"):
        every, tokenizer = sampler(folders[name], "all")
        [sample] = every(talk).samples
        assert tokenizer.show(sample.ids.tolist()).endswith("<|im_start|>user\ne<|im_end|>\n")
        assert sample.marks.tolist() == [BEGINS] + [TRAINED] * (len(sample.ids) - 1)
    marked, tokenizer = sampler(folders["marked"], "last")
    [sample] = marked(talk).samples
    assert trained_text(sample, tokenizer) == "d<|im_end|>"


def test_context_and_turn_are_tokenized_as_they_are_in_use(folders: dict[str, Path]) -> None:
    """The answer's line ends would be one token with that of the header if the text were tokenized as a whole."""
    make, tokenizer = sampler(folders["chatml"])
    [sample] = make(conversation(user("a"), said("\n\nb"))).samples
    context = tokenizer.encode("<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n")
    assert sample.ids.tolist() == context + tokenizer.encode("\n\nb<|im_end|>\n")
    # When the conversation goes on, the model reads the whole text: it is another context.
    samples = make(conversation(user("a"), said("\n\nb"), user("c"), said("d"))).samples
    whole = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n\n\nb<|im_end|>\n<|im_start|>user\nc<|im_end|>\n"
    joined = tokenizer.encode(whole + "<|im_start|>assistant\n")
    assert samples[0].ids.tolist() == sample.ids.tolist()
    assert samples[1].ids.tolist() == joined + tokenizer.encode("d<|im_end|>\n")


def test_a_context_whose_tokens_reach_across_the_end_of_a_turn_is_another_sample(tmp_path: Path) -> None:
    """What follows the turn begins with a line's end, which is one token with that of the turn."""
    source = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ '\nQ ' + m.content + '\n' }}"
        "{% else %}{{ 'A ' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'A ' }}{% endif %}"
    )
    make, tokenizer = sampler(folder_with(source, tmp_path))
    first, second = make(conversation(user("a"), said("b"), user("c"), said("d"))).samples
    assert first.ids.tolist() == tokenizer.encode("\nQ a\nA ") + tokenizer.encode("b<|im_end|>\n")
    context = tokenizer.encode("\nQ a\nA b<|im_end|>\n\nQ c\nA ")
    assert second.ids.tolist() == context + tokenizer.encode("d<|im_end|>\n")
    assert trained_text(second, tokenizer) == "d<|im_end|>\n"


def test_marks_of_a_template_that_drops_thoughts_split_too(tmp_path: Path) -> None:
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}{% generation %}"
        "{% if loop.last %}{{ m.reasoning_content + '</think>' }}{% endif %}{{ m.content + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{% endfor %}"
    )
    make, tokenizer = sampler(folder_with(source, tmp_path))
    talk = conversation(user("a"), said("b", reasoning_content="t"), user("c"), said("d", reasoning_content="u"))
    samples, turns, _ = make(talk)
    assert turns == 2
    assert [trained_text(sample, tokenizer) for sample in samples] == ["t</think>b<|im_end|>", "u</think>d<|im_end|>"]
    assert "b<|im_end|>" in tokenizer.show(samples[1].ids.tolist())


def test_a_tokenizer_that_puts_a_space_in_front_takes_the_text_as_a_whole(tmp_path: Path) -> None:
    backend = json.loads((folder_with(CHATML, tmp_path) / "tokenizer.json").read_text(encoding="utf-8"))
    backend["pre_tokenizer"] = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    (tmp_path / "tokenizer.json").write_text(json.dumps(backend), encoding="utf-8")
    make, tokenizer = sampler(tmp_path)
    assert not tokenizer.joins_pieces
    [sample] = make(conversation(user("a"), said("b c"), user("d"), said("e"))).samples
    text = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in (("user", "a"), ("assistant", "b c")))
    text += "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in (("user", "d"), ("assistant", "e")))
    assert sample.ids.tolist() == tokenizer.encode(text)
    assert trained_text(sample, tokenizer).split() == ["b", "c<|im_end|>", "e<|im_end|>"]


@pytest.mark.parametrize(
    ("source", "messages", "problem"),
    [
        (CHATML, [user("a")], "no assistant turn"),
        ("{{ raise_exception('no ' + messages[0].role) }}", [user("a"), said("b")], "rejects it: no user"),
        ("{{ messages[0].name + 1 }}", [user("a"), said("b")], "the chat template rejects it"),
        (
            "{% for m in messages %}{{ m.role[0] + ':' + m.content + '.' }}{% endfor %}"
            "{% if add_generation_prompt %}a:<think>{% endif %}",
            [user("q"), said("hello")],
            r'renders message 2 differently than its generation prompt begins: "hello." where the prompt has "<think>"',
        ),
        ("{{ messages[0].role }}", [said("b")], "only assistant turn is the first message"),
    ],
)
def test_what_cannot_be_trained_on(source: str, messages: Any, problem: str, tmp_path: Path) -> None:
    make, _ = sampler(folder_with(source, tmp_path))
    with pytest.raises(Unusable) as raised:
        make(conversation(*messages))
    assert problem in str(raised.value)


def test_a_first_turn_of_the_assistant_is_context_where_nothing_asks_for_it(tmp_path: Path) -> None:
    source = "{{ messages[0].role[:0] }}" + CHATML
    make, tokenizer = sampler(folder_with(source, tmp_path))
    samples, turns, notes = make(conversation(said("hello"), user("a"), said("b")))
    assert (turns, notes) == (1, ["its first message is the assistant's, which is not trained on"])
    assert trained_text(samples[0], tokenizer) == "b<|im_end|>\n"


def test_messages_that_the_template_leaves_out_are_noted(tmp_path: Path) -> None:
    source = CHATML.replace("in messages %}", "in messages if m.role != 'developer' %}")
    make, _ = sampler(folder_with(source, tmp_path))
    _, turns, notes = make(conversation({"role": "developer", "content": "be brief"}, user("a"), said("b")))
    assert (turns, notes) == (1, ['the template leaves out its messages of the role "developer"'])
    assert make(conversation({"role": "system", "content": "be brief"}, user("a"), said("b"))).notes == []
