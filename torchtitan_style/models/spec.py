"""ModelSpec: all that the rest of the program needs to know of a model family, in one place.

A family is a folder beside this file: its configuration, its model in plain PyTorch, and how that is parallelized. Its
``spec.py`` puts them together in one ``ModelSpec``, under the name that ``model.name`` and ``config.json`` have for it.
Nothing here imports torch: functions that need it import it when they are called.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    import torch

__all__ = ["Dimension", "ModelConfig", "ModelSpec", "OnDisk"]

Shapes = dict[str, tuple[int, ...]]


class ModelConfig(Protocol):
    """A frozen dataclass with a model's dimensions, under the names that Transformers has for them.

    Every field has a docstring, which ``--help model`` prints, and one of the types int, float, bool, str and
    tuple[int, ...], which is a list in TOML.
    Constructing one raises ValueError if the dimensions contradict each other.
    """

    @property
    def vocab_size(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def intermediate_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def dropout(self) -> float: ...
    @property
    def attention_dropout(self) -> float: ...

    @property
    def windows(self) -> list[int | None]:
        """For each layer the positions that it looks back on, itself included; None: all."""
        ...

    @property
    def num_parameters(self) -> int:
        """All weights, a tied embedding counted once."""
        ...

    @property
    def num_active_parameters(self) -> int:
        """Those that a token meets: of experts, only the chosen ones."""
        ...

    @property
    def num_matmul_parameters(self) -> int:
        """Weights that each token is multiplied with: all active matrices but the embedding look-up."""
        ...

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations to train on one token of a row of ``seq_len`` tokens."""
        ...

    def problems(self) -> list[tuple[tuple[str, ...], str]]:
        """What makes this shape impossible, as (fields concerned, explanation) pairs."""
        ...


class Dimension(NamedTuple):
    """A dimension that a parallel degree must divide."""

    field: str
    """Of the configuration."""
    what: str
    """What the ranks share, in words: "query heads"."""


class OnDisk(NamedTuple):
    """A tensor of a folder in Transformers' format, and which part of one of our parameters it is."""

    name: str
    part: tuple[int | slice, ...] = ()
    """``parameter[part]`` is the tensor. (): it is the whole parameter."""


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """One model family."""

    name: str
    """``model.name`` in a configuration, and ``model_type`` in config.json."""
    config_class: type
    """A ``ModelConfig``."""
    flavors: Mapping[str, Any]
    """Named configurations for ``model.flavor``; "small" is the default."""

    parameter_shapes: Callable[[Any], Shapes]
    """Config → names and shapes of the parameters, in the order of the layers, without building the model. A tied head
    is not one."""
    shape_fields: tuple[str, ...]
    """The fields of the configuration that decide which parameters there are, and their shapes."""
    tensor_parallel: tuple[Dimension, ...]
    """What ``parallelism.tensor_parallel_degree`` must divide."""
    tensor_parallel_dim: Callable[[str], int | None]
    """Name of a parameter → the dimension that tensor parallelism splits; None: each of its ranks holds it whole. The
    plan of a run counts with it; ``parallelize`` decides, and a test holds them together."""

    expert_parallel: tuple[Dimension, ...] = ()
    """What ``parallelism.expert_parallel_degree`` must divide; (): the family has no experts. A family with experts has
    the fields of ``Qwen3MoeConfig`` that a plan counts with."""
    is_expert: Callable[[str], bool] = lambda name: False
    """Name of a parameter → whether it is a stack of the experts of a layer, which expert parallelism shares out along
    its first dimension and FSDP shards over all ranks that are left."""

    context_parallel: bool = False
    """Whether ``parallelize`` takes ``context``, the ranks that share the positions of a row
    (``distributed/context.py``), and the model then inputs that are a part of each row: token ids, labels and positions
    [B, t] with documents of whole rows, [B, T]. It says which part in ``model.part``; while that is set to None, inputs
    are whole rows."""

    build: Callable[[Any], Any]
    """Config → the model: a module that maps (token ids, labels, documents, positions) to (sum of token losses, right
    guesses), and token ids alone to logits. It has ``tie_weights()``, ``initial_std(name)``, ``model.layers`` and
    ``lm_head``, of which training sets two attributes: ``z_loss``, to ``training.z_loss``, and ``loss_function``, if
    ``training.loss`` names one of one's own."""
    pipeline: bool = False
    """Whether the model runs as a pipeline stage: with ``model.embed_tokens``, ``model.norm``, ``lm_head`` or some of
    ``model.layers`` None. Without the embedding it takes hidden states [B, T, C] for token ids, and positions
    with them; without the head it returns hidden states."""
    use_definition: Callable[[Any], None] | None = None
    """Have a model that ``build`` has built compute by the plainest code there is, to compare others with; None: it
    does so anyway."""
    parallelize: Callable[..., None]
    """Lays a model out over a mesh for training, in place; see ``qwen3/parallelize.py``. Called with ``adapt`` only for
    LoRA."""

    is_hidden_matrix: Callable[[str, torch.Tensor], bool]
    """(name, parameter) → whether it is a matrix of a block, which maps hidden states, so that Muon takes it."""
    is_router: Callable[[str], bool] = lambda name: False
    """Name of a matrix of a block → whether it chooses experts, so that LoRA leaves it alone."""
    has_heads: Callable[[str], bool]
    """Name of a matrix → whether its rows are heads of ``head_dim`` rows each."""
    stacked_rows: Callable[[str, tuple[int, ...]], int | None] = lambda name, shape: None
    """Name and shape of a parameter → rows of each of the matrices that it is a stack of, one below the other; None: it
    is one matrix."""

    hf_architecture: str = ""
    """The class in Transformers, as "Qwen3ForCausalLM"; empty: the family is not in Transformers."""
    from_hf: Callable[[dict[str, Any]], Any] | None = None
    """The content of config.json → config. Raises ValueError, naming the field, for what is not implemented."""
    to_hf: Callable[[Any], dict[str, Any]] | None = None
    """Config → the arguments of the configuration's class in Transformers."""
    on_disk: Callable[[Any], dict[str, tuple[OnDisk, ...]]] | None = None
    """Config → the tensors in Transformers' files that make up each parameter; None: one of the same name each."""

    inference: Callable[[], InferenceForm] | None = None
    """The module with the form for generating text; None: the model runs as it is built, on one device."""

    def disk_tensors(self, config: Any) -> dict[str, tuple[OnDisk, ...]]:
        """The tensors on disk that make up each parameter."""
        if self.on_disk is not None:
            return self.on_disk(config)
        return {name: (OnDisk(name),) for name in self.parameter_shapes(config)}


class InferenceForm(Protocol):
    """A module with these functions. For ``generate`` a model is split over ranks before its weights are loaded, and
    fused after that."""

    replays: bool
    """Whether a step of decoding can be recorded on a GPU, and replayed: nothing in it waits for the device."""

    def split_problem(self, config: Any, ranks: int) -> str | None:
        """Why a model of ``config`` cannot be split over so many ranks, or None if it can."""
        ...

    def split(self, model: Any, mesh: Any) -> None:
        """Make the parameters of ``model``, on the meta device, DTensors over ``mesh``."""
        ...

    def fuse(self, model: Any, *, group: Any = None, compile: bool = False) -> None:
        """Replace layers by faster ones for inference, in place. group: the ranks of ``split``."""
        ...

    def packs(self, dtype: torch.dtype, device: torch.device) -> bool:
        """Whether ``fuse`` keeps a reordered copy of each matrix."""
        ...


def describe_size(config: ModelConfig) -> str:
    """Numbers of parameters, for a person: "30,532.1 M parameters, 3,344.5 M of them active"."""
    text = f"{config.num_parameters / 1e6:,.1f} M parameters"
    if config.num_active_parameters != config.num_parameters:
        text += f", {config.num_active_parameters / 1e6:,.1f} M of them active"
    return text
