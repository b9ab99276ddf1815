"""Masked diffusion language models, their parallel decoders, and dUltra, which learns what to unmask together.

Papers   MDLM, arXiv:2406.07524; LLaDA, 2502.09992; first-hitting, 2409.02908; Fast-dLLM, 2505.22618; entropy-bounded
         unmasking, 2505.24857; the planner's network, LLaDOU, 2505.10446; dUltra, 2512.21446 (chinsengi/dUltra-os).
Idea     Train a model that sees both ways to fill in masked tokens, any of them, and it can write in any order and
         several at once. But tokens written together are drawn independently, each as if the others were unknown: fast
         is wrong where they hang together. Rules by confidence are slow where tokens are uncertain and yet independent;
         dUltra trains a small planner, by the rewards of whole texts, to say which tokens are safe together.
Picture  x [B,T], M where unknown --backbone, both ways, no time--> h [B,T,C] --lm_head--> logits [B,T,V], none for M
               ^                                                      |                          | one pass: confidence,
               |                                                      '--planner, AdaLN--> z     | entropy, margin
               |                                                                           |     v
               '------ tokens, where chosen ------ at least one a row ------ rule(probs, eligible, step) -> bool [B,T]

         log pi(step) = sum log sigmoid(+-z) over what was eligible + sum log softmax(logits / T)[token] over the chosen
         A = R - mean of the group;   loss = - sum over steps of min(r A, clip(r) A) / (B length)
Read     1, 2: model and likelihood; 4, 5: rules and decoder; 6 and, in 8, DUltra: what is learnt. 3 is speed.
Symbols  code            paper     meaning
         t               t         share of the tokens that are masked: alpha_t = 1 - t
         maskable        answer    tokens that may be masked; a prompt is not
         eligible        E         masked, and in the block that is decoded now
         action          U         tokens that a step writes
         nfe             NFE       forwards of the backbone until a row's last mask is gone, for each row
         keys            key mask  False on padding, which nothing attends to
         hidden          h         what the backbone knows of each token, after the final norm
         z               logit p   how ready a token is to be written: the planner's coin falls with chance sigmoid(z)
         order           -         the forward, 1 ... nfe, that wrote a token
Limits   With the exact posterior the bound is log p, for every text and order; one token a step samples the joint
         distribution, two do not; all eligible chosen is one forward; cached is uncached at the first step of a block;
         log pi adds up to one over all actions: see tests/test_mdlm_dultra.py.
Differs  From the authors' code, on purpose. A step in which no token was drawn writes the likeliest: {a} then has
         probability prod_{j != a} (1 - p_j), where the authors score it as if a had been drawn. Log-probabilities are
         of the temperature that was sampled at. Padding is masked everywhere. The factor rule stops at the first that
         fails. The planner's clock is scaled by 1000 as in DiT, or it would stand still. It has an embedding for each
         position, not rotary ones: tokens that are equally unknown would be equal to it. Its warm start is plain
         cross-entropy against smoothed targets: balanced classes would teach it to unmask too much, certainty leaves
         nothing to explore. The masks that it learns from then are spread at random, not all behind one position.
         `sample=False` takes what is above one half, not the floor(sum p) likeliest, and speed is a shift of z, not a
         factor on p. A step costs lambda / length, not 1 / 500: at the paper's 256 tokens lambda = .25 is its 2 points
         for a right answer against .1 NFE / 50. By default the planner alone learns from rewards (--joint: the
         backbone, too), without a teacher (--distill_coef), and from what is worse than its group, too, as the authors
         do not (--advantage_floor=0).
"""

import json
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

from common.checkpoints import config_fields, read_config, read_weights
from common.data import Tokenizer
from common.objectives import NextToken, Objective, Recipe
from common.tasks import BLANK, ENVIRONMENTS, FILL_INS, environment, sample_task, score_all
from grpo import LARGEST, REWARDS, advantages, policy_loss
from kernels import at_least_float32, block_of, jit, linear_logprob, pick_backend
from nano_hybrid import PRESETS as TEXT_PRESETS
from nano_hybrid import (
    TEXT_CPU,
    TEXT_GPU,
    Attention,
    Block,
    Hybrid,
    HybridConfig,
    rotate,
)
from rollouts import check_choice, check_dropout, check_run

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

# ---- 1. the model -------------------------------------------------------------------------------------------------


@dataclass
class View:
    """What attention may look at. The positions that are computed stand at start, start + 1, ... of the text."""

    keys: torch.Tensor | None = None  # bool [B, L], False on padding
    start: int = 0
    kv: dict | None = None  # layer -> (k, v), each [B, Hkv, L, D]: of all positions, as they were last computed
    fixed = False  # `Block` has a path of its own for caches of CUDA graphs, which have it True

    def all(self, layer, k, v):
        """Returns the keys and values of the whole text, those of the computed positions new, the others as stored."""
        if self.kv is None:
            return k, v
        if layer not in self.kv:
            self.kv[layer] = k, v
        else:
            for stored, new in zip(self.kv[layer], (k, v)):
                stored[:, :, self.start : self.start + new.shape[2]] = new
        return self.kv[layer]


class BidirectionalAttention(Attention):
    """Grouped-query attention that looks both ways."""

    def forward(self, x, view):
        """Returns [B, T, C] for the positions x [B, T, C] of a text."""
        q, k, v = self.qkv(lambda projection: projection(x))  # [B, heads, T, D]
        if self.rotary_base:
            q, k = (rotate(t, view.start, self.rotary_base) for t in (q, k))
        k, v = view.all(self.index, k, v)  # [B, Hkv, L, D]
        mask = None if view.keys is None else view.keys[:, None, None]  # [B, 1, 1, L]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def places(T, keys, device):
    """Returns int64 [T] or [B, L], where in its text a token stands. keys [B, L] or None: padding is on the left."""
    return torch.arange(T, device=device) if keys is None else (keys.cumsum(1) - 1).clamp(min=0)


def bidirectional_blocks(config, pattern):
    """Returns the residual layers of a pattern, as nano_hybrid.py has them, with attention that looks both ways."""
    blocks = nn.ModuleList(Block(config, letter, index) for index, letter in enumerate(pattern))
    for index, letter in enumerate(pattern):
        if letter == "*":
            blocks[index].mixer = BidirectionalAttention(config, index)
    return blocks


class MaskedDiffusionLM(Hybrid):
    """The language model of nano_hybrid.py, looking both ways: of attention, MLPs and mixtures of experts (* - E).

    The last token of the vocabulary is the mask. There is no row for it in the softmax, no token is ever masked by the
    model, and what is known is never written again: SUBS of MDLM, section 3.2. There is no time either: the share of
    masks says it. positions: how many there are at most. The model has an embedding for each if it has no rotary ones
    (config.rotary_base), the planner wherever they are given. planner: whether there is an UnmaskPlanner. Parameter
    names are those of `Hybrid`, with `positions` and `planner`.
    Raises ValueError for layers that read from left to right, and for a model without positions of any kind.
    """

    parts = ("planner",)

    def __init__(self, config, positions=None, planner=False):
        if set(config.hybrid_override_pattern) - set("*-E") or config.num_nextn_predict_layers:
            raise ValueError(
                f"hybrid_override_pattern={config.hybrid_override_pattern!r} with num_nextn_predict_layers="
                f"{config.num_nextn_predict_layers}: masked diffusion looks both ways; take *, - and E, and 0"
            )
        if not positions and not config.rotary_base:
            raise ValueError("a masked diffusion model needs positions: set rotary_base (1e4 is usual)")
        super().__init__(config)
        self.model.layers = bidirectional_blocks(config, config.hybrid_override_pattern)
        self.positions = None if config.rotary_base else nn.Embedding(positions, config.hidden_size)
        self.planner = UnmaskPlanner(config, positions) if planner else None
        if self.lm_head.weight.device.type != "meta":
            self.init_weights()
            if planner:
                self.planner.init_weights()

    @property
    def mask_id(self):
        """M, the token that stands for an unknown one."""
        return self.config.vocab_size - 1

    @property
    def n_layers(self):
        """Layers in the sense of a Transformer, attention and what follows it."""
        return self.config.hybrid_override_pattern.count("*")

    def encode(self, ids, keys=None, kv=None, start=0):
        """Returns hidden states [B, T, C] after the final norm. ids [B, T] stand at start ... start + T of the text.

        keys bool [B, L], False on padding, which must stand on the left. kv: a dict, filled by a call with the whole
        text; later calls take from it what they are not given, and put in what they compute.
        """
        x = self.model.embeddings(ids)  # [B, T, C]
        if self.positions is not None:
            place = places(start + ids.shape[1], keys, ids.device)
            x = x + self.positions(place[..., start : start + ids.shape[1]])
        x = F.dropout(x, self.config.hidden_dropout, self.training)
        view = View(keys, start, kv)
        for layer in self.model.layers:
            x = layer(x, view)
        return self.model.norm_f(x)

    def logits(self, hidden):
        """Returns logits [..., V - 1] for hidden [..., C]: there is none for the mask, the last token."""
        return F.linear(hidden, self.lm_head.weight[: self.mask_id])

    def forward(self, ids, keys=None):
        """Returns float32 logits [B, T, V] for ids [B, T] int64, -inf for the mask."""
        return F.pad(at_least_float32(self.logits(self.encode(ids, keys))), (0, 1), value=-math.inf)

    def logprobs(self, ids, masked, keys=None, temperature=1.0):
        """Returns float32 [B, T]: log p of ids [B, T] where masked [B, T], given the others; 0 elsewhere."""
        hidden = self.encode(ids.masked_fill(masked, self.mask_id), keys)
        weight, targets = self.lm_head.weight[: self.mask_id], ids[masked]
        logprob, _ = linear_logprob(hidden[masked], weight, targets, temperature)  # [n]
        return at_least_float32(hidden[..., 0]).new_zeros(ids.shape).masked_scatter(masked, logprob)

    def loss(self, ids, maskable=None, keys=None, generator=None):
        """Returns `mdlm_loss(self, ...)`; in training, mixtures of experts add their balance loss, as in `Hybrid`."""
        loss, metrics = mdlm_loss(self, ids, maskable, generator, keys)
        return loss + self.config.router_aux_loss_coef * self.pop_balance_losses(), metrics

    def generate(self, *_, **__):
        """Raises TypeError: a masked diffusion model is decoded, not continued."""
        raise TypeError("a MaskedDiffusionLM fills in masks: use mdlm_dultra.decode")

    def save_pretrained(self, directory, state_dict=None, **extra):
        """Writes config.json and model.safetensors, which `from_pretrained` opens."""
        super().save_pretrained(directory, state_dict, **extra | dict(architectures=["MaskedDiffusionLM"]))

    @classmethod
    def from_pretrained(cls, directory, **overrides):
        """Returns the model that `save_pretrained` wrote. Raises FileNotFoundError or ValueError."""
        read = read_config(directory)
        if read.get("architectures") != ["MaskedDiffusionLM"]:
            raise ValueError(
                f"{directory} is no masked diffusion model: its architecture is {read.get('architectures')}"
            )
        config = HybridConfig(**(config_fields(read, HybridConfig) | overrides))
        weights = read_weights(directory, config.n_routed_experts)
        embeddings = [weights[name] for name in ("positions.weight", "planner.positions.weight") if name in weights]
        positions = len(embeddings[0]) if embeddings else None
        with torch.device("meta"):
            model = cls(config, positions, planner="planner.out.weight" in weights)
        model.load_weights(weights, directory)
        return model


class ExactPosterior:
    """The ideal model of a text that is one of N, all equally likely: what a MaskedDiffusionLM learns to be.

    texts [N, T] int64, below mask_id. What it has of a model: `encode`, `logits`, `logprobs`, and a call.
    """

    n_layers, planner = 1, None

    def __init__(self, texts, mask_id):
        self.texts, self.mask_id = texts, mask_id
        self.one_hot = F.one_hot(texts, mask_id).double()  # [N, T, V]

    def encode(self, ids, keys=None, kv=None, start=0):
        """Returns log p [B, T, V]: of every token, among the texts that agree with what is known of ids [B, T].

        Where none does, all tokens are alike.
        """
        agrees = ((ids[:, None] == self.texts) | (ids[:, None] == self.mask_id)).all(-1).double()  # [B, N]
        counts = torch.einsum("bn,ntv->btv", agrees, self.one_hot)
        return (counts / agrees.sum(1).clamp(min=1)[:, None, None]).log().clamp(min=-1e4)

    def logits(self, hidden):
        """Returns log p itself."""
        return hidden

    def __call__(self, ids, keys=None):
        return F.pad(self.encode(ids), (0, 1), value=-math.inf)

    def logprobs(self, ids, masked, keys=None, temperature=1.0):
        """Returns log p [B, T] of ids where masked, 0 elsewhere."""
        logp = torch.log_softmax(self.encode(ids.masked_fill(masked, self.mask_id)) / temperature, -1)
        return logp.gather(-1, ids[..., None]).squeeze(-1).masked_fill(~masked, 0)


# ---- 2. the objective, and the likelihood -------------------------------------------------------------------------
#
# Of a text of A tokens mask a share t. The bound on its negative log-likelihood, in three forms that are exactly equal:
#
#   integral     E over t in (0, 1] of  1/t  sum over the masked of -log p(x_i | the others)        MDLM, equation (10)
#   count        E over k in 1 ... A of A/k  sum over k masked, any k of them, of the same           LLaDA, equation (6)
#   any order    E over orders of       sum over j of -log p(x_order[j] | x_order[0 ... j-1])
#
# since a set of k masked tokens has the weight (k-1)! (A-k)! / A! in all of them. The first trains, the second has the
# least noise, the third says what it is: the cost of an autoregressive model that reads in a random order.

EPS = 1e-3  # smallest t: 1/t would be all noise


def noise_levels(B, generator=None, device=None):
    """Returns t [B] in (EPS, 1], one in each B-th of it: stratified, which takes most of the noise out of 1/t.

    Source: MDLM's `antithetic_sampling`.
    """
    u = (torch.arange(B, device=device) + torch.rand(B, generator=generator, device=device)) / B
    return EPS + (1 - EPS) * (1 - u)


def mdlm_loss(model, ids, maskable=None, generator=None, keys=None):
    """Returns (loss, metrics): the bound in nats per maskable token, the mean over rows, by the integral form.

    ids [B, T] int64, without masks; maskable bool [B, T], None for all: a prompt that stays clean is not, and each row
    is divided by how many it has. Padding behind an answer (an end of text) is maskable: so the model learns to stop.
    generator: on the device of ids. keys: `MaskedDiffusionLM.encode`. Not divided by how many *are* masked: that would
    be BERT's loss, and no bound. Source: MDLM, section 3.4; LLaDA, Algorithm 1 and, with a prompt, 2.

    metrics: loss; masked_loss, the plain cross-entropy of a masked token; mask_rate.
    """
    maskable = torch.ones_like(ids, dtype=torch.bool) if maskable is None else maskable
    t = noise_levels(len(ids), generator, ids.device)  # [B]
    masked = maskable & (torch.rand(ids.shape, generator=generator, device=ids.device) < t[:, None])
    logprob = model.logprobs(ids, masked, keys)  # [B, T]
    loss = (-logprob.sum(1) / t / maskable.sum(1).clamp(min=1)).mean()
    masked_loss = -logprob.detach().sum() / masked.sum().clamp(min=1)
    return loss, dict(loss=loss.detach(), masked_loss=masked_loss, mask_rate=masked.sum() / maskable.sum())


def random_ranks(maskable, generator=None):
    """Returns int64 [B, T]: the maskable positions of each row numbered 0, 1, ... in a random order, the others T."""
    order = torch.rand(maskable.shape, generator=generator, device=maskable.device).masked_fill(~maskable, 2).argsort(1)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).to(order).expand_as(order))
    return ranks.masked_fill(~maskable, maskable.shape[1])


@torch.no_grad()
def nelbo(model, ids, maskable=None, form="count", samples=16, generator=None, keys=None):
    """Returns (mean [B], standard error [B]) of the bound on -log p(maskable | the rest), in nats for the whole row.

    form: "count" (k spread evenly over the samples, and exactly k masks), "integral" or "order", which takes as many
    forwards a sample as there are tokens. With one sample there is no standard error: nan.
    """
    check_choice("form", form, ("count", "integral", "order"))
    maskable = torch.ones_like(ids, dtype=torch.bool) if maskable is None else maskable
    A, found = maskable.sum(1), []  # [B]
    shift = torch.rand(len(ids), generator=generator, device=ids.device)
    for sample in range(samples):
        u = (sample + shift) / samples  # [B] in [0, 1), stratified
        ranks = random_ranks(maskable, generator)
        if form == "order":
            A_max = int(A.max()) if len(ids) else 0
            steps = [(ranks >= j) & maskable for j in range(A_max)]  # masked before step j, which reads rank j
            logprob = [(model.logprobs(ids, m, keys) * (ranks == j)).sum(1) for j, m in enumerate(steps)]
            found.append(-sum(logprob, torch.zeros(len(ids), device=ids.device)))
        elif form == "count":
            k = (u * A).floor() + 1  # 1 ... A
            found.append(-model.logprobs(ids, ranks < k[:, None], keys).sum(1) * A / k)
        else:
            t = EPS + (1 - EPS) * u
            noise = torch.rand(ids.shape, generator=generator, device=ids.device)
            found.append(-model.logprobs(ids, maskable & (noise < t[:, None]), keys).sum(1) / t)
    found = torch.stack(found)  # [samples, B]
    spread = found.std(0) if samples > 1 else torch.full_like(found[0], math.nan)
    return found.mean(0), spread / math.sqrt(samples)


# ---- 3. what a decoder has to know of the logits ------------------------------------------------------------------


class Probs(NamedTuple):
    """Of the probabilities at each position: what every rule decides by. Float32 and int64, all of one shape."""

    confidence: torch.Tensor  # of the token that would be written: the largest, or that of the one sampled
    token: torch.Tensor  # that one
    entropy: torch.Tensor  # in nats
    margin: torch.Tensor  # the largest probability minus the second


def softmax_statistics_ref(logits):
    """Returns Probs [N] of logits [N, V], V > 1; of equal ones the first token. Computed in float32 (float64)."""
    logp = torch.log_softmax(at_least_float32(logits), -1)
    (first, second), token = logp.topk(2, -1).values.exp().unbind(-1), logp.argmax(-1)
    entropy = -(logp.exp() * logp.clamp(min=-1e30)).sum(-1)  # 0 log 0 = 0
    return Probs(first, token, entropy, first - second)


# The kernel. A program owns a row and reads it once, LANES x GROUP logits at a time, 16 bytes to a lane. A lane keeps
# the largest logit of its groups and the chunk that one was in, and two sums against m, the largest logit of the first
# chunk (in base 2, which is what the GPU computes):
#
#       s = sum 2^(l - m),   w = sum 2^(l - m) (l - m),   l = logit log2(e)
#       confidence = 2^(max - m) / s,   entropy = ln(2) (log2 s - w / s),   margin = confidence - 2^(second - m) / s
#
# What is kept for each logit would cost more than reading it. So neither the token nor the second largest is: they are
# found in the groups of the winning lane, which are read again at the end, and in the largest of the other lanes. A
# running maximum would have to be agreed on, by all lanes, for each chunk. Where m proves too small (float32 ends at
# 2^127), the sums are made again against the maximum. Traffic: N V logits read and nothing else to speak of. PyTorch
# reads or writes them ten times: a float32 copy, a log-softmax, two products for the entropy, a top-2 and an argmax.

TOO_FAR = tl.constexpr(60.0) if triton else 60.0  # max - m, in base 2
LANES, WARPS = 512, 4
LOG2_E = tl.constexpr(math.log2(math.e)) if triton else math.log2(math.e)


@jit
def _add_to_sums(s, w, x, m):
    """Returns s and w with the logits x added."""
    below = tl.maximum(x * LOG2_E - m, -1e30)  # finite: 0 (-inf) is nan
    e = tl.exp2(below)
    return s + e, w + e * below


@jit
def _statistics_kernel(logits_ptr, confidence_ptr, token_ptr, entropy_ptr, margin_ptr, V, stride, LANES: tl.constexpr,
                       GROUP: tl.constexpr, MOST_CHUNKS: tl.constexpr):  # fmt: skip
    row, CHUNK = tl.program_id(0).to(tl.int64), LANES * GROUP
    logits_ptr += row * stride
    lanes, group = tl.arange(0, LANES), tl.arange(0, GROUP)
    at = lanes[:, None] * GROUP + group[None, :]  # [LANES, GROUP]
    x = tl.load(logits_ptr + at, at < V, -float("inf")).to(tl.float32)
    m = tl.maximum(tl.max(x) * LOG2_E, -1e30)
    s, w = tl.zeros([LANES, GROUP], tl.float32), tl.zeros([LANES, GROUP], tl.float32)
    best, place = tl.full([LANES], -float("inf"), tl.float32), tl.zeros([LANES], tl.int32)
    for start in range(0, V, CHUNK):
        x = tl.load(logits_ptr + start + at, at < V - start, -float("inf")).to(tl.float32)
        s, w = _add_to_sums(s, w, x, m)
        largest = tl.max(x, 1)
        place = tl.where(largest > best, start, place)
        best = tl.maximum(best, largest)
    top = tl.max(best, 0)
    if top * LOG2_E - m > TOO_FAR:
        m = top * LOG2_E
        s, w = tl.zeros([LANES, GROUP], tl.float32), tl.zeros([LANES, GROUP], tl.float32)
        for start in range(0, V, CHUNK):
            x = tl.load(logits_ptr + start + at, at < V - start, -float("inf")).to(tl.float32)
            s, w = _add_to_sums(s, w, x, m)
    winner = tl.min(tl.where(best == top, place + lanes * GROUP, V), 0) % CHUNK // GROUP
    at = tl.arange(0, MOST_CHUNKS)[:, None] * CHUNK + winner * GROUP + group[None, :]  # of all its groups
    x = tl.load(logits_ptr + at, at < V, -float("inf")).to(tl.float32)
    token = tl.min(tl.where(x == top, at, V))
    second = tl.maximum(
        tl.max(tl.where(at == token, -float("inf"), x)), tl.max(tl.where(lanes == winner, -float("inf"), best))
    )
    total, weighted = tl.sum(s), tl.sum(w)
    confidence = tl.exp2(top * LOG2_E - m) / total
    tl.store(confidence_ptr + row, confidence)
    tl.store(token_ptr + row, token.to(tl.int64))
    tl.store(entropy_ptr + row, (tl.log2(total) - weighted / total) / LOG2_E)
    tl.store(margin_ptr + row, confidence - tl.exp2(second * LOG2_E - m) / total)


def softmax_statistics_triton(logits):
    """Returns `softmax_statistics_ref(logits)`."""
    N, V = logits.shape
    logits = logits if logits.stride(1) == 1 else logits.contiguous()
    confidence, entropy, margin = torch.empty(3, N, device=logits.device).unbind(0)
    token = torch.empty(N, dtype=torch.int64, device=logits.device)
    group = 16 // logits.element_size()
    lanes = min(LANES, block_of(triton.cdiv(V, group)))
    if N:
        _statistics_kernel[(N,)](
            logits, confidence, token, entropy, margin, V, logits.stride(0), LANES=lanes, GROUP=group,
            MOST_CHUNKS=block_of(triton.cdiv(V, lanes * group)), num_warps=WARPS,
        )  # fmt: skip
    return Probs(confidence, token, entropy, margin)


def softmax_statistics(logits, backend="auto"):
    """Returns `softmax_statistics_ref(logits)`, Probs [N] of logits [N, V], on the backend asked for."""
    if logits.dim() != 2 or logits.shape[1] < 2:
        raise ValueError(f"logits is {list(logits.shape)}, expected [N, V] with V > 1")
    triton_runs = pick_backend(backend, logits.device, logits.dtype) == "triton"
    return (softmax_statistics_triton if triton_runs else softmax_statistics_ref)(logits)


# ---- 4. rules: what to write in a step ----------------------------------------------------------------------------
#
# A rule is a function (probs [B, T], eligible [B, T], step) -> bool [B, T]. What it chooses outside of eligible does
# not count, and for a row where it chooses nothing the most confident token is written (`chosen`). `step` has what few
# rules need.


class Step(NamedTuple):
    """What a rule may ask for beside probabilities."""

    ids: torch.Tensor  # [B, T] as they are, with masks
    hidden: torch.Tensor  # [B, T, C] after the final norm
    clock: torch.Tensor  # [B, T] uniform in [0, 1), drawn once for a text: when its time comes
    keys: torch.Tensor | None  # bool [B, T], False on padding
    mask_id: int
    generator: torch.Generator | None


def best(score, eligible, k):
    """Returns bool [B, T]: the k eligible positions of highest score in each row, the first of equal ones."""
    order = score.masked_fill(~eligible, -math.inf).argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).to(order).expand_as(order))
    return eligible & (ranks < torch.as_tensor(k, device=score.device).view(-1, 1))


def ancestral(steps=64):
    """Writes each token in one of so many steps, at random: MDLM's sampler, whose mask goes with chance (t - s) / t.

    That is a uniform step for each token, whatever the others do. Steps in which none falls due are left out, as they
    would repeat the forward before: at most min(steps, tokens) forwards.
    """

    def rule(probs, eligible, step):
        due = (step.clock * steps).floor().masked_fill(~eligible, steps)
        return due == due.amin(1, keepdim=True)

    return rule


def random_k(k=1):
    """Writes k tokens, any."""
    return lambda probs, eligible, step: best(-step.clock, eligible, k)


def first_hitting():
    """Writes one token after the other, in random order: the limit of `ancestral` for ever more steps, exactly."""
    return random_k(1)


def top_k(k=1, by="confidence"):
    """Writes the k tokens of highest confidence, highest margin or lowest entropy: LLaDA's and Dream's decoders."""
    check_choice("by", by, ("confidence", "margin", "entropy"))
    sign = -1 if by == "entropy" else 1
    return lambda probs, eligible, step: best(sign * getattr(probs, by), eligible, k)


def threshold(tau=0.9):
    """Writes all tokens of a confidence of at least tau. Source: Fast-dLLM, Algorithm 1."""
    return lambda probs, eligible, step: probs.confidence >= tau


def factor(f=1.0):
    """Writes the n most confident tokens, n the largest with (n + 1) (1 - c_n) < f up to it. Source: Fast-dLLM."""

    def rule(probs, eligible, step):
        c = probs.confidence.masked_fill(~eligible, -1).sort(dim=1, descending=True).values
        n = torch.arange(1, c.shape[1] + 1, device=c.device)
        passes = ((n + 1) * (1 - c) < f) & (c >= 0)
        return best(probs.confidence, eligible, passes.long().cumprod(1).sum(1).clamp(min=1))

    return rule


def entropy_bounded(gamma=0.1):
    """Writes the n tokens of lowest entropy, n the largest whose entropies add up to at most gamma beside the largest.

    The sum without the largest bounds what drawing them independently costs, in nats. Source: arXiv:2505.24857.
    """

    def rule(probs, eligible, step):
        H = probs.entropy.masked_fill(~eligible, math.inf).sort(dim=1).values
        passes = (H.cumsum(1) - H <= gamma) & H.isfinite()  # sorted: the largest is the last
        return best(-probs.entropy, eligible, passes.long().cumprod(1).sum(1).clamp(min=1))

    return rule


def planned(planner, shift=0.0, temperature=1.0, sample=True):
    """Writes what the planner draws, a coin for each token of chance sigmoid((z + shift) / temperature).

    sample=False: those whose chance is above one half. shift moves between safe (< 0) and fast (> 0). Where no coin
    falls, the token of highest chance. Source: dUltra; LLaDOU's network.
    """

    def rule(probs, eligible, step):
        z = (planner(step.hidden, eligible, step.ids == step.mask_id, step.keys) + shift) / temperature
        coins = torch.rand(z.shape, generator=step.generator, device=z.device) if sample else 0.5
        chosen = eligible & (coins < torch.sigmoid(z))
        return torch.where(chosen.any(1, keepdim=True), chosen, best(z, eligible, 1))

    rule.layers = 1  # that it computes in a step
    return rule


RULES = dict(
    ancestral=ancestral, first_hitting=first_hitting, random_k=random_k, top_k=top_k, threshold=threshold,
    factor=factor, entropy_bounded=entropy_bounded, planner=planned,
    margin=lambda k=1: top_k(k, "margin"), low_entropy=lambda k=1: top_k(k, "entropy"),
)  # fmt: skip


def rule_of(spec, model):
    """Returns the rule that a text asks for: threshold:0.9, top_k:2, entropy_bounded:0.1, planner, ...

    Raises ValueError for one that is not there.
    """
    name, _, number = spec.partition(":")
    check_choice("rule", name, RULES)
    if name == "planner" and model.planner is None:
        raise ValueError("rule='planner': this model has none; use threshold:0.9, say")
    whole = name in ("ancestral", "random_k", "top_k", "margin", "low_entropy")
    try:
        setting = [int(number) if whole else float(number)] if number else []
        if not all(math.isfinite(n) and (n >= whole or name == "planner") for n in setting):
            raise ValueError
        return planned(model.planner, *setting) if name == "planner" else RULES[name](*setting)
    except (TypeError, ValueError):
        raise ValueError(
            f"rule={spec!r}: {name} takes no {number!r}; write threshold:0.9, top_k:2, ancestral:64"
        ) from None


# ---- 5. the decoder -----------------------------------------------------------------------------------------------


@dataclass
class Decoded:
    """Texts with every mask filled in, and what that took."""

    ids: torch.Tensor  # [B, T] int64
    nfe: torch.Tensor  # [B] int64: forwards of the backbone until the row's last mask was gone
    order: torch.Tensor  # [B, T] int64: the forward, 1 ... nfe, that wrote the token; 0 for what was given
    layer_forwards: torch.Tensor  # [B] float: layers computed, of all positions; what a planner costs, a cache saves

    @property
    def tokens_per_forward(self):
        """TPF [B]: tokens written / NFE, ends of text too."""
        return (self.order > 0).sum(1) / self.nfe.clamp(min=1)


def block_ends(ids, mask_id, block_size=None):
    """Returns where the blocks end that have a mask, left to right. They are counted from the right edge, where all
    completions end, so that each row's are its own."""
    T, some = ids.shape[1], (ids == mask_id).any(0)
    size = block_size or max(1, T)
    return [end for end in sorted(range(T, 0, -size)) if some[max(0, end - size) : end].any()]


def in_block(masked, block_size=None):
    """Returns bool [B, T]: those masks that `decode` fills in first, given what is masked, bool [B, T]."""
    if block_size is None:
        return masked
    T = masked.shape[1]
    block = (torch.arange(T, device=masked.device) - T % block_size).div(block_size, rounding_mode="floor")  # [T]
    current = torch.where(masked, block, T).amin(1, keepdim=True)
    return masked & (block == current)


def chosen(rule, probs, eligible, step=None):
    """Returns bool [B, T], what a rule writes: some of eligible, and where it has none of a row, the most confident."""
    action = eligible & rule(probs, eligible, step)
    return torch.where(action.any(1, keepdim=True), action, best(probs.confidence, eligible, 1))


@torch.no_grad()
def decode(model, ids, rule, temperature=0.0, block_size=None, cache=None, keys=None, generator=None):
    """Returns Decoded: ids [B, T] int64 with every mask (model.mask_id) filled in, a step at a time, by a rule.

    rule(probs, eligible, step) -> bool [B, T] says which masks are written in a step: section 4. temperature: of the
    tokens, 0 for the likeliest; a token's confidence is always its probability at temperature 1. block_size: fill in
    blocks of so many positions from left to right (semi-autoregressive); masks behind the block are seen, as masks.
    cache: in the later steps of a block compute only from its start on ("prefix"), or only the block ("dual"); what is
    left out stays as it was at the block's first step, an approximation. keys bool [B, T], False on padding (left).
    generator: on the device of ids. Rows do not see each other, and one that is done costs nothing more (with a cache:
    than its block).
    Source: LLaDA, Algorithms 4 and 5; Fast-dLLM, Algorithm 1.

    Raises ValueError for a cache without blocks, and settings out of range.
    """
    if cache not in (None, "prefix", "dual") or cache and not block_size:
        raise ValueError(f"cache={cache!r}, expected None, or 'prefix' or 'dual' together with a block_size")
    if not 0 <= temperature < math.inf or block_size is not None and block_size < 1:
        raise ValueError(f"need temperature >= 0 and block_size >= 1; got {temperature}, {block_size}")
    (B, T), ids = ids.shape, ids.clone()
    temperature = 0.0 if temperature < 1e-6 else temperature  # what 1 / temperature can still be computed of
    nfe, order = torch.zeros(B, dtype=torch.int64, device=ids.device), torch.zeros_like(ids)
    cost = torch.zeros(B, device=ids.device)
    clock = torch.rand(B, T, generator=generator, device=ids.device)
    for stop in block_ends(ids, model.mask_id, block_size):
        start = max(0, stop - (block_size or T))
        kv, rows, hidden = {} if cache else None, None, None
        while True:
            eligible = ids == model.mask_id
            eligible[:, stop:] = False
            live = eligible.any(1)
            if rows is None or not cache:  # a cache holds the rows that were live at its block's first step
                rows = live.nonzero().squeeze(1)
            if not live.any():
                break
            first, last = (0, T) if not kv else (start, T if cache == "prefix" else stop)
            e, x = eligible[rows], ids[rows]  # [R, T]
            row_keys = None if keys is None else keys[rows]
            fresh = model.encode(x[:, first:last], row_keys, kv, first)
            hidden = fresh if (first, last) == (0, T) else torch.cat([hidden[:, :first], fresh, hidden[:, last:]], 1)
            probs = look(model, hidden, e, temperature, generator)
            action = chosen(rule, probs, e, Step(x, hidden, clock[rows], row_keys, model.mask_id, generator))
            ids[rows] = torch.where(action, probs.token, x)
            nfe[rows] += live[rows]
            order[rows] = torch.where(action, nfe[rows][:, None], order[rows])
            cost[rows] += live[rows] * (model.n_layers * (last - first) / T + getattr(rule, "layers", 0))
    return Decoded(ids, nfe, order, cost)


def look(model, hidden, eligible, temperature=0.0, generator=None):
    """Returns Probs [B, T] of the eligible positions of hidden [B, T, C], and the tokens to write; 0 elsewhere."""
    logits = model.logits(hidden[eligible])  # [n, V]
    probs = softmax_statistics(logits)
    if temperature > 0:
        drawn = torch.softmax(at_least_float32(logits) / temperature, -1).multinomial(1, generator=generator)
        chance = torch.softmax(at_least_float32(logits), -1).gather(1, drawn).squeeze(1)
        probs = probs._replace(token=drawn.squeeze(1), confidence=chance)
    return Probs(*(p.new_zeros(eligible.shape).masked_scatter(eligible, p) for p in probs))


def aup(tokens_per_forward, accuracy):
    """Returns the accuracy under parallelism of a decoder: the area under its accuracy (0 ... 1) against its TPF.

    Both are lists, a point for each setting. Points more than 5 percent below that of lowest TPF do not count, and
    those below the best count less, by exp(-3 (1 - y / best)). In percent times TPF. Source: the d3LLM leaderboard.
    """
    points = sorted(zip(tokens_per_forward, (100 * a for a in accuracy)))
    points = [(rho, y) for rho, y in points if y >= points[0][1] - 5]
    top = max(y for _, y in points)
    weighted = [(rho, y * min(1.0, math.exp(-3 * (1 - y / top)))) for rho, y in points] if top else points
    area = points[0][0] * points[0][1]
    return area + sum((r1 - r0) * (y1 + y0) / 2 for (r0, y0), (r1, y1) in zip(weighted, weighted[1:]))


# ---- 6. the planner -----------------------------------------------------------------------------------------------


def sinusoids(tau, size=256, scale=1000.0):
    """Returns [B, size]: cos and sin of tau [B] in [0, 1] at size / 2 speeds, from scale down to scale / 10,000."""
    speed = scale * torch.exp(-math.log(1e4) * torch.arange(size // 2, device=tau.device) / (size // 2))
    return torch.cat([(tau[:, None] * speed).cos(), (tau[:, None] * speed).sin()], 1)


class UnmaskPlanner(nn.Module):
    """Says of each token how ready it is to be written: z [B, T], a coin of chance sigmoid(z) each.

        tau = 1 - masks / length           how much of the text is known
        c   = MLP(sinusoids(tau)) + embedding[eligible] + embedding[position]      [B, T, C]
        a   = LN(h) (1 + scale(c)) + shift(c)                           AdaLN
        z   = w . AdaLN'(one Transformer layer(a), c)

    It reads the hidden states that `lm_head` reads, and neither probabilities nor what is drawn.
    Source: LLaDOU, arXiv:2505.10446, section 3.2; the authors' `modeling_llada_dultra.py`.
    """

    def __init__(self, config, positions=None):
        super().__init__()
        C = config.hidden_size
        self.time = nn.Sequential(nn.Linear(256, C), nn.SiLU(), nn.Linear(C, C))
        self.eligible = nn.Embedding(2, C)
        self.positions = nn.Embedding(positions, C) if positions else None
        self.before, self.after = nn.Linear(C, 2 * C), nn.Linear(C, 2 * C)
        rotary_base = None if positions else config.rotary_base  # ties are broken by a place, not by distances
        self.blocks = bidirectional_blocks(replace(config, rotary_base=rotary_base), "*-")
        self.out = nn.Linear(C, 1)

    @torch.no_grad()
    def init_weights(self):
        """Draws the weights: all coins begin near one half."""
        for module in (*self.time, self.before, self.after):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                module.bias.zero_()
        nn.init.trunc_normal_(self.eligible.weight, std=0.02)
        nn.init.normal_(self.out.weight, std=0.02)
        self.out.bias.zero_()

    def forward(self, hidden, eligible, masked, keys=None):
        """Returns z [B, T] float32. hidden [B, T, C]; eligible and masked bool [B, T]; keys: `encode`."""
        hidden, length = hidden.to(self.out.weight.dtype), masked.shape[1] if keys is None else keys.sum(1)
        tau = 1 - masked.sum(1) / length  # [B]
        c = self.time(sinusoids(tau).to(hidden.dtype))[:, None] + self.eligible(eligible.long())  # [B, T, C]
        if self.positions is not None:
            c = c + self.positions(places(masked.shape[1], keys, masked.device))
        x, view = modulated(hidden, self.before(c)), View(keys)
        for block in self.blocks:
            x = block(x, view)
        return at_least_float32(self.out(modulated(x, self.after(c))).squeeze(-1))


def modulated(x, scale_and_shift):
    """Returns AdaLN: x [B, T, C] normalised, then scaled and shifted by [B, T, 2 C]."""
    scale, shift = scale_and_shift.chunk(2, -1)
    return F.layer_norm(x, x.shape[-1:], eps=1e-4) * (1 + scale) + shift


def planner_logprob(z, eligible, action):
    """Returns log pi [B] of what was written: action bool [B, T], at least one of eligible bool [B, T]; z [B, T].

    A coin of chance sigmoid(z) for each eligible token; if none falls, the token a* of highest z is written. So
    P({a*}) = p_a* prod (1 - p_j) + (1 - p_a*) prod (1 - p_j) = prod over j != a* of (1 - p_j), and over all actions the
    probabilities add up to one. The authors' code keeps the factor p_a*, and theirs add up to less.
    """
    z = at_least_float32(z)
    highest = best(z.detach(), eligible, 1)
    alone = (action == highest).all(1, keepdim=True)  # its coin does not matter
    terms = torch.where(action, F.logsigmoid(z), F.logsigmoid(-z))
    return terms.masked_fill(~eligible | (alone & highest), 0).sum(1)


# ---- 7. tasks as texts with masks ---------------------------------------------------------------------------------


class Canvas(NamedTuple):
    """Tasks as a decoder meets them: prompts on the left, completions end at the right edge."""

    ids: torch.Tensor  # [B, T] int64, masks where something is to be found
    solved: torch.Tensor  # [B, T] int64, with the demo in their place
    keys: torch.Tensor | None  # bool [B, T], False on the padding before a short prompt; None: there is none

    def maskable(self, mask_id):
        """Returns bool [B, T]: what is to be found."""
        return self.ids == mask_id


def canvas_of(tasks, tokenizer, mask_id, max_new_tokens, device="cpu"):
    """Returns the Canvas of tasks: prompt and template, or prompt and max_new_tokens masks, where the demo goes on with
    ends of text: a completion of any length ends where the first stands."""
    end, rows = tokenizer.end_of_text, {}
    for task in dict.fromkeys(tasks):
        prompt, demo = tokenizer.encode(task.prompt), tokenizer.encode(task.demonstration)
        if task.template:
            given = tokenizer.encode(task.template)  # an id for a letter: of the "bytes" tokenizer
            body = [mask_id if letter == BLANK else i for letter, i in zip(task.template, given)]
        else:
            body, demo = [mask_id] * max_new_tokens, demo + [end] * (max_new_tokens - len(demo))
        rows[task] = prompt + body, prompt + demo
    place = {task: i for i, task in enumerate(rows)}
    T, which = max(len(ids) for ids, _ in rows.values()), torch.tensor([place[task] for task in tasks])
    padded = [[[end] * (T - len(part)) + part for part in pair] for pair in rows.values()]
    keys = torch.tensor([[i >= T - len(ids) for i in range(T)] for ids, _ in rows.values()])
    ids, solved = torch.tensor(padded)[which].to(device).unbind(1)
    keys = None if keys.all() else keys[which].to(device)
    return Canvas(ids, solved, keys)


def completions(tasks, ids, tokenizer, max_new_tokens):
    """Returns the text of each task's completion in ids [B, T], up to the first end of text."""
    texts = []
    for task, row in zip(tasks, ids.tolist()):
        row = row[-(len(task.template) or max_new_tokens) :]
        end = row.index(tokenizer.end_of_text) if tokenizer.end_of_text in row else len(row)
        texts.append(tokenizer.decode(row[:end]))
    return texts


# ---- 8. what train.py composes: --recipe=mdlm, --recipe=dultra ------------------------------------------------------


class MaskedDiffusion(NextToken):
    """Pre-training: predict masked tokens of a text from all others. Data and settings as in `NextToken`."""

    extra_tokens = 1  # the mask

    def build(self, config):
        """Returns the model to train."""
        return MaskedDiffusionLM(config)

    def epochs(self, tokens):
        """Returns 0: with other masks each time, text that is read again is hardly a repetition (arXiv:2507.15857)."""
        return 0

    def batch(self, model, step):
        """Returns {"ids"} [batch_size, context]; one batch in a hundred is cut to a random length (LLaDA, 2.2)."""
        ids = super().batch(model, step)["ids"]
        rng = np.random.default_rng([self.seed, step, 1])
        return dict(ids=ids[:, : rng.integers(1, self.context + 1)] if rng.random() < 0.01 else ids)

    def loss(self, model, batch):
        """Returns (bound in nats per token, metrics)."""
        loss, metrics = model.loss(batch["ids"])
        return loss, metrics | dict(tokens=torch.tensor(float(batch["ids"].numel())))

    @torch.no_grad()
    def evaluate(self, model):
        """Returns val_loss (nats per token) and val_bpb (bits per byte): bounds from above, by the count form.

        Every window once, with one draw; windows do not see each other. `val_error` is the standard error of val_bpb.
        """
        generator = torch.Generator(next(model.parameters()).device).manual_seed(self.seed)
        tokens, size, found = 0, 0, []
        for ids, targets in self.corpus.val_batches(self.context, self.batch_size):
            ids = torch.from_numpy(ids).to(next(model.parameters()).device)
            real = torch.from_numpy(targets).to(ids.device) >= 0
            found.append(nelbo(model, ids, real, samples=1, generator=generator)[0])
            tokens += int(real.sum())
            size += int(self.tokenizer.bytes_per_token[ids[real].cpu().numpy()].sum())
        nats = torch.cat(found).double()
        total, scale = nats.sum().item(), 1 / math.log(2) / size
        found = {"val_loss": total / tokens, "val_bpb": total * scale}
        return found | ({"val_error": nats.std().item() * math.sqrt(len(nats)) * scale} if len(nats) > 1 else {})


@dataclass
class DUltraConfig:
    """Settings of --recipe=dultra. The comment is the --help text."""

    task: str = "sudoku:4"  # sudoku:4 (clues), progressions:8 (groups), or one of tasks.ENVIRONMENTS, add:3
    pretrain: int = 600  # steps of masked diffusion on solved tasks
    imitate: int = 100  # then steps in which the planner learns to imitate a rule
    imitated: str = "factor:1"  # that rule
    smoothing: float = 0.15  # of its decisions: coins of chance 0 and 1 leave nothing to explore
    balanced: bool = False  # weigh its decisions so that both count the same, as the authors do: coins fall too often
    imitate_lr: float = 1e-3  # peak learning rate of the planner while it imitates
    planner_lr: float = 1e-3  # and when rewards train it
    joint: bool = False  # rewards train the backbone, too
    backbone_lr: float = 1e-4  # its peak learning rate then
    group_size: int = 8  # texts written for a task; batch_size is tasks times that
    temperature: float = 0.0  # of the tokens while learning; joint training learns from none that are certain
    reward: str = "additive"  # right - efficiency NFE / length, or multiplicative: right (1 - efficiency NFE / length)
    efficiency: float = 0.25  # what a step costs
    distill_coef: float = 0.0  # reward for a nat per token of log-likelihood under the teacher
    teacher: str = ""  # folder of an autoregressive run on the same task (--recipe=grpo)
    advantage_floor: float | None = None  # advantages below it count as 0: at 0 only what beats its group teaches
    block_size: int | None = None  # decode in blocks of so many positions; default: all at once
    replay_rows: int = 2048  # steps that are learnt from at a time: bounds the memory, not the result

    def __post_init__(self):
        check_choice("reward", self.reward, ("additive", "multiplicative"))
        if self.joint and not self.temperature >= 1e-3:
            raise ValueError(
                "--joint learns from the tokens that were drawn: it needs --temperature of at least 0.001 (1 is usual)"
            )
        for name, low, high in DULTRA_LIMITS:
            if not low <= getattr(self, name) <= high:
                span = f"from {low} to {high}" if high < LARGEST else f"at least {low}, and finite"
                raise ValueError(f"--{name}={getattr(self, name)} must be {span}")
        if self.block_size is not None and self.block_size < 1:
            raise ValueError(f"--block_size={self.block_size} must be at least 1")
        if self.advantage_floor is not None and not math.isfinite(self.advantage_floor):
            raise ValueError(f"--advantage_floor={self.advantage_floor} must be finite")
        if self.imitated.partition(":")[0] not in IMITABLE:
            raise ValueError(
                f"--imitated={self.imitated}: take a rule that decides by the probabilities, such as factor:1"
            )
        rule_of(self.imitated, None)
        if bool(self.distill_coef) != bool(self.teacher):
            raise ValueError("--distill_coef and --teacher go together")


IMITABLE = "threshold", "factor", "entropy_bounded", "top_k", "margin", "low_entropy"  # probabilities alone decide
DULTRA_LIMITS = [  # bounds included
    ("pretrain", 0, math.inf), ("imitate", 0, math.inf), ("group_size", 2, math.inf), ("replay_rows", 1, math.inf),
    ("smoothing", 0, 0.49), ("temperature", 0, 100), ("efficiency", 0, LARGEST), ("distill_coef", 0, LARGEST),
    ("imitate_lr", 0, LARGEST), ("planner_lr", 0, LARGEST), ("backbone_lr", 1e-12, LARGEST),
]  # fmt: skip


class DUltra(Objective):
    """Masked diffusion on a task, a planner that imitates a rule, then rewards: dUltra in one run.

    Metrics of a step of rewards, beside those of `grpo.policy_loss` (whose tokens are decoding steps here):

    train_reward   mean of what is maximised            accuracy     share of the texts that are right
    nfe            forwards to write one                learnt_from  share of the texts with an advantage other than 0

    And of a step of imitation: coins, the mean chance that a masked token is written; wanted, what the rule writes.
    """

    Settings = DUltraConfig
    fixed = ("task", "pretrain", "imitate", "group_size", "batch_size")
    extra_tokens = 1  # the mask

    def __init__(self, config, tokenizer, batch_size, seed=0, rank=0, world_size=1):
        self.config, self.tokenizer, self.batch_size = config, tokenizer, batch_size
        self.settings = config
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.env = environment(config.task, ENVIRONMENTS | FILL_INS)
        if batch_size % config.group_size:
            raise ValueError(f"batch_size={batch_size} must be a multiple of group_size={config.group_size}")
        rng = np.random.default_rng(seed)
        samples = [sample_task(self.env, rng, held_out) for held_out in (False, True) for _ in range(32)]
        if samples[0].template and tokenizer.name != "bytes":
            raise ValueError(f"--task={config.task} is filled in letter by letter: it needs --tokenizer=bytes")
        self.teacher = self.open_teacher(samples[0]) if config.teacher else None
        self.step = 0
        sizes = [len(tokenizer.encode(t.prompt)) + (len(t.template) or self.env.max_new_tokens) for t in samples]
        self.length = max(sizes) + (2 if len(set(sizes)) > 1 else 0)  # room for the longest prompt
        self.example = samples[0].prompt + samples[0].template

    def open_teacher(self, example):
        """Returns the autoregressive model of --teacher. Raises ValueError for one that cannot judge these texts."""
        read = read_config(self.config.teacher)
        tokenizer = read.get("nanopapers", {}).get("tokenizer", self.tokenizer.name)
        if read.get("architectures") == ["MaskedDiffusionLM"] or tokenizer != self.tokenizer.name or example.template:
            raise ValueError(
                f"--teacher={self.config.teacher}: a teacher is a run of --recipe=grpo on the same task, one of "
                f"tasks.ENVIRONMENTS, with --tokenizer={self.tokenizer.name}"
            )
        return Hybrid.from_pretrained(self.config.teacher).eval().requires_grad_(False)

    @classmethod
    def from_run(cls, run, settings):
        """Returns the objective of a run. Raises ValueError for settings that do not go together."""
        before = settings.pretrain + settings.imitate
        check_run(run, before, f"pretrain and --imitate, {before} steps together,", "--task")
        where = dict(seed=run.seed, rank=run.rank, world_size=run.world_size)
        objective = cls(settings, Tokenizer(run.tokenizer), run.config.batch_size, **where)
        return objective

    def build(self, config):
        """Returns the model to train."""
        check_dropout(config)
        return MaskedDiffusionLM(config, self.length, planner=True)

    def about(self):
        """Returns a line about the data."""
        c = self.config
        return f"{c.task}: {c.pretrain} steps of masked diffusion, {c.imitate} of imitating {c.imitated}, then rewards"

    @property
    def begin_rewards(self):
        """The first step of rewards."""
        return self.config.pretrain + self.config.imitate

    def lr_scale(self, step, lr, part=""):
        """Returns the factor on the run's peak learning rate `lr` for a step: of the planner, or of the backbone."""
        c = self.config
        if part == "planner":
            return 0.0 if step < c.pretrain else (c.imitate_lr if step < self.begin_rewards else c.planner_lr) / lr
        return c.backbone_lr / lr if step >= c.pretrain else min(1.0, 2 * (1 - step / c.pretrain))  # down to 0

    def tasks(self, step, n, held_out=False):
        """Returns n tasks."""
        rng = np.random.default_rng([self.seed, step, self.rank, held_out])
        return [sample_task(self.env, rng, held_out) for _ in range(n)]

    def canvas(self, model, tasks):
        """Returns the Canvas of tasks on the model's device."""
        device = next(model.parameters()).device
        return canvas_of(tasks, self.tokenizer, model.mask_id, self.env.max_new_tokens, device)

    def batch(self, model, step):
        """Returns solved tasks, or fresh texts of the model with their advantages."""
        self.step = step
        if step < self.begin_rewards:
            canvas = self.canvas(model, self.tasks(step, self.batch_size))
            return dict(canvas=canvas, imitate=step >= self.config.pretrain)
        return self.judged(model, self.tasks(step, self.batch_size // self.config.group_size), step)

    def judged(self, model, tasks, step):
        """Returns texts for each task, group_size of them, with their advantages and what they took."""
        c, tasks = self.config, [task for task in tasks for _ in range(self.config.group_size)]
        canvas = self.canvas(model, tasks)
        generator = torch.Generator(canvas.ids.device).manual_seed(hash((self.seed, step, self.rank)) % 2**63)
        training = model.training
        model.eval()
        rule = planned(model.planner)
        decoded = decode(model, canvas.ids, rule, c.temperature, c.block_size, keys=canvas.keys, generator=generator)
        model.train(training)
        right = self.right(tasks, decoded.ids)
        rewards = self.rewards(right, decoded, tasks)
        A = advantages(rewards.view(-1, c.group_size), "dr")
        A = (A if c.advantage_floor is None else A.masked_fill(A < c.advantage_floor, 0)).flatten()
        numbers = dict(
            train_reward=rewards.mean(), accuracy=(right == 1).float().mean(), nfe=decoded.nfe.float().mean()
        )
        numbers |= dict(learnt_from=(A != 0).float().mean(), tokens=(decoded.order > 0).sum())
        return dict(ids=decoded.ids, order=decoded.order, keys=canvas.keys, advantages=A, numbers=numbers)

    def right(self, tasks, ids):
        """Returns what the verifiers give, float32 [B] on the device of ids."""
        texts = completions(tasks, ids, self.tokenizer, self.env.max_new_tokens)
        return torch.tensor([reward for reward, _ in score_all(tasks, texts)], device=ids.device)

    def rewards(self, right, decoded, tasks):
        """Returns R [B] of texts that are right [B]."""
        c = self.config
        spent = c.efficiency * decoded.nfe / (decoded.order > 0).sum(1).clamp(min=1)
        R = right * (1 - spent) if c.reward == "multiplicative" else right - spent
        if self.teacher is not None:
            R = R + c.distill_coef * self.teacher_logprob(tasks, decoded.ids)
        return R

    @torch.no_grad()
    def teacher_logprob(self, tasks, ids):
        """Returns the mean log-probability [B] of a completion's tokens, end of text included, under the teacher."""
        end = self.tokenizer.end_of_text
        texts = completions(tasks, ids, self.tokenizer, self.env.max_new_tokens)
        rows = [(self.tokenizer.encode(task.prompt), self.tokenizer.encode(text)) for task, text in zip(tasks, texts)]
        T = max(len(prompt) + len(text) for prompt, text in rows) + 2
        padded = [[end, *prompt, *text] + [end] * (T - 1 - len(prompt) - len(text)) for prompt, text in rows]
        mask = torch.zeros(len(rows), T - 1, dtype=torch.bool)  # of the targets
        for row, (prompt, text) in enumerate(rows):
            mask[row, len(prompt) : len(prompt) + len(text) + 1] = True
        teacher, mask = self.teacher.to(ids.device), mask.to(ids.device)
        logprob, _ = teacher.logprobs(torch.tensor(padded, device=ids.device), mask)
        return (logprob * mask).sum(1) / mask.sum(1)

    def loss(self, model, batch):
        """Returns (loss, metrics)."""
        if "canvas" not in batch:
            return self.policy_loss(model, batch)
        canvas, maskable = batch["canvas"], batch["canvas"].maskable(model.mask_id)
        if batch["imitate"]:
            return self.imitation_loss(model, canvas, maskable)
        loss, metrics = model.loss(canvas.solved, maskable, canvas.keys)
        return loss, metrics | dict(tokens=maskable.sum())

    def imitation_loss(self, model, canvas, maskable):
        """Returns (loss, metrics): the planner's cross-entropy against what a rule would write, on solved tasks."""
        c = self.config
        t = noise_levels(len(canvas.ids), device=canvas.ids.device)
        masked = maskable & (torch.rand(maskable.shape, device=maskable.device) < t[:, None])
        with torch.no_grad():
            eligible, ids = in_block(masked, c.block_size), canvas.solved.masked_fill(masked, model.mask_id)
            hidden = model.encode(ids, canvas.keys)
            wanted = chosen(rule_of(c.imitated, model), look(model, hidden, eligible), eligible)
            targets = wanted.float() * (1 - 2 * c.smoothing) + c.smoothing
        z = model.planner(hidden, eligible, masked, canvas.keys)[eligible]
        targets, share = targets[eligible], wanted.sum() / eligible.sum().clamp(min=1)
        weight = (1 - share) / share.clamp(min=1e-6) if c.balanced else None
        loss = F.binary_cross_entropy_with_logits(z, targets, pos_weight=weight, reduction="sum") / max(1, len(z))
        metrics = dict(loss=loss.detach(), coins=torch.sigmoid(z.detach()).mean(), wanted=share, tokens=maskable.sum())
        return loss, metrics

    def policy_loss(self, model, batch):
        """Returns (loss, metrics): dUltra's surrogate, whose ratio is of a whole step, over B times length.

        The texts a step began with are made again from `order`. Steps are taken replay_rows at a time, and what each
        such chunk computes is computed again in the backward (checkpoint): memory does not grow with their number. With
        one update for each batch, here and in the paper, the ratio is one, and its clip, (.2, 1), dormant.
        """
        c, ids, order, A = self.config, batch["ids"], batch["order"], batch["advantages"]
        S = int(order.max())
        step = torch.arange(1, S + 1, device=ids.device)  # [S]
        live = (step <= order.amax(1, keepdim=True)) & (A != 0)[:, None]  # [B, S]: the rest has no gradient
        rows, steps = live.nonzero().unbind(1)
        found = [
            checkpoint(self.step_logprob, model, batch, r, s + 1, use_reentrant=False)
            for r, s in zip(rows.split(c.replay_rows), steps.split(c.replay_rows))
        ]
        logprob = torch.zeros(live.shape, device=ids.device)
        if found:
            logprob = logprob.masked_scatter(live, torch.cat(found))
        loss, metrics = policy_loss(
            logprob, logprob, A, live, clip=(0.2, 1.0), aggregate="constant",
            denominator=(order > 0).sum().float(),
        )  # fmt: skip
        metrics |= batch["numbers"]
        return loss + 0 * sum(p.sum() for p in model.planner.out.parameters()), metrics  # a gradient, if all are silent

    def step_logprob(self, model, batch, rows, steps):
        """Returns log pi [n] of the steps [n] of texts rows [n]: coins, and when joint, the tokens drawn."""
        c, solved, order = self.config, batch["ids"][rows], batch["order"][rows]
        masked, action = order >= steps[:, None], order == steps[:, None]  # [n, T]
        keys = None if batch["keys"] is None else batch["keys"][rows]
        with torch.set_grad_enabled(torch.is_grad_enabled() and c.joint):
            hidden = model.encode(solved.masked_fill(masked, model.mask_id), keys)
        model.pop_balance_losses()  # rewards do not balance experts
        eligible = in_block(masked, c.block_size)
        logprob = planner_logprob(model.planner(hidden, eligible, masked, keys), eligible, action)
        if c.joint:
            weight = model.lm_head.weight[: model.mask_id]
            of_tokens, _ = linear_logprob(hidden[action], weight, solved[action], c.temperature)
            logprob = logprob + of_tokens.new_zeros(action.shape).masked_scatter(action, of_tokens).sum(1)
        return logprob

    @torch.no_grad()
    def evaluate(self, model, n=256):
        """Returns reward, the share of n held-out tasks that are right, and nfe: written by the planner at T = 0.

        While there is none (pretrain), by entropy-bounded unmasking.
        """
        rule = planned(model.planner) if self.step >= self.config.pretrain else entropy_bounded()
        decoded, right = self.write(model, rule, n)
        return dict(reward=(right == 1).float().mean().item(), nfe=decoded.nfe.float().mean().item())

    def write(self, model, rule, n=256, seed=0, temperature=0.0):
        """Returns (Decoded, what the verifiers give [n]) of n held-out tasks."""
        tasks = self.tasks(seed, n, held_out=True)
        canvas = self.canvas(model, tasks)
        generator = torch.Generator(canvas.ids.device).manual_seed(seed)
        decoded = decode(
            model, canvas.ids, rule, temperature, self.config.block_size, keys=canvas.keys, generator=generator
        )
        return decoded, self.right(tasks, decoded.ids)


# fmt: off
PRESETS = {
    # For mdlm_dultra.py, Transformers that look both ways: 1.9 M and 88 M for text, 0.2 M and 0.8 M for tasks.
    "mdlm-tiny": HybridConfig(
        hybrid_override_pattern="*-*-*-*-", num_attention_heads=4, num_key_value_heads=4, head_dim=32, rotary_base=1e4
    ),
    "mdlm": replace(TEXT_PRESETS["small"], hybrid_override_pattern="*-" * 12, rotary_base=1e4),
    "dultra-tiny": HybridConfig(
        hybrid_override_pattern="*-*-", hidden_size=64, num_attention_heads=4, num_key_value_heads=4, head_dim=16,
        intermediate_size=256,
    ),
    "dultra": HybridConfig(
        hybrid_override_pattern="*-*-", num_attention_heads=4, num_key_value_heads=4, head_dim=32,
    ),
}
# fmt: on
RECIPES = {
    # Its autoregressive baseline: --recipe=hybrid --preset=mdlm-tiny (on a GPU --preset=mdlm).
    "mdlm": Recipe(MaskedDiffusion, cpu=dict(preset="mdlm-tiny", **TEXT_CPU), gpu=dict(preset="mdlm", **TEXT_GPU)),
    "dultra": Recipe(
        DUltra,
        cpu=dict(preset="dultra-tiny", **REWARDS | dict(lr=2e-3), batch_size=256, steps=900, eval_every=100),
        gpu=dict(preset="dultra", **REWARDS | dict(lr=2e-3), batch_size=2048, steps=2000, eval_every=200),
    ),
}

# ---- 9. python mdlm_dultra.py: accuracy against forwards; python mdlm_dultra.py bench: the kernel ------------------

CURVES = {  # rules, each with settings from safe to fast
    "top-k": ["top_k:1", "top_k:2", "top_k:3", "top_k:4"],
    "threshold": ["threshold:0.99", "threshold:0.95", "threshold:0.9", "threshold:0.8", "threshold:0.6"],
    "factor": ["factor:0.25", "factor:0.5", "factor:1", "factor:2"],
    "entropy-bounded": [f"entropy_bounded:{gamma}" for gamma in (0.01, 0.1, 0.3, 0.5, 0.7, 1.4, 3)],
}
SHIFTS = (-2.0, -1.0, 0.0, 1.0, 2.0)  # of the planner's coins: its own curve
PAPER_CUT = 0.65, 0.74  # dUltra's fewer forwards than Fast-dLLM's factor rule, at no loss, on four benchmarks of LLaDA


@dataclass
class Study:
    """What the demo trains, and how long."""

    task: str
    hidden_size: int
    layers: str  # pattern of the backbone
    rotary_base: float | None  # None: an embedding for each position
    lr: float
    pretrain: int  # steps, of `rows` texts
    rows: int
    texts: int  # of an update by rewards
    planners: dict  # name -> updates by rewards, settings of DUltraConfig
    puzzles: int  # held-out ones, to measure with


# Joint, it is the backbone that has to learn quickly: from a planner that dares too much, what to write at once.
JOINT = dict(joint=True, temperature=1.0, imitated="entropy_bounded:3", planner_lr=2e-5, backbone_lr=6e-4)
STUDIES = {
    "cpu": [Study("sudoku:4", 64, "*-*-", None, 2e-3, 900, 128, 512, {"planner": (60, dict(efficiency=0.5))}, 400)],
    "cuda": [
        Study("sudoku:4", 128, "*-*-*-*-", None, 1e-3, 2000, 512, 4096, {
            "planner": (400, dict(imitated="entropy_bounded:0.5", efficiency=1.0)),
            "joint": (600, dict(efficiency=0.5, **JOINT)),
        }, 2000),
        Study("progressions:8", 256, "*-*-*-*-", 1e4, 5e-4, 1500, 512, 4096, {
            "planner": (200, dict(imitated="threshold:0.9", efficiency=0.5)),
        }, 1000),
    ],
}  # fmt: skip


def fit(model, objective, steps, lr, name, begin=0):
    """Trains steps `begin` ... of an objective, a small train.py. Returns name -> mean of the last ten steps."""
    planner, rest = (
        [p for n, p in model.named_parameters() if n.startswith("planner.") == is_p] for is_p in (True, False)
    )
    optimizer = torch.optim.AdamW([dict(params=planner), dict(params=rest)], lr, betas=(0.9, 0.95), weight_decay=0.0)
    rows = []
    for i in tqdm(range(steps), desc=name, delay=2, leave=False, disable=not sys.stderr.isatty()):
        now = lr * min(1, (i + 1) / 20, (steps - i) / (0.2 * steps))
        optimizer.param_groups[0]["lr"] = now * objective.lr_scale(begin + i, lr, "planner")
        optimizer.param_groups[1]["lr"] = now * objective.lr_scale(begin + i, lr)
        loss, metrics = objective.loss(model, objective.batch(model, begin + i))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        rows.append({key: float(value) for key, value in metrics.items()} if i >= steps - 10 else {})
    return {key: np.mean([row[key] for row in rows[-10:]]) for key in rows[-1]}


def run_study(study, seed, device):
    """Trains one backbone and planners on it, and returns rows: task, seed, curve, setting, accuracy, nfe, and more."""
    torch.manual_seed(seed)
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("high")
    began, rows, tokenizer = time.perf_counter(), [], Tokenizer("bytes")
    base = dict(task=study.task, pretrain=study.pretrain, imitate=300, group_size=16, replay_rows=8192)
    before, C = DUltra(DUltraConfig(**base), tokenizer, study.rows, seed), study.hidden_size
    shape = dict(hidden_size=C, num_attention_heads=C // 32, num_key_value_heads=C // 32, intermediate_size=4 * C)
    shape |= dict(hybrid_override_pattern=study.layers, head_dim=32, rotary_base=study.rotary_base)
    model = before.build(HybridConfig(vocab_size=320, **shape)).to(device)
    label = f"{study.task}, seed {seed}"

    def measure(curve, setting, rule, temperature=0.0):
        decoded, right = before.write(model, rule, study.puzzles, seed, temperature)
        accuracy, nfe = (right == 1).float().mean().item(), decoded.nfe.float().mean().item()
        row = dict(task=study.task, seed=seed, curve=curve, setting=setting, accuracy=accuracy, nfe=nfe)
        row |= dict(tpf=(decoded.order > 0).sum().item() / decoded.nfe.sum().item())
        row |= dict(layer_forwards=decoded.layer_forwards.mean().item(), seconds=time.perf_counter() - began)
        rows.append(row)
        print(f"{label:24} {curve:24} {setting:20} accuracy {accuracy:.3f}  NFE {nfe:5.2f}", flush=True)

    found = fit(model, before, study.pretrain, study.lr, f"{label}: masked diffusion")
    print(f"{label}: bound {found['loss']:.4f} nats a token after {time.perf_counter() - began:.0f} s", flush=True)
    for curve, specs in CURVES.items():
        for spec in specs:
            measure(curve, spec, rule_of(spec, model))
    start = {name: value.clone() for name, value in model.state_dict().items()}
    for name, (updates, settings) in study.planners.items():
        model.load_state_dict(start)
        config = DUltraConfig(**base | settings)
        warm, learns = (DUltra(config, tokenizer, n, seed) for n in (study.rows, study.texts))
        fit(model, warm, config.imitate, study.lr, f"{label}: imitation", begin=config.pretrain)
        measure(f"{name}, warm start", "coins", planned(model.planner))
        measure(f"{name}, warm start", "above one half", planned(model.planner, sample=False))
        fit(model, learns, updates, study.lr, f"{label}: {name}", begin=learns.begin_rewards)
        measure(f"{name}, after rewards", "coins", planned(model.planner))
        for shift in SHIFTS:
            measure(f"{name}, after rewards", f"shift {shift}", planned(model.planner, shift, sample=False))
        if config.joint:  # what the backbone learnt, without the planner
            for spec in ("entropy_bounded:0.3", "threshold:0.9", "factor:1"):
                measure(f"{spec} after joint", spec, rule_of(spec, model))
    return rows


def demo(task=None, seeds=None):
    """Prints accuracy against forwards of every rule and of dUltra, and draws out/mdlm_dultra.png.

    task: only that study. On a GPU the rows go to assets/bench/mdlm_dultra.json, in the place of those of that task.
    """
    device, began = "cuda" if torch.cuda.is_available() else "cpu", time.perf_counter()
    studies = [study for study in STUDIES[device] if task in (None, study.task)]
    seeds = seeds or ((0, 1, 2) if device == "cuda" else (0,))
    jobs = [(study, seed) for study in studies for seed in seeds]
    if device == "cpu":
        rows = [row for study, seed in jobs for row in run_study(study, seed, device)]
    else:  # small models: the host is the limit, so all at once
        devices = [f"cuda:{i % torch.cuda.device_count()}" for i in range(len(jobs))]
        with ProcessPoolExecutor(len(jobs), multiprocessing.get_context("spawn")) as pool:
            rows = [row for part in pool.map(run_study, *zip(*jobs), devices) for row in part]
    seconds = time.perf_counter() - began
    machine = f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}" if device == "cuda" else "CPU"
    for study in studies:
        report([row for row in rows if row["task"] == study.task], study.task, len(seeds))
    print(f"{seconds:.0f} s on {machine}")
    if device == "cuda":
        path = Path(__file__).parent / "assets" / "bench" / "mdlm_dultra.json"
        record = json.loads(path.read_text()) if path.is_file() else {}
        kept = record.get("studies", {})
        for study in studies:
            part = [row for row in rows if row["task"] == study.task]
            kept[study.task] = dict(machine=f"{machine}, torch {torch.__version__}", seconds=seconds, rows=part)
        path.write_text(json.dumps(record | dict(command="python mdlm_dultra.py", studies=kept), indent=0) + "\n")
        rows = [row for part in kept.values() for row in part["rows"]]
    plot_frontiers(rows, Path("out/mdlm_dultra.png"))


def summary(rows):
    """Returns {curve: [(setting, accuracy, its spread, NFE, its spread), ...]}, means over seeds."""
    found = {}
    for row in rows:
        found.setdefault(row["curve"], {}).setdefault(row["setting"], []).append((row["accuracy"], row["nfe"]))
    return {
        curve: [
            (setting, *np.mean(p, 0)[:1], np.std(p, 0)[0], np.mean(p, 0)[1], np.std(p, 0)[1])
            for setting, p in part.items()
        ]
        for curve, part in found.items()
    }


def fewest(points, accuracy):
    """Returns the fewest forwards among points (setting, accuracy, ...) of at least this accuracy, or None."""
    return min((p[3] for p in points if p[1] >= accuracy), default=None)


def report(rows, task, n_seeds):
    """Prints a table: every setting, each curve's area, and who needs the fewest forwards at 0.98."""
    curves = summary(rows)
    print(f"\n{task}: held-out, T = 0, mean of {n_seeds} seed(s) and spread")
    for curve, points in curves.items():
        tpf = [np.mean([r["tpf"] for r in rows if (r["curve"], r["setting"]) == (curve, p[0])]) for p in points]
        area = aup(tpf, [p[1] for p in points])
        print(f"{curve}   (AUP {area:.0f})")
        for setting, accuracy, spread, nfe, nfe_spread in points:
            print(f"    {setting:20} {accuracy:.3f} ± {spread:.3f}   {nfe:5.2f} ± {nfe_spread:.2f} forwards")
    print("fewest forwards at an accuracy of 0.98 and more:")
    for curve, points in curves.items():
        found = fewest(points, 0.98)
        print(f"    {curve:24} " + ("never" if found is None else f"{found:.2f}"))


def plot_frontiers(rows, path):
    """Draws accuracy against forwards of each curve, a panel for each task, and writes it to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(7 * len(tasks), 4.2), dpi=150, layout="constrained", squeeze=False
    )
    colours = ("#999999", "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#000000")
    for panel, task in zip(axes[0], tasks):
        curves = {c: p for c, p in summary([r for r in rows if r["task"] == task]).items() if "after joint" not in c}
        for (curve, points), colour in zip(curves.items(), colours):
            points = sorted((p[3], p[1]) for p in points)
            learnt = "after rewards" in curve
            panel.plot(*zip(*points), marker="s" if learnt else "o", color=colour, label=curve, lw=2 if learnt else 1)
        by_factor = fewest(curves["factor"], 0.9)
        if by_factor:
            low, high = ((1 - cut) * by_factor for cut in PAPER_CUT)
            panel.axvspan(low, high, color="#dddddd", zorder=0)
            panel.annotate("the paper's cut:\n65 to 74 % below factor", (high, 0.02), fontsize=8, color="#444444")
        found = min(((n, c) for c, p in curves.items() if (n := fewest(p, 0.98))), default=None)
        title = f"at 0.98, {found[1]} needs fewest forwards ({found[0]:.1f})" if found else "none reaches 0.98"
        panel.set_title(f"{task}: {title}", fontsize=10)
        panel.set(xlabel="forwards of the backbone (NFE)", ylabel="held-out tasks right", ylim=(-0.02, 1.03))
        panel.legend(frameon=False, fontsize=8)
        panel.grid(alpha=0.3)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    print(f"plot: {path}")


if __name__ == "__main__":
    tasks = [study.task for study in STUDIES["cuda" if torch.cuda.is_available() else "cpu"]]
    asked = sys.argv[1] if len(sys.argv) == 2 else None
    if len(sys.argv) > 2 or asked not in (None, *tasks):
        raise SystemExit(f"usage: python mdlm_dultra.py [{' | '.join(tasks)}]")
    demo(asked)
