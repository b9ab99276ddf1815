"""Masked diffusion language models, and dUltra, which learns by rewards which tokens to unmask together.

Papers   MDLM, arXiv:2406.07524; LLaDA, 2502.09992; the planner's network, LLaDOU, 2505.10446; dUltra, 2512.21446
         (chinsengi/dUltra-os). The decoder, and the rules that dUltra is compared with, are in unmasking.py.
Idea     A model that attends in both directions learns to fill in masked tokens, any of them, so it can decode in any
         order and several tokens at once. But tokens that are unmasked together are drawn independently, which is wrong
         where they depend on each other; and rules by confidence are slow where tokens are uncertain but independent.
         dUltra trains a small planner on rewards for correct, short decodings to say which tokens are safe together.
Picture  x [B,T], M where masked --backbone, both ways, no time--> h [B,T,C] --lm_head--> logits [B,T,V], none for M
               ^                                                      |                          | one pass: confidence,
               |                                                      '--planner, AdaLN--> z     | entropy, margin
               |                                                                           |     v
               '------ tokens, where chosen ------ at least one a row ------ rule(probs, eligible, step) -> bool [B,T]

         log pi(step) = sum log sigmoid(+-z) over the eligible + sum log softmax(logits / T)[token] over the unmasked
         A = R - mean of the group;   loss = - sum over steps of min(r A, clip(r) A) / (B length)
Symbols  code            paper     meaning
         t               t         share of the tokens that are masked: alpha_t = 1 - t
         maskable        answer    tokens that may be masked; a prompt may not
         eligible        E         positions that are masked, and in the block that is being decoded
         action          U         tokens that a step unmasks; order [B,T]: the step, 1 ... NFE, that unmasked a token
         z               logit p   the planner unmasks a token with probability sigmoid(z)
Read     1, 2: model and likelihood; 3: planner; 4: dUltra, whose page is DUltra.batch and .loss; log pi: unmasking.py.
Limits   With the exact posterior the bound is log p, for every sequence and order; log pi adds up to one over all
         actions; a replayed step has the log-probability that it was drawn with: see tests/test_mdlm_dultra.py.
Differs  From the authors' code, on purpose. If no token was drawn, the step unmasks the likeliest: {a} then has
         probability prod_{j != a} (1 - p_j), where the authors score it as if a had been drawn. Log-probabilities are
         of the temperature that was sampled at; padding is masked everywhere. The planner's time is scaled by 1000 as
         in DiT, or its embedding would hardly vary, and it has an embedding for each position, not rotary ones, which
         give equally unknown tokens equal z. Its warm start is plain cross-entropy against smoothed targets, with masks
         spread at random: balanced classes would teach it to unmask too much, certain targets leave nothing to explore.
         `sample=False` takes what is above one half, not the floor(sum p) likeliest; speed is a shift of z, not a
         factor on p. A step costs lambda / length, not 1 / 500: at the paper's 256 tokens lambda = .25 is its 2 points
         for a correct answer against .1 NFE / 50. By default only the planner learns from rewards (--joint: and the
         backbone), without a teacher (--distill_coef), also from decodings worse than their group (--advantage_floor).
Files    mdlm_dultra.py + grpo.py + kernels.py + latent_moe.py + nano_hybrid.py + rollouts.py + unmasking.py +
         decoding.py + expert_kernels.py + lla.py + ssd.py + decode_kernels.py + nvfp4.py + common/canvas.py +
         common/checkpoints.py + common/data.py + common/fit.py + common/objectives.py + common/ranges.py +
         common/tasks.py + common/accounting.py + common/files.py + common/presets.py + common/sampling.py: 12,075
         lines in all
"""

import math
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from common.canvas import canvas_of, completion_logprob, completions
from common.checkpoints import read_config, read_model, without_memory
from common.data import Tokenizer
from common.fit import fit
from common.objectives import NextToken, Objective, Recipe
from common.ranges import check_ranges
from common.tasks import ENVIRONMENTS, FILL_INS, environment, sample_task, score_all
from grpo import advantages, denominator, policy_loss
from kernels import at_least_float32, fresh_casts, linear_logprob
from latent_moe import new_load
from nano_hybrid import PRESETS as HYBRIDS
from nano_hybrid import TEXT_CPU, TEXT_GPU, Attention, Block, Hybrid, HybridConfig, apply_rope
from rollouts import check_dropout, check_run
from unmasking import DETERMINISTIC, apply_rule, current_block, decode, planner_logprob, planner_rule, predict, rule_of

# ---- 1. the model ---------------------------------------------------------------------------------------------------


@dataclass
class View:
    """What attention may see. The positions that are computed are start, start + 1, ... of the sequence."""

    keys: torch.Tensor | None = None  # bool [B, L], False on padding
    start: int = 0
    kv: dict | None = None  # layer -> (k, v), each [B, Hkv, L, D]: those last computed, of all positions

    def update(self, layer, k, v):
        """Returns the keys and values of the whole sequence: new for the computed positions, stored for the others."""
        if self.kv is None:
            return k, v
        if layer not in self.kv:
            self.kv[layer] = k, v
        else:
            for stored, new in zip(self.kv[layer], (k, v)):
                stored[:, :, self.start : self.start + new.shape[2]] = new
        return self.kv[layer]


class BidirectionalAttention(Attention):
    """Grouped-query attention of every position to every other, before and after it."""

    def forward(self, x, view, attention_mask=None):
        """Returns [B, T, C] for the positions x [B, T, C] of a sequence. The mask is in the view."""
        q, k, v = self.qkv(x)  # [B, Hq, T, D], [B, Hkv, T, D] twice
        if self.rotary_base:
            q, k = (apply_rope(t, view.start, self.rotary_base) for t in (q, k))
        k, v = view.update(self, k, v)  # [B, Hkv, L, D]
        mask = None if view.keys is None else view.keys[:, None, None]  # [B, 1, 1, L]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def position_ids(T, keys, device):
    """Returns int64 [T] or [B, L], the position of each token in its sequence. keys [B, L] or None: left padding."""
    return torch.arange(T, device=device) if keys is None else (keys.cumsum(1) - 1).clamp(min=0)


def bidirectional_blocks(config, pattern):
    """Returns the residual layers of a pattern, as in nano_hybrid.py, with bidirectional attention."""
    blocks = nn.ModuleList(Block(config, letter) for letter in pattern)
    for block, letter in zip(blocks, pattern):
        if letter == "*":
            block.mixer = BidirectionalAttention(config)
    return blocks


class MaskedDiffusionLM(Hybrid):
    """The language model of nano_hybrid.py with bidirectional attention, MLPs and mixtures of experts (* - E).

    The last token of the vocabulary is the mask, M. SUBS (MDLM, section 3.2) holds by construction: M has no row in the
    softmax, and loss and decoder only touch masked positions. The model takes no time t, which the share of masks says.
    positions: the largest length. The model has an embedding for each position unless they are rotary
    (config.rotary_base), the planner wherever `positions` is given. planner: whether it has an UnmaskPlanner. Parameter
    names are those of `Hybrid`, plus `positions` and `planner`. Raises ValueError for causal layers, or no positions.
    """

    parts = ("planner",)  # submodules with a learning rate of their own: see common.objectives

    def __init__(self, config, positions=None, planner=False):
        if set(config.hybrid_override_pattern) - set("*-E") or config.num_nextn_predict_layers:
            raise ValueError(
                f"hybrid_override_pattern={config.hybrid_override_pattern!r} with num_nextn_predict_layers="
                f"{config.num_nextn_predict_layers}: masked diffusion looks both ways; take *, - and E, and 0"
            )
        if not positions and not config.rotary_base:
            raise ValueError("a masked diffusion model needs positions: set rotary_base (1e4 is usual)")
        super().__init__(config)
        self.mask_id = config.vocab_size - 1  # M
        self.n_layers = config.hybrid_override_pattern.count("*")  # Transformer layers: attention and what follows
        self.model.layers = bidirectional_blocks(config, config.hybrid_override_pattern)
        self.positions = None if config.rotary_base else nn.Embedding(positions, config.hidden_size)
        self.planner = UnmaskPlanner(config, positions) if planner else None
        self.reset_parameters()

    def reset_parameters(self):
        """Draws the initial weights: those of `Hybrid`, then the planner's own."""
        super().reset_parameters()
        if getattr(self, "planner", None):
            self.planner.reset_parameters()

    def encode(self, ids, keys=None, kv=None, start=0, load=None):
        """Returns hidden states [B, T, C] after the final norm. ids [B, T] are positions start ... start + T.

        keys bool [B, L], False on padding, which must be on the left. kv: a dict that a call with the whole sequence
        fills; later calls, with some positions, update it and attend to what it holds of the others. load: a Load.
        """
        x = self.model.embeddings(ids)  # [B, T, C]
        if self.positions is not None:
            places = position_ids(start + ids.shape[1], keys, ids.device)
            x = x + self.positions(places[..., start : start + ids.shape[1]])
        x = F.dropout(x, self.config.hidden_dropout, self.training)
        view = View(keys, start, kv)
        for layer in self.model.layers:
            if load and layer.routes:
                x = load.add(layer.mixer, *layer(x, None, None, load.counted))
            else:
                x = layer(x, view if layer.stateful else None)
        return self.model.norm_f(x)

    def logits(self, hidden):
        """Returns logits [..., V - 1] of hidden [..., C]: M, the last token, has none."""
        return F.linear(hidden, self.head_weight[: self.mask_id])

    def forward(self, ids, keys=None):
        """Returns float32 logits [B, T, V] of ids [B, T] int64, -inf for M."""
        return F.pad(at_least_float32(self.logits(self.encode(ids, keys))), (0, 1), value=-math.inf)

    def logprobs(self, ids, masked, keys=None, temperature=1.0, load=None):
        """Returns float32 [B, T]: log p of the tokens ids [B, T] that are masked [B, T], given the others; else 0."""
        hidden = self.encode(ids.masked_fill(masked, self.mask_id), keys, load=load)
        weight, targets = self.head_weight[: self.mask_id], ids[masked]
        logprob, _ = linear_logprob(hidden[masked], weight, targets, temperature)  # [n]
        return at_least_float32(hidden[..., 0]).new_zeros(ids.shape).masked_scatter(masked, logprob)

    def loss(self, ids, maskable=None, keys=None, generator=None):
        """Returns `mdlm_loss(self, ...)`; in training, mixtures of experts add their balance loss, as in `Hybrid`."""
        load = new_load(self, torch.ones_like(ids, dtype=torch.bool) if keys is None else keys)
        loss, metrics = mdlm_loss(self, ids, maskable, generator, keys, load=load)
        return loss + self.config.router_aux_loss_coef * (load.finish() if load else 0.0), metrics

    def generate(self, *_, **__):
        """Raises TypeError: a masked diffusion model is decoded, not continued."""
        raise TypeError("a MaskedDiffusionLM fills in masks: use mdlm_dultra.decode")

    def save_pretrained(self, directory, state_dict=None, **extra):
        """Writes config.json and model.safetensors, which `from_pretrained` opens."""
        super().save_pretrained(directory, state_dict, **extra | dict(architectures=["MaskedDiffusionLM"]))

    @classmethod
    def from_pretrained(cls, directory, **overrides):
        """Returns the model that `save_pretrained` wrote. Raises FileNotFoundError or ValueError."""
        config, weights = read_model(directory, HybridConfig, overrides, masked_diffusion=True)
        embeddings = [weights[name] for name in ("positions.weight", "planner.positions.weight") if name in weights]
        with without_memory(directory):
            model = cls(config, len(embeddings[0]) if embeddings else None, planner="planner.out.weight" in weights)
        model.load_weights(weights, directory)
        return model


# ---- 2. the loss, and the likelihood --------------------------------------------------------------------------------
#
# One bound on -log p, written in two ways: t is uniform in (0, 1], tokens are masked with probability t, weight 1 / t
# (the loss); or k is uniform in 1 ... A, exactly k of A tokens are masked, weight A / k (`nelbo`, of less variance).

EPS = 1e-3  # smallest t: 1 / t has no bound


def noise_levels(B, generator=None, device=None):
    """Returns t [B] in (EPS, 1], one in each B-th of it: stratified, which takes most of the variance out of 1 / t.

    Source: MDLM's `antithetic_sampling`.
    """
    u = (torch.arange(B, device=device) + torch.rand(B, generator=generator, device=device)) / B
    return EPS + (1 - EPS) * (1 - u)


def mdlm_loss(model, ids, maskable=None, generator=None, keys=None, **options):
    """Returns (loss, metrics): the NELBO in nats per maskable token, mean over rows, by the integral over t.

    ids [B, T] int64, without masks; maskable bool [B, T], None for all. A prompt is not maskable, and each row is
    divided by its number of maskable tokens. Ends of text behind an answer are maskable: that is how the model learns
    to stop. generator: on the device of ids. keys: `MaskedDiffusionLM.encode`; options: of `logprobs`. Dividing by the
    number of *masked* tokens would give BERT's loss: no bound. Source: MDLM, section 3.4; LLaDA, Algorithms 1 and 2.

    metrics: loss; masked_loss, the plain cross-entropy of a masked token; mask_rate.
    """
    maskable = torch.ones_like(ids, dtype=torch.bool) if maskable is None else maskable
    t = noise_levels(len(ids), generator, ids.device)  # [B]
    masked = maskable & (torch.rand(ids.shape, generator=generator, device=ids.device) < t[:, None])
    logprob = model.logprobs(ids, masked, keys, **options)  # [B, T]
    loss = (-logprob.sum(1) / t / maskable.sum(1).clamp(min=1)).mean()
    masked_loss = -logprob.detach().sum() / masked.sum().clamp(min=1)
    return loss, dict(loss=loss.detach(), masked_loss=masked_loss, mask_rate=masked.sum() / maskable.sum())


@torch.no_grad()
@fresh_casts()
def nelbo(model, ids, maskable=None, samples=16, generator=None, keys=None):
    """Returns (mean [B], standard error [B]) of the bound on -log p(maskable | the rest), in nats for the whole row.

    k is stratified over the samples. With one sample there is no standard error: nan. Source: LLaDA, equation 6.
    """
    maskable = torch.ones_like(ids, dtype=torch.bool) if maskable is None else maskable
    A, draws = maskable.sum(1), []  # [B]
    shift = torch.rand(len(ids), generator=generator, device=ids.device)
    for sample in range(samples):
        k = ((sample + shift) / samples * A).floor() + 1  # [B], 1 ... A
        noise = torch.rand(ids.shape, generator=generator, device=ids.device)
        masked = maskable & (noise.masked_fill(~maskable, 2).argsort(1).argsort(1) < k[:, None])  # k of them
        draws.append(-model.logprobs(ids, masked, keys).sum(1) * A / k)
    draws = torch.stack(draws)  # [samples, B]
    spread = draws.std(0) if samples > 1 else torch.full_like(draws[0], math.nan)
    return draws.mean(0), spread / math.sqrt(samples)


# ---- 3. the planner -------------------------------------------------------------------------------------------------


def sinusoids(tau, size=256, scale=1000.0):
    """Returns [B, size]: cos and sin of tau [B] in [0, 1] at size / 2 frequencies, from scale to scale / 10,000."""
    speed = scale * torch.exp(-math.log(1e4) * torch.arange(size // 2, device=tau.device) / (size // 2))
    return torch.cat([(tau[:, None] * speed).cos(), (tau[:, None] * speed).sin()], 1)


class UnmaskPlanner(nn.Module):
    """Says which tokens are ready: logits z [B, T]; a step unmasks each eligible token with probability sigmoid(z).

        tau = 1 - masks / length           share of the sequence that is known
        c   = MLP(sinusoids(tau)) + embedding[eligible] + embedding[position]      [B, T, C]
        a   = LN(h) (1 + scale(c)) + shift(c)                           AdaLN
        z   = w . AdaLN'(one Transformer layer(a), c)

    It reads the hidden states that `lm_head` reads, but neither probabilities nor the tokens that are drawn.
    Source: LLaDOU, arXiv:2505.10446, section 3.2; the authors' `modeling_llada_dultra.py`.
    """

    def __init__(self, config, positions=None):
        super().__init__()
        C = config.hidden_size
        self.time = nn.Sequential(nn.Linear(256, C), nn.SiLU(), nn.Linear(C, C))
        self.eligible = nn.Embedding(2, C)
        self.positions = nn.Embedding(positions, C) if positions else None
        self.before, self.after = nn.Linear(C, 2 * C), nn.Linear(C, 2 * C)
        rotary_base = None if positions else config.rotary_base  # absolute positions break ties, distances do not
        self.blocks = bidirectional_blocks(replace(config, rotary_base=rotary_base), "*-")
        self.out = nn.Linear(C, 1)

    @torch.no_grad()
    def reset_parameters(self):
        """Draws the weights, where they are not drawn as those of `Hybrid`: all probabilities begin near one half."""
        for module in (*self.time, self.before, self.after):
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                module.bias.zero_()
        nn.init.trunc_normal_(self.eligible.weight, std=0.02)
        nn.init.normal_(self.out.weight, std=0.02)
        self.out.bias.zero_()

    def forward(self, hidden, eligible, masked, keys=None):
        """Returns z [B, T] float32. hidden [B, T, C]; eligible and masked bool [B, T]; keys: `encode`."""
        hidden, length = hidden.to(self.out.weight.dtype), masked.shape[1] if keys is None else keys.sum(1)
        tau = 1 - masked.sum(1) / length  # [B]
        c = self.time(sinusoids(tau).to(hidden.dtype))[:, None] + self.eligible(eligible.long())  # [B, T, C]
        if self.positions is not None:
            c = c + self.positions(position_ids(masked.shape[1], keys, masked.device))
        x, view = ada_layer_norm(hidden, self.before(c)), View(keys)
        for block in self.blocks:
            x = block(x, view if block.stateful else None)
        return at_least_float32(self.out(ada_layer_norm(x, self.after(c))).squeeze(-1))


def ada_layer_norm(x, scale_and_shift):
    """Returns AdaLN: x [B, T, C] normalised, then scaled and shifted by [B, T, 2 C]."""
    scale, shift = scale_and_shift.chunk(2, -1)
    return F.layer_norm(x, x.shape[-1:], eps=1e-4) * (1 + scale) + shift


# ---- 4. what train.py composes: --recipe=mdlm, --recipe=dultra ------------------------------------------------------


class MaskedDiffusion(NextToken):
    """Pre-training: predict masked tokens of a text from all others. Data and settings as in `NextToken`."""

    extra_tokens = 1  # the mask

    def build(self, config):
        """Returns the model to train."""
        return MaskedDiffusionLM(config)

    def epochs(self, tokens):
        """Returns 0: with new masks each time, text can be repeated often at little harm (arXiv:2507.15857)."""
        return 0

    def batch(self, model, step):
        """Returns {"ids"} [batch_size, context]; one batch in a hundred is cut to a random length (LLaDA, 2.2)."""
        ids = super().batch(model, step)["ids"]
        rng = np.random.default_rng([self.seed, step, 1])
        return dict(ids=ids[:, : rng.integers(1, self.context + 1)] if rng.random() < 0.01 else ids)

    def loss(self, model, batch):
        """Returns (NELBO in nats per token, metrics)."""
        loss, metrics = model.loss(batch["ids"])
        return loss, metrics | dict(tokens=torch.tensor(float(batch["ids"].numel())))

    @torch.no_grad()
    def evaluate(self, model):
        """Returns val_loss (nats per token) and val_bpb (bits per byte), upper bounds, and val_error, val_bpb's
        standard error. Each window counts once, with one draw of its masks; windows do not see each other."""
        device = next(model.parameters()).device
        generator = torch.Generator(device).manual_seed(self.seed)
        tokens, size, bounds = 0, 0, []
        for ids, targets in self.corpus.val_batches(self.context, self.batch_size):
            ids, scored = torch.from_numpy(ids).to(device), torch.from_numpy(targets).to(device) >= 0
            bounds.append(nelbo(model, ids, scored, samples=1, generator=generator)[0])
            tokens += int(scored.sum())
            size += int(self.tokenizer.bytes_per_token[ids[scored].cpu().numpy()].sum())
        nats = torch.cat(bounds).double()
        total, scale = nats.sum().item(), 1 / math.log(2) / size
        error = {"val_error": nats.std().item() * math.sqrt(len(nats)) * scale} if len(nats) > 1 else {}
        return {"val_loss": total / tokens, "val_bpb": total * scale} | error


@dataclass
class DUltraConfig:
    """Settings of --recipe=dultra. The comment is the --help text."""

    task: str = "sudoku:4"  # sudoku:4 (clues), progressions:8 (groups), or one of tasks.ENVIRONMENTS, add:3
    pretrain: int = 600  # steps of masked diffusion on solved tasks
    imitate: int = 100  # then steps in which the planner learns to imitate a rule
    imitated: str = "factor:1"  # that rule
    smoothing: float = 0.15  # of its decisions: probabilities of 0 and 1 leave nothing to explore
    balanced: bool = False  # weigh both decisions alike, as the authors do: then too many tokens are unmasked
    imitate_lr: float = 1e-3  # peak learning rate of the planner while it imitates
    planner_lr: float = 1e-3  # and when rewards train it
    joint: bool = False  # rewards train the backbone, too
    backbone_lr: float = 1e-4  # its peak learning rate then
    group_size: int = 8  # G, decodings of a task; batch_size is tasks times that
    temperature: float = 0.0  # of the tokens while learning; joint training learns from none that are certain
    reward: str = "additive"  # score - efficiency NFE / length, or multiplicative: score (1 - efficiency NFE / length)
    efficiency: float = 0.25  # lambda, what a step costs
    distill_coef: float = 0.0  # reward for a nat per token of log-likelihood under the teacher
    teacher: str = ""  # folder of an autoregressive run on the same task (--recipe=grpo)
    advantage_floor: float | None = None  # advantages below it count as 0: at 0 only what beats its group teaches
    block_size: int | None = None  # decode in blocks of so many positions; default: all at once
    replay_rows: int = 2048  # steps that are learnt from at a time: bounds the memory, not the result

    def __post_init__(self):
        if self.reward not in ("additive", "multiplicative"):
            raise ValueError(f"reward={self.reward!r}, expected one of additive, multiplicative")
        if self.joint and not self.temperature >= 1e-3:
            raise ValueError(
                "--joint learns from the tokens that were drawn: it needs --temperature of at least 0.001 (1 is usual)"
            )
        check_ranges(self, group_size=(2, 10**15))
        if self.imitated.partition(":")[0] not in DETERMINISTIC:
            raise ValueError(f"--imitated={self.imitated}: take a rule that decides by the probabilities, say factor:1")
        rule_of(self.imitated, None)
        if bool(self.distill_coef) != bool(self.teacher):
            raise ValueError("--distill_coef and --teacher go together")


class DUltra(Objective):
    """dUltra in one run of three phases: masked diffusion on a task, a planner that imitates a rule, then rewards.

    `batch` reads from tasks to canvas, decoding, judging and advantages; `loss` from replayed steps to the gradient.

    Metrics of a step of rewards, beside those of `grpo.policy_loss` (whose tokens are decoding steps here):

    train_reward   mean of R, which is maximised        accuracy     share of the decodings that are correct
    nfe            mean NFE of a decoding               learnt_from  share of them with an advantage other than 0

    And of a step of imitation: coins, the mean probability that a masked token is unmasked; wanted, the share that the
    rule unmasks.
    """

    Settings = DUltraConfig
    fixed = "task", "pretrain", "imitate", "group_size", "batch_size"
    extra_tokens = 1  # the mask

    def __init__(self, settings, tokenizer, batch_size, seed=0, rank=0, world_size=1):
        self.settings, self.tokenizer, self.batch_size = settings, tokenizer, batch_size
        self.seed, self.rank, self.world_size, self.step = seed, rank, world_size, 0
        self.env = environment(settings.task, ENVIRONMENTS | FILL_INS)
        self.begin_rewards = settings.pretrain + settings.imitate  # the first step of rewards
        if batch_size % settings.group_size:
            raise ValueError(f"batch_size={batch_size} must be a multiple of group_size={settings.group_size}")
        rng = np.random.default_rng(seed)
        samples = [sample_task(self.env, rng, held_out) for held_out in (False, True) for _ in range(32)]
        self.example = samples[0].prompt + samples[0].template
        if samples[0].template and tokenizer.name != "bytes":
            raise ValueError(f"--task={settings.task} is filled in letter by letter: it needs --tokenizer=bytes")
        sizes = [len(tokenizer.encode(t.prompt)) + (len(t.template) or self.env.max_new_tokens) for t in samples]
        self.length = max(sizes) + (2 if len(set(sizes)) > 1 else 0)  # longer prompts than the sampled ones may come
        self.teacher = open_teacher(settings.teacher, tokenizer, samples[0]) if settings.teacher else None

    @classmethod
    def from_run(cls, run, settings):
        """Returns the objective of a run (RunInfo). Raises ValueError, in one line, for settings that cannot be."""
        c, before = run.config, settings.pretrain + settings.imitate
        objective = cls(settings, Tokenizer(run.tokenizer), c.batch_size, run.seed, run.rank, run.world_size)
        if c.grad_accum > 1:
            raise ValueError(
                f"--grad_accum={c.grad_accum} has no meaning with --recipe={c.recipe}: make --batch_size larger; "
                "--replay_rows bounds the memory"
            )
        check_run(run, before, f"--pretrain and --imitate, {before} steps together,", "--task")
        return objective

    def build(self, config):
        """Returns the model to train. Raises ValueError for a config with dropout."""
        check_dropout(config)
        return MaskedDiffusionLM(config, self.length, planner=True)

    def about(self):
        """Returns a line about the data."""
        c = self.settings
        return f"{c.task}: {c.pretrain} steps of masked diffusion, {c.imitate} of imitating {c.imitated}, then rewards"

    def lr_scale(self, step, lr, part=""):
        """Returns the factor on the peak learning rate `lr` of a part: the planner, or all the rest."""
        c = self.settings
        if step < c.pretrain:  # the backbone's falls to 0 over the second half
            return 0.0 if part else min(1.0, 2 * (1 - step / c.pretrain))
        planner_lr = c.imitate_lr if step < self.begin_rewards else c.planner_lr
        return (planner_lr if part else c.backbone_lr) / lr

    def tasks(self, step, n, held_out=False):
        """Returns n tasks."""
        rng = np.random.default_rng([self.seed, step, self.rank, held_out])
        return [sample_task(self.env, rng, held_out) for _ in range(n)]

    def canvas(self, model, tasks):
        """Returns the Canvas of tasks on the model's device."""
        device = next(model.parameters()).device
        return canvas_of(tasks, self.tokenizer, model.mask_id, self.env.max_new_tokens, device)

    def judge(self, tasks, ids):
        """Returns the verifiers' scores in [0, 1], float32 [B], of the completions in ids [B, T]."""
        texts = completions(tasks, ids, self.tokenizer, self.env.max_new_tokens)
        return torch.tensor([score for score, _ in score_all(tasks, texts)], device=ids.device)

    @fresh_casts()
    def batch(self, model, step):
        """Returns solved tasks (phases 1 and 2), or decodings of the model with their advantages (phase 3)."""
        c, G, self.step = self.settings, self.settings.group_size, step
        if step < self.begin_rewards:
            canvas = self.canvas(model, self.tasks(step, self.batch_size))
            return dict(canvas=canvas, imitate=step >= c.pretrain)

        tasks = [task for task in self.tasks(step, self.batch_size // G) for _ in range(G)]
        canvas = self.canvas(model, tasks)
        generator = torch.Generator(canvas.ids.device).manual_seed(hash((self.seed, step, self.rank)) % 2**63)
        rule, training = planner_rule(model.planner), model.training
        model.eval()
        decoded = decode(model, canvas.ids, rule, c.temperature, c.block_size, keys=canvas.keys, generator=generator)
        model.train(training)

        score = self.judge(tasks, decoded.ids)  # [B]
        R = rewards(score, decoded, c)
        if self.teacher is not None:
            texts = completions(tasks, decoded.ids, self.tokenizer, self.env.max_new_tokens)
            R = R + c.distill_coef * completion_logprob(self.teacher.to(R.device), tasks, texts, self.tokenizer)
        A = advantages(R.view(-1, G), "dr").flatten()
        if c.advantage_floor is not None:
            A = A.masked_fill(A < c.advantage_floor, 0)

        metrics = dict(train_reward=R.mean(), accuracy=(score == 1).float().mean(), nfe=decoded.nfe.float().mean())
        metrics |= dict(learnt_from=(A != 0).float().mean(), tokens=(decoded.order > 0).sum())
        batch = dict(ids=decoded.ids, order=decoded.order, keys=canvas.keys, advantages=A)
        return batch | dict(metrics=metrics, denominator=denominator(decoded.order > 0))

    def loss(self, model, batch):
        """Returns (loss, metrics): of masked diffusion, of imitation, or dUltra's surrogate.

        The surrogate's ratio is that of a whole step, and its sum is divided by B times length: by the "denominator" of
        the whole batch, even where its rows are learnt from in parts. There is one update for each batch, here and in
        the paper: the ratio is one, and its clip, (.2, 1), has no effect.
        """
        if "canvas" in batch:
            canvas, maskable = batch["canvas"], batch["canvas"].maskable(model.mask_id)
            if batch["imitate"]:
                return imitation_loss(model, canvas, maskable, self.settings)
            loss, metrics = model.loss(canvas.solved, maskable, canvas.keys)
            return loss, metrics | dict(tokens=maskable.sum())

        order, A = batch["order"], batch["advantages"]
        step = torch.arange(1, int(order.max()) + 1, device=order.device)  # [S]
        live = (step <= order.amax(1, keepdim=True)) & (A != 0)[:, None]  # [B, S]: the others have no gradient
        logprob = replay(model, batch, live, self.settings)  # [B, S]
        loss, metrics = policy_loss(
            logprob, logprob, A, live, clip=(0.2, 1.0), aggregate="constant", denominator=batch["denominator"]
        )
        no_gradient = 0 * sum(p.sum() for p in model.planner.out.parameters())  # for a batch whose A are all 0
        return loss + no_gradient, metrics | batch["metrics"]

    @torch.no_grad()
    def evaluate(self, model, n=256):
        """Returns reward, the share of n held-out tasks that is solved, and nfe, with the planner and tokens at T = 0.

        Before the planner is trained, the rule is entropy-bounded unmasking.
        """
        rule = planner_rule(model.planner) if self.step >= self.settings.pretrain else rule_of("entropy_bounded", model)
        decoded, score = self.decode_held_out(model, rule, n)
        return dict(reward=(score == 1).float().mean().item(), nfe=decoded.nfe.float().mean().item())

    def decode_held_out(self, model, rule, n=256, seed=0, temperature=0.0):
        """Returns (Decoded, scores [n]) of n held-out tasks."""
        tasks = self.tasks(seed, n, held_out=True)
        canvas, size = self.canvas(model, tasks), self.settings.block_size
        generator = torch.Generator(canvas.ids.device).manual_seed(seed)
        decoded = decode(model, canvas.ids, rule, temperature, size, keys=canvas.keys, generator=generator)
        return decoded, self.judge(tasks, decoded.ids)


def rewards(score, decoded, settings):
    """Returns R [B] of decodings with scores [B]: what they are worth, less what their steps cost."""
    cost = settings.efficiency * decoded.nfe / (decoded.order > 0).sum(1).clamp(min=1)
    return score * (1 - cost) if settings.reward == "multiplicative" else score - cost


def replay(model, batch, live, settings):
    """Returns log pi [B, S] of the decoding steps where live [B, S]; 0 elsewhere.

    The sequences before each step are made again from `order`. Steps are computed replay_rows at a time, and each chunk
    again in the backward (checkpoint), so memory does not grow with their number.
    """
    rows, steps = live.nonzero().unbind(1)
    chunks = [
        checkpoint(step_logprob, model, batch, r, s + 1, settings, use_reentrant=False)
        for r, s in zip(rows.split(settings.replay_rows), steps.split(settings.replay_rows))
    ]
    logprob = torch.zeros(live.shape, device=live.device)
    return logprob.masked_scatter(live, torch.cat(chunks)) if chunks else logprob


def step_logprob(model, batch, rows, steps, settings):
    """Returns log pi [n] of steps [n] of sequences rows [n]: of the planner's action and, if joint, of the tokens."""
    solved, order = batch["ids"][rows], batch["order"][rows]
    masked, action = order >= steps[:, None], order == steps[:, None]  # [n, T]
    keys = None if batch["keys"] is None else batch["keys"][rows]
    with torch.set_grad_enabled(torch.is_grad_enabled() and settings.joint):
        hidden = model.encode(solved.masked_fill(masked, model.mask_id), keys)
    eligible = current_block(masked, settings.block_size)
    logprob = planner_logprob(model.planner(hidden, eligible, masked, keys), eligible, action)
    if settings.joint:
        weight = model.head_weight[: model.mask_id]
        of_tokens, _ = linear_logprob(hidden[action], weight, solved[action], settings.temperature)
        logprob = logprob + of_tokens.new_zeros(action.shape).masked_scatter(action, of_tokens).sum(1)
    return logprob


def imitation_loss(model, canvas, maskable, settings):
    """Returns (loss, metrics): the planner's cross-entropy against a rule's decisions, on solved tasks masked anew."""
    c = settings
    t = noise_levels(len(canvas.ids), device=canvas.ids.device)
    masked = maskable & (torch.rand(maskable.shape, device=maskable.device) < t[:, None])
    with torch.no_grad():
        eligible, ids = current_block(masked, c.block_size), canvas.solved.masked_fill(masked, model.mask_id)
        hidden = model.encode(ids, canvas.keys)
        decision = apply_rule(rule_of(c.imitated, model), predict(model, hidden, eligible), eligible)
        targets = decision.float() * (1 - 2 * c.smoothing) + c.smoothing
    z = model.planner(hidden, eligible, masked, canvas.keys)[eligible]
    targets, share = targets[eligible], decision.sum() / eligible.sum().clamp(min=1)
    weight = (1 - share) / share.clamp(min=1e-6) if c.balanced else None
    loss = F.binary_cross_entropy_with_logits(z, targets, pos_weight=weight, reduction="sum") / max(1, len(z))
    metrics = dict(loss=loss.detach(), coins=torch.sigmoid(z.detach()).mean(), wanted=share, tokens=maskable.sum())
    return loss, metrics


def open_teacher(folder, tokenizer, example):
    """Returns the autoregressive model in a folder. Raises ValueError for one that cannot judge tasks like example."""
    read = read_config(folder)
    name = read.get("nanopapers", {}).get("tokenizer", tokenizer.name)
    if read.get("architectures") == ["MaskedDiffusionLM"] or name != tokenizer.name or example.template:
        raise ValueError(
            f"--teacher={folder}: a teacher is a run of --recipe=grpo on the same task, one of "
            f"tasks.ENVIRONMENTS, with --tokenizer={tokenizer.name}"
        )
    return Hybrid.from_pretrained(folder).eval().requires_grad_(False)


# Transformers with bidirectional attention: 1.9 M and 88 M parameters for text, 0.2 M and 0.8 M for tasks.
PRESETS = {
    "mdlm-tiny": HybridConfig(
        hybrid_override_pattern="*-*-*-*-", num_attention_heads=4, num_key_value_heads=4, head_dim=32, rotary_base=1e4
    ),
    "mdlm": replace(HYBRIDS["small"], hybrid_override_pattern="*-" * 12, rotary_base=1e4),
    "dultra-tiny": HybridConfig(
        hybrid_override_pattern="*-*-", num_attention_heads=4, num_key_value_heads=4, head_dim=16, hidden_size=64,
        intermediate_size=256,
    ),
    "dultra": HybridConfig(hybrid_override_pattern="*-*-", num_attention_heads=4, num_key_value_heads=4, head_dim=32),
}  # fmt: skip
TASKS = dict(tokenizer="bytes", context=64, lr=2e-3, weight_decay=0.0, decay=0.2, warmup=20, compile=False)
RECIPES = {
    # Its autoregressive baseline of equal size: --recipe=hybrid --preset=mdlm-tiny (on a GPU --preset=mdlm).
    "mdlm": Recipe(MaskedDiffusion, cpu=dict(preset="mdlm-tiny", **TEXT_CPU), gpu=dict(preset="mdlm", **TEXT_GPU)),
    "dultra": Recipe(
        DUltra,
        cpu=dict(preset="dultra-tiny", **TASKS, batch_size=256, steps=900, eval_every=100),
        gpu=dict(preset="dultra", **TASKS, batch_size=2048, steps=2000, eval_every=200),
    ),
}

# ---- 5. python mdlm_dultra.py: accuracy against NFE -----------------------------------------------------------------


def demo(pretrain=600, imitate=100, updates=30, puzzles=400):
    """Trains a model and a planner on sudokus of 4 x 4 with 4 clues, and prints accuracy and NFE of rules and planner.

    The claim: trained by rewards, the planner is as accurate as the safest threshold, in fewer forwards.
    """
    torch.manual_seed(0)
    settings = dict(task="sudoku:4", imitated="entropy_bounded:0.1", group_size=16, efficiency=0.5)
    settings = DUltraConfig(pretrain=pretrain, imitate=imitate, **settings)
    warm, learns = (DUltra(settings, Tokenizer("bytes"), batch_size) for batch_size in (128, 512))
    model = warm.build(replace(PRESETS["dultra-tiny"], vocab_size=320))

    def measure(name, rule):
        decoded, score = warm.decode_held_out(model, rule, puzzles)
        accuracy, tokens = (score == 1).float().mean(), decoded.tokens_per_forward.mean()
        print(f"{name:32} {accuracy:8.3f} {decoded.nfe.float().mean():6.2f} {tokens:12.2f}", flush=True)

    fit(model, warm, pretrain, 2e-3, "masked diffusion")
    print(f"{'sudoku:4, held out':32} accuracy    NFE   tokens/NFE")
    for spec in ("top_k:1", "top_k:3", "threshold:0.99", "threshold:0.9", "factor:1", "entropy_bounded:0.1"):
        measure(spec, rule_of(spec, model))
    fit(model, warm, imitate, 2e-3, "imitation", begin=pretrain)
    measure("planner, warm start", planner_rule(model.planner))
    fit(model, learns, updates, 2e-3, "rewards", begin=learns.begin_rewards)
    measure("planner, after rewards", planner_rule(model.planner))
    measure("planner, after rewards, p > 1/2", planner_rule(model.planner, sample=False))


if __name__ == "__main__":
    demo()
