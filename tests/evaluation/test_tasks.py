"""``eval --tasks`` against the harness's own model class for Transformers, on the same folder, in fp32.

Log-probabilities agree to 1e-5 (sums over a few tokens of fp32 logits, added in another order), so the figures of
tasks, which compare them or count matches, are the same.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tiny_hf import hf_model, write_tokenizer

from torchtitan_style.__main__ import main

lm_eval = pytest.importorskip("lm_eval", reason="needs the lm-evaluation-harness, of the eval extra")

WORDS = ["loss", "gradient", "token", "weight", "don't", "return 1234", "the", "naïve 学习"]
ROWS = [
    {
        "question": f"def {WORDS[i % 8]}(x): the {WORDS[(3 * i + 1) % 8]} of",
        "choices": [WORDS[(i + k * k) % 8] for k in range(3)],
        "answer": i % 3,
        "text": f"the {WORDS[i % 8]} and its {WORDS[(i + 5) % 8]}\n" * (1 + 9 * (i % 4)),
        "target": "x",
    }
    for i in range(12)
]
COMMON = "dataset_path: json\ndataset_kwargs:\n  data_files: {data}\ntest_split: train\n"
TASKS = {
    "local_choice": "output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}'\n"
    "doc_to_choice: '{{{{choices}}}}'\ndoc_to_target: answer\n"
    "metric_list: [{{metric: acc}}, {{metric: acc_norm}}]\nnum_fewshot: 1\nfewshot_split: train\n",
    "local_letter": "output_type: multiple_choice\ndoc_to_text: '{{{{question}}}}\nAnswer:'\n"
    "doc_to_choice: [x, y, z]\ndoc_to_target: answer\ntarget_delimiter: ''\nmetric_list: [{{metric: acc}}]\n",
    "local_text": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{{{text}}}}'\n"
    "metric_list: [{{metric: word_perplexity}}, {{metric: byte_perplexity}}, {{metric: bits_per_byte}}]\n",
    "local_generation": "output_type: generate_until\ndoc_to_text: '{{{{question}}}}'\ndoc_to_target: target\n"
    "generation_kwargs: {{until: ['\\n', 'th'], max_gen_toks: 12, do_sample: false}}\n"
    "metric_list: [{{metric: bleu}}, {{metric: chrf}}]\n",
}
ARGUMENTS = ["--dtype", "float32", "--device", "cpu", "--batch-size", "5"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hf") / "model"
    hf_model(max_position_embeddings=128).save_pretrained(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tasks = tmp_path_factory.mktemp("tasks")
    data = tasks / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    for name, text in TASKS.items():
        (tasks / f"{name}.yaml").write_text(f"task: {name}\n" + (COMMON + text).format(data=data), encoding="utf-8")
    return tasks


def theirs(folder: Path) -> Any:
    pytest.importorskip("accelerate", reason="needs accelerate, which the harness's own models need")
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder), dtype="float32", device="cpu", batch_size=4)


def ours(folder: Path) -> Any:
    from torchtitan_style import load_model
    from torchtitan_style.evaluation.harness import HarnessModel

    model = load_model(folder, dtype="float32", device="cpu")
    return HarnessModel(model, world=None, max_length=128, batch_size=3)


def test_figures_are_those_of_the_harness(folder: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from lm_eval.tasks import TaskManager

    main(["eval", "--checkpoint", str(folder), *ARGUMENTS, "--include-path", str(tasks), "--json", "--tasks", *TASKS])
    found = json.loads(capsys.readouterr().out)["results"]
    expected = lm_eval.simple_evaluate(
        model=theirs(folder), tasks=list(TASKS), task_manager=TaskManager(include_path=str(tasks)), log_samples=False
    )["results"]
    assert found.keys() == expected.keys() == TASKS.keys()
    for name, figures in expected.items():
        for key, value in figures.items():
            assert found[name][key] == (pytest.approx(value, rel=1e-5) if isinstance(value, float) else value), key


def test_answers_are_those_of_transformers(folder: Path) -> None:
    from lm_eval.api.instance import Instance

    def ask(kind: str, *arguments: tuple[Any, ...]) -> list[Any]:
        return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]

    mine, reference = ours(folder), theirs(folder)
    pairs = [
        ("the loss of ", "x"), ("", "the token"), ("def loss(x):", " return 1234"),
        ("the token " * 60, "and its weight"),
        ("the loss", " of"), ("the loss", " x"),
        # Answers to one question, long and short, and questions of several lengths beside each other.
        ("def f(x):", " return 1"), ("def f(x):", " return 1234 and the token"), ("def f(x):", " the"),
        ("naïve 学习 is the weight", " of a loss"), ("naïve 学习 is the weight", "s"), ("a", "b c d"), ("a", "b"),
        ("the token " * 55, " and its weight"), ("the token " * 55, " and"),
    ]  # fmt: skip
    requests = ask("loglikelihood", *pairs)
    for found, expected in zip(mine.loglikelihood(requests), reference.loglikelihood(requests), strict=True):
        assert found[0] == pytest.approx(expected[0], abs=1e-5, rel=1e-5)
        assert found[1] == expected[1]
    requests = ask("loglikelihood_rolling", ("the token " * 100,), ("x",))
    assert mine.loglikelihood_rolling(requests) == pytest.approx(reference.loglikelihood_rolling(requests), rel=1e-5)
    options = {"until": ["\n"], "max_gen_toks": 20, "do_sample": False}
    requests = ask("generate_until", *((prompt, options) for prompt in ("def", "the token " * 80, "naïve")))
    assert mine.generate_until(requests) == reference.generate_until(requests)
    greedy = mine.generate_until(requests)[0]
    [(_, is_greedy)] = mine.loglikelihood(ask("loglikelihood", ("def", greedy)))
    assert is_greedy or not greedy.isascii()  # text that is cut within a character cannot be tokenized back


def test_the_table_is_the_harness_s_own(folder: Path, tasks: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["eval", "--checkpoint", str(folder), *ARGUMENTS, "--include-path", str(tasks), "--limit", "3"]
    main([*line, "--chat-template", "--tasks", "local_letter"])
    lines = capsys.readouterr().out.strip().splitlines()
    assert lines[0].split("|")[1].strip() == "Tasks"
    assert lines[-1].split("|")[1].strip() == "local_letter"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--tasks", "local_lettre"], '--tasks: the harness has no task "local_lettre"; did you mean local_letter?'),
        (["--tasks", "local_letter", "--data", "x.txt"], "--data and --tasks: give one of them"),
        (["--tasks", "local_letter", "--stride", "4"], "--stride: goes with --data only"),
        (["--tasks", "local_letter", "--limit", "0"], "--limit: must be above 0"),
        (["--tasks", "local_letter", "--seq-len", "1000"], "--seq-len: 1,000 is more than the 128 positions"),
    ],
)
def test_mistakes(
    folder: Path, tasks: Path, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit:
        main(["eval", "--checkpoint", str(folder), *ARGUMENTS, "--include-path", str(tasks), *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_data_that_cannot_be_reached(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = COMMON.format(data=tmp_path / "nowhere.jsonl") + TASKS["local_letter"].format()
    (tmp_path / "lost.yaml").write_text("task: local_lost\n" + text, encoding="utf-8")
    with pytest.raises(SystemExit) as exit:
        main(["eval", "--checkpoint", str(folder), "--include-path", str(tmp_path), "--tasks", "local_lost"])
    assert exit.value.code == 2
    assert "--tasks local_lost: the data cannot be loaded: " in capsys.readouterr().err
