"""The source of tensor_parallelism.ipynb; see make.py."""

# %% [markdown]
# # Tensor parallelism on your laptop
#
# Two processes share a model: each has half of the heads, of the MLP's features, of the vocabulary and, between
# blocks, of the positions. No GPU is needed; the processes talk over gloo. `docs/learn/tensor_parallel.md` explains
# what we see here.
#
# A notebook is one process. `two_ranks` writes a function to a file, and starts it twice with torchrun.

# %%
import inspect
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def two_ranks(function):
    """Run ``function``, which imports what it needs, as two ranks, and show what they print."""
    file = Path(tempfile.mkdtemp()) / "ranks.py"
    file.write_text(f"{inspect.getsource(function)}\n{function.__name__}()\n")
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(file)]
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout, end="")
    assert done.returncode == 0, done.stderr
    return done.stdout


# %% [markdown]
# ## 1. Two ranks
#
# `init_world` joins the process group and lays the mesh. Both ranks are on the tp axis.


# %%
def who():
    import torch.distributed as dist

    from torchtitan_style.config.layout import Layout
    from torchtitan_style.distributed.world import destroy_world, init_world

    world = init_world(Layout(tp=2), timeout_seconds=60)
    for rank in range(2):  # one after the other
        if rank == world.rank:
            print(f"rank {rank}: tp coordinate {world.mesh['tp'].get_local_rank()} of {world.mesh}", flush=True)
        dist.barrier()
    destroy_world()


output = two_ranks(who)
assert "rank 1: tp coordinate 1" in output

# %% [markdown]
# ## 2. A product in two halves
#
# Two matrices with something elementwise in between, as in an MLP. The first is split by columns, the second by rows.
# Each rank ends with a summand of the output; one all-reduce adds them.


# %%
def halves():
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    generator = torch.Generator().manual_seed(0)  # the same numbers on both ranks
    x, up, down = (torch.randn(size, generator=generator) for size in [(4, 8), (8, 20), (20, 8)])
    mine = slice(10 * rank, 10 * rank + 10)
    summand = (x @ up[:, mine]).relu() @ down[mine]  # [4, 8]: full size, half of the sum
    whole = (x @ up).relu() @ down
    total = summand.clone()
    dist.all_reduce(total)
    if rank == 0:
        print(f"a summand is off by {(summand - whole).norm() / whole.norm():.0%}")
        print(f"their sum by {(total - whole).norm() / whole.norm():.0e}")
    dist.destroy_process_group()


two_ranks(halves)

# %% [markdown]
# ## 3. What each rank holds
#
# `parallelize_qwen3` lays the model out. Matrices are split; norms are whole on both ranks.


# %%
def what_each_holds():
    import torch

    from torchtitan_style import Qwen3ForCausalLM
    from torchtitan_style.config.layout import Layout
    from torchtitan_style.config.schema import ActivationCheckpoint, Compile
    from torchtitan_style.distributed.world import destroy_world, init_world
    from torchtitan_style.models.qwen3.config import FLAVORS
    from torchtitan_style.models.qwen3.parallelize import parallelize_qwen3

    world = init_world(Layout(tp=2), timeout_seconds=60)
    model = Qwen3ForCausalLM(FLAVORS["debug"])
    parallelize_qwen3(
        model,
        world.mesh,
        activation_checkpoint=ActivationCheckpoint(),
        compile=Compile(),
        param_dtype=torch.float32,
        reduce_dtype=torch.float32,
        reshard_after_forward=True,
    )
    if world.is_main:
        for name, p in model.named_parameters():
            if "layers.1" not in name:
                print(f"{name:<48} {tuple(p.shape)!s:>10}  on a rank {tuple(p.to_local().shape)!s:>10}")
        held = sum(p.to_local().numel() for p in model.parameters())
        print(f"{held:,} of {sum(p.numel() for p in model.parameters()):,} numbers")
    destroy_world()


output = two_ranks(what_each_holds)
assert "q_proj" in output

# %% [markdown]
# ## 4. What passes between blocks
#
# Sequence parallelism: between blocks a rank has half of the positions. Inside attention and MLP it has all of them,
# and half of the heads or features.


# %%
def what_passes():
    import torch

    from torchtitan_style import Qwen3ForCausalLM
    from torchtitan_style.config.layout import Layout
    from torchtitan_style.config.schema import ActivationCheckpoint, Compile
    from torchtitan_style.distributed.world import destroy_world, init_world
    from torchtitan_style.models.qwen3.config import FLAVORS
    from torchtitan_style.models.qwen3.parallelize import parallelize_qwen3

    world = init_world(Layout(tp=2), timeout_seconds=60)
    model = Qwen3ForCausalLM(FLAVORS["debug"])
    options = {"param_dtype": torch.float32, "reduce_dtype": torch.float32, "reshard_after_forward": True}
    parallelize_qwen3(model, world.mesh, activation_checkpoint=ActivationCheckpoint(), compile=Compile(), **options)
    shapes = {}

    def note(name):
        return lambda module, inputs, output: shapes.update({name: (tuple(inputs[0].shape), tuple(output.shape))})

    layer = model.model.layers[0]
    for name in ("input_layernorm", "self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj"):
        layer.get_submodule(name).register_forward_hook(note(name))
    model(torch.zeros(2, 16, dtype=torch.long))
    if world.is_main:
        print("2 rows of 16 positions, C = 64, H·D = 128, I = 192")
        for name, (before, after) in shapes.items():
            print(f"{name:<20} {before} → {after}")
    destroy_world()


output = two_ranks(what_passes)
assert "input_layernorm      (2, 8, 64) → (2, 8, 64)" in output

# %% [markdown]
# ## 5. Gradients
#
# Every gradient against the plain model's. That of a norm's weight is a sum over positions, of which each rank has
# half: FSDP2 adds what the two find. `docs/learn/tensor_parallel.py` shows what a rank finds by itself.


# %%
def gradients():
    import torch

    from torchtitan_style import Qwen3ForCausalLM
    from torchtitan_style.config.layout import Layout
    from torchtitan_style.config.schema import ActivationCheckpoint, Compile
    from torchtitan_style.distributed.local import whole_tensor
    from torchtitan_style.distributed.world import destroy_world, init_world
    from torchtitan_style.models.qwen3.config import FLAVORS
    from torchtitan_style.models.qwen3.parallelize import parallelize_qwen3

    world = init_world(Layout(tp=2), timeout_seconds=60)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Qwen3ForCausalLM(FLAVORS["debug"]))
    plain, model = models
    options = {"param_dtype": torch.float32, "reduce_dtype": torch.float32, "reshard_after_forward": True}
    parallelize_qwen3(model, world.mesh, activation_checkpoint=ActivationCheckpoint(), compile=Compile(), **options)
    ids = torch.randint(0, 512, (2, 17), generator=torch.Generator().manual_seed(1))
    for each in models:
        loss, _ = each(ids[:, :-1], ids[:, 1:])
        loss.backward()
    worst = 0.0
    for (name, expected), parameter in zip(plain.named_parameters(), model.parameters(), strict=True):
        found = whole_tensor(parameter.grad)
        off = float((found - expected.grad).norm() / expected.grad.norm())
        worst = max(worst, off)
        if world.is_main and "layers.1" not in name:
            print(f"{name:<48} {off:.1e}")
    assert worst < 1e-5
    if world.is_main:
        print(f"the largest relative difference is {worst:.1e}")
    destroy_world()


two_ranks(gradients)

# %% [markdown]
# ## 6. Breaking it
#
# `_read_weight` in `distributed/tensor.py` says that a rank's gradient of a norm is a summand:
# `grad_placements=[Partial()]`. Without that, DTensor takes the summand for the whole. The loss is right, and the run
# looks healthy. The gradients of all norms are wrong.


# %%
def broken():
    import torch

    from torchtitan_style import Qwen3ForCausalLM
    from torchtitan_style.config.layout import Layout
    from torchtitan_style.config.schema import ActivationCheckpoint, Compile
    from torchtitan_style.distributed import tensor
    from torchtitan_style.distributed.local import whole_tensor
    from torchtitan_style.distributed.world import destroy_world, init_world
    from torchtitan_style.models.qwen3.config import FLAVORS
    from torchtitan_style.models.qwen3.parallelize import parallelize_qwen3

    tensor._read_weight = lambda weight: weight.to_local()  # the fault
    world = init_world(Layout(tp=2), timeout_seconds=60)
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        models.append(Qwen3ForCausalLM(FLAVORS["debug"]))
    plain, model = models
    options = {"param_dtype": torch.float32, "reduce_dtype": torch.float32, "reshard_after_forward": True}
    parallelize_qwen3(model, world.mesh, activation_checkpoint=ActivationCheckpoint(), compile=Compile(), **options)
    ids = torch.randint(0, 512, (2, 17), generator=torch.Generator().manual_seed(1))
    losses = []
    for each in models:
        loss, _ = each(ids[:, :-1], ids[:, 1:])
        loss.backward()
        losses.append(loss.item())
    wrong = []
    for (name, expected), parameter in zip(plain.named_parameters(), model.parameters(), strict=True):
        found = whole_tensor(parameter.grad)
        if float((found - expected.grad).norm() / expected.grad.norm()) > 1e-5:
            wrong.append(name)
    if world.is_main:
        print(f"loss {losses[1]:.4f}, of the plain model {losses[0]:.4f}")
        print(f"{len(wrong)} wrong gradients:", *wrong, sep="\n  ")
    destroy_world()


output = two_ranks(broken)
assert "9 wrong gradients" in output

# %% [markdown]
# `verify` makes this comparison for a configuration of yours, on any layout:
#
# ```
# python -m torchtitan_style verify --parallelism.tensor_parallel_degree 2
# ```
#
# ## 7. Training
#
# The trainer itself, on two ranks and on one: the same losses.


# %%
def losses_of(ranks, tensor_parallel):
    """The losses of 5 steps of the real program."""
    import json

    folder = Path(tempfile.mkdtemp())
    (folder / "corpus.txt").write_text("one row after another, " * 2000)
    line = "--model.flavor debug --training.steps 5 --training.seq_len 64 --data.dataset files --data.paths corpus.txt "
    line += "--training.global_batch_size 4 --training.local_batch_size -1 --training.mixed_precision_param float32 "
    line += "--validation.enable false --generation.enable false --job.dump_folder run "
    line += f"--parallelism.tensor_parallel_degree {tensor_parallel}"
    environment = os.environ | {"NPROC": str(ranks), "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torchtitan_style.launch", *line.split()]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    records = [json.loads(text) for text in (folder / "run/metrics.jsonl").read_text().splitlines()]
    return [record["loss"] for record in records if "loss" in record]


one, two = losses_of(1, 1), losses_of(2, 2)
for a, b in zip(one, two, strict=True):
    print(f"{a:.6f}  {b:.6f}")
assert all(abs(a - b) < 1e-5 * a for a, b in zip(one, two, strict=True))
