"""The range of every setting that is a number: of a run, a model, an objective, a sample. One table, one check.

A number out of its range would otherwise be noticed late (a loss of NaN after an hour), or never. The bounds are wide:
they keep out what cannot train, not what is unusual. What fits into memory is asked in common/memory.py.
"""

import sys
from dataclasses import fields
from types import NoneType
from typing import get_args, get_type_hints

RATE = 1e-12, 10.0  # a learning rate; AdamW moves a weight by about that much in a step
SHARE = 0.0, 1.0
WEIGHT = 0.0, 1000.0  # of a term of a loss, or of a reward
SIZE = 1, 10**15
COUNT = 0, 10**15
FINITE = -sys.float_info.max, sys.float_info.max

RANGES = {  # setting -> (lowest, highest), both included
    # ---- train.TrainConfig
    "lr": RATE, "muon_lr": RATE, "beta1": (0.0, 0.999999), "beta2": (0.0, 0.999999), "weight_decay": (0.0, 100.0),
    "decay": SHARE, "grad_clip": (1e-6, 1e9), "context": SIZE, "batch_size": SIZE, "grad_accum": (1, 2**16),
    "steps": SIZE, "warmup": COUNT, "seed": (0, 2**63 - 1), "eval_every": SIZE, "save_every": SIZE,
    # ---- nano_hybrid.HybridConfig
    "rotary_base": (1.0, 1e12), "lla_ridge": (0.0, 1e6), "layer_norm_epsilon": (1e-12, 1.0),
    "initializer_range": (1e-6, 1.0), "hidden_dropout": (0.0, 0.99), "routed_scaling_factor": (1e-3, 1000.0),
    "router_aux_loss_coef": WEIGHT, "router_bias_update_rate": SHARE, "mtp_loss_weight": WEIGHT,
    "vocab_size": SIZE, "hidden_size": SIZE, "num_attention_heads": SIZE, "num_key_value_heads": SIZE, "head_dim": SIZE,
    "intermediate_size": SIZE, "mamba_num_heads": SIZE, "mamba_head_dim": SIZE, "ssm_state_size": SIZE,
    "n_groups": SIZE, "conv_kernel": (1, 1024), "chunk_size": SIZE, "n_routed_experts": SIZE,
    "num_experts_per_tok": SIZE, "moe_intermediate_size": SIZE, "moe_shared_expert_intermediate_size": SIZE,
    "moe_latent_size": SIZE, "n_group": SIZE, "topk_group": SIZE, "num_nextn_predict_layers": (0, 1),
    "mtp_depths": (1, 64),
    # ---- grpo.GRPOConfig
    "warm_start": COUNT, "group_size": SIZE, "updates": SIZE, "sampler_every": SIZE, "dynamic_sampling": (0, 1000),
    "curriculum": COUNT, "low_effort_tokens": SIZE, "rl_lr": RATE, "temperature": (0.0, 100.0),
    "eval_temperature": (0.0, 100.0), "clip_low": SHARE, "clip_high": WEIGHT, "entropy_coef": WEIGHT,
    "kl_coef": WEIGHT, "cut_thoughts": SHARE, "no_thoughts": SHARE, "low_effort": SHARE, "focus": SHARE,
    "length_coef": WEIGHT,
    # ---- mdlm_dultra.DUltraConfig
    "pretrain": COUNT, "imitate": COUNT, "replay_rows": SIZE, "block_size": SIZE, "smoothing": (0.0, 0.49),
    "imitate_lr": (0.0, 10.0), "planner_lr": (0.0, 10.0), "backbone_lr": RATE, "efficiency": WEIGHT,
    "distill_coef": WEIGHT, "advantage_floor": (-1000.0, 1000.0),
    # ---- sample.SampleConfig
    "max_new_tokens": SIZE, "num_samples": (1, 2**16), "top_k": SIZE, "top_p": (1e-6, 1.0), "draft": COUNT,
    "think": COUNT,
}  # fmt: skip
SAID = {bool: "true or false", str: "a string", int: "a whole number", float: "a number"}


def type_of(hint):
    """Returns the type that a field holds: that of its type hint, without the None of `int | None`."""
    return next(kind for kind in get_args(hint) or [hint] if kind is not NoneType)


def check_ranges(config, prefix="--", **own):
    """Raises ValueError, in one line, for a field of a dataclass that is of another type, or a number out of range.

    prefix: "--" where the fields are flags. own: name -> (lowest, highest), over RANGES. A number that neither has must
    be finite.
    """
    hints = get_type_hints(type(config))
    for name, value in ((f.name, getattr(config, f.name)) for f in fields(config)):
        kind = type_of(hints[name])
        if kind not in SAID or (value is None and kind is not hints[name]):
            continue
        right = (int, float) if kind is float else kind
        if not isinstance(value, right) or isinstance(value, bool) != (kind is bool):
            raise ValueError(f"{prefix}{name}={value!r} must be {SAID[kind]}")
        if kind in (int, float):
            low, high = (RANGES | own).get(name, FINITE)
            if not low <= value <= high:
                span = f"of at least {low}" if kind is int and value < low else f"from {low:g} to {high:g}"
                raise ValueError(f"{prefix}{name}={value} must be {SAID[kind]} {span}")
