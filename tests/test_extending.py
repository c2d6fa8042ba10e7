"""docs/extending.md: its code and its configurations, as they stand there, run and give what they say."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from tests.conftest import ENVIRONMENT, ROOT
from torchtitan_style.common.errors import UserError
from torchtitan_style.common.extensions import import_modules

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
SMALL = """
[training]
steps = 4
seq_len = 32
global_batch_size = 4
local_batch_size = -1
mixed_precision_param = "float32"
[validation]
enable = false
[generation]
enable = false
[metrics]
enable_tensorboard = false
"""


def code(module: str) -> str:
    """The block of the page that begins with the module's name."""
    [found] = re.findall(rf"```python\n# {module}\.py\n(.*?)```", PAGE, flags=re.S)
    assert len(found.splitlines()) < 60
    return found


def settings(module: str) -> dict[str, str]:
    """The sections of the TOML block that imports the module."""
    [block] = [block for block in re.findall(r"```toml\n(.*?)```", PAGE, flags=re.S) if f'["{module}"]\n[' in block]
    return dict(re.findall(r"\[(\w+)\]\n((?:[^\[\n].*\n)+)", block))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A working folder with a corpus."""
    rows = "".join(f"what is {n} plus {n}?,it is {2 * n}\n" for n in range(200))
    (tmp_path / "questions").mkdir()
    (tmp_path / "questions" / "sums.csv").write_text("question,answer\n" + rows)
    (tmp_path / "corpus.txt").write_text(rows)
    return tmp_path


def write(folder: Path, module: str) -> Path:
    """The module of the page, and its configuration with what makes it small."""
    (folder / f"{module}.py").write_text(code(module))
    sections = settings(module)
    text = "" if "data" in sections else '[data]\ndataset = "files"\npaths = ["corpus.txt"]\n'
    text += "" if "model" in sections else '[model]\nflavor = "debug"\n'
    text += "".join(f"[{name}]\n{keys}" for name, keys in sections.items() if name not in ("training",))
    text += SMALL.replace("[training]\n", "[training]\n" + sections.get("training", ""))
    (folder / "my.toml").write_text(text)
    return folder / "my.toml"


def figures(run: Path, key: str) -> list[float]:
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [record[key] for record in records if "loss" in record]


def trained(launch, folder: Path, name: str, *options: str, nproc: int = 1) -> Path:
    line = ["--config", "my.toml", "--job.dump_folder", folder / name, *options]
    done = launch(*line, nproc=nproc, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / name


TP = ("--parallelism.tensor_parallel_degree", "2")


def test_a_loss_is_the_same_in_every_layout(launch, folder: Path) -> None:
    write(folder, "my_loss")
    one = figures(trained(launch, folder, "one"), "loss")
    four = figures(trained(launch, folder, "four", *TP, nproc=4), "loss")
    assert four == pytest.approx(one, rel=1e-5)
    plain = figures(trained(launch, folder, "plain", "--training.loss", "cross_entropy"), "loss")
    assert one[0] == pytest.approx(plain[0] * (1 - torch.exp(torch.tensor(-plain[0])).item()), rel=1e-3)


def test_the_gradient_of_a_loss_is_that_of_its_definition(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.distributed as dist

    from torchtitan_style.config.layout import Layout
    from torchtitan_style.distributed import custom_loss
    from torchtitan_style.distributed.world import destroy_world, init_world

    world = init_world(Layout(), timeout_seconds=60)
    try:
        monkeypatch.setattr(custom_loss, "LOGITS_PER_CHUNK", 100)  # several chunks
        hidden, weight = torch.randn(2, 9, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
        labels = torch.randint(0, 30, (2, 9))
        labels[0, 3:] = -100

        def squared(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            return F.cross_entropy(logits, labels, reduction="none").square()

        chunked = custom_loss.custom_loss(squared, world.mesh["tp"].get_group())
        found = []
        for function in (chunked, custom_loss.plain_loss(squared)):
            loss, right = function(hidden, weight, labels)
            found.append((loss, right, *torch.autograd.grad(loss, (hidden, weight))))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        with torch.no_grad():
            expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten(), reduction="sum")
            assert chunked(hidden, weight, labels)[0].item() == pytest.approx(expected.item(), rel=1e-5)
    finally:
        assert dist.is_initialized()
        destroy_world()


def test_an_optimizer_resumes_on_another_layout(launch, folder: Path) -> None:
    write(folder, "my_optimizer")
    whole = figures(trained(launch, folder, "whole", "--lr_scheduler.total_steps", "4"), "loss")
    shorter = ("--training.steps", "2", "--lr_scheduler.total_steps", "4")
    run = trained(launch, folder, "parted", *shorter)
    dcp_to_torch_save(run / "checkpoint" / "step-2", folder / "all.pt")
    state = torch.load(folder / "all.pt")
    assert "optimizer.model.norm.weight.momentum" in state
    assert state["optimizer.model.norm.weight.momentum"].abs().sum() > 0
    trained(launch, folder, "parted", "--lr_scheduler.total_steps", "4", *TP, nproc=2)
    assert figures(run, "loss") == pytest.approx(whole, rel=1e-4)
    adamw = figures(trained(launch, folder, "adamw", "--optimizer.name", "adamw"), "loss")
    assert adamw[-1] != pytest.approx(whole[-1], rel=1e-4)


def test_a_schedule_decays_as_it_says(launch, folder: Path) -> None:
    write(folder, "my_schedule")
    run = trained(launch, folder, "run", "--lr_scheduler.warmup_steps", "0", "--optimizer.lr", "1e-3")
    assert figures(run, "lr") == pytest.approx([1e-3 * (1 - step / 5) ** 2 for step in range(1, 5)])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_source_gives_documents(launch, folder: Path, streaming: bool) -> None:
    write(folder, "my_source")
    options = ["--data.streaming", "true", "--data.num_workers", "1"] if streaming else []
    run = trained(launch, folder, "run", *options)
    again = trained(launch, folder, "again", *options, nproc=2)
    assert figures(run, "batch_hash") == figures(again, "batch_hash")
    texts = json.dumps(json.loads((run / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"])
    assert "plus" in texts


def test_a_model_family_trains_is_verified_and_writes(launch, python, folder: Path) -> None:
    write(folder, "my_model")
    one = trained(launch, folder, "one")
    four = trained(launch, folder, "four", *TP, nproc=4)
    assert figures(four, "loss") == pytest.approx(figures(one, "loss"), rel=1e-5)
    verify = ["verify", "--config", "my.toml", *TP, "--world-size", "2"]
    done = python("-m", "torchtitan_style", *verify, environment=ENVIRONMENT, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    generate = ["generate", "--checkpoint", "four", "--prompt", "what is", "--max-new-tokens", "4", "--seed", "0"]
    done = python("-m", "torchtitan_style", *generate, environment=ENVIRONMENT, cwd=folder)
    assert done.returncode == 2
    assert 'there is no model family "llama_style"' in done.stderr
    generate += ["--custom-import", "my_model"]
    done = python("-m", "torchtitan_style", *generate, environment=ENVIRONMENT, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("what is")


def test_a_loop_of_ones_own_leaves_a_run_that_goes_on(launch, run_ranks, folder: Path) -> None:
    (folder / "my_loop.py").write_text(code("my_loop"))
    corpus = f'[model]\nflavor = "debug"\n[data]\ndataset = "files"\npaths = ["{folder}/corpus.txt"]\n'
    (folder / "my.toml").write_text(corpus + SMALL)
    options = ["--lr_scheduler.total_steps", "4"]
    whole = figures(trained(launch, folder, "whole", *options), "batch_hash")
    run = folder / "run"
    run_ranks(
        folder / "my_loop.py", 2, folder / "my.toml", 2, "--job.dump_folder", run, "--training.steps", "2", *options
    )
    trained(launch, folder, "run", *options)
    assert figures(run, "batch_hash") == whole[2:]


MISTAKES = {
    "no_such_module": ("", r'there is no module "no_such_module" \(looked in'),
    "my_modul": ("x = 1\n", r"did you mean my_module\?"),
    "fails": ("import math\n\nmath.sqrt(-1)\n", r"fails\.py, line 3: ValueError: "),
    "no_python": ("def f(:\n", r"no_python\.py, line 1: "),
    "lacks": ("import not_installed_at_all\n", r"lacks\.py, line 1: ModuleNotFoundError: No module named 'not_inst"),
    "taken": ("from torchtitan_style import register_loss\nregister_loss('cross_entropy', print)\n", r"already"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_module_that_cannot_be_imported_is_one_message(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    content, message = MISTAKES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TORCHTITAN_STYLE_CUSTOM_IMPORT", raising=False)
    (tmp_path / "my_module.py").touch()
    if content and name != "my_modul":
        (tmp_path / f"{name}.py").write_text(content)
    with pytest.raises(UserError, match=message):
        import_modules([name])
