"""Names that settings have in flat configuration files of other programs, and what has no counterpart here.

docs/weights.md shows both tables.
"""

from __future__ import annotations

RENAMED = {  # there -> here
    "embedding_dim": "n_embd",
    "embed_dim": "n_embd",
    "d_model": "n_embd",
    "num_heads": "n_head",
    "n_heads": "n_head",
    "num_layers": "n_layer",
    "n_layers": "n_layer",
    "n_kv_heads": "n_kv_head",
    "num_kv_heads": "n_kv_head",
    "feedforward_dim": "ffn_dim",
    "dim_feedforward": "ffn_dim",
    "d_ff": "ffn_dim",
    "context_length": "block_size",
    "max_seq_len": "block_size",
    "dropout_rate": "dropout",
    "pos_encoding": "position",
    "mlp_type": "mlp",
    "norm_type": "norm",
    "tie_weights": "tie_embeddings",
    "lr": "learning_rate",
    "num_epochs": "epochs",
    "max_steps": "max_iters",
    "warmup_steps": "warmup_iters",
    "use_checkpoint": "activation_checkpointing",
}
NO_COUNTERPART = {  # and why
    "vocab_size": "the tokenizer says it",
    "decay_lr": "schedule constant keeps the learning rate",
    "init_from": "--init-from and --resume say where training begins",
    "out_dir": "a run has a folder of its own in runs_dir",
    "checkpoint_dir": "a run has a folder of its own in runs_dir",
    "save_dir": "a run has a folder of its own in runs_dir",
    "log_dir": "a run has a folder of its own in runs_dir",
    "model_name": "run_tag names a run",
    "always_save_checkpoint": "checkpoint_interval says how often one is saved",
    "eval_only": "evaluate.py does that",
    "wandb_log": "wandb_mode switches Weights & Biases on",
    "wandb_project": "experiment names the project",
    "wandb_run_name": "run_tag names a run",
    "backend": "the device decides: NCCL on GPUs, gloo on the CPU",
    "use_amp": "dtype says the precision",
    "save_dtype": "checkpoints keep float32",
    "use_loss_mask": "loss_after says what counts",
    "rope_scale": "rope_scaling and rope_factor scale rotary positions",
    "neftune_alpha": "embeddings get no noise",
    "segment_position_reset": "packing says where positions begin",
    "batch_sampling_mode": "packing says how samples are drawn",
    "pad_token_id": "rows are packed, not padded",
    "episode_min_tokens": "prepare.py removes short documents",
    "epoch_seed": "seed decides the order",
    "epoch_shuffle": "samples are always shuffled",
    "epoch_drop_last": "every batch is full",
}


def ignored_line(name: str) -> str:
    """What is said of a name without counterpart."""
    return f"{name} has no counterpart here, so it is ignored: {NO_COUNTERPART[name]}"
