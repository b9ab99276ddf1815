"""GRPO and its fixes: reinforcement learning from groups of answers, the mean of a group in the place of a critic.

Papers   GRPO, arXiv:2402.03300; RLOO, 2402.14740; DAPO, 2503.14476; Dr. GRPO, 2503.20783; CISPO (MiniMax-M1),
         2506.13585; GSPO, 2507.18071; decoupled PPO, 2110.00641, and AReaL, 2505.24298; Nemotron 3 Nano, Super, Ultra,
         2512.20848, 2604.12374, 2606.15007 (leave-one-out advantages, curriculum, multi-teacher distillation: MOPD).
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
         T                                of log-probabilities and masks counts targets, ids[:, 1:]

Which flags of `train.py --recipe=grpo` give which algorithm. Add --entropy_coef=0: none of the papers has that bonus.
[Brackets]: arguments of the functions, without a flag. clip is clip_low, clip_high; sg is stop-gradient, a constant.
TIS, truncated importance sampling, and IcePop, which masks tokens, correct a sampler that is not quite the policy.

    algorithm             --advantage  --surrogate  --clip_...  --aggregate  further
    GRPO                  grpo         grpo         .2, .2      sequence     --kl_coef=.04 [kl_kind=k3]
    DAPO                  grpo         grpo         .2, .28     token        --dynamic_sampling=4 [overlong_penalty]
    Dr. GRPO              dr           grpo         .2, .2      constant
    RLOO                  rloo         grpo         inert       constant     --updates=1 [denominator=B]
    GSPO                  grpo         gspo         3e-4, 4e-4  sequence
    CISPO                 grpo         cispo        1, 4        token        lo = 1: no lower bound; r up to 5
    dual clip (verl)      any          grpo         .2, .2      any          [dual_clip=3]
    naive PPO             any          grpo         .2, .2      any          --correction=clip
    decoupled PPO, AReaL  batch        grpo         .2, .2      token        --correction=mask --updates=4 [(0, 5)]
    TIS                   any          any          any         any          --correction=tis
    IcePop                any          any          any         any          --correction=mask
    Nemotron 3 Nano       nemotron     grpo         .2, .28     token        --correction=sequence --overlong=filter
    Nemotron 3 Super      nemotron     grpo         .2, .28     token        --correction=tis [(0, 5), A in +-50]
    Nemotron 3 Ultra      nemotron     grpo         .2, .28     token        --correction=tis [(.2, 5), A in +-20]
    MOPD (Ultra)          any          grpo         .2, .28     token        --teachers=... --group_size=1, as IcePop

    Nano, Super and Ultra update once per batch: r = 1, the clip is inert, w is all there is. Nano and Super drop rows
    that are not `rollouts.faithful`. Super and Ultra set A := -5 on tokens of malformed messages: A may be [BG, T].
    AReaL's released code drops tokens whose ratio w is above 5, and clamps none.

Read     The table above, 1, 2; then `GRPO.batch` and `GRPO.rollouts` in 4, from sampling to judging to advantages, and
         `GRPO.loss`. `python grpo.py` compares five losses, `python train.py --recipe=grpo` learns several tasks at
         once, `python -m experiments.grpo` tests Nemotron's claims, `python -m benchmarks.grpo` times answers.
Files    grpo.py + decoding.py + kernels.py + nano_hybrid.py + rollouts.py + decode_kernels.py + latent_moe.py +
         lla.py + ssd.py + expert_kernels.py + nvfp4.py + common/data.py + common/fit.py + common/objectives.py +
         common/ranges.py + common/tasks.py + common/accounting.py + common/checkpoints.py + common/files.py +
         common/presets.py + common/sampling.py: 10,903 lines in all
"""

import time
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.distributed as dist

import rollouts
from common.data import Tokenizer
from common.fit import learn
from common.objectives import Objective, Recipe, to_device
from common.ranges import check_ranges
from common.tasks import demonstration_rows, environment, sample_task, with_low_effort
from decoding import DecodeSession
from kernels import at_least_float32, expect, fresh_casts
from nano_hybrid import Hybrid, HybridConfig
from rollouts import Curricula, PolicyCopies, informative, join_answers, judged_answers, rollout_metrics, sample_answers

# ---- 1. advantages ------------------------------------------------------------------------------------------------
#
# Of 0/1 rewards with success rate p, a group's mean update is proportional to p (1 - p) under "dr" and "rloo", and to
# sqrt(p (1 - p)) under "grpo", which so lifts prompts that are nearly always or nearly never solved. Both vanish at
# p = 0 and p = 1, where a group is not `informative`: dynamic sampling draws others instead.

EPS = 1e-6  # added to standard deviations: NVIDIA's; TRL has 1e-4
ADVANTAGES = ("grpo", "nemotron", "rloo", "dr", "batch")


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
    batch     (R - mean) / std of all B G rewards, so prompts keep their weight; take it of a whole batch.    TRL

    A group of equal rewards, and so one of a single answer, is exactly 0 in all. Only with "grpo" and "nemotron" may
    environments have rewards of different ranges. Raises ValueError for another kind or shape.
    """
    rollouts.check_choice("kind", kind, ADVANTAGES)
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
    rollouts.check_choice("kind", kind, KL_KINDS)
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


def denominator(mask, aggregate="token", max_tokens=None, micro_batches=1, processes=1):
    """Returns the number, a tensor [], that sums over the tokens of a batch are divided by. mask [B, T]: all of it.

    token     tokens in the mask: each token counts the same, so long answers count more        DAPO, section 3.3
    sequence  rows with any token; each row's tokens are averaged before                        GRPO, equation (3)
    constant  B max_tokens: a row without tokens counts, and no length of an answer does        Dr. GRPO

    Take it once from the whole batch of an optimiser step, and hand it to every part: divided by its own tokens, a part
    has a gradient that depends on how the batch was cut. micro_batches, processes: how many parts there are, if their
    gradients are averaged, not added, as in train.py, DDP and FSDP. With several processes each has the mask of its own
    rows, and all of them make this call. What is not in the mask does not count; to let uninformative groups count, as
    DAPO does without dynamic sampling, take it from the mask before `rollouts.keep_only`.
    """
    rollouts.check_choice("aggregate", aggregate, AGGREGATES)
    if aggregate == "constant" and not max_tokens:
        raise ValueError('aggregate="constant" needs denominator=denominator(mask, "constant", max_tokens)')
    tokens = (mask != 0).sum(1)  # [B]
    total = dict(token=tokens.sum(), sequence=(tokens > 0).sum(), constant=tokens.new_tensor(len(mask)))[aggregate]
    if processes > 1:
        dist.all_reduce(total)
    total = total.clamp(min=1).float() * (max_tokens if aggregate == "constant" else 1)
    return total / (micro_batches * processes)


def aggregate_tokens(values, mask, aggregate="token", divisor=None):
    """Returns a scalar: the sum of values [B, T] in mask [B, T] / divisor; None: that of this mask alone."""
    divisor = denominator(mask, aggregate) if divisor is None else divisor
    return (row_mean(values, mask) if aggregate == "sequence" else values * mask).sum() / divisor


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
    tis       clip(w, lo, hi): truncated importance sampling, biased, bounded; without bounds, (0, math.inf), unbiased
    mask      w inside the bounds, else 0 (IcePop, AReaL): a token that the two disagree on is no evidence
    sequence  w, and 0 for a whole row whose geometric mean of w leaves the bounds

    NaN and inf become 0 in all, and belong to `out`, as does what is outside of the bounds. The denominator of the loss
    goes on counting what is dropped. Sample at the trainer's temperature and without top-k or top-p, or w is wrong.
    """
    rollouts.check_choice("correction", correction, BOUNDS)
    low, high = BOUNDS[correction] if bounds is None else bounds
    log_w = (at_least_float32(old_logprob) - at_least_float32(behaviour_logprob)).detach().masked_fill(mask == 0, 0)
    w = log_w.exp()
    judged = row_mean(log_w, mask).exp()[:, None] if correction == "sequence" else w
    inside = (judged >= low) & (judged <= high) & w.isfinite()  # NaN compares false
    weights = torch.where(w.isfinite(), w.clamp(low, high), 0) if correction == "tis" else torch.where(inside, w, 0)
    return weights, ~inside & (mask != 0)


def check_loss_arguments(logprob, kind, dual_clip, correction, kl_coef, tensors):
    """Raises ValueError for what `policy_loss` cannot take. tensors: dict of what has logprob's shape, or is None."""
    rollouts.check_choice("kind", kind, SURROGATES)
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
    aggregate, denominator: see the function `denominator`. correction, bounds: `correction_weights`; None is w = 1.
    kl_kind: `kl_estimate`; kl_ratio: times w pi / pi_old, for samples that are not of pi. Computed in float32 (float64
    for float64). On-policy the loss is near 0, since A has mean 0: it does not measure progress. Raises ValueError for
    unknown kinds, shapes that do not fit, and what is missing.

    Metrics, detached, each a mean over the tokens of the mask:

    ratio      mean of r: 1 at the first update of a batch
    clip_low   fraction of tokens that the clip acts on below 1 - lo; only where A < 0, except for cispo
    clip_high  the same above 1 + hi; only where A > 0, except for cispo
    kl_old     KL(old || new), nats a token: how far the updates of this batch have gone
    kl_ref     KL(new || ref), the estimate kl_kind, with ref_logprob
    with behaviour_logprob (blind under --correction=clip, where old is behaviour):
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
    kl = None if ref is None else kl_estimate(logprob, ref.detach(), kl_kind)
    if kl is not None and kl_ratio:
        kl = kl * w * ratio_terms(logprob, old, mask)
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


# ---- 3. settings --------------------------------------------------------------------------------------------------

CHOICES = dict(advantage=ADVANTAGES, surrogate=SURROGATES, aggregate=AGGREGATES, overlong=("zero", "filter"))
CHOICES["correction"] = ("", "clip", *BOUNDS)


@dataclass
class GRPOConfig:
    """Settings of --recipe=grpo. The comment is the --help text."""

    envs: str = "sort,countdown"  # of every batch, by commas: tasks.ENVIRONMENTS, sort:10 for size 10; twice is twice
    warm_start: int = 70  # steps of supervised learning on demonstrations of the environments, before the first answer
    cut_thoughts: float = 0.0  # share of demonstrations whose thought stops early: they teach to answer under a budget
    no_thoughts: float = 0.0  # share of demonstrations whose thinking is turned off
    rl_lr: float = 4e-4  # peak learning rate after the warm start
    group_size: int = 8  # G, answers to a prompt; batch_size, times grad_accum, is prompts times G
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
    teachers: str = ""  # distillation (MOPD) in the place of rewards: a run's folder for each environment, by commas

    def __post_init__(self):
        for name, choices in CHOICES.items():
            rollouts.check_choice(name, getattr(self, name), choices)
        check_ranges(self, temperature=(1e-3, 100.0))
        if self.group_size < 2 and not self.teachers.strip(", "):
            raise ValueError("--group_size=1 leaves nothing to compare an answer with; it takes --teachers")
        if self.cut_thoughts + self.no_thoughts > 1:
            raise ValueError("--cut_thoughts and --no_thoughts share the demonstrations: they are at most 1 together")
        if self.teachers and (self.length_coef or self.low_effort or self.dynamic_sampling):
            raise ValueError("--teachers replace rewards: leave out length_coef, low_effort, dynamic_sampling")


# ---- 4. the objective ---------------------------------------------------------------------------------------------

POOL, TRIES = 2048, 8  # tasks of an environment that a curriculum orders, at most; answers that tell a pass rate


def shaped_advantages(settings, rewards, tasks, completions, tokenizer):
    """Returns A [B] of answers with rewards [n, G], with what low effort and length control make of it."""
    c, G = settings, settings.group_size
    if not (c.length_coef or c.low_effort):
        return advantages(rewards, c.advantage).flatten()
    lengths, shaped = rollouts.part_lengths(tasks, completions, tokenizer, G), rewards
    if c.low_effort:
        shaped = rollouts.low_effort_rewards(rewards, tasks[::G], lengths[0], c.low_effort_tokens)
    A = advantages(shaped, c.advantage) + rollouts.brevity_advantages(rewards, lengths, c.length_coef)
    return A.flatten()


def demonstrations(settings, model, tasks, tokenizer, rng):
    """Returns {"ids", "targets"}, int64 [B, T] on the model's device: the `demonstration_rows` of tasks."""
    rows = demonstration_rows(tasks, tokenizer, rng, settings.cut_thoughts, settings.no_thoughts)
    return dict(zip(("ids", "targets"), to_device(model, *rows)))


class GRPO(Objective):
    """Reinforcement learning from verifiable rewards, after a supervised warm start in the same run.

    Metrics, beside those of `policy_loss` and `rollouts.rollout_metrics`: informative, the share of the drawn groups
    whose answers differ in reward; pass_rate, before rewards, of the tasks that curricula drew; entropy of the policy,
    nats a token (a collapse means no more exploration); tokens learnt from; rollout_tokens_per_s, of sampling.

    Uninformative groups still get the entropy bonus, which keeps them exploring, and the KL. A mixture of experts is
    balanced by its bias alone, as in Nemotron's RL; its router is trained, where theirs is not.
    """

    Settings = GRPOConfig
    fixed = ("envs", "updates", "group_size", "curriculum", "grad_accum")

    def __init__(self, settings, tokenizer, batch_size, seed=0, rank=0, world_size=1, grad_accum=1):
        self.settings, self.tokenizer, self.batch_size, self.grad_accum = settings, tokenizer, batch_size, grad_accum
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.envs = [environment(spec.strip()) for spec in settings.envs.split(",")]
        self.max_new_tokens = max(env.max_new_tokens for env in self.envs)
        rollouts.check_batch(settings, batch_size, grad_accum, self.envs, seed)
        self.n_prompts = batch_size * grad_accum // settings.group_size
        self.example = self.envs[0].sample(np.random.default_rng(seed)).prompt
        self.state = {}  # of a checkpoint: answers with updates still to come, copies of weights, pass rates
        self.session, self.generator = DecodeSession(), None
        self.copies = PolicyCopies(self.state)
        n_tasks = min(POOL, settings.curriculum * self.n_prompts // len(self.envs))
        self.curricula = Curricula(self.envs, n_tasks, settings.curriculum, seed, rank)
        self.teachers = rollouts.load_teachers(settings.teachers, self.envs)

    @classmethod
    def from_run(cls, run, settings):
        """Returns the objective of a run. Raises ValueError for settings that do not go together."""
        c, before, tokenizer = run.config, settings.warm_start, Tokenizer(run.tokenizer)
        objective = cls(settings, tokenizer, c.batch_size, run.seed, run.rank, run.world_size, c.grad_accum)
        rollouts.check_run(run, before, f"--warm_start={before}", "--envs")
        return objective

    def build(self, config):
        """Returns None: a Hybrid. Raises ValueError for one with dropout."""
        rollouts.check_dropout(config)

    def about(self):
        """Returns a line about the data."""
        c, n = self.settings, self.n_prompts
        return f"{c.envs}; {c.warm_start} steps of demonstrations, then {n} prompts x {c.group_size} answers a batch"

    def lr_scale(self, step, lr, part=""):
        """Returns what the learning rate `lr` is multiplied by: supervised steps can be larger."""
        return 1.0 if step < self.settings.warm_start else self.settings.rl_lr / lr

    def state_dict(self):
        """Returns what a checkpoint needs of the objective: tensors, numbers, and lists and dicts of them."""
        return self.state | dict(left=self.curricula.state())

    def load_state_dict(self, state):
        """Takes back what `state_dict` returned."""
        self.state = {name: value for name, value in state.items() if name != "left"}
        self.copies = PolicyCopies(self.state)
        if "pass_rates" in self.state:
            self.curricula.start(self.state["pass_rates"], state["left"])

    @fresh_casts()
    def batch(self, model, step):
        """Returns a micro-batch: {"ids", "targets"} of demonstrations, or after the warm start judged answers.

        step: a micro-step. An update has grad_accum of them, and "denominator" counts what all their rows hold. Answers
        are sampled at the first one of `updates` updates, for all of them.
        """
        c, device, (step, micro) = self.settings, next(model.parameters()).device, divmod(step, self.grad_accum)
        if step < c.warm_start:
            rng, n = np.random.default_rng((self.seed, step, 1)), self.batch_size * self.grad_accum
            whole, further = demonstrations(c, model, self.tasks(step, n), self.tokenizer, rng), {}
            counted, aggregate = whole["targets"] >= 0, "token"
        else:
            self.begin_rewards(model)
            update = (step - c.warm_start) % c.updates
            if update == micro == 0:
                self.state["rollouts"], self.state["metrics"] = self.rollouts(model, step)
            answers, further = self.state["rollouts"], dict(metrics=self.state["metrics"])
            whole = {name: value.tensor_split(c.updates)[update].to(device) for name, value in answers.items()}
            counted, aggregate = whole["mask"], c.aggregate
        parts = dict(micro_batches=self.grad_accum, processes=self.world_size)
        further["denominator"] = denominator(counted, aggregate, self.max_new_tokens, **parts)
        return {name: value.tensor_split(self.grad_accum)[micro] for name, value in whole.items()} | further

    def rollouts(self, model, step):
        """Returns (batch, metrics): fresh answers, judged and compared; in the batch a row for each of n G answers."""
        c, G, n = self.settings, self.settings.group_size, self.n_prompts
        self.generator = self.generator or torch.Generator(next(model.parameters()).device)  # captured by CUDA graphs
        generator = self.generator.manual_seed(hash((self.seed, step, self.rank)) % 2**63)
        sampler = self.copies.sampler(model, step - c.warm_start, c.sampler_every, c.updates)
        tasks, parts, verdicts, seconds = [], [], [], []  # of all draws; parts: Answers of each
        self.curricula.drawn_rates = []

        def draw(n):
            """Returns n groups, by their place among all that were drawn, and their rewards [n, G]."""
            new = [task for task in self.tasks(step, n, again=len(parts)) for _ in range(G)]
            began = time.perf_counter()
            parts.append(self.answer(sampler, new, generator))  # 1. sample G answers to each prompt
            seconds.append(time.perf_counter() - began)
            verdicts.extend(judged_answers(new, parts[-1]))  # 2. judge them
            tasks.extend(new)
            rewards = torch.tensor([reward for reward, _ in verdicts[-n * G :]]).view(-1, G)
            return range(len(tasks) // G - n, len(tasks) // G), rewards

        groups, share = rollouts.dynamic_sampling(draw, n, c.dynamic_sampling)  # one draw, if its setting is 0
        rewards = torch.tensor([reward for reward, _ in verdicts]).view(-1, G)  # [groups drawn, G]
        uninformative = [i for i in range(len(rewards)) if i not in set(groups)]  # they fill up what is missing
        groups = torch.tensor(sorted((groups + uninformative)[:n]))
        rows = (groups[:, None] * G + torch.arange(G)).flatten()  # [n G], of all the answers
        answers = join_answers(parts, self.tokenizer.end_of_text)

        metrics = rollout_metrics(self.envs, tasks, answers, verdicts)
        if self.curricula.drawn_rates:
            metrics["pass_rate"] = float(np.mean(self.curricula.drawn_rates))
        metrics |= dict(informative=share, rollout_tokens_per_s=answers.mask.sum().item() / sum(seconds))
        if c.focus:
            weight, which = self.state.get("focus"), informative(rewards)
            self.state["focus"] = rollouts.track_informative(weight, self.envs, tasks[::G], which)

        tasks, answers = [tasks[i] for i in rows], answers.select(rows)
        A = shaped_advantages(c, rewards[groups], tasks, answers.completions, self.tokenizer)  # 3. compare: [n G]
        mask = rollouts.keep_only(answers.mask, answers.finished) if c.overlong == "filter" else answers.mask
        batch = dict(ids=answers.ids, mask=mask, behaviour_logprob=answers.logprob, advantages=A.to(mask.device))
        return batch | self.other_policies(model, batch, tasks), metrics  # 4. what `loss` compares them with

    def loss(self, model, batch):
        """Returns (loss, metrics)."""
        c, divisor = self.settings, batch["denominator"]
        if "targets" in batch:
            tokens = (batch["targets"] >= 0).sum()
            loss, metrics = model.loss(batch["ids"], batch["targets"])  # a mean over them
            return loss * (tokens / divisor), metrics | dict(tokens=tokens)
        mask = batch["mask"]
        logprob, entropy = model.logprobs(batch["ids"], mask, c.temperature)
        loss, metrics = policy_loss(
            logprob, batch.get("old_logprob", logprob), batch["advantages"], mask, c.surrogate,
            (c.clip_low, c.clip_high), aggregate=c.aggregate, denominator=divisor,
            behaviour_logprob=batch["behaviour_logprob"], correction=c.correction if c.correction in BOUNDS else None,
            ref_logprob=batch.get("ref_logprob"), kl_coef=c.kl_coef, kl_kind="k3+",
        )  # fmt: skip
        bonus = c.entropy_coef * aggregate_tokens(entropy, mask, c.aggregate, divisor)
        entropy = entropy.detach().sum() / mask.sum().clamp(min=1)
        return loss - bonus, metrics | batch["metrics"] | dict(entropy=entropy, tokens=mask.sum())

    @torch.no_grad()
    def evaluate(self, model, n=128):
        """Returns reward_<env>, the mean over sampled answers to n held-out prompts, and reward, their mean."""
        tasks, temperature = self.tasks(0, n * len(self.envs), held_out=True), self.settings.eval_temperature
        generator = torch.Generator(next(model.parameters()).device).manual_seed(self.seed)
        prompts = [task.prompt for task in tasks]
        answers = sample_answers(model, self.tokenizer, prompts, self.max_new_tokens, temperature, generator)
        return rollouts.mean_rewards(tasks, judged_answers(tasks, answers))

    # -- what `batch` and `rollouts` call

    def tasks(self, step, n, held_out=False, again=0):
        """Returns n tasks by (seed, step, rank) and number of draw; with curriculum or focus, by earlier ones too."""
        c, rng = self.settings, np.random.default_rng((self.seed, step, self.rank, held_out, again))
        if held_out:
            return [sample_task(env, rng, held_out=True) for env in rollouts.focused(self.envs, n, None, 0, rng)]
        if self.curricula.orders:
            tasks = self.curricula.draw(n, step - c.warm_start, rng)
        else:
            envs = rollouts.focused(self.envs, n, self.state.get("focus"), c.focus, rng)
            tasks = [sample_task(env, rng) for env in envs]
        return with_low_effort(tasks, rng.random(n) < c.low_effort)

    def begin_rewards(self, model):
        """Remembers the policy after its warm start: weights for the KL, pass rates for curricula. Once."""
        if self.settings.kl_coef and "reference" not in self.state:
            self.copies.keep("reference", model)
        if self.settings.curriculum and not self.curricula.orders:
            generator = torch.Generator(next(model.parameters()).device).manual_seed(self.seed)

            def rewards_of(tasks):
                return [reward for reward, _ in judged_answers(tasks, self.answer(model, tasks, generator))]

            self.state["pass_rates"] = self.curricula.pass_rates(rewards_of, TRIES, self.batch_size)
            self.curricula.start(self.state["pass_rates"])

    def answer(self, model, tasks, generator):
        """Returns the model's Answers to tasks."""
        where = dict(temperature=self.settings.temperature, generator=generator, session=self.session)
        return sample_answers(model, self.tokenizer, [t.prompt for t in tasks], self.max_new_tokens, **where)

    @torch.no_grad()
    def other_policies(self, model, batch, tasks):
        """Returns what other policies than the one in training make of a batch, where a setting asks for them."""
        c, ids, mask, others = self.settings, batch["ids"], batch["mask"], {}
        if c.correction == "clip":
            others["old_logprob"] = batch["behaviour_logprob"]
        elif c.updates > 1 or c.correction or self.teachers:
            others["old_logprob"] = model.logprobs(ids, mask, c.temperature)[0]
        if c.kl_coef:
            others["ref_logprob"] = self.copies.get("reference", model).logprobs(ids, mask, c.temperature)[0]
        if self.teachers:  # MOPD: advantages [B, T-1] in the place of those of rewards
            of_teacher = rollouts.teacher_logprobs(self.teachers, tasks, ids, mask, c.temperature)
            others["advantages"] = rollouts.mopd_advantages(of_teacher, others["old_logprob"])
        return others


# fmt: off
PRESETS = {  # for tasks of a few dozen bytes: 0.4 M and 7 M parameters
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
EVERYTHING = "sort:10,countdown,countdown:3,add:5,chain,brackets,json,instruct,lookup,tool"  # and again what is hard:
EVERYTHING += ",sort:10,countdown,countdown:3,add:5,countdown:3,countdown:3"
REWARDS = dict(tokenizer="bytes", context=64, lr=3e-3, weight_decay=0.0, decay=0.2, warmup=20, compile=False)
RECIPES = {  # short rows of many lengths: nothing for a compiler to gain. batch_size is prompts times group_size
    "grpo": Recipe(
        GRPO,
        cpu=dict(preset="grpo-tiny", **REWARDS, batch_size=256, steps=420, eval_every=70),
        gpu=dict(preset="grpo", **REWARDS | dict(lr=1e-3, warmup=100), batch_size=1280, steps=1700, eval_every=100),
        settings_gpu=dict(envs=EVERYTHING, warm_start=700, rl_lr=2e-4, entropy_coef=0.01),
    )
}

# ---- 5. python grpo.py: what rewards add to demonstrations --------------------------------------------------------

ALGORITHMS = {  # of the table at the top, with two updates for each batch of answers: with one, ratios are 1
    "GRPO": dict(advantage="grpo", aggregate="sequence", clip_high=0.2),
    "DAPO": dict(advantage="grpo", aggregate="token"),
    "Dr. GRPO": dict(advantage="dr", aggregate="constant", clip_high=0.2),
    "GSPO": dict(advantage="grpo", surrogate="gspo", aggregate="sequence", clip_low=0.03, clip_high=0.04),
    "CISPO": dict(advantage="grpo", surrogate="cispo", clip_low=1.0, clip_high=4.0),
}


def demo(env="sort:5", warm_start=50, steps=25, batch_size=96):
    """Prints the share of held-out prompts answered right after demonstrations, then after rewards by five losses."""
    device, tokenizer, began = "cuda" if torch.cuda.is_available() else "cpu", Tokenizer("bytes"), time.perf_counter()
    torch.manual_seed(0)
    model = Hybrid(replace(PRESETS["grpo-tiny"], vocab_size=320)).to(device)
    start = GRPO(GRPOConfig(envs=env, warm_start=warm_start), tokenizer, batch_size)
    learn(model, start, warm_start, 3e-3)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    base = start.evaluate(model, 256)["reward"]
    print(f"{env}, on a {device}: share of 256 held-out prompts answered right; {steps} steps of {batch_size} answers")
    print(f"{warm_start} steps of demonstrations {base:8.2f}")
    for name, flags in ALGORITHMS.items():
        model.load_state_dict(weights)
        settings = GRPOConfig(envs=env, warm_start=0, updates=2, entropy_coef=0.0, **flags)
        objective = GRPO(settings, tokenizer, batch_size, seed=100)
        learn(model, objective, steps, 4e-4)
        reward = objective.evaluate(model, 256)["reward"]
        print(f"  then rewards, {name:9} {reward:12.2f}   {reward - base:+.2f}", flush=True)
    print(f"{time.perf_counter() - began:.0f} s. Longer, with seeds and a picture: python -m experiments.grpo losses")


if __name__ == "__main__":
    demo()
