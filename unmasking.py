"""Parallel decoding of masked diffusion models: rules that say which tokens to unmask together, and what that costs.

Papers   First-hitting sampling, arXiv:2409.02908; LLaDA, 2502.09992; Fast-dLLM, 2505.22618; entropy-bounded unmasking,
         2505.24857; a planner that is trained, dUltra, 2512.21446 (mdlm_dultra.py trains it).
Idea     One forward of the model gives a distribution for every masked position, but tokens that are unmasked together
         are drawn independently of each other. Each forward (NFE) should therefore unmask as many tokens as possible
         that do not depend on each other. A rule makes that choice, from the confidence, entropy or margin of each
         position, or with a small network on the hidden states.
Picture  ids [B,T], masks --encode--> hidden [B,T,C] --logits--> [n,V] --softmax_statistics--> Probs [B,T]
            ^                            |                                                        |
            |                            '--- Step (ids, hidden, ...) ---.     .------------------'
            |                                                            v     v
            '------- tokens, where True ------- at least one a row <-- rule(probs, eligible, step) -> bool [B,T]
Symbols  code         paper   meaning
         eligible     E       positions that are masked, and in the block that is being decoded
         nfe          NFE     forwards of the backbone until a row's last mask is gone, counted for each row
         tau          tau     confidence threshold                                           (Fast-dLLM, Algorithm 1)
         f            f       factor: n tokens need a confidence of about 1 - f / (n + 1)    (Fast-dLLM, section 3)
         gamma        gamma   bound on the joint entropy that is given up, in nats           (entropy-bounded)
Limits   One token a step samples the joint distribution of an exact model, several at once do not; all eligible tokens
         at once is one forward; a cached forward equals the uncached one at the first step of a block; log pi adds up
         to one over all actions: see tests/test_mdlm_dultra.py.
Differs  Ancestral sampling leaves out the steps that unmask nothing. The factor rule stops at the first token that
         fails, where Fast-dLLM's code cannot tell that the last one did. For the planner, see mdlm_dultra.py.
Files    unmasking.py + kernels.py: 1,430 lines in all
         `decode` takes any model with `encode(ids, keys, kv, start)`, `logits(hidden)`, `mask_id` and `n_layers`.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F

from kernels import at_least_float32, block_of, fresh_casts, jit, pick_backend

try:
    import triton
    import triton.language as tl
except ImportError:
    triton = tl = None

# ---- 1. what a rule knows of each position --------------------------------------------------------------------------


class Probs(NamedTuple):
    """What every rule decides by, for each position. All fields have one shape: [N], or [B, T]."""

    confidence: torch.Tensor  # float32, probability of `token`
    token: torch.Tensor  # int64, the likeliest token, or the one that was drawn
    entropy: torch.Tensor  # float32, in nats
    margin: torch.Tensor  # float32, the largest probability minus the second largest


def softmax_statistics_ref(logits):
    """Returns Probs [N] of logits [N, V], V > 1; of equal logits the first token. Computed in float32 (or float64)."""
    logp = torch.log_softmax(at_least_float32(logits), -1)
    (first, second), token = logp.topk(2, -1).values.exp().unbind(-1), logp.argmax(-1)
    entropy = -(logp.exp() * logp.clamp(min=-1e30)).sum(-1)  # 0 log 0 = 0
    return Probs(first, token, entropy, first - second)


# The kernel. A program owns a row and reads it once, LANES x GROUP logits at a time, 16 bytes to a lane. A lane keeps
# the largest logit of its groups and the chunk in which it was, and two sums relative to m, the largest logit of the
# first chunk (in base 2, which is what the GPU computes):
#
#       s = sum 2^(l - m),   w = sum 2^(l - m) (l - m),   l = logit log2(e)
#       confidence = 2^(max - m) / s,   entropy = ln(2) (log2 s - w / s),   margin = confidence - 2^(second - m) / s
#
# Bookkeeping for each logit would cost more than reading it, so the loop tracks neither the token nor the second
# largest logit: both are found at the end, in the groups of the winning lane, which are read again, and in the largest
# logits of the other lanes. A running maximum would make all lanes agree on one in each chunk. Where m proves too small
# (float32 ends at 2^127), a second pass makes the sums against the true maximum. Traffic: N V logits are read and
# almost nothing is written. PyTorch reads or writes them ten times: a float32 copy, a log-softmax, two products for the
# entropy, a top-2 and an argmax.

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


# ---- 2. rules: which tokens to unmask in a step ---------------------------------------------------------------------
#
# A rule is a function (probs [B, T], eligible [B, T], step) -> bool [B, T]. What it chooses outside of `eligible` is
# ignored, and in a row where it chooses nothing `decode` unmasks the most confident token (`apply_rule`).


class Step(NamedTuple):
    """What a rule may use besides probabilities."""

    ids: torch.Tensor  # [B, T] int64, the sequences before the step, with masks
    hidden: torch.Tensor  # [B, T, C] after the final norm
    clock: torch.Tensor  # [B, T] uniform in [0, 1), drawn once for a sequence: the time at which a token is due
    keys: torch.Tensor | None  # bool [B, T], False on padding
    mask_id: int
    generator: torch.Generator | None


def top_positions(score, eligible, k):
    """Returns bool [B, T]: the k eligible positions of highest score in each row, the first of equal ones.

    score [B, T]; k: a number, or int64 [B].
    """
    order = score.masked_fill(~eligible, -math.inf).argsort(dim=1, descending=True, stable=True)
    ranks = torch.empty_like(order).scatter_(1, order, torch.arange(order.shape[1]).to(order).expand_as(order))
    return eligible & (ranks < torch.as_tensor(k, device=score.device).view(-1, 1))


def ancestral(steps=64):
    """Unmasks each token in one of `steps` steps at random: MDLM's sampler, where a mask goes with chance (t - s) / t.

    That is a uniform step for each token, whatever the others do. Steps in which no token is due are left out, because
    they would repeat the forward before them: at most min(steps, tokens) NFE.
    """

    def rule(probs, eligible, step):
        due = (step.clock * steps).floor().masked_fill(~eligible, steps)
        return due == due.amin(1, keepdim=True)

    return rule


def random_k(k=1):
    """Unmasks k tokens at random. k = 1 is first-hitting sampling: the exact limit of `ancestral` for many steps."""
    return lambda probs, eligible, step: top_positions(-step.clock, eligible, k)


def top_k(k=1, by="confidence"):
    """Unmasks the k tokens of highest confidence or margin, or of lowest entropy: LLaDA's and Dream's decoders."""
    sign = {"confidence": 1, "margin": 1, "entropy": -1}[by]
    return lambda probs, eligible, step: top_positions(sign * getattr(probs, by), eligible, k)


def threshold(tau=0.9):
    """Unmasks all tokens whose confidence is at least tau. Source: Fast-dLLM, Algorithm 1."""
    return lambda probs, eligible, step: probs.confidence >= tau


def factor(f=1.0):
    """Unmasks the n most confident tokens, for the largest n with (i + 1) (1 - c_i) < f for all i <= n.

    c_1 >= c_2 >= ... are the confidences. Source: Fast-dLLM, section 3.
    """

    def rule(probs, eligible, step):
        c = probs.confidence.masked_fill(~eligible, -1).sort(dim=1, descending=True).values
        n = torch.arange(1, c.shape[1] + 1, device=c.device)
        passes = ((n + 1) * (1 - c) < f) & (c >= 0)
        return top_positions(probs.confidence, eligible, passes.long().cumprod(1).sum(1).clamp(min=1))

    return rule


def entropy_bounded(gamma=0.1):
    """Unmasks the n tokens of lowest entropy, for the largest n with H_1 + ... + H_(n-1) <= gamma, H sorted.

    The sum without the largest entropy bounds, in nats, what drawing the n tokens independently costs.
    Source: arXiv:2505.24857.
    """

    def rule(probs, eligible, step):
        H = probs.entropy.masked_fill(~eligible, math.inf).sort(dim=1).values
        passes = (H.cumsum(1) - H <= gamma) & H.isfinite()
        return top_positions(-probs.entropy, eligible, passes.long().cumprod(1).sum(1).clamp(min=1))

    return rule


def planner_rule(planner, shift=0.0, temperature=1.0, sample=True):
    """Unmasks what a planner draws: each token with probability sigmoid((z + shift) / temperature), independently.

    planner(hidden, eligible, masked, keys) -> z [B, T]. shift trades accuracy (< 0) for speed (> 0). sample=False:
    the tokens of a probability above one half. Where no token is drawn, the one of highest probability is unmasked.
    Source: dUltra; the network is LLaDOU's.
    """

    def rule(probs, eligible, step):
        z = (planner(step.hidden, eligible, step.ids == step.mask_id, step.keys) + shift) / temperature
        u = torch.rand(z.shape, generator=step.generator, device=z.device) if sample else 0.5
        drawn = eligible & (u < torch.sigmoid(z))
        return torch.where(drawn.any(1, keepdim=True), drawn, top_positions(z, eligible, 1))

    rule.layers = 1  # Transformer layers that it computes in a step
    return rule


def planner_logprob(z, eligible, action):
    """Returns log pi [B] of a step: action bool [B, T], at least one of eligible bool [B, T]; z [B, T].

    Each eligible token is drawn with probability p = sigmoid(z); if none is, the token a* of highest z is unmasked. So
    P({a*}) = p_a* prod (1 - p_j) + (1 - p_a*) prod (1 - p_j) = prod over j != a* of (1 - p_j), and over all actions the
    probabilities add up to one. The authors' code keeps the factor p_a*, and its probabilities add up to less.
    """
    z = at_least_float32(z)
    highest = top_positions(z.detach(), eligible, 1)
    alone = (action == highest).all(1, keepdim=True)  # {a*}: whether a* was drawn does not matter
    terms = torch.where(action, F.logsigmoid(z), F.logsigmoid(-z))
    return terms.masked_fill(~eligible | (alone & highest), 0).sum(1)


RULES = dict(
    ancestral=ancestral, first_hitting=lambda: random_k(1), random_k=random_k, top_k=top_k, threshold=threshold,
    factor=factor, entropy_bounded=entropy_bounded, planner=planner_rule,
    margin=lambda k=1: top_k(k, "margin"), low_entropy=lambda k=1: top_k(k, "entropy"),
)  # fmt: skip
WHOLE_NUMBERS = "ancestral", "random_k", "top_k", "margin", "low_entropy"  # rules whose setting counts something
DETERMINISTIC = "threshold", "factor", "entropy_bounded", "top_k", "margin", "low_entropy"  # functions of Probs alone


def rule_of(spec, model):
    """Returns the rule that a string names: threshold:0.9, top_k:2, entropy_bounded:0.1, planner, ...

    Raises ValueError for an unknown rule, for a setting out of its range, and for "planner" if the model has none.
    """
    name, _, number = spec.partition(":")
    if name not in RULES:
        raise ValueError(f"rule={name!r}, expected one of {', '.join(RULES)}")
    if name == "planner" and model.planner is None:
        raise ValueError("rule='planner': this model has none; use threshold:0.9, say")
    whole = name in WHOLE_NUMBERS
    try:
        setting = [int(number) if whole else float(number)] if number else []
        if not all(math.isfinite(n) and (n >= whole or name == "planner") for n in setting):
            raise ValueError
        return planner_rule(model.planner, *setting) if name == "planner" else RULES[name](*setting)
    except (TypeError, ValueError):
        raise ValueError(
            f"rule={spec!r}: {name} takes no {number!r}; write threshold:0.9, top_k:2, ancestral:64"
        ) from None


# ---- 3. the decoder -------------------------------------------------------------------------------------------------


@dataclass
class Decoded:
    """Sequences with every mask filled in, and what that took."""

    ids: torch.Tensor  # [B, T] int64
    nfe: torch.Tensor  # [B] int64, forwards of the backbone until the row's last mask was gone
    order: torch.Tensor  # [B, T] int64, the forward, 1 ... nfe, that unmasked the token; 0 for what was given
    layer_forwards: torch.Tensor  # [B] float32, layers computed, in whole sequences: planners add to it, caches save

    @property
    def tokens_per_forward(self):
        """TPF [B]: tokens unmasked / NFE, ends of text included."""
        return (self.order > 0).sum(1) / self.nfe.clamp(min=1)


def block_ends(ids, mask_id, block_size=None):
    """Returns the ends of the blocks that have a mask in some row, from left to right. ids [B, T].

    Blocks are counted from the right edge, where all completions end, so that rows of any prompt length agree on them.
    """
    T, some = ids.shape[1], (ids == mask_id).any(0)
    size = block_size or max(1, T)
    return [end for end in sorted(range(T, 0, -size)) if some[max(0, end - size) : end].any()]


def current_block(masked, block_size=None):
    """Returns bool [B, T]: the masks that `decode` fills in first, those of each row's leftmost block with a mask."""
    if block_size is None:
        return masked
    T = masked.shape[1]
    block = (torch.arange(T, device=masked.device) - T % block_size).div(block_size, rounding_mode="floor")  # [T]
    return masked & (block == torch.where(masked, block, T).amin(1, keepdim=True))


def apply_rule(rule, probs, eligible, step=None):
    """Returns bool [B, T], what a step unmasks: the rule's choice, or the most confident token of a row without one."""
    action = eligible & rule(probs, eligible, step)
    return torch.where(action.any(1, keepdim=True), action, top_positions(probs.confidence, eligible, 1))


def predict(model, hidden, eligible, temperature=0.0, generator=None):
    """Returns Probs [B, T] of the eligible positions of hidden [B, T, C], and 0 elsewhere.

    temperature: of the tokens, 0 for the likeliest. A confidence is always the token's probability at temperature 1.
    """
    logits = model.logits(hidden[eligible])  # [n, V]
    probs = softmax_statistics(logits)
    if temperature > 0:
        drawn = torch.softmax(at_least_float32(logits) / temperature, -1).multinomial(1, generator=generator)
        confidence = torch.softmax(at_least_float32(logits), -1).gather(1, drawn).squeeze(1)
        probs = probs._replace(token=drawn.squeeze(1), confidence=confidence)
    return Probs(*(p.new_zeros(eligible.shape).masked_scatter(eligible, p) for p in probs))


@torch.no_grad()
@fresh_casts()
def decode(model, ids, rule, temperature=0.0, block_size=None, cache=None, keys=None, generator=None):
    """Returns Decoded: ids [B, T] int64 with every mask (model.mask_id) filled in, step by step, as the rule says.

    temperature: `predict`. block_size: decode blocks of that many positions from left to right (semi-autoregressive);
    masks to the right of the block are attended to, as masks. cache: in the later steps of a block compute only from
    its start on ("prefix"), or only the block itself ("dual"), and attend to the keys and values that the other
    positions had at the block's first step: an approximation. keys: bool [B, T], False on padding, on the left.
    generator: on the device of ids. Rows do not influence each other. A row that is finished is not computed any more;
    with a cache, it is computed until its block is finished. Source: LLaDA, Algorithms 4, 5; Fast-dLLM, Algorithm 1.

    Raises ValueError for a cache without blocks, and for settings out of range.
    """
    if cache not in (None, "prefix", "dual"):
        raise ValueError(f"cache={cache!r}, expected prefix or dual, or None")
    if cache and block_size is None:
        raise ValueError(f"cache={cache!r} is of blocks: it needs a block_size")
    if not 0 <= temperature < math.inf or block_size is not None and block_size < 1:
        raise ValueError(f"need temperature >= 0 and block_size >= 1; got {temperature}, {block_size}")
    (B, T), ids = ids.shape, ids.clone()
    temperature = 0.0 if temperature < 1e-6 else temperature  # below, 1 / temperature overflows
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
            first, last = (0, T) if not kv else (start, T if cache == "prefix" else stop)  # positions to compute
            e, x = eligible[rows], ids[rows]  # [R, T]
            row_keys = None if keys is None else keys[rows]
            fresh = model.encode(x[:, first:last], row_keys, kv, first)
            hidden = fresh if (first, last) == (0, T) else torch.cat([hidden[:, :first], fresh, hidden[:, last:]], 1)
            probs = predict(model, hidden, e, temperature, generator)
            action = apply_rule(rule, probs, e, Step(x, hidden, clock[rows], row_keys, model.mask_id, generator))
            ids[rows] = torch.where(action, probs.token, x)
            nfe[rows] += live[rows]
            order[rows] = torch.where(action, nfe[rows][:, None], order[rows])
            cost[rows] += live[rows] * (model.n_layers * (last - first) / T + getattr(rule, "layers", 0))
    return Decoded(ids, nfe, order, cost)
