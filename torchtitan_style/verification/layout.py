"""A training layout against one process: the same weights, the same batches, the plain model in fp32.

``reference`` is the definition, in one process: full logits, no sharding, no recomputation, no compiler,
``torch.optim.AdamW``. ``compare`` is run by every rank of the layout and goes through ``build_training_model``
and ``train_step``, as training does.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from torchtitan_style.common.extensions import LOSSES
from torchtitan_style.config import Config
from torchtitan_style.config.layout import plan_batch
from torchtitan_style.data.loader import Batch, Microbatch
from torchtitan_style.data.rows import Rows
from torchtitan_style.distributed.custom_loss import plain_loss
from torchtitan_style.distributed.init import draw
from torchtitan_style.distributed.local import whole_tensor
from torchtitan_style.distributed.pipeline import PipelinedModel
from torchtitan_style.distributed.world import World
from torchtitan_style.models.build import build_model
from torchtitan_style.models.lora import add_adapters
from torchtitan_style.models.registry import model_config, spec_of
from torchtitan_style.models.trained import UP, adapted_modules
from torchtitan_style.optim.adamw import is_decayed
from torchtitan_style.optim.guard import StepGuard
from torchtitan_style.optim.normuon import normalize_rows
from torchtitan_style.optim.orthogonalize import orthogonalize, step_scale
from torchtitan_style.optim.schedule import lr_factor
from torchtitan_style.train.step import (
    DTYPES,
    build_optimizer,
    build_training_model,
    draw_weights,
    freeze,
    train_step,
)

from .report import SMALLEST, Check, Difference, gradient_check, gradient_difference
from .routing import check_routing, routed_otherwise

STEPS = 5

TOLERANCES = {
    # Sums of fp32 terms in another order: 1e-7 each. A term that is dropped or doubled is above 1e-3.
    "float32": {"loss": 1e-6, "gradients": 1e-5, "norm": 1e-5, "later losses": 1e-5},
    # bf16 has 8 bits of mantissa: rounding is 4e-3 of a number, and some of it averages out. Gradients that
    # are small differences of large numbers have little left: they are held against ``SMALLEST``.
    "bfloat16": {"loss": 1e-3, "gradients": 1e-1, "norm": 5e-2, "later losses": 1e-2},
}
"""Largest relative differences from the plain fp32 model, by the type that the layout computes in."""


def global_batch(config: Config, *, rows: int) -> Microbatch:
    """Rows [rows, T], the same at every step, so that the loss falls fast and shows what the
    updates have done. More labels are missing in later rows than in earlier ones, so that a mean over the
    wrong tokens is another number."""
    generator = torch.Generator().manual_seed(config.training.seed)
    shape = rows, config.training.seq_len + 1
    ids = torch.randint(0, model_config(config.model).vocab_size, shape, generator=generator)
    inputs, labels = ids[:, :-1].contiguous(), ids[:, 1:].contiguous()
    missing = torch.linspace(0.1, 0.6, rows)[:, None]
    labels[torch.rand(labels.shape, generator=generator) < missing] = -100
    if not config.data.document_mask:
        return Microbatch(inputs, labels)
    documents = (torch.rand(labels.shape, generator=generator) < 4 / config.training.seq_len).cumsum(dim=1)
    positions = Rows(inputs.numpy(), labels.numpy(), documents.numpy()).positions
    return Microbatch(inputs, labels, documents, torch.from_numpy(positions))


def _documents(batch: Microbatch, row: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and labels [1, n] of what makes up one row: each document by itself, or the row as a whole."""
    if batch.documents is None:
        yield batch.inputs[row : row + 1], batch.labels[row : row + 1]
        return
    lengths = batch.documents[row].unique_consecutive(return_counts=True)[1].tolist()
    yield from zip(batch.inputs[row, None].split(lengths, 1), batch.labels[row, None].split(lengths, 1), strict=True)


def reference(config: Config, folder: Path, *, device: torch.device, rows: int) -> None:
    """Train the plain model for a few steps, and leave in ``folder`` what a layout must agree with.

    rows: the global batch size.
    """
    spec, shape = spec_of(config.model.name), model_config(config.model)

    def prepare(model: Any) -> None:
        freeze(model, config)
        add_adapters(model, config.lora, adapted_modules(spec, shape, config.lora))

    fill = functools.partial(draw_weights, config=config)
    model = build_model(spec, shape, device=torch.device("cpu"), lay_out=prepare, fill=fill)
    model.lm_head.z_loss = config.training.z_loss
    if LOSSES.added(config.training.loss):
        model.lm_head.loss_function = plain_loss(LOSSES.get(config.training.loss))
    # What adapters are added to is kept in the type of computation.
    weights = {n: [_fingerprint(p), _fingerprint(p.bfloat16())] for n, p in model.named_parameters()}
    _move_adapters(model, config)
    model.to(device)
    if spec.use_definition:
        spec.use_definition(model)
    muon = config.optimizer.name == "muon"
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    hidden = {n: p for n, p in trained.items() if muon and spec.is_hidden_matrix(n, p)}
    momenta = {name: torch.zeros_like(p) for name, p in hidden.items()}
    mean_squares = {name: torch.zeros_like(p[..., :1]) for name, p in hidden.items()}
    optimizer = _adamw({n: p for n, p in trained.items() if n not in hidden}, config)
    batch = global_batch(config, rows=rows)
    tokens = (batch.labels != -100).sum().to(device)
    losses, norms = [], []
    routers = _RoutersByDefinition(model, shape, batch) if spec.expert_parallel else None
    for step in range(1, STEPS + 1):
        model.zero_grad()
        if routers is not None:
            logits = routers.count(device)
            if step == 1:
                save_file({"logits": logits}, folder / "routing.safetensors")
        loss = torch.zeros((), dtype=torch.float64, device=device)
        for row in range(rows):  # one by one: full logits of many are more than memory holds
            for inputs, labels in _documents(batch, row):
                share = model(inputs.to(device), labels.to(device))[0] / tokens
                (share if routers is None else share + routers.loss()).backward()
                loss += share.detach()
        gradients = {name: p.grad for name, p in trained.items()}
        norm = torch.stack([g.double().pow(2).sum() for g in gradients.values()]).sum().sqrt()
        if step == 1:
            largest = max(g.norm().item() for g in gradients.values())
            save_file({name: g.contiguous() for name, g in gradients.items()}, folder / "gradients.safetensors")
        factor = min(1.0, _max_norm(config, step) / (norm.item() + 1e-6))
        for gradient in gradients.values():
            gradient.mul_(factor)
        for group in optimizer.param_groups:
            group["lr"] = _lr(config, step)
        optimizer.step()
        for name, matrix in hidden.items():
            per_head = config.optimizer.muon.per_head and spec.has_heads(name)
            stacked = spec.stacked_rows(name, tuple(matrix.shape))
            _muon(matrix, momenta[name], mean_squares[name], config, step, shape.head_dim if per_head else stacked)
        losses.append(loss.item())
        norms.append(norm.item())
    found = {"weights": weights, "losses": losses, "norms": norms, "largest_gradient": largest}
    (folder / "reference.json").write_text(json.dumps(found), encoding="utf-8")


class _RoutersByDefinition:
    """The routers' losses as Transformers defines them, on the routers' logits for all tokens at once."""

    def __init__(self, model: Any, shape: Any, batch: Microbatch) -> None:
        self.model, self.shape, self.batch = model, shape, batch
        self.logits: list[Tensor] = []
        """Of each layer in turn, [N, E], in the last forward pass."""
        for name, module in model.named_modules():
            if name.endswith("mlp.gate"):
                module.register_forward_hook(lambda _module, _inputs, output: self.logits.append(output[0].float()))

    @torch.no_grad()
    def count(self, device: torch.device) -> Tensor:
        """Find out how often each expert is chosen in the whole batch. → the logits, [rows, T, L, E]"""
        every: list[Tensor] = []
        experts = self.shape.num_experts
        self.counts, self.rows = torch.zeros(experts, device=device), 0
        for row in range(len(self.batch.inputs)):
            for inputs, labels in _documents(self.batch, row):
                self.logits.clear()
                self.model(inputs.to(device), labels.to(device))
                for logits in self.logits:
                    chosen = logits.softmax(-1).topk(self.shape.num_experts_per_tok).indices
                    self.counts += torch.nn.functional.one_hot(chosen, experts).sum((0, 1))
                    self.rows += len(logits)
                every.append(torch.stack(self.logits, dim=1).cpu())  # [N, L, E]
        self.logits.clear()
        return torch.cat(every).view(*self.batch.inputs.shape, *every[0].shape[1:])

    def loss(self) -> Tensor:
        """The part that the tokens of the last forward pass have."""
        logits = torch.cat(self.logits)  # [L·N, E]
        self.logits.clear()
        shares, probabilities = self.counts / self.rows, logits.softmax(-1).sum(0) / self.rows
        z = logits.logsumexp(-1).square().sum() / self.rows
        balance = self.shape.num_experts * (shares * probabilities).sum()
        return self.shape.router_aux_loss_coef * balance + self.shape.router_z_loss_coef * z


def compare(
    config: Config,
    world: World,
    folder: Path,
    *,
    precision: str,
    warn: Callable[[str], None],
    tolerance: float | None = None,
) -> list[Check]:
    """Train the layout for the same steps, and compare. Called by all ranks, with the same result on all.

    precision: the type to compute in, "float32" or "bfloat16". tolerance: for everything that is not
    exact, instead of ``TOLERANCES``.
    """
    training = config.training.model_copy(update={"mixed_precision_param": precision})
    if precision == "float32":
        training = training.model_copy(update={"mixed_precision_reduce": "float32"})
    config = config.model_copy(update={"training": training})
    expected = json.loads((folder / "reference.json").read_text(encoding="utf-8"))
    tolerances = TOLERANCES[precision] if tolerance is None else dict.fromkeys(TOLERANCES[precision], tolerance)
    torch.compiler.reset()
    model = build_training_model(config, world, warn=warn)
    optimizer = build_optimizer(model, config, world)
    checks = [_names(model, expected["weights"]), _initial_weights(model, expected["weights"])]
    _move_adapters(model, config)

    guard = StepGuard(0.0, 2, world.device)
    batch = _batch(config, world)
    if (folder / "routing.safetensors").exists():
        right = load_file(folder / "routing.safetensors")["logits"]
        mine = routed_otherwise(model, batch.microbatches, right, world, precision=precision)
        check, more = check_routing(_gathered(mine))
        checks.append(check)
        tolerances = tolerances | {"gradients": tolerances["gradients"] + more}
    losses, norms, gradients = [], [], []
    for step in range(1, STEPS + 1):
        clipped = training.model_copy(update={"max_norm": _max_norm(config, step)})
        result = train_step(
            model,
            optimizer,
            batch,
            step=step,
            config=config.model_copy(update={"training": clipped}),
            world=world,
            guard=guard,
        )
        if step == 1:
            smallest = SMALLEST[DTYPES[precision]] * expected["largest_gradient"]
            gradients = _gradients(model, folder / "gradients.safetensors", world.device, smallest=smallest)
        losses.append(result.loss.item())
        norms.append(result.grad_norm.item())
    return [
        *checks,
        _numbers("loss of step 1", losses[:1], expected["losses"][:1], tolerances["loss"], first=1),
        gradient_check("every gradient of step 1", gradients, tolerances["gradients"]),
        _numbers(f"gradient norm of steps 1 to {STEPS}", norms, expected["norms"], tolerances["norm"], first=1),
        _numbers(
            f"loss of steps 2 to {STEPS}", losses[1:], expected["losses"][1:], tolerances["later losses"], first=2
        ),
    ]


def _batch(config: Config, world: World) -> Batch:
    """This rank's share of the batch, as ``Loader`` would deal it out."""
    plan = plan_batch(config.training, world.layout.dp)
    mine = plan.local_batch_size * plan.accumulation_steps
    parts: list[Any] = []
    for whole in global_batch(config, rows=plan.global_batch_size):
        if whole is None:
            parts.append([None] * plan.accumulation_steps)
            continue
        rows = whole[world.dp_rank * mine : (world.dp_rank + 1) * mine].to(world.device)
        parts.append(rows.split(plan.local_batch_size))
    return Batch([Microbatch(*rows).of_part(world.part) for rows in zip(*parts, strict=True)], 0)


def _max_norm(config: Config, step: int) -> float:
    """The first step is not clipped: its gradients are compared as they are."""
    return config.training.max_norm if step > 1 else float("inf")


def _lr(config: Config, step: int) -> float:
    return config.optimizer.adamw_lr * lr_factor(step, config.lr_scheduler, total_steps=config.training.steps)


def _adamw(parameters: dict[str, nn.Parameter], config: Config) -> torch.optim.AdamW:
    optimizer = config.optimizer
    groups = [
        {"params": [p], "weight_decay": optimizer.weight_decay if is_decayed(name, p, optimizer) else 0.0}
        for name, p in parameters.items()
    ]
    return torch.optim.AdamW(
        groups or [{"params": []}],
        lr=optimizer.adamw_lr,
        betas=(optimizer.beta1, optimizer.beta2),
        eps=optimizer.eps,
        foreach=False,
    )


@torch.no_grad()
def _muon(
    matrix: nn.Parameter, momentum: Tensor, mean_squares: Tensor, config: Config, step: int, rows: int | None
) -> None:
    """Muon, or NorMuon, by its definition, in fp32, on a whole matrix or on each of so many rows."""
    muon = config.optimizer.muon
    assert matrix.grad is not None
    momentum.mul_(muon.momentum).add_((1 - muon.momentum) * matrix.grad)
    direction = (1 - muon.momentum) * matrix.grad + muon.momentum * momentum if muon.nesterov else momentum
    decay = config.optimizer.muon_weight_decay
    lr = config.optimizer.muon_lr * lr_factor(
        step, muon.schedule(config.lr_scheduler), total_steps=config.training.steps
    )
    scale = step_scale(rows or matrix.shape[0], matrix.shape[-1], muon.adjust_lr)
    parts = direction.flatten(0, -2).split(rows or matrix.shape[0])
    updates = [orthogonalize(part, rounds=muon.ns_steps) for part in parts]
    if muon.normuon_beta2:
        taken = torch.ones((), dtype=torch.bool, device=matrix.device)
        for part, squares in zip(updates, mean_squares.flatten(0, -2).split(len(parts[0])), strict=True):
            normalize_rows(part, squares, taken, beta2=muon.normuon_beta2)
    update = torch.cat(updates).view(matrix.shape)
    matrix.copy_((1 - lr * decay) * matrix - lr * scale * update)


def _fingerprint(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data).hexdigest()


def _move_adapters(model: nn.Module, config: Config) -> None:
    """Begin with B of adapters not at zero, where A would have no gradient."""
    for name, parameter in model.named_parameters():
        if name.endswith(UP):
            draw(parameter, 0.02, f"{config.training.seed}/verify/{name}")


def _names(model: nn.Module, expected: dict[str, list[str]]) -> Check:
    names = set().union(*_gathered(set(dict(model.named_parameters()))))  # of all pipeline stages
    faults = [f"{name} is missing, or shares another parameter" for name in expected.keys() - names]
    faults += [f"{name} is a parameter of its own, but should not be" for name in names - expected.keys()]
    return Check("names of parameters", len(expected), len(faults), 0, tuple(sorted(faults)))


def _initial_weights(model: nn.Module, expected: dict[str, list[str]]) -> Check:
    other = [
        name
        for name, parameter in model.named_parameters()
        if name in expected and _fingerprint(whole_tensor(parameter)) not in expected[name]
    ]
    everyone = dict.fromkeys(name for names in _gathered(other) for name in names)
    faults = tuple(f"{name} starts from other values" for name in everyone)
    return Check("initial weights, bit for bit", len(expected), len(faults), 0, faults)


@torch.no_grad()
def _gradients(model: nn.Module, right: Path, device: torch.device, *, smallest: float) -> list[Difference]:
    """Every parameter's gradient, as each rank sees it, against the one in ``right``; the worst rank counts."""
    mine: dict[str, Difference] = {}
    parameters = dict(model.named_parameters())
    stages = model.stage_of if isinstance(model, PipelinedModel) else {}
    with safe_open(right, framework="pt", device=str(device)) as file:
        names = list(file.keys())
        for name in names:
            if name in parameters:
                gradient = parameters[name].grad
                whole = None if gradient is None else whole_tensor(gradient)
                where = f"{name} (pipeline stage {stages[name]})" if stages else name
                mine[name] = gradient_difference(where, whole, file.get_tensor(name), smallest=smallest)
    untrained = [name for name, parameter in parameters.items() if parameter.grad is not None and name not in names]
    mine |= {name: Difference(name, float("inf"), float("inf")) for name in untrained}
    found = _gathered(mine)  # ranks of a pipeline hold different parameters
    worst = {name: [each[name] for each in found if name in each] for name in [*names, *untrained]}
    return [max(differences, key=lambda d: d.severity) for differences in worst.values() if differences]


def _gathered(value: Any) -> list[Any]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, value)
    return everyone


def _numbers(name: str, found: list[float], right: list[float], tolerance: float, *, first: int) -> Check:
    differences = [abs(a - b) / abs(b) for a, b in zip(found, right, strict=True)]
    faults = [
        f"step {step}: {a:.6f} instead of {b:.6f}"
        for step, (a, b, d) in enumerate(zip(found, right, differences, strict=True), start=first)
        if not d <= tolerance
    ]
    nan = any(d != d for d in differences)
    return Check(name, len(found), float("nan") if nan else max(differences), tolerance, tuple(faults))
