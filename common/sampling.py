"""The next token: what is drawn, from which probabilities, after which prompts, and what a thinking budget puts there.

Plain PyTorch, any device. Source of drafts: Leviathan et al., arXiv:2211.17192; of budgets: arXiv:2508.14444.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F

from kernels import at_least_float32


def token_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """Returns the probabilities [B, V] that the next token is drawn from, for logits [B, V]. Every row sums to 1.

    In this order: the logits are divided by the temperature (0: the likeliest token has probability 1), the top_k
    likeliest are kept, and of these, renormalised, the fewest that hold top_p of the probability.
    """
    logits = at_least_float32(logits)
    if temperature < 1e-6:  # greedy; logits / 1e-40 would overflow
        return torch.zeros_like(logits).scatter(-1, logits.argmax(-1, keepdim=True), 1.0)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]  # [B, 1]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        sorted_probs, order = probs.sort(descending=True)
        before = sorted_probs.cumsum(-1) - sorted_probs  # probability of all likelier tokens
        kept = sorted_probs.masked_fill(before >= top_p, 0)
        probs = torch.empty_like(probs).scatter_(-1, order, kept / kept.sum(-1, keepdim=True))
    return probs


def draw(probs, generator=None):
    """Returns one token [B] int64 per row of probs [B, V], which need not sum to 1.

    Of independent exponential waiting times with rates p_i the first to end is i with probability p_i / sum(p).
    """
    waits = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / waits).argmax(-1)


def pad_left(prompts, device, vocab_size):
    """Returns (ids int64 [B, T], pad int64 [B]) of B rows of token ids of any lengths, padded with 0 on the left.

    Raises ValueError for no rows, for an empty row, for ids that are not rows, and for ids outside of the vocabulary.
    """
    if len(prompts) == 0 or any(getattr(row, "ndim", 1) == 0 or isinstance(row, int) for row in prompts):
        raise ValueError("ids must hold one row of token ids per sequence, as [[1, 2, 3]]; an empty prompt has none")
    if any(len(row) == 0 for row in prompts):
        raise ValueError("cannot go on from an empty prompt; give at least one token per row")
    T = max(len(row) for row in prompts)
    pad = torch.tensor([T - len(row) for row in prompts], device=device)
    if all(isinstance(row, list) for row in prompts):  # one copy to the device for all
        ids = torch.tensor([[0] * (T - len(row)) + row for row in prompts], device=device)
    else:
        ids = torch.stack([F.pad(torch.as_tensor(row, device=device), (T - len(row), 0)) for row in prompts])
    least, largest = (int(end) for end in ids.aminmax())
    if least < 0 or largest >= vocab_size:  # a GPU would never recover from an embedding that is not there
        raise ValueError(f"a prompt holds ids from {least} to {largest}; the model has 0 to {vocab_size - 1}")
    return ids, pad


def check_sampling(temperature, top_k, top_p, vocab_size=None):
    """Raises ValueError for settings out of range."""
    if vocab_size is not None and vocab_size < 1:
        raise ValueError(f"vocab_size={vocab_size} leaves no token to draw")
    good_temperature = 0 <= temperature < math.inf
    if not good_temperature or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"need temperature >= 0, top_k >= 1, 0 < top_p <= 1; got {temperature}, {top_k}, {top_p}")


@dataclass
class ThinkingBudget:
    """A cap on the tokens a model thinks for before it answers. It is never told: its thinking is closed for it.

    From `tokens` on, the thinking ends at the next line break, or after `grace` more tokens if there is none: then
    `end` is inserted, and the answer goes on. What the prompt holds does not count. Raises ValueError for a negative
    number, and for an `end` of no tokens. Source: Nemotron Nano 2, arXiv:2508.14444, section 3.4.
    """

    tokens: int  # to think for
    end: list  # the tokens that close the thinking, "</think>" for one
    line_breaks: list = ()  # tokens with a line break in them
    grace: int = 500  # tokens to wait for one

    def __post_init__(self):
        if self.tokens < 0 or self.grace < 0 or len(self.end) == 0:
            raise ValueError(
                f"a thinking budget needs tokens={self.tokens} and grace={self.grace} >= 0, and tokens that close the "
                f"thinking, not end={self.end}"
            )


class BudgetControl:
    """Watches the rows of a batch think, and closes what takes too long. Its tensors stay where they are."""

    def __init__(self, budget, B, device):
        self.budget = budget
        self.end = torch.tensor(budget.end, device=device)
        self.line_breaks = torch.tensor(list(budget.line_breaks), dtype=torch.int64, device=device)
        self.recent = torch.full((B, len(budget.end)), -1, device=device)  # the last tokens of each row
        self.closed = torch.zeros(B, dtype=torch.bool, device=device)  # by the model or by us
        begun = 0 if budget.tokens + budget.grace == 0 else -1
        self.inserted = torch.full((B,), begun, device=device)  # tokens of `end` so far; -1: not begun
        self.count = torch.zeros(B, dtype=torch.int64, device=device)  # tokens so far

    def select_batch(self, rows):
        """Goes on with these rows only, int64 [n]."""
        self.recent, self.closed = self.recent[rows], self.closed[rows]
        self.inserted, self.count = self.inserted[rows], self.count[rows]

    def __call__(self, token, counts=None):
        """Returns (the next token [B] of every row, whether it was inserted [B]), given the one [B] that was drawn.

        counts bool [B] or None: False for a row whose token is not part of its text, and is not to be remembered.
        """
        budget, inserted = self.budget, (self.inserted >= 0) & ~self.closed
        token = torch.where(inserted, self.end[self.inserted.clamp(0, len(self.end) - 1)], token)
        n_inserted, count = self.inserted + inserted, self.count + 1
        recent = torch.cat([self.recent[:, 1:], token[:, None]], dim=1)
        closed = self.closed | (recent == self.end).all(1)
        at_line_break = (token[:, None] == self.line_breaks).any(1) & (count >= budget.tokens)
        due = (at_line_break | (count >= budget.tokens + budget.grace)) & ~closed & (n_inserted < 0)
        n_inserted = torch.where(due, 0, n_inserted)
        news = recent, closed, n_inserted, count
        for old, new in zip((self.recent, self.closed, self.inserted, self.count), news):
            old.copy_(new if counts is None else torch.where(counts.view(-1, *[1] * (new.dim() - 1)), new, old))
        return token, inserted


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


# A batch is made smaller when half of its rows have stopped, if it has so many rows and, on a GPU, where a step has to
# be recorded anew, has gone on for so many steps. In a session that is kept, already when a quarter has stopped.
SMALLEST_CUT, CUT_AFTER = 32, 24


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
