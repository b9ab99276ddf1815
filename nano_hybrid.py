"""Nemotron-H: a language model that is mostly Mamba-2, with a few attention layers and squared-ReLU MLPs.

Papers   Nemotron-H, arXiv:2504.03624; NVIDIA Nemotron Nano 2 (12B-v2, 9B-v2), arXiv:2508.14444;
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
                                    rms_norm -> lm_head -> logits [B,T,V]

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
"""

import json
import math
import os
from contextlib import contextmanager
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from kernels import at_least_float32, linear_cross_entropy, linear_logprob, rms_norm
from ssd import mamba2_inner

# ---- 1. configuration -------------------------------------------------------------------------------------


LETTERS = "M*-"  # the layers there are: section 3


@dataclass(frozen=True)
class HybridConfig:
    """The shape of a model. Field names are those of Hugging Face's NemotronHConfig; the comment is the --help text.

    Raises ValueError, with the numbers and the remedy, for a shape that cannot be built.
    """

    vocab_size: int = 4096  # V, tokens
    hidden_size: int = 128  # C, width of the residual stream
    hybrid_override_pattern: str = "M-M*-M-"  # layers: M Mamba-2, * attention, - MLP
    tie_word_embeddings: bool = False  # one matrix for embeddings and lm_head
    num_attention_heads: int = 2  # query heads of an attention layer
    num_key_value_heads: int = 1  # key/value heads, each shared by a group of query heads
    head_dim: int = 64  # D, channels of an attention head; heads * head_dim need not be hidden_size
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

    def __post_init__(self):
        unknown = sorted(set(self.hybrid_override_pattern) - set(LETTERS))
        if unknown or not self.hybrid_override_pattern:
            raise ValueError(
                f"hybrid_override_pattern={self.hybrid_override_pattern!r} has {unknown or 'no layers'}; "
                "write one letter per layer: M (Mamba-2), * (attention), - (MLP)"
            )
        for name in (f.name for f in fields(self) if f.type in (int, "int")):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a whole number of at least 1")
        for many, few in (("num_attention_heads", "num_key_value_heads"), ("mamba_num_heads", "n_groups")):
            if getattr(self, many) % getattr(self, few):
                raise ValueError(f"{many}={getattr(self, many)} is not a multiple of {few}={getattr(self, few)}")
        if not 0 <= self.hidden_dropout < 1:
            raise ValueError(f"hidden_dropout={self.hidden_dropout} must be in [0, 1)")

    @property
    def mamba_size(self):
        """Width of the Mamba mixer, di = H * P. It need not be 2 * hidden_size, whatever `expand` in old files says."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_size(self):
        """Channels of the convolution: x, B and C go through it together."""
        return self.mamba_size + 2 * self.n_groups * self.ssm_state_size


# fmt: off
_RELEASED = dict(  # what NVIDIA's released Nano 2 models have in common
    vocab_size=131072, num_attention_heads=40, num_key_value_heads=8, head_dim=128, mamba_num_heads=128,
    mamba_head_dim=80, ssm_state_size=128, n_groups=8, chunk_size=128,
)
PRESETS = {  # the shapes we train (tiny, small) and the papers' models
    # 1.8M parameters with the shipped vocabulary: minutes on a laptop's CPU.
    "tiny": HybridConfig(),
    # 122M with GPT-2's vocabulary, to stand beside GPT-2's 124M; 87M with the shipped one.
    "small": HybridConfig(
        vocab_size=50304, hidden_size=768, hybrid_override_pattern="M-M-M*-M-M-M*-M-M-", tie_word_embeddings=True,
        num_attention_heads=12, num_key_value_heads=12, head_dim=64, intermediate_size=3072, mamba_num_heads=24,
        mamba_head_dim=64, ssm_state_size=128, n_groups=8, chunk_size=128, initializer_range=0.02,
    ),
    # Nemotron Nano 2, arXiv:2508.14444: 12.31 B, and the 8.89 B pruned from it.
    "nano-12b-v2": HybridConfig(
        **_RELEASED, hidden_size=5120, intermediate_size=20480, initializer_range=0.0125,
        hybrid_override_pattern="M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M*-M-M-M-M-",
    ),
    "nano-9b-v2": HybridConfig(
        **_RELEASED, hidden_size=4480, intermediate_size=15680, initializer_range=0.0134,
        hybrid_override_pattern="M-M-M-MM-M-M-M*-M-M-M*-M-M-M-M*-M-M-M-M*-M-MM-M-M-M-M-M-",
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
    """The memory of one attention layer: every key and value so far."""

    k: torch.Tensor  # [B, Hkv, T, D]
    v: torch.Tensor  # [B, Hkv, T, D]


@dataclass
class Cache:
    """What a model has read: pass it to `forward` with the tokens that come next; `forward` brings it up to date.

    Prompts of different lengths share a batch by padding on the left; `pad` says by how much. Padding is exact:
    a padded position writes nothing to any state and is never looked at.
    """

    layers: list  # one MambaState, KVState or None per layer; None before the first token, and always for an MLP
    length: int = 0  # T, positions read so far, padding included
    pad: torch.Tensor | None = None  # [B] int64, padded positions at the start of each row; None: no padding
    longest_pad: int = 0  # the largest of them

    def real(self, T):
        """Returns a bool [B, T]: which of the next T positions are tokens, not padding; None if all are."""
        if self.length >= self.longest_pad:
            return None
        positions = torch.arange(self.length, self.length + T, device=self.pad.device)
        return positions[None, :] >= self.pad[:, None]


# ---- 3. the three mixers --------------------------------------------------------------------------------------
#
# Each maps x [B, T, C] to what its layer adds to the residual stream, [B, T, C]. With a cache it goes on from
# cache.layers[index] and leaves there what the next call will need.


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
        self.in_proj = nn.Linear(config.hidden_size, di + config.conv_size + H, bias=False)  # z | x B C | dt
        self.conv1d = nn.Conv1d(config.conv_size, config.conv_size, config.conv_kernel, groups=config.conv_size)
        self.A_log = nn.Parameter(torch.empty(H))
        self.D = nn.Parameter(torch.empty(H))
        self.dt_bias = nn.Parameter(torch.empty(H))
        self.norm = RMSNorm(di, config.layer_norm_epsilon)
        self.out_proj = nn.Linear(di, config.hidden_size, bias=False)

    def forward(self, u, cache=None):
        """Returns [B, T, C]: in_proj, then the inside of the layer (ssd.py, section 6), then out_proj."""
        c, state = self.config, cache.layers[self.index] if cache else None
        A = -torch.exp(at_least_float32(self.A_log))  # [H]
        y = mamba2_inner(
            self.in_proj(u), self.conv1d.weight.squeeze(1), self.conv1d.bias, self.dt_bias, A, self.D, self.norm.weight,
            c.n_groups, c.layer_norm_epsilon, c.chunk_size, state and (state.conv, state.ssm),
            real=cache.real(u.shape[1]) if cache else None, return_final_state=cache is not None,
        )  # fmt: skip
        if cache:
            y, state = y
            cache.layers[self.index] = MambaState(*state)
        return self.out_proj(y)


class Attention(nn.Module):
    """Causal grouped-query attention without position embedding."""

    def __init__(self, config, index):
        super().__init__()
        self.head_dim, self.index = config.head_dim, index
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(q_size, config.hidden_size, bias=False)

    def forward(self, x, cache=None):
        """Returns [B, T, C]. A query sees the cache, and of the T new positions its own and those before it."""
        state, pad = (cache.layers[self.index], cache.pad) if cache else (None, None)
        q, k, v = (
            p(x).unflatten(-1, (-1, self.head_dim)).transpose(1, 2)  # [B, heads, T, D]
            for p in (self.q_proj, self.k_proj, self.v_proj)
        )
        if state:
            k, v = torch.cat([state.k, k], dim=2), torch.cat([state.v, v], dim=2)  # [B, Hkv, past + T, D]
        if cache:
            cache.layers[self.index] = KVState(k, v)
        T, past = q.shape[2], k.shape[2] - q.shape[2]
        mask = None
        if (past and T > 1) or pad is not None:  # SDPA's own causal mask only knows the square case
            rows = torch.arange(past, past + T, device=x.device)[:, None]
            columns = torch.arange(past + T, device=x.device)[None, :]
            mask = columns <= rows  # [T, past + T]
            if pad is not None:  # a padded query sees itself, so that its softmax is over something
                mask = mask & ((columns >= pad[:, None, None, None]) | (columns == rows))  # [B, 1, T, past + T]
        is_causal = mask is None and T > 1
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=is_causal, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """down(relu(up x)^2), no gate and no bias. It remembers nothing."""

    def __init__(self, config, index):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x, cache=None):
        """Returns [B, T, C]."""
        return self.down_proj(F.relu(self.up_proj(x)).square())


MIXERS = dict(zip(LETTERS, (Mamba2, Attention, MLP)))
OUTPUT_PROJECTIONS = ("out_proj", "o_proj", "down_proj")  # what a layer adds to the residual stream comes from these

# ---- 4. the model -----------------------------------------------------------------------------------------------


class Block(nn.Module):
    """One letter of the pattern: x + dropout(mixer(norm(x)))."""

    def __init__(self, config, index):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.mixer = MIXERS[config.hybrid_override_pattern[index]](config, index)
        self.dropout = config.hidden_dropout

    def forward(self, x, cache=None):
        """Returns x [B, T, C] with the mixer's part added."""
        return x + F.dropout(self.mixer(self.norm(x), cache), self.dropout, self.training)


class Backbone(nn.Module):
    """Embeddings, layers and the final norm: ids [B, T] -> hidden [B, T, C]."""

    def __init__(self, config):
        super().__init__()
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, index) for index in range(len(config.hybrid_override_pattern)))
        self.norm_f = RMSNorm(config.hidden_size, config.layer_norm_epsilon)
        self.dropout = config.hidden_dropout

    def forward(self, ids, cache=None):
        """Returns hidden states [B, T, C] after the final norm, and brings `cache` up to date if there is one."""
        x = F.dropout(self.embeddings(ids), self.dropout, self.training)  # [B, T, C]
        for layer in self.layers:
            x = layer(x, cache)
        if cache:
            cache.length += ids.shape[1]
        return self.norm_f(x)


class Hybrid(nn.Module):
    """The language model. Parameter names are those of `transformers`' NemotronHForCausalLM."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
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
        """
        std = self.config.initializer_range
        for name, module in self.named_modules():
            if isinstance(module, nn.Embedding | nn.Linear):
                is_output = name.split(".")[-1] in OUTPUT_PROJECTIONS
                module.weight.normal_(0, std / math.sqrt(len(self.model.layers)) if is_output else std)
            elif isinstance(module, Mamba2):
                bound = 1 / math.sqrt(self.config.conv_kernel)
                module.conv1d.weight.uniform_(-bound, bound)
                module.conv1d.bias.uniform_(-bound, bound)
                module.A_log.uniform_(1, 16).log_()
                module.D.fill_(1)
                dt = module.dt_bias.uniform_(math.log(1e-3), math.log(1e-1)).exp_().clamp_(min=1e-4)
                dt.add_(torch.log(-torch.expm1(-dt)))  # the inverse of softplus

    def compile(self, **options):
        """Compiles the layers one by one, and the loss, with `torch.compile`.

        Layers of a kind share their graph, so a deep model compiles as fast as a shallow one.
        """
        for layer in self.model.layers:
            layer.compile(**options)
        self.cross_entropy = torch.compile(linear_cross_entropy, **options)

    def new_cache(self, pad=None):
        """Returns an empty Cache. pad [B] int64: how many positions at the start of each row are padding."""
        longest_pad = 0 if pad is None else int(pad.max())
        return Cache([None] * len(self.model.layers), pad=pad if longest_pad else None, longest_pad=longest_pad)

    def forward(self, ids, cache=None):
        """Returns float32 logits [B, T, V] for ids [B, T] int64; with a cache, for the tokens after what it holds."""
        return at_least_float32(self.lm_head(self.model(ids, cache)))

    def loss(self, ids, targets):
        """Returns (mean next-token cross-entropy in nats, metrics). ids, targets [B, T]; targets -100 are left out."""
        hidden = self.model(ids).flatten(0, 1)  # [S, C]
        loss = self.cross_entropy(hidden, self.lm_head.weight, targets.flatten())
        return loss, {"loss": loss.detach()}

    def logprobs(self, ids, mask=None, temperature=1.0):
        """Returns (logprob, entropy), each [B, T-1], of tokens ids[:, 1:] given what is before them.

        mask bool [B, T-1] or None: positions that are not wanted are 0 in both, and cost no projection.
        """
        hidden = self.model(ids[:, :-1])  # [B, T-1, C]
        targets = ids[:, 1:]
        mask = torch.ones_like(targets, dtype=torch.bool) if mask is None else mask.bool()
        found = linear_logprob(hidden[mask], self.lm_head.weight, targets[mask], temperature)
        return tuple(f.new_zeros(mask.shape).masked_scatter(mask, f) for f in found)

    def num_parameters(self):
        """Returns how many numbers are trained; a tied matrix counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self, context):
        """Returns the floating-point operations to train on one token: 6 per matrix weight, plus what mixes tokens.

        Forward counts 2 per weight, backward twice that. Attention: scores and values over half the context (causal).
        SSD: the chunked algorithm, causal half of a chunk, with C.B once per group.
        """
        c, pattern = self.config, self.config.hybrid_override_pattern
        matrices = sum(p.numel() for n, p in self.named_parameters() if p.dim() == 2 and "embeddings" not in n)
        if c.tie_word_embeddings:
            matrices += c.vocab_size * c.hidden_size
        attention = 2 * context / 2 * c.num_attention_heads * c.head_dim
        Q = min(c.chunk_size, context)
        scan = Q / 2 * (c.ssm_state_size * c.n_groups + c.mamba_size) + 2 * c.mamba_size * c.ssm_state_size
        return 6 * (matrices + pattern.count("*") * attention + pattern.count("M") * scan)

    @torch.inference_mode()
    def generate(self, ids, max_new_tokens, temperature=1.0, top_k=None, top_p=None, stop=(), generator=None):
        """Yields one int64 tensor [B] per step: the next token of every row, -1 for a row that has stopped.

        ids [B, T] int64, or a list of B lists of different lengths (padded on the left here). temperature 0 is greedy;
        top_k keeps the k most likely tokens, top_p the fewest that hold that much probability. stop: token ids that
        end a row (the stop token itself is yielded). Ends when every row has stopped. Raises ValueError for an empty
        prompt or a setting out of range. Call eval() first if the model has dropout.
        """
        if temperature < 0 or (top_k is not None and top_k < 1) or (top_p is not None and not 0 < top_p <= 1):
            raise ValueError(f"need temperature >= 0, top_k >= 1, 0 < top_p <= 1; got {temperature}, {top_k}, {top_p}")
        if any(len(row) == 0 for row in ids) or len(ids) == 0:
            raise ValueError("cannot go on from an empty prompt; give at least one token per row")
        device = self.lm_head.weight.device
        T = max(len(row) for row in ids)
        pad = torch.tensor([T - len(row) for row in ids], device=device)
        ids = torch.stack([F.pad(torch.as_tensor(row, device=device), (T - len(row), 0)) for row in ids])  # [B, T]
        stop = torch.tensor(list(stop), dtype=torch.int64, device=device)
        done = torch.zeros(len(ids), dtype=torch.bool, device=device)
        cache = self.new_cache(pad)
        for _ in range(max_new_tokens):
            hidden = self.model(ids, cache)[:, -1]  # [B, C]; only the last position needs logits
            logits = at_least_float32(self.lm_head(hidden))  # [B, V]
            token = sample(logits, temperature, top_k, top_p, generator)  # [B]
            yield torch.where(done, -1, token)
            done |= torch.isin(token, stop)
            if done.all():
                return
            ids = token[:, None]  # a row that has stopped goes on unseen, so that the batch keeps its shape

    def save_pretrained(self, directory, state_dict=None, **extra):
        """Writes config.json (with `extra` keys added) and model.safetensors, which `transformers` opens too.

        state_dict: the whole weights, where this process holds only a part of them (FSDP).

        Each file is written beside its name and moved there when whole. On disk the backbone is called "backbone.",
        as in NVIDIA's releases; tied weights are written twice, since transformers does not tie this model.
        """
        directory = Path(directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = asdict(self.config) | {"num_hidden_layers": len(self.config.hybrid_override_pattern)} | extra
        config = {"architectures": ["NemotronHForCausalLM"], "model_type": "nemotron_h"} | config
        tensors = {
            name.replace("model.", "backbone.", 1): tensor.detach().cpu().contiguous().clone()
            for name, tensor in (state_dict or self.state_dict()).items()
        }
        with replacing(directory / "config.json") as path:
            path.write_text(json.dumps(config, indent=2) + "\n")
        with replacing(directory / "model.safetensors") as path:
            save_file(tensors, path, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(cls, directory, **overrides):
        """Returns the model saved in `directory`. overrides: config fields to change (chunk_size, hidden_dropout).

        Raises FileNotFoundError or ValueError, saying which file is missing, damaged or does not fit.
        """
        directory = Path(directory)
        config = HybridConfig(**(config_fields(read_config(directory)) | overrides))
        weights = directory / "model.safetensors"
        if not weights.is_file():
            raise FileNotFoundError(f"{weights} is missing; a checkpoint is config.json and model.safetensors")
        try:
            tensors = load_file(weights)
        except SafetensorError as error:
            raise ValueError(f"{weights} is damaged or not a safetensors file ({error}); copy it again") from None
        with torch.device("meta"):
            model = cls(config)
        model.load_weights({name.replace("backbone.", "model.", 1): t for name, t in tensors.items()}, weights)
        return model

    def load_weights(self, tensors, source):
        """Takes `tensors` (name -> tensor) as the weights. Raises ValueError naming `source` unless all fit exactly."""
        expected = self.state_dict()
        wrong = [
            f"{n} {list(tensors[n].shape) if n in tensors else 'missing'}"
            for n in expected
            if n not in tensors or tensors[n].shape != expected[n].shape
        ] + [f"{n} unexpected" for n in tensors if n not in expected]
        if wrong:
            raise ValueError(f"{source} does not fit its config: {wrong[0]}, the first of {len(wrong)}")
        self.load_state_dict(tensors, assign=True)
        if self.config.tie_word_embeddings:
            self.lm_head.weight = self.model.embeddings.weight


# ---- 5. choosing the next token -----------------------------------------------------------------------------------


def sample(logits, temperature=1.0, top_k=None, top_p=None, generator=None):
    """Returns one token [B] int64 per row of logits [B, V], with the settings of `generate`."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        kth = logits.topk(top_k).values[:, -1:]  # [B, 1]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs = logits.softmax(-1)
    if top_p is not None and top_p < 1:
        sorted_probs, order = probs.sort(descending=True)
        before = sorted_probs.cumsum(-1) - sorted_probs  # probability of all likelier tokens
        probs = torch.zeros_like(probs).scatter(-1, order, sorted_probs.masked_fill(before >= top_p, 0))
    return torch.multinomial(probs, 1, generator=generator).squeeze(-1)


# ---- 6. files of a checkpoint -------------------------------------------------------------------------------------


@contextmanager
def replacing(path):
    """Yields a temporary path beside `path` to write to; moves it there when the block ends without an exception.

    Whoever opens `path`, at any moment and after any kill, finds the old file or the new one, never half of one.
    """
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        with partial.open("rb") as file:
            os.fsync(file.fileno())  # on the disk before it takes the name, or a power cut could leave it empty
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def read_config(directory):
    """Returns the config.json of a checkpoint folder as a dict. Raises FileNotFoundError or ValueError."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing; {directory} is not a checkpoint folder")
    try:
        config = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not valid JSON ({error})") from None
    if not isinstance(config, dict) or config.get("model_type") != "nemotron_h":
        config = config if isinstance(config, dict) else {}
        raise ValueError(f"{path} has model_type={config.get('model_type')!r}; this file knows 'nemotron_h' only")
    return config


# transformers 5 writes the layers as a list of words: its own, or those of newer releases
LETTER_OF = dict(linear_attention="M", mamba="M", full_attention="*", attention="*", mlp="-", moe="E")


def config_fields(config):
    """Returns the part of a config.json dict that HybridConfig has fields for.

    Raises ValueError for a model with biases that this file does not build.
    """
    expected = dict(use_bias=False, mlp_bias=False, attention_bias=False, mamba_proj_bias=False, use_conv_bias=True)
    for name, value in expected.items():
        if config.get(name, value) != value:
            raise ValueError(f"config.json sets {name}={config[name]}; this model is built with {value}, as released")
    if "hybrid_override_pattern" not in config and "layers_block_type" in config:
        pattern = "".join(LETTER_OF.get(kind, "?") for kind in config["layers_block_type"])
        config = config | {"hybrid_override_pattern": pattern}
    return {f.name: config[f.name] for f in fields(HybridConfig) if f.name in config}


# ---- 7. the training objective ------------------------------------------------------------------------------------


class NextToken:
    """Pre-training: predict each token of a text from those before it.

    corpus: data.Corpus. Row r of the training data is the same whoever reads it: `world_size` processes with
    batch_size rows each read between them what one process with all the rows would.
    """

    def __init__(self, corpus, context, batch_size, seed=0, rank=0, world_size=1):
        self.corpus, self.context, self.batch_size = corpus, context, batch_size
        self.seed, self.rank, self.world_size = seed, rank, world_size

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
