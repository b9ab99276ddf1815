"""python -m experiments.lla: the paper's experiments with LLA, softmax attention and MesaNet; draws out/lla.png.

Paper    arXiv:2510.01450: test-time regression (nothing is trained), in-context regression, associative recall, state
         tracking. The paper gives neither learning rates nor model sizes; those here are ours, equal for all three.
Sizes    On a CPU the two regressions, small, in about half a minute. On a GPU all four, three seeds, in about five
         minutes; writes assets/bench/lla_demo.json.
"""

import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from benchmarks.harness import provenance
from common.runlog import save_plot
from lla import MIXERS, LocalLinearAttention, fit_errors, piecewise_linear

SEEDS = (0, 1, 2)


def regression_batch(generator, B, T, S, d):
    """Returns tokens [B, T - 1, 3 d], each (x, y, the next x), and the next y [B, T - 1, d]."""
    x, y = piecewise_linear(generator, B, T, S, d)
    return torch.cat([x[:, :-1], y[:, :-1], x[:, 1:]], -1), y[:, 1:]


def recall_batch(generator, B, T, n_pairs, vocab_size):
    """Returns ids [B, T] and targets [B, T], -100 where nothing is asked: multi-query associative recall (MQAR).

    n_pairs keys, each with its value after it, then blanks (token 0) among which every key comes once more, at gaps
    drawn from a power law of exponent 0.01. Keys are below vocab_size / 2, values are not. Source: Zoology's
    `multiquery_ar`, arXiv:2312.04927.
    """
    device, half, n_blanks = generator.device, vocab_size // 2, T - 2 * n_pairs
    keys, values = (torch.rand(B, half - 1, generator=generator, device=device).argsort(1)[:, :n_pairs] for _ in "kv")
    keys, values = keys + 1, values + half  # [B, n_pairs]
    blanks = torch.zeros(B, n_blanks, dtype=torch.int64, device=device)
    ids = torch.cat([torch.stack([keys, values], -1).flatten(1), blanks], 1)  # [B, T]
    gaps = torch.arange(1, n_blanks + 1, device=device) ** (0.01 - 1)
    places = 2 * n_pairs + torch.multinomial(gaps.expand(B, -1), n_pairs, generator=generator)  # [B, n_pairs]
    return ids.scatter(1, places, keys), torch.full_like(ids, -100).scatter(1, places, values)


def swaps_batch(generator, B, T, n_items):
    """Returns ids [B, T], each a swap of two places, and the place [B, T], after each, of the item that began at 0."""
    pairs = torch.combinations(torch.arange(n_items, device=generator.device))  # [n_items (n_items - 1) / 2, 2]
    ids = torch.randint(len(pairs), (B, T), generator=generator, device=generator.device)
    place, places = torch.zeros_like(ids[:, 0]), []
    for a, b in pairs[ids].permute(1, 2, 0):  # T times [2, B]
        place = torch.where(place == a, b, torch.where(place == b, a, place))
        places.append(place)
    return ids, torch.stack(places, 1)


@dataclass(frozen=True)
class Task:
    """What a model learns, and which model learns it."""

    name: str
    claim: str  # the paper's, of LLA's score: "lowest" or "highest" of the three, or "as softmax"
    batch: Callable  # generator -> inputs, targets
    inputs: int  # of the vocabulary, or numbers in a token
    outputs: int
    width: int
    head_dim: int
    steps: int
    lr: float
    heads: int = 1
    context: int | None = None  # tokens with learned positions; None: inputs are numbers, their order says nothing
    tied: bool = False  # the output layer is the embedding
    mlp: bool = False


class Mixer(LocalLinearAttention):
    """The layer with `attend` in the place of `lla`: projections, norm and ridge stay, so that nothing else differs."""

    def __init__(self, attend, *sizes, **options):
        super().__init__(*sizes, **options)
        self.attend = attend

    def forward(self, x):
        """Returns [B, T, C]."""
        q, k, v = self.qkv(lambda projection: projection(x))
        return self.o_proj(self.attend(q, k, v, self.ridge).transpose(1, 2).flatten(2))


class Model(nn.Module):
    """Two layers: x + mixer(norm x), and for some tasks x + MLP(norm x). Numbers are not normalised: sizes count."""

    def __init__(self, attend, task, ridge=1.0):
        super().__init__()
        width, norm = task.width, nn.RMSNorm if task.context else nn.Identity
        self.embed = nn.Embedding(task.inputs, width) if task.context else nn.Linear(task.inputs, width)
        self.positions = nn.Embedding(task.context or 0, width)
        for table in [self.embed, self.positions] if task.context else []:
            nn.init.normal_(table.weight, std=width**-0.5)  # each row about as long as 1
        self.parts = nn.ModuleList()  # what is added to x, in order
        for _ in range(2):
            mixer = Mixer(attend, width, task.heads, head_dim=task.head_dim, ridge=ridge)
            self.parts.append(nn.Sequential(norm(width), mixer))
            if task.mlp:
                mlp = nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
                self.parts.append(nn.Sequential(norm(width), *mlp))
        self.head = nn.Sequential(norm(width), nn.Linear(width, task.outputs, bias=not task.tied))
        if task.tied:
            self.head[1].weight = self.embed.weight

    def forward(self, x):
        """Returns [B, T, outputs]. x: numbers [B, T, inputs], or ids [B, T]."""
        x = self.embed(x) + (self.positions.weight[: x.shape[1]] if self.positions.num_embeddings else 0)
        for part in self.parts:
            x = x + part(x)
        return self.head(x)


def train_one(task, attend, seed, device, ridge=1.0, lr=None):
    """Returns (the loss of each step, the score on new data): error / mean y^2 of numbers, accuracy of ids."""
    torch.manual_seed(seed)
    model, generator = Model(attend, task, ridge).to(device), torch.Generator(device).manual_seed(seed)
    lr, losses = lr or task.lr, []
    optimizer = torch.optim.AdamW(model.parameters(), lr, betas=(0.9, 0.95), weight_decay=0.01)
    for step in tqdm(range(task.steps), desc=task.name, delay=2, leave=False):
        for group in optimizer.param_groups:  # warm up over a tenth, then fall to 0
            group["lr"] = lr * min((step + 1) / (0.1 * task.steps), 1) * (1 - step / task.steps)
        inputs, y = task.batch(generator)
        out = model(inputs)
        loss = F.mse_loss(out, y) if y.is_floating_point() else F.cross_entropy(out.flatten(0, 1), y.flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    with torch.no_grad():
        inputs, y = map(torch.cat, zip(*(task.batch(generator) for _ in range(8))))  # [8 B, T, ...]
        out = torch.cat([model(part) for part in inputs.chunk(8)])
    if y.is_floating_point():
        return torch.stack(losses).tolist(), ((out - y).square().sum() / y.square().sum()).item()
    return torch.stack(losses).tolist(), (out.argmax(-1) == y)[y >= 0].float().mean().item()


def tasks(device):
    """Returns the trained experiments: on a CPU only the regression, small."""
    if device == "cpu":
        batch = partial(regression_batch, B=16, T=128, d=8)
        sizes = dict(inputs=24, outputs=8, width=32, head_dim=16, steps=200, lr=2e-2)
        return [
            Task(f"in-context regression, d 8, S {S}", "lowest", partial(batch, S=S), **sizes) for S in (16, 32, 64)
        ]
    batch = partial(regression_batch, B=16, T=512, d=32)
    sizes = dict(inputs=96, outputs=32, width=128, head_dim=32, steps=300, lr=1e-2)
    regression = [
        Task(f"in-context regression, d 32, S {S}", "lowest", partial(batch, S=S), **sizes) for S in (64, 128, 256)
    ]
    sizes = dict(inputs=128, outputs=128, width=64, head_dim=32, heads=2, steps=1000, lr=3e-3, tied=True)
    batch = partial(recall_batch, B=128, T=64, n_pairs=16, vocab_size=128)
    recall = Task("associative recall, 16 pairs", "highest", batch, context=64, **sizes)
    sizes = dict(width=128, head_dim=32, heads=4, steps=500, lr=3e-3, context=16, mlp=True)
    tracking = [
        Task(f"state tracking, {n} places", "as softmax", partial(swaps_batch, B=256, T=16, n_items=n),
             inputs=n * (n - 1) // 2, outputs=n, **sizes)
        for n in (4, 8)
    ]  # fmt: skip
    return [*regression, recall, *tracking]


def print_row(name, claim, runs):
    """Prints mean and spread over seeds of each score in runs, name -> [seeds], and whether the claim is found.

    One score is above or below another if they differ by more than their spreads. Returns the row, for the record.
    """
    runs = {who: torch.tensor(scores) for who, scores in runs.items()}
    mean = {who: scores.mean().item() for who, scores in runs.items()}
    spread = {who: scores.std().item() if len(scores) > 1 else 0.0 for who, scores in runs.items()}
    above = {who: mean["LLA"] - mean[who] for who in ("softmax", "linear")}
    margin = {who: spread["LLA"] + spread[who] for who in above}
    found = {
        "lowest": all(above[who] < -margin[who] for who in above),
        "highest": all(above[who] > margin[who] for who in above),
        "as softmax": abs(above["softmax"]) <= margin["softmax"] + 0.01,
    }[claim]
    cells = "".join(f"{mean[who]:9.3f}" + (f"±{spread[who]:.3f}" if len(runs["LLA"]) > 1 else " " * 6) for who in runs)
    ratio = f"{mean['softmax'] / mean['LLA']:.2f}" if claim == "lowest" else ""
    tqdm.write(f"{name:38}{cells}{ratio:>11}  {claim:12}{'yes' if found else 'no'}")
    return dict(name=name, claim=claim, found=found, **{who: scores.tolist() for who, scores in runs.items()})


def demo():
    """Prints the paper's experiments (on a CPU two of them), draws out/lla.png; on a GPU writes assets/bench, too."""
    device, began = "cuda" if torch.cuda.is_available() else "cpu", time.perf_counter()
    source = provenance("python -m experiments.lla")
    record = dict(**source, seeds=SEEDS, settings=[], rows=[])

    def note(row):
        record["rows"].append({**row, **source})
        if device == "cuda":  # after each row: the last of them take minutes
            record["seconds"] = time.perf_counter() - began
            path = Path(__file__).parent.parent / "assets" / "bench" / "lla_demo.json"
            path.write_text(json.dumps(record, indent=1) + "\n")

    torch.set_float32_matmul_precision("high")  # on a GPU, float32 products as TF32 do for all three
    dims, (n, seeds) = (16, 32, 64), (32, SEEDS) if device == "cuda" else (3, SEEDS[:1])
    print("Regression on segments of S pairs (x, y) of d numbers: squared error, as a share of the answers' square.")
    print(f"Recall and tracking: how often right. {device}; ±: the spread over seeds, where there are several.\n")
    print(f"{'':38}" + "".join(f"{who:>9}{'':6}" for who in MIXERS) + "softmax/LLA  the paper: LLA is; found")
    sizes = [(d, S) for d in dims for S in (128, 256, 512)]
    errors = {size: [] for size in sizes}  # (d, S) -> [a seed each] of name -> error [T - 1]
    for d, S in tqdm(sizes, desc="test-time regression", delay=2, leave=False):
        errors[d, S] = [fit_errors(seed, d, S, n, device) for seed in SEEDS]
        scores = {who: [error[who].mean().item() for error in errors[d, S]] for who in MIXERS}
        note(print_row(f"test-time regression, d {d}, S {S}", "lowest", scores))
    for task in tasks(device):
        scores = {who: [train_one(task, attend, seed, device)[1] for seed in seeds] for who, attend in MIXERS.items()}
        record["settings"].append({**vars(task), "batch": task.batch.keywords})
        note(print_row(task.name, task.claim, scores))
    seconds, gain = time.perf_counter() - began, gains(errors)
    print(f"\ntest-time regression, S 256, segment by segment\n{'':8}" + "".join(f"{who:^28}" for who in MIXERS))
    for d in dims:
        print(f"{'d ' + str(d):8}" + "".join(by_segment(errors[d, 256], who, 256) for who in MIXERS))
    print()
    learned = [sum(row["softmax"]) / sum(row["LLA"]) for row in record["rows"] if row["name"].startswith("in-context")]
    print_gains("softmax/LLA grows with d, S = 256", [gain[d, 256] for d in dims])
    print_gains("softmax/LLA grows with d, S = 8 d", [gain[d, 8 * d] for d in dims])
    print_gains("in context it is largest at the smallest S", learned[::-1])
    print(f"\n{seconds:.0f} s" + ("" if device == "cuda" else "; recall and state tracking run on a GPU"))
    draw(errors, Path("out/lla.png"))


def print_gains(claim, gains):
    """Prints a claim, the gains that it says grow from left to right, and whether they do."""
    print(f"{claim:46}" + "".join(f"{gain:7.2f}" for gain in gains) + ("   yes" if gains == sorted(gains) else "   no"))


def by_segment(errors, who, S):
    """Returns the mean error in each segment, as text. The first pair is never predicted."""
    mean = F.pad(torch.stack([error[who] for error in errors]).mean(0), (1, 0), value=math.nan)  # [T]
    return "".join(f"{x:7.3f}" for x in mean.view(-1, S).nanmean(1))


def gains(errors):
    """Returns (d, S) -> softmax's error over LLA's."""
    return {
        size: (sum(error["softmax"].sum() for error in runs) / sum(error["LLA"].sum() for error in runs)).item()
        for size, runs in errors.items()
    }


def draw(errors, path, d=32, S=256, width=16):
    """Draws the errors by position for one d and S, and softmax's error over LLA's for all; writes them to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(
        1, 2, figsize=(10, 4), dpi=150, layout="constrained", gridspec_kw=dict(width_ratios=[2, 1])
    )
    for who, color in zip(MIXERS, ("#D55E00", "#0072B2", "#009E73")):
        curves = torch.stack([error[who] for error in errors[d, S]])  # [seeds, T - 1]
        curves = F.pad(curves, (1, 0), value=math.nan).unflatten(1, (-1, width)).nanmean(2)  # [seeds, T / width]
        at, mean, T = width * (torch.arange(curves.shape[1]) + 0.5), curves.mean(0), curves.shape[1] * width
        left.fill_between(at, curves.amin(0), curves.amax(0), color=color, alpha=0.2, linewidth=0)
        left.plot(at, mean, color=color)
        left.annotate(who, (at[-1], mean[-1]), xytext=(4, -3), textcoords="offset points", color=color)
    for start in range(S, T, S):
        left.axvline(start, color="#999999", linewidth=1, linestyle=":")
    left.set(xlabel=f"position; a new segment every {S}", ylabel="squared error / mean square of the answer", ylim=0)
    left.set_title(f"d = {d}, means of {width} positions, band: seeds", fontsize=9)
    left.set_xlim(0, 1.12 * T)
    ratio = gains(errors)
    for share, color in (4, "#999999"), (8, "#555555"), (16, "black"):
        line = [(d, r) for (d, S), r in ratio.items() if S == share * d]
        right.plot(*zip(*line), marker="o", markersize=3, color=color)
        right.annotate(f"S = {share} d", line[-1], xytext=(4, -3), textcoords="offset points", color=color)
    right.set_xscale("log", base=2)
    right.set_xticks([16, 32, 64], [16, 32, 64])
    right.set(xlabel="d", ylabel="softmax's error / LLA's", xlim=(14, 110), ylim=1)
    right.set_title("all positions, segments of S", fontsize=9)
    for axes in left, right:
        axes.grid(alpha=0.3)
    figure.suptitle(
        f"LLA keeps learning in each segment: softmax attention's error is {ratio[d, S]:.1f} times LLA's at d = {d}"
    )
    save_plot(figure, path)


if __name__ == "__main__":
    if sys.argv[1:]:
        raise SystemExit("usage: python -m experiments.lla")
    demo()
