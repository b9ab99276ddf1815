"""python -m benchmarks.lla [part ...]: how exact, how fast and how large FlashLLA is, on a GPU."""

import itertools
import json
import sys
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.harness import BYTES, milliseconds, provenance, time_one
from common.runlog import save_plot
from lla import lla_ref, lla_step_triton, lla_triton

PEAK = 989e12  # FLOP/s of an H100 or H200, dense bfloat16


def attention_inputs(kind, B, H, T, D, seed=0):
    """Returns q, k, v, g [B, H, T, D] in bfloat16 and scale: logits of a spread of about 1, of "sharp" 4."""
    normal = partial(torch.randn, device="cuda", generator=torch.Generator("cuda").manual_seed(seed))
    (q, k, v, g), scale = (normal(B, H, T, D) for _ in range(4)), D**-0.5
    if kind in ("unit norm", "rms norm"):  # of length 1 and sqrt(D)
        length = 1 if kind == "unit norm" else D**0.5
        q, k, scale = F.normalize(q, dim=-1) * length, F.normalize(k, dim=-1) * length, D**0.5 / length**2
    if kind == "offset":
        k = k + 3 * normal(1, H, 1, D)
    if kind == "sharp":
        scale = 4 * scale
    return *(t.bfloat16() for t in (q, k, v, g)), scale


def bench_errors(T=4096):
    """Returns rows: the relative errors of output and gradients against the definition in float64."""
    rows = []
    print(f"\nerrors against float64, bf16, T {T}; steps: mean and largest\n{'':34}", end="")
    print("".join(f"{name:>9}" for name in ("o", "dq", "dk", "dv", "dridge")), "  steps")
    for D, ridge, kind in itertools.product(
        (64, 128), (1.0, 0.1), ("gauss", "unit norm", "rms norm", "offset", "sharp")
    ):
        *inputs, g, scale = attention_inputs(kind, 1, 2, T, D)
        inputs.append(torch.full((2,), ridge, device="cuda"))
        used = torch.zeros(2, 1, 2, T, dtype=torch.int32, device="cuda")
        leaves = [t.clone().requires_grad_() for t in inputs]
        o = lla_triton(*leaves, scale=scale, used=used)
        found = [o, *torch.autograd.grad(o, leaves, g)]
        leaves = [t.double().requires_grad_() for t in inputs]
        o = lla_ref(*leaves, scale=scale)
        exact = [o, *torch.autograd.grad(o, leaves, g.double())]
        errors = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, exact)]
        steps = used[0].float().mean().item(), used[0].max().item()
        rows.append(dict(T=T, D=D, ridge=ridge, keys=kind, errors=errors, steps=steps))
        cells = "".join(f"{e:9.1e}" for e in errors)
        print(f"D {D:<4} ridge {ridge:<4} {kind:16}{cells}   {steps[0]:.1f}, {steps[1]}")
        del found, exact, leaves, o
    return rows


def peak_mib(fn, inputs, g):
    """Returns the MiB that fn(*inputs), forward and backward, takes at its peak beside inputs and g."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(fn(*leaves), leaves, g)
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def bench_speed():
    """Returns rows: milliseconds and MiB of LLA and of softmax attention, and the steps that the solves took."""
    rows = []
    print("\nbf16, causal, ridge 1; steps: mean over rows, forward and backward; bound: all products at 989 TFLOP/s")
    print(f"{'':40}{'fwd ms':>9}{'of bound':>9}{'f+b ms':>9}{'of bound':>9}{'MiB':>8}   steps")
    shapes = (4, 16, 4096, 128), (4, 16, 4096, 64), (1, 16, 65536, 64)
    for (B, H, T, D), kind in itertools.product(shapes, ("unit norm", "rms norm", "softmax")):
        q, k, v, g, scale = attention_inputs("unit norm" if kind == "softmax" else kind, B, H, T, D)
        used = torch.zeros(2, B, H, T, dtype=torch.int32, device="cuda")
        ridge = torch.ones(H, device="cuda")
        fn, products, inputs = partial(lla_triton, scale=scale), (5, 16), (q, k, v, ridge)
        if kind == "softmax":
            fn, products, inputs = (
                partial(F.scaled_dot_product_attention, is_causal=True, scale=scale),
                (2, 5),
                (q, k, v),
            )
        else:
            leaves = [t.detach().requires_grad_() for t in inputs]
            torch.autograd.grad(fn(*leaves, used=used), leaves, g)
        forward, both, _ = time_one(fn, inputs)
        mib = peak_mib(fn, inputs, g)
        steps = used.float().mean((1, 2, 3)).tolist()
        product = B * H * T**2 * D / PEAK * 1e3  # ms of one, over the causal half
        bounds = product * (products[0] + 3 * steps[0]), product * (sum(products) + 3 * sum(steps))
        rows.append(
            dict(
                shape=[B, H, T, D],
                keys=kind,
                fwd_ms=forward,
                fwd_bwd_ms=both,
                peak_mib=mib,
                steps=steps,
                bounds_ms=bounds,
            )
        )
        print(f"{str((B, H, T, D)):24}{kind:16}{forward:9.3f}{bounds[0] / forward:9.0%}{both:9.3f}", end="")
        print(f"{bounds[1] / both:9.0%}{mib:8.0f}   {steps[0]:.2f}, {steps[1]:.2f}")
    return rows


def bench_memory(H=16, D=64):
    """Returns name -> [(T, MiB at the peak of forward and backward)] of LLA, softmax attention and the definition."""
    found = {"FlashLLA": [], "softmax attention": [], "the definition": []}
    attend = partial(F.scaled_dot_product_attention, is_causal=True)
    for T in (1024, 2048, 4096, 8192, 16384, 32768, 65536):
        q, k, v, g, scale = attention_inputs("unit norm", 1, H, T, D)
        for name, fn in zip(found, (partial(lla_triton, ridge=1.0), attend, partial(lla_ref, ridge=1.0))):
            if name != "the definition" or T <= 4096:
                found[name].append((T, peak_mib(partial(fn, scale=scale), (q, k, v), g)))
    print(f"\nMiB at the peak of forward + backward, {H} heads of {D}, by tokens")
    for name, points in found.items():
        print(f"{name:18}" + "".join(f"{T:>7}: {mib:<6.0f}" for T, mib in points))
    plot_memory(found, Path("out/lla_memory.png"))
    return found


def plot_memory(found, path):
    """Draws the memory of the three against the length of the sequence, and writes it to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=150, layout="constrained")
    for (name, points), color in zip(found.items(), ("#009E73", "#D55E00", "#999999")):
        axes.plot(*zip(*points), marker="o", markersize=3, color=color)
        below = name == "softmax attention"
        offset = dict(xytext=(0, -22 if below else 8), textcoords="offset points", ha="right")
        axes.annotate(name, points[-1], color=color, **offset)
    axes.set(
        xscale="log",
        yscale="log",
        ylim=(8, 3e4),
        xlabel="tokens (16 heads of 64)",
        ylabel="peak MiB, forward + backward",
    )
    axes.set_xticks([2**n for n in range(10, 17)], [f"{2**n // 1024}k" for n in range(10, 17)])
    axes.grid(alpha=0.3)
    ratio = found["FlashLLA"][-1][1] / found["softmax attention"][-1][1]
    axes.set_title(f"FlashLLA: {ratio:.1f} times the memory of softmax attention, at any length", fontsize=11)
    save_plot(figure, path)


def bench_step():
    """Returns rows: microseconds of one new token at a cache, beside softmax attention at the same cache."""
    rows = []
    print(f"\none new token, bf16{'':21}{'lla_step us':>12}{'softmax us':>12}{'ratio':>7}{'floor us':>10}")
    for B, H, Hkv, S, D in (
        (1, 16, 16, 65536, 64),
        (8, 16, 16, 8192, 64),
        (1, 16, 16, 65536, 128),
        (1, 32, 8, 65536, 128),
    ):
        q, ridge = torch.randn(B, H, D, device="cuda").bfloat16(), torch.ones(H, device="cuda")
        k, v = (torch.randn(B, Hkv, S, D, device="cuda").bfloat16() for _ in "kv")
        length = torch.tensor(S, device="cuda")
        ours = 1e3 * milliseconds(partial(lla_step_triton, q, k, v, ridge, length))
        softmax = partial(F.scaled_dot_product_attention, q[:, :, None], k, v, enable_gqa=True)
        softmax = 1e3 * milliseconds(softmax)
        floor = 4 * k.numel() / BYTES * 1e6
        rows.append(dict(shape=[B, H, Hkv, S, D], lla_step_us=ours, softmax_us=softmax, floor_us=floor))
        print(f"{str((B, H, Hkv, S, D)):40}{ours:12.1f}{softmax:12.1f}{ours / softmax:7.2f}{floor:10.1f}")
    return rows


def bench(parts):
    """Measures and prints each of `parts` (if empty: errors, speed, memory, step); writes assets/bench/lla.json.

    Records of parts that are not measured stay in that file. memory also draws out/lla_memory.png.
    """
    known = dict(speed=bench_speed, step=bench_step, errors=bench_errors, memory=bench_memory)
    if unknown := set(parts) - known.keys():
        raise SystemExit(f"unknown part {min(unknown)!r}; usage: python -m benchmarks.lla [{'] ['.join(known)}]")
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.lla: there is no CUDA device; the tests check the kernels without one")
    path = Path(__file__).parent.parent / "assets" / "bench" / "lla.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    print(provenance()["machine"])
    for part in parts or known:
        record[part] = dict(**provenance(f"python -m benchmarks.lla {part}"), found=known[part]())
        path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    bench(sys.argv[1:])
