"""Files of a checkpoint: formats, names, and writes that are whole or not there. No model class lives here.

A folder out/<run>/ that train.py wrote, or one from Hugging Face:

    config.json          the model's config, in Hugging Face's names: `read_config`, `config_fields`
    model.safetensors    weights, in the names of NVIDIA's releases: `save_weights`, `read_weights`; large ones come in
                         parts, listed in model.safetensors.index.json
    tokenizer files      of a released folder: where its texts begin and end, `text_ends`
    trainer.pt           all that a run needs to go on, weights included, in one file: `write_trainer`, `read_trainer`

Names      In memory a layer is "model.layers.3.mixer.up_proj.weight", as in `transformers`' NemotronH; on disk "model."
           is "backbone.". The experts of a layer are one stacked tensor [E, ...] in memory and E matrices on disk.
Trust      Nothing in a checkpoint is executed: safetensors holds numbers, and trainer.pt is read with weights_only. (A
           run of a user's own recipe names that file, and resuming runs it, unless it lies in the run's folder.) What
           is read takes memory in proportion to the files, whatever numbers they hold.
Kills      Every file is written beside its name and moved there when it is whole: `replacing`.
Layouts    A folder holds one model. Saving takes away what an older save in another layout left; reading refuses a
           folder in which two layouts stand side by side, or whose index and parts disagree.
"""

import json
import math
import os
import re
import reprlib
import warnings
import zipfile
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import get_args, get_type_hints

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

# ---- 1. whole files -------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path):
    """Yields a temporary path beside `path` to write to; moves it there when the block ends without an exception.

    Whoever opens `path`, at any moment and after any kill, finds the old file or the new one, never half of one.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        partial.touch()
        mode = partial.stat().st_mode
        yield partial
        partial.chmod(mode)  # safetensors writes files that nobody else may read
        with partial.open("rb+") as file:  # to be written to: Windows syncs no file that is only read
            os.fsync(file.fileno())  # on the disk before it takes the name, or a power cut could leave it empty
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


# ---- 2. config.json -------------------------------------------------------------------------------------------------

LARGEST_JSON = 100_000_000  # bytes: what safetensors allows its own headers
LARGEST_NUMBER = 2**30  # in a config; shapes are products of two of them, which still fit into 64 bits
LONGEST_TEXT = 10_000  # letters of a pattern: one is a layer


def read_json(path):
    """Returns the dict in a JSON file, in whichever Unicode it is encoded. Raises ValueError for anything else."""
    if path.stat().st_size > LARGEST_JSON:
        raise ValueError(f"{path} has {path.stat().st_size:,} bytes; files of its kind have less than a tenth of that")
    try:
        found = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object {{...}} but {reprlib.repr(found)}")
    return found


def language_model(config):
    """Returns the part of a config.json dict that is the language model's: of a multimodal one, an inner dict."""
    inner = [part for part in config.values() if isinstance(part, dict) and part.get("model_type") == "nemotron_h"]
    return inner[0] if inner and config.get("model_type") != "nemotron_h" else config


def read_config(directory):
    """Returns the config.json of a checkpoint folder as a dict. Raises FileNotFoundError or ValueError."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {directory} is not a checkpoint folder")
    config = language_model(read_json(path))
    if config.get("model_type") != "nemotron_h":
        raise ValueError(
            f"{path} has model_type={reprlib.repr(config.get('model_type'))}; only 'nemotron_h' is read here"
        )
    run = config.get("nanopapers", {"tokenizer": ""})  # what train.py adds
    if not isinstance(run, dict) or not isinstance(run.get("tokenizer"), str):
        raise ValueError(f"{path} does not say the tokenizer as train.py does, but {reprlib.repr(run)}")
    return config


# transformers 5 writes the layers as a list of words: its own, or those of newer releases
LETTER_OF = dict(linear_attention="M", mamba="M", full_attention="*", attention="*", mlp="-", moe="E")
OLD_NAMES = dict(attention_head_dim="head_dim", norm_eps="layer_norm_epsilon", rms_norm_eps="layer_norm_epsilon",
                 mamba_proj_bias="use_bias", layer_types="layers_block_type", num_local_experts="n_routed_experts",
                 mamba_n_groups="n_groups", mamba_d_conv="conv_kernel", mamba_conv_bias="use_conv_bias",
                 mamba_chunk_size="chunk_size", mamba_dt_limit="time_step_limit")  # fmt: skip
ALWAYS = dict(mlp_hidden_act="relu2", mamba_hidden_act="silu", attention_bias=False)  # all that our models can be
UNLIMITED = (None, [], [0, math.inf], [0, {"__float__": "Infinity"}])  # time_step_limit; transformers 5 writes the last


def config_fields(config, config_class):
    """Returns the part of a config.json dict that the dataclass has fields for, in whichever of its spellings.

    Raises ValueError for a model that we do not build (quantised, other activations, a limit on dt), for a value of
    another type than the field's, and for a number beyond all models.
    """
    config = {OLD_NAMES[name]: value for name, value in config.items() if name in OLD_NAMES} | config
    for name, value in ALWAYS.items():
        if config.get(name, value) != value:
            raise ValueError(f"config.json sets {name}={reprlib.repr(config[name])}; our models have {value!r} only")
    if config.get("quantization_config") or config.get("compression_config"):
        raise ValueError("config.json describes quantised weights; take the BF16 release of the model")
    if config.get("time_step_limit") not in UNLIMITED:
        limits = reprlib.repr(config["time_step_limit"])
        raise ValueError(f"config.json limits dt to {limits}; our models have [0, inf), as released")
    for words, pattern in (
        ("layers_block_type", "hybrid_override_pattern"),
        ("mtp_layers_block_type", "mtp_hybrid_override_pattern"),
    ):
        config = with_pattern(config, words, pattern)
    if config.get("num_key_value_heads", 1) is None:
        config = config | {"num_key_value_heads": config.get("num_attention_heads")}  # as in transformers
    found = {f.name: config[f.name] for f in fields(config_class) if f.name in config}
    expect_types(found, config_class, "config.json")
    for name, value in found.items():
        if type(value) is int and abs(value) > LARGEST_NUMBER or isinstance(value, str) and len(value) > LONGEST_TEXT:
            raise ValueError(f"config.json sets {name}={reprlib.repr(value)}, which is beyond any model")
    return found


def expect_types(values, config_class, source):
    """Raises ValueError, naming `source`, unless values (name -> value) are of the types of the dataclass's fields."""
    hints = get_type_hints(config_class)
    for name, value in values.items():
        if name not in hints:
            raise ValueError(f"{source} sets {name}, which this version does not know")
        types = get_args(hints[name]) or (hints[name],)
        if type(value) not in types and not (type(value) is int and float in types):
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            raise ValueError(f"{source} sets {name}={reprlib.repr(value)}; it must be {expected}")


def with_pattern(config, words, pattern):
    """Returns a config.json dict with a pattern of letters where it has a list of words.

    words, pattern: names of the two. Raises ValueError for another thing than a list, and if both are there and differ.
    """
    if not config.get(words):
        return config
    if not isinstance(config[words], list):
        raise ValueError(f"config.json sets {words}={reprlib.repr(config[words])}; it must be a list of words")
    letters = "".join(LETTER_OF.get(kind, "?") if isinstance(kind, str) else "?" for kind in config[words])
    if config.get(pattern) not in (None, letters):
        shown = f"{reprlib.repr(letters)}, {pattern} {reprlib.repr(config[pattern])}"
        raise ValueError(f"config.json disagrees with itself: {words} says {shown}")
    return config | {pattern: letters}


# ---- 3. model.safetensors -------------------------------------------------------------------------------------------

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
OTHER_LAYOUTS = re.compile(
    r"model-\d+-of-\d+\.safetensors|pytorch_model(-\d+-of-\d+)?\.bin|(model\.safetensors|pytorch_model\.bin)\.index\.json"
)
ON_DISK = re.compile(r"^(language_model\.)?(backbone|model)\.")
EXPERT = re.compile(r"(.*\.experts)\.([0-9]{1,6})\.(up_proj|down_proj)\.weight")
DTYPES = ("F64", "F32", "F16", "BF16")
EMBEDDINGS, HEAD = "model.embeddings.weight", "lm_head.weight"


def to_disk_names(state_dict):
    """Returns the weights as NVIDIA's releases name them: "backbone." for "model.", and one matrix per expert."""
    tensors = {}
    for name, tensor in state_dict.items():
        name, tensor = re.sub(r"^model\.", "backbone.", name), tensor.detach().cpu()
        if name.endswith((".experts.up_proj", ".experts.down_proj")):
            layer, matrix = name.rsplit(".", 1)
            tensors |= {f"{layer}.{e}.{matrix}.weight": one.clone() for e, one in enumerate(tensor)}
        else:
            tensors[name] = tensor.contiguous().clone()
    return tensors


def save_weights(directory, config, state_dict):
    """Writes config.json and model.safetensors, and takes away what an older save in another layout left.

    Both files are whole before the first is moved to its name. config: dict. Tied weights are written twice, since
    transformers does not tie this model.
    """
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    config = {"architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h"} | config
    with replacing(directory / "config.json") as config_path, replacing(directory / WEIGHTS) as weights_path:
        config_path.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        save_file(to_disk_names(state_dict), weights_path, metadata={"format": "pt"})
    older = [path for path in directory.iterdir() if OTHER_LAYOUTS.fullmatch(path.name)]
    for path in sorted(older, key=lambda path: path.suffix != ".json"):  # indices first: parts alone are no model
        path.unlink()


def weight_files(directory):
    """Returns path -> names of the tensors that the index says are in it; for a single file, path -> None.

    Raises FileNotFoundError or ValueError for a folder without weights, with an index that is none, or with two
    layouts side by side: which of them was saved last cannot be told.
    """
    single, index = directory / WEIGHTS, directory / INDEX
    if not index.is_file():
        others = [] if single.is_file() else sorted(filter(OTHER_LAYOUTS.fullmatch, os.listdir(directory)))
        if others and others[0].endswith(".safetensors"):
            raise FileNotFoundError(
                f"{index} is missing, which says what is in {others[0]} and the other parts; copy it"
            )
        if others:
            found = f"{others[0]}, a pickle, which could run code and is not opened here"
            raise ValueError(f"{directory} holds {found}; save the model as {WEIGHTS}")
        return {single: None}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ValueError(f"{index} has no weight_map, a JSON object of tensor: file; copy it again")
    files = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not file.endswith(".safetensors") or re.search(r"[/\\:\0]", file):
            shown = f"{reprlib.repr(name)} in {reprlib.repr(file)}"
            raise ValueError(f"{index} puts {shown}, which is no *.safetensors file of its own folder")
        files.setdefault(directory / file, set()).add(name)
    if single.is_file() and single not in files:
        raise ValueError(
            f"{directory} holds two models, {WEIGHTS} and the parts of {INDEX}; remove the one that is not meant"
        )
    return files


@contextmanager
def utf8_path(path):
    """Yields a path to the same file that is UTF-8, since safetensors opens no other."""
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with TemporaryDirectory() as folder:
            link = Path(folder) / path.suffix
            link.symlink_to(path.absolute())
            yield link
    else:
        yield path


def checkpoint_tensors(directory):
    """Yields (name, tensor) for every tensor of a checkpoint, in one file or several, one at a time.

    Tensors are copies: those of safetensors are views of the file, and change when somebody writes into it.
    """
    for file, listed in weight_files(directory).items():
        if not file.is_file():
            raise FileNotFoundError(
                f"{file} is missing; a checkpoint is config.json and model.safetensors, or its parts"
            )
        try:
            with utf8_path(file) as path, safe_open(path, "pt") as tensors:
                names = set(tensors.keys())
                if listed is not None and names != listed:
                    raise ValueError(f"{file} and {INDEX} disagree about {min(names ^ listed)!r}: not of one save")
                for name in sorted(names):
                    dtype = tensors.get_slice(name).get_dtype()
                    if name.endswith("_scale") or dtype not in DTYPES:
                        raise ValueError(f"{file} is quantised ({name} is {dtype}); take the BF16 release of the model")
                    yield name, tensors.get_tensor(name).clone()
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged or not a safetensors file ({error}); copy it again") from None
        except (MemoryError, RuntimeError) as error:  # torch's is a RuntimeError
            if isinstance(error, RuntimeError) and "memory" not in str(error):
                raise
            raise ValueError(f"{file} has {file.stat().st_size:,} bytes, more than there is memory for") from None


def read_weights(directory):
    """Returns the state_dict of a checkpoint in any spelling: the inverse of `to_disk_names`.

    There is never more in memory than the weights and the stack of one layer's experts. Raises FileNotFoundError or
    ValueError for files that are missing, damaged, quantised or that disagree.
    """
    state_dict, stacks = {}, {}  # stacks: name of a stacked tensor -> number of an expert -> its matrix
    for written, tensor in checkpoint_tensors(Path(directory)):
        name = ON_DISK.sub("model.", written).removeprefix("language_model.")
        match = EXPERT.fullmatch(name)
        where, key = (stacks.setdefault(f"{match[1]}.{match[3]}", {}), int(match[2])) if match else (state_dict, name)
        if key in where:
            raise ValueError(f"{directory} has {name} twice, in two spellings, one of them {written}")
        # The steps of the routers' bias are finer than 16 bits.
        where[key] = tensor.float() if name.endswith("e_score_correction_bias") else tensor
    for name, stack in stacks.items():
        experts = range(len(stack))
        if name in state_dict:
            raise ValueError(f"{directory} has {name} twice, stacked and one by one")
        if lacking := set(experts) - set(stack):
            raise ValueError(f"{directory} lacks expert {min(lacking)} of {name}; a part of it is missing")
        first = stack[0]
        for e, one in stack.items():
            if (one.shape, one.dtype) != (first.shape, first.dtype):
                shapes = f"expert {e} is {list(one.shape)}, other experts are {list(first.shape)}"
                raise ValueError(f"{directory}: of {name}, {shapes}")
        state_dict[name] = torch.stack([stack.pop(e) for e in experts])
    return state_dict


def read_model(directory, config_class, overrides, masked_diffusion=False):
    """Returns (config, state_dict) of a checkpoint. overrides: fields of the config to change.

    masked_diffusion: whether it is to be a masked diffusion model, whose weights would pass for a causal one's.

    A flag is not believed where the weights say otherwise: a head that differs from the embeddings is a matrix of its
    own even if tie_word_embeddings is set (transformers reads it so), and without weights of a multi-token predictor
    there is none (transformers leaves them out when it saves). Of two tied matrices one may be missing. Raises
    FileNotFoundError or ValueError, saying which file is missing, damaged, quantised or does not fit.
    """
    read = read_config(directory)
    if (read.get("architectures") == ["MaskedDiffusionLM"]) != masked_diffusion:
        found = f"architectures={reprlib.repr(read.get('architectures'))}"
        raise ValueError(f"{directory} is {'no' if masked_diffusion else 'a'} masked diffusion model: {found}")
    written = config_fields(read, config_class)
    config, weights = config_class(**(written | overrides)), read_weights(directory)
    if not any(name.startswith("mtp.") for name in weights):
        config = replace(config, num_nextn_predict_layers=0)
    layers = len(config.hybrid_override_pattern)
    layers += config.num_nextn_predict_layers * len(config.mtp_hybrid_override_pattern)
    if layers > len(weights):
        raise ValueError(f"{directory} does not fit its config: {layers} layers, {len(weights)} tensors")
    if written.get("tie_word_embeddings"):
        for one, other in ((EMBEDDINGS, HEAD), (HEAD, EMBEDDINGS)):
            if one not in weights and other in weights:
                weights[one] = weights[other].clone()
    if config.tie_word_embeddings and not same(weights.get(HEAD), weights.get(EMBEDDINGS)):
        if "tie_word_embeddings" in overrides:
            raise ValueError(f"{directory}: lm_head is not equal to the embeddings, so they cannot be tied")
        config = replace(config, tie_word_embeddings=False)
    return config, weights


def same(a, b):
    """Returns whether two tensors, or None, are equal in shape, dtype and all numbers."""
    return a is not None and b is not None and a.dtype == b.dtype and torch.equal(a, b)


@contextmanager
def without_memory(source):
    """Modules made inside have shapes but no memory. Raises ValueError, naming `source`, for shapes beyond counting."""
    try:
        with torch.device("meta"):
            yield
    except RuntimeError as error:
        if "overflow" not in str(error):
            raise
        raise ValueError(f"{source} does not fit its config: {' '.join(str(error).split())[:200]}") from None


def expect_weights(tensors, expected, source):
    """Raises ValueError naming `source` unless `tensors` have the names and shapes of `expected`, both state_dicts."""
    wrong = []
    for name, parameter in expected.items():
        if name not in tensors:
            wrong.append(f"{name} missing")
        elif getattr(tensors[name], "shape", ()) != parameter.shape:
            wrong.append(f"{name} {list(getattr(tensors[name], 'shape', ()))}")
    wrong += [f"{name} unexpected" for name in tensors if name not in expected]
    if wrong:
        raise ValueError(f"{source} does not fit its config: {wrong[0]}, the first of {len(wrong)}")


# ---- 4. where the texts of a released model begin and end -----------------------------------------------------------

SAYS_IDS = ("config.json", "generation_config.json")
SAYS_TOKENS = ("tokenizer_config.json", "special_tokens_map.json")


def text_ends(directory, token_id):
    """Returns (start, ends) of a released folder: the id that a text begins with, and a list of those that end one.

    token_id: function text of a token -> id, or None. The ends are all that the folder's files name together: a chat
    model ends an answer with another token than a document, and the files that say so differ between releases. null is
    none, and an id below 0 too. Where no file speaks of it: 1 and 2, as in transformers' NemotronHConfig. A model that
    has no start begins behind an end. Raises ValueError for an entry that is none, and if there is neither.
    """
    directory = Path(directory)
    ids = dict(bos=[], eos=[])
    silent = dict(bos=True, eos=True)
    for file in (*SAYS_IDS, *SAYS_TOKENS):
        found = read_json(directory / file) if (directory / file).is_file() else {}
        for part in (language_model(found), found):
            for kind in ids:
                key = f"{kind}_token_id" if file in SAYS_IDS else f"{kind}_token"
                silent[kind] &= key not in part
                ids[kind] += as_ids(part.get(key), key, directory / file, token_id)
    starts, ends = (ids[kind] or [default] * silent[kind] for kind, default in (("bos", 1), ("eos", 2)))
    ends = list(dict.fromkeys(ends))
    if not starts and not ends:
        raise ValueError(f"{directory} names no token that a text begins or ends with; set eos_token_id in config.json")
    start, vocab_size = (starts or ends)[0], read_config(directory).get("vocab_size")
    if type(vocab_size) is int and max([start, *ends]) >= vocab_size:
        found = f"texts begin with {start} and end with {reprlib.repr(ends)}"
        raise ValueError(f"{directory} disagrees with itself: {found}, its vocabulary has {vocab_size} tokens")
    return start, ends


def as_ids(value, key, file, token_id):
    """Returns the list of ids that an entry of a released folder's JSON names: an id, a list of them, or a token."""
    if key.endswith("_token"):  # its text, or a dict with it
        value = value.get("content") if isinstance(value, dict) else value
        value = token_id(value) if isinstance(value, str) else value
    values = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(one) is not int for one in values):
        raise ValueError(f"{file} sets {key}={reprlib.repr(value)}; it must be an id, a list of ids, or null")
    return [one for one in values if one >= 0]


# ---- 5. trainer.pt --------------------------------------------------------------------------------------------------


def write_trainer(path, state):
    """Writes the state of a run: tensors, numbers, strings, and lists and dicts of them."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def read_trainer(path, types):
    """Returns the dict that `write_trainer` wrote, on the CPU. Raises ValueError for a damaged file, or another's.

    types: name -> type of what it has to have at least.
    """
    damaged = f"{path} is damaged or not a checkpoint of train.py"
    if not zipfile.is_zipfile(path):  # torch.save writes a zip, whose directory comes last: half a file has none
        raise ValueError(f"{damaged}; choose another --run")
    try:
        with zipfile.ZipFile(path) as parts:  # torch.save compresses nothing: what unpacks to more is not its work
            if sum(part.file_size for part in parts.infolist()) > path.stat().st_size:
                raise ValueError("it unpacks to more than its size")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of odd bytes: they are an error here
            saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # whatever foreign bytes make the two libraries raise
        raise ValueError(f"{damaged} ({type(error).__name__}); choose another --run") from None
    if not isinstance(saved, dict) or not all(isinstance(saved.get(name), kind) for name, kind in types.items()):
        raise ValueError(f"{path} is not a checkpoint of this version of train.py; choose another --run")
    return saved
