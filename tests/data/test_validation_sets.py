"""Held-out sets before a run: wrong settings, missing files, and the bytes of tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from tests.data.corpora import texts, write_jsonl
from torchtitan_style.common.errors import UserError
from torchtitan_style.data.prepare.validation_sets import check_sets, prepare_sets
from torchtitan_style.data.tokenizer.tokenizer import SPECIAL_TOKENS, Tokenizer, token_bytes, train
from torchtitan_style.launch.configure import load_config

ONE = '[[validation.sets]]\nname = "one"\npaths = ["x.txt"]\n'


def written(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ONE + ONE, 'two sets have the name "one"'),
        (ONE.replace("one", "a/b"), "name must be letters"),
        (ONE.replace("one", "a b"), "name must be letters"),
        (ONE.replace("one", ""), "name must be letters"),
        (ONE.replace("one", ".."), "name must be letters"),
        (ONE.replace("one", "a" * 101), "name:"),
        (ONE.replace("one", "a.tmp"), "ends in .tmp"),
        (ONE.replace('name = "one"', ""), "entry 1: name is missing"),
        ('[[validation.sets]]\nname = "one"\n', "one: paths:"),
        (ONE + 'dataset = "mixture"\n', "cannot be a mixture"),
        (ONE + 'train_on = "all"\n', "one: train_on:"),
        (ONE + "weight = 2\n", "unknown key weight"),
        (ONE + '[checkpoint]\nbest_metric = "val_loss/two"\n', 'must be val_loss or val_loss/one, not "val_loss/two"'),
        (ONE + '[checkpoint]\nbest_metric = "val_accuracy/one"\n', "best_metric: must be val_loss or val_loss/one"),
        ('[checkpoint]\nbest_metric = "loss"\n', 'must be val_loss, not "loss"'),
        (ONE + "[data]\nvalidation_fraction = 0\n", "nothing of the corpus is held out"),
    ],
)
def test_a_wrong_setting_is_one_message(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        load_config(written(tmp_path, text))
    assert message in str(caught.value)
    assert "problems" not in str(caught.value)


def test_the_files_of_sets_are_looked_for_first(tmp_path: Path) -> None:
    config = load_config(written(tmp_path, ONE), ["--job.dump_folder", str(tmp_path / "run")])
    with pytest.raises(UserError, match=r'^validation\.sets: one: paths: no file matches "x\.txt"'):
        check_sets(config)
    off = load_config(tmp_path / "config.toml", ["--validation.enable", "false"])
    check_sets(off)
    assert prepare_sets(off, tmp_path, say=print) == {}


def test_a_set_that_changed_before_the_first_checkpoint_is_prepared_again(tmp_path: Path) -> None:
    train(texts(50, seed=0), tmp_path / "tokenizer", vocab_size=400)
    path = write_jsonl(tmp_path / "set.jsonl", texts(3, seed=1))
    text = ONE.replace("x.txt", str(path)) + '[model]\nflavor = "debug"\n'
    config = load_config(written(tmp_path, text), ["--job.dump_folder", str(tmp_path / "run")])
    said: list[str] = []
    for count in (3, 3, 5):
        write_jsonl(path, texts(count, seed=1))
        [found] = prepare_sets(config, tmp_path / "tokenizer", say=said.append).values()
        assert found.manifest["corpora"][""]["documents"]["train"] == count
    assert [line.partition(",")[0] for line in said] == [f"validation set one: {n} documents" for n in (3, 5)]
    train(texts(50, seed=9), tmp_path / "other", vocab_size=300)
    [found] = prepare_sets(config, tmp_path / "other", say=said.append).values()
    assert found.manifest["tokenizer_sha256"] == Tokenizer(tmp_path / "other").fingerprint


def test_bytes_of_tokens_add_up_to_the_text(tmp_path: Path) -> None:
    train(texts(200, seed=0), tmp_path / "tokenizer", vocab_size=600)
    tokenizer = Tokenizer(tmp_path / "tokenizer")
    sizes = token_bytes(tokenizer)
    for text in [*texts(50, seed=1), "<think>x</think>"]:  # which belongs to a text, though one token stands for it
        assert sizes[tokenizer.encode(text)].sum() == len(text.encode())
    assert sizes[tokenizer.end_of_text] == 0
    assert sizes[tokenizer.encode(SPECIAL_TOKENS[1])].sum() == 0


def test_bytes_of_a_vocabulary_like_sentencepieces(tmp_path: Path) -> None:
    vocabulary = {"<0xE5>": 0, "▁naïve": 1, "▁": 2, "</s>": 3}
    backend = Backend(models.BPE(vocabulary, [], byte_fallback=True))
    backend.decoder = decoders.ByteFallback()  # type: ignore[assignment]
    backend.add_special_tokens(["</s>"])
    backend.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "</s>"}')
    assert token_bytes(Tokenizer(tmp_path)).tolist() == [1, 7, 1, 0]
