"""python -m benchmarks.expert_kernels: checks the experts of a mixture, then times them on a GPU.

Their rows are in assets/bench/kernels.json, beside those of benchmarks.kernels.
"""

import torch
import torch.nn.functional as F

from benchmarks.harness import Bench, check_and_time
from expert_kernels import expert_mlp


def expert_inputs(randn, S, C, width, E, K, skew=0):
    """Returns the arguments of `expert_mlp`, at random. skew: how much likelier the last experts are than the first."""
    ids = (randn(S, E) + skew * torch.linspace(0, 1, E, device=randn.keywords["device"])).topk(K).indices
    return [
        randn(S, C),
        randn(E, width, C) / C**0.5,
        randn(E, C, width) / width**0.5,
        ids,
        randn(S, K).float().sigmoid(),
    ]


def grouped_mm_experts(x, up, down, expert_ids, expert_weights):
    """Returns `expert_mlp_ref(...)` by torch's grouped product: rows sorted, gathered, multiplied, put back, summed."""
    (S, K), ids = expert_ids.shape, expert_ids.flatten()
    order = ids.argsort(stable=True)
    ends = torch.zeros(len(up), dtype=torch.int32, device=x.device).scatter_add_(0, ids, torch.ones_like(ids).int())
    ends = ends.cumsum(0, dtype=torch.int32)
    hidden = F.relu(F.grouped_mm(x[order // K], up.mT, offs=ends)).square()
    out = F.grouped_mm(hidden, down.mT, offs=ends)[order.argsort()].view(S, K, -1)
    return (out * expert_weights[:, :, None]).sum(1).to(x.dtype)


def _expert_peers():
    yield "torch.grouped_mm", torch.compile(grouped_mm_experts)


BENCHES = [
    Bench(
        expert_mlp, expert_inputs, checks=[(70, 40, 24, 5, 2), (9, 33, 50, 3, 3)],
        timings=[(16384, 2688, 1856, 128, 6), (16384, 2688, 1856, 128, 6, 3), (32768, 768, 512, 32, 4)],
        cost=lambda S, C, F, E, K, skew=0: (4 * (S * C + E * F * C), 4 * S * K * F * C),
        peers=_expert_peers, compiles=False,
    ),
]  # fmt: skip


if __name__ == "__main__":
    check_and_time(BENCHES, "kernels")
