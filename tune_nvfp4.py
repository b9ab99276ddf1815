"""Scratch: times variants of nvfp4's kernels on the GPU. python tune_nvfp4.py"""

import time

import torch
import torch.nn.functional as F
import triton

import nvfp4
import nvfp4_triton as nt
import asm_triton as at
import packed_triton as pt

start = time.time()
T, C = 65536, 768


def ms(fn):
    fn()
    torch.cuda.synchronize()
    g = torch.cuda.CUDAGraph()
    with torch.cuda.graph(g):
        fn()
    return triton.testing.do_bench(g.replay, warmup=3, rep=15, return_mode="median")


def say(*a):
    print(f"{time.time() - start:5.1f}s", *a, flush=True)


x = torch.randn(T, C, device="cuda").bfloat16()
big = torch.randn(T, 3072, device="cuda").bfloat16()
y = torch.empty_like(big)
copy = 2 * big.numel() * 2 / ms(lambda: y.copy_(big)) * 1e3
say(torch.cuda.get_device_name(), f"copy {copy / 1e12:.2f} TB/s", torch.__version__, triton.__version__)
t = ms(lambda: big.abs().amax())
say(f"torch abs().amax {t:.3f} ms")
partial = torch.empty(2, 512, dtype=torch.int32, device="cuda")
scale = torch.empty(2, device="cuda")
seed = torch.tensor(5, device="cuda")
rows, columns = torch.empty_like(big), torch.empty_like(big)
codes = torch.empty(T, 3072 // 8, dtype=torch.int32, device="cuda")
scales = torch.empty(T, 3072 // 16, dtype=torch.uint8, device="cuda")
n = big.numel()
for had in (False, True):
    for runs, width, warps in ((4, 128, 4), (2, 128, 4), (4, 128, 8), (2, 256, 4)):
        t = ms(lambda: nt._amax_kernel[(512,)](big, partial, T, 3072, 3072, N_PARTIAL=512, N=16, HADAMARD=had,
                                               SIGNS=nvfp4.SIGNS, RUNS=runs, WIDTH=width, num_warps=warps))  # fmt: skip
        say(f"amax had={had} {runs}x{width} w{warps}: {t:.3f} ms {2 * n / t * 1e3 / copy:.0%} of copy")


def pack(sr, by_rows, by_columns, packed, runs, width, warps, per):
    r = ((codes, scales, None) if packed else (None, None, rows)) if by_rows else (None,) * 3
    tiles = T // (runs * 16) * (3072 // width)
    return lambda: nt._pack_kernel[(-(-tiles // per),)](
        big, partial, seed, scale, *r, columns if by_columns else None, T, 3072, 3072, T, 3072, FORMAT="nvfp4",
        STOCHASTIC=sr, BR=1, BC=16, HADAMARD=True, SIGNS=nvfp4.SIGNS, N_PARTIAL=512, RUNS=runs, WIDTH=width,
        num_warps=warps)  # fmt: skip


for name, args, nbytes in (
    ("rows packed", (False, True, False, True), 2.5625), ("rows packed SR", (True, True, False, True), 2.5625),
    ("x both", (False, True, True, False), 6), ("x rows", (False, True, False, False), 4),
    ("x columns", (False, False, True, False), 4), ("dy both", (True, True, True, False), 6),
):  # fmt: skip
    for runs, width, warps in ((4, 128, 4), (4, 64, 4), (2, 128, 4)):
        for per in (4, 16) if runs * width == 512 and warps == 4 else (4,):
            try:
                t = ms(pack(*args, runs, width, warps, per))
                say(f"{name}: {runs}x{width} w{warps} per {per}: {t:.3f} ms {nbytes * n / t * 1e3 / copy:.0%} of copy")
            except Exception as e:
                say(name, runs, width, warps, type(e).__name__, str(e)[:100])

for N, K in ((15680, 4480), (8192, 8192), (4480, 15680), (22656, 4480), (5144, 768)):
    w = torch.randn(N, K, device="cuda")
    q = nt.quantize_triton(w, (16, 16), "nvfp4")
    copies = max(1, min(8, int(3e8 / (N * K * 2))))
    wb = [w.bfloat16() for _ in range(copies)]
    qs = [q._replace(codes=q.codes.clone()) for _ in range(copies * 4)]
    v = torch.randn(1, K, device="cuda").bfloat16()
    base = ms(lambda: [F.linear(v, a) for a in wb]) / len(wb)
    found = []
    for tiles in ((8, 128, 4), (16, 128, 4), (4, 128, 4), (8, 64, 2), (16, 64, 2), (4, 64, 2), (8, 32, 1), (16, 32, 1),
                  (8, 256, 8), (4, 32, 1)):  # fmt: skip
        pt._vector_tiles = lambda N: dict(zip(("ROWS", "WIDTH", "num_warps"), tiles))
        t = ms(lambda: [pt.packed_linear(v, a) for a in qs]) / len(qs)
        found.append((base / t, tiles))
    exact = v.double() @ nvfp4.dequantize(q).double().T
    error = lambda y: ((y.double() - exact).norm() / exact.norm()).item()  # noqa: E731
    say("errors", error(F.linear(v, nvfp4.dequantize(q).bfloat16())), error(pt.packed_linear(v, q)),
        error(at.asm_linear(v, q)))  # fmt: skip
    for tiles in ((32, 256, 3, 4), (64, 256, 3, 4), (16, 512, 3, 2)) if N > 6000 else ():
        try:
            t = ms(lambda: [at.asm_linear(v, a, 16, *tiles) for a in qs]) / len(qs)
            found.append((base / t, ("asm", *tiles)))
        except Exception as e:
            say("asm", tiles, type(e).__name__, str(e)[:100])
    found.sort(reverse=True)
    say(f"{N}x{K}: bf16 {base * 1e3:.1f} us ({2 * N * K / base * 1e3 / copy:.0%} of copy);",
        " ".join(f"{g:.2f}x{str(t).replace(' ', '')}" for g, t in found[:8]), f"worst {found[-1][0]:.2f}")  # fmt: skip
    if N == 15680:
        for M in (8, 16, 64, 256):
            v = torch.randn(M, K, device="cuda").bfloat16()
            us = [ms(f) * 1e3 for f in (lambda: F.linear(v, wb[0]), lambda: pt.packed_linear(v, q),
                                          lambda: at.asm_linear(v, q, 16 if M < 64 else 64, 64, 128))]  # fmt: skip
            say(f"  M={M}: {us[0]:.1f} us, packed {us[1]:.1f} us, asm {us[2]:.1f} us")
