"""dUltra's claim at length: accuracy against NFE of every rule, of a trained planner, and of both trained together.

    python -m experiments.mdlm_dultra                 all studies of the machine: on a CPU a minute, on GPUs minutes
    python -m experiments.mdlm_dultra sudoku:4        that one

A study trains one backbone by masked diffusion, measures the rules of unmasking.py on held-out tasks, then trains
planners on copies of that backbone: by imitation, then by rewards. On a GPU there are three seeds, and the rows go to
assets/bench/mdlm_dultra.json, in the place of those of the same task; a CPU has one seed and writes no record. The
plot goes to out/mdlm_dultra.png.

Claim    A planner trained by rewards needs fewer forwards (NFE) than confidence rules at equal accuracy. In the paper
         65 to 74 % fewer than Fast-dLLM's factor rule, on four benchmarks of LLaDA-8B (arXiv:2512.21446).
Tasks    sudoku:4        4 x 4, 4 clues: all open cells depend on each other
         progressions:8  8 groups that are uncertain and independent: two forwards are enough, rules need 16 or 9
"""

import json
import math
import multiprocessing
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from benchmarks.harness import provenance
from common.data import Tokenizer
from common.fit import fit
from common.runlog import save_plot
from mdlm_dultra import DUltra, DUltraConfig
from nano_hybrid import HybridConfig
from unmasking import planner_rule, rule_of

RECORD = Path(__file__).parent.parent / "assets" / "bench" / "mdlm_dultra.json"
CURVES = {  # rules, each with settings from safe to fast
    "top-k": ["top_k:1", "top_k:2", "top_k:3", "top_k:4"],
    "threshold": ["threshold:0.99", "threshold:0.95", "threshold:0.9", "threshold:0.8", "threshold:0.6"],
    "factor": ["factor:0.25", "factor:0.5", "factor:1", "factor:2"],
    "entropy-bounded": [f"entropy_bounded:{gamma}" for gamma in (0.01, 0.1, 0.3, 0.5, 0.7, 1.4, 3)],
}
SHIFTS = (-2.0, -1.0, 0.0, 1.0, 2.0)  # of the planner's z: its own curve
PAPER_CUT = 0.65, 0.74  # share of the factor rule's NFE that dUltra saves in the paper, at no loss

# ---- 1. a study -----------------------------------------------------------------------------------------------------


@dataclass
class Study:
    """What is trained, and for how long."""

    task: str
    hidden_size: int
    layers: str  # pattern of the backbone
    rotary_base: float | None  # None: an embedding for each position
    lr: float
    pretrain: int  # steps, of `rows` sequences
    rows: int
    decodings: int  # in an update by rewards
    planners: dict  # name -> updates by rewards, settings of DUltraConfig
    puzzles: int  # held-out ones, to measure with


# Joint training changes what the backbone predicts, so that more tokens are safe together. It starts from a planner
# that unmasks too much, and the backbone learns faster than the planner.
JOINT = dict(joint=True, temperature=1.0, imitated="entropy_bounded:3", planner_lr=2e-5, backbone_lr=6e-4)
STUDIES = {
    "cpu": [Study("sudoku:4", 64, "*-*-", None, 2e-3, 900, 128, 512, {"planner": (60, dict(efficiency=0.5))}, 400)],
    "cuda": [
        Study("sudoku:4", 128, "*-*-*-*-", None, 1e-3, 2000, 512, 4096, {
            "planner": (400, dict(imitated="entropy_bounded:0.5", efficiency=1.0)),
            "joint": (600, dict(efficiency=0.5, **JOINT)),
        }, 2000),
        Study("progressions:8", 256, "*-*-*-*-", 1e4, 5e-4, 1500, 512, 4096, {
            "planner": (200, dict(imitated="threshold:0.9", efficiency=0.5)),
        }, 1000),
    ],
}  # fmt: skip


class Measurements:
    """Rows of a study: task, seed, curve, setting, accuracy, nfe, tpf, layer_forwards, seconds since its beginning."""

    def __init__(self, study, seed, objective, model):
        self.study, self.seed, self.objective, self.model = study, seed, objective, model
        self.began, self.rows = time.perf_counter(), []

    def add(self, curve, setting, rule):
        """Decodes held-out tasks with a rule, and prints and keeps what came of it."""
        decoded, score = self.objective.decode_held_out(self.model, rule, self.study.puzzles, self.seed)
        accuracy, nfe = (score == 1).float().mean().item(), decoded.nfe.float().mean().item()
        row = dict(task=self.study.task, seed=self.seed, curve=curve, setting=setting, accuracy=accuracy, nfe=nfe)
        row |= dict(tpf=(decoded.order > 0).sum().item() / decoded.nfe.sum().item())
        row |= dict(layer_forwards=decoded.layer_forwards.mean().item(), seconds=time.perf_counter() - self.began)
        self.rows.append(row)
        label = f"{self.study.task}, seed {self.seed}"
        print(f"{label:24} {curve:24} {setting:20} accuracy {accuracy:.3f}  NFE {nfe:5.2f}", flush=True)


def run_study(study, seed, device):
    """Trains one backbone and planners on it. Returns the rows of its Measurements."""
    torch.manual_seed(seed)
    torch.set_num_threads(2)
    torch.set_float32_matmul_precision("high")
    tokenizer, C = Tokenizer("bytes"), study.hidden_size
    base = dict(task=study.task, pretrain=study.pretrain, imitate=300, group_size=16, replay_rows=8192)
    objective = DUltra(DUltraConfig(**base), tokenizer, study.rows, seed)
    shape = dict(hidden_size=C, num_attention_heads=C // 32, num_key_value_heads=C // 32, intermediate_size=4 * C)
    shape |= dict(hybrid_override_pattern=study.layers, head_dim=32, rotary_base=study.rotary_base)
    model = objective.build(HybridConfig(vocab_size=320, **shape)).to(device)
    measured, label = Measurements(study, seed, objective, model), f"{study.task}, seed {seed}"

    losses = fit(model, objective, study.pretrain, study.lr, f"{label}: masked diffusion")
    seconds = time.perf_counter() - measured.began
    print(f"{label}: bound {losses['loss']:.4f} nats a token after {seconds:.0f} s", flush=True)
    for curve, specs in CURVES.items():
        for spec in specs:
            measured.add(curve, spec, rule_of(spec, model))
    backbone = {name: value.clone() for name, value in model.state_dict().items()}
    for name, (updates, settings) in study.planners.items():
        model.load_state_dict(backbone)
        config = DUltraConfig(**base | settings)
        warm, learns = (DUltra(config, tokenizer, n, seed) for n in (study.rows, study.decodings))
        fit(model, warm, config.imitate, study.lr, f"{label}: imitation", begin=config.pretrain)
        measured.add(f"{name}, warm start", "coins", planner_rule(model.planner))
        measured.add(f"{name}, warm start", "above one half", planner_rule(model.planner, sample=False))
        fit(model, learns, updates, study.lr, f"{label}: {name}", begin=learns.begin_rewards)
        measured.add(f"{name}, after rewards", "coins", planner_rule(model.planner))
        for shift in SHIFTS:
            measured.add(f"{name}, after rewards", f"shift {shift}", planner_rule(model.planner, shift, sample=False))
        if config.joint:  # what the backbone learnt, without the planner
            for spec in ("entropy_bounded:0.3", "threshold:0.9", "factor:1"):
                measured.add(f"{spec} after joint", spec, rule_of(spec, model))
    return measured.rows


# ---- 2. what came of it ---------------------------------------------------------------------------------------------


def aup(tokens_per_forward, accuracy):
    """Returns the accuracy under parallelism of a decoder: the area under its accuracy (0 ... 1) against its TPF.

    Both are lists, a point for each setting. Points more than 5 percent below that of lowest TPF do not count, and
    those below the best count less, by exp(-3 (1 - y / best)). In percent times TPF. Source: the d3LLM leaderboard.
    """
    points = sorted(zip(tokens_per_forward, (100 * a for a in accuracy)))
    points = [(rho, y) for rho, y in points if y >= points[0][1] - 5]
    top = max(y for _, y in points)
    weighted = [(rho, y * min(1.0, math.exp(-3 * (1 - y / top)))) for rho, y in points] if top else points
    area = points[0][0] * points[0][1]
    return area + sum((r1 - r0) * (y1 + y0) / 2 for (r0, y0), (r1, y1) in zip(weighted, weighted[1:]))


def summary(rows):
    """Returns {curve: [(setting, accuracy, its spread, NFE, its spread), ...]}, means over seeds."""
    curves = {}
    for row in rows:
        curves.setdefault(row["curve"], {}).setdefault(row["setting"], []).append((row["accuracy"], row["nfe"]))
    return {
        curve: [
            (setting, *np.mean(p, 0)[:1], np.std(p, 0)[0], np.mean(p, 0)[1], np.std(p, 0)[1])
            for setting, p in settings.items()
        ]
        for curve, settings in curves.items()
    }


def fewest(points, accuracy):
    """Returns the lowest NFE among points (setting, accuracy, ...) of at least this accuracy, or None."""
    return min((p[3] for p in points if p[1] >= accuracy), default=None)


def report(rows, task, n_seeds):
    """Prints a table: every setting, each curve's area, and the lowest NFE of each curve at an accuracy of 0.98."""
    curves = summary(rows)
    print(f"\n{task}: held-out, T = 0, mean of {n_seeds} seed(s) and spread")
    for curve, points in curves.items():
        tpf = [np.mean([r["tpf"] for r in rows if (r["curve"], r["setting"]) == (curve, p[0])]) for p in points]
        area = aup(tpf, [p[1] for p in points])
        print(f"{curve}   (AUP {area:.0f})")
        for setting, accuracy, spread, nfe, nfe_spread in points:
            print(f"    {setting:20} {accuracy:.3f} ± {spread:.3f}   NFE {nfe:5.2f} ± {nfe_spread:.2f}")
    print("lowest NFE at an accuracy of 0.98 and more:")
    for curve, points in curves.items():
        nfe = fewest(points, 0.98)
        print(f"    {curve:24} " + ("never" if nfe is None else f"{nfe:.2f}"))


def plot_frontiers(rows, path):
    """Draws accuracy against NFE of each curve, a panel for each task, and writes it to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    tasks = list(dict.fromkeys(row["task"] for row in rows))
    figure, axes = plt.subplots(
        1, len(tasks), figsize=(7 * len(tasks), 4.2), dpi=150, layout="constrained", squeeze=False
    )
    colours = ("#999999", "#0072B2", "#56B4E9", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#000000")
    for panel, task in zip(axes[0], tasks):
        curves = {c: p for c, p in summary([r for r in rows if r["task"] == task]).items() if "after joint" not in c}
        for (curve, points), colour in zip(curves.items(), colours):
            points = sorted((p[3], p[1]) for p in points)
            learnt = "after rewards" in curve
            panel.plot(*zip(*points), marker="s" if learnt else "o", color=colour, label=curve, lw=2 if learnt else 1)
        by_factor = fewest(curves["factor"], 0.9)
        if by_factor:
            low, high = ((1 - cut) * by_factor for cut in PAPER_CUT)
            panel.axvspan(low, high, color="#dddddd", zorder=0)
            panel.annotate("the paper's cut:\n65 to 74 % below factor", (high, 0.02), fontsize=8, color="#444444")
        best = min(((n, c) for c, p in curves.items() if (n := fewest(p, 0.98))), default=None)
        title = f"at 0.98, {best[1]} has the lowest NFE ({best[0]:.1f})" if best else "none reaches 0.98"
        panel.set_title(f"{task}: {title}", fontsize=10)
        panel.set(xlabel="forwards of the backbone (NFE)", ylabel="held-out tasks solved", ylim=(-0.02, 1.03))
        panel.legend(frameon=False, fontsize=8)
        panel.grid(alpha=0.3)
    save_plot(figure, path)


def main(task=None, seeds=None):
    """Runs the studies of the machine, or the one of a task; prints tables, draws the plot, writes the record."""
    device, began = "cuda" if torch.cuda.is_available() else "cpu", time.perf_counter()
    known = [study.task for study in STUDIES[device]]
    if task not in (None, *known):
        raise SystemExit(f"usage: python -m experiments.mdlm_dultra [{' | '.join(known)}]")
    studies = [study for study in STUDIES[device] if task in (None, study.task)]
    seeds = seeds or ((0, 1, 2) if device == "cuda" else (0,))
    jobs = [(study, seed) for study in studies for seed in seeds]
    if device == "cpu":
        rows = [row for study, seed in jobs for row in run_study(study, seed, device)]
    else:  # small models: the host is the limit, so all at once
        devices = [f"cuda:{i % torch.cuda.device_count()}" for i in range(len(jobs))]
        with ProcessPoolExecutor(len(jobs), multiprocessing.get_context("spawn")) as pool:
            rows = [row for part in pool.map(run_study, *zip(*jobs), devices) for row in part]
    seconds = time.perf_counter() - began
    for study in studies:
        report([row for row in rows if row["task"] == study.task], study.task, len(seeds))
    print(f"{seconds:.0f} s")
    if device == "cuda":
        record = json.loads(RECORD.read_text()) if RECORD.is_file() else {}
        kept = record.get("studies", {})
        for study in studies:
            part = [row for row in rows if row["task"] == study.task]
            source = provenance(f"python -m experiments.mdlm_dultra {study.task}")
            kept[study.task] = source | dict(seconds=seconds, rows=part)
        command = dict(command="python -m experiments.mdlm_dultra")
        RECORD.write_text(json.dumps(record | command | dict(studies=kept), indent=0) + "\n")
        rows = [row for part in kept.values() for row in part["rows"]]
    plot_frontiers(rows, Path("out/mdlm_dultra.png"))


if __name__ == "__main__":
    if len(sys.argv) > 2:
        raise SystemExit("usage: python -m experiments.mdlm_dultra [task]")
    main(*sys.argv[1:])
