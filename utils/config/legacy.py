"""Names of settings in the flat configuration files of other programs: those renamed here, and those not used.

docs/weights.md shows both tables.
"""

from __future__ import annotations

RENAMED = {  # name in other programs -> name here
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
NO_COUNTERPART = {  # name -> why it is ignored, or what replaces it
    "vocab_size": "the tokenizer determines it",
    "decay_lr": "schedule constant keeps the learning rate",
    "init_from": "--init-from and --resume select where training begins",
    "out_dir": "each run gets its own folder in runs_dir",
    "checkpoint_dir": "each run gets its own folder in runs_dir",
    "save_dir": "each run gets its own folder in runs_dir",
    "log_dir": "each run gets its own folder in runs_dir",
    "model_name": "run_tag names a run",
    "always_save_checkpoint": "checkpoint_interval sets how often checkpoints are saved",
    "eval_only": "evaluate.py does that",
    "wandb_log": "wandb_mode switches Weights & Biases on",
    "wandb_project": "experiment names the project",
    "wandb_run_name": "run_tag names a run",
    "backend": "it depends on the device: NCCL on GPUs, gloo on the CPU",
    "use_amp": "dtype sets the precision",
    "save_dtype": "checkpoints are float32",
    "use_loss_mask": "loss_after selects the tokens that count",
    "rope_scale": "rope_scaling and rope_factor scale rotary positions",
    "neftune_alpha": "no noise is added to embeddings",
    "segment_position_reset": "packing determines where positions restart",
    "batch_sampling_mode": "packing determines how samples are drawn",
    "pad_token_id": "rows are packed, not padded",
    "episode_min_tokens": "prepare.py removes short documents",
    "epoch_seed": "seed determines the order",
    "epoch_shuffle": "samples are always shuffled",
    "epoch_drop_last": "every batch is full",
}


def ignored_line(name: str) -> str:
    """The message for a name without counterpart."""
    return f"{name} has no counterpart here, so it is ignored: {NO_COUNTERPART[name]}"
