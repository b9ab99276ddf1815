"""python -m experiments.latent_moe: trains small language models with the standard layer and with LatentMoE layers.

A small Transformer whose MLPs are mixtures of experts is trained with the standard layer and with LatentMoE layers of
equal active parameters (`to_latent`), on the same data in the same order, three seeds. Prints the validation losses
beside the paper's claims, draws out/latent_moe.png, and writes the table to assets/bench/latent_moe.json: under "demo"
if it ran on a GPU, under "demo_cpu" otherwise.
"""

import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

from benchmarks.harness import ROOT, provenance
from common.data import load_corpus
from common.runlog import save_plot
from latent_moe import MoE, MoEConfig, layer_cost, new_load, to_latent

# ---- 1. the model -----------------------------------------------------------------------------------------

SETTINGS = dict(  # some two minutes on two CPU cores, three on one GPU
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

    def forward(self, x, load=None):
        """Returns x [B, T, C] with both parts added. load: a `latent_moe.Load`, which takes that of the mixture."""
        q, k, v = (
            t.transpose(1, 2) for t in self.qkv(self.norms[0](x)).unflatten(-1, (3, -1, self.head_dim)).unbind(2)
        )
        a = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)  # [B, T, C]
        x = x + self.o(a)
        h = self.norms[1](x)
        return x + (load.add(self.moe, *self.moe(h, load.counted)) if load else self.moe(h))


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
        # Each matrix gets the std that suits the width of its own input. (With one std for all, the routed path would
        # start 13 times weaker than the standard layer's at alpha 2, and 240 times at alpha 8.) Matrices whose output
        # is added to x are scaled down by depth; in a LatentMoE that is fc2, not the experts' down_proj.
        latent = config.latent_size is not None
        for name, p in self.named_parameters():
            if p.dim() > 1:
                own = ".experts." in name or "latent_proj" in name
                adds = name.endswith((".o.weight", "down_proj.weight", "fc2_latent_proj.weight"))
                adds |= name.endswith("experts.down_proj") and not latent
                width = p.shape[-1] if own else config.hidden_size
                nn.init.normal_(p, std=(0.8 / width / (2 * n_layers if adds else 1)) ** 0.5)

    def loss(self, ids, targets):
        """Returns (next-token loss in nats, balance loss averaged over the layers). ids, targets [B, T]."""
        x, load = self.embed(ids) + self.positions.weight[: ids.shape[1]], new_load(self, torch.ones_like(ids).bool())
        for layer in self.layers:
            x = layer(x, load)
        logits = self.norm(x) @ self.embed.weight.T
        balance = load.finish() / len(self.layers) if load else 0.0
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten()), balance


# ---- 2. training ------------------------------------------------------------------------------------------


def train_one(config, seed, corpus, setting, device):
    """Returns (validation loss in nats, seconds per step, max / mean load) of one model trained from scratch."""
    torch.manual_seed(seed)
    B, T, steps = setting["batch_size"], setting["context"], setting["steps"]
    model = LanguageModel(corpus.tokenizer.n_vocab, T, setting["n_layers"], config, setting["head_dim"]).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=setting["lr"], betas=(0.9, 0.95), weight_decay=0.1)
    autocast = torch.autocast(device, torch.bfloat16, enabled=device == "cuda")

    def tensors(block):
        return [torch.from_numpy(a).to(device) for a in block]

    began = 0
    for step in range(steps):
        if step == min(10, steps // 2):  # the first steps compile kernels and are not timed
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


# ---- 3. the comparison ------------------------------------------------------------------------------------


def variants(standard):
    """Returns {name: (MoEConfig, what the paper says of it)}."""
    found = {"standard": (standard, "the baseline")}
    for alpha, claim in ((2, "better"), (4, "better"), (8, "worse again than alpha 4")):
        latent = to_latent(standard, alpha)
        more = latent.num_experts_per_tok / standard.num_experts_per_tok
        # However many experts a token has, their weights sum to 1; the more there are, the smaller is the weighted sum
        # of their outputs. Hence the factor: Super has 5.0 where Nano has 2.5.
        found[f"latent, alpha {alpha}"] = (replace(latent, routed_scaling_factor=more**0.5), claim)
    fewer = replace(to_latent(standard, 4, more_experts=False), num_experts_per_tok=standard.num_experts_per_tok)
    found["alpha 4, experts not multiplied"] = (fewer, "worse")
    return found


def main():
    """Trains every variant with every seed; prints, draws and records what came out."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting = SETTINGS[device]
    corpus = load_corpus("python", setting["tokenizer"], setting["context"])
    print(f"{setting['n_layers']} layers on {device}, {setting['steps']} steps, {len(SEEDS)} seeds, loss in nats")
    print(f"{'':32}{'E':>4}{'K':>4}{'l':>5}{'active':>8}{'stored':>8}{'loss':>8}{'std':>7}{'vs standard':>17}"
          f"{'ms/step':>9}{'load':>6}  paper")  # fmt: skip
    results, rows = {}, {}
    for name, (config, claim) in variants(setting["moe"]).items():
        losses, seconds, loads = zip(*(train_one(config, seed, corpus, setting, device) for seed in SEEDS))
        results[name] = losses
        losses, base = torch.tensor(losses), torch.tensor(results["standard"])
        gap, cost = losses - base, layer_cost(config)  # seed by seed: the data are the same
        E, K, width = config.n_routed_experts, config.num_experts_per_tok, config.expert_size
        measured = [losses.mean(), losses.std(), gap.mean(), gap.std(), 1e3 * min(seconds), max(loads)]
        loss, std, mean_gap, gap_std, ms, load = map(float, measured)
        rows[name] = [E, K, width, *(round(float(number), 4) for number in measured)]
        print(f"{name:32}{E:4}{K:4}{width:5}{cost['active'] / 1e6:7.2f}M{cost['total'] / 1e6:7.2f}M"
              f"{loss:8.4f}{std:7.4f}{mean_gap:+10.4f}±{gap_std:.4f}{ms:9.1f}{load:6.2f}  {claim}")  # fmt: skip
    if device == "cpu":
        print(f"{setting['steps']} steps show that every layer learns, at what cost, and how evenly it is loaded.")
        print("They are too few to show which layer is better; a run on a GPU takes more.")
    write(rows, "demo" if device == "cuda" else "demo_cpu", setting)
    draw(results, Path("out/latent_moe.png"))


def write(rows, key, setting):
    """Writes the table under `key` of assets/bench/latent_moe.json; the other keys stay."""
    path = ROOT / "assets" / "bench" / "latent_moe.json"
    record = json.loads(path.read_text()) if path.exists() else {}
    columns = "E K l loss std gap gap_std ms_per_step load"
    setting = {name: value for name, value in setting.items() if name != "moe"}
    record[key] = dict(**provenance(), seeds=len(SEEDS), setting=setting, columns=columns, rows=rows)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print(f"record: {path.relative_to(ROOT)}, {key!r}")


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
    save_plot(figure, path)


if __name__ == "__main__":
    if sys.argv[1:]:
        raise SystemExit("usage: python -m experiments.latent_moe")
    main()
