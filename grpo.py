"""GRPO and its fixes: reinforcement learning from groups of answers, the mean of a group in the place of a critic.

Papers   GRPO, arXiv:2402.03300; RLOO, 2402.14740; DAPO, 2503.14476; Dr. GRPO, 2503.20783; CISPO (MiniMax-M1),
         2506.13585; GSPO, 2507.18071; decoupled PPO, 2110.00641, and AReaL, 2505.24298; Nemotron 3 Nano, Super, Ultra,
         2512.20848, 2604.12374, 2606.15007 (leave-one-out advantages, curriculum, length control, MOPD).
Idea     Answer each prompt G times; let a program judge the answers; raise the log-probability of those above the mean
         of their group and lower that of those below. The rest is repair: what a group's spread, an answer's length, a
         clipped ratio, or a sampler that is not quite the policy does to that gradient, and it is a few lines for each.
Picture  B prompts --sampler x G--> answers [BG, T] --verify--> rewards [B, G] --advantages--> A [BG]
                        |                                                                        |
            behaviour_logprob [BG, T]    old_logprob [BG, T]    logprob [BG, T], has a gradient  |
                        '------- w ----------'   '------- r ---------'                           |
                          = sg[old / behaviour]    = new / old                                   v
                      loss = sum over tokens of  - w min(r A, clip(r) A) + kl_coef KL(new || ref),  / denominator
Symbols  code               paper         meaning
         logprob            log pi_theta  of the sampled token under the weights in training
         old_logprob        log pi_old    at the start of this batch's updates (pi_prox of decoupled PPO)
         behaviour_logprob  log mu        under what sampled it (pi_gen), stale or of lower precision
         ref_logprob        log pi_ref    under what kl_coef (beta) ties the policy to
         advantages         A             how much better than its group; an answer's, or (MOPD) a token's
         clip               eps_lo, hi    the ratio r counts inside [1 - lo, 1 + hi]
         mask               m             1 where the policy wrote the token, stop token included; 0 elsewhere

Which flags give which algorithm: those of `train.py --recipe=grpo`, with --entropy_coef=0, which none of them has; in
brackets what only the functions take; clip is clip_low, clip_high.

    algorithm             --advantage  --surrogate  --clip_...  --aggregate  further
    GRPO                  grpo         grpo         .2, .2      sequence     --kl_coef=.04
    DAPO                  grpo         grpo         .2, .28     token        --dynamic_sampling=4 [overlong_penalty]
    Dr. GRPO              dr           grpo         .2, .2      constant
    RLOO                  rloo         grpo         inert       constant     --updates=1 [denominator=B]
    GSPO                  grpo         gspo         3e-4, 4e-4  sequence
    CISPO                 grpo         cispo        1, 4        token        lo = 1: no lower bound; r up to 5
    dual clip (verl)      any          grpo         .2, .2      any          [dual_clip=3]
    naive PPO             any          grpo         .2, .2      any          --correction=clip
    decoupled PPO, AReaL  batch        grpo         .2, .2      token        --correction=tis --updates=4 [(0, 5)]
    TIS                   any          any          any         any          --correction=tis
    IcePop                any          any          any         any          --correction=mask
    Nemotron 3 Nano       nemotron     grpo         .2, .28     token        --correction=sequence --overlong=filter
    Nemotron 3 Super      nemotron     grpo         .2, .28     token        --correction=tis [(0, 5), A in +-50]
    Nemotron 3 Ultra      nemotron     grpo         .2, .28     token        --correction=tis [(.2, 5), A in +-20]
    MOPD (Ultra)          any          grpo         .2, .28     token        --teachers=... --group_size=1, as IcePop

    Nano, Super and Ultra update once per batch: r = 1, the clip is inert, w is all there is. Nano and Super drop rows
    that are not `faithful`. Super and Ultra set A := -5 on the tokens of malformed messages: one more reason that A may
    be [BG, T].

Read     The table above, 1, 2; then 4 and 5, where an answer is sampled, judged and learnt from. `python grpo.py`
         compares five losses, `python grpo.py bench` times answers on a GPU; `python train.py --recipe=grpo` learns
         several tasks at once; grpo_studies.py puts Nemotron's claims to the test.
Limits   Equal rewards give advantages of exactly 0; the first update of a batch has the same gradient under grpo, gspo
         and cispo; behaviour = old is PPO; one token and one teacher make MOPD the reverse KL: see tests/test_grpo.py.
Differs  Standard deviations are of a sample (1 / (G - 1)), as in TRL, with NVIDIA's eps of 1e-6, and groups without
         spread are set to 0 rather than left to it. CISPO's upper bound is 1 + hi, as in the paper; TRL's is hi. Length
         control is the paper's, not the released server's; the recipe adds it to advantages, not to rewards, of right
         answers only: else in a group of equal rewards its coefficient cancels, and the shortest wrong answer wins.
         Dynamic sampling fills a batch from all environments: those solved, or hopeless, lose their share of it.
         Nemotron's reports say masked weights; the table follows the released configurations: a sequence mask (Nano),
         TIS (Super, Ultra). k3 is capped at e^20, not at 10 (verl): an exploding estimate is what the metric is for.
         The recipe's KL is k3+, for the gradient of the reverse KL; GRPO's own is k3. Neither is known to be better.
"""

import copy
import json
import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from common.data import Tokenizer
from common.tasks import THINK_END, cut_trace, environment, sample_task, score_all, without_thought
from decoding import DecodeSession, generate
from kernels import at_least_float32, expect
from nano_hybrid import Hybrid, HybridConfig

# fmt: off
PRESETS = {
    # For grpo.py's tasks of a few dozen bytes: 0.4 M and 7 M parameters.
    "grpo-tiny": HybridConfig(
        hybrid_override_pattern="M*-M*-", hidden_size=96, num_attention_heads=4, num_key_value_heads=4, head_dim=24,
        intermediate_size=384, mamba_num_heads=4, mamba_head_dim=48, ssm_state_size=32, chunk_size=32,
    ),
    "grpo": HybridConfig(
        hybrid_override_pattern="M*-M*-M*-M*-", hidden_size=320, num_attention_heads=5, num_key_value_heads=5,
        head_dim=64, intermediate_size=1280, mamba_num_heads=10, mamba_head_dim=64, ssm_state_size=32, chunk_size=32,
    ),
}
# fmt: on

# ---- 1. advantages ------------------------------------------------------------------------------------------------
#
# Of 0/1 rewards with success rate p, a group's mean update is proportional to p (1 - p) under "dr" and "rloo", and to
# sqrt(p (1 - p)) under "grpo", which so lifts prompts that are nearly always or nearly never solved. Both vanish at
# p = 0 and p = 1: such a group is silent, and dynamic sampling draws another.

EPS = 1e-6  # added to standard deviations: NVIDIA's; TRL has 1e-4
ADVANTAGES = ("grpo", "nemotron", "rloo", "dr", "batch")


def choose(name, value, choices):
    """Raises ValueError, with the choices, unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{name}={value!r}, expected one of {', '.join(map(str, choices))}")


def informative(rewards):
    """Returns bool [B]: whether the rewards [B, G] of a group differ. If not, it is silent: its advantages are all 0.

    Silence is not harmless: its tokens count in the token mean, so the step shrinks as training succeeds, and with
    kl_coef > 0 they still have a gradient. `keep_only(mask, informative(rewards))` takes them out of both.
    """
    return rewards.amax(1) != rewards.amin(1)


def leave_one_out(rewards):
    """Returns (mean, std), each [B, G]: of the rewards [B, G] of the *others* in the group, G - 1 >= 1 of them.

    std is unbiased, and exactly 0 where the others are equal: compared, because a computed one may round to 1e-9.
    """
    B, G = rewards.shape
    off_diagonal = ~torch.eye(G, dtype=torch.bool, device=rewards.device)
    others = rewards[:, None].expand(B, G, G)[:, off_diagonal].view(B, G, G - 1)
    mean = others.mean(-1)
    std = ((others - mean[..., None]).square().sum(-1) / max(1, G - 2)).sqrt()
    return mean, std.masked_fill(others.amax(-1) == others.amin(-1), 0)


def advantages(rewards, kind="grpo"):
    """Returns A [B, G], float32: how much better each answer is than its group. rewards [B, G]: B prompts, G answers.

    grpo      (R - mean) / std of the group                         GRPO, section 4.1.2
    dr        R - mean: unbiased but for the factor (G - 1) / G     Dr. GRPO
    rloo      R - mean of the others = G / (G - 1) (R - mean)       RLOO
    nemotron  (R - mean of the others) / std of the others; where that is 0, no division. One success in 16 so gets 1
              and each failure -0.258, where "grpo" gives 3.75 and -0.25.        Nemotron 3 Nano; NeMo RL
    batch     (R - mean) / std of all B G rewards, so prompts keep their weight; never on a micro-batch.      TRL

    A group of equal rewards, and so one of a single answer, is exactly 0 in all. Only with "grpo" and "nemotron" may
    environments have rewards of different ranges. Raises ValueError for another kind or shape.
    """
    choose("kind", kind, ADVANTAGES)
    if rewards.dim() != 2:
        raise ValueError(f"rewards is {list(rewards.shape)}, expected [B, G]: G answers for each of B prompts")
    rewards = at_least_float32(rewards)
    G = rewards.shape[1]
    if G < 2:
        return torch.zeros_like(rewards)
    A = rewards - rewards.mean(1, keepdim=True)
    if kind == "grpo":
        A = A / (rewards.std(1, keepdim=True) + EPS)
    elif kind == "batch":
        A = A / (rewards.std() + EPS)
    elif kind == "rloo":
        A = A * (G / (G - 1))
    elif kind == "nemotron":
        mean, std = leave_one_out(rewards)
        A = torch.where(std > 0, (rewards - mean) / (std + EPS), rewards - mean)
    return A.masked_fill(~informative(rewards)[:, None], 0)  # R - mean of equal numbers may round to 1e-8


def keep_only(mask, keep):
    """Returns mask [B, T] with the rows that are not to be kept set to 0.

    keep: bool, one for a row, or one for each group of consecutive rows. The overlong filter of DAPO and Nemotron 3
    Nano is `keep_only(mask, ~truncated)`: an answer cut off at the limit has no gradient, but its reward still counts
    in its group's baseline.
    """
    if len(mask) % max(1, len(keep)):
        raise ValueError(f"keep is [{len(keep)}], expected a divisor of the {len(mask)} rows of mask")
    return mask * keep.to(mask.device).repeat_interleave(len(mask) // max(1, len(keep)))[:, None]


def dynamic_sampling(draw, n, refills=4):
    """Returns (groups, acceptance): the first n informative groups, and the share of the drawn ones that were.

    draw(n) returns (a list of n groups, their rewards [n, G]). Fewer than n come back when 1 + refills draws did not
    yield them: on a task too hard or too easy there is no end to it. Source: DAPO, "Dynamic Sampling".
    """
    kept, drawn = [], 0
    for _ in range(1 + refills):
        groups, rewards = draw(n)
        kept += [group for group, keep in zip(groups, informative(rewards).tolist()) if keep]
        drawn += len(groups)
        if len(kept) >= n:
            break
    return kept[:n], len(kept) / max(1, drawn)


# ---- 2. losses ----------------------------------------------------------------------------------------------------

KL_KINDS = ("k1", "k2", "k3", "k3+")
AGGREGATES = ("token", "sequence", "constant")
BOUNDS = dict(tis=(0.0, 2.0), mask=(0.5, 5.0), sequence=(0.999, 1.002))  # of w: TIS; IcePop; Nemotron 3 Nano


def kl_estimate(logprob, ref_logprob, kind="k3"):
    """Returns an estimate of KL(pi || ref), in nats, for each token sampled from pi; shape of logprob, float32.

    With x = log ref - log pi (Schulman, "Approximating KL divergence", 2020):
    k1   -x              unbiased, can be negative, noisy
    k2   x^2 / 2         biased, low variance
    k3   e^x - x - 1     unbiased, never negative
    k3+  value of k3, gradient of k2 (verl's straight-through form)

    As a term of a loss it is the gradient that counts, and that is another matter. On samples of pi the mean gradient
    of k1 is zero (it adds noise and nothing else; k1 belongs in the reward, detached); of k2, that of the reverse
    KL(pi || ref), exactly; of k3, that of the forward KL(ref || pi), as grad k3 = (1 - ref / pi) grad log pi. k3 times
    pi / pi_old, kept in the graph, has value and gradient of the reverse KL: `kl_ratio` of `policy_loss`.
    """
    choose("kind", kind, KL_KINDS)
    x = at_least_float32(ref_logprob) - at_least_float32(logprob)
    far = x.clamp(max=20)  # e^89 is inf
    if kind == "k1":
        return -x
    k2 = x.square() / 2
    k3 = torch.expm1(far) - far  # at x = 1e-4, e^x - 1 - x in float32 would be nothing but rounding
    return {"k2": k2, "k3": k3, "k3+": k2 - k2.detach() + k3.detach()}[kind]


def row_mean(values, mask):
    """Returns [B]: the mean of each row of values [B, T] over its tokens in mask [B, T]; 0 for a row without any."""
    return (values * mask).sum(1) / mask.sum(1).clamp(min=1)


def denominator(mask, aggregate="token", max_tokens=None):
    """Returns the number, a tensor [], that the sum over the tokens of a batch is divided by. mask [B, T]: all of it.

    token     tokens in the mask: each token counts the same, so long answers count more        DAPO, section 3.3
    sequence  rows with any token; each row's tokens are averaged before                        GRPO, equation (3)
    constant  B max_tokens: a row without tokens counts, and no length of an answer does        Dr. GRPO

    Take it once from the whole optimiser batch (of all GPUs: sum it) and hand it to every micro-batch; one that divides
    by its own tokens has a gradient that depends on how the batch was cut. What is not in the mask does not count; to
    let silent groups count, as DAPO does without dynamic sampling, take it from the mask before `keep_only`.
    """
    choose("aggregate", aggregate, AGGREGATES)
    if aggregate == "constant" and not max_tokens:
        raise ValueError('aggregate="constant" divides by B max_tokens: pass denominator(mask, "constant", max_tokens)')
    if aggregate == "constant":
        return torch.tensor(float(len(mask) * max_tokens), device=mask.device)
    tokens = (mask != 0).sum(1)
    return (tokens.sum() if aggregate == "token" else (tokens > 0).sum()).clamp(min=1).float()


def aggregate_tokens(values, mask, aggregate="token", divisor=None):
    """Returns a scalar: the sum of values [B, T] in mask [B, T] over `divisor`, None for `denominator` of this mask."""
    divisor = denominator(mask, aggregate) if divisor is None else divisor
    return ((row_mean(values, mask) if aggregate == "sequence" else values * mask).sum()) / divisor


def ratio_terms(logprob, old_logprob, mask, kind="grpo"):
    """Returns r [B, T] = pi_theta / pi_old of each token. logprob, old_logprob, mask [B, T].

    gspo: the geometric mean over the row, s_i = exp(mean_t log r), written for each token as sg[s_i] pi / sg[pi]. Its
    mean over the row has the gradient of s_i itself, and it takes advantages of tokens too. Source: GSPO, "GSPO-token".
    Short answers make s_i noisy: at 5 to 30 tokens start with clip=(.03, .03) and look at the clip fractions.
    """
    log_ratio = logprob - old_logprob
    if kind == "gspo":
        log_ratio = row_mean(log_ratio.detach(), mask)[:, None] + logprob - logprob.detach()
    return log_ratio.clamp(max=20).exp()  # e^89 is inf in float32, and inf times an advantage of 0 NaN


def clipped(ratio, logprob, advantages, clip, dual_clip=None):
    """Returns min(r A, clip(r, 1 - lo, 1 + hi) A) [B, T]: no reward for moving further than the clip.

    hi > lo (DAPO's clip-higher) is for rare tokens: one of 0.01 may grow to 0.0128, not to 0.012 only. dual_clip =
    c > 1: at least c A where A < 0; without it r, which has no bound there, can make one token the whole gradient.
    Source: PPO, arXiv:1707.06347, equation (7); dual clip, arXiv:1912.09729.
    """
    s = torch.minimum(ratio * advantages, ratio.clamp(1 - clip[0], 1 + clip[1]) * advantages)
    return s if dual_clip is None else torch.where(advantages < 0, torch.maximum(s, dual_clip * advantages), s)


def cispo(ratio, logprob, advantages, clip, dual_clip=None):
    """Returns sg[clip(r, 1 - lo, 1 + hi)] A log pi [B, T]: the weight is clipped, and no token loses its gradient.

    Its value cannot be compared with the others': log pi is in it. Source: MiniMax-M1, "CISPO".
    """
    return ratio.detach().clamp(1 - clip[0], 1 + clip[1]) * advantages * logprob


SURROGATES = dict(grpo=clipped, gspo=clipped, cispo=cispo)


def correction_weights(old_logprob, behaviour_logprob, mask, correction="tis", bounds=None):
    """Returns (w [B, T], out [B, T] bool): the weight of each token against a sampler that is not the trainer's policy.

    w = pi_old / behaviour, a constant: nothing is differentiated. bounds = (lo, hi), by default those of BOUNDS.
    tis       clip(w, lo, hi): biased, bounded. (0, math.inf) is plain importance sampling: unbiased, unbounded
    mask      w inside the bounds, else 0 (IcePop): a token that the two disagree on is no evidence
    sequence  w, and 0 for a whole row whose geometric mean of w leaves the bounds

    NaN and inf become 0 in all, and belong to `out`, as does what is outside of the bounds. The denominator of the loss
    goes on counting what is dropped. Sample at the trainer's temperature and without top-k or top-p, or w is wrong.
    """
    choose("correction", correction, BOUNDS)
    low, high = BOUNDS[correction] if bounds is None else bounds
    log_w = (at_least_float32(old_logprob) - at_least_float32(behaviour_logprob)).detach().masked_fill(mask == 0, 0)
    w = log_w.exp()
    judged = row_mean(log_w, mask).exp()[:, None] if correction == "sequence" else w
    inside = (judged >= low) & (judged <= high) & w.isfinite()  # NaN compares false
    weights = torch.where(w.isfinite(), w.clamp(low, high), 0) if correction == "tis" else torch.where(inside, w, 0)
    return weights, ~inside & (mask != 0)


def faithful(old_logprob, behaviour_logprob, mask, limit=2.0):
    """Returns bool [B]: whether mean_t exp|log pi_old - log behaviour| <= limit, for `keep_only`. NeMo RL's filter."""
    gap = (at_least_float32(old_logprob) - at_least_float32(behaviour_logprob)).abs().exp()
    return row_mean(torch.where(mask != 0, gap, 0), mask) <= limit


def check_loss_arguments(logprob, kind, dual_clip, correction, kl_coef, tensors):
    """Raises ValueError for what `policy_loss` cannot take. tensors: dict of what has logprob's shape, or is None."""
    choose("kind", kind, SURROGATES)
    if logprob.dim() != 2:
        raise ValueError(f"logprob is {list(logprob.shape)}, expected [B, T]")
    for name, tensor in tensors.items():
        expect(name, tensor, *logprob.shape, hint=", the shape of logprob")
    if dual_clip is not None and (kind == "cispo" or dual_clip <= 1):
        raise ValueError(f"dual_clip={dual_clip} with kind={kind!r}: it must be above 1, and cispo has none")
    if correction is not None and tensors["behaviour_logprob"] is None:
        raise ValueError(f"correction={correction!r} needs behaviour_logprob, noted when the tokens were sampled")
    if kl_coef and tensors["ref_logprob"] is None:
        raise ValueError(f"kl_coef={kl_coef} needs ref_logprob")


def policy_loss(
    logprob, old_logprob, advantages, mask, kind="grpo", clip=(0.2, 0.28), dual_clip=None, aggregate="token",
    denominator=None, behaviour_logprob=None, correction=None, bounds=None,
    ref_logprob=None, kl_coef=0.0, kl_kind="k3", kl_ratio=False,
):  # fmt: skip
    """Returns (loss, metrics): the sum of m (kl_coef KL - w s(r, A)) over a denominator, and a dict of scalars.

    logprob, old_logprob, behaviour_logprob, ref_logprob [B, T]: of the sampled tokens. Only logprob has a gradient, so
    `old_logprob=logprob` is right, and free, for the first update. advantages [B], an answer's, or [B, T]. mask [B, T],
    bool or 0 and 1; outside of it tensors may hold anything, NaN too. kind, clip, dual_clip: `clipped` and `cispo`.
    aggregate, denominator: the function `denominator`. correction, bounds: `correction_weights`; None is w = 1.
    kl_kind: `kl_estimate`; kl_ratio: times w pi / pi_old, for samples that are not of pi. Computed in float32 (float64
    for float64). On-policy the loss is near 0, since A has mean 0: it does not measure progress. Raises ValueError for
    unknown kinds, shapes that do not fit, and what is missing.

    Metrics, detached, each a mean over the tokens of the mask:

    ratio      mean of r: 1 at the first update of a batch
    clip_low   fraction of tokens that the clip acts on below 1 - lo; but for cispo, where A < 0
    clip_high  the same above 1 + hi; but for cispo, where A > 0
    kl_old     KL(old || new), nats a token: how far the updates of this batch have gone
    kl_ref     KL(new || ref), the estimate kl_kind, with ref_logprob
    with behaviour_logprob:
    weight     mean of old / behaviour before any bound: near 1, or the sampler is another policy
    weight_out fraction of tokens outside of the correction's bounds, or not finite
    mismatch   mean of exp|log old - log behaviour|: should stay below 1.02
    gen_kl     KL(behaviour || old), k3, nats a token: alarm above 1e-3; the other direction explodes on one rare token
    """
    tensors = dict(old_logprob=old_logprob, mask=mask, behaviour_logprob=behaviour_logprob, ref_logprob=ref_logprob)
    check_loss_arguments(logprob, kind, dual_clip, correction, kl_coef, tensors)
    if advantages.dim() == 1:
        expect("advantages", advantages, len(logprob), hint=", one for a row of logprob")
        advantages = advantages[:, None].expand_as(logprob)
    expect("advantages", advantages, *logprob.shape, hint=": one for a row of logprob, or one for a token")

    mask = mask != 0
    logprob, old, A, behaviour, ref = (  # 0 on padding: NaN there would be NaN in every gradient, as 0 NaN = NaN
        None if x is None else at_least_float32(x).masked_fill(~mask, 0)
        for x in (logprob, old_logprob.detach(), advantages.detach(), behaviour_logprob, ref_logprob)
    )
    ratio = ratio_terms(logprob, old, mask, kind)
    surrogate, out = SURROGATES[kind](ratio, logprob, A, clip, dual_clip), None
    w = torch.ones_like(logprob)
    if correction is not None:
        w, out = correction_weights(old, behaviour, mask, correction, bounds)
    token_loss = -w * surrogate
    kl = None
    if ref is not None:
        kl = kl_estimate(logprob, ref.detach(), kl_kind)
        kl = kl * w * ratio_terms(logprob, old, mask) if kl_ratio else kl
    if kl_coef:  # 0 times an infinite estimate is NaN
        token_loss = token_loss + kl_coef * kl
    metrics = loss_metrics(ratio, A, mask, kind, clip, logprob, old, behaviour, out, kl)
    return aggregate_tokens(token_loss, mask, aggregate, denominator), metrics


@torch.no_grad()
def loss_metrics(ratio, advantages, mask, kind, clip, logprob, old_logprob, behaviour_logprob, out, kl):
    """Returns the metrics that `policy_loss` explains: dict of detached scalars, each a mean over the mask."""
    low, high = ratio < 1 - clip[0], ratio > 1 + clip[1]
    if kind != "cispo":  # on the other side of A the minimum is r A, unclipped
        low, high = low & (advantages < 0), high & (advantages > 0)
    values = dict(ratio=ratio, clip_low=low, clip_high=high, kl_old=kl_estimate(old_logprob, logprob))
    if kl is not None:
        values["kl_ref"] = kl
    if behaviour_logprob is not None:
        gap = old_logprob - behaviour_logprob
        values["weight_out"] = ~gap.exp().isfinite() if out is None else out
        gap = gap.nan_to_num().clamp(-20, 20)  # one broken token is counted above, and should not hide the others
        values["weight"], values["mismatch"] = gap.exp(), gap.abs().exp()
        values["gen_kl"] = kl_estimate(torch.zeros_like(gap), gap)
    return {name: (value * mask).sum() / mask.sum().clamp(min=1) for name, value in values.items()}


# ---- 3. rewards, tasks and teachers -------------------------------------------------------------------------------
#
# `overlong_penalty`, `circular_scores` and `dpo_loss` are building blocks: the objective in 5 does without them.


def overlong_penalty(lengths, max_tokens, cache):
    """Returns what to add to rewards: 0, falling to -1 over the last `cache` tokens before max_tokens. lengths [...].

    Source: DAPO, "Soft Overlong Punishment".
    """
    if not 0 < cache <= max_tokens:
        raise ValueError(f"cache={cache} must be above 0 and at most max_tokens={max_tokens}")
    return ((max_tokens - cache - lengths) / cache).clamp(-1, 0)


def length_control(rewards, lengths, coef=0.5, bonus=0.5, quantile=0.8):
    """Returns what to add to rewards [B, G] for the lengths [B, G] of one part of each answer: brevity in the group.

    R = base + length_control(base, thought_lengths) + length_control(base, answer_lengths), each of the *base* rewards:
    coef (u - mean u), u = 1 - (l - min) / (max - min), which sums to 0, then + bonus for the shortest, if its reward is
    in the group's best (>= quantile). All 0 in a group of equal lengths. Source: Nemotron 3 Nano, section 3.3.
    The released server differs: characters for tokens, the third best of 16 for the quantile, bonuses first and in
    place, none for an empty part. Ours alone: all of several shortest get the bonus, so no order of answers matters.
    With 0/1 rewards of which few are 1 the quantile is 0 and a wrong answer can earn the bonus: set bonus=0 there.
    With dense rewards the term can turn the sign of an advantage: count those.
    """
    expect("lengths", lengths, *rewards.shape, hint=", the shape of rewards")
    rewards = at_least_float32(rewards)
    lengths = lengths.to(rewards.dtype)
    shortest, longest = lengths.amin(1, keepdim=True), lengths.amax(1, keepdim=True)  # [B, 1]
    u = (longest - lengths) / (longest - shortest).clamp(min=1e-12)  # all 0 if all are equal
    good = rewards >= rewards.quantile(quantile, dim=1, keepdim=True)
    won = good & (lengths == shortest) & (longest > shortest)
    return coef * (u - u.mean(1, keepdim=True)) + bonus * won


def low_effort_reward(rewards, lengths, U, a=0.1, c=1.0):
    """Returns r + r max(l, 0) + c min(l, 0), l = min(1, a (1 - length / U)): for prompts marked as low effort.

    Below U tokens what is right gains, by a factor; above it everything loses. Ultra: a = .1, c = 1, U = 15000.
    """
    effort = (a * (1 - lengths / U)).clamp(max=1)
    return rewards + rewards * effort.clamp(min=0) + c * effort.clamp(max=0)


def circular_scores(first, second, ranking):
    """Returns rewards [..., N] of N answers: judgement i compares answer i with answer i + 1, the last with the first.

    first, second [..., N]: the scores that judgement i gave to the two; ranking [..., N]: 1 (first far better) .. 6,
    which breaks ties, by +(3.5 - ranking) and -(3.5 - ranking). A reward is the mean over both positions. N judgements
    instead of N (N - 1) / 2. Source: Nemotron 3 Nano, section 3.3.
    """
    tie = torch.where(first == second, 3.5 - ranking, 0.0)
    return (first + tie + (second - tie).roll(1, -1)) / 2


class Curriculum:
    """Draws tasks from easy to hard: by a Gaussian over their pass rate whose mean moves linearly with the step.

    pass_rates [n], of the model before training; tasks of pass rate 1 are dropped, those of 0 too if drop_unsolved.
    The weight N(p; mu, sigma) is divided by the number of tasks left in the same of `bins` bins, or the mean of a batch
    would follow the pool and not mu. Without replacement: a bin begins anew when it is used up. `left`, bool [n], is
    its whole state. Use one for each environment, each with a fixed quota in the batch; at a plateau make
    another from new pass rates. Source: Nemotron 3 Nano, section 3.2.2 and Figure 6 (.7 to .4 in 600 steps), which
    gives no sigma and no bins.
    """

    def __init__(self, pass_rates, steps, easy=0.7, hard=0.4, sigma=0.15, bins=10, drop_unsolved=False):
        self.pass_rates = torch.as_tensor(pass_rates, dtype=torch.float64)
        if self.pass_rates.dim() != 1 or not ((self.pass_rates >= 0) & (self.pass_rates <= 1)).all():
            raise ValueError("pass_rates must be a list of numbers from 0 to 1, one for a task")
        self.steps, self.easy, self.hard, self.sigma = steps, easy, hard, sigma
        self.usable = (self.pass_rates < 1) & (self.pass_rates >= (1e-9 if drop_unsolved else 0))
        self.bin = (self.pass_rates * bins).long().clamp(max=bins - 1)  # [n]
        self.left = self.usable.clone()

    def mean(self, step):
        """Returns mu, the pass rate aimed at."""
        return self.easy + (self.hard - self.easy) * min(1.0, max(0.0, step / self.steps))

    def draw(self, n, step, generator=None):
        """Returns int64 [n], indices of tasks, no two alike. generator: of torch, on the CPU."""
        if n > self.usable.sum():
            raise ValueError(f"n={n} tasks for a batch, but only {int(self.usable.sum())} of pass rate below 1")
        count = torch.bincount(self.bin[self.left], minlength=int(self.bin.max()) + 1)
        self.left |= self.usable & (count[self.bin] == 0)
        if n > self.left.sum():
            self.left = self.usable.clone()
        density = torch.bincount(self.bin[self.left], minlength=len(count)).clamp(min=1)
        log_weight = -(((self.pass_rates - self.mean(step)) / self.sigma) ** 2) / 2 - density[self.bin].log()
        # Gumbel noise and the n best is drawing without replacement, and far tasks do not underflow to a weight of 0
        gumbel = -torch.empty_like(log_weight).exponential_(generator=generator).log()
        drawn = (log_weight + gumbel).masked_fill(~self.left, -math.inf).topk(n).indices
        self.left[drawn] = False
        return drawn


def mopd_advantages(teacher_logprob, prox_logprob, limit=20.0):
    """Returns A [B, T] = sg[log pi_teacher - log pi_prox], within +-limit, of the student's own tokens.

    Multi-teacher on-policy distillation: `policy_loss` with an advantage for each token, from the teacher of the
    prompt's domain; no groups, one answer to a prompt. On-policy its mean gradient is that of the reverse KL to the
    teacher, given each prefix. Source: Nemotron 3 Ultra.
    """
    expect("teacher_logprob", teacher_logprob, *prox_logprob.shape, hint=", the shape of prox_logprob")
    return (at_least_float32(teacher_logprob) - at_least_float32(prox_logprob)).detach().clamp(-limit, limit)


def dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=0.1):
    """Returns mean of -log sigmoid(beta ((chosen - ref_chosen) - (rejected - ref_rejected))): log 2 at the reference.

    Each [B]: the log-probability of a whole answer, summed over its tokens, under the policy and the reference.
    Nemotron 3 Nano, appendix C, adds .2 times the cross-entropy of the chosen answer and .05 times a KL. Source: DPO,
    arXiv:2305.18290, equation (7).
    """
    chosen, rejected, ref_chosen, ref_rejected = map(at_least_float32, (chosen, rejected, ref_chosen, ref_rejected))
    return -F.logsigmoid(beta * ((chosen - ref_chosen) - (rejected - ref_rejected))).mean()


# ---- 4. answers ---------------------------------------------------------------------------------------------------


@dataclass
class Answers:
    """Sampled completions, each behind its prompt and padded on the right: what a training step reads."""

    ids: torch.Tensor  # [N, T] int64
    mask: torch.Tensor  # bool [N, T-1], of the targets ids[:, 1:]: those the policy wrote, its end of text too
    logprob: torch.Tensor  # [N, T-1] float32: of those, as they were sampled; 0 elsewhere
    texts: list  # N completions, without the end of text
    finished: torch.Tensor  # bool [N]: whether it wrote an end of text before max_new_tokens


@torch.no_grad()
def sample_answers(model, tokenizer, prompts, max_new_tokens, temperature=1.0, generator=None, budget=None, works=None):
    """Returns the Answers of a model to N prompts (text), sampled together. An end of text stands before each prompt.

    Temperature only: where top_k or top_p cut tokens off, the sampler is another policy than the one in training.
    budget: a ThinkingBudget. With one, or at temperature 0, there is nothing to learn from: all of logprob is 0.
    works: a `DecodeSession` shared by calls of one shape and generator: several times faster on a GPU.
    """
    training, end, logprobs = model.training, tokenizer.end_of_text, None if budget or temperature == 0 else []
    known = {prompt: [end, *tokenizer.encode(prompt)] for prompt in set(prompts)}
    starts = [known[prompt] for prompt in prompts]
    model.eval()
    steps = generate(
        model, starts, max_new_tokens, temperature, stop=[end], generator=generator, budget=budget, logprobs=logprobs,
        session=works,
    )  # fmt: skip
    tokens = torch.stack(list(steps), 1)  # [N, new], -1 behind the end
    model.train(training)
    N, new = tokens.shape
    wrote, logprob = tokens >= 0, torch.stack(logprobs[:new], 1) if logprobs else torch.zeros(N, new).to(tokens.device)
    lengths = torch.tensor([len(start) for start in starts], device=tokens.device)
    before = int(lengths.max())
    prompt = torch.tensor([[end] * (before - len(start)) + start for start in starts], device=tokens.device)
    # Prompts end together, answers begin together: turning each row to the left makes the padding go to the right.
    turn = (torch.arange(before + new, device=tokens.device) + (before - lengths)[:, None]) % (before + new)
    ids = torch.cat([prompt, tokens.where(wrote, end)], 1).gather(1, turn)  # [N, T]
    mask = F.pad(wrote, (before, 0)).gather(1, turn)[:, 1:]
    logprob = F.pad(logprob.where(wrote, 0), (before, 0)).gather(1, turn)[:, 1:]
    T = int((lengths + wrote.sum(1)).max())
    finished = (tokens == end).any(1)
    n_text = (wrote.sum(1) - finished.long()).tolist()  # a row stops at its end of text
    texts = [tokenizer.decode(row[:n]) for row, n in zip(tokens.tolist(), n_text)]
    return Answers(ids[:, :T], mask[:, : T - 1], logprob[:, : T - 1], texts, finished)


def judged_answers(tasks, answers):
    """Returns (reward, problem of the verifier or None) of each answer. One that has not ended is worth nothing."""
    found = score_all(tasks, answers.texts)
    return [(reward * end, problem) for (reward, problem), end in zip(found, answers.finished.tolist())]


# ---- 5. the objective ---------------------------------------------------------------------------------------------

LOW_EFFORT = "~"  # before a prompt, it asks for little thought
POOL, TRIES = 2048, 8  # tasks of an environment that a curriculum orders, at most; answers that tell a pass rate


@dataclass
class GRPOConfig:
    """Settings of --recipe=grpo. The comment is the --help text."""

    envs: str = "sort,countdown"  # of every batch, by commas: tasks.ENVIRONMENTS, sort:10 for size 10; twice is twice
    warm_start: int = 70  # steps of supervised learning on the environments' demos, before the first answer
    cut_thoughts: float = 0.0  # share of demos whose thought stops early: they teach to answer under a budget
    no_thoughts: float = 0.0  # share of demos whose thinking is turned off
    rl_lr: float = 4e-4  # peak learning rate after the warm start
    group_size: int = 8  # G, answers to a prompt; batch_size is prompts times G
    updates: int = 1  # optimiser steps for a batch of answers, each on its share of them
    temperature: float = 1.0  # of sampling, and of the log-probabilities in training
    eval_temperature: float = 1.0  # of the answers to held-out prompts; 0: the likeliest tokens
    advantage: str = "grpo"  # grpo, nemotron, rloo, dr or batch: see advantages
    surrogate: str = "grpo"  # grpo, gspo or cispo: see policy_loss
    aggregate: str = "token"  # token, sequence or constant: see denominator
    clip_low: float = 0.2  # the ratio counts down to 1 - clip_low
    clip_high: float = 0.28  # and up to 1 + clip_high
    entropy_coef: float = 0.02  # bonus for a nat of entropy: with less, small models settle on one answer for all
    kl_coef: float = 0.0  # weight of KL(policy || policy after the warm start): it keeps what it knew, and exploring
    sampler_every: int = 1  # k: its weights are copied every k steps, and so are 0 to k - 1 steps old (asynchronous RL)
    correction: str = ""  # of a sampler that is another policy: tis, mask, sequence, or clip (its ratio, clipped)
    overlong: str = "zero"  # an answer without an end is worth zero; filter: and has no gradient
    dynamic_sampling: int = 0  # further draws, at most, in place of prompts whose answers are all worth the same
    focus: float = 0.0  # share of the prompts that goes to environments by how many of their groups are informative
    curriculum: int = 0  # steps over which prompts go from easy to hard, by the warm start's pass rate; 0: at random
    length_coef: float = 0.0  # reward for thoughts and answers that are short in their group: see length_control
    low_effort: float = 0.0  # share of the prompts to think on that are marked ~, for little thought
    low_effort_tokens: int = 16  # of thought, beyond which those lose reward: see low_effort_reward
    teachers: str = ""  # MOPD: a run's folder for each environment, by commas; they take the place of rewards

    def __post_init__(self):
        choose("advantage", self.advantage, ADVANTAGES)
        choose("surrogate", self.surrogate, SURROGATES)
        choose("aggregate", self.aggregate, AGGREGATES)
        choose("correction", self.correction, ("", "clip", *BOUNDS))
        choose("overlong", self.overlong, ("zero", "filter"))
        for name, low, high in LIMITS:
            if not low <= getattr(self, name) <= high:
                span = f"from {low} to {high}" if high < LARGEST else f"at least {low}, and finite"
                raise ValueError(f"--{name}={getattr(self, name)} must be {span}")
        if self.group_size < 2 and not self.teachers.strip(", "):
            raise ValueError("--group_size=1 leaves nothing to compare an answer with; it takes --teachers")
        if self.cut_thoughts + self.no_thoughts > 1:
            raise ValueError("--cut_thoughts and --no_thoughts are shares of the same demos: at most 1 together")
        if self.teachers and (self.length_coef or self.low_effort or self.dynamic_sampling):
            raise ValueError(
                "--teachers take the place of rewards: leave out length_coef, low_effort, dynamic_sampling"
            )


LARGEST = sys.float_info.max
LIMITS = [  # (setting, lowest, highest)
    ("warm_start", 0, math.inf), ("group_size", 1, math.inf), ("updates", 1, math.inf), ("sampler_every", 1, math.inf),
    ("rl_lr", 1e-12, LARGEST), ("temperature", 1e-3, LARGEST), ("eval_temperature", 0, LARGEST),
    ("clip_low", 0, 1), ("clip_high", 0, LARGEST), ("entropy_coef", 0, LARGEST), ("kl_coef", 0, LARGEST),
    ("cut_thoughts", 0, 1), ("no_thoughts", 0, 1), ("low_effort", 0, 1), ("low_effort_tokens", 1, math.inf),
    ("dynamic_sampling", 0, math.inf), ("focus", 0, 1), ("curriculum", 0, math.inf), ("length_coef", 0, LARGEST),
]  # fmt: skip


class GRPO:
    """Reinforcement learning from verifiable rewards, after a supervised warm start in the same run.

    Metrics of a step, beside those of `policy_loss`:

    train_reward      mean of what the verifiers gave           train_reward_<env>   of the answers of one environment
    informative       share of the drawn groups whose answers differ in reward: the others teach nothing
    pass_rate         mean pass rate, before rewards, of the tasks that curricula drew
    entropy           of the policy, nats a token: falls as it decides; collapse means no more exploration
    length            tokens of an answer                       truncated      share that wrote no end of text
    problems          answers whose verifier raised, hung, or gave no number in [0, 1]
    tokens            that were learnt from                     rollout_tokens_per_s   answers' tokens / time to sample

    What a run needs to go on, beside weights and step, is in `kept`: answers that updates are still to come for, copies
    of the weights, pass rates. Silent groups have the bonus for entropy, which keeps them exploring, and the KL. A
    mixture of experts is balanced by its bias alone, as in Nemotron's RL; its router is trained, where theirs is not.
    """

    def __init__(self, config, tokenizer, batch_size, seed=0, rank=0, world_size=1):
        self.config, self.tokenizer, self.batch_size = config, tokenizer, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.envs = [environment(spec.strip()) for spec in config.envs.split(",")]
        self.max_new_tokens = max(env.max_new_tokens for env in self.envs)
        rows = len(self.envs) * config.group_size * config.updates
        if batch_size % rows:
            raise ValueError(
                f"batch_size={batch_size} must be a multiple of {rows}: {len(self.envs)} environments times "
                f"group_size={config.group_size} times updates={config.updates}"
            )
        self.example = self.envs[0].sample(np.random.default_rng(seed)).prompt  # a prompt to try it with
        self.kept, self.models, self.curricula, self.drawn_rates = {}, {}, [], []
        self.works, self.generator = DecodeSession(), None
        if config.cut_thoughts or config.no_thoughts or config.low_effort:
            if not any(env.sample(np.random.default_rng(seed)).thinks for env in self.envs):
                raise ValueError(f"--envs={config.envs} has none that thinks, as chain or add:5:on does")
        names = list(dict.fromkeys(env.name for env in self.envs))
        folders = [folder.strip() for folder in config.teachers.split(",") if folder.strip()]
        if folders and len(folders) != len(names):
            raise ValueError(f"--teachers names {len(folders)} runs, --envs {len(names)} environments")
        self.teachers = {
            name: Hybrid.from_pretrained(Path(folder)).requires_grad_(False) for name, folder in zip(names, folders)
        }

    def about(self):
        """Returns a line about the data."""
        c, prompts = self.config, self.batch_size // self.config.group_size
        return f"{c.envs}; {c.warm_start} steps of demos, then {prompts} prompts x {c.group_size} answers a batch"

    def lr_scale(self, step, lr):
        """Returns what the learning rate `lr` is multiplied by: supervised steps can be larger."""
        return 1.0 if step < self.config.warm_start else self.config.rl_lr / lr

    def state_dict(self):
        """Returns what a checkpoint needs of the objective: tensors, numbers, and lists and dicts of them."""
        return self.kept | dict(left=[curriculum.left for curriculum in self.curricula])

    def load_state_dict(self, state):
        """Takes back what `state_dict` returned."""
        self.models, self.curricula = {}, []
        self.kept = {name: value for name, value in state.items() if name != "left"}
        if "pass_rates" in self.kept:
            self.make_curricula()
            for curriculum, left in zip(self.curricula, state["left"]):
                curriculum.left = left.clone()

    # -- tasks

    def tasks(self, step, n, held_out=False, again=0):
        """Returns n tasks, the environments taking turns: a function of (seed, step, rank) and the number of the draw.

        With a curriculum also of what it has drawn before, and with `focus` of how many groups were informative: then
        every environment has one prompt in each round, and what is left goes where there is most to learn.
        """
        rng = np.random.default_rng((self.seed, step, self.rank, held_out, again))
        if self.curricula and not held_out:
            tasks = self.ordered(step, n, rng)
        else:
            envs = [self.envs[i % len(self.envs)] for i in range(n)]
            if "teaches" in self.kept and not held_out:
                fixed, weight = max(len(self.envs), round(n * (1 - self.config.focus))), self.kept["teaches"].numpy()
                drawn = rng.choice(len(self.envs), max(0, n - fixed), p=weight / weight.sum())
                envs[fixed:] = [self.envs[i] for i in drawn]
            tasks = [sample_task(env, rng, held_out) for env in envs]
        marked = rng.random(n) < (0 if held_out else self.config.low_effort)
        return [replace(t, prompt=LOW_EFFORT + t.prompt) if m and t.thinks else t for t, m in zip(tasks, marked)]

    def pool(self, env):
        """Returns the tasks of an environment that a curriculum orders: all it will need, or POOL."""
        rng = np.random.default_rng((self.seed, self.rank, self.envs.index(env)))
        need = self.config.curriculum * self.batch_size // self.config.group_size // len(self.envs)
        return [sample_task(env, rng) for _ in range(min(need, POOL))]

    def find_pass_rates(self, model):
        """Lets the model try each task of each pool, and keeps its pass rates."""
        generator = torch.Generator(next(model.parameters()).device).manual_seed(self.seed)
        self.kept["pass_rates"] = []
        for env in self.envs:
            tasks, rewards = [task for task in self.pool(env) for _ in range(TRIES)], []
            for i in range(0, len(tasks), self.batch_size):
                part = tasks[i : i + self.batch_size]
                rewards += [reward for reward, _ in judged_answers(part, self.answer(model, part, generator))]
            self.kept["pass_rates"].append(torch.tensor(rewards).view(-1, TRIES).mean(1))

    def make_curricula(self):
        """Makes the curriculum of each environment from `kept`."""
        steps = self.config.curriculum
        self.pools = [self.pool(env) for env in self.envs]
        self.curricula = [Curriculum(rates, steps) for rates in self.kept["pass_rates"]]

    def ordered(self, step, n, rng):
        """Returns n tasks by the curricula, as many of each environment; fresh ones of one with too few unsolved."""
        generator, columns = torch.Generator().manual_seed(int(rng.integers(2**62))), []
        quota = -(-n // len(self.envs))
        for env, pool, curriculum in zip(self.envs, self.pools, self.curricula):
            if curriculum.usable.sum() < quota:
                columns.append([sample_task(env, rng) for _ in range(quota)])
                continue
            drawn = curriculum.draw(quota, step - self.config.warm_start, generator)
            columns.append([pool[i] for i in drawn])
            self.drawn_rates += curriculum.pass_rates[drawn].tolist()
        return [task for row in zip(*columns) for task in row][:n]

    # -- a batch

    def batch(self, model, step):
        """Returns demos to imitate, {"ids", "targets"}, or after the warm start the next share of judged answers."""
        c, share = self.config, self.batch_size // self.config.updates
        if step < c.warm_start:
            return self.demos(model, self.tasks(step, self.batch_size), np.random.default_rng((self.seed, step, 1)))
        self.begin_rewards(model)
        part = (step - c.warm_start) % c.updates
        if part == 0:
            self.kept["judged"], self.kept["numbers"] = self.judge(model, step)
        rows, device = slice(part * share, (part + 1) * share), next(model.parameters()).device
        judged = {name: value[rows].to(device) for name, value in self.kept["judged"].items()}
        return judged | dict(numbers=self.kept["numbers"])

    def demos(self, model, tasks, rng):
        """Returns {"ids", "targets"} [B, T]: end of text, prompt, demo, end of text; targets are demo and end.

        Of those that think, shares are cut short or not thought at all. Of a thought cut short the closing tag is no
        target: who reads it learns to answer from half a thought, not to stop at half (Nemotron 3 Ultra). Of one that
        is to be short, by LOW_EFFORT, it is.
        """
        end, device, rows = self.tokenizer.end_of_text, next(model.parameters()).device, []
        encode, tag, c = self.tokenizer.encode, len(self.tokenizer.encode(THINK_END)), self.config
        for task, chance in zip(tasks, rng.random(len(tasks))):
            little, lines = task.prompt.startswith(LOW_EFFORT), task.demonstration.count("\n")
            cut = task.thinks and not little and chance < c.cut_thoughts
            if task.thinks and not little and not cut and chance < c.cut_thoughts + c.no_thoughts:
                task = without_thought(task)
            demo = task.demonstration
            if (cut or little) and lines:
                demo = cut_trace(demo, int(rng.integers(lines)))
            prompt, targets = encode(task.prompt), [*encode(demo), end]
            if cut:
                closes = len(encode(task.parts(demo)[0]))
                targets[closes : closes + tag] = [-100] * tag
            rows.append(([end, *prompt, *encode(demo)], [-100] * len(prompt) + targets))
        T = max(len(ids) for ids, _ in rows)
        ids = torch.tensor([ids + [end] * (T - len(ids)) for ids, _ in rows], device=device)
        targets = torch.tensor([targets + [-100] * (T - len(targets)) for _, targets in rows], device=device)
        return dict(ids=ids, targets=targets)

    def begin_rewards(self, model):
        """Keeps what is to be remembered of the model after its warm start, unless it is kept already."""
        if self.config.kl_coef and "reference" not in self.kept:
            self.keep_weights("reference", model)
        if self.config.curriculum and not self.curricula:
            self.find_pass_rates(model)
            self.make_curricula()

    def keep_weights(self, name, model):
        """Keeps a copy of the model's weights under a name; `copy_of` makes a model of them."""
        self.kept[name] = {key: value.detach().clone() for key, value in model.state_dict().items()}
        self.models.pop(name, None)

    def copy_of(self, name, model):
        """Returns a model with the weights kept under a name. model: one of the same shape."""
        if name not in self.models:
            self.models[name] = copy.deepcopy(model).requires_grad_(False)
            self.models[name].load_state_dict(self.kept[name])
        return self.models[name]

    def answer(self, model, tasks, generator):
        """Returns the model's Answers to tasks."""
        prompts, temperature = [task.prompt for task in tasks], self.config.temperature
        return sample_answers(
            model, self.tokenizer, prompts, self.max_new_tokens, temperature, generator, works=self.works
        )

    def sampler(self, model, step):
        """Returns the model that samples: the one in training, or a copy of it that is some steps old."""
        c, since = self.config, step - self.config.warm_start
        if c.sampler_every == 1:
            return model
        if "sampler" not in self.kept or since % c.sampler_every < c.updates:
            self.keep_weights("sampler", model)
        return self.copy_of("sampler", model)

    def judge(self, model, step):
        """Returns (what `policy_loss` needs of a batch of fresh answers, a row each; the batch's numbers)."""
        c, G, device = self.config, self.config.group_size, next(model.parameters()).device
        sampler, n = self.sampler(model, step), self.batch_size // G
        self.generator = self.generator or torch.Generator(device)  # the same for all: a CUDA graph knows it
        generator = self.generator.manual_seed(hash((self.seed, step, self.rank)) % 2**63)
        tasks, parts, found, rewards, seconds = [], [], [], [], 0.0
        self.drawn_rates = []

        def draw(n):
            """Returns n groups, by their place among all that were drawn, and their rewards [n, G]."""
            nonlocal seconds
            new = [task for task in self.tasks(step, n, again=len(parts)) for _ in range(G)]
            began = time.perf_counter()
            parts.append(self.answer(sampler, new, generator))
            seconds += time.perf_counter() - began
            found.extend(judged_answers(new, parts[-1]))
            tasks.extend(new)
            rewards.append(torch.tensor([reward for reward, _ in found[-n * G :]]).view(-1, G))
            return range(len(tasks) // G - n, len(tasks) // G), rewards[-1]

        groups, accepted = dynamic_sampling(draw, n, c.dynamic_sampling)
        others = [i for i in range(len(tasks) // G) if i not in set(groups)]  # they fill up what is missing
        groups = torch.tensor(sorted((groups + others)[:n]))
        numbers = self.numbers_of(tasks, parts, found) | dict(informative=accepted)
        if c.focus:
            self.look_for_what_teaches(tasks[::G], informative(torch.cat(rewards)))
        numbers["rollout_tokens_per_s"] = sum(part.mask.sum().item() for part in parts) / seconds

        rows = (groups[:, None] * G + torch.arange(G)).flatten()  # [B], of all the answers
        fills = dict(ids=self.tokenizer.end_of_text, mask=False, logprob=0.0, finished=False)
        ids, mask, logprob, finished = (
            joined([getattr(part, name) for part in parts], fill)[rows.to(device)] for name, fill in fills.items()
        )
        texts = [text for part in parts for text in part.texts]
        A = self.advantages(torch.cat(rewards)[groups], [tasks[i] for i in rows], [texts[i] for i in rows]).to(device)
        mask = keep_only(mask, finished) if c.overlong == "filter" else mask
        judged = dict(ids=ids, mask=mask, behaviour_logprob=logprob, advantages=A)
        self.add_other_logprobs(model, judged, [tasks[i] for i in rows])
        return judged, numbers

    def look_for_what_teaches(self, tasks, taught):
        """Keeps for each environment the share of informative groups, averaged over some twenty steps.

        tasks: one for each group; taught: bool, whether its answers differ in reward.
        """
        mean = self.kept.setdefault("teaches", torch.ones(len(self.envs), dtype=torch.float64))
        for i, env in enumerate(self.envs):
            groups = torch.tensor([task.env == env.name for task in tasks])
            mean[i] += 0.05 * (taught[groups].double().mean() - mean[i])
        mean.clamp_(min=1e-3)  # a weight of 0 everywhere would be none

    def numbers_of(self, tasks, answers, found):
        """Returns the metrics of all the answers of a step."""
        rewards, names = np.array([reward for reward, _ in found]), np.array([task.env for task in tasks])
        numbers = dict(train_reward=rewards.mean(), problems=sum(problem is not None for _, problem in found))
        numbers |= {f"train_reward_{env.name}": rewards[names == env.name].mean() for env in self.envs}
        numbers["length"] = torch.cat([part.mask.sum(1) for part in answers]).float().mean().item()
        numbers["truncated"] = (~torch.cat([part.finished for part in answers])).float().mean().item()
        if self.drawn_rates:
            numbers["pass_rate"] = np.mean(self.drawn_rates)
        return {name: float(value) for name, value in numbers.items()}

    def advantages(self, rewards, tasks, texts):
        """Returns A [B] of answers with rewards [n, G], with what low effort and length control make of it.

        Brevity counts for right answers alone: to it, a wrong one is as long as the longest of its group.
        """
        c, G = self.config, self.config.group_size
        if not (c.length_coef or c.low_effort):
            return advantages(rewards, c.advantage).flatten()
        parts = [task.parts(text) for task, text in zip(tasks, texts)]
        lengths = [torch.tensor([len(self.tokenizer.encode(p[i])) for p in parts]).view(-1, G) for i in (0, 1)]
        right, shaped = rewards > 0, rewards
        if c.low_effort:
            marked = torch.tensor([task.prompt.startswith(LOW_EFFORT) for task in tasks[::G]])[:, None]
            shaped = torch.where(marked, low_effort_reward(rewards, lengths[0], c.low_effort_tokens), rewards)
        A = advantages(shaped, c.advantage)
        for length in lengths:
            length = torch.where(right, length, length.amax(1, keepdim=True))
            A = A + length_control(rewards, length, c.length_coef, bonus=0)
        return A.flatten()

    @torch.no_grad()
    def add_other_logprobs(self, model, judged, tasks):
        """Adds to a batch what other policies than the one in training make of it, where a setting asks for them."""
        c, ids, mask = self.config, judged["ids"], judged["mask"]
        if c.correction == "clip":
            judged["old_logprob"] = judged["behaviour_logprob"]
        elif c.updates > 1 or c.correction or self.teachers:
            judged["old_logprob"] = model.logprobs(ids, mask, c.temperature)[0]
        if c.kl_coef:
            judged["ref_logprob"] = self.copy_of("reference", model).logprobs(ids, mask, c.temperature)[0]
        if self.teachers:
            of_teacher = torch.zeros_like(judged["old_logprob"])
            for name, teacher in self.teachers.items():
                rows = torch.tensor([task.env == name for task in tasks], device=ids.device)
                teacher = teacher.to(ids.device)
                of_teacher[rows] = teacher.logprobs(ids[rows], mask[rows], c.temperature)[0].to(of_teacher.dtype)
            judged["advantages"] = mopd_advantages(of_teacher, judged["old_logprob"])  # [B, T-1]

    def loss(self, model, batch):
        """Returns (loss, metrics)."""
        if "targets" in batch:
            loss, metrics = model.loss(**batch)
            return loss, metrics | dict(tokens=(batch["targets"] >= 0).sum())
        c, mask = self.config, batch["mask"]
        logprob, entropy = model.logprobs(batch["ids"], mask, c.temperature)
        divisor = denominator(mask, c.aggregate, self.max_new_tokens)
        loss, metrics = policy_loss(
            logprob, batch.get("old_logprob", logprob), batch["advantages"], mask, c.surrogate,
            (c.clip_low, c.clip_high), aggregate=c.aggregate, denominator=divisor,
            behaviour_logprob=batch["behaviour_logprob"], correction=c.correction if c.correction in BOUNDS else None,
            ref_logprob=batch.get("ref_logprob"), kl_coef=c.kl_coef, kl_kind="k3+",
        )  # fmt: skip
        bonus = c.entropy_coef * aggregate_tokens(entropy, mask, c.aggregate, divisor)
        entropy = entropy.detach().sum() / mask.sum().clamp(min=1)
        return loss - bonus, metrics | batch["numbers"] | dict(entropy=entropy, tokens=mask.sum())

    @torch.no_grad()
    def evaluate(self, model, n=128):
        """Returns reward_<env>, the mean over sampled answers to n held-out prompts, and reward, their mean."""
        device, scores = next(model.parameters()).device, {}
        tasks = self.tasks(0, n * len(self.envs), held_out=True)
        generator = torch.Generator(device).manual_seed(self.seed)
        prompts, temperature = [task.prompt for task in tasks], self.config.eval_temperature
        answers = sample_answers(model, self.tokenizer, prompts, self.max_new_tokens, temperature, generator)
        for task, (reward, _) in zip(tasks, judged_answers(tasks, answers)):
            scores.setdefault(task.env, []).append(reward)
        found = {f"reward_{env}": sum(values) / len(values) for env, values in scores.items()}
        return dict(reward=sum(found.values()) / len(found)) | found


def joined(parts, fill=0):
    """Returns the rows of tensors [N, T] (or [N]) with different T, padded on the right to the widest."""
    T = max(part.shape[-1] for part in parts)
    return torch.cat([F.pad(part, (0, T - part.shape[1]), value=fill) if part.dim() == 2 else part for part in parts])


# ---- 6. python grpo.py: five losses from the same start; python grpo.py bench: rollouts on a GPU --------------------

ALGORITHMS = {  # of the table at the top, with two updates for each batch of answers: with one, ratios are 1
    "GRPO": dict(advantage="grpo", aggregate="sequence", clip_high=0.2),
    "DAPO": dict(advantage="grpo", aggregate="token"),
    "Dr. GRPO": dict(advantage="dr", aggregate="constant", clip_high=0.2),
    "GSPO": dict(
        advantage="grpo", surrogate="gspo", aggregate="sequence", clip_low=0.03, clip_high=0.04
    ),  # short answers
    "CISPO": dict(advantage="grpo", surrogate="cispo", clip_low=1.0, clip_high=4.0),
}


def learn(model, objective, steps, lr, name=None):
    """Trains for `steps` steps, on a GPU in bfloat16, and returns the numbers of each: metric -> float."""
    optimizer, rows = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.0), []
    device = next(model.parameters()).device
    for step in tqdm(range(steps), desc=name, delay=2, leave=False, disable=name is None):
        optimizer.param_groups[0]["lr"] = lr * min(1, (step + 1) / 10)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):  # anew: it remembers weights
            loss, metrics = objective.loss(model, objective.batch(model, step))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        values = torch.stack([torch.as_tensor(value, device=device).detach().float() for value in metrics.values()])
        rows.append(dict(zip(metrics, values.tolist())))
    return rows


def demo(env="sort", steps=60, batch_size=128, seeds=(0, 1)):
    """Prints what five losses make of the same warm start in as many steps, and draws out/grpo.png."""
    device, tokenizer, began = "cuda" if torch.cuda.is_available() else "cpu", Tokenizer("bytes"), time.perf_counter()
    config = replace(PRESETS["grpo-tiny"], vocab_size=320)
    scores, curves = {name: [] for name in ("warm start", *ALGORITHMS)}, {name: [] for name in ALGORITHMS}
    for seed in seeds:
        torch.manual_seed(seed)
        model = Hybrid(config).to(device)
        start = GRPO(GRPOConfig(envs=env, warm_start=50), tokenizer, batch_size, seed)
        learn(model, start, 50, 3e-3, f"warm start, seed {seed}")
        weights = {key: value.clone() for key, value in model.state_dict().items()}
        scores["warm start"].append(start.evaluate(model)["reward"])
        for name, settings in ALGORITHMS.items():
            model.load_state_dict(weights)
            run = GRPO(
                GRPOConfig(envs=env, warm_start=0, updates=2, entropy_coef=0.0, **settings),
                tokenizer,
                batch_size,
                seed + 100,
            )
            curves[name].append([row["train_reward"] for row in learn(model, run, steps, 4e-4, f"{name}, seed {seed}")])
            scores[name].append(run.evaluate(model)["reward"])
    print(
        f"{env}: held-out prompts answered right, after {steps} steps of {batch_size} answers each, by seed; {device}"
    )
    for name, found in scores.items():
        print(f"{name:12}{np.mean(found):8.3f}   " + " ".join(f"{score:.3f}" for score in found))
    print(f"{time.perf_counter() - began:.0f} s")
    plot_rewards(curves, scores, Path("out/grpo.png"), env)


def plot_rewards(curves, scores, path, env):
    """Draws the reward of each batch for each loss, means of seeds and of ten steps, and writes it to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=150, layout="constrained")
    for (name, runs), color in zip(curves.items(), ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00")):
        mean = np.mean(runs, axis=0)
        mean = np.convolve(mean, np.ones(10) / 10, "valid")
        axes.plot(np.arange(len(mean)) + 10, mean, color=color, label=f"{name}: {np.mean(scores[name]):.2f} held out")
    axes.axhline(np.mean(scores["warm start"]), color="#999999", linestyle="--", linewidth=1)
    axes.set(xlabel="step", ylabel=f"reward of the batch ({env}), mean of 10 steps")
    low, *_, high = sorted(np.mean(found) for name, found in scores.items() if name in curves)
    axes.set_title(
        f"From {np.mean(scores['warm start']):.2f} after the warm start to {low:.2f} ... {high:.2f} by rewards"
    )
    axes.legend(frameon=False)
    axes.grid(alpha=0.3)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    print(f"plot: {path}")


def bench(prompts=128, G=8, repeats=5):
    """Prints how fast a GPU samples 1,024 answers at once, and writes assets/bench/grpo.json.

    The model is new and hardly ever ends an answer, so that all rows go on to the last token; `rollout_tokens_per_s` in
    a run's log.jsonl is the rate with answers that end.
    """
    if not torch.cuda.is_available():
        raise SystemExit("grpo.py bench: there is no CUDA device")
    rows, tokenizer, rng = [], Tokenizer("bytes"), np.random.default_rng(0)
    sizes = dict(hidden_size=384, num_attention_heads=6, num_key_value_heads=6, intermediate_size=1536)
    model = Hybrid(replace(PRESETS["grpo"], vocab_size=320, mamba_num_heads=12, **sizes)).to("cuda")
    texts = [sample_task(environment("tool"), rng).prompt for _ in range(prompts) for _ in range(G)]
    print(f"{model.num_parameters() / 1e6:.1f}M parameters, {len(texts)} answers, bfloat16; all of `sample_answers`")
    for new in (16, 48, 128, 512):
        rates, works = [], DecodeSession()
        for _ in range(repeats + 1):  # the first compiles
            torch.cuda.synchronize()
            began = time.perf_counter()
            with torch.autocast("cuda", torch.bfloat16):
                answers = sample_answers(model, tokenizer, texts, new, works=works)
            rates.append(answers.mask.sum().item() / (time.perf_counter() - began))
        rows.append(dict(max_new_tokens=new, tokens_per_s=sorted(rates[1:])[repeats // 2]))
        print(f"up to {new:4} tokens: {rows[-1]['tokens_per_s']:12,.0f} tokens/s")
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    record = dict(command="python grpo.py bench", machine=machine, answers=len(texts), rollouts=rows)
    (Path(__file__).parent / "assets" / "bench" / "grpo.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["bench"]):
        raise SystemExit("usage: python grpo.py [bench]")
    bench() if sys.argv[1:] else demo()
