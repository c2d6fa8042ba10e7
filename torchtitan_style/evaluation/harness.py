"""Tasks of the lm-evaluation-harness on a model of ours, through the harness's own interface for models.

What a request means (which token is before the first, what is cut off on the left, where text ends) is as in the
harness's own class for models of Transformers, so that both give the same figures.
"""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from lm_eval import simple_evaluate
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.tasks import TaskManager
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from torchtitan_style.common.errors import UserError
from torchtitan_style.distributed.world import World
from torchtitan_style.inference.cache import KVCache
from torchtitan_style.inference.generate import TextModel

from .score import score, sums_of_hidden
from .windows import IGNORE, Window, batches

_NEW_TOKENS = 256
"""The harness's own number where a task names none."""


def run_tasks(
    model: TextModel,
    tasks: Sequence[str],
    *,
    include_path: str | None,
    world: World | None,
    max_length: int,
    batch_size: int,
    chat_template: bool,
    num_fewshot: int | None,
    limit: float | None,
) -> dict[str, Any] | None:
    """What the harness's ``simple_evaluate`` returns; None on all ranks but the main one.

    include_path: a folder with tasks of one's own. max_length: of a request, in tokens. chat_template: whether requests
    are rendered as a conversation. num_fewshot: examples before each question, None: as the task has it. limit:
    questions of each task, or the share of them if below 1.

    Raises UserError for a task that there is not, or whose data cannot be reached.
    """
    manager = TaskManager(include_path=include_path)
    for name in tasks:
        if not manager.match_tasks([name]):
            near = difflib.get_close_matches(name, manager.all_tasks, n=1)
            hint = f"did you mean {near[0]}?" if near else "--include-path names a folder with tasks of your own"
            raise UserError(f'--tasks: the harness has no task "{name}"; {hint}')
    adapter = HarnessModel(model, world=world, max_length=max_length, batch_size=batch_size)
    try:
        found: dict[str, Any] | None = simple_evaluate(
            model=adapter,
            tasks=manager.match_tasks(list(tasks)),
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=chat_template,
            task_manager=manager,
            log_samples=False,
        )
    except OSError as error:  # what datasets and huggingface_hub raise, no network and no such data set included
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"--tasks {' '.join(tasks)}: the data cannot be loaded: {reason}") from None
    return found


class HarnessModel(TemplateLM):
    """Every rank has one; the harness deals its requests to the data-parallel ranks."""

    def __init__(self, model: TextModel, *, world: World | None, max_length: int, batch_size: int) -> None:
        super().__init__()
        self.model, self.world, self.max_length, self.batch_size = model, world, max_length, batch_size
        self._rank = 0 if world is None else world.dp_rank
        self._world_size = 1 if world is None else world.layout.dp
        self._device = model.device
        self._tokenizer: Any = None

    def _batches(self, windows: Sequence[Window[int]]) -> Iterator[list[Window[int]]]:
        """At most ``batch_size`` rows each, the longest first."""
        longest = max((len(window.inputs) for window in windows), default=1)
        return batches(windows, tokens=self.batch_size * longest)

    # Tokens

    @property
    def tokenizer(self) -> Any:
        """Transformers', for what the harness asks of one: the chat template."""
        if self._tokenizer is None:
            import transformers

            self._tokenizer = transformers.AutoTokenizer.from_pretrained(self.model.assets)
        return self._tokenizer

    @property
    def eot_token_id(self) -> int:
        end = self.model.tokenizer.special_id("eos_token")
        return self.model.tokenizer.end_of_text if end is None else end

    @property
    def prefix_token_id(self) -> int:
        begin = self.model.tokenizer.special_id("bos_token")
        return self.eot_token_id if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        return str(self.model.assets).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        return self.model.tokenizer.encode(string)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    # Requests

    def _loglikelihood_tokens(
        self, requests: list[Any], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether it is what greedy decoding gives.

        requests: (what it was, ids before, ids of the continuation). Answers to the same question are scored together:
        the question is computed once.
        """
        found: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        bar = tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm or self.rank > 0)
        asked: dict[tuple[int, ...], list[int]] = {}
        windows = []
        for number, (_, before, after) in enumerate(requests):
            if len(before) + len(after) <= self.max_length + 1:
                asked.setdefault(tuple(before), []).append(number)
            else:
                ids = (before + after)[-(self.max_length + 1) :]
                windows.append(Window(ids[:-1], ids[1:], max(len(ids) - 1 - len(after), 0), number))
        for before, numbers in list(asked.items()):
            if len(numbers) == 1:
                del asked[before]
                (number,) = numbers
                ids = [*before, *requests[number][2]]
                windows.append(Window(ids[:-1], ids[1:], len(before) - 1, number))
        for window, loss, right in score(self.model.model, self._batches(windows), device=self.model.device):
            found[window.source] = -loss, right == len(window.inputs) - window.context
            bar.update()
        for questions in _questions(asked, self.batch_size):
            answers = [[requests[number][2] for number in numbers] for _, numbers in questions]
            scored = self._answers([before for before, _ in questions], answers)
            numbers = [number for _, numbers in questions for number in numbers]
            for number, answer in zip(numbers, scored, strict=True):
                found[number] = answer
            bar.update(len(numbers))
        bar.close()
        for (request, _, _), answer in zip(requests, found, strict=True):
            if request is not None:
                self.cache_hook.add_partial("loglikelihood", request, answer)
        return found

    @torch.inference_mode()
    def _answers(
        self, questions: Sequence[Sequence[int]], answers: Sequence[Sequence[Sequence[int]]]
    ) -> Iterator[tuple[float, bool]]:
        """Log-probability of each answer to each question, and whether it is the likeliest text.

        Questions go into a cache, padded on the left, and each of its rows is continued by every answer.
        """
        model, device = self.model.model, self.model.device
        longest = max(map(len, questions))
        padding = [longest - len(question) for question in questions]
        ids = torch.tensor([[0] * pad + list(q) for pad, q in zip(padding, questions, strict=True)], device=device)
        flat = [answer for of_question in answers for answer in of_question]
        most = max(map(len, flat))
        cache = KVCache(model.config.windows, padding=padding, capacity=longest + most)
        hidden = model.model(ids, positions=cache.positions(ids), cache=cache)[:, -1:]  # [Q, 1, C]
        cache.advance(longest)
        rows = [i for i, of_question in enumerate(answers) for _ in of_question]
        hidden = hidden[rows]  # [A, 1, C]: they predict the first token of each answer
        if most > 1:
            cache.select(rows)
            given = torch.tensor([[*answer[:-1], *[0] * (most - len(answer))] for answer in flat], device=device)
            later = model.model(given, positions=cache.positions(given), cache=cache)
            hidden = torch.cat((hidden, later), dim=1)  # [A, most, C]
        labels = torch.tensor([[*answer, *[IGNORE] * (most - len(answer))] for answer in flat], device=device)
        losses, right = sums_of_hidden(model, hidden, labels)
        for answer, loss, count in zip(flat, losses.tolist(), right.tolist(), strict=True):
            yield -loss, count == len(answer)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text, in windows of ``max_length`` that do not overlap."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            (text,) = request.args
            rolling = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for before, after in map(make_disjoint_window, rolling):
                windows.append((None, before, after))
                owners.append(number)
        totals = [0.0] * len(requests)
        for number, (log_prob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[number] += log_prob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each prompt, up to a stop string or the end-of-text token."""
        texts = [""] * len(requests)
        bar = tqdm(total=len(requests), desc="generate_until", disable=disable_tqdm or self.rank > 0)
        # Longest first; requests with the same options together.
        order = sorted(range(len(requests)), key=lambda i: (str(requests[i].args[1]), -len(requests[i].args[0])))
        for _, group in itertools.groupby(order, key=lambda i: str(requests[i].args[1])):
            for batch in _batched(list(group), self.batch_size):
                options = normalize_gen_kwargs(requests[batch[0]].args[1], _NEW_TOKENS)
                prompts = [requests[number].args[0] for number in batch]
                for number, text in zip(batch, self._continue(prompts, options), strict=True):
                    texts[number] = text
                    self.cache_hook.add_partial("generate_until", requests[number].args, text)
                bar.update(len(batch))
        bar.close()
        return texts

    def _continue(self, prompts: list[str], options: Any) -> list[str]:
        most = options["max_gen_toks"]
        room = self.max_length - most
        if room < 1:
            raise UserError(f"a task asks for {most:,} new tokens, and --seq-len is {self.max_length:,}")
        sampling = {name: options[name] for name in ("temperature", "top_k", "top_p", "min_p") if name in options}
        if not options.get("do_sample"):
            sampling = {"temperature": 0.0}
        texts = [""] * len(prompts)
        for piece in self.model.continue_ids(
            [self.tok_encode(prompt)[-room:] for prompt in prompts],
            sampling=self.model.settings(**sampling),
            max_new_tokens=most,
            stop=[stop for stop in options["until"] if stop],
            stop_tokens={self.eot_token_id},
        ):
            texts[piece.row] += piece.text
        return texts

    # Ranks

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        if self.world is None:
            return tensor
        parts = [torch.empty_like(tensor).reshape(1) for _ in range(self._world_size)]
        dist.all_gather(parts, tensor.reshape(1), group=self.world.dp_group)
        return torch.cat(parts)

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        if self.world is None:
            return [obj]
        parts: list[Any] = [None] * self._world_size
        dist.all_gather_object(parts, obj, group=self.world.dp_group)
        return parts if self.rank == dst else None

    def barrier(self) -> None:
        if self.world is not None:
            dist.barrier(group=self.world.dp_group)


def _questions(
    asked: dict[tuple[int, ...], list[int]], answers: int
) -> Iterator[list[tuple[tuple[int, ...], list[int]]]]:
    """Questions with the numbers of their answers, of similar length together, with at most so many answers."""
    together: list[tuple[tuple[int, ...], list[int]]] = []
    for question in sorted(asked.items(), key=lambda item: -len(item[0])):
        if together and sum(len(numbers) for _, numbers in [*together, question]) > answers:
            yield together
            together = []
        together.append(question)
    if together:
        yield together


def _batched(numbers: list[int], size: int) -> Iterator[list[int]]:
    return (numbers[begin : begin + size] for begin in range(0, len(numbers), size))
