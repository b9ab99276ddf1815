"""Writing text one token at a time: choosing the token, guessing ahead, and the kernels that make a step short.

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
              linear_step                       ssd.mamba2_steps               linear_step
Differs  Nothing from the papers' distributions: greedy text is the same with and without drafts, sampled text is
         equally distributed (tests/test_nano_hybrid.py). In 16 bits two likeliest tokens may tie, and the tie may fall
         otherwise where several tokens are checked at once.
"""

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from decode_kernels import argmax
from kernels import (
    at_least_float32,
    pick_backend,
)

# ---- 1. choosing the next token -----------------------------------------------------------------------------------


def token_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """Returns the probabilities [B, V] that the next token is drawn by, from logits [B, V], as `generate` explains."""
    logits = at_least_float32(logits)
    if temperature == 0:
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]  # [B, 1]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        sorted_probs, order = probs.sort(descending=True)
        before = sorted_probs.cumsum(-1) - sorted_probs  # probability of all likelier tokens
        probs = torch.zeros_like(probs).scatter(-1, order, sorted_probs.masked_fill(before >= top_p, 0))
    return probs


def draw(probs, generator=None):
    """Returns one token [B] int64 per row of probs [B, V], which need not sum to 1."""
    waits = torch.empty_like(probs).exponential_(generator=generator)  # the first of B x V clocks to ring is a draw
    return argmax(probs / waits)


@dataclass
class Sampler:
    """How the next token is chosen. Greedily where temperature is 0: then no probabilities are made."""

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    generator: torch.Generator | None = None

    def __call__(self, logits):
        """Returns (a token [B], the probabilities [B, V] it was drawn by or None), from logits [B, V]."""
        if self.temperature == 0:
            return argmax(logits), None
        probs = token_probs(logits, self.temperature, self.top_k, self.top_p)
        return draw(probs, self.generator), probs

    def check(self, logits, guesses, q):
        """Returns (how many of the guesses [n] to keep [], the token [1] after them), as `accept`.

        logits [n+1, V]: the model's, after 0, 1, ... n of the guesses; q: for each guess the probabilities [1, V] it
        was drawn by, or None.
        """
        if self.temperature == 0:
            best = argmax(logits)  # [n+1]
            kept = (best[:-1] == guesses).long().cumprod(0).sum()
            return kept, best.index_select(0, kept[None])
        p = token_probs(logits, self.temperature, self.top_k, self.top_p)
        return accept(p, torch.cat(q), guesses, self.generator)


def accept(p, q, guesses, generator=None):
    """Returns (how many guesses to keep [], the token [1] after them), so that the text is distributed as by p alone.

    p [n+1, V]: the model's probabilities after 0, 1, ... n of the guesses [n]; q [n, V]: those each was drawn by. A
    guess is kept with probability min(1, p / q); in place of the first that is not, a token is drawn by max(0, p - q),
    which is what p has more than was given by keeping. Source: Leviathan et al., arXiv:2211.17192, Alg. 1.
    """
    at = torch.arange(len(guesses), device=p.device)
    keep = torch.rand(len(guesses), generator=generator, device=p.device) * q[at, guesses] < p[at, guesses]
    kept = keep.long().cumprod(0).sum()
    rest = p - F.pad(q, (0, 0, 0, 1))  # after the last guess nothing was given yet
    return kept, draw(rest.index_select(0, kept[None]).clamp(min=0), generator)


@dataclass
class DraftStats:
    """What came of drafting."""

    forwards: int = 0  # of the model, the prompt's aside
    tokens: int = 0  # that they gave
    drafted: list = field(default_factory=list)  # by depth: how often a guess was made after right ones only
    accepted: list = field(default_factory=list)  # by depth: how often it was right

    def count(self, right, n):
        """Notes that of n guesses the first `right` were kept."""
        self.forwards += 1
        self.tokens += right + 1
        for counts, many in ((self.drafted, min(n, right + 1)), (self.accepted, right)):
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

    def select(self, rows):
        """Watches these rows, int64 [n], and no other."""
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
