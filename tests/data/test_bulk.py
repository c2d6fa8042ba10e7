"""Encoding in bulk gives the ids that tokenizers gives, or is not used."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
from tokenizers import pre_tokenizers

from tests.data.corpora import texts
from torchtitan_style.data.tokenizer.bulk import _GPT2, BulkEncoder, bulk_encoder
from torchtitan_style.data.tokenizer.tokenizer import _PIECES, SPECIAL_TOKENS, Tokenizer, train

CHARACTERS = [chr(code) for code in (*range(0xD800), *range(0xE000, 0x14000), *range(0x1D400, 0x20000))]


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """tokenizer.json of a tokenizer trained on many scripts."""
    folder = tmp_path_factory.mktemp("tokenizer") / "trained"
    train(texts(3000, seed=1), folder, vocab_size=1500)
    return json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))


def backend(content: dict[str, Any], **changes: Any) -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_str(json.dumps(content | changes))


def samples(count: int) -> list[str]:
    draw = random.Random(0)
    common = "  \n\n\t\r'\"aabbccdeelnstzABC019(){}[]:;.,_-=+<|>漢字λслоé\u0301"
    made = ["", " ", "\n", "'s 'S 'ſ 'LL", "a" * 3000, " " * 3000, "aaa" * 50, "ab\x00\ufffd\U0010ffff"]
    for number in range(count):
        pool = [draw.choice(common) if draw.random() < 0.8 else draw.choice(CHARACTERS) for _ in range(60)]
        pool.insert(draw.randrange(60), draw.choice(SPECIAL_TOKENS) if number % 5 == 0 else "")
        made.append("".join(pool[: draw.randrange(61)]))
    return made + texts(300, seed=2)


def gpt2(content: dict[str, Any]) -> dict[str, Any]:
    return {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}}


@pytest.mark.parametrize("kind", ["qwen", "gpt2", "nfc"])
def test_the_ids_are_those_of_tokenizers(content: dict[str, Any], kind: str) -> None:
    changes = {"qwen": {}, "gpt2": gpt2(content), "nfc": {"normalizer": {"type": "NFC"}}}[kind]
    slow = backend(content, **changes)
    fast = bulk_encoder(slow)
    assert fast is not None
    given = samples(3000)
    expected = [encoding.ids for encoding in slow.encode_batch(given, add_special_tokens=False)]
    assert [ids.tolist() for ids in fast(given)] == expected
    assert fast._encode.__name__ == "_encode", "the fast way was taken"


@pytest.mark.parametrize(("before", "after"), [("a", ""), (" ", ""), ("!", ""), ("\n", ""), ("'", "x"), ("", "a")])
@pytest.mark.parametrize("pattern", [_PIECES, _GPT2], ids=["qwen", "gpt2"])
def test_both_libraries_cut_every_character_alike(pattern: str, before: str, after: str) -> None:
    """With tokens for all of before + character + after, tiktoken's first token is the first piece."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for character in CHARACTERS:
        raw = (before + character + after).encode()
        for end in range(2, len(raw) + 1):
            ranks.setdefault(raw[:end], len(ranks))
    encoding = tiktoken.Encoding("pieces", pat_str=pattern, mergeable_ranks=ranks, special_tokens={})
    if pattern == _GPT2:
        splitter: Any = pre_tokenizers.ByteLevel(add_prefix_space=False)
    else:
        splitter = pre_tokenizers.Split(tokenizers.Regex(pattern), "isolated")
    for character in CHARACTERS:
        text = before + character + after
        first_token = encoding.decode_single_token_bytes(encoding.encode_ordinary(text)[0])
        _, (_, end) = splitter.pre_tokenize_str(text)[0]
        assert first_token == text[:end].encode(), f"U+{ord(character):04X}"


def with_model(content: dict[str, Any], **changes: Any) -> dict[str, Any]:
    return content | {"model": content["model"] | changes}


def test_what_does_not_fit_is_left_to_tokenizers(content: dict[str, Any]) -> None:
    assert bulk_encoder(backend(content)) is not None
    model = content["model"]
    merges = model["merges"]
    swapped = [*merges[:5], merges[6], merges[5], *merges[7:]]
    metaspace = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
    stripped = [token | {"lstrip": True} for token in content["added_tokens"]]
    longer = [*content["added_tokens"], content["added_tokens"][0] | {"id": 5000, "content": "<think>x"}]
    prefixed = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
    for unfit in (
        with_model(content, merges=swapped),
        with_model(content, dropout=0.1),
        with_model(content, end_of_word_suffix="</w>"),
        content | {"normalizer": {"type": "Lowercase"}},
        content | {"pre_tokenizer": metaspace},
        content | {"pre_tokenizer": prefixed},
        content | {"pre_tokenizer": None},
        content | {"added_tokens": stripped},
        content | {"added_tokens": longer},
    ):
        assert bulk_encoder(tokenizers.Tokenizer.from_str(json.dumps(unfit))) is None


def test_a_token_that_its_own_bytes_do_not_make_is_found(content: dict[str, Any]) -> None:
    """Merges b+c, a+b, ab+c: tokenizers leaves "abc" as a, bc, and tiktoken would make abc of it."""
    vocabulary = {token: id for token, id in content["model"]["vocab"].items() if id < 256 + len(SPECIAL_TOKENS)}
    size = len(vocabulary)
    vocabulary |= {"bc": size, "ab": size + 1, "abc": size + 2}
    merges = [["b", "c"], ["a", "b"], ["ab", "c"]]
    slow = backend(with_model(content, vocab=vocabulary, merges=merges))
    assert len(slow.encode("abc").ids) == 2
    assert bulk_encoder(slow) is None


def test_a_library_that_cuts_otherwise_is_noticed(content: dict[str, Any]) -> None:
    slow = backend(content)
    other = bulk_encoder(backend(content, **gpt2(content)))
    assert other is not None
    fast = BulkEncoder(slow, other.encoding, normalized=False)
    given = ["def f(x):\n    return x.y\n\n" + text for text in texts(50, seed=3)]
    assert [ids.tolist() for ids in fast(given)] == [slow.encode(text, add_special_tokens=False).ids for text in given]


def test_a_tokenizer_that_does_not_fit_still_encodes(tmp_path: Path, content: dict[str, Any]) -> None:
    slow = backend(content, normalizer={"type": "Lowercase"})
    slow.save(str(tmp_path / "tokenizer.json"))
    found = Tokenizer(tmp_path).encode_batch(["ABC Def", ""])
    assert [ids.tolist() for ids in found] == [slow.encode("ABC Def").ids, []]


def test_what_tiktoken_gives_up_on_is_encoded_all_the_same(content: dict[str, Any]) -> None:
    slow = backend(content)
    fast = bulk_encoder(slow)
    assert fast is not None
    text = "a" + " " * 1_200_000 + "b"
    assert fast([text])[0].tolist() == slow.encode(text, add_special_tokens=False).ids
