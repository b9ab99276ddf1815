"""python -m experiments.nvfp4 [--minutes=9]: what each part of the recipe is worth, by paired seeds.

Small hybrid models are trained in BF16, FP8, NVFP4, and in NVFP4 without one part or with one more. A seed gives every
arm the same first weights and the same texts in the same order, so that losses are compared seed by seed: the gap is
(L - L_bf16) / L_bf16, and its standard error is that of its mean over the seeds. An arm without an effect is called a
null. Also: which share of the weight gradients is exactly zero, over time.

On a GPU all of it takes --minutes, set-up included: a first short run of each arm says how many steps fit. It writes
assets/bench/nvfp4.json and assets/nvfp4.png. A CPU makes a few steps of tiny models, which show that every arm trains
and no difference between them; it writes to out/. A finished run is kept at once in out/nvfp4_runs.jsonl: a command
that was cut off, given again, goes on there. A recipe of yours is one more row of ARMS.
"""

import json
import math
import sys
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import mean, stdev
from typing import NamedTuple

import torch
from scipy.stats import t as student

from benchmarks.harness import ROOT, provenance
from common.cli import fail, parse
from common.data import load_corpus
from common.jsonl import append_jsonl, read_jsonl
from common.objectives import NextToken
from common.runlog import save_plot
from decoding import GraphedStep
from nano_hybrid import Hybrid, HybridConfig
from nvfp4 import RECIPES, Recipe, quantize_model
from train import MAX_FRESH_EPOCHS, schedule

# ---- 1. the arms ------------------------------------------------------------------------------------------

NVFP4 = RECIPES["nvfp4"]
SWITCH = 0.82  # of the steps: then the forward of the last arm is BF16's


class Arm(NamedTuple):
    """One way to train."""

    recipe: Recipe
    paper: str  # what the papers report; 12B and 8B: arXiv:2509.25149, 550B: Nemotron 3 Ultra, arXiv:2606.15007
    everything: bool = False  # whether the layers that the papers keep in BF16 are quantised, too
    last: Recipe | None = None  # from SWITCH on; None: the same


ARMS = {
    "BF16": Arm(RECIPES["bf16"], "the baseline"),
    "FP8": Arm(RECIPES["fp8"], "the baseline of the 12B run"),
    "NVFP4": Arm(NVFP4, "1.5 % (12B, 8B), below 0.4 % (550B)"),
    "without stochastic rounding": Arm(replace(NVFP4, stochastic_grad=False), "worse (12B)"),
    "without Hadamard transform": Arm(replace(NVFP4, hadamard_wgrad=False), "worse (12B)"),
    "without 16 x 16 blocks": Arm(replace(NVFP4, weight_block=(1, 16)), "worse (12B)"),
    "everything quantised": Arm(NVFP4, "diverges (1.2B)", everything=True),
    "forward only": Arm(replace(NVFP4, backward=False), "most of the gap (12B)"),
    "backward only": Arm(replace(NVFP4, forward=False), "little of the gap (12B)"),
    "stochastic forward, too": Arm(replace(NVFP4, stochastic_forward=True), "diverges (1.2B)"),
    "MXFP4": Arm(RECIPES["mxfp4"], "2.5 % (8B)"),
    "forward BF16 at the end": Arm(NVFP4, "0.5 %, from 1.5 % (12B)", last=replace(NVFP4, forward=False)),
}

SHAPE = dict(
    vocab_size=4096, hidden_size=384, hybrid_override_pattern="M-M-M*-M-M-", tie_word_embeddings=True,
    num_attention_heads=6, num_key_value_heads=6, head_dim=64, intermediate_size=1536, mamba_num_heads=12,
    mamba_head_dim=64, ssm_state_size=64, n_groups=4,
)  # fmt: skip
TINY = dict(hybrid_override_pattern="M-*-", mamba_num_heads=2, intermediate_size=128, tie_word_embeddings=True)


@dataclass(frozen=True)
class Setting:
    """What all runs have in common. Widths are multiples of 128, the block of FP8."""

    shape: dict = field(default_factory=lambda: SHAPE)  # of nano_hybrid.HybridConfig
    context: int = 512
    batch_size: int = 16
    lr: float = 3e-3
    warmup: int = 50
    decay: float = 0.5  # last part of the steps, in which the learning rate falls to 0
    val_tokens: int = 1 << 20
    seeds: int = 5
    steps: int | None = None  # None: as many as fit


CPU = Setting(TINY, context=64, batch_size=2, val_tokens=512, warmup=2, seeds=2, steps=10)
FEW_STEPS = 100  # with fewer, differences are noise, and no verdict is given


# ---- 2. a run ---------------------------------------------------------------------------------------------


class Trainee:
    """The model of an arm, and its step: on a GPU a CUDA graph, which is recorded once and serves all seeds.

    A step has a thousand short kernels, more than a host keeps up with. So nothing is compiled; what changes from step
    to step (batch, learning rate) is written into tensors that stay where they are.
    """

    def __init__(self, arm, setting, device, graph=True):
        self.arm, self.setting, self.device, self.graph = arm, setting, torch.device(device), graph
        self.model = Hybrid(HybridConfig(**setting.shape)).to(device)
        names = quantize_model(self.model, NVFP4)  # of every arm the same weights are watched
        self.watched = [self.model.get_submodule(name).weight for name in names]
        self.lr = torch.zeros((), device=device)
        matrices, vectors = ([p for p in self.model.parameters() if (p.dim() > 1) == two] for two in (True, False))
        groups = [dict(params=matrices, weight_decay=0.1), dict(params=vectors, weight_decay=0.0)]
        on_gpu = self.device.type == "cuda"
        self.optimizer = torch.optim.AdamW(groups, self.lr, betas=(0.9, 0.95), fused=True, capturable=on_gpu)
        self.autocast = torch.autocast(device, torch.bfloat16, enabled=on_gpu)
        shape = setting.batch_size, setting.context
        self.batch = {name: torch.zeros(shape, dtype=torch.int64, device=device) for name in ("ids", "targets")}
        recipes = {0.0: arm.recipe} | ({SWITCH: arm.last} if arm.last else {})
        self.phases = {share: (recipe, self.recorded(recipe)) for share, recipe in recipes.items()}

    def quantize(self, recipe):
        """Makes the model one of `recipe`."""
        quantize_model(self.model, recipe, everything=self.arm.everything)

    def recorded(self, recipe):
        """Returns the training step of `recipe`."""
        self.quantize(recipe)
        step = GraphedStep(self.step, self.device, torch.bfloat16, recordable=self.graph)
        if step.records:  # the step before the recording must not be on the main stream: autograd remembers it
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                step()
            torch.cuda.current_stream().wait_stream(stream)
            step()
        return step

    def step(self):
        """Learns from `batch`. Returns the share of watched weights whose gradient is exactly zero, a tensor []."""
        self.optimizer.zero_grad()
        with self.autocast:
            loss, _ = self.model.loss(**self.batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        return sum((w.grad == 0).sum() for w in self.watched) / sum(w.numel() for w in self.watched)

    def begin(self, seed):
        """Gives the model the first weights of `seed`, drawn on the CPU: the same for every arm."""
        torch.manual_seed(seed)
        self.model.load_state_dict(Hybrid(self.model.config).state_dict())
        for state in self.optimizer.state.values():
            for tensor in state.values():
                tensor.zero_()
        torch.manual_seed(seed)  # of stochastic rounding

    def run(self, seed, steps, corpus):
        """Trains from scratch, and returns a dict.

        val_loss: in nats, by the arm's own forward; zeros: what `step` returned at `measured_steps`; seconds: in all;
        ms_per_step: of training.
        """
        setting, zeros, began = replace(self.setting, steps=steps), [], time.perf_counter()
        objective = NextToken(corpus, setting.context, setting.batch_size, seed)
        starts = {round(share * steps): phase for share, phase in self.phases.items()}
        self.begin(seed)
        self.model.train()
        prepared = time.perf_counter()
        for step in range(steps):
            if step in starts:
                recipe, learn = starts[step]
                self.quantize(recipe)
            for name, value in objective.batch(self.model, step).items():
                self.batch[name].copy_(value)
            self.lr.fill_(setting.lr * schedule(step, setting))
            share = learn()
            if step in measured_steps(steps):
                zeros.append(share.clone())
        zeros = torch.stack(zeros).tolist()  # waits for the device
        trained = time.perf_counter()
        self.model.eval()
        with self.autocast:
            val_loss = objective.evaluate(self.model)["val_loss"]
        seconds, training = time.perf_counter() - began, trained - prepared
        return dict(val_loss=val_loss, zeros=zeros, seconds=seconds, ms_per_step=1e3 * training / steps)


def measured_steps(steps):
    """Returns the steps, about twenty of them, whose gradients are looked at."""
    return range(0, steps, max(1, steps // 20))


# ---- 3. all runs ------------------------------------------------------------------------------------------


@dataclass
class Budget:
    """What all runs together may take."""

    minutes: float = 9.0  # set-up included; on a GPU the number of steps follows from it
    steps: int | None = None  # optimiser steps of a run; default: as many as fit, on a CPU 10
    seeds: int | None = None  # paired seeds; default: 5, on a CPU 2
    graph: bool = True  # on a GPU, record the step of each arm as a CUDA graph


def fitting_steps(trainees, corpus, setting, seconds):
    """Returns how many steps a run may have so that all runs take `seconds`, by a first run of each arm.

    Texts are read MAX_FRESH_EPOCHS times at most: a model that learns them by heart may gain from noise.
    Raises ValueError if that is less than FEW_STEPS.
    """
    first = [trainee.run(0, 20, corpus) for trainee in trainees.values()]
    for name, run in zip(trainees, first):
        print(f"{name:28}{run['ms_per_step']:8.2f} ms a step")
    step = sum(run["ms_per_step"] for run in first) / 1e3
    around = sum(run["seconds"] for run in first) - 20 * step  # first weights, evaluation
    left = seconds - sum(run["seconds"] for run in first)
    steps = int((0.92 * left / setting.seeds - around) / step)  # room for a card that gets warm
    most = MAX_FRESH_EPOCHS * corpus.n_train // (setting.context * setting.batch_size)
    if steps < FEW_STEPS:
        raise ValueError(f"only {steps} steps fit: give more --minutes, or fewer --seeds than {setting.seeds}")
    steps = min(steps, most)
    print(f"{steps} steps, {around + steps * step:.0f} s a seed, of {seconds:.0f} s left for {setting.seeds} seeds")
    return steps


def made_with(setting, device):
    """Returns what makes runs comparable, as a row of the runs has it: all but the number of seeds."""
    card = torch.cuda.get_device_name() if device == "cuda" else "CPU"
    return json.loads(json.dumps(asdict(setting) | dict(seeds=None, card=card)))


def finished_runs(path, setting, device):
    """Returns (setting, rows): the rows of `path`, and if steps were left open, those of its runs.

    Raises ValueError for runs of another setting, or on another device.
    """
    rows = read_jsonl(path, cut_off=True) if path.exists() else []
    if rows and not setting.steps:
        setting = replace(setting, steps=rows[0]["made_with"]["steps"])
    if any(row["made_with"] != made_with(setting, device) for row in rows):
        raise ValueError(f"{path} has runs with other settings or of another device: move or remove it")
    if rows:
        print(f"{path} has {len(rows)} finished runs: they are not made again")
    return setting, rows


def make_runs(arms, setting, corpus, device, path, limit, graph=True):
    """Trains every arm with every seed, seed by seed; returns (setting, rows), the rows of whole seeds.

    Appends each row to `path` at once. Begins no seed that would end after `limit`, a time of perf_counter.
    """
    setting, rows = finished_runs(path, setting, device)
    done = {(row["arm"], row["seed"]) for row in rows}
    trainees = {name: Trainee(arm, setting, device, graph) for name, arm in arms.items()}
    if not setting.steps:
        for trainee in trainees.values():
            trainee.run(0, 1, corpus)  # compiles what is left to compile, for evaluation
        setting = replace(setting, steps=fitting_steps(trainees, corpus, setting, limit - time.perf_counter()))
    tokens = setting.steps * setting.batch_size * setting.context
    print(f"{device}: {len(arms)} arms, {setting.seeds} seeds, {setting.steps} steps, {tokens:,} tokens a run")
    path.parent.mkdir(parents=True, exist_ok=True)
    for seed in range(setting.seeds):
        missing = [name for name in trainees if (name, seed) not in done]
        taken = [max([row["seconds"] for row in rows if row["arm"] == name], default=0) for name in missing]
        if time.perf_counter() + sum(taken) > limit:
            print(f"seed {seed} would not end within --minutes; give the command again, and it goes on from here")
            break
        for name in missing:
            run = trainees[name].run(seed, setting.steps, corpus)
            rows.append(dict(arm=name, seed=seed, made_with=made_with(setting, device)) | run)
            append_jsonl(path, rows[-1])
            print(f"seed {seed}  {name:28}loss {run['val_loss']:.4f}{run['seconds']:7.1f} s", flush=True)
    have = {seed: {row["arm"] for row in rows if row["seed"] == seed} for seed in range(setting.seeds)}
    return setting, [row for row in rows if have.get(row["seed"]) == set(arms)]


# ---- 4. what came out -------------------------------------------------------------------------------------


def told_apart(differences, judges=True):
    """Returns (mean, standard error, verdict) of paired differences.

    The verdict is "null" unless a two-sided t-test at 5 % tells the mean from 0: "worse" above it, "better" below;
    "diverges" if a number is not finite. Without `judges` there is none.
    """
    n = len(differences)
    if not all(map(math.isfinite, differences)):
        return math.nan, math.nan, "diverges"
    center, error = mean(differences), stdev(differences) / n**0.5 if n > 1 else math.nan
    differs = abs(center) > student.ppf(0.975, max(1, n - 1)) * error
    verdict = "null" if not differs else "worse" if center > 0 else "better"
    return center, error, verdict if judges else ""


def to_rows(runs, arms, judges=True):
    """Returns a dict for each arm: losses, gaps to BF16 and beside NVFP4's (`told_apart`), zeros, ms_per_step.

    runs: of whole seeds. Gaps are in %, by seed; zeros are means over the seeds, by step.
    """
    of = {name: [run for run in sorted(runs, key=lambda run: run["seed"]) if run["arm"] == name] for name in arms}
    losses = {name: [run["val_loss"] for run in of[name]] for name in arms}
    gaps = {name: [100 * (a - b) / b for a, b in zip(losses[name], losses["BF16"])] for name in arms}
    return [
        dict(
            arm=name, paper=arm.paper, losses=losses[name], gaps=gaps[name], gap=told_apart(gaps[name], judges),
            beside_nvfp4=told_apart([a - b for a, b in zip(gaps[name], gaps["NVFP4"])], judges),
            zeros=[mean(at) for at in zip(*(run["zeros"] for run in of[name]))],
            ms_per_step=min(run["ms_per_step"] for run in of[name]),
        )
        for name, arm in arms.items()
    ]  # fmt: skip


def shown(center, error, verdict):
    """Returns what `told_apart` found, as text."""
    return verdict if math.isnan(center) else f"{center:+.2f} ± {error:.2f} {verdict:8}"


def print_rows(rows):
    """Prints the table."""
    print(f"\n{'':28}{'loss':>8}{'above BF16, %':>24}{'above NVFP4, points':>24}{'zeros':>8}{'ms':>8}  papers")
    for row in rows:
        gap = "" if row["arm"] == "BF16" else shown(*row["gap"])
        beside = "" if row["arm"] in ("BF16", "NVFP4") else shown(*row["beside_nvfp4"])
        print(f"{row['arm']:28}{mean(row['losses']):8.4f}{gap:>24}{beside:>24}{row['zeros'][-1]:8.3%}"
              f"{row['ms_per_step']:8.2f}  {row['paper']}")  # fmt: skip
    error = max((row["gap"][1] for row in rows if not math.isnan(row["gap"][1])), default=math.nan)
    print(f"\nlargest standard error above BF16: {error:.2f} % (0.2 % is what was aimed at)")


def draw(rows, steps, path):
    """Draws the gap of each arm, a dot for each seed, and the share of zero gradients over time; writes them."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), dpi=150, layout="constrained")
    others = [row for row in rows if row["arm"] != "BF16"][::-1]
    for y, row in enumerate(others):
        left.plot(row["gaps"], [y] * len(row["gaps"]), "o", color="#999999", markersize=3)
        left.errorbar(row["gap"][0], y, xerr=row["gap"][1], fmt="o", color="#0072B2", capsize=3)
    left.axvline(0, color="#D55E00", linewidth=1)
    left.set_yticks(range(len(others)), [row["arm"] for row in others])
    left.set(xlabel="validation loss above BF16's, %")
    left.set_title("mean and its standard error; grey: seeds", fontsize=9)
    by_arm = {row["arm"]: row for row in rows}
    for name, color in (("BF16", "#D55E00"), ("NVFP4", "#0072B2")):
        right.plot(measured_steps(steps), [100 * share for share in by_arm[name]["zeros"]], color=color, label=name)
    right.set(xlabel="step", ylabel="%", ylim=0)
    right.set_title("weight gradients that are exactly zero", fontsize=9)
    right.legend(frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
    center, error, _ = by_arm["NVFP4"]["gap"]
    costs = f"NVFP4's loss is {center:.2f} ± {error:.2f} % above BF16's"
    figure.suptitle(costs if steps >= FEW_STEPS else f"After {steps} steps, differences are noise")
    save_plot(figure, path)


def report(arms, setting, runs, bench, pictures):
    """Prints the table; writes the picture nvfp4.png and the record nvfp4.json to these folders."""
    rows = to_rows(runs, arms, setting.steps >= FEW_STEPS)
    print_rows(rows)
    if setting.steps < FEW_STEPS:
        print(f"{setting.steps} steps show that every arm trains. They show no difference of losses: that takes a GPU.")
    draw(rows, setting.steps, pictures / "nvfp4.png")
    with torch.device("meta"):
        parameters = Hybrid(HybridConfig(**setting.shape)).num_parameters()
    found = dict(seeds=len({run["seed"] for run in runs}), parameters=parameters, setting=asdict(setting),
                 measured_at=list(measured_steps(setting.steps)), rows=rows)  # fmt: skip
    (bench / "nvfp4.json").write_text(json.dumps(provenance() | found, indent=1) + "\n")
    print(f"record: {bench / 'nvfp4.json'}")


def study(budget, arms=ARMS, setting=None, out=Path("out")):
    """Makes all runs, or those that are missing, and reports them. Raises ValueError for settings that cannot be."""
    limit = time.perf_counter() + 60 * budget.minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    setting, path = setting or (Setting() if device == "cuda" else CPU), out / "nvfp4_runs.jsonl"
    given = {name: getattr(budget, name) for name in ("steps", "seeds") if getattr(budget, name) is not None}
    if min(budget.minutes, *given.values(), 1) <= 0:
        raise ValueError("--minutes, --steps and --seeds must be above 0")
    setting = replace(setting, **given)
    corpus = load_corpus("python", "python4k", setting.context)
    corpus = replace(corpus, val=corpus.val[: setting.val_tokens])
    setting, runs = make_runs(arms, setting, corpus, device, path, limit, budget.graph)
    n_seeds = len({run["seed"] for run in runs})
    if not n_seeds:
        raise ValueError("no seed has all its arms yet; give the command again, and it goes on")
    whole = n_seeds == setting.seeds
    real = whole and device == "cuda" and n_seeds >= Setting().seeds and setting.steps >= FEW_STEPS
    report(arms, setting, runs, ROOT / "assets" / "bench" if real else out, ROOT / "assets" if real else out)
    if whole:
        path.unlink()  # all of it is in the record


def main(argv=None):
    """Returns the exit status: 0 done, 2 a mistake on the command line."""
    about = "Trains small models in BF16, FP8, NVFP4 and NVFP4 without one part, by paired seeds."
    try:
        study(Budget(**parse(Budget, prog="python -m experiments.nvfp4", about=about, argv=argv)))
    except ValueError as error:
        return fail(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
