"""Mixture of experts, and LatentMoE: the same layer with its experts in a narrower space, and more of them.

Papers   LatentMoE, arXiv:2601.18089; Nemotron 3 Nano and Super, arXiv:2512.20848 and 2604.12374 (layers, recipe);
         "Auxiliary-Loss-Free Load Balancing", arXiv:2408.15664; DeepSeek-V3, arXiv:2412.19437 (the sequence-wise loss).
Idea     An MLP of which each token uses a few parts of many. What such a layer costs, apart from arithmetic, is width:
         the rows sent to the experts and the expert weights read are as wide as the model. LatentMoE projects a token
         down to `latent_size` before it is sent out and up again after its experts' outputs are summed; what that
         saves buys alpha = hidden_size / latent_size times as many experts, and alpha times as many for each token.
Picture  S tokens, C wide, E experts of width F, K for each token; l is the latent size

         x [S,C] --router (C wide)--> scores [S,E] --+ bias, top K--> ids, weights [S,K]
            |                                                            |
            |---- fc1 ----> [S,l] --> sum_k w_k down relu(up .)^2 <------'   fc1, fc2: LatentMoE only, else l = C
            |                             '--> [S,l] -- fc2 --> [S,C] --.
            '---- shared expert: one MLP that every token uses ---------+--> y [S,C]

Symbols  code                           paper   meaning
         n_routed_experts               N       experts to choose from
         num_experts_per_tok            K       experts each token uses
         moe_intermediate_size          m       hidden units of an expert
         latent_size                    l       width of an expert's input and output, C / alpha
         e_score_correction_bias        b       added to the scores to choose, and only to choose
Limits   One expert with weight 1 is an MLP; latent_size = C with identity projections is the standard layer; all
         experts chosen is a dense sum: see tests/test_latent_moe.py.
Differs  The paper writes softmax scores. The released models, and so this file, score with a sigmoid.
"""

import math
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F

from kernels import at_least_float32, expert_mlp

# ---- 1. configuration -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MoEConfig:
    """The shape of a layer. Raises ValueError, with the numbers and the remedy, for one that cannot be built."""

    hidden_size: int  # C, width of what comes in and goes out
    n_routed_experts: int = 8  # E (paper N), experts to choose from
    num_experts_per_tok: int = 2  # K, experts of a token
    moe_intermediate_size: int = 128  # F (paper m), hidden units of an expert
    moe_shared_expert_intermediate_size: int = 256  # hidden units of the expert that every token uses
    latent_size: int | None = None  # l, width the experts work in; None: hidden_size, the standard layer
    n_group: int = 1  # groups the experts are in
    topk_group: int = 1  # groups a token may choose from
    norm_topk_prob: bool = True  # whether a token's weights are divided by their sum
    routed_scaling_factor: float = 1.0  # then multiplied by this
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
        """Width of what an expert takes and gives."""
        return self.hidden_size if self.latent_size is None else self.latent_size


# ---- 2. choosing experts ----------------------------------------------------------------------------------


def choose_experts(scores, bias, config):
    """Returns (ids [S, K] int64, weights [S, K]): the experts of each token, and how much each counts.

    scores [S, E], sigmoid(router logits), float32; bias [E]. The biased score decides who is chosen; the weight is the
    score without it, or the bias that balances the load would also change what the layer computes.
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
# A router left alone sends everything to the few experts that were a little better at the start. Two small forces
# against it: a bias on the choice, moved by a fixed step towards the experts with too few tokens (no gradient, so it
# does not compete with the language model), and a weak loss within each sequence.


def update_bias(bias, counts, rate=1e-3):
    """Moves bias [E] in place: b_i += rate * sign(mean(counts) - counts_i). counts [E] int64: tokens of each expert.

    To be called after the optimiser's step, with the counts of the whole batch; rate may be a tensor. Source:
    arXiv:2408.15664, Alg. 1.
    """
    bias.add_(torch.sign(counts.sum() - len(counts) * counts) * rate)  # exact: in whole numbers


def sequence_balance_loss(scores, top_k):
    """Returns E sum_i f_i p_i, mean over the sequences; 1 when every expert has an equal share. scores [..., T, E].

    f_i = share of the sequence's top-k choices that fall on expert i (of the scores without bias; no gradient);
    p_i = mean over the sequence of expert i's share of a token's scores. Source: DeepSeek-V3, equations (17) to (20);
    the top-k without bias as in Megatron-LM.
    """
    if scores.numel() == 0:
        return scores.sum()
    T, E = scores.shape[-2:]
    shares = scores / scores.sum(-1, keepdim=True)  # [B, T, E]
    chosen = torch.zeros_like(scores).scatter(-1, scores.topk(top_k).indices, 1.0)  # [B, T, E]
    f, p = chosen.sum(-2) / (top_k * T), shares.mean(-2)  # [B, E]
    return E * (f.detach() * p).sum(-1).mean()


def load_metrics(counts, entropy):
    """Returns how even the load is: a dict of scalars. counts [E], tokens of each expert; entropy, of a token's choice.

    load_max        tokens of the busiest expert over the mean: 1 is even, E / K is collapse
    dead_experts    fraction of the experts that got no token
    router_entropy  mean over the tokens of the entropy of their normalised scores, over ln E: 1 is indifference
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
        self.up_proj = nn.Parameter(0.02 * torch.randn(E, width, size))
        self.down_proj = nn.Parameter(0.02 * torch.randn(E, size, width))


class Router(nn.Module):
    """Scores every expert for every token, in float32: in bfloat16 the bias's steps of 0.001 would be rounded away."""

    def __init__(self, config):
        super().__init__()
        self.weight = nn.Parameter(0.02 * torch.randn(config.n_routed_experts, config.hidden_size))
        self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts))
        self.register_buffer("counts", None, persistent=False)  # [E] int64, tokens sent to each expert
        self.register_buffer("entropy", None, persistent=False)  # sum over tokens of that of their scores
        self.reset_counts()

    def _apply(self, fn, recurse=True):
        """Moves the module as asked, but keeps the bias in float32 where the model is cast to 16 bits."""
        bias = self.e_score_correction_bias
        super()._apply(fn, recurse)
        if self.e_score_correction_bias.dtype in (torch.float16, torch.bfloat16) and not bias.is_meta:
            self.e_score_correction_bias = bias.to(self.e_score_correction_bias.device)
        return self

    def reset_counts(self):
        """Begins to count anew."""
        self.counts = torch.zeros_like(self.e_score_correction_bias, dtype=torch.int64)
        self.entropy = torch.zeros_like(self.e_score_correction_bias[0])

    def forward(self, x):
        """Returns scores [..., E] in (0, 1), float32, for x [..., C]."""
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(at_least_float32(x), at_least_float32(self.weight)).sigmoid()


class MoE(nn.Module):
    """A mixture of experts; with config.latent_size, a LatentMoE. Parameter names: those of `transformers`' NemotronH.

    In training each forward adds to `gate.counts` and `gate.entropy`, and leaves its `sequence_balance_loss` for
    whoever sums up the loss to take.
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
        self.balance_loss = None

    def forward(self, x):
        """Returns y [..., T, C] of x [..., T, C]."""
        scores = self.gate(x)  # [B, T, E]
        ids, weights = choose_experts(scores.flatten(0, -2), self.gate.e_score_correction_bias, self.config)  # [S, K]
        if self.training and torch.is_grad_enabled():
            self.observe(scores, ids)
        latent = self.config.latent_size is not None
        u = self.fc1_latent_proj(x) if latent else x  # [B, T, l]
        o = expert_mlp(u.flatten(0, -2), self.experts.up_proj, self.experts.down_proj, ids, weights).view(u.shape)
        return (self.fc2_latent_proj(o) if latent else o) + self.shared_experts(x)

    def observe(self, scores, ids):
        """Notes the load of a batch: scores [B, T, E], ids [S, K]."""
        ids = ids.flatten()
        counts = torch.zeros_like(self.gate.counts)  # [E]
        counts.scatter_add_(0, ids, torch.ones_like(ids))  # bincount would wait for the device
        self.gate.counts += counts
        shares = scores.detach() / scores.detach().sum(-1, keepdim=True)
        self.gate.entropy += torch.special.entr(shares).sum()
        self.balance_loss = sequence_balance_loss(scores, self.config.num_experts_per_tok)

    def pop_balance_loss(self):
        """Returns the balance loss of the last forward, 0 if there was none, and forgets it: it holds a whole graph."""
        loss, self.balance_loss = self.balance_loss, None
        return 0.0 if loss is None else loss

    def balance(self, rate=1e-3):
        """Moves the bias by what was counted, and begins to count anew. Returns the `load_metrics` of what was."""
        gate, K = self.gate, self.config.num_experts_per_tok
        metrics = load_metrics(gate.counts, gate.entropy * K / gate.counts.sum().clamp(min=1))
        update_bias(gate.e_score_correction_bias, gate.counts, rate)
        gate.reset_counts()
        return metrics


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


def latent_twin(config, alpha, more_experts=True):
    """Returns the LatentMoE that costs what the standard layer `config` costs, with latent_size = hidden_size / alpha.

    It has alpha times the experts, so their stored weights stay the same, and as many for each token as the active
    parameters allow after the two projections and the longer router are paid for (that is how the paper's 22 of 512
    come from 6 of 128). more_experts=False keeps the number of experts: the ablation that loses quality.
    Raises ValueError if alpha does not divide hidden_size, or leaves nothing for the experts.
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
    dispatched_bytes   sent to experts and back for one token: 2 K l numbers
    read_bytes         expert weights read for one token on its own: 2 K l F numbers
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


# ---- 6. python latent_moe.py: the paper's claim, small ------------------------------------------------------
#
# A small Transformer whose MLPs are mixtures of experts, trained with the standard layer and with its LatentMoE twins
# of equal active parameters: the same data in the same order, seed by seed.

SETTINGS = dict(  # what fits in two minutes, on two CPU cores and on one GPU
    cpu=dict(tokenizer="bytes", context=128, batch_size=8, steps=100, n_layers=2, head_dim=32, lr=3e-3,
             val_batches=16, moe=MoEConfig(128, 8, 2, 128, 256)),
    cuda=dict(tokenizer="python4k", context=512, batch_size=32, steps=400, n_layers=4, head_dim=64, lr=2e-3,
              val_batches=99, moe=MoEConfig(512, 16, 4, 512, 1024)),
)  # fmt: skip
SEEDS = range(3)


class Layer(nn.Module):
    """x + attention(norm x), then x + MoE(norm x)."""

    def __init__(self, config, head_dim):
        super().__init__()
        C = config.hidden_size
        self.head_dim = head_dim
        self.norms = nn.ModuleList(nn.RMSNorm(C) for _ in range(2))
        self.qkv, self.o = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
        self.moe = MoE(config)

    def forward(self, x):
        """Returns x [B, T, C] with both parts added."""
        q, k, v = (
            t.transpose(1, 2) for t in self.qkv(self.norms[0](x)).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        )
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)  # [B, T, C]
        x = x + self.o(a)
        return x + self.moe(self.norms[1](x))


class LanguageModel(nn.Module):
    """A Transformer with learned positions, tied embeddings and a mixture of experts in every layer."""

    def __init__(self, vocab_size, context, n_layers, config, head_dim):
        super().__init__()
        self.embed, self.positions = (
            nn.Embedding(vocab_size, config.hidden_size),
            nn.Embedding(context, config.hidden_size),
        )
        self.layers = nn.ModuleList(Layer(config, head_dim) for _ in range(n_layers))
        self.norm = nn.RMSNorm(config.hidden_size)
        # Each matrix as wide as its own input asks (with one std for all, the routed path would start 13 times weaker
        # at alpha 2 and 240 times at alpha 8 than the standard one), and what adds to x scaled down by depth, once.
        latent = config.latent_size is not None
        for name, p in self.named_parameters():
            if p.dim() > 1:
                own = ".experts." in name or "latent_proj" in name
                adds = name.endswith((".o.weight", "down_proj.weight", "fc2_latent_proj.weight"))
                adds |= name.endswith("experts.down_proj") and not latent
                width = p.shape[-1] if own else config.hidden_size
                nn.init.normal_(p, std=(0.8 / width / (2 * n_layers if adds else 1)) ** 0.5)

    def loss(self, ids, targets):
        """Returns (next-token loss, mean over the layers of the balance loss or None). ids, targets [B, T]."""
        x = self.embed(ids) + self.positions.weight[: ids.shape[1]]
        for layer in self.layers:
            x = layer(x)
        logits = self.norm(x) @ self.embed.weight.T
        balance = sum(layer.moe.pop_balance_loss() for layer in self.layers) / len(self.layers)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()), balance


def train_one(config, seed, corpus, setting, device):
    """Returns (validation loss in nats, seconds a step, max/mean load) of one model trained from scratch."""
    torch.manual_seed(seed)
    B, T, steps = setting["batch_size"], setting["context"], setting["steps"]
    model = LanguageModel(corpus.tokenizer.n_vocab, T, setting["n_layers"], config, setting["head_dim"]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting["lr"], betas=(0.9, 0.95), weight_decay=0.1)
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def tensors(block):
        return [torch.from_numpy(a).to(device) for a in block]

    began = 0
    for step in range(steps):
        if step == min(10, steps // 2):  # the first steps compile kernels
            torch.cuda.synchronize() if device == "cuda" else None
            began, first = time.perf_counter(), step
        for group in optimizer.param_groups:  # warm up over a tenth, then fall to 0
            group["lr"] = setting["lr"] * min((step + 1) / (0.1 * steps), 1) * (1 - step / steps)
        with autocast:
            loss, balance = model.loss(*tensors(corpus.batch(range(step * B, (step + 1) * B), T, seed)))
        (loss + 1e-4 * balance).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loads = [layer.moe.balance()["load_max"] for layer in model.layers]
    load = torch.stack(loads).mean().item()  # waits for the GPU
    seconds = (time.perf_counter() - began) / (steps - first)
    model.eval()
    with torch.no_grad(), autocast:
        blocks = list(zip(range(setting["val_batches"]), corpus.val_batches(T, B)))
        losses = [model.loss(*tensors(block))[0].item() for _, block in blocks]
    return sum(losses) / len(losses), seconds, load


def demo():
    """Prints the paper's claim beside what comes out here, and draws out/latent_moe.png."""
    from common.data import load_corpus

    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = SETTINGS[device]
    corpus, standard = load_corpus("python", setting["tokenizer"], setting["context"]), setting["moe"]
    variants = {"standard": (standard, "the baseline")}
    for alpha, claim in ((2, "better"), (4, "better"), (8, "worse again than alpha 4")):
        twin = latent_twin(standard, alpha)
        more = twin.num_experts_per_tok / standard.num_experts_per_tok
        # the weights of more experts add up to 1 all the same, and their sum shrinks: Super has 5.0 where Nano has 2.5
        variants[f"latent, alpha {alpha}"] = (replace(twin, routed_scaling_factor=more**0.5), claim)
    fewer = replace(latent_twin(standard, 4, more_experts=False), num_experts_per_tok=standard.num_experts_per_tok)
    variants["alpha 4, experts not multiplied"] = (fewer, "worse")

    print_paper_counts()
    print(f"\n{setting['n_layers']} layers on {device}, {setting['steps']} steps, {len(SEEDS)} seeds, loss in nats")
    print(f"{'':32}{'E':>4}{'K':>4}{'l':>5}{'active':>8}{'stored':>8}{'loss':>8}{'std':>7}{'vs standard':>17}"
          f"{'ms/step':>9}{'load':>6}  paper")  # fmt: skip
    results = {}
    for name, (config, claim) in variants.items():
        losses, seconds, loads = zip(*(train_one(config, seed, corpus, setting, device) for seed in SEEDS))
        results[name] = losses
        losses, base = torch.tensor(losses), torch.tensor(results["standard"])
        gap, cost = losses - base, layer_cost(config)  # seed by seed: the data are the same
        print(f"{name:32}{config.n_routed_experts:4}{config.num_experts_per_tok:4}{config.expert_size:5}"
              f"{cost['active'] / 1e6:7.2f}M{cost['total'] / 1e6:7.2f}M{losses.mean():8.4f}{losses.std():7.4f}"
              f"{gap.mean():+10.4f}±{gap.std():.4f}{1e3 * min(seconds):9.1f}{max(loads):6.2f}  {claim}")  # fmt: skip
    if device == "cpu":
        print(f"{setting['steps']} steps show that every layer learns, at what cost, and how evenly it is loaded.")
        print("Which is better they cannot show: that takes more steps than two minutes hold. Run this on a GPU.")
    draw(results, Path("out/latent_moe.png"))


def print_paper_counts():
    """Prints what the paper's layer and its LatentMoE twin store, use, send and read."""
    standard = MoEConfig(4096, 128, 6, 2688, 5376)
    print(f"{'the paper: C 4096, F 2688':32}{'stored':>8}{'active':>9}{'MB sent':>9}{'MB read':>9}  per token, layer")
    for name, config in (("N 128, K 6", standard), ("alpha 4: N 512, K 22, l 1024", latent_twin(standard, 4))):
        cost = layer_cost(config)
        print(f"{name:32}{cost['total'] / 1e9:7.2f}G{cost['active'] / 1e6:8.1f}M{cost['dispatched_bytes'] / 1e6:9.3f}"
              f"{cost['read_bytes'] / 1e6:9.1f}")  # fmt: skip


def draw(results, path):
    """Draws the validation loss of each variant, a dot for each seed, and writes it to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    means = {name: sum(losses) / len(losses) for name, losses in results.items()}
    gap = means["latent, alpha 4"] - means["standard"]
    figure, axes = plt.subplots(figsize=(7, 4), dpi=150, layout="constrained")
    for x, (name, losses) in enumerate(results.items()):
        axes.plot([x] * len(losses), losses, "o", color="#0072B2", alpha=0.6)
        axes.plot([x - 0.2, x + 0.2], [means[name]] * 2, color="#0072B2", linewidth=2)
    axes.axhline(means["standard"], linestyle="--", linewidth=1, color="#D55E00")
    axes.set_xticks(range(len(results)), [name.replace(", ", ",\n") for name in results])
    title = f"Equal active parameters: alpha 4 is {abs(gap):.3f} nats {'better' if gap < 0 else 'worse'} than standard"
    axes.set(ylabel="validation loss, nats per token", title=title)
    axes.grid(axis="y", alpha=0.3)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    print(f"plot: {path}")


if __name__ == "__main__":
    if sys.argv[1:]:
        raise SystemExit("usage: python latent_moe.py")
    demo()
