"""python -m experiments.ssd: three forms of the layer and softmax attention over lengths, and the paper's claims."""

import json
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.harness import provenance
from common.runlog import save_plot
from kernels import pick_backend
from ssd import ssd, ssd_recurrent_ref, ssd_ref


def _seconds(fn):
    """Returns the best time of three calls of fn(), after one to warm up."""
    best = float("inf")
    for attempt in range(4):
        begin = time.perf_counter()
        fn()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        if attempt:
            best = min(best, time.perf_counter() - begin)
    return best


ON_GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if ON_GPU else ("cpu", torch.float32)
H, P, N = (24, 64, 128) if ON_GPU else (4, 64, 64)


def inputs(T, N=N, dtype=DTYPE):
    """Returns x, dt, A, Bmat, Cmat of one sequence at random; dt and A are float32."""
    randn = partial(torch.randn, generator=torch.Generator().manual_seed(0))
    x, dt = randn(1, T, H, P), F.softplus(randn(1, T, H) - 2)
    A, b, c = -torch.exp(randn(H)), randn(1, T, 1, N), randn(1, T, 1, N)
    return [v.to(DEVICE, v.dtype if v is dt or v is A else dtype) for v in (x, dt, A, b, c)]


def main():
    """Times the three forms of the layer and softmax attention over lengths; prints the claims, draws out/ssd.png."""
    on_gpu, device, dtype = ON_GPU, DEVICE, DTYPE
    lengths = [2**k for k in (range(10, 18) if on_gpu else range(8, 15))]
    longest = dict(recurrence=4096, attention_form=4096)  # a loop in Python; a T x T matrix in memory
    scan = f"SSD ({pick_backend(device=device, dtype=dtype)})"
    forms = {
        "recurrence": lambda x, dt, A, b, c: ssd_recurrent_ref(x, dt, A, b, c),
        "attention_form": lambda x, dt, A, b, c: ssd_ref(x, dt, A, b, c, chunk_size=x.shape[1]),
        scan: lambda x, dt, A, b, c: ssd(x, dt, A, b, c, chunk_size=64),
        "softmax attention": lambda x, *_: F.scaled_dot_product_attention(*3 * [x.transpose(1, 2)], is_causal=True),
    }

    took = {name: {} for name in forms}
    with torch.no_grad():
        for T in lengths:
            given = inputs(T)
            for name, form in forms.items():
                if T <= longest.get(name, T):
                    took[name][T] = _seconds(lambda: form(*given))  # noqa: B023
            print(f"T = {T:6d}: " + ", ".join(f"{name} {1e3 * t[T]:.3g} ms" for name, t in took.items() if T in t))
        exact = inputs(1024, dtype=torch.float64)
        exact[1:3] = (v.double() for v in exact[1:3])
        results = [ssd_recurrent_ref(*exact), ssd_ref(*exact, chunk_size=1024), ssd_ref(*exact, chunk_size=64)]
        apart = max(((r - results[0]).norm() / results[0].norm()).item() for r in results)
        T = lengths[-2]
        wide, narrow = (_seconds(lambda: forms[scan](*inputs_N)) for inputs_N in (inputs(T, 128), inputs(T, 16)))  # noqa: B023

    record(took, claims(took, scan, lengths, apart, wide / narrow))


def claims(took, scan, lengths, apart, wider):
    """Returns rows (claim, the paper's figure on an A100, ours)."""
    T = lengths[-2]
    ssd_times, attention_times = took[scan], took["softmax attention"]
    ahead = [T for T in lengths if all(ssd_times[t] < attention_times[t] for t in lengths if t >= T)]
    at = min(16384, lengths[-1])
    return [
        ("recurrence = attention form = chunks", "the same function", f"apart by {apart:.0e} (float64)"),
        ("time grows with the text, not its square", "linear", f"x {ssd_times[2 * T] / ssd_times[T]:.2f} for T x 2"),
        ("faster than softmax attention", "from T = 2,048", f"from T = {ahead[0]:,}" if ahead else "not here"),
        (f"how much faster at T = {at:,}", "6 x at 16,384", f"{attention_times[at] / ssd_times[at]:.1f} x"),
        ("a state 8 times as large, N 16 -> 128", "costs little", f"x {wider:.2f} in time"),
        ("faster than the recurrence step by step", "2 to 8 x (fused)",
         f"{took['recurrence'][4096] / ssd_times[4096]:.0f} x (a Python loop), T = 4,096"),
    ]  # fmt: skip


def record(took, rows):
    """Prints the claims, draws the plot, and writes assets/bench/ssd_claims.json on a GPU."""
    machine = torch.cuda.get_device_name() if ON_GPU else "CPU"
    print(f"\n{'claim':44}{'paper, A100':20}here, {machine}, {H} heads, P {P}, N {N}, forward")
    for claim, paper, here in rows:
        print(f"{claim:44}{paper:20}{here}")
    plot(took, rows[3], machine)
    if ON_GPU:
        path = Path(__file__).parent.parent / "assets" / "bench" / "ssd_claims.json"
        found = dict(claims=rows, ms={name: {T: 1e3 * t for T, t in times.items()} for name, times in took.items()})
        path.write_text(json.dumps(provenance("python -m experiments.ssd") | found, indent=1) + "\n")


def plot(took, row, machine):
    """Draws time over length to out/ssd.png."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=150, layout="constrained")
    for (name, times), color in zip(took.items(), ("#999999", "#E69F00", "#0072B2", "#D55E00")):
        axes.loglog(list(times), [1e3 * t for t in times.values()], marker="o", markersize=3, color=color, base=2)
        T = max(times)
        at = (T, 1e3 * times[T])
        axes.annotate(name.replace("_", " "), at, xytext=(5, 0), textcoords="offset points", color=color)
    axes.set_yscale("log", base=10)
    axes.margins(x=0.25)
    title = f"{machine}: SSD is {row[2]} as fast as attention {row[0][16:]}"
    axes.set(xlabel="tokens", ylabel="forward, ms", title=title)
    axes.grid(alpha=0.3)
    path = Path(__file__).parent.parent / "out" / "ssd.png"
    save_plot(figure, path)


if __name__ == "__main__":
    main()
