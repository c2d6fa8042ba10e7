"""Conversations: what the model is given, what is computed anew, and what is shown as a thought."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from tiny_hf import hf_model, write_tokenizer

from torchtitan_style import load_model
from torchtitan_style.common.errors import UserError
from torchtitan_style.data.chat.template import ChatTemplate
from torchtitan_style.inference.conversation import Conversation, _Thoughts, split_at_special_token
from torchtitan_style.inference.generate import TextModel
from torchtitan_style.inference.settings import Sampling

OPTIONS: dict[str, Any] = {"sampling": Sampling(temperature=0.0), "max_new_tokens": 12}
# As Qwen3's: thoughts of earlier turns are left out, and without thinking an empty one is put before the answer.
THINKING_TEMPLATE = """\
{%- for m in messages -%}
{%- set content = m.content.split('</think>')[-1] if m.role == 'assistant' else m.content -%}
<|im_start|>{{ m.role }}
{{ content }}<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}<|im_start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think>

</think>

{% endif %}{%- endif -%}"""


@pytest.fixture(scope="module", params=["full attention", "sliding window"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    window = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
    hf_model(**(window if request.param == "sliding window" else {})).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder: Path) -> TextModel:
    return load_model(folder, dtype=torch.float32)


def answer(conversation: Conversation, text: str) -> str:
    return "".join(piece for piece, _ in conversation.ask(text, **OPTIONS))


def test_messages_are_rendered_as_transformers_renders_them(folder: Path) -> None:
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    template = ChatTemplate.find(folder)
    assert template is not None
    messages = [{"role": "system", "content": "be nice"}, {"role": "user", "content": "hé 学"}]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert template.render(messages) == expected


def test_a_template_is_found_in_the_settings_too(tmp_path: Path) -> None:
    settings = tmp_path / "tokenizer_config.json"
    assert ChatTemplate.find(tmp_path) is None
    settings.write_text(
        json.dumps({"chat_template": "{{ eos_token }}{{ messages[0].content }}", "eos_token": {"content": "E"}})
    )
    assert ChatTemplate.find(tmp_path).render([{"role": "user", "content": "x"}]) == "Ex"
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"eos_token": "M"}))
    assert ChatTemplate.find(tmp_path).render([{"role": "user", "content": "x"}]) == "Mx"
    settings.write_text(
        json.dumps({"chat_template": [{"name": "default", "template": "D"}, {"name": "tool", "template": "T"}]})
    )
    assert ChatTemplate.find(tmp_path).render([]) == "D"
    (tmp_path / "chat_template.jinja").write_text("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match="roles must alternate"):
        ChatTemplate.find(tmp_path).render([])


@pytest.mark.parametrize("thinking", [True, False, None])
def test_the_thinking_mode_reaches_the_template(thinking: bool | None) -> None:
    template = ChatTemplate(THINKING_TEMPLATE, {})
    assert template.thinks
    rendered = template.render([{"role": "user", "content": "x"}], thinking=thinking)
    assert rendered.endswith("<think>\n\n</think>\n\n") == (thinking is False)


@pytest.mark.parametrize("templated", [True, False], ids=["chat template", "plain"])
def test_each_turn_is_what_a_fresh_model_would_say_to_the_whole_conversation(
    model: TextModel, folder: Path, templated: bool
) -> None:
    template = ChatTemplate.find(folder) if templated else None
    conversation = Conversation(model, template=template, system="be nice" if templated else None)
    for text in ("def loss(x)", "the gradient", "1234"):
        found = answer(conversation, text)
        before = conversation.messages[:-1]
        prompt = template.render(before) if template else "".join(m["content"] for m in before)
        assert found == model.generate(prompt, temperature=0.0, max_new_tokens=12)
        assert conversation.messages[-1] == {"role": "assistant", "content": found}
    conversation.reset()
    assert [m["role"] for m in conversation.messages] == (["system"] if templated else [])
    assert answer(conversation, "def loss(x)") == conversation.messages[-1]["content"]


def test_only_what_is_new_is_computed(model: TextModel) -> None:
    conversation = Conversation(model, template=None)
    answer(conversation, "def loss(x): return 1234 + 56")
    first = conversation.speed.prefill_tokens
    answer(conversation, " def")
    # The new text, and the last token of the answer, which no step has run through the model; a few tokens more
    # where text of the answer that is no UTF-8 reads as other tokens.
    assert first == len(model.encode("def loss(x): return 1234 + 56"))
    if not any(model.new_cache().windows):
        assert conversation.speed.prefill_tokens < len(
            model.encode("".join(m["content"] for m in conversation.messages))
        )


def test_an_interrupted_answer_stays_as_far_as_it_came_and_the_next_is_right(model: TextModel, folder: Path) -> None:
    template = ChatTemplate.find(folder)
    conversation = Conversation(model, template=template)
    pieces = conversation.ask("def", **OPTIONS)
    said = "".join(next(pieces)[0] for _ in range(3))
    pieces.close()
    assert conversation.finish is None
    assert conversation.messages[-1] == {"role": "assistant", "content": said}
    found = answer(conversation, "it")
    assert found == model.generate(template.render(conversation.messages[:-1]), temperature=0.0, max_new_tokens=12)


def test_a_conversation_that_is_too_long_is_left_as_it_was(model: TextModel) -> None:
    conversation = Conversation(model, template=None)
    answer(conversation, "def")
    before = list(conversation.messages)
    with pytest.raises(UserError, match=r"has [\d,]+ tokens, but the model has only 512 positions; .*/reset"):
        answer(conversation, "def " * 600)
    assert conversation.messages == before
    answer(conversation, "it")


def test_a_thought_that_the_template_begins_is_one() -> None:
    thoughts = _Thoughts(thinking=True)
    assert list(thoughts.split("hm\n</think>\n\nyes", last=True)) == [("hm\n", True), ("\n\nyes", False)]


@pytest.mark.parametrize("size", [1, 2, 3, 7, 100])
def test_thoughts_are_told_from_the_answer_whatever_the_pieces(size: int) -> None:
    text = "<think>\nhm < 3 </thin?\n</think>\n\nyes <b> </think"
    thoughts = _Thoughts()
    pieces = [text[i : i + size] for i in range(0, len(text), size)]
    found = [part for i, piece in enumerate(pieces) for part in thoughts.split(piece, last=i == len(pieces) - 1)]
    assert "".join(part for part, thought in found if thought) == "\nhm < 3 </thin?\n"
    assert "".join(part for part, thought in found if not thought) == "\n\nyes <b> </think"


def test_a_question_that_is_refused_leaves_the_conversation_as_it_was(
    model: TextModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    conversation = Conversation(model, template=None)
    answer(conversation, "def loss(x)")
    before = list(conversation.messages)
    with monkeypatch.context() as patch:
        patch.setattr("torchtitan_style.inference.generate.available_memory", lambda device: 0)
        with pytest.raises(UserError, match="are free"):
            answer(conversation, "more")
    assert conversation.messages == before
    answer(conversation, "more")
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2


def test_a_template_that_fails_is_said() -> None:
    with pytest.raises(UserError, match="the model's chat template rejects this conversation"):
        ChatTemplate("{{ messages[0].content + 1 }}", {}).render([{"role": "user", "content": "hi"}])


_ENDS = {
    # template of one message, what ends an answer: stop strings, tokens
    "special token": ("<|im_start|>{r}\n{c}<|im_end|>\n", [], ["<|im_end|>"]),
    "two special tokens": ("{c}<|im_end|><|endoftext|>", [], ["<|im_end|>"]),
    "text": ("## {r}\n{c}\n## end\n", ["\n## end"], []),
    "text before a special token": ("{c} END <|im_end|>\n", [" END"], ["<|im_end|>"]),
    "the next turn, as text": ("{r}: {c}\n", ["\nuser:"], []),
    "the next turn, as a special token": ("<|im_start|>{r}\n{c}\n", [], ["<|im_start|>"]),
}


@pytest.mark.parametrize("name", _ENDS)
def test_the_end_of_a_turn_is_read_off_the_template(model: TextModel, name: str) -> None:
    turn, stop, tokens = _ENDS[name]
    turn = turn.replace("{r}", "{{ m.role }}").replace("{c}", "{{ m.content }}").replace("\n", "{{ '\\n' }}")
    template = ChatTemplate("{% for m in messages %}" + turn + "{% endfor %}", {})
    found = split_at_special_token(template.end_of_turn(), model.tokenizer)
    assert found == (stop, {model.tokenizer.backend.token_to_id(token) for token in tokens})


@pytest.mark.parametrize("source", ["{{ messages[0].content }}", "{{ raise_exception('no') }}", "{{ 1 }}"])
def test_a_template_that_shows_no_end_of_turn_stops_nothing(model: TextModel, source: str) -> None:
    assert split_at_special_token(ChatTemplate(source, {}).end_of_turn(), model.tokenizer) == ([], set())


@pytest.mark.parametrize("ends", ["<|im_end|>", "of text"], ids=["special token", "text"])
def test_an_answer_ends_with_the_templates_turn_though_the_models_eos_is_another(
    model: TextModel, monkeypatch: pytest.MonkeyPatch, ends: str
) -> None:
    """A model that says "of", the end of its turn, and goes on."""
    monkeypatch.setattr(model, "stop_tokens", {model.tokenizer.end_of_text})
    script = model.encode(f" def{ends} loss")
    said = iter(script * 3)
    monkeypatch.setattr("torchtitan_style.inference.decode.Sampler.pick", lambda *_: [next(said)])
    turn = "{% for m in messages %}{{ m.role }}{{ m.content }}" + ends + "{% endfor %}"
    conversation = Conversation(model, template=ChatTemplate(turn, {}))
    assert answer(conversation, "x") == " def"
    assert conversation.finish == "stop"
