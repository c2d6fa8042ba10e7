"""Our Qwen3 against Transformers' on the same weights: parameters, logits, greedy text, loss, gradients.

Transformers runs its "eager" attention, which is written out by the definition, and reads the folder
by itself; ours reads it through ``load_weights``.

Shapes: B rows, T tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from torchtitan_style.checkpoint.weights import load_weights
from torchtitan_style.common.device import available_memory
from torchtitan_style.common.errors import UserError
from torchtitan_style.cpu.half_precision import multiply_in_fp32
from torchtitan_style.models.build import build_model
from torchtitan_style.models.hf_folder import HFFolder
from torchtitan_style.train.balance import balance_loss

from .report import SMALLEST, Check, gradient_check, gradient_difference

TOLERANCES = {
    # The same sums in another order: 1e-7 each, growing with depth.
    # Trained models have a few activations thousands of times larger than the rest, which amplify that.
    torch.float32: {"logits": 5e-5, "loss": 5e-6, "gradients": 5e-5},
    # 8 bits of mantissa: 4e-3 per rounding, some of which averages out.
    torch.bfloat16: {"logits": 5e-2, "loss": 5e-3, "gradients": 1e-1},
}
"""Largest differences, relative to the largest logit, to the loss and to the norm of a gradient."""

_SEEDS = 3
_NEW_TOKENS = 32


def compare_with_transformers(
    folder: HFFolder, *, dtype: torch.dtype, device: torch.device, tolerance: float | None = None
) -> list[Check]:
    """All checks on the model in ``folder``.

    tolerance: for everything that is not exact, instead of ``TOLERANCES``.

    Raises UserError if the machine cannot hold the two models and their gradients.
    """
    needed, available = 4 * dtype.itemsize * folder.config.num_parameters, available_memory(device)
    if needed > 0.9 * available:
        raise UserError(
            f"--hf: two models and their gradients take {needed / 2**30:.0f} GiB in "
            f"{str(dtype).removeprefix('torch.')}, and {available / 2**30:.0f} GiB are free"
            + ("; --dtype bfloat16 takes half" if dtype == torch.float32 else "")
        )
    multiply_in_fp32(dtype, device)
    theirs, ours = _theirs(folder, dtype, device), _ours(folder, dtype, device)
    tolerances = TOLERANCES[dtype] if tolerance is None else dict.fromkeys(TOLERANCES[dtype], tolerance)
    return [
        *_parameters(theirs, ours),
        _logits(theirs, ours, folder.config, tolerances["logits"], device),
        _greedy(theirs, ours, folder.config, tolerances["logits"], device),
        *(_routing(theirs, ours, folder.config, tolerances, device) if folder.spec.expert_parallel else ()),
        *_loss_and_gradients(theirs, ours, folder.config, tolerances, device),
    ]


def _theirs(folder: HFFolder, dtype: torch.dtype, device: torch.device) -> Any:
    import transformers

    transformers.utils.logging.disable_progress_bar()
    return transformers.AutoModelForCausalLM.from_pretrained(folder.path, dtype=dtype, attn_implementation="eager").to(
        device
    )


def _ours(folder: HFFolder, dtype: torch.dtype, device: torch.device) -> Any:
    def read(model: Any) -> None:
        load_weights(folder, dict(model.named_parameters()))

    return build_model(folder.spec, folder.config, device=device, fill=read, dtype=dtype).eval()


def _parameters(theirs: Any, ours: Any) -> Iterator[Check]:
    a, b = dict(theirs.named_parameters()), dict(ours.named_parameters())
    names = [f"{name} is in Transformers' model alone" for name in a.keys() - b.keys()]
    names += [f"{name} is in this model alone" for name in b.keys() - a.keys()]
    yield Check("names of parameters", len(a), len(names), 0, tuple(sorted(names)))
    common = [name for name in a if name in b]
    shapes = [f"{n} is {tuple(b[n].shape)} instead of {tuple(a[n].shape)}" for n in common if a[n].shape != b[n].shape]
    yield Check("their shapes", len(common), len(shapes), 0, tuple(shapes))
    values = [f"{n} has other values" for n in common if a[n].shape == b[n].shape and not torch.equal(a[n], b[n])]
    yield Check("their values, bit for bit", len(common), len(values), 0, tuple(values))


@torch.no_grad()
def _logits(theirs: Any, ours: Any, config: Any, tolerance: float, device: torch.device) -> Check:
    """Random rows of several lengths, alone and in a batch where all but one are padded at the end."""
    lengths = {1, 2, 17, 64, 256}
    if config.use_sliding_window:
        lengths |= {config.sliding_window, config.sliding_window + 1, 2 * config.sliding_window + 1}
    cases, worst, faults = 0, 0.0, []
    for seed in range(_SEEDS):
        generator = torch.Generator().manual_seed(seed)
        for length in sorted(n for n in lengths if n <= min(config.max_position_embeddings, 1024)):
            for rows in (1, 3):
                ids = torch.randint(0, config.vocab_size, (rows, length), generator=generator).to(device)
                kept = torch.randint(1, length + 1, (rows,), generator=generator)
                kept[0] = length
                mask = (torch.arange(length) < kept[:, None]).to(device)  # [B, T]
                a = theirs(ids, attention_mask=mask.long()).logits[mask].float()  # [tokens, V]
                b = ours(ids)
                assert isinstance(b, Tensor)
                difference = _relative(b[mask].float(), a)
                cases += 1
                worst = _larger(worst, difference)
                if not difference <= tolerance:
                    faults.append(f"seed {seed}, {rows} rows of {length} tokens: off by {difference:.1e}")
    return Check("logits over lengths, padding, seeds", cases, worst, tolerance, tuple(faults))


@torch.no_grad()
def _greedy(theirs: Any, ours: Any, config: Any, tolerance: float, device: torch.device) -> Check:
    """The token that ours finds likeliest after each prefix of the text that Transformers generates.

    The difference is by how much its logit is ahead of that of Transformers' choice, as a share of the
    largest logit: 0 where they choose the same, tiny where two tokens are as likely.
    """
    import transformers

    cases, worst, faults = 0, 0.0, []
    generator = torch.Generator().manual_seed(_SEEDS)
    # Nothing of what the folder recommends: the likeliest token alone is compared, ends of texts included.
    theirs.generation_config = transformers.GenerationConfig(eos_token_id=None, pad_token_id=0)
    for length in [length for length in (1, 5, 23) if length < config.max_position_embeddings]:
        prompt = torch.randint(0, config.vocab_size, (1, length), generator=generator).to(device)
        new = min(_NEW_TOKENS, config.max_position_embeddings - length)
        text = theirs.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            max_new_tokens=new,
        )
        for position in range(length, text.shape[1]):
            logits = ours(text[:, :position])
            assert isinstance(logits, Tensor)
            last = logits[0, -1].float()  # [V]
            difference = ((last.max() - last[text[0, position]]) / last.abs().max()).item()
            cases += 1
            worst = _larger(worst, difference)
            if not difference <= tolerance:
                faults.append(
                    f"prompt of {length}, new token {position - length + 1}: {int(last.argmax())} instead of "
                    f"{int(text[0, position])}"
                )
    return Check("greedy text, token by token", cases, worst, tolerance, tuple(faults))


def _loss_and_gradients(
    theirs: Any, ours: Any, config: Any, tolerances: dict[str, float], device: torch.device
) -> Iterator[Check]:
    """Rows of which some labels are missing. Transformers shifts labels itself and takes the mean."""
    generator = torch.Generator().manual_seed(_SEEDS + 1)
    length = min(64, config.max_position_embeddings - 1)
    ids = torch.randint(0, config.vocab_size, (2, length + 1), generator=generator)
    # Transformers gives the embedding of the padding token no gradient, wherever the token stands.
    if (padding := theirs.config.pad_token_id) is not None:
        ids[ids == padding] = (padding + 1) % config.vocab_size
    labels = ids.clone()
    labels[1, length // 2 :] = -100
    ids, labels = ids.to(device), labels.to(device)
    sparse = hasattr(ours.model, "routing")
    a = theirs(ids, labels=labels, **({"output_router_logits": True} if sparse else {})).loss
    a.backward()
    if sparse:
        # All of Transformers' tokens are routed, those without a label too, and the last is one of them.
        shifted = torch.cat((labels[:, 1:], torch.full_like(labels[:, :1], -100)), dim=1)
        loss_sum, _ = ours(ids, shifted)
        b = loss_sum / (shifted != -100).sum() + config.router_aux_loss_coef * _aux_loss(ours, config, ids.numel())
    else:
        loss_sum, _ = ours(ids[:, :-1], labels[:, 1:].contiguous())
        b = loss_sum / (labels[:, 1:] != -100).sum()
    b.backward()
    difference = (abs(b - a) / abs(a)).item()
    fault = () if difference <= tolerances["loss"] else (f"{b.item():.6f} instead of {a.item():.6f}",)
    yield Check("loss, some labels missing", 1, difference, tolerances["loss"], fault)

    right = {name: p.grad for name, p in theirs.named_parameters()}
    smallest = SMALLEST[ours.lm_head.weight.dtype] * max(gradient.norm().item() for gradient in right.values())
    found = [
        gradient_difference(name, parameter.grad, right[name], smallest=smallest)
        for name, parameter in ours.named_parameters()
        if name in right
    ]
    yield gradient_check("every gradient", found, tolerances["gradients"])


@torch.no_grad()
def _routing(
    theirs: Any, ours: Any, config: Any, tolerances: dict[str, float], device: torch.device
) -> Iterator[Check]:
    """What the routers of all layers make of random rows."""
    generator = torch.Generator().manual_seed(_SEEDS + 2)
    ids = torch.randint(0, config.vocab_size, (2, min(64, config.max_position_embeddings)), generator=generator)
    ids = ids.to(device)
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    gates = [module for name, module in ours.named_modules() if name.endswith("mlp.gate")]
    hooks = [gate.register_forward_hook(lambda _module, _inputs, output: found.append(output)) for gate in gates]
    ours(ids)
    for hook in hooks:
        hook.remove()
    right = theirs(ids, output_router_logits=True)
    worst, otherwise, ties, faults = 0.0, 0, 0, []
    for layer, ((logits, _, experts), expected) in enumerate(zip(found, right.router_logits, strict=True)):
        logits, expected = logits.float(), expected.float()
        worst = _larger(worst, _relative(logits, expected))
        best = expected.topk(config.num_experts_per_tok).indices
        other = (experts.sort(-1).values != best.sort(-1).values).any(-1)  # [N]
        # By how much the least likely of the experts that ours chose is behind the least likely of the right ones.
        behind = (expected.gather(1, best).amin(-1) - expected.gather(1, experts).amin(-1)) / expected.abs().max()
        wrong = other & ~(behind <= tolerances["logits"])
        ties += int((other & ~wrong).sum())
        otherwise += int(wrong.sum())
        faults += [f"router {layer}, token {int(token)}" for token in wrong.nonzero()]
    yield Check("router logits", len(found), worst, tolerances["logits"])
    name = "chosen experts" + (f" ({ties} tokens had others that are as likely)" if ties else "")
    yield Check(name, len(found) * ids.numel(), otherwise, 0, tuple(faults))
    a, b = right.aux_loss.item(), _aux_loss(ours, config, ids.numel()).item()
    fault = f"{b:.6f} instead of {a:.6f}"
    difference = abs(b - a) / abs(a)
    passed = difference <= tolerances["loss"]
    yield Check("auxiliary loss", 1, difference, tolerances["loss"], () if passed else (fault,))


def _aux_loss(ours: Any, config: Any, tokens: int) -> Tensor:
    """Of the last forward pass."""
    counts, probabilities = (
        torch.stack([getattr(routing, name) for routing in ours.model.routing]).sum(0)
        for name in ("counts", "probabilities")
    )
    return balance_loss(counts, probabilities, tokens * config.num_sparse_layers)


def _relative(a: Tensor, b: Tensor) -> float:
    """Largest difference of a from b, as a share of b's largest number."""
    return ((a - b).abs().max() / b.abs().max()).item()


def _larger(a: float, b: float) -> float:
    """The larger of two, NaN counting as the largest."""
    return b if not b <= a else a
