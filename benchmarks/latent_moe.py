"""python -m benchmarks.latent_moe: checks the routed path of a LatentMoE, then times it on a GPU."""

import torch

from benchmarks.expert_kernels import expert_inputs, grouped_mm_experts
from benchmarks.harness import Bench, check_and_time
from expert_kernels import expert_mlp


def latent_experts(x, fc1, up, down, fc2, expert_ids, expert_weights, backend="auto"):
    """Returns the routed path of a LatentMoE for x [S, C]: down to [S, l], through the experts, up to [S, C]."""
    return expert_mlp(x @ fc1.T, up, down, expert_ids, expert_weights, backend) @ fc2.T


def _latent_inputs(randn, S, C, size, width, E, K):
    u, up, down, ids, weights = expert_inputs(randn, S, size, width, E, K)
    return [randn(S, C), randn(size, C) / C**0.5, up, down, randn(C, size) / size**0.5, ids, weights]


def _latent_peers():
    @torch.compile
    def grouped_mm(x, fc1, up, down, fc2, expert_ids, expert_weights):
        return grouped_mm_experts(x @ fc1.T, up, down, expert_ids, expert_weights) @ fc2.T

    yield "torch.grouped_mm", grouped_mm


BENCHES = [
    Bench(
        latent_experts, _latent_inputs, checks=[(70, 40, 16, 24, 12, 5), (9, 33, 10, 50, 3, 3)],
        timings=[(16384, 2688, 672, 1856, 512, 24)],
        cost=lambda S, C, size, F, E, K: (4 * (S * C + E * F * size + C * size), 4 * S * size * (K * F + C)),
        peers=_latent_peers, compiles=False,
    ),
]  # fmt: skip


if __name__ == "__main__":
    check_and_time(BENCHES, "latent_moe")
