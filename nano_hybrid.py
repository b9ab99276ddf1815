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

         Mamba-2    x -> in_proj -> z | x B C | dt        hidden_size -> 2 di + 2 G N + H,  di = H P
                                     |   |      '- softplus(dt + dt_bias) ------.
                                     |   '-- causal conv, silu -> x, B, C -> SSD scan (+ D x)
                                     '------------------------ gate ----> gated RMSNorm -> out_proj

         No position embedding, as released: the Mamba layers, which read left to right, supply the order.
Symbols  B texts of T tokens; C hidden_size; V vocab_size; W conv_kernel; D head_dim, or Mamba's skip (+ D x)
         code               paper  meaning
         mamba_num_heads    H      heads of a Mamba layer            mamba_head_dim  P  channels of one
         ssm_state_size     N      state per channel                 n_groups        G  heads of a group share B and C
         chunk_size         Q      tokens the scan takes at once: speed only, the result is the same
         A_log              A      A = -exp(A_log) < 0; a token's decay is exp(dt A)
         dt                 delta  softplus(dt + dt_bias): how strongly a token writes, and how much is forgotten
Limits   One chunk is the recurrence; a prompt in pieces is the prompt at once: tests/test_nano_hybrid.py.
Differs  From `transformers` 5: dt is not clamped below at time_step_min (neither NVIDIA's training code nor the
         published time_step_limit of [0, inf) does that), and A starts uniform in [1, 16] as in Megatron-LM, not 1..H.
         From Megatron-LM: an expert's up_proj starts with std * sqrt(hidden_size / its input width), and of a LatentMoE
         only fc2_latent_proj is divided by sqrt(layers). With one std for all, the routed path of the preset `super3`
         (LatentMoE) would start 370 times weaker than that of `nano3` (standard experts).
Files    nano_hybrid.py + kernels.py + latent_moe.py + lla.py + ssd.py + expert_kernels.py + common/accounting.py +
         common/checkpoints.py + common/objectives.py + common/presets.py + common/ranges.py + common/sampling.py +
         common/data.py + common/files.py: 6,608 lines in all
Read     Mamba2 in ssd.py, then sections 3 and 4 here. `generate` is plain; decoding.py yields the same tokens fast.
         `python nano_hybrid.py` shows the claim; `python -m experiments.nano_hybrid` at length.
"""

import math
import time
from dataclasses import asdict, dataclass, fields, replace
from functools import partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right

from common import accounting
from common.checkpoints import expect_weights, read_config, read_model, save_weights, without_memory
from common.objectives import NextToken, Recipe
from common.presets import SHAPES
from common.ranges import check_ranges
from common.sampling import check_sampling, draw, pad_left, token_probs
from kernels import at_least_float32, fresh_casts, has_hooks, linear_cross_entropy, linear_logprob, rms_norm
from latent_moe import MLP, MoE, MoEConfig, Router, balance_routers, before_padding, new_load
from lla import MIN_RIDGE, LocalLinearAttention, lla
from ssd import Mamba2

# ---- 1. configuration -------------------------------------------------------------------------------------


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
        check_ranges(self, prefix="")
        unknown = sorted(set(self.hybrid_override_pattern) - set(MIXERS))
        if unknown or not self.hybrid_override_pattern:
            raise ValueError(
                f"hybrid_override_pattern={self.hybrid_override_pattern!r} has {unknown or 'no layers'}; "
                f"write one letter per layer, of {' '.join(MIXERS)}: M (Mamba-2), * (attention), - (MLP), "
                "E (mixture of experts), L (local linear attention)"
            )
        pattern = self.mtp_hybrid_override_pattern
        if not pattern or set(pattern) - set("*E-"):
            raise ValueError(f"mtp_hybrid_override_pattern={pattern!r} must be made of *, E and -")
        for many, few in (("num_attention_heads", "num_key_value_heads"), ("mamba_num_heads", "n_groups")):
            if getattr(self, many) % getattr(self, few):
                raise ValueError(f"{many}={getattr(self, many)} is not a multiple of {few}={getattr(self, few)}")
        if self.rotary_base is not None and self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even for rotary_base={self.rotary_base}")
        if self.lla_ridge <= MIN_RIDGE:
            raise ValueError(f"lla_ridge={self.lla_ridge} must be above {MIN_RIDGE}")
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


# ---- 2. what the layers remember ------------------------------------------------------------------------------
#
# A stateful mixer has `new_state(capacity)` and `forward(x, state=None, attention_mask=None)`: with a state it goes on
# from what the state holds and brings it up to date. Every state has nbytes, expand(rows), select(rows) and, where
# draft tokens can be taken back, rollback: `RecurrentState` in ssd.py is that of fixed size, `KVState` the growing one.


@dataclass
class KVState:
    """The keys and values of every position so far, for an attention layer. The buffers double when they are full."""

    k: torch.Tensor | None = None  # [B, Hkv, capacity, D]; None before the first token
    v: torch.Tensor | None = None  # [B, Hkv, capacity, D]
    length: int = 0  # T, positions that are filled
    capacity: int = 0  # positions to allocate at the first token
    pad: torch.Tensor | None = None  # [B] int64, how many of the first positions of each row are padding
    can_roll_back = True  # without a method: a static cache moves its position back, and overwrites

    def append(self, k, v, attention_mask=None):
        """Adds k, v [B, Hkv, T, D] and returns all keys and values, each [B, Hkv, length, D].

        attention_mask bool [B, T] or None: False where a new position is padding, which stands on the left.
        """
        if attention_mask is not None:
            padding = (~attention_mask).sum(1)
            self.pad = padding if self.pad is None else self.pad + padding
        if k.requires_grad:  # autograd has seen the buffers: they must not be written to
            self.k, self.v = (k, v) if self.k is None else (torch.cat(p, 2) for p in zip(self.filled(), (k, v)))
            self.length = self.k.shape[2]
            return self.k, self.v
        length = self.length + k.shape[2]
        if self.k is None:
            self.reserve(max(self.capacity, length), k)
        elif length > self.k.shape[2]:
            self.reserve(max(length, 2 * self.k.shape[2]), k)
        for buffer, new in ((self.k, k), (self.v, v)):
            buffer[:, :, self.length : length] = new
        self.length = length
        return self.filled()

    def reserve(self, capacity, like):
        """Allocates buffers for `capacity` positions and keeps what is filled. like: a tensor [B, Hkv, T, D]."""
        old, shape = self.filled() if self.k is not None else None, (*like.shape[:2], capacity, like.shape[3])
        self.k, self.v = like.new_zeros(shape), like.new_zeros(shape)
        for buffer, filled in zip((self.k, self.v), old or ()):
            buffer[:, :, : self.length] = filled

    def filled(self):
        """Returns views (k, v), each [B, Hkv, length, D]."""
        return self.k[:, :, : self.length], self.v[:, :, : self.length]

    @property
    def nbytes(self):
        """Bytes of the keys and values that are filled."""
        return 0 if self.k is None else sum(t.numel() * t.element_size() for t in self.filled())

    def expand(self, rows, capacity=0, into=None):
        """Returns a state whose row i is a copy of row rows[i], int64 [n].

        capacity: positions to allocate, at least those that are filled. into: such a state, to be written over.
        """
        if into is None:
            shape = (len(rows), self.k.shape[1], max(capacity, self.length), self.k.shape[3])
            into = KVState(self.k.new_zeros(shape), self.v.new_zeros(shape))
        for buffer, filled in zip((into.k, into.v), self.filled()):
            buffer[:, :, : self.length] = filled[rows]
        into.length, into.pad = self.length, None if self.pad is None else self.pad[rows]
        return into

    def select(self, rows):
        """Returns a state of rows `rows`, int64 [n], which move to the front of the same buffers."""
        k, v = (buffer[: len(rows)].copy_(buffer[rows]) for buffer in (self.k, self.v))
        return KVState(k, v, self.length, self.capacity, None if self.pad is None else self.pad[rows])


class Cache:
    """What a model has read of a batch: pass it to `forward` with the tokens that come next.

    Prompts of different lengths are padded on the left, and `pad` says by how much. Padding is exact: a padded position
    changes no state and is never attended to.
    """

    def __init__(self, layers, pad=None, capacity=0):
        # One state for each layer that has one, None for the others.
        self.states = [layer.mixer.new_state(capacity) if layer.stateful else None for layer in layers]
        self.length = 0  # positions read, padding included
        self.longest_pad = 0 if pad is None else int(pad.max())
        self.pad = pad if self.longest_pad else None  # [B] int64

    @property
    def nbytes(self):
        """Bytes of all states."""
        return sum(state.nbytes for state in self.states if state is not None)

    def attention_mask(self, T):
        """Returns bool [B, T], False where one of the next T positions is padding; None if none of them is."""
        if self.length >= self.longest_pad:
            return None
        positions = torch.arange(self.length, self.length + T, device=self.pad.device)
        return positions[None, :] >= self.pad[:, None]


# ---- 3. the mixers: one letter of the pattern each -------------------------------------------------------------
#
# `forward` maps x [B, T, C] to what the layer adds to the residual stream, [B, T, C]. Mamba-2, the letter M, is
# `Mamba2` in ssd.py: in_proj, convolution, scan, gate and out_proj, step by step. MLP and experts: latent_moe.py.


class RMSNorm(nn.RMSNorm):
    """x / rms(x) * weight: the norm in front of every layer."""

    def forward(self, x):
        """Returns x [..., size] normalised over its last dimension."""
        return rms_norm(x, self.weight, self.eps)


def apply_rope(x, start, base):
    """Returns x [B, H, T, D] with rotary position embedding, arXiv:2104.09864, section 3.2.

    Channels (d, d + D/2) turn by position * base^(-2d/D), so that q.k depends only on how far apart the two are.
    start: the first position, a number or a tensor []. Angles are float32: in 16 bits, positions past a few hundred
    cannot be told apart. For comparisons only: the released models have no position embedding, whatever rope_theta a
    config.json carries.
    """
    (T, D), dtype = x.shape[2:], at_least_float32(x).dtype
    speed = base ** (-torch.arange(0, D, 2, device=x.device, dtype=dtype) / D)  # [D/2]
    angle = (start + torch.arange(T, device=x.device))[:, None] * speed  # [T, D/2]
    (a, b), cos, sin = x.chunk(2, dim=-1), angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query attention: without positions as published, or with rotary ones (config.rotary_base)."""

    def __init__(self, config):
        super().__init__()
        C, D, Hq, Hkv = config.hidden_size, config.head_dim, config.num_attention_heads, config.num_key_value_heads
        self.head_dim, self.rotary_base = D, config.rotary_base
        self.q_proj = nn.Linear(C, Hq * D, bias=False)
        self.k_proj = nn.Linear(C, Hkv * D, bias=False)
        self.v_proj = nn.Linear(C, Hkv * D, bias=False)
        self.o_proj = nn.Linear(Hq * D, C, bias=False)

    def new_state(self, capacity=0):
        """Returns the state before the first token. capacity: positions to allocate keys and values for at once."""
        return KVState(capacity=capacity)

    def forward(self, x, state=None, attention_mask=None):
        """Returns [B, T, C]. A query attends to what the state holds and, of the T new positions, to its own and those
        before it. attention_mask bool [B, T]: False on padding."""
        q, k, v = self.qkv(x)  # [B, Hq, T, D], [B, Hkv, T, D] twice
        if self.rotary_base:
            start = 0 if state is None else state.length
            q, k = apply_rope(q, start, self.rotary_base), apply_rope(k, start, self.rotary_base)
        if state is not None:
            k, v = state.append(k, v, attention_mask)  # [B, Hkv, past + T, D]
        o = self.attend(q, k, v, None if state is None else state.pad)  # [B, Hq, T, D]
        return self.o_proj(o.transpose(1, 2).flatten(2))

    def qkv(self, x):
        """Returns q, k, v, each [B, heads, T, D], of x [B, T, C]."""
        products = (projection(x) for projection in (self.q_proj, self.k_proj, self.v_proj))
        return tuple(p.unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for p in products)

    def attend(self, q, k, v, pad=None):
        """Returns [B, Hq, T, D]: attention of the last T positions on k, v [B, Hkv, past + T, D]. pad [B] or None."""
        T, past, mask = q.shape[2], k.shape[2] - q.shape[2], None
        if pad is not None:
            rows = torch.arange(past, past + T, device=q.device)[:, None]
            columns = torch.arange(past + T, device=q.device)[None, :]
            mask = (columns <= rows) & (columns >= pad[:, None, None, None])  # [B, 1, T, past + T]
            mask = mask | (columns == rows)  # a padded query attends to itself, so that its softmax is over something
        elif past and T > 1:  # as causal_lower_right, GPU kernels need no mask matrix
            mask = causal_lower_right(T, past + T)
        is_causal = mask is None and T > 1
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=True)


class LocalLinear(LocalLinearAttention):
    """Local linear attention (lla.py) where softmax attention would stand: same projections, state and positions.

    Beyond those of `Attention` it has D + H parameters: the norm that q and k share, and a ridge for each head.
    """

    def __init__(self, config):
        c = config
        super().__init__(
            c.hidden_size, c.num_attention_heads, c.num_key_value_heads, c.head_dim, c.lla_ridge, c.layer_norm_epsilon
        )
        self.rotary_base = c.rotary_base

    new_state, forward = Attention.new_state, Attention.forward  # project, remember, attend: the same

    def qkv(self, x):
        """Returns q, k, v, each [B, heads, T, D], of x [B, T, C]; q and k share one norm."""
        return super().qkv(lambda projection: projection(x))

    def attend(self, q, k, v, pad=None):
        """Returns [B, Hq, T, D]: `lla` of the last T positions on k, v [B, Hkv, past + T, D]. pad [B] or None.

        `lla` knows no padding, so with padding each sequence is computed by itself, from its first token.
        """
        if pad is None:
            return lla(q, k, v, self.ridge)
        T, past, out = q.shape[2], k.shape[2] - q.shape[2], torch.zeros_like(q)
        for row, n in enumerate(pad.tolist()):
            one, first = slice(row, row + 1), max(0, n - past)  # of the T new positions; before `first` is padding
            if first < T:
                out[one, :, first:] = lla(q[one, :, first:], k[one, :, n:], v[one, :, n:], self.ridge)
        return out


# A letter of the pattern -> the function that makes its mixer from a HybridConfig. A letter of your own is one class
# and one more row. A class that keeps a state has `new_state`, and takes (x, state, attention_mask).
MIXERS = {
    "M": lambda c: Mamba2(
        c.hidden_size, c.mamba_num_heads, c.mamba_head_dim, c.ssm_state_size, c.n_groups, c.conv_kernel, c.chunk_size,
        c.layer_norm_epsilon, c.use_bias, c.use_conv_bias,
    ),
    "*": Attention,
    "L": LocalLinear,
    "-": lambda c: MLP(c.hidden_size, c.intermediate_size, c.mlp_bias),
    "E": lambda c: MoE(c.moe()),
}  # fmt: skip

# ---- 4. the model -----------------------------------------------------------------------------------------------

OUTPUT_PROJECTIONS = ("out_proj", "o_proj", "down_proj", "fc2_latent_proj")  # they write to the residual stream


class Block(nn.Module):
    """One letter of a pattern: x + dropout(mixer(norm(x)))."""

    def __init__(self, config, letter):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = MIXERS[letter](config)
        self.stateful = hasattr(self.mixer, "new_state")
        self.routes = isinstance(self.mixer, MoE)
        self.dropout = config.hidden_dropout

    def forward(self, x, state=None, attention_mask=None, counted=None):
        """Returns x [B, T, C] with the mixer's part added. state: that of the mixer, which goes on from it.

        counted bool [B, T], for a mixture of experts only: returns (x, *numbers), its load, as `MoE.forward` does.
        """
        h = self.norm(x)
        if counted is not None:
            h, *numbers = self.mixer(h, counted)
            return x + F.dropout(h, self.dropout, self.training), *numbers
        h = self.mixer(h) if state is None else self.mixer(h, state, attention_mask)
        return x + F.dropout(h, self.dropout, self.training)


def through(layers, x, cache=None, load=None):
    """Returns x [B, T, C] after the layers; brings `cache`, if there is one, up to date, and adds to `load`, a Load."""
    attention_mask = cache.attention_mask(x.shape[1]) if cache else None
    for layer, state in zip(layers, cache.states if cache else [None] * len(layers)):
        if load and layer.routes:
            counted = load.counted[:, -x.shape[1] :]  # multi-token prediction reads the last positions only
            x = load.add(layer.mixer, *layer(x, None, None, counted))
        else:
            x = layer(x, state, attention_mask)
    if cache:
        cache.length += x.shape[1]
    return x


class Backbone(nn.Module):
    """Embeddings, layers and the final norm: ids [B, T] -> hidden [B, T, C]."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, letter) for letter in config.hybrid_override_pattern)
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.dropout = config.hidden_dropout

    def forward(self, ids, cache=None, load=None):
        """Returns hidden states [B, T, C] after the final norm; with a cache, of the tokens after what it holds.

        load: a `latent_moe.Load`, which takes what mixtures of experts tell of these tokens.
        """
        x = F.dropout(self.embeddings(ids), self.dropout, self.training)
        return self.norm_f(through(self.layers, x, cache, load))


class MultiTokenPredictor(nn.Module):
    """Goes one token further: what the model knew at a token, and the token after it -> what it would know there.

    It is applied to its own output to go further still, with the same weights. Parameter names are those of the
    released models: the norms and the projection belong to its first layer, the final norm to its last. Source:
    DeepSeek-V3, section 2.2; Nemotron 3 Super, arXiv:2604.12374.
    """

    def __init__(self, config):
        super().__init__()
        C, eps, pattern = config.hidden_size, config.layer_norm_epsilon, config.mtp_hybrid_override_pattern
        self.layers = nn.ModuleList(Block(config, letter) for letter in pattern)
        first, last = self.layers[0], self.layers[-1]
        first.enorm, first.hnorm = RMSNorm(C, eps), RMSNorm(C, eps)
        first.eh_proj = nn.Linear(2 * C, C, bias=False)
        last.final_layernorm = RMSNorm(C, eps)

    def forward(self, embedded, hidden, cache=None, through=through):
        """Returns hidden states [B, T, C] for `lm_head`, one token further than `hidden`.

        embedded [B, T, C]: of the token after each; hidden [B, T, C]: after the model's final norm, or from here.
        through: how x goes through the layers.
        """
        first, last = self.layers[0], self.layers[-1]
        g = first.eh_proj(torch.cat([first.enorm(embedded), first.hnorm(hidden)], dim=-1))  # [B, T, C]
        return last.final_layernorm(through(self.layers, g, cache))


class Hybrid(nn.Module):
    """The language model. Parameter names are those of `transformers`' NemotronHForCausalLM."""

    parts = ()  # submodules whose learning rate is set apart
    token_ids = {}  # bos, eos and pad of a released model, which are saved with it again

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.mtp = MultiTokenPredictor(config) if config.num_nextn_predict_layers else None
        self.cross_entropy = linear_cross_entropy  # `compile` swaps in a compiled one
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self):
        """Draws the initial weights as Megatron-LM does for these models, from torch's global generator.

        Matrices normal(0, initializer_range), those that write to the residual stream divided by sqrt(number of
        layers) so that its variance does not grow with depth; whatever else a layer has, as that layer draws it.
        A model built on the meta device, without memory, gets both by `model.to_empty(device=...)` and this.
        """
        if self.config.tie_word_embeddings:  # again: `to_empty` has made two matrices of it
            self.lm_head.weight = self.model.embeddings.weight
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
                module.gate.reset_bias()
            elif isinstance(module, Mamba2 | LocalLinearAttention):
                module.reset_parameters(children=False)  # its projections are Linear
            elif isinstance(module, nn.RMSNorm):
                module.reset_parameters()

    def compile(self, **options):
        """Compiles the layers one by one, and the loss, with `torch.compile`.

        Layers of a kind share their graph, so a deep model compiles as fast as a shallow one.
        """
        for layer in self.layers:
            layer.compile(**options)
        self.cross_entropy = torch.compile(linear_cross_entropy, **options)

    @property
    def layers(self):
        """All residual layers, those of the multi-token predictor included."""
        return [*self.model.layers, *(self.mtp.layers if self.mtp else ())]

    def new_cache(self, pad=None, capacity=0):
        """Returns an empty Cache. pad [B] int64 or None: how many positions at the start of each row are padding.

        capacity: positions to allocate keys and values for at once; more are allocated as they are needed.
        """
        return Cache(self.model.layers, pad, capacity)

    def forward(self, ids, cache=None):
        """Returns float32 logits [B, T, V] for ids [B, T] int64; with a cache, for the tokens after what it holds."""
        return at_least_float32(self.lm_head(self.model(ids, cache)))

    @property
    def head_weight(self):
        """The weight of `lm_head`, as the losses read it. Raises ValueError if calling `lm_head` would do more."""
        if has_hooks(self.lm_head) or type(self.lm_head) is not nn.Linear:
            raise ValueError(f"losses read lm_head.weight: {type(self.lm_head).__name__} or its hooks do more")
        return self.lm_head.weight

    def loss(self, ids, targets):
        """Returns (loss, metrics). ids, targets [B, T] int64; targets -100 are left out.

        The loss is the mean next-token cross-entropy in nats (metrics["loss"]); in training, mixtures of experts add
        router_aux_loss_coef times their `sequence_balance_loss`, and multi-token prediction `mtp_loss`.
        """
        load = new_load(self, before_padding(targets != -100))
        hidden = self.model(ids, load=load)  # [B, T, C]
        loss = self.cross_entropy(hidden.flatten(0, 1), self.head_weight, targets.flatten())
        metrics = {"loss": loss.detach()}
        if not load:
            return loss, metrics
        if self.mtp:
            further, mtp_metrics = self.mtp_loss(ids, targets, hidden, load)
            loss, metrics = loss + self.config.mtp_loss_weight * further, metrics | mtp_metrics
        return loss + self.config.router_aux_loss_coef * load.finish(), metrics

    def mtp_loss(self, ids, targets, hidden, load=None):
        """Returns (mean cross-entropy over the depths of multi-token prediction, metrics). hidden [B, T, C].

        Depth j predicts, at token t, token t + j + 1, and is given all tokens up to t + j. Metrics, for each depth: its
        loss, and how often its likeliest token is right (on the first 512 predictions): what drafting will live on.
        """
        losses, metrics = [], {}
        for depth in range(1, min(self.config.mtp_depths, ids.shape[1] - 1) + 1):
            embedded = self.model.embeddings(ids[:, depth:])  # [B, T - depth, C]
            hidden = self.mtp(embedded, hidden[:, :-1], through=partial(through, load=load))  # [B, T - depth, C]
            flat, wanted = hidden.flatten(0, 1), targets[:, depth:].flatten()
            losses.append(self.cross_entropy(flat, self.head_weight, wanted))
            with torch.no_grad():
                metrics[f"mtp{depth}_loss"] = losses[-1].detach()
                right = self.lm_head(flat[:512]).argmax(-1) == wanted[:512]
                metrics[f"mtp{depth}_accuracy"] = right.sum() / (wanted[:512] != -100).sum().clamp(min=1)
        return sum(losses) / max(1, len(losses)), metrics

    def moe_layers(self):
        """Returns the mixtures of experts, each once."""
        return list(dict.fromkeys(layer.mixer for layer in self.layers if layer.routes))

    def balance_routers(self, finite=True):
        """Moves each router's bias towards an even load, if the optimiser's step was made (finite); returns metrics."""
        return balance_routers(self.moe_layers(), self.config.router_bias_update_rate * finite)

    def logprobs(self, ids, mask=None, temperature=1.0):
        """Returns (logprob, entropy), each [B, T-1], of tokens ids[:, 1:] given what is before them.

        mask bool [B, T-1] or None: positions that are not wanted are 0 in both, and cost no projection.
        """
        targets = ids[:, 1:]
        rows = slice(None) if mask is None else mask.bool().flatten()
        mask = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask.bool()
        load = new_load(self, before_padding(mask))
        hidden = self.model(ids[:, :-1], load=load)  # [B, T-1, C]
        if load:
            load.finish()  # the balance loss is left out: rewards come without it
        outputs = linear_logprob(hidden.flatten(0, 1)[rows], self.head_weight, targets.flatten()[rows], temperature)
        return tuple(v.new_zeros(mask.shape).masked_scatter(mask, v) for v in outputs)

    def num_parameters(self, active=False):
        """Returns how many numbers are trained, without the multi-token predictor; active: those that a token uses."""
        return accounting.num_parameters(self, active)

    def flops_per_token(self, context):
        """Returns the floating-point operations to train on one token, in rows of `context` tokens."""
        return accounting.flops_per_token(self, context)

    @torch.inference_mode()
    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=(), generator=None):
        """Yields one int64 tensor [B] per step: the next token of every row, -1 for a row that has stopped.

        ids: B lists of token ids, or int64 [B, T]; shorter rows are padded on the left. temperature 0 is greedy; top_k
        keeps the k likeliest tokens, top_p the fewest that hold that much probability. stop: token ids that end a row
        (the stop token is yielded). `decoding.generate` yields the same tokens faster, and has drafts, budgets,
        log-probabilities. Raises ValueError for an empty prompt and a setting out of range.
        """
        ids, pad = pad_left(ids, self.lm_head.weight.device, self.config.vocab_size)  # [B, T], [B]
        check_sampling(temperature, top_k, top_p)
        cache, done = self.new_cache(pad), torch.zeros(len(ids), dtype=torch.bool, device=ids.device)
        stop = torch.tensor(list(stop), dtype=torch.int64, device=ids.device)
        with fresh_casts():
            for _ in range(max_new_tokens):
                hidden = self.model(ids, cache)[:, -1]  # [B, C]
                token = draw(token_probs(self.lm_head(hidden), temperature, top_k, top_p), generator)  # [B]
                yield torch.where(done, -1, token)
                done |= torch.isin(token, stop)
                if done.all():
                    return
                ids = token[:, None]  # [B, 1]: the cache holds what came before

    def save_pretrained(self, directory, state_dict=None, **extra):
        """Writes config.json (with `extra` keys added) and model.safetensors, which `transformers` opens too.

        Not if the pattern has an L: `transformers` does not know local linear attention; `from_pretrained` here does.
        state_dict: the whole weights, where this process holds only a part of them (FSDP).
        """
        config = asdict(self.config) | {"num_hidden_layers": len(self.config.hybrid_override_pattern)}
        save_weights(directory, config | self.token_ids | extra, state_dict or self.state_dict())

    @classmethod
    def from_pretrained(cls, directory, **overrides):
        """Returns the model saved in `directory`: by `save_pretrained`, by `transformers`, or one of NVIDIA's releases.

        overrides: config fields to change (chunk_size, hidden_dropout). Weights keep their dtype; where they disagree
        with the config, they are right: see `read_model`. Raises FileNotFoundError or ValueError that names the file.
        """
        config, weights = read_model(directory, HybridConfig, overrides)
        with without_memory(directory):
            model = cls(config)
        model.load_weights(weights, directory)
        model.token_ids = {name: id for name, id in read_config(directory).items() if name.endswith("_token_id")}
        return model

    def load_weights(self, tensors, source):
        """Takes `tensors` (name -> tensor) as the weights. Raises ValueError naming `source` unless all fit exactly."""
        expect_weights(tensors, self.state_dict(), source)
        self.load_state_dict(tensors, assign=True)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embeddings.weight


# ---- 5. shapes and recipes ----------------------------------------------------------------------------------------

PRESETS = {name: HybridConfig(**shape) for name, shape in SHAPES.items()}  # tiny, small, ..., nano-9b-v2, ...
TEXT_CPU = dict(tokenizer="python4k", context=256, batch_size=8, steps=500, warmup=50, lr=6e-3, eval_every=250)
TEXT_GPU = dict(tokenizer="python4k", context=1024, batch_size=16, steps=2000, warmup=100, lr=2e-3, eval_every=250)
RECIPES = {
    "hybrid": Recipe(NextToken, cpu=dict(preset="tiny", **TEXT_CPU), gpu=dict(preset="small", **TEXT_GPU)),
    "nano3": Recipe(NextToken, cpu=dict(preset="nano3-tiny", **TEXT_CPU), gpu=dict(preset="nano3", **TEXT_GPU)),
    "super3": Recipe(NextToken, cpu=dict(preset="super3-tiny", **TEXT_CPU), gpu=dict(preset="super3", **TEXT_GPU)),
    # Its softmax baseline is the same command with * for L: --hybrid_override_pattern='M-M*-M-' on a CPU,
    # 'M-M-M*-M-M-M*-M-M-' on a GPU. It lacks D + H parameters a layer: the norm of q and k, and the ridges.
    "lla": Recipe(NextToken, cpu=dict(preset="lla-tiny", **TEXT_CPU), gpu=dict(preset="lla", **TEXT_GPU)),
}


# ---- 6. python nano_hybrid.py -------------------------------------------------------------------------------------


def demo(lengths=(64, 1024, 4096)):
    """Prints the bytes of state and the time of the next token, for a hybrid and an attention-only baseline."""
    hybrid = HybridConfig(hybrid_override_pattern="M-M-M*-M-M-", hidden_size=256, intermediate_size=1024)
    baseline = replace(hybrid, hybrid_override_pattern=hybrid.hybrid_override_pattern.replace("M", "*"))
    print("Few attention layers among Mamba-2 layers: what is remembered hardly grows. One sequence, float32.")
    print(f"{'':10}{'parameters':>12}" + "".join(f"{f'{n:,} tokens':>22}" for n in lengths))
    for name, config in (("hybrid", hybrid), ("attention", baseline)):
        torch.manual_seed(0)
        model, cells = Hybrid(config).eval(), ""
        for length in lengths:
            with torch.inference_mode():
                cache, ids = model.new_cache(capacity=length + 8), torch.randint(config.vocab_size, (1, length))
                for part in ids.split(1024, dim=1):
                    model.model(part, cache)
                nbytes, times = cache.nbytes, []
                for _ in range(6):
                    began = time.perf_counter()
                    model(ids[:, :1], cache)
                    times.append(time.perf_counter() - began)
            cells += f"{nbytes / 2**20:10.2f} MiB{1e3 * min(times):5.1f} ms"
        print(f"{name:10}{model.num_parameters() / 1e6:11.2f}M{cells}")


if __name__ == "__main__":
    demo()
