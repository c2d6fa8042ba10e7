"""Text to token ids and back: a byte-level BPE trained on the corpus, or any Hugging Face tokenizer.

Either way the tokenizer ends up as files in the run's ``tokenizer/`` folder, in the format that
``transformers.AutoTokenizer`` reads, and is loaded from there.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer as BackendTokenizer
from tokenizers import decoders, models, pre_tokenizers, trainers

from torchtitan_style.errors import UserError
from torchtitan_style.hub import fetch
from torchtitan_style.models.hf_folder import copy_assets

__all__ = ["END_OF_TEXT", "Tokenizer", "copy_pretrained", "train"]

END_OF_TEXT = "<|endoftext|>"
"""The token between documents, as in Qwen's vocabulary."""


class Tokenizer:
    """A tokenizer read from a folder with ``tokenizer.json`` and, mostly, ``tokenizer_config.json``."""

    def __init__(self, folder: Path) -> None:
        try:
            self.backend = BackendTokenizer.from_file(str(folder / "tokenizer.json"))
            path = folder / "tokenizer_config.json"
            settings = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
            roles = {role: settings.get(role) for role in ("eos_token", "pad_token")}
            self._special = {role: t["content"] if isinstance(t, dict) else t for role, t in roles.items()}
        except Exception as error:  # tokenizers raises a plain Exception
            raise UserError(f"{folder}: the tokenizer cannot be read: {error}") from None
        # Qwen's instruct models name <|im_end|>, which ends a turn; a document ends with this one.
        end = self.backend.token_to_id(END_OF_TEXT)
        end = self.special_id("eos_token") if end is None else end
        if end is None:
            raise UserError(f"{folder} has neither {END_OF_TEXT} nor an eos_token to end documents")
        self.end_of_text: int = end
        self.num_ids = max(self.backend.get_vocab(with_added_tokens=True).values()) + 1
        """One more than the largest id: what the model's vocab_size must be at least."""

    def special_id(self, role: str) -> int | None:
        """The id of the "eos_token" or the "pad_token" that its settings name, or None."""
        token = self._special[role]
        return None if token is None else self.backend.token_to_id(token)

    @property
    def fingerprint(self) -> str:
        """Changes whenever some text might be tokenized otherwise."""
        return hashlib.sha256(self.backend.to_str().encode()).hexdigest()

    def encode(self, text: str) -> list[int]:
        """Token ids of ``text``, nothing added."""
        return self.backend.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        """Token ids of each text, all texts at once on all cores."""
        return [e.ids for e in self.backend.encode_batch_fast(texts, add_special_tokens=False)]

    def decode(self, ids: list[int]) -> str:
        """Text of ``ids``, special tokens left out."""
        return self.backend.decode(ids)


def train(texts: Iterable[str], folder: Path, *, vocab_size: int) -> None:
    """Train a byte-level BPE (Sennrich et al. 2016; Radford et al. 2019) on ``texts`` and save it to ``folder``.

    It has at most ``vocab_size`` tokens, fewer if the texts have too few repeated pieces.
    """
    backend = BackendTokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore[assignment]
    backend.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    folder.mkdir(parents=True)
    backend.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_TEXT,
        "pad_token": END_OF_TEXT,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def copy_pretrained(source: str, folder: Path) -> None:
    """Save the tokenizer of ``source`` to ``folder``, file for file: a model folder, a Hub name, a run or a checkpoint.

    One without a ``tokenizer.json`` is converted by Transformers. Raises UserError if there is none.
    """
    found = fetch(source, weights=False)
    # A run and each of its checkpoints have a folder for it; beside the checkpoints is the run's.
    places = (found, found / "tokenizer", found.parent / "tokenizer")
    found = next((place for place in places if (place / "tokenizer.json").is_file()), found)
    if (found / "tokenizer.json").is_file():
        Tokenizer(found)  # raises if it cannot be used
        folder.mkdir(parents=True)
        copy_assets(found, folder)
        return
    if not any((found / name).is_file() for name in ("vocab.json", "tokenizer.model")):
        raise UserError(f'no tokenizer in "{source}": there is no tokenizer.json')

    import transformers

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(found)
    except Exception as error:  # transformers raises many kinds
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f'no tokenizer in "{source}": {reason}') from None
    tokenizer.save_pretrained(folder)
    if not (folder / "tokenizer.json").exists():
        raise UserError(f'"{source}" has no fast version (tokenizer.json)')
