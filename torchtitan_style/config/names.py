"""Which setting a mistyped or foreign name was meant to be.

People bring names from torchtitan, Transformers' TrainingArguments, LitGPT, nanochat and Axolotl. Those are looked
up; other names are compared with all that there are.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping

from pydantic import BaseModel

Sections = Mapping[str, type[BaseModel]]
"""The schema: each section by its name in TOML."""

_MOVED = {
    # torchtitan, past and present
    "training.dataset": "data.dataset",
    "training.dataset_path": "data.paths",
    "training.batch_size": "training.local_batch_size",
    "training.warmup_steps": "lr_scheduler.warmup_steps",
    "training.compile": "compile.enable",
    "training.gradient_accumulation_steps": "training.global_batch_size",
    "training.data_parallel_degree": "parallelism.data_parallel_shard_degree",
    "training.data_parallel_shard_degree": "parallelism.data_parallel_shard_degree",
    "training.data_parallel_replicate_degree": "parallelism.data_parallel_replicate_degree",
    "training.tensor_parallel_degree": "parallelism.tensor_parallel_degree",
    "model.tokenizer_path": "data.tokenizer",
    "checkpoint.initial_load_in_hf": "model.hf_assets_path",
    "debug.seed": "training.seed",
    "checkpoint.enable_checkpoint": "checkpoint.enable",
    "validation.interval": "validation.freq",
    "lr_scheduler.lr_min": "lr_scheduler.min_lr_factor",
    "model.dim": "model.hidden_size",
    "model.n_layers": "model.num_hidden_layers",
    "model.n_heads": "model.num_attention_heads",
    "model.n_kv_heads": "model.num_key_value_heads",
}
"""Names that mean this in their section only."""

_FOREIGN = {
    "optimizer.lr": "learning_rate max_lr peak_lr base_lr max_learning_rate",
    "optimizer.muon.lr": "matrix_lr muon_lr",
    "optimizer.name": "optim optimizer_type optimizer_name",
    "optimizer.beta1": "adam_beta1",
    "optimizer.beta2": "adam_beta2",
    "optimizer.eps": "adam_epsilon epsilon adam_eps",
    "optimizer.weight_decay": "wd decay_rate",
    "lr_scheduler.warmup_steps": "lr_warmup_steps warmup_iters num_warmup_steps warmup_ratio warmup_fraction",
    "lr_scheduler.decay_type": "lr_scheduler_type scheduler_type",
    "lr_scheduler.decay_ratio": "warmdown_ratio cooldown_ratio",
    "lr_scheduler.min_lr_factor": "min_lr min_lr_ratio final_lr_frac lr_min",
    "training.steps": "max_steps num_iterations max_iters train_steps total_iterations num_steps num_train_steps",
    "training.seq_len": "max_seq_len max_seq_length sequence_len sequence_length block_size context_length max_length",
    "training.local_batch_size": (
        "per_device_train_batch_size device_batch_size micro_batch_size batch_size train_batch_size"
    ),
    "training.global_batch_size": (
        "total_batch_size gradient_accumulation_steps gradient_accumulation_iters grad_accum_steps"
    ),
    "training.max_norm": "max_grad_norm grad_clip clip_grad_norm gradient_clipping gradient_clip_val",
    "training.mixed_precision_param": "bf16 fp16 dtype precision mixed_precision",
    "training.seed": "random_seed data_seed",
    "data.dataset": "dataset_name datasets",
    "data.paths": "data_path data_dir train_file data_files train_data dataset_path",
    "data.tokenizer": "tokenizer_name tokenizer_dir tokenizer_path tokenizer_name_or_path",
    "data.text_key": "text_column dataset_text_field text_field",
    "data.packing": "sample_packing",
    "data.messages_key": "messages_column messages_field field_messages",
    "data.train_on": "assistant_only_loss completion_only_loss train_on_inputs train_on_responses_only roles_to_train",
    "data.num_workers": "dataloader_num_workers",
    "data.prepared_folder": "dataset_prepared_path",
    "data.validation_fraction": "val_set_size val_split_fraction val_split test_size",
    "model.hf_assets_path": "model_name_or_path base_model initial_load_in_hf checkpoint_dir",
    "model.flavor": "model_name model_size",
    "model.hidden_size": "dim n_embd d_model model_dim n_embed",
    "model.num_hidden_layers": "n_layers n_layer num_layers depth",
    "model.num_attention_heads": "n_heads n_head num_heads",
    "model.num_key_value_heads": "n_kv_heads n_kv_head n_query_groups num_kv_heads",
    "model.intermediate_size": "ffn_dim hidden_dim ffn_hidden_size",
    "model.rope_theta": "rope_base",
    "model.rms_norm_eps": "norm_eps",
    "model.tie_word_embeddings": "tie_embeddings enable_weight_tying",
    "lora.rank": "lora_r lora_rank r",
    "lora.alpha": "lora_alpha",
    "lora.dropout": "lora_dropout",
    "lora.target_modules": "lora_target_modules",
    "parallelism.tensor_parallel_degree": "tp tp_size tensor_parallel tensor_parallel_size",
    "parallelism.pipeline_parallel_degree": "pp pp_size pipeline_parallel pipeline_parallel_size",
    "parallelism.context_parallel_degree": "cp cp_size context_parallel context_parallel_size sequence_parallel_size",
    "parallelism.data_parallel_shard_degree": "dp_shard dp_size fsdp_size data_parallel_size fsdp",
    "parallelism.data_parallel_replicate_degree": "dp_replicate",
    "compile.enable": "torch_compile",
    "activation_checkpoint.mode": "gradient_checkpointing activation_checkpointing",
    "checkpoint.interval": "save_steps save_interval save_every checkpoint_interval",
    "checkpoint.keep_latest_k": "save_total_limit",
    "checkpoint.load_step": "resume_from_step resume_step",
    "validation.enable": "do_eval eval_strategy evaluation_strategy",
    "validation.freq": "eval_steps eval_interval eval_every validation_interval val_interval",
    "validation.steps": "eval_iters max_eval_steps val_max_steps",
    "metrics.log_freq": "logging_steps log_interval log_every log_every_n_steps",
    "metrics.enable_wandb": "wandb use_wandb report_to",
    "metrics.enable_tensorboard": "tensorboard use_tensorboard",
    "job.dump_folder": "output_dir out_dir save_dir run_dir",
    "job.description": "run_name experiment_name wandb_project wandb_name",
}
"""Our name: what others call it, in whatever section."""

_BY_FOREIGN_NAME = {foreign: ours for ours, names in _FOREIGN.items() for foreign in names.split()}

_NO_COUNTERPART = {
    "compile.scope": "blocks are compiled one by one",
    "optimizer.fused": "the fused implementation is used wherever there is one",
    "optimizer.implementation": "the fused implementation is used wherever there is one",
    "checkpoint.folder": "checkpoints are in the folder checkpoint/ of job.dump_folder",
    "checkpoint.export_dtype": "export-hf writes a model in Transformers' format",
    "checkpoint.last_save_model_only": "export-hf writes a model without the optimizer",
    "checkpoint.last_save_in_hf": "export-hf writes a model in Transformers' format",
    "num_train_epochs": "training.steps says how long to train; the run prints the epochs",
    "num_epochs": "training.steps says how long to train; the run prints the epochs",
    "epochs": "training.steps says how long to train; the run prints the epochs",
    "resume_from_checkpoint": "the same job.dump_folder is resumed by itself",
    "load_in_4bit": "quantized weights are not built",
    "load_in_8bit": "quantized weights are not built",
}
"""What has no setting here, and why; by key or, in any section, by name."""


def all_keys(sections: Sections) -> list[str]:
    """Every setting as "section.key"."""
    keys = [f"{section}.{name}" for section, model in sections.items() for name in model.model_fields]
    return [key for key in keys if key not in sections]


def did_you_mean(key: str, sections: Sections) -> str:
    """The right name for ``section.key`` or a bare name, as the tail of a message. Empty if nothing is near."""
    section, _, name = key.rpartition(".")
    name = name.replace("-", "_")
    if why := _NO_COUNTERPART.get(key) or _NO_COUNTERPART.get(name):
        return f"; {why}"
    if key in _MOVED:
        return f"; here it is {_MOVED[key]}"
    elsewhere = [k for k in all_keys(sections) if k.rpartition(".")[2] == name]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    if name in _BY_FOREIGN_NAME:
        return f"; here it is {_BY_FOREIGN_NAME[name]}"
    if near := _nearest_key(section, name, sections):
        return f"; did you mean {near}?"
    if close := difflib.get_close_matches(name, _BY_FOREIGN_NAME, n=1, cutoff=0.85):
        return f"; did you mean {_BY_FOREIGN_NAME[close[0]]}?"
    if not section:
        return nearest_section(name, sections)
    return f"; --help {section} lists the keys" if section in sections else ""


def _nearest_key(section: str, name: str, sections: Sections) -> str:
    """The key with a name like ``name``, preferably in ``section``; empty if there is none."""
    own = sections[section].model_fields if section in sections else ()
    if close := difflib.get_close_matches(name, own, n=1, cutoff=0.7):
        return f"{section}.{close[0]}"
    by_name = {key.rpartition(".")[2]: key for key in reversed(all_keys(sections))}
    close = difflib.get_close_matches(name, by_name, n=1, cutoff=0.8)
    if close:
        return by_name[close[0]]
    if section in sections:
        # A part of a longer name, as "k" words for keep_latest_k, says what was meant if it is the only one.
        holding = [key for key in own if f"_{name}_" in f"_{key}_"]
        return f"{section}.{holding[0]}" if len(holding) == 1 else ""
    close = difflib.get_close_matches(f"{section}.{name}", all_keys(sections), n=1, cutoff=0.8)
    return close[0] if close else ""


def nearest_section(name: str, sections: Sections) -> str:
    """The section that ``name`` was meant to be, as the tail of a message, or else a list of all."""
    close = difflib.get_close_matches(name, list(sections), n=1)
    close = close or [key for key in all_keys(sections) if key.rpartition(".")[2] == name][:1]
    return f"; did you mean {close[0]}?" if close else f"; the sections are {', '.join(sections)}"
