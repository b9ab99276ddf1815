"""The next token: what is drawn, from which probabilities, after which prompts. Plain PyTorch, any device."""

import math

import torch
import torch.nn.functional as F

from kernels import at_least_float32


def token_probs(logits, temperature=1.0, top_k=None, top_p=None):
    """Returns the probabilities [B, V] that the next token is drawn from, for logits [B, V], as `generate` explains."""
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
        probs = torch.zeros_like(probs).scatter(-1, order, sorted_probs.masked_fill(before >= top_p, 0))
    return probs


def draw(probs, generator=None):
    """Returns one token [B] int64 per row of probs [B, V], which need not sum to 1.

    Of independent exponential waiting times with rates p_i the first to end is i with probability p_i / sum(p).
    """
    waits = torch.empty_like(probs).exponential_(generator=generator)
    return (probs / waits).argmax(-1)


def pad_left(prompts, device):
    """Returns (ids int64 [B, T], pad int64 [B]) of B rows of token ids of any lengths, padded with 0 on the left.

    Raises ValueError for no rows, for an empty row, and for ids that are not rows.
    """
    if len(prompts) == 0 or any(getattr(row, "ndim", 1) == 0 or isinstance(row, int) for row in prompts):
        raise ValueError("ids must hold one row of token ids per sequence, as [[1, 2, 3]]; an empty prompt has none")
    if any(len(row) == 0 for row in prompts):
        raise ValueError("cannot go on from an empty prompt; give at least one token per row")
    T = max(len(row) for row in prompts)
    pad = torch.tensor([T - len(row) for row in prompts], device=device)
    if all(isinstance(row, list) for row in prompts):  # one copy to the device for all
        return torch.tensor([[0] * (T - len(row)) + row for row in prompts], device=device), pad
    rows = [F.pad(torch.as_tensor(row, device=device), (T - len(row), 0)) for row in prompts]
    return torch.stack(rows), pad


def check_sampling(temperature, top_k, top_p):
    """Raises ValueError for settings out of range."""
    good_temperature = 0 <= temperature < math.inf
    if not good_temperature or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
        raise ValueError(f"need temperature >= 0, top_k >= 1, 0 < top_p <= 1; got {temperature}, {top_k}, {top_p}")
