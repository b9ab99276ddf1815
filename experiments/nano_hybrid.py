"""python -m experiments.nano_hybrid [decoding | passkey]: what a hybrid saves, and how far it looks back.

decoding   tokens/s and state of a hybrid and of its attention-only baseline of as many parameters, over lengths.
passkey    how far beyond its training lengths a model finds a key again: hybrid, attention with RoPE, Mamba alone.
"""

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
from tqdm import tqdm

from common.objectives import to_device
from common.runlog import save_plot
from decoding import GraphedStep, Sampler, decode_step, step_logits, to_static
from nano_hybrid import PRESETS, Hybrid, HybridConfig

# ---- 1. decoding --------------------------------------------------------------------------------------------------


def attention_baseline(config):
    """Returns the config with attention for every Mamba-2 layer, at the same number of parameters."""
    return iso_parameter_baseline(config, hybrid_override_pattern=config.hybrid_override_pattern.replace("M", "*"))


def iso_parameter_baseline(config, **changes):
    """Returns the config with these changes, its MLPs resized to the same number of parameters."""
    baseline = replace(config, **changes)
    with torch.device("meta"):
        missing = Hybrid(config).num_parameters() - Hybrid(baseline).num_parameters()
    per_unit = 2 * config.hidden_size * baseline.hybrid_override_pattern.count("-")
    return replace(baseline, intermediate_size=baseline.intermediate_size + round(missing / per_unit))


def state_bytes(config, length, bytes_per_number):
    """Returns the bytes state of a sequence of `length` tokens: constant for a Mamba layer, else growing."""
    c, pattern = config, config.hybrid_override_pattern
    conv_channels = c.mamba_size + 2 * c.n_groups * c.ssm_state_size  # x, B and C
    mamba = 4 * c.mamba_size * c.ssm_state_size + bytes_per_number * conv_channels * (c.conv_kernel - 1)
    attention = 2 * bytes_per_number * c.num_key_value_heads * c.head_dim * length
    return pattern.count("M") * mamba + (pattern.count("*") + pattern.count("L")) * attention


def random_static_cache(model, n_sequences, length, capacity):
    """Returns a StaticCache as after `length` tokens, its states drawn at random: they do not change the speed."""
    cache, device = model.new_cache(), model.lm_head.weight.device
    model.model(torch.zeros(n_sequences, 1, dtype=torch.int64, device=device), cache)
    cache = to_static(cache, capacity, device)
    for state in cache.states:
        for tensor in vars(state).values() if state else ():
            tensor.normal_() if torch.is_tensor(tensor) else None
    cache.position.fill_(length)
    return cache


@torch.inference_mode()
def decode_speed(model, n_sequences, length, n_tokens=32):
    """Returns (seconds per token, bytes of the cache) for n_sequences at once, each after `length` random tokens."""
    device = model.lm_head.weight.device
    cache = random_static_cache(model, n_sequences, length, length + n_tokens + 4)
    token, sampler = torch.zeros(n_sequences, dtype=torch.int64, device=device), Sampler(temperature=0)

    def step():
        hidden = decode_step(model, token[:, None], cache)
        token.copy_(sampler(step_logits(model, hidden[:, -1], normed=False))[0])

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
    return (time.perf_counter() - began) / n_tokens, cache_bytes(cache)


def cache_bytes(cache):
    """Returns the bytes of a StaticCache, its whole capacity included."""
    tensors = [t for state in cache.states if state for t in vars(state).values() if torch.is_tensor(t)]
    return sum(t.numel() * t.element_size() for t in tensors)


def decoding():
    """Prints how fast a hybrid and its attention-only baseline decode, and in how much memory; draws a plot of it."""
    on_gpu = torch.cuda.is_available()
    device, dtype = ("cuda", torch.bfloat16) if on_gpu else ("cpu", torch.float32)
    n_sequences, lengths = (16, [2**k for k in range(10, 18)]) if on_gpu else (4, [2**k for k in range(8, 15)])
    config = replace(PRESETS["small"], vocab_size=4096)
    if not on_gpu:
        config = replace(config, hidden_size=128, intermediate_size=512, num_attention_heads=4, num_key_value_heads=4,
                         head_dim=32, mamba_num_heads=4, mamba_head_dim=64, ssm_state_size=64, n_groups=1)  # fmt: skip
    models = {"hybrid": config, "attention only": attention_baseline(config)}
    models = {n: Hybrid(c).to(device, dtype).eval().requires_grad_(False) for n, c in models.items()}
    sizes = ", ".join(f"{name} {model.num_parameters() / 1e6:.2f}M" for name, model in models.items())
    print(f"{'parameters':>16}: {sizes}")
    print(f"{n_sequences} sequences, {str(dtype)[6:]} on {device}; untrained weights, which do not change the speed\n")
    print(f"{'tokens before':>16}{'tokens/s':>10}{'baseline':>9}{'times':>7}{'MB':>9}{'predicted':>10}", end="")
    print(f"{'baseline':>9}{'times':>7}")
    found = {name: [] for name in models}
    for length in lengths:
        for name, model in models.items():
            seconds, size = decode_speed(model, n_sequences, length)
            found[name].append((n_sequences / seconds, size))
        (speed, size), (baseline_speed, baseline_size) = (rows[-1] for rows in found.values())
        predicted = n_sequences * state_bytes(config, length + 36, dtype.itemsize)
        print(f"{length:16,}{speed:10,.0f}{baseline_speed:9,.0f}{speed / baseline_speed:7.1f}{size / 1e6:9.2f}", end="")
        print(f"{predicted / 1e6:10.2f}{baseline_size / 1e6:9.2f}{baseline_size / size:7.1f}")
    ratio = speed / baseline_speed
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
    save_plot(figure, path)


# ---- 2. passkeys --------------------------------------------------------------------------------------------------

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
    vocab_size=64,  # PASSKEY_VOCAB
    hidden_size=64, num_attention_heads=2, num_key_value_heads=2, head_dim=32, intermediate_size=128,
    mamba_num_heads=4, mamba_head_dim=32, ssm_state_size=32, chunk_size=32, hybrid_override_pattern="M-*-M-*-",
)  # fmt: skip


@dataclass(frozen=True)
class PasskeyStudy:
    """How the models are trained and asked.

    All have the same steps, enough for the hybrid and for attention to learn the training lengths. On a CPU Mamba alone
    does not get there in them: its row then says how fast it learns, not how much it could hold.
    """

    config: HybridConfig = PASSKEY_SHAPE  # the hybrid; the others are its iso-parameter baselines
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
            "attention, RoPE": replace(attention_baseline(self.config), rotary_base=1e4),
            "Mamba": iso_parameter_baseline(self.config, hybrid_override_pattern=pattern.replace("*", "M")),
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
        command = "python -m experiments.nano_hybrid passkey"
        record = dict(machine=machine, command=command, seconds=seconds, settings=asdict(study),
                      seeds=SEEDS, parameters=sizes, depths=DEPTHS, lengths=lengths, accuracy=found)  # fmt: skip
        path = Path(__file__).parent.parent / "assets" / "bench" / "passkey.json"
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
    save_plot(figure, path)


if __name__ == "__main__":
    commands = {"decoding": decoding, "passkey": passkey}
    if set(sys.argv[1:]) - set(commands):
        raise SystemExit("usage: python -m experiments.nano_hybrid [decoding] [passkey]")
    for name in sys.argv[1:] or commands:
        commands[name]()
