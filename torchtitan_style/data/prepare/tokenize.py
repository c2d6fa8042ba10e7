"""A corpus to shards of token ids, in parallel processes, and restartable.

The files are cut into units of about equal size, always in the same way; each unit becomes one shard, by
itself, so that neither the number of processes nor a restart changes what comes out.

    train-00007.*, validation-00007.*   the documents of unit 7, see data/shards.py
    unit-00007.json                     what is in them; written last: the unit is done
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torchtitan_style.common.errors import RunError
from torchtitan_style.common.files import digest_of, sha256
from torchtitan_style.common.program import STOP_SIGNALS, begin
from torchtitan_style.common.reading import open_regular, read_json_object
from torchtitan_style.common.signals import shielding_children
from torchtitan_style.common.typed import Content, Count, typed

from ..encode import PARTS, Recipe, is_held_out
from ..sources.corpus import SourceFile
from ..sources.documents import is_one_piece, read_records
from ..sources.parquet import parquet_groups
from ..sources.problems import Problem, is_allowed, is_bad_document, is_lost, problem_of
from ..sources.records import Lost, Record
from ..tokenizer.tokenizer import Tokenizer

_BATCH_BYTES = 2**19
"""Text that is tokenized at once, about."""
_NOT_ALLOWED = 2**32
"""What a file that is lost and may not be counts for, in bad documents: it stops everything."""
_ALONE, _ALONE_CHAT = 2**24, 2**22
"""Bytes of a corpus that is tokenized without starting processes for it: of texts, of conversations."""
_REPORT_SECONDS = 0.5

Unit = list[tuple[int, tuple[int, int] | None]]
"""Files by their number, each whole or a span of it."""
_Bad = tuple[int, int, str, str, Sequence[Any] | None]
"""A bad document: part of the unit, place, problem, place_name and lost of its record."""
Progress = Callable[[int, int, int], None]
"""Called now and then with bytes read, bytes in all, and tokens made."""


@dataclass(frozen=True)
class _Job:
    """One corpus on its way into one folder."""

    files: Sequence[SourceFile]
    units: list[Unit]
    folder: Path
    recipe: Recipe

    def todo(self) -> list[int]:
        """Units that are not done."""
        return [number for number in range(len(self.units)) if _done(self.folder, number) is None]

    def local(self) -> list[int]:
        """Files of this machine, which are hashed."""
        return [number for number, file in enumerate(self.files) if not file.is_remote]


def plan_units(files: Sequence[SourceFile]) -> list[Unit]:
    """Cut a corpus into units: small files together, large ones in spans where their format can be cut."""
    size = min(max(sum(file.size for file in files) // 64, 2**20), 2**26)
    units: list[Unit] = []
    room = 0
    for number, file in enumerate(files):
        for span, length in _spans(file, size):
            if room <= 0:
                units.append([])
                room = size
            units[-1].append((number, span))
            room -= max(length, 1)
    return units


def _spans(file: SourceFile, size: int) -> Iterator[tuple[tuple[int, int] | None, int]]:
    """Parts of ``file`` of about ``size`` bytes: byte ranges or row groups, and their lengths."""
    is_text = file.format not in ("jsonl", "parquet")
    if file.size < 2 * size or file.is_remote or file.compression or is_text or is_one_piece(file):
        yield None, file.size
    elif file.format == "jsonl":
        cuts = range(0, file.size, size)
        yield from (((start, min(start + size, file.size)), min(size, file.size - start)) for start in cuts)
    else:
        groups = parquet_groups(file)
        start = length = 0
        for number, group in enumerate(groups):
            length += group
            if length >= size or number == len(groups) - 1:
                yield (start, number + 1), length
                start, length = number + 1, 0
        if not groups:
            yield None, file.size


def tokenize(
    files: Sequence[SourceFile], folder: Path, recipe: Recipe, *, processes: int, progress: Progress, max_bad: int
) -> tuple[list[dict[str, Any]], list[Problem], list[str]]:
    """Write the shards of ``files`` into ``folder``, but for units that are there already.

    Returns what is in each unit, the documents that cannot be read, and the SHA-256 of each local file. Stops early,
    with the units done so far, when more than ``max_bad`` documents cannot be read, or a file is lost that may not be.
    """
    job = _Job(files, plan_units(files), folder, recipe)
    total, units = sum(file.size for file in files), len(job.units)
    if processes == 1 or total < (_ALONE_CHAT if recipe.chat else _ALONE) or units == 1:
        counter = _Counter()
        tokenizer = Tokenizer(Path(recipe.tokenizer))
        for number in job.todo():
            _tokenize_unit(job, number, tokenizer, counter)
            progress(counter.read, total, counter.made)
            if counter.bad > max_bad:
                break
        hashes = {number: sha256(Path(files[number].url)) for number in job.local()}
    else:
        skipped = total * (units - len(job.todo())) // units
        hashes = _in_processes(
            job, processes, lambda read, made: progress(read + skipped, total, made), max_bad=max_bad
        )

    def done() -> list[tuple[Unit, dict[str, Any]]]:
        return [(unit, content) for number, unit in enumerate(job.units) if (content := _done(folder, number))]

    # Too many documents may have been in units that were under way: these are gone through until they are named.
    for number in job.todo():
        if sum(_harm(problem, recipe.allow_lost_files) for problem in _problems(files, done())) > max_bad:
            break
        _tokenize_unit(job, number, Tokenizer(Path(recipe.tokenizer)), _Counter())
    found = done()
    problems = _problems(files, found)
    return [content for _, content in found], problems, [hashes.get(number, "") for number in range(len(files))]


def _in_processes(job: _Job, processes: int, progress: Callable[[int, int], None], *, max_bad: int) -> dict[int, str]:
    """Tokenize what is left to do, by several processes. Returns the hash of each local file."""
    todo, local = job.todo(), job.local()
    # Not forked: threads of this process, torch's or the tokenizer's, may hold locks at that moment.
    context = multiprocessing.get_context("spawn")
    counter = _Counter(context)
    others = multiprocessing.active_children()
    pool = concurrent.futures.ProcessPoolExecutor(
        min(processes, len(todo) + len(local)) or 1,
        mp_context=context,
        initializer=_start_process,
        initargs=(os.getpid(), job, counter),
    )
    try:
        with shielding_children():  # they are started here
            tokenized = [pool.submit(_unit_of_process, number) for number in todo]
            hashed = {number: pool.submit(sha256, Path(job.files[number].url)) for number in local}
        waiting: set[concurrent.futures.Future[Any]] = {*tokenized, *hashed.values()}
        while waiting and counter.bad <= max_bad:
            finished, waiting = concurrent.futures.wait(
                waiting, timeout=_REPORT_SECONDS, return_when=concurrent.futures.FIRST_EXCEPTION
            )
            for future in finished:
                future.result()
            progress(counter.read, counter.made)
        return {number: digest.result() for number, digest in hashed.items() if digest.done()}
    except concurrent.futures.process.BrokenProcessPool:
        # The pool sends the others SIGTERM, which they ignore, and from Python 3.12.1 on waits for them to end.
        for process in multiprocessing.active_children():
            if process not in others:
                process.kill()
        raise RunError(
            "a tokenizing process was killed, perhaps because memory ran out; run the same command to resume"
        ) from None
    finally:
        counter.stop.value = 1
        pool.shutdown(cancel_futures=True)


def lines_of_progress(say: Callable[[str], None]) -> Progress:
    """Progress as a line every ten seconds."""
    begin = last = time.monotonic()

    def progress(done: int, total: int, tokens: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < 10 or not done:
            return
        last = now
        left = (now - begin) * (total - done) / done
        say(f"tokenized {done / total:.0%}: {tokens / (now - begin):,.0f} tokens/s, about {left:,.0f} s left")

    return progress


class _Counter:
    """How far all processes have come together. To look takes no lock: one that was killed may have had it."""

    def __init__(self, context: Any = None) -> None:
        context = context or multiprocessing
        self._bytes, self._tokens, self._bad = (context.Value("q", 0) for _ in range(3))
        self.stop = context.RawValue("b", 0)

    def add(self, read: int, tokens: int, bad: int) -> None:
        with self._bytes.get_lock():
            self._bytes.get_obj().value += read
            self._tokens.get_obj().value += tokens
            self._bad.get_obj().value += bad

    @property
    def read(self) -> int:
        return self._bytes.get_obj().value

    @property
    def made(self) -> int:
        return self._tokens.get_obj().value

    @property
    def bad(self) -> int:
        return self._bad.get_obj().value


_process: dict[str, Any] = {}
"""In a process of the pool: what its jobs have in common."""


def _start_process(parent: int, job: _Job, counter: _Counter) -> None:
    begin()
    for number in STOP_SIGNALS:  # the parent says when to stop
        signal.signal(number, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a thread each
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    _process.update(job=job, tokenizer=Tokenizer(Path(job.recipe.tokenizer)), counter=counter)


def _end_with(parent: int) -> None:
    """End this process when the one that started it is gone: a pool's processes wait for work for ever."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _unit_of_process(number: int) -> None:
    _tokenize_unit(number=number, **_process)


def _tokenize_unit(job: _Job, number: int, tokenizer: Tokenizer, counter: _Counter) -> None:
    """Write one unit's shard."""
    folder, recipe = job.folder, job.recipe
    bad: list[_Bad] = []
    counts: Counter[str] = Counter()
    encode = recipe.encoder(tokenizer)
    with contextlib.ExitStack() as stack:
        shards = {
            part: stack.enter_context(recipe.writer(folder, part, number, tokenizer.end_of_text)) for part in PARTS
        }
        for place, (file_number, span) in enumerate(job.units[number]):
            file = job.files[file_number]
            read = read_records(file, text_key=recipe.fields, max_bytes=recipe.max_document_bytes, span=span)
            before = span[0] if span and file.format == "jsonl" else 0
            for batch in _batches(read):
                unread = len(bad)
                good = [record for record in batch if not record.problem]
                made = 0
                problems = {record.index: record.problem for record in batch if record.problem}
                for record, encoded in zip(good, encode([record.text for record in good]), strict=True):
                    if encoded.problem:
                        problems[record.index] = encoded.problem
                    if encoded.samples:
                        part = PARTS[is_held_out(record.text, recipe.validation_fraction)]
                        made += shards[part].add(encoded.samples)
                        counts.update(encoded.counts)
                for record in batch:
                    if problem := problems.get(record.index):
                        bad.append((place, record.place, problem, record.place_name, record.lost))
                harmful = sum(_harm(_problem(file, each), recipe.allow_lost_files) for each in bad[unread:])
                counter.add(max(batch[-1].consumed - before, 0), made, harmful)
                before = batch[-1].consumed
                if counter.stop.value:
                    raise KeyboardInterrupt
    made_files = sorted(path for part in PARTS for path in folder.glob(f"{part}-{number:05d}.*"))
    content = {
        "documents": {part: shard.documents for part, shard in shards.items()},
        "tokens": {part: shard.tokens for part, shard in shards.items()},
        "counts": counts,
        "bad": sorted(bad, key=lambda each: each[:3]),
        "files": {path.name: file_entry(path) for path in made_files},
    }
    temporary = folder / f"unit-{number:05d}.tmp"
    temporary.write_text(json.dumps(content | {"unit_sha256": digest_of(content)}), encoding="utf-8")
    temporary.rename(folder / f"unit-{number:05d}.json")


def _problem(file: SourceFile, bad: _Bad, first_line: int = 0) -> Problem:
    """What a unit keeps of a bad document as a line of the list. first_line: lines of the file before the unit."""
    _, place, problem, place_name, lost = bad
    record = Record(
        0, place + first_line, 0, problem=problem, place_name=place_name, lost=Lost(*lost) if lost else None
    )
    return problem_of(file, record)


def _harm(problem: Problem, allow_lost: Sequence[str]) -> int:
    """What ``problem`` counts for in max_bad."""
    if is_lost(problem):
        return 0 if is_allowed(problem["file"], allow_lost) else _NOT_ALLOWED
    return int(is_bad_document(problem))


def file_entry(path: Path) -> dict[str, Any]:
    """What a manifest says of a file."""
    stat = path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": sha256(path)}


def _batches(records: Iterator[Record]) -> Iterator[list[Record]]:
    """``records`` in lists of about ``_BATCH_BYTES`` of text."""
    batch: list[Record] = []
    room = _BATCH_BYTES
    for record in records:
        batch.append(record)
        room -= len(record.text) + 64
        if room <= 0:
            yield batch
            batch, room = [], _BATCH_BYTES
    if batch:
        yield batch


class _FileOfUnit(Content):
    size: Count
    mtime_ns: int


class _Unit(Content):
    documents: dict[str, Count]
    tokens: dict[str, Count]
    bad: list[list[Any]]
    files: dict[str, _FileOfUnit]


def _done(folder: Path, number: int) -> dict[str, Any] | None:
    """What a finished unit has, or None if it is not finished, or its files are not as it left them."""
    try:
        content = read_json_object(folder / f"unit-{number:05d}.json", most=2**28)
        if content.get("unit_sha256") != digest_of(content, but="unit_sha256"):
            return None
        for name, file in typed(_Unit, content).files.items():
            stat = (folder / name).stat()
            if (stat.st_size, stat.st_mtime_ns) != (file.size, file.mtime_ns):
                return None
        return content
    except (OSError, ValueError):
        return None


def _problems(files: Sequence[SourceFile], done: list[tuple[Unit, dict[str, Any]]]) -> list[Problem]:
    """The bad documents of units in the corpus's order, lines counted from the beginning of their file."""
    problems = []
    counted: dict[int, tuple[int, int]] = {}  # of each file: up to where, and the lines there
    for unit, content in done:
        for place, (number, span) in enumerate(unit):
            bad = [each for each in content["bad"] if each[0] == place]
            base = 0
            if bad and span and files[number].format == "jsonl":
                start, lines = counted.get(number, (0, 0))
                base = lines + _lines_that_begin(Path(files[number].url), start, span[0])
                counted[number] = span[0], base
            problems += [_problem(files[number], each, base) for each in bad]
    return problems


def _lines_that_begin(path: Path, start: int, stop: int) -> int:
    """How many lines of a file begin at its bytes start … stop - 1."""
    count = int(start == 0 < stop)
    with open_regular(path) as file:
        at = max(start - 1, 0)
        file.seek(at)
        while at < stop - 1 and (block := file.read(min(2**20, stop - 1 - at))):
            count += block.count(b"\n")
            at += len(block)
    return count
