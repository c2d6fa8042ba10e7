"""Making a run's data, once: the tokenizer, and the corpora as shards of token ids (see prepared.py).

Needs no torch: the launcher prepares before it starts the ranks, so that a mistake in the corpus is found at once,
and with nothing written. Killed half-way it goes on where it was: until all is there, everything is in a folder
beside the final one, with .tmp behind its name.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torchtitan_style.common.errors import UserError
from torchtitan_style.common.files import copy_folder, first_missing, fsync, locked, remove_empty, write_in_one_go
from torchtitan_style.config.schema import Data

from .changes import change_of, source_entry, tokenizer_in_folder
from .corpus import SourceFile, source_files
from .documents import lost_file
from .held_out import hold_out
from .make_tokenizer import make_tokenizer
from .prepared import FORMAT, Prepared, read_prepared
from .problems import (
    FILE_NAME,
    BadDocuments,
    Problem,
    TooManyBadDocuments,
    counted,
    describe,
    describe_left_out,
    is_allowed,
    is_bad_document,
    is_lost,
    lost_files,
    problem_of,
)
from .streams import StreamedCorpus
from .tokenize import PARTS, Progress, Recipe, lines_of_progress, tokenize
from .tokenizer import Tokenizer

__all__ = ["prepare", "streamed_corpora"]

Complete = Callable[[Prepared, Callable[[str], None]], None]


def prepare(
    config: Data,
    dump_folder: Path,
    *,
    vocab_size: int,
    say: Callable[[str], None],
    held_out: Sequence[int] = (),
    complete: Complete = lambda prepared, say: None,
    progress: Progress | None = None,
    processes: int | None = None,
    allow_changed_data: bool = False,
    for_run: bool = True,
) -> Prepared:
    """Make the tokenizer and the prepared folder of a run, or see that they are there and still right.

    say: called with a line of progress. held_out: how many tokens of each streamed corpus are wanted; left out: none.
    complete: called with what there is and with ``say``, to add to its folder, or to refuse it with a UserError.
    progress: called now and then while tokenizing; left out: a line every ten seconds. processes: left out: one per
    CPU. allow_changed_data: take a corpus that has changed though the run has checkpoints. for_run: whether the dump
    folder gets its own copy of the tokenizer.

    Raises UserError, with nothing left behind but the list of bad documents, if the corpus cannot be used.
    """
    folder = Path(os.path.expanduser(config.prepared_folder)) if config.prepared_folder else dump_folder / "data"
    folder = folder.resolve() if folder.is_symlink() else folder  # what it names is replaced, and not the link
    hands_out = for_run or not config.prepared_folder
    _check_ours(
        folder,
        dump_folder / "tokenizer" if hands_out else None,
        key="data.prepared_folder" if config.prepared_folder else "job.dump_folder",
    )
    with locked(folder, say) if config.prepared_folder else contextlib.nullcontext():  # other runs may share it
        settings = _settings(config, vocab_size)
        held_out = held_out or [0] * len(settings["corpora"])
        present = read_prepared(folder)
        change = present and change_of(present, config, settings)
        # A folder that is prepared for other runs has nothing to do with the one in the dump folder.
        is_running = hands_out and any(dump_folder.glob("checkpoint/step-*"))
        if present and change and is_running and not allow_changed_data:
            mend = f"delete {folder}, and it is prepared again" if str(folder) in change else "put it back"
            raise UserError(
                f"{dump_folder}: {change} since this run began, so it cannot go on with the next batch; {mend}, "
                "start a new run with another --job.dump_folder, or go on at the same place of the new data with "
                "--checkpoint.allow_changed_data"
            )
        if present and change and config.prepared_folder:
            raise UserError(
                f"data.prepared_folder: {folder}: {change} since it was prepared; name another folder, or delete "
                "this one"
            )
        if present is None or change or _lacks_held_out(present, config, held_out):
            present = _make(
                config,
                folder,
                dump_folder if hands_out else None,
                settings=settings,
                held_out=held_out,
                say=say,
                complete=complete,
                progress=progress or lines_of_progress(say),
                processes=processes or _cpus(),
                # A model knows its tokens: other data is read with the same ones.
                trained=dump_folder / "tokenizer" if is_running else None,
            )
            if hands_out and not config.streaming:
                (dump_folder / FILE_NAME).unlink(missing_ok=True)  # of an attempt before this one
        else:
            complete(present, lambda line: None)  # it was said when it was made
        if hands_out:
            _hand_out(present, dump_folder, is_running=is_running and not allow_changed_data)
        return present


def _check_ours(folder: Path, tokenizer: Path | None, *, key: str) -> None:
    """Raise UserError if something that is not ours would be replaced."""
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        is_prepared = isinstance(manifest["format"], int) and "corpora" in manifest
    except (OSError, ValueError, KeyError, TypeError):
        is_prepared = False
    staging = folder.with_name(f"{folder.name}.tmp")
    for place, ours in (
        (folder, is_prepared or ((folder / "manifest.json").exists() and (folder / "tokenizer").is_dir())),
        (staging, any((staging / name).exists() for name in ("plan.json", "plan.json.tmp", "manifest.json"))),
        (tokenizer, tokenizer is not None and (tokenizer / "tokenizer.json").exists()),
    ):
        if place and not ours and place.exists() and (not place.is_dir() or any(place.iterdir())):
            raise UserError(
                f"{place} holds something else, and would be replaced by the prepared corpus; name another folder "
                f"with {key}"
            )


def _settings(config: Data, vocab_size: int) -> dict[str, Any]:
    """What decides the content of a prepared folder, beside the corpus's files."""
    return {
        "tokenizer": config.tokenizer,
        "vocab_size": vocab_size,
        "validation_fraction": config.validation_fraction,
        "max_document_bytes": config.max_document_bytes,
        "streaming": config.streaming,
        "corpora": {
            name: corpus.model_dump(include={"dataset", "subset", "split", "text_key", "paths"})
            for name, corpus in config.corpora().items()
        },
    }


def _lacks_held_out(present: Prepared, config: Data, held_out: Sequence[int]) -> bool:
    """Whether validation has been turned on or made longer since a streamed corpus's held-out tokens were collected."""
    return config.streaming and any(
        corpus["tokens"]["validation"] < wanted and not corpus["exhausted"]
        for corpus, wanted in zip(present.manifest["corpora"].values(), held_out, strict=True)
    )


def _make(
    config: Data,
    folder: Path,
    dump_folder: Path | None,
    *,
    settings: dict[str, Any],
    held_out: Sequence[int],
    say: Callable[[str], None],
    complete: Complete,
    progress: Progress,
    processes: int,
    trained: Path | None,
) -> Prepared:
    """Make everything in a folder beside ``folder``, and put it there when it is complete.

    dump_folder: None to leave it alone.
    """
    sources = {name: source_files(corpus) for name, corpus in config.corpora().items()}
    _check_readable(config, sources)
    staging = folder.parent / f"{folder.name}.tmp"
    made = {each: first_missing(each) for each in (folder.parent, dump_folder) if each}
    try:
        plan = {
            "settings": settings,
            "tokenizer": tokenizer_in_folder(config),
            "units": 2,  # what a unit's file is like
            "sources": {name: [asdict(file) for file in files] for name, files in sources.items()},
        }
        _begin(staging, plan, say)
        tokenizer = make_tokenizer(config, sources, staging, settings["vocab_size"], say, trained)
        recipe = {
            "tokenizer": str(staging / "tokenizer"),
            "max_document_bytes": config.max_document_bytes,
            "validation_fraction": config.validation_fraction,
            "vocab_size": settings["vocab_size"],
            "dtype": "<u2" if settings["vocab_size"] <= 2**16 else "<u4",
            "allow_lost_files": tuple(config.allow_lost_files),
        }
        corpora, problems = {}, []
        for (name, corpus), wanted in zip(config.corpora().items(), held_out, strict=True):
            place = staging / name if name else staging
            place.mkdir(exist_ok=True)
            own = Recipe(**recipe, text_key=corpus.text_key)
            if config.streaming:
                corpora[name] = hold_out(sources[name], place, own, wanted, say)
                continue
            corpora[name], bad = _tokenize(
                sources[name], place, own, processes, progress, max_bad=config.max_bad_documents
            )
            problems += bad
            _list_problems(problems, staging, dump_folder, config)
            if sum(corpora[name]["documents"].values()):
                _report(name, corpora[name], say)
        for name, corpus_entry in corpora.items():
            if not config.streaming and not sum(corpus_entry["documents"].values()):
                raise _empty(name, problems, dump_folder)
        _report_problems(problems, dump_folder or folder, say)
        manifest = {
            "format": FORMAT,
            "settings": settings,
            "tokenizer_sha256": tokenizer.fingerprint,
            "end_of_text": tokenizer.end_of_text,
            "dtype": recipe["dtype"],
            "corpora": corpora,
        }
        complete(Prepared(staging, manifest), say)
        Prepared(staging, manifest).save()
        for leftover in (*staging.rglob("unit-*.json"), staging / "plan.json"):
            leftover.unlink()
        for path in (*staging.rglob("*"), staging):
            fsync(path)
        shutil.rmtree(folder, ignore_errors=True)
        staging.rename(folder)
    except OSError as error:
        raise UserError(f"{staging}: cannot be written: {error.strerror or error}") from None
    except TooManyBadDocuments:
        raise  # with the limit raised, it goes on from here
    except UserError:
        shutil.rmtree(staging, ignore_errors=True)
        for each, outermost in made.items():
            remove_empty(each, up_to=outermost)
        raise
    return Prepared(folder, manifest)


def _begin(staging: Path, plan: dict[str, Any], say: Callable[[str], None]) -> None:
    """An empty folder to prepare in, or the one of an earlier attempt at the same."""
    file = staging / "plan.json"
    try:
        if json.loads(file.read_text(encoding="utf-8")) == plan:
            say(f"going on with {staging}, {len(list(staging.rglob('unit-*.json')))} units of which are done")
            return
    except (OSError, ValueError):
        pass
    shutil.rmtree(staging, ignore_errors=True)
    staging.mkdir(parents=True)
    write_in_one_go(file, json.dumps(plan))


def _tokenize(
    files: list[SourceFile], place: Path, recipe: Recipe, processes: int, progress: Progress, *, max_bad: int
) -> tuple[dict[str, Any], list[Problem]]:
    units, problems, hashes = tokenize(files, place, recipe, processes=processes, progress=progress, max_bad=max_bad)
    entry = {
        "documents": {part: sum(unit["documents"][part] for unit in units) for part in PARTS},
        "tokens": {part: sum(unit["tokens"][part] for unit in units) for part in PARTS},
        "sources": [source_entry(file, digest) for file, digest in zip(files, hashes, strict=True)],
        "files": {name: content for unit in units for name, content in unit["files"].items()},
    }
    return entry, problems


def _empty(name: str, problems: list[Problem], dump_folder: Path | None) -> UserError:
    """What to say of a corpus without a document; those that cannot be read are listed in the dump folder."""
    bad = [problem for problem in problems if is_bad_document(problem) or is_lost(problem)]
    if bad and dump_folder:
        BadDocuments(dump_folder / FILE_NAME, limit=len(problems), allow_lost=["*"]).add(problems)
    shown = "".join(f"\n  {describe(problem)}" for problem in bad[:5])
    return UserError(
        f"data.paths: the corpus{f' {name}' if name else ''} is empty: "
        + (f"none of its documents can be read:{shown}" if bad else "its files hold no text")
    )


def _report(name: str, corpus: dict[str, Any], say: Callable[[str], None]) -> None:
    tokens = corpus["tokens"]
    say(
        f"tokenized {counted(sum(corpus['documents'].values()), 'document')}{f' of {name}' if name else ''}: "
        f"{counted(tokens['train'], 'token')} to train on, "
        f"{counted(tokens['validation'] if corpus['documents']['validation'] else 0, 'token')} held out"
    )


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
        if (record := lost_file(file, corpus.text_key))
    ]
    if lost:
        raise lost_files(lost, config.allow_lost_files)


def _report_problems(problems: list[Problem], folder: Path, say: Callable[[str], None]) -> None:
    bad = sum(map(is_bad_document, problems))
    lost = [problem for problem in problems if is_lost(problem)]
    if bad or lost:
        say(f"warning: {describe_left_out(bad, lost)}; {folder / FILE_NAME} lists them")


def _hand_out(prepared: Prepared, dump_folder: Path, *, is_running: bool) -> None:
    """Put copies of the tokenizer and of the list of bad documents into the dump folder."""
    own = dump_folder / "tokenizer"
    try:
        same = Tokenizer(own).fingerprint == prepared.manifest["tokenizer_sha256"]
    except UserError:
        same = False
    if not same:
        if is_running and (own / "tokenizer.json").exists():
            raise UserError(
                f"{own}: the tokenizer has changed since this run began; put it back, or take that of the prepared "
                "data with --checkpoint.allow_changed_data"
            )
        dump_folder.mkdir(parents=True, exist_ok=True)
        copy_folder(prepared.tokenizer, own)
    listed = prepared.folder / FILE_NAME
    if listed.exists() and not (dump_folder / FILE_NAME).exists():
        shutil.copyfile(listed, dump_folder / FILE_NAME)


def streamed_corpora(config: Data, prepared: Prepared, *, vocab_size: int) -> list[StreamedCorpus]:
    """What the streams read, for data.streaming."""
    return [
        StreamedCorpus(
            name=name,
            files=tuple(source_files(corpus)),
            recipe=Recipe(
                tokenizer=str(prepared.tokenizer),
                text_key=corpus.text_key,
                max_document_bytes=config.max_document_bytes,
                validation_fraction=config.validation_fraction,
                vocab_size=vocab_size,
                dtype=prepared.manifest["dtype"],
                allow_lost_files=tuple(config.allow_lost_files),
            ),
            max_bad_documents=config.max_bad_documents,
        )
        for name, corpus in config.corpora().items()
    ]


def _cpus() -> int:
    """CPUs that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
