"""Fast generation for nano_hybrid.py: static caches, CUDA graphs, drafts, thinking budgets.

Papers   Speculative decoding, Leviathan et al., arXiv:2211.17192; thinking budgets, Nemotron Nano 2, arXiv:2508.14444;
         Flash-Decoding, Dao et al., 2023 (attention on a long cache, split among programs).
Idea     A step for one text reads every weight once and does next to nothing with it. What it costs beyond that is
         beginning and ending: two hundred kernels, each over before the host has sent the next. So the step becomes a
         CUDA graph (`GraphedStep`), its kernels become few (`linear_step` takes the norm before a product, the
         activation or the sum after it along), and each fetches its weights while the one before is at work. And since
         reading the weights costs the same for a few tokens as for one, a cheap predictor guesses some tokens ahead
         ("drafts") and the model checks them in one step (`Sampler.check`).
Picture  one Mamba-2 layer, x [1, C]:

         x --[norm, in_proj]-- z | x B C | dt --[conv, recurrence, gate]-- y --[norm, out_proj, + x]-- x
              linear_step                       mamba2_steps                   linear_step
Differs  Nothing from the papers' distributions: greedy text is the same with and without drafts, sampled text is
         equally distributed (tests/test_decoding.py). In 16 bits two likeliest tokens may tie, and the tie may fall
         otherwise where several tokens are checked at once.
"""

import copy
import itertools
import weakref
from dataclasses import dataclass, field, replace

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.sampling import check_sampling, pad_left, token_probs
from decode_kernels import advance, append, argmax, cached_attention, embed, linear_step, mamba2_steps
from kernels import pick_backend
from latent_moe import MLP
from lla import LocalLinearAttention, lla_step
from nano_hybrid import Attention, Cache, KVState, LocalLinear, apply_rope
from ssd import Mamba2, MambaState, RecurrentState

# ---- 1. sampling, drafts, budgets ---------------------------------------------------------------------------------


def draw(probs, generator=None):
    """Returns one token [B] int64 per row of probs [B, V]: `common.sampling.draw`, with the step's argmax kernel."""
    return argmax(probs / torch.empty_like(probs).exponential_(generator=generator))


@dataclass
class Sampler:
    """How the next token is drawn, greedily where temperature is 0."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    @property
    def greedy(self):
        """Whether the likeliest token is taken: no probabilities are made then."""
        return self.temperature < 1e-6  # logits / 1e-40 would overflow

    def __call__(self, logits):
        """Returns (a token [B], the probabilities [B, V] it was drawn by or None), from logits [B, V]."""
        if self.greedy:
            return argmax(logits), None
        probs = token_probs(logits, self.temperature, self.top_k, self.top_p)
        return draw(probs, self.generator), probs

    def check(self, logits, drafts, q):
        """Returns (how many of the drafts [n] to keep [], the token [1] after them), as `accept`.

        logits [n+1, V]: the model's, after 0, 1, ... n of the drafts; q: for each draft token the probabilities [1, V]
        that it was drawn from, or None.
        """
        if self.greedy:
            best = argmax(logits)  # [n+1]
            n_accepted = (best[:-1] == drafts).long().cumprod(0).sum()
            return n_accepted, best.index_select(0, n_accepted[None])
        p = token_probs(logits, self.temperature, self.top_k, self.top_p)
        return accept(p, torch.cat(q), drafts, self.generator)


def accept(p, q, drafts, generator=None):
    """Returns (how many drafts to keep [], the token [1] after them), so that the text is distributed as by p alone.

    p [n+1, V]: the model's probabilities after 0, 1, ... n of the drafts [n]; q [n, V]: those each was drawn by. A
    draft token is accepted with probability min(1, p / q); in place of the first that is rejected, a token is drawn
    from max(0, p - q), the part of p that acceptance does not cover. Source: Leviathan et al., Alg. 1.
    """
    at = torch.arange(len(drafts), device=p.device)
    keep = torch.rand(len(drafts), generator=generator, device=p.device) * q[at, drafts] < p[at, drafts]
    n_accepted = keep.long().cumprod(0).sum()
    rest = p - F.pad(q, (0, 0, 0, 1))  # after the last guess nothing was given yet
    return n_accepted, draw(rest.index_select(0, n_accepted[None]).clamp(min=0), generator)


@dataclass
class DraftStats:
    """What came of drafting."""

    forwards: int = 0  # of the model, the prompt's aside
    tokens: int = 0  # that they gave
    drafted: list = field(default_factory=list)  # by depth: how often a draft token followed accepted ones only
    accepted: list = field(default_factory=list)  # by depth: how often it was accepted

    def count(self, n_accepted, n):
        """Notes that of n draft tokens the first n_accepted were accepted."""
        self.forwards += 1
        self.tokens += n_accepted + 1
        for counts, many in ((self.drafted, min(n, n_accepted + 1)), (self.accepted, n_accepted)):
            counts.extend([0] * (n - len(counts)))
            for depth in range(many):
                counts[depth] += 1


@dataclass
class ThinkingBudget:
    """A cap on the tokens a model thinks for before it answers. It is never told: its thinking is closed for it.

    From `tokens` on, the thinking ends at the next line break, or after `grace` more tokens if there is none: then
    `end` is inserted, and the answer goes on. What the prompt holds does not count. Source: Nemotron Nano 2,
    arXiv:2508.14444, section 3.4.
    """

    tokens: int  # to think for
    end: list  # the tokens that close the thinking, "</think>" for one
    line_breaks: list = ()  # tokens that end a line
    grace: int = 500  # tokens to wait for one


class BudgetControl:
    """Watches the rows of a batch think, and closes what takes too long."""

    def __init__(self, budget, ids):
        B, device = len(ids), ids.device
        self.budget, self.count = budget, 0
        self.end = torch.tensor(budget.end, device=device)
        self.line_breaks = torch.tensor(list(budget.line_breaks), dtype=torch.int64, device=device)
        self.recent = torch.full((B, len(budget.end)), -1, device=device)  # the last tokens of each row
        self.closed = torch.zeros(B, dtype=torch.bool, device=device)  # by the model or by us
        self.inserted = torch.full((B,), -1, device=device)  # tokens of `end` so far; -1: not begun
        self.inserted += int(budget.tokens + budget.grace == 0)

    def select_batch(self, rows):
        """Goes on with these rows only, int64 [n]."""
        self.recent, self.closed, self.inserted = self.recent[rows], self.closed[rows], self.inserted[rows]

    def __call__(self, token):
        """Returns the next token [B] of every row, given the one [B] that the model chose."""
        inserting = (self.inserted >= 0) & ~self.closed
        token = torch.where(inserting, self.end[self.inserted.clamp(0, len(self.end) - 1)], token)
        self.inserted += inserting.long()
        self.recent = torch.cat([self.recent[:, 1:], token[:, None]], dim=1)
        self.closed |= (self.recent == self.end).all(1)
        self.count += 1
        over = self.count >= self.budget.tokens
        due = (torch.isin(token, self.line_breaks) & over) | (self.count >= self.budget.tokens + self.budget.grace)
        self.inserted = torch.where(due & ~self.closed & (self.inserted < 0), 0, self.inserted)
        return token


# ---- 2. the step as a CUDA graph ----------------------------------------------------------------------------------


def to_host(flag):
    """Returns a function that gives the value of a tensor []: on a GPU it waits for that alone, not for later work."""
    if flag.device.type != "cuda":
        return flag.item
    value, copied = flag.new_empty((), device="cpu", pin_memory=True), torch.cuda.Event()
    value.copy_(flag, non_blocking=True)
    copied.record()

    def read():
        copied.synchronize()
        return value.item()

    return read


class GraphedStep:
    """A step that is taken again and again, and touches only tensors that stay where they are.

    On a GPU its kernels, too many and too short for a host to keep up with, become a CUDA graph: the first call runs
    them one by one (and compiles them), the second records them, and from then on one launch does all. On a CPU, and
    where PyTorch stands in for Triton (float64, NANO_BACKEND=torch), it is the function itself. What a call returns is
    written over by the next.
    """

    def __init__(self, step, device, dtype, generator=None):
        self.step, self.generator = step, generator
        self.graph, self.ready = None, False
        self.records = device.type == "cuda" and pick_backend(device=device, dtype=dtype) == "triton"

    def __call__(self):
        if not (self.records and self.ready):
            self.ready = True
            return self.step()
        if self.graph is None:
            self.graph = torch.cuda.CUDAGraph()
            if self.generator is not None:
                self.graph.register_generator_state(self.generator)
            with torch.cuda.graph(self.graph):
                self.results = self.step()
        self.graph.replay()
        return self.results

    def forget(self):
        """To be called when a tensor has moved: begins anew."""
        self.graph, self.results, self.ready = None, None, False


# ---- 3. the static cache ------------------------------------------------------------------------------------------


@dataclass
class StaticCache:
    """What a model has read, in tensors that stay where they are, so that a CUDA graph can repeat a step on them.

    `position` counts on the device. While `speculative`, the tokens read are not final: `rollback` keeps the first of
    them and takes the others back. Without gradients.
    """

    states: list  # as in nano_hybrid.Cache; KVState buffers have the cache's capacity
    position: torch.Tensor  # [] int64, positions read
    pad: torch.Tensor | None = None  # [B] int64, padded positions at the start of each row; None: no padding
    speculative: bool = False
    pending_states: dict = field(default_factory=dict)  # layer -> what its step left, not yet written to its state

    def grow(self, capacity):
        """Makes room for `capacity` positions: keys and values move, so recorded graphs are void."""
        for state in self.states:
            if isinstance(state, KVState):
                state.length = state.k.shape[2]
                state.reserve(capacity, state.k)

    def finish(self, T):
        """Ends a step that read T tokens: writes pending states to their places and moves `position`."""
        if self.speculative:
            return
        copies, convs = [], []  # pairs (tensor, what to copy into it)
        for index, pending in self.pending_states.items():
            state = self.states[index]
            if isinstance(state, MambaState):
                convs.append((state.conv, pending[0]))
                copies += [(state.ssm, pending[1])] if pending[1] is not state.ssm else []  # a kernel wrote in place
            else:
                copies += zip(state.tensors(), pending.tensors())
        if copies:
            torch._foreach_copy_(*zip(*copies))
        advance(self.position, T, *(zip(*convs) if convs else ((), ())))
        self.pending_states = {}

    def rollback(self, last):
        """Ends a speculative step: its tokens up to number `last`, a tensor [], were read; those after it were not."""
        copies = []
        for index, pending in self.pending_states.items():
            copies += self.states[index].rollback(pending, last)
        if copies:
            torch._foreach_copy_(*zip(*copies))
        self.position += last + 1  # keys and values of the other tokens will be written over
        self.pending_states, self.speculative = {}, False

    def select_batch(self, rows):
        """Keeps only these rows of the batch, int64 [n]: they move to the front of the same tensors."""
        self.states = [state and state.select(rows) for state in self.states]
        self.pad = None if self.pad is None else self.pad[: len(rows)].copy_(self.pad[rows])


def to_static(cache, capacity, device):
    """Returns a StaticCache with room for `capacity` positions that goes on from a nano_hybrid.Cache.

    Keys and values are taken over, not copied, where they have that capacity already. Raises ValueError if what was
    read does not fit, or padding is still to come.
    """
    if capacity < cache.length or cache.length < cache.longest_pad:
        raise ValueError(
            f"read {cache.length} positions, {cache.longest_pad} of padding; capacity={capacity} does not fit"
        )
    states = [copy.copy(state) for state in cache.states]
    for index, state in enumerate(states):
        if isinstance(state, KVState) and state.k.shape[2] != capacity:
            state.reserve(capacity, state.k)
        elif isinstance(state, RecurrentState):
            states[index] = type(state)(*(t.clone(memory_format=torch.contiguous_format) for t in state.tensors()))
    return StaticCache(states, torch.tensor(cache.length, device=device), cache.pad)


def expand_batch(cache, rows, capacity, into=None):
    """Returns a StaticCache whose row i goes on from row rows[i], int64 [n], of a nano_hybrid.Cache.

    into: a StaticCache that an earlier call returned for as many rows and as much capacity, to be written over.
    """
    if into is None:
        states = [state and state.expand(rows, capacity) for state in cache.states]
        pad = None if cache.pad is None else cache.pad[rows]
        return StaticCache(states, torch.tensor(cache.length, device=rows.device), pad)
    for old, state in zip(into.states, cache.states):
        if state is not None:
            state.expand(rows, capacity, into=old)
    into.position.fill_(cache.length)
    if cache.pad is not None:
        into.pad.copy_(cache.pad[rows])
    return into


# ---- 4. a step: a few tokens through all layers -------------------------------------------------------------------
#
# Each function returns x + mixer(norm(x)) [B, T, C] for a few tokens x on a StaticCache: norm and residual sum go along
# with the mixer's products. They read the weights of Linear layers themselves. A mixer that has no row in STEPS falls
# back to its `forward`.


def mamba2_step(layer, x, index, cache):
    """A Mamba-2 layer: two products and one kernel between them."""
    m, norm, state, every = layer.mixer, layer.norm, cache.states[index], cache.speculative
    projected = linear_step(x, m.in_proj.weight, m.in_proj.bias, norm=norm.weight, eps=norm.eps)
    y, *cache.pending_states[index] = mamba2_steps(
        projected, state.conv, state.ssm, m.conv1d.weight.squeeze(1), m.conv1d.bias, m.dt_bias, m.A_log, m.D,
        m.n_groups, every, overwrite=not every, settled=True,
    )  # fmt: skip
    return linear_step(
        y, m.out_proj.weight, m.out_proj.bias, norm=m.norm.weight, group_size=m.out_proj.in_features // m.n_groups,
        eps=m.eps, residual=x,
    )  # fmt: skip


def attention_step(layer, x, index, cache):
    """An attention layer, * or L: q, k and v in one product; new keys go into the cache where they are attended to."""
    m, norm, state = layer.mixer, layer.norm, cache.states[index]
    projections = m.q_proj, m.k_proj, m.v_proj
    products = linear_step(x, tuple(p.weight for p in projections), norm=norm.weight, eps=norm.eps)
    if isinstance(m, LocalLinear):
        q, k, v = LocalLinearAttention.qkv(m, dict(zip(projections, products)).get)
    else:
        q, k, v = (p.unflatten(-1, (-1, m.head_dim)).transpose(1, 2) for p in products)  # [B, heads, T, D]
    if m.rotary_base:
        q, k = (apply_rope(t, cache.position, m.rotary_base) for t in (q, k))
    attend = attend_local_linear if isinstance(m, LocalLinear) else attend_softmax
    out = attend(m, q, k, v, state, cache)  # [B, Hq, T, D]
    return linear_step(out.transpose(1, 2).flatten(2), m.o_proj.weight, residual=x)


def attend_softmax(_, q, k, v, state, cache):
    """Returns attention [B, Hq, T, D] of T new positions, whose k, v [B, Hkv, T, D] are written to the state."""
    return cached_attention(q, k, v, state.k, state.v, cache.position, cache.pad, settled=True)


def attend_local_linear(mixer, q, k, v, state, cache):
    """Returns the same by local linear attention: each new position attends no further than itself."""
    append(state.k, state.v, k, v, cache.position)
    steps = enumerate(q.unbind(2), 1)
    out = [lla_step(one, state.k, state.v, mixer.ridge, cache.position + t, cache.pad) for t, one in steps]
    return torch.stack(out, dim=2)


def mlp_step(layer, x, index, cache):
    """An MLP: two products, squared ReLU in the first."""
    up, down, norm = layer.mixer.up_proj, layer.mixer.down_proj, layer.norm
    h = linear_step(x, up.weight, up.bias, norm=norm.weight, eps=norm.eps, relu2=True)
    return linear_step(h, down.weight, down.bias, residual=x)


def forward_step(layer, x, index, cache):
    """Any other layer, by its `forward`; a state of fixed size is written back when the step ends."""
    mixer, state = layer.mixer, cache.states[index]
    if state is None:
        return x + mixer(layer.norm(x))
    if not isinstance(state, RecurrentState):
        raise ValueError(
            f"{type(mixer).__name__} has a state that grows and no fast step: use model.generate, or give it a row in "
            "decoding.STEPS"
        )
    cache.pending_states[index] = new = copy.copy(state)
    return x + mixer(layer.norm(x), new)


STEPS = {Mamba2: mamba2_step, Attention: attention_step, LocalLinear: attention_step, MLP: mlp_step}


def through_static(layers, x, cache):
    """Returns x [B, T, C] after the layers; the counterpart of `nano_hybrid.through` for a StaticCache."""
    for index, layer in enumerate(layers):
        x = STEPS.get(type(layer.mixer), forward_step)(layer, x, index, cache)
    cache.finish(x.shape[1])
    return x


def decode_step(model, ids, cache):
    """Returns hidden states [B, T, C] of ids [B, T], a few tokens, before the final norm."""
    return through_static(model.model.layers, embed(ids, model.model.embeddings.weight), cache)


def step_logits(model, hidden, normed):
    """Returns logits [..., V] of hidden states, in the model's dtype. normed: whether they are after the final norm."""
    norm = model.model.norm_f
    return linear_step(hidden, model.lm_head.weight, norm=None if normed else norm.weight, eps=norm.eps)


# ---- 5. a session: what calls of one shape share ------------------------------------------------------------------


class DecodeSession:
    """What `generate` decodes with: a static cache, the last token of each row, a step for each size of the batch.

    On a GPU a step is a CUDA graph, which takes a hundred steps' time to record and knows its tensors by their address.
    In one session, calls of one shape use the same tensors, and graphs recorded in the first serve the rest.
    """

    def __init__(self):
        self.shape, self.capacity, self.copied, self.copy = None, 0, None, None

    def model_like(self, model):
        """Returns a model with the weights that `model` has now, in the dtype that autocast would cast them to."""
        kind = model.lm_head.weight.device.type
        if not torch.is_autocast_enabled(kind):
            return model
        dtype = torch.get_autocast_dtype(kind)
        if self.copied != (model, dtype):
            self.copied, self.copy = (model, dtype), copy.deepcopy(model).requires_grad_(False)
            for module in self.copy.modules():
                if isinstance(module, nn.Linear) and module.weight is not self.copy.model.embeddings.weight:
                    module.to(dtype)
        torch._foreach_copy_(*(list(itertools.chain(m.parameters(), m.buffers())) for m in (self.copy, model)))
        return self.copy

    def begin(self, model, cache, rows, capacity, sampler, wants_logprobs):
        """Goes on from a cache: row i of the batch, int64 [B], from row rows[i] of it."""
        shape = (model, len(rows), cache.pad is None, sampler, wants_logprobs)
        if shape == self.shape and capacity <= self.capacity:
            expand_batch(cache, rows, self.capacity, self.whole)
        else:
            self.shape, self.capacity, self.graphs = shape, capacity, {}
            if len(rows) > 1:
                self.whole = expand_batch(cache, rows, capacity)
            else:  # a sequence by itself may be long: its keys and values are not copied
                self.whole = to_static(cache, capacity, rows.device)
            self.tokens = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
            self.logprobs = torch.empty(len(rows), device=rows.device) if wants_logprobs else None
        self.model, self.sampler, self.size = model, sampler, len(rows)
        self.cache = replace(self.whole, states=list(self.whole.states))

    @property
    def token(self):
        """The last token of each row of the batch, [b]."""
        return self.tokens[: self.size]

    @property
    def logprob(self):
        """Its log-probability, [b]."""
        return self.logprobs[: self.size]

    def sample(self, hidden, normed=True):
        """Draws the next token of each row from the hidden states [b, T, C] of the last, normed or not."""
        drawn, probs = self.sampler(step_logits(self.model, hidden[:, -1], normed))  # [b], [b, V]
        self.token.copy_(drawn)
        if self.logprobs is not None:
            self.logprob.copy_(probs.gather(1, drawn[:, None])[:, 0].log())

    def step(self):
        """Reads the last token of each row, and draws the next."""
        if self.size not in self.graphs:
            me = weakref.proxy(self)  # a reference would keep an unused session until the garbage collector runs
            self.graphs[self.size] = GraphedStep(
                lambda: me.sample(decode_step(me.model, me.token[:, None], me.cache), normed=False),
                self.tokens.device, self.model.lm_head.weight.dtype, self.sampler.generator,
            )  # fmt: skip
        self.graphs[self.size]()

    def select_batch(self, rows):
        """Goes on with these rows only, int64 [n]: they become rows 0 ... n - 1."""
        self.cache.select_batch(rows)
        for buffer in (self.tokens, self.logprobs):
            if buffer is not None:
                buffer[: len(rows)] = buffer[rows]
        self.size = len(rows)

    def grow(self):
        """Doubles the capacity; recorded graphs are void."""
        self.capacity *= 2
        self.cache.grow(self.capacity)
        self.shape, self.graphs = None, {}


# ---- 6. generation ------------------------------------------------------------------------------------------------

# A batch is made smaller when half of its rows have stopped, if it has so many rows and, on a GPU, where a step has to
# be recorded anew, has gone on for so many steps. In a session that is kept, already when a quarter has stopped.
SMALLEST_CUT, CUT_AFTER = 32, 24
CAPACITY = 1024  # positions that `generate` makes room for at once, or as many as the prompt has


def check_options(model, prompts, max_new_tokens, sampler, budget, draft, logprobs, prefill_size):
    """Raises ValueError, in one line, for options of `generate` that cannot be, alone or together."""
    check_sampling(sampler.temperature, sampler.top_k, sampler.top_p)
    if max_new_tokens < 0 or draft < 0 or prefill_size < 1:
        raise ValueError(
            f"need max_new_tokens={max_new_tokens} and draft={draft} >= 0, prefill_size={prefill_size} >= 1"
        )
    if draft and (model.mtp is None or len(prompts) > 1 or budget):
        raise ValueError(
            f"draft={draft} needs a model trained with num_nextn_predict_layers=1 (--recipe=super3 is), "
            f"one row (here {len(prompts)}) and no thinking budget"
        )
    if logprobs is not None and (draft or budget or sampler.greedy):
        raise ValueError("logprobs are of tokens that were drawn: they need temperature > 0, no drafts and no budget")
    for layer in model.layers if draft else ():
        if layer.stateful and not layer.mixer.new_state().can_roll_back:
            raise ValueError(
                f"draft={draft}: {type(layer.mixer).__name__} cannot take draft tokens back (its state has no rollback)"
            )


@torch.inference_mode()
def generate(
    model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=(), generator=None, budget=None, draft=0,
    draft_stats=None, logprobs=None, prefill_size=8192, session=None,
):  # fmt: skip
    """Yields one int64 tensor [B] per step, as `nano_hybrid.Hybrid.generate`: the same tokens, faster.

    model: a Hybrid; call eval() first if it has dropout. budget: a ThinkingBudget. draft: tokens to guess ahead by
    multi-token prediction, for one row: the tokens are the same (sampled: equally distributed), in fewer forwards;
    draft_stats: a DraftStats to count in. logprobs: a list to which the log-probability [B] of each step's tokens, as
    they were drawn, is added. prefill_size: tokens of the prompt to read at a time, which bounds the memory of that;
    equal prompts are read once. session: a DecodeSession, for calls that share memory and CUDA graphs, with one
    generator for all. Raises ValueError for an empty prompt, and for options that cannot be.
    """
    sampler, device = Sampler(temperature, top_k, top_p, generator), model.lm_head.weight.device
    prompt, pad = pad_left(ids, device)  # [B, T], [B]
    check_options(model, prompt, max_new_tokens, sampler, budget, draft, logprobs, prefill_size)
    B, T = prompt.shape
    stop = torch.tensor(list(stop), dtype=torch.int64, device=device)
    capacity = T + min(max_new_tokens, max(T, CAPACITY)) + 2 * (draft + 1)  # two steps: see _draft_steps
    rows = ActiveRows(B, stop, device, kept=session is not None)
    if draft:
        steps = _draft_steps(model, prompt, draft, sampler, draft_stats or DraftStats(), prefill_size, capacity)
    else:
        session, kept = session or DecodeSession(), session is not None
        steps = _steps(model, prompt, pad, sampler, budget, prefill_size, capacity, logprobs, rows, session, kept)
    for token in itertools.islice(steps, max_new_tokens):
        if rows.n_active() == 0:  # asked only now that a GPU has the next step to work on
            return
        yield torch.where(rows.done, -1, token)
        rows.update(token)


class ActiveRows:
    """Which rows of a batch have stopped, and which of the others the batch should shrink to."""

    def __init__(self, B, stop, device, kept):
        self.stop, self.kept, self.on_gpu = stop, kept, device.type == "cuda"
        self.done = torch.zeros(B, dtype=torch.bool, device=device)
        self.n_active = lambda: B  # a function: on a GPU the count is still on its way
        self.rows, self.since = torch.arange(B, device=device), 0  # rows in the batch; steps since they became so few
        self.cut = None  # int64 [n]: the rows, of those in the batch, that it should shrink to

    def update(self, token):
        """Notes the tokens [B] of a step, and decides whether the batch should shrink."""
        if not len(self.stop):
            return
        n_before = self.n_active()
        self.done |= torch.isin(token, self.stop)
        self.n_active, self.since = to_host((~self.done).sum()), self.since + 1
        fewer = len(self.rows) * 3 // 4 if self.kept and self.on_gpu else len(self.rows) // 2
        long_enough = self.since >= CUT_AFTER or self.kept or not self.on_gpu
        if len(self.rows) >= SMALLEST_CUT and n_before <= fewer and long_enough:
            stopped = self.done[self.rows]  # a GPU goes on with exactly `fewer`, for which it has a graph
            self.cut = stopped.argsort(stable=True)[:fewer] if self.on_gpu else (~stopped).nonzero()[:, 0]
            self.rows, self.since = self.rows[self.cut], 0

    def take_cut(self):
        """Returns `cut` and forgets it."""
        cut, self.cut = self.cut, None
        return cut


def _steps(model, ids, pad, sampler, budget, prefill_size, capacity, logprobs, active, session, kept):
    """Yields the next token [B] of every row, without end; -1 for rows that the batch no longer has.

    logprobs: None, or a list that their log-probabilities go to. active: an ActiveRows, which says when the batch
    shrinks. kept: whether the session is to serve another call.
    """
    B = len(ids)
    model = session.model_like(model) if kept else model
    control = budget and BudgetControl(budget, ids)
    rows = torch.arange(B, device=ids.device)  # those in the batch
    prompts, which = torch.cat([pad[:, None], ids], dim=1), rows
    if B > 1:
        prompts, which = prompts.unique(dim=0, return_inverse=True)
    cache = model.new_cache(prompts[:, 0], capacity if B == 1 else 0)

    def of_all(values, others):
        return values.new_full((B,), others).index_copy_(0, rows, values)

    for part in prompts[:, 1:].split(prefill_size, dim=1):
        hidden = model.model(part, cache)
    capacity = -(-capacity // 64) * 64 if kept else capacity
    session.begin(model, cache, which, capacity, sampler, logprobs is not None)
    session.sample(hidden[which])
    for length in itertools.count(ids.shape[1] + 1):
        if control:
            session.token.copy_(control(session.token))
        if logprobs is not None:
            logprobs.append(of_all(session.logprob, 0.0))
        yield of_all(session.token, -1)
        cut = active.take_cut()
        if cut is not None and len(cut):
            rows = rows[cut]
            session.select_batch(cut)
            if control:
                control.select_batch(cut)
        if length > session.capacity:
            session.grow()
        session.step()


# ---- 7. drafts ----------------------------------------------------------------------------------------------------


class DraftStep:
    """One step of speculative decoding of one sequence: the predictor drafts n tokens, the model checks them at once.

    A draft token is accepted with the probability that keeps the distribution (`Sampler.check`). What the model read of
    rejected ones is taken back: keys and values by `position`, a Mamba layer by the state after the last accepted one.
    """

    def __init__(self, model, n, sampler, token, ahead, cache, memory):
        self.model, self.n, self.sampler = model, n, sampler
        self.token, self.ahead = token, ahead  # [1] the last token; [1, 1, C] the predictor's hidden state there
        self.cache, self.memory = cache, memory  # StaticCache of the model, and of the predictor

    def predict(self, tokens, hidden):
        """Returns the predictor's hidden states [1, T, C], one token further, for tokens [1, T]."""
        return self.model.mtp(self.model.model.embeddings(tokens), hidden, self.memory, through_static)

    def __call__(self):
        """Returns (tokens [1, n+1], n_accepted []): the accepted draft tokens and the one after them come first."""
        n, model, start, h, drafts, q = self.n, self.model, self.memory.position.clone(), self.ahead, [], []
        for depth in range(n):  # first from what the model knew, then from the predictor's own output
            draft_token, probs = self.sampler(step_logits(model, h[:, 0], normed=True))  # [1], [1, V]
            drafts.append(draft_token)
            q.append(probs)
            if depth < n - 1:
                h = self.predict(draft_token[:, None], h)
        drafts = torch.stack(drafts, dim=1)  # [1, n]
        self.cache.speculative = True
        hidden = decode_step(model, torch.cat([self.token[:, None], drafts], dim=1), self.cache)
        hidden = model.model.norm_f(hidden)  # [1, n+1, C]
        n_accepted, new = self.sampler.check(step_logits(model, hidden[0], normed=True), drafts[0], q)
        self.cache.rollback(n_accepted)
        is_draft = torch.arange(n + 1, device=new.device) < n_accepted
        tokens = torch.where(is_draft, F.pad(drafts, (0, 1)), new)  # [1, n+1]
        self.memory.position.copy_(start)
        read = self.predict(tokens, hidden)  # [1, n+1, C]
        self.memory.position.copy_(start + n_accepted + 1)
        self.ahead.copy_(read.index_select(1, n_accepted[None]))
        self.token.copy_(new)
        return tokens, n_accepted


def _draft_steps(model, ids, n, sampler, stats, prefill_size, capacity):
    """Yields the next token [1], without end; several per forward of the model where draft tokens are accepted."""
    cache, memory = model.new_cache(capacity=capacity), Cache(model.mtp.layers, capacity=capacity)
    for part in ids.split(prefill_size, dim=1):
        hidden = model.model(part, cache)  # [1, part, C]
        following = ids[:, cache.length - part.shape[1] + 1 : cache.length + 1]  # the token after each
        if cache.length == ids.shape[1]:
            token, _ = sampler(step_logits(model, hidden[:, -1], normed=True))  # [1]
            following = torch.cat([following, token[:, None]], dim=1)
        ahead = model.mtp(model.model.embeddings(following), hidden, memory)[:, -1:]  # [1, 1, C], at the end of `token`
    yield token.clone()
    caches = [to_static(what, capacity, ids.device) for what in (cache, memory)]
    draft_step = DraftStep(model, n, sampler, token, ahead, *caches)
    step = GraphedStep(draft_step, ids.device, model.lm_head.weight.dtype, sampler.generator)
    length, before = ids.shape[1], None
    while True:
        if length + 2 * (n + 1) > capacity:  # this step, and the one whose outcome the host does not know yet
            capacity *= 2
            for what in caches:
                what.grow(capacity)
            step.forget()
        tokens, n_accepted = step()
        now = tokens.clone(), to_host(n_accepted)
        if before:  # asked only now that a GPU has the next step to work on
            n_accepted = before[1]()
            length += n_accepted + 1
            stats.count(n_accepted, n)
            yield from before[0][:, : n_accepted + 1].unbind(1)
        before = now
