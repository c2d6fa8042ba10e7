"""Every setting, in TOML sections, with its default and its meaning.

The docstring under a field is what ``--help SECTION`` prints. Names follow torchtitan's TOML
(v0.2) where it has the setting; the others are ours. A section is handed to the part of the
program that it configures, never the whole ``Config``.
"""

from __future__ import annotations

import os
from typing import Annotated, Literal, get_origin

from pydantic import AfterValidator, BaseModel, Field

from .data import Corpus as Corpus
from .data import Data as Data
from .data import MixtureCorpus as MixtureCorpus
from .data import ValidationSet as ValidationSet
from .kinds import MOST, FiniteNonNegative, NonNegative, PathText, PipelineSchedule, Positive, PositiveOrRest, TimeLimit
from .section import Section


class Job(Section):
    """Where a run leaves its files."""

    dump_folder: Annotated[PathText, AfterValidator(os.path.expanduser)] = Field("outputs/qwen3", min_length=1)
    """Folder for everything the run writes. A folder that holds checkpoints is resumed."""
    description: str = ""
    """Free text, kept in config.toml."""
    custom_import: list[str] = []
    """Python modules to import first, from the working folder too. They may register model families, losses,
    optimizers, schedules and data sources (docs/extending.md)."""


class Model(Section):
    """Which model to train: a flavor, and any of its dimensions overridden."""

    # The dimensions are those of the model family: models/section.py adds them.
    name: str = "qwen3"
    """Model family."""
    flavor: str = "small"
    """Named set of dimensions to start from; the other keys of this section override them."""
    hf_assets_path: PathText = ""
    """Start from the weights of a model in Transformers' format, a folder or a Hub name: its
    config.json takes the place of the flavor, and its tokenizer that of data.tokenizer = "train"."""


class Training(Section):
    """Steps, batch, precision."""

    steps: Positive = 1000
    """Total optimizer steps."""
    seq_len: int = Field(512, ge=1, le=MOST)
    """Tokens in a row."""
    local_batch_size: PositiveOrRest = 8
    """Rows per forward pass on a data-parallel rank (the microbatch); -1: its whole share of global_batch_size. Smaller
    means less memory and more gradient accumulation."""
    global_batch_size: PositiveOrRest = -1
    """Rows in an optimizer step, over all ranks and accumulation; -1: no accumulation."""
    max_norm: float = Field(1.0, gt=0, allow_inf_nan=True)
    """Gradients are scaled down to this global norm when they exceed it; inf for no clipping."""
    loss: str = "cross_entropy"
    """What is minimised: "cross_entropy", or a loss of your own (docs/extending.md). Validation always reports cross
    entropy."""
    z_loss: FiniteNonNegative = 0.0
    """Weight of log² of the softmax's normaliser in the training loss, as 1e-4; keeps logits from drifting
    (PaLM, Chowdhery et al. 2022). Validation is without it."""
    seed: NonNegative = 0
    """Decides initial weights, row order and dropout."""
    mixed_precision_param: Literal["bfloat16", "float32"] = "bfloat16"
    """Type that the model computes in. Master weights and optimizer state are always float32. On a CPU without
    instructions for bfloat16 its matrices are multiplied in float32 and the results rounded, which is about as fast as
    "float32"."""
    mixed_precision_reduce: Literal["float32", "bfloat16"] = "float32"
    """Type in which gradients are summed over ranks. Tensor-parallel ranks sum those of norms in
    mixed_precision_param."""
    max_skipped_steps: NonNegative = 3
    """How many steps in a row may have a NaN or infinite loss or gradient, on any rank, before the run stops. Such a
    step is skipped: weights, optimizer and learning-rate schedule do not change, the data advances."""
    spike_sigma: FiniteNonNegative = 0.0
    """Treat a loss more than this many standard deviations above the mean of the last spike_window steps as a spike;
    0: off."""
    spike_window: int = Field(100, ge=2, le=1_000_000)
    """Number of earlier steps that a loss is compared with. No spike is detected before there are that many."""
    spike_action: Literal["skip", "rewind"] = "skip"
    """skip: as with a loss that is NaN or infinite. rewind: return to the newest checkpoint, and continue with the data
    after the spike (PaLM, Chowdhery et al. 2022, section 5.1)."""
    freeze: list[str] = []
    """Parameters that are not trained, by name; wildcards allowed, as "*embed_tokens*" or "model.layers.0.*". They take
    no gradients and no optimizer state. With [lora] all but the adapters are frozen anyway."""
    gc_freq: Positive = 50
    """Steps between garbage collections. Left to Python, each rank would collect at a different moment while the others
    wait."""


class Lora(Section):
    """Fine-tune low-rank adapters instead of the weights (LoRA, Hu et al. 2021). The run starts from the weights of
    model.hf_assets_path or checkpoint.initial_load_path, which it keeps in training.mixed_precision_param."""

    rank: NonNegative = 0
    """Rank of the adapters; 0: none, all weights are trained, and the other keys of this section are not read."""
    alpha: float = Field(16.0, gt=0, allow_inf_nan=False)
    """The adapters' output is multiplied by alpha / rank."""
    dropout: float = Field(0.0, ge=0, lt=1)
    """Probability of dropping an element of the adapters' input while training."""
    target_modules: list[str] = Field(["*"], min_length=1)
    """Linear layers of attention and MLP to adapt, by name or the end of it; wildcards allowed, as "q_proj", "mlp.*"
    or "model.layers.0.*". The default is all of them. Experts cannot be adapted."""

    @property
    def scale(self) -> float:
        """Factor on the adapters' output."""
        return self.alpha / self.rank


class LRScheduler(Section):
    """Learning rate over the run: warm-up, then a stable part, then decay."""

    warmup_steps: NonNegative | None = None
    """Steps over which the rate rises linearly to optimizer.lr. Left out: a tenth of the schedule's steps, at most
    200."""
    decay_type: str = "cosine"
    """Shape of the decay: "linear", "cosine", "sqrt" (1 - sqrt(progress), Hägele et al. 2024, section 3), or one of
    your own (docs/extending.md)."""
    decay_ratio: float | None = Field(None, ge=0, le=1)
    """Share of all steps that decays, at the end; before it the rate is constant
    (warm-up-stable-decay). Left out: everything after warm-up. 0: constant."""
    min_lr_factor: float = Field(0.0, ge=0, le=1)
    """Rate at the end, as a share of optimizer.lr."""
    total_steps: Positive | None = None
    """Length of the schedule in steps; left out: training.steps. Set it to train the first part of a longer run."""

    def warmup(self, steps: int) -> int:
        """Steps of warm-up in a run of ``steps`` steps."""
        if self.warmup_steps is None:
            return min(200, (self.total_steps or steps) // 10)
        return self.warmup_steps


class Muon(Section):
    """For optimizer.name = "muon": the matrices of attention and MLP."""

    lr: float | None = Field(None, gt=0, allow_inf_nan=False)
    """Learning rate after warm-up; left out: optimizer.lr, which fits "match_rms_adamw"."""
    adamw_lr: float | None = Field(None, gt=0, allow_inf_nan=False)
    """AdamW's learning rate for the other parameters: embedding, head, norms, biases. Left out: optimizer.lr."""
    weight_decay: float | None = Field(None, ge=0, allow_inf_nan=False)
    """Left out: optimizer.weight_decay."""
    momentum: float = Field(0.95, ge=0, lt=1)
    """Decay of the gradient's running mean."""
    nesterov: bool = True
    """Nesterov momentum: mix the gradient into the running mean once more before orthogonalisation."""
    ns_steps: int = Field(5, ge=1, le=100)
    """Steps of the Newton-Schulz iteration."""
    per_head: bool = False
    """Orthogonalise each head of q, k and v separately, instead of all heads together. Adapters (LoRA) have none."""
    normuon_beta2: float = Field(0.0, ge=0, lt=1)
    """NorMuon (Li et al. 2025), if above 0; 0.95 is usual. Each row of an orthogonalised matrix is divided by the root
    of a running mean of its squares, which decays by this factor; the matrix keeps its norm."""
    adjust_lr: Literal["match_rms_adamw", "original"] = "match_rms_adamw"
    """How the step depends on a matrix's shape. match_rms_adamw: 0.2·sqrt(max(out, in)), an element
    changes about as much as under AdamW (Liu et al. 2025). original: sqrt(max(1, out/in)) (Jordan 2024)."""
    warmup_steps: NonNegative | None = None
    """This and the next three: a schedule of its own; left out: as in [lr_scheduler]."""
    decay_type: str | None = None
    """As lr_scheduler.decay_type."""
    decay_ratio: float | None = Field(None, ge=0, le=1)
    """As lr_scheduler.decay_ratio."""
    min_lr_factor: float | None = Field(None, ge=0, le=1)
    """As lr_scheduler.min_lr_factor."""

    def schedule(self, general: LRScheduler) -> LRScheduler:
        """``general`` with what is set here instead."""
        own = ("warmup_steps", "decay_type", "decay_ratio", "min_lr_factor")
        return general.model_copy(update={k: v for k, v in self if k in own and v is not None})


class Optimizer(Section):
    """The optimizer and its step size."""

    name: str = "adamw"
    """"adamw" (Loshchilov & Hutter 2019). "muon" (Jordan 2024): for the matrices of attention and MLP, with
    AdamW for embedding, head, norms and biases; see optimizer.muon. Or one of your own (docs/extending.md)."""
    lr: float = Field(3e-4, gt=0, allow_inf_nan=False)
    """Learning rate after warm-up."""
    beta1: float = Field(0.9, ge=0, lt=1)
    """Decay of the gradient's running mean."""
    beta2: float = Field(0.95, ge=0, lt=1)
    """Decay of the squared gradient's running mean."""
    eps: float = Field(1e-8, gt=0, allow_inf_nan=False)
    """Added to the root of the squared gradient's mean."""
    weight_decay: FiniteNonNegative = 0.1
    """Share of a weight taken off per step and unit of learning rate. Norm weights and biases are not
    decayed."""
    no_decay: list[str] = []
    """More parameters that AdamW does not decay, by name; wildcards allowed, as "*embed_tokens*"."""
    muon: Muon = Muon()

    @property
    def muon_lr(self) -> float:
        """Muon's learning rate after warm-up."""
        return self.lr if self.muon.lr is None else self.muon.lr

    @property
    def adamw_lr(self) -> float:
        """AdamW's learning rate after warm-up."""
        return self.muon.adamw_lr if self.name == "muon" and self.muon.adamw_lr else self.lr

    @property
    def muon_weight_decay(self) -> float:
        """Muon's weight decay."""
        return self.weight_decay if self.muon.weight_decay is None else self.muon.weight_decay


class Parallelism(Section):
    """How many ranks share the data and the model. Their product is the number of processes."""

    data_parallel_replicate_degree: Positive = 1
    """Groups of ranks that each hold all shards (hybrid sharding: shard within a host, replicate
    across hosts)."""
    data_parallel_shard_degree: PositiveOrRest = -1
    """Ranks that parameters, gradients and optimizer state are sharded over (FSDP2); -1: all that
    the other degrees leave."""
    tensor_parallel_degree: Positive = 1
    """Ranks that each matrix and the sequence are split over."""
    context_parallel_degree: Positive = 1
    """Ranks that the positions of each row are split over; each gathers the keys and values of all. Parameters are
    sharded over them, too. training.seq_len must be a multiple of 2 · context_parallel_degree ·
    tensor_parallel_degree."""
    pipeline_parallel_degree: Positive = 1
    """Pipeline stages: groups of ranks that each hold some of the blocks. A step's microbatches (global_batch_size /
    local_batch_size / data-parallel ranks) go through them one after another."""
    pipeline_parallel_schedule: PipelineSchedule = "1F1B"
    """The order of forward and backward passes. 1F1B (Narayanan et al. 2019): a stage keeps the activations of at most
    as many microbatches as there are stages from it to the last. GPipe (Huang et al. 2019): all forward passes first.
    Interleaved1F1B (Narayanan et al. 2021) and ZBVZeroBubble (Qi et al. 2023): two stages on each rank, which halves
    the idle time; ZBVZeroBubble fills more of it with the gradients of weights, and cannot be compiled."""
    pipeline_parallel_blocks: list[NonNegative] = []
    """Number of blocks in each stage, first to last, as [21, 19]; left out: balanced by the cost of blocks, embedding
    and head."""
    expert_parallel_degree: Positive = 1
    """Ranks that the experts of each layer are distributed over, in mixture-of-experts models. They are taken from the
    ranks of data_parallel_shard_degree and context_parallel_degree. Tokens are sent to their experts and back."""
    fsdp_reshard_after_forward: Literal["always", "never"] | None = None
    """always: gathered parameters are freed after a block's forward and gathered again for its
    backward. never: kept, for more memory and less communication. Left out: always; never with a pipeline, which would
    gather them for each microbatch."""
    fsdp_reduce_gradients: Literal["each_microbatch", "last_microbatch"] | None = None
    """When a step has several microbatches. each_microbatch: gradients are summed over the ranks, and only this rank's
    shard is kept. last_microbatch: each rank keeps whole gradients until the last, for less communication and
    4 bytes of memory per parameter. Left out: each_microbatch; with a pipeline last_microbatch, the only choice."""


class ActivationCheckpoint(Section):
    """Trade compute for memory: recompute activations in the backward pass."""

    mode: Literal["none", "selective", "full", "memory_budget"] = "none"
    """none: keep all activations (on CPU a compiled block recomputes what takes longer to read). full: keep each
    block's input only. selective: see selective_ac_option. memory_budget: let the compiler choose."""
    memory_budget: float = Field(default=0.5, ge=0, le=1)
    """For mode = "memory_budget", which needs compile.enable: share of the activations to keep, from 0, each graph's
    inputs only, to 1, all. The compiler recomputes first what takes the least time."""
    selective_ac_option: str = "op"
    """For mode = "selective". "op": in each block keep the outputs of matrix multiplications and
    attention, recompute the rest. A number n, as "2": full checkpointing of every n-th block."""


class Compile(Section):
    """torch.compile."""

    enable: bool = False
    """Compile the transformer block, once for all blocks, and the loss. Needs a C++ compiler on CPU."""


class Checkpoint(Section):
    """Saving and resuming."""

    enable: bool = True
    """Save checkpoints, and resume from them."""
    interval: Positive = 500
    """Steps between checkpoints. The last step is always saved."""
    async_mode: Literal["disabled", "async"] = "disabled"
    """async: training waits only while the state is copied to host memory (as much as the state), and continues while
    the copy is written."""
    on_error: Literal["stop", "warn"] = "stop"
    """When a checkpoint cannot be saved, as on a full disk: stop the run, or warn and continue. Earlier checkpoints
    stay intact either way."""
    keep_latest_k: NonNegative = 3
    """Checkpoints to keep, besides the best; 0: all. Older ones are deleted only after a newer one has been read
    back and verified."""
    keep_every: NonNegative = 0
    """Also keep every checkpoint whose step is a multiple of this, permanently; 0: none."""
    keep_best: bool = True
    """Also save when best_metric is the lowest so far, and name it in checkpoint/best."""
    best_metric: str = "val_loss"
    """The loss that decides which checkpoint is the best: "val_loss", that of the held-out documents of the corpus, or
    "val_loss/NAME", that of a set of validation.sets."""
    initial_load_path: PathText = ""
    """Start a new run from the weights of another: its folder, or one of its checkpoints. Dimensions
    and tokenizer come with them. Optimizer and data start fresh."""
    switch_optimizer: bool = False
    """Allow a resume with another optimizer.name than before: its state then starts fresh."""
    allow_changed_data: bool = False
    """Allow a resume although the corpus, its tokens, the tokenizer or the mixture's weights have changed: the run
    continues at the same position of the new data, so rows may repeat or be skipped. A tokenizer that was trained on
    the corpus is kept."""
    load_step: int = Field(-1, ge=-1)
    """Step to resume from; -1: the newest that verifies. Used once: when started again, the run resumes from its
    newest checkpoint since. 0: start from scratch, which needs a dump folder without checkpoints."""


class Validation(Section):
    """Loss, perplexity and token accuracy on held-out documents."""

    enable: bool = True
    """Validate before the first step, every freq steps and at the end."""
    freq: Positive = 500
    """Steps between validations."""
    steps: int = Field(-1, ge=-1)
    """Batches of global_batch_size rows per validation; -1: all held-out rows (with data.streaming a
    number is needed: that many are collected once, from the start of the stream)."""
    sets: list[ValidationSet] = []
    """Further held-out sets, one [[validation.sets]] entry each, with name, and dataset ("files" if left out), subset,
    split, paths, text_key, format, messages_key and train_on as in [data]. Each is validated whole, and has
    val_loss/NAME, val_perplexity/NAME, val_accuracy/NAME and val_bits_per_byte/NAME. With sets,
    data.validation_fraction may be 0: then they alone are validated."""


class Metrics(Section):
    """What is shown and recorded. metrics.jsonl always has every step."""

    log_freq: Positive = 10
    """Steps between lines on the console; figures are read from the device only then."""
    enable_tensorboard: bool = True
    """Write TensorBoard events to the dump folder."""
    enable_wandb: bool = False
    """Log to Weights & Biases; needs the wandb package (the "wandb" extra)."""


class Profiling(Section):
    """torch.profiler traces."""

    enable_profiling: bool = False
    """Record traces, which Perfetto and chrome://tracing can show."""
    profile_freq: Positive = 100
    """Steps from one recorded step to the next."""
    save_traces_folder: PathText = Field("profile_traces", min_length=1)
    """Folder for traces, inside the dump folder."""


class Comm(Section):
    """Collective communication."""

    init_timeout_seconds: TimeLimit = 600
    """Seconds without progress on any rank before the run is ended, until the first step is done (compilation
    included)."""
    train_timeout_seconds: TimeLimit = 300
    """Seconds without progress on any rank before the run is ended, after the first step. It names the rank that the
    others wait for, and writes the stacks of all ranks to hang/."""
    shutdown_timeout_seconds: TimeLimit = 120
    """Seconds that ranks have to save after a signal to stop, before the launcher kills them."""
    host_timeout_seconds: TimeLimit = 30
    """Seconds without a heartbeat after which a host counts as lost."""
    rejoin_timeout_seconds: TimeLimit = 60
    """With NNODES=MIN:MAX: seconds that the remaining hosts wait for others before they train without them."""


class Generation(Section):
    """A sample of text, printed at each validation and at the end."""

    enable: bool = True
    """Print samples."""
    prompt: str | None = None
    """Text that the sample continues; empty: starts a new document. Left out: "def" where the corpus is stdlib, else
    empty."""
    max_new_tokens: Positive = 96
    """Tokens to sample."""
    temperature: FiniteNonNegative = 0.7
    """Logits are divided by it; 0: always the most likely token."""
    top_k: NonNegative = 40
    """Sample from the k most likely tokens; 0: from all."""


class Debug(Section):
    """For debugging."""

    deterministic: bool = False
    """Use only deterministic kernels (slower on CUDA; CPU kernels are deterministic anyway)."""


class Config(Section):
    """All sections."""

    job: Job = Job()
    model: Model = Model()
    data: Data = Data()
    training: Training = Training()
    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer()
    lr_scheduler: LRScheduler = LRScheduler()
    parallelism: Parallelism = Parallelism()
    activation_checkpoint: ActivationCheckpoint = ActivationCheckpoint()
    compile: Compile = Compile()
    checkpoint: Checkpoint = Checkpoint()
    validation: Validation = Validation()
    metrics: Metrics = Metrics()
    profiling: Profiling = Profiling()
    comm: Comm = Comm()
    generation: Generation = Generation()
    debug: Debug = Debug()

    @property
    def holds_out(self) -> bool:
        """Whether documents of the corpus are held out, and validated."""
        return self.validation.enable and self.data.validation_fraction > 0

    @property
    def sample_prompt(self) -> str:
        """The text that samples continue, "" for a new document."""
        if self.generation.prompt is not None:
            return self.generation.prompt
        return "def" if self.data.dataset == "stdlib" else ""

    @property
    def initial_weights(self) -> str:
        """Where a new run's weights come from; empty: drawn at random."""
        return self.model.hf_assets_path or self.checkpoint.initial_load_path


def sections_of(schema: type[BaseModel], prefix: str = "") -> dict[str, type[BaseModel]]:
    """Every section of ``schema`` by its name in TOML, as "optimizer" and "optimizer.muon"."""
    found: dict[str, type[BaseModel]] = {}
    for name, field in schema.model_fields.items():
        kind = field.annotation
        # In Python 3.10 list[str] is an instance of type, but no class.
        if get_origin(kind) is None and isinstance(kind, type) and issubclass(kind, Section):
            found[prefix + name] = kind
            found |= sections_of(kind, f"{prefix}{name}.")
    return found
