"""Making a prepared folder: tokenizer and token shards, in a staging folder that is renamed when it is complete.

The staging folder is ``<folder>.tmp``. A build that is killed continues from the units that are done.
Needs no torch.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.files import first_missing, fsync, remove_empty, write_in_one_go
from torchtitan_style.common.reading import read_json
from torchtitan_style.config.schema import Corpus, Data

from ..chat.template import CHATML_TOKENS, ensure_template
from ..encode import PARTS, ChatRecipe, Recipe
from ..sources.corpus import SourceFile, source_files
from ..sources.documents import lost_file
from ..sources.problems import (
    FILE_NAME,
    BadDocuments,
    Problem,
    TooManyBadDocuments,
    counted,
    describe_left_out,
    first_few,
    is_allowed,
    is_bad_document,
    is_lost,
    lost_files,
    problem_of,
)
from ..sources.records import fields_of
from ..tokenizer.tokenizer import Tokenizer
from .changes import source_entry, template_in_folder, tokenizer_in_folder
from .held_out import hold_out
from .make_tokenizer import make_tokenizer
from .prepared import FORMAT, Prepared, describe_chat, template_hash
from .tokenize import Progress, tokenize

Say = Callable[[str], None]


class Build:
    """One prepared folder in the making: ``with build.staged(): prepared = build.make(…); build.publish(prepared)``.

    settings: what decides the content, for the manifest. dump_folder: where the list of bad documents is left if the
    build fails; None: beside the shards. Raises UserError if the corpus has no file, or files that cannot be read.
    """

    def __init__(
        self, data: Data, folder: Path, dump_folder: Path | None, *, settings: dict[str, Any], say: Say
    ) -> None:
        self.data, self.folder, self.dump_folder, self.settings, self.say = data, folder, dump_folder, settings, say
        self.staging = folder.parent / f"{folder.name}.tmp"
        self.sources = {name: source_files(corpus) for name, corpus in data.corpora().items()}
        _check_readable(data, self.sources)
        self.problems: list[Problem] = []

    @contextlib.contextmanager
    def staged(self) -> Iterator[None]:
        """Begin or continue in the staging folder. A UserError removes it, but for one that can be continued from."""
        created = {each: first_missing(each) for each in (self.folder.parent, self.dump_folder) if each}
        try:
            self._begin()
            yield
        except OSError as error:
            raise UserError(f"{self.staging}: cannot be written: {error.strerror or error}") from None
        except TooManyBadDocuments:
            raise  # with the limit raised, the build continues from here
        except UserError:
            shutil.rmtree(self.staging, ignore_errors=True)
            for each, outermost in created.items():
                remove_empty(each, up_to=outermost)
            raise

    def make(self, *, trained: Path | None, held_out: Sequence[int], progress: Progress, processes: int) -> Prepared:
        """Make the tokenizer and the shards of every corpus.

        trained: tokenizer of a run that has begun, which is used again. held_out: tokens to hold out of each corpus
        that is streamed.
        """
        vocab_size = self.settings["vocab_size"]
        tokenizer = make_tokenizer(self.data, self.sources, self.staging, vocab_size, self.say, trained)
        template = self._find_template(tokenizer)
        corpora = {}
        for (name, corpus), wanted in zip(self.data.corpora().items(), held_out, strict=True):
            place = self.staging / name if name else self.staging
            place.mkdir(exist_ok=True)
            recipe = recipe_of(self.data, corpus, self.settings, self.staging / "tokenizer")
            if self.data.streaming:
                corpora[name] = hold_out(self.sources[name], place, recipe, wanted, self.say)
            else:
                corpora[name] = self._tokenize(name, place, recipe, processes, progress)
        for name, entry in corpora.items():
            if not self.data.streaming and not sum(entry["documents"].values()):
                raise _empty(name, self.problems, self.dump_folder)
        _report_problems(self.problems, self.dump_folder or self.folder, self.say)
        manifest = {
            "format": FORMAT,
            "settings": self.settings,
            "tokenizer_sha256": tokenizer.fingerprint,
            "end_of_text": tokenizer.end_of_text,
            "dtype": _dtype(vocab_size),
            "corpora": corpora,
        } | ({"chat_template": template} if template else {})
        return Prepared(self.staging, manifest)

    def publish(self, prepared: Prepared) -> Prepared:
        """Write the manifest and rename the staging folder to its final name."""
        prepared.save()
        for leftover in (*self.staging.rglob("unit-*.json"), self.staging / "plan.json"):
            leftover.unlink()
        for path in (*self.staging.rglob("*"), self.staging):
            fsync(path)
        shutil.rmtree(self.folder, ignore_errors=True)
        self.staging.rename(self.folder)
        return Prepared(self.folder, prepared.manifest)

    def _begin(self) -> None:
        """Empty the staging folder, unless an earlier build with the same plan left it."""
        plan = {
            "settings": self.settings,
            "tokenizer": [tokenizer_in_folder(self.data), template_in_folder(self.data)],
            "units": 3,  # version of the unit files
            "sources": {name: [asdict(file) for file in files] for name, files in self.sources.items()},
        }
        file = self.staging / "plan.json"
        with contextlib.suppress(OSError, ValueError):
            if read_json(file, most=2**28) == plan:
                done = len(list(self.staging.rglob("unit-*.json")))
                self.say(f"resuming the preparation in {self.staging}: {done} units are done")
                return
        shutil.rmtree(self.staging, ignore_errors=True)
        self.staging.mkdir(parents=True)
        write_in_one_go(file, json.dumps(plan))

    def _find_template(self, tokenizer: Tokenizer) -> str | None:
        """Fingerprint of the chat template in the folder of ``tokenizer``, ChatML if there was none; None if no corpus
        is one of conversations."""
        if not self.data.has_chat:
            return None
        if ensure_template(self.staging / "tokenizer"):
            self.say("the tokenizer has no chat template: conversations are written in ChatML")
            if split := [token for token in CHATML_TOKENS if len(tokenizer.encode(token)) > 1]:
                self.say(f"warning: {' and '.join(split)} of ChatML are not single tokens in this tokenizer")
        return template_hash(self.staging / "tokenizer")

    def _tokenize(self, name: str, place: Path, recipe: Recipe, processes: int, progress: Progress) -> dict[str, Any]:
        """Tokenize one corpus. Returns its entry of the manifest."""
        files, limit = self.sources[name], self.data.max_bad_documents
        units, bad, hashes = tokenize(files, place, recipe, processes=processes, progress=progress, max_bad=limit)
        entry: dict[str, Any] = {
            "documents": {part: sum(unit["documents"][part] for unit in units) for part in PARTS},
            "tokens": {part: sum(unit["tokens"][part] for unit in units) for part in PARTS},
            "counts": _sum_of_counts(units),
            "sources": [source_entry(file, digest) for file, digest in zip(files, hashes, strict=True)],
            "files": {file: content for unit in units for file, content in unit["files"].items()},
        }
        self.problems += bad
        _list_problems(self.problems, self.staging, self.dump_folder, self.data)
        if sum(entry["documents"].values()):
            _report(name, entry, self.say)
        return entry


def recipe_of(data: Data, corpus: Corpus, settings: dict[str, Any], tokenizer: Path) -> Recipe:
    """How the documents of ``corpus`` become tokens, with the ``settings`` of a prepared folder."""
    return Recipe(
        tokenizer=str(tokenizer),
        text_key=corpus.text_key,
        max_document_bytes=data.max_document_bytes,
        validation_fraction=settings["validation_fraction"],
        vocab_size=settings["vocab_size"],
        dtype=_dtype(settings["vocab_size"]),
        allow_lost_files=tuple(data.allow_lost_files),
        chat=ChatRecipe(corpus.messages_key, corpus.train_on, settings["longest"]) if corpus.format == "chat" else None,
    )


def _sum_of_counts(units: Iterable[dict[str, Any]]) -> dict[str, int]:
    """The counts of all units: see ``COUNTS``."""
    total: Counter[str] = Counter()
    for unit in units:
        total.update(unit["counts"])
    return dict(total)


def _dtype(vocab_size: int) -> str:
    """Type of a token id in a shard."""
    return "<u2" if vocab_size <= 2**16 else "<u4"


def _empty(name: str, problems: list[Problem], dump_folder: Path | None) -> UserError:
    """What to say of a corpus without a document; those that cannot be read are listed in the dump folder."""
    bad = [problem for problem in problems if is_bad_document(problem) or is_lost(problem)]
    if bad and dump_folder:
        BadDocuments(dump_folder / FILE_NAME, limit=len(problems), allow_lost=["*"]).add(problems)
    return UserError(
        f"data.paths: the corpus{f' {name}' if name else ''} is empty: "
        + (f"none of its documents can be read:{first_few(bad)}" if bad else "its files hold no text")
    )


def _report(name: str, corpus: dict[str, Any], say: Callable[[str], None]) -> None:
    tokens = corpus["tokens"]
    say(
        f"tokenized {counted(sum(corpus['documents'].values()), 'document')}{f' of {name}' if name else ''}: "
        f"{counted(tokens['train'], 'token')} to train on, "
        f"{counted(tokens['validation'] if corpus['documents']['validation'] else 0, 'token')} held out"
    )
    for line in _report_chat(name, corpus):
        say(line)


def _report_chat(name: str, entry: dict[str, Any]) -> Iterator[str]:
    """Lines about a corpus of conversations that was prepared; none if it is one of texts."""
    if not (line := describe_chat(name, entry)):
        return
    yield line
    counts, tokens, of = entry["counts"], sum(entry["tokens"].values()), f" of {name}" if name else ""
    if counts["split"]:
        yield (
            f"{counted(counts['split'], 'conversation')}{of} became several samples, because the chat template renders "
            f"earlier turns differently later on: {counts['samples']:,} samples in all, {counts['added']:,} more "
            f"tokens (+{counts['added'] / (tokens - counts['added'] or 1):.1%})"
        )
    if counts["cut"]:
        yield f"{counted(counts['cut'], 'sample')}{of} cut at the end of a row (training.seq_len)"


def _list_problems(problems: list[Problem], staging: Path, dump_folder: Path | None, config: Data) -> None:
    """Leave the list of bad documents in the prepared folder; if there are too many, where it can be found."""
    (staging / FILE_NAME).unlink(missing_ok=True)
    limit, allowed = config.max_bad_documents, config.allow_lost_files
    bad = BadDocuments(staging / FILE_NAME, limit=len(problems), allow_lost=["*"])
    bad.add(problems)
    if bad.count > limit or not all(is_allowed(problem["file"], allowed) for problem in bad.lost):
        listed = (dump_folder or staging) / FILE_NAME
        listed.unlink(missing_ok=True)
        BadDocuments(listed, limit=limit, allow_lost=allowed).add(problems)


def _check_readable(config: Data, sources: dict[str, list[SourceFile]]) -> None:
    """Raise LostFiles for local files that cannot be read at all, before anything is made of the others."""
    lost = [
        problem_of(file, record)
        for name, corpus in config.corpora().items()
        for file in sources[name]
        if not file.is_remote and not is_allowed(file.url, config.allow_lost_files)
        if (record := lost_file(file, fields_of(corpus)))
    ]
    if lost:
        raise lost_files(lost, config.allow_lost_files)


def _report_problems(problems: list[Problem], folder: Path, say: Callable[[str], None]) -> None:
    bad = sum(map(is_bad_document, problems))
    lost = [problem for problem in problems if is_lost(problem)]
    if bad or lost:
        say(f"warning: {describe_left_out(bad, lost)}; {folder / FILE_NAME} lists them")
