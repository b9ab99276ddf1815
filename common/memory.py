"""Whether a training fits into the memory that is free: asked before any of it is taken.

The estimate is a lower bound, so that nothing is refused that could run: weights, gradients and AdamW's means exactly,
of activations what every backward keeps. A run that passes can still find too little; train.py then says so in a line.
"""

import bisect
import os
import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import torch

# ---- 1. what a model takes ------------------------------------------------------------------------------------------


def sizes_of_layers(c):
    """Returns letter -> (parameters of a layer, numbers that its backward keeps of a token, at least).

    c: a `nano_hybrid.HybridConfig`, or its fields in another object, as large as they may be: nothing is allocated.
    """
    C, di, groups = c.hidden_size, c.mamba_num_heads * c.mamba_head_dim, c.n_groups * c.ssm_state_size
    projected, convolved = 2 * di + 2 * groups + c.mamba_num_heads, di + 2 * groups
    mamba = C * projected + di * C + convolved * (c.conv_kernel + c.use_conv_bias) + 3 * c.mamba_num_heads + di
    queries, keys = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    attention, shared, latent = 2 * C * (queries + keys), c.moe_shared_expert_intermediate_size, c.moe_latent_size
    experts = C * c.n_routed_experts + 2 * c.n_routed_experts * (latent or C) * c.moe_intermediate_size
    experts += mlp(C, shared, c.mlp_bias) + (mlp(C, latent, c.mlp_bias) if latent else 0)
    layers = {
        "M": (mamba + c.use_bias * (projected + C), projected + 2 * di),
        "*": (attention, 2 * (queries + keys)),
        "L": (attention + c.head_dim + c.num_attention_heads, 2 * (queries + keys)),
        "-": (mlp(C, c.intermediate_size, c.mlp_bias), 2 * c.intermediate_size),
        "E": (experts, 2 * c.num_experts_per_tok * c.moe_intermediate_size + 2 * shared),
    }
    return {letter: (parameters + C, kept + 2 * C) for letter, (parameters, kept) in layers.items()}  # norm, residual


def mlp(outer, inner, bias):
    """Returns how many parameters two linear layers have, from `outer` to `inner` channels and back."""
    return 2 * outer * inner + bias * (outer + inner)


def sizes_of_model(c):
    """Returns (parameters of a `nano_hybrid.Hybrid`, numbers that a training step keeps of a token, at least)."""
    layers, C = sizes_of_layers(c), c.hidden_size
    predictor = c.mtp_hybrid_override_pattern if c.num_nextn_predict_layers else ""
    parameters = sum(layers[letter][0] for letter in c.hybrid_override_pattern + predictor)
    parameters += (1 if c.tie_word_embeddings else 2) * c.vocab_size * C + C
    parameters += 2 * C * C + 3 * C if predictor else 0
    kept = sum(layers[letter][1] for letter in c.hybrid_override_pattern)
    return parameters, kept + c.mtp_depths * sum(layers[letter][1] for letter in predictor)


def training_memory(c, tokens, width=4, processes=1, means=2):
    """Returns bytes (of weights and optimizer states, of gradients, of activations) of one process, at least.

    tokens: at once; width: bytes of an activation; means: of the gradient that the optimizer keeps, 2 of AdamW, 1 of
    Muon. All but activations are float32 and sharded over the processes, but each makes all the weights first.
    """
    parameters, kept = sizes_of_model(c)
    share = parameters // processes
    return max(4 * parameters, 4 * (1 + means) * share), 4 * share, tokens * kept * width


# ---- 2. what there is -----------------------------------------------------------------------------------------------

LIMITS = (  # of a CPU under Linux: file, pattern, bytes of a unit
    ("/proc/meminfo", r"MemAvailable:\s+(\d+) kB", 1024),
    ("/sys/fs/cgroup/memory.max", r"(\d+)", 1),  # what a container may take
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", r"(\d+)", 1),
)


def free_memory(device):
    """Returns the bytes that are free on a torch.device, or None where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    try:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))  # all there is, on Linux and macOS
    except (AttributeError, ValueError, OSError):
        pass
    for path, pattern, unit in LIMITS:
        try:
            with open(path) as file:
                found += [int(number) * unit for number in re.findall(pattern, file.read())]
        except OSError:
            pass
    return min(found, default=None)


def expect_memory(config, model_config, objective, asked, device, dtype, processes):
    """Raises ValueError, in one line, if training would take more memory than `device` has free.

    config: train.TrainConfig. asked: name -> value of the flags on the command line; the line says how large one of
    them may be.
    """
    free = free_memory(device)
    sharing = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this memory

    def needed(**other):
        """Returns what `training_memory` does, for all processes, with other values of some flags."""
        c = SimpleNamespace(**asdict(model_config) | other)
        run = replace(config, **{name: value for name, value in other.items() if hasattr(config, name)})
        means = 1 if config.optimizer == "muon" else 2
        parts = training_memory(c, objective.tokens_at_once(run), dtype.itemsize, processes, means)
        return [sharing * part for part in parts]

    def peak(**other):
        """Returns the most bytes at a time: backward frees activations as it makes gradients."""
        held, gradients, activations = needed(**other)
        return held + max(gradients, activations)

    if free is None or peak() <= free:
        return
    hint = "take a smaller --preset, --batch_size or --context"
    for name, value in asked.items():
        if type(value) is int and peak(**{name: 1}) <= free:
            largest = bisect.bisect_right(range(1, value), free, key=lambda n, name=name: peak(**{name: n}))
            hint = f"--{name} can be about {buildable(model_config, name, largest)} at most"
    held, gradients, activations = needed()
    states, activations, free = map(in_units, (held + gradients, activations, free))
    parameters, tokens = sizes_of_model(model_config)[0], objective.tokens_at_once(config)
    raise ValueError(
        f"{parameters:,} parameters, with gradients and the optimizer's states, take {states}, and {tokens:,} tokens "
        f"at once at least {activations}, but {device.type} has {free} free: {hint}"
    )


def in_units(n):
    """Returns a number of bytes for people to read."""
    return f"{n / 2**30:,.1f} GiB" if n >= 2**30 else f"{n / 2**20:,.1f} MiB"


def is_out_of_memory(error):
    """Returns whether an exception says that there was no memory left, on a GPU or on the CPU."""
    said = "can't allocate memory" in str(error) or "not enough memory" in str(error)  # a CPU's: a plain RuntimeError
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or said


def buildable(model_config, name, largest):
    """Returns the largest value of a flag, up to `largest`, with which a model can be built: heads come in groups."""
    for value in range(largest, max(1, largest - 4096), -1) if hasattr(model_config, name) else ():
        try:
            replace(model_config, **{name: value})
            return value
        except ValueError:
            pass
    return largest
