"""Trains any model of this suite on any objective: one loop.

    python train.py                                   a hybrid Mamba-2 language model on Python's own source code
    python train.py --data='books/*.txt' --steps=5000
    python train.py --recipe=lla                      local linear attention where `hybrid` has softmax attention
    python train.py --recipe=mdlm                     masked diffusion; and --recipe=dultra, --recipe=grpo: see below
    python train.py --resume                          goes on with the newest run
    torchrun --standalone --nproc_per_node=8 train.py

What is learnt is an objective, a small class in its paper's file:

    class Objective:
        def batch(self, model, step) -> dict              # data, or fresh rollouts of the model
        def loss(self, model, batch) -> (loss, metrics)   # differentiable
        def evaluate(self, model) -> dict                 # numbers to log; 'val_loss' or 'reward' is plotted
        def build(self, config) -> nn.Module              # optional: the model to train, where it is not a `Hybrid`
        def lr_scale(self, step, lr) -> float             # optional: a factor on the learning rate of a step
        def part_scale(self, step, part) -> float         # optional: the same for a part of the model, "planner"
        def epochs(self, tokens) -> float                 # optional: how often a run of so many reads its data
        def state_dict(self) / load_state_dict(self, s)   # optional: what a checkpoint keeps of it

Everything else is here: optimiser, schedule, precision, clipping, logging, checkpoints, resuming, many GPUs.
Randomness is a function of (seed, step, rank), data included, so a run that is stopped and resumed is the run.

A run lives in out/<run>/: config.json and model.safetensors (what sample.py and `transformers` open), trainer.pt
(weights, optimiser and step in one file, so that they always belong together), log.jsonl, loss.png.

log.jsonl has one row per step:
    loss          nats per token of this step's batches, mean over all processes; of rewards: see grpo.policy_loss
    grad_norm     norm of the whole gradient before clipping
    lr            learning rate of the step; dultra: of the backbone, also where only the planner learns
    tokens_per_s  over all processes, from the end of the step before to the end of this one (the first one compiles);
                  of reinforcement learning: tokens of answers (or demos) sampled, judged and learnt from
    mfu           model FLOPs utilisation: FLOPs it needs / time / the GPU's dense bf16 peak; text and known GPUs only
    skipped       steps left out so far because loss or gradient was not finite
    mtp1_loss, mtp1_accuracy, ...            of multi-token prediction, by depth: see Hybrid.mtp_loss
    load_max, dead_experts, router_entropy   of mixtures of experts: see latent_moe.load_metrics
    train_reward, informative, entropy, ...  of reinforcement learning: see grpo.GRPO and grpo.policy_loss
    masked_loss, nfe, accuracy, coins, ...   of masked diffusion: see mdlm_dultra.mdlm_loss and mdlm_dultra.DUltra
    val_loss      nats per token of the validation text, where it was evaluated; of masked diffusion a bound from above
    val_bpb       bits per byte of that text: comparable across tokenizers, and with compressors
    reward        mean reward of sampled answers to held-out prompts, where it was evaluated (dultra: the share right)
"""

import importlib.util
import json
import math
import os
import pickle
import signal
import statistics
import sys
import time
import zipfile
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from tqdm import tqdm

import grpo
import mdlm_dultra
from common.checkpoints import replacing
from common.cli import fail, parse, pick_device, pick_dtype
from common.data import Tokenizer, load_corpus
from common.objectives import NextToken, Recipe, RunInfo
from grpo import GRPO, GRPOConfig
from kernels import pick_backend
from nano_hybrid import PRESETS as HYBRIDS
from nano_hybrid import Hybrid, HybridConfig

PRESETS = HYBRIDS | grpo.PRESETS | mdlm_dultra.PRESETS
OUT = Path("out")
MAX_BAD_STEPS = 10  # non-finite steps in a row before giving up
PEAK_FLOPS = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L4": 121e12, "4090": 165e12}  # dense bf16

# ---- 1. configuration ---------------------------------------------------------------------------------------------


@dataclass
class TrainConfig:
    """The settings of a run. None means: what the recipe says. The comment is the --help text."""

    recipe: str = "hybrid"  # what to train, a row of RECIPES: hybrid, nano3, super3, lla, mdlm, grpo or dultra
    preset: str | None = None  # shape of the model: a name in nano_hybrid.PRESETS
    data: str = "python"  # "python" (the standard library's source), a file, folder or glob, or token shards *.bin
    tokenizer: str | None = None  # python4k, bytes, or one of tiktoken's: gpt2, cl100k_base, ...; default: the recipe's
    context: int | None = None  # T, tokens per row
    batch_size: int | None = None  # rows per process and micro-step
    grad_accum: int = 1  # micro-steps per optimiser step
    steps: int | None = None  # optimiser steps in all
    lr: float | None = None  # peak learning rate
    weight_decay: float | None = None  # on matrices only; default 0.1, or REPEATED's
    warmup: int | None = None  # steps of linear warm-up
    decay: float | None = None  # last part of the steps, in which the learning rate falls to 0; default 0.5
    grad_clip: float = 1.0  # largest norm of the gradient
    seed: int = 0  # of weights, data order and dropout
    device: str = "auto"  # cuda, mps or cpu
    dtype: str = "auto"  # float32, bfloat16 or float16 (autocast; weights stay float32)
    compile: bool | None = None  # torch.compile the layers; default: where it pays
    eval_every: int | None = None  # steps between evaluations
    save_every: int | None = None  # steps between checkpoints; default: at each evaluation
    run: str | None = None  # name of the run's folder in out/; default: the recipe, numbered
    resume: bool = False  # go on with --run, or with the newest run
    log: str = ""  # also log to wandb or tensorboard


_CPU = dict(tokenizer="python4k", context=256, batch_size=8, steps=500, warmup=50, lr=6e-3, eval_every=250)
_GPU = dict(tokenizer="python4k", context=1024, batch_size=16, steps=2000, warmup=100, lr=2e-3, eval_every=250)
_GRPO = dict(tokenizer="bytes", context=64, lr=3e-3, weight_decay=0.0, decay=0.2, warmup=20, compile=False)
EVERYTHING = "sort:10,countdown,countdown:3,add:5,chain,brackets,json,instruct,lookup,tool"  # and again what is hard:
EVERYTHING += ",sort:10,countdown,countdown:3,add:5,countdown:3,countdown:3"
RECIPES = {
    "hybrid": Recipe(NextToken, cpu=dict(preset="tiny", **_CPU), gpu=dict(preset="small", **_GPU)),
    "nano3": Recipe(NextToken, cpu=dict(preset="nano3-tiny", **_CPU), gpu=dict(preset="nano3", **_GPU)),
    "super3": Recipe(NextToken, cpu=dict(preset="super3-tiny", **_CPU), gpu=dict(preset="super3", **_GPU)),
    # Its softmax twin is the same command with * for L in the pattern: --hybrid_override_pattern='M-M*-M-' on a CPU,
    # 'M-M-M*-M-M-M*-M-M-' on a GPU. It lacks D + H parameters a layer: the norm of q and k, and the ridges.
    "lla": Recipe(NextToken, cpu=dict(preset="lla-tiny", **_CPU), gpu=dict(preset="lla", **_GPU)),
    # Short rows of many lengths: nothing for a compiler to gain. batch_size is prompts times group_size.
    "grpo": Recipe(
        GRPO,
        cpu=dict(preset="grpo-tiny", **_GRPO, batch_size=256, steps=420, eval_every=70),
        gpu=dict(preset="grpo", **_GRPO | dict(lr=1e-3, warmup=100), batch_size=1280, steps=1700, eval_every=100),
        settings_gpu=dict(envs=EVERYTHING, warm_start=700, rl_lr=2e-4, entropy_coef=0.01),
    ),
} | mdlm_dultra.RECIPES

SETTINGS = {GRPO: GRPOConfig, mdlm_dultra.DUltra: mdlm_dultra.DUltraConfig}  # what an objective has of its own

# A model that reads a text more than MAX_FRESH_EPOCHS times learns it by heart unless it is held back (Muennighoff et
# al., arXiv:2305.16264: up to four passes are nearly as good as new text). Then these are the defaults.
MAX_FRESH_EPOCHS = 4
FRESH = dict(weight_decay=0.1, hidden_dropout=0.0)
REPEATED = dict(weight_decay=1.0, hidden_dropout=0.5)

# ---- 2. set-up: everything a user's mistake can break ---------------------------------------------------------------


@dataclass
class Run:
    """What the loop works with."""

    config: TrainConfig
    directory: Path
    device: torch.device
    dtype: torch.dtype
    rank: int
    world_size: int
    objective: object
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # optimiser steps done
    skipped: int = 0  # steps left out because something was not finite

    @property
    def tokens_per_step(self):
        """Tokens of one optimiser step, over all processes."""
        return self.config.batch_size * self.config.context * self.config.grad_accum * self.world_size

    def autocast(self):
        """Returns the context in which the model computes."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def say(self, *words):
        """Prints, once however many processes there are, and without breaking the progress bar."""
        if self.rank == 0:
            tqdm.write(" ".join(map(str, words)))


def set_up(argv):
    """Returns the Run that the command line asks for. Raises ValueError or OSError with what is wrong in one line."""
    about = "Trains any model of this suite on any objective. With no flags: a hybrid language model on Python source."
    given, shape, *rest = parse(TrainConfig, HybridConfig, *SETTINGS.values(), prog="train.py", about=about, argv=argv)
    resume = given.get("resume", False)
    directory = find_run(given.get("run"), resume, given.get("recipe", TrainConfig.recipe))
    saved = load_checkpoint(directory) if resume else None
    config = resolve(given, saved)
    device, rank, world_size = join_processes(config.device)
    dtype, reason = pick_dtype(config.dtype, device)
    if dtype == torch.float32:  # TF32 on a GPU. Under autocast what is left in float32 (routers) is so for a reason
        torch.set_float32_matmul_precision("high")

    settings = settings_of(config, dict(zip(SETTINGS, rest)))
    objective = make_objective(config, given, settings, saved, rank, world_size)
    tokens = config.steps * config.batch_size * config.context * config.grad_accum * world_size
    epochs = objective.epochs(tokens) if isinstance(objective, NextToken) else 0
    held_back = REPEATED if epochs > MAX_FRESH_EPOCHS else FRESH
    if config.weight_decay is None:
        config.weight_decay = held_back["weight_decay"]
    model_config = shape_of(config, objective, shape, held_back["hidden_dropout"], saved)

    if type(objective) in SETTINGS and model_config.hidden_dropout:
        why = "the sampler and the trainer must be one policy"
        raise ValueError(f"--hidden_dropout: with --recipe={config.recipe} {why}; leave it 0")

    torch.manual_seed(config.seed)
    built = objective.build(model_config) if hasattr(objective, "build") else None
    model = (built or Hybrid(model_config)).to(device)
    if config.compile:
        model.compile()
    if world_size > 1:
        mesh = init_device_mesh(device.type, (world_size,))
        for layer in model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for method in ("loss", "logprobs"):
            register_fsdp_forward_method(model, method)
    # Norms, biases, A_log, D, dt_bias and raw_ridge are vectors, and never decayed.
    groups = {}
    for name, p in model.named_parameters():
        part, decays = "planner" if name.startswith("planner.") else "", p.dim() >= 2
        settings_of_group = dict(params=[], part=part, weight_decay=config.weight_decay * decays)
        groups.setdefault((part, decays), settings_of_group)["params"].append(p)
    optimizer = torch.optim.AdamW(
        [*groups.values()], lr=config.lr, betas=(0.9, 0.95), fused=device.type in ("cuda", "cpu")
    )
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    run = Run(config, directory, device, dtype, rank, world_size, objective, model, optimizer, scaler)
    if saved:
        restore(run, saved)

    parameters = f"{model.num_parameters() / 1e6:.2f}M parameters"
    if model.moe_layers():
        parameters += f" ({model.num_parameters(active=True) / 1e6:.2f}M active)"
    run.say(f"run: {directory}, {'resumed at' if saved else 'from'} step {run.step} of {config.steps}")
    run.say(
        f"model: {model_config.hybrid_override_pattern}, {parameters} on "
        f"{world_size} x {device.type}, {str(dtype)[6:]} ({reason}), backend {pick_backend(device=device)}, "
        f"compile={config.compile}"
    )
    amount = f"; {run.tokens_per_step:,} tokens a step, {epochs:.1f} epochs" if epochs else ""
    run.say(
        f"data: {objective.about()}{amount}: dropout {model_config.hidden_dropout}, weight decay {config.weight_decay}"
    )
    for name, value in settings.items() if saved else ():
        if value != saved["objective"].get(name, value):
            run.say(f"changed: --{name}={value}, until now {saved['objective'][name]}")
    return run


def join_processes(name):
    """Returns (device, rank, world size) of this process. Under torchrun, joins it with the others."""
    device = pick_device(name)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, rank, world_size


def settings_of(config, given):
    """Returns the flags of the recipe's own settings. given: objective -> flags of its settings (SETTINGS).

    Raises ValueError if the command line has a setting of another recipe.
    """
    own = SETTINGS.get(RECIPES[config.recipe].objective)
    for objective, flags in given.items():
        foreign = set(flags) - {f.name for f in fields(own)} if own else set(flags)
        if foreign:
            recipe = next(name for name, row in RECIPES.items() if row.objective is objective)
            raise ValueError(
                f"--{min(foreign)} is a setting of --recipe={recipe}; --recipe={config.recipe} has none such"
            )
    return given.get(RECIPES[config.recipe].objective, {})


FIXED = {GRPO: ("envs", "updates", "group_size", "curriculum"), mdlm_dultra.DUltra: mdlm_dultra.DUltra.fixed[:-1]}


def make_objective(config, given, settings, saved, rank, world_size):
    """Returns the recipe's objective. given, settings: flags of TrainConfig and of the objective's own settings."""
    where, kind = dict(seed=config.seed, rank=rank, world_size=world_size), RECIPES[config.recipe].objective
    if kind not in SETTINGS:
        corpus = load_corpus(config.data, config.tokenizer, config.context)
        return kind(corpus, config.context, config.batch_size, **where)
    if kind is GRPO and (config.grad_accum > 1 or world_size > 1):
        raise ValueError(
            f"--recipe={config.recipe} runs in one process, without --grad_accum; make --batch_size larger instead"
        )
    on_gpu = pick_device(config.device).type == "cuda"
    begun = saved["objective"] if saved else RECIPES[config.recipe].settings_gpu if on_gpu else {}
    changed = [name for name in FIXED[kind] if saved and settings.get(name, begun[name]) != begun[name]]
    if changed:
        raise ValueError(
            f"--{changed[0]}={settings[changed[0]]}: the run was begun with {begun[changed[0]]}; start a new run"
        )
    if saved and config.batch_size != saved["config"]["batch_size"]:
        raise ValueError(f"--batch_size: the run was begun with {saved['config']['batch_size']}; start a new run")
    settings = SETTINGS[kind](**(begun | settings))
    if kind is not GRPO:
        return kind.from_run(RunInfo(config, config.tokenizer, frozenset(given), **where), settings)
    if settings.warm_start >= config.steps:
        raise ValueError(f"--warm_start={settings.warm_start} leaves none of --steps={config.steps} for rewards")
    objective = kind(settings, Tokenizer(config.tokenizer), config.batch_size, **where)
    if unused := {"data", "context"} & set(given):
        raise ValueError(f"--{min(unused)} has no meaning with --recipe={config.recipe}: its tasks come from --envs")
    return objective


def shape_of(config, objective, shape, dropout, saved):
    """Returns the HybridConfig to build: the command line's fields over the resumed run's, or over the preset's."""
    n_vocab = objective.tokenizer.n_vocab + getattr(objective, "extra_tokens", 0)
    base = saved["model_config"] if saved else dict(vocab_size=-(-n_vocab // 64) * 64, hidden_dropout=dropout)
    model_config = replace(PRESETS[config.preset], **(base | shape))  # a vocabulary of 64 n suits matrix units
    if model_config.vocab_size < n_vocab:
        raise ValueError(
            f"vocab_size={model_config.vocab_size} is less than the {n_vocab} tokens of "
            f"--tokenizer={config.tokenizer}; leave --vocab_size out, or name the tokenizer that the run began with"
        )
    return model_config


def find_run(name, resume, recipe):
    """Returns the folder of the run to begin or to resume. A run that is there is never written over."""
    if not resume:
        if name is None:
            names = [recipe] + [f"{recipe}-{i}" for i in range(2, 1000)]
            name = next(n for n in names if not (OUT / n).exists())
        if (OUT / name / "trainer.pt").exists():
            raise ValueError(f"{OUT / name} has a run already; add --resume to go on with it, or choose another --run")
        return OUT / name
    if name is None:
        runs = sorted(OUT.glob("*/trainer.pt"), key=lambda p: p.stat().st_mtime)
        if not runs:
            raise FileNotFoundError(
                f"--resume: there is no run with a trainer.pt in {OUT}/; start one without --resume"
            )
        return runs[-1].parent
    if not (OUT / name / "trainer.pt").exists():
        raise FileNotFoundError(f"--resume: {OUT / name} has no trainer.pt; leave --resume out to start it")
    return OUT / name


def resolve(given, saved):
    """Returns the TrainConfig, with no None left but weight_decay. Raises ValueError for a setting that cannot be.

    In order of weight: the command line, the run that is resumed, the recipe's row for the device, the defaults.
    """
    config = TrainConfig(**((saved["config"] if saved else {}) | given))
    if config.recipe not in RECIPES:
        raise ValueError(f"unknown recipe {config.recipe!r}; known: {', '.join(RECIPES)}")
    on_gpu = pick_device(config.device).type == "cuda"
    row = RECIPES[config.recipe].gpu if on_gpu else RECIPES[config.recipe].cpu
    # On a CPU, compiling takes up to a minute and then saves a fifth to a third of each step: for long runs only.
    row = dict(compile=on_gpu, decay=0.5, save_every=config.eval_every or row["eval_every"]) | row
    config = replace(config, **{k: v for k, v in row.items() if getattr(config, k) is None})
    if config.preset not in PRESETS:
        raise ValueError(f"unknown preset {config.preset!r}; known: {', '.join(PRESETS)}")
    for name in ("context", "batch_size", "grad_accum", "steps", "eval_every", "save_every"):
        if getattr(config, name) < 1:
            raise ValueError(f"--{name}={getattr(config, name)} must be at least 1")
    if not (config.lr > 0 and 0 <= config.decay <= 1 and config.grad_clip > 0 and config.warmup >= 0 <= config.seed):
        raise ValueError("need lr > 0, 0 <= decay <= 1, grad_clip > 0, warmup >= 0 and seed >= 0")
    if config.log not in ("", "wandb", "tensorboard"):
        raise ValueError(f"--log={config.log} is unknown; use wandb or tensorboard")
    if config.log and not importlib.util.find_spec(config.log):
        raise ValueError(f"--log={config.log} needs a package that is not installed: pip install {config.log}")
    if saved and saved["step"] >= config.steps:
        raise ValueError(f"the run has done all its {saved['step']} steps; to go on, add --steps=N with a larger N")
    return config


# ---- 3. checkpoints -------------------------------------------------------------------------------------------------

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # sharded or not, a checkpoint is whole, on the CPU


def settings_in(objective):
    """Returns the settings of an objective, or None."""
    return getattr(objective, "settings", None) or getattr(objective, "config", None)


def save_checkpoint(run):
    """Writes trainer.pt, from which a run resumes, then config.json and model.safetensors, which others read.

    trainer.pt replaces the old one in a single move, so a run killed at any moment has one whole checkpoint.
    """
    weights = get_model_state_dict(run.model, options=WHOLE)  # all processes take part
    optimizer = get_optimizer_state_dict(run.model, run.optimizer, options=WHOLE)
    if run.rank == 0:
        run.directory.mkdir(parents=True, exist_ok=True)
        config = asdict(run.config)
        state = dict(
            step=run.step, skipped=run.skipped, config=config, model_config=asdict(run.model.config),
            model=weights, optimizer=optimizer, scaler=run.scaler.state_dict(),
            objective=asdict(settings) if (settings := settings_in(run.objective)) else {},
            objective_state=run.objective.state_dict() if hasattr(run.objective, "state_dict") else {},
        )  # fmt: skip
        with replacing(run.directory / "trainer.pt") as path:
            torch.save(state, path)
        run.model.save_pretrained(run.directory, state_dict=weights, nanopapers=config)


def load_checkpoint(directory):
    """Returns the dict that `save_checkpoint` wrote. Raises ValueError for a damaged file, or one that is not ours.

    weights_only: nothing in a checkpoint is ever executed.
    """
    path = directory / "trainer.pt"
    damaged = ValueError(f"{path} is damaged or not a checkpoint of train.py; choose another --run")
    if not zipfile.is_zipfile(path):  # torch.save writes a zip, whose directory comes last: half a file has none
        raise damaged
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError):
        raise damaged from None
    parts = dict(config=[TrainConfig], model_config=[HybridConfig], objective=SETTINGS.values())
    others = {"step", "skipped", "model", "optimizer", "scaler", "objective_state"}
    ours = isinstance(saved, dict) and others | set(parts) <= set(saved)
    known = {part: [{f.name for f in fields(config)} for config in configs] for part, configs in parts.items()}
    if not ours or not all(any(set(saved[part]) <= names for names in known[part]) for part in parts):
        raise ValueError(f"{path} is not a checkpoint of this version of train.py; choose another --run")
    return saved


def restore(run, saved):
    """Puts a loaded checkpoint into the run. Raises ValueError if the command line asked for another shape."""
    asked, was = asdict(run.model.config), saved["model_config"]
    changed = [k for k in asked if asked[k] != was.get(k, asked[k]) and k not in ("hidden_dropout", "chunk_size")]
    if changed:
        raise ValueError(
            f"--{changed[0]}={asked[changed[0]]}: the run was begun with {was[changed[0]]}; start a new run"
        )
    set_model_state_dict(run.model, saved["model"], options=WHOLE)
    set_optimizer_state_dict(run.model, run.optimizer, saved["optimizer"], options=replace(WHOLE, strict=False))
    for name, parameter in run.model.named_parameters():  # what has had no gradient yet, a planner, has no state
        if name not in saved["optimizer"]["state"]:
            run.optimizer.state.pop(parameter, None)
    for group in run.optimizer.param_groups:
        if group["params"][0].dim() >= 2:
            group["weight_decay"] = run.config.weight_decay  # it may have been given anew
        group["fused"] = run.optimizer.defaults["fused"]  # the run may come from another kind of device
    run.scaler.load_state_dict(saved["scaler"])
    if saved["objective_state"]:
        run.objective.load_state_dict(saved["objective_state"])
    run.step, run.skipped = saved["step"], saved["skipped"]


# ---- 4. logs --------------------------------------------------------------------------------------------------------


class Log:
    """Rows of numbers, to log.jsonl and to the service asked for."""

    def __init__(self, run):
        self.path = run.directory / "log.jsonl"
        run.directory.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text().splitlines() if self.path.exists() else []
        self.rows = [json.loads(line) for line in lines if line.endswith("}")]  # a kill can cut the last one short
        self.rows = [row for row in self.rows if row["step"] <= run.step]  # those after the checkpoint come again
        with replacing(self.path) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in self.rows))
        self.write = lambda step, row: None
        if run.config.log == "wandb":
            import wandb

            wandb.init(project="nanopapers", name=run.directory.name, config=asdict(run.config))
            self.write = lambda step, row: wandb.log(row, step=step)
        elif run.config.log == "tensorboard":
            from torch.utils.tensorboard import SummaryWriter

            writer = SummaryWriter(run.directory)
            self.write = lambda step, row: [writer.add_scalar(k, v, step) for k, v in row.items()]

    def add(self, step, **row):
        """Adds numbers of one step."""
        self.rows.append({"step": step, **row})
        with self.path.open("a") as file:
            file.write(json.dumps(self.rows[-1]) + "\n")
        self.write(step, row)


def plot(log, path, baselines):
    """Draws the run: the validation score (or the reward) over the steps, baselines as dashed lines."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    score = next(k for k in ("val_bpb", "val_loss", "reward") if any(k in row for row in log.rows))
    points = [(row["step"], row[score]) for row in log.rows if score in row]
    label = {"val_bpb": "bits per byte of validation text", "val_loss": "validation loss, nats", "reward": "reward"}[
        score
    ]
    figure, axes = plt.subplots(figsize=(7, 4), dpi=150, layout="constrained")
    axes.plot(*zip(*points), marker="o", color="#0072B2")
    for name, value in baselines.items():
        axes.axhline(value, linestyle="--", linewidth=1, color="#D55E00")
        axes.annotate(f"{name}: {value:.2f}", (points[-1][0], value), ha="right", va="bottom", color="#D55E00")
    axes.margins(y=0.1)
    axes.set(
        xlabel="step",
        ylabel=label,
        title=f"{path.parent.name}: {points[-1][1]:.3f} {label} after {points[-1][0]} steps",
    )
    axes.grid(alpha=0.3)
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


# ---- 5. the loop ----------------------------------------------------------------------------------------------------


def schedule(step, config):
    """Returns the learning rate's share of its peak: linear warm-up, constant, 1 - sqrt(progress through the decay).

    Warmup-stable-decay as in Nemotron 3 Super, arXiv:2604.12374.
    """
    begin = config.steps * (1 - config.decay)
    progress = (step - begin) / max(1, config.steps - begin)
    return min(1, (step + 1) / max(1, config.warmup)) * (1 - math.sqrt(max(0, progress)))


def gradients(run, interrupt):
    """Returns (gradient norm, numbers), tensors, and leaves the clipped gradients in the model.

    numbers: the loss and the objective's metrics, mean over micro-steps and processes, and "noted", > 0 if a process
    was interrupted. Nothing here waits for the device: the host prepares the next step while it is at work.
    """
    config, sums = run.config, {}
    for micro in range(config.grad_accum):
        if run.world_size > 1:
            run.model.set_requires_gradient_sync(micro == config.grad_accum - 1)
        with run.autocast():  # rollouts, too: a sampler of another precision is another policy
            batch = run.objective.batch(run.model, run.step * config.grad_accum + micro)
            loss, metrics = run.objective.loss(run.model, batch)
        run.scaler.scale(loss / config.grad_accum).backward()
        for name, value in (
            {"loss": loss} | metrics
        ).items():  # its own "loss" leaves out what balance and the like add
            value = torch.as_tensor(value, dtype=torch.float32, device=run.device).detach()
            sums[name] = sums.get(name, 0) + value / config.grad_accum / run.world_size
    run.scaler.unscale_(run.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip)
    sums["noted"] = torch.full((), float(interrupt.noted), device=run.device)
    if run.world_size > 1:
        norm, together = norm.full_tensor(), torch.stack(list(sums.values()))
        dist.all_reduce(together, op=dist.ReduceOp.SUM)
        sums = dict(zip(sums, together))
    return norm, sums


def optimizer_step(run, loss, norm):
    """Makes the step, unless loss or gradients are not finite; where the optimiser is fused, the device decides.

    Returns metrics of the mixtures of experts, whose routers move with it.
    """
    finite = torch.isfinite(loss) & torch.isfinite(norm)
    if run.optimizer.defaults["fused"] and not run.scaler.is_enabled():
        run.optimizer.found_inf = (~finite).float()  # as a GradScaler tells it
        run.optimizer.step()
    elif finite:
        run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return run.model.balance_routers(finite)


def evaluate(run):
    """Returns the objective's numbers. Not compiled: another mode and odd shapes would take minutes."""
    run.model.eval()
    with run.autocast(), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        numbers = run.objective.evaluate(run.model)
    run.model.train()
    run.say(f"step {run.step}: " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))
    return numbers


class Interrupt:
    """Notes Ctrl-C (or a SIGTERM) so that the step can end; a second one ends the program at once."""

    def __init__(self):
        self.noted = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note)

    def note(self, *_):
        """The signal handler."""
        if self.noted:
            raise KeyboardInterrupt
        self.noted = True


def train(run):
    """Runs the loop to its end. Returns the exit status: 0, 1 if it gave up, 130 after Ctrl-C.

    Numbers of a step are copied to the host right behind it, and asked for when the next step is on its way: only then
    does asking not leave the device idle. All processes read the same numbers, and so stop together.
    """
    config, interrupt, began = run.config, Interrupt(), time.perf_counter()
    log = Log(run) if run.rank == 0 else None
    bar = progress_bar(run)
    report = Report(run, bar)
    waiting = []  # steps whose numbers the host has not asked for
    run.model.train()
    while run.step < config.steps:
        torch.manual_seed(hash((config.seed, run.step, run.rank)))  # dropout, and whatever a rollout samples
        lr = config.lr * schedule(run.step, config)
        for group in run.optimizer.param_groups:
            group["lr"] = lr
            if group["part"]:
                group["lr"] *= run.objective.lr_scale(run.step, config.lr, group["part"])
            elif hasattr(run.objective, "lr_scale"):
                group["lr"] *= run.objective.lr_scale(run.step, config.lr)
        if hasattr(run.objective, "lr_scale"):
            lr *= run.objective.lr_scale(run.step, config.lr)
        norm, numbers = gradients(run, interrupt)
        numbers |= optimizer_step(run, numbers["loss"], norm)
        run.step += 1
        waiting.append(StepNumbers(run, lr, grad_norm=norm, **numbers))

        last = run.step == config.steps
        evaluates = run.step % config.eval_every == 0 or last
        saves = run.step % config.save_every == 0 or last
        keep = 0 if evaluates or saves or run.device.type != "cuda" else 1  # elsewhere a call returns when it is done
        rows = [report(waiting.pop(0)) for _ in range(len(waiting) - keep)]
        stop = report.stop and not last
        if stop:
            rows += [report(step) for step in waiting]
        if evaluates:
            rows[-1] |= evaluate(run)
        for row in rows if log else []:
            log.add(**row)
        if report.bad >= MAX_BAD_STEPS:
            bar.close()
            run.say(f"stopped: loss or gradient was not finite {report.bad} steps in a row. {run.directory} keeps its "
                    "last checkpoint, if it had come to one; try a smaller --lr, or --dtype=float32")  # fmt: skip
            return 1
        if saves or stop:
            save_checkpoint(run)
        if stop:
            bar.close()
            run.say(f"interrupted, and saved at step {run.step}. To go on:\n"
                    f"  python train.py --resume --run={run.directory.name}")  # fmt: skip
            return 130
        if evaluates or saves:
            report.end_of_last = Moment(run.device)
    bar.close()
    if log:
        finish(run, log, time.perf_counter() - began)
    return 0


class Moment:
    """Now: on a GPU, when it will have done what it was given so far; elsewhere by the clock."""

    def __init__(self, device):
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        self.clock = None if self.event else time.perf_counter()
        if self.event:
            self.event.record()

    def wait(self):
        """Returns when the moment has come."""
        if self.event:
            self.event.synchronize()

    def seconds_since(self, earlier):
        """Returns the time between two moments that have come."""
        return earlier.event.elapsed_time(self.event) / 1000 if self.event else self.clock - earlier.clock


class StepNumbers:
    """The numbers of a step, on their way to the host: copied right behind the step, so that nobody waits for more."""

    def __init__(self, run, lr, **numbers):
        self.step, self.lr, self.names = run.step, lr, list(numbers)
        values = torch.stack([v.detach().float() for v in numbers.values()])
        on_gpu = run.device.type == "cuda"
        self.values = torch.empty(values.shape, pin_memory=on_gpu).copy_(values, non_blocking=on_gpu)
        self.end = Moment(run.device)

    def get(self):
        """Returns name -> float, when the step is done."""
        self.end.wait()
        return dict(zip(self.names, self.values.tolist()))


class Report:
    """Asks for the numbers of a step, shows them, and counts the steps that were left out."""

    def __init__(self, run, bar):
        self.run, self.bar, self.bad, self.stop = run, bar, 0, False
        self.end_of_last = Moment(run.device)
        self.flops, self.peak = run.model.flops_per_token(run.config.context), peak_flops(run.device)

    def __call__(self, step):
        """Returns the row of the log for a StepNumbers. Waits until the device has done the step."""
        run, numbers = self.run, step.get()
        self.stop |= numbers.pop("noted") > 0
        loss, norm = numbers["loss"], numbers["grad_norm"]
        self.bad = 0 if math.isfinite(loss) and math.isfinite(norm) else self.bad + 1
        run.skipped += self.bad > 0
        tokens = numbers.pop("tokens", None)  # None: every position is one
        speed = (tokens or run.tokens_per_step) / max(1e-9, step.end.seconds_since(self.end_of_last))
        self.end_of_last = step.end
        row = dict(step=step.step, lr=step.lr, tokens_per_s=speed, skipped=run.skipped) | numbers
        shown = f"loss {loss:.3f}, {speed:,.0f} tok/s"
        if self.peak and tokens is None:
            row["mfu"] = speed * self.flops / self.peak / run.world_size
            shown += f", MFU {row['mfu']:.1%}"
        self.bar.set_postfix_str(shown, refresh=False)
        self.bar.update()
        return row


def progress_bar(run):
    """Returns the tqdm bar; where stderr is a file it speaks every half minute."""
    often = 0.1 if sys.stderr.isatty() else 30
    return tqdm(
        initial=run.step,
        total=run.config.steps,
        disable=run.rank != 0,
        mininterval=often,
        maxinterval=often,
        unit="step",
    )


def peak_flops(device):
    """Returns the dense bf16 FLOP/s of a known GPU, None of any other device: no MFU is better than a wrong one."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    return next((flops for known, flops in PEAK_FLOPS.items() if known in name), None)


def finish(run, log, seconds):
    """Prints what was reached, beside what it is measured against, and draws the plot."""
    baselines = run.objective.baselines() if hasattr(run.objective, "baselines") else {}
    plot(log, run.directory / "loss.png", baselines)
    if "val_bpb" in log.rows[-1]:
        others = ", ".join(f"{name} {value:.3f}" for name, value in baselines.items())
        run.say(f"validation: {log.rows[-1]['val_bpb']:.3f} bits per byte (on the same text: {others})")
    prompt = getattr(run.objective, "example", "def ")
    speed = f"{statistics.median(row['tokens_per_s'] for row in log.rows):,.0f} tokens/s"
    if "mfu" in log.rows[-1]:
        speed += f", MFU {statistics.median(row['mfu'] for row in log.rows):.1%}"
        speed += f", peak memory {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    run.say(f"{seconds:.0f} s of training at {speed} (median step), saved in {run.directory}. To let it write:\n"
            f"  python sample.py --run={run.directory.name} --prompt='{prompt}'")  # fmt: skip


def main(argv=None):
    """Returns the exit status: 0 done, 1 gave up, 2 a mistake on the command line, 130 interrupted."""
    try:
        try:
            run = set_up(argv)
        except ValueError as error:  # only here: later it would be a mistake of ours, and deserves its traceback
            return fail(error)
        status = train(run)
        if dist.is_initialized():
            dist.barrier()  # gloo aborts a process that leaves while another still talks to it
            time.sleep(0.5 * (dist.get_backend() == "gloo"))  # or while a barrier's last messages are on their way
        return status
    except OSError as error:  # a missing file, a full disk
        return fail(error)
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
