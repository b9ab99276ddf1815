"""What a model learns: the protocol of an objective, recipes, and the plainest objective, the next token.

train.py has one loop and names no objective. What is learnt is a subclass of `Objective` in its paper's file, and a row
of that file's RECIPES; `python train.py --recipe=my/file.py` takes yours.

What train.py asks of a model, besides being an nn.Module (`nano_hybrid.Hybrid` is one):

    config                        a nano_hybrid.HybridConfig: its fields are flags of train.py, and in the checkpoint
    layers                        the list of its residual layers: Muon trains the matrices inside them
    model.layers                  those of its backbone: with many processes they are sharded one by one
    loss(ids, targets), ...       whatever its objective calls
    compile(**options)            torch.compile, where it pays
    num_parameters(active=False)  how many numbers are trained; active: those that one token uses
    flops_per_token(context)      FLOPs to train on one token, for the MFU
    moe_layers()                  its mixtures of experts, [] without
    balance_routers(finite)       moves their biases after an optimiser step; returns metrics
    parts                         names of submodules whose learning rate is set apart: see `Objective.lr_scale`
    save_pretrained(folder, state_dict=None, **extra)
"""

import hashlib
import importlib.util
import math
import re
import sys
import traceback
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from common.data import load_corpus
from common.ranges import FINITE, check_ranges
from kernels import fresh_casts


@dataclass
class Recipe:
    """A row of RECIPES: an objective and its defaults on a CPU and on a GPU, by the names of train.py's flags."""

    objective: type  # a subclass of Objective
    cpu: dict
    gpu: dict
    settings_gpu: dict = field(default_factory=dict)  # defaults of the objective's own Settings on a GPU


@dataclass
class RunInfo:
    """What an objective may know of the run that it is made for."""

    config: object  # train.TrainConfig, every default filled in
    tokenizer: str  # name of the tokenizer
    given: frozenset = frozenset()  # names of the flags on the command line
    seed: int = 0
    rank: int = 0
    world_size: int = 1


RECIPE_FILE = re.compile(r"(?P<path>.+\.py)(?::(?P<name>.+))?")


def recipe_from_file(spec):
    """Returns (Recipe, presets) of a user's file. spec: "my/file.py", or "my/file.py:name" where it has several.

    The file is a Python module with RECIPES, name -> Recipe, and if it likes PRESETS, name -> model config. Raises
    ValueError or FileNotFoundError, in one line, for a file that is missing, that fails, or that has no such recipe.
    """
    path, name = RECIPE_FILE.fullmatch(spec).group("path", "name")
    if not Path(path).is_file():
        raise FileNotFoundError(f"--recipe={spec}: there is no file {path}")
    module_name = "recipe_file_" + re.sub(r"\W", "_", Path(path).stem)
    module_spec = importlib.util.spec_from_file_location(module_name, path)
    module = sys.modules[module_name] = importlib.util.module_from_spec(module_spec)  # dataclasses look it up there
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:  # whatever a user's file may raise
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename.endswith(path)]
        where = f"{path}, line {lines[-1]}" if lines else path
        raise ValueError(f"--recipe={spec}: {where}: {type(error).__name__}: {error}") from None
    rows = getattr(module, "RECIPES", None)
    if not isinstance(rows, dict) or not rows or not all(isinstance(row, Recipe) for row in rows.values()):
        raise ValueError(f"--recipe={spec}: {path} has no RECIPES, a dict of name -> common.objectives.Recipe")
    if name is None and len(rows) > 1:
        choices = ", ".join(f"--recipe={path}:{name}" for name in rows)
        raise ValueError(f"--recipe={spec}: {path} has several recipes; choose one: {choices}")
    if name is not None and name not in rows:
        raise ValueError(f"--recipe={spec}: {path} has no recipe {name!r}; known: {', '.join(rows)}")
    return rows[name or next(iter(rows))], getattr(module, "PRESETS", {})


def recipes_with(spec, recipes, presets):
    """Returns (recipes, presets) by name, those of a user's file added if `spec`, what --recipe says, is one."""
    if not RECIPE_FILE.fullmatch(spec):
        return recipes, presets
    recipe, further = recipe_from_file(spec)
    return recipes | {spec: recipe}, presets | further


def run_name(spec):
    """Returns what a run of a recipe is called by default."""
    file = RECIPE_FILE.fullmatch(spec)
    return file["name"] or Path(file["path"]).stem if file else spec


def settings_classes(recipes):
    """Returns recipe -> Settings of its objective, each class once."""
    classes = {}
    for name, recipe in recipes.items():
        if recipe.objective.Settings and recipe.objective.Settings not in classes.values():
            classes[name] = recipe.objective.Settings
    return classes


def make_settings(config, objective, given, begun, saved):
    """Returns the Settings of an objective for a run, or None if it has none.

    config: train.TrainConfig. given: recipe -> flags of its settings on the command line. They go over those of the
    run that is resumed (saved: its checkpoint), or over `begun`, the recipe's. Raises ValueError for a setting of
    another recipe, or one that is `fixed`.
    """
    own = {f.name for f in fields(objective.Settings)} if objective.Settings else set()
    flags = {name: value for settings in given.values() for name, value in settings.items()}
    for recipe, settings in given.items():
        if foreign := set(settings) - own - {f.name for f in fields(config)}:
            raise ValueError(
                f"--{min(foreign)} is a setting of --recipe={recipe}; --recipe={config.recipe} has none such"
            )
    if saved:
        begun = saved["objective"]
        if unknown := set(begun) - own:
            raise ValueError(f"the run has a setting {min(unknown)} that --recipe={config.recipe} does not know")
        was, asked = saved["config"] | begun, asdict(config) | begun | flags
        for name in (*objective.fixed, "batch_size") if objective.fixed else ():  # batches are what steps count
            if name in was and asked[name] != was[name]:
                raise ValueError(f"--{name}={asked[name]}: the run was begun with {was[name]}; start a new run")
    if not own:
        return None
    settings = objective.Settings(**begun | {name: flags[name] for name in own & set(flags)})
    check_ranges(settings, **dict.fromkeys(own, FINITE))  # a class of ours has checked its own ranges
    return settings


class Objective:
    """What is learnt. A subclass needs `from_run`, `batch` and `loss`; the rest has a default here."""

    Settings = None  # a dataclass: its fields become flags of train.py, their comments the --help text
    fixed = ()  # names of settings that a resumed run may not change; where there are any, nor --batch_size
    example = "def "  # a prompt to try the trained model with
    tokenizer = None  # a common.data.Tokenizer
    extra_tokens = 0  # rows that the vocabulary needs beyond the tokenizer's: a mask token, for one
    settings = None  # the Settings of this run

    @classmethod
    def from_run(cls, run, settings):
        """Returns the objective of a run (RunInfo). Raises ValueError, in one line, for settings that cannot be."""
        raise NotImplementedError

    def build(self, config):
        """Returns the model to train for its config, or None for a `nano_hybrid.Hybrid`."""
        return None

    def about(self):
        """Returns a line about the data."""
        return type(self).__name__

    def batch(self, model, step):
        """Returns a dict, what `loss` takes, for micro-step `step`: data, or fresh rollouts of the model."""
        raise NotImplementedError

    def loss(self, model, batch):
        """Returns (loss, metrics): a scalar to differentiate, and name -> number or detached tensor to log."""
        raise NotImplementedError

    def evaluate(self, model):
        """Returns name -> number to log; val_bpb, val_loss or reward is plotted."""
        return {}

    def lr_scale(self, step, lr, part=""):
        """Returns the factor on the learning rate of a step. lr: the run's peak. part: one of the model's `parts`."""
        return 1.0

    def epochs(self, tokens):
        """Returns how often a run of so many tokens reads its text; 0 where there is no text to learn by heart."""
        return 0.0

    def tokens_at_once(self, config):
        """Returns how many tokens `loss` reads at once, at least, in a run with this TrainConfig."""
        return config.batch_size

    def baselines(self):
        """Returns name -> score of something else on the same data, for the plot."""
        return {}

    def state_dict(self):
        """Returns what a checkpoint keeps of the objective: tensors, numbers, and lists and dicts of them."""
        return {}

    def load_state_dict(self, state):
        """Takes back what `state_dict` returned."""


SPANS, SPAN = 1024, 4096  # at most 4M tokens are read to know a text again


class NextToken(Objective):
    """Pre-training: predict each token of a text from those before it.

    corpus: data.Corpus. Row r of the training data is the same whoever reads it: `world_size` processes with
    batch_size rows each read between them what one process with all the rows would.
    """

    def __init__(self, corpus, context, batch_size, seed=0, rank=0, world_size=1):
        self.corpus, self.context, self.batch_size = corpus, context, batch_size
        self.tokenizer = corpus.tokenizer
        self.seed, self.rank, self.world_size = seed, rank, world_size

    @classmethod
    def from_run(cls, run, settings=None):
        """Returns the objective of a run: its corpus is read, and encoded where it was not yet."""
        c = run.config
        corpus = load_corpus(c.data, run.tokenizer, c.context)
        return cls(corpus, c.context, c.batch_size, run.seed, run.rank, run.world_size)

    def epochs(self, tokens):
        """Returns how often a run of so many tokens reads its text."""
        return tokens / self.corpus.n_train

    def tokens_at_once(self, config):
        """Returns how many tokens `loss` reads at once."""
        return config.batch_size * config.context

    def state_dict(self):
        """Returns the fingerprint of the training data: a resumed run goes on in the same order of the same rows."""
        return {"data": self.fingerprint}

    def load_state_dict(self, state):
        """Raises ValueError if the training data is not what the run was begun with."""
        if state["data"] != self.fingerprint:
            raise ValueError(
                f"--data={self.corpus.name} is not what the run was begun with, or has changed since: rows would be "
                "read twice, or never; name the same texts, or start a new run"
            )

    @cached_property
    def fingerprint(self):
        """A hash of the training tokens: of each array its length, and all of it or SPANS spans."""
        digest = hashlib.sha256()
        for tokens in self.corpus.train:
            digest.update(str(len(tokens)).encode())
            for start in np.unique(np.linspace(0, len(tokens), SPANS, endpoint=False, dtype=np.int64)):
                digest.update(tokens[start : start + SPAN].astype(np.uint32).tobytes())
        return digest.hexdigest()[:16]

    def about(self):
        """Returns a line about the data."""
        n_val, tokenizer = len(self.corpus.val), self.tokenizer.name
        return f"{self.corpus.name}, {self.corpus.n_train:,} + {n_val:,} tokens of {tokenizer}"

    def batch(self, model, step):
        """Returns {"ids", "targets"}, int64 [batch_size, context], of micro-step `step` on the model's device."""
        first = (step * self.world_size + self.rank) * self.batch_size
        block = self.corpus.batch(range(first, first + self.batch_size), self.context, self.seed)
        return dict(zip(("ids", "targets"), to_device(model, *block)))

    def loss(self, model, batch):
        """Returns (loss in nats per token, metrics)."""
        return model.loss(**batch)

    @torch.no_grad()
    @fresh_casts()
    def evaluate(self, model):
        """Returns val_loss (nats per token) and val_bpb (bits per byte of text) over the validation text.

        Windows do not overlap, so tokens at the start of one are predicted from little: a pessimistic figure.
        """
        length = torch.from_numpy(self.corpus.tokenizer.bytes_per_token)
        nats = tokens = size = 0
        for block in self.corpus.val_batches(self.context, self.batch_size):
            ids, targets = to_device(model, *block)
            scored = torch.from_numpy(block[1]) >= 0
            loss, _ = model.loss(ids, targets)  # mean over the scored targets
            nats += loss.item() * int(scored.sum())
            tokens += int(scored.sum())
            size += int(length[torch.from_numpy(block[1])[scored]].sum())
        return {"val_loss": nats / tokens, "val_bpb": nats / math.log(2) / size}

    def baselines(self):
        """Returns name -> bits per byte that general compressors need for the same validation text."""
        return self.corpus.compressors()


def to_device(model, *arrays):
    """Returns numpy arrays as tensors on the device of the model. On a GPU the host does not wait for the copy."""
    device, tensors = next(model.parameters()).device, [torch.from_numpy(a) for a in arrays]
    if device.type == "cuda":
        return [t.pin_memory().to(device, non_blocking=True) for t in tensors]
    return [t.to(device) for t in tensors]
