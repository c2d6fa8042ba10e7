"""What ranks send: the formulas, against the collectives that real ranks call."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from torchtitan_style.config.files import DEFAULT_CONFIG
from torchtitan_style.config.layout import Layout
from torchtitan_style.launch.configure import load_config
from torchtitan_style.planner.activations import kept_by_layers, kept_outside
from torchtitan_style.planner.traffic import traffic_of
from torchtitan_style.planner.workload import Workload

SHAPE = ("--model.flavor", "debug", "--model.num_hidden_layers", "3", "--training.seq_len", "64",
         "--training.local_batch_size", "2", "--optimizer.name", "adamw")  # fmt: skip
CP = ("--parallelism.context_parallel_degree", "2")
TP = ("--parallelism.tensor_parallel_degree", "2")
EXPERTS = ("--model.name", "qwen3_moe", "--model.num_experts", "16")
EP = (*EXPERTS, "--parallelism.expert_parallel_degree", "2")
CASES: dict[str, tuple[dict[str, int], int, tuple[str, ...]]] = {
    "dp": ({"dp_shard": 2}, 2, ()),
    "dp, untied": ({"dp_shard": 2}, 1, ("--model.tie_word_embeddings", "false")),
    "dp, kept": ({"dp_shard": 2}, 1, ("--parallelism.fsdp_reshard_after_forward", "never")),
    "replicated": ({"dp_replicate": 2}, 1, ("--parallelism.data_parallel_replicate_degree", "2")),
    "tp": ({"tp": 2}, 1, TP),
    "tp, fp32, untied": ({"tp": 2}, 2, (*TP, "--training.mixed_precision_param", "float32",
                                        "--model.tie_word_embeddings", "false")),
    "tp, full": ({"tp": 2}, 1, (*TP, "--activation_checkpoint.mode", "full")),
    "tp, selective": ({"tp": 2}, 1, (*TP, "--activation_checkpoint.mode", "selective")),
    "cp": ({"cp": 2}, 2, CP),
    "cp, documents, fp32": ({"cp": 2}, 1, (*CP, "--data.document_mask", "true", "--training.mixed_precision_param",
                                           "float32")),
    "cp, full": ({"cp": 2}, 1, (*CP, "--activation_checkpoint.mode", "full")),
    "cp, selective": ({"cp": 2}, 1, (*CP, "--activation_checkpoint.mode", "selective")),
    "experts, dp": ({"dp_shard": 2}, 2, EXPERTS),
    "experts, ep": ({"dp_shard": 2, "ep": 2}, 1, EP),
    "experts, ep, counting": ({"dp_shard": 2, "ep": 2}, 2, (*EP, "--training.mixed_precision_param", "float32")),
    "experts, ep, full": ({"dp_shard": 2, "ep": 2}, 2, (*EP, "--activation_checkpoint.mode", "full")),
    "experts, ep, selective": ({"dp_shard": 2, "ep": 2}, 1, (*EP, "--activation_checkpoint.mode", "selective",
                                                             "--model.mlp_only_layers", "1")),
    "experts, tp": ({"tp": 2}, 2, (*EXPERTS, *TP)),
    "experts, tp, selective": ({"tp": 2}, 1, (*EXPERTS, *TP, "--activation_checkpoint.mode", "selective",
                                              "--model.mlp_only_layers", "1")),
    "experts, cp × ep": ({"cp": 2, "ep": 2}, 1, (*EP, *CP)),
}  # fmt: skip


def test_ranks_send_what_is_planned(run_ranks: Callable[..., None], tmp_path: Path) -> None:
    works, cases = {}, []
    for name, (degrees, microbatches, given) in CASES.items():
        layout = Layout(**degrees)
        overrides = [*SHAPE, *given, "--training.global_batch_size", str(2 * layout.dp * microbatches)]
        config = load_config(DEFAULT_CONFIG, overrides, world_size=2)
        works[name] = Workload.of_ranks(config, layout, on_gpu=False)[0]
        assert works[name].batch.accumulation_steps == microbatches
        keeps = config.activation_checkpoint.mode == "none" and layout.tp * layout.cp * layout.ep > 1
        cases.append({"layout": degrees, "overrides": overrides, "microbatches": microbatches, "keeps": keeps})
    (tmp_path / "cases").write_text(json.dumps(cases), encoding="utf-8")
    run_ranks(Path(__file__).with_name("traffic_of_ranks.py"), 2, tmp_path / "cases", tmp_path / "found")
    results = json.loads((tmp_path / "found").read_text(encoding="utf-8"))
    differing = {}
    for (name, work), case, found in zip(works.items(), cases, results, strict=True):
        planned: Counter[str] = Counter()
        for each in traffic_of(work):
            planned[each.kind] += each.per_step(work)
        # Norms' gradients and FSDP's padding are a few kB.
        if dict(planned) != pytest.approx(found["sent"], rel=0.03):
            differing[name] = {"planned": dict(planned), "sent": found["sent"]}
        if planned["all-to-all"] != found["sent"].get("all-to-all", 0):  # rows to experts and back, to the byte
            differing[f"{name}, rows"] = {"planned": planned["all-to-all"], "sent": found["sent"].get("all-to-all")}
        kept = kept_by_layers(work) + kept_outside(work)
        if case["keeps"] and kept != pytest.approx(found["kept"], rel=0.05):
            differing[f"{name}, kept"] = {"planned": kept, "found": found["kept"]}
    assert not differing
