"""Mixture of experts, and LatentMoE: the same layer with narrower experts, and more of them, at equal cost.

Papers   LatentMoE, arXiv:2601.18089; Nemotron 3 Nano and Super, arXiv:2512.20848 and 2604.12374 (layers, recipe);
         "Auxiliary-Loss-Free Load Balancing", arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437 (the sequence-wise loss).
Idea     A mixture of experts is an MLP in many parts, of which each token uses a few. Beside arithmetic, its cost grows
         with width: the tokens sent to the experts and the expert weights read are as wide as the model. LatentMoE
         projects a token down to `latent_size` before it is sent, and projects the sum of its experts' outputs up
         again. The saving pays for alpha = hidden_size / latent_size times as many experts, and for nearly alpha times
         as many experts for each token.
Picture  S tokens of width C, E experts with F hidden units, K experts for each token; l is the latent size

         x [S,C] --router (C wide)--> scores [S,E] --+ bias, top K--> ids, weights [S,K]
            |                                                            |
            |---- fc1 ----> [S,l] --> sum_k w_k down relu(up .)^2 <------'   fc1, fc2: LatentMoE only, else l = C
            |                             '--> [S,l] -- fc2 --> [S,C] --.
            '---- shared expert: one MLP that every token uses ---------+--> y [S,C]

Symbols  code                           paper   meaning
         n_routed_experts               N       experts to choose from
         num_experts_per_tok            K       experts for each token
         moe_intermediate_size          m       hidden units of an expert
         latent_size                    l       width of an expert's input and output, C / alpha
         e_score_correction_bias        b       added to the scores when experts are chosen, but not to their weights
Limits   One expert with weight 1 is an MLP; latent_size = C with identity projections is the standard layer; with all
         experts chosen the layer is a dense sum: see tests/test_latent_moe.py.
Differs  The paper writes softmax scores. The released models, and so this file, score with a sigmoid.
Files    latent_moe.py + expert_kernels.py + kernels.py: 1,963 lines in all
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from expert_kernels import expert_mlp
from kernels import at_least_float32, no_autocast

# ---- 1. configuration -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MoEConfig:
    """The shape of a layer. Raises ValueError for a shape that cannot be built, and says what to change."""

    hidden_size: int  # C, width of what comes in and goes out
    n_routed_experts: int = 8  # E (the paper's N), experts to choose from
    num_experts_per_tok: int = 2  # K, experts for each token
    moe_intermediate_size: int = 128  # F (the paper's m), hidden units of an expert
    moe_shared_expert_intermediate_size: int = 256  # hidden units of the shared expert
    latent_size: int | None = None  # l, width of an expert's input; None: hidden_size, the standard layer
    n_group: int = 1  # groups of experts
    topk_group: int = 1  # groups from which a token may choose
    norm_topk_prob: bool = True  # whether a token's weights are divided by their sum
    routed_scaling_factor: float = 1.0  # the weights are then multiplied by this
    mlp_bias: bool = False  # biases in the shared expert and the latent projections; the experts never have any

    def __post_init__(self):
        sizes = [self.hidden_size, self.n_routed_experts, self.num_experts_per_tok, self.moe_intermediate_size,
                 self.moe_shared_expert_intermediate_size, self.expert_size, self.n_group, self.topk_group]  # fmt: skip
        if min(sizes) < 1:
            raise ValueError(f"every size of a mixture of experts must be at least 1: {self}")
        if self.n_routed_experts % self.n_group or self.topk_group > self.n_group:
            raise ValueError(
                f"n_routed_experts={self.n_routed_experts} must be a multiple of n_group={self.n_group}, "
                f"and topk_group={self.topk_group} at most n_group"
            )
        group = self.n_routed_experts // self.n_group
        if self.n_group > 1 and group < 2:
            raise ValueError(f"groups are ranked by their two best experts; n_group={self.n_group} leaves {group}")
        if self.num_experts_per_tok > group * self.topk_group:
            raise ValueError(
                f"num_experts_per_tok={self.num_experts_per_tok}, but a token may choose from "
                f"{group * self.topk_group} experts; lower it, or raise n_routed_experts or topk_group"
            )

    @property
    def expert_size(self):
        """Width of an expert's input and output."""
        return self.hidden_size if self.latent_size is None else self.latent_size


# ---- 2. choosing experts ----------------------------------------------------------------------------------


def choose_experts(scores, bias, config):
    """Returns (ids [S, K] int64, weights [S, K]): the experts of each token, and their weights in the sum.

    scores [S, E], sigmoid(router logits), float32; bias [E]. The biased score decides which experts are chosen. Their
    weights come from the score without bias, so that balancing the load changes nothing else in the layer.
    Source: `NemotronHTopkRouter`; DeepSeek-V3, equations (13) to (16).
    """
    biased = scores + bias
    if config.n_group > 1:
        groups = biased.unflatten(-1, (config.n_group, -1))  # [S, n_group, E / n_group]
        best = groups.topk(2).values.sum(-1).topk(config.topk_group).indices  # [S, topk_group]
        allowed = torch.zeros_like(groups[..., 0], dtype=torch.bool).scatter(-1, best, True)  # [S, n_group]
        biased = groups.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)  # [S, E]
    ids = biased.topk(config.num_experts_per_tok).indices
    weights = scores.gather(-1, ids)
    if config.norm_topk_prob:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * config.routed_scaling_factor


# ---- 3. keeping the load even -----------------------------------------------------------------------------
#
# A router left to itself sends all tokens to the few experts that were slightly better at the start. Two weak forces
# prevent it. A bias on the choice moves by a fixed step towards the experts with too few tokens; it has no gradient, so
# it does not compete with the language model. And a small loss evens out the load within each sequence.


def update_bias(bias, counts, rate=1e-3):
    """Moves bias [E] in place: b_i += rate * sign(mean(counts) - counts_i). counts [E] int64: tokens of each expert.

    Call it after the optimizer's step, with the counts of the whole batch; rate may be a tensor.
    Source: arXiv:2408.15664, Alg. 1.
    """
    bias.add_(torch.sign(counts.sum() - len(counts) * counts) * rate)  # both sides times E: exact in integers


def sequence_balance_loss(scores, top_k, counted):
    """Returns E sum_i f_i p_i, averaged over the sequences; 1 if every expert has an equal share. scores [..., T, E].

    f_i = the fraction of the sequence's top-k choices that are expert i (by scores without bias; no gradient);
    p_i = the mean over the sequence of expert i's share of a token's scores.
    counted bool [..., T]: the tokens that the sequence consists of, False on padding. A sequence without any is left
    out. Source: DeepSeek-V3, equations (17) to (20); the top-k by scores without bias is Megatron-LM's.
    """
    n = counted.sum(-1, keepdim=True)  # [B, 1], tokens of each sequence
    weights = (counted / n.clamp(min=1)).to(scores.dtype)[..., None]  # [B, T, 1], 1 / n or 0
    shares = scores / scores.sum(-1, keepdim=True)  # [B, T, E]
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(top_k).indices, 1.0)  # [B, T, E]
    f, p = (chosen * weights).sum(-2) / top_k, (shares * weights).sum(-2)  # [B, E]
    return scores.shape[-1] * (f.detach() * p).sum() / (n > 0).sum().clamp(min=1)


def expert_load(scores, ids, counted):
    """Returns (balance loss [], counts [E] int64, entropy []) of a forward: how even its load is.

    scores [B, T, E]; ids [B * T, K], the experts chosen; counted bool [B, T], False on padding. balance:
    `sequence_balance_loss`, with its gradient; counts: tokens of each expert; entropy: the sum over the tokens of the
    entropy of their normalised scores, in nats.
    """
    times = counted.reshape(-1, 1).expand_as(ids).flatten().long()  # [B * T * K]: each choice counts once, or not
    counts = torch.zeros(scores.shape[-1], dtype=torch.int64, device=ids.device)
    counts = counts.scatter_add(0, ids.flatten(), times)  # bincount would wait for the device
    shares = scores.detach() / scores.detach().sum(-1, keepdim=True)
    entropy = (torch.special.entr(shares).sum(-1) * counted).sum()
    return sequence_balance_loss(scores, ids.shape[-1], counted), counts, entropy


def load_metrics(counts, entropy):
    """Returns how even the load is: a dict of scalars. counts [E], tokens of each expert; entropy, see below.

    load_max        tokens of the busiest expert / mean over the experts: 1 is even, E / K is collapse
    dead_experts    fraction of the experts that got no token
    router_entropy  `entropy`, the mean entropy of a token's normalised scores in nats, / ln E: 1 means no preference
    """
    counts = counts.float()
    return dict(
        load_max=counts.max() / counts.mean().clamp(min=1e-20),
        dead_experts=(counts == 0).float().mean(),
        router_entropy=entropy / math.log(max(2, len(counts))),
    )


# ---- 4. the layer -----------------------------------------------------------------------------------------


class MLP(nn.Module):
    """down(relu(up x)^2), no gate."""

    def __init__(self, hidden_size, intermediate_size, bias=False):
        super().__init__()
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias)

    def forward(self, x):
        """Returns [..., hidden_size] of x [..., hidden_size]."""
        return self.down_proj(F.relu(self.up_proj(x)).square())


class Experts(nn.Module):
    """The matrices of all experts, stacked."""

    def __init__(self, config):
        super().__init__()
        E, width, size = config.n_routed_experts, config.moe_intermediate_size, config.expert_size
        self.up_proj = nn.Parameter(torch.empty(E, width, size))
        self.down_proj = nn.Parameter(torch.empty(E, size, width))
        self.product = None  # (x [n, I], weight [O, I]) -> [n, O] in place of x weight^T, if set (nvfp4.py)
        self.reset_parameters()

    @torch.compiler.disable  # with the reshaping: of a view that leaves a compiled graph, torch 2.11 can lose the shape
    def forward(self, u, ids, weights):
        """Returns [..., l] of u [..., l]; ids, weights [S, K]: the experts of each token, and what each counts."""
        y = expert_mlp(u.flatten(0, -2), self.up_proj, self.down_proj, ids, weights, product=self.product)
        return y.view(u.shape)

    def reset_parameters(self):
        """Draws the weights."""
        nn.init.normal_(self.up_proj, std=0.02)
        nn.init.normal_(self.down_proj, std=0.02)


class Router(nn.Module):
    """Scores every expert for every token, in float32: in bfloat16 the bias would lose its steps of 0.001."""

    def __init__(self, config):
        super().__init__()
        E = config.n_routed_experts
        self.weight = nn.Parameter(torch.empty(E, config.hidden_size))
        self.register_buffer("e_score_correction_bias", at_least_float32(torch.empty(E)))
        self.register_buffer("counts", None, persistent=False)  # [E] int64, tokens of each expert since the last reset
        self.register_buffer("entropy", None, persistent=False)  # sum over those tokens of the entropy of their scores
        self.reset_parameters()

    def reset_parameters(self):
        """Draws the weight, and sets bias and counts to zero."""
        nn.init.normal_(self.weight, std=0.02)
        self.reset_bias()

    def reset_bias(self):
        """Sets bias and counts to zero."""
        self.e_score_correction_bias.zero_()
        self.reset_counts()

    def _apply(self, fn, recurse=True):
        """Applies fn to parameters and buffers, as .to() does, but keeps the bias in float32 if fn casts to 16 bits."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        cast = self.e_score_correction_bias
        if cast.dtype in (torch.float16, torch.bfloat16):
            self.e_score_correction_bias = (
                torch.empty_like(cast, dtype=bias.dtype) if bias.is_meta else bias.to(cast.device)
            )
        return self

    def _load_from_state_dict(self, *args):
        """Takes the weights of a state_dict; what was counted until now, or never was set, is not in it."""
        super()._load_from_state_dict(*args)
        self.reset_counts()

    def reset_counts(self):
        """Sets counts and entropy to zero."""
        self.counts = torch.zeros_like(self.e_score_correction_bias, dtype=torch.int64)
        self.entropy = torch.zeros_like(self.e_score_correction_bias[0])

    def forward(self, x):
        """Returns scores [..., E] in (0, 1), float32, for x [..., C]."""
        with no_autocast(x.device):
            return F.linear(at_least_float32(x), at_least_float32(self.weight)).sigmoid()


class MoE(nn.Module):
    """A mixture of experts; with config.latent_size, a LatentMoE. Parameter names: those of `transformers`' NemotronH.

    A forward changes nothing in the layer, so that it may be computed again (activation checkpointing) and the layer be
    copied. In training it returns its load beside y, which a `Load` takes:

        load = Load(counted)                      # bool [B, T], False on padding
        y = load.add(moe, *moe(x, load.counted))  # as many layers, as often as you like
        loss = ... + 1e-4 * load.finish()         # then backward, the optimizer's step, and moe.balance()
    """

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.gate = Router(config)
        self.experts = Experts(config)
        C, bias = config.hidden_size, config.mlp_bias
        self.shared_experts = MLP(C, config.moe_shared_expert_intermediate_size, bias)
        if config.latent_size is not None:
            self.fc1_latent_proj = nn.Linear(C, config.latent_size, bias)
            self.fc2_latent_proj = nn.Linear(config.latent_size, C, bias)

    def reset_parameters(self):
        """Draws all weights anew, as a new layer does: after `to_empty`, if the layer was made on the meta device."""
        for module in self.modules():
            if module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()

    def forward(self, x, counted=None):
        """Returns y [..., T, C] of x [..., T, C].

        counted bool [..., T] or None: the tokens whose load is wanted, False on padding. With it, returns (y, balance,
        counts, entropy), see `expert_load`; flat, as a checkpoint with use_reentrant=True loses nested gradients.
        """
        scores = self.gate(x)  # [B, T, E]
        ids, weights = choose_experts(scores.flatten(0, -2), self.gate.e_score_correction_bias, self.config)  # [S, K]
        latent = self.config.latent_size is not None
        u = self.fc1_latent_proj(x) if latent else x  # [B, T, l]
        o = self.experts(u, ids, weights)  # [B, T, l]
        y = (self.fc2_latent_proj(o) if latent else o) + self.shared_experts(x)
        return y if counted is None else (y, *expert_load(scores, ids, counted))

    def balance(self, rate=1e-3):
        """Returns the `load_metrics` since the last call, after moving the bias by the counts and resetting them."""
        gate, K = self.gate, self.config.num_experts_per_tok
        metrics = load_metrics(gate.counts, gate.entropy * K / gate.counts.sum().clamp(min=1))
        update_bias(gate.e_score_correction_bias, gate.counts, rate)
        gate.reset_counts()
        return metrics


class Load:
    """Takes the load of mixtures of experts in one forward of a model, where the layers are called: see `new_load`."""

    def __init__(self, counted):
        self.counted = counted  # bool [B, T]: the tokens whose load is wanted, False on padding
        self.taken = []  # (MoE, balance [], counts [E], entropy []) of each call

    def add(self, moe, y, *numbers):
        """Returns y, and takes the numbers: (y, *numbers) is what `moe`, or a layer around it, returned."""
        self.taken.append((moe, *numbers))
        return y

    def finish(self):
        """Returns the sum of the balance losses, [] or 0.0, and adds the tokens to those that each MoE has counted."""
        for moe, _, counts, entropy in self.taken:
            moe.gate.counts += counts
            moe.gate.entropy += entropy.detach()
        return sum((balance for _, balance, _, _ in self.taken), start=0.0)


def new_load(model, counted):
    """Returns a Load for a forward of a model in training with gradients; None for any other, which is not counted.

    counted bool [B, T]: the tokens whose load is wanted, False on padding.
    """
    return Load(counted) if model.training and torch.is_grad_enabled() else None


def before_padding(wanted):
    """Returns bool [B, T]: False behind the last position of each row that is wanted [B, T], where only padding is."""
    return wanted.flip(1).cumsum(1).flip(1) > 0


@torch.no_grad()
def balance_routers(moe_layers, rate=1e-3):
    """Moves each router's bias towards an even load, by the tokens counted since the last call, in all processes.

    The part of a training step that has no gradient. rate: a number, or a tensor that is 0 where the optimiser's step
    was left out. Returns metrics: of `load_metrics` the worst layer's load_max, else the mean over the layers.
    """
    if not moe_layers:
        return {}
    if dist.is_available() and dist.is_initialized():
        rows = [torch.cat([moe.gate.counts.double(), moe.gate.entropy[None].double()]) for moe in moe_layers]
        counted = torch.stack(rows)  # [layers, E + 1]
        dist.all_reduce(counted)
        for moe, row in zip(moe_layers, counted):
            moe.gate.counts, moe.gate.entropy = row[:-1].long(), row[-1].float()
    metrics = [moe.balance(rate) for moe in moe_layers]
    together = {name: torch.stack([layer[name] for layer in metrics]) for name in metrics[0]}
    return {name: v.max() if name == "load_max" else v.mean() for name, v in together.items()}


# ---- 5. what it costs -------------------------------------------------------------------------------------


def to_latent(config, alpha, more_experts=True):
    """Returns the LatentMoE that costs what the standard layer `config` costs, with latent_size = hidden_size / alpha.

    It has alpha times as many experts, so the routed experts store as many parameters as before. Each token uses as
    many experts as its active parameters allow once the two projections and the longer router are paid for; this is how
    6 of 128 experts become 22 of 512 in the paper. more_experts=False keeps the number of experts, the paper's
    ablation that loses quality.
    Raises ValueError if alpha does not divide hidden_size, or if the projections leave nothing for the experts.
    """
    C, width = config.hidden_size, config.moe_intermediate_size
    if config.latent_size is not None or C % alpha:
        raise ValueError(f"need a standard layer whose hidden_size={C} is a multiple of alpha={alpha}")
    size, E = C // alpha, config.n_routed_experts * (alpha if more_experts else 1)
    price = 2 * C * size + (E - config.n_routed_experts) * C  # the projections, and the router's new rows
    top_k = (2 * C * width * config.num_experts_per_tok - price) // (2 * size * width)
    if top_k < 1:
        raise ValueError(f"alpha={alpha}: the projections alone cost as much as the experts; take a smaller alpha")
    return replace(config, latent_size=size, n_routed_experts=E, num_experts_per_tok=min(top_k, E))


def layer_cost(config, bytes_per_number=2):
    """Returns what a layer without biases costs, a dict.

    total, active      parameters stored, and used by one token (router, projections and shared expert included)
    routed             parameters of all routed experts
    dispatched_bytes   sent to the experts and back for one token: 2 K l numbers
    read_bytes         expert weights read for a single token: 2 K l F numbers
    """
    C, size, width = config.hidden_size, config.expert_size, config.moe_intermediate_size
    expert, K = 2 * size * width, config.num_experts_per_tok
    always = config.n_routed_experts * C + 2 * C * config.moe_shared_expert_intermediate_size
    always += 2 * C * size if config.latent_size is not None else 0
    return dict(
        total=config.n_routed_experts * expert + always,
        active=K * expert + always,
        routed=config.n_routed_experts * expert,
        dispatched_bytes=2 * K * size * bytes_per_number,
        read_bytes=K * expert * bytes_per_number,
    )


# ---- 6. python latent_moe.py: the paper's claim about cost ------------------------------------------------


def demo():
    """Prints what the paper's standard layer and its LatentMoE layers cost, in one table."""
    standard = MoEConfig(4096, 128, 6, 2688, 5376)  # of the paper's model with 95B parameters, 8B of them active
    layers = {"standard": standard}
    layers |= {f"alpha {alpha}, equal cost": to_latent(standard, alpha) for alpha in (2, 4, 8)}
    layers["alpha 4, equal K"] = replace(layers["alpha 4, equal cost"], num_experts_per_tok=6)
    print("LatentMoE: hidden size 4096, experts of 2688 units; numbers in bfloat16, for one layer and one token\n")
    print(f"{'layer':22}{'experts':>8}{'used':>6}{'width':>7}{'stored':>9}{'active':>9}{'KB sent':>9}{'MB read':>9}"
          f"{'choices':>10}")  # fmt: skip
    for name, config in layers.items():
        with torch.device("meta"):  # shapes without memory
            n_parameters = sum(p.numel() for p in MoE(config).parameters())
        E, K, cost = config.n_routed_experts, config.num_experts_per_tok, layer_cost(config)
        assert n_parameters == cost["total"]
        print(f"{name:22}{E:8}{K:6}{config.expert_size:7}{cost['total'] / 1e9:8.3f}B{cost['active'] / 1e6:8.1f}M"
              f"{cost['dispatched_bytes'] / 1e3:9.1f}{cost['read_bytes'] / 1e6:9.1f}"
              f"{f'2^{math.log2(math.comb(E, K)):.0f}':>10}")  # fmt: skip
    saved = layer_cost(standard)["active"] - layer_cost(layers["alpha 4, equal cost"])["active"]
    print(f"""
Equal cost: a token chooses among many more combinations of experts for the same parameters, traffic and memory reads.
The paper takes alpha 4, with 22 of 512 experts; its quality falls at alpha 8. Over the 32 layers of its model the
active parameters differ by {32 * saved / 1e9:.2f}B here, and in the paper by 8.47B - 8.44B = 0.03B.
Equal K: the cheap variant, which sends and reads a quarter.
What such layers learn: python -m experiments.latent_moe""")


if __name__ == "__main__":
    demo()
