"""lla.py: its two forms against each other, limit cases, and the kernels against the definition in float64."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F

import kernels
import lla
from experiments import lla as study
from experiments import parallax
from kernels import triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * (DEVICE == "cuda")
NEEDS_TRITON = pytest.mark.skipif(triton is None, reason="needs the package triton")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def qkv(B=2, H=4, Hkv=2, T=9, S=None, D=5, Dv=None):
    S, Dv = S or T, Dv or D
    return draw(B, H, T, D), draw(B, Hkv, S, D, seed=1), draw(B, Hkv, S, Dv, seed=2)


def softmax_attention(q, k, v, **options):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)


def relative(a, b):
    return float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))


@pytest.fixture(autouse=True)
def exact_products():
    """train.py, in other tests, lets float32 products be inexact."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


# ---- the definition


def paper_fit(s, q, k, v, ridge):
    """Returns what `local_fit` returns, by the formula of the paper for weights that sum to one."""
    z = k[:, :, None] - q[..., None, :]  # [B, H, T, S, D]
    mu = (s[..., None] * z).sum(-2)  # [B, H, T, D]
    Sigma = torch.einsum("bhts,bhtsd,bhtse->bhtde", s, z, z)
    Sigma = Sigma + ridge[..., None] * torch.eye(q.shape[-1], dtype=q.dtype)
    rho = torch.linalg.solve(Sigma, mu)
    a = s * (1 - (z @ rho[..., None])[..., 0]) / (1 - (mu * rho).sum(-1, keepdim=True))  # [B, H, T, S]
    return a @ v


def test_the_centred_form_is_the_paper_s_formula():
    q, k, v = qkv(H=2, T=12)
    s, ridge = lla.softmax_weights(q, k), torch.tensor([0.3, 2.0]).double().view(2, 1, 1)
    assert (lla.local_fit(s, q, k, v, ridge) - paper_fit(s, q, k, v, ridge)).abs().max() < 1e-12


def test_systems_are_solved_with_their_gradient():
    A, c = draw(7, 6, 6), draw(7, 6, seed=1)
    C = A @ A.mT + 0.1 * torch.eye(6).double()
    assert relative(lla.solve(C, c), torch.linalg.solve(C, c)) < 1e-12
    symmetric = lambda A, c: lla.solve(A @ A.mT + torch.eye(6).double(), c)  # noqa: E731
    assert torch.autograd.gradcheck(symmetric, (A.requires_grad_(), c.requires_grad_()))
    C = torch.stack([torch.eye(2), torch.tensor([[1.0, 2.0], [2.0, 1.0]])])  # the second is indefinite
    assert torch.equal(lla.solve(C, torch.ones(2, 2)).isnan(), torch.tensor([[False, False], [True, True]]))


def test_systems_are_solved_by_cholesky_s_method(monkeypatch):
    """Batched torch.linalg.solve hangs with two threads on some machines."""
    monkeypatch.delattr(torch.linalg, "solve")
    q, k, v = (t.requires_grad_() for t in qkv())
    lla.lla_ref(q, k, v, 0.3).sum().backward()
    lla.mesa_ref(q, q, q, 0.3)


@pytest.mark.parametrize("ridge", [1e-1, 1e-2, 1e-3, 1e-4])
def test_what_a_small_ridge_costs_in_float32(ridge):
    """As the docstring says: in a row at most eps |k - k_1|^2 / ridge, in the whole a tenth of it."""
    q, k, v = (t.float() for t in qkv(B=1, H=1, Hkv=1, T=60, D=32))
    want, got = lla.lla_ref(q.double(), k.double(), v.double(), ridge), lla.lla_ref(q, k, v, ridge)
    cost = torch.finfo(torch.float32).eps * float((k - k[:, :, :1]).square().sum(-1).max()) / ridge
    assert relative(got, want) < 0.1 * cost
    assert ((got - want).norm(dim=-1) / want.norm(dim=-1)).max() < cost


def test_a_ridge_that_rounding_would_swallow_is_refused():
    q, k, v = qkv(B=1, H=2, Hkv=1, T=20, D=32)
    low = [t.float() for t in (q, k, v)]
    for ridge in (1e-8, torch.tensor([1.0, 1e-8])):
        with pytest.raises(ValueError, match=r"ridge=1e-08 is lost in torch.float32: keys .* apart need 1.*e-05"):
            lla.lla(*low, ridge, backend="torch")
        with pytest.raises(ValueError, match="is lost in torch.float32"):
            lla.lla_step(low[0][:, :, -1], *low[1:], ridge, backend="torch")
        assert lla.lla(q, k, v, ridge).isfinite().all()
    low[1][:, :, 5] = math.nan  # a text that has diverged is not the ridge's fault
    assert lla.lla(*low, 1e-8, backend="torch")[:, :, 6:].isnan().all()


def test_it_minimises_the_paper_s_objective():
    """The intercept b of  sum_j s_j |v_j - b - W (k_j - q)|^2 + ridge |W|^2, here found by one long least squares."""
    q, k, v = qkv(B=1, H=1, Hkv=1, T=8, D=3)
    s, z = lla.softmax_weights(q, k)[0, 0, -1], (k - q[:, :, -1:])[0, 0]
    root = s.sqrt()[:, None]
    A = torch.cat([root, root * z], 1)  # [S, 1 + D]
    A = torch.cat([A, math.sqrt(0.7) * torch.eye(4).double()[1:]])
    y = torch.cat([root * v[0, 0], torch.zeros(3, 3).double()])
    b = torch.linalg.lstsq(A, y).solution[0]
    assert (lla.lla_ref(q, k, v, 0.7)[0, 0, -1] - b).abs().max() < 1e-12


def test_gradients_of_the_definition():
    q, k, v = qkv(B=1, H=2, Hkv=1, T=6, D=3)
    inputs = [t.requires_grad_() for t in (q, k, v, torch.tensor([0.5, 1.5]).double())]
    assert torch.autograd.gradcheck(lla.lla_ref, inputs)


def test_large_ridge_is_softmax_attention():
    q, k, v = qkv()
    assert (lla.lla(q, k, v, 1e12) - softmax_attention(q, k, v, is_causal=True)).abs().max() < 1e-10


def test_equal_weights_are_ridge_regression_with_intercept():
    q, k, v = qkv(B=1, H=1, Hkv=1, T=20, D=4)
    o = lla.lla(q, k, v, 0.3, scale=0.0)[0, 0, -1]
    keys, values, n = k[0, 0], v[0, 0], 20
    kc, vc = keys - keys.mean(0), values - values.mean(0)
    W = torch.linalg.solve(kc.T @ kc / n + 0.3 * torch.eye(4).double(), kc.T @ vc / n)
    assert (o - (values.mean(0) + (q[0, 0, -1] - keys.mean(0)) @ W)).abs().max() < 1e-12


def test_affine_values_come_back_exactly_also_outside_of_the_keys():
    """Where softmax attention is biased: the queries lie on one side of all keys."""
    q, k, _ = qkv(B=1, H=1, Hkv=1, T=40, D=3)
    q, A = q.abs() + 4, draw(3, 3, seed=5)
    v = k @ A + 1
    o, biased = lla.lla(q, k, v, 1e-10), softmax_attention(q, k, v, is_causal=True)
    error = (o - (q @ A + 1))[:, :, 8:].abs().max()
    assert error < 1e-5 < 0.1 < (biased - (q @ A + 1))[:, :, 8:].abs().max()


def test_values_that_do_not_vary_stay():
    q, k, v = qkv()
    assert (lla.lla(q, k, torch.full_like(v, 3.0), 0.1) - 3).abs().max() < 1e-12


def test_a_query_at_the_mean_of_the_keys_gets_softmax_attention():
    q, k, v = qkv(B=1, H=1, Hkv=1, T=1, S=7)
    s = lla.softmax_weights(q, k)
    ridge = torch.ones(1, 1, 1).double()
    assert (lla.local_fit(s, s @ k, k, v, ridge) - s @ v).abs().max() < 1e-12


def test_what_all_keys_share_does_not_count():
    """A constant feature of the keys shifts a row's logits alike: an absolute ridge would change with it."""
    q, k, v = qkv(B=1, H=1, Hkv=1)
    k[..., 0] = 1.0
    moved = q.clone()
    moved[..., 0] += 300
    assert relative(lla.lla(moved, k, v, 0.1), lla.lla(q, k, v, 0.1)) < 1e-9


def test_turning_keys_and_queries_together_changes_nothing():
    q, k, v = qkv()
    Q = torch.linalg.qr(draw(5, 5, seed=7)).Q
    assert relative(lla.lla(q @ Q, k @ Q, v, 0.1), lla.lla(q, k, v, 0.1)) < 1e-10


def test_keys_far_from_the_origin_cost_the_definition_nothing_in_float32():
    """The covariance is a difference of moments; they are taken from the first key."""
    q, k, v = qkv(T=30)
    q, k = q + 100, k + 100
    assert relative(lla.lla_ref(q.float(), k.float(), v.float(), 0.1), lla.lla_ref(q, k, v, 0.1)) < 1e-3


def test_autocast_leaves_the_fit_in_float32():
    q, k, v = (t.float() for t in qkv())
    with torch.autocast("cpu", torch.bfloat16):
        got = lla.lla_ref(q, k, v, 0.1), lla.lla_step_ref(q[:, :, -1], k, v, 0.1)
    assert torch.equal(got[0], lla.lla_ref(q, k, v, 0.1)) and relative(got[1], got[0][:, :, -1]) < 1e-5


def test_more_steps_are_more_exact_and_D_are_exact():
    q, k, v = qkv(T=30, D=8)
    exact = lla.lla_ref(q, k, v, 0.05)
    errors = [relative(lla.lla_ref(q, k, v, 0.05, iters=n), exact) for n in (1, 2, 4, 8)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 1e-8


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
def test_the_first_token_returns_its_value(backend):
    q, k, v = (t.float().to(DEVICE) for t in qkv(T=3))
    o = lla.lla(q, k, v, 0.5, backend=backend)
    assert (o[:, :, 0] - v[:, :, 0].repeat_interleave(2, 1)).abs().max() < 1e-4


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
def test_the_future_changes_nothing_bit_for_bit(backend):
    q, k, v = (t.float().to(DEVICE) for t in qkv(T=40))
    before = lla.lla(q, k, v, 0.5, backend=backend)
    q[:, :, 21:], k[:, :, 21:], v[:, :, 21:] = 7.0, -3.0, 1e4
    assert torch.equal(lla.lla(q, k, v, 0.5, backend=backend)[:, :, :21], before[:, :, :21])


# ---- the kernels


def with_gradients(op, q, k, v, ridge, g, dtype, **options):
    """Returns [o, dq, dk, dv, dridge] of op, with inputs of this dtype."""
    inputs = [t.detach().to(DEVICE, dtype).requires_grad_() for t in (q, k, v)]
    inputs.append(
        ridge.detach().to(DEVICE, torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
    )
    o = op(*inputs, **options)
    return [o, *torch.autograd.grad(o, inputs, g.to(DEVICE, dtype))]


def ridge_terms(q, k, v, ridge, g, causal=True):
    """Returns what each row adds to the gradient of its head's ridge [H, T], in float64."""
    k, v = (t.repeat_interleave(q.shape[1] // k.shape[1], 1) for t in (k, v))
    rows = ridge.double()[:, None, None].expand(-1, q.shape[2], 1).clone().requires_grad_()  # [H, T, 1]
    o = lla.local_fit(lla.softmax_weights(q, k, causal=causal), q, k, v, rows)
    return torch.autograd.grad(o, rows, g)[0][..., 0]


def assert_exact(q, k, v, ridge, dtype, **options):
    """Asserts that output and every gradient are what float64 makes of the same rounded inputs."""
    g = draw(*q.shape[:3], v.shape[3], seed=3)
    q, k, v, g = (t.to(dtype).double() for t in (q, k, v, g))
    want = with_gradients(lla.lla_ref, q, k, v, ridge, g, torch.float64, **options)
    got = with_gradients(lla.lla_triton, q, k, v, ridge, g, dtype, **options)
    tolerance = {torch.float32: 1e-4, torch.float16: 6e-3, torch.bfloat16: 8e-3}[dtype]
    for name, a, b in zip(("o", "dq", "dk", "dv"), got, want):
        assert a.dtype == dtype and a.shape == b.shape
        assert (a.double() - b).norm() <= tolerance * max(float(b.detach().norm()), 0.1), (name, relative(a, b))
    terms = ridge_terms(q, k, v, ridge, g, **options).to(DEVICE)  # of both signs: their sum may be small
    assert (got[4].double() - want[4]).norm() <= tolerance * max(float(terms.norm()), 0.1)


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("T", [1, 15, 17, 63, 65, 127, 129])
def test_kernels_at_every_kind_of_length(T, dtype):
    assert_exact(*qkv(B=1, H=2, Hkv=1, T=T, D=16), torch.tensor([1.0, 3.0]), dtype)


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [
    dict(B=2, H=4, Hkv=2, T=20, D=64), dict(B=1, H=2, Hkv=2, T=33, D=128), dict(B=1, H=3, Hkv=1, T=18, D=40, Dv=24),
    dict(B=1, H=1, Hkv=1, T=17, D=8, Dv=33), dict(B=1, H=2, Hkv=1, T=7, S=70, D=32),
])  # fmt: skip
def test_kernels_with_groups_widths_and_a_past(sizes, dtype):
    assert_exact(*qkv(**sizes), torch.rand(sizes["H"], generator=torch.Generator().manual_seed(1)) + 0.5, dtype)


@NEEDS_TRITON
@pytest.mark.parametrize("T, S", [(20, 20), (40, 7), (3, 66)])
def test_kernels_without_causality(T, S):
    assert_exact(*qkv(B=1, H=2, Hkv=1, T=T, S=S, D=32), torch.tensor([0.5, 2.0]), torch.float32, causal=False)


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_on_hard_cases(dtype):
    """A small ridge, keys far from the origin, sharp weights: where errors are multiplied."""
    q, k, v = qkv(B=1, H=2, Hkv=1, T=96, D=32)
    tolerance = {torch.float32: 2e-4, torch.float16: 2e-2, torch.bfloat16: 2e-2}[dtype]
    for keys, scale in ((k, None), (k + 3 * draw(32, seed=4), None), (k, 4 * 32**-0.5)):
        low = [t.to(DEVICE, dtype) for t in (q, keys, v)]
        want = lla.lla_ref(*(t.double() for t in low), 0.1, scale=scale)
        assert relative(lla.lla_triton(*low, 0.1, scale=scale), want) < tolerance


@NEEDS_TRITON
def test_the_gradients_of_a_row_s_logits_sum_to_zero():
    """Keys that share a large vector multiply the sum of dlogit by it in dq: the kernels must not lose a term of it, as
    the published ones do."""
    q, k, v = qkv(B=1, H=1, Hkv=1, T=50, D=32)
    g, shift, dqs = draw(1, 1, 50, 32, seed=3), 5 * draw(32, seed=4), []
    for keys in (k, k + shift):
        inputs = q + (keys - k)[:, :, :1], keys, v  # the query moves along: its distances, and so x and u, stay
        inputs = [t.float() for t in inputs]
        _, dq, *_ = with_gradients(lla.lla_triton, *inputs, torch.tensor([0.5]), g, torch.float32)
        dqs.append(
            (dq, with_gradients(lla.lla_ref, *(t.double() for t in inputs), torch.tensor([0.5]), g, torch.float64)[1])
        )
    assert all(relative(got, want) < 1e-3 for got, want in dqs)


@NEEDS_TRITON
def test_a_row_does_not_depend_on_its_tile_mates():
    """Other rows of the tile take many more steps in one call than in the other."""
    q, k, v = (t.float().to(DEVICE) for t in qkv(B=1, H=1, Hkv=1, T=32, D=32))
    used = torch.zeros(2, 2, 1, 1, 32, dtype=torch.int32, device=DEVICE)
    many = lla.lla_triton(q, k, v, 0.5, used=used[0])
    q[:, :, 20:] *= 0.01
    k[:, :, 20:] *= 0.01
    few = lla.lla_triton(q, k, v, 0.5, used=used[1])
    mates = used[:, 0, 0, 0, 20:].sum(-1)
    assert mates[1] < 0.9 * mates[0]
    assert torch.equal(many[:, :, :20], few[:, :, :20])


@NEEDS_TRITON
def test_the_kernels_stop_when_told_and_repeat_bit_for_bit():
    q, k, v = (t.float().to(DEVICE) for t in qkv(B=1, H=1, Hkv=1, T=40, D=32))
    used = torch.zeros(2, 1, 1, 40, dtype=torch.int32, device=DEVICE)
    few = lla.lla_triton(q, k, v, 0.05, iters=2, used=used)
    assert used[0].max() == 2 and relative(few, lla.lla_ref(q, k, v, 0.05, iters=2)) < 1e-5
    assert torch.equal(few, lla.lla_triton(q, k, v, 0.05, iters=2))


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [0.0, 1e-4, 1e-6])
def test_small_gradients_and_none(size, dtype):
    """Rows that the loss does not look at, as behind a mask, give zeros and not NaN; small ones keep their digits."""
    q, k, v = (t.to(dtype).double() for t in qkv(B=1, H=1, Hkv=1, T=40, D=32))
    g = (size * draw(1, 1, 40, 32, seed=3)).to(dtype).double()
    g[:, :, ::3] = 0
    got = with_gradients(lla.lla_triton, q, k, v, torch.tensor([1.0]), g, dtype)
    want = with_gradients(lla.lla_ref, q, k, v, torch.tensor([1.0]).double(), g, torch.float64)
    if size == 0:
        assert not any(t.any() for t in got[1:])
        return
    for a, b in zip(got[1:4], want[1:4]):
        b = b.to(a.dtype)  # in float16 the gradients themselves are as coarse
        smallest = torch.finfo(a.dtype).smallest_normal * torch.finfo(a.dtype).eps * b.numel() ** 0.5
        assert (a.double() - b.double()).norm() <= 1e-2 * b.double().norm() + 2 * smallest


@NEEDS_TRITON
@pytest.mark.parametrize("size", [1e-4, 1e4])
def test_values_of_any_size(size):
    """float16's range is not left: gradients are taken in units of |g| max|v|."""
    q, k, v = (t.half().double() for t in qkv(B=1, H=1, Hkv=1, T=40, D=32))
    v, g = (size * v).half().double(), draw(1, 1, 40, 32, seed=3).half().double() / size
    got = with_gradients(lla.lla_triton, q, k, v, torch.tensor([1.0]), g, torch.float16)
    want = with_gradients(lla.lla_ref, q, k, v, torch.tensor([1.0]).double(), g, torch.float64)
    assert all(relative(a, b) < 1e-2 for a, b in zip(got[:3], want[:3]))


@NEEDS_TRITON
def test_a_nan_stays_in_its_row_and_its_text():
    q, k, v = (t.float().to(DEVICE) for t in qkv(B=2, H=1, Hkv=1, T=20, D=32))
    clean = lla.lla_triton(q, k, v, 0.5)
    q[0, 0, 3] = math.nan
    k[1, 0, 10] = math.nan
    dirty = lla.lla_triton(q, k, v, 0.5)
    rows = [i for i in range(20) if i != 3]
    assert dirty[0, 0, 3].isnan().all() and torch.equal(dirty[0, 0, rows], clean[0, 0, rows])


@NEEDS_TRITON
def test_layouts_that_the_hardware_cannot_copy():
    """Views with strides of any kind, an expanded gradient, an address that is not a multiple of 16 bytes."""
    x = draw(2, 11, 3, 3, 32).float().to(DEVICE)[..., 1:, :].reshape(-1)[1:]
    x = torch.cat([x, x[:1]]).view(2, 11, 3, 2, 32)
    q, k = x[:, :, :, 0].transpose(1, 2), x[:, :, :, 1].transpose(1, 2)  # [2, 3, 11, 32]
    v = draw(32, 2, 3, 11, seed=2).float().to(DEVICE).movedim(0, 3)
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    dense = [t.detach().clone(memory_format=torch.contiguous_format).requires_grad_() for t in (q, k, v)]
    for a, b in zip(*(torch.autograd.grad(lla.lla_triton(*t, 1.0).sum(), t) for t in (leaves, dense))):
        assert relative(a, b) < 1e-5


@NEEDS_TRITON
def test_small_cards_get_smaller_tiles(monkeypatch):
    monkeypatch.setattr(lla, "shared_memory", lambda: 64 << 10)
    for D in (64, 128):
        M, N, _, stages = lla._tile("dkv", D, 2, 3, 6)
        assert 2 * D * (3 * N + 6 * M * stages) <= 64 << 10
    assert_exact(*qkv(B=1, H=2, Hkv=1, T=40, D=64), torch.tensor([1.0, 3.0]), torch.float16)


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_parallax_with_every_gradient(causal, dtype):
    inputs = [*qkv(B=1, H=2, Hkv=1, T=37, D=32), 0.3 * draw(1, 2, 37, 32, seed=6)]
    inputs = [t.to(dtype).double().to(DEVICE) for t in inputs]
    g, results = draw(1, 2, 37, 32, seed=3).to(DEVICE, dtype), []
    for op, used in ((parallax.parallax_ref, torch.float64), (parallax.parallax_triton, dtype)):
        leaves = [t.to(used).detach().requires_grad_() for t in inputs]
        o = op(*leaves, causal=causal)
        results.append([o, *torch.autograd.grad(o, leaves, g.to(used))])
    for want, got in zip(*results):
        assert relative(got, want) < {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 6e-3}[dtype]


def test_parallax_with_the_solution_is_lla():
    q, k, v = qkv(H=2, Hkv=2)
    s = lla.softmax_weights(q, k)
    kbar = s @ k
    C = torch.einsum("bhts,bhsd,bhse->bhtde", s, k, k) - kbar[..., :, None] * kbar[..., None, :]
    r = -torch.linalg.solve(C + 0.4 * torch.eye(5).double(), q - kbar)
    assert (parallax.parallax(q, k, v, r) - lla.lla(q, k, v, 0.4)).abs().max() < 1e-12


# ---- one token at a time


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
@pytest.mark.parametrize("sizes", [(2, 4, 2, 30, 16), (1, 2, 1, 1, 40), (1, 2, 2, 700, 32), (1, 1, 1, 45, 128)])
def test_a_step_is_the_last_row(sizes, backend):
    B, H, Hkv, S, D = sizes
    q, k, v = qkv(B, H, Hkv, 1, S, D)
    ridge = torch.rand(H, generator=torch.Generator().manual_seed(1)).double() + 0.1
    want = lla.lla_ref(q, k, v, ridge)[:, :, 0]
    behind = torch.full((B, Hkv, 9, D), math.nan).double()  # the room that is not filled yet
    k, v = (torch.cat([t, behind], 2).float().to(DEVICE) for t in (k, v))
    for length in (S, torch.tensor(S, device=DEVICE)):
        got = lla.lla_step(q[:, :, 0].float().to(DEVICE), k, v, ridge.float().to(DEVICE), length, backend=backend)
        assert relative(got.cpu(), want) < 2e-5


@pytest.mark.parametrize("backend", ["torch", pytest.param("triton", marks=NEEDS_TRITON)])
@pytest.mark.parametrize("S, pads", [(40, [0, 17, 39]), (1500, [0, 700, 1499])])  # the longer one goes in parts
def test_a_step_behind_padding(S, pads, backend):
    q, k, v = (t.float().to(DEVICE) for t in qkv(3, 2, 1, 1, S, 16))
    pad = torch.tensor(pads, device=DEVICE).repeat_interleave(2)[::2]  # with gaps between
    for b, p in enumerate(pads):
        k[b, :, :p], v[b, :, :p] = math.nan, math.inf
    got = lla.lla_step(q[:, :, 0], k, v, 0.5, pad=pad, backend=backend)
    for b, p in enumerate(pad.tolist()):
        want = lla.lla_ref(*(t[b : b + 1].double() for t in (q, k[:, :, p:], v[:, :, p:])), 0.5)
        assert relative(got[b], want[0, :, 0]) < 2e-5


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", DTYPES[1:])
def test_a_step_in_16_bits(dtype):
    q, k, v = (t.to(DEVICE, dtype) for t in qkv(1, 2, 1, 1, 300, 64))
    want = lla.lla_ref(*(t.double() for t in (q, k, v)), 0.1)[:, :, 0]
    assert relative(lla.lla_step(q[:, :, 0], k, v, 0.1, backend="triton"), want) < 8 * torch.finfo(dtype).eps


@NEEDS_TRITON
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", [0, 100])
def test_a_step_whose_largest_weight_comes_late(at, dtype):
    """A logit far above all before it: the weights would overflow, and the part begins again."""
    q, k, v = qkv(1, 1, 1, 1, 150, 32)
    k[:, :, at] = 2 * q[:, :, 0]  # 2 |q|^2 = 60, times the scale: 2^180 times the others' weight
    q, k, v = (t.to(DEVICE, dtype) for t in (q, k, v))
    want = lla.lla_ref(*(t.double() for t in (q, k, v)), 0.1, scale=2.0)[:, :, 0]
    got = lla.lla_step(q[:, :, 0], k, v, 0.1, scale=2.0, backend="triton")
    assert relative(got, want) < (1e-3 if dtype == torch.float32 else 1e-2)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_a_step_replays_from_a_cuda_graph_as_the_text_grows():
    q, k, v = (t.bfloat16().cuda() for t in qkv(1, 4, 2, 1, 2000, 64))
    length, ridge = torch.tensor(900, device="cuda"), torch.ones(4, device="cuda")
    lla.lla_step(q[:, :, 0], k, v, ridge, length)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        o = lla.lla_step(q[:, :, 0], k, v, ridge, length)
    for n in (900, 1, 2000):
        length.fill_(n)
        graph.replay()
        assert relative(o, lla.lla_ref(q, k[:, :, :n], v[:, :, :n], ridge)[:, :, 0]) < 1e-2


# ---- the layer, and what a user gets wrong


def test_the_layer_in_pieces_is_the_layer_at_once():
    torch.manual_seed(0)
    layer, x, cache = lla.LocalLinearAttention(24, 4, 2, 6).double(), draw(2, 11, 24), []
    pieces = torch.cat([layer(piece, cache) for piece in x.split([4, 1, 6], 1)], 1)
    assert (pieces - layer(x)).abs().max() < 1e-12


def test_the_layer_learns_its_ridge():
    torch.manual_seed(0)
    layer = lla.LocalLinearAttention(16, 2, ridge=0.3)
    assert torch.allclose(layer.ridge, torch.full((2,), 0.3))
    layer(draw(1, 9, 16).float()).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in layer.parameters())


@pytest.mark.parametrize("change, message", [
    (dict(ridge=0.0), "ridge=0.0 must be positive"), (dict(ridge=torch.ones(3)), r"ridge is \[3\], expected \[\] or"),
    (dict(k=draw(2, 3, 9, 5)), "4 query heads do not divide into 3"), (dict(v=draw(2, 2, 8, 5)), "v is"),
    (dict(q=draw(2, 4, 12, 5)), "12 queries, but 9 keys"), (dict(v=draw(2, 2, 9, 5).float()), "must be of one dtype"),
    (dict(backend="cuda"), "unknown backend"),
])  # fmt: skip
def test_mistakes_are_named(change, message):
    q, k, v = qkv()
    with pytest.raises(ValueError, match=message):
        lla.lla(**(dict(q=q, k=k, v=v, ridge=1.0) | change))


@pytest.mark.parametrize("change, message", [
    (dict(ridge=-1.0), "ridge=-1.0 must be positive"), (dict(pad=torch.zeros(3, dtype=torch.int64)), "pad is"),
    (dict(length=0), "length=0 is outside"), (dict(length=10), "capacity is 9"),
    (dict(length=torch.ones(2)), r"length is \[2\]"), (dict(v_cache=draw(2, 2, 9, 4)), "v_cache is"),
])  # fmt: skip
def test_mistakes_of_a_step_are_named(change, message):
    q, k, v = qkv()
    with pytest.raises(ValueError, match=message):
        lla.lla_step(**(dict(q=q[:, :, 0], k_cache=k, v_cache=v, ridge=1.0) | change))


@NEEDS_TRITON
def test_the_kernels_refuse_float64():
    with pytest.raises(ValueError, match="float64"):
        lla.lla_triton(*(t.to(DEVICE) for t in qkv()), 1.0)


@NEEDS_TRITON
def test_heads_too_wide_for_the_kernels(monkeypatch):
    q, k, v = (t.float().to(DEVICE) for t in qkv(1, 1, 1, 3, 3, 130))
    assert lla.lla(q, k, v, 1.0).shape == q.shape
    with pytest.raises(ValueError, match="'triton' was asked for, but its kernels take heads of up to 128 channels"):
        lla.lla(q, k, v, 1.0, backend="triton")
    monkeypatch.setattr(kernels, "BACKEND", "triton")  # what NANO_BACKEND=triton sets
    for call in (lambda: lla.lla(q, k, v, 1.0), lambda: lla.lla_step(q[:, :, 0], k, v, 1.0)):
        with pytest.raises(ValueError, match="up to 128 channels, not 130"):
            call()


def test_a_layer_without_a_ridge_is_refused():
    with pytest.raises(ValueError, match="ridge=0 must be above 0.01"):
        lla.LocalLinearAttention(16, 2, ridge=0)
    with pytest.raises(ValueError, match="not a multiple"):
        lla.LocalLinearAttention(16, 3, 2, 4)


# ---- the demo's pieces


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_mesa_is_a_ridge_regression_on_all_pairs_so_far():
    q, k, v = (torch.randn(2, 3, 9, size, generator=rng(size), dtype=torch.float64) for size in (4, 4, 5))
    ridge = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    o = lla.mesa_ref(q, k, v, ridge)  # [2, 3, 9, 5]
    for b, h, t in ((0, 0, 0), (1, 1, 3), (0, 2, 8)):  # fewer pairs than dimensions, and more
        rows = torch.cat([k[b, h, : t + 1], ridge[h] ** 0.5 * torch.eye(4, dtype=torch.float64)])  # ridge as data
        targets = torch.cat([v[b, h, : t + 1], torch.zeros(4, 5, dtype=torch.float64)])
        expected = q[b, h, t] @ torch.linalg.lstsq(rows, targets).solution
        torch.testing.assert_close(o[b, h, t], expected)


def test_mesa_is_causal_and_has_gradients():
    q, k, v = (torch.randn(1, 1, 6, 3, generator=rng(i), dtype=torch.float64, requires_grad=True) for i in range(3))
    lla.mesa_ref(q, k, v, 0.5)[:, :, 2].sum().backward()
    assert not k.grad[:, :, 3:].any() and not v.grad[:, :, 3:].any() and k.grad[:, :, :3].all()
    ridge = torch.tensor([0.5], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lla.mesa_ref, (q, k, v, ridge))


def test_each_segment_has_a_line_of_its_own():
    x, y = lla.piecewise_linear(rng(), B=2, T=48, S=16, d=4)
    torch.testing.assert_close(x.norm(dim=-1), torch.ones(2, 48))
    for b in range(2):
        parts = [(x[b, s : s + 16], y[b, s : s + 16]) for s in (0, 16, 32)]
        maps = [torch.linalg.lstsq(*part).solution for part in parts]
        for (x_part, y_part), A in zip(parts, maps):
            torch.testing.assert_close(x_part @ A, y_part, atol=1e-4, rtol=1e-4)
        assert (maps[0] - maps[1]).norm() > 0.5 and (maps[1] - maps[2]).norm() > 0.5


def test_a_regression_token_holds_a_pair_and_the_next_question():
    tokens, y = study.regression_batch(rng(), B=2, T=32, S=16, d=4)
    x_now, y_now, x_next = tokens.split(4, dim=-1)
    torch.testing.assert_close(x_next[:, :-1], x_now[:, 1:])
    torch.testing.assert_close(y[:, :-1], y_now[:, 1:])


def test_recall_asks_every_key_once_for_the_value_after_it():
    ids, targets = study.recall_batch(rng(), B=8, T=40, n_pairs=7, vocab_size=64)
    assert ids.shape == targets.shape == (8, 40)
    for row, answers in zip(ids.tolist(), targets.tolist()):
        keys, values = row[:14:2], row[1:14:2]
        assert len(set(keys)) == len(set(values)) == 7
        assert all(0 < key < 32 for key in keys) and all(32 <= value < 64 for value in values)
        assert set(answers[:14]) == {-100}
        asked = {row[t]: answers[t] for t in range(14, 40) if row[t]}
        assert asked == dict(zip(keys, values)) and sum(map(bool, row[14:])) == 7
        assert all(answers[t] == -100 for t in range(40) if not row[t])


def test_recall_asks_soon_rather_than_late():
    ids, _ = study.recall_batch(rng(), B=200, T=80, n_pairs=8, vocab_size=64)
    asked = (ids[:, 16:] > 0).float().mean(0)  # [64]
    assert asked[:8].mean() > 4 * asked[-8:].mean()


def test_places_are_those_of_the_swaps():
    n = 5
    ids, places = study.swaps_batch(rng(), B=6, T=20, n_items=n)
    swaps = [(a, b) for a in range(n) for b in range(a + 1, n)]
    for row, where in zip(ids.tolist(), places.tolist()):
        items = list(range(n))
        for swap, place in zip(row, where):
            a, b = swaps[swap]
            items[a], items[b] = items[b], items[a]
            assert items.index(0) == place


def test_local_lines_beat_averages_and_one_line_the_more_the_larger_d(device):
    gain = []
    for d in (16, 32):
        error = {who: e.mean().item() for who, e in lla.fit_errors(0, d, S=256, n=2, device=device).items()}
        assert error["LLA"] < 0.6 * error["softmax"] and error["LLA"] < 0.4 * error["linear"]
        gain.append(error["softmax"] / error["LLA"])
    assert gain[1] > 1.2 * gain[0]


def test_one_line_beats_averages_only_while_there_is_one():
    error = lla.fit_errors(0, 16, S=128, n=2, device="cpu", T=512)
    first, last = ({who: e[start + 64 : start + 127].mean() for who, e in error.items()} for start in (0, 384))
    assert first["linear"] < 0.3 * first["softmax"] and last["linear"] > 1.3 * last["softmax"]
    assert first["LLA"] < 0.3 * first["softmax"] and last["LLA"] < 0.4 * last["softmax"]


TINY = dict(width=32, head_dim=16, lr=1e-2)
TASKS = {
    "regression": study.Task("", "lowest", partial(study.regression_batch, B=8, T=32, S=16, d=4), 12, 4, steps=40,
                             **TINY),
    "recall": study.Task("", "highest", partial(study.recall_batch, B=16, T=12, n_pairs=2, vocab_size=16), 16, 16,
                         steps=60, context=12, tied=True, heads=2, **TINY),
    "swaps": study.Task("", "as softmax", partial(study.swaps_batch, B=16, T=6, n_items=3), 3, 3, steps=60,
                      context=6, mlp=True, heads=2, **TINY),
}  # fmt: skip


@pytest.mark.parametrize("who", lla.MIXERS)
@pytest.mark.parametrize("task", TASKS)
def test_a_tiny_model_learns(task, who, device):
    losses, score = study.train_one(TASKS[task], lla.MIXERS[who], 0, device)
    first, last = (sum(part) / len(part) for part in (losses[:5], losses[-5:]))
    assert last < 0.8 * first
    assert (
        score < 0.8 if task == "regression" else score > 0.4
    )  # recall of a wrong value that was shown: 0.5, of any: 1/8


def test_models_differ_in_nothing_but_the_mixer():
    states = []
    for attend in lla.MIXERS.values():
        torch.manual_seed(0)
        states.append(study.Model(attend, replace(TASKS["recall"], mlp=True)).state_dict())
    for state in states[1:]:
        assert state.keys() == states[0].keys() and all(torch.equal(p, states[0][name]) for name, p in state.items())


@pytest.mark.parametrize(
    ("claim", "ours", "found"),
    [("lowest", [0.1, 0.1], True), ("lowest", [0.1, 0.5], False),
     ("highest", [0.9, 0.9], True), ("highest", [0.5, 0.5], False),
     ("as softmax", [0.5, 0.5], True), ("as softmax", [0.7, 0.7], False)],
)  # fmt: skip
def test_a_claim_is_found_if_the_scores_differ_by_more_than_their_spreads(claim, ours, found):
    runs = {"softmax": [0.5, 0.5], "linear": [0.4, 0.4], "LLA": ours}
    assert study.print_row("", claim, runs)["found"] == found
