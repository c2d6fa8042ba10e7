"""The section [data]: corpora, and how their documents become rows."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field, model_validator

from .kinds import NonNegative, PathText, PositiveOrRest
from .section import Section


class Corpus(Section):
    """Where documents come from."""

    dataset: PathText = Field("stdlib", min_length=1)
    """"stdlib": the source files of Python's standard library, present on every machine. "files": your own
    files, named by paths. "mixture": several corpora, each an entry of [[data.mixture]]. Or a dataset of the
    Hub by its name, as "HuggingFaceFW/fineweb", or a folder laid out like one."""
    subset: str = ""
    """Configuration of a Hub dataset, as "sample-10BT"; empty: its default."""
    split: str = Field("train", min_length=1)
    """Split of a Hub dataset."""
    paths: list[str] = []
    """Files for dataset = "files": wildcards allowed, ** for any depth; https:// and hf:// too. A line of
    .jsonl, .ndjson or .json and a row of .parquet are a document each; any other file is UTF-8 text, in documents
    of at most about a megabyte. All but parquet may be compressed: .gz, .zst, .bz2, .xz."""
    text_key: str = Field("text", min_length=1)
    """Field of a JSON line, or column of a parquet file, that holds the text."""
    format: Literal["text", "chat"] = "text"
    """"chat": each row is a conversation (docs/finetuning.md), rendered by the tokenizer's chat template; packing is
    then "best_fit" and document_mask true, unless they are set."""
    messages_key: str = ""
    """For format = "chat": field or column with the messages. Empty: messages, conversations, prompt and completion, or
    instruction and output, whichever there is."""
    train_on: Literal["assistant", "last", "all"] = "assistant"
    """For format = "chat": tokens with a loss. "assistant": every assistant turn, its end token included.
    "last": its last turn only. "all": all tokens."""


class MixtureCorpus(Corpus):
    """One corpus of a mixture: an entry of [[data.mixture]]."""

    name: str = Field(pattern=r"^\w[\w.-]*$")
    """Its name in the metrics and on disk."""
    weight: float = Field(1.0, gt=0, allow_inf_nan=False)
    """Its part of all rows, relative to the other weights."""


class ValidationSet(Corpus):
    """One held-out set: an entry of [[validation.sets]]."""

    dataset: PathText = Field("files", min_length=1)
    """As data.dataset, but for "mixture"."""
    name: str = Field(pattern=r"^\w[\w.-]*$", max_length=100)
    """Its name in the metrics and on disk."""


class Data(Corpus):
    """The corpus, its tokenizer, and how documents become rows."""

    mixture: list[MixtureCorpus] = []
    """For dataset = "mixture": one [[data.mixture]] entry per corpus, with name, weight, and dataset, subset,
    split, paths, text_key, format, messages_key and train_on as in this section."""
    tokenizer: PathText = Field("train", min_length=1)
    """"train": train a byte-level BPE of model.vocab_size tokens on the corpus. Otherwise a
    folder or Hub name with a Hugging Face tokenizer."""
    validation_fraction: float = Field(0.05, ge=0, lt=1)
    """Share of the documents held out for validation, chosen by a hash of the text."""
    prepared_folder: PathText = ""
    """Where the tokenized corpus is kept; empty: in the dump folder. Runs that name the same folder share it."""
    streaming: bool = False
    """Read and tokenize while training instead of once beforehand. Needs no disk space and starts at once."""
    num_streams: PositiveOrRest = -1
    """For streaming: independent readers that each fill fixed rows of every batch. They are divided
    among the data-parallel ranks, whose number must divide it; it must divide the global batch. -1: the largest
    divisor of the global batch up to 64."""
    packing: Literal["concat", "best_fit"] = "concat"
    """How rows are filled. concat: documents one after another, cut at the row's end. best_fit: documents
    that fit a row stay whole, each where the least space remains; the rest is padding."""
    document_mask: bool = False
    """Let tokens attend to their own document only, and count positions from its start."""
    num_workers: int = Field(0, ge=0, le=1024)
    """Processes per rank that read ahead; 0: read between steps."""
    max_bad_documents: NonNegative = 100
    """Number of unreadable documents before the run stops. They are skipped, and listed with file and position in
    data_errors.jsonl."""
    allow_lost_files: list[str] = []
    """Files that may be lost, all or from some point on: damaged, an archive, without the right column. Names or
    patterns, as "*/broken.parquet". Any other lost file stops the run. What is lost is listed in data_errors.jsonl."""
    max_document_bytes: int = Field(5_000_000, ge=1, le=2**40)
    """A longer JSON line's or parquet row's text counts as unreadable."""

    @model_validator(mode="before")
    @classmethod
    def _defaults_for_chat(cls, values: Any) -> Any:
        """Rows of whole conversations that do not see each other, unless told otherwise."""
        if not isinstance(values, dict):
            return values
        mixture = values.get("mixture")
        corpora = [values, *(mixture if isinstance(mixture, list) else [])]
        if any(isinstance(corpus, dict) and corpus.get("format") == "chat" for corpus in corpora):
            values = {"packing": "best_fit", "document_mask": True} | values
        return values

    @property
    def has_chat(self) -> bool:
        """Whether a corpus is one of conversations."""
        return any(corpus.format == "chat" for corpus in self.corpora().values())

    def corpora(self) -> dict[str, Corpus]:
        """Each corpus by its name: "" for the only one."""
        return {corpus.name: corpus for corpus in self.mixture} if self.dataset == "mixture" else {"": self}

    def weights(self) -> list[float]:
        """Each corpus's share of the rows."""
        weights = [corpus.weight for corpus in self.mixture] or [1.0]
        return [weight / sum(weights) for weight in weights]
