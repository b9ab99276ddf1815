"""Masked diffusion: the likelihood against exact posteriors, decoders, the planner's likelihood, dUltra's updates."""

import contextlib
import itertools
import math
from dataclasses import asdict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mdlm_dultra
from common.canvas import canvas_of, completion_logprob, completions
from common.data import Tokenizer
from common.objectives import RunInfo
from common.tasks import BLANK, FILL_INS, environment, sample_task, sudoku_grids
from experiments.mdlm_dultra import Study, aup, plot_frontiers, report, run_study
from grpo import GRPO, advantages, denominator
from mdlm_dultra import (
    EPS,
    DUltra,
    DUltraConfig,
    MaskedDiffusionLM,
    UnmaskPlanner,
    mdlm_loss,
    nelbo,
    noise_levels,
    replay,
    rewards,
    step_logprob,
)
from nano_hybrid import Hybrid, HybridConfig
from unmasking import (
    RULES,
    Decoded,
    Probs,
    Step,
    apply_rule,
    block_ends,
    current_block,
    decode,
    entropy_bounded,
    factor,
    planner_logprob,
    planner_rule,
    random_k,
    rule_of,
    softmax_statistics,
    softmax_statistics_ref,
    threshold,
    top_k,
    top_positions,
)

TINY = dict(
    vocab_size=8, hidden_size=24, hybrid_override_pattern="*-*-", num_attention_heads=2, num_key_value_heads=1,
    head_dim=12, intermediate_size=40, rotary_base=1e4,
)  # fmt: skip


def tiny(positions=None, planner=False, scale=6.0, **changes):
    """A small model whose predictions are far from uniform."""
    torch.manual_seed(0)
    rotary = dict(rotary_base=None if positions else 1e4)
    model = MaskedDiffusionLM(HybridConfig(**TINY | rotary | changes), positions, planner).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(scale if p.dim() > 1 else 1)
    return model


class ExactPosterior:
    """What a MaskedDiffusionLM learns to be: the exact model of sequences [N, T] of probabilities weights [N].

    It has what `decode` and the bounds use of a model. weights: default all equal.
    """

    n_layers, planner = 1, None

    def __init__(self, texts, mask_id, weights=None):
        weights = torch.ones(len(texts)).double() if weights is None else weights
        self.texts, self.weights, self.mask_id = texts, weights / weights.sum(), mask_id

    def encode(self, ids, keys=None, kv=None, start=0):
        """Returns log p [B, T, V] of every token, given what is known; where no sequence agrees, all are alike."""
        agrees = ((ids[:, None] == self.texts) | (ids[:, None] == self.mask_id)).all(-1) * self.weights
        counts = torch.einsum("bn,ntv->btv", agrees, F.one_hot(self.texts, self.mask_id).double())
        return (counts / agrees.sum(1).clamp(min=1e-30)[:, None, None]).log().clamp(min=-1e4)

    def logits(self, hidden):
        return hidden

    def logprobs(self, ids, masked, keys=None, temperature=1.0):
        logp = torch.log_softmax(self.encode(ids.masked_fill(masked, self.mask_id)) / temperature, -1)
        return logp.gather(-1, ids[..., None]).squeeze(-1).masked_fill(~masked, 0)


def ternary(T=4, seed=0):
    """All sequences of T letters out of three, with random probabilities."""
    texts = torch.tensor(list(itertools.product(range(3), repeat=T)))
    weights = torch.rand(len(texts), generator=torch.Generator().manual_seed(seed)).double() ** 3 + 1e-3
    return ExactPosterior(texts, 3, weights)


def sudoku():
    """The exact posterior of the 288 sudokus, digits 0 to 3."""
    return ExactPosterior(torch.tensor([[int(d) - 1 for d in grid] for grid in sudoku_grids()]), 4)


def integral_bound(model, ids, maskable, samples, generator):
    """Returns (mean [B], standard error [B]) of the bound as the loss has it: an integral over t, in nats a row."""
    draws = []
    for sample in range(samples):
        t = EPS + (1 - EPS) * (sample + torch.rand(len(ids), generator=generator)) / samples
        masked = maskable & (torch.rand(ids.shape, generator=generator) < t[:, None])
        draws.append(-model.logprobs(ids, masked).sum(1) / t)
    draws = torch.stack(draws)
    return draws.mean(0), draws.std(0) / math.sqrt(samples)


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def subsets(T):
    """All non-empty subsets of T positions, bool [2^T - 1, T]."""
    return torch.tensor(list(itertools.product([False, True], repeat=T)))[1:]


def pattern_weight(k, A):
    return math.factorial(k - 1) * math.factorial(A - k) / math.factorial(A)


# ---- 1, 2. the model and its likelihood


def test_sudoku_grids_are_the_288():
    grids = sudoku_grids()
    assert len(set(grids)) == 288
    for grid in grids[::17]:
        square = np.array(list(grid)).reshape(4, 4)
        units = [*square, *square.T, *square.reshape(2, 2, 2, 2).swapaxes(1, 2).reshape(4, 4)]
        assert all(set(unit) == set("1234") for unit in units)


def test_enumerated_bound_is_the_exact_likelihood():
    """With the exact posterior the bound is no bound, for every text."""
    model, masks = ternary(), subsets(4)
    for text, weight in zip(model.texts[::7], model.weights[::7]):
        logprob = model.logprobs(text.expand(len(masks), -1), masks).sum(1)
        weights = torch.tensor([pattern_weight(int(k), 4) for k in masks.sum(1)], dtype=torch.float64)
        assert -(weights * logprob).sum() == pytest.approx(-weight.log().item(), abs=1e-10)


def test_every_order_costs_the_same_under_the_exact_posterior():
    model = ternary()
    text = model.texts[[5, 50]]
    for order in itertools.permutations(range(4)):
        total = torch.zeros(2).double()
        masked = torch.ones(2, 4, dtype=torch.bool)
        for position in order:
            total += model.logprobs(text, masked)[:, position]
            masked[:, position] = False
        torch.testing.assert_close(total, model.weights[[5, 50]].log())


@pytest.mark.parametrize("form", ["count", "integral"])
def test_monte_carlo_of_both_forms_is_the_exact_likelihood(form):
    model, bound = sudoku(), nelbo if form == "count" else integral_bound
    ids = model.texts[:3]
    mean, error = bound(model, ids, torch.ones_like(ids) > 0, 600, torch.Generator().manual_seed(1))
    assert ((mean - math.log(288)).abs() < 4 * error + 0.01).all()  # the integral form leaves out t < EPS
    clues = torch.zeros(3, 16, dtype=torch.bool)
    clues[:, :4] = True
    counts = ((model.texts[:, None] == ids)[..., :4].all(-1)).sum(0)
    mean, error = bound(model, ids, ~clues, 600, torch.Generator().manual_seed(2))
    assert ((mean - counts.double().log()).abs() < 4 * error + 0.01).all()


def test_pattern_weights_count_every_token_once():
    masks = subsets(6)
    assert sum(pattern_weight(int(k), 6) * int(k) for k in masks.sum(1)) == pytest.approx(6)


def test_bound_is_above_the_likelihood_of_the_order_averaged_model():
    """Jensen, for an untrained denoiser: and that model's probabilities add up to one."""
    model, texts = tiny(vocab_size=4).double(), torch.tensor(list(itertools.product(range(3), repeat=3)))
    probability, bound = torch.zeros(27).double(), torch.zeros(27).double()
    with torch.no_grad():
        for order in itertools.permutations(range(3)):
            total, masked = torch.zeros(27).double(), torch.ones(27, 3, dtype=torch.bool)
            for position in order:
                total += model.logprobs(texts, masked)[:, position].double()
                masked[:, position] = False
            probability += total.exp() / 6
            bound -= total / 6
    assert probability.sum().item() == pytest.approx(1, abs=1e-5)
    assert (bound >= -probability.log() - 1e-6).all() and (bound > -probability.log() + 1e-3).sum() > 13


def test_loss_is_the_bound_and_divides_by_the_length_of_each_answer():
    """Averaged over many draws; and on one draw it is the formula."""
    model = sudoku()
    ids = model.texts[:1].expand(4000, -1)
    loss, metrics = mdlm_loss(model, ids, generator=torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(math.log(288) / 16, rel=0.02)
    assert metrics["mask_rate"].item() == pytest.approx(0.5, abs=0.01)
    short = torch.zeros(4000, 16, dtype=torch.bool)
    short[:, 4:] = True
    clues = (model.texts[:, :4] == model.texts[0, :4]).all(1).sum().item()
    loss, _ = mdlm_loss(model, ids, short, torch.Generator().manual_seed(0))
    assert loss.item() == pytest.approx(math.log(clues) / 12, rel=0.05)


def test_noise_levels_are_one_to_a_stratum():
    t = noise_levels(64, torch.Generator().manual_seed(0))
    assert t.min() > 1e-3 and t.max() <= 1
    assert sorted(((1 - (t - 1e-3) / 0.999) * 64).floor().clamp(0, 63).tolist()) == list(range(64))


def test_the_bound_masks_exactly_k_of_the_maskable():
    maskable = torch.tensor([[True, False, True, True], [False, False, False, True]])
    seen = []

    class Spy:
        def logprobs(self, ids, masked, keys):
            seen.append(masked)
            return torch.zeros(ids.shape)

    nelbo(Spy(), torch.zeros(2, 4, dtype=torch.int64), maskable, samples=3, generator=torch.Generator().manual_seed(0))
    assert [m[0].sum().item() for m in seen] == [1, 2, 3] and all((m <= maskable).all() for m in seen)
    assert all(m[1].tolist() == maskable[1].tolist() for m in seen)


def test_mask_is_never_predicted_and_the_loss_learns():
    model = tiny()
    ids = torch.randint(7, (5, 9), generator=torch.Generator().manual_seed(0))
    logits = model(ids.masked_fill(torch.rand(5, 9) < 0.5, 7))
    assert logits.shape == (5, 9, 8) and (logits.softmax(-1)[..., 7] == 0).all() and logits[..., :7].isfinite().all()
    model, before = tiny(positions=4, scale=1), None  # rotary: all masks look alike
    optimizer, generator = torch.optim.AdamW(model.parameters(), 1e-2), torch.Generator().manual_seed(0)
    ids = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 0]]).repeat(16, 1)
    for _ in range(150):
        loss, _ = mdlm_loss(model, ids, generator=generator)
        before = before or loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    bound = nelbo(model, ids[:2], samples=200, generator=generator)[0]
    assert before > 1.5 and 0.6 < bound.mean().item() < 0.95  # log 2 = 0.69 is ideal


def test_logprobs_are_those_of_the_logits():
    model = tiny(planner=True, positions=9).double()
    ids = torch.randint(7, (3, 9), generator=torch.Generator().manual_seed(0))
    masked = torch.rand(3, 9, generator=torch.Generator().manual_seed(1)) < 0.5
    for temperature in (1.0, 0.7):
        found = model.logprobs(ids, masked, temperature=temperature)
        logp = (model(ids.masked_fill(masked, 7)) / temperature).log_softmax(-1)
        wanted = logp.gather(-1, ids[..., None]).squeeze(-1)
        torch.testing.assert_close(found, wanted.masked_fill(~masked, 0).to(found.dtype))


@pytest.mark.parametrize("positions", [None, 12])
def test_padding_does_not_change_logits(positions):
    model = tiny(positions)
    ids = torch.randint(8, (2, 7), generator=torch.Generator().manual_seed(0))
    padded, keys = F.pad(ids, (3, 0), value=5), F.pad(torch.ones(2, 7, dtype=torch.bool), (3, 0))
    torch.testing.assert_close(model(padded, keys)[:, 3:], model(ids), rtol=1e-4, atol=1e-4)
    other = torch.cat([torch.full((2, 3), 2), ids], 1)
    torch.testing.assert_close(model(other, keys)[:, 3:], model(padded, keys)[:, 3:])


def test_attention_looks_both_ways():
    model = tiny()
    ids = torch.randint(8, (1, 7), generator=torch.Generator().manual_seed(0))
    changed = ids.clone()
    changed[0, -1] = (ids[0, -1] + 1) % 8
    assert (model(ids)[0, 0, :7] - model(changed)[0, 0, :7]).abs().max() > 1e-3


def test_checkpoint_round_trip(tmp_path):
    model = tiny(positions=11, planner=True)
    model.save_pretrained(tmp_path)
    again = MaskedDiffusionLM.from_pretrained(tmp_path).eval()
    ids = torch.randint(8, (2, 11), generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=0)
    masked = ids == 7
    hidden = model.encode(ids)
    torch.testing.assert_close(again.planner(hidden, masked, masked), model.planner(hidden, masked, masked))
    Hybrid(HybridConfig(**TINY)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="no masked diffusion model"):
        MaskedDiffusionLM.from_pretrained(tmp_path / "other")


def test_models_that_cannot_be_built():
    with pytest.raises(ValueError, match="both ways"):
        MaskedDiffusionLM(HybridConfig(**TINY | dict(hybrid_override_pattern="M-")))
    with pytest.raises(ValueError, match="needs positions"):
        MaskedDiffusionLM(HybridConfig(**TINY | dict(rotary_base=None)))
    with pytest.raises(TypeError, match="decode"):
        tiny().generate([[1]], 2)


# ---- 3. statistics

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton's kernels run, interpreted on a CPU


@pytest.mark.parametrize("shape", [(1, 2), (3, 7), (5, 1000), (4, 3001)])
def test_statistics_kernel_is_the_definition(shape):
    generator = torch.Generator().manual_seed(0)
    logits = 4 * torch.randn(shape, generator=generator)
    logits[0, 1] = logits[0].max() + 30  # nearly certain
    logits[-1] = 1.5  # all equal: the first
    if shape[1] > 2:
        logits[0, 2] = -math.inf
    if shape[1] > 2048:
        logits[1, :2048] = -math.inf  # nothing in the first chunk to compare with
        logits[2, -1] = 300.0  # beyond what a float32 holds against that chunk's largest
    logits = logits.to(DEVICE)
    found, wanted = softmax_statistics(logits, "triton"), softmax_statistics_ref(logits.double())
    assert (found.token == wanted.token).all()
    for name in ("confidence", "entropy", "margin"):
        torch.testing.assert_close(getattr(found, name).double(), getattr(wanted, name), rtol=1e-4, atol=2e-6)


def test_statistics_kernel_takes_16_bits_strides_and_no_rows():
    logits = torch.randn(6, 200, generator=torch.Generator().manual_seed(0)).half().to(DEVICE)
    for view in (logits, logits[:, ::2], logits[::2], logits[:0]):
        found, wanted = softmax_statistics(view, "triton"), softmax_statistics_ref(view)
        for a, b in zip(found, wanted):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, check_dtype=False)
    with pytest.raises(ValueError, match="V > 1"):
        softmax_statistics(logits[:, :1])


# ---- 4, 5. rules and the decoder


def test_nfe_of_rules():
    model = sudoku()
    ids = torch.full((6, 16), 4)
    cases = {threshold(0.0): 1, threshold(1.1): 16, factor(0.0): 16, top_k(1): 16, top_k(3): 6, top_k(5): 4}
    cases |= {random_k(16): 1, random_k(1): 16, entropy_bounded(1e9): 1, rule_of("ancestral:1", model): 1}
    for rule, nfe in cases.items():
        decoded = decode(model, ids, rule, generator=torch.Generator().manual_seed(0))
        assert decoded.nfe.tolist() == [nfe] * 6
        assert (decoded.ids < 4).all() and decoded.order.amax(1).tolist() == [nfe] * 6 and decoded.order.min() == 1


@pytest.mark.parametrize("spec", [*RULES])
@pytest.mark.parametrize("block_size", [None, 5])
def test_every_rule_ends_keeps_what_is_known_and_treats_rows_alone(spec, block_size):
    model = tiny(positions=16, planner=True)
    ids = torch.randint(7, (5, 16), generator=torch.Generator().manual_seed(0))
    masked = (
        torch.rand(5, 16, generator=torch.Generator().manual_seed(1)) < torch.tensor([0.0, 0.1, 0.5, 0.8, 1])[:, None]
    )
    masked[0] = False
    ids = ids.masked_fill(masked, 7)
    decoded = decode(
        model, ids, rule_of(spec, model), block_size=block_size, generator=torch.Generator().manual_seed(2)
    )
    assert (decoded.ids < 7).all() and (decoded.ids == ids)[~masked].all()
    assert ((decoded.order > 0) == masked).all() and (decoded.nfe <= masked.sum(1)).all()
    assert decoded.nfe[0] == 0 and (decoded.nfe[1:] > 0).all()
    for row, n in zip(decoded.order, decoded.nfe.tolist()):
        assert set(row.tolist()) - {0} == set(range(1, n + 1))  # every forward wrote something
    if spec not in ("ancestral", "first_hitting", "random_k", "planner"):  # deterministic
        for row in range(5):
            alone = decode(model, ids[row : row + 1], rule_of(spec, model), block_size=block_size)
            assert (alone.ids == decoded.ids[row]).all() and alone.nfe[0] == decoded.nfe[row]


def test_rules_choose_by_their_definition():
    confidence = torch.tensor([[0.99, 0.95, 0.5, 0.9, 0.2]])
    eligible = torch.tensor([[True, True, True, True, False]])
    probs = Probs(confidence, None, torch.tensor([[0.04, 0.2, 0.9, 0.05, 0.0]]), 1 - confidence)
    step = Step(None, None, torch.tensor([[0.3, 0.1, 0.9, 0.25, 0.0]]), None, 7, None)

    def chosen(rule):
        return (rule(probs, eligible, step) & eligible)[0].nonzero().flatten().tolist()

    assert chosen(threshold(0.9)) == [0, 1, 3] and chosen(top_k(2)) == [0, 1]
    assert chosen(factor(1.0)) == [0, 1, 3]  # 2 * .01, 3 * .05, 4 * .1 pass; 5 * .5 does not
    assert chosen(factor(0.1)) == [0]
    assert chosen(entropy_bounded(0.1)) == [0, 1, 3]  # .04 + .05 <= .1 without the largest, .2
    assert chosen(entropy_bounded(0.05)) == [0, 3]
    assert chosen(top_k(1, "margin")) == [2] and chosen(top_k(2, "entropy")) == [0, 3]
    assert chosen(random_k(2)) == [1, 3]
    assert chosen(rule_of("ancestral:10", None)) == [1] and chosen(rule_of("ancestral:4", None)) == [1]
    assert chosen(rule_of("ancestral:3", None)) == [0, 1, 3]


@pytest.mark.parametrize("spec", ["first_hitting", "ancestral:400"])
def test_one_token_at_a_time_samples_the_joint_distribution(spec):
    model, n = ternary(3), 4000
    ids = torch.full((n, 3), 3)
    decoded = decode(model, ids, rule_of(spec, model), 1.0, generator=torch.Generator().manual_seed(0))
    counts = torch.bincount(decoded.ids @ torch.tensor([9, 3, 1]), minlength=27).double()
    expected = n * model.weights
    chi_square = ((counts - expected) ** 2 / expected)[expected > 5].sum().item()
    assert chi_square < 60  # 26 degrees of freedom: one in ten thousand above 60


def test_several_tokens_at_a_time_do_not():
    model, n = sudoku(), 1500
    ids = torch.full((n, 16), 4)
    valid = {tuple(text) for text in model.texts.tolist()}
    one, four = (
        decode(model, ids[: n // k], random_k(k), 1.0, generator=torch.Generator().manual_seed(0)) for k in (1, 4)
    )
    assert all(tuple(text) in valid for text in one.ids[:200].tolist())
    assert np.mean([tuple(text) in valid for text in four.ids.tolist()]) < 0.2


def test_two_forwards_are_enough_for_progressions_with_an_ideal_planner():
    """One token of every group, then all the others; a threshold needs two a group, the entropy bound one a group."""
    steps, rows = [2, 3], []
    for a, b in itertools.product(range(10), repeat=2):
        rows.append([(start + s * i) % 10 for start, s in zip((a, b), steps) for i in range(3)])
    model = ExactPosterior(torch.tensor(rows), 10)

    def ideal(probs, eligible, step):
        first = torch.zeros_like(eligible)
        first[:, ::3] = True
        return torch.where((step.ids == step.mask_id).all(1, keepdim=True), first, eligible)

    valid, ids = {tuple(row) for row in rows}, torch.full((50, 6), 10)
    for rule, nfe in ((ideal, 2), (threshold(0.9), 4), (entropy_bounded(0.1), 3)):
        decoded = decode(model, ids, rule, 1.0, generator=torch.Generator().manual_seed(0))
        assert all(tuple(row) in valid for row in decoded.ids.tolist()) and decoded.nfe.unique().tolist() == [nfe]


def test_temperature_zero_takes_the_likeliest_and_confidence_is_of_the_token_drawn():
    model = ternary(1)
    ids = torch.full((2000, 1), 3)
    hot = decode(model, ids, threshold(0.0), 2.0, generator=torch.Generator().manual_seed(0)).ids.flatten()
    wanted = (model.weights.log() / 2).softmax(0)
    assert (torch.bincount(hot, minlength=3) / 2000 - wanted).abs().max() < 0.05
    assert (decode(model, ids, threshold(0.0)).ids == model.weights.argmax()).all()
    seen = []
    decode(model, ids, lambda probs, eligible, step: seen.append(probs) or eligible, 1.0)
    torch.testing.assert_close(seen[0].confidence, model.weights[seen[0].token], check_dtype=False)


def test_blocks_are_decoded_in_order():
    model = tiny()
    ids = torch.full((3, 12), 7)
    ids[:, :2] = 1
    order = decode(model, ids, top_k(2), block_size=5).order
    assert block_ends(ids, 7, 5) == [7, 12] and block_ends(ids, 7) == [12]
    assert (order[:, 2:7].amax(1) < order[:, 7:].amin(1).clamp(max=99)).all()
    for s in range(1, int(order.max()) + 1):
        eligible = current_block(order >= s, 5)
        assert eligible[order == s].all() and (eligible.sum(1) <= 5).all()


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_cache_is_exact_at_the_first_step_of_a_block_and_cheaper_after(cache):
    model = tiny()
    ids = torch.full((3, 12), 7)
    ids[:, :4] = torch.randint(7, (3, 4), generator=torch.Generator().manual_seed(0))
    one_step = decode(model, ids, threshold(0.0), block_size=4, cache=cache)  # a block a forward: all of them whole
    assert (one_step.ids == decode(model, ids, threshold(0.0), block_size=4).ids).all()
    cached, whole = (decode(model, ids, top_k(1), block_size=4, cache=c) for c in (cache, None))
    assert (cached.nfe == whole.nfe).all() and (cached.layer_forwards < whole.layer_forwards).all()
    last = decode(model, ids[:, :8], top_k(1), block_size=4, cache=cache)  # a single block behind a prompt
    assert last.layer_forwards.tolist() == [model.n_layers * (1 + 3 * 4 / 8)] * 3
    assert (cached.ids < 7).all()
    with pytest.raises(ValueError, match="block_size"):
        decode(model, ids, top_k(1), cache=cache)


@pytest.mark.parametrize("cache", ["prefix", "dual"])
def test_cache_is_exact_where_nothing_cached_can_change(cache, monkeypatch):
    """Attention that sees only its own block and those before it, prefix; and its own block alone, dual."""
    forward = mdlm_dultra.BidirectionalAttention.forward

    def block_causal(self, x, view, attention_mask=None):
        attend, T, start = F.scaled_dot_product_attention, x.shape[1], view.start

        def with_mask(q, k, v, attn_mask=None, **options):
            rows, columns = torch.arange(start, start + T)[:, None] // 4, torch.arange(k.shape[2])[None] // 4
            mask = columns <= rows if cache == "prefix" else columns == rows
            return attend(q, k, v, attn_mask=mask, **options)

        with monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", with_mask)
            return forward(self, x, view)

    monkeypatch.setattr(mdlm_dultra.BidirectionalAttention, "forward", block_causal)
    model, ids = tiny().double(), torch.full((3, 12), 7)
    ids[:, :4] = torch.randint(7, (3, 4), generator=torch.Generator().manual_seed(0))
    seen = {None: [], cache: []}
    for kind, probs in seen.items():

        def rule(p, eligible, step, probs=probs):
            probs.append(p.entropy)
            return top_positions(p.confidence, eligible, 1)

        decode(model, ids, rule, block_size=4, cache=kind)
    assert len(seen[None]) == 8
    for a, b in zip(*seen.values()):
        torch.testing.assert_close(a, b)


def test_decode_says_what_is_wrong():
    model, ids = tiny(), torch.full((1, 4), 7)
    for options in (dict(cache="both", block_size=2), dict(temperature=-1.0), dict(block_size=0)):
        with pytest.raises(ValueError):
            decode(model, ids, top_k(1), **options)
    for spec in ("nonsense", "threshold:high", "top_k:1.5", "planner"):
        with pytest.raises(ValueError, match="rule"):
            rule_of(spec, model)


def test_area_under_parallelism():
    assert aup([1.0], [0.8]) == pytest.approx(80)
    weight = math.exp(-3 * (1 - 78 / 80))
    assert aup([2.0, 1.0], [0.78, 0.8]) == pytest.approx(80 + (78 * weight + 80) / 2)
    assert aup([1.0, 2.0, 3.0], [0.8, 0.78, 0.5]) == pytest.approx(80 + (78 * weight + 80) / 2)  # the last is dropped


# ---- 6. the planner


def test_probabilities_of_all_actions_add_up_to_one():
    z = torch.tensor([[0.3, -1.2, 2.0, -0.4, 5.0]]).double()
    eligible = torch.tensor([[True, True, True, True, False]])
    actions = F.pad(subsets(4), (0, 1))
    logprob = planner_logprob(z.expand(15, -1), eligible.expand(15, -1), actions)
    assert logprob.exp().sum().item() == pytest.approx(1, abs=1e-12)
    p = torch.sigmoid(z[0, :4])
    authors = torch.where(actions[:, :4], p, 1 - p).prod(1)
    assert authors.sum().item() < 0.99
    # and they are the frequencies of what is drawn
    rule, step = planner_rule(lambda *_: z.expand(40000, -1)), Step(
        torch.zeros(40000, 5), None, None, None, 7, torch.Generator().manual_seed(0)
    )  # fmt: skip
    drawn = rule(None, eligible.expand(40000, -1), step)
    codes = (drawn.long() @ torch.tensor([8, 4, 2, 1, 0])).bincount(minlength=16)[1:] / 40000
    expected = logprob.exp()[(actions.long() @ torch.tensor([8, 4, 2, 1, 0])).argsort()]
    assert (codes - expected).abs().max() < 0.012


def test_gradient_of_the_log_probability():
    eligible = torch.tensor([[True, True, True, False]])
    z = torch.tensor([[0.3, -1.2, 2.0, 0.7]], dtype=torch.float64, requires_grad=True)
    p = torch.sigmoid(z.detach())
    for action, wanted in (
        ([True, False, True, False], [1 - p[0, 0], -p[0, 1], 1 - p[0, 2], 0]),
        ([False, False, True, False], [-p[0, 0], -p[0, 1], 0, 0]),  # the likeliest alone: its coin does not matter
        ([False, True, False, False], [-p[0, 0], 1 - p[0, 1], -p[0, 2], 0]),
    ):
        action = torch.tensor([action])
        (grad,) = torch.autograd.grad(planner_logprob(z, eligible, action).sum(), z)
        torch.testing.assert_close(grad, torch.tensor([wanted], dtype=torch.float64))
        assert torch.autograd.gradcheck(lambda z, a=action: planner_logprob(z, eligible, a), z)


def test_score_function_gradient_is_the_gradient_of_the_expected_reward():
    """Two tokens, all trajectories enumerated; dividing by the group's spread, or a floor, would bias it."""
    reward = {(1, 1): 0.3, (1, 2): 1.0, (2, 1): 0.5}  # by the step in which each token is written
    z = torch.tensor([0.4, -0.7], dtype=torch.float64, requires_grad=True)
    both, first = torch.ones(1, 2, dtype=torch.bool), torch.tensor([[True, False]])
    logprob = {
        (1, 1): planner_logprob(z[None], both, both), (1, 2): planner_logprob(z[None], both, first),
        (2, 1): planner_logprob(z[None], both, ~first),
    }  # fmt: skip
    expected = sum(reward[path] * logprob[path].exp() for path in reward)  # the second step is forced: probability 1
    assert sum(lp.exp() for lp in logprob.values()).item() == pytest.approx(1)
    (exact,) = torch.autograd.grad(expected.sum(), z, retain_graph=True)
    p = {path: lp.exp().item() for path, lp in logprob.items()}
    score = {path: torch.autograd.grad(lp.sum(), z, retain_graph=True)[0] for path, lp in logprob.items()}
    torch.testing.assert_close(sum(p[path] * reward[path] * score[path] for path in reward), exact)
    grouped = {"dr": torch.zeros(2).double(), "grpo": torch.zeros(2).double(), "floor": torch.zeros(2).double()}
    for pair in itertools.product(reward, repeat=2):  # groups of two, all of them
        weight, R = p[pair[0]] * p[pair[1]], torch.tensor([[reward[path] for path in pair]]).double()
        for kind in grouped:
            A = advantages(R, "dr" if kind == "floor" else kind)[0]
            A = A.clamp(min=0) if kind == "floor" else A
            grouped[kind] += weight * sum(a * score[path] for a, path in zip(A, pair)) / 2
    torch.testing.assert_close(grouped["dr"] * 2, exact)  # G / (G - 1)
    for kind in ("grpo", "floor"):  # not even the same direction
        cosine = F.cosine_similarity(grouped[kind], exact, dim=0)
        assert (grouped[kind] * 2 - exact).abs().max() > 0.01, cosine


def test_planner_begins_undecided_and_sees_only_what_it_should():
    torch.manual_seed(0)
    planner = MaskedDiffusionLM(HybridConfig(**TINY), planner=True).planner
    hidden = torch.randn(4, 9, 24)
    eligible = torch.rand(4, 9) < 0.6
    z = planner(hidden, eligible, eligible)
    assert isinstance(planner, UnmaskPlanner) and z.shape == (4, 9) and z.abs().max() < 1
    keys = F.pad(torch.ones(4, 9, dtype=torch.bool), (2, 0))
    padded = planner(F.pad(hidden, (0, 0, 2, 0), value=3.0), F.pad(eligible, (2, 0)), F.pad(eligible, (2, 0)), keys)
    torch.testing.assert_close(padded[:, 2:], z, rtol=1e-4, atol=1e-5)
    fuller = planner(hidden, eligible, torch.zeros_like(eligible))
    assert (fuller - z).abs().max() > 1e-4  # it knows how much is known


# ---- 7, 8. tasks and objectives


def test_canvas_of_a_task_and_back():
    tokenizer, rng = Tokenizer("bytes"), np.random.default_rng(0)
    sudoku, add = environment("sudoku:5", FILL_INS), environment("add:2")
    tasks = [sample_task(sudoku, rng) for _ in range(4)]
    canvas = canvas_of(tasks, tokenizer, 319, sudoku.max_new_tokens)
    assert canvas.ids.shape == (4, 16) and canvas.keys is None and (canvas.maskable(319).sum(1) == 11).all()
    assert completions(tasks, canvas.solved, tokenizer, 16) == [task.demonstration for task in tasks]
    assert all(task.verify(task.demonstration) == 1 and task.template.count(BLANK) == 11 for task in tasks)
    wrong = tasks[0].demonstration[::-1] if tasks[0].demonstration[0] != tasks[0].demonstration[-1] else tasks[0].demonstration[1:] + tasks[0].demonstration[0]  # noqa: E501
    assert tasks[0].verify(wrong[:-1]) == 0
    tasks = [sample_task(env, rng) for env in (add, environment("add:3"), add)]
    canvas = canvas_of(tasks, tokenizer, 319, 12)
    assert canvas.keys is not None and canvas.keys.sum(1).tolist() == [len(t.prompt) + 12 for t in tasks]
    assert completions(tasks, canvas.solved, tokenizer, 12) == [task.demonstration for task in tasks]
    assert ((canvas.ids == 319).sum(1) == 12).all()


def test_progressions_are_worth_their_right_groups():
    task = environment("progressions:2", FILL_INS).sample(np.random.default_rng(0))
    steps = [int(d) for d in task.template[::4]]
    good = "".join(f"{s}7{(7 + s) % 10}{(7 + 2 * s) % 10}" for s in steps)
    assert task.template == f"{steps[0]}___{steps[1]}___" and task.verify(good) == 1 and task.verify(task.demonstration) == 1  # noqa: E501
    assert task.verify(good[:7] + str((int(good[7]) + 1) % 10)) == 0.5
    other = str((steps[0] + 1) % 10)
    assert task.verify(good[:7]) == 0 and task.verify("abcdefgh") == 0 and task.verify(other + good[1:]) == 0


def objective(task="sudoku:8", batch_size=32, **settings):
    """A DUltra and a model of it, after no training."""
    torch.manual_seed(0)
    found = DUltra(DUltraConfig(task=task, pretrain=0, imitate=0, **settings), Tokenizer("bytes"), batch_size)
    config = HybridConfig(**TINY | dict(vocab_size=320, rotary_base=None, initializer_range=0.2))
    return found, found.build(config)


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize("block_size", [None, 6])
def test_replayed_steps_have_the_log_probability_they_were_drawn_with(joint, block_size, monkeypatch):
    settings = dict(joint=joint, temperature=0.8 if joint else 0.0, block_size=block_size)
    found, model = objective(**settings, replay_rows=7)
    drawn = []

    def remembering(planner):
        rule = planner_rule(planner)

        def spy(probs, eligible, step):
            action = rule(probs, eligible, step)
            z = planner(step.hidden, eligible, step.ids == step.mask_id, step.keys)
            logprob = planner_logprob(z, eligible, action)
            if joint:
                logp = torch.log_softmax(model.logits(step.hidden) / 0.8, -1)
                chosen = logp.gather(-1, probs.token[..., None]).squeeze(-1)
                logprob = logprob + chosen.masked_fill(~action, 0).sum(1)
            drawn.append((step.ids.clone(), logprob))
            return action

        return spy

    monkeypatch.setattr(mdlm_dultra, "planner_rule", remembering)
    batch = found.batch(model, 5)
    replayed = {}
    order, ids = batch["order"], batch["ids"]
    for s in range(1, int(order.max()) + 1):
        rows = (order.amax(1) >= s).nonzero().flatten()
        logprob = step_logprob(model, batch, rows, torch.full_like(rows, s), found.settings)
        before = ids[rows].masked_fill(order[rows] >= s, model.mask_id)
        for text, value in zip(before.tolist(), logprob.tolist()):
            replayed.setdefault(tuple(text), []).append(value)
    count = 0
    for texts, logprob in drawn:
        for text, value in zip(texts.tolist(), logprob.tolist()):
            assert min(abs(value - other) for other in replayed[tuple(text)]) < 1e-4
            count += 1
    assert count == sum(map(len, replayed.values())) == int(batch["metrics"]["nfe"] * 32 + 0.5)


@pytest.mark.parametrize(("joint", "block_size"), [(False, None), (True, None), (False, 4), (True, 4)])
def test_chunks_of_the_replay_do_not_change_the_gradient(joint, block_size):
    grads = []
    for rows in (1, 5, 1000) if block_size else (5, 1000):
        found, model = objective(
            joint=joint, temperature=1.0 if joint else 0.0, replay_rows=rows, efficiency=2.0,
            block_size=block_size,
        )  # fmt: skip
        loss, metrics = found.loss(model, found.batch(model, 3))
        loss.backward()
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        assert metrics["ratio"].item() == pytest.approx(1) and metrics["learnt_from"] > 0.3
    assert grads[0].keys() == grads[1].keys() and any(name.startswith("planner.") for name in grads[0])
    assert joint == any(name.startswith("model.") for name in grads[0])
    for other in grads[1:]:
        for name in other:
            torch.testing.assert_close(grads[0][name], other[name], rtol=1e-3, atol=1e-6)


def test_loss_is_the_formula():
    """- sum of A log pi over B times length: at ratio one, its gradient; the floor leaves out the rest."""
    for floor in (None, 0.0):
        found, model = objective(efficiency=2.0, advantage_floor=floor)
        batch = found.batch(model, 3)
        R = (batch["metrics"]["train_reward"]).item()
        assert R == pytest.approx(-2.0 * batch["metrics"]["nfe"].item() / 8, abs=0.05)
        loss, _ = found.loss(model, batch)
        wanted = torch.zeros(())
        for s in range(1, int(batch["order"].max()) + 1):
            rows = (batch["order"].amax(1) >= s).nonzero().flatten()
            logprob = step_logprob(model, batch, rows, torch.full_like(rows, s), found.settings)
            wanted = wanted - (logprob * batch["advantages"][rows]).sum() / (32 * 8)
        parameters = list(model.planner.parameters())
        for a, b in zip(torch.autograd.grad(loss, parameters), torch.autograd.grad(wanted, parameters)):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-7)
        assert (batch["advantages"] >= (0 if floor == 0 else -99)).all()
        if floor is None:
            assert batch["advantages"].view(-1, 8).sum(1).abs().max() < 1e-5


@pytest.mark.parametrize("joint", [False, True])
def test_the_gradient_of_rewards_is_the_sum_over_parts_of_the_batch(joint):
    """Rows of two lengths: where each part divided by its own tokens, short prompts would weigh more."""
    found, model = objective("add:2", 16, joint=joint, temperature=1.0 if joint else 0.0, efficiency=2.0)
    batch = found.batch(model, 3)
    batch["order"][:8] *= batch["order"][:8] > 2  # as if these rows had had fewer masks
    batch["denominator"] = denominator(batch["order"] > 0)
    parameters = [p for p in model.parameters() if joint] or list(model.planner.parameters())

    def gradient(rows):
        part = {k: v[rows] if isinstance(v, torch.Tensor) and v.dim() else v for k, v in batch.items()}
        return torch.autograd.grad(found.loss(model, part)[0], parameters, allow_unused=True)

    parts = [gradient(rows) for rows in torch.arange(16).split([8, 3, 5])]
    for whole, *shares in zip(gradient(slice(None)), *parts):
        if whole is not None:
            shares = [torch.zeros_like(whole) if share is None else share for share in shares]
            torch.testing.assert_close(sum(shares), whole, rtol=1e-3, atol=1e-7)
    assert found.batch(model, 3)["denominator"] == 16 * found.env.max_new_tokens


WHAT_SAMPLES = {
    "decoding": lambda found, model: decode(model, found.canvas(model, found.tasks(0, 8)).ids, top_k(2)).order,
    "the bound": lambda found, model: nelbo(
        model, torch.arange(48).view(4, 12), samples=2, generator=torch.Generator().manual_seed(0)
    )[0],
    "a batch": lambda found, model: found.batch(model, 3)["order"],
    "an evaluation": lambda found, model: torch.tensor(found.evaluate(model, 16)["nfe"]),
}


@pytest.mark.parametrize("what", WHAT_SAMPLES)
def test_sampling_may_share_a_context_of_autocast_with_learning(what):
    """The weights change in it, by another model's; the loss behind must have gradients, and of the new weights."""
    results = []
    for separate in (False, True):
        found, model = objective("progressions:3", joint=True, temperature=1.0, efficiency=2.0)
        around, of_each = (contextlib.nullcontext, autocast) if separate else (autocast, contextlib.nullcontext)
        ids, masked = torch.arange(48).view(4, 12), torch.ones(4, 12, dtype=torch.bool)
        with around():
            with of_each():
                model.logprobs(ids, masked)
                with torch.no_grad():
                    model.logprobs(ids, masked)
                    for p in model.parameters():
                        p.copy_(2 * p.flip(0))
            with of_each():
                value = WHAT_SAMPLES[what](found, model)
            with of_each():
                loss = model.logprobs(ids, masked).sum()
        weights = [p for name, p in model.named_parameters() if not name.startswith("planner.")]
        results.append((value, torch.cat([g.flatten() for g in torch.autograd.grad(loss, weights)])))
    assert all(torch.equal(*pair) for pair in zip(*results)) and results[0][1].abs().max() > 0.01


def test_learning_may_share_a_context_of_autocast_with_decoding():
    grads = []
    for separate in (False, True):
        found, model = objective("progressions:2", 16, efficiency=2.0)
        around, of_each = (contextlib.nullcontext, autocast) if separate else (autocast, contextlib.nullcontext)
        with around():
            for step in (3, 4):
                with of_each():
                    batch = found.batch(model, step)
                with of_each():
                    loss, _ = found.loss(model, batch)
                grads += torch.autograd.grad(loss, list(model.planner.parameters()))
                with torch.no_grad():
                    for p in model.parameters():
                        p.mul_(1.5)
    half = len(grads) // 2
    assert all(torch.equal(a, b) for a, b in zip(grads[:half], grads[half:])) and grads[-2].any()


def test_tokens_that_are_no_text_are_not_free():
    tokenizer, task = Tokenizer("bytes"), environment("add:2").sample(np.random.default_rng(0))
    good = tokenizer.encode(task.demonstration)
    for extra, worth in ((256, 1), (300, 0)):  # an end of text; an id beyond the tokenizer's
        row = torch.tensor([[*good, extra] + [256] * (11 - len(good))])
        assert task.verify(completions([task], row, tokenizer, 12)[0]) == worth


def test_imitation_knows_that_something_is_always_written():
    probs = Probs(torch.tensor([[0.4, 0.6, 0.5]]), None, None, None)
    assert apply_rule(threshold(0.9), probs, torch.ones(1, 3, dtype=torch.bool)).tolist() == [
        [False, True, False]
    ]


def test_experts_stay_balanced():
    experts = dict(hybrid_override_pattern="*E", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    model = tiny(scale=1, **experts, moe_shared_expert_intermediate_size=8, router_aux_loss_coef=10.0).train()
    ids = torch.randint(7, (4, 9), generator=torch.Generator().manual_seed(0))
    loss, metrics = model.loss(ids, generator=torch.Generator().manual_seed(0))
    assert loss - metrics["loss"] > 1 and model.moe_layers()[0].gate.counts.sum() == 4 * 9 * 2
    loss, metrics = model.eval().loss(ids, generator=torch.Generator().manual_seed(0))
    assert loss == metrics["loss"]


def test_padding_and_replays_are_not_counted_by_experts():
    experts = dict(hybrid_override_pattern="*E", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8)
    model = tiny(scale=1, planner=True, **experts, moe_shared_expert_intermediate_size=8).train()
    (moe,), ids = model.moe_layers(), torch.randint(7, (2, 9), generator=torch.Generator().manual_seed(0))
    keys = torch.arange(9) >= torch.tensor([[0], [5]])  # five positions of padding, on the left
    model.loss(ids, keys=keys, generator=torch.Generator().manual_seed(0))[0].backward()
    assert moe.gate.counts.sum() == (9 + 4) * 2
    batch, live = dict(ids=ids, order=torch.ones_like(ids), keys=keys), torch.ones(2, 1, dtype=torch.bool)
    replay(model, batch, live, DUltraConfig(joint=True, temperature=1.0)).sum().backward()  # computed twice
    assert moe.gate.counts.sum() == (9 + 4) * 2


@pytest.mark.parametrize("positions", [None, 12])
def test_a_model_made_on_the_meta_device_begins_like_any_other(positions):
    config = HybridConfig(**TINY | dict(rotary_base=None if positions else 1e4))
    with torch.device("meta"):
        model = MaskedDiffusionLM(config, positions, planner=True)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(math.nan)  # empty memory may hold anything
    other = MaskedDiffusionLM(config, positions, planner=True)
    for one in (model, other):
        torch.manual_seed(0)
        one.reset_parameters()
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values()):
        assert torch.equal(a, b), name


def test_before_there_is_a_planner_a_rule_is_evaluated(monkeypatch):
    found = DUltra(DUltraConfig(task="sudoku:8", pretrain=2, imitate=2), Tokenizer("bytes"), 16)
    model = found.build(HybridConfig(**TINY | dict(vocab_size=320, rotary_base=None)))
    used = []
    monkeypatch.setattr(model.planner, "forward", lambda hidden, *_: used.append(1) or hidden[..., 0])
    for step, planner in ((1, False), (2, True)):
        found.batch(model, step)
        found.evaluate(model, 4)
        assert bool(used) == planner


def test_a_planner_tells_positions_apart():
    """Where nothing else does: hidden states all alike, as those of tokens that are equally unknown."""
    planner = tiny(positions=6, planner=True).planner
    masked = torch.ones(1, 6, dtype=torch.bool)
    z = planner(torch.ones(1, 6, 24), masked, masked)
    assert z.std() > 1e-3
    keys = F.pad(masked, (2, 0))
    padded = planner(torch.ones(1, 8, 24), keys, keys, keys)
    torch.testing.assert_close(padded[:, 2:], z, rtol=1e-4, atol=1e-5)


def test_rewards_add_or_multiply(tmp_path):
    decoded = Decoded(None, torch.tensor([4, 2]), torch.ones(2, 8), None)
    right = torch.tensor([1.0, 0.0])
    found, _ = objective(efficiency=0.5)
    assert rewards(right, decoded, found.settings).tolist() == [0.75, -0.125]
    found, _ = objective(efficiency=0.5, reward="multiplicative")
    assert rewards(right, decoded, found.settings).tolist() == [0.75, 0]


def test_teacher_scores_completions(tmp_path):
    torch.manual_seed(0)
    config = HybridConfig(**TINY | dict(vocab_size=320, rotary_base=None))
    Hybrid(config).save_pretrained(tmp_path)
    found, model = objective("add:2", teacher=str(tmp_path), distill_coef=0.5)
    tasks = found.tasks(0, 4)
    solved = found.canvas(model, tasks).solved
    texts = completions(tasks, solved, found.tokenizer, found.env.max_new_tokens)
    logprob = completion_logprob(found.teacher, tasks, texts, found.tokenizer)
    for task, value in zip(tasks, logprob.tolist()):
        ids = torch.tensor([[256, *task.prompt.encode(), *task.demonstration.encode(), 256]])
        logp = found.teacher(ids[:, :-1]).log_softmax(-1).gather(-1, ids[:, 1:, None]).flatten()
        assert value == pytest.approx(logp[len(task.prompt) :].mean().item(), abs=1e-4)
    loss, _ = found.loss(model, found.batch(model, 2))
    assert loss.isfinite()
    with pytest.raises(ValueError, match="a teacher is a run of --recipe=grpo on the same task"):
        objective("sudoku:8", teacher=str(tmp_path), distill_coef=0.5)  # it would not see the clues
    tiny().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="a teacher is"):
        objective("add:2", teacher=str(tmp_path / "other"), distill_coef=0.5)


@pytest.mark.parametrize("task", ["sudoku:8", "progressions:3", "add:2"])
def test_the_three_phases_learn(task):
    torch.manual_seed(0)
    found = DUltra(DUltraConfig(task=task, pretrain=2, imitate=1, imitated="threshold:0.5"), Tokenizer("bytes"), 16)
    model = found.build(HybridConfig(**TINY | dict(vocab_size=320, rotary_base=None)))
    for step in range(4):
        loss, metrics = found.loss(model, found.batch(model, step))
        model.zero_grad()
        loss.backward()
        planner, backbone = model.planner.out.weight.grad, model.model.layers[0].mixer.q_proj.weight.grad
        assert loss.isfinite() and (planner is None) == (step < 2) and (backbone is None) == (step >= 2)
    assert set(found.evaluate(model, 8)) == {"reward", "nfe"} and "accuracy" in metrics


def test_imitation_learns_the_rule():
    torch.manual_seed(0)
    settings = dict(task="sudoku:8", pretrain=0, imitate=200, imitated="threshold:0.5", smoothing=0.0)
    found = DUltra(DUltraConfig(**settings), Tokenizer("bytes"), 64)
    model = found.build(HybridConfig(**TINY | dict(vocab_size=320, rotary_base=None)))
    optimizer, losses = torch.optim.AdamW(model.planner.parameters(), 3e-3), []
    with torch.no_grad():  # predictions of digits, some of them sure
        model.lm_head.weight.zero_()
        model.lm_head.weight[49:53].normal_(0, 0.6)
    for step in range(60):
        loss, metrics = found.loss(model, found.batch(model, step))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-5:]) < 0.85 * losses[0]


def test_settings_that_cannot_be():
    for wrong in (
        dict(joint=True), dict(reward="none"), dict(group_size=1), dict(smoothing=0.5), dict(efficiency=-1.0),
        dict(distill_coef=0.1), dict(replay_rows=0),
    ):  # fmt: skip
        with pytest.raises(ValueError):
            DUltraConfig(**wrong)
    with pytest.raises(ValueError, match="multiple of group_size"):
        DUltra(DUltraConfig(), Tokenizer("bytes"), 12)
    with pytest.raises(ValueError, match="known: .*sudoku"):
        DUltra(DUltraConfig(task="chess"), Tokenizer("bytes"), 16)
    assert asdict(DUltraConfig())["task"] == "sudoku:4"


@pytest.mark.parametrize("recipe, kind, source, settings", [
    ("dultra", DUltra, "--task", dict(pretrain=2, imitate=1)), ("grpo", GRPO, "--envs", dict(warm_start=3)),
])  # fmt: skip
def test_runs_that_rewards_cannot_be_learnt_in(recipe, kind, source, settings):
    config = SimpleNamespace(recipe=recipe, batch_size=32, grad_accum=1, steps=4)

    def begin(given=(), world_size=1, **changes):
        config_of_run = SimpleNamespace(**vars(config) | changes)
        run = RunInfo(config_of_run, "bytes", frozenset(given), 0, 0, world_size)
        return kind.from_run(run, kind.Settings(**settings))

    assert begin().batch_size == 32
    for message, options in {
        f"--recipe={recipe} runs in one process, without torchrun": dict(world_size=2),
        "leaves none of --steps=3 for rewards": dict(steps=3),
        f"--context has no meaning with --recipe={recipe}: its tasks come from {source}": dict(given=["context"]),
        f"--data has no meaning with --recipe={recipe}: its tasks come from {source}": dict(given=["data", "seed"]),
    }.items():
        with pytest.raises(ValueError, match=message) as error:
            begin(**options)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="--hidden_dropout: with rewards the sampler and the trainer must be one"):
        begin().build(HybridConfig(**TINY | dict(vocab_size=320, rotary_base=None, hidden_dropout=0.1)))


def test_demo_and_a_study_print_accuracy_and_nfe_of_rules_and_planner(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda n: None)
    mdlm_dultra.demo(pretrain=2, imitate=1, updates=1, puzzles=4)
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 10 and table[0].split()[-3:] == ["accuracy", "NFE", "tokens/NFE"]
    assert table[1].split() == ["top_k:1", table[1].split()[1], "12.00", "1.00"]
    study = Study("sudoku:8", 32, "*-", None, 2e-3, 2, 16, 32, {"planner": (1, dict(imitate=2))}, 4)
    rows = run_study(study, 0, "cpu")
    assert len({row["curve"] for row in rows}) == 6 and all(0 < row["nfe"] <= 8 for row in rows)
    report(rows, "sudoku:8", 1)
    assert "lowest NFE at an accuracy of 0.98" in capsys.readouterr().out
    plot_frontiers(rows, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
