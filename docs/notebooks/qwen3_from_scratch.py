"""The source of qwen3_from_scratch.ipynb; see make.py."""

# %% [markdown]
# # Qwen3 from scratch in an hour
#
# We build Qwen3 piece by piece from the modules of this package. Each piece is first written out in a few lines, then
# compared with the package's module and with Transformers'. Then we train a small one for a minute, look inside it,
# and let it write.
#
# Everything runs on a CPU, without network. Each section names the page of `docs/learn/` that says more.
#
# Shapes: B rows, T positions, C hidden size, H query heads, K key/value heads, D head size, V vocabulary.

# %%
import math
import tempfile
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
import transformers
from transformers.models.qwen3 import modeling_qwen3 as theirs

from torchtitan_style import Qwen3Config, Qwen3ForCausalLM
from torchtitan_style.models.qwen3 import model as ours
from torchtitan_style.models.qwen3.hf import to_hf
from torchtitan_style.models.qwen3.rotary import apply_rotary, rotary_cos_sin

torch.manual_seed(0)


def same(found, expected, tolerance=1e-5):
    """Fail if the two differ; else say by how much."""
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    print(f"the same, up to {(found - expected).abs().max():.1e}")


# %% [markdown]
# ## 1. Tokens
#
# A corpus that every machine has: source files of Python's standard library. On it we train a byte-level BPE, as the
# package does for `data.tokenizer = "train"` (`docs/learn/tokens_and_packing.md`).

# %%
from torchtitan_style.config.schema import Corpus
from torchtitan_style.data.sources.corpus import source_files
from torchtitan_style.data.tokenizer.tokenizer import Tokenizer, train

files = [file for file in source_files(Corpus(dataset="stdlib")) if file.size < 60_000][:150]
texts = [Path(file.url).read_text(encoding="utf-8", errors="replace") for file in files]
print(f"{len(texts)} files, {sum(map(len, texts)):,} characters")

folder = Path(tempfile.mkdtemp()) / "tokenizer"
train(texts, folder, vocab_size=2048)
tokenizer = Tokenizer(folder)

line = "def forward(self, x):\n    return self.norm(x)\n"
print([tokenizer.show([i]) for i in tokenizer.encode(line)])
assert tokenizer.decode(tokenizer.encode(line)) == line

# %% [markdown]
# The tokens of all files in one long row, with an end-of-text token before each.

# %%
stream = torch.tensor([token for text in texts for token in (tokenizer.end_of_text, *tokenizer.encode(text))])
held_out, stream = stream[:20_000], stream[20_000:]
print(f"{len(stream):,} tokens to train on, {len(held_out):,} held out")

# %% [markdown]
# ## 2. The shape of the model
#
# `Qwen3Config` has the fields of Transformers' `Qwen3Config`. The published 0.6B is its default; ours is five hundred
# times smaller. Note that H·D = 128 need not be C, and that two query heads share a key/value head.

# %%
config = Qwen3Config(
    vocab_size=2048,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    max_window_layers=4,
)
hf_config = transformers.Qwen3Config(**to_hf(config), attn_implementation="eager")
print(f"{config.num_parameters / 1e6:.2f} M parameters; Qwen3-0.6B has {Qwen3Config().num_parameters / 1e6:.0f} M")

B, T, C = 2, 16, config.hidden_size
H, K, D = config.num_attention_heads, config.num_key_value_heads, config.head_dim
x = torch.randn(B, T, C)

# %% [markdown]
# ## 3. RMSNorm
#
# Divide each vector by its root mean square, and scale each channel by a learned weight (`docs/learn/rmsnorm.md`).

# %%
norm, hf_norm = ours.RMSNorm(C, eps=1e-6), theirs.Qwen3RMSNorm(C, eps=1e-6)
norm.weight.data.uniform_(0.5, 1.5)
hf_norm.load_state_dict(norm.state_dict())

by_hand = norm.weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()
same(norm(x), by_hand)
same(norm(x), hf_norm(x))

# %% [markdown]
# ## 4. RoPE
#
# Each pair of channels of a query or key is rotated by an angle proportional to the position. Dot products then
# depend on distances only (`docs/learn/rope.md`).

# %%
positions = torch.arange(T)[None]
cos, sin = rotary_cos_sin(positions, head_dim=D, theta=config.rope_theta)  # [1, T, D]
hf_cos, hf_sin = theirs.Qwen3RotaryEmbedding(hf_config)(x, positions)
same(cos, hf_cos)

q = torch.randn(B, T, H, D)
rotated = apply_rotary(q, cos[:, :, None], sin[:, :, None])
hf_rotated, _ = theirs.apply_rotary_pos_emb(q.transpose(1, 2), q.transpose(1, 2), hf_cos, hf_sin)  # heads first
same(rotated, hf_rotated.transpose(1, 2))

angles = rotary_cos_sin(torch.arange(200)[None], head_dim=D, theta=config.rope_theta)[0][0]
plt.figure(figsize=(7, 2.5))
plt.imshow(angles[:, : D // 2].T, aspect="auto", cmap="RdBu")
plt.title("cosine of each pair's angle: fast pairs at the top, slow ones below")
plt.xlabel("position")
plt.ylabel("pair")
plt.show()

# %% [markdown]
# ## 5. Attention
#
# Grouped queries, QK-norm, RoPE, a causal mask (`docs/learn/attention.md`). First written out, then as a module.

# %%
attention, hf_attention = ours.Attention(config, layer=0), theirs.Qwen3Attention(hf_config, layer_idx=0)
hf_attention.load_state_dict(attention.state_dict())


def attention_by_hand(x):
    """→ output [B, T, C], and the weights [B, H, T, T]."""
    q = attention.q_norm(attention.q_proj(x).view(B, T, H, D))
    k = attention.k_norm(attention.k_proj(x).view(B, T, K, D))
    v = attention.v_proj(x).view(B, T, K, D)
    q, k = (apply_rotary(each, cos[:, :, None], sin[:, :, None]) for each in (q, k))
    k, v = (each.repeat_interleave(H // K, dim=2) for each in (k, v))  # each key head serves H / K query heads
    scores = torch.einsum("bthd,bshd->bhts", q, k) / math.sqrt(D)
    scores = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -torch.inf)  # nobody looks ahead
    weights = scores.softmax(-1)
    mixed = torch.einsum("bhts,bshd->bthd", weights, v).reshape(B, T, H * D)
    return attention.o_proj(mixed), weights


by_hand, weights = attention_by_hand(x)
found = attention(x, cos[:, :, None], sin[:, :, None])
same(found, by_hand)
causal = torch.full((T, T), -torch.inf).triu(1)[None, None]
hf_output, _ = hf_attention(x, position_embeddings=(hf_cos, hf_sin), attention_mask=causal)
same(found, hf_output)
assert torch.allclose(weights.sum(-1), torch.ones(B, H, T))

# %% [markdown]
# ## 6. SwiGLU
#
# Two projections, of which one gates the other (`docs/learn/swiglu.md`).

# %%
mlp, hf_mlp = ours.MLP(config), theirs.Qwen3MLP(hf_config)
hf_mlp.load_state_dict(mlp.state_dict())

by_hand = mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
same(mlp(x), by_hand)
same(mlp(x), hf_mlp(x))

# %% [markdown]
# ## 7. The whole
#
# A block adds attention and MLP to the residual stream, each on a normalised copy. The model is an embedding, blocks,
# a norm and the head, which shares the embedding's matrix (`docs/learn/embedding.md`).

# %%
torch.manual_seed(0)
model = Qwen3ForCausalLM(config)
hf_model = transformers.Qwen3ForCausalLM(hf_config)
hf_model.load_state_dict(model.state_dict())  # the names are the same
ids = stream[None, :T]


def model_by_hand(ids):
    """Token ids [1, T] → logits [1, T, V]."""
    x = model.model.embed_tokens.weight[ids]
    for layer in model.model.layers:
        x = x + layer.self_attn(layer.input_layernorm(x), cos[:, :, None], sin[:, :, None])
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.model.norm(x) @ model.model.embed_tokens.weight.T


with torch.no_grad():
    same(model(ids), model_by_hand(ids))
    same(model(ids), hf_model(ids).logits, tolerance=1e-4)

# %% [markdown]
# ## 8. The loss
#
# Given labels the model returns the *sum* of the token losses, and how many labels are the likeliest token
# (`docs/learn/loss.md`). Before training the loss is about ln V: every token is as likely as any other.

# %%
inputs, labels = stream[None, :T], stream[None, 1 : T + 1]
with torch.no_grad():
    loss_sum, right = model(inputs, labels)
    expected = F.cross_entropy(model(inputs)[0], labels[0], reduction="sum")
same(loss_sum, expected, tolerance=1e-4)
print(f"{loss_sum / T:.2f} a token; ln V is {math.log(config.vocab_size):.2f}")

# %% [markdown]
# ## 9. Training
#
# Muon for the matrices of attention and MLP, AdamW for embedding and norms (`docs/learn/adamw_and_muon.md`), with
# warm-up and decay (`docs/learn/schedules.md`). It takes a minute or so.

# %%
from torchtitan_style.config.schema import LRScheduler, Optimizer
from torchtitan_style.config.schema import Muon as MuonConfig
from torchtitan_style.optim.adamw import adamw
from torchtitan_style.optim.muon import Muon
from torchtitan_style.optim.schedule import lr_factor

STEPS, ROWS, LENGTH, RATE = 250, 8, 128, 4e-3
matrices = {n: p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n}
others = {n: p for n, p in model.named_parameters() if n not in matrices}
muon = Muon(list(matrices.values()), MuonConfig(), lr=RATE, weight_decay=0.1, dtype=torch.float32)
adam = adamw(others, Optimizer(lr=RATE))
schedule = LRScheduler(warmup_steps=20)
yes = torch.tensor(True)  # whether to take the step: the package decides it on the device


def batch(tokens, rows, generator):
    """Rows from random places of the stream: inputs and labels, [rows, LENGTH] each."""
    starts = torch.randint(0, len(tokens) - LENGTH - 1, (rows,), generator=generator)
    rows = torch.stack([tokens[s : s + LENGTH + 1] for s in starts])
    return rows[:, :-1], rows[:, 1:]


@torch.no_grad()
def validate():
    loss, right = model(*batch(held_out, 32, torch.Generator().manual_seed(0)))
    return loss.item() / (32 * LENGTH), right.item() / (32 * LENGTH)


generator, losses, began = torch.Generator().manual_seed(1), [], time.time()
print("before: loss {:.2f}, accuracy {:.0%}".format(*validate()))
for step in range(1, STEPS + 1):
    inputs, labels = batch(stream, ROWS, generator)
    loss_sum, _ = model(inputs, labels)
    loss = loss_sum / labels.numel()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    if step == STEPS:  # kept for section 11: optimizers may change gradients in place
        gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    for optimizer in (muon, adam):
        for group in optimizer.param_groups:
            group["lr"] = RATE * lr_factor(step, schedule, total_steps=STEPS)
    muon.step_if(yes)
    adam.step()
    for optimizer in (muon, adam):
        optimizer.zero_grad()
    losses.append(loss.item())
print("after: loss {:.2f}, accuracy {:.0%}".format(*validate()), f"({time.time() - began:.0f} s)")

plt.figure(figsize=(7, 2.5))
plt.plot(losses)
plt.axhline(math.log(config.vocab_size), linestyle=":", label="ln V")
plt.xlabel("step")
plt.ylabel("loss")
plt.legend()
plt.show()
assert validate()[0] < 5.0

# %% [markdown]
# ## 10. Attention maps
#
# `Attention.attend` is an attribute, so that training can set another way to compute the same. We set one that keeps
# the weights.

# %%
text = "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y\n"
ids = torch.tensor([tokenizer.encode(text)])
maps = []


def attend_and_keep(q, k, v, mask, *, dropout=0.0):
    k, v = (each.repeat_interleave(q.shape[1] // each.shape[1], dim=1) for each in (k, v))
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    maps.append(scores.softmax(-1)[0])
    return maps[-1][None] @ v


plain = [layer.self_attn.attend for layer in model.model.layers]
with torch.no_grad():
    expected = model(ids)
    for layer in model.model.layers:
        layer.self_attn.attend = attend_and_keep
    same(model(ids), expected, tolerance=1e-3)
for layer, attend in zip(model.model.layers, plain, strict=True):
    layer.self_attn.attend = attend

tokens = [repr(tokenizer.show([i]))[1:-1] for i in ids[0].tolist()]
figure, axes = plt.subplots(len(maps), H, figsize=(2.6 * H, 2.6 * len(maps)))
for layer, row in enumerate(axes):
    for head, axis in enumerate(row):
        axis.imshow(maps[layer][head], cmap="Blues", vmin=0)
        axis.set_title(f"layer {layer}, head {head}", fontsize=8)
        axis.set_xticks([])
        axis.set_yticks(range(len(tokens)) if head == 0 else [], tokens if head == 0 else [], fontsize=5)
figure.tight_layout()
plt.show()

# %% [markdown]
# Some heads look at the last few tokens. Others look at one token from many later ones: the dark columns.
#
# ## 11. Gradients
#
# Their norms by layer, of the last step. A layer whose gradients are a thousand times smaller than the others' would
# not learn.

# %%
kinds = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
norms = torch.tensor(
    [
        [next(g.norm() for n, g in gradients.items() if f"layers.{i}." in n and kind in n) for kind in kinds]
        for i in range(config.num_hidden_layers)
    ]
)
plt.figure(figsize=(7, 2.5))
plt.imshow(norms.log10(), aspect="auto")
plt.colorbar(label="log10 of the norm")
plt.xticks(range(len(kinds)), kinds, rotation=30)
plt.ylabel("layer")
plt.show()

# %% [markdown]
# ## 12. What Muon does to a gradient
#
# The singular values of a gradient fall off steeply: a few directions dominate. Muon's step has the same singular
# vectors with values near 1.

# %%
from torchtitan_style.optim.orthogonalize import orthogonalize

gradient = gradients["model.layers.1.mlp.gate_proj.weight"]
before = torch.linalg.svdvals(gradient)
after = torch.linalg.svdvals(orthogonalize(gradient, rounds=5))
plt.figure(figsize=(7, 2.5))
plt.semilogy(before / before[0], label="gradient, largest = 1")
plt.semilogy(after, label="after Newton-Schulz")
plt.xlabel("number")
plt.ylabel("singular value")
plt.legend()
plt.show()
print(f"gradient: largest / median {before[0] / before.median():.0f}; step: {after[0] / after.median():.2f}")
assert after[0] / after.median() < 1.5 < before[0] / before.median()

# %% [markdown]
# ## 13. Writing
#
# Feed the model its own guesses. It has seen Python for a minute: expect its look, not its sense. Keys and values of
# earlier positions are recomputed here; `inference/cache.py` keeps them.


# %%
@torch.no_grad()
def write(prompt, tokens=80, temperature=0.7, top_k=40):
    generator = torch.Generator().manual_seed(0)
    ids = tokenizer.encode(prompt)
    for _ in range(tokens):
        logits = model(torch.tensor([ids]))[0, -1] / temperature
        best, which = logits.topk(top_k)
        ids.append(which[torch.multinomial(best.softmax(-1), 1, generator=generator)].item())
    return tokenizer.decode(ids)


print(write("class Reader:\n    def "))

# %% [markdown]
# ## Next
#
# - The same on the command line: `./run_train.sh`, minutes for a model that is larger and learns more.
# - Change `STEPS`, or `MuonConfig(per_head=True)`, and see what it does to the loss.
# - `docs/tour.md` goes through the code that does this on many devices, and the second notebook splits the model over
# two processes.
