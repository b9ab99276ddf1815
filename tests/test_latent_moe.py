"""latent_moe.py: parity with transformers' NemotronHMoE, limit cases, balancing, the paper's counts."""

import copy
import json
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import latent_moe
from experiments import latent_moe as study
from latent_moe import (
    MLP,
    Load,
    MoE,
    MoEConfig,
    before_padding,
    choose_experts,
    layer_cost,
    load_metrics,
    new_load,
    sequence_balance_loss,
    to_latent,
    update_bias,
)
from nano_hybrid import PRESETS

SMALL = MoEConfig(24, 8, 3, 10, 14, routed_scaling_factor=2.5)
KINDS = {
    "standard": SMALL,
    "grouped": replace(SMALL, n_group=4, topk_group=2),
    "latent": replace(SMALL, latent_size=6),
    "not normalised": replace(SMALL, norm_topk_prob=False),
}


def build(config, dtype=torch.float32, seed=0):
    """A layer whose every part matters: large weights, and a correction bias that changes the choice."""
    torch.manual_seed(seed)
    layer = MoE(config)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_(0, 1.3 / p.shape[-1] ** 0.5)
        layer.gate.e_score_correction_bias.uniform_(-0.2, 0.2)
    return layer.to(dtype)


def draw(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def trained(layer, x, counted=None):
    """The balance loss of a forward in training, whose tokens are counted."""
    load = Load(torch.ones(x.shape[:-1], dtype=torch.bool) if counted is None else counted)
    load.add(layer, *layer(x, load.counted))
    return load.finish()


def plain(layer, x):
    """The layer for one token after the other, expert by expert, from the equations."""
    c, ys = layer.config, []
    for token in x.flatten(0, -2):
        s = torch.sigmoid(layer.gate.weight @ token)
        biased = s + layer.gate.e_score_correction_bias
        if c.n_group > 1:
            groups = biased.view(c.n_group, -1)
            best = groups.topk(2).values.sum(-1).topk(c.topk_group).indices.tolist()
            for g in set(range(c.n_group)) - set(best):
                biased = torch.where(torch.arange(len(s)) // groups.shape[1] == g, -torch.inf, biased)
        chosen = biased.topk(c.num_experts_per_tok).indices.tolist()
        total = sum(s[e] for e in chosen) if c.norm_topk_prob else 1
        u = layer.fc1_latent_proj(token) if c.latent_size else token
        experts = layer.experts
        o = sum(s[e] / total * (experts.down_proj[e] @ (experts.up_proj[e] @ u).relu() ** 2) for e in chosen)
        o = c.routed_scaling_factor * o
        shared = layer.shared_experts
        ys.append((layer.fc2_latent_proj(o) if c.latent_size else o) + shared(token))
    return torch.stack(ys).view(x.shape)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_is_its_equations_with_every_gradient(kind):
    layer, x = build(KINDS[kind], torch.float64), draw(2, 5, 24, dtype=torch.float64).requires_grad_()
    weights = draw(2, 5, 24, seed=1, dtype=torch.float64)
    wanted = [x, *layer.parameters()]
    got, expected = layer(x), plain(layer, x)
    assert torch.allclose(got, expected, atol=1e-12)
    pairs = zip(*(torch.autograd.grad((y * weights).sum(), wanted) for y in (got, expected)))
    assert all(torch.allclose(a, b, atol=1e-10) for a, b in pairs)


@pytest.mark.parametrize("kind", KINDS)
def test_the_layer_is_that_of_transformers(kind):
    modeling = pytest.importorskip("transformers.models.nemotron_h.modeling_nemotron_h")
    from transformers import NemotronHConfig

    c, layer = KINDS[kind], build(KINDS[kind])
    config = NemotronHConfig(
        hidden_size=24, n_routed_experts=8, num_experts_per_tok=3, moe_intermediate_size=10,
        moe_latent_size=c.latent_size, moe_shared_expert_intermediate_size=14, n_group=c.n_group,
        topk_group=c.topk_group, norm_topk_prob=c.norm_topk_prob, routed_scaling_factor=2.5,
    )  # fmt: skip
    config._experts_implementation = "eager"
    theirs = modeling.NemotronHMoE(config)
    theirs.load_state_dict(layer.state_dict())  # the same names
    x = draw(2, 7, 24)
    expected = theirs(x)
    assert (layer(x) - expected).norm() < 1e-5 * expected.norm()
    grads = [torch.autograd.grad(f(x).square().sum(), list(f.parameters())) for f in (layer, theirs)]
    names = [dict(f.named_parameters()).keys() for f in (layer, theirs)]
    ours, others = (dict(zip(n, g)) for n, g in zip(names, grads))
    for name, grad in others.items():
        assert (ours[name] - grad).norm() < 1e-5 * grad.norm(), name


# ---- limit cases ----


def test_one_expert_is_two_mlps():
    layer, x = (
        build(replace(SMALL, n_routed_experts=1, num_experts_per_tok=1, routed_scaling_factor=1.0)),
        draw(3, 2, 24),
    )
    expert = MLP(24, 10)
    expert.load_state_dict({"up_proj.weight": layer.experts.up_proj[0], "down_proj.weight": layer.experts.down_proj[0]})
    assert torch.allclose(layer(x), expert(x) + layer.shared_experts(x), atol=1e-5)


def test_a_latent_space_of_full_width_is_the_standard_layer():
    layer, x = build(SMALL), draw(2, 3, 24)
    latent = MoE(replace(SMALL, latent_size=24))
    latent.load_state_dict(
        layer.state_dict() | {f"fc{i}_latent_proj.weight": torch.eye(24) for i in (1, 2)}, strict=True
    )
    assert torch.allclose(latent(x), layer(x), atol=1e-5)


def test_the_bias_chooses_and_does_not_weigh():
    scores = torch.tensor([[0.9, 0.5, 0.1]])
    ids, weights = choose_experts(scores, torch.tensor([0.0, 0.0, 2.0]), MoEConfig(4, 3, 2, 4, 4))
    assert set(ids[0].tolist()) == {2, 0}
    assert weights[ids == 2].item() == pytest.approx(0.1 / (0.1 + 0.9))


def test_no_tokens():
    assert build(SMALL)(torch.zeros(2, 0, 24)).shape == (2, 0, 24)


# ---- balancing ----


def test_the_balance_loss_is_one_when_even_and_grows_to_E_over_K_when_not():
    even = torch.full((2, 8, 4), 0.5) + 1e-3 * torch.eye(4).repeat(
        2, 2, 1
    )  # each expert is best for every fourth token
    counted = torch.ones(2, 8, dtype=torch.bool)
    assert sequence_balance_loss(even, 1, counted).item() == pytest.approx(1, rel=1e-3)
    skewed = torch.tensor([1.0, 1e-9, 1e-9, 1e-9]).expand(2, 8, 4)
    assert sequence_balance_loss(skewed, 1, counted).item() == pytest.approx(4, rel=1e-3)


def test_the_balance_loss_is_its_equation_sequence_by_sequence():
    scores, top_k = draw(3, 7, 6, dtype=torch.float64).sigmoid().requires_grad_(), 2
    expected = 0
    for sequence in scores:
        f = torch.bincount(sequence.topk(top_k).indices.flatten(), minlength=6) / (top_k * 7)
        p = (sequence / sequence.sum(-1, keepdim=True)).mean(0)
        expected = expected + 6 * (f * p).sum() / 3
    got = sequence_balance_loss(scores, top_k, torch.ones(3, 7, dtype=torch.bool))
    padded = torch.cat([scores, draw(3, 4, 6, dtype=torch.float64).sigmoid()], 1)  # and a row of nothing but padding
    padded = torch.cat([padded, padded[:1]])
    counted = torch.arange(11) < torch.tensor([7, 7, 7, 0])[:, None]
    for loss in (got, sequence_balance_loss(padded, top_k, counted)):
        assert torch.allclose(loss, expected)
        grads = [torch.autograd.grad(value, scores, retain_graph=True)[0] for value in (loss, expected)]
        assert torch.allclose(*grads)


def test_the_bias_moves_by_its_rate_towards_the_experts_with_too_few():
    bias = torch.zeros(4)
    update_bias(bias, torch.tensor([9, 3, 1, 3]), rate=0.5)  # mean 4
    assert bias.tolist() == [-0.5, 0.5, 0.5, 0.5]
    update_bias(bias, torch.tensor([2, 2, 2, 2]), rate=0.5)
    assert bias.tolist() == [-0.5, 0.5, 0.5, 0.5]


def test_the_bias_alone_evens_out_a_badly_skewed_router():
    layer = build(MoEConfig(16, 16, 2, 8, 8))
    with torch.no_grad():
        layer.gate.weight[:, 0] = torch.linspace(-2, 2, 16)  # on tokens whose first channel is 1: some always win
    loads = []
    for step in range(400):
        x = draw(1, 512, 16, seed=step)
        x[..., 0] = 1
        trained(layer, x)
        loads.append(layer.balance(rate=5e-3)["load_max"].item())
    assert loads[0] > 3 and max(loads[-20:]) < 1.5


def test_counts_add_up_over_micro_batches_and_only_in_training():
    layer, everything = build(SMALL), torch.ones(2, 5, dtype=torch.bool)
    trained(layer, draw(2, 5, 24)), trained(layer, draw(1, 5, 24))
    assert layer.gate.counts.sum() == 15 * 3
    layer(draw(2, 5, 24)), layer(draw(2, 5, 24), everything)  # a forward by itself changes nothing
    assert layer.gate.counts.sum() == 15 * 3
    assert new_load(layer.eval(), everything) is None
    with torch.no_grad():
        assert new_load(layer.train(), everything) is None


def test_padding_is_not_counted():
    layer, x = build(SMALL), draw(2, 9, 24)
    counted = torch.arange(9) < torch.tensor([4, 7])[:, None]
    balance = trained(layer, x, counted)
    rows = [trained(alone := build(SMALL), x[:1, :4]), trained(alone, x[1:, :7])]  # the same without padding
    assert balance.item() == pytest.approx(sum(rows).item() / 2, rel=1e-5)
    assert torch.equal(layer.gate.counts, alone.gate.counts) and layer.gate.counts.sum() == 11 * 3
    assert layer.gate.entropy.item() == pytest.approx(alone.gate.entropy.item(), rel=1e-5)
    assert trained(layer, x, torch.zeros(2, 9, dtype=torch.bool)) == 0 and layer.gate.counts.sum() == 11 * 3


def test_padding_begins_behind_the_last_position_that_is_wanted():
    wanted = torch.tensor([[0, 1, 0, 1, 0, 0], [0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 1]]).bool()
    assert before_padding(wanted).long().tolist() == [[1, 1, 1, 1, 0, 0], [0] * 6, [1] * 6]


def test_load_metrics():
    even, collapsed = torch.tensor([5, 5, 5, 5]), torch.tensor([20, 0, 0, 0])
    found = [load_metrics(even, torch.tensor(4.0).log()), load_metrics(collapsed, torch.tensor(0.0))]
    expected = dict(load_max=1, dead_experts=0, router_entropy=1), dict(load_max=4, dead_experts=0.75, router_entropy=0)
    for a, b in zip(found, expected):
        assert {name: value.item() for name, value in a.items()} == pytest.approx(b)


def test_the_entropy_is_that_of_all_tokens_counted():
    layer, xs = build(SMALL), [draw(2, 5, 24), draw(1, 3, 24, seed=1)]
    for x in xs:
        trained(layer, x)
    shares = torch.cat([layer.gate(x).flatten(0, 1) for x in xs])
    shares = shares / shares.sum(-1, keepdim=True)
    expected = torch.distributions.Categorical(shares).entropy().mean() / torch.tensor(8.0).log()
    assert layer.balance()["router_entropy"].item() == pytest.approx(expected.item(), rel=1e-5)
    assert not layer.gate.counts.any() and layer.gate.entropy == 0


@pytest.mark.parametrize("shape", [(4, 24), (0, 5, 24), (2, 0, 24)])
def test_training_on_tokens_in_any_shape(shape):
    layer = build(SMALL)
    y, balance, counts, entropy = layer(draw(*shape), torch.ones(shape[:-1], dtype=torch.bool))
    tokens = math.prod(shape[:-1])
    assert y.shape == shape and counts.sum() == 3 * tokens and (balance > 0) == (tokens > 0) == (entropy > 0)


# ---- computed again, copied, used twice ----


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("kind", ["standard", "latent"])
def test_a_checkpointed_layer_has_the_same_losses_gradients_and_counts(kind, use_reentrant):
    results = []
    for again in (False, True):
        layer, x = build(KINDS[kind]), draw(2, 9, 24).requires_grad_()
        counted, load = torch.arange(9) < torch.tensor([4, 9])[:, None], Load(torch.ones(2, 9, dtype=torch.bool))
        for _ in range(2):  # the same layer twice in one forward
            out = checkpoint(layer, x, counted, use_reentrant=use_reentrant) if again else layer(x, counted)
            y = load.add(layer, *out)
        loss = y.square().mean() + 3 * load.finish()
        loss.backward()
        assert layer.gate.counts.sum() == 2 * 13 * 3
        results.append([loss, x.grad, layer.gate.counts, layer.gate.entropy, *(p.grad for p in layer.parameters())])
    for plain, computed_again in zip(*results):
        assert torch.allclose(plain, computed_again, rtol=1e-5, atol=1e-6)
    assert results[0][4].abs().max() > 0  # the router's gradient, to which the balance loss belongs


def test_the_balance_loss_alone_trains_the_router_through_a_checkpoint():
    layer, x = build(SMALL), draw(2, 9, 24).requires_grad_()
    counted = torch.ones(2, 9, dtype=torch.bool)
    expected = torch.autograd.grad(layer(x, counted)[1], layer.gate.weight)[0]
    checkpoint(layer, x, counted, use_reentrant=True)[1].backward()
    assert torch.allclose(layer.gate.weight.grad, expected) and expected.norm() > 0


def test_a_layer_can_be_copied_after_a_forward_and_before_its_backward():
    layer = build(SMALL)
    balance = trained(layer, draw(2, 5, 24))
    copied = copy.deepcopy(layer)
    balance.backward()
    assert torch.equal(copied.gate.counts, layer.gate.counts) and copied.gate.weight.grad is None
    assert all(torch.equal(a, b) for a, b in zip(copied.state_dict().values(), layer.state_dict().values()))


@pytest.mark.parametrize("kind", ["standard", "latent"])
def test_a_compiled_layer_is_the_layer_at_every_length(kind):
    """After a second length torch compiles for any: multi-token prediction has several in one step."""
    layer, copies = MoE(KINDS[kind]).train(), []
    compiled = torch.compile(layer, backend="aot_eager")
    C = layer.config.hidden_size
    for T in (9, 8, 7, 9):
        x, counted = draw(2, T, C), torch.arange(T) < torch.tensor([4, T])[:, None]
        for f in (layer, compiled):
            layer.zero_grad()
            outputs = f(x, counted)
            (outputs[0].square().sum() + outputs[1]).backward()
            copies.append([*outputs, *(p.grad.clone() for p in layer.parameters())])
        for a, b in zip(*copies[-2:], strict=True):
            assert torch.allclose(a, b, atol=1e-5)


# ---- weights anew ----


@pytest.mark.parametrize("kind", ["standard", "latent"])
def test_a_layer_made_on_the_meta_device_begins_like_any_other(kind):
    config = replace(KINDS[kind], hidden_size=64, mlp_bias=True)
    with torch.device("meta"):
        layer = MoE(config)
    layer.to_empty(device="cpu")
    for tensor in layer.state_dict(keep_vars=True).values():
        tensor.detach().fill_(1e9)  # as empty memory may be
    layer.gate.counts.fill_(7), layer.gate.entropy.fill_(7)
    torch.manual_seed(0)
    layer.reset_parameters()
    torch.manual_seed(0)
    other = MoE(config)
    for (name, a), b in zip(layer.state_dict().items(), other.state_dict().values()):
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert not layer.gate.counts.any() and layer.gate.entropy == 0


def test_loading_weights_forgets_what_was_counted():
    layer, x = build(SMALL), draw(2, 5, 24)
    weights = build(SMALL, seed=1).state_dict()
    trained(layer, x)
    layer.load_state_dict(weights)
    assert not layer.gate.counts.any() and layer.gate.entropy == 0
    with torch.device("meta"):
        other = MoE(SMALL)
    other.load_state_dict(weights, assign=True)  # counters, which no file has, leave the meta device, too
    trained(other, x)
    assert other.gate.counts.sum() == 10 * 3


# ---- precision ----


def test_router_and_bias_stay_in_float32_when_the_model_does_not():
    layer = build(SMALL)
    bias = layer.gate.e_score_correction_bias.clone()
    layer = layer.to(torch.bfloat16)
    assert torch.equal(layer.gate.e_score_correction_bias, bias)
    assert layer(draw(1, 4, 24).bfloat16()).dtype == torch.bfloat16
    assert layer.gate(draw(1, 4, 24).bfloat16()).dtype == torch.float32
    with torch.device("meta"):
        assert MoE(SMALL).to(torch.bfloat16).gate.e_score_correction_bias.dtype == torch.float32
        assert MoE(SMALL).half().to_empty(device="cpu").gate.e_score_correction_bias.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.gate(draw(1, 4, 24)).dtype == torch.float32


# ---- costs ----


def test_the_latent_form_of_the_paper_s_layer_has_the_paper_s_counts():
    standard = MoEConfig(4096, 128, 6, 2688, 5376)
    latent = to_latent(standard, 4)
    assert (latent.latent_size, latent.n_routed_experts, latent.num_experts_per_tok) == (1024, 512, 22)
    ours, theirs = layer_cost(standard), layer_cost(latent)
    assert ours["routed"] == theirs["routed"] == 2 * 4096 * 2688 * 128
    assert 0.99 < theirs["active"] / ours["active"] <= 1
    assert theirs["dispatched_bytes"] / ours["dispatched_bytes"] == pytest.approx(22 / 24)
    assert theirs["read_bytes"] / ours["read_bytes"] == pytest.approx(22 / 24)
    assert to_latent(standard, 4, more_experts=False).n_routed_experts == 128


@pytest.mark.parametrize("config", [SMALL, KINDS["latent"]])
def test_layer_cost_counts_the_parameters(config):
    assert layer_cost(config)["total"] == sum(p.numel() for p in MoE(config).parameters())


@pytest.mark.parametrize("size", ["", "-tiny"])
def test_super3_is_the_latent_form_of_nano3(size):
    latent = to_latent(PRESETS["nano3" + size].moe(), 4)
    assert PRESETS["super3" + size].moe() == replace(latent, routed_scaling_factor=5.0)  # as Super has it


@pytest.mark.parametrize(
    "changes, wrong",
    [
        (dict(num_experts_per_tok=9), "num_experts_per_tok=9"),
        (dict(n_group=3), "multiple of n_group=3"),
        (dict(n_group=8), "n_group=8 leaves 1"),
        (dict(n_group=4, topk_group=1), "choose from 2 experts"),
        (dict(latent_size=0), "at least 1"),
    ],
)
def test_impossible_layers_are_refused(changes, wrong):
    with pytest.raises(ValueError, match=wrong):
        replace(SMALL, **changes)


def test_impossible_latent_layers_are_refused():
    with pytest.raises(ValueError, match="multiple of alpha=5"):
        to_latent(SMALL, 5)
    with pytest.raises(ValueError, match="alpha=1"):
        to_latent(replace(SMALL, num_experts_per_tok=1), 1)


def test_dense_gradients_reach_the_router_only_through_the_weights():
    layer = build(replace(SMALL, num_experts_per_tok=1))  # one expert, normalised: its weight is 1 whatever the score
    grad = torch.autograd.grad(F.mse_loss(layer(draw(1, 6, 24)), draw(1, 6, 24, seed=1)), layer.gate.weight)[0]
    assert grad.abs().max() < 1e-6


# ---- the demo and the study ----


def test_the_demo_prints_the_paper_s_layers(capsys):
    latent_moe.demo()
    table = capsys.readouterr().out
    assert " 512    22   1024   2.873B   175.6M" in table and "differ by 0.03B here" in table


def test_the_study_trains_and_records_where_it_ran(monkeypatch, tmp_path, corpus_dir):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "assets" / "bench").mkdir(parents=True)
    setting = study.SETTINGS["cpu"] | dict(context=8, batch_size=2, steps=3, val_batches=1)
    setting["moe"] = MoEConfig(32, 4, 2, 8, 8)
    for name, value in dict(ROOT=tmp_path, SETTINGS=dict(cpu=setting, cuda=setting), SEEDS=range(2)).items():
        monkeypatch.setattr(study, name, value)
    latent = to_latent(replace(setting["moe"], moe_intermediate_size=64), 4)
    monkeypatch.setattr(study, "variants", lambda moe: {"standard": (moe, ""), "latent, alpha 4": (latent, "")})
    load = study.load_corpus
    monkeypatch.setattr(study, "load_corpus", lambda data, tokenizer, context: load(f"{corpus_dir}/*.txt", tokenizer))
    study.main()
    (record,) = json.loads((tmp_path / "assets/bench/latent_moe.json").read_text()).values()
    assert record["rows"].keys() == {"standard", "latent, alpha 4"} and record["machine"] and record["commit"]
    assert len(record["rows"]["standard"]) == len(record["columns"].split())
    assert (tmp_path / "out/latent_moe.png").exists()
