"""Files of a checkpoint: Hugging Face's names and formats, and writes that are whole or not there."""

import json
import math
import os
import re
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


@contextmanager
def replacing(path):
    """Yields a temporary path beside `path` to write to; moves it there when the block ends without an exception.

    Whoever opens `path`, at any moment and after any kill, finds the old file or the new one, never half of one.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # on the disk before it takes the name, or a power cut could leave it empty
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_config(directory):
    """Returns the config.json of a checkpoint folder as a dict. Raises FileNotFoundError or ValueError."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {directory} is not a checkpoint folder")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    config = config if isinstance(config, dict) else {}
    inner = [part for part in config.values() if isinstance(part, dict) and part.get("model_type") == "nemotron_h"]
    if config.get("model_type") != "nemotron_h" and inner:
        config = inner[0]  # the language model of a multimodal one
    if config.get("model_type") != "nemotron_h":
        raise ValueError(f"{path} has model_type={config.get('model_type')!r}; this file knows 'nemotron_h' only")
    return config


EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(up_proj|down_proj)\.weight")


def to_disk_names(state_dict):
    """Returns the weights as NVIDIA's releases name them: "backbone." for "model.", and one matrix per expert."""
    tensors = {}
    for name, tensor in state_dict.items():
        name, tensor = name.replace("model.", "backbone.", 1), tensor.detach().cpu()
        if name.endswith((".experts.up_proj", ".experts.down_proj")):
            layer, matrix = name.rsplit(".", 1)
            tensors |= {f"{layer}.{e}.{matrix}.weight": one.clone() for e, one in enumerate(tensor)}
        else:
            tensors[name] = tensor.contiguous().clone()
    return tensors


def save_weights(directory, config, state_dict):
    """Writes config.json and model.safetensors: each beside its name, and moved there when whole.

    On disk the backbone is called "backbone.", as in NVIDIA's releases; tied weights are written twice, since
    transformers does not tie this model.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h"} | config
    tensors = to_disk_names(state_dict)
    with replacing(directory / "config.json") as path:
        path.write_text(json.dumps(config, indent=2) + "\n")
    with replacing(directory / "model.safetensors") as path:
        save_file(tensors, path, metadata={"format": "pt"})


def expect_weights(tensors, expected, source):
    """Raises ValueError naming `source` unless `tensors` have the names and shapes of `expected`, both state_dicts."""
    wrong = [
        f"{n} {list(tensors[n].shape) if n in tensors else 'missing'}"
        for n in expected
        if n not in tensors or tensors[n].shape != expected[n].shape
    ] + [f"{n} unexpected" for n in tensors if n not in expected]
    if wrong:
        raise ValueError(f"{source} does not fit its config: {wrong[0]}, the first of {len(wrong)}")


def checkpoint_tensors(directory):
    """Yields (name, tensor) for every tensor of a checkpoint, in one file or several, one at a time."""
    index = directory / "model.safetensors.index.json"
    files = [directory / "model.safetensors"]
    if index.is_file():
        files = [directory / name for name in sorted(set(json.loads(index.read_text())["weight_map"].values()))]
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing; a checkpoint is config.json and model.safetensors, or its parts"
            )
        try:
            with safe_open(file, "pt") as tensors:
                for name in tensors.keys():  # noqa: SIM118 (it is no dict)
                    yield name, tensors.get_tensor(name)
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or not a safetensors file ({error}); copy it again") from None


def read_weights(directory, n_experts):
    """Returns the state_dict of a checkpoint in any spelling: the inverse of `to_disk_names`.

    Each tensor goes to its place as it is read, so that there is never more in memory than the weights and one of them.
    """
    state_dict, missing = {}, {}
    for name, tensor in checkpoint_tensors(Path(directory)):
        if name.endswith("_scale") or tensor.dtype in (torch.uint8, torch.int8, torch.float8_e4m3fn):
            raise ValueError(f"{directory} is quantised ({name} is {tensor.dtype}); take the BF16 release of the model")
        name = name.removeprefix("language_model.").replace("backbone.", "model.", 1)
        match = EXPERT.fullmatch(name)
        if match and int(match[2]) < n_experts:
            stack, expert = f"{match[1]}.{match[3]}", int(match[2])
            if stack not in state_dict:
                state_dict[stack], missing[stack] = tensor.new_empty(n_experts, *tensor.shape), set(range(n_experts))
            expected = state_dict[stack][expert]
            if (tensor.shape, tensor.dtype) != (expected.shape, expected.dtype):
                raise ValueError(
                    f"{directory}: {name} is {list(tensor.shape)}, other experts are {list(expected.shape)}"
                )
            expected.copy_(tensor)
            missing[stack].discard(expert)
        elif name.endswith("e_score_correction_bias"):
            state_dict[name] = tensor.float()  # its steps are finer than 16 bits
        else:
            state_dict[name] = tensor
    for stack, experts in missing.items():
        if experts:
            raise ValueError(f"{directory} lacks expert {min(experts)} of {stack}; a part of it is missing")
    return state_dict


# transformers 5 writes the layers as a list of words: its own, or those of newer releases
LETTER_OF = dict(linear_attention="M", mamba="M", full_attention="*", attention="*", mlp="-", moe="E")
OLD_NAMES = dict(attention_head_dim="head_dim", norm_eps="layer_norm_epsilon", rms_norm_eps="layer_norm_epsilon",
                 mamba_proj_bias="use_bias")  # fmt: skip
ALWAYS = dict(
    mlp_hidden_act="relu2", mamba_hidden_act="silu", attention_bias=False
)  # what this file builds, whatever else there could be


def config_fields(config, config_class):
    """Returns the part of a config.json dict that the dataclass has fields for, in whichever of its spellings.

    Raises ValueError for a model that this file does not build: quantised, other activations, a limit on dt.
    """
    for name, value in ALWAYS.items():
        if config.get(name, value) != value:
            raise ValueError(f"config.json sets {name}={config[name]!r}; this file builds {value!r} only")
    if config.get("quantization_config") or config.get("compression_config"):
        raise ValueError("config.json describes quantised weights; take the BF16 release of the model")
    low, high = config.get("time_step_limit") or (0.0, math.inf)
    high = float(high["__float__"]) if isinstance(high, dict) else high  # transformers 5 writes infinity so
    if low > 0 or high < math.inf:
        raise ValueError(f"config.json limits dt to [{low}, {high}]; this file builds [0, inf), as released")
    config = {OLD_NAMES[name]: value for name, value in config.items() if name in OLD_NAMES} | config
    if "hybrid_override_pattern" not in config and "layers_block_type" in config:
        pattern = "".join(LETTER_OF.get(kind, "?") for kind in config["layers_block_type"])
        config = config | {"hybrid_override_pattern": pattern}
    if "mtp_hybrid_override_pattern" not in config and config.get("mtp_layers_block_type"):
        pattern = "".join(LETTER_OF.get(kind, "?") for kind in config["mtp_layers_block_type"])
        config = config | {"mtp_hybrid_override_pattern": pattern}
    return {f.name: config[f.name] for f in fields(config_class) if f.name in config}
