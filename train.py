"""Trains any model of this suite on any objective: one loop.

    python train.py                                   a hybrid Mamba-2 language model on Python's own source code
    python train.py --data='books/*.txt' --steps=5000
    python train.py --recipe=lla                      another row of the papers' RECIPES; all of them: --help
    python train.py --recipe=my/file.py               an objective of yours: see common/objectives.py
    python train.py --optimizer=muon                  Muon for the matrices inside the layers, AdamW for the rest
    python train.py --resume                          goes on with the newest run
    torchrun --standalone --nproc_per_node=8 train.py

What is learnt is an objective, a small class in its paper's file that returns batches and losses, and what is trained
is a model: common/objectives.py says what both have to offer. Everything else is here: optimiser, schedule, precision,
clipping, checkpoints, resuming, many GPUs. Section 4 is the loop; `optimizer_step` is where a model learns.
Randomness is a function of (seed, step, rank), data included, so a run that is stopped and resumed is the run.

A run lives in out/<run>/: config.json and model.safetensors (what sample.py and `transformers` open), trainer.pt
(weights, optimiser and step in one file, so that they always belong together), log.jsonl, loss.png.

log.jsonl has one row per step; null stands for a number that was not finite:
    loss          nats per token of this step's batches, mean over all processes; what the objective's class says
    grad_norm     norm of the whole gradient before clipping
    lr            learning rate of the step, of all parts of the model that the objective does not set apart
    tokens_per_s  over all processes, from the end of the step before to the end of this one (the first one compiles);
                  of reinforcement learning: tokens sampled, judged and learnt from
    mfu           model FLOPs utilisation: FLOPs it needs / time / the GPU's dense bf16 peak; text and known GPUs only
    skipped       steps left out so far because loss or gradient was not finite
    mtp1_loss, mtp1_accuracy, ...            of multi-token prediction, by depth: see Hybrid.mtp_loss
    load_max, dead_experts, router_entropy   of mixtures of experts: see latent_moe.load_metrics
    val_loss      nats per token of the validation text, where it was evaluated
    val_bpb       bits per byte of that text: comparable across tokenizers, and with compressors
    reward        mean reward of sampled answers to held-out prompts, where it was evaluated
    others        the objective's: its class explains them
"""

import importlib.util
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
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

import grpo
import mdlm_dultra
import nano_hybrid
import nvfp4
from common.checkpoints import expect_types, expect_weights, read_trainer, write_trainer
from common.cli import Interrupt, command, fail, find_run, join_processes, parse, peek, pick_device, pick_dtype
from common.measure import evaluate, loss_is_finite, weights_are_finite
from common.memory import expect_memory, is_out_of_memory
from common.objectives import RunInfo, make_settings, recipes_with, run_name, settings_classes
from common.ranges import check_ranges
from common.resume import expect_same_run, expect_same_shape
from common.runlog import Means, Report, describe, finish, print0, report_divergence
from nano_hybrid import Hybrid, HybridConfig

PAPERS = (nano_hybrid, grpo, mdlm_dultra)  # those with recipes; a further paper is one import and one name here
RECIPES = {name: recipe for paper in PAPERS for name, recipe in paper.RECIPES.items()}
PRESETS = {name: config for paper in PAPERS for name, config in paper.PRESETS.items()}
SETTINGS = settings_classes(RECIPES)  # recipe -> dataclass of further flags

OUT = Path("out")
MAX_BAD_STEPS = 10  # non-finite steps in a row before giving up

# A model that reads a text more than MAX_FRESH_EPOCHS times learns it by heart unless it is held back (Muennighoff et
# al., arXiv:2305.16264: up to four passes are nearly as good as new text). Then these are the defaults.
MAX_FRESH_EPOCHS = 4
FRESH = dict(weight_decay=0.1, hidden_dropout=0.0)
REPEATED = dict(weight_decay=1.0, hidden_dropout=0.5)

# ---- 1. configuration ---------------------------------------------------------------------------------------------


@dataclass
class TrainConfig:
    """The settings of a run. None means: what the recipe says. The comment is the --help text."""

    recipe: str = "hybrid"  # what to train: a name in RECIPES, or a file of yours, my/file.py or my/file.py:name
    preset: str | None = None  # shape of the model: a name in PRESETS
    data: str = "python"  # "python" (the standard library's source), a file, folder or glob, or token shards *.bin
    tokenizer: str | None = None  # python4k, bytes, or one of tiktoken's: gpt2, cl100k_base, ...; default: the recipe's
    context: int | None = None  # T, tokens per row
    batch_size: int | None = None  # rows per process and micro-step
    grad_accum: int = 1  # micro-steps per optimiser step
    steps: int | None = None  # optimiser steps in all
    optimizer: str = "adamw"  # adamw, or muon: Muon for the matrices inside the layers, AdamW for the rest
    lr: float | None = None  # peak learning rate
    muon_lr: float | None = None  # peak learning rate of Muon; default: lr, to which Muon's updates are scaled
    beta1: float = 0.9  # AdamW's decay of the mean gradient
    beta2: float = 0.95  # and of the mean squared gradient
    weight_decay: float | None = None  # on matrices only; default 0.1, or REPEATED's
    warmup: int | None = None  # steps of linear warm-up
    decay: float | None = None  # last part of the steps, in which the learning rate falls to 0; default 0.5
    grad_clip: float = 1.0  # largest norm of the gradient
    seed: int = 0  # of weights, data order and dropout
    device: str = "auto"  # cuda, mps or cpu
    dtype: str = "auto"  # float32, bfloat16 or float16 (autocast; weights stay float32)
    precision: str = "bf16"  # of products in the layers: bf16 (what dtype says), fp8, mxfp4 or nvfp4; see nvfp4.py
    compile: bool | None = None  # torch.compile the layers; default: where it pays
    eval_every: int | None = None  # steps between evaluations
    save_every: int | None = None  # steps between checkpoints; default: at each evaluation
    run: str | None = None  # name of the run's folder in out/; default: the recipe, numbered
    resume: bool = False  # go on with --run, or with the newest run
    log: str = ""  # also log to wandb or tensorboard


def on_gpu(config):
    """Returns whether the run is on a GPU, for which recipes have other defaults."""
    return pick_device(config.device).type == "cuda"


def resolve(given, saved, recipes, presets):
    """Returns the TrainConfig, with no None left but weight_decay's and muon_lr's, and `run` as given.

    In order of weight: the command line, the run that is resumed, the recipe's row for the device, the defaults.
    Raises ValueError for a setting that cannot be.
    """
    config = TrainConfig(**((saved["config"] if saved else {}) | given))
    if config.recipe not in recipes:
        raise ValueError(f"unknown recipe {config.recipe!r}; known: {', '.join(recipes)}, or a file: my/file.py")
    row = recipes[config.recipe].gpu if on_gpu(config) else recipes[config.recipe].cpu
    # On a CPU, compiling takes up to a minute and then saves a fifth to a third of each step: for long runs only.
    row = dict(compile=on_gpu(config), decay=0.5, save_every=config.eval_every or row.get("eval_every")) | row
    config = replace(config, **{k: v for k, v in row.items() if getattr(config, k) is None})
    for name in ("preset", "tokenizer", "context", "batch_size", "steps", "lr", "warmup", "eval_every"):
        if getattr(config, name) is None:
            raise ValueError(f"--{name} is missing: neither the command line nor --recipe={config.recipe} says it")
    if config.preset not in presets:
        raise ValueError(f"unknown preset {config.preset!r}; known: {', '.join(presets)}")
    if saved and saved["step"] >= config.steps:
        done = f"{saved['step']} of {config.steps}" if saved["step"] > config.steps else f"all its {config.steps}"
        raise ValueError(f"the run has done {done} steps; to go on, add --steps=N with a larger N")
    check(config)
    return config


def check(config):
    """Raises ValueError for a number out of range, or a name that nothing here has."""
    check_ranges(config)
    for name, known in dict(optimizer=("adamw", "muon"), precision=tuple(nvfp4.RECIPES)).items():
        if getattr(config, name) not in known:
            raise ValueError(f"--{name}={getattr(config, name)} is unknown; use {' or '.join(known)}")
    if config.optimizer == "muon" and not hasattr(torch.optim, "Muon"):
        raise ValueError(f"--optimizer=muon: torch {torch.__version__} has no torch.optim.Muon; update it")
    if config.muon_lr is not None and config.optimizer != "muon":
        raise ValueError(f"--muon_lr={config.muon_lr} goes with --optimizer=muon")
    if config.log not in ("", "wandb", "tensorboard"):
        raise ValueError(f"--log={config.log} is unknown; use wandb or tensorboard")
    if config.log and not importlib.util.find_spec(config.log):
        raise ValueError(f"--log={config.log} needs a package that is not installed: pip install {config.log}")


def shape_of(config, preset, objective, shape, dropout, saved):
    """Returns the HybridConfig to build: the command line's fields over the resumed run's, or over the preset's."""
    n_vocab = objective.tokenizer.n_vocab + objective.extra_tokens
    base = saved["model_config"] if saved else dict(vocab_size=-(-n_vocab // 64) * 64, hidden_dropout=dropout)
    model_config = replace(preset, **(base | shape))  # a vocabulary of 64 n suits matrix units
    if model_config.vocab_size < n_vocab:
        raise ValueError(
            f"vocab_size={model_config.vocab_size} is less than the {n_vocab} tokens of "
            f"--tokenizer={config.tokenizer}; leave --vocab_size out, or name the tokenizer that the run began with"
        )
    return model_config


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
    optimizers: list
    scaler: torch.amp.GradScaler
    step: int = 0  # optimiser steps done
    skipped: int = 0  # steps left out because something was not finite
    saved_at: int | None = None  # step of the checkpoint in the directory
    last_batch: dict | None = None  # what the last micro-step learnt from

    @property
    def rows_per_step(self):
        """Rows of data that one optimiser step reads, over all processes."""
        return self.config.batch_size * self.config.grad_accum * self.world_size

    @property
    def name(self):
        """What --run calls it."""
        return self.directory.relative_to(OUT).as_posix()

    @property
    def tokens_per_step(self):
        """Tokens of one optimiser step, over all processes."""
        return self.rows_per_step * self.config.context

    def autocast(self):
        """Returns the context in which the model computes."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)


def set_up(argv):
    """Returns the Run that the command line asks for. Raises ValueError or OSError with what is wrong in one line."""
    early = peek(TrainConfig, prog="train.py", argv=argv)  # first: a user's recipe brings flags and presets of its own
    resume, recipe = early.get("resume", False), early.get("recipe", TrainConfig.recipe)
    directory = find_run(OUT, early.get("run"), resume, run_name(recipe))
    saved = load_checkpoint(directory) if resume else None
    if saved and "recipe" not in early:
        recipe = saved["config"].get("recipe", recipe)
        if directory.resolve() in Path(recipe).resolve().parents:  # a checkpoint that came with code: it is not run
            raise ValueError(f"--resume: {recipe} lies in the run's own folder; to trust it, add --recipe={recipe}")
    recipes, presets = recipes_with(recipe, RECIPES, PRESETS)
    classes = settings_classes(recipes)
    about = f"Trains a model. With no flags: a language model on Python source. Recipes: {', '.join(recipes)}."
    given, shape, *rest = parse(TrainConfig, HybridConfig, *classes.values(), prog="train.py", about=about, argv=argv)

    config = resolve(given, saved, recipes, presets)
    device, rank, world_size = join_processes(config.device)
    if saved:
        expect_same_run(config, world_size, saved)
    dtype, reason = pick_dtype(config.dtype, device)
    if dtype == torch.float32:  # TF32 on a GPU. Under autocast what is left in float32 (routers) is so for a reason
        torch.set_float32_matmul_precision("high")

    kind = recipes[config.recipe].objective
    begun = recipes[config.recipe].settings_gpu if on_gpu(config) else {}
    settings = make_settings(config, kind, dict(zip(classes, rest)), begun, saved)
    names = frozenset(given) | frozenset(shape) | frozenset().union(*rest)
    objective = kind.from_run(RunInfo(config, config.tokenizer, names, config.seed, rank, world_size), settings)
    objective.settings = settings
    epochs = objective.epochs(config.steps * config.batch_size * config.context * config.grad_accum * world_size)
    held_back = REPEATED if epochs > MAX_FRESH_EPOCHS else FRESH
    if config.weight_decay is None:
        config.weight_decay = held_back["weight_decay"]
    model_config = shape_of(config, presets[config.preset], objective, shape, held_back["hidden_dropout"], saved)

    expect_memory(config, model_config, objective, given | shape, device, dtype, world_size)

    torch.manual_seed(config.seed)
    model = (objective.build(model_config) or Hybrid(model_config)).to(device)
    names = nvfp4.quantize_model(model, nvfp4.RECIPES[config.precision])
    reason += f"; {config.precision}: {len(names)} of the layers' matrices" if names else ""
    if config.compile:
        model.compile()
    if world_size > 1:
        shard(model, device)
    scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)
    optimizers = make_optimizers(model, config)
    run = Run(config, directory, device, dtype, rank, world_size, objective, model, optimizers, scaler)
    if saved:
        restore(run, saved)
    describe(run, reason, epochs, saved)
    return run


def shard(model, device):
    """Shards a model over all processes (FSDP2), layer by layer."""
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    for layer in model.model.layers:  # a multi-token predictor reads weights of its layers from outside of them
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    for method in ("loss", "logprobs"):
        if hasattr(model, method):
            register_fsdp_forward_method(model, method)


def make_optimizers(model, config):
    """Returns the optimisers of a model: [AdamW], or with --optimizer=muon [AdamW, Muon].

    Muon trains the matrices inside the model's layers; embeddings, head, vectors, convolutions and stacked experts stay
    with AdamW. A group holds parameters of one part of the model (`parts`) that all decay or all do not, and has its
    "peak_lr". Muon's updates are scaled to the size of AdamW's, by 0.2 sqrt(longer side), so that one learning rate and
    one weight decay fit both. Source: Liu et al., Muon is Scalable for LLM Training, arXiv:2502.16982, section 2.2.
    Raises ValueError for a decay that would turn the weights around.
    """
    lr = max(config.lr, config.muon_lr or 0)
    if lr * config.weight_decay >= 1:
        raise ValueError(f"--lr={lr} x --weight_decay={config.weight_decay} must be below 1, or weights change sign")
    inside = {p for layer in model.layers for p in layer.parameters()} if config.optimizer == "muon" else ()
    groups = {}  # (by Muon, part, decays) -> parameters
    for name, p in model.named_parameters():
        part = next((part for part in model.parts if name.startswith(part + ".")), "")
        decays = p.dim() >= 2  # norms, biases, A_log, D, dt_bias and raw_ridge are vectors
        groups.setdefault((p.dim() == 2 and p in inside, part, decays), []).append(p)
    adamw, muon = [], []
    for (by_muon, part, decays), params in groups.items():
        peak_lr = (config.muon_lr or config.lr) if by_muon else config.lr
        group = dict(params=params, part=part, weight_decay=config.weight_decay * decays, peak_lr=peak_lr)
        (muon if by_muon else adamw).append(group)
    fused = next(model.parameters()).device.type in ("cuda", "cpu")
    optimizers = [torch.optim.AdamW(adamw, lr=config.lr, betas=(config.beta1, config.beta2), fused=fused)]
    return optimizers + ([torch.optim.Muon(muon, adjust_lr_fn="match_rms_adamw")] if muon else [])


# ---- 3. checkpoints -------------------------------------------------------------------------------------------------

WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)  # sharded or not, a checkpoint is whole, on the CPU
IN_CHECKPOINT = dict(step=int, skipped=int, rows_per_step=int, config=dict, model_config=dict, objective=dict,
                     objective_state=dict, model=dict, optimizer=dict, scaler=dict)  # fmt: skip


def save_checkpoint(run):
    """Writes trainer.pt, from which a run resumes, then config.json and model.safetensors, which others read.

    trainer.pt replaces the old one in a single move, so a run killed at any moment has one whole checkpoint.
    """
    weights = get_model_state_dict(run.model, options=WHOLE)  # all processes take part
    optimizer = get_optimizer_state_dict(run.model, run.optimizers, options=WHOLE)
    if run.rank == 0:
        run.directory.mkdir(parents=True, exist_ok=True)
        config, settings = asdict(run.config), run.objective.settings
        state = dict(
            step=run.step, skipped=run.skipped, rows_per_step=run.rows_per_step, config=config,
            model_config=asdict(run.model.config), objective=asdict(settings) if settings else {},
            objective_state=run.objective.state_dict(),
            model=weights, optimizer=optimizer, scaler=run.scaler.state_dict(),
        )  # fmt: skip
        write_trainer(run.directory / "trainer.pt", state)
        run.model.save_pretrained(run.directory, state_dict=weights, nanopapers=config)
    run.saved_at = run.step


def load_checkpoint(directory):
    """Returns the dict that `save_checkpoint` wrote. Raises ValueError for a damaged file, or one that is not ours."""
    path = directory / "trainer.pt"
    saved = read_trainer(path, IN_CHECKPOINT)
    for part, known in dict(config=TrainConfig, model_config=HybridConfig).items():
        expect_types(saved[part], known, path)
    return saved


def restore(run, saved):
    """Puts a loaded checkpoint into the run. Raises ValueError if the command line asked for another shape or text."""
    expect_same_shape(run.model.config, saved)
    expect_weights(saved["model"], run.model.state_dict(), run.directory / "trainer.pt")
    set_model_state_dict(run.model, saved["model"], options=WHOLE)
    groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
    asked = [{name: value for name, value in group.items() if name != "params"} for group in groups]
    set_optimizer_state_dict(run.model, run.optimizers, saved["optimizer"], options=replace(WHOLE, strict=False))
    for optimizer in run.optimizers:
        for name, parameter in run.model.named_parameters():
            if name not in saved["optimizer"]["state"]:  # it has had no gradient yet: torch made up a state of zeros
                optimizer.state.pop(parameter, None)
    groups = [group for optimizer in run.optimizers for group in optimizer.param_groups]
    for group, settings in zip(groups, asked):
        group.update(settings)  # they may have been given anew, and the run may come from another kind of device
    if saved["scaler"] and run.scaler.is_enabled():  # else it was begun in another precision
        run.scaler.load_state_dict(saved["scaler"])
    if saved["objective_state"]:
        run.objective.load_state_dict(saved["objective_state"])
    run.step, run.skipped, run.saved_at = saved["step"], saved["skipped"], saved["step"]


# ---- 4. the loop ----------------------------------------------------------------------------------------------------


def schedule(step, config):
    """Returns the learning rate's share of its peak: linear warm-up, constant, 1 - sqrt(progress through the decay).

    Warmup-stable-decay as in Nemotron 3 Super, arXiv:2604.12374.
    """
    begin = config.steps * (1 - config.decay)
    progress = (step - begin) / max(1, config.steps - begin)
    return min(1, (step + 1) / max(1, config.warmup)) * (1 - math.sqrt(max(0, progress)))


def optimizer_step(run, interrupt):
    """Makes a step. Returns (learning rate, name -> tensor to log). The host waits for nothing: see common/runlog.py.

    interrupt: whether this process was asked to stop is one of the numbers, so that all processes stop together.
    """
    config, objective, model, scaler = run.config, run.objective, run.model, run.scaler
    torch.manual_seed(hash((config.seed, run.step, run.rank)))  # dropout, and whatever a rollout samples
    share = schedule(run.step, config)
    for group in (group for optimizer in run.optimizers for group in optimizer.param_groups):
        group["lr"] = group["peak_lr"] * share * objective.lr_scale(run.step, config.lr, group["part"])
    means = Means(run)
    for micro in range(config.grad_accum):
        if run.world_size > 1:  # gradients are exchanged once a step
            model.set_requires_gradient_sync(micro == config.grad_accum - 1)
        with run.autocast():  # rollouts, too: a sampler of another precision is another policy
            batch = objective.batch(model, run.step * config.grad_accum + micro)
        with run.autocast():  # anew: what autocast cast under no_grad, for rollouts, is not to be learnt with
            loss, metrics = objective.loss(model, batch)
            run.last_batch = batch
        scaler.scale(loss / config.grad_accum).backward()
        means.add({"loss": loss} | metrics)  # an objective's own "loss" leaves out what balance and the like add
    for optimizer in run.optimizers:
        scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip)
    norm = norm.full_tensor() if run.world_size > 1 else norm
    numbers = means.over_processes(interrupt.interrupted)
    finite = torch.isfinite(numbers["loss"]) & torch.isfinite(norm)
    for optimizer in run.optimizers:  # a step that is not finite is left out, by all of them
        if optimizer.defaults.get("fused") and not scaler.is_enabled():
            optimizer.found_inf = (~finite).float()  # as a GradScaler tells it: the device decides
            optimizer.step()
        elif finite:  # here the host waits for the device
            scaler.step(optimizer)
    scaler.update()
    numbers |= model.balance_routers(finite)  # routers of experts move with the optimiser, without a gradient
    model.zero_grad(set_to_none=True)
    lr = config.lr * share * objective.lr_scale(run.step, config.lr)
    return lr, {"grad_norm": norm} | numbers


def train(run):
    """Runs the loop to its end. Returns the exit status: 0, 1 if it gave up, 130 after Ctrl-C."""
    report, began = Report(run), time.perf_counter()
    with report.bar:  # whatever happens, what is printed next begins a line
        status = loop(run, report)
    if status == 0 and report.log:
        finish(run, report.log, time.perf_counter() - began)
    return status


def loop(run, report):
    """Trains until all steps are done, somebody interrupts, or the model is lost. Returns the exit status.

    A model that is not finite is never saved: a save waits for the next step that leaves a finite one.
    """
    config, interrupt, saves = run.config, Interrupt(), False
    run.model.train()
    while run.step < config.steps:
        lr, numbers = optimizer_step(run, interrupt)
        run.step += 1
        report.add(run.step, lr, numbers)

        last = run.step == config.steps
        evaluates = run.step % config.eval_every == 0 or last
        saves = saves or run.step % config.save_every == 0 or last
        rows = report.read(all=evaluates or saves)
        stop = report.interrupted and not last
        if stop:
            rows, saves = rows + report.read(all=True), True
        finite = weights_are_finite(run) if evaluates or saves or report.bad else True
        scores = evaluate(run) if evaluates and finite else {}
        if scores:
            rows[-1] |= scores
        report.write(rows)
        sound = finite and (loss_is_finite(run, scores) if saves else True)
        if not finite or report.bad >= MAX_BAD_STEPS or ((last or stop) and not sound):
            report_divergence(run, report.bad if finite else None)
            return 1
        if saves and sound:
            save_checkpoint(run)
            saves = False
        if stop:
            print0(f"interrupted, and saved at step {run.step}. To go on:\n"
                   f"  {command('train.py', 'resume', run=run.name)}")  # fmt: skip
            return 130
        if evaluates or run.saved_at == run.step:
            report.restart_clock()
    return 0


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
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return fail("no memory is left; take a smaller --batch_size (and a larger --grad_accum), --context, --preset")
    except KeyboardInterrupt:
        return 130
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


if __name__ == "__main__":
    sys.exit(main())
