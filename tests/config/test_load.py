"""Mistakes in the configuration: all found at once, each with its place, before torch is imported."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from torchtitan_style.common.errors import UserError
from torchtitan_style.config import Config, to_toml
from torchtitan_style.launch.configure import load_config
from torchtitan_style.models.registry import model_config

ROOT = Path(__file__).parents[2]


def problems_of(folder: Path, toml: str, *overrides: str, world_size: int = 1) -> list[str]:
    """The lines of the one error that loading ``toml`` ends with, its path shown as FILE."""
    path = folder / "run.toml"
    path.write_text(toml, encoding="utf-8")
    with pytest.raises(UserError) as caught:
        load_config(path, overrides, world_size=world_size)
    first, *rest = str(caught.value).replace(str(path), "FILE").splitlines()
    if not rest:
        return [first]
    assert first == f"{len(rest)} problems in the configuration"
    return [line.strip() for line in rest]


def loaded(folder: Path, toml: str, *overrides: str, world_size: int = 1) -> Config:
    path = folder / "run.toml"
    path.write_text(toml, encoding="utf-8")
    return load_config(path, overrides, world_size=world_size)


# What is written, the key to be blamed, and what its line must say.
MISTAKES = {
    "unknown key": ("[training]\nstepz = 3", "training.stepz", ["unknown key", "mean training.steps?"]),
    "unknown section": ("[trainning]\nsteps = 3", "trainning", ["unknown section", "mean training?"]),
    "key without section": ("steps = 3", "steps", ["mean training.steps?"]),
    "key in wrong section": ("[training]\nlr = 0.1", "training.lr", ["unknown key", "mean optimizer.lr?"]),
    "right name in wrong section": ("[optimizer]\nsteps = 3", "optimizer.steps", ["mean training.steps?"]),
    "string for number": ('[optimizer]\nlr = "3e-4"', "optimizer.lr", ["a number", '"3e-4"']),
    "float for int": ("[training]\nsteps = 3.0", "training.steps", ["a whole number", "3.0"]),
    "bool for int": ("[training]\nsteps = true", "training.steps", ["a whole number"]),
    "int for bool": ("[compile]\nenable = 1", "compile.enable", ["true or false", "1"]),
    "int for string": ("[job]\ndescription = 3", "job.description", ["a string", "3"]),
    "string for list": ('[data]\npaths = "a.txt"', "data.paths", ["a list", '"a.txt"']),
    "entry of a list": ('[data]\npaths = ["a.txt", 3]', "data.paths", ["a string", "entry 2", "3"]),
    "value for section": ("training = 3", "training", ["a section of keys", "3"]),
    "too small": ("[training]\nsteps = 0", "training.steps", ["at least 1", "0"]),
    "too large": ("[lr_scheduler]\nmin_lr_factor = 1.5", "lr_scheduler.min_lr_factor", ["at most 1", "1.5"]),
    "on the open bound below": ("[optimizer]\nlr = 0.0", "optimizer.lr", ["greater than 0"]),
    "on the open bound above": ("[optimizer]\nbeta2 = 1.0", "optimizer.beta2", ["less than 1"]),
    "infinite": ("[optimizer]\nlr = inf", "optimizer.lr", ["finite"]),
    "not a number": ("[training]\nmax_norm = nan", "training.max_norm", ["greater than 0"]),
    "empty string": ('[job]\ndump_folder = ""', "job.dump_folder", ["empty"]),
    "bad literal": ('[lr_scheduler]\ndecay_type = "cosin"', "lr_scheduler.decay_type", ["linear", "mean cosine?"]),
    "bad flavor": ('[model]\nflavor = "huge"', "model.flavor", ["one of", "0.6B", '"huge"']),
    "heads in groups": ("[model]\nnum_attention_heads = 6", "model.num_attention_heads", ["6 query", "4 key/value"]),
    "odd head": ("[model]\nhead_dim = 31", "model.head_dim", ["even", "31"]),
    "no layers": ("[model]\nnum_hidden_layers = 0", "model.num_hidden_layers", ["at least 1"]),
    "certain dropout": ("[model]\ndropout = 1.0", "model.dropout", ["[0, 1)", "1.0"]),
    "row too long": ("[training]\nseq_len = 4096", "training.seq_len", ["4096", "max_position_embeddings = 2048"]),
    "vocabulary below bytes": ("[model]\nvocab_size = 200", "model.vocab_size", ["283", "200"]),
    "files without paths": ('[data]\ndataset = "files"', "data.paths", ["needs the files"]),
    "paths without files": ('[data]\npaths = ["a.txt"]', "data.dataset", ['dataset = "files"', '"stdlib"']),
    "nothing to validate on": ("[data]\nvalidation_fraction = 0.0", "data.validation_fraction", ["holds nothing out"]),
    "a field of no corpus": (
        '[data]\ndataset = "mixture"\ntext_key = "body"\nmixture = [{name = "a", weight = 1}]',
        "data.text_key",
        ["each corpus of a mixture"],
    ),
    "a number without end": ("[training]\nsteps = " + "9" * 5000, "not valid TOML", []),
    "no validation steps": ("[validation]\nsteps = 0", "validation.steps", ["-1 or at least 1"]),
    "both batches left open": ("[training]\nlocal_batch_size = -1", "training.global_batch_size", ["both be -1"]),
    "batch not divisible": ("[training]\nglobal_batch_size = 12", "training.global_batch_size", ["12 rows", "8 × 1"]),
    "no shards": (
        "[parallelism]\ndata_parallel_shard_degree = 0",
        "parallelism.data_parallel_shard_degree",
        ["-1 or at least 1"],
    ),
    "a memory budget for nobody": (
        '[activation_checkpoint]\nmode = "memory_budget"',
        "activation_checkpoint.mode",
        ["needs compile.enable = true"],
    ),
    "a memory budget above all": (
        "[activation_checkpoint]\nmemory_budget = 1.5",
        "activation_checkpoint.memory_budget",
        ["at most 1"],
    ),
    "resume past the end": ("[checkpoint]\nload_step = 2000", "checkpoint.load_step", ["2000", "1000 training steps"]),
    **{
        f"selective_ac_option {option}": (
            f'[activation_checkpoint]\nselective_ac_option = "{option}"',
            "activation_checkpoint.selective_ac_option",
            ['"op" or a number', f'"{option}"'],
        )
        for option in ("ops", "0", "-1", "1.5", "")
    },
}


@pytest.mark.parametrize(("toml", "key", "parts"), MISTAKES.values(), ids=MISTAKES)
def test_a_mistake_is_one_line_with_file_key_and_reason(tmp_path: Path, toml: str, key: str, parts: list[str]) -> None:
    [line] = problems_of(tmp_path, toml)
    assert line.startswith(f"FILE: {key}: ")
    for part in parts:
        assert part in line.removeprefix(f"FILE: {key}: ")


def test_all_mistakes_are_in_one_error(tmp_path: Path) -> None:
    toml = """
        [training]
        stepz = 3
        seq_len = 4096
        [optimizer]
        lr = "3e-4"
        [data]
        dataset = "files"
    """
    lines = problems_of(tmp_path, toml, "--optimizer.name", "sgd", "--metrics.log_freq=0", "steps")
    starts = [
        "FILE: training.stepz: unknown",
        "FILE: training.seq_len: 4096",
        "FILE: optimizer.lr: must be",
        "FILE: data.paths: ",
        "--optimizer.name: must be",
        "--metrics.log_freq: must be",
        "argument steps: expected",
    ]
    assert [sum(line.startswith(start) for line in lines) for start in starts] == [1] * len(starts)
    assert len(lines) == len(starts)


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (["--training.stepz", "3"], "--training.stepz: unknown key; did you mean training.steps?"),
        (["--trainin.steps", "3"], "--trainin.steps: unknown section; did you mean training?"),
        (["--training.steps", "3.5"], "--training.steps: must be a whole number, not 3.5"),
        (["--training.steps=many"], '--training.steps: must be a whole number, not "many"'),
        (["--compile.enable", "maybe"], '--compile.enable: must be true or false, not "maybe"'),
        (["--model.flavor", "smal"], "--model.flavor: must be one of"),
        (["--model.num_attention_heads", "6"], "--model.num_attention_heads: 6 query heads"),
        (["--training.steps"], "--training.steps: needs a value"),
        (["--compile.enabel"], "--compile.enabel: unknown key; did you mean compile.enable?"),
        (["--steps", "3"], "argument --steps: expected --section.key VALUE; did you mean training.steps?"),
        (["-training.steps", "3"], "argument -training.steps: expected --section.key VALUE"),
        (["training.toml"], "argument training.toml: expected --section.key VALUE"),
        (["--training.steps", "3", "4"], "argument 4: expected --section.key VALUE"),
    ],
)
def test_a_mistake_on_the_command_line_names_its_argument(tmp_path: Path, overrides: list[str], start: str) -> None:
    [line] = problems_of(tmp_path, "", *overrides)
    assert line.startswith(start)


def test_a_contradiction_between_file_and_command_line_names_both(tmp_path: Path) -> None:
    toml = "[parallelism]\ntensor_parallel_degree = 2"
    [line] = problems_of(tmp_path, toml, "--model.intermediate_size", "333", world_size=2)
    assert line.startswith("FILE: parallelism.tensor_parallel_degree (with --model.intermediate_size): ")


@pytest.mark.parametrize(
    ("moved", "here"),
    [
        ("[training]\nbatch_size = 4", "training.local_batch_size"),
        ("[training]\ncompile = true", "compile.enable"),
        ("[training]\nwarmup_steps = 4", "lr_scheduler.warmup_steps"),
        ("[training]\ntensor_parallel_degree = 1", "parallelism.tensor_parallel_degree"),
        ('[training]\ndataset = "c4"', "data.dataset"),
        ('[model]\ntokenizer_path = "t"', "data.tokenizer"),
        ("[checkpoint]\nenable_checkpoint = true", "checkpoint.enable"),
    ],
)
def test_keys_that_torchtitan_has_elsewhere_are_pointed_to(tmp_path: Path, moved: str, here: str) -> None:
    [line] = problems_of(tmp_path, moved)
    assert line.endswith(f"unknown key; here it is {here}")


def test_bad_toml_names_the_line(tmp_path: Path) -> None:
    [line] = problems_of(tmp_path, "[training]\nsteps = 3\nseq_len = = 4\n")
    assert line.startswith("FILE: not valid TOML: ")
    assert "line 3" in line


def test_a_missing_file_suggests_one_that_is_there(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").touch()
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "mime.toml")
    assert str(caught.value).startswith(f"{tmp_path}/mime.toml: there is no such config file")
    assert f"did you mean {tmp_path}/mine.toml?" in str(caught.value)


def test_a_suggested_file_is_one_that_can_be_opened(tmp_path: Path) -> None:
    # Only its name is like that of a file in train_configs, its folder is not.
    with pytest.raises(UserError) as caught:
        load_config(tmp_path / "far" / "away" / "from" / "it" / "qwen3_.toml")
    assert Path(str(caught.value).partition("did you mean ")[2].removesuffix("?")).is_file()


@pytest.mark.parametrize(
    ("content", "why"),
    [(None, "it is a folder, not a regular file"), (b"\xff\xfe[training]", "it is not UTF-8 text")],
    ids=["folder", "not UTF-8"],
)
def test_what_cannot_be_read_is_a_user_error(tmp_path: Path, content: bytes | None, why: str) -> None:
    path = tmp_path / "run.toml"
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=rf"run\.toml: cannot be read: {why}$"):
        load_config(path)


def test_heads_that_tensor_parallel_ranks_cannot_share(tmp_path: Path) -> None:
    lines = problems_of(tmp_path, "[parallelism]\ntensor_parallel_degree = 3", world_size=3)
    assert all(line.startswith("FILE: parallelism.tensor_parallel_degree: 3 ranks cannot share") for line in lines)
    # The flavor "small": 8 and 4 heads, 8192 tokens; 512 positions. Its 768 MLP rows are shared evenly.
    assert [sum(f" {n} " in line for line in lines) for n in (8, 4, 8192, 512, 768)] == [1, 1, 1, 1, 0]


@pytest.mark.parametrize(("shard", "fitting"), [(2, 4), (-1, 2)])
def test_a_world_size_that_does_not_fit_says_how_many_to_start(tmp_path: Path, shard: int, fitting: int) -> None:
    toml = f"[parallelism]\ntensor_parallel_degree = 2\ndata_parallel_shard_degree = {shard}"
    [line] = problems_of(tmp_path, toml, world_size=3)
    assert "3 processes" in line
    assert f"NPROC={fitting}" in line
    assert loaded(tmp_path, toml, world_size=fitting)


def test_a_memory_budget_of_tensor_parallel_blocks_is_refused(tmp_path: Path) -> None:
    toml = "[compile]\nenable = true\n[activation_checkpoint]\nmode = 'memory_budget'"
    assert loaded(tmp_path, toml)
    [line] = problems_of(tmp_path, toml, "--parallelism.tensor_parallel_degree=2", world_size=2)
    assert line.startswith("FILE: activation_checkpoint.mode (with --parallelism.tensor_parallel_degree): ")


def test_rows_that_cannot_be_shared_out_say_how_long_they_may_be(tmp_path: Path) -> None:
    toml = "[parallelism]\ncontext_parallel_degree = 2\ntensor_parallel_degree = 2\n[training]\nseq_len = 500"
    [line] = problems_of(tmp_path, toml, world_size=4)
    assert line.startswith("FILE: training.seq_len: a row of 500 positions cannot be split evenly over")
    assert "a multiple of 2 × 2 × 2 = 8, as 496 or 504" in line
    assert loaded(tmp_path, toml, "--training.seq_len=504", world_size=4)
    [line] = problems_of(tmp_path, toml, "--training.seq_len=3", world_size=4)
    assert "= 8, as 8" in line


def test_what_does_not_go_with_context_parallelism_is_refused(tmp_path: Path) -> None:
    toml = "[parallelism]\ncontext_parallel_degree = 2"
    [line] = problems_of(tmp_path, toml, world_size=3)
    assert "context_parallel_degree 2" in line
    assert "NPROC=2" in line
    budget = "[compile]\nenable = true\n[activation_checkpoint]\nmode = 'memory_budget'\n"
    [line] = problems_of(tmp_path, budget + toml, world_size=2)
    assert line.startswith("FILE: activation_checkpoint.mode: ")


@pytest.mark.parametrize(
    ("model", "key", "says"),
    [
        ("rope_type = 'linear'", "rope_type", 'must be "default" or "yarn", not "linear"'),
        ("rope_type = 'yarn'", "original_max_position_embeddings", 'rope_type = "yarn" needs'),
        ("rope_factor = 4.0", "rope_factor", 'is only read with rope_type = "yarn"'),
        ("original_max_position_embeddings = 512", "original_max_position_embeddings", "is only read with"),
        ("rope_type = 'yarn'\noriginal_max_position_embeddings = 512\nrope_factor = 0.5", "rope_factor", "at least 1"),
        (
            "rope_type = 'yarn'\noriginal_max_position_embeddings = 512\nrope_beta_slow = 64.0",
            "rope_beta_fast",
            "greater than rope_beta_slow",
        ),
    ],
)
def test_a_rotary_embedding_that_is_not_possible(tmp_path: Path, model: str, key: str, says: str) -> None:
    [line] = problems_of(tmp_path, f"[model]\n{model}")
    assert line.startswith(f"FILE: model.{key}")
    assert says in line


@pytest.mark.parametrize(
    ("toml", "key", "world_size"),
    [
        # The default that stands in for a wrong value must not be blamed for anything.
        ('[parallelism]\ntensor_parallel_degree = "3"\ndata_parallel_shard_degree = 1', "tensor_parallel_degree", 3),
        ('[training]\nlocal_batch_size = "4"\nglobal_batch_size = 12', "local_batch_size", 1),
        ('[model]\nflavor = "8b"\n[training]\nseq_len = 8192', "flavor", 1),
        ("training = 3\n[model]\nmax_position_embeddings = 100", "training", 1),
        # A value that is impossible by itself need not be compared with others.
        ("[parallelism]\ntensor_parallel_degree = 0", "tensor_parallel_degree", 1),
        ("[model]\nnum_attention_heads = 0", "num_attention_heads", 1),
        ("[model]\nmax_position_embeddings = 0", "max_position_embeddings", 1),
        ("[training]\nlocal_batch_size = 0\nglobal_batch_size = 12", "local_batch_size", 1),
    ],
)
def test_what_follows_from_another_problem_is_not_reported(
    tmp_path: Path, toml: str, key: str, world_size: int
) -> None:
    [line] = problems_of(tmp_path, toml, world_size=world_size)
    assert f"{key}: must be" in line


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["--training.steps", "7"], 7),
        (["--training.steps=7"], 7),
        (["--training.steps", "6", "--training.steps", "7"], 7),
        (["--training.local_batch_size", "-1", "--training.global_batch_size", "4"], -1),
        (["--compile.enable"], True),
        (["--compile.enable", "--job.description", "a"], True),
        (["--compile.enable", "True"], True),
        (["--validation.enable=False"], False),
        (["--validation.enable", "false"], False),
        (["--optimizer.lr", "1e-3"], 1e-3),
        (["--optimizer.lr", "1.e-3"], 1e-3),
        (["--optimizer.lr", ".001"], 1e-3),
        (["--optimizer.lr", "1"], 1.0),
        (["--training.max_norm", "inf"], float("inf")),
        (["--lr_scheduler.decay_ratio", "0.5"], 0.5),
        (["--job.description", "2024"], "2024"),
        (["--job.description=true"], "true"),
        (["--job.description=a = b"], "a = b"),
        (["--job.description="], ""),
        (["--generation.prompt", "-1"], "-1"),
        (["--activation_checkpoint.selective_ac_option", "2"], "2"),
        (["--data.paths", "a.txt", "b/*.txt", "--data.dataset", "files"], ["a.txt", "b/*.txt"]),
        (["--data.paths=a.txt", "--data.dataset=files"], ["a.txt"]),
        (["--data.paths", '["a.txt", "b.txt"]', "--data.dataset", "files"], ["a.txt", "b.txt"]),
        (["--data.paths", "2024", "--data.dataset", "files"], ["2024"]),
        (["--data.paths", "[ab]*.txt", "--data.dataset", "files"], ["[ab]*.txt"]),
        (["--data.paths", "2024", "2025", "--data.dataset", "files"], ["2024", "2025"]),
    ],
    ids=str,
)
def test_overrides(tmp_path: Path, overrides: list[str], expected: object) -> None:
    toml = "[training]\nsteps = 5\n[job]\ndescription = 'from the file'"
    section, _, key = overrides[0].removeprefix("--").partition("=")[0].partition(".")
    value = getattr(getattr(loaded(tmp_path, toml, *overrides), section), key)
    assert value == expected
    assert type(value) is type(expected)  # True == 1


def test_what_follows_a_list_is_not_dropped(tmp_path: Path) -> None:
    with contextlib.suppress(UserError):  # it may be refused or read, as long as it is not silently left out
        config = loaded(tmp_path, '[data]\ndataset = "files"', "--data.paths", '["a.txt"]', "b.txt")
        assert "b.txt" in config.data.paths


def test_dimensions_override_the_flavor(tmp_path: Path) -> None:
    toml = '[model]\nflavor = "debug"\nnum_hidden_layers = 5\ndropout = 0.25'
    shape = model_config(loaded(tmp_path, toml, "--model.rope_theta", "5e5").model)
    assert (shape.num_hidden_layers, shape.dropout, shape.rope_theta) == (5, 0.25, 5e5)
    assert shape.hidden_size == 64  # the flavor's own


def test_written_configuration_loads_as_itself(tmp_path: Path) -> None:
    toml = r"""
        [job]
        description = "quotes \" and ' , \\ and\nlines, 日本語 🙂"
        [model]
        flavor = "debug"
        num_hidden_layers = 3
        [data]
        dataset = "files"
        paths = ["a b.txt", "c\"d.txt"]
        [training]
        max_norm = inf
        [optimizer]
        eps = 1e-30
        [lr_scheduler]
        decay_ratio = 0.1
    """
    config = loaded(tmp_path, toml)
    assert config.training.max_norm == float("inf")
    assert loaded(tmp_path, to_toml(config)) == config


@pytest.mark.parametrize("path", sorted((ROOT / "train_configs").glob("*.toml")), ids=lambda p: p.name)
def test_shipped_configurations_load(path: Path) -> None:
    refused = []
    # Without a network: weights of the Hub bring dimensions along, which those of their flavor stand in for.
    offline = ["--model.hf_assets_path", ""]
    for world_size in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        try:
            config = load_config(path, offline, world_size=world_size)
        except UserError as error:
            refused.append(str(error))
            continue
        if weights := re.search(r'hf_assets_path = "Qwen/Qwen3-(.+?)"', path.read_text()):
            assert config.model.flavor == weights[1]
        return
    pytest.fail("\n".join(refused))


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torchtitan_style", *arguments],
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_a_typo_costs_no_import_and_no_traceback(tmp_path: Path) -> None:
    for heavy in ("torch", "transformers", "pyarrow", "numpy"):
        (tmp_path / f"{heavy}.py").write_text("raise RuntimeError('imported for nothing')")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = run("train", "--training.stepz", "3", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: --training.stepz: unknown key; did you mean training.steps?\n"
    # Processor time, since other jobs may hold up the clock. 0.2 s where this was written; torch alone takes over 1.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 2


def test_the_version_is_that_of_the_package() -> None:
    assert run("--version").stdout == f"torchtitan_style {metadata.version('torchtitan_style')}\n"


@pytest.mark.parametrize("command", [(), ("train",)], ids=["program", "train"])
def test_help_is_about_everything_or_a_section_or_suggests_one(command: tuple[str, ...]) -> None:
    done = run(*command, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("usage: python -m torchtitan_style")

    done = run(*command, "--help", "training")
    assert (done.returncode, done.stderr) == (0, "")
    for key, field in type(Config().training).model_fields.items():
        assert f"training.{key} = " in done.stdout
        assert " ".join(field.description.split()) in " ".join(done.stdout.split())

    done = run(*command, "--help", "trainig")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: --help trainig: there is no such section; did you mean training?\n"
    assert "the sections are job, model" in run(*command, "--help", "nosuch").stderr


def test_an_unknown_command_is_named() -> None:
    done = run("trian")
    assert done.returncode == 2
    assert done.stderr.startswith('error: there is no command "trian"; did you mean train?')


@pytest.mark.parametrize("nproc", ["two", "0", "-1", "1.5"])
def test_a_number_of_processes_that_is_none(launch, nproc: str) -> None:
    done = launch("--training.steps", "1", nproc=nproc)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f'error: NPROC: must be a whole number of at least 1, not "{nproc}"\n'


def test_a_mistake_is_told_before_any_rank_starts(launch, tmp_path: Path) -> None:
    done = launch("--job.dump_folder", tmp_path / "run", "--parallelism.tensor_parallel_degree", "2", nproc=3)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: --parallelism.tensor_parallel_degree: ")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("overrides", "prompt"),
    [
        ([], "def"),
        (["--data.dataset", "files", "--data.paths", "*.md"], ""),
        (["--data.dataset", "files", "--data.paths", "*.md", "--generation.prompt", "x"], "x"),
        (["--generation.prompt", ""], ""),
    ],
)
def test_samples_start_as_code_only_where_the_corpus_is_code(overrides: list[str], prompt: str) -> None:
    config = load_config(Path("train_configs/qwen3.toml"), overrides, world_size=1)
    assert config.sample_prompt == prompt
    assert "Python" not in config.job.description
