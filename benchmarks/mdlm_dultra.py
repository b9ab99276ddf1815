"""python -m benchmarks.mdlm_dultra: the statistics that every rule of masked diffusion reads, timed on a GPU."""

import json
from pathlib import Path

import torch

from benchmarks.harness import milliseconds, provenance
from unmasking import softmax_statistics, softmax_statistics_ref


def bench(N=2048, V=126464):
    """Prints what the kernel takes on the logits of LLaDA, [8 x 256, 126,464], beside a copy of them.

    Writes assets/bench/mdlm_statistics.json.
    """
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.mdlm_dultra: there is no CUDA device")
    logits = 3 * torch.randn(N, V, device="cuda", dtype=torch.bfloat16)
    exact = softmax_statistics_ref(logits[:64].double())
    worst = max((a.double() - b).abs().max().item() for a, b in zip(softmax_statistics(logits[:64]), exact))
    target = torch.empty_like(logits)
    copy, kernel = milliseconds(lambda: target.copy_(logits)), milliseconds(lambda: softmax_statistics(logits))
    eager = milliseconds(lambda: softmax_statistics_ref(logits[:256])) * N / 256
    share = copy / 2 / kernel
    print(f"[{N}, {V}] bfloat16: {kernel:.3f} ms, {share:.0%} of the rate of a copy ({copy:.3f} ms: it writes, too);")
    print(f"PyTorch, in blocks of 256 rows: {eager:.2f} ms. Largest error against float64: {worst:.1e}")
    record = provenance("python -m benchmarks.mdlm_dultra") | dict(kernel_ms=kernel, copy_ms=copy, eager_ms=eager)
    record |= dict(share_of_copy_rate=share, error=worst)
    path = Path(__file__).parent.parent / "assets" / "bench" / "mdlm_statistics.json"
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    bench()
