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
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.sampling import (
    ActiveRows,
    BudgetControl,
    DraftStats,
    ThinkingBudget,
    check_sampling,
    pad_left,
    to_host,
    token_probs,
)
from decode_kernels import advance, append, argmax, cached_attention, embed, grouped_rms_norm, linear_step, mamba2_steps
from kernels import fresh_casts, has_hooks, pick_backend
from latent_moe import MLP
from lla import LocalLinearAttention, lla_step
from nano_hybrid import Attention, Block, Cache, Hybrid, KVState, LocalLinear, RMSNorm, apply_rope
from ssd import Mamba2, RecurrentState

# ---- 1. sampling and drafts ---------------------------------------------------------------------------------------


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
    vocab_size: int | None = None  # ids from here on are padding of the vocabulary, and never drawn

    @property
    def greedy(self):
        """Whether the likeliest token is taken: no probabilities are made then."""
        return self.temperature < 1e-6  # logits / 1e-40 would overflow

    def probs(self, logits):
        """Returns the probabilities [B, V] that a token is drawn from, or None where it is greedy; logits [B, V]."""
        return None if self.greedy else token_probs(logits, self.temperature, self.top_k, self.top_p)

    def __call__(self, logits):
        """Returns (a token [B], the probabilities [B, V] it was drawn from or None), from logits [B, V]."""
        logits = logits[:, : self.vocab_size]
        probs = self.probs(logits)
        return (argmax(logits) if self.greedy else draw(probs, self.generator)), probs

    def check(self, logits, drafts, q):
        """Returns (how many of the drafts [n] to keep [], the token [1] after them, p), as `accept`.

        logits [n+1, V]: the model's, after 0, 1, ... n of the drafts; q: for each draft token the probabilities [1, V]
        that it was drawn from, or None; p [n+1, V]: the probabilities of the model's tokens, or None.
        """
        logits = logits[:, : self.vocab_size]
        if self.greedy:
            best = argmax(logits)  # [n+1]
            n_accepted = (best[:-1] == drafts).long().cumprod(0).sum()
            return n_accepted, best.index_select(0, n_accepted[None]), None
        p = self.probs(logits)
        return *accept(p, torch.cat(q), drafts, self.generator), p


def accept(p, q, drafts, generator=None):
    """Returns (how many drafts to keep [], the token [1] after them), so that the text is distributed as by p alone.

    p [n+1, V]: the model's probabilities after 0, 1, ... n of the drafts [n]; q [n, V]: those each was drawn by. A
    draft token is accepted with probability min(1, p / q); in place of the first that is rejected, a token is drawn
    from max(0, p - q), the part of p that acceptance does not cover. Source: Leviathan et al., Alg. 1.
    """
    at = torch.arange(len(drafts), device=p.device)
    keep = torch.rand(len(drafts), generator=generator, device=p.device) * q[at, drafts] < p[at, drafts]
    n_accepted = keep.long().cumprod(0).sum()
    rest = (p - F.pad(q, (0, 0, 0, 1))).clamp(min=0)  # after the last draft token nothing was given yet
    rest = torch.where(rest.sum(-1, keepdim=True) > 0, rest, p)  # p = q but for rounding: nothing would be left
    return n_accepted, draw(rest.index_select(0, n_accepted[None]), generator)


def logprob_of(token, probs):
    """Returns the log-probability [B] of token [B], drawn from probs [B, V]; 0 where they are None: it was greedy."""
    if probs is None:
        return torch.zeros(len(token), device=token.device)
    return probs.gather(1, token[:, None])[:, 0].log()


# ---- 2. the step as a CUDA graph ----------------------------------------------------------------------------------


class GraphedStep:
    """A step that is taken again and again, and touches only tensors that stay where they are.

    On a GPU its kernels, too many and too short for a host to keep up with, become a CUDA graph: the first call runs
    them one by one (and compiles them), the second records them, and from then on one launch does all. On a CPU, where
    PyTorch stands in for Triton (float64, NANO_BACKEND=torch), and with recordable=False, it is the function itself.
    What a call returns is written over by the next.
    """

    def __init__(self, step, device, dtype, generator=None, recordable=True):
        self.step, self.generator = step, generator
        self.graph, self.ready = None, False
        on_triton = device.type == "cuda" and pick_backend(device=device, dtype=dtype) == "triton"
        self.records = recordable and on_triton

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
        """Raises the capacity to `capacity` positions: keys and values move, so recorded graphs are void."""
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
            if isinstance(pending, RecurrentState):
                copies += zip(state.tensors(), pending.tensors())
            else:  # of mamba2_step
                convs.append((state.conv, pending[0]))
                copies += [(state.ssm, pending[1])] if pending[1] is not state.ssm else []  # a kernel wrote in place
        if copies:
            torch._foreach_copy_(*zip(*copies))
        advance(self.position, T, *(zip(*convs) if convs else ((), ())))
        self.pending_states = {}

    def rollback(self, last):
        """Ends a speculative step: its tokens up to number `last`, a tensor [], were read; those after it were not."""
        copies = []
        for index, pending in self.pending_states.items():
            state = self.states[index]
            if isinstance(pending[0], RecurrentState):  # of forward_step: the state after each token
                after = (torch.stack(each) for each in zip(*(one.tensors() for one in pending)))
                copies += [(old, new.index_select(0, last[None])[0]) for old, new in zip(state.tensors(), after)]
            else:
                copies += state.rollback(pending, last)
        if copies:
            torch._foreach_copy_(*zip(*copies))
        self.position += last + 1  # keys and values of the other tokens will be written over
        self.pending_states, self.speculative = {}, False

    def select_batch(self, rows):
        """Keeps only these rows of the batch, int64 [n]: they move to the front of the same tensors."""
        self.states = [state and state.select(rows) for state in self.states]
        self.pad = None if self.pad is None else self.pad[: len(rows)].copy_(self.pad[rows])


def to_static(cache, capacity, device):
    """Returns a StaticCache of `capacity` positions that goes on from a nano_hybrid.Cache.

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
# with the mixer's products. That reads the weights, past the `forward` of the modules that hold them, so it is done
# only where `forward` would do just that (`is_plain`). Any other module is called, and any other layer goes through
# `forward_step`.

PLAIN = (nn.Linear, nn.Embedding, RMSNorm, Block, Mamba2, Attention, LocalLinear, MLP)


def is_plain(*modules):
    """Returns whether these modules do with their weights what their names say: no subclass (LoRA, 4 bits), no hook."""
    if nn.modules.module._global_forward_hooks or nn.modules.module._global_forward_pre_hooks:
        return False
    return all(type(module) in PLAIN and not has_hooks(module) for module in modules)


def product(linear, x, norm=None, relu2=False, residual=None):
    """Returns [..., N]: residual + activation(linear(norm(x))), each part where it is asked for. norm: a module."""
    if norm is not None and not is_plain(norm):
        x, norm = norm(x), None
    if is_plain(linear):
        scale, eps = (None, 1e-5) if norm is None else (norm.weight, norm.eps)
        return linear_step(x, linear.weight, linear.bias, norm=scale, eps=eps, relu2=relu2, residual=residual)
    y = linear(x if norm is None else norm(x))
    y = F.relu(y).square() if relu2 else y
    return y if residual is None else residual + y


def mamba2_step(layer, x, index, cache):
    """A Mamba-2 layer: two products and one kernel between them."""
    m, state, every = layer.mixer, cache.states[index], cache.speculative
    y, *cache.pending_states[index] = mamba2_steps(
        product(m.in_proj, x, layer.norm), state.conv, state.ssm, m.conv1d.weight.squeeze(1), m.conv1d.bias, m.dt_bias,
        m.A_log, m.D, m.n_groups, every, overwrite=not every, settled=True,
    )  # fmt: skip
    norm = dict(norm=m.norm.weight, group_size=m.norm.weight.numel() // m.n_groups, eps=m.eps)
    if is_plain(m.out_proj):
        return linear_step(y, m.out_proj.weight, m.out_proj.bias, **norm, residual=x)
    return x + m.out_proj(grouped_rms_norm(y, **norm).to(x.dtype))


def attention_step(layer, x, index, cache):
    """An attention layer, * or L: q, k and v in one product; new keys go into the cache where they are attended to."""
    m, norm, state = layer.mixer, layer.norm, cache.states[index]
    projections = m.q_proj, m.k_proj, m.v_proj
    if not is_plain(norm, *projections):
        q, k, v = m.qkv(norm(x))
    else:
        products = linear_step(x, tuple(p.weight for p in projections), norm=norm.weight, eps=norm.eps)
        if isinstance(m, LocalLinear):
            q, k, v = LocalLinearAttention.qkv(m, dict(zip(projections, products)).get)
        else:
            q, k, v = (p.unflatten(-1, (-1, m.head_dim)).transpose(1, 2) for p in products)  # [B, heads, T, D]
    if m.rotary_base:
        q, k = (apply_rope(t, cache.position, m.rotary_base) for t in (q, k))
    attend = attend_local_linear if isinstance(m, LocalLinear) else attend_softmax
    out = attend(m, q, k, v, state, cache)  # [B, Hq, T, D]
    return product(m.o_proj, out.transpose(1, 2).flatten(2), residual=x)


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
    return product(layer.mixer.down_proj, product(layer.mixer.up_proj, x, layer.norm, relu2=True), residual=x)


def forward_step(layer, x, index, cache):
    """Any other layer, by its `forward`. What it leaves in a state of fixed size is written back when the step ends."""
    state = cache.states[index]
    if state is None:
        return layer(x)
    if isinstance(state, KVState):  # the host has to know its length: never a part of a graph, see `can_record`
        return layer(x, replace(state, length=int(cache.position), pad=cache.pad))
    states, out = [state], []
    for part in x.split(1 if cache.speculative else x.shape[1], dim=1):
        states.append(copy.copy(states[-1]))
        out.append(layer(part, states[-1]))
    cache.pending_states[index] = states[1:] if cache.speculative else states[-1]
    return torch.cat(out, dim=1)


STEPS = {Mamba2: mamba2_step, Attention: attention_step, LocalLinear: attention_step, MLP: mlp_step}


def step_of(layer):
    """Returns the function above that takes a step through a Block: a fused one where that changes nothing."""
    return STEPS.get(type(layer.mixer), forward_step) if is_plain(layer, layer.mixer) else forward_step


def can_record(model):
    """Returns whether a step can be a CUDA graph: it would run no hook again, nor ask the host for a length or rows."""
    growing = [layer for layer in model.layers if layer.stateful and isinstance(layer.mixer.new_state(), KVState)]
    fused = is_plain() and all(step_of(layer) is not forward_step for layer in growing)
    return fused and not any(has_hooks(m) or getattr(m, "product", None) for m in model.modules())  # experts' product


def identity_of(model):
    """Returns what a recorded step depends on: the modules of a model, and where its weights lie."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return can_record(model), *map(id, model.modules()), *(t.data_ptr() for t in tensors)


def through_static(layers, x, cache):
    """Returns x [B, T, C] after the layers; the counterpart of `nano_hybrid.through` for a StaticCache."""
    for index, layer in enumerate(layers):
        x = step_of(layer)(layer, x, index, cache)
    cache.finish(x.shape[1])
    return x


def decode_step(model, ids, cache):
    """Returns hidden states [B, T, C] of ids [B, T], a few tokens, before the final norm."""
    embeddings = model.model.embeddings
    x = embed(ids, embeddings.weight) if is_plain(embeddings) else embeddings(ids)
    return through_static(model.model.layers, x, cache)


def step_logits(model, hidden, normed):
    """Returns logits [..., V] of hidden states, in the model's dtype. normed: whether they are after the final norm."""
    return product(model.lm_head, hidden, None if normed else model.model.norm_f)


# ---- 5. a session: what calls of one shape share ------------------------------------------------------------------


class DecodeSession:
    """What `generate` decodes with: a static cache, the last token of each row, a step for each size of the batch.

    On a GPU a step is a CUDA graph, which takes a hundred steps' time to record and knows its tensors by their address.
    In one session, calls of one shape use the same tensors, and graphs recorded in the first serve the rest, until a
    module of the model is replaced or a weight moves. Drafts record their own steps, call by call.
    """

    def __init__(self):
        self.shape, self.capacity, self.copied, self.copy = None, 0, None, None

    def model_like(self, model):
        """Returns a model with the weights that `model` has now, in the dtype that autocast would cast them to."""
        kind = model.lm_head.weight.device.type
        if not torch.is_autocast_enabled(kind):
            return model
        dtype, modules = torch.get_autocast_dtype(kind), tuple(map(id, model.modules()))
        if self.copied != (modules, dtype):
            self.copied, self.copy = (modules, dtype), copy.deepcopy(model).requires_grad_(False)
            for module in self.copy.modules():
                if type(module) is nn.Linear and module.weight is not self.copy.model.embeddings.weight:
                    module.to(dtype)
        torch._foreach_copy_(*(list(itertools.chain(m.parameters(), m.buffers())) for m in (self.copy, model)))
        return self.copy

    def begin(self, model, cache, rows, capacity, sampler, wants_logprobs):
        """Goes on from a cache: row i of the batch, int64 [B], from row rows[i] of it."""
        shape = (identity_of(model), len(rows), cache.pad is None, sampler, wants_logprobs)
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
            self.logprob.copy_(logprob_of(drawn, probs))

    def step(self):
        """Reads the last token of each row, and draws the next."""
        if self.size not in self.graphs:
            me = weakref.proxy(self)  # a reference would keep an unused session until the garbage collector runs
            self.graphs[self.size] = GraphedStep(
                lambda: me.sample(decode_step(me.model, me.token[:, None], me.cache), normed=False),
                self.tokens.device, self.model.lm_head.weight.dtype, self.sampler.generator, can_record(self.model),
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

CAPACITY = 1024  # positions that `generate` allocates at once, or as many as the prompt has


def check_options(model, max_new_tokens, sampler, budget, draft, prefill_size):
    """Raises ValueError, in one line, for a model or options that `generate` cannot go on with."""
    if not isinstance(model, Hybrid):
        raise ValueError(f"generate takes a Hybrid, not a {type(model).__name__}; of a PeftModel, its base_model.model")
    if not isinstance(budget, ThinkingBudget | None):
        raise ValueError(f"budget={budget} is to be a ThinkingBudget: its tokens, and those that close the thinking")
    check_sampling(sampler.temperature, sampler.top_k, sampler.top_p, sampler.vocab_size)
    if max_new_tokens < 0 or draft < 0 or prefill_size < 1:
        raise ValueError(
            f"need max_new_tokens={max_new_tokens} and draft={draft} >= 0, prefill_size={prefill_size} >= 1"
        )
    if model.training and model.config.hidden_dropout:
        raise ValueError(f"the model is in training, with dropout {model.config.hidden_dropout}: call its eval() first")
    if any(map(has_hooks, (model, model.model))):
        raise ValueError(
            "a hook on the whole model or its backbone does not see single steps: hook layers, or use model.generate"
        )
    if draft and model.mtp is None:
        raise ValueError(f"draft={draft} needs a model trained with num_nextn_predict_layers=1 (--recipe=super3 is)")
    for layer in model.layers if draft else ():
        if layer.stateful and not layer.mixer.new_state().can_roll_back:
            raise ValueError(
                f"draft={draft}: {type(layer.mixer).__name__} cannot take draft tokens back (its state has no rollback)"
            )


@torch.inference_mode()
def generate(
    model, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=(), generator=None, budget=None, draft=0,
    draft_stats=None, logprobs=None, prefill_size=8192, session=None, vocab_size=None,
):  # fmt: skip
    """Yields one int64 tensor [B] per step, as `nano_hybrid.Hybrid.generate`: the same tokens, faster.

    model: a Hybrid; call eval() first if it has dropout. budget: a ThinkingBudget. draft: tokens to guess ahead by
    multi-token prediction, each row by itself: the tokens are the same (sampled: equally distributed), in fewer
    forwards; draft_stats: a DraftStats to count in. logprobs: a list to which the log-probability [B] of each step's
    tokens is added, in the distribution that they were drawn from: 0 for greedy ones, those that the budget inserted,
    and rows that have stopped. prefill_size: tokens of the prompt to read at a time, which bounds the memory of that;
    equal prompts are read once. session: a DecodeSession, for calls that share memory and CUDA graphs, with one
    generator for all. vocab_size: ids from here on, which fill up the vocabulary, are never drawn. Options go together
    as they are given. Raises ValueError for an empty prompt, and for options that cannot be.
    """
    sampler = Sampler(temperature, top_k, top_p, generator, vocab_size)
    check_options(model, max_new_tokens, sampler, budget, draft, prefill_size)
    device = model.model.embeddings.weight.device
    prompt, pad = pad_left(ids, device, model.config.vocab_size)  # [B, T], [B]
    B, T = prompt.shape
    stop = torch.tensor(list(stop), dtype=torch.int64, device=device)
    capacity = T + min(max_new_tokens, max(T, CAPACITY)) + 2 * (draft + 1)  # two steps: see _draft_steps
    rows = ActiveRows(B, stop, device, kept=session is not None)
    control = None if budget is None else partial(BudgetControl, budget, device=device)
    if draft:
        stats = DraftStats() if draft_stats is None else draft_stats
        steps = _draft_rows(model, prompt, pad, draft, sampler, stats, prefill_size, capacity, control, rows)
    else:
        kept, session = session is not None, session or DecodeSession()
        control, wants = control and control(B), logprobs is not None
        steps = _steps(model, prompt, pad, sampler, control, prefill_size, capacity, wants, rows, session, kept)
    with fresh_casts():
        for token, logprob in itertools.islice(steps, max_new_tokens):
            if rows.n_active() == 0:  # asked only now that a GPU has the next step to work on
                return
            if logprobs is not None:
                logprobs.append(logprob.masked_fill(rows.done, 0.0))
            yield torch.where(rows.done, -1, token)
            rows.update(token)


def _steps(model, ids, pad, sampler, control, prefill_size, capacity, wants_logprobs, active, session, kept):
    """Yields (the next token [B] of every row, its log-probability [B] or None), without end.

    Token -1 is that of rows that the batch no longer has. control: a BudgetControl or None. active: an ActiveRows,
    which says when the batch shrinks. kept: whether the session is to serve another call.
    """
    B = len(ids)
    model = session.model_like(model) if kept else model
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
    session.begin(model, cache, which, capacity, sampler, wants_logprobs)
    session.sample(hidden[which])
    for length in itertools.count(ids.shape[1] + 1):
        if control:
            token, inserted = control(session.token)
            session.token.copy_(token)
            if wants_logprobs:
                session.logprob.masked_fill_(inserted, 0.0)
        yield of_all(session.token, -1), of_all(session.logprob, 0.0) if wants_logprobs else None
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

    def __init__(self, model, n, sampler, control, token, ahead, cache, memory):
        self.model, self.n, self.sampler, self.control = model, n, sampler, control
        self.token, self.ahead = token, ahead  # [1] the last token; [1, 1, C] the predictor's hidden state there
        self.cache, self.memory = cache, memory  # StaticCache of the model, and of the predictor

    def predict(self, tokens, hidden):
        """Returns the predictor's hidden states [1, T, C], one token further, for tokens [1, T]."""
        return self.model.mtp(self.model.model.embeddings(tokens), hidden, self.memory, through_static)

    def draft(self):
        """Returns (n draft tokens [1, n], the probabilities [1, V] that each was drawn from, or None)."""
        h, drafts, q = self.ahead, [], []
        for depth in range(self.n):  # first from what the model knew, then from the predictor's own output
            token, probs = self.sampler(step_logits(self.model, h[:, 0], normed=True))  # [1], [1, V]
            drafts.append(token)
            q.append(probs)
            if depth < self.n - 1:
                h = self.predict(token[:, None], h)
        return torch.stack(drafts, dim=1), q

    def check(self, hidden, drafts, q):
        """Returns (tokens [1, n+1], n_accepted [], log-probabilities [n+1]): the accepted ones and one more come first.

        A thinking budget ends what is accepted where it inserts a token other than the one that was drawn.
        """
        n_accepted, new, p = self.sampler.check(step_logits(self.model, hidden[0], normed=True), drafts[0], q)
        is_draft = torch.arange(self.n + 1, device=new.device) < n_accepted
        tokens = torch.where(is_draft, F.pad(drafts, (0, 1)), new)  # [1, n+1]
        logprobs = logprob_of(tokens[0], p)
        for at in range(self.n + 1) if self.control else ():
            token, inserted = self.control(tokens[:, at], counts=at <= n_accepted[None])
            n_accepted = torch.where(token[0] != tokens[0, at], n_accepted.clamp(max=at), n_accepted)
            tokens[:, at], logprobs[at] = token, logprobs[at].masked_fill(inserted[0], 0.0)
        return tokens, n_accepted, logprobs

    def __call__(self):
        """Returns what `check` returns, and goes on to the last of the tokens that it accepts."""
        start = self.memory.position.clone()
        drafts, q = self.draft()
        self.cache.speculative = True
        hidden = decode_step(self.model, torch.cat([self.token[:, None], drafts], dim=1), self.cache)
        hidden = self.model.model.norm_f(hidden)  # [1, n+1, C]
        tokens, n_accepted, logprobs = self.check(hidden, drafts, q)
        self.cache.rollback(n_accepted)
        self.memory.position.copy_(start)
        read = self.predict(tokens, hidden)  # [1, n+1, C]
        self.memory.position.copy_(start + n_accepted + 1)
        self.ahead.copy_(read.index_select(1, n_accepted[None]))
        self.token.copy_(tokens[0].index_select(0, n_accepted[None]))
        return tokens, n_accepted, logprobs


def _draft_steps(model, ids, n, sampler, stats, prefill_size, capacity, control):
    """Yields (the next token [1], its log-probability [1]), without end; several per forward of the model."""
    cache, memory = model.new_cache(capacity=capacity), Cache(model.mtp.layers, capacity=capacity)
    for part in ids.split(prefill_size, dim=1):
        hidden = model.model(part, cache)  # [1, part, C]
        following = ids[:, cache.length - part.shape[1] + 1 : cache.length + 1]  # the token after each
        if cache.length == ids.shape[1]:
            token, probs = sampler(step_logits(model, hidden[:, -1], normed=True))  # [1], [1, V]
            logprob = logprob_of(token, probs)
            if control:
                token, inserted = control(token)
                logprob = logprob.masked_fill(inserted, 0.0)
            following = torch.cat([following, token[:, None]], dim=1)
        ahead = model.mtp(model.model.embeddings(following), hidden, memory)[:, -1:]  # [1, 1, C], at the end of `token`
    yield token.clone(), logprob
    caches = [to_static(what, capacity, ids.device) for what in (cache, memory)]
    draft_step = DraftStep(model, n, sampler, control, token, ahead, *caches)
    step = GraphedStep(draft_step, ids.device, model.lm_head.weight.dtype, sampler.generator, can_record(model))
    length, before = ids.shape[1], None
    while True:
        if length + 2 * (n + 1) > capacity:  # this step, and the one whose outcome the host does not know yet
            capacity *= 2
            for what in caches:
                what.grow(capacity)
            step.forget()
        tokens, n_accepted, logprobs = step()
        now = tokens.clone(), to_host(n_accepted), logprobs.clone()
        if before:  # asked only now that a GPU has the next step to work on
            tokens, n_accepted, logprobs = before
            n_kept = n_accepted() + 1
            length += n_kept
            stats.count(n_kept - 1, n)
            yield from zip(tokens[:, :n_kept].unbind(1), logprobs[:n_kept, None])
        before = now


def _draft_rows(model, ids, pad, n, sampler, stats, prefill_size, capacity, control, active):
    """Yields (the next token [B] of every row, its log-probability [B]): each row drafts by itself, in turn.

    Rows keep different numbers of draft tokens a step, and a StaticCache has one position for all of its rows.
    """
    rows = [
        _draft_steps(model, row[None, n_pad:], n, sampler, stats, prefill_size, capacity, control and control(1))
        for row, n_pad in zip(ids, pad.tolist())
    ]
    over = torch.full((1,), -1, device=ids.device), torch.zeros(1, device=ids.device)
    while True:
        done = active.done.tolist() if len(rows) > 1 else [False]
        tokens, logprobs = zip(*(over if stopped else next(row) for row, stopped in zip(rows, done)))
        yield torch.cat(tokens), torch.cat(logprobs)
