"""Whether a training fits into the memory that is free: asked before any of it is taken.

The estimate is a lower bound, so that nothing is refused that could run: weights, gradients and AdamW's means exactly,
activations as autograd keeps them (counted on small models, and rounded down). A run that passes can still find too
little; train.py then says so in one line.
"""

import bisect
import os
import re
from dataclasses import asdict, replace
from types import SimpleNamespace

import torch

from kernels import pick_backend

# ---- 1. what a model takes ------------------------------------------------------------------------------------------


def parameters_of_layers(c):
    """Returns letter -> parameters of a layer with its norm. c: a `nano_hybrid.HybridConfig`, or its fields alone."""
    C, di = c.hidden_size, c.mamba_num_heads * c.mamba_head_dim
    convolved = di + 2 * c.n_groups * c.ssm_state_size
    projected = di + convolved + c.mamba_num_heads
    mamba = C * projected + di * C + c.use_bias * (projected + C)
    mamba += convolved * (c.conv_kernel + c.use_conv_bias) + 3 * c.mamba_num_heads + di
    attention = 2 * C * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    width = c.moe_latent_size or C
    experts = C * c.n_routed_experts + 2 * c.n_routed_experts * width * c.moe_intermediate_size
    experts += mlp(C, c.moe_shared_expert_intermediate_size, c.mlp_bias)
    experts += mlp(C, c.moe_latent_size, c.mlp_bias) if c.moe_latent_size else 0
    layers = {"M": mamba, "*": attention, "L": attention + c.head_dim + c.num_attention_heads, "E": experts}
    layers["-"] = mlp(C, c.intermediate_size, c.mlp_bias)
    return {letter: parameters + C for letter, parameters in layers.items()}


def activations_of_layers(c, context, fused):
    """Returns letter -> numbers that the backward of a layer keeps of a token, at least.

    fused: whether Triton's kernels run. They compute again what PyTorch keeps of each operation.
    """
    C, di, Q = c.hidden_size, c.mamba_num_heads * c.mamba_head_dim, min(c.chunk_size, context)
    groups, width = c.n_groups * c.ssm_state_size, c.moe_latent_size or C
    attention = 2 * c.head_dim * (c.num_attention_heads + c.num_key_value_heads)
    shared, experts = 2 * c.moe_shared_expert_intermediate_size, c.moe_intermediate_size
    if fused:
        mamba, local_linear = 4 * di + 2 * groups + c.mamba_num_heads, attention
    else:  # the states between chunks, and matrices Q x Q inside; of each query and head D x D
        mamba = 13 * di + 8 * groups + 2 * di * c.ssm_state_size // Q + 3 * Q * c.mamba_num_heads
        local_linear, experts = attention + 2 * c.num_attention_heads * c.head_dim**2, 2 * experts + 3 * width
    layers = {"M": mamba, "*": attention, "L": local_linear, "E": shared + c.num_experts_per_tok * experts}
    layers["-"] = 2 * c.intermediate_size
    return {letter: kept + (2 if fused else 3) * C for letter, kept in layers.items()}


def mlp(outer, inner, bias):
    """Returns how many parameters two linear layers have, from `outer` to `inner` channels and back."""
    return 2 * outer * inner + bias * (outer + inner)


def predictor(c):
    """Returns the pattern of the multi-token predictor, "" without."""
    return c.mtp_hybrid_override_pattern if c.num_nextn_predict_layers else ""


def parameters_of(c):
    """Returns how many parameters a `nano_hybrid.Hybrid` has, the predictor's included, without making any."""
    layers, C = parameters_of_layers(c), c.hidden_size
    parameters = sum(layers[letter] for letter in c.hybrid_override_pattern + predictor(c))
    parameters += (1 if c.tie_word_embeddings else 2) * c.vocab_size * C + C
    return parameters + (2 * C * C + 3 * C if predictor(c) else 0)


def activations_of(c, context, fused):
    """Returns how many numbers a step of training keeps of a token, at least."""
    layers = activations_of_layers(c, context, fused)
    return sum(layers[x] for x in c.hybrid_override_pattern) + c.mtp_depths * sum(layers[x] for x in predictor(c))


def training_memory(c, tokens, context, fused=False, width=4, processes=1, means=2):
    """Returns bytes (of weights and optimizer states, of gradients, of activations) of one process, at least.

    tokens: at once, in rows of `context`; width: bytes of an activation; means: of the gradient that the optimizer
    keeps, 2 of AdamW, 1 of Muon. All but activations are float32 and sharded over the processes, but each makes all the
    weights first.
    """
    parameters = parameters_of(c)
    share = parameters // processes
    return max(4 * parameters, 4 * (1 + means) * share), 4 * share, tokens * activations_of(c, context, fused) * width


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
    free, fused = free_memory(device), pick_backend(device=device) == "triton"
    sharing = 1 if device.type == "cuda" else int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # processes on this memory

    def needed(**other):
        """Returns what `training_memory` does, for all processes, with other values of some flags."""
        c = SimpleNamespace(**asdict(model_config) | other)
        run = replace(config, **{name: value for name, value in other.items() if hasattr(config, name)})
        tokens, means = objective.tokens_at_once(run), 1 if config.optimizer == "muon" else 2
        parts = training_memory(c, tokens, run.context, fused, dtype.itemsize, processes, means)
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
            room = free * 0.8  # the estimate is low
            largest = bisect.bisect_right(range(2, value), room, key=lambda n, name=name: peak(**{name: n})) + 1
            hint = f"--{name} can be about {buildable(model_config, name, largest)} at most"
    held, gradients, activations = needed()
    states, activations, free = map(in_units, (held + gradients, activations, free))
    parameters, tokens = parameters_of(model_config), objective.tokens_at_once(config)
    raise ValueError(
        f"{parameters:,} parameters, with gradients and the optimizer's states, take {states}, and {tokens:,} tokens "
        f"at once at least {activations}, but {device.type} has {free} free: {hint}"
    )


def in_units(n):
    """Returns a number of bytes for people to read."""
    return f"{n / 2**30:,.1f} GiB" if n >= 2**30 else f"{n / 2**20:,.1f} MiB"


def is_out_of_memory(error):
    """Returns whether an exception says that there was no memory left, on a GPU or on the CPU."""
    said = ("can't allocate memory", "not enough memory", "out of memory", "ALLOC_FAILED")  # of plain RuntimeErrors
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(words in str(error) for words in said)


def buildable(model_config, name, largest):
    """Returns the largest value of a flag, up to `largest`, with which a model can be built: heads come in groups."""
    for value in range(largest, max(1, largest - 4096), -1) if hasattr(model_config, name) else ():
        try:
            replace(model_config, **{name: value})
            return value
        except ValueError:
            pass
    return largest
