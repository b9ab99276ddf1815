"""Nemotron-H: a language model that is mostly Mamba-2, with a few attention layers and squared-ReLU MLPs.

Papers   Nemotron-H, arXiv:2504.03624; NVIDIA Nemotron Nano 2 (12B-v2, 9B-v2), arXiv:2508.14444; Nemotron 3, where
         mixtures of experts take the place of the MLPs: Nano, Super, Ultra, arXiv:2512.20848, 2604.12374, 2606.15007;
         the Mamba-2 mixer: Dao and Gu, "Transformers are SSMs", arXiv:2405.21060.
Idea     Attention remembers every token exactly and pays for it: its cache grows with the text. A Mamba-2 layer
         keeps one state of fixed size instead. About one layer in twelve as attention is enough to look things up
         exactly; the rest as Mamba-2 and MLP gives the same quality at several times the decoding speed.
Picture  One letter of the pattern string is one residual layer with one mixer, nothing else:

         ids [B,T] -> embeddings -> x [B,T,C]
                                    |   for each letter of "M-M-M*-M-...":
                                    x <- x + mixer(rms_norm(x))        M  Mamba-2
                                    |                                  *  grouped-query attention, no positions
                                    |                                  -  down(relu(up x)^2)
                                    |                                  E  mixture of experts: latent_moe.py
                                    |                                  L  local linear attention: lla.py; in none of
                                    rms_norm -> lm_head -> logits [B,T,V]     these papers, for comparison

         Mamba-2    x -> in_proj -> z | x B C | dt        C -> 2 di + 2 G N + H,  di = H P
                                     |   |      '- softplus(dt + dt_bias) ------.
                                     |   '-- causal conv, silu -> x, B, C -> SSD scan (+ D x)
                                     '------------------------ gate ----> gated RMSNorm -> out_proj

         No position embedding anywhere: the Mamba layers, which read left to right, supply the order.
Symbols  code               paper  meaning
         mamba_num_heads    H      heads of a Mamba layer            mamba_head_dim  P  channels of one
         ssm_state_size     N      state per channel                 n_groups        G  heads of a group share B and C
         chunk_size         Q      tokens the scan takes at once: speed only, the result is the same
         A_log              A      A = -exp(A_log) < 0, how fast a head forgets
         dt_bias            delta  dt = softplus(dt + dt_bias), how strongly a token writes
Limits   One chunk is the recurrence; a prompt in pieces is the prompt at once; half a run plus a resume is the run:
         see tests/test_kernels.py, tests/test_nano_hybrid.py and tests/test_train.py.
Differs  From `transformers` 5: dt is not clamped below at time_step_min (neither NVIDIA's training code nor the
         published time_step_limit of [0, inf) does that), and A starts uniform in [1, 16] as in Megatron-LM, not 1..H.
         From Megatron-LM: a LatentMoE's experts start as wide as their own input asks, and only its last projection is
         scaled down by depth. With one std for all, the routed path of `super3` would start 370 times weaker than that
         of `nano3`.
"""

import copy
import itertools
import json
import math
import statistics
import sys
import tempfile
import time
import weakref
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from tqdm import tqdm

from common.checkpoints import config_fields, expect_weights, read_config, read_weights, save_weights
from common.objectives import NextToken, Recipe, to_device
from decode_kernels import advance, append, cached_attention, embed, linear_step
from decoding import (
    BudgetControl,
    DraftStats,
    GraphedStep,
    Sampler,
    to_host,
)
from kernels import at_least_float32, linear_cross_entropy, linear_logprob, rms_norm
from latent_moe import MLP, MoE, MoEConfig, Router
from lla import MIN_RIDGE, LocalLinearAttention, lla, lla_step
from ssd import mamba2_inner, mamba2_steps

# ---- 1. configuration -------------------------------------------------------------------------------------


LETTERS = "M*-EL"  # the layers there are: section 3


@dataclass(frozen=True)
class HybridConfig:
    """The shape of a model. Field names are those of Hugging Face's NemotronHConfig; the comment is the --help text.

    Raises ValueError, with the numbers and the remedy, for a shape that cannot be built.
    """

    vocab_size: int = 4096  # V, tokens
    hidden_size: int = 128  # C, width of the residual stream
    hybrid_override_pattern: str = "M-M*-M-"  # M Mamba-2, * attention, L local linear attention, - MLP, E experts
    tie_word_embeddings: bool = False  # one matrix for embeddings and lm_head
    num_attention_heads: int = 2  # query heads of an attention layer, * or L
    num_key_value_heads: int = 1  # key/value heads, each shared by a group of query heads
    head_dim: int = 64  # D, channels of an attention head; heads * head_dim need not be hidden_size
    rotary_base: float | None = None  # base of rotary positions in attention (1e4 is usual); default: none, as released
    lla_ridge: float = 1.0  # lambda, the ridge that each head of a local linear attention layer begins with
    intermediate_size: int = 512  # width of the MLP
    mamba_num_heads: int = 4  # H, heads of a Mamba-2 layer
    mamba_head_dim: int = 64  # P, channels of a Mamba head; the mixer is H * P wide
    ssm_state_size: int = 64  # N, state per Mamba channel
    n_groups: int = 1  # G, groups of Mamba heads that share B and C, and groups of the gated norm
    conv_kernel: int = 4  # W, width of the causal convolution
    chunk_size: int = 64  # Q, tokens per chunk of the SSD scan (speed only)
    layer_norm_epsilon: float = 1e-5  # eps of every RMSNorm
    initializer_range: float = 0.04  # std of the initial weights; the released models use sqrt(0.8 / hidden_size)
    hidden_dropout: float = 0.0  # dropout on the embeddings and on what each layer adds to them
    use_bias: bool = False  # biases in a Mamba layer's in_proj and out_proj
    use_conv_bias: bool = True  # bias in its convolution
    mlp_bias: bool = False  # biases in MLPs, shared experts and latent projections
    n_routed_experts: int = 8  # E, experts of a mixture
    num_experts_per_tok: int = 2  # K, experts that a token uses
    moe_intermediate_size: int = 128  # hidden units of an expert
    moe_shared_expert_intermediate_size: int = 256  # hidden units of the expert that every token uses
    moe_latent_size: int | None = None  # l, width the experts work in (LatentMoE); default: hidden_size
    n_group: int = 1  # groups of experts (n_groups, with an s, is Mamba's)
    topk_group: int = 1  # groups a token may choose its experts from
    norm_topk_prob: bool = True  # divide the weights of a token's experts by their sum
    routed_scaling_factor: float = 1.0  # then multiply them by this
    router_aux_loss_coef: float = 1e-4  # weight of the sequence-wise balance loss
    router_bias_update_rate: float = 1e-3  # step of the bias that balances the load
    num_nextn_predict_layers: int = 0  # 1: a block that predicts tokens further ahead (multi-token prediction)
    mtp_hybrid_override_pattern: str = "*E"  # its layers: *, E or -
    mtp_depths: int = 2  # how many further tokens it is trained on, by being applied to its own output
    mtp_loss_weight: float = 0.3  # weight of their mean loss

    def __post_init__(self):
        unknown = sorted(set(self.hybrid_override_pattern) - set(LETTERS))
        if unknown or not self.hybrid_override_pattern:
            raise ValueError(
                f"hybrid_override_pattern={self.hybrid_override_pattern!r} has {unknown or 'no layers'}; "
                "write one letter per layer: M (Mamba-2), * (attention), - (MLP), E (mixture of experts), "
                "L (local linear attention)"
            )
        for name in (f.name for f in fields(self) if f.type in (int, "int") and f.name != "num_nextn_predict_layers"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number of at least 1")
        pattern = self.mtp_hybrid_override_pattern
        if self.num_nextn_predict_layers not in (0, 1) or not pattern or set(pattern) - set("*E-"):
            raise ValueError(
                f"num_nextn_predict_layers={self.num_nextn_predict_layers} must be 0 or 1 (one block, applied to its "
                f"own output), and mtp_hybrid_override_pattern={pattern!r} made of *, E and -"
            )
        for many, few in (("num_attention_heads", "num_key_value_heads"), ("mamba_num_heads", "n_groups")):
            if getattr(self, many) % getattr(self, few):
                raise ValueError(f"{many}={getattr(self, many)} is not a multiple of {few}={getattr(self, few)}")
        if self.rotary_base is not None and (self.rotary_base <= 0 or self.head_dim % 2):
            raise ValueError(f"rotary_base={self.rotary_base} must be positive, and head_dim={self.head_dim} even")
        if not MIN_RIDGE < self.lla_ridge < math.inf:
            raise ValueError(f"lla_ridge={self.lla_ridge} must be above {MIN_RIDGE}, and finite")
        if not 0 <= self.hidden_dropout < 1:
            raise ValueError(f"hidden_dropout={self.hidden_dropout} must be in [0, 1)")
        if "E" in self.hybrid_override_pattern or (self.num_nextn_predict_layers and "E" in pattern):
            self.moe()  # raises ValueError for a mixture that cannot be built

    @property
    def mamba_size(self):
        """Width of the Mamba mixer, di = H * P. It need not be 2 * hidden_size, whatever `expand` in old files says."""
        return self.mamba_num_heads * self.mamba_head_dim

    def moe(self):
        """Returns the MoEConfig of the mixtures of experts."""
        same = {f.name: getattr(self, f.name) for f in fields(MoEConfig) if f.name != "latent_size"}
        return MoEConfig(**same, latent_size=self.moe_latent_size)

    @property
    def conv_size(self):
        """Channels of the convolution: x, B and C go through it together."""
        return self.mamba_size + 2 * self.n_groups * self.ssm_state_size


# fmt: off
_SMALL = dict(
    vocab_size=50304, hidden_size=768, tie_word_embeddings=True, num_attention_heads=12, num_key_value_heads=12,
    head_dim=64, intermediate_size=3072, mamba_num_heads=24, mamba_head_dim=64, ssm_state_size=128, n_groups=8,
    chunk_size=128, initializer_range=0.02,
)
_NANO3_TINY = dict(
    hybrid_override_pattern="MEM*EME", num_experts_per_tok=4, n_routed_experts=16, moe_intermediate_size=64,
    moe_shared_expert_intermediate_size=256, routed_scaling_factor=2.5,
)
_NANO3_SMALL = dict(  # 4 x 512 + 1,024 hidden units for a token: as many as the MLP of `small` has
    hybrid_override_pattern="MEMEM*EMEMEM*EMEME", num_experts_per_tok=4, n_routed_experts=32, moe_intermediate_size=512,
    moe_shared_expert_intermediate_size=1024, routed_scaling_factor=2.5,
)
_RELEASED = dict(  # what NVIDIA's released Nano 2 models have in common
    vocab_size=131072, num_attention_heads=40, num_key_value_heads=8, head_dim=128, mamba_num_heads=128,
    mamba_head_dim=80, ssm_state_size=128, n_groups=8, chunk_size=128,
)
_NEMOTRON_3 = dict(
    vocab_size=131072, num_key_value_heads=2, head_dim=128, mamba_head_dim=64, ssm_state_size=128, n_groups=8,
    chunk_size=128,
)
PRESETS = {  # the shapes we train (tiny, small) and the papers' models
    # 1.8M parameters with the shipped vocabulary: minutes on a laptop's CPU.
    "tiny": HybridConfig(),
    # 122M with GPT-2's vocabulary, to stand beside GPT-2's 124M; 87M with the shipped one.
    "small": HybridConfig(**_SMALL, hybrid_override_pattern="M-M-M*-M-M-M*-M-M-"),
    # The same with a mixture of experts for each MLP, of as many active parameters: Nemotron 3 Nano, arXiv:2512.20848.
    "nano3-tiny": HybridConfig(**_NANO3_TINY),
    "nano3": HybridConfig(**_SMALL, **_NANO3_SMALL),
    # And with LatentMoE, alpha 4 (`latent_moe.latent_twin` of those), and multi-token prediction: Nemotron 3 Super.
    "super3-tiny": HybridConfig(
        **_NANO3_TINY
        | dict(moe_latent_size=32, n_routed_experts=64, num_experts_per_tok=12, routed_scaling_factor=5.0),
        num_nextn_predict_layers=1,
    ),
    "super3": HybridConfig(
        **_SMALL, num_nextn_predict_layers=1,
        **_NANO3_SMALL
        | dict(moe_latent_size=192, n_routed_experts=128, num_experts_per_tok=14, routed_scaling_factor=5.0),
    ),
    # `small` and `tiny` with local linear attention in place of softmax attention, arXiv:2510.01450. The tiny one has
    # heads of 32: on a CPU a D x D system is solved for each position and head.
    "lla-tiny": HybridConfig(hybrid_override_pattern="M-ML-M-", head_dim=32),
    "lla": HybridConfig(**_SMALL, hybrid_override_pattern="M-M-ML-M-M-ML-M-M-"),
    # Nemotron Nano 2, arXiv:2508.14444: 12.31 B, and the 8.89 B pruned from it.
    "nano-12b-v2": HybridConfig(
        **_RELEASED, hidden_size=5120, intermediate_size=20480, initializer_range=0.0125,
        hybrid_override_pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
    ),
    "nano-9b-v2": HybridConfig(
        **_RELEASED, hidden_size=4480, intermediate_size=15680, initializer_range=0.0134,
        hybrid_override_pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
    ),
    # Nemotron 3 (arXiv:2512.20848, 2604.12374, 2606.15007): 31.58 B, 3.58 B active; 120.67 B, 12.77 B; 549.3 B, 56.1 B.
    "nano-3-30b-a3b": HybridConfig(
        **_NEMOTRON_3, hidden_size=2688, num_attention_heads=32, mamba_num_heads=64, n_routed_experts=128,
        num_experts_per_tok=6, moe_intermediate_size=1856, moe_shared_expert_intermediate_size=3712,
        routed_scaling_factor=2.5, initializer_range=0.0173,
        hybrid_override_pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    ),
    "super-3-120b-a12b": HybridConfig(
        **_NEMOTRON_3, hidden_size=4096, num_attention_heads=32, mamba_num_heads=128, n_routed_experts=512,
        num_experts_per_tok=22, moe_intermediate_size=2688, moe_shared_expert_intermediate_size=5376,
        moe_latent_size=1024, num_nextn_predict_layers=1, routed_scaling_factor=5.0, initializer_range=0.014,
        hybrid_override_pattern="MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
    ),
    "ultra-3-550b-a55b": HybridConfig(
        **_NEMOTRON_3, hidden_size=8192, num_attention_heads=64, mamba_num_heads=256, n_routed_experts=512,
        num_experts_per_tok=22, moe_intermediate_size=5120, moe_shared_expert_intermediate_size=10240,
        moe_latent_size=2048, num_nextn_predict_layers=1, routed_scaling_factor=5.0, initializer_range=0.0099,
        hybrid_override_pattern="MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    ),
}
# fmt: on

# ---- 2. what the model remembers ----------------------------------------------------------------------------


@dataclass
class MambaState:
    """The memory of one Mamba-2 layer: the same size after one token and after a million."""

    conv: torch.Tensor  # [B, conv_size, W-1] the last inputs of the convolution, newest last
    ssm: torch.Tensor  # [B, H, P, N] float32: errors in a 16-bit state add up over the text


@dataclass
class KVState:
    """The memory of an attention layer, * or L: every key and value so far, in room that doubles when it is full."""

    k: torch.Tensor  # [B, Hkv, room, D]
    v: torch.Tensor  # [B, Hkv, room, D]
    length: int  # T, those that are filled; in a fixed Cache the whole room, and Cache.position counts

    @classmethod
    def after(cls, state, k, v, room=0):
        """Returns the state (None: empty, and to be given this room) with k, v [B, Hkv, T, D] added."""
        if state is None or k.requires_grad:  # what autograd has seen must not be written to
            k, v = (k, v) if state is None else (torch.cat(pair, dim=2) for pair in zip(state.filled(), (k, v)))
            state = cls(k, v, k.shape[2])
            return state if k.requires_grad else state.in_room(max(room, state.length), state.length)
        length, room = state.length + k.shape[2], state.k.shape[2]
        more = 0 if length <= room else max(length, 2 * room) - room
        buffers = [F.pad(b, (0, 0, 0, more)) if more else b for b in (state.k, state.v)]
        for buffer, new in zip(buffers, (k, v)):
            buffer[:, :, state.length : length] = new
        return cls(*buffers, length)

    def filled(self):
        """Returns views (k, v), each [B, Hkv, T, D]."""
        return self.k[:, :, : self.length], self.v[:, :, : self.length]

    def in_room(self, room, length):
        """Returns the state with this room, `length` positions of it called filled."""
        if room == self.k.shape[2]:
            return KVState(self.k, self.v, length)
        return KVState(*(F.pad(b, (0, 0, 0, room - b.shape[2])) for b in self.filled()), length)


@dataclass
class Cache:
    """What a model has read: pass it to `forward` with the tokens that come next; `forward` brings it up to date.

    Prompts of different lengths share a batch by padding on the left; `pad` says by how much. Padding is exact:
    a padded position writes nothing to any state and is never looked at.

    To write, `fix` it: then states are written over in place and `position` counts on the device, so that a CUDA graph
    can repeat a step. `keep` says how many tokens of a `trial` were right; the rest are taken back.
    """

    layers: list  # one MambaState, KVState or None per layer; None before the first token, and for one without memory
    length: int = 0  # T, positions read before `fix`, padding included
    room: int = 0  # positions that keys and values get room for at once
    pad: torch.Tensor | None = None  # [B] int64, padded positions at the start of each row; None: no padding
    longest_pad: int = 0  # the largest of them
    position: torch.Tensor | None = None  # [] int64, positions read, once it is fixed
    trial: bool = False  # whether those tokens may be taken back
    found: dict = field(default_factory=dict)  # layer -> (inputs, states) of `mamba2_steps` for those tokens

    def size(self):
        """Returns how many bytes it remembers with; fixed, with its whole room."""
        tensors = []
        for state in self.layers:
            if state is not None:
                tensors += state.filled() if isinstance(state, KVState) else (state.conv, state.ssm)
        return sum(t.numel() * t.element_size() for t in tensors)

    def real(self, T):
        """Returns a bool [B, T]: which of the next T positions are tokens, not padding; None if all are."""
        if self.length >= self.longest_pad:
            return None
        positions = torch.arange(self.length, self.length + T, device=self.pad.device)
        return positions[None, :] >= self.pad[:, None]

    def fix(self, room, device):
        """Gives each state a place to be written over, with room for `room` positions; again, for more room.

        From then on without gradients. Raises ValueError if what was read does not fit, or padding is still to come.
        """
        if not self.fixed and (room < self.length or self.length < self.longest_pad):
            raise ValueError(f"read {self.length} positions, {self.longest_pad} of padding; room={room} does not fit")
        for index, state in enumerate(self.layers):
            if isinstance(state, KVState):
                self.layers[index] = state.in_room(room, room)  # from now on `position` says how many are filled
            elif isinstance(state, MambaState) and not self.fixed:
                self.layers[index] = MambaState(*(t.clone(memory_format=torch.contiguous_format)
                                                  for t in (state.conv, state.ssm)))  # fmt: skip
        if not self.fixed:
            self.position = torch.tensor(self.length, device=device)

    @property
    def fixed(self):
        """Whether `fix` was called."""
        return self.position is not None

    def finish(self, T):
        """Notes that they were read."""
        if not self.fixed:
            self.length += T
        elif not self.trial:
            pairs = [(self.layers[i].ssm, states) for i, (_, states) in self.found.items()]
            pairs = [(old, new) for old, new in pairs if old is not new]  # a kernel wrote them in place
            if pairs:
                torch._foreach_copy_(*zip(*pairs))
            advance(
                self.position, T, [self.layers[i].conv for i in self.found], [new for new, _ in self.found.values()]
            )
            self.found = {}

    def select(self, rows):
        """Forgets every row of the batch but these, int64 [n], of a fixed cache: they move to its front."""
        n = len(rows)
        for index, state in enumerate(self.layers):
            if isinstance(state, KVState):
                k, v = (buffer[:n].copy_(buffer[rows]) for buffer in (state.k, state.v))
                self.layers[index] = KVState(k, v, state.length)
            elif isinstance(state, MambaState):
                self.layers[index] = MambaState(*(buffer[:n].copy_(buffer[rows]) for buffer in (state.conv, state.ssm)))
        self.pad = None if self.pad is None else self.pad[:n].copy_(self.pad[rows])

    def spread(self, rows, room, into=None):
        """Returns a fixed cache whose row i goes on from row rows[i], int64 [n], of this one, which is not fixed.

        into: a cache that an earlier call returned for as many rows and as much room, to be written over.
        """
        n, device = len(rows), rows.device
        if into is None:
            into = Cache([None] * len(self.layers), position=torch.zeros((), dtype=torch.int64, device=device))
            into.pad = None if self.pad is None else torch.zeros(n, dtype=torch.int64, device=device)
            for index, state in enumerate(self.layers):
                if isinstance(state, KVState):  # what is not filled counts 0 times, which must not be NaN
                    shape = (n, state.k.shape[1], room, state.k.shape[3])
                    into.layers[index] = KVState(state.k.new_zeros(shape), state.v.new_zeros(shape), room)
                elif isinstance(state, MambaState):
                    shapes = [(n, *t.shape[1:]) for t in (state.conv, state.ssm)]
                    into.layers[index] = MambaState(state.conv.new_empty(shapes[0]), state.ssm.new_empty(shapes[1]))
        for mine, state in zip(into.layers, self.layers):
            if isinstance(state, KVState):
                for buffer, read in zip((mine.k, mine.v), state.filled()):
                    buffer[:, :, : self.length] = read[rows]
            elif isinstance(state, MambaState):
                mine.conv.copy_(state.conv[rows])
                mine.ssm.copy_(state.ssm[rows])
        into.position.fill_(self.length)
        if self.pad is not None:
            into.pad.copy_(self.pad[rows])
        return into

    def keep(self, last):
        """Ends a trial: its tokens up to number `last`, a tensor [], were read; those after it never were."""
        pairs = []
        for index, (inputs, states) in self.found.items():
            conv, ssm = self.layers[index].conv, self.layers[index].ssm
            window = last + 1 + torch.arange(conv.shape[-1], device=last.device)
            pairs += [(conv, inputs.index_select(-1, window)), (ssm, states.index_select(1, last[None])[:, 0])]
        if pairs:
            torch._foreach_copy_(*zip(*pairs))
        self.position += last + 1  # keys and values of the others will be written over
        self.found, self.trial = {}, False


# ---- 3. the mixers that remember ------------------------------------------------------------------------------
#
# `forward` maps x [B, T, C] to what its layer adds to the residual stream, [B, T, C]. With a cache it goes on from
# cache.layers[index] and leaves there what the next call will need. `step` is the same for a few tokens on a fixed
# cache, with the norm before and the sum after taken into the products; it reads the weights themselves, so whoever
# replaces a Linear by a layer of their own writes by `forward` alone. MLPs and experts are in latent_moe.py.


class RMSNorm(nn.Module):
    """x / rms(x) * weight: the norm in front of every layer. Inside Mamba-2 it only holds the gated norm's weight."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        """Returns x [..., size] normalised over its last dimension."""
        return rms_norm(x, self.weight, self.eps)


class Mamba2(nn.Module):
    """A gated, selective state space layer."""

    def __init__(self, config, index):
        super().__init__()
        self.config, self.index = config, index
        H, di = config.mamba_num_heads, config.mamba_size
        self.in_proj = nn.Linear(config.hidden_size, di + config.conv_size + H, bias=config.use_bias)  # z | x B C | dt
        channels = config.conv_size
        self.conv1d = nn.Conv1d(channels, channels, config.conv_kernel, groups=channels, bias=config.use_conv_bias)
        self.A_log = nn.Parameter(torch.empty(H))
        self.D = nn.Parameter(torch.empty(H))
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.norm = RMSNorm(di, config.layer_norm_epsilon)
        self.out_proj = nn.Linear(di, config.hidden_size, bias=config.use_bias)

    def forward(self, u, cache=None):
        """Returns [B, T, C]: in_proj, then the inside of the layer (ssd.py, section 6), then out_proj."""
        c, projected = self.config, self.in_proj(u)
        inner = (
            projected, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.dt_bias,
            -torch.exp(at_least_float32(self.A_log)), self.D, self.norm.weight, c.n_groups, c.layer_norm_epsilon,
            c.chunk_size,
        )  # fmt: skip
        if cache is None:
            return self.out_proj(mamba2_inner(*inner))
        state, real = cache.layers[self.index], cache.real(u.shape[1])
        y, state = mamba2_inner(*inner, state and (state.conv, state.ssm), real, return_final_state=True)
        cache.layers[self.index] = MambaState(*state)
        return self.out_proj(y)

    def step(self, x, norm, cache):
        """Returns x + forward(norm(x)) [B, T, C] of a few tokens on a fixed cache."""
        c, state, every = self.config, cache.layers[self.index], cache.trial
        projected = linear_step(x, self.in_proj.weight, self.in_proj.bias, norm=norm.weight, eps=norm.eps)
        y, *cache.found[self.index] = mamba2_steps(
            projected, state.conv, state.ssm, self.conv1d.weight.squeeze(1), self.conv1d.bias, self.dt_bias,
            self.A_log, self.D, c.n_groups, every, overwrite=not every, settled=True,
        )  # fmt: skip
        return linear_step(
            y, self.out_proj.weight, self.out_proj.bias, norm=self.norm.weight,
            group_size=c.mamba_size // c.n_groups, eps=c.layer_norm_epsilon, residual=x,
        )  # fmt: skip


def rotate(x, start, base):
    """Returns x [B, H, T, D], each position turned by its own angles: rotary embedding, arXiv:2104.09864, section 3.2.

    Channels (d, d + D/2) turn by position * base^(-2d/D), so that q.k depends on how far the two are apart alone.
    start: the first position, a number or a tensor []. Angles are float32: in 16 bits, positions past a few hundred are
    no longer told apart. For comparisons only: the released models and `transformers` have no positions here, whatever
    rope_theta a config.json carries.
    """
    (T, D), dtype = x.shape[2:], at_least_float32(x).dtype
    speed = base ** (-torch.arange(0, D, 2, device=x.device, dtype=dtype) / D)  # [D/2]
    angle = (start + torch.arange(T, device=x.device))[:, None] * speed  # [T, D/2]
    (a, b), cos, sin = x.chunk(2, dim=-1), angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class KeyValueMixer:
    """What all attention has in common: it remembers keys and values, and each query reads those up to its own.

    A subclass is a Module with projections to q, k, v and from o, an `index`, a `rotary_base` or None, and three
    methods: `qkv(product)`, as LocalLinearAttention has it; `read`, for a text or a piece of one; `read_fixed`, for a
    few tokens on a fixed cache.
    """

    def forward(self, x, cache=None):
        """Returns [B, T, C]. A query sees the cache, and of the T new positions its own and those before it."""
        (q, k, v), pad = self.placed(lambda projection: projection(x), cache), None
        if cache:
            cache.layers[self.index] = state = KVState.after(cache.layers[self.index], k, v, cache.room)
            (k, v), pad = state.filled(), cache.pad  # [B, Hkv, past + T, D]
        return self.o_proj(self.read(q, k, v, pad).transpose(1, 2).flatten(2))

    def step(self, x, norm, cache):
        """Returns x + forward(norm(x)) [B, T, C] of a few tokens on a fixed cache."""
        state = cache.layers[self.index]
        projections = self.q_proj, self.k_proj, self.v_proj
        products = linear_step(x, tuple(p.weight for p in projections), norm=norm.weight, eps=norm.eps)
        out = self.read_fixed(*self.placed(dict(zip(projections, products)).get, cache), state, cache)
        return linear_step(out.transpose(1, 2).flatten(2), self.o_proj.weight, residual=x)

    def placed(self, product, cache):
        """Returns q, k, v, each [B, heads, T, D], where positions are rotary turned by their own."""
        q, k, v = self.qkv(product)
        if self.rotary_base:
            start = 0 if cache is None else cache.position if cache.fixed else cache.length
            q, k = (rotate(t, start, self.rotary_base) for t in (q, k))
        return q, k, v


class Attention(KeyValueMixer, nn.Module):
    """Causal grouped-query attention: without positions as published, or with rotary ones (config.rotary_base)."""

    def __init__(self, config, index):
        super().__init__()
        self.head_dim, self.index, self.rotary_base = config.head_dim, index, config.rotary_base
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def qkv(self, product):
        """Returns q, k, v, each [B, heads, T, D]: product(projection) of each projection."""
        return tuple(
            product(p).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )

    def read(self, q, k, v, pad):
        """Returns [B, Hq, T, D]: attention of the last T positions on k, v [B, Hkv, past + T, D]. pad [B] or None."""
        T, past, mask = q.shape[2], k.shape[2] - q.shape[2], None
        if pad is not None:
            rows = torch.arange(past, past + T, device=q.device)[:, None]
            columns = torch.arange(past + T, device=q.device)[None, :]
            mask = (columns <= rows) & (columns >= pad[:, None, None, None])  # [B, 1, T, past + T]
            mask = mask | (columns == rows)  # a padded query sees itself, so that its softmax is over something
        elif past and T > 1:  # the last row sees everything; a GPU's kernels do it without a matrix
            mask = causal_lower_right(T, past + T)
        is_causal = mask is None and T > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=True)

    def read_fixed(self, q, k, v, state, cache):
        """Returns the same of T new positions, whose keys and values k, v [B, Hkv, T, D] are put into the state."""
        return cached_attention(q, k, v, state.k, state.v, cache.position, cache.pad, settled=True)


class LocalLinear(KeyValueMixer, LocalLinearAttention):
    """Local linear attention (lla.py) where softmax attention would stand: the same projections, memory and positions.

    Beyond those of `Attention` it has D + H parameters: the norm that q and k share, and a ridge for each head.
    """

    def __init__(self, config, index):
        c = config
        super().__init__(
            c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.lla_ridge, c.layer_norm_epsilon
        )
        self.index, self.rotary_base = index, c.rotary_base

    def read(self, q, k, v, pad):
        """Returns [B, Hq, T, D]: `lla` of the last T positions on k, v [B, Hkv, past + T, D]. pad [B] or None.

        `lla` knows no padding, so with some each text is read by itself, from its own beginning.
        """
        if pad is None:
            return lla(q, k, v, self.ridge)
        T, past, out = q.shape[2], k.shape[2] - q.shape[2], torch.zeros_like(q)
        for text, n in enumerate(pad.tolist()):
            one, first = slice(text, text + 1), max(0, n - past)  # of the T; what is before is padding
            if first < T:
                out[one, :, first:] = lla(q[one, :, first:], k[one, :, n:], v[one, :, n:], self.ridge)
        return out

    def read_fixed(self, q, k, v, state, cache):
        """Returns the same of T new positions, whose keys and values k, v [B, Hkv, T, D] are put into the state."""
        append(state.k, state.v, k, v, cache.position)
        one_by_one = enumerate(q.unbind(2), 1)  # drafts: each looks no further than itself
        out = [lla_step(one, state.k, state.v, self.ridge, cache.position + t, cache.pad) for t, one in one_by_one]
        return torch.stack(out, dim=2)


STATEFUL = {"M": Mamba2, "*": Attention, "L": LocalLinear}  # an MLP and a mixture of experts (latent_moe.py) do not


def mixer_of(config, letter, index):
    """Returns the mixer for a letter."""
    if letter in STATEFUL:
        return STATEFUL[letter](config, index)
    return MoE(config.moe()) if letter == "E" else MLP(config.hidden_size, config.intermediate_size, config.mlp_bias)


# ---- 4. the model -----------------------------------------------------------------------------------------------

# What a layer adds to the residual stream comes from these.
OUTPUT_PROJECTIONS = ("out_proj", "o_proj", "down_proj", "fc2_latent_proj")
CG_STEPS = 8  # that a solve of local linear attention is counted with: about what q and k with norms need at ridge 1
# A batch is made smaller when half of its rows have stopped, if it has so many rows and, on a GPU, where a step has to
# be recorded anew, has gone on for so many steps. A session does so already when a quarter has.
SMALLEST_CUT, CUT_AFTER = 32, 24
ROOM = 1024  # tokens that `generate` makes room for at once, or as many as the prompt has


class Block(nn.Module):
    """One letter of a pattern: x + dropout(mixer(norm(x))). index: its place in the pattern, and in a cache."""

    def __init__(self, config, letter, index):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer, self.remembers = mixer_of(config, letter, index), letter in STATEFUL
        self.dropout = config.hidden_dropout

    def forward(self, x, cache=None):
        """Returns x [B, T, C] with the mixer's part added."""
        if cache and cache.fixed:
            return self.step(x, cache)
        added = self.mixer(self.norm(x), cache) if self.remembers else self.mixer(self.norm(x))
        return x + F.dropout(added, self.dropout, self.training)

    @torch.compiler.disable  # a CUDA graph repeats it: nothing for a compiler to gain
    def step(self, x, cache):
        """Returns the same for a few tokens on a fixed cache: norm and sum go along with the mixer's products."""
        mixer, norm = self.mixer, self.norm
        if isinstance(mixer, MoE):
            return x + mixer(norm(x))
        if isinstance(mixer, MLP):
            up, down = mixer.up_proj, mixer.down_proj
            h = linear_step(x, up.weight, up.bias, norm=norm.weight, eps=norm.eps, relu2=True)
            return linear_step(h, down.weight, down.bias, residual=x)
        return mixer.step(x, norm, cache)


class Backbone(nn.Module):
    """Embeddings, layers and the final norm: ids [B, T] -> hidden [B, T, C]."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        pattern = config.hybrid_override_pattern
        self.layers = nn.ModuleList(Block(config, letter, index) for index, letter in enumerate(pattern))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.dropout = config.hidden_dropout

    def forward(self, ids, cache=None, normed=True):
        """Returns hidden states [B, T, C] after the final norm, and brings `cache` up to date if there is one.

        normed: False leaves that norm to whoever takes them.
        """
        if cache and cache.fixed:
            x = embed(ids, self.embeddings.weight)  # [B, T, C]
        else:
            x = F.dropout(self.embeddings(ids), self.dropout, self.training)
        for layer in self.layers:
            x = layer(x, cache)
        if cache:
            cache.finish(ids.shape[1])
        return self.norm_f(x) if normed else x


class MultiTokenPredictor(nn.Module):
    """Goes one token further: what the model knew at a token, and the token after it -> what it would know there.

    It is applied to its own output to go further still, with the same weights. Parameter names are those of the
    released models: the norms and the projection belong to its first layer, the final norm to its last. Source:
    DeepSeek-V3, section 2.2; Nemotron 3 Super, arXiv:2604.12374.
    """

    def __init__(self, config):
        super().__init__()
        C, eps, pattern = config.hidden_size, config.layer_norm_epsilon, config.mtp_hybrid_override_pattern
        self.layers = nn.ModuleList(Block(config, letter, index) for index, letter in enumerate(pattern))
        first, last = self.layers[0], self.layers[-1]
        first.enorm, first.hnorm = RMSNorm(C, eps), RMSNorm(C, eps)
        first.eh_proj = nn.Linear(2 * C, C, bias=False)
        last.final_layernorm = RMSNorm(C, eps)

    def forward(self, embedded, hidden, cache=None):
        """Returns hidden states [B, T, C] for `lm_head`, one token further than `hidden`.

        embedded [B, T, C]: of the token after each; hidden [B, T, C]: after the model's final norm, or from here.
        """
        first, last = self.layers[0], self.layers[-1]
        g = first.eh_proj(torch.cat([first.enorm(embedded), first.hnorm(hidden)], dim=-1))  # [B, T, C]
        for layer in self.layers:
            g = layer(g, cache)
        if cache:
            cache.finish(g.shape[1])
        return last.final_layernorm(g)


class DecodeSession:
    """What `generate` writes with: a fixed cache, the last token of each row, a step for each size of the batch.

    On a GPU a step is a CUDA graph, which takes a hundred steps' time to record and knows its tensors by their address.
    So in one session, calls of one shape use the same tensors, and graphs recorded in the first serve the rest.
    """

    def __init__(self):
        self.shape, self.room, self.copied, self.copy = None, 0, None, None

    def model_like(self, model):
        """Returns a model with the weights that `model` has now, in the type that autocast would cast them to."""
        kind = model.lm_head.weight.device.type
        if not torch.is_autocast_enabled(kind):
            return model
        dtype = torch.get_autocast_dtype(kind)
        if self.copied != (model, dtype):
            self.copied, self.copy = (model, dtype), copy.deepcopy(model).requires_grad_(False)
            for module in self.copy.modules():
                if isinstance(module, nn.Linear) and module.weight is not self.copy.model.embeddings.weight:
                    module.to(dtype)
        torch._foreach_copy_(*(list(itertools.chain(m.parameters(), m.buffers())) for m in (self.copy, model)))
        return self.copy

    def begin(self, model, cache, rows, room, choose, wants_logprobs):
        """Goes on from a cache: row i of the batch, int64 [B], from row rows[i] of it."""
        shape = (model, len(rows), cache.pad is None, choose, wants_logprobs)
        if shape == self.shape and room <= self.room:
            cache.spread(rows, self.room, self.whole)
        else:
            self.shape, self.room, self.repeated = shape, room, {}
            if len(rows) > 1:
                self.whole = cache.spread(rows, room)
            else:  # a text by itself may be long: no copy of what is remembered of it
                cache.fix(room, rows.device)
                self.whole = cache
            self.tokens = torch.empty(len(rows), dtype=torch.int64, device=rows.device)
            self.logprobs = torch.empty(len(rows), device=rows.device) if wants_logprobs else None
        self.model, self.choose, self.size = model, choose, len(rows)
        self.cache = replace(self.whole, layers=list(self.whole.layers))

    @property
    def token(self):
        """The last token of each row of the batch, [b]."""
        return self.tokens[: self.size]

    @property
    def logprob(self):
        """Its log-probability, [b]."""
        return self.logprobs[: self.size]

    def choose_from(self, hidden, normed=True):
        """Draws the next token of each row from what the model made of the last, hidden [b, T, C], normed or not."""
        last = hidden[:, -1]  # only the last position is needed
        drawn, probs = self.choose(self.model._logits(last, normed))  # [b], [b, V]
        self.token.copy_(drawn)
        if self.logprobs is not None:
            self.logprob.copy_(probs.gather(1, drawn[:, None])[:, 0].log())

    def step(self):
        """Reads the last token of each row, and draws the next."""
        if self.size not in self.repeated:
            me = weakref.proxy(self)  # or what is no longer used would wait for the garbage collector
            self.repeated[self.size] = GraphedStep(
                lambda: me.choose_from(me.model.model(me.token[:, None], me.cache, normed=False), normed=False),
                self.tokens.device, self.model.lm_head.weight.dtype, self.choose.generator,
            )  # fmt: skip
        self.repeated[self.size]()

    def select(self, rows):
        """Goes on with these rows only, int64 [n]: they become rows 0 ... n - 1."""
        self.cache.select(rows)
        for buffer in (self.tokens, self.logprobs):
            if buffer is not None:
                buffer[: len(rows)] = buffer[rows]
        self.size = len(rows)

    def grow(self):
        """Makes twice the room; what was recorded is of no more use."""
        self.room *= 2
        self.cache.fix(self.room, self.tokens.device)
        self.shape, self.repeated = None, {}


class Hybrid(nn.Module):
    """The language model. Parameter names are those of `transformers`' NemotronHForCausalLM."""

    parts = ()  # submodules whose learning rate an objective sets apart

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = MultiTokenPredictor(config) if config.num_nextn_predict_layers else None
        self.cross_entropy = linear_cross_entropy  # `compile` swaps in a compiled one
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embeddings.weight
        if self.lm_head.weight.device.type != "meta":
            self.init_weights()

    @torch.no_grad()
    def init_weights(self):
        """Draws the initial weights as Megatron-LM does for these models, from torch's global generator.

        Matrices normal(0, initializer_range), those that write to the residual stream divided by sqrt(number of
        layers) so that its variance does not grow with depth; A uniform in [1, 16]; dt log-uniform in [1e-3, 1e-1].
        Norms and the ridges of local linear attention stay as their layers made them.
        """
        std = self.config.initializer_range
        for name, module in self.named_modules():
            output_std = std / math.sqrt(len(self.model.layers))
            if isinstance(module, nn.Embedding | nn.Linear | Router):
                module.weight.normal_(0, output_std if name.split(".")[-1] in OUTPUT_PROJECTIONS else std)
                if getattr(module, "bias", None) is not None:
                    module.bias.zero_()
            elif isinstance(module, MoE):  # narrow experts: see Differs
                wider = math.sqrt(self.config.hidden_size / module.config.expert_size)
                module.experts.up_proj.normal_(0, std * wider)
                module.experts.down_proj.normal_(0, output_std if module.config.latent_size is None else std)
            elif isinstance(module, Mamba2):
                bound = 1 / math.sqrt(self.config.conv_kernel)
                module.conv1d.weight.uniform_(-bound, bound)
                if module.conv1d.bias is not None:
                    module.conv1d.bias.uniform_(-bound, bound)
                module.A_log.uniform_(1, 16).log_()
                module.D.fill_(1)
                dt = module.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_().clamp_(min=1e-4)
                dt.add_(torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def compile(self, **options):
        """Compiles the layers one by one, and the loss, with `torch.compile`.

        Layers of a kind share their graph, so a deep model compiles as fast as a shallow one.
        """
        for layer in self.layers:
            layer.compile(**options)
        self.cross_entropy = torch.compile(linear_cross_entropy, **options)

    @property
    def layers(self):
        """All residual layers, those of the multi-token predictor too."""
        return [*self.model.layers, *(self.mtp.layers if self.mtp else ())]

    def new_cache(self, pad=None, room=0):
        """Returns an empty Cache. pad [B] int64: how many positions at the start of each row are padding.

        room: positions that keys and values get room for at once; more are made as they are needed.
        """
        longest_pad = 0 if pad is None else int(pad.max())
        pad = pad if longest_pad else None
        return Cache([None] * len(self.model.layers), room=room, pad=pad, longest_pad=longest_pad)

    def forward(self, ids, cache=None):
        """Returns float32 logits [B, T, V] for ids [B, T] int64; with a cache, for the tokens after what it holds."""
        return at_least_float32(self.lm_head(self.model(ids, cache)))

    def loss(self, ids, targets):
        """Returns (loss, metrics). ids, targets [B, T] int64; targets -100 are left out.

        The loss is the mean next-token cross-entropy in nats (metrics["loss"]); in training, mixtures of experts add
        router_aux_loss_coef times their `sequence_balance_loss`, and multi-token prediction `mtp_loss`.
        """
        hidden = self.model(ids)  # [B, T, C]
        loss = self.cross_entropy(hidden.flatten(0, 1), self.lm_head.weight, targets.flatten())
        metrics = {"loss": loss.detach()}
        if not self.training or not torch.is_grad_enabled():
            return loss, metrics
        balance = self.pop_balance_losses()
        if self.mtp:
            further, found = self.mtp_loss(ids, targets, hidden)
            loss, metrics = loss + self.config.mtp_loss_weight * further, metrics | found
            balance = balance + self.pop_balance_losses()
        return loss + self.config.router_aux_loss_coef * balance, metrics

    def pop_balance_losses(self):
        """Returns the sum of the mixtures' balance losses since they were last taken."""
        return sum(moe.pop_balance_loss() for moe in self.moe_layers())

    def mtp_loss(self, ids, targets, hidden):
        """Returns (mean cross-entropy over the depths of multi-token prediction, metrics). hidden [B, T, C].

        Depth j predicts, at token t, token t + j + 1, and is given all tokens up to t + j. Metrics, for each depth: its
        loss, and how often its likeliest token is right (on the first 512 predictions): what drafting will live on.
        """
        losses, metrics = [], {}
        for depth in range(1, min(self.config.mtp_depths, ids.shape[1] - 1) + 1):
            embedded = self.model.embeddings(ids[:, depth:])  # [B, T - depth, C]
            hidden = self.mtp(embedded, hidden[:, :-1])  # [B, T - depth, C]
            flat, wanted = hidden.flatten(0, 1), targets[:, depth:].flatten()
            losses.append(self.cross_entropy(flat, self.lm_head.weight, wanted))
            with torch.no_grad():
                metrics[f"mtp{depth}_loss"] = losses[-1].detach()
                right = self.lm_head(flat[:512]).argmax(-1) == wanted[:512]
                metrics[f"mtp{depth}_accuracy"] = right.sum() / (wanted[:512] != -100).sum().clamp(min=1)
        return sum(losses) / max(1, len(losses)), metrics

    def moe_layers(self):
        """Returns the MoE layers."""
        return [layer.mixer for layer in self.layers if isinstance(layer.mixer, MoE)]

    @torch.no_grad()
    def balance_routers(self, finite=True):
        """Moves each router's bias towards an even load, by the tokens counted since the last call, in all processes.

        The part of a training step that has no gradient: to be called after the optimiser's. finite: bool or tensor,
        whether that step was made. Returns metrics: of `load_metrics` the worst layer's load_max, else the mean.
        """
        mixtures, rate = self.moe_layers(), self.config.router_bias_update_rate * finite
        if not mixtures:
            return {}
        if dist.is_available() and dist.is_initialized():
            counted = torch.stack(
                [torch.cat([m.gate.counts.double(), m.gate.entropy[None].double()]) for m in mixtures]
            )
            dist.all_reduce(counted)
            for moe, row in zip(mixtures, counted):
                moe.gate.counts, moe.gate.entropy = row[:-1].long(), row[-1].float()
        found = [moe.balance(rate) for moe in mixtures]
        together = {name: torch.stack([f[name] for f in found]) for name in found[0]}
        return {name: v.max() if name == "load_max" else v.mean() for name, v in together.items()}

    def logprobs(self, ids, mask=None, temperature=1.0):
        """Returns (logprob, entropy), each [B, T-1], of tokens ids[:, 1:] given what is before them.

        mask bool [B, T-1] or None: positions that are not wanted are 0 in both, and cost no projection.
        """
        hidden = self.model(ids[:, :-1])  # [B, T-1, C]
        self.pop_balance_losses()  # nobody else will
        targets = ids[:, 1:]
        mask = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask.bool()
        found = linear_logprob(hidden[mask], self.lm_head.weight, targets[mask], temperature)
        return tuple(f.new_zeros(mask.shape).masked_scatter(mask, f) for f in found)

    def num_parameters(self, active=False):
        """Returns how many numbers are trained; a tied matrix counts once. active: those that one token uses.

        Without the multi-token predictor, as in the published figures.
        """
        return sum(self._size(p, n, active) for n, p in self.named_parameters() if not n.startswith("mtp."))

    def _size(self, p, name, active):
        """Returns how many numbers a parameter has; of stacked experts, if `active`, those that one token uses."""
        c = self.config
        return p.numel() * c.num_experts_per_tok // c.n_routed_experts if active and ".experts." in name else p.numel()

    def flops_per_token(self, context):
        """Returns the floating-point operations to train on one token: 6 per matrix weight, plus what mixes tokens.

        Forward counts 2 per weight, backward twice that. Attention: scores and values over half the context (causal).
        SSD: the chunked algorithm, causal half of a chunk, with C.B once per group. Multi-token prediction: block and
        projection for each depth. Local linear attention: where attention has 2 products of queries with keys or values
        forward and 4 backward, it has 4 and 8, and 2 for each step of each of its two solves by conjugate gradients
        (lla.py). As everywhere, what a kernel computes again does not count.
        """
        c, pattern = self.config, self.config.hybrid_override_pattern
        matrices = [
            (n, p) for n, p in self.named_parameters() if p.dim() >= 2 and "embed" not in n and "conv1d" not in n
        ]
        main = sum(self._size(p, n, True) for n, p in matrices if not n.startswith("mtp."))
        further = sum(self._size(p, n, True) for n, p in matrices if n.startswith("mtp."))
        if c.tie_word_embeddings:
            main += c.vocab_size * c.hidden_size
        attention = 2 * context / 2 * c.num_attention_heads * c.head_dim
        Q = min(c.chunk_size, context)
        scan = Q / 2 * (c.ssm_state_size * c.n_groups + c.mamba_size) + 2 * c.mamba_size * c.ssm_state_size
        local_linear = (4 + 8 + 2 * 2 * CG_STEPS) / (2 + 4) * attention
        main += pattern.count("*") * attention + pattern.count("L") * local_linear + pattern.count("M") * scan
        if self.mtp:
            again = further + c.mtp_hybrid_override_pattern.count("*") * attention + c.vocab_size * c.hidden_size
            main += c.mtp_depths * again
        return 6 * main

    @torch.inference_mode()
    def generate(
        self, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=(), generator=None,
        budget=None, draft=0, drafts=None, logprobs=None, prefill_size=8192, works=None,
    ):  # fmt: skip
        """Yields one int64 tensor [B] per step: the next token of every row, -1 for a row that has stopped.

        ids [B, T] int64, or a list of B lists of different lengths (padded on the left here). temperature 0 is greedy;
        top_k keeps the k most likely tokens, top_p the fewest that hold that much probability. stop: token ids that
        end a row (the stop token itself is yielded). Ends when every row has stopped. Call eval() first if the model
        has dropout.

        budget: a ThinkingBudget. draft: tokens to guess ahead by multi-token prediction, for one row: the text is the
        same (sampled: equally distributed), in fewer forwards; drafts: a DraftStats to count in. logprobs: a list to
        which the log-probability [B] of each step's tokens, as they were drawn, is added. prefill_size: tokens of the
        prompt to read at a time, which bounds the memory that takes; prompts that are alike are read once. works: a
        DecodeSession, the same in calls that should share their memory and CUDA graphs, with one generator for all.

        Raises ValueError for an empty prompt, a setting out of range, or drafts where there can be none.
        """
        good_temperature = 0 <= temperature < math.inf
        if not good_temperature or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
            raise ValueError(f"need temperature >= 0, top_k >= 1, 0 < top_p <= 1; got {temperature}, {top_k}, {top_p}")
        if max_new_tokens < 0 or draft < 0 or prefill_size < 1:
            raise ValueError(
                f"need max_new_tokens={max_new_tokens} and draft={draft} >= 0, prefill_size={prefill_size} >= 1"
            )
        if len(ids) == 0 or any(getattr(row, "ndim", 1) == 0 or isinstance(row, int) for row in ids):
            raise ValueError(
                "ids must hold one row of token ids for each text, as [[1, 2, 3]]; an empty prompt has none"
            )
        if any(len(row) == 0 for row in ids):
            raise ValueError("cannot go on from an empty prompt; give at least one token per row")
        temperature = 0 if temperature < 1e-6 else temperature  # logits / 1e-40 would overflow
        if draft and (self.mtp is None or len(ids) > 1 or budget):
            raise ValueError(
                f"draft={draft} needs a model trained with num_nextn_predict_layers=1 (--recipe=super3 is), "
                f"one row (here {len(ids)}) and no thinking budget"
            )
        if logprobs is not None and (draft or budget or temperature == 0):
            raise ValueError(
                "logprobs are of tokens that were drawn: they need temperature > 0, no drafts and no budget"
            )
        device = self.lm_head.weight.device
        T = max(len(row) for row in ids)
        pad = torch.tensor([T - len(row) for row in ids], device=device)
        if all(isinstance(row, list) for row in ids):  # one copy to the device for all
            ids = torch.tensor([[0] * (T - len(row)) + row for row in ids], device=device)  # [B, T]
        else:
            ids = torch.stack([F.pad(torch.as_tensor(row, device=device), (T - len(row), 0)) for row in ids])
        stop = torch.tensor(list(stop), dtype=torch.int64, device=device)
        choose = Sampler(temperature, top_k, top_p, generator)
        room = T + min(max_new_tokens, max(T, ROOM)) + 2 * (draft + 1)  # two steps: see _steps_with_drafts
        cut, keeps = [], works is not None
        if draft:
            drafts = DraftStats() if drafts is None else drafts
            steps = self._steps_with_drafts(ids, draft, choose, drafts, prefill_size, room)
        else:
            works = DecodeSession() if works is None else works
            steps = self._steps(ids, pad, choose, budget, prefill_size, room, logprobs, cut, works, keeps)
        done, left = torch.zeros(len(ids), dtype=torch.bool, device=device), None
        rows, since = torch.arange(len(ids), device=device), 0  # in the works; steps since they became so few
        for token in itertools.islice(steps, max_new_tokens):
            n_left = left() if left else len(ids)  # asked only now that a GPU has the next step to work on
            if n_left == 0:
                return
            yield torch.where(done, -1, token)
            if len(stop):
                done |= torch.isin(token, stop)
                left, since, on_gpu = to_host((~done).sum()), since + 1, device.type == "cuda"
                fewer = len(rows) * 3 // 4 if keeps and on_gpu else len(rows) // 2
                if len(rows) >= SMALLEST_CUT and n_left <= fewer and (since >= CUT_AFTER or keeps or not on_gpu):
                    stopped = done[rows]  # a GPU goes on with so many, whoever they are: it has a graph for that
                    cut.append(stopped.argsort(stable=True)[:fewer] if on_gpu else (~stopped).nonzero()[:, 0])
                    rows, since = rows[cut[0]], 0

    def _steps(self, ids, pad, choose, budget, prefill_size, room, logprobs, cut, works, keeps):
        """Yields the next token [B] of every row, without end.

        logprobs: None, or a list that their log-probabilities go to. cut: a list; when there is an int64 tensor in it,
        those of the rows that go on are all that still do, and the tokens of the others are -1 from then on.
        works: a DecodeSession; keeps: whether it is to serve another call.
        """
        B = len(ids)
        model = works.model_like(self) if keeps else self
        control = budget and BudgetControl(budget, ids)
        rows = torch.arange(B, device=ids.device)  # those that go on
        texts, which = torch.cat([pad[:, None], ids], dim=1), rows
        if B > 1:
            texts, which = texts.unique(dim=0, return_inverse=True)
        cache = model.new_cache(texts[:, 0], room if B == 1 else 0)

        def of_all(values, others):
            return values.new_full((B,), others).index_copy_(0, rows, values)

        for part in texts[:, 1:].split(prefill_size, dim=1):
            hidden = model.model(part, cache)
        works.begin(model, cache, which, -(-room // 64) * 64 if keeps else room, choose, logprobs is not None)
        works.choose_from(hidden[which])
        for length in itertools.count(ids.shape[1] + 1):
            if control:
                works.token.copy_(control(works.token))
            if logprobs is not None:
                logprobs.append(of_all(works.logprob, 0.0))
            yield of_all(works.token, -1)
            if cut and len(cut[0]):
                rows = rows[cut[0]]
                works.select(cut[0])
                if control:
                    control.select(cut[0])
            cut.clear()
            if length > works.room:
                works.grow()
            works.step()

    def _logits(self, hidden, normed=True):
        """Returns the logits of hidden states of a step, in the model's dtype. normed: whether after the final norm."""
        norm = self.model.norm_f
        return linear_step(hidden, self.lm_head.weight, norm=None if normed else norm.weight, eps=norm.eps)

    def _steps_with_drafts(self, ids, n, choose, stats, prefill_size, room):
        """Yields the next token [1], without end: several for each forward of the model, where its guesses are right.

        A guess is kept with the probability that keeps the distribution (`Sampler.check`). What the model remembers of
        a wrong one has to be taken back: of keys and values by forgetting that they are there, of a Mamba layer by
        going back to the state after the last right one, since they were all kept.
        """
        cache, memory = self.new_cache(room=room), Cache([None] * len(self.mtp.layers), room=room)
        for part in ids.split(prefill_size, dim=1):
            hidden = self.model(part, cache)  # [1, part, C]
            following = ids[:, cache.length - part.shape[1] + 1 : cache.length + 1]  # the token after each
            if cache.length == ids.shape[1]:
                token, _ = choose(self._logits(hidden[:, -1]))  # [1]
                following = torch.cat([following, token[:, None]], dim=1)
            ahead = self.mtp(self.model.embeddings(following), hidden, memory)[
                :, -1:
            ]  # [1, 1, C], in the end of `token`
        yield token.clone()
        for what in (cache, memory):
            what.fix(room, ids.device)

        def step():
            """Guesses, checks, and takes what is right: returns (tokens [1, n+1], how many of them are guesses [])."""
            start, h, guesses, q = memory.position.clone(), ahead, [], []
            for depth in range(n):  # first with what the model knew, then with what the predictor made of it
                guess, probs = choose(self._logits(h[:, 0]))  # [1], [1, V]
                guesses.append(guess)
                q.append(probs)
                if depth < n - 1:
                    h = self.mtp(self.model.embeddings(guess[:, None]), h, memory)
            guesses = torch.stack(guesses, dim=1)  # [1, n]
            cache.trial = True
            hidden = self.model(torch.cat([token[:, None], guesses], dim=1), cache)  # [1, n+1, C]
            right, new = choose.check(self._logits(hidden[0]), guesses[0], q)
            cache.keep(right)
            is_guess = torch.arange(n + 1, device=ids.device) < right
            tokens = torch.where(is_guess, F.pad(guesses, (0, 1)), new)  # [1, n+1], right up to number `right`
            memory.position.copy_(start)
            read = self.mtp(self.model.embeddings(tokens), hidden, memory)  # [1, n+1, C]
            memory.position.copy_(start + right + 1)
            ahead.copy_(read.index_select(1, right[None]))
            token.copy_(new)
            return tokens, right

        step, length, before = (
            GraphedStep(step, ids.device, self.lm_head.weight.dtype, choose.generator),
            ids.shape[1],
            None,
        )
        while True:
            if length + 2 * (n + 1) > room:  # this step, and the one whose outcome the host does not know yet
                room *= 2
                for what in (cache, memory):
                    what.fix(room, ids.device)
                step.forget()
            tokens, right = step()
            now = tokens.clone(), to_host(right)
            if before:  # asked only now that a GPU has the next step to work on
                right = before[1]()
                length += right + 1
                stats.count(right, n)
                yield from before[0][:, : right + 1].unbind(1)
            before = now

    def save_pretrained(self, directory, state_dict=None, **extra):
        """Writes config.json (with `extra` keys added) and model.safetensors, which `transformers` opens too.

        Not if the pattern has an L: `transformers` does not know local linear attention, `from_pretrained` here does.
        state_dict: the whole weights, where this process holds only a part of them (FSDP).

        Each file is written beside its name and moved there when whole. On disk the backbone is called "backbone.",
        as in NVIDIA's releases; tied weights are written twice, since transformers does not tie this model.
        """
        config = asdict(self.config) | {"num_hidden_layers": len(self.config.hybrid_override_pattern)} | extra
        save_weights(directory, config, state_dict or self.state_dict())

    @classmethod
    def from_pretrained(cls, directory, **overrides):
        """Returns the model saved in `directory`: by `save_pretrained`, by `transformers`, or one of NVIDIA's releases.

        overrides: config fields to change (chunk_size, hidden_dropout). Weights keep the dtype they were saved in.
        Raises FileNotFoundError or ValueError, saying which file is missing, damaged, quantised or does not fit.
        """
        config = HybridConfig(**(config_fields(read_config(directory), HybridConfig) | overrides))
        weights = read_weights(directory, config.n_routed_experts)
        if not any(name.startswith("mtp.") for name in weights):
            config = replace(config, num_nextn_predict_layers=0)  # transformers leaves the predictor out when it saves
        with torch.device("meta"):
            model = cls(config)
        model.load_weights(weights, directory)
        return model

    def load_weights(self, tensors, source):
        """Takes `tensors` (name -> tensor) as the weights. Raises ValueError naming `source` unless all fit exactly."""
        expect_weights(tensors, self.state_dict(), source)
        self.load_state_dict(tensors, assign=True)
        for moe in self.moe_layers():
            moe.gate.reset_counts()  # not in the file
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embeddings.weight


# ---- recipes of train.py ----

TEXT_CPU = dict(tokenizer="python4k", context=256, batch_size=8, steps=500, warmup=50, lr=6e-3, eval_every=250)
TEXT_GPU = dict(tokenizer="python4k", context=1024, batch_size=16, steps=2000, warmup=100, lr=2e-3, eval_every=250)
RECIPES = {
    "hybrid": Recipe(NextToken, cpu=dict(preset="tiny", **TEXT_CPU), gpu=dict(preset="small", **TEXT_GPU)),
    "nano3": Recipe(NextToken, cpu=dict(preset="nano3-tiny", **TEXT_CPU), gpu=dict(preset="nano3", **TEXT_GPU)),
    "super3": Recipe(NextToken, cpu=dict(preset="super3-tiny", **TEXT_CPU), gpu=dict(preset="super3", **TEXT_GPU)),
    # Its softmax baseline is the same command with * for L in the pattern: --hybrid_override_pattern='M-M*-M-' on a
    # CPU, 'M-M-M*-M-M-M*-M-M-' on a GPU. It lacks D + H parameters a layer: the norm of q and k, and the ridges.
    "lla": Recipe(NextToken, cpu=dict(preset="lla-tiny", **TEXT_CPU), gpu=dict(preset="lla", **TEXT_GPU)),
}

# ---- 7. python nano_hybrid.py: what a hybrid saves when it writes ---------------------------------------------------


def attention_twin(config):
    """Returns the config with attention for every Mamba-2 layer, at the same number of parameters."""
    return twin_of(config, hybrid_override_pattern=config.hybrid_override_pattern.replace("M", "*"))


def twin_of(config, **changes):
    """Returns the config with these changes, its MLPs resized to the same number of parameters."""
    twin = replace(config, **changes)
    with torch.device("meta"):
        missing = Hybrid(config).num_parameters() - Hybrid(twin).num_parameters()
    per_unit = 2 * config.hidden_size * twin.hybrid_override_pattern.count("-")
    return replace(twin, intermediate_size=twin.intermediate_size + round(missing / per_unit))


def memory_per_text(config, length, bytes_per_number):
    """Returns the bytes a text of `length` tokens is remembered with: constant for a Mamba layer, else growing."""
    c, pattern = config, config.hybrid_override_pattern
    mamba = 4 * c.mamba_size * c.ssm_state_size + bytes_per_number * c.conv_size * (c.conv_kernel - 1)
    attention = 2 * bytes_per_number * c.num_key_value_heads * c.head_dim * length
    return pattern.count("M") * mamba + (pattern.count("*") + pattern.count("L")) * attention


def random_cache(model, n_texts, length, room):
    """Returns a fixed Cache as after `length` tokens, its memories drawn at random: they do not change the speed."""
    cache = model.new_cache()
    model.model(torch.zeros(n_texts, 1, dtype=torch.int64, device=model.lm_head.weight.device), cache)
    cache.fix(room, model.lm_head.weight.device)
    for state in cache.layers:
        for tensor in vars(state).values() if state else ():
            tensor.normal_() if torch.is_tensor(tensor) else None
    cache.position.fill_(length)
    return cache


@torch.inference_mode()
def writing_speed(model, n_texts, length, n_tokens=32):
    """Returns (seconds a token takes, bytes of the cache) for n_texts at once, each after `length` random tokens."""
    device = model.lm_head.weight.device
    cache = random_cache(model, n_texts, length, length + n_tokens + 4)
    token, choose = torch.zeros(n_texts, dtype=torch.int64, device=device), Sampler(temperature=0)

    def step():
        hidden = model.model(token[:, None], cache, normed=False)
        token.copy_(choose(model._logits(hidden[:, -1], normed=False))[0])

    step, wait = (
        GraphedStep(step, device, model.lm_head.weight.dtype),
        torch.cuda.synchronize if device.type == "cuda" else lambda: None,
    )
    for _ in range(4):
        step()
    wait()
    began = time.perf_counter()
    for _ in range(n_tokens):
        step()
    wait()
    return (time.perf_counter() - began) / n_tokens, cache.size()


def demo():
    """Prints how fast a hybrid and its attention-only twin write, and in how much memory; draws out/nano_hybrid.png."""
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    n_texts, lengths = (16, [2**k for k in range(10, 18)]) if on_gpu else (4, [2**k for k in range(8, 15)])
    config = replace(PRESETS["small"], vocab_size=4096)
    if not on_gpu:
        config = replace(config, hidden_size=128, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4,
                         head_dim=32, mamba_num_heads=4, mamba_head_dim=64, ssm_state_size=64, n_groups=1)  # fmt: skip
    models = {"hybrid": config, "attention only": attention_twin(config)}
    models = {n: Hybrid(c).to(device, dtype).eval().requires_grad_(False) for n, c in models.items()}
    sizes = ", ".join(f"{name} {model.num_parameters() / 1e6:.2f}M" for name, model in models.items())
    print(f"{'parameters':>16}: {sizes}")
    print(f"{n_texts} texts at once, {str(dtype)[6:]} on {device}; untrained weights, which do not change the speed\n")
    print(
        f"{'tokens before':>16}{'tokens/s':>10}{'twin':>8}{'times':>7}{'MB':>9}{'predicted':>10}{'twin':>9}{'times':>7}"
    )
    found = {name: [] for name in models}
    for length in lengths:
        for name, model in models.items():
            seconds, size = writing_speed(model, n_texts, length)
            found[name].append((n_texts / seconds, size))
        (speed, size), (twin_speed, twin_size) = (rows[-1] for rows in found.values())
        predicted = n_texts * memory_per_text(config, length + 36, dtype.itemsize)
        print(f"{length:16,}{speed:10,.0f}{twin_speed:8,.0f}{speed / twin_speed:7.1f}{size / 1e6:9.2f}", end="")
        print(f"{predicted / 1e6:10.2f}{twin_size / 1e6:9.2f}{twin_size / size:7.1f}")
    ratio = speed / twin_speed
    print(
        "\nclaim: up to 6.3 times the tokens/s of an attention-only model (9B, 8K in, 16K out, largest batch that fits;"
    )
    print(f"arXiv:2508.14444). Here {ratio:.1f} times after {lengths[-1]:,} tokens, at the same batch.")
    plot_speeds(lengths, found, ratio, Path("out/nano_hybrid.png"))


def plot_speeds(lengths, found, ratio, path):
    """Draws the ratio of the speeds over the length of the text, and writes it to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=150, layout="constrained")
    for (name, rows), color in zip(found.items(), ("#0072B2", "#D55E00")):
        axes.plot(lengths, [speed for speed, _ in rows], marker="o", markersize=3, color=color)
        axes.annotate(
            name, (lengths[-1], rows[-1][0]), xytext=(-5, 8), textcoords="offset points", ha="right", color=color
        )
    paper = [6.3 * speed for speed, _ in found["attention only"]]
    axes.plot(lengths, paper, linestyle="--", linewidth=1, color="#999999")
    axes.annotate("6.3 x attention (paper, 9B)", (lengths[-1], paper[-1]), ha="right", va="bottom", color="#999999")
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    title = f"After {lengths[-1]:,} tokens the hybrid writes {ratio:.1f} times as fast"
    axes.set(xlabel="tokens before", ylabel="tokens/s, all texts", title=title)
    axes.grid(alpha=0.3)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    print(f"plot: {path}")


# ---- 8. python nano_hybrid.py bench: how fast it writes on a GPU -------------------------------------------------

# The pattern and the proportions of Nemotron-Nano-9B-v2 at a ninth of its size.
BILLION = HybridConfig(
    vocab_size=50304, hidden_size=1536, tie_word_embeddings=True, num_attention_heads=15, num_key_value_heads=3,
    head_dim=128, intermediate_size=5376, mamba_num_heads=56, mamba_head_dim=64, ssm_state_size=128, n_groups=8,
    chunk_size=128, hybrid_override_pattern=PRESETS["nano-9b-v2"].hybrid_override_pattern,
)  # fmt: skip


def on_gpu(config):
    """Returns a model of this shape in bfloat16 on the GPU, with random weights."""
    return Hybrid(config).to("cuda", torch.bfloat16).eval().requires_grad_(False)


def seconds_of(fn, repeat=5):
    """Returns the median time of fn(), after one call to warm up."""
    times = []
    for _ in range(repeat + 1):
        torch.cuda.synchronize()
        began = time.perf_counter()
        fn()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])


@torch.inference_mode()
def bench_long_answers(config, read=8192, write=16384):
    """Returns tokens/s where `read` tokens are read and `write` written, for as many texts as fit the memory."""
    model = on_gpu(config)
    room = torch.cuda.mem_get_info()[0] * 0.92 - 3e9
    n_texts = int(room / memory_per_text(config, read + write + 36, 2))
    lengths = [read, read + write // 2, read + write - 36]
    steps = []
    for length in lengths:
        steps.append(writing_speed(model, n_texts, length, n_tokens=8)[0])
        torch.cuda.empty_cache()
    ids = torch.randint(config.vocab_size, (2, read), device="cuda")
    reading = seconds_of(lambda: model.model(ids, model.new_cache()), 2) / 2 * n_texts
    writing = write * (steps[0] + 4 * steps[1] + steps[2]) / 6  # Simpson's rule
    return dict(texts=n_texts, tokens_per_s=n_texts * write / (reading + writing), reading_s=reading, writing_s=writing,
                step_ms=[1e3 * s for s in steps], parameters=model.num_parameters())  # fmt: skip


def seconds_a_token(steps):
    """Returns the mean time between two tokens of `generate`, after four that compile and record."""
    for _ in itertools.islice(steps, 4):
        torch.cuda.synchronize()
    began = time.perf_counter()
    n_tokens = sum(1 for _ in steps)
    torch.cuda.synchronize()
    return (time.perf_counter() - began) / n_tokens


@torch.inference_mode()
def bench_one_text(config, length=1024):
    """Returns tokens/s of one text, and the fraction that is of the time its bytes take at the rate of a copy."""
    model = on_gpu(config)
    big = torch.empty(2**30, dtype=torch.uint8, device="cuda").random_()
    rate = 2 * 2**30 / seconds_of(lambda: big.clone())  # bytes/s
    weights = sum(p.numel() * p.element_size() for p in model.parameters())  # a tied matrix is one
    if not config.tie_word_embeddings:
        weights -= config.vocab_size * config.hidden_size * 2
    states = memory_per_text(config, length, 2) + memory_per_text(config, 0, 2)  # states are read and written
    ids = torch.randint(config.vocab_size, (1, length), device="cuda")
    greedy, sampled = (seconds_a_token(model.generate(ids, 404, temperature)) for temperature in (0, 1))
    return dict(tokens_per_s=1 / greedy, bound=rate / (weights + states), of_bound=(weights + states) / rate / greedy,
                sampled_tokens_per_s=1 / sampled)  # fmt: skip


@torch.inference_mode()
def bench_transformers(config, length=1024, n_tokens=48):
    """Returns tokens/s of one text by `transformers`' generate, greedy: the same weights through a checkpoint."""
    from transformers import AutoModelForCausalLM

    with tempfile.TemporaryDirectory() as directory:
        on_gpu(config).save_pretrained(directory)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).to("cuda").eval()
    ids = torch.randint(config.vocab_size, (1, length), device="cuda")
    options = dict(do_sample=False, pad_token_id=0, eos_token_id=None)
    all_, first = (
        seconds_of(lambda n=n: model.generate(ids, min_new_tokens=n, max_new_tokens=n, **options), 1)
        for n in (n_tokens + 1, 1)
    )
    return dict(tokens_per_s=n_tokens / (all_ - first))


@torch.inference_mode()
def bench_reading(config, n_texts=64, length=1024):
    """Returns tokens/s of reading prompts, and of the forward half of a training step, which is compiled."""
    model, ids = on_gpu(config), torch.randint(config.vocab_size, (n_texts, length), device="cuda")
    reading = seconds_of(lambda: model.model(ids, model.new_cache()))
    model.compile()
    forward = seconds_of(lambda: model.model(ids))
    return dict(reading=ids.numel() / reading, training_forward=ids.numel() / forward)


@torch.inference_mode()
def bench_million(config, length=1_000_000, piece=8192):
    """Returns what reading a million tokens and writing after them takes."""
    model = on_gpu(config)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before, times = torch.cuda.memory_allocated(), [time.perf_counter()]
    for _ in model.generate(torch.randint(config.vocab_size, (1, length)), 65, temperature=0, prefill_size=piece):
        torch.cuda.synchronize()
        times.append(time.perf_counter())
    later = statistics.median(b - a for a, b in zip(times[2:], times[3:]))
    return dict(reading_s=times[1] - times[0], tokens_per_s=1 / later,
                peak_gb=(torch.cuda.max_memory_allocated() - before) / 1e9,
                predicted_gb=memory_per_text(config, length, 2) / 1e9)  # fmt: skip


def bench():
    """Measures all of that on this GPU, prints it, and writes assets/bench/writing.json."""
    if not torch.cuda.is_available():
        raise SystemExit("nano_hybrid.py bench times a GPU; there is none here. Without `bench` it runs anywhere")
    small = PRESETS["small"]
    rows = {
        "1B, 8K in, 16K out": partial(bench_long_answers, BILLION),
        "its attention-only twin": partial(bench_long_answers, attention_twin(BILLION)),
        "small, one text": partial(bench_one_text, small),
        "the same through transformers": partial(bench_transformers, small),
        "1B, one text": partial(bench_one_text, BILLION),
        "small, reading": partial(bench_reading, small),
        "small, a million tokens": partial(bench_million, small),
    }
    record = dict(
        machine=f"{torch.cuda.get_device_name()}, torch {torch.__version__}", command="python nano_hybrid.py bench"
    )
    path = Path(__file__).parent / "assets" / "bench" / "writing.json"
    for name, measure in rows.items():
        try:
            record[name] = measure()
        except (ImportError, torch.OutOfMemoryError) as error:
            record[name] = dict(error=str(error)[:100])
        print(
            f"{name}: "
            + ", ".join(f"{k} {v:,.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in record[name].items())
        )
        path.write_text(json.dumps(record, indent=1) + "\n")
        torch.cuda.empty_cache()


# ---- 10. python nano_hybrid.py passkey: how far beyond its training texts a model finds a key again ---------------

PASSKEY_VOCAB = 64  # token ids: ten digits, two marks, and the filler
PASSKEY_DIGITS = 5
KEY_MARK, QUERY_MARK, FIRST_FILLER = 10, 11, 12


def passkey_batch(rng, n, length, depth=None, digits=PASSKEY_DIGITS):
    """Returns (ids, targets), int64 [n, length]: n texts, each with a number somewhere in it that its end asks for.

        filler ... KEY_MARK 4 7 1 1 9 filler ... filler QUERY_MARK 4 7 1 1|9      (9: the last target)

    The filler is random and has no digits. targets are one token ahead, and -100 except for the answer: the last
    `digits` positions.
    rng: a numpy Generator. depth: where the key stands, 0 at the start, 1 right before the question, anything between
    (rounded to a token); None: anywhere, each text by itself. Raises ValueError for a depth that is none of that, and
    a length that the key and the question do not fit in.

    Source: the passkey test of Mohtashami and Jaggi, arXiv:2305.16300, in random tokens.
    """
    last = length - 2 * digits - 1  # where a key stands that has no filler after it
    if last < 0:
        raise ValueError(f"length={length} is too short for a key of {digits} digits: need at least {2 * digits + 1}")
    if depth is not None and not 0 <= depth <= 1:
        raise ValueError(f"depth={depth} must be between 0 (key at the start) and 1 (key before the question)")
    block = rng.integers(FIRST_FILLER, PASSKEY_VOCAB, (n, length + 1))
    key = rng.integers(10, size=(n, digits))
    place = rng.integers(last + 1, size=n) if depth is None else np.full(n, round(depth * last))
    block[np.arange(n), place] = KEY_MARK
    block[np.arange(n)[:, None], place[:, None] + 1 + np.arange(digits)] = key
    block[:, -digits - 1] = QUERY_MARK
    block[:, -digits:] = key
    targets = block[:, 1:].copy()
    targets[:, :-digits] = -100
    return block[:, :-1], targets


SEEDS = (0,)  # of weights and texts; with more of them a cell is their mean
DEPTHS = (0, 0.25, 0.5, 0.75, 1)  # where the key stands, of the text
PASSKEY_SHAPE = HybridConfig(
    vocab_size=64,  # data.PASSKEY_VOCAB
    hidden_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=32, intermediate_size=128,
    mamba_num_heads=4, mamba_head_dim=32, ssm_state_size=32, chunk_size=32, hybrid_override_pattern="M-*-M-*-",
)  # fmt: skip


@dataclass(frozen=True)
class PasskeyStudy:
    """How the models are trained and asked.

    All have the same steps, enough for the hybrid and for attention to learn the training lengths. On a CPU Mamba alone
    does not get there in them: its row then says how fast it learns, not how much it could hold.
    """

    config: HybridConfig = PASSKEY_SHAPE  # the hybrid; the others are its twins of the same size
    context: int = 64  # tokens of the longest training texts
    steps: int = 800
    tokens: int = 2048  # per step
    lr: float = 3e-3
    reading: int = 2**14  # tokens read at once when asked
    times: tuple = (1, 2, 4, 8, 16)  # lengths asked for, in contexts
    texts: int = 32  # for each length, depth and seed

    def configs(self):
        """Returns name -> HybridConfig."""
        pattern = self.config.hybrid_override_pattern
        return {
            "hybrid, no positions": self.config,
            "attention, RoPE": replace(attention_twin(self.config), rotary_base=1e4),
            "Mamba": twin_of(self.config, hybrid_override_pattern=pattern.replace("*", "M")),
        }


GPU_STUDY = PasskeyStudy(
    replace(PASSKEY_SHAPE, hidden_size=256, num_attention_heads=4, num_key_value_heads=4, head_dim=64,
            intermediate_size=512, mamba_num_heads=8, mamba_head_dim=64, ssm_state_size=64, chunk_size=64),
    context=256, steps=1500, tokens=2**15, lr=1e-3, times=(1, 2, 4, 8, 16, 32, 64), texts=64, reading=2**18,
)  # fmt: skip


def autocast(device):
    """Returns bfloat16 autocast on a GPU, and on a CPU one that does nothing."""
    return torch.autocast(device, torch.bfloat16, enabled=device == "cuda")


def train_on_passkeys(config, study, seed, device):
    """Returns a Hybrid trained to answer texts of up to study.context tokens. The loss is that of the answer alone."""
    torch.manual_seed(seed)
    model, rng = Hybrid(config).to(device), np.random.default_rng(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=study.lr, betas=(0.9, 0.95), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, study.lr, total_steps=study.steps, pct_start=0.1, cycle_momentum=False
    )
    for _ in tqdm(range(study.steps), desc="training", delay=2, leave=False):
        length = study.context // int(rng.choice([1, 1, 2, 4]))  # short texts are where finding is learnt first
        batch = to_device(model, *passkey_batch(rng, study.tokens // length, length))
        with autocast(device):
            loss, _ = model.loss(*batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    return model.eval()


@torch.inference_mode()
def passkey_accuracy(model, length, depth, study, seed):
    """Returns the share of study.texts texts whose answer has every digit right.

    The digits before each are given: all right so is all right when written greedily.
    """
    rng, device, right = np.random.default_rng([seed, length]), model.lm_head.weight.device.type, 0
    ids, targets = map(torch.from_numpy, passkey_batch(rng, study.texts, length, depth))
    answers = targets[targets >= 0].view(study.texts, -1)  # [texts, digits]
    at_once = max(1, study.reading // length)  # all of the long texts together would not fit the memory
    for part, answer in zip(ids.split(at_once), answers.split(at_once)):
        with autocast(device):
            hidden = model.model(part.to(device))[:, -answer.shape[1] :]  # only the answer needs logits
            right += int((model.lm_head(hidden).argmax(-1).cpu() == answer).all(dim=1).sum())
    return right / study.texts


def passkey(study=None):
    """Trains the three, prints how often each finds the key, draws out/passkey.png; on a GPU writes assets/bench, too.

    Returns name -> accuracy [depth][length].
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    study = study or (GPU_STUDY if device == "cuda" else PasskeyStudy())
    lengths, began, found, sizes = [t * study.context for t in study.times], time.perf_counter(), {}, {}
    print(f"trained on texts of up to {study.context} tokens, {device}")
    print(f"every digit right, mean over depths {DEPTHS} (worst of them), {study.texts} texts each\n")
    print(f"{'tokens':>20}" + "".join(f"{length:>13,}" for length in lengths))
    for name, config in study.configs().items():
        runs = []
        for seed in SEEDS:
            model = train_on_passkeys(config, study, seed, device)
            runs.append([[passkey_accuracy(model, n, depth, study, seed) for n in lengths] for depth in DEPTHS])
        table, sizes[name] = np.mean(runs, axis=0), model.num_parameters()  # [depth, length]
        found[name] = table.tolist()
        print(f"{name:>20}" + "".join(f"{c.mean():6.2f} ({c.min():.2f})" for c in table.T))
    seconds = time.perf_counter() - began
    print(f"\n{seconds:.0f} s; parameters: " + ", ".join(f"{name} {n / 1e3:,.0f}K" for name, n in sizes.items()))
    plot_passkeys(found, lengths, study.context, Path("out/passkey.png"))
    if device == "cuda":
        machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
        record = dict(machine=machine, command="python nano_hybrid.py passkey", seconds=seconds, settings=asdict(study),
                      seeds=SEEDS, parameters=sizes, depths=DEPTHS, lengths=lengths, accuracy=found)  # fmt: skip
        path = Path(__file__).parent / "assets" / "bench" / "passkey.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
    return found


def plot_passkeys(found, lengths, context, path):
    """Draws accuracy over length and depth, a panel for each model, and writes it to `path`."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(found), figsize=(10, 3.2), dpi=150, layout="constrained", sharey=True)
    for axes, (name, table) in zip(panels, found.items()):
        axes.imshow(table, vmin=0, vmax=1, cmap="cividis", aspect="auto")
        for row, column in np.ndindex(len(table), len(lengths)):
            value = table[row][column]
            color = "black" if value > 0.5 else "white"
            axes.text(column, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color=color)
        axes.set_xticks(range(len(lengths)), [f"{n:,}" for n in lengths], fontsize=7)
        axes.set_yticks(range(len(DEPTHS)), DEPTHS)
        axes.set(xlabel="tokens in the text", title=name)
    panels[0].set_ylabel("depth of the key")
    figure.suptitle(f"How often every digit of a key is found again; trained on texts of up to {context} tokens")
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    print(f"plot: {path}")


if __name__ == "__main__":
    commands = {"": demo, "bench": bench, "passkey": passkey}
    if len(sys.argv) > 2 or "".join(sys.argv[1:]) not in commands:
        raise SystemExit("usage: python nano_hybrid.py [bench | passkey]")
    commands["".join(sys.argv[1:])]()
