"""nvfp4.py: every byte of the formats, the error of each rounding, the three products, and quantised models in use."""

import copy
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import decoding
import nvfp4
from conftest import TINY
from decode_kernels import pack_model
from kernels import philox
from latent_moe import MoE, MoEConfig
from nano_hybrid import PRESETS, Hybrid, HybridConfig
from nvfp4 import (
    FORMATS,
    MXFP8,
    RECIPES,
    QuantizedLinear,
    Recipe,
    decode,
    dequantize,
    e2m1_round,
    e4m3_round,
    fp4_matmul,
    gradient_bias,
    hadamard,
    merge_checkpoints,
    quantize,
    quantize_columns,
    quantize_model,
    quantize_ref,
    quantized_linear,
    relative,
)

NVFP4 = RECIPES["nvfp4"]
GRID = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
E4M3 = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()  # 0 ... 448, the bytes 0 ... 126


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---- 1. rounding ------------------------------------------------------------------------------------------


def test_e2m1_takes_every_bf16_to_the_nearest_and_every_tie_to_the_even_code():
    y = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16).float()
    y = y[y.abs() <= 6]
    a = y.abs()
    code = sum(t.int() for t in (a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5))
    torch.testing.assert_close(e2m1_round(y).abs(), GRID[code], rtol=0, atol=0)
    assert torch.equal(e2m1_round(y).signbit(), y < 0)  # -0.1 becomes -0.0, but -0.0 becomes 0.0
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    assert e2m1_round(ties).tolist() == [0, 1, 1, 2, 2, 4, 4]
    assert e2m1_round(-ties).tolist() == [0, -1, -1, -2, -2, -4, -4]
    assert e2m1_round(torch.tensor([6.3, 1e30, -torch.inf])).tolist() == [6, 6, -6]


def test_stochastic_rounding_never_moves_a_value_on_the_grid_and_keeps_the_mean():
    values = torch.cat([GRID, -GRID])
    for u in (0.0, 0.5, 1 - 2**-24):
        assert torch.equal(e2m1_round(values, torch.full_like(values, u)), values)
    between = torch.tensor([0.1, 0.7, 1.3, 2.9, 3.5, 4.4, -5.9])
    u = (torch.arange(20000) + 0.5) / 20000
    mean = torch.stack([e2m1_round(torch.full_like(u, y), u).mean() for y in between.tolist()])
    torch.testing.assert_close(mean, between, rtol=0, atol=2e-4)


def test_e4m3_is_the_integer_rule():
    midpoints = (E4M3[1:] + E4M3[:-1]) / 2
    a = torch.cat([E4M3, midpoints, midpoints.nextafter(torch.zeros(())), midpoints.nextafter(torch.full((), 1e9)),
                   torch.rand(10000) * 448, torch.rand(10000) * 2**-5])  # fmt: skip
    bits = a.view(torch.int32)
    byte = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3)
    byte = torch.where(a >= 2**-6, byte, (a * 512).round().int())
    assert torch.equal(e4m3_round(a), E4M3[byte.clamp(max=126)])
    assert e4m3_round(torch.tensor([449.0, 1e9])).tolist() == [448, 448]


def test_random_numbers_are_philox_as_triton_draws_it():
    words = np.array([0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8], np.uint32)  # of counter 0 and key 0: Random123
    assert philox(0, (1, 8), "cpu").flatten().tolist() == (words.view(np.uint16) / 65536).tolist()
    u, again, other = (philox(seed, (64, 256), "cpu") for seed in (torch.tensor(7 - 2**62), 7 - 2**62, 7))
    assert torch.equal(u, again) and not torch.equal(u, other)
    assert u.min() >= 0 and u.max() < 1 and abs(u.mean() - 0.5) < 0.01 and abs(u.std() - 12**-0.5) < 0.01


# ---- 2. bytes ---------------------------------------------------------------------------------------------


def test_all_values_times_all_scales_are_exact():
    values = torch.cat([-GRID.flip(0)[:-1], GRID, torch.tensor([6.0])])  # 15 values, and 6 again
    q = quantize(E4M3[1:, None] * values)  # the last block has 448: S_enc is 1
    assert q.scale == 1 and q.scales.flatten().tolist() == list(range(1, 127))
    low, high = q.codes & 15, q.codes >> 4
    assert torch.equal(torch.stack([low, high], 2).flatten(1), torch.tensor(
        [15, 14, 13, 12, 11, 10, 9, 0, 1, 2, 3, 4, 5, 6, 7, 7], dtype=torch.uint8).expand(126, 16))  # fmt: skip
    assert torch.equal(dequantize(q), E4M3[1:, None] * values)
    assert q.nbytes == 126 * 9 + 4  # 4.5 bits each


@np.errstate(all="ignore")
def bytes_by_numpy(x, u=None):
    """The rules in numpy's float32, number by number where torch has tensors: (codes, scales, scale)."""
    f, largest = np.float32, np.finfo(np.float32).max
    A = np.abs(x).max()
    S_enc = f(1) if A == 0 else min(f(2688) / A, largest)
    S_dec = f(1) / S_enc
    blocks = x.reshape(len(x), -1, 16)
    s = E4M3.numpy()[nearest_even(np.minimum(np.abs(blocks).max(2) * (S_enc * f(1 / 6)), f(448)))]
    factor = np.minimum(f(1) / (s * S_dec), largest)
    y = np.clip(blocks * factor[..., None], -6, 6).reshape(x.shape)
    a = np.abs(y)
    if u is None:
        code = sum(t.astype(int) for t in (a > 0.25, a >= 0.75, a > 1.25, a >= 1.75, a > 2.5, a >= 3.5, a > 5))
    else:
        below = np.searchsorted(GRID.numpy(), a, side="right") - 1
        step = np.append(np.diff(GRID.numpy()), f(2))[below]
        code = below + (u < (a - GRID.numpy()[below]) / step)
    code = code + 8 * (y < 0)
    return code[:, ::2] | code[:, 1::2] << 4, s, S_dec


def nearest_even(a):
    bits = a.view(np.int32)
    byte = ((bits + 0x7FFFF + (bits >> 20 & 1)) >> 20) - (120 << 3)
    return np.where(a >= 2**-6, byte, np.rint(a * 512).astype(int))


@pytest.mark.parametrize("size", [1.0, 3e-5, 1e-42, 1e36])
def test_bytes_are_those_of_the_rules_in_numpy(size):
    for seed in range(20):  # a fourth of all A would show a division by way of a reciprocal
        x = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed)) ** 3 * size
        q, (codes, scales, scale) = quantize(x), bytes_by_numpy(x.numpy())
        assert np.array_equal(q.codes.numpy(), codes) and q.scale.numpy() == scale
        assert np.array_equal(E4M3[q.scales.int()].numpy(), scales)
        q, u = quantize(x, stochastic=True, seed=seed), philox(seed, x.shape, "cpu")
        assert np.array_equal(q.codes.numpy(), bytes_by_numpy(x.numpy(), u.numpy())[0])


def test_zero_tensors_zero_blocks_and_scales_that_underflow():
    q = quantize(torch.zeros(16, 32))
    assert q.scale == 1 and not q.codes.any() and not q.scales.any() and not dequantize(q).any()
    x = torch.randn(2, 48)
    x[:, :16] = 0
    x[0, 0] = -0.0
    x[:, 16:32] *= 1e-7 * x.abs().max()
    q = quantize(x)
    assert q.scales[:, :2].tolist() == [[0, 0], [0, 0]] and not q.codes[:, :8].any()
    assert not dequantize(q)[:, :32].any() and dequantize(q)[:, 32:].isfinite().all()
    at_edge = torch.full((1, 32), 2.0**-10 / 448)  # of the scale: half of the least number of E4M3, a tie
    at_edge[0, 16] = 1
    assert quantize(at_edge).scales.tolist() == [[0, 126]]
    at_edge[0, 0] *= 1.001
    assert quantize(at_edge).scales.tolist() == [[1, 126]]


@pytest.mark.parametrize("bad", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("format", FORMATS)
def test_what_is_not_finite_is_never_a_silent_number(bad, format):
    for block in FORMATS[format].blocks:
        for amax in (None, 3.0):
            x = torch.randn(128, 256)
            x[5, 7] = bad
            out = dequantize(quantize(x, block, format, amax=amax))
            assert out[5, 7].isnan()
            if format == "nvfp4" and amax is None:
                assert out.isnan().all()
    x = torch.randn(64, 128)
    x[3, 4] = bad
    y = quantized_linear(x, torch.randn(128, 128), RECIPES["nvfp4"])
    assert y[3].isnan().all()  # as where a Linear is given it: the step will be left out


def test_codes_keep_the_sign_of_what_is_rounded_to_zero():
    x = torch.tensor([[6.0, -0.2, -0.0, 0.2] * 4])
    assert quantize(x).codes.tolist() == [[7 | 8 << 4, 0] * 4]


@pytest.mark.parametrize("format", FORMATS)
def test_quantising_again_changes_nothing(format):
    for block in FORMATS[format].blocks:
        once = dequantize(quantize(torch.randn(128, 256), block, format))
        again = dequantize(quantize(once, block, format))
        torch.testing.assert_close(again, once, rtol=2e-7 if format == "fp8" else 0, atol=0)  # its scales are rounded


@pytest.mark.parametrize("format, bits", [("nvfp4", 4.5), ("mxfp4", 4.25), ("mxfp8", 8.25), ("fp8", 8.25)])
def test_bits_and_dtypes_in_memory(format, bits):
    x, kind = torch.randn(128, 256), FORMATS[format]
    q = quantize(x, kind.blocks[0], format)
    assert q.nbytes == x.numel() * bits / 8 + 4
    assert q.codes.dtype == torch.uint8 and q.codes.shape == (128, 256 * kind.bits // 8)
    assert q.scales.shape == (128, 256 // kind.blocks[0][1])
    assert q.scales.dtype == (torch.float32 if format == "fp8" else torch.uint8)
    assert (q.shape, q.format, q.block) == ((128, 256), format, kind.blocks[0])


def test_powers_of_two_as_scales_clip_nothing():
    for format, largest in (("mxfp4", 6), ("mxfp8", 448)):
        x = torch.randn(64, 64) * torch.logspace(-37, 37, 64)[:, None]
        x[0, 0], x[1] = largest * 2.0**10, 0  # exactly at the top; nothing
        q = quantize(x, (1, 32), format)
        scale = torch.exp2(q.scales.double() - 127)
        a = x.unflatten(1, (-1, 32)).abs().amax(2).double()
        assert (a <= largest * scale).all() and ((a > largest * scale / 2) | (q.scales == 0)).all()
        assert q.scales[0, 0] == 127 + 10 and not dequantize(q)[1].any()


def test_scales_of_the_least_numbers_are_the_least_powers_of_two():
    x = torch.full((1, 32), 2.0**-149)  # over 448, it is 0 in float32
    for format in ("mxfp4", "mxfp8"):
        assert quantize(x, (1, 32), format).scales.tolist() == [[0]]
    stored = torch.tensor([0, 1, 127, 254, 255], dtype=torch.uint8)
    assert nvfp4._scale_values(stored, "mx")[:4].tolist() == [2.0**-127, 2.0**-126, 1, 2.0**127]
    assert nvfp4._scale_values(stored, "mx")[4].isnan()


def test_no_gradient_passes_through_a_quantised_matrix():
    x = torch.randn(16, 16, requires_grad=True)
    assert not dequantize(quantize(x)).requires_grad and not quantize(x, amax=x.abs().max()).scale.requires_grad


def test_a_given_amax_is_used():
    x = torch.randn(16, 16)
    q, a = quantize(x, amax=100.0), quantize(x, amax=torch.tensor(100.0))
    assert q.scale == torch.tensor(1.0) / (torch.tensor(2688.0) / torch.tensor(100.0)) == a.scale
    assert relative(dequantize(q), x) < 0.12 and torch.equal(q.codes, a.codes)
    assert dequantize(quantize(x, amax=0.5)).abs().max() <= 0.5  # clipped


def test_a_matrix_that_cannot_be_quantised_is_one_clear_line():
    x = torch.randn(32, 64)
    for bad, words in [
        (dict(format="fp3"), "unknown format 'fp3'; use one of nvfp4"),
        (dict(block=(1, 32)), r"nvfp4 has blocks of \(1, 16\) or \(16, 16\), not \(1, 32\)"),
        (dict(block=(1, 128), format="fp8"), r"\[32, 64\] is not made of whole blocks of \[1, 128\]"),
        (dict(block=(1, 32), format="mxfp8", stochastic=True), "mxfp8 is rounded to nearest"),
    ]:
        with pytest.raises(ValueError, match=words):
            quantize(x, **bad)
    for matrix in (x[0], x[None], x.int(), x[:, :20], x[:0]):
        with pytest.raises(ValueError):
            quantize(matrix)
    with pytest.raises(ValueError, match="whole blocks"):
        quantize(x[:20], (16, 16))


# ---- 3. errors --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "format, block, stochastic, percent",
    [
        ("nvfp4", (1, 16), False, 9.5), ("nvfp4", (16, 16), False, 11.1), ("nvfp4", (1, 16), True, 13.7),
        ("nvfp4", (16, 16), True, 15.9), ("mxfp4", (1, 32), False, 11.5), ("fp8", (1, 128), False, 2.57),
        ("fp8", (128, 128), False, 2.64),
    ],
)  # fmt: skip
def test_error_of_gaussian_numbers(format, block, stochastic, percent):
    x = torch.randn(1024, 1024)
    error = 100 * relative(dequantize(quantize(x, block, format, stochastic)), x)
    assert abs(error - percent) < 0.1


def test_the_mean_of_stochastic_gradients_converges_down_to_what_is_clipped():
    dy, x = torch.randn(2, 128, 128)
    errors, without_clipping = gradient_bias(dy, x, 256), gradient_bias(dy, x, 256, 17 / 16)
    for row in (errors, without_clipping):
        n = np.log([k for k in row if k <= 32])
        assert abs(np.polyfit(n, np.log([row[k] for k in row if k <= 32]), 1)[0] + 0.5) < 0.06
    assert abs(errors[1] - 0.137) < 0.005 and 0.01 < errors[256] < 0.016
    assert without_clipping[256] < errors[256] - 0.002
    assert abs(without_clipping[256] * math.sqrt(256) / without_clipping[1] - 1) < 0.1  # no floor yet


def test_headroom_of_a_sixteenth_clips_nothing():
    x = torch.randn(256, 256)
    for headroom, least, most in ((1.0, 0.02, 0.05), (17 / 16, 0, 0)):
        q = quantize_ref(x, headroom=headroom)
        step = (E4M3[q.scales.int()] * q.scale)[..., None]
        clipped = (x.unflatten(1, (-1, 16)).abs() > 6.000001 * step).float().mean()
        assert least <= clipped <= most


def test_a_steady_gradient_under_spikes_survives_stochastic_rounding_only():
    spike = F.one_hot(torch.randint(16, (64, 256)), 16).bool().transpose(1, 2).flatten(0, 1)  # one of 16 tokens
    dy = torch.where(spike, torch.randn(1024, 256), 0.02)
    kept = [(dequantize(quantize_columns(dy, stochastic=s)).T[~spike].mean() / 0.02).item() for s in (False, True)]
    assert kept[0] <= 0.7 and 0.98 <= kept[1] <= 1.02
    x, errors = 1 + torch.randn(1024, 64), {}
    for transform in (False, True):
        for stochastic in (False, True):
            g, other = quantize_columns(dy, "nvfp4", transform, stochastic), quantize_columns(x, "nvfp4", transform)
            errors[transform, stochastic] = relative(fp4_matmul(g, other), dy.T @ x)
    assert errors.pop((False, False)) > 0.3 and max(errors.values()) < 0.12


# ---- 4. the transform -------------------------------------------------------------------------------------


def sylvester(size):
    H = torch.ones(1, 1)
    while len(H) < size:
        H = torch.cat([torch.cat([H, H], 1), torch.cat([H, -H], 1)])
    return H


@pytest.mark.parametrize("size", [1, 4, 16, 32])
def test_hadamard_is_signs_then_sylvester_over_each_run(size):
    reference = torch.tensor([1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1.0])
    S, x = reference.repeat(2)[:size], torch.randn(3, 64, 5)
    R = sylvester(size) * S / size**0.5  # rows of the output, columns of the input
    expected = (R @ x.unflatten(1, (-1, size))).flatten(1, 2)
    torch.testing.assert_close(hadamard(x, size=size), expected, rtol=0, atol=1e-6)
    torch.testing.assert_close(hadamard(x, signs=S.tolist(), size=size), hadamard(x, size=size), rtol=0, atol=0)
    torch.testing.assert_close(hadamard(hadamard(x, size=size), size=size, inverse=True), x)
    a, b = hadamard(x[0], size=size), hadamard(x[1], size=size)
    torch.testing.assert_close(a.T @ b, x[0].T @ x[1], rtol=0, atol=1e-5)
    assert hadamard(x.bfloat16()).dtype == torch.float32


def test_signs_keep_an_offset_from_ending_in_one_row():
    x = 15 + torch.randn(1024, 64)
    zeros = []
    for signs in (None, [1] * 16):
        q = quantize(hadamard(x, signs).T.contiguous())
        zeros.append((dequantize(q) == 0).float().mean())
    assert zeros[0] < 0.3 and zeros[1] > 0.6


def test_hadamard_refuses_what_it_cannot_transform():
    for x, options in [
        (torch.randn(24, 3), {}), (torch.randn(16), {}), (torch.randn(24, 3), dict(size=12)),
        (torch.randn(16, 3), dict(signs=[1, -1])),
    ]:  # fmt: skip
        with pytest.raises(ValueError):
            hadamard(x, **options)


# ---- 5. products ------------------------------------------------------------------------------------------


def test_square_blocks_commute_with_transposing_and_rows_do_not():
    w = torch.randn(48, 64)
    q, other = quantize(w, (16, 16)).T, quantize(w.T.contiguous(), (16, 16))
    assert torch.equal(q.codes, other.codes) and torch.equal(q.scales, other.scales) and q.shape == (64, 48)
    assert (dequantize(quantize(w)).T != dequantize(quantize(w.T.contiguous()))).float().mean() > 0.6
    with pytest.raises(ValueError, match="not square"):
        _ = quantize(w).T
    w = torch.randn(128, 256)
    assert torch.equal(dequantize(quantize(w, (128, 128), "fp8").T), dequantize(quantize(w, (128, 128), "fp8")).T)


def test_operands_are_exact_in_bf16_and_the_product_is_that_of_float64():
    for format in ("nvfp4", "mxfp4", "mxfp8"):
        q = quantize(torch.randn(64, 256) ** 3, FORMATS[format].blocks[0], format)
        assert torch.equal(decode(q, torch.bfloat16).float(), decode(q))
    a, b = quantize(torch.randn(40, 512)), quantize(torch.randn(48, 512), (16, 16))
    exact = dequantize(a).double() @ dequantize(b).double().T
    with torch.autocast("cpu", torch.bfloat16):  # is not meant for the sums
        assert relative(fp4_matmul(a, b).double(), exact) < 1e-6
    assert fp4_matmul(a, b.rows(37), torch.bfloat16).shape == (40, 37)
    torch.testing.assert_close(fp4_matmul(a, b.rows(37)), fp4_matmul(a, b)[:, :37])
    with pytest.raises(ValueError, match="widths differ"):
        fp4_matmul(a, quantize(torch.randn(48, 256)))


RECIPES_TESTED = {
    **RECIPES,
    "without 2D": replace(NVFP4, weight_block=(1, 16)),
    "without SR": replace(NVFP4, stochastic_grad=False),
    "without RHT": replace(NVFP4, hadamard_wgrad=False),
    "forward": replace(NVFP4, backward=False),
    "backward": replace(NVFP4, forward=False),
    "SR of x": replace(NVFP4, stochastic_forward=True),
    "mxfp8": MXFP8,
}


@pytest.mark.parametrize("name", RECIPES_TESTED)
def test_each_product_is_that_of_its_quantised_views(name):
    r, seed = RECIPES_TESTED[name], 5
    x, w, dy = torch.randn(37, 128), torch.randn(50, 128), torch.randn(37, 50)
    x.requires_grad_(), w.requires_grad_()
    y = quantized_linear(x, w, r, seed)
    dx, dw = torch.autograd.grad(y, (x, w), dy)
    x, w, k = x.detach(), w.detach(), r.columns

    def rows(a, **how):  # zeros up to whole blocks, quantised along the last axis, and the zeros' rows cut off
        padded = torch.zeros(len(a), -(-a.shape[1] // k) * k)
        padded[:, : a.shape[1]] = a
        return dequantize(quantize(padded, (1, k), r.format, **how)).double()

    def weight(a):
        padded = torch.zeros(*(-(-n // 128) * 128 for n in a.shape))
        padded[: a.shape[0], : a.shape[1]] = a
        return dequantize(quantize(padded, r.weight_block, r.format)).double()[: a.shape[0], : a.shape[1]]

    def columns(a, **how):  # after the transform, along the tokens
        padded = torch.zeros(-(-len(a) // k) * k, a.shape[1])
        padded[: len(a)] = a
        return rows((hadamard(padded, size=k) if r.hadamard_wgrad else padded).T, **how)

    sr = [dict(stochastic=r.stochastic_grad, seed=2 * seed + i) for i in (0, 1)]
    X, W, D = x.double(), w.double(), dy.double()
    of_x = dict(stochastic=r.stochastic_forward, seed=~seed)
    expected_y = rows(x, **of_x) @ weight(w).T if r.forward else X @ W.T
    square = r.weight_block and r.weight_block[0] > 1
    expected_dx = rows(dy, **sr[0])[:, :50] @ (weight(w) if square else rows(w.T)[:, :50].T) if r.backward else D @ W
    expected_dw = columns(dy, **sr[1]) @ columns(x).T if r.backward else D.T @ X
    for ours, expected in ((y, expected_y), (dx, expected_dx), (dw, expected_dw)):
        assert relative(ours.double(), expected) < 3e-6


def test_the_demo_prints_what_is_measured(capsys):
    nvfp4.demo()
    lines = {line.split()[0]: line.split() for line in capsys.readouterr().out.splitlines() if line.strip()}
    assert lines["mxfp8"][-1] == "2.66%" and lines["128"][1] < "2%"
    assert all(float(lines[name][1]) < 3e-6 for name in ("fprop", "dgrad", "wgrad"))


def test_with_quantisers_that_do_nothing_the_layer_is_linear(monkeypatch):
    monkeypatch.setattr(nvfp4, "quantize", lambda x, *_: x)
    monkeypatch.setattr(torch.Tensor, "rows", lambda x, n: x[:n], raising=False)
    monkeypatch.setattr(nvfp4, "fp4_matmul", lambda a, b, dtype: (a @ b.T).to(dtype))
    x = torch.randn(7, 16, dtype=torch.float64, requires_grad=True)
    w = torch.randn(5, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: quantized_linear(x, w, NVFP4), (x, w))
    assert torch.autograd.gradcheck(lambda x, w: quantized_linear(x, w, RECIPES["bf16"]), (x, w))


def test_shapes_that_do_not_fit_are_one_clear_line():
    w = torch.randn(8, 40)
    with pytest.raises(ValueError, match="I=40 is not a multiple of 16, the block of nvfp4"):
        quantized_linear(torch.randn(3, 40), w, NVFP4)
    for x in (torch.randn(40), torch.randn(3, 48)):
        with pytest.raises(ValueError, match="expected x"):
            quantized_linear(x, w, NVFP4)
    for bad in (("nvfp4", (1, 32), True, True), ("fp8", (1, 128), True, False)):
        with pytest.raises(ValueError):
            Recipe(*bad)
    assert not Recipe("bf16", None, False, False).quantizes


# ---- 6. a layer in use ------------------------------------------------------------------------------------


def gradients(layer, x, seed=3, run=None):
    """The output and all gradients of a layer with the seed set."""
    torch.manual_seed(seed)
    layer.zero_grad()
    x = x.detach().requires_grad_()
    y = layer(x) if run is None else run(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in layer.parameters())]


def same(ours, others):
    return all(torch.equal(a, b) for a, b in zip(ours, others))


def test_a_quantised_linear_is_a_linear_with_other_products():
    layer, x = QuantizedLinear(32, 20), torch.randn(2, 5, 32)
    assert list(layer.state_dict()) == ["weight", "bias"]
    expected = quantized_linear(x.flatten(0, 1), layer.weight, NVFP4).view(2, 5, 20) + layer.bias
    assert torch.equal(layer(x), expected) and torch.equal(layer(x[0, 0]), layer(x[0, :1])[0])
    plain = nn.Linear(32, 20)
    plain.load_state_dict(layer.state_dict())
    assert 0.03 < relative(layer(x), plain(x)) < 0.3
    layer.recipe = RECIPES["bf16"]
    assert torch.equal(layer(x), plain(x))


def test_autocast_gives_its_dtype_and_quantises_the_float32_weight():
    layer, x = QuantizedLinear(32, 20), torch.randn(6, 32)
    with torch.autocast("cpu", torch.bfloat16):
        y, inside = layer(x), gradients(layer, x)
    expected = quantized_linear(x.bfloat16(), layer.weight, NVFP4) + layer.bias.bfloat16()
    assert y.dtype == torch.bfloat16 and torch.equal(y, expected)
    assert [t.dtype for t in inside[1:]] == [torch.float32] * 3
    torch.manual_seed(3)
    seed = torch.randint(2**62, ())
    leaf, weight = x.bfloat16().requires_grad_(), layer.weight.detach().requires_grad_()
    quantized_linear(leaf, weight, NVFP4, seed).backward(2 * y.detach())
    assert torch.equal(weight.grad, inside[2])  # the backward ran within autocast, and did not heed it


@pytest.mark.parametrize("name", ["forward", "backward", "bf16"])
def test_y_has_the_dtype_of_x_under_autocast(name):
    for tokens in (5, 0):
        x, w = torch.randn(tokens, 32, requires_grad=True), torch.randn(20, 32, requires_grad=True)
        with torch.autocast("cpu", torch.bfloat16):
            y = quantized_linear(x, w, RECIPES_TESTED[name])
        y.sum().backward()
        assert (y.dtype, x.grad.dtype, w.grad.dtype) == (torch.float32,) * 3
        assert tokens == 0 or name == "forward" or torch.equal(y, x @ w.T)


def test_seeds_come_from_the_generator_and_only_where_a_gradient_may_follow():
    layer, x = QuantizedLinear(32, 16, bias=False), torch.randn(16, 32)
    a, b, c = gradients(layer, x, 1), gradients(layer, x, 1), gradients(layer, x, 2)
    assert same(a, b) and torch.equal(a[0], c[0]) and not torch.equal(a[1], c[1]) and not torch.equal(a[2], c[2])
    state = torch.get_rng_state()
    with torch.no_grad():
        layer(x)
    layer.recipe = replace(NVFP4, stochastic_grad=False)
    layer(x)
    assert torch.equal(state, torch.get_rng_state())


def test_activation_checkpointing_draws_the_same_seed_again():
    layer = nn.Sequential(QuantizedLinear(32, 48), nn.ReLU(), QuantizedLinear(48, 16))
    x = torch.randn(16, 32)
    assert same(gradients(layer, x), gradients(layer, x, run=lambda x: checkpoint(layer, x, use_reentrant=False)))


def test_gradients_accumulate_in_float32():
    layer, x = QuantizedLinear(32, 16), torch.randn(2, 16, 32)
    whole = [gradients(layer, part, seed) for seed, part in enumerate(x)]
    layer.zero_grad()
    for seed, part in enumerate(x):
        torch.manual_seed(seed)
        layer(part).square().sum().backward()
    torch.testing.assert_close(layer.weight.grad, whole[0][2] + whole[1][2], rtol=0, atol=0)
    assert layer.weight.grad.dtype == torch.float32


def test_torch_compile_keeps_one_graph_and_the_numbers():
    layer, x, dy = QuantizedLinear(32, 20), torch.randn(6, 32), torch.randn(6, 20)

    def both(x, seed):
        return layer(x), quantized_linear(x, layer.weight, NVFP4, seed)

    torch._dynamo.reset()
    compiled = torch.compile(both, backend="eager", fullgraph=True)
    drawn = []  # of the layer, which draws its seeds
    with torch._dynamo.config.patch(error_on_recompile=True):  # another seed is no other graph
        for run, seed in enumerate((5, 5, 2**61 + 7)):
            if run < 2:
                torch.manual_seed(1)
            seed, leaf = torch.tensor(seed), x.clone().requires_grad_()
            y, z = compiled(leaf, seed)
            drawn.append(torch.autograd.grad(y, leaf, dy, retain_graph=True)[0])
            ours = torch.autograd.grad(z, (leaf, layer.weight), dy)
            leaf = x.clone().requires_grad_()
            z = quantized_linear(leaf, layer.weight, NVFP4, seed)
            assert same(ours, torch.autograd.grad(z, (leaf, layer.weight), dy))
            assert torch.equal(y, layer(leaf))
    assert torch.equal(drawn[0], drawn[1]) and not torch.equal(drawn[1], drawn[2])


def test_a_batch_without_tokens_has_no_gradient_but_zero():
    layer = QuantizedLinear(32, 16)
    y, dx, dw, db = gradients(layer, torch.randn(0, 32))
    assert y.shape == (0, 16) and dx.shape == (0, 32) and not dw.any() and not db.any()


# ---- 7. quantised models ----------------------------------------------------------------------------------

WIDE = TINY | dict(hidden_size=32, intermediate_size=48, mamba_head_dim=8)  # widths in blocks of 16, of out_proj 32


def test_the_rules_keep_what_the_papers_keep():
    with torch.device("meta"):
        model = Hybrid(replace(PRESETS["super3"], hybrid_override_pattern="MEMEM*LMEMEM*EMEMEME"))
    names = quantize_model(model, NVFP4)
    parts = {name.split("mixer.")[1] for name in names}
    assert parts == {"in_proj", "out_proj", "experts", "shared_experts.up_proj", "shared_experts.down_proj"}
    layers = {int(name.split(".")[2]) for name in names}
    assert layers == set(range(17)) - {5, 6, 12}  # 20 layers: the last 3 stay, and attention
    assert {type(model.get_submodule(name)) for name in names if "experts" not in name} == {QuantizedLinear}
    recipes = {name.split(".")[-1]: model.get_submodule(name).recipe for name in names if "proj" in name}
    assert recipes["out_proj"] == MXFP8 and recipes["in_proj"] == recipes["up_proj"] == NVFP4
    assert type(model.lm_head) is nn.Linear and model.mtp.layers[1].mixer.experts.product is None
    quantize_model(model, replace(NVFP4, forward=False))  # BF16 forward: of MXFP8, too
    assert model.model.layers[0].mixer.out_proj.recipe == replace(MXFP8, forward=False)
    kept = quantize_model(model, NVFP4, keep=["layers.0.", "shared_experts"])
    assert set(names) - set(kept) == {n for n in names if "layers.0." in n or "shared_experts" in n}
    everything = quantize_model(model, NVFP4, everything=True)
    assert model.model.layers[19].mixer.experts.product and model.mtp.layers[0].mixer.q_proj.recipe == NVFP4
    assert "lm_head" not in everything and model.model.layers[0].mixer.out_proj.recipe == NVFP4
    assert quantize_model(model, RECIPES["bf16"]) == []
    assert not any(isinstance(m, QuantizedLinear) or getattr(m, "product", None) for m in model.modules())


def test_a_short_model_keeps_its_last_layer_and_8_bits_need_no_exception():
    model = Hybrid(HybridConfig(**WIDE))
    assert quantize_model(model, NVFP4) == [f"model.layers.{n}" for n in
        ("0.mixer.in_proj", "0.mixer.out_proj", "1.mixer.up_proj", "1.mixer.down_proj", "3.mixer.in_proj",
         "3.mixer.out_proj")]  # fmt: skip
    model = Hybrid(PRESETS["tiny"])
    quantize_model(model, RECIPES["fp8"])
    assert model.model.layers[0].mixer.out_proj.recipe == RECIPES["fp8"]


def test_a_model_that_cannot_be_quantised_is_left_as_it_was():
    model = Hybrid(HybridConfig(**WIDE | dict(intermediate_size=40)))
    with pytest.raises(ValueError, match="layers.1.mixer.down_proj: its width 40 is not a multiple of 16, the block"):
        quantize_model(model, NVFP4)
    with pytest.raises(ValueError, match="keep='dwon_proj' is in the name of no module"):
        quantize_model(model, NVFP4, keep=["dwon_proj"])
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())
    assert "model.layers.1.mixer.up_proj" in quantize_model(model, NVFP4, keep="down_proj")


def test_a_quantised_model_learns_and_is_saved_like_any_other(tmp_path):
    model = Hybrid(HybridConfig(**WIDE, tie_word_embeddings=True))
    names, ids = list(model.state_dict()), torch.randint(64, (4, 33))
    before = model.loss(ids[:, :-1], ids[:, 1:])[0].item()
    quantize_model(model, NVFP4)
    assert list(model.state_dict()) == names and model.lm_head.weight is model.model.embeddings.weight
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    for _ in range(15):
        optimizer.zero_grad()
        loss, _ = model.loss(ids[:, :-1], ids[:, 1:])
        loss.backward()
        optimizer.step()
    assert loss < 0.8 * before
    model.save_pretrained(tmp_path)
    loaded = Hybrid.from_pretrained(tmp_path)
    quantize_model(loaded, NVFP4)
    assert torch.equal(loaded(ids), model(ids))
    quantize_model(model, RECIPES["bf16"])  # the switch back
    assert torch.equal(Hybrid.from_pretrained(tmp_path)(ids), model(ids))


def test_hooks_stay_and_subclasses_of_linear_are_left_alone():
    class Lora(nn.Linear):
        pass

    model, seen = nn.Sequential(nn.Linear(16, 16), Lora(16, 16)), []
    model[0].register_forward_hook(lambda *_: seen.append(1))
    assert quantize_model(model, NVFP4) == ["0"] and type(model[1]) is Lora
    copy.deepcopy(model)(torch.randn(3, 16))
    assert seen == [1]


def test_experts_are_quantised_one_by_one_and_may_be_idle():
    config = MoEConfig(32, n_routed_experts=6, num_experts_per_tok=2, moe_intermediate_size=48)
    moe, x = MoE(config), torch.randn(1, 11, 32)
    with torch.no_grad():
        moe.gate.e_score_correction_bias[:2] = -10  # two experts without a token
        for p in moe.experts.parameters():
            p.mul_(10 * torch.logspace(-3, 3, 6)[:, None, None])  # maxima of their own
    assert "experts" in quantize_model(moe, replace(NVFP4, stochastic_grad=False))
    moe.shared_experts.requires_grad_(False)
    ids, weights = torch.tensor([[2, 3], [3, 4], [5, 2]] + [[4, 5]] * 8), torch.rand(11, 2)
    y = moe.experts(x[0], ids, weights)
    expected = torch.zeros(11, 32)
    for e in range(2, 6):
        token, k = torch.where(ids == e)
        hidden = quantized_linear(x[0, token], moe.experts.up_proj[e], NVFP4).relu().square()
        expected[token] += weights[token, k, None] * quantized_linear(hidden, moe.experts.down_proj[e], NVFP4)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5 * y.abs().max().item())
    moe(x).square().mean().backward()
    grads = moe.experts.up_proj.grad
    assert grads.isfinite().all() and not grads[:2].any() and all(g.any() for g in grads[2:])


def test_decode_steps_go_through_the_quantised_forward(monkeypatch):
    model = Hybrid(HybridConfig(**WIDE)).eval()
    plain = [t.tolist() for t in decoding.generate(model, [[1, 2, 3]], 6, temperature=0)]
    quantize_model(model, NVFP4)
    calls, forward = [], QuantizedLinear.forward
    monkeypatch.setattr(QuantizedLinear, "forward", lambda self, x: calls.append(x.shape[-2]) or forward(self, x))
    tokens = [t.tolist() for t in decoding.generate(model, [[1, 2, 3]], 6, temperature=0)]
    assert calls[:6] == [3] * 6 and calls[6:] and set(calls[6:]) == {1} and len(calls) % 6 == 0
    assert tokens == [t.tolist() for t in model.generate([[1, 2, 3]], 6, temperature=0)] and len(plain) == 6


def test_experts_whose_rows_the_host_counts_are_in_no_graph():
    model = Hybrid(HybridConfig(**WIDE | dict(hybrid_override_pattern="M-E*M-"))).eval()
    assert decoding.can_record(model)
    quantize_model(model, NVFP4)
    assert not decoding.can_record(model)
    pack_model(model)
    assert decoding.can_record(model)


def test_under_autocast_a_decode_session_keeps_the_float32_weights():
    model = Hybrid(HybridConfig(**WIDE)).eval()
    quantize_model(model, NVFP4)
    with torch.autocast("cpu", torch.bfloat16):
        copied = decoding.DecodeSession().model_like(model)
    assert copied.model.layers[0].mixer.in_proj.weight.dtype == torch.float32
    assert copied.model.layers[2].mixer.q_proj.weight.dtype == torch.bfloat16


def test_a_packed_model_generates_with_the_rounded_weights():
    model = Hybrid(HybridConfig(**WIDE | dict(intermediate_size=160, hybrid_override_pattern="M-E*M-"))).eval()
    names, ids = quantize_model(model, NVFP4), torch.randint(64, (2, 9))
    rounded = copy.deepcopy(model)
    packed = pack_model(model)
    assert packed == [name for name in names if not name.endswith(("out_proj", "experts"))]
    quantize_model(rounded, RECIPES["bf16"])
    for name in names:
        module, block = rounded.get_submodule(name), (1, 32) if "out_proj" in name else (16, 16)
        for p in module.parameters():
            for matrix in p.data.view(-1, *p.shape[-2:]):
                padded = torch.zeros(-(-len(matrix) // 16) * 16, matrix.shape[1])
                padded[: len(matrix)] = matrix
                q = quantize(padded, block, "mxfp8" if "out_proj" in name else "nvfp4")
                matrix.copy_(dequantize(q)[: len(matrix)])
    torch.testing.assert_close(model(ids), rounded(ids))
    layer, x = model.model.layers[1].mixer.up_proj, torch.randn(3, 32)
    assert sum(b.nbytes for b in layer.buffers()) == 160 * 32 * (4 + 8 / 256) / 8 + 4 and not list(layer.parameters())
    torch.testing.assert_close(layer(x), x @ dequantize(layer.packed).T)
    assert layer.to(torch.bfloat16).packed.scale.dtype == torch.float32
    tokens = [list(write(model, [[1, 2, 3]], 6, temperature=0)) for write in (decoding.generate, Hybrid.generate)]
    assert torch.equal(*map(torch.stack, tokens))


# ---- 8. merged checkpoints --------------------------------------------------------------------------------


@pytest.mark.parametrize("decay, first, last", [("minus-sqrt", 0.302, 0.047), ("linear", 1 / 11, 1 / 11)])
def test_merging_is_a_decay_of_the_steps(decay, first, last):
    steps = torch.randn(11, 5, dtype=torch.float64)
    dicts = [{"w": th, "n": torch.tensor(i)} for i, th in enumerate(steps.cumsum(0))]
    w = [{"minus-sqrt": 1 - math.sqrt(i / 11), "linear": 1 - i / 11}[decay] for i in range(11)]
    expected = sum(wi * step for wi, step in zip(w, steps))
    merged = merge_checkpoints(dicts, decay)
    torch.testing.assert_close(merged["w"], expected)
    assert merged["n"] == 10
    c = [merge_checkpoints([{"w": torch.tensor(float(i == j))} for i in range(11)], decay)["w"] for j in (0, 10)]
    assert abs(c[0] - first) < 6e-4 and abs(c[1] - last) < 6e-4


def test_merging_keeps_dtypes_and_refuses_other_models():
    one = {"a": torch.ones(2, dtype=torch.bfloat16), "b": torch.ones(2)}
    merged = merge_checkpoints([one, {name: 3 * t for name, t in one.items()}], "linear")
    assert merged["a"].dtype == torch.bfloat16 and merged["a"].tolist() == [2, 2] == merged["b"].tolist()
    for dicts, decay, words in [
        ([one], "cosine", "minus-sqrt, linear"), ([], "linear", "0 checkpoints"),
        ([one, {"a": one["a"]}], "linear", "differ in b"), ([one, one | {"b": torch.ones(3)}], "linear", "differ in b"),
    ]:  # fmt: skip
        with pytest.raises(ValueError, match=words):
            merge_checkpoints(dicts, decay)
