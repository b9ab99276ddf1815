"""nano_hybrid.py: parity with transformers' NemotronH, the cache, generation, checkpoints, published sizes."""

import copy
import json
import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from common.accounting import CG_STEPS
from conftest import TINY, scramble
from decoding import DraftStats, StaticCache, ThinkingBudget, decode_step, generate, step_logits, to_static
from experiments.nano_hybrid import PASSKEY_VOCAB, PasskeyStudy, attention_baseline, passkey, state_bytes
from latent_moe import new_load
from lla import LocalLinearAttention
from nano_hybrid import (
    PRESETS,
    Hybrid,
    HybridConfig,
    RMSNorm,
    apply_rope,
)
from ssd import Mamba2


def build(dtype=torch.float32, seed=0, **changes):
    torch.manual_seed(seed)
    return scramble(Hybrid(HybridConfig(**(TINY | changes))), seed).to(dtype).eval()


MOE = dict(
    hybrid_override_pattern="ME*E", n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=12,
    moe_shared_expert_intermediate_size=20, routed_scaling_factor=2.5,
)  # fmt: skip
MTP = dict(num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*-", tie_word_embeddings=True)
MIXTURES = {"standard": MOE, "grouped": MOE | dict(n_group=4, topk_group=2), "latent": MOE | dict(moe_latent_size=8)}


ATTENTIONS = [TINY["hybrid_override_pattern"], "ML-L"]  # with softmax attention, and with local linear attention


def step(model, ids, cache):
    """Logits of ids on a StaticCache."""
    return step_logits(model, decode_step(model, ids, cache), normed=False)


def draw_ids(B, T, seed=0):
    return torch.randint(TINY["vocab_size"], (B, T), generator=torch.Generator().manual_seed(seed))


# ---- the world's implementation ----


def oracle(model, tmp_path):
    """transformers' NemotronH with our checkpoint, and its clamp of dt (not in the published model) out of the way."""
    transformers = pytest.importorskip("transformers")
    model.save_pretrained(tmp_path)
    theirs = transformers.NemotronHForCausalLM.from_pretrained(tmp_path, attn_implementation="eager").eval()
    for layer in theirs.model.layers:
        if hasattr(layer.mixer, "time_step_limit"):
            layer.mixer.time_step_limit = (0.0, math.inf)
    return theirs


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("T", [1, 3, 8, 9, 29])
def test_logits_and_gradients_are_those_of_transformers(T, tied, tmp_path):
    model = build(tie_word_embeddings=tied)
    theirs = oracle(model, tmp_path)
    ids = draw_ids(2, T)
    ours, expected = model(ids), theirs(ids, use_cache=False).logits
    assert (ours - expected).norm() < 1e-5 * expected.norm()
    weight = torch.randn(ours.shape, generator=torch.Generator().manual_seed(1))
    (ours * weight).sum().backward()
    (expected * weight).sum().backward()
    for name, p in theirs.named_parameters():
        if tied and name in ("lm_head.weight", "model.embeddings.weight"):
            continue  # transformers does not tie this model: its two gradients add up to our one
        grad = dict(model.named_parameters())[name].grad
        assert (grad - p.grad).norm() <= 1e-4 * p.grad.norm() + 1e-6 * weight.norm(), name


def test_a_checkpoint_of_transformers_opens_here(tmp_path):
    model = build()
    theirs = oracle(model, tmp_path / "ours")
    theirs.save_pretrained(tmp_path / "theirs")
    config = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert "hybrid_override_pattern" not in config  # transformers 5 spells the layers out
    again = Hybrid.from_pretrained(tmp_path / "theirs")
    assert torch.equal(again(draw_ids(1, 9)), model(draw_ids(1, 9)))


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_mixture_of_experts_is_that_of_transformers(kind, tmp_path):
    model = build(**MIXTURES[kind])
    for moe in model.moe_layers():
        moe.gate.e_score_correction_bias.uniform_(-0.2, 0.2)
    theirs = oracle(model, tmp_path / "ours")
    ids = draw_ids(2, 11)
    expected = theirs(ids, use_cache=False).logits
    assert (model(ids) - expected).norm() < 1e-5 * expected.norm()
    theirs.save_pretrained(tmp_path / "theirs")
    again = Hybrid.from_pretrained(tmp_path / "theirs").to(torch.float64).to(torch.float32).eval()
    assert torch.equal(again(ids), model(ids))


def test_biases_are_those_of_transformers(tmp_path):
    model = build(**MOE | dict(moe_latent_size=8, hybrid_override_pattern="M-*E"), use_bias=True,
                  mlp_bias=True, use_conv_bias=False)  # fmt: skip
    ids, theirs = draw_ids(2, 11), oracle(model, tmp_path)
    expected = theirs(ids, use_cache=False).logits
    assert (model(ids) - expected).norm() < 1e-5 * expected.norm()
    cache = model.new_cache(torch.tensor([0, 3]))  # left padding is exact although in_proj has a bias
    padded = torch.cat([ids[1:, :3] * 0, ids[1:, :8]], dim=1)
    got = model(torch.cat([ids[:1], padded]), cache)[1, 3:]
    assert torch.allclose(got, model(ids[1:, :8])[0], atol=1e-4)


def spell_as_a_release(folder):
    """Rewrites a checkpoint as NVIDIA's are: parts with an index, other spellings, a multimodal model's prefix."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names, parts = sorted(tensors), 3
    weight_map = {}
    for part in range(parts):
        file = f"model-{part + 1:05}-of-{parts:05}.safetensors"
        mine = {f"language_model.{n}": tensors[n].bfloat16() for n in names[part::parts]}
        save_file(mine, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(mine, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    config = json.loads((folder / "config.json").read_text())
    words = {"M": "mamba", "*": "attention", "-": "mlp", "E": "moe"}
    config["layers_block_type"] = [words[letter] for letter in config.pop("hybrid_override_pattern")]
    config |= {"attention_head_dim": config.pop("head_dim"), "norm_eps": config.pop("layer_norm_epsilon")}
    text = json.dumps({"model_type": "a_vision_model", "text_config": config | {"time_step_limit": [0.0, math.inf]}})
    (folder / "config.json").write_text(text)


def test_a_release_opens(tmp_path):
    model = build(**MIXTURES["latent"])
    for p in model.parameters():
        p.data = p.data.bfloat16().float()
    model.save_pretrained(tmp_path)
    spell_as_a_release(tmp_path)
    again = Hybrid.from_pretrained(tmp_path)
    assert again.lm_head.weight.dtype == torch.bfloat16  # as saved
    assert all(moe.gate.e_score_correction_bias.dtype == torch.float32 for moe in again.moe_layers())
    assert torch.equal(again.float().eval()(draw_ids(1, 9)), model(draw_ids(1, 9)))
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    (tmp_path / index["language_model.lm_head.weight"]).unlink()
    with pytest.raises(FileNotFoundError, match="is missing"):
        Hybrid.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    "change, wrong",
    [("no expert 2", "lacks expert 2"), ("a scale", "quantised"), ("one row", r"is \[1, 24\], other experts are")],
)
def test_a_checkpoint_with_a_part_missing_or_quantised_is_named(change, wrong, tmp_path):
    build(**MOE).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    if change == "no expert 2":
        tensors = {n: t for n, t in tensors.items() if not n.endswith("layers.1.mixer.experts.2.up_proj.weight")}
    elif change == "one row":
        tensors["backbone.layers.1.mixer.experts.2.up_proj.weight"] = torch.ones(1, 24)
    else:
        tensors["backbone.layers.1.mixer.experts.2.up_proj.weight_scale"] = torch.ones(1)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=wrong):
        Hybrid.from_pretrained(tmp_path)


@pytest.mark.parametrize("changes", [{}, MOE, MOE | dict(moe_latent_size=8)])
def test_parameter_names_are_those_of_transformers(changes):
    transformers = pytest.importorskip("transformers")
    shape = TINY | changes
    with torch.device("meta"):
        theirs = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**shape)).state_dict()
        ours = Hybrid(HybridConfig(**shape)).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


@pytest.mark.parametrize(
    ("preset", "millions", "active"),
    [
        ("nano-12b-v2", 12310, 12310), ("nano-9b-v2", 8890, 8890), ("nano-3-30b-a3b", 31580, 3580),
        ("super-3-120b-a12b", 120670, 12770), ("ultra-3-550b-a55b", 549300, 56100),
        ("small", 122.3, 122.3), ("nano3", 298.7, 122.5), ("super3", 301.6, 122.3), ("tiny", 1.844, 1.844),
        ("lla", 122.3, 122.3), ("lla-tiny", 1.820, 1.820),
    ],
)  # fmt: skip
def test_presets_have_the_published_sizes(preset, millions, active):
    with torch.device("meta"):
        model = Hybrid(PRESETS[preset])
    assert model.num_parameters() / 1e6 == pytest.approx(millions, rel=1e-3)
    assert model.num_parameters(active=True) / 1e6 == pytest.approx(active, rel=1e-3)


@pytest.mark.parametrize(
    ("preset", "counts"),
    [
        ("nano-12b-v2", (28, 6, 28, 0)), ("nano-9b-v2", (27, 4, 25, 0)), ("nano-3-30b-a3b", (23, 6, 0, 23)),
        ("super-3-120b-a12b", (40, 8, 0, 40)), ("ultra-3-550b-a55b", (48, 12, 0, 48)),
    ],
)  # fmt: skip
def test_presets_have_the_published_layers(preset, counts):
    assert tuple(map(PRESETS[preset].hybrid_override_pattern.count, "M*-E")) == counts


# ---- mixtures of experts in training ----


def test_the_loss_of_mixtures_has_their_balance_and_their_routers_move():
    model, ids = build(**MOE, router_aux_loss_coef=0.5, router_bias_update_rate=0.1), draw_ids(2, 20)
    plain, _ = model.loss(ids[:, :-1], ids[:, 1:])
    load = new_load(model.train(), torch.ones(2, 19, dtype=torch.bool))
    model.model(ids[:, :-1], load=load)
    balance = sum(numbers[1] for numbers in load.taken).item()
    loss, metrics = model.loss(ids[:, :-1], ids[:, 1:])
    assert loss.item() == pytest.approx(plain.item() + 0.5 * balance, rel=1e-5)
    assert metrics["loss"].item() == pytest.approx(plain.item(), rel=1e-5)
    gates = [moe.gate for moe in model.moe_layers()]
    busiest = [gate.counts.argmax() for gate in gates]
    found = model.balance_routers(torch.tensor(False))  # a step that was left out
    assert found["load_max"] >= 1 and 0 <= found["dead_experts"] < 1 and 0 < found["router_entropy"] <= 1
    assert not any(gate.counts.any() or gate.e_score_correction_bias.any() for gate in gates)
    model.loss(ids[:, :-1], ids[:, 1:])
    model.balance_routers(torch.tensor(True))
    for gate, expert in zip(gates, busiest):
        assert gate.e_score_correction_bias[expert] == pytest.approx(-0.1) and not gate.counts.any()


def test_every_depth_of_a_predictor_adds_its_balance():
    model = build(**MOE | MTP | dict(mtp_hybrid_override_pattern="E"), router_aux_loss_coef=1.0).train()
    ids = draw_ids(2, 9)
    loss, metrics = model.loss(ids[:, :-1], ids[:, 1:])
    further = sum(metrics[f"mtp{depth}_loss"] for depth in (1, 2)) / 2
    balance = (loss - metrics["loss"] - 0.3 * further).item()  # two layers, and two depths of one: each about 1
    assert 3.2 < balance < 8
    assert model.mtp.layers[0].mixer.gate.counts.sum() == 2 * 3 * (7 + 6)
    loss, _ = model.loss(ids[:, :1], ids[:, 1:2])  # a text of one token: nothing further ahead
    assert loss.isfinite()


def checkpointed(model, what, use_reentrant):
    """The model with each layer, or each mixture of experts, computed again in the backward."""
    for layer in model.layers:
        module = layer if what == "layers" else layer.mixer
        if what == "layers" or layer.routes:
            module.forward = partial(checkpoint, module.forward, use_reentrant=use_reentrant)
    return model


def trained(model, ids, targets):
    """What a training step leaves: name -> loss, every gradient, and what the routers have counted."""
    loss, metrics = model.loss(ids, targets)
    loss.backward()
    found = {"loss": loss.detach()} | metrics | {name: p.grad for name, p in model.named_parameters()}
    for index, moe in enumerate(model.moe_layers()):
        found |= {f"counts {index}": moe.gate.counts.double(), f"entropy {index}": moe.gate.entropy}
    return found


PADDED = torch.arange(12) >= torch.tensor([[12], [7]])  # in the second of two texts of 12 tokens
SUPER = MOE | MTP | dict(mtp_hybrid_override_pattern="*E", moe_latent_size=8, router_aux_loss_coef=0.5)


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("what", ["layers", "mixtures"])
def test_checkpointing_changes_neither_losses_nor_gradients_nor_counts(what, use_reentrant):
    """Mixtures, latent, with padding and a multi-token predictor, which goes through its layers twice."""
    ids, targets = draw_ids(2, 12), draw_ids(2, 12, seed=1).masked_fill(PADDED, -100)
    expected = trained(build(**SUPER).train(), ids, targets)
    found = trained(checkpointed(build(**SUPER).train(), what, use_reentrant), ids, targets)
    assert found.keys() == expected.keys() and expected["counts 0"].sum() == 3 * (12 + 7)
    assert expected["counts 2"].sum() == 3 * (11 + 6 + 10 + 5)  # of the predictor, one and two tokens further
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name
    without = trained(build(**SUPER | dict(router_aux_loss_coef=0.0)).train(), ids, targets)
    routers = [name for name in expected if name.endswith("gate.weight")]
    assert len(routers) == 3  # the balance loss reaches each of them
    assert all((expected[name] - without[name]).norm() > 1e-3 * expected[name].norm() for name in routers)


def test_checkpointing_goes_with_torch_compile():
    few = dict(hybrid_override_pattern="-E", router_aux_loss_coef=0.5)
    ids, targets = draw_ids(2, 12), draw_ids(2, 12, seed=1).masked_fill(PADDED, -100)
    expected = trained(build(**MOE | few).train(), ids, targets)
    model = checkpointed(build(**MOE | few).train(), "layers", use_reentrant=False)
    model.compile(backend="aot_eager")
    found = trained(model, ids, targets)
    for name, value in expected.items():
        assert torch.allclose(found[name], value, rtol=1e-4, atol=1e-6), name


def test_checkpointing_goes_with_data_parallelism(tmp_path):
    class Step(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, ids, targets):
            return self.model.loss(ids, targets)

    ids, targets = draw_ids(2, 12), draw_ids(2, 12, seed=1).masked_fill(PADDED, -100)
    expected = trained(build(**MOE).train(), ids, targets)
    model = checkpointed(build(**MOE).train(), "layers", use_reentrant=False)
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        step = DistributedDataParallel(Step(model))
        loss, _ = step(ids, targets)
        loss.backward()
        counts = [moe.gate.counts.clone() for moe in model.moe_layers()]
        model.balance_routers()  # over all processes
    finally:
        dist.destroy_process_group()
    for name, p in model.named_parameters():
        assert torch.allclose(p.grad, expected[name], rtol=1e-4, atol=1e-6), name
    assert [c.tolist() for c in counts] == [expected[f"counts {i}"].long().tolist() for i in (0, 1)]


def test_five_tokens_and_45_of_padding_make_forty_choices():
    model, ids = build(**MOE | dict(num_experts_per_tok=8, n_routed_experts=16)).train(), draw_ids(1, 51)
    mask = torch.arange(50)[None] < 5
    targets = ids[:, 1:].masked_fill(~mask, -100)
    of_answer = targets.masked_fill(torch.arange(50) < 3, -100)  # a prompt has no targets, but is no padding
    for forward, inputs in ((model.loss, (ids[:, :-1], targets)), (model.loss, (ids[:, :-1], of_answer)),
                            (model.logprobs, (ids, mask))):  # fmt: skip
        forward(*inputs)
        assert [moe.gate.counts.sum().item() for moe in model.moe_layers()] == [40, 40]
        model.balance_routers()


def test_padding_changes_neither_balance_nor_counts():
    ids, targets = draw_ids(2, 12), draw_ids(2, 12, seed=1)
    model, other = (build(**MOE, router_aux_loss_coef=0.5).train() for _ in range(2))
    loss, _ = model.loss(ids[:, :7], targets[:, :7])
    padded, _ = other.loss(ids, targets.masked_fill(torch.arange(12) >= 7, -100))
    assert padded.item() == pytest.approx(loss.item(), rel=1e-5)
    for a, b in zip(model.moe_layers(), other.moe_layers()):
        assert torch.equal(a.gate.counts, b.gate.counts)
        assert a.gate.entropy.item() == pytest.approx(b.gate.entropy.item(), rel=1e-5)


def test_only_training_counts():
    model, ids = build(**MOE | MTP).train(), draw_ids(2, 9)
    with torch.no_grad():
        model.loss(ids[:, :-1], ids[:, 1:]), model.logprobs(ids)
    model(ids), list(model.generate(ids, 2)), list(generate(model, ids, 2))
    model.eval().loss(ids[:, :-1], ids[:, 1:])[0].backward()
    assert not any(moe.gate.counts.any() or moe.gate.entropy for moe in model.moe_layers())


@pytest.mark.parametrize("kind", ["plain", "checkpointed", "compiled"])
def test_a_model_can_be_copied_whenever(kind):
    shape = SUPER | dict(hybrid_override_pattern="ME*L-")
    if kind == "compiled":  # few layers: compilation takes its time
        shape |= dict(hybrid_override_pattern="E", num_nextn_predict_layers=0)
    model, ids = build(**shape).train(), draw_ids(2, 9)
    if kind == "checkpointed":
        checkpointed(model, "layers", use_reentrant=True)
    elif kind == "compiled":
        model.compile(backend="eager")
    loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
    ema = [copy.deepcopy(model)]
    loss.backward()
    ema.append(copy.deepcopy(model))
    model.logprobs(ids)
    ema.append(copy.deepcopy(model))
    for copied in ema:
        assert copied.lm_head.weight is copied.model.embeddings.weight is not model.lm_head.weight
        assert all(torch.equal(a, b) for a, b in zip(copied.state_dict().values(), model.state_dict().values()))
    assert torch.equal(ema[0].moe_layers()[0].gate.counts * 2, model.moe_layers()[0].gate.counts)


def test_a_mixture_in_two_layers_is_counted_twice_and_moved_once():
    model, ids = build(**MOE, router_aux_loss_coef=0.5, router_bias_update_rate=0.1).train(), draw_ids(2, 9)
    model.model.layers[1].mixer = shared = model.model.layers[3].mixer
    loss, metrics = model.loss(ids[:, :-1], ids[:, 1:])
    loss.backward()
    assert model.moe_layers() == [shared] and shared.gate.counts.sum() == 2 * (2 * 8 * 3)
    assert loss - metrics["loss"] > 0.5 * 1.9  # two balance losses, each about one
    busiest = shared.gate.counts.argmax()
    assert model.balance_routers()["dead_experts"] < 1
    assert shared.gate.e_score_correction_bias[busiest].item() == pytest.approx(-0.1)


@pytest.mark.parametrize("kind", MIXTURES)
def test_a_cache_of_mixtures_goes_on_where_it_was(kind):
    model, ids = build(**MIXTURES[kind]), draw_ids(2, 12)
    cache = model.new_cache()
    parts = torch.cat([model(ids[:, :5], cache), model(ids[:, 5:6], cache), model(ids[:, 6:], cache)], dim=1)
    assert torch.allclose(parts, model(ids), atol=1e-4)


@pytest.mark.parametrize("trains", [False, True])
@pytest.mark.parametrize("pad", [None, torch.tensor([0, 90])])
def test_a_cache_holds_no_more_memory_than_its_states(pad, trains):
    """A view would keep what it was cut from: the inputs or the states of the whole text."""
    model, ids = build(hybrid_override_pattern="M*L", conv_kernel=2), draw_ids(2, 100)
    with torch.set_grad_enabled(trains):
        cache = model.new_cache(pad)
        for part in (ids[:, :97], ids[:, 97:98], ids[:, 98:]):
            model(part, cache)
            tensors = [t for state in cache.states for t in vars(state).values() if torch.is_tensor(t)]
            assert len(tensors) == 6 + 2 * (pad is not None)
            held = [t.untyped_storage().nbytes() for t in tensors if t is not cache.pad]
            assert held == [t.numel() * t.element_size() for t in tensors if t is not cache.pad]
            if part.shape[1] == 97:
                assert cache.nbytes == sum(t.numel() * t.element_size() for t in tensors if t.is_floating_point())


# ---- made on the meta device ----


def as_empty_memory(module):
    """What `to_empty` may leave: anything."""
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.detach().fill_(99 if tensor.dtype == torch.int64 else math.nan)
    return module


KINDS = {
    "all layers": dict(hybrid_override_pattern="M*L-E", lla_ridge=3.0),
    "tied, with biases": dict(hybrid_override_pattern="M-", tie_word_embeddings=True, use_bias=True, mlp_bias=True),
    "super": SUPER,
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_made_on_the_meta_device_begins_like_any_other(kind):
    config = HybridConfig(**(TINY | KINDS[kind]))
    with torch.device("meta"):
        model = Hybrid(config)
    assert all(p.is_meta for p in model.parameters())
    as_empty_memory(model.to_empty(device="cpu"))
    other = Hybrid(config)
    for one in (model, other):
        torch.manual_seed(0)
        one.reset_parameters()
    assert (model.lm_head.weight is model.model.embeddings.weight) == config.tie_word_embeddings
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values()):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    ids = draw_ids(2, 9)
    for one in (model, other):
        one.train().loss(ids[:, :-1], ids[:, 1:])[0].backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(model.parameters(), other.parameters()))
    assert all(torch.equal(a.gate.counts, b.gate.counts) for a, b in zip(model.moe_layers(), other.moe_layers()))


LAYERS = {
    "Mamba2": lambda: Mamba2(48, 64, 4, 16, 2, use_bias=True),
    "LocalLinearAttention": lambda: LocalLinearAttention(48, 4, 2, ridge=3.0),
    "RMSNorm": lambda: RMSNorm(48, 1e-5),
}


@pytest.mark.parametrize("make", LAYERS.values(), ids=LAYERS)
def test_a_layer_made_on_the_meta_device_begins_like_any_other(make):
    with torch.device("meta"):
        layer = make()
    as_empty_memory(layer.to_empty(device="cpu"))
    new, other = make(), make()
    for one in (layer, other):
        torch.manual_seed(0)
        one.reset_parameters()
    for (name, a), b, c in zip(layer.named_parameters(), other.parameters(), new.parameters()):
        assert torch.equal(a, b), name
        assert (a.std() - c.std()).abs() <= 0.25 * c.std(), name  # distributed as in a new layer
        assert (a.mean() - c.mean()).abs() <= 0.25 * c.std(), name


@pytest.mark.parametrize("shape", [{}, SUPER], ids=["plain", "super"])
def test_shapes_gradients_and_flops_are_known_on_the_meta_device(shape):
    shape, flops = TINY | shape | dict(hybrid_override_pattern="MEL-"), []  # PyTorch counts no attention on a CPU
    for device in ("cpu", "meta"):
        with torch.device(device):
            model, ids = Hybrid(HybridConfig(**shape)).train(), torch.zeros(2, 16).long()
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(ids)
            flops.append(counter.get_total_flops())
    model.loss(ids, ids)[0].backward()
    assert all(p.grad.is_meta and p.grad.shape == p.shape for p in model.parameters())
    with torch.device("meta"), torch.no_grad():
        cache = model.new_cache()
        assert model(ids, cache).shape == (2, 16, 64) and model(ids[:, :1], cache).shape == (2, 1, 64)
        assert [v.shape for v in model.logprobs(ids)] == [(2, 15), (2, 15)]
    assert flops[0] == flops[1]  # with an even load of the experts, which costs what any other does


# ---- initialisation, loss ----


@pytest.mark.parametrize("preset", ["tiny", "lla-tiny", "small"])
def test_loss_at_step_0_is_ln_V(preset):
    torch.manual_seed(0)
    model = Hybrid(replace(PRESETS[preset], vocab_size=4096))
    ids = torch.randint(4096, (2, 129))
    loss, metrics = model.loss(ids[:, :-1], ids[:, 1:])
    assert loss.item() == pytest.approx(math.log(4096), rel=0.02)
    assert metrics["loss"] == loss


def test_initial_values_are_the_published_ones():
    torch.manual_seed(0)
    config = replace(PRESETS["tiny"], mamba_num_heads=64, hidden_size=256, initializer_range=0.02)
    model = Hybrid(config).requires_grad_(False)
    mixer, mlp = model.model.layers[0].mixer, model.model.layers[1].mixer
    assert mixer.in_proj.weight.std() == pytest.approx(0.02, rel=0.02)
    for output in (mixer.out_proj, mlp.down_proj):
        assert output.weight.std() == pytest.approx(0.02 / math.sqrt(7), rel=0.02)
    A, dt = mixer.A_log.exp(), F.softplus(mixer.dt_bias)
    assert A.min() >= 1 and A.max() <= 16 and A.std() > 3
    assert dt.min() >= 1e-3 * 0.999 and dt.max() <= 0.1 * 1.001
    assert mixer.D.unique().tolist() == [1.0] and mixer.norm.weight.unique().tolist() == [1.0]


@pytest.mark.parametrize("ridge", [0.011, 1.0, 1000.0])
def test_local_linear_attention_begins_with_its_ridge_and_its_norm(ridge):
    model = Hybrid(replace(PRESETS["lla-tiny"], lla_ridge=ridge, initializer_range=0.02))
    mixer = model.model.layers[3].mixer
    assert torch.allclose(mixer.ridge, torch.full((2,), ridge)) and mixer.qk_norm.unique().tolist() == [1.0]
    assert mixer.q_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert mixer.o_proj.weight.std().item() == pytest.approx(0.02 / math.sqrt(7), rel=0.05)


def test_loss_is_the_cross_entropy_of_forward_and_ignores_minus_100():
    model, ids = build(), draw_ids(2, 20)
    targets = ids[:, 1:].clone()
    targets[0, :7] = -100
    loss, _ = model.loss(ids[:, :-1], targets)
    expected = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), targets.flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_logprobs_are_log_softmax_of_forward():
    model, ids = build(torch.float64), draw_ids(2, 12)
    logprob, entropy = model.logprobs(ids, temperature=1.5)
    expected = torch.distributions.Categorical(logits=model(ids[:, :-1]) / 1.5)
    assert torch.allclose(logprob, expected.log_prob(ids[:, 1:]))
    assert torch.allclose(entropy, expected.entropy())
    mask = torch.arange(11).expand(2, 11) > 6
    masked, _ = model.logprobs(ids, mask, temperature=1.5)
    assert torch.allclose(masked, logprob * mask)


@pytest.mark.parametrize("pattern", ATTENTIONS)
def test_a_small_model_learns_a_sequence_by_heart(pattern):
    torch.manual_seed(0)
    model = Hybrid(HybridConfig(**(TINY | dict(hybrid_override_pattern=pattern))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    ids = draw_ids(2, 33)
    for _ in range(120):
        loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert loss.item() < 0.1


def test_dropout_is_for_training_only():
    model = build(hidden_dropout=0.5)
    ids = draw_ids(1, 9)
    assert torch.equal(model(ids), model(ids))
    model.train()
    assert not torch.equal(model(ids), model(ids))


def test_flops_are_those_that_pytorch_counts():
    model = Hybrid(HybridConfig(**(TINY | dict(hybrid_override_pattern="--")))).train()
    ids = draw_ids(1, 11)
    with FlopCounterMode(display=False) as counter:
        loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
    assert counter.get_total_flops() == model.flops_per_token(10) * 10


def test_local_linear_attention_costs_what_attention_does_times_a_number():
    """The same weights, and more for each token of the context."""
    softmax, local = (Hybrid(HybridConfig(**(TINY | dict(hybrid_override_pattern=p)))) for p in ("*-", "L-"))
    first, more = (local.flops_per_token(T) - softmax.flops_per_token(T) for T in (0, 100))
    attention = softmax.flops_per_token(100) - softmax.flops_per_token(0)
    assert first == 0 and more / attention == pytest.approx(1 + 2 / 3 * CG_STEPS)


# ---- the cache ----


@pytest.mark.parametrize("pattern", ATTENTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("pieces", [[30], [1] * 30, [12, 18], [2, 9, 1, 1, 17], [29, 1]])
def test_cached_equals_uncached(pattern, pieces, dtype):
    model, ids = build(dtype, hybrid_override_pattern=pattern), draw_ids(2, 30)
    with torch.no_grad():
        expected = model(ids)
        cache = model.new_cache()
        got = torch.cat([model(part, cache) for part in ids.split(pieces, dim=1)], dim=1)
    assert cache.length == 30
    assert (got - expected).abs().max() < (1e-4 if dtype == torch.float32 else 1e-10) * expected.abs().max()


def test_the_mamba_state_does_not_grow():
    model, cache = build(), None
    sizes = []
    for T in (3, 40):
        cache = model.new_cache()
        model(draw_ids(1, T), cache)
        sizes.append([(s.conv.shape, s.ssm.shape) for s in cache.states if hasattr(s, "ssm")])
        assert all(s.ssm.dtype == torch.float32 for s in cache.states if hasattr(s, "ssm"))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("pattern", ATTENTIONS)
def test_the_future_does_not_matter(pattern):
    model, ids = build(torch.float64, hybrid_override_pattern=pattern), draw_ids(1, 20)
    changed = ids.clone()
    changed[:, 11:] = (changed[:, 11:] + 1) % TINY["vocab_size"]
    assert torch.equal(model(ids)[:, :11], model(changed)[:, :11])


@pytest.mark.parametrize("pattern", ATTENTIONS)
def test_left_padding_is_exact(pattern):
    model, ids = build(torch.float64, hybrid_override_pattern=pattern), draw_ids(1, 20)
    pad = 7
    padded = torch.cat([ids[:, :3].new_full((1, pad), 5), ids], 1)
    both = torch.cat([padded, draw_ids(1, 27, seed=3)])
    with torch.no_grad():
        for pieces in ([27], [4, 4, 18, 1]):
            cache = model.new_cache(pad=torch.tensor([pad, 0]))
            got = torch.cat([model(part, cache) for part in both.split(pieces, dim=1)], dim=1)
            assert (got[0, pad:] - model(ids)[0]).abs().max() < 1e-10
            assert (got[1] - model(both[1:])[0]).abs().max() < 1e-10


# ---- generation ----


def run(model, prompts, n, **kwargs):
    return torch.stack(list(generate(model, prompts, n, **kwargs)), dim=1).tolist()


@pytest.mark.parametrize("pattern", ATTENTIONS)
def test_greedy_generation_is_argmax_of_forward(pattern):
    model, ids = build(torch.float64, hybrid_override_pattern=pattern), draw_ids(1, 5)
    made = run(model, ids, 12, temperature=0)[0]
    for i in range(12):
        assert made[i] == model(torch.cat([ids, torch.tensor([made[:i]], dtype=torch.int64)], 1))[0, -1].argmax()


@pytest.mark.parametrize("pattern", ATTENTIONS)
def test_prompts_of_different_length_do_not_disturb_each_other(pattern):
    model = build(torch.float64, hybrid_override_pattern=pattern)
    prompts = [draw_ids(1, n, seed=n)[0].tolist() for n in (1, 4, 13)]
    together = run(model, prompts, 10, temperature=0)
    assert together == [run(model, [p], 10, temperature=0)[0] for p in prompts]


def test_a_row_ends_at_its_stop_token_and_the_others_go_on():
    model = build(torch.float64)
    prompts = [draw_ids(1, n, seed=n)[0].tolist() for n in (3, 6)]
    free = run(model, prompts, 12, temperature=0)
    stop = free[0][2]
    rows = run(model, prompts, 12, temperature=0, stop=[stop])
    end = free[0].index(stop)
    assert rows[0][: end + 1] == free[0][: end + 1]
    assert set(rows[0][end + 1 :]) <= {-1}
    other = free[1].index(stop) + 1 if stop in free[1] else len(rows[1])
    assert rows[1][:other] == free[1][:other]
    assert len(rows[0]) == max(end + 1, other)


def test_the_log_probabilities_of_generation_are_those_of_training():
    model, prompts, logprobs = build().eval(), [[1, 2, 3], [4], [5, 6]], []
    options = dict(temperature=0.8, generator=torch.Generator().manual_seed(0), logprobs=logprobs)
    tokens = torch.stack(list(generate(model, prompts, 6, **options)), 1)  # [3, 6]
    for prompt, new, found in zip(prompts, tokens.tolist(), torch.stack(logprobs, 1)):
        expected, _ = model.logprobs(torch.tensor([prompt + new]), temperature=0.8)
        assert (found - expected[0, len(prompt) - 1 :]).abs().max() < 1e-4


def test_generation_repeats_with_its_seed():
    model, ids = build(), draw_ids(2, 4)
    first, second, third = (
        run(model, ids, 20, temperature=2.0, generator=torch.Generator().manual_seed(s)) for s in (1, 1, 2)
    )
    assert first == second != third


@pytest.mark.parametrize(
    ("prompt", "kwargs", "message"),
    [
        ([[]], {}, "empty prompt"),
        ([], {}, "empty prompt"),
        ([[1]], dict(temperature=-1), "temperature >= 0"),
        ([[1]], dict(top_k=0), "top_k >= 1"),
        ([[1]], dict(top_p=0.0), "0 < top_p"),
    ],
)
def test_generate_refuses_what_cannot_be(prompt, kwargs, message):
    with pytest.raises(ValueError, match=message):
        next(generate(build(), prompt, 3, **kwargs))


# ---- checkpoints and configurations ----


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("pattern", ATTENTIONS)
def test_save_and_load_give_the_same_logits(pattern, tied, tmp_path):
    model = build(hybrid_override_pattern=pattern, tie_word_embeddings=tied, lla_ridge=0.5)
    model.save_pretrained(tmp_path / "a", note="kept")
    again = Hybrid.from_pretrained(tmp_path / "a")
    assert again.config == model.config
    assert (again.lm_head.weight is again.model.embeddings.weight) == tied
    assert torch.equal(again(draw_ids(1, 9)), model(draw_ids(1, 9)))
    assert json.loads((tmp_path / "a" / "config.json").read_text())["note"] == "kept"
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["config.json", "model.safetensors"]


def damage(path, how):
    if how == "gone":
        path.unlink()
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif how == "nonsense":
        path.write_bytes(b"not this")
    elif how == "a list":
        path.write_text("[1, 2]")
    elif how == "foreign":
        path.write_text('{"model_type": "llama"}')
    elif how == "other shape":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"intermediate_size": 48}))
    elif how == "other pattern":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"hybrid_override_pattern": "M-X"}))
    elif how == "activation":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"mlp_hidden_act": "gelu"}))
    elif how == "dt limit":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"time_step_limit": [0.001, 0.1]}))
    elif how == "quantised":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"quantization_config": {"quant_algo": "FP8"}}))


@pytest.mark.parametrize(
    ("file", "how", "error", "message"),
    [
        ("config.json", "gone", FileNotFoundError, "config.json is missing"),
        ("config.json", "nonsense", ValueError, "config.json is not valid JSON"),
        ("config.json", "a list", ValueError, "holds no JSON object"),
        ("config.json", "foreign", ValueError, "model_type='llama'"),
        ("config.json", "other pattern", ValueError, "'X'"),
        ("config.json", "other shape", ValueError, "does not fit its config"),
        ("config.json", "activation", ValueError, "mlp_hidden_act"),
        ("config.json", "dt limit", ValueError, "limits dt"),
        ("config.json", "quantised", ValueError, "BF16 release"),
        ("model.safetensors", "gone", FileNotFoundError, "model.safetensors is missing"),
        ("model.safetensors", "truncated", ValueError, "damaged or not a safetensors file"),
        ("model.safetensors", "nonsense", ValueError, "damaged or not a safetensors file"),
    ],
)
def test_a_bad_checkpoint_is_named(file, how, error, message, tmp_path):
    build().save_pretrained(tmp_path)
    damage(tmp_path / file, how)
    with pytest.raises(error, match=message):
        Hybrid.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(hybrid_override_pattern="M-Q"), r"has \['Q'\].*one letter per layer"),
        (dict(hybrid_override_pattern=""), "no layers"),
        (dict(num_attention_heads=6, num_key_value_heads=4), "num_attention_heads=6 is not a multiple of"),
        (dict(mamba_num_heads=4, n_groups=3), "mamba_num_heads=4 is not a multiple of n_groups=3"),
        (dict(hidden_size=0), "hidden_size=0 must be a whole number of at least 1"),
        (dict(hidden_size="wide"), "hidden_size='wide' must be a whole number"),
        (dict(hidden_dropout=1.0), "hidden_dropout=1.0"),
        (dict(lla_ridge=0.0), "lla_ridge=0.0 must be above 0.01"),
        (dict(lla_ridge=math.nan), "lla_ridge=nan must be a number from 0"),
    ],
)
def test_a_shape_that_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        HybridConfig(**(TINY | changes))


# ---- multi-token prediction ----


def test_the_loss_further_ahead_is_its_equation():
    model, ids = build(torch.float64, **MTP).train(), draw_ids(2, 12)
    ids, targets = ids[:, :-1], ids[:, 1:].clone()
    targets[0, :4] = -100
    loss, metrics = model.loss(ids, targets)
    h, total = model.model(ids), 0
    first, last = model.mtp.layers[0], model.mtp.layers[-1]
    for depth in (1, 2):
        pairs = []
        for t in range(11 - depth):
            pairs.append(torch.cat([first.enorm(model.model.embeddings(ids[:, t + depth])), first.hnorm(h[:, t])], -1))
        g = first.eh_proj(torch.stack(pairs, dim=1))
        for layer in model.mtp.layers:
            g = layer(g)
        h = last.final_layernorm(g)
        logits = model.lm_head(h)  # position t predicts token t + depth + 1
        expected = F.cross_entropy(logits.flatten(0, 1), targets[:, depth:].flatten())
        assert torch.allclose(metrics[f"mtp{depth}_loss"], expected)
        total = total + expected / 2
    assert torch.allclose(loss, metrics["loss"] + 0.3 * total)


def test_a_depth_sees_no_token_that_it_is_to_predict():
    model, ids = build(**MTP), draw_ids(1, 10)
    other = ids.clone()
    other[0, 6:] = (other[0, 6:] + 1) % TINY["vocab_size"]
    h = [model.mtp(model.model.embeddings(i[:, 1:]), model.model(i)[:, :-1]) for i in (ids, other)]
    assert torch.equal(h[0][:, :5], h[1][:, :5])  # positions 0 to 4 are given tokens up to 5
    assert not torch.equal(h[0][:, 5], h[1][:, 5])


def test_a_checkpoint_with_a_predictor_opens_everywhere(tmp_path):
    model, ids = build(**MOE | MTP | dict(mtp_hybrid_override_pattern="*E", tie_word_embeddings=False)), draw_ids(1, 9)
    theirs = oracle(model, tmp_path / "ours")  # transformers leaves the predictor out
    expected = theirs(ids, use_cache=False).logits
    assert (model(ids) - expected).norm() < 1e-5 * expected.norm()
    again = Hybrid.from_pretrained(tmp_path / "ours")
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), model.state_dict().values()))
    theirs.save_pretrained(tmp_path / "theirs")
    assert Hybrid.from_pretrained(tmp_path / "theirs").mtp is None


def trained_predictor():
    """A model that has learnt a periodic text, and so guesses well, but not always."""
    torch.manual_seed(0)
    model = Hybrid(HybridConfig(**(TINY | MTP | dict(vocab_size=16))))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        start = torch.randint(16, (8, 1), generator=generator)
        ids = (start + torch.arange(33)) % 16
        ids = torch.where(
            torch.rand(8, 33, generator=generator) < 0.1, torch.randint(16, (8, 33), generator=generator), ids
        )
        loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


@pytest.fixture(scope="module")
def predictor():
    return trained_predictor()


@pytest.mark.parametrize("n", [1, 3, 5])
@pytest.mark.parametrize("prefill_size", [4, 8192])
def test_greedy_text_is_the_same_with_drafts(predictor, n, prefill_size):
    prompt, stats = [[3, 4, 9, 6, 7, 8, 9]], DraftStats()
    plain = torch.stack(list(generate(predictor, prompt, 50, temperature=0)))
    drafted = generate(predictor, prompt, 50, temperature=0, draft=n, draft_stats=stats, prefill_size=prefill_size)
    assert torch.equal(torch.stack(list(drafted)), plain)
    assert stats.tokens / stats.forwards > 1.5 and stats.accepted[0] > 0.5 * stats.drafted[0]


@pytest.mark.parametrize("pattern", ATTENTIONS)
def test_greedy_text_is_the_same_when_the_drafts_are_bad(pattern):
    model, stats = build(hybrid_override_pattern=pattern, **MTP), DraftStats()  # never trained: guesses are wrong
    plain = torch.stack(list(generate(model, draw_ids(1, 9), 40, temperature=0)))
    drafted = torch.stack(list(generate(model, draw_ids(1, 9), 40, temperature=0, draft=3, draft_stats=stats)))
    assert torch.equal(plain, drafted) and stats.accepted[0] < 0.5 * stats.drafted[0]


def test_stop_ends_a_text_with_drafts_too(predictor):
    tokens = [t.item() for t in generate(predictor, [[3, 4, 5, 6]], 50, temperature=0, draft=3, stop=[12])]
    assert tokens.count(12) == 1 and tokens[-1] == 12


def test_sampled_text_with_drafts_is_distributed_as_without(predictor):
    generator, counts = torch.Generator().manual_seed(0), torch.zeros(2, 16)
    for row, draft in enumerate((0, 2)):
        for _ in range(250):
            steps = generate(predictor, [[5, 6]], 4, temperature=2.0, generator=generator, draft=draft)
            counts[row, list(steps)[-1]] += 1
    expected = counts.mean(0)
    chi2 = ((counts - expected) ** 2 / expected.clamp(min=1)).sum()
    assert chi2 < 37.7, chi2  # 15 degrees of freedom: p = 0.001


@pytest.mark.parametrize("pattern", ATTENTIONS)
def test_a_prompt_read_in_parts_is_the_prompt_at_once(pattern):
    model = build(hybrid_override_pattern=pattern)
    prompts = [draw_ids(1, 21)[0].tolist(), draw_ids(1, 13, seed=1)[0].tolist()]
    texts = [torch.stack(list(generate(model, prompts, 12, 0, prefill_size=size))) for size in (5, 8, 8192)]
    assert torch.equal(texts[0], texts[2]) and torch.equal(texts[1], texts[2])


def test_a_budget_in_generate():
    (model, prompt), END = (build(), draw_ids(2, 5)), [60, 61]
    rows = torch.stack(list(generate(model, prompt, 12, 0, budget=ThinkingBudget(4, END, grace=2))), dim=1)
    free = torch.stack(list(generate(model, prompt, 6, 0)), dim=1)
    assert torch.equal(rows[:, :6], free) and rows[:, 6:8].tolist() == [END, END]
    after = generate(model, torch.cat([prompt, rows[:, :8]], dim=1), 4, 0)  # the answer is what the model says next
    assert torch.equal(rows[:, 8:], torch.stack(list(after), dim=1))


# ---- what it remembers with ----


@pytest.mark.parametrize("pattern", ATTENTIONS)
@pytest.mark.parametrize("T", [1, 9, 40])
def test_the_cache_is_as_large_as_its_pattern_says(pattern, T):
    model = build(hybrid_override_pattern=pattern)
    cache = model.new_cache()
    with torch.no_grad():
        for part in draw_ids(3, T).split(4, dim=1):
            model(part, cache)
    assert cache.nbytes == 3 * state_bytes(model.config, T, 4)


def test_the_attention_only_baseline_has_as_many_parameters():
    config = replace(PRESETS["small"], vocab_size=4096)
    with torch.device("meta"):
        ours, baseline = Hybrid(config).num_parameters(), Hybrid(attention_baseline(config)).num_parameters()
    assert baseline == pytest.approx(ours, rel=1e-3) and "M" not in attention_baseline(config).hybrid_override_pattern


@pytest.mark.parametrize("pattern", ["M-*-", "MM", "*-*-", "ML-L"])
def test_a_static_cache_remembers_the_same(pattern):
    model, ids = build(hybrid_override_pattern=pattern).eval(), draw_ids(2, 30)
    pad = torch.tensor([0, 3])
    with torch.no_grad():
        moving, static = model.new_cache(pad), model.new_cache(pad)
        for cache in (moving, static):
            model(ids[:, :10], cache)
        static = to_static(static, 20, "cpu")
        places = [t.data_ptr() for s in static.states if s for t in vars(s).values() if torch.is_tensor(t)]
        for at, T in ((10, 1), (11, 3), (14, 1)):
            part = ids[:, at : at + T]
            assert torch.allclose(step(model, part, static), model(part, moving), atol=1e-5)
        assert static.position == 15
        assert places == [t.data_ptr() for s in static.states if s for t in vars(s).values() if torch.is_tensor(t)]


@pytest.mark.parametrize("pattern", ["M-*-M", "ML-M"])
def test_of_a_speculative_step_only_what_is_accepted_was_read(pattern):
    model, ids = build(hybrid_override_pattern=pattern).eval(), draw_ids(1, 30)
    with torch.no_grad():
        cache = model.new_cache()
        model(ids[:, :10], cache)
        cache = to_static(cache, 20, "cpu")
        cache.speculative = True
        decode_step(model, torch.cat([ids[:, 10:12], ids[:, 20:22]], dim=1), cache)  # two accepted, two rejected
        cache.rollback(torch.tensor(1))
        got = step(model, ids[:, 12:13], cache)
        assert torch.allclose(got, model(ids[:, :13])[:, -1:], atol=1e-5) and cache.position == 13


@pytest.mark.parametrize("draft", [0, 2])
def test_a_text_outgrows_its_room(monkeypatch, predictor, draft):
    prompt = torch.tensor([[3, 4, 5]])
    whole = torch.stack(list(generate(predictor, prompt, 60, temperature=0)))
    monkeypatch.setattr("decoding.CAPACITY", 5)
    assert torch.equal(torch.stack(list(generate(predictor, prompt, 60, temperature=0, draft=draft))), whole)


# ---- rotary positions, passkeys ----


def test_rotary_scores_are_those_of_complex_numbers_and_relative():
    q, k = torch.randn(2, 1, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def score(i, j):
        return (apply_rope(q, i, 100.0) * apply_rope(k, j, 100.0)).sum()

    a, b = (torch.complex(*t[0, 0, 0].chunk(2)) for t in (q, k))  # channels (d, d + D/2) as one number
    turns = torch.polar(torch.ones(4).double(), 4 * 100.0 ** -(torch.arange(4).double() / 4))  # 4 positions apart
    assert score(9, 5).item() == pytest.approx((a * b.conj() * turns).real.sum().item())
    assert torch.allclose(score(9, 5), score(1004, 1000)) and not torch.allclose(score(9, 5), score(9, 6))
    assert torch.equal(apply_rope(q, 0, 100.0), q)
    both = apply_rope(torch.cat([q, k], dim=2), torch.tensor(3), 100.0)
    assert torch.allclose(both, torch.cat([apply_rope(q, 3, 100.0), apply_rope(k, 4, 100.0)], dim=2))


def test_attention_knows_the_order_only_with_rotary_positions(tmp_path):
    ids = draw_ids(1, 9)
    swapped = ids[:, [1, 0, *range(2, 9)]]
    for base, same in ((None, True), (1e4, False)):
        model = build(torch.float64, hybrid_override_pattern="*-", rotary_base=base)
        assert torch.allclose(model(ids)[:, -1], model(swapped)[:, -1]) == same
        model.save_pretrained(tmp_path)
        again = Hybrid.from_pretrained(tmp_path)
        assert again.config.rotary_base == base and torch.allclose(again(ids), model(ids))
    for wrong in (dict(rotary_base=-1.0), dict(rotary_base=1e4, head_dim=7)):
        with pytest.raises(ValueError, match="rotary_base="):
            HybridConfig(**(TINY | wrong))


@pytest.mark.parametrize("pattern", ATTENTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("static", [False, True])
def test_a_cache_of_rotary_attention_goes_on_where_it_was(pattern, static, dtype):
    model, ids = build(dtype, hybrid_override_pattern=pattern, rotary_base=1e4), draw_ids(2, 20)
    pad = torch.tensor([0, 4])
    with torch.no_grad():
        expected = model(ids), model(ids[1:, 4:])  # the second row begins after its padding
        cache = model.new_cache(pad)
        got = [model(ids[:, :10], cache)]
        cache = to_static(cache, 24, "cpu") if static else cache
        forward = step if static else Hybrid.__call__
        got = torch.cat(got + [forward(model, part, cache) for part in ids[:, 10:].split([1, 3, 6], dim=1)], dim=1)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    assert torch.allclose(got[:1], expected[0][:1], atol=tolerance)
    assert torch.allclose(got[1:, 4:], expected[1], atol=tolerance)


def test_the_passkey_study_compares_models_of_a_size(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    study = PasskeyStudy(context=44, steps=3, tokens=88, times=(1, 2), texts=3, reading=100)
    assert study.config.vocab_size == PASSKEY_VOCAB
    found = passkey(study)
    sizes = [Hybrid(config).num_parameters() for config in study.configs().values()]
    assert max(sizes) < 1.01 * min(sizes) and (tmp_path / "out" / "passkey.png").is_file()
    assert all(len(table) == 5 and len(row) == 2 and 0 <= min(row) <= max(row) <= 1
               for table in found.values() for row in table)  # fmt: skip
    assert "worst of them" in capsys.readouterr().out


@pytest.mark.parametrize("pattern", ["-", "E-"])
@pytest.mark.parametrize("draft", [0, 2])
def test_a_model_that_remembers_nothing_writes(pattern, draft):
    changes = MOE | MTP | dict(hybrid_override_pattern=pattern, mtp_hybrid_override_pattern="-")
    model, ids = build(**changes), draw_ids(1, 4)
    texts = [torch.stack(list(generate(model, ids, 9, 0, draft=n))) for n in (0, draft)]
    assert torch.equal(*texts)


def test_a_cache_becomes_static_only_when_all_of_it_fits():
    model, pad = build(), torch.tensor([0, 5])
    with torch.no_grad():
        cache = model.new_cache(pad)
        model(draw_ids(2, 3), cache)
        for room, ready in ((20, False), (2, False), (20, True)):
            if ready:
                model(draw_ids(2, 3), cache)
                assert to_static(cache, room, "cpu").position == 6
            else:
                with pytest.raises(ValueError, match="does not fit"):
                    to_static(cache, room, "cpu")


@pytest.mark.parametrize("options", [dict(draft=-1), dict(prefill_size=0), dict(temperature=math.nan)], ids=str)
def test_settings_out_of_range_are_refused(options):
    with pytest.raises(ValueError, match="need "):
        next(generate(build(**MTP), [[1, 2]], 4, **options))


def test_a_prompt_without_rows_is_refused():
    for ids in ([3, 4, 5], torch.tensor([3, 4, 5]), []):
        with pytest.raises(ValueError, match="one row"):
            next(generate(build(), ids, 4))


def test_a_tiny_temperature_is_greedy():
    model, ids = build(), draw_ids(1, 4)
    assert torch.equal(*(torch.stack(list(generate(model, ids, 9, t))) for t in (0, 1e-40)))


# ---- a batch that shrinks


def early_and_late(n=80):
    """Returns (a model, n prompts of 1 to 9 tokens, tokens to stop at): most rows end within a few steps."""
    prompts = [draw_ids(1, 1 + i % 9, seed=i)[0].tolist() for i in range(n)]
    return build(torch.float64), prompts, list(range(32, 60))


@pytest.mark.parametrize("smallest", [32, 2])
@pytest.mark.parametrize("budget", [None, ThinkingBudget(3, [61, 62], [5, 6, 7], grace=4)], ids=["free", "budget"])
def test_a_batch_that_shrinks_writes_what_each_row_writes_alone(monkeypatch, smallest, budget):
    (model, prompts, stop), sizes, select = early_and_late(), [], StaticCache.select_batch
    monkeypatch.setattr("common.sampling.SMALLEST_CUT", smallest)
    monkeypatch.setattr(StaticCache, "select_batch", lambda cache, rows: (sizes.append(len(rows)), select(cache, rows)))
    options = dict(temperature=0, stop=stop, budget=budget)
    rows = run(model, prompts, 16, **options)
    assert sizes[0] <= 40 and all(2 * b <= a for a, b in zip(sizes, sizes[1:])) and (len(sizes) > 1) == (smallest == 2)
    cuts = len(sizes)
    for row, prompt in zip(rows, prompts):
        alone = run(model, [prompt], 16, **options)[0]
        assert row == alone + [-1] * (len(row) - len(alone))
    assert len(sizes) == cuts and len({row.index(-1) if -1 in row else 16 for row in rows}) > 4


def test_the_log_probabilities_of_a_batch_that_shrinks():
    (model, prompts, stop), logprobs = early_and_late(), []
    options = dict(temperature=0.8, generator=torch.Generator().manual_seed(0), logprobs=logprobs, stop=stop)
    tokens = torch.stack(list(generate(model, prompts, 16, **options)), 1)  # [80, 16]
    assert {tuple(found.shape) for found in logprobs} == {(80,)}
    found = torch.stack(logprobs, 1)  # [80, 16]
    assert torch.equal(found == 0, tokens < 0) and 0 < (tokens[:, -1] >= 0).sum() <= 40  # rows were dropped
    for prompt, row, got in zip(prompts, tokens.tolist(), found):
        new = [token for token in row if token >= 0]
        expected, _ = model.logprobs(torch.tensor([prompt + new]), temperature=0.8)
        assert (got[: len(new)] - expected[0, len(prompt) - 1 :]).abs().max() < 1e-4
