"""What a model learns: the protocol of an objective, recipes, and the plainest objective, the next token.

train.py has one loop and names no objective. What is learnt is a subclass of `Objective` in its paper's file, and a row
of that file's RECIPES; `python train.py --recipe=my/file.py` takes yours.

What train.py asks of a model, besides being an nn.Module (`nano_hybrid.Hybrid` is one):

    config                        a dataclass: its fields are flags of train.py and part of the checkpoint
    layers                        the list of residual layers: they are compiled, and sharded, one by one
    loss(ids, targets), ...       whatever its objective calls
    compile(**options)            torch.compile, where it pays
    num_parameters(active=False)  how many numbers are trained; active: those that one token uses
    flops_per_token(context)      FLOPs to train on one token, for the MFU
    moe_layers()                  its mixtures of experts, [] without
    balance_routers(finite)       moves their biases after an optimiser step; returns metrics
    parts                         names of submodules whose learning rate is set apart: see `Objective.lr_scale`
    save_pretrained(folder, state_dict=None, **extra)
"""

import math
from dataclasses import dataclass, field

import torch

from common.data import load_corpus


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


class Objective:
    """What is learnt. A subclass needs `from_run`, `batch` and `loss`; the rest has a default here."""

    Settings = None  # a dataclass: its fields become flags of train.py, their comments the --help text
    fixed = ()  # names of settings that a resumed run may not change
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

    def baselines(self):
        """Returns name -> score of something else on the same data, for the plot."""
        return {}

    def state_dict(self):
        """Returns what a checkpoint keeps of the objective: tensors, numbers, and lists and dicts of them."""
        return {}

    def load_state_dict(self, state):
        """Takes back what `state_dict` returned."""


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
