"""common/checkpoints.py: whole files, one model a folder, tied weights, damage and hostility, ends of text."""

import json
import math
import os
import pickle
import re
import struct
import zipfile
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from common import checkpoints
from common.checkpoints import (
    INDEX,
    expect_weights,
    read_config,
    read_trainer,
    read_weights,
    replacing,
    save_weights,
    text_ends,
    to_disk_names,
    write_trainer,
)
from common.data import ReleasedTokenizer
from conftest import TINY, scramble
from mdlm_dultra import MaskedDiffusionLM
from nano_hybrid import Hybrid, HybridConfig

WEIGHTS = {
    "model.layers.0.mixer.in_proj.weight": torch.arange(6.0).view(2, 3),
    "model.layers.1.mixer.experts.up_proj": torch.arange(12.0).view(2, 3, 2),  # [E, F, C]
    "model.layers.1.mixer.gate.e_score_correction_bias": torch.ones(2),
}


def test_an_exception_while_writing_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_weights_go_to_disk_by_other_names_and_come_back(tmp_path):
    names = set(to_disk_names(WEIGHTS))
    assert "backbone.layers.0.mixer.in_proj.weight" in names
    assert "backbone.layers.1.mixer.experts.1.up_proj.weight" in names
    save_weights(tmp_path / "out", {"hidden_size": 3}, WEIGHTS)
    read = read_weights(tmp_path / "out")
    assert read.keys() == WEIGHTS.keys() and all(torch.equal(read[name], WEIGHTS[name]) for name in read)
    assert read_config(tmp_path / "out")["hidden_size"] == 3


@pytest.mark.parametrize(("change", "message"), [
    (lambda w: w.pop("b"), "b missing"),
    (lambda w: w.update(b=torch.ones(3)), r"b \[3\]"),
    (lambda w: w.update(c=torch.ones(3)), "c unexpected"),
])  # fmt: skip
def test_weights_that_do_not_fit_are_named(change, message):
    expected = dict(a=torch.ones(1), b=torch.ones(2))
    expect_weights(dict(expected), expected, "here")
    wrong = dict(expected)
    change(wrong)
    with pytest.raises(ValueError, match=f"here does not fit its config: {message}"):
        expect_weights(wrong, expected, "here")


def test_the_state_of_a_run_is_read_back_and_another_file_is_refused(tmp_path):
    path = tmp_path / "trainer.pt"
    write_trainer(path, dict(step=3, model=WEIGHTS))
    assert read_trainer(path, dict(step=int, model=dict))["step"] == 3
    with pytest.raises(ValueError, match="not a checkpoint of this version"):
        read_trainer(path, dict(step=int, scaler=dict))
    path.write_bytes(path.read_bytes()[:-50])
    with pytest.raises(ValueError, match="is damaged"):
        read_trainer(path, dict(step=int))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match="only 'nemotron_h' is read here"):
        read_config(tmp_path)


# ---- layouts: a folder holds one model ----

SHAPE = TINY | dict(hybrid_override_pattern="M*")


@contextmanager
def little_memory(size):
    """Lets this process take `size` bytes more than it has."""
    resource, taken = pytest.importorskip("resource"), Path("/proc/self/statm")
    if not taken.is_file():
        pytest.skip("needs /proc to see how much memory is taken")
    before = resource.getrlimit(resource.RLIMIT_AS)
    taken = int(taken.read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (taken + size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def build(seed=0, **changes):
    torch.manual_seed(seed)
    return scramble(Hybrid(HybridConfig(**SHAPE | changes)), seed).eval()


def logits(model):
    return model(torch.arange(9)[None])


def write_parts(folder, n, index=True):
    """Rewrites the single file of a checkpoint as n parts, with their index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, weight_map = sorted(tensors), {}
    for i in range(n):
        file = f"model-{i + 1:05}-of-{n:05}.safetensors"
        save_file({name: tensors[name] for name in names[i::n]}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[i::n], file)
    if index:
        (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return weight_map


def older_save(folder, layout):
    """Leaves another model in a folder: in one file, in parts, in parts of two lengths, as pickles."""
    build(seed=1).save_pretrained(folder)
    if layout == "parts":
        write_parts(folder, 3)
    elif layout == "left-over parts":
        write_parts(folder, 2, index=False)
        build(seed=1).save_pretrained(folder)
        write_parts(folder, 3)
    elif layout == "parts without their index":
        write_parts(folder, 2, index=False)
    elif layout == "pickles":
        (folder / "model.safetensors").unlink()
        for name in ("pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "pytorch_model.bin.index.json"):
            (folder / name).write_bytes(pickle.dumps({}))
    elif layout == "an index that is none":
        write_parts(folder, 2)
        (folder / INDEX).write_text("{")


@pytest.mark.parametrize("layout", [
    "one file", "parts", "left-over parts", "parts without their index", "pickles", "an index that is none",
])  # fmt: skip
def test_saving_replaces_an_older_save_of_any_layout(layout, tmp_path):
    older_save(tmp_path, layout)
    (tmp_path / "tokenizer.json").write_text("{}")
    model = build()
    model.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"config.json", "model.safetensors", "tokenizer.json"}
    assert torch.equal(logits(Hybrid.from_pretrained(tmp_path)), logits(model))


def test_transformers_and_we_save_over_each_other(tmp_path):
    transformers = pytest.importorskip("transformers")
    first, second = build(seed=1), build()
    first.save_pretrained(tmp_path)
    theirs = transformers.NemotronHForCausalLM.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1 and (tmp_path / INDEX).is_file()
    (tmp_path / "model.safetensors").unlink(missing_ok=True)  # theirs leaves ours
    assert torch.equal(logits(Hybrid.from_pretrained(tmp_path)), logits(first))
    second.save_pretrained(tmp_path)
    assert torch.equal(logits(Hybrid.from_pretrained(tmp_path)), logits(second))
    assert not list(tmp_path.glob("model-*")) and not (tmp_path / INDEX).exists()


@pytest.mark.parametrize("when", ["before the first move", "between the moves", "before the old layout goes"])
def test_a_save_that_is_stopped_leaves_the_old_model_the_new_one_or_a_folder_that_is_named(when, tmp_path, monkeypatch):
    older_save(tmp_path, "parts")
    moves, move = [], os.replace
    unlink = type(tmp_path).unlink

    def stop(*_, **__):
        raise KeyboardInterrupt

    def stopping(source, target):
        if len(moves) == ["before the first move", "between the moves"].index(when):
            stop()
        moves.append(target)
        move(source, target)

    if when == "before the old layout goes":
        monkeypatch.setattr(type(tmp_path), "unlink", lambda p, **k: stop() if p.name == INDEX else unlink(p, **k))
    else:
        monkeypatch.setattr(os, "replace", stopping)
    with pytest.raises(KeyboardInterrupt):
        build().save_pretrained(tmp_path)
    monkeypatch.undo()
    assert not [p for p in tmp_path.iterdir() if p.name.endswith(".partial")]
    if when == "before the first move":
        assert torch.equal(logits(Hybrid.from_pretrained(tmp_path)), logits(build(seed=1)))
    else:
        with pytest.raises(ValueError, match="holds two models"):
            Hybrid.from_pretrained(tmp_path)


def test_a_model_that_is_loaded_does_not_change_with_its_file(tmp_path):
    """safetensors returns views of the file: whoever writes into it in place would change the model, or end it."""
    build().save_pretrained(tmp_path)
    again = Hybrid.from_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    with path.open("rb+") as file:
        file.seek(path.stat().st_size // 2)
        file.write(bytes(path.stat().st_size // 3))
    assert torch.equal(logits(again), logits(build()))


# ---- layouts: what disagrees is named ----


@pytest.mark.parametrize(("index", "message"), [
    ("", "is not valid JSON"),
    ("{", "is not valid JSON"),
    ("[" * 100_000, "is not valid JSON"),
    ("[]", "holds no JSON object"),
    ("{}", "has no weight_map"),
    ('{"weight_map": {}}', "has no weight_map"),
    ('{"weight_map": []}', "has no weight_map"),
    ('{"weight_map": {"a": 1}}', "puts 'a' in 1"),
    ('{"weight_map": {"a": null}}', "puts 'a' in None"),
    ('{"weight_map": {"a": ["model-1.safetensors"]}}', "puts 'a' in"),
    ('{"weight_map": {"a": ""}}', "no *.safetensors file of its own folder"),
    ('{"weight_map": {"a": "."}}', "no *.safetensors file of its own folder"),
    ('{"weight_map": {"a": ".."}}', "no *.safetensors file of its own folder"),
    ('{"weight_map": {"a": "../secret.safetensors"}}', "no *.safetensors file of its own folder"),
    ('{"weight_map": {"a": "/etc/secret.safetensors"}}', "no *.safetensors file of its own folder"),
    ('{"weight_map": {"a": "..\\\\\\\\secret.safetensors"}}', "no *.safetensors file of its own folder"),
    ('{"weight_map": {"a": "C:secret.safetensors"}}', "no *.safetensors file of its own folder"),
    ('{"weight_map": {"a": "sub/part.safetensors"}}', "no *.safetensors file of its own folder"),
    ('{"weight_map": {"a": "trainer.pt"}}', "no *.safetensors file of its own folder"),
    ('{"weight_map": {"a": "nul\\\\u0000.safetensors"}}', "no *.safetensors file of its own folder"),
    ('{"weight_map": {"a": "missing.safetensors"}}', "missing.safetensors is missing"),
])  # fmt: skip
def test_a_malformed_index_is_one_line(index, message, tmp_path):
    folder = tmp_path / "model"
    build().save_pretrained(folder)
    (folder / "model.safetensors").rename(tmp_path / "secret.safetensors")
    (folder / INDEX).write_text(index)
    with pytest.raises((ValueError, FileNotFoundError), match=re.escape(message)) as error:
        Hybrid.from_pretrained(folder)
    assert INDEX in str(error.value) or "is missing" in message


def test_a_single_file_with_an_index_of_itself_opens(tmp_path):
    model = build()
    model.save_pretrained(tmp_path)
    names = dict.fromkeys(load_file(tmp_path / "model.safetensors"), "model.safetensors")
    (tmp_path / INDEX).write_bytes(b"\xef\xbb\xbf" + json.dumps({"weight_map": names}).encode())  # Windows' mark
    assert torch.equal(logits(Hybrid.from_pretrained(tmp_path)), logits(model))


@pytest.mark.parametrize(("what", "message"), [
    ("a second model", "holds two models, model.safetensors and the parts of model.safetensors.index.json"),
    ("a tensor of another part", "disagree about 'backbone.embeddings.weight'"),
    ("a tensor that is nowhere", "disagree about 'backbone.more'"),
    ("a tensor in two parts", "disagree about 'lm_head.weight'"),
    ("two spellings", "has model.embeddings.weight twice"),
    ("only pickles", "holds pytorch_model.bin, a pickle"),
    ("no index", "model.safetensors.index.json is missing, which says what is in model-00001-of-00002.safetensors"),
    ("integers", r"is quantised \(lm_head.weight is I64\)"),
    ("eight bits", r"is quantised \(lm_head.weight is F8_E5M2\)"),
])  # fmt: skip
def test_a_folder_whose_files_disagree_is_named(what, message, tmp_path):
    build().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    if what == "a second model":
        write_parts(tmp_path, 2)
        save_file(tensors, path)
    elif what in ("a tensor of another part", "a tensor that is nowhere", "a tensor in two parts"):
        weight_map = write_parts(tmp_path, 2)
        first, second = sorted(set(weight_map.values()))
        if what == "a tensor of another part":
            weight_map["backbone.embeddings.weight"] = second
        elif what == "a tensor that is nowhere":
            weight_map["backbone.more"] = first
        else:
            for part in (first, second):
                save_file(load_file(tmp_path / part) | {"lm_head.weight": torch.ones(64, 24)}, tmp_path / part)
        (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    elif what == "two spellings":
        save_file(tensors | {"model.embeddings.weight": torch.ones(64, 24)}, path)
    elif what == "no index":
        write_parts(tmp_path, 2, index=False)
    elif what == "only pickles":
        path.rename(tmp_path / "pytorch_model.bin")
    else:
        dtype = torch.int64 if what == "integers" else torch.float8_e5m2
        save_file(tensors | {"lm_head.weight": tensors["lm_head.weight"].to(dtype)}, path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        Hybrid.from_pretrained(tmp_path)


def test_parts_without_an_index_are_no_model_beside_a_whole_one(tmp_path):
    older_save(tmp_path, "parts without their index")
    torch.save({}, tmp_path / "pytorch_model.bin")
    tensors = build().state_dict()
    save_file(to_disk_names(tensors), tmp_path / "model.safetensors")
    assert torch.equal(logits(Hybrid.from_pretrained(tmp_path)), logits(build()))


def test_a_masked_diffusion_model_is_not_opened_as_a_causal_one(tmp_path):
    changes = dict(hybrid_override_pattern="*-", rotary_base=1e4)
    MaskedDiffusionLM(HybridConfig(**SHAPE | changes)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a masked diffusion model"):
        Hybrid.from_pretrained(tmp_path)


# ---- tied weights ----


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("head", ["equal", "different", "missing", "in place of the embeddings"])
def test_tied_weights_are_what_the_files_say(head, flag, tmp_path):
    """Where both matrices are there, transformers reads both, whatever the flag: so do we. Else the flag decides."""
    build().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    if head == "equal":
        tensors["lm_head.weight"] = tensors["backbone.embeddings.weight"].clone()
    elif head == "missing":
        del tensors["lm_head.weight"]
    elif head == "in place of the embeddings":
        del tensors["backbone.embeddings.weight"]
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | dict(tie_word_embeddings=flag)))
    if not flag and head not in ("equal", "different"):
        with pytest.raises(ValueError, match="does not fit its config: (lm_head|model.embeddings).weight missing"):
            Hybrid.from_pretrained(tmp_path)
        return
    ours = Hybrid.from_pretrained(tmp_path).eval()
    tied = flag and head != "different"
    assert ours.config.tie_word_embeddings == tied
    assert (ours.lm_head.weight is ours.model.embeddings.weight) == tied
    assert torch.equal(ours.lm_head.weight, tensors.get("lm_head.weight", ours.model.embeddings.weight))
    untied = Hybrid.from_pretrained(tmp_path, tie_word_embeddings=False).eval()
    assert untied.lm_head.weight is not untied.model.embeddings.weight
    with torch.no_grad():
        untied.lm_head.weight += 1
    assert not torch.equal(untied.lm_head.weight, untied.model.embeddings.weight)
    if head == "different":
        with pytest.raises(ValueError, match="cannot be tied"):
            Hybrid.from_pretrained(tmp_path, tie_word_embeddings=True)
    ours.save_pretrained(tmp_path / "again")
    again = Hybrid.from_pretrained(tmp_path / "again")
    assert again.config == ours.config and torch.equal(logits(again), logits(ours))
    if head in ("equal", "different"):
        expected = logits_of_transformers(tmp_path)
        assert (logits(ours) - expected).norm() < 1e-5 * expected.norm()


def logits_of_transformers(folder):
    transformers = pytest.importorskip("transformers")
    theirs = transformers.NemotronHForCausalLM.from_pretrained(folder, attn_implementation="eager").eval()
    for layer in theirs.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, math.inf)
    return theirs(torch.arange(9)[None], use_cache=False).logits


@pytest.mark.parametrize("tied", [False, True])
def test_a_model_that_transformers_trained_on_is_what_it_saved(tied, tmp_path):
    """transformers does not tie this model: a step of training parts the two, and it keeps the flag."""
    transformers = pytest.importorskip("transformers")
    build(tie_word_embeddings=tied).save_pretrained(tmp_path)
    theirs = transformers.NemotronHForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        theirs.lm_head.weight += 0.5
    theirs.save_pretrained(tmp_path / "trained")
    assert json.loads((tmp_path / "trained" / "config.json").read_text())["tie_word_embeddings"] == tied
    ours, expected = Hybrid.from_pretrained(tmp_path / "trained").eval(), logits_of_transformers(tmp_path / "trained")
    assert (logits(ours) - expected).norm() < 1e-5 * expected.norm()


# ---- damage ----


def test_files_cut_anywhere_are_one_line(tmp_path):
    """Every cut of the weights, in one file and in parts, of the index, and of config.json is noticed and named."""
    build().save_pretrained(tmp_path / "one")
    build().save_pretrained(tmp_path / "parts")
    write_parts(tmp_path / "parts", 2)
    for path in (tmp_path / "one" / "model.safetensors", tmp_path / "one" / "config.json",
                 tmp_path / "parts" / "model-00002-of-00002.safetensors", tmp_path / "parts" / INDEX):  # fmt: skip
        whole = path.read_bytes()
        for cut in sorted({*range(0, 40), *range(0, len(whole) - 1, max(1, len(whole) // 60)), len(whole) - 2}):
            path.write_bytes(whole[:cut])
            with pytest.raises(ValueError, match=re.escape(path.name)):
                Hybrid.from_pretrained(path.parent)
        path.write_bytes(whole)
        assert torch.equal(logits(Hybrid.from_pretrained(path.parent)), logits(build()))
    path = tmp_path / "one" / "model.safetensors"
    for foreign in (
        pickle.dumps({"a": 1}),
        b"\x80\x04.",
        b"PK\x03\x04" + bytes(99),
        b"\xff" * 99,
        whole + b"x",
    ):
        path.write_bytes(foreign)
        with pytest.raises(ValueError, match="model.safetensors is damaged or not a safetensors file"):
            Hybrid.from_pretrained(path.parent)


def test_a_trainer_cut_or_spoilt_anywhere_is_one_line(tmp_path):
    path, types = tmp_path / "trainer.pt", dict(step=int, model=dict)
    write_trainer(path, dict(step=3, model=WEIGHTS, text="x" * 50))
    whole = path.read_bytes()
    for cut in range(0, len(whole) - 1, 11):
        path.write_bytes(whole[:cut])
        with pytest.raises(ValueError, match="trainer.pt is damaged or not a checkpoint"):
            read_trainer(path, types)
    begin = whole.index(b"step")
    for place in range(begin - 20, begin + 200, 3):  # in the pickle: whatever that makes torch raise, or harmless
        for wrong in (0, 0x52, 0x81, 0xFF):
            path.write_bytes(whole[:place] + bytes([wrong]) + whole[place + 1 :])
            try:
                read_trainer(path, types)
            except ValueError as error:
                assert "trainer.pt is" in str(error)


def test_a_trainer_that_unpacks_to_more_than_its_size_is_refused(tmp_path):
    path = tmp_path / "trainer.pt"
    write_trainer(path, dict(step=3, model={"a": torch.zeros(1 << 20)}))
    with zipfile.ZipFile(path) as parts, zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as bomb:
        for part in parts.namelist():
            bomb.writestr(part, parts.read(part))
    os.replace(tmp_path / "bomb", path)
    assert path.stat().st_size < 1 << 16
    with pytest.raises(ValueError, match="trainer.pt is damaged"):
        read_trainer(path, dict(step=int))


@pytest.mark.parametrize(("wrong", "message"), [
    (dict(step="3"), "not a checkpoint of this version"),
    (dict(model=[1]), "not a checkpoint of this version"),
])  # fmt: skip
def test_a_trainer_of_other_types_is_refused(wrong, message, tmp_path):
    write_trainer(tmp_path / "trainer.pt", dict(step=3, model={}) | wrong)
    with pytest.raises(ValueError, match=message):
        read_trainer(tmp_path / "trainer.pt", dict(step=int, model=dict))


SIZES = [f.name for f in fields(HybridConfig) if f.type in (int, "int", int | None, "int | None")]


@pytest.mark.parametrize("name", SIZES)
def test_absurd_sizes_in_a_config_take_no_memory(name, tmp_path):
    """Either the model is the same (a size that no weight has), or it is refused in a line; in a gibibyte."""
    model = build(hybrid_override_pattern="M-E*L", moe_latent_size=8, num_nextn_predict_layers=1)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    with little_memory(1 << 30):
        for size in (10**7, 2**30, 2**31, 10**12, 2**62, 10**30, -1, 0, True, 3.5, "7", [1], {"a": 1}, math.nan):
            (tmp_path / "config.json").write_text(json.dumps(config | {name: size}))
            try:
                again = Hybrid.from_pretrained(tmp_path).eval()
            except ValueError as error:
                assert len(str(error)) < 500
            else:
                assert name in ("chunk_size", "mtp_depths")
                assert torch.allclose(logits(again), logits(model), atol=1e-5)


@pytest.mark.parametrize("size", [1 << 30, 1 << 40])
def test_weights_beyond_the_memory_are_one_line(size, tmp_path):
    """A file may be large and take no room on the disk."""
    header = {"a": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}
    header = json.dumps(header).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + size)
    with little_memory(1 << 29), pytest.raises(ValueError, match="more than there is memory for"):
        read_weights(tmp_path)


@pytest.mark.parametrize(("changes", "message"), [
    (dict(hidden_size=10**30), "beyond any model"),
    (dict(hidden_size="24"), "config.json sets hidden_size='24'; it must be int"),
    (dict(hidden_size=None), "hidden_size=None; it must be int"),
    (dict(tie_word_embeddings="false"), "tie_word_embeddings='false'; it must be bool"),
    (dict(tie_word_embeddings=1), "tie_word_embeddings=1; it must be bool"),
    (dict(layer_norm_epsilon="1e-5"), "layer_norm_epsilon='1e-5'; it must be float"),
    (dict(rotary_base=[1e4]), "rotary_base=.*; it must be float or null"),
    (dict(hybrid_override_pattern=["M", "*"]), "must be str"),
    (dict(hybrid_override_pattern="M" * 10**6), "beyond any model"),
    (dict(hybrid_override_pattern="M" * 9999), r"9999 layers, \d+ tensors"),
    (dict(layers_block_type=["mlp", "mlp"]), "disagrees with itself: layers_block_type says '--'"),
    (dict(layers_block_type=[["mamba"]], hybrid_override_pattern=None), r"'\?'"),
    (dict(layers_block_type="mamba"), "layers_block_type='mamba'; it must be a list"),
    (dict(time_step_limit=[0.1, 2]), "limits dt"),
    (dict(time_step_limit=[1, 2, 3]), "limits dt"),
    (dict(mamba_dt_limit=[0.1, 2]), "limits dt"),
    (dict(time_step_limit="all"), "limits dt"),
    (dict(time_step_limit=[0, {"a": 1}]), "limits dt"),
    (dict(mlp_hidden_act=["relu2"]), "mlp_hidden_act"),
    (dict(model_type=["nemotron_h"]), "model_type="),
    (dict(nanopapers=[1]), "does not say the tokenizer"),
    (dict(nanopapers={"tokenizer": 7}), "does not say the tokenizer"),
])  # fmt: skip
def test_a_hostile_config_is_one_line(changes, message, tmp_path):
    build().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    with pytest.raises(ValueError, match=message) as error:
        Hybrid.from_pretrained(tmp_path)
    assert len(str(error.value)) < 500


def test_a_config_is_read_in_any_unicode_and_not_when_it_is_huge(tmp_path, monkeypatch):
    build().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    text = path.read_text().replace("{", '{"note": "été 🙂",', 1)
    for encoding in ("utf-8", "utf-8-sig", "utf-16", "utf-32"):
        path.write_text(text, encoding=encoding)
        assert read_config(tmp_path)["note"] == "été 🙂"
    path.write_text(text, encoding="latin-1", errors="replace")
    with pytest.raises(ValueError, match="is not valid JSON"):
        read_config(tmp_path)
    monkeypatch.setattr(checkpoints, "LARGEST_JSON", 100)
    with pytest.raises(ValueError, match="config.json has .* bytes"):
        read_config(tmp_path)


@pytest.mark.skipif(os.name == "nt", reason="Windows allows fewer letters in a name")
@pytest.mark.parametrize("name", ["a b", "[a]*?", "~", "$HOME", "été", "#%&'\"", os.fsdecode(b"caf\xe9")])
def test_folders_of_any_name_are_written_and_read(name, tmp_path):
    model = build()
    model.save_pretrained(tmp_path / name)
    assert torch.equal(logits(Hybrid.from_pretrained(tmp_path / name)), logits(model))


def test_files_are_synced_through_a_handle_that_can_write(tmp_path, monkeypatch):
    """Windows syncs no other: there, every save failed."""
    fcntl, modes = pytest.importorskip("fcntl"), []
    sync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda fd: modes.append(fcntl.fcntl(fd, fcntl.F_GETFL) & os.O_ACCMODE) or sync(fd))
    build().save_pretrained(tmp_path)
    write_trainer(tmp_path / "trainer.pt", {})
    assert modes == [os.O_RDWR] * 3


# ---- where texts begin and end ----


def release(folder, **files):
    """Writes the files of a release, name of a file -> what is in it."""
    for name, content in (dict(config={}) | files).items():
        base = dict(model_type="nemotron_h", vocab_size=64) if name == "config" else {}
        (folder / f"{name}.json").write_text(json.dumps(base | content))
    return text_ends(folder, {"<s>": 1, "</s>": 2, "<|im_end|>": 11}.get)


@pytest.mark.parametrize(("files", "expected"), [
    ({}, (1, [2])),  # NemotronHConfig's own
    (dict(config=dict(eos_token_id=5)), (1, [5])),
    (dict(config=dict(eos_token_id=[5, 11, 5])), (1, [5, 11])),
    (dict(config=dict(bos_token_id=3, eos_token_id=None)), (3, [])),
    (dict(config=dict(eos_token_id=[])), (1, [])),
    (dict(config=dict(eos_token_id=-1)), (1, [])),
    (dict(config=dict(bos_token_id=None, eos_token_id=[7, 2])), (7, [7, 2])),
    (dict(config=dict(pad_token_id=0, eos_token_id=2)), (1, [2])),  # padding is no end
    (dict(config=dict(eos_token_id=2), generation_config=dict(eos_token_id=[2, 11])), (1, [2, 11])),
    (dict(generation_config=dict(bos_token_id=4, eos_token_id=12)), (4, [12])),
    (dict(config=dict(eos_token_id=None), generation_config=dict(eos_token_id=12)), (1, [12])),
    (dict(config=dict(eos_token_id=2), generation_config=dict(eos_token_id=None)), (1, [2])),
    (dict(config=dict(eos_token_id=2), tokenizer_config=dict(eos_token="<|im_end|>")), (1, [2, 11])),
    (dict(tokenizer_config=dict(eos_token={"content": "<|im_end|>"}, bos_token="<s>")), (1, [11])),
    (dict(tokenizer_config=dict(eos_token=None)), (1, [])),
    (dict(config=dict(eos_token_id=2), special_tokens_map=dict(eos_token="<|im_end|>")), (1, [2, 11])),
    (dict(config=dict(eos_token_id=2), special_tokens_map=dict(eos_token="<|unheard of|>")), (1, [2])),
    (dict(config=dict(model_type="vision", eos_token_id=9, text_config=dict(model_type="nemotron_h", eos_token_id=5))),
     (1, [5, 9])),
])  # fmt: skip
def test_texts_end_as_all_files_of_a_folder_say(files, expected, tmp_path):
    assert release(tmp_path, **files) == expected


@pytest.mark.parametrize(("files", "message"), [
    (dict(config=dict(eos_token_id="2")), "config.json sets eos_token_id='2'; it must be an id"),
    (dict(config=dict(eos_token_id=True)), "eos_token_id=True"),
    (dict(config=dict(eos_token_id=2.0)), "eos_token_id=2.0"),
    (dict(generation_config=dict(eos_token_id=[2, None])), "generation_config.json sets eos_token_id="),
    (dict(tokenizer_config=dict(eos_token={"content": {}})), "tokenizer_config.json sets eos_token="),
    (dict(config=dict(bos_token_id=None, eos_token_id=None)), "no token that a text begins or ends with"),
    (dict(config=dict(eos_token_id=64)), r"texts begin with 1 and end with \[64\], its vocabulary has 64"),
    (dict(config=dict(bos_token_id=64)), "texts begin with 64"),
])  # fmt: skip
def test_ends_that_are_none_are_one_line(files, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        release(tmp_path, **files)


@pytest.mark.parametrize("name", ["a", os.fsdecode(b"caf\xe9")])
def test_a_released_tokenizer_knows_its_size_and_flushes_what_is_cut(name, tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    if os.name == "nt":
        name = "a"
    made = tokenizers.ByteLevelBPETokenizer()
    made.train_from_iterator(["def f"], vocab_size=260, special_tokens=["<s>"])
    made.save(str(tmp_path / "tokenizer.json"))
    found = json.loads((tmp_path / "tokenizer.json").read_text(encoding="utf-8"))
    found["model"]["vocab"] = {t: i + 40 * (i > 200) for t, i in found["model"]["vocab"].items()}  # a hole
    (tmp_path / "tokenizer.json").write_text(json.dumps(found))
    (tmp_path / name).mkdir()
    tokenizer = ReleasedTokenizer((tmp_path / "tokenizer.json").rename(tmp_path / name / "tokenizer.json"))
    assert tokenizer.n_vocab == max(found["model"]["vocab"].values()) + 1 == len(found["model"]["vocab"]) + 40
    for text, cut in (("def é", 0), ("def é", 1), ("é🙂", 1), ("é🙂", 3), ("", 0)):
        ids = tokenizer.encode(text)
        ids = ids[: len(ids) - cut]
        assert "".join(tokenizer.stream(iter(ids))) == tokenizer.decode(ids)


def test_ends_of_text_of_a_released_model_are_saved_again(tmp_path):
    model = Hybrid(HybridConfig(**TINY))
    model.save_pretrained(tmp_path / "a", bos_token_id=1, eos_token_id=[2, 11])
    Hybrid.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    config = read_config(tmp_path / "b")
    assert config["bos_token_id"] == 1 and config["eos_token_id"] == [2, 11]
    assert Hybrid.token_ids == {} and Hybrid(HybridConfig(**TINY)).token_ids == {}


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
def test_all_files_of_a_checkpoint_can_be_read_by_whom_the_umask_lets(tmp_path):
    old = os.umask(0o022)
    try:
        Hybrid(HybridConfig(**TINY)).save_pretrained(tmp_path)
    finally:
        os.umask(old)
    assert {path.stat().st_mode & 0o777 for path in tmp_path.iterdir()} == {0o644}
