"""Checks and times kernels: a file of this folder lists its ops as `Bench` rows and calls `check_and_time`.

A check compares the Triton path with the definition in float64, in every output and every gradient. A timing compares
it with the definition under torch.compile, with its peers where they are installed, and with the least time in which
an H200 could move the bytes or do the arithmetic. Timings go to assets/bench/<file>.json, each row with its
`provenance`: command, machine and commit.
"""

import json
import math
import os
import shlex
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from kernels import INTERPRET, triton

ROOT = Path(__file__).resolve().parent.parent
FLOPS, BYTES = 799e12, 4.25e12  # per second: what an H200 reaches on a large bf16 product and a large copy: "the floor"


class Bench(NamedTuple):
    """What to check and to time of one op."""

    op: Callable  # takes backend=
    inputs: Callable  # (randn, *sizes) -> its arguments; float64 stands for the low dtype, float32 for itself
    checks: list  # sizes, small and odd
    timings: list = []  # sizes
    cost: Callable = None  # *sizes -> (bytes, FLOPs) of a forward at the least: inputs read once, outputs written once
    peers: Callable = lambda: ()  # yields (name, function of the same arguments); an ImportError ends it
    compiles: bool = True  # whether torch.compile can make something of the definition
    has_backward: bool = True


def provenance(command=None):
    """Returns dict(command, machine, commit): how, where and from which code a record was made, for each of its rows.

    command: what to type to repeat it; by default the running command, such as "python -m benchmarks.ssd".
    machine: the GPUs (or "CPU") and the versions of torch and triton.
    commit: short hash of HEAD, with "-dirty" if a Python file differs from it. In a copy without git, the environment
    variable GIT_COMMIT, or "unknown".
    """
    if torch.cuda.is_available():
        count, card = torch.cuda.device_count(), torch.cuda.get_device_name()
    else:
        count, card = 1, "CPU"
    machine = f"{f'{count} x ' if count > 1 else ''}{card}, torch {torch.__version__}"
    machine += f", triton {triton.__version__}" if triton else ""
    return dict(command=command or running_command(), machine=machine, commit=commit())


def running_command():
    """Returns how this process was started: "python X.py ..." for a file at top level, else "python -m folder.X"."""
    script = Path(sys.argv[0]).resolve()
    if script.parent == ROOT or not script.is_relative_to(ROOT):
        start = ["python", script.name]
    else:
        start = ["python", "-m", ".".join(script.relative_to(ROOT).with_suffix("").parts)]
    return shlex.join([*start, *sys.argv[1:]])


def commit():
    """Returns the commit that `provenance` speaks of."""

    def git(*args):
        run = subprocess.run(["git", *args], cwd=ROOT, capture_output=True, text=True, check=True)
        return run.stdout.strip()

    try:
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if git("status", "--porcelain", "--", "*.py") else "")
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("GIT_COMMIT", "unknown")


def each(benches, which):
    """Returns (bench, sizes) for each of the "checks" or the "timings"."""
    return [(bench, sizes) for bench in benches for sizes in getattr(bench, which)]


def normal(device):
    """Returns randn(*shape): normal numbers in float64, the same ones every time."""
    return partial(torch.randn, generator=torch.Generator(device).manual_seed(0), device=device, dtype=torch.float64)


def in_low(t, low):
    """Returns t in the dtype `low` if it is a float64 tensor, and unchanged otherwise."""
    return t.to(low) if torch.is_tensor(t) and t.dtype == torch.float64 else t


def installed(peers):
    """Yields the peers that can be imported here."""
    try:
        yield from peers()
    except ImportError:
        pass


def errors(op, inputs, low, **options):
    """Returns a list of (error of Triton, error of the definition in the same dtypes), both against float64.

    One pair for each output and then for each input's gradient, by a random weighting of the outputs; relative
    Frobenius norms. inputs: tensors and other arguments of `op`; those in float64 stand for "the low dtype".
    """
    generator, results = torch.Generator().manual_seed(90), {}
    inputs = [in_low(t, low) for t in inputs]
    for name, backend in (("exact", "torch"), ("reference", "torch"), ("triton", "triton")):
        leaves = []
        for t in inputs:
            if torch.is_tensor(t):
                t = t.double() if name == "exact" and t.is_floating_point() else t
                t = t.detach().clone().requires_grad_(t.is_floating_point())
            leaves.append(t)
        outputs = op(*leaves, backend=backend, **options)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator.manual_seed(90)  # the same weights for each of the three, exact in the low dtype
        weights = [torch.randn(o.shape, generator=generator).to(low).to(o.device, o.dtype) for o in outputs]
        wanted = [t for t in leaves if torch.is_tensor(t) and t.requires_grad]
        loss = sum((o * w).sum() for o, w in zip(outputs, weights))
        results[name] = [*outputs, *torch.autograd.grad(loss, wanted)] if loss.requires_grad else list(outputs)
    pairs = []
    for exact, reference, got in zip(*results.values()):
        if (got.shape, got.dtype) != (reference.shape, reference.dtype):
            raise AssertionError(f"{op.__name__}: {got.shape} {got.dtype}, not {reference.shape} {reference.dtype}")
        pairs.append(tuple(((v.double() - exact).norm() / (exact.norm() + 1e-30)).item() for v in (got, reference)))
    return pairs


def allowed_error(reference, low):
    """Returns the error a kernel may have: 1.5 times the definition's in the same dtype, or what rounding explains.

    The second matters for a handful of numbers, where the definition can be exact by luck.
    """
    return max(1.5 * reference, 2e-6, 0.25 * torch.finfo(low).eps)


def milliseconds(fn):
    """Returns the median time of fn(), the shorter of eager and replayed from a CUDA graph, the L2 cache flushed."""
    eager = triton.testing.do_bench(fn, warmup=5, rep=40, return_mode="median")
    if eager > 2:  # the host keeps up
        return eager
    try:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            fn()
        return min(eager, triton.testing.do_bench(graph.replay, warmup=5, rep=40, return_mode="median"))
    except RuntimeError:  # it synchronises with the host
        return eager


def time_one(fn, inputs, has_backward=True):
    """Returns (forward ms, forward + backward ms, MiB that these take beside inputs and gradients); nan without one."""
    leaves = [t.detach().requires_grad_(t.is_floating_point()) if torch.is_tensor(t) else t for t in inputs]
    wanted = [t for t in leaves if torch.is_tensor(t) and t.requires_grad]
    with torch.no_grad():
        y = fn(*leaves)
        forward = milliseconds(lambda: fn(*leaves))
    if not has_backward:
        return forward, math.nan, math.nan
    dy = torch.randn_like(y)
    both = milliseconds(lambda: torch.autograd.grad(fn(*leaves), wanted, dy))
    del y
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    torch.autograd.grad(fn(*leaves), wanted, dy)
    kept = sum(t.numel() * t.element_size() for t in wanted)
    return forward, both, (torch.cuda.max_memory_allocated() - before - kept) / 2**20


def check(benches, device):
    """Prints how exact every kernel is beside its definition. Raises SystemExit if one is less exact than it may be."""
    print(f"{'check (error / that of the same-dtype definition)':58}{'worst':>8}  output, states, gradients")
    failed = 0
    for low in (torch.float32, torch.float16, torch.bfloat16)[: 3 if device == "cuda" else 2]:
        for bench, sizes in each(benches, "checks"):
            with torch.set_grad_enabled(bench.has_backward):
                pairs = errors(bench.op, bench.inputs(normal(device), *sizes), low)
            bad = [k for k, (got, reference) in enumerate(pairs) if not got <= allowed_error(reference, low)]
            failed += len(bad)
            ratio = max(got / max(reference, allowed_error(reference, low) / 1.5) for got, reference in pairs)
            found = " ".join(f"{got:.0e}" for got, _ in pairs)
            print(f"{bench.op.__name__} {sizes} {str(low)[6:]}".ljust(58) + f"{ratio:8.2f}  {found} {bad or ''}")
    if failed:
        raise SystemExit(f"{failed} results are less exact than 1.5 x the definition's")


def measure(benches, path):
    """Prints the times of every kernel, of its definition compiled and of its peers; writes them to `path` as JSON.

    Rows of other ops that the file has already stay there.
    """
    print(f"\n{'bf16 (floor: that of an H200)':60}{'fwd ms':>8}{'of floor':>9}{'f+b ms':>8}{'of floor':>9}{'MiB':>7}")
    source = provenance()
    names = {bench.op.__name__ for bench in benches}
    record = json.loads(path.read_text()) if path.exists() else dict(rows=[])
    rows = [row for row in record["rows"] if row["op"] not in names]
    for bench, sizes in each(benches, "timings"):
        inputs = [in_low(t, torch.bfloat16) for t in bench.inputs(normal("cuda"), *sizes)]
        n_bytes, n_flops = bench.cost(*sizes)
        floor = 1e3 * max(n_bytes / BYTES, n_flops / FLOPS)
        ours = partial(bench.op, backend="triton")
        definition = torch.compile(partial(bench.op, backend="torch"))
        compiled = [("torch.compile", definition)] if bench.compiles else []
        for who, fn in [("triton", ours), *compiled, *installed(bench.peers)]:
            try:
                forward, both, mib = time_one(fn, inputs, bench.has_backward)
            except Exception as error:  # a peer that does not run here is a row, not the end
                print(f"{bench.op.__name__} {sizes} {who}: {type(error).__name__} {str(error)[:80]}")
                continue
            found = dict(fwd_ms=forward, fwd_bwd_ms=both, extra_mib=mib, floor_fwd_ms=floor)
            rows.append(dict(op=bench.op.__name__, sizes=sizes, who=who, **found, **source))
            print(
                f"{bench.op.__name__} {sizes} {who}"[:59].ljust(60)
                + f"{forward:8.3f}{floor / forward:9.0%}{both:8.3f}{3 * floor / both:9.0%}{mib:7.0f}"
            )
        torch.compiler.reset()
        path.write_text(json.dumps(record | dict(rows=rows), indent=1) + "\n")


def check_and_time(benches, name):
    """Checks all kernels of a file; on a GPU times them too, and writes assets/bench/<name>.json.

    Without a GPU the checks run in Triton's interpreter. Raises SystemExit where there is no Triton, or if a kernel is
    less exact than `allowed_error`.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and triton is None:
        raise SystemExit(f"{name}.py: the package triton is not installed; there is nothing to check")
    if device == "cpu" and not INTERPRET:  # Triton reads this when it is imported: start again
        os.execve(sys.executable, sys.orig_argv, os.environ | {"TRITON_INTERPRET": "1"})
    check(benches, device)
    if device == "cpu":
        print("all exact; timings need a GPU")
    else:
        measure(benches, ROOT / "assets" / "bench" / f"{name}.json")
