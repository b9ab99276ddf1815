"""grpo.py: advantages, losses and gradients against closed forms, limit cases and small vocabularies enumerated."""

import contextlib
import inspect
import itertools
import math
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import grpo
import rollouts
from common.canvas import completion_logprob
from common.data import Tokenizer
from common.tasks import THINK_END, environment, is_held_out
from conftest import scramble
from decoding import generate
from nano_hybrid import Hybrid, HybridConfig


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch(B=6, T=7, off=0.3):
    """Returns (logprob with grad, old_logprob, advantages, mask), rows of 1 to T tokens; off: between new and old."""
    logprob = (-draw(B, T).abs() - 0.5).requires_grad_()
    old = logprob.detach() + off * draw(B, T, seed=1)
    lengths = torch.tensor([T, 1, 4, 2, T, 5])[:B]
    return logprob, old, draw(B, seed=2), torch.arange(T) < lengths[:, None]


def gradient(logprob, *args, **options):
    """Returns the gradient of policy_loss with respect to logprob."""
    loss, _ = grpo.policy_loss(logprob, *args, **options)
    return torch.autograd.grad(loss, logprob)[0]


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def close(a, b, atol=1e-12):
    return torch.allclose(a.double(), torch.as_tensor(b, dtype=torch.float64), rtol=0, atol=atol)


def successes(k, G=16):
    return (torch.arange(G) < k).double()[None]


# ---- advantages


def test_the_four_advantages_of_nemotron():
    lone = grpo.advantages(successes(1), "nemotron")[0]
    assert lone[0] == 1.0 and close(lone[1:], [-0.258199] * 15, 1e-5)  # the success's own std is 0: no division
    textbook = grpo.advantages(successes(1), "grpo")[0]
    assert close(textbook, [3.75] + [-0.25] * 15, 2e-5)
    half = grpo.advantages(successes(8), "nemotron")[0]
    assert close(half, [1.032796] * 8 + [-1.032796] * 8, 1e-5)
    assert not grpo.advantages(successes(16), "nemotron").any()


@pytest.mark.parametrize("kind", grpo.ADVANTAGES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_give_exactly_nothing(kind, dtype):
    rewards = torch.tensor([[0.1] * 7, [1 / 3] * 7, [0, 1, 0, 0, 1, 0, 0.2]], dtype=dtype)  # 7 times .1 is not .7
    A = grpo.advantages(rewards, kind)
    assert not A[:2].any() and A[2].all() and A.dtype == dtype
    assert not grpo.advantages(rewards[:, :1], kind).any()  # a group of one
    assert grpo.advantages(rewards[2:, :2], kind).isfinite().all()  # of two: one other


def test_rloo_is_mean_centring_scaled():
    rewards = draw(5, 8)
    others = (rewards.sum(1, keepdim=True) - rewards) / 7
    assert close(grpo.advantages(rewards, "rloo"), rewards - others)
    assert close(grpo.advantages(rewards, "rloo"), 8 / 7 * grpo.advantages(rewards, "dr"))


def test_leave_one_out_is_a_loop():
    rewards = draw(3, 5)
    mean, std = grpo.leave_one_out(rewards)
    for b in range(3):
        for i in range(5):
            others = torch.cat([rewards[b, :i], rewards[b, i + 1 :]])
            assert close(mean[b, i], others.mean()) and close(std[b, i], others.std())


def test_others_that_are_equal_are_not_divided_by_their_rounding():
    """The std of 22 times .1, computed in float32, is 7e-9."""
    rewards = torch.tensor([[1.0] + [0.1] * 22])
    assert rewards[0, 1:].std() > 0
    assert grpo.leave_one_out(rewards)[1][0, 0] == 0
    assert close(grpo.advantages(rewards, "nemotron")[0, 0], 0.9, 1e-6)


def test_scales_of_the_kinds():
    """Group-normalised advantages do not see a reward's scale; "batch" keeps the weights of prompts to each other."""
    rewards = draw(4, 8)
    for kind in ["grpo", "nemotron", "batch"]:
        assert close(grpo.advantages(100 * rewards, kind), grpo.advantages(rewards, kind), 1e-4)
    ratio = grpo.advantages(rewards, "batch") / grpo.advantages(rewards, "dr")
    assert close(ratio, 1 / rewards.std().expand(4, 8), 1e-5)


def test_integers_and_bools_are_rewards():
    assert close(grpo.advantages(successes(8).bool()), grpo.advantages(successes(8).float()))


# ---- KL


def vocabulary(V=5):
    """Returns (logits with grad, log pi, log ref) [V]: enumerated, sampling has no noise."""
    logits = draw(V, seed=3).requires_grad_()
    return logits, logits.log_softmax(0), draw(V, seed=4).log_softmax(0)


def test_values_of_kl_estimates_by_enumeration():
    _, logprob, ref = vocabulary()
    exact = (logprob.exp() * (logprob - ref)).sum()
    for kind, unbiased in dict(k1=True, k2=False, k3=True).items():
        mean = (logprob.exp() * grpo.kl_estimate(logprob, ref, kind)).sum()
        assert close(mean, exact) == unbiased
    assert (grpo.kl_estimate(logprob, ref, "k1") < 0).any()
    assert (grpo.kl_estimate(logprob, ref, "k3") >= 0).all()
    assert torch.equal(grpo.kl_estimate(logprob, ref, "k3+"), grpo.kl_estimate(logprob, ref, "k3"))


def test_gradients_of_kl_estimates_by_enumeration():
    logits, logprob, ref = vocabulary()
    pi = logprob.exp()

    def grad(value):
        return torch.autograd.grad(value, logits, retain_graph=True)[0]

    reverse, forward = grad((pi * (logprob - ref)).sum()), grad((ref.exp() * (ref - logprob)).sum())
    expected = dict(k1=torch.zeros(5), k2=reverse, k3=forward)
    expected["k3+"] = reverse
    for kind, gradient in expected.items():
        assert close(grad((pi.detach() * grpo.kl_estimate(logprob, ref, kind)).sum()), gradient), kind
    assert not close(reverse, forward, 1e-2)


def test_kl_times_the_ratio_is_the_reverse_kl_from_any_sampler():
    """On samples of old = behaviour / w, k3 times w r has the gradient of KL(new || ref): enumerated over old."""
    logits, logprob, ref = vocabulary()
    old = draw(5, seed=5).log_softmax(0)
    counts = torch.ones(5).double()  # a uniform sampler: each token once
    args = [logprob[:, None], old[:, None], torch.zeros(5), counts[:, None]]
    uniform = counts[:, None] * -math.log(5)
    loss, metrics = grpo.policy_loss(
        *args, behaviour_logprob=uniform, correction="tis", bounds=(0, math.inf),
        ref_logprob=ref[:, None], kl_coef=1.0, kl_ratio=True,
    )  # fmt: skip
    exact = (logprob.exp() * (logprob - ref)).sum()
    assert close(loss, exact) and close(metrics["kl_ref"], exact)
    assert close(*(torch.autograd.grad(x, logits, retain_graph=True)[0] for x in (loss, exact)))


def test_gen_kl_is_9_where_policy_kl_explodes():
    sampler, trainer = torch.tensor([[-5.0]]), torch.tensor([[-15.0]])
    _, metrics = grpo.policy_loss(trainer, trainer, torch.ones(1), torch.ones(1, 1), behaviour_logprob=sampler)
    assert abs(float(metrics["gen_kl"]) - 9) < 1e-3
    assert 21_000 < float(grpo.kl_estimate(trainer, sampler)) < 23_000


def test_k3_keeps_its_digits_in_float32():
    x = torch.tensor([1e-4])
    assert abs(float(grpo.kl_estimate(torch.zeros(1), x)) / 5.00017e-9 - 1) < 0.01  # e^x - x - 1 would be off by > 1


# ---- aggregation


@pytest.mark.parametrize("aggregate", grpo.AGGREGATES)
@pytest.mark.parametrize("kind", grpo.SURROGATES)
def test_the_gradient_does_not_depend_on_micro_batches(aggregate, kind):
    tensors = batch()
    mask = tensors[3]
    options = dict(kind=kind, aggregate=aggregate, ref_logprob=tensors[1] - 0.1, kl_coef=0.1)
    options["denominator"] = grpo.denominator(mask, aggregate, 9)
    found = []
    for size in (1, 4, 6):
        parts = []
        for rows in torch.arange(6).split(size):
            ref = options["ref_logprob"][rows]
            part = [tensors[0].detach()[rows].requires_grad_(), *(x[rows] for x in tensors[1:])]
            parts.append(gradient(*part, **{**options, "ref_logprob": ref}))
        found.append(torch.cat(parts))
    assert close(found[0], found[2]) and close(found[1], found[2]) and found[2].any()


@pytest.mark.parametrize("correction", [None, *grpo.BOUNDS])
@pytest.mark.parametrize("aggregate", grpo.AGGREGATES)
@pytest.mark.parametrize("kind", grpo.SURROGATES)
def test_the_mean_of_micro_batches_and_processes_is_the_batch(monkeypatch, kind, aggregate, correction):
    """Two processes of two micro-batches with one or two of six rows each, and rows by which any mean would differ."""
    logprob, old, A, mask = batch()
    mask[5] = False  # a row of which nothing is left
    behaviour, options = old + 0.1 * draw(6, 7, seed=5), dict(kind=kind, aggregate=aggregate, correction=correction)
    options |= dict(dual_clip=None if kind == "cispo" else 3.0, kl_coef=0.1, kl_kind="k2", bounds=(0.5, 1.2))

    def grad(rows, divisor):
        part = [logprob.detach()[rows].requires_grad_(), old[rows], A[rows], mask[rows]]
        further = dict(behaviour_logprob=behaviour[rows], ref_logprob=old[rows] - 0.2, denominator=divisor)
        return gradient(*part, **options, **further)

    whole = grad(torch.arange(6), grpo.denominator(mask, aggregate, 9))
    shares, parts = (torch.arange(3), torch.arange(3, 6)), []
    for mine, others in (shares, shares[::-1]):
        theirs = grpo.denominator(mask[others], aggregate, 1)
        monkeypatch.setattr(grpo.dist, "all_reduce", lambda total, theirs=theirs: total.add_(theirs.long()))
        divisor = grpo.denominator(mask[mine], aggregate, 9, micro_batches=2, processes=2)
        parts += [grad(rows, divisor) / 4 for rows in mine.tensor_split(2)]
    assert close(torch.cat(parts), whole) and whole[:5].abs().sum(1).all() and not whole[5].any()


def test_a_local_token_mean_depends_on_micro_batches():
    tensors = batch()
    parts = [
        gradient(tensors[0].detach()[i : i + 1].requires_grad_(), *(x[i : i + 1] for x in tensors[1:]))
        for i in range(6)
    ]
    assert not close(torch.cat(parts) / 6, gradient(*tensors), 1e-3)


def test_what_an_answer_weighs():
    """A row of 1 and a row of 4 tokens: each token the same; each row the same; each token 1 / (B max_tokens)."""
    mask = torch.tensor([[1, 0, 0, 0], [1, 1, 1, 1]])
    values = torch.ones(2, 4).double()
    weights = {}
    for aggregate in grpo.AGGREGATES:
        x = values.clone().requires_grad_()
        grpo.aggregate_tokens(x, mask, aggregate, grpo.denominator(mask, aggregate, 10)).backward()
        weights[aggregate] = x.grad
    assert close(weights["token"], mask / 5, 1e-8) and close(weights["constant"], mask / 20, 1e-8)
    assert close(weights["sequence"], torch.tensor([[0.5, 0, 0, 0], [0.125] * 4]))


def test_rows_without_tokens_count_only_in_the_constant():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]]).bool()
    found = [float(grpo.denominator(mask, aggregate, 3)) for aggregate in grpo.AGGREGATES]
    assert found == [2, 1, 6]


def test_an_empty_mask_is_a_loss_of_zero():
    logprob, old, A, mask = batch()
    for aggregate in ["token", "sequence"]:
        loss, metrics = grpo.policy_loss(logprob, old, A, mask & False, aggregate=aggregate)
        loss.backward()
        assert loss == 0 and not logprob.grad.any() and all(x.isfinite() for x in metrics.values())


# ---- surrogates


@pytest.mark.parametrize("aggregate", ["token", "sequence"])
def test_the_first_update_is_reinforce(aggregate):
    """At r = 1: grpo, DAPO, gspo and cispo all have the gradient -A m / denominator (a row's length for "sequence")."""
    logprob, _, A, mask = batch()
    weight = mask.double() / mask.sum() if aggregate == "token" else mask.double() / mask.sum(1, keepdim=True) / 6
    for kind, clip in [("grpo", (0.2, 0.2)), ("grpo", (0.2, 0.28)), ("gspo", (3e-4, 4e-4)), ("cispo", (1, 4))]:
        found = gradient(logprob, logprob, A, mask, kind, clip, aggregate=aggregate)  # old is logprob itself: detached
        assert close(found, -A[:, None] * weight)


def test_weights_at_ratio_one_are_weighted_reinforce():
    logprob, _, A, mask = batch()
    behaviour = logprob.detach() + 0.5 * draw(6, 7, seed=6)
    w = (logprob.detach() - behaviour).exp()
    expected = dict(tis=w.clamp(0, 2), mask=torch.where((w >= 0.5) & (w <= 5), w, 0))
    for correction, weight in expected.items():
        found = gradient(logprob, logprob, A, mask, behaviour_logprob=behaviour, correction=correction)
        assert close(found, -weight * A[:, None] * mask / mask.sum())


def test_decoupled_ppo_is_ppo_when_the_sampler_is_up_to_date():
    args = batch()
    for correction in grpo.BOUNDS:
        assert close(gradient(*args, behaviour_logprob=args[1], correction=correction), gradient(*args))


def test_decoupled_ppo_is_not_naive_ppo_when_it_is_stale():
    """Naive PPO clips around the sampler, decoupled PPO around old: a token far from the sampler goes on learning."""
    logprob = torch.tensor([[-1.0]], requires_grad=True)
    old, behaviour = torch.tensor([[-1.0]]), torch.tensor([[-1.5]])
    args = torch.ones(1), torch.ones(1, 1)
    assert gradient(logprob, behaviour, *args) == 0  # r = e^.5 > 1.28
    assert close(gradient(logprob, old, *args, behaviour_logprob=behaviour, correction="tis"), -math.exp(0.5), 1e-6)


def test_gspo_for_tokens_has_the_gradient_of_the_sequence_form():
    logprob, old, A, mask = batch(off=0.05)
    for clip in [(0.2, 0.28), (0.01, 0.01)]:
        s = ((logprob - old) * mask).sum(1).div(mask.sum(1)).exp()  # [B]
        loss = -torch.minimum(s * A, s.clamp(1 - clip[0], 1 + clip[1]) * A).mean()
        found = grpo.policy_loss(logprob, old, A, mask, "gspo", clip, aggregate="sequence")[0]
        assert close(found, loss)
        assert close(*(torch.autograd.grad(x, logprob)[0] for x in (found, loss)))


def slope(p, p_old, A, **options):
    """Returns the gradient with respect to the log-probability of one token that went from p_old to p."""
    logprob = torch.tensor([[math.log(p)]], dtype=torch.float64, requires_grad=True)
    old = torch.tensor([[math.log(p_old)]], dtype=torch.float64)
    return float(gradient(logprob, old, torch.tensor([A]), torch.ones(1, 1), **options))


def test_clip_higher_lets_a_rare_token_grow_to_128_percent():
    assert slope(0.01279, 0.01, 1.0) < 0 and slope(0.01281, 0.01, 1.0) == 0
    assert slope(0.01201, 0.01, 1.0, clip=(0.2, 0.2)) == 0
    assert slope(0.01281, 0.01, -1.0) > 0  # too likely and bad: on the way back nothing is clipped
    assert slope(0.0081, 0.01, -1.0) > 0 and slope(0.0079, 0.01, -1.0) == 0


def test_dual_clip_caps_what_a_bad_token_can_weigh():
    args = torch.tensor([[-1.0]]), torch.tensor([[-1.0 - math.log(10)]]), torch.tensor([-1.0]), torch.ones(1, 1)
    assert close(grpo.policy_loss(*args)[0], 10, 1e-5) and close(grpo.policy_loss(*args, dual_clip=3)[0], 3, 1e-5)
    assert slope(0.5, 0.05, -1.0) > 9.9 and slope(0.5, 0.05, -1.0, dual_clip=3) == 0
    assert slope(0.1, 0.05, -1.0, dual_clip=3) == slope(0.1, 0.05, -1.0) > 0
    assert slope(0.05, 0.05, 1.0, dual_clip=3) == slope(0.05, 0.05, 1.0) < 0  # a good one is not its business


def test_cispo_clips_the_weight_and_keeps_the_gradient():
    for p, weight in [(0.1, 1.28), (0.055, 1.1), (0.001, 0.8)]:
        for A in (1.0, -1.0):
            assert abs(slope(p, 0.05, A, kind="cispo") + weight * A) < 1e-9
    assert abs(slope(0.001, 0.05, 1.0, kind="cispo", clip=(1, 4)) + 0.02) < 1e-9


def test_advantages_may_be_of_tokens():
    logprob, old, A, mask = batch()
    for kind in grpo.SURROGATES:
        assert close(gradient(logprob, old, A[:, None].expand(6, 7), mask, kind), gradient(logprob, old, A, mask, kind))


@pytest.mark.parametrize("kind", grpo.SURROGATES)
def test_what_is_not_in_the_mask_has_no_gradient(kind):
    logprob, old, A, mask = batch()
    found = gradient(logprob, old, A, mask, kind, ref_logprob=old, kl_coef=0.1, behaviour_logprob=old, correction="tis")
    assert not found[~mask].any() and found[mask].any()
    # and may be anything: padding of -inf, NaN in an unused row
    broken = [x.detach().masked_fill(~mask, math.nan) for x in (logprob, old)]
    options = dict(
        behaviour_logprob=broken[1], correction="sequence", bounds=(0, 9), ref_logprob=broken[1], kl_coef=0.1
    )
    repeat = gradient(broken[0].requires_grad_(), broken[1], A, mask.float(), kind, **options)
    assert repeat.isfinite().all() and not repeat[~mask].any()
    assert close(repeat, found, 1e-12)


def test_an_uninformative_group_has_no_gradient_even_with_a_kl_term():
    rewards = torch.tensor([[1.0, 1, 1], [0, 1, 0]])
    logprob, old, _, mask = batch()
    A = grpo.advantages(rewards).flatten()
    options = dict(ref_logprob=old - 0.3, kl_coef=0.1)
    assert gradient(logprob, old, A, mask, **options)[:3].any()  # the KL of answers that nothing is learnt from
    keep = grpo.informative(rewards)
    assert keep.tolist() == [False, True]
    found = gradient(logprob, old, A, rollouts.keep_only(mask, keep), **options)
    assert not found[:3].any() and found[3:].any()


def test_overlong_answers_change_baselines_and_have_no_gradient():
    logprob, old, _, mask = batch()
    truncated = torch.tensor([True, False, False, False, False, False])
    kept = rollouts.keep_only(mask, ~truncated)
    found = []
    for reward in (0.0, 1.0):  # of the answer that was cut off
        A = grpo.advantages(torch.tensor([[reward, 0.3, 0.6], [0.1, 0.4, 0.9]]), "dr").flatten()
        found.append(gradient(logprob, old, A, kept))
    assert not found[0][0].any() and not found[1][0].any()
    assert not close(found[0][1:3], found[1][1:3], 1e-3)  # through the baseline
    assert close(found[0][3:], found[1][3:])  # another group


def test_keep_only_counts_rows_or_groups():
    mask = torch.ones(4, 2)
    assert rollouts.keep_only(mask, torch.tensor([True, False])).tolist() == [[1, 1], [1, 1], [0, 0], [0, 0]]
    assert rollouts.keep_only(mask.bool(), torch.tensor([True, False, True, False])).dtype == torch.bool
    with pytest.raises(ValueError, match=r"keep is \[3\].*4 rows"):
        rollouts.keep_only(mask, torch.ones(3).bool())


# ---- samplers that are not the policy


def test_corrections_on_ratios_by_hand():
    w = numbers([0.1, 0.5, 1.0, 3.0, 7.0, math.nan, math.inf, 99.0])
    mask = torch.tensor([[1, 1, 1, 1, 1, 1, 1, 0]])

    def weights(correction, bounds, w=w):
        found, out = grpo.correction_weights(w.log(), torch.zeros_like(w), mask, correction, bounds)
        return found[0, :7], out[0].tolist()

    tis, out = weights("tis", (0.2, 5))
    assert close(tis, [0.2, 0.5, 1, 3, 5, 0, 0]) and out == [True, False, False, False, True, True, True, False]
    masked, out = weights("mask", (0.5, 5))
    assert close(masked, [0, 0.5, 1, 3, 0, 0, 0]) and out == [True, False, False, False, True, True, True, False]
    dropped, out = weights("sequence", None)
    assert not dropped.any() and out == [True] * 7 + [False]  # the mean of a row with NaN is NaN: no evidence either


def test_areal_drops_ratios_above_five_and_goes_on_counting_them():
    """AReaL's `behav_imp_weight_cap`: a filter of tokens, no clamp; no lower bound."""
    (row,) = (line for line in grpo.__doc__.splitlines() if "AReaL  " in line)
    assert "--correction=mask" in row and "[(0, 5)]" in row
    ratios = torch.tensor([[0.01, 1.0, 4.9, 5.1, 600.0]])
    options = dict(behaviour_logprob=-ratios.log(), correction="mask", bounds=(0, 5))
    logprob = torch.zeros(1, 5, requires_grad=True)
    w, out = grpo.correction_weights(torch.zeros(1, 5), -ratios.log(), torch.ones(1, 5), "mask", (0, 5))
    assert close(w, [[0.01, 1.0, 4.9, 0, 0]], 1e-6) and out.tolist() == [[False] * 3 + [True] * 2]
    assert close(gradient(logprob, logprob, torch.ones(1), torch.ones(1, 5), **options), -w / 5, 1e-6)


def test_a_word_of_its_own_for_each_thing():
    """What a reader meets in grpo.py and rollouts.py has one name, explained where it comes first."""
    for module in (grpo, rollouts):
        source = inspect.getsource(module)
        assert not re.search(r"\b(demos|silent|silence|accepted)\b", source, re.IGNORECASE)
        for short, long in (("MOPD", r"multi-teacher[\w\s-]*distillation"), ("TIS", "truncated importance sampling")):
            first = re.search(rf"\b{short}\b", source)
            assert first is None or re.search(long, source[max(0, first.start() - 120) : first.end() + 120])
    assert grpo.informative is rollouts.informative


def test_the_sequence_mask_judges_the_geometric_mean():
    w = numbers([4.0, 0.25], [1.1, 1.1], [1.001, 1.001])
    weights, out = grpo.correction_weights(w.log(), torch.zeros_like(w), torch.ones(3, 2), "sequence")
    assert close(weights, [[4.0, 0.25], [0, 0], [1.001, 1.001]]) and out[:, 0].tolist() == [False, True, False]
    assert rollouts.faithful(w.log(), torch.zeros_like(w), torch.ones(3, 2)).tolist() == [
        False,
        True,
        True,
    ]  # mean |.|: 4


def test_weights_are_constants():
    logprob, old, A, mask = batch()
    old, behaviour = old.requires_grad_(), (old.detach() - 0.1).requires_grad_()
    loss, metrics = grpo.policy_loss(
        logprob, old, A, mask, behaviour_logprob=behaviour, correction="tis", ref_logprob=old, kl_coef=0.1
    )
    loss.backward()
    assert old.grad is None and behaviour.grad is None and logprob.grad.any()
    assert all(x.dim() == 0 and not x.requires_grad for x in metrics.values())


def test_importance_weights_are_unbiased_and_truncated_ones_are_not():
    """Policy gradient of 5 tokens from 200,000 samples of a perturbed sampler, against its enumerated value."""
    N, (logits, logprob, _) = 200_000, vocabulary()
    behaviour = (logits.detach() + 1.5 * draw(5, seed=7)).log_softmax(0)
    reward = draw(5, seed=8)
    tokens = torch.multinomial(behaviour.exp(), N, replacement=True, generator=torch.Generator().manual_seed(0))
    score = torch.eye(5).double() - logprob.exp().detach()  # [V, V]: d log pi(token) / d logits
    exact = -(logprob.exp().detach() * reward) @ score
    w = (logprob - behaviour).detach().exp()
    assert w.max() > 2 and w.min() < 0.5  # the bounds below have something to do

    for correction, bounds, weight in [
        ("tis", (0, math.inf), w), ("tis", (0, 1.2), w.clamp(max=1.2)), ("mask", (0.5, 2), w * ((w >= 0.5) & (w <= 2)))
    ]:  # fmt: skip
        loss, _ = grpo.policy_loss(
            logprob[tokens][:, None], logprob[tokens][:, None], reward[tokens], torch.ones(N, 1),
            behaviour_logprob=behaviour[tokens][:, None], correction=correction, bounds=bounds,
        )  # fmt: skip
        found = torch.autograd.grad(loss, logits, retain_graph=True)[0]
        terms = -(weight * reward)[:, None] * score  # [V, V], of each token
        stated = behaviour.exp() @ terms
        error = ((behaviour.exp() @ terms.square() - stated.square()) / N).sqrt()  # standard error
        assert ((found - stated).abs() < 5 * error).all()
        biased = ((found - exact).abs() > 10 * error).any()
        assert biased == (weight is not w) and (biased or ((found - exact).abs() < 5 * error).all())


def test_metrics_of_a_batch_by_hand():
    r = numbers([0.7, 1.0, 1.5, 0.7], [1.5, 0.7, 1.0, 1.0])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    old = torch.full((2, 4), -2.0).double()
    behaviour = old - numbers([3, 1, 1, 1], [1, 1, 1, 1]).log()
    args = old + r.log(), old, torch.tensor([1.0, -1.0]), mask
    _, metrics = grpo.policy_loss(*args, behaviour_logprob=behaviour, correction="tis", ref_logprob=old)
    assert close(metrics["ratio"], (0.7 + 1 + 1.5 + 0.7 + 1.5 + 0.7) / 6)
    assert close(metrics["clip_low"], 1 / 6, 1e-7) and close(metrics["clip_high"], 1 / 6, 1e-7)  # A > 0: 1.5; A < 0: .7
    assert (
        close(metrics["weight"], 8 / 6)
        and close(metrics["weight_out"], 1 / 6, 1e-7)
        and close(metrics["mismatch"], 8 / 6)
    )
    assert close(metrics["gen_kl"], (3 - math.log(3) - 1) / 6)
    k3 = [x - math.log(x) - 1 for x in (0.7, 1.0, 1.5, 0.7, 1.5, 0.7)]
    assert close(metrics["kl_old"], sum(k3) / 6)
    assert close(metrics["kl_ref"], sum(1 / x + math.log(x) - 1 for x in (0.7, 1.0, 1.5, 0.7, 1.5, 0.7)) / 6)
    _, metrics = grpo.policy_loss(*args, kind="cispo")
    assert close(metrics["clip_low"], 3 / 6, 1e-7) and close(metrics["clip_high"], 2 / 6, 1e-7)


# ---- rewards


def test_soft_overlong_penalty():
    lengths = torch.tensor([0, 80, 90, 100, 120])
    assert close(rollouts.overlong_penalty(lengths, 100, 20), [0, 0, -0.5, -1, -1], 1e-7)
    with pytest.raises(ValueError, match="cache=0"):
        rollouts.overlong_penalty(lengths, 100, 0)


def test_length_control_sums_to_zero_before_the_bonus():
    rewards, lengths = draw(4, 8), (100 * draw(4, 8, seed=1).abs()).long()
    term = rollouts.length_control(rewards, lengths, bonus=0)
    assert close(term.sum(1), torch.zeros(4)) and term.any()
    for b in range(4):  # shorter is better, and the range is coef
        assert torch.equal(term[b].argsort(), lengths[b].argsort(descending=True))
        assert close(term[b].max() - term[b].min(), 0.5)


def test_equal_lengths_change_nothing():
    assert not rollouts.length_control(draw(3, 8), torch.full((3, 8), 50)).any()


def test_the_bonus_is_for_the_shortest_if_it_is_good():
    rewards = torch.tensor([[1.0, 2, 3, 4, 5, 6]]).repeat(2, 1)  # the quantile .8 is 5
    lengths = torch.tensor([[9, 8, 7, 6, 1, 5], [1, 8, 7, 6, 9, 5]])
    bonus = rollouts.length_control(rewards, lengths, coef=0)
    assert bonus.tolist() == [[0, 0, 0, 0, 0.5, 0], [0] * 6]


def test_length_control_of_two_parts_adds_up_in_any_order():
    rewards, thought, answer = draw(2, 8), draw(2, 8, seed=1).abs(), draw(2, 8, seed=2).abs()
    a = rollouts.length_control(rewards, thought, 0.3) + rollouts.length_control(rewards, answer, 0.35)
    order = torch.randperm(8, generator=torch.Generator().manual_seed(0))
    b = rollouts.length_control(rewards[:, order], answer[:, order], 0.35)
    b = b + rollouts.length_control(rewards[:, order], thought[:, order], 0.3)
    assert close(a[:, order], b)


def test_low_effort_reward_by_hand():
    rewards, lengths = torch.tensor([1.0, 0, 1, 0, 1]), torch.tensor([0.0, 0, 100, 200, 200])
    assert close(rollouts.low_effort_reward(rewards, lengths, U=100), [1.1, 0, 1, -0.1, 0.9], 1e-6)


def test_circular_comparison():
    """Each answer is judged once in each position, and a tie's two adjustments cancel."""
    N = 5
    first, second = torch.zeros(N), torch.zeros(N)
    for i in range(N):
        hot = torch.arange(N) == i
        assert rollouts.circular_scores(hot.float(), second, torch.full((N,), 3.5)).nonzero().tolist() == [[i]]
        assert rollouts.circular_scores(first, hot.float(), torch.full((N,), 3.5)).nonzero().tolist() == [[(i + 1) % N]]
    first, second = torch.tensor([3.0, 2, 4]), torch.tensor([3.0, 5, 4])
    found = rollouts.circular_scores(first, second, torch.tensor([1.0, 6, 5]))
    assert close(found, [(5.5 + 5.5) / 2, (2 + 0.5) / 2, (2.5 + 5) / 2])
    assert found.sum() == (first + second).sum() / 2


# ---- tasks


def pool(n=20_000):
    """Returns pass rates as they are before training: most tasks nearly always or nearly never solved."""
    p = torch.rand(n, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return torch.where(torch.arange(n) % 4 == 0, p, p**8)


def test_the_curriculum_s_batches_follow_its_mean():
    rates, generator = pool(), torch.Generator().manual_seed(1)
    curriculum = rollouts.Curriculum(rates, steps=20)
    assert [round(curriculum.mean(step), 9) for step in (0, 10, 20, 99)] == [0.7, 0.55, 0.4, 0.4]
    means = [rates[curriculum.draw(64, step, generator)].mean() for step in range(21)]
    aims = [curriculum.mean(step) for step in range(21)]
    assert max(abs(float(mean) - aim) for mean, aim in zip(means, aims)) < 0.08  # 64 draws: .15 / 8 = .02 each
    assert abs(float(sum(means)) - sum(aims)) / 21 < 0.012  # three standard errors
    plain = rollouts.Curriculum(rates, steps=20, bins=1)  # the Gaussian alone: batches follow the pool
    plain = [rates[plain.draw(64, step, generator)].mean() for step in range(21)]
    assert (sum(aims) - float(sum(plain))) / 21 > 0.024


def test_the_curriculum_uses_a_bin_up_before_it_begins_anew():
    rates = torch.tensor([0.0, 1.0, 0.2, 0.4, 0.6, 0.8]).repeat_interleave(2)
    curriculum = rollouts.Curriculum(rates, steps=10)
    drawn = [curriculum.draw(1, 5, torch.Generator().manual_seed(i)).item() for i in range(40)]
    for pair in [(0, 1), (4, 5), (6, 7), (8, 9), (10, 11)]:
        mine = [i for i in drawn if i in pair]
        assert all(set(mine[i : i + 2]) == set(pair) for i in range(0, len(mine) - 1, 2))
    assert not {2, 3} & set(drawn)  # always solved
    assert len(set(curriculum.draw(10, 5).tolist())) == 10
    assert not {0, 1} & set(rollouts.Curriculum(rates, steps=10, drop_unsolved=True).draw(8, 10).tolist())
    with pytest.raises(ValueError, match="n=11.*only 10"):
        curriculum.draw(11, 0)
    with pytest.raises(ValueError, match="from 0 to 1"):
        rollouts.Curriculum([0.5, 1.5], steps=10)


def test_a_pool_that_is_too_small_does_not_bend_the_curriculum():
    rates = (torch.arange(2048) + 0.5) / 2048
    curriculum, generator = rollouts.Curriculum(rates, steps=250), torch.Generator().manual_seed(0)
    means = torch.stack([rates[curriculum.draw(32, step, generator)].mean() for step in range(250)])
    aims = torch.tensor([curriculum.mean(step) for step in range(250)])
    assert (means.view(25, 10).mean(1) - aims.view(25, 10).mean(1)).abs().max() < 0.06


def test_the_curriculum_repeats_with_its_generator_and_state():
    a, b = (rollouts.Curriculum(pool(200), steps=10) for _ in range(2))
    first = a.draw(10, 0, torch.Generator().manual_seed(0))
    assert torch.equal(first, b.draw(10, 0, torch.Generator().manual_seed(0)))
    c = rollouts.Curriculum(pool(200), steps=10)
    c.left = a.left.clone()
    assert torch.equal(*(x.draw(10, 1, torch.Generator().manual_seed(1)) for x in (a, c)))


def test_dynamic_sampling_draws_until_it_has_enough():
    made = []

    def source(n):  # every third group is not informative
        groups = [len(made) + i for i in range(n)]
        made.extend(groups)
        return groups, torch.stack([torch.tensor([0.0, i % 3]) for i in groups])

    groups, acceptance = rollouts.dynamic_sampling(source, 3)
    assert groups == [1, 2, 4] and len(made) == 6 and acceptance == 4 / 6  # one more than was asked for
    groups, acceptance = rollouts.dynamic_sampling(source, 3, refills=0)
    assert groups == [7, 8] and len(made) == 9
    groups, acceptance = rollouts.dynamic_sampling(lambda n: (list(range(n)), torch.ones(n, 3)), 4, refills=2)
    assert groups == [] and acceptance == 0


# ---- teachers and pairs


def test_mopd_has_the_gradient_of_the_reverse_kl():
    """Two tokens, of probability 1/4 and 3/4, enumerated as four answers of one token."""
    logits = numbers(1, 3).log().requires_grad_()
    logprob, teacher = logits.log_softmax(0), numbers(0.6, 0.4).log()
    exact = torch.autograd.grad((logprob.exp() * (logprob - teacher)).sum(), logits, retain_graph=True)[0]
    tokens = torch.tensor([0, 1, 1, 1])
    sampled, of_teacher = logprob[tokens][:, None], teacher[tokens][:, None]
    A = rollouts.mopd_advantages(of_teacher, sampled)
    loss, _ = grpo.policy_loss(sampled, sampled, A, torch.ones(4, 1))
    assert close(torch.autograd.grad(loss, logits, retain_graph=True)[0], exact)

    tokens = torch.tensor([0, 1])  # the same from a sampler of 1/2 and 1/2
    sampled, of_teacher = logprob[tokens][:, None], teacher[tokens][:, None]
    A, half = rollouts.mopd_advantages(of_teacher, sampled), numbers([0.5], [0.5]).log()
    loss, _ = grpo.policy_loss(
        sampled, sampled, A, torch.ones(2, 1), behaviour_logprob=half, correction="mask", bounds=(0, 5)
    )
    assert close(torch.autograd.grad(loss, logits, retain_graph=True)[0], exact)


def test_mopd_advantages_are_bounded_constants():
    A = rollouts.mopd_advantages(torch.tensor([[-100.0, -1]]), torch.tensor([[-1.0, -100]], requires_grad=True))
    assert A.tolist() == [[-20, 20]] and not A.requires_grad


def test_dpo_starts_at_log_2_and_parts_the_pair():
    chosen, rejected, ref = draw(4).requires_grad_(), draw(4, seed=1).requires_grad_(), draw(4, seed=2)
    assert close(rollouts.dpo_loss(chosen, rejected, ref, ref, beta=1e-9), math.log(2), 1e-8)
    assert close(rollouts.dpo_loss(chosen, rejected, chosen.detach(), rejected.detach()), math.log(2))
    rollouts.dpo_loss(chosen, rejected, ref, ref).backward()
    assert (chosen.grad < 0).all() and close(rejected.grad, -chosen.grad)
    margin = 0.1 * (chosen - rejected).detach()
    assert close(chosen.grad, -0.1 * torch.sigmoid(-margin) / 4)


# ---- errors and precision


def test_unknown_names_are_answered_with_the_choices():
    args = batch()
    for call, choices in [
        (lambda: grpo.advantages(draw(2, 4), "ppo"), "kind='ppo'.*grpo, nemotron, rloo, dr, batch"),
        (lambda: grpo.kl_estimate(draw(2), draw(2), "k4"), "kind='k4'.*k1, k2, k3, k3+"),
        (lambda: grpo.policy_loss(*args, kind="ppo"), "kind='ppo'.*grpo, gspo, cispo"),
        (lambda: grpo.policy_loss(*args, aggregate="mean"), "aggregate='mean'.*token, sequence, constant"),
        (lambda: grpo.policy_loss(*args, aggregate="constant"), "max_tokens"),
        (
            lambda: grpo.policy_loss(*args, behaviour_logprob=args[1], correction="x"),
            "correction='x'.*tis, mask, sequence",
        ),
        (lambda: grpo.policy_loss(*args, correction="tis"), "needs behaviour_logprob"),
        (lambda: grpo.policy_loss(*args, kl_coef=0.1), "needs ref_logprob"),
        (lambda: grpo.policy_loss(*args, kind="cispo", dual_clip=3), "dual_clip=3.*cispo"),
    ]:
        with pytest.raises(ValueError, match=choices):
            call()


def test_shapes_that_do_not_fit_are_named():
    logprob, old, A, mask = batch()
    for args, message in [
        ((logprob, old[:, 1:], A, mask), r"old_logprob is \[6, 6\], expected \[6, 7\]"),
        ((logprob, old, A[:4], mask), r"advantages is \[4\], expected \[6\]"),
        ((logprob, old, A[:, None], mask), r"advantages is \[6, 1\], expected \[6, 7\]"),
        ((logprob, old, A, mask[0]), r"mask is \[7\], expected \[6, 7\]"),
        ((logprob[0], old, A, mask), r"logprob is \[7\], expected \[B, T\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            grpo.policy_loss(*args)
    with pytest.raises(ValueError, match=r"rewards is \[6\], expected \[B, G\]"):
        grpo.advantages(A)
    with pytest.raises(ValueError, match=r"lengths is \[2, 3\], expected \[2, 4\]"):
        rollouts.length_control(draw(2, 4), draw(2, 3))
    with pytest.raises(ValueError, match=r"teacher_logprob is \[2, 3\], expected \[2, 4\]"):
        rollouts.mopd_advantages(draw(2, 3), draw(2, 4))


def test_half_precision_is_computed_in_float32():
    logprob, old, A, mask = batch()
    halves = [x.detach().to(torch.bfloat16) for x in (logprob, old, A)]
    loss, metrics = grpo.policy_loss(*halves, mask)
    exact, _ = grpo.policy_loss(*(x.double() for x in halves), mask)
    assert loss.dtype == metrics["ratio"].dtype == torch.float32 and abs(float(loss - exact)) < 1e-6


def test_far_policies_stay_finite():
    """A token that went from e^-200 to 1, or the other way, in float32."""
    logprob = torch.tensor([[-1e-3, -200.0]], requires_grad=True)
    old = torch.tensor([[-200.0, -1e-3]])
    for kind in grpo.SURROGATES:
        for A in (1.0, 0.0, -1.0):
            loss, metrics = grpo.policy_loss(
                logprob, old, torch.tensor([A]), torch.ones(1, 2), kind,
                behaviour_logprob=old.flip(1), correction="tis", ref_logprob=old, kl_coef=0.1,
            )  # fmt: skip
            assert loss.isfinite() and torch.autograd.grad(loss, logprob)[0].isfinite().all()
            assert all(x.isfinite() for x in metrics.values())


# ---- answers and the objective


def small_model(seed=0):
    torch.manual_seed(seed)
    return Hybrid(
        HybridConfig(
            vocab_size=257, hidden_size=32, hybrid_override_pattern="M*-", num_attention_heads=2, num_key_value_heads=2,
            head_dim=16, intermediate_size=64, mamba_num_heads=2, mamba_head_dim=32, ssm_state_size=8, chunk_size=16,
        )
    )  # fmt: skip


def objective(batch_size=16, **settings):
    settings = dict(envs="sort:3,countdown", warm_start=2, group_size=4) | settings
    return grpo.GRPO(grpo.GRPOConfig(**settings), Tokenizer("bytes"), batch_size)


def test_log_probabilities_of_sampling_are_those_of_training():
    model, tokenizer = small_model(), Tokenizer("bytes")
    generator = torch.Generator().manual_seed(0)
    answers = grpo.sample_answers(model, tokenizer, ["s1=", "c3,5>8=", "s314159="], 9, 0.7, generator)
    logprob, _ = model.logprobs(answers.ids, answers.mask, temperature=0.7)
    assert (logprob - answers.logprob).abs().max() < 1e-4
    for i, prompt in enumerate(["s1=", "c3,5>8=", "s314159="]):
        wrote = answers.mask[i].nonzero()[:, 0] + 1
        start = tokenizer.encode(prompt)
        assert answers.ids[i, : len(start) + 1].tolist() == [tokenizer.end_of_text, *start]
        assert wrote.tolist() == list(range(len(start) + 1, len(start) + 1 + len(wrote)))
        assert answers.finished[i] == (answers.ids[i, wrote[-1]] == tokenizer.end_of_text)


def test_an_answer_ends_with_its_end_of_text():
    """The end is written by the policy and learnt from; what stands behind it is padding."""
    model, tokenizer = small_model(), Tokenizer("bytes")
    with torch.no_grad():  # every token as likely as any: an end of text about once in nine answers of 30
        model.lm_head.weight.zero_()
    generator = torch.Generator().manual_seed(3)
    answers = grpo.sample_answers(model, tokenizer, ["s1="] * 40, 30, generator=generator)
    for row, mask, text, finished in zip(answers.ids, answers.mask, answers.completions, answers.finished):
        wrote = row[1:][mask].tolist()
        ends = [i for i, token in enumerate(wrote) if token == tokenizer.end_of_text]
        assert ends == ([len(wrote) - 1] if finished else []) and "endoftext" not in text


def test_a_batch_is_a_function_of_the_step_and_of_the_weights():
    model = small_model()
    for step in (0, 2, 7):
        a, b = objective().batch(model, step), objective().batch(model, step)
        assert all(torch.equal(a[name], b[name]) for name in a if name != "metrics")
    demos, answers = objective().batch(model, 1), objective().batch(model, 2)
    assert set(demos) == {"ids", "targets", "denominator"} and "advantages" in answers
    targets = demos["targets"]
    assert (targets[:, 0] == -100).all() and ((targets == 256).sum(1) == 1).all()  # no prompt, one end


def test_every_environment_is_in_every_batch_and_none_is_held_out():
    run = objective(batch_size=32)
    tasks = run.tasks(5, 8)
    assert [task.env for task in tasks] == ["sort:3", "countdown"] * 4
    assert not any(is_held_out(task) for task in tasks)
    assert all(is_held_out(task) for task in run.tasks(0, 8, held_out=True))


@pytest.mark.parametrize("settings", [
    dict(), dict(advantage="nemotron", correction="tis"), dict(surrogate="gspo", aggregate="sequence", updates=2),
    dict(surrogate="cispo", clip_low=1.0, clip_high=4.0, updates=2), dict(advantage="dr", aggregate="constant"),
    dict(overlong="filter", correction="sequence"),
])  # fmt: skip
def test_a_step_of_every_kind_moves_the_model(settings):
    model, run = small_model(), objective(**settings)
    for step in range(2, 2 + run.settings.updates):
        batch = run.batch(model, step)
        batch["advantages"] = torch.linspace(-1, 1, len(batch["ids"]))  # a fresh model earns nothing
        loss, metrics = run.loss(model, batch)
        loss.backward()
        kept = run.settings.overlong != "filter"  # a fresh model hardly ends an answer
        assert loss.isfinite() and (metrics["ratio"] == pytest.approx(1, abs=1e-4) or not kept)
        assert metrics["mismatch"] < 1.001 and {"train_reward_sort:3", "train_reward_countdown", "entropy"} <= set(
            metrics
        )
    if kept:
        assert sum(p.grad.abs().sum() for p in model.parameters() if p.grad is not None) > 0


def test_a_verifier_that_raises_costs_its_answer_and_not_the_run(monkeypatch):
    model, run, real = small_model(), objective(), rollouts.score_all

    def broken(tasks, texts):
        return real([replace(task, check=lambda answer: 1 / 0) for task in tasks], ["123"] * len(texts))

    monkeypatch.setattr(rollouts, "score_all", broken)
    batch = run.batch(model, 2)
    assert batch["metrics"]["problems"] > 0 and batch["metrics"]["train_reward"] == 0
    loss, _ = run.loss(model, batch)
    assert loss.isfinite()


def test_an_answer_that_has_not_ended_is_worth_nothing():
    task = environment("sort:2").sample(np.random.default_rng(0))
    nothing, finished = torch.zeros(2, 1), torch.tensor([True, False])
    answers = rollouts.Answers(nothing, nothing, nothing, [task.demonstration, task.demonstration], finished)
    assert grpo.judged_answers([task, task], answers) == [(1.0, None), (0.0, None)]


def test_a_little_learning_raises_the_reward():
    """Sort three digits: from demos, then from rewards."""
    model, rewards = small_model(), {}
    run = objective(envs="sort:3", warm_start=80, batch_size=64, group_size=8, entropy_coef=0.0, rl_lr=1e-3)
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3)
    for step in range(150):
        optimizer.param_groups[0]["lr"] = 5e-3 * run.lr_scale(step, 5e-3)
        if step in (80, 149):
            rewards[step] = run.evaluate(model, n=200)["reward"]
        loss, _ = run.loss(model, run.batch(model, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    assert 0.3 < rewards[80] < rewards[149] - 0.1


@pytest.mark.parametrize("settings, message", [
    (dict(envs="sart"), "unknown environment 'sart'"), (dict(batch_size=12), "batch_size=12 must be a multiple of 8"),
    (dict(advantage="best"), "best"), (dict(temperature=0.0), "temperature"), (dict(updates=3), "multiple of"),
    (dict(correction="tvs"), "tvs"),
])  # fmt: skip
def test_settings_that_cannot_be(settings, message):
    with pytest.raises(ValueError, match=message):
        objective(**settings)


# What follows needs answers that end, some early and some not at all, and rewards that are known.


def writer(seed=0):
    """Returns a model that was never trained, knows its mind, and ends an answer after about five tokens."""
    model = scramble(small_model(), seed)
    with torch.no_grad():
        model.model.embeddings.weight[:, 0] = 30.0  # the same for every token, and what the end of text looks for
        model.model.norm_f.weight[0] = 1.0
        model.lm_head.weight[:, 0] = 0.0
        model.lm_head.weight[256] = torch.tensor([0.8] + [0.0] * 31)
    return model


def change(model, seed=1):
    """Gives a model the weights of another writer."""
    model.load_state_dict(writer(seed).state_dict())


def spy(monkeypatch, where, name):
    """Returns a list that grows by (arguments, result) of each call: arguments by name, defaults too."""
    calls, real = [], getattr(where, name)

    def called(*args, **options):
        bound = inspect.signature(real).bind(*args, **options)
        bound.apply_defaults()
        calls.append((SimpleNamespace(**bound.arguments), real(*args, **options)))
        return calls[-1][1]

    monkeypatch.setattr(where, name, called)
    return calls


def rule_rewards(monkeypatch, *rewards):
    """Has the verifiers give these rewards, over and over, whatever an answer says; a string is a problem, worth 0."""
    given = itertools.cycle(rewards)

    def score_all(tasks, texts):
        verdicts = [next(given) for _ in texts]
        return [(0.0, v) if isinstance(v, str) else (float(v), None) for v in verdicts]

    monkeypatch.setattr(rollouts, "score_all", score_all)


def rule_draws(monkeypatch, *draws):
    """Has draw number i give its groups the rewards draws[i] [n][G], although answers may not have ended."""
    left = iter(draws)
    verdicts = lambda tasks, answers: [(float(r), None) for r in itertools.chain(*next(left))]  # noqa: E731
    monkeypatch.setattr(grpo, "judged_answers", verdicts)


def prompts_of(batch):
    """Returns the prompt of each row of a batch of answers, from its ids."""
    starts = batch["mask"].int().argmax(1).tolist()  # of the answer, in targets
    return [bytes(ids[1 : start + 1]).decode() for ids, start in zip(batch["ids"].tolist(), starts)]


def with_seed(seed=0, rank=0, batch_size=16, **settings):
    config = objective(batch_size, **settings).settings
    return grpo.GRPO(config, Tokenizer("bytes"), batch_size, seed, rank)


DEFAULTS = dict(kind="grpo", clip=(0.2, 0.28), aggregate="token", correction=None, kl_coef=0.0)


@pytest.mark.parametrize("settings, expected", [
    (dict(), dict()),
    (dict(surrogate="gspo", clip_low=0.03, clip_high=0.04), dict(kind="gspo", clip=(0.03, 0.04))),
    (dict(surrogate="cispo", clip_low=1.0, clip_high=4.0), dict(kind="cispo", clip=(1.0, 4.0))),
    (dict(aggregate="sequence", updates=2), dict(aggregate="sequence")),
    (dict(aggregate="constant", envs="sort:12,sort:3"), dict(aggregate="constant")),
    (dict(aggregate="sequence", overlong="filter"), dict(aggregate="sequence")),
    (dict(correction="tis"), dict(correction="tis")), (dict(correction="mask"), dict(correction="mask")),
    (dict(correction="sequence"), dict(correction="sequence")), (dict(correction="clip"), dict()),
    (dict(kl_coef=0.25), dict(kl_coef=0.25)),
])  # fmt: skip
def test_every_setting_reaches_the_loss(monkeypatch, settings, expected):
    rule_rewards(monkeypatch, 1, 0, 0.5)
    (model, run), calls = (writer(), objective(**settings)), spy(monkeypatch, grpo, "policy_loss")
    batch = run.batch(model, 2)
    run.loss(model, batch)
    ((got, _),) = calls
    assert {name: getattr(got, name) for name in DEFAULTS} == DEFAULTS | expected
    assert (got.dual_clip, got.bounds, got.kl_kind, got.kl_ratio) == (None, None, "k3+", False)
    tokens, rows = batch["mask"].sum(), batch["mask"].any(1).sum()
    longest = 20 if "envs" in settings else 11
    assert got.denominator == dict(token=tokens, sequence=rows, constant=16 * longest)[got.aggregate]
    assert got.behaviour_logprob is batch["behaviour_logprob"] and got.advantages is batch["advantages"]
    assert (got.ref_logprob is not None) == ("kl_coef" in settings)
    asked = settings.get("updates", 1) > 1 or settings.get("correction")
    assert got.old_logprob is (batch["old_logprob"] if asked else got.logprob)
    assert ("old_logprob" in batch) == bool(asked) and len(batch["ids"]) == 16 // settings.get("updates", 1)


@pytest.mark.parametrize("kind", grpo.ADVANTAGES)
def test_advantages_are_of_the_rewards_of_finished_answers(monkeypatch, kind):
    rule_rewards(monkeypatch, 1, 0, 0.5, 0, 0.25)
    model, answers = writer(), spy(monkeypatch, grpo, "sample_answers")
    batch = objective(advantage=kind).batch(model, 2)
    finished = answers[0][1].finished
    rewards = (torch.tensor([1, 0, 0.5, 0, 0.25] * 4)[:16] * finished).view(4, 4)
    assert 0 < finished.sum() < 16 and torch.equal(batch["advantages"], grpo.advantages(rewards, kind).flatten())


@pytest.mark.parametrize("aggregate", grpo.AGGREGATES)
def test_the_loss_of_a_batch_is_its_equation(monkeypatch, aggregate):
    rule_rewards(monkeypatch, 1, 0, 0.5)
    model = writer(1)
    settings = dict(temperature=0.7, entropy_coef=0.3, aggregate=aggregate, kl_coef=0.5, updates=2, overlong="filter")
    run = objective(32, **settings)
    run.batch(model, 2)
    change(model, 2)
    batch = run.batch(model, 3)
    loss, metrics = run.loss(model, batch)
    ids, mask = batch["ids"], batch["mask"]
    log_p = (model(ids[:, :-1]) / 0.7).log_softmax(-1)
    logprob = log_p.gather(2, ids[:, 1:, None])[..., 0]
    entropy = -(log_p.exp() * log_p).sum(-1)
    options = dict(aggregate=aggregate, ref_logprob=batch["ref_logprob"], kl_coef=0.5, kl_kind="k3+")
    divisor = grpo.denominator(mask, aggregate, 11)
    expected, _ = grpo.policy_loss(
        logprob, batch["old_logprob"], batch["advantages"], mask, denominator=divisor, **options
    )
    rows = (entropy * mask).sum(1)
    bonus = (rows / mask.sum(1).clamp(min=1) if aggregate == "sequence" else rows).sum() / divisor
    assert not mask.any(1).all() and loss.item() == pytest.approx((expected - 0.3 * bonus).item(), rel=1e-4)
    assert metrics["entropy"].item() == pytest.approx((rows.sum() / mask.sum()).item(), rel=1e-4)
    assert metrics["tokens"] == mask.sum() and not metrics["entropy"].requires_grad
    assert batch["metrics"].items() <= metrics.items() and metrics["kl_ref"] > 0


def test_the_numbers_of_a_batch_are_those_of_its_answers(monkeypatch):
    rule_rewards(monkeypatch, 1, 1, 1, 1, 0, "it raised", 0, 0.25, 0)
    (model, run), answers = (writer(), objective(batch_size=32)), spy(monkeypatch, grpo, "sample_answers")
    numbers = run.batch(model, 2)["metrics"]
    ((_, a),) = answers
    given = torch.tensor([1, 1, 1, 1, 0, 0, 0, 0.25, 0] * 4)[:32] * a.finished
    by_env = given.view(4, 2, 4)  # the environments take turns
    told = [sum(row) for row in a.mask.tolist()]
    assert numbers.pop("rollout_tokens_per_s") > 0 and numbers == pytest.approx({
        "train_reward": given.mean().item(), "train_reward_sort:3": by_env[:, 0].mean().item(), "problems": 3,
        "train_reward_countdown": by_env[:, 1].mean().item(), "length": sum(told) / 32,
        "truncated": 1 - a.finished.sum().item() / 32,
        "informative": sum(len(set(group.tolist())) > 1 for group in given.view(8, 4)) / 8,
    })  # fmt: skip
    assert 0 < numbers["truncated"] < 1 and 0 < numbers["informative"] < 1
    assert numbers["train_reward_sort:3"] != numbers["train_reward_countdown"]


def test_the_overlong_filter_takes_a_gradient_away_and_no_reward(monkeypatch):
    model, batches = writer(), {}
    for overlong in ("zero", "filter"):
        rule_rewards(monkeypatch, 1, 0, 0.5)
        batches[overlong] = objective(overlong=overlong).batch(model, 2)
    zero, filtered = batches.values()
    assert torch.equal(zero["advantages"], filtered["advantages"]) and torch.equal(zero["ids"], filtered["ids"])
    cut = zero["mask"].sum(1) == 11  # of answers that ended, none did at the last token
    assert 0 < cut.sum() < 16 and zero["advantages"][cut].any()
    assert torch.equal(filtered["mask"], zero["mask"] & ~cut[:, None])


def test_the_shares_of_a_batch_are_the_batch_judged_once(monkeypatch):
    rule_rewards(monkeypatch, 1, 0, 0.5)
    model, run = writer(), objective(updates=2, kl_coef=0.1)
    whole, _ = objective(updates=2).rollouts(model, 2)
    rule_rewards(monkeypatch, 1, 0, 0.5)
    judged = spy(monkeypatch, grpo, "judged_answers")
    first = run.batch(model, 2)
    change(model)  # between the two updates
    second = run.batch(model, 3)
    assert len(judged) == 1 and first["metrics"] == second["metrics"]
    for name, value in whole.items():
        assert torch.equal(torch.cat([first[name], second[name]]), value), name
    run.batch(model, 4)
    assert len(judged) == 2


def test_another_seed_step_rank_or_draw_gives_other_tasks():
    drawn = set()
    for seed, step, rank, held_out, again in [
        (0, 0, 0, False, 0), (1, 0, 0, False, 0), (0, 1, 0, False, 0), (0, 0, 1, False, 0), (0, 0, 0, True, 0),
        (0, 0, 0, False, 1),
    ]:  # fmt: skip
        found = [tuple(task.prompt for task in with_seed(seed, rank).tasks(step, 8, held_out, again)) for _ in range(2)]
        assert found[0] == found[1]
        drawn.add(found[0])
    assert len(drawn) == 6


def test_another_seed_step_or_rank_gives_other_answers_to_the_same_tasks(monkeypatch):
    model, tasks = writer(), objective().tasks(0, 4)
    monkeypatch.setattr(grpo.GRPO, "tasks", lambda self, *args, **options: tasks)
    places = [(0, 2, 0), (1, 2, 0), (0, 3, 0), (0, 2, 1), (0, 2, 0)]
    ids = [with_seed(seed, rank).batch(model, step)["ids"].tolist() for seed, step, rank in places]
    assert ids[0] == ids[4] and all(a != b for a, b in itertools.combinations(ids[:4], 2))


@pytest.mark.parametrize("entropy_coef", [0.0, 0.04])
def test_an_uninformative_group_has_no_gradient_but_that_of_entropy(monkeypatch, entropy_coef):
    rule_draws(monkeypatch, [[1] * 4, [1, 0, 0, 1], [0] * 4, [0.5, 0, 0, 0]])
    model, run, found = writer(), objective(entropy_coef=entropy_coef), []
    batch, real = run.batch(model, 2), model.logprobs

    def logprobs(*args):
        found.extend(x.requires_grad_() for x in map(torch.Tensor.detach, real(*args)))
        return found

    monkeypatch.setattr(model, "logprobs", logprobs)
    run.loss(model, batch)[0].backward()
    by_group = found[0].grad.view(4, 4, -1).abs().sum((1, 2))
    assert by_group[0] == by_group[2] == 0 < min(by_group[1], by_group[3])
    expected = -entropy_coef * batch["mask"] / batch["mask"].sum()
    assert torch.allclose(found[1].grad, expected)


DRAWS = [[0] * 4, [1, 0, 0, 0], [1] * 4, [0] * 4], [[1, 1, 0, 0], [0] * 4, [0, 0, 0, 1], [1] * 4], [
    [0] * 4, [1, 0, 1, 1], [0] * 4, [0.5, 0, 0, 0]]  # fmt: skip


def test_dynamic_sampling_draws_until_every_group_is_informative(monkeypatch):
    rule_draws(monkeypatch, *DRAWS)
    (model, run), answers = (writer(), objective(dynamic_sampling=4)), spy(monkeypatch, grpo, "sample_answers")
    batch = run.batch(model, 2)
    drawn = [[task.prompt for task in run.tasks(2, 4, again=again)] for again in range(3)]
    expected = [drawn[0][1], drawn[1][0], drawn[1][2], drawn[2][1]]
    assert len(answers) == 3 and prompts_of(batch) == [prompt for prompt in expected for _ in range(4)]
    rewards = torch.tensor([DRAWS[0][1], DRAWS[1][0], DRAWS[1][2], DRAWS[2][1]])
    assert torch.equal(batch["advantages"], grpo.advantages(rewards).flatten())
    written = torch.cat([a.mask.sum(1) for _, a in answers]).float()
    assert batch["metrics"]["informative"] == 5 / 12 and batch["metrics"]["length"] == written.mean()
    assert batch["metrics"]["train_reward"] == pytest.approx(np.mean(DRAWS))
    kept = torch.tensor([1, 4, 6, 9])[:, None] * 4 + torch.arange(4)  # rows of all that was drawn
    assert batch["mask"].sum(1).tolist() == written[kept.flatten()].tolist()
    logprob, _ = model.logprobs(batch["ids"], batch["mask"])
    assert (batch["behaviour_logprob"] - logprob).abs().max() < 1e-4


def test_dynamic_sampling_fills_up_with_uninformative_groups(monkeypatch):
    rule_draws(monkeypatch, *DRAWS)
    model, run = writer(), objective(dynamic_sampling=1)
    batch = run.batch(model, 2)
    drawn = [[task.prompt for task in run.tasks(2, 4, again=again)] for again in range(2)]
    expected = [drawn[0][0], drawn[0][1], drawn[1][0], drawn[1][2]]
    assert prompts_of(batch) == [prompt for prompt in expected for _ in range(4)]
    assert batch["metrics"]["informative"] == 3 / 8
    assert batch["advantages"].view(4, 4).any(1).tolist() == [False, True, True, True]


# ---- curricula, lengths and thoughts


def test_pass_rates_are_found_once_from_all_tries(monkeypatch):
    """The tries of a task are cut by batches of 18, and must be put together again."""
    passes, count = lambda task: sum(task.prompt.encode()) % 9, itertools.count()  # of 8 tries

    def judged(tasks, answers):
        return [(float(next(count) % 8 < passes(task)), None) for task in tasks]

    monkeypatch.setattr(grpo, "judged_answers", judged)
    (model, run), found = (
        (writer(), objective(18, group_size=3, curriculum=5)),
        spy(monkeypatch, rollouts.Curricula, "pass_rates"),
    )
    run.batch(model, 1)
    assert not found and not run.curricula.orders  # the warm start is not over
    for step in (2, 3, 4):
        run.batch(model, step)
    assert len(found) == 1
    pools = [run.curricula.pool(env) for env in run.envs]
    for env, pool, rates in zip(run.envs, pools, run.state["pass_rates"]):
        assert {task.env for task in pool} == {env.name} and not any(map(is_held_out, pool))
        assert rates.tolist() == [passes(task) / 8 for task in pool] and len(pool) == 5 * 18 // 3 // 2
    others = [
        with_seed(1, curriculum=5),
        with_seed(0, 1, curriculum=5),
        with_seed(envs="countdown,sort:3", curriculum=5),
    ]
    prompts = [{task.prompt for env in other.envs for task in other.curricula.pool(env)} for other in (run, *others)]
    assert all(len(a & b) < len(a) / 2 for a, b in itertools.combinations(prompts, 2))


def ordered(rates, **settings):
    """Returns an objective whose pools have these pass rates."""
    run = objective(**settings)
    run.state["pass_rates"] = [torch.as_tensor(r) for r in rates]
    run.curricula.start(run.state["pass_rates"])
    return run


def test_a_curriculum_goes_from_easy_to_hard():
    settings = dict(envs="sort:12,sort:9", warm_start=10, curriculum=20, batch_size=160)  # no prompt comes twice
    drawn = {}
    for step, aim in [(10, 0.7), (20, 0.55), (30, 0.4), (99, 0.4)]:
        run = ordered([torch.linspace(0, 0.99, 200)] * 2, **settings)
        rate = {
            task.prompt: r.item() for pool in run.curricula.pools for task, r in zip(pool, torch.linspace(0, 0.99, 200))
        }
        tasks = run.tasks(step, 40)
        assert [task.env for task in tasks] == ["sort:12", "sort:9"] * 20
        for env, pool, curriculum in zip(range(2), run.curricula.pools, run.curricula.orders):
            mine = [task.prompt for task in tasks[env::2]]
            assert len(set(mine)) == 20 and set(mine) <= {task.prompt for task in pool}
            assert curriculum.left.sum() == 180
            assert np.mean([rate[prompt] for prompt in mine]) == pytest.approx(aim, abs=0.1)
        again = ordered([torch.linspace(0, 0.99, 200)] * 2, **settings)
        assert [task.prompt for task in again.tasks(step, 40)] == [task.prompt for task in tasks]
        drawn[step] = {task.prompt for task in tasks}
    assert drawn[30] != drawn[99] and len(run.tasks(10, 3)) == 3
    assert all(is_held_out(task) for task in run.tasks(10, 8, held_out=True))


def test_the_pass_rate_of_a_batch_is_that_of_its_tasks():
    rates = torch.linspace(0, 0.95, 20)
    model, run = writer(), ordered([rates, rates], curriculum=10)
    batch = run.batch(model, 3)
    known = {task.prompt: rate.item() for pool in run.curricula.pools for task, rate in zip(pool, rates)}
    found = [known[prompt] for prompt in prompts_of(batch)[::4]]
    assert batch["metrics"]["pass_rate"] == pytest.approx(np.mean(found), abs=1e-6)
    assert "pass_rate" not in objective().batch(model, 3)["metrics"]


def test_an_environment_with_too_few_unsolved_tasks_gets_fresh_ones(monkeypatch):
    monkeypatch.setattr(grpo, "POOL", 4)
    run = ordered([[1.0, 1.0, 1.0, 0.5], [1.0, 0.5, 1.0, 0.5]], curriculum=10)  # two of each in a batch
    pools = [[task.prompt for task in pool] for pool in run.curricula.pools]
    fresh = set()
    for step in (2, 3, 4):
        tasks = run.tasks(step, 4)
        assert [task.env for task in tasks] == ["sort:3", "countdown"] * 2
        assert {task.prompt for task in tasks[1::2]} == {pools[1][1], pools[1][3]}
        fresh |= {task.prompt for task in tasks[::2]}
        assert not any(map(is_held_out, tasks)) and set(run.curricula.drawn_rates) == {0.5}
    assert len(fresh) == 6 and not fresh & set(pools[0]) and [len(pool) for pool in pools] == [4, 4]


def think_on(n, envs="chain:2,sort:3", **settings):
    run = objective(envs=envs, **settings)
    return run, run.tasks(0, n)


def test_the_parts_of_an_answer():
    _, (thinks, plain) = think_on(2)
    assert thinks.parts("3+5=1\n</think>5") == ("3+5=1\n", "5")
    assert thinks.parts("3+</think>5=1\n</think>5") == ("3+</think>5=1\n", "5")
    assert thinks.parts("3+5=1\n5") == ("3+5=1\n5", "")  # never closed
    assert plain.parts("123") == ("", "123")


def test_right_answers_gain_by_being_short_and_wrong_ones_do_not():
    run, (thinks, plain) = think_on(2, length_coef=0.5)
    tasks = [thinks] * 4 + [plain] * 4 + [thinks] * 4
    texts = ["12</think>5", "123456</think>5", "</think>555", "123456"] + ["1", "12", "123", "12345"]
    texts += ["</think>5", "12</think>5", "12</think>5", "1234</think>5"]
    rewards = torch.tensor([[1.0, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]])
    base = grpo.advantages(rewards, run.settings.advantage)
    A = grpo.shaped_advantages(run.settings, rewards, tasks, texts, run.tokenizer).view(3, 4)
    thought, answer = torch.tensor([1, 0, 0, 0]), torch.tensor([1, 1, 0, 0])  # a wrong one is as long as the longest
    assert close(A[0] - base[0], sum(0.5 * (u - u.float().mean()) for u in (thought, answer)), 1e-5)
    assert not A[1].any() and close(A[2], [0.25, 0, 0, -0.25], 1e-6)  # equal rewards: the coefficient, and no more
    assert torch.equal(
        grpo.shaped_advantages(objective().settings, rewards, tasks, texts, run.tokenizer), base.flatten()
    )


def test_length_control_is_learnt_from_and_not_reported(monkeypatch):
    rule_draws(monkeypatch, [[1] * 4] * 4)
    model, run = writer(), objective(length_coef=0.5)
    batch = run.batch(model, 2)
    lengths = batch["mask"].sum(1).view(4, 4)
    assert batch["metrics"]["train_reward"] == 1 and batch["metrics"]["informative"] == 0
    for A, length in zip(batch["advantages"].view(4, 4), lengths):
        assert length[A.argmax()] == length.min() and length[A.argmin()] >= length[A.argmax()]


def test_low_effort_marks_prompts_that_think():
    _, plain = think_on(400)
    run, marked = think_on(400, low_effort=1.0)
    assert [task.prompt for task in marked[::2]] == ["~" + task.prompt for task in plain[::2]]
    assert [task.prompt for task in marked[1::2]] == [task.prompt for task in plain[1::2]]
    assert all(a.demonstration == b.demonstration and a.check("5") == b.check("5") for a, b in zip(marked, plain))
    assert not any(task.prompt.startswith("~") for task in run.tasks(0, 40, held_out=True))
    _, some = think_on(400, low_effort=0.25)
    assert 30 < sum(task.prompt.startswith("~") for task in some[::2]) < 70


def test_low_effort_changes_the_rewards_of_marked_prompts_only():
    run, (marked, plain) = think_on(2, low_effort=1.0, low_effort_tokens=4, advantage="dr")
    other = replace(marked, prompt=marked.prompt[1:])
    texts, rewards = ["</think>5", "12</think>5", "12345678</think>5", "1234"] * 3, torch.tensor([[1.0, 1, 1, 0]] * 3)
    A = grpo.shaped_advantages(
        run.settings, rewards, [marked] * 4 + [plain] * 4 + [other] * 4, texts, run.tokenizer
    ).view(3, 4)
    shaped = torch.tensor([[1.1, 1.05, 0.9, 0], [1, 1, 1, 0], [1, 1, 1, 0]])
    assert close(A, shaped - shaped.mean(1, keepdim=True), 1e-6)


def demonstrations_of(run, tasks):
    """Returns for each of tasks (prompt, what was written behind it, the part of it that is a target) and checks ids.

    A token that is no target is written as a dot.
    """
    found, batch = [], grpo.demonstrations(run.settings, small_model(), tasks, run.tokenizer, np.random.default_rng(0))
    for ids, targets in zip(batch["ids"].tolist(), batch["targets"].tolist()):
        assert all(target in (-100, following) for target, following in zip(targets, [*ids[1:], 256]))
        ids = ids[1:]
        while ids and ids[-1] == 256:
            ids.pop()
        text = bytes(ids).decode()
        start = text.index("=", 0) + 1  # the end of the question
        start += next((len(end) for end in ("<think></think>", "<think>\n") if text.startswith(end, start)), 0)
        assert targets[:start] == [-100] * start and targets[len(ids)] == 256
        assert set(targets[len(ids) + 1 :]) <= {-100}
        shown = "".join("." if t < 0 else chr(t) for t in targets[start : len(ids)])
        found.append((text[:start], text[start:], shown))
    return found


def test_a_demonstration_is_shown_whole():
    run, tasks = think_on(20)
    assert demonstrations_of(run, tasks) == [(task.prompt, task.demonstration, task.demonstration) for task in tasks]


@pytest.mark.parametrize("settings, mark", [(dict(cut_thoughts=1.0), ""), (dict(low_effort=1.0), "~")])
def test_thoughts_are_cut_at_whole_lines_and_only_low_effort_learns_to_close_them(settings, mark):
    run, tasks = think_on(60, envs="chain:3,sort:3", **settings)
    kept = []
    for task, (prompt, written, shown) in zip(tasks, demonstrations_of(run, tasks)):
        if not task.thinks:
            assert (prompt, written, shown) == (task.prompt, task.demonstration, task.demonstration)
            continue
        thought, _, answer = task.demonstration.rpartition("</think>")
        left = written.removesuffix("</think>" + answer)
        kept.append(left.count("\n"))
        assert prompt == task.prompt and prompt.startswith(mark) and thought.startswith(left) and left != thought
        assert left == "".join(thought.splitlines(keepends=True)[: kept[-1]])
        assert shown == left + (THINK_END if mark else "........") + answer
    assert len(kept) == 30 and set(kept) == {0, 1, 2}


def test_the_demonstrations_of_another_step_are_cut_elsewhere(monkeypatch):
    run, tasks = think_on(16, envs="chain:3", cut_thoughts=1.0)
    monkeypatch.setattr(run, "tasks", lambda step, n: [replace(tasks[0], demonstration="</think>5"), *tasks[1:]])
    cuts = [run.batch(small_model(), step)["targets"] for step in (0, 0, 1)]  # a thought without lines stays empty
    assert torch.equal(cuts[0], cuts[1]) and cuts[0].tolist() != cuts[2].tolist()


def test_demonstrations_without_thoughts_are_answers_alone():
    run, tasks = think_on(20, no_thoughts=1.0)
    for task, found in zip(tasks, demonstrations_of(run, tasks)):
        answer = task.demonstration.rpartition("</think>")[2]
        prompt = task.prompt.replace("<think>\n", "<think></think>")
        assert found == (prompt, answer, answer)


def test_shares_of_demonstrations_are_cut_and_not_thought():
    run, tasks = think_on(400, envs="chain:3", batch_size=4, cut_thoughts=0.25, no_thoughts=0.5)
    found = demonstrations_of(run, tasks)
    no_thought = sum(prompt.endswith("</think>") for prompt, _, _ in found)
    cut = sum("........" in shown for _, _, shown in found)
    assert 70 < cut < 130 and 160 < no_thought < 240
    assert all(
        task.demonstration == shown for task, (_, written, shown) in zip(tasks, found) if written.count("\n") == 3
    )  # noqa: E501


# ---- policies beside the one in training


def saved(model, folder):
    model.save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("group_size", [1, 4])
def test_advantages_of_teachers_are_by_token_from_the_teacher_of_the_task(tmp_path, group_size):
    model, teachers = writer(), [writer(1), writer(2)]
    with torch.no_grad():
        teachers[1].lm_head.weight.mul_(20)  # sure of itself, and so nearly always of another mind
    folders = ", ".join(saved(teacher, tmp_path / str(i)) for i, teacher in enumerate(teachers))
    run = objective(teachers=folders, group_size=group_size, temperature=0.7)
    batch = run.batch(model, 2)
    ids, mask = batch["ids"], batch["mask"]
    student = model.logprobs(ids, mask, 0.7)[0]
    expected = torch.stack([teacher.logprobs(ids, mask, 0.7)[0] - student for teacher in teachers]).clamp(-20, 20)
    whose = torch.tensor([int(prompt.startswith("c")) for prompt in prompts_of(batch)])
    assert whose.tolist() == ([0] * group_size + [1] * group_size) * (8 // group_size)
    expected = expected[whose, torch.arange(16)]
    assert close(batch["advantages"], expected.detach(), 1e-4) and batch["advantages"].min() == -20
    assert close(batch["old_logprob"], student.detach(), 1e-4)
    assert not any(p.requires_grad for teacher in run.teachers.values() for p in teacher.parameters())
    loss, _ = run.loss(model, batch)
    loss.backward()
    assert loss.isfinite() and model.lm_head.weight.grad.any()


def test_a_teacher_is_named_for_every_environment(tmp_path):
    folder = saved(small_model(), tmp_path)
    with pytest.raises(ValueError, match="^--teachers names 1 runs, --envs 2 environments$"):
        objective(teachers=folder)
    with pytest.raises(ValueError, match="^--group_size=1 .*--teachers$"):
        objective(group_size=1)


def test_a_clipped_correction_takes_the_sampler_for_the_old_policy(monkeypatch):
    rule_rewards(monkeypatch, 1, 0, 0.5)
    model, run = writer(), objective(correction="clip", sampler_every=3, temperature=0.7)
    batch = run.batch(model, 2)
    assert batch["old_logprob"] is not None and torch.equal(batch["old_logprob"], batch["behaviour_logprob"])
    assert run.loss(model, batch)[1]["ratio"].item() == pytest.approx(1, abs=1e-4)
    change(model)
    batch = run.batch(model, 3)
    mask, logprob = batch["mask"], model.logprobs(batch["ids"], batch["mask"], 0.7)[0]
    ratio = (logprob - batch["behaviour_logprob"]).exp()[mask].mean().item()
    assert run.loss(model, batch)[1]["ratio"].item() == pytest.approx(ratio, rel=1e-3) and abs(ratio - 1) > 0.1


@pytest.mark.parametrize("every", [1, 3])
def test_answers_are_those_of_the_copy_until_it_is_renewed(every):
    """Every step has weights of its own; those of step 2 are copied, and those of step 5."""
    model, run = writer(2), objective(sampler_every=every, correction="tis")
    for step in range(2, 7):
        change(model, step)
        batch = run.batch(model, step)
        sampler = writer(step if every == 1 else step - (step - 2) % 3)
        logprob = sampler.logprobs(batch["ids"], batch["mask"])[0]
        assert close(batch["behaviour_logprob"], logprob.detach(), 1e-4), step
        assert close(batch["old_logprob"], model.logprobs(batch["ids"], batch["mask"])[0].detach(), 1e-4)


def test_the_reference_is_the_policy_after_the_warm_start():
    model, run = writer(), objective(kl_coef=0.1, temperature=0.7)
    run.batch(model, 1)
    change(model, 1)  # by the warm start's last step
    for step in (2, 3, 4):
        batch = run.batch(model, step)
        reference = writer(1).logprobs(batch["ids"], batch["mask"], 0.7)[0]
        assert close(batch["ref_logprob"], reference.detach(), 1e-4)
        _, metrics = run.loss(model, batch)
        assert (metrics["kl_ref"] > 0.01) == (step > 2)
        change(model, step)


def test_at_temperature_0_an_answer_is_the_likeliest_for_every_generator():
    model, tokenizer, prompts = writer(), Tokenizer("bytes"), ["s123=", "c3,5>8=", "s3="]
    found = [
        grpo.sample_answers(model, tokenizer, prompts, 9, 0, torch.Generator().manual_seed(seed)) for seed in (0, 1)
    ]
    assert found[0].completions == found[1].completions and torch.equal(found[0].ids, found[1].ids)
    for ids, mask in zip(found[0].ids, found[0].mask):
        likeliest = model(ids[None, :-1])[0].argmax(-1)
        assert torch.equal(likeliest[mask], ids[1:][mask])
    assert not found[0].logprob.any()


def test_an_evaluation_has_its_own_temperature_prompts_and_mean(monkeypatch):
    rule_rewards(monkeypatch, 1, 0.5, 0.25, "it raised")
    run = objective(temperature=0.7, eval_temperature=1.3)
    (model, sampled), tasks = (writer(), spy(monkeypatch, grpo, "sample_answers")), run.tasks(0, 20, held_out=True)
    model.train()
    found = run.evaluate(model, n=10)
    ((asked, answers),) = sampled
    assert asked.temperature == 1.3 and asked.prompts == [task.prompt for task in tasks] and model.training
    rewards = torch.tensor([1, 0.5, 0.25, 0] * 5) * answers.finished
    sort, countdown = rewards[::2].mean().item(), rewards[1::2].mean().item()
    assert sort != countdown and found == pytest.approx(
        {"reward_sort:3": sort, "reward_countdown": countdown, "reward": (sort + countdown) / 2}
    )
    run.batch(model, 2)
    assert sampled[1][0].temperature == 0.7
    objective(eval_temperature=0.0).evaluate(model, n=5)
    assert sampled[2][0].temperature == 0


def test_an_objective_goes_on_where_its_state_was_saved(tmp_path):
    settings = dict(updates=2, curriculum=8, sampler_every=6, kl_coef=0.1)
    model, run = writer(), objective(**settings)
    run.batch(model, 2)
    torch.save(run.state_dict(), tmp_path / "state.pt")
    again = objective(**settings)
    again.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert [c.left.sum() for c in again.curricula.orders] == [14, 14]  # two of sixteen were drawn
    for step in (3, 4, 5, 6):  # the rest of a batch; one from a copy of old weights, with tasks that are left
        change(model, step)
        expected, got = run.batch(model, step), again.batch(model, step)
        for name in expected:
            same = torch.equal if name != "metrics" else lambda a, b: a["train_reward"] == b["train_reward"]
            assert same(expected[name], got[name]), (step, name)
    old = writer(0).logprobs(got["ids"], got["mask"])[0]
    assert close(got["behaviour_logprob"], old.detach(), 1e-4)


def test_a_state_that_was_saved_is_not_written_on():
    model, run = writer(), objective(curriculum=8)
    run.batch(model, 2)
    state = run.state_dict()
    again = objective(curriculum=8)
    again.load_state_dict(state)
    again.batch(model, 3)
    assert state["left"][0].sum() == 14 and run.curricula.orders[0].left.sum() == 14


@pytest.mark.parametrize("settings, message", [
    (dict(surrogate="ppo"), "surrogate='ppo', expected one of grpo, gspo, cispo"),
    (dict(aggregate="mean"), "aggregate='mean', expected one of token, sequence, constant"),
    (dict(overlong="keep"), "overlong='keep', expected one of zero, filter"),
    (dict(correction="no"), "correction='no', expected one of , clip, tis, mask, sequence"),
    (dict(cut_thoughts=0.6, no_thoughts=0.5), "--cut_thoughts and --no_thoughts .*at most 1"),
])  # fmt: skip
def test_settings_that_contradict_are_refused_in_a_line(settings, message):
    with pytest.raises(ValueError, match=f"^{message}[^\n]*$"):
        grpo.GRPOConfig(**settings)
    assert grpo.GRPOConfig(cut_thoughts=0.5, no_thoughts=0.5)


def test_parts_of_different_width_are_joined():
    joined = rollouts.joined([torch.ones(1, 2, dtype=torch.int64), torch.zeros(2, 3, dtype=torch.int64)], 7)
    assert joined.tolist() == [[1, 1, 7], [0, 0, 0], [0, 0, 0]]
    assert rollouts.joined([torch.ones(1), torch.zeros(2)]).tolist() == [1, 0, 0]


# ---- sessions that several calls share, and which prompts are drawn


def test_calls_that_share_a_session_answer_as_calls_that_do_not():
    """Also after other weights, other prompts, a cut of the batch, and a call that needs more room."""
    model, tokenizer, session, generator = writer(), Tokenizer("bytes"), grpo.DecodeSession(), torch.Generator()
    calls = [(["s1="] * 30 + ["c3,5>8="] * 40, 9), (["s3141592="] * 70, 9), (["c3,5>8=", "s1="] * 35, 60)]
    for seed, (prompts, longest) in enumerate(calls):
        change(model, seed)
        a = grpo.sample_answers(model, tokenizer, prompts, longest, 1.0, generator.manual_seed(seed), session=session)
        alone = torch.Generator().manual_seed(seed)
        b = grpo.sample_answers(model, tokenizer, prompts, longest, 1.0, alone)
        assert (
            torch.equal(a.ids, b.ids)
            and torch.allclose(a.logprob, b.logprob, atol=1e-6)
            and a.completions == b.completions
        )
        again, _ = model.logprobs(a.ids, a.mask)
        assert (again - a.logprob).abs().max() < 1e-4 and len(set(a.mask.sum(1).tolist())) > 3


def test_sessions_under_autocast_have_the_weights_of_now_in_16_bits():
    model, tokenizer, session = writer(), Tokenizer("bytes"), grpo.DecodeSession()
    for seed in (0, 1):
        change(model, seed)
        with torch.autocast("cpu", torch.bfloat16):
            a = grpo.sample_answers(
                model, tokenizer, ["s1="] * 8, 9, 1.0, torch.Generator().manual_seed(0), session=session
            )
            again, _ = model.logprobs(a.ids, a.mask)
        assert (again - a.logprob).abs().max() < 0.05
        for name, weight in model.named_parameters():
            theirs = session.copy.get_parameter(name)
            assert torch.equal(theirs, weight.to(theirs.dtype)) and not theirs.requires_grad
        assert session.copy.lm_head.weight.dtype == torch.bfloat16 and model.lm_head.weight.dtype == torch.float32
        assert session.copy.model.embeddings.weight.dtype == torch.float32


def autocast():
    return torch.autocast("cpu", torch.bfloat16)


def gradients(model, loss):
    """Returns the gradient of a loss by every parameter, as one vector; None would be a weight that has none."""
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


def after_a_change(model, call, separate):
    """Returns call(), and the gradients of what is learnt behind it, after the model was used and its weights changed.

    separate: whether each part has a context of autocast of its own, or all share one.
    """
    ids, mask = torch.arange(20).view(2, 10), torch.ones(2, 9)
    around, of_each = (contextlib.nullcontext, autocast) if separate else (autocast, contextlib.nullcontext)
    with around():
        with of_each():
            model.logprobs(ids, mask)
            with torch.no_grad():
                model.logprobs(ids, mask)
                for p in model.parameters():
                    p.mul_(1.5)
        with of_each():
            found = call()
        with of_each():
            logprob, _ = model.logprobs(ids, mask)
            return found, gradients(model, logprob.sum())


WHAT_SAMPLES = {
    "answers": lambda model, run: (
        grpo.sample_answers(model, run.tokenizer, ["s1=", "c3,5>8="], 9, 1.0, torch.Generator().manual_seed(0)).logprob
    ),
    "answers of a session": lambda model, run: (
        run.answer(model, run.tasks(0, 4), torch.Generator().manual_seed(0)).logprob
    ),
    "teachers": lambda model, run: rollouts.teacher_logprobs(
        {"countdown": model}, run.tasks(0, 2), torch.arange(20).view(2, 10), torch.ones(2, 9), 1.0
    ),
    "other policies": lambda model, run: run.batch(model, 2)["old_logprob"],
    "evaluation": lambda model, run: torch.tensor(list(run.evaluate(model, 8).values())),
    "completions": lambda model, run: completion_logprob(model, run.tasks(0, 2), ["12", "3+5"], run.tokenizer),
}


@pytest.mark.parametrize("what", WHAT_SAMPLES)
def test_sampling_may_share_a_context_of_autocast_with_learning(monkeypatch, what):
    verdicts = lambda tasks, answers: [(float(sum(map(ord, text))), None) for text in answers.completions]  # noqa: E731
    monkeypatch.setattr(grpo, "judged_answers", verdicts)
    found = []
    for separate in (False, True):
        model, run = writer(), objective(updates=2)
        found.append(after_a_change(model, lambda model=model, run=run: WHAT_SAMPLES[what](model, run), separate))
    (together, gradient), (alone, expected) = found
    assert torch.equal(together, alone) and torch.equal(gradient, expected) and alone.abs().max() > 0.1


@pytest.mark.parametrize("settings", [dict(), dict(updates=2, kl_coef=0.1), dict(correction="tis", sampler_every=2)])
def test_a_step_of_rewards_in_one_context_of_autocast_is_the_step_in_two(monkeypatch, settings):
    """Over three steps, each of which changes the weights: by hand, as an optimiser would, inside of the context."""
    gradient_of = {}
    for separate in (False, True):
        rule_rewards(monkeypatch, 1, 0, 0.5)
        model, run, found = writer(), objective(**settings), []
        around, of_each = (contextlib.nullcontext, autocast) if separate else (autocast, contextlib.nullcontext)
        with around():
            for step in (2, 3, 4):
                with of_each():
                    batch = run.batch(model, step)
                with of_each():
                    loss, _ = run.loss(model, batch)
                found.append(gradients(model, loss))
                with torch.no_grad():
                    for p in model.parameters():
                        p.mul_(1.2)
        gradient_of[separate] = torch.stack(found)
    assert torch.equal(gradient_of[False], gradient_of[True]) and gradient_of[True].abs().amax(1).min() > 1e-4


def test_alike_prompts_are_read_once():
    model, read = writer(), []
    model.model.embeddings.register_forward_pre_hook(lambda module, args: read.append(args[0].shape))
    list(generate(model, [[1, 2, 3]] * 5 + [[4, 5]] * 3, 2, generator=torch.Generator().manual_seed(0)))
    assert read == [(2, 3), (8, 1)]


def test_focus_gives_prompts_to_what_still_teaches(monkeypatch):
    """sort is always solved, so of 64 prompts countdown gets its own eighth and nearly all of what is free."""
    right = lambda tasks, answers: [(float(t.env == "sort:3" or i % 2), None) for i, t in enumerate(tasks)]  # noqa: E731  # noqa: E501
    monkeypatch.setattr(grpo, "judged_answers", right)
    model, run = writer(), objective(256, focus=0.75, warm_start=0)
    shares = []
    for step in range(60):
        tasks = run.tasks(step, 64)
        shares.append(sum(task.env == "countdown" for task in tasks) / 64)
        assert [task.env for task in tasks[:16]] == ["sort:3", "countdown"] * 8
        differ = torch.tensor([task.env == "countdown" for task in tasks])
        run.state["focus"] = rollouts.track_informative(run.state.get("focus"), run.envs, tasks, differ)
    assert shares[0] == 0.5 and 0.8 < np.mean(shares[-10:]) <= 0.875
    held_out = run.tasks(0, 64, held_out=True)
    assert sum(task.env == "countdown" for task in held_out) == 32
    run.batch(model, 60)
    other = objective(256, focus=0.75, warm_start=0)
    other.load_state_dict(run.state_dict())
    assert [task.prompt for task in other.tasks(61, 64)] == [task.prompt for task in run.tasks(61, 64)]
