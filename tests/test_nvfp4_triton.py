"""The kernels of nvfp4.py: every byte is the definition's, and the packed product is that of the decoded weights.

Without a GPU they run under Triton's interpreter (tests/conftest.py sets TRITON_INTERPRET=1).
"""

from dataclasses import replace

import pytest
import torch

import kernels
import nvfp4
from decode_kernels import packed_linear_triton as packed_linear
from nvfp4 import FORMATS, decode, dequantize, hadamard, operands, quantize_ref, quantize_triton

pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
BLOCKS = [("nvfp4", (1, 16)), ("nvfp4", (16, 16)), ("mxfp4", (1, 32))]


def draw(*shape, seed=0, dtype=torch.float32):
    """Returns numbers of very different sizes, with zeros, blocks of zeros and blocks too small for a scale."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*shape, generator=generator) * 4 ** torch.randn(shape[0], 1, generator=generator)
    x[torch.rand(shape, generator=generator) < 0.05] = 0.0
    x[:, :2] = -0.0
    x[1, : shape[1] // 2] = 0.0
    x[2] *= 1e-4 if dtype == torch.float16 else 1e-9
    return x.to(dtype).to(DEVICE)


def assert_same_bytes(got, want):
    for name in ("codes", "scales", "scale"):
        a, b = getattr(got, name), getattr(want, name)
        assert a.dtype == b.dtype and torch.equal(a, b), name
    assert got[3:] == want[3:]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("format, block", BLOCKS)
def test_bytes_are_those_of_the_definition(format, block, dtype):
    for R, K in ((32, 128), (16 * 5, 128 * 2)):
        x = draw(R, K, dtype=dtype)
        for stochastic in (False, True):
            for seed in (7, torch.tensor(2**61 + 5, device=DEVICE)) if stochastic else (0,):
                want = quantize_ref(x, block, format, stochastic, seed)
                assert_same_bytes(quantize_triton(x, block, format, stochastic, seed), want)


@pytest.mark.parametrize("format, block, transform", [("nvfp4", (1, 16), True), ("nvfp4", (16, 16), True),
                                                      ("mxfp4", (1, 32), True), ("mxfp8", (1, 32), False)])  # fmt: skip
def test_operands_are_the_decoded_numbers_of_both_views(format, block, transform):
    """Of any number of tokens and channels: those that are missing in a block count as zeros."""
    stochastic, seed, n = FORMATS[format].bits == 4, torch.tensor(11, device=DEVICE), block[1]
    for dtype in DTYPES:
        x = draw(43, 72, dtype=dtype)
        rows, columns = operands(x, block, format, stochastic, seed, transform)
        tokens = torch.nn.functional.pad(x.float(), (0, 0, 0, -43 % n))
        want = quantize_ref(nvfp4._pad(x.float(), *block), block, format, stochastic, seed)
        assert torch.equal(rows.values.float(), decode(want)[:43, :72]) and torch.equal(rows.scale, want.scale)
        tokens = hadamard(tokens, size=n) if transform else tokens
        want = quantize_ref(tokens.T.contiguous(), (1, n), format, stochastic, seed + 1)
        assert torch.equal(columns.values.float(), decode(want)[:, : columns.shape[1]])
        assert columns.shape == (72, 48 + 16 * (n == 32) if transform else 43) and torch.equal(
            columns.scale, want.scale
        )
        assert operands(x, block, format, columns=False)[1] is None


def test_all_values_at_all_scales_and_all_ties():
    """Rows of 6 s, then a tensor that holds 448 * 6: its scale is 1, and blocks keep their s. E4M3 ties, E2M1 ties."""
    e4m3 = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x = (torch.cat([values, -values]) * e4m3[:, None]).to(DEVICE)  # [126, 16]
    q = quantize_triton(x, (1, 16), "nvfp4")
    assert torch.equal(dequantize(q), x) and q.nbytes * 8 == 4.5 * x.numel() + 32
    middle = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    ties = torch.cat(
        [middle, torch.nextafter(middle, middle + 1)[:1], torch.nextafter(middle, middle - 1), values[-1:]]
    )
    x = torch.cat([ties.expand(126, 16) * e4m3[:, None], 6 * (e4m3[1:] + e4m3[:-1])[:, None].expand(-1, 16) / 2])
    x = torch.cat([x, -x]).to(DEVICE)
    assert_same_bytes(quantize_triton(x, (1, 16), "nvfp4"), quantize_ref(x))


def test_zero_and_a_number_that_is_not_finite():
    zero = torch.zeros(16, 32, device=DEVICE)
    for format, block in BLOCKS:
        assert_same_bytes(quantize_triton(zero, block, format), quantize_ref(zero, block, format))
        for bad in (float("-inf"), float("nan")):
            x = draw(16, 32)
            x[3, 5] = bad
            q = quantize_triton(x, block, format)
            assert torch.equal(q.scales, quantize_ref(x, block, format).scales)
            assert dequantize(q)[3, :16].isnan().all() and dequantize(q)[0].isnan().all() == (format == "nvfp4")
            rows, columns = operands(x, block, format, transform=format != "mxfp8")
            assert (rows.values * rows.scale)[3, :16].isnan().all() and (columns.values * columns.scale)[
                5
            ].isnan().any()


def test_a_known_maximum_and_rows_that_are_not_contiguous():
    wide = draw(32, 100)
    x = wide[:, 20:68]
    assert_same_bytes(quantize_triton(x, (1, 16), "nvfp4", amax=9.0), quantize_ref(x, amax=torch.tensor(9.0)))
    assert_same_bytes(quantize_triton(x.T, (1, 16), "nvfp4"), quantize_ref(x.T.contiguous()))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows_of_block", [1, 16])
def test_a_packed_product_is_that_of_the_decoded_weights(rows_of_block, dtype):
    for M, N, K in ((1, 48, 160), (3, 16, 1040), (5, 80, 48), (20, 48, 144)):
        weight = quantize_ref(draw(N, K, seed=M), (rows_of_block, 16))
        x = torch.randn(M, K, generator=torch.Generator().manual_seed(M)).to(DEVICE, dtype)
        exact = x.double() @ dequantize(weight).double().T
        got = packed_linear(x, weight)
        assert got.dtype == dtype and (got.double() - exact).norm() <= max(1e-6, torch.finfo(dtype).eps) * exact.norm()
        x[0, 0] = float("nan")
        assert packed_linear(x, weight)[0].isnan().all()


@pytest.mark.parametrize("name", ["nvfp4", "mxfp4", "mxfp8", "without 2D"])
def test_a_layer_is_the_same_on_both_backends(name, monkeypatch):
    NVFP4 = nvfp4.RECIPES["nvfp4"]
    recipes = {**nvfp4.RECIPES, "mxfp8": nvfp4.MXFP8, "without 2D": replace(NVFP4, weight_block=(1, 16))}
    x, weight, dy = (draw(*shape, seed=i) for i, shape in enumerate(((43, 64), (50, 64), (43, 50))))
    outputs = []
    for backend in ("triton", "torch"):
        monkeypatch.setattr(kernels, "BACKEND", backend)
        leaves = [t.clone().requires_grad_() for t in (x, weight)]
        y = nvfp4.quantized_linear(*leaves, recipes[name], 5)
        outputs.append([y, *torch.autograd.grad(y, leaves, dy), nvfp4.quantize(weight[:48]).codes.float()])
    for ours, definition in zip(*outputs):
        assert nvfp4.relative(ours, definition) < 1e-6
