"""Choosing and checking tokens, closing thoughts, and the products and memory of a step."""

from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import decode_kernels
import decoding
import kernels
import nano_hybrid
from common.sampling import token_probs
from conftest import TINY, scramble
from decode_kernels import linear_step
from decoding import BudgetControl, Sampler, ThinkingBudget, accept, draw
from nano_hybrid import Hybrid, HybridConfig
from ssd import RecurrentState

NO_TRITON = pytest.mark.skipif(decode_kernels.triton is None, reason="no triton")
BACKENDS = ["torch", pytest.param("triton", marks=NO_TRITON)]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


# ---- choosing ----


def test_sampling_follows_the_distribution_that_was_asked_for():
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits = probs.log().expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)

    def frequencies(**kwargs):
        return torch.bincount(draw(token_probs(logits, **kwargs), generator), minlength=4) / 20_000

    for kwargs, expected in [
        (dict(), probs),
        (dict(top_k=2), torch.tensor([5, 3, 0, 0]) / 8),
        (dict(top_p=0.6), torch.tensor([5, 3, 0, 0]) / 8),  # 0.5 is not enough, 0.5 + 0.3 is
        (dict(top_p=0.5), torch.tensor([1.0, 0, 0, 0])),
        (dict(top_p=1e-9), torch.tensor([1.0, 0, 0, 0])),
        (dict(temperature=0.5), probs**2 / (probs**2).sum()),
        (dict(temperature=0), torch.tensor([1.0, 0, 0, 0])),
        (dict(top_k=100, top_p=1.0), probs),
    ]:
        assert (frequencies(**kwargs) - expected).abs().max() < 0.015, kwargs


def test_greedy_choices_need_no_probabilities():
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    token, probs = Sampler(temperature=0)(logits)
    assert probs is None and torch.equal(token, logits.argmax(-1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("V", [1, 5, 1024, 2500])
def test_the_first_of_the_largest(V, backend, monkeypatch):
    monkeypatch.setattr(kernels, "BACKEND", backend)
    x = torch.randint(3, (2, V), generator=torch.Generator().manual_seed(0)).float().to(DEVICE)
    expected = [row.index(max(row)) for row in x.tolist()]
    assert decode_kernels.argmax(x).tolist() == expected
    assert decode_kernels.argmax(torch.full((1, V), -torch.inf, device=DEVICE)).tolist() == [0]


@pytest.mark.parametrize("right", [0, 1, 2])
def test_greedy_guesses_are_right_up_to_the_first_that_is_not(right):
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0))
    guesses = logits.argmax(-1)[:2].clone()
    guesses[right:] += 1
    kept, token, _ = Sampler(temperature=0).check(logits, guesses % 9, [None, None])
    assert kept == right and token == logits[right].argmax()


def test_kept_and_replaced_guesses_are_distributed_as_the_model_s_tokens():
    generator = torch.Generator().manual_seed(0)
    p, q = (torch.rand(k, 5, generator=generator).softmax(-1) ** 3 for k in (3, 2))
    p, q = p / p.sum(-1, keepdim=True), q / q.sum(-1, keepdim=True)
    counts, trials = torch.zeros(3, 5), 6000
    for _ in range(trials):
        guesses = draw(q, generator)
        kept, token = accept(p, q, guesses, generator)
        for depth, t in enumerate([*guesses[:kept].tolist(), token.item()]):
            counts[depth, t] += 1
    for depth in range(3):  # the guess at one depth does not change p at the next here
        expected = p[depth] * counts[depth].sum()
        chi2 = ((counts[depth] - expected) ** 2 / expected).sum()
        assert chi2 < 18.5, (depth, chi2)  # 4 degrees of freedom: p = 0.001


# ---- thinking budget ----

BREAK, END = 7, [60, 61]


def think(thoughts, budget, steps=14):
    """What becomes of rows that would say `thoughts`, a list of lists, with a budget."""
    control = BudgetControl(budget, len(thoughts), torch.device("cpu"))
    rows = [[] for _ in thoughts]
    for step in range(steps):
        for row, token in zip(rows, control(torch.tensor([t[step] for t in thoughts]))[0].tolist()):
            row.append(token)
    return rows


def test_thinking_is_closed_at_the_next_line_break_or_after_the_grace():
    breaks = [1, BREAK, 2, 3, BREAK, 4, 5, 6, 8, 9, 10, 11, 12, 13]
    none = list(range(20, 34))
    rows = think([breaks, none], ThinkingBudget(3, END, [BREAK], grace=4))
    assert rows[0] == [1, BREAK, 2, 3, BREAK, *END, 6, 8, 9, 10, 11, 12, 13]
    assert rows[1] == [*none[:7], *END, *none[9:]]


def test_thinking_that_ends_by_itself_is_left_alone():
    early = [1, *END, BREAK, 2, 3, BREAK, 4, 5, 6, 8, 9, 10, 11]
    assert think([early], ThinkingBudget(3, END, [BREAK], grace=4)) == [early]


def test_a_budget_of_nothing_closes_at_once():
    assert think([list(range(20, 34))], ThinkingBudget(0, END, grace=0))[0][:4] == [*END, 22, 23]


# ---- a step's products and memory ----


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_a_step_without_extras_is_a_product(backend):
    x, weight = rand(2, 1, 20), rand(7, 20, seed=1)
    assert torch.allclose(linear_step(x, weight, backend=backend), x @ weight.T, atol=1e-5)


@pytest.mark.skipif(decode_kernels.triton is None, reason="no triton")
@torch.no_grad()
def test_a_row_does_not_depend_on_the_others():
    x, weight, norm, residual = rand(3, 24), rand(9, 24, seed=1), rand(24, seed=2), rand(3, 9, seed=3)
    whole = linear_step(x, weight, norm=norm, residual=residual, backend="triton")
    rows = [
        linear_step(x[i : i + 1], weight, norm=norm, residual=residual[i : i + 1], backend="triton") for i in range(3)
    ]
    assert torch.equal(whole, torch.cat(rows))


@pytest.mark.parametrize("rows", [0, 1, decode_kernels.FEW, decode_kernels.FEW + 1])
@torch.no_grad()
def test_any_number_of_rows(rows):
    x, weight = rand(rows, 48)[:, ::2], rand(9, 24, seed=1)  # a view with gaps
    options = dict(norm=rand(24, seed=3), group_size=8, relu2=True, residual=rand(rows, 9, seed=4))
    expected, got = (linear_step(x, weight, **options, backend=b) for b in ("torch", "auto"))
    assert got.shape == (rows, 9) and torch.allclose(got, expected, atol=1e-5)


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(norm=torch.ones(5)), "norm"),
        (dict(bias=torch.ones(5)), "bias"),
        (dict(norm=torch.ones(6), group_size=4), "does not divide"),
        (dict(residual=torch.ones(2, 6)), "residual"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        linear_step(torch.ones(2, 6), torch.ones(3, 6), **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_new_keys_and_values_go_behind_the_old(backend):
    caches, (k, v) = [rand(2, 3, 9, 5), rand(2, 3, 9, 5, seed=1)], (rand(2, 2, 15, seed=s) for s in (2, 3))
    k, v = (t.view(2, 2, 3, 5).transpose(1, 2) for t in (k, v))  # [B, Hkv, T, D], as a projection leaves them
    expected = [torch.cat([c[:, :, :4], new, c[:, :, 6:]], dim=2) for c, new in zip(caches, (k, v))]
    decode_kernels.append(*caches, k, v, torch.tensor(4, device=DEVICE), backend=backend)
    assert all(torch.equal(got, wanted) for got, wanted in zip(caches, expected))


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_what_is_not_a_number_stays_so(backend):
    x, weight = torch.full((1, 8), torch.nan, device=DEVICE), rand(3, 8)
    assert linear_step(x, weight, relu2=True, backend=backend).isnan().all()


@pytest.mark.skipif(decode_kernels.triton is None, reason="no triton")
def test_what_does_not_fit_the_room_is_left_out():
    caches, k = [torch.zeros(1, 2, 4, 5, device=DEVICE) for _ in range(2)], rand(1, 2, 3, 5)
    position = torch.tensor(2, device=DEVICE)
    decode_kernels.append(*(c[:, :1] for c in caches), k[:, :1], k[:, :1], position, backend="triton")
    for cache in caches:
        assert torch.equal(cache[:, :1, 2:], k[:, :1, :2]) and not cache[:, 1].any()


@pytest.mark.parametrize("backend", BACKENDS)
def test_attention_on_a_cache_is_causal_attention(backend):
    q, k, v = (rand(2, heads, 7, 8, seed=heads) for heads in (4, 2, 2))
    whole = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    caches = [F.pad(t[:, :, :4], (0, 0, 0, 8), value=1e4) for t in (k, v)]  # where it is not filled, it would show
    position = torch.tensor(4, device=DEVICE)
    got = decode_kernels.cached_attention(*(t[:, :, 4:] for t in (q, k, v)), *caches, position, backend=backend)
    assert torch.allclose(got, whole[:, :, 4:], atol=1e-5)
    assert all(torch.equal(cache[:, :, :7], t) and (cache[:, :, 7:] == 1e4).all() for cache, t in zip(caches, (k, v)))


@pytest.mark.skipif(decode_kernels.triton is None, reason="no triton")
def test_keys_that_do_not_fit_the_room_are_left_out():
    k = rand(1, 1, 3, 5)
    caches = [torch.zeros(1, 2, 4, 5, device=DEVICE) for _ in range(2)]
    position = torch.tensor(2, device=DEVICE)
    decode_kernels.cached_attention(k, k, k, *(c[:, :1] for c in caches), position, backend="triton")
    assert all(torch.equal(c[:, :1, 2:], k[:, :, :2]) and not c[:, 1].any() for c in caches)


@pytest.mark.parametrize("backend", BACKENDS)
@torch.no_grad()
def test_weights_side_by_side_are_products_by_themselves(backend):
    x, weights = rand(2, 1, 20), tuple(rand(n, 20, seed=n) for n in (7, 3, 9))
    for got, weight in zip(linear_step(x, weights, backend=backend), weights, strict=True):
        assert torch.allclose(got, x @ weight.T, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_end_of_a_step(backend, monkeypatch):
    monkeypatch.setattr(kernels, "BACKEND", backend)
    position = torch.tensor(4, device=DEVICE)
    news = [rand(2, 700, 3, seed=s) for s in range(3)]
    olds = [torch.zeros_like(new) for new in news]
    decode_kernels.advance(position, 2, olds, news)
    decode_kernels.advance(position, 1)
    assert position == 7 and all(torch.equal(*pair) for pair in zip(olds, news))
    ids, weight = torch.tensor([[3, 0], [1, 1]], device=DEVICE), rand(5, 6)
    assert torch.equal(decode_kernels.embed(ids, weight), weight[ids])


# ---- generate: the same tokens as nano_hybrid's ----


def tiny(**changes):
    torch.manual_seed(0)
    return scramble(Hybrid(HybridConfig(**(TINY | changes)))).double().eval()


def tokens_of(steps):
    return torch.stack(list(steps), 1).tolist()


PROMPTS = [[3, 4, 5], [6], [7, 8, 9, 10, 11, 12, 13]]


@pytest.mark.parametrize("pattern", ["M-*M-", "ML-L", "ME*E", "*-", "M", "-"])
@pytest.mark.parametrize(
    "options", [dict(temperature=0), dict(temperature=0.9), dict(top_k=5), dict(top_p=0.8, temperature=2.0)], ids=str
)
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], [[5, 6]] * 3], ids=["ragged", "one", "equal"])
def test_fast_and_plain_generation_write_the_same_tokens(pattern, options, prompts):
    model, made = tiny(hybrid_override_pattern=pattern), []
    for fast in (False, True):
        generator = torch.Generator().manual_seed(1)
        call = partial(decoding.generate, model) if fast else model.generate
        made.append(tokens_of(call(prompts, 12, stop=[50, 51], generator=generator, **options)))
    assert made[0] == made[1]


# ---- a mixer of one's own ----


@dataclass
class MatrixState(RecurrentState):
    matrix: torch.Tensor | None = None  # [B, H, D, D]


class GatedLinearAttention(nn.Module):
    """S_t = g_t S_{t-1} + k_t v_t^T; y_t = q_t S_t, with a gate g_t in (0, 1) for each head."""

    def __init__(self, config):
        super().__init__()
        self.heads, self.head_dim = config.num_attention_heads, config.head_dim
        size = self.heads * self.head_dim
        self.qkv = nn.Linear(config.hidden_size, 3 * size, bias=False)
        self.gate = nn.Linear(config.hidden_size, self.heads)
        self.o_proj = nn.Linear(size, config.hidden_size, bias=False)

    def new_state(self, capacity=0):
        return MatrixState()

    def forward(self, x, state=None, attention_mask=None):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, self.head_dim)).unbind(2)  # [B, T, H, D]
        gate = self.gate(x).sigmoid()  # [B, T, H]
        if attention_mask is not None:  # padding writes nothing, and forgets nothing
            k, gate = k * attention_mask[..., None, None], gate.where(attention_mask[..., None], 1.0)
        S = None if state is None else state.matrix
        S = x.new_zeros(len(x), self.heads, self.head_dim, self.head_dim) if S is None else S
        out = []
        for t in range(x.shape[1]):
            S = gate[:, t, :, None, None] * S + k[:, t, :, :, None] * v[:, t, :, None, :]
            out.append((q[:, t, :, None, :] @ S)[:, :, 0])
        if state is not None:
            state.matrix = S
        return self.o_proj(torch.stack(out, 1).flatten(2))


@pytest.fixture
def letter_g(monkeypatch):
    monkeypatch.setitem(nano_hybrid.MIXERS, "G", GatedLinearAttention)


def test_a_letter_of_ones_own_trains_samples_and_is_refused_by_drafts(letter_g):
    model = tiny(hybrid_override_pattern="GM-G*", num_nextn_predict_layers=1, mtp_hybrid_override_pattern="-")
    ids = torch.arange(20).repeat(2, 2)
    optimizer, losses = torch.optim.Adam(model.parameters(), 1e-2), []
    for _ in range(15):
        loss, metrics = model.train().loss(ids[:, :-1], ids[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(metrics["loss"].item())
    assert losses[-1] < 0.5 * losses[0]
    model.eval()
    made = [tokens_of(call(PROMPTS, 9, 0)) for call in (model.generate, partial(decoding.generate, model))]
    assert made[0] == made[1]
    for row, prompt in zip(made[0], PROMPTS):
        assert row[0] == model(torch.tensor([prompt]))[0, -1].argmax()
    with pytest.raises(ValueError, match="GatedLinearAttention cannot take draft tokens back"):
        next(decoding.generate(model, [[1, 2]], 4, draft=2))
    with pytest.raises(ValueError, match="one letter per layer, of M . L - E G"):
        HybridConfig(hybrid_override_pattern="MX")
