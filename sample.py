"""Continues text with a trained model.

    python sample.py --prompt='def '                  the newest run in out/
    python sample.py --run=hybrid-2 --num_samples=3 --temperature=0.8 --top_p=0.95
    python sample.py --run=brief --think=20 --prompt=$'m3+5*2-4=<think>\\n'     thinks for 20 tokens, then answers
    python sample.py --run=super3 --draft=3           speculative decoding: the same distribution, fewer forward passes
    python sample.py --run=path/to/Nemotron           a released checkpoint, with its tokenizer.json
    python sample.py --run=mdlm --rule=threshold:0.7  masked diffusion: many tokens a forward pass, in any order
    python sample.py --run=mdlm --block_size=32 --cache=dual      block after block, the others' keys and values kept
    python sample.py --run=dultra --prompt=__13______24____     fills in the blanks, by the model's planner

One sample on a terminal (or with --stream) appears as it is made; that of a masked diffusion model in colours that say
when a token was unmasked (early ones blue, late ones red), and as a picture in its run's folder, order.png.
"""

import itertools
import os
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from common.checkpoints import read_config, replacing, text_ends
from common.cli import fail, parse, pick_device, pick_dtype
from common.data import ReleasedTokenizer, Tokenizer
from common.files import NotText, read_document
from common.memory import is_out_of_memory
from common.ranges import check_ranges
from common.sampling import draw, token_probs
from common.tasks import BLANK, THINK_END
from decode_kernels import pack_model
from decoding import DraftStats, ThinkingBudget, generate
from mdlm_dultra import MaskedDiffusionLM, decode, rule_of
from nano_hybrid import Hybrid
from nvfp4 import RECIPES, quantize_model

OUT = Path("out")
LONGEST_PROMPT = 1 << 24  # bytes, of a pipe or device
NOT_OF_DIFFUSION = ("top_k", "top_p", "draft", "think")
ONLY_OF_DIFFUSION = ("rule", "block_size", "cache")

# ---- 1. settings ----------------------------------------------------------------------------------------------------


@dataclass
class SampleConfig:
    """The settings; the comment is the --help text."""

    run: str | None = None  # a run's name in out/, or the path of a checkpoint folder; default: the newest run
    prompt: str | None = None  # text to go on from; default: the start of a document
    prompt_file: str | None = None  # read the prompt from this file
    max_new_tokens: int = 200  # tokens to add; a model of tasks (--recipe=dultra) fills in all its positions
    temperature: float | None = None  # 0: the likeliest token; 1: the model as it is; default: 0.8, with a planner 0
    top_k: int | None = None  # only ever choose among this many tokens
    top_p: float | None = None  # only ever choose among the fewest tokens with this much probability in all
    num_samples: int = 1  # continuations of the prompt
    stream: bool | None = None  # print one sample as it comes, not when it is done; default: on a terminal
    draft: int = 0  # draft tokens per forward pass, by a model trained for that (--recipe=super3)
    think: int | None = None  # tokens of thinking, at most: </think> is inserted at the end of the line after that
    rule: str | None = None  # of masked diffusion: planner, threshold:0.9, top_k:2, ...; default: planner, or top_k
    block_size: int | None = None  # of masked diffusion: tokens to finish before the next; default: any order
    cache: str | None = None  # of masked diffusion, with --block_size: prefix or dual, a little less exact, and faster
    seed: int = 0  # the same seed gives the same text
    device: str = "auto"  # cuda, mps or cpu
    dtype: str = "auto"  # float32, bfloat16 or float16
    precision: str = "bf16"  # of the layers' weights: bf16 (what dtype says), fp8, mxfp4 or nvfp4 (4 bits in memory)


def check(config, folder, diffusion):
    """Raises ValueError for settings that do not go together, or that have no meaning for the model in `folder`."""
    if config.prompt is not None and config.prompt_file is not None:
        raise ValueError("--prompt and --prompt_file were both given; choose one")
    check_ranges(config)
    if config.precision not in RECIPES:
        raise ValueError(f"--precision={config.precision} is unknown; use {' or '.join(RECIPES)}")
    foreign = NOT_OF_DIFFUSION if diffusion else ONLY_OF_DIFFUSION
    given = {name for name in foreign if getattr(config, name) != getattr(SampleConfig, name)}
    if given:
        kind = "a masked diffusion model" if diffusion else "no masked diffusion model"
        raise ValueError(f"--{min(given)} has no meaning here: {folder} is {kind}")


def thinking_budget(config, tokenizer):
    """Returns the ThinkingBudget asked for, or None. With --think=0 the thinking is closed before it begins."""
    if config.think is None:
        return None
    line_breaks = [i for i in range(tokenizer.n_vocab) if "\n" in tokenizer.decode([i])]
    grace = ThinkingBudget.grace if config.think else 0
    return ThinkingBudget(config.think, tokenizer.encode(THINK_END), line_breaks, grace)


# ---- 2. the model and the prompt ------------------------------------------------------------------------------------


def find_checkpoint(run):
    """Returns the folder of the checkpoint asked for. Raises FileNotFoundError if there is none."""
    if run is None:
        newest = max(OUT.rglob("model.safetensors"), key=lambda p: p.stat().st_mtime, default=None)
        if newest is None:
            raise FileNotFoundError(f"there is no trained model in {OUT}/; run python train.py first, or give --run")
        return newest.parent
    folder = next((f for f in (OUT / run, Path(run), Path(os.path.expanduser(run))) if f.is_dir()), None)
    if folder is None:
        raise FileNotFoundError(f"--run={run}: neither {OUT / run} nor {run} is a folder")
    return folder


def load(config):
    """Returns (model, tokenizer, prompt ids, ids that end a text), and fills in the default of the temperature.

    Raises ValueError or OSError with what is wrong in one line.
    """
    folder = find_checkpoint(config.run)
    diffusion = read_config(folder).get("architectures") == ["MaskedDiffusionLM"]
    check(config, folder, diffusion)
    tokenizer, start, stop = load_tokenizer(folder)
    device = pick_device(config.device)
    dtype, _ = pick_dtype(config.dtype, device)
    model = (MaskedDiffusionLM if diffusion else Hybrid).from_pretrained(folder).to(device).eval()
    n_parameters, names = model.num_parameters(), quantize_model(model, RECIPES[config.precision])
    pack_model(model)
    matrices_to(model, dtype)
    if config.temperature is None:
        config.temperature = 0.0 if diffusion and model.planner is not None else 0.8
    if model.config.vocab_size < tokenizer.n_vocab:
        raise ValueError(
            f"{folder}: {model.config.vocab_size} tokens in the model, {tokenizer.n_vocab} in {tokenizer.name}"
        )
    rounded = f", {len(names)} layers' matrices in {config.precision}" if names else ""
    parameters = f"{n_parameters / 1e6:.2f}M parameters"
    print(f"{folder}: {parameters}, {device}, {str(dtype)[6:]}{rounded}", file=sys.stderr)
    return model, tokenizer, [start] + tokenizer.encode(read_prompt(config)), stop


def matrices_to(model, dtype):
    """Converts the matrices of a model, in place, and the biases beside them.

    A_log, D, dt_bias, norms, routers and planners stay in float32: they are small, and states and decisions depend on
    their last digits.
    """
    for name, p in model.named_parameters():
        matrix = p.dim() > 1 and not name.endswith("gate.weight") or name.endswith("_proj.bias")
        if matrix and not name.startswith("planner."):
            p.data = p.data.to(dtype)


def read_prompt(config):
    """Returns the text of the prompt. What is no file, such as the pipe of <(...), is read once, into one."""
    if config.prompt_file is None:
        return config.prompt or ""
    flag, path = f"--prompt_file={config.prompt_file}", Path(config.prompt_file)
    with tempfile.TemporaryDirectory() as folder:
        if not path.is_file():
            with path.open("rb") as source:
                text = source.read(LONGEST_PROMPT + 1)
            if len(text) > LONGEST_PROMPT:
                raise ValueError(f"{flag} is longer than {LONGEST_PROMPT:,} bytes")
            path = Path(folder) / "prompt"
            path.write_bytes(text)
        try:
            document = read_document(config.prompt_file, path)
        except NotText as error:
            raise ValueError(f"{flag} is {': '.join(error.args)}") from None
        return "".join(document.pieces(0, document.length))


def load_tokenizer(folder):
    """Returns (tokenizer, id to start from, ids that end a text) of a checkpoint: train.py's, or a released one."""
    config = read_config(folder)
    if "nanopapers" in config:
        tokenizer = Tokenizer(config["nanopapers"]["tokenizer"])
        return tokenizer, tokenizer.end_of_text, [tokenizer.end_of_text]
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise ValueError(f"{folder} names no tokenizer: it was not written by train.py, and has no tokenizer.json")
    tokenizer = ReleasedTokenizer(path)
    start, ends = text_ends(folder, tokenizer.tokenizer.token_to_id)
    tokenizer.end_of_text = ends[0] if ends else None
    return tokenizer, start, ends


# ---- 3. next-token models -------------------------------------------------------------------------------------------


def go_on(config, model, tokenizer, prompt, stop):
    """Prints continuations of the prompt, and what drafts came to."""
    generator = torch.Generator(model.lm_head.weight.device).manual_seed(config.seed)
    began = time.perf_counter()
    prompt, first = heal(config, model, tokenizer, prompt, generator)
    prompts = [prompt + row for row in first.tolist()]
    steps = generate(
        model, prompts, config.max_new_tokens - first.shape[1], config.temperature, config.top_k, config.top_p,
        stop=stop, generator=generator, budget=thinking_budget(config, tokenizer), draft=config.draft,
        draft_stats=(stats := DraftStats()), vocab_size=tokenizer.n_vocab,
    )  # fmt: skip
    print_samples(config, tokenizer, prompt, itertools.chain(first.unbind(1), steps), stop, began)
    if stats.forwards:
        shares = ", ".join(f"{a / max(1, d):.0%}" for a, d in zip(stats.accepted, stats.drafted))
        rate = stats.tokens / stats.forwards
        print(f"{rate:.2f} tokens a forward pass; draft tokens accepted, by depth: {shares}", file=sys.stderr)


@torch.inference_mode()
def heal(config, model, tokenizer, prompt, generator):
    """Returns (prompt without spaces at its end, the first tokens of the samples, int64 [num_samples, 1 or 0]).

    Words begin with a space, " return" is one token, so a model hardly ever read a text that went on after a space by
    itself. The first token is drawn among those that begin with the spaces that the prompt ended with.
    """
    spaces = tokenizer.decode(prompt[-1:]) if len(prompt) > 1 else ""
    if not spaces or spaces.strip(" \t"):
        return prompt, torch.empty(config.num_samples, 0, dtype=torch.int64)
    allowed = [tokenizer.decode([i]).startswith(spaces) for i in range(tokenizer.n_vocab)]
    ids, cache = torch.tensor([prompt[:-1]], device=model.lm_head.weight.device), model.new_cache()
    for part in ids.split(8192, dim=1):
        hidden = model.model(part, cache)  # [1, part, C]
    logits = model.lm_head(hidden[:, -1])[:, : len(allowed)]  # [1, V]
    logits = logits.masked_fill(~torch.tensor(allowed, device=logits.device), -torch.inf)
    probs = token_probs(logits, config.temperature, config.top_k, config.top_p)
    return prompt[:-1], draw(probs.expand(config.num_samples, -1), generator)[:, None]


def print_samples(config, tokenizer, prompt, steps, stop, began):
    """Prints prompt and continuations, and the speed. steps: iterator of tokens [num_samples], -1 where a row ended.

    began: when the model began to read, by time.perf_counter.
    """
    rows, times, totals = [[] for _ in range(config.num_samples)], [began], [0]

    def collect():
        """Keeps the tokens of every row, and yields those of the first as they come."""
        for step in steps:
            times.append(time.perf_counter())
            for row, token in zip(rows, step.tolist()):
                if token not in (-1, *stop):
                    row.append(token)
            totals.append(sum(map(len, rows)))
            if len(rows[0]) == len(times) - 1:
                yield rows[0][-1]

    stream = sys.stdout.isatty() if config.stream is None else config.stream
    if stream and config.num_samples == 1:
        for text in tokenizer.stream(itertools.chain(prompt[1:], collect())):
            print(text, end="", flush=True)
        print()
    else:
        for _ in collect():
            pass
        print("\n---\n".join(tokenizer.decode(prompt[1:] + row) for row in rows))
    half = max(1, len(times) // 2)  # on a GPU the first steps compile and record: the second half tells the speed
    rate = (totals[-1] - totals[half]) / max(1e-9, times[-1] - times[half])
    print(f"first token after {times[1] - times[0]:.2f} s; in the second half {rate:,.0f} tokens/s", file=sys.stderr)


# ---- 4. masked diffusion models -------------------------------------------------------------------------------------

RAMP = (27, 33, 39, 44, 43, 42, 76, 148, 184, 214, 208, 202, 196)  # of a terminal's 256 colours: early to late
MASKED = "\N{LIGHT SHADE}"
SHOWN = {"\n": "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}", "$": r"\$"}  # letters that a plot shows otherwise


def masked_ids(config, model, tokenizer, prompt):
    """Returns (ids with masks, how many at the start are not to be shown).

    A model of text goes on from the prompt. One of tasks (it has a planner) fills in the prompt's blanks, or all its
    positions behind a prompt that has none. Raises ValueError for a prompt that it has no positions for.
    """
    start, given = prompt[:1], prompt[1:]
    if model.planner is None:
        return start + given + [model.mask_id] * config.max_new_tokens, 1
    if model.planner.positions is None:
        raise ValueError("this model does not say how long its texts are: write the blanks with mdlm_dultra.decode")
    length = len(model.planner.positions.weight)
    blank, newline = tokenizer.encode(BLANK + "\n")
    given = given[:-1] if blank in given and given[-1] == newline else given  # a file's last line ends
    ids = [model.mask_id if i == blank else i for i in given]
    ids += [model.mask_id] * (length - len(ids) if blank not in given else 0)
    if len(ids) > length:
        raise ValueError(f"the prompt has {len(ids)} letters, the model {length} positions")
    return ids, 0  # tasks have no end of text in front


def fill(config, model, tokenizer, prompt):
    """Prints texts with their masks filled in, and draws at which step each token was unmasked."""
    ids, hidden = masked_ids(config, model, tokenizer, prompt)
    ids = torch.tensor([ids] * config.num_samples, device=model.lm_head.weight.device)  # [num_samples, T]
    if not (ids == model.mask_id).any():
        raise ValueError(f"--prompt has nothing to fill in: write {BLANK} for what is open")
    rule = rule_of(config.rule or ("planner" if model.planner is not None else "top_k:1"), model)
    stream = sys.stdout.isatty() if config.stream is None else config.stream
    screen = Screen(tokenizer, model.mask_id) if stream and config.num_samples == 1 else None

    def visible(row):
        """Returns the ids of a text [T] up to its first end of text."""
        row = row.tolist()[hidden:]
        return row[: row.index(tokenizer.end_of_text)] if tokenizer.end_of_text in row else row

    def shown(probs, eligible, step):
        """The rule, and a look at the text before each step."""
        if screen:
            screen.show(visible(step.ids[0]))
        return rule(probs, eligible, step)

    shown.layers = getattr(rule, "layers", 0)
    generator, began = torch.Generator(ids.device).manual_seed(config.seed), time.perf_counter()
    decoded = decode(model, ids, shown, config.temperature, config.block_size, config.cache, generator=generator)
    seconds = time.perf_counter() - began
    if screen:
        screen.show(visible(decoded.ids[0]))
    else:
        print("\n---\n".join(tokenizer.decode(visible(row)) for row in decoded.ids))
    path = find_checkpoint(config.run) / "order.png"
    draw_order([tokenizer.decode([i]) for i in visible(decoded.ids[0])], decoded.order[0].tolist()[hidden:], path)
    nfe, rate = decoded.nfe.float().mean().item(), decoded.tokens_per_forward.float().mean().item()
    speed = (decoded.order > 0).sum().item() / seconds
    print(f"NFE {nfe:.1f}, {rate:.2f} tokens each; {speed:,.0f} tokens/s; order: {path}", file=sys.stderr)


class Screen:
    """A text with masks on a terminal, drawn over itself: early tokens blue, late ones red."""

    def __init__(self, tokenizer, mask_id):
        self.tokenizer, self.mask_id = tokenizer, mask_id
        self.colour_of, self.lines, self.tty = {}, 0, sys.stdout.isatty()

    def show(self, ids):
        """Draws the text of a list of ids as it is."""
        known = [place for place, token in enumerate(ids) if token != self.mask_id]
        done = sum(place in self.colour_of for place in range(len(ids)))  # places behind an end of text do not count
        colour = RAMP[(len(RAMP) - 1) * done // max(1, len(ids))] if self.lines else 0
        for place in known:
            self.colour_of.setdefault(place, colour)
        colours = [self.colour_of.get(place, -1) for place in range(len(ids))]  # -1: masked, 0: given
        if self.tty and self.lines:
            print(f"\x1b[{self.lines}F\x1b[0J", end="")
        text = plain = ""
        for colour, run in itertools.groupby(zip(ids, colours), key=lambda pair: pair[1]):
            run = [token for token, _ in run]
            part = MASKED * len(run) if colour < 0 else self.tokenizer.decode(run)
            plain += part
            text += f"\x1b[38;5;{colour}m{part}\x1b[0m" if colour > 0 and self.tty else part
        print(text, flush=True)
        width = shutil.get_terminal_size().columns
        self.lines = sum(max(1, -(-len(line) // width)) for line in plain.split("\n"))
        if self.tty:
            time.sleep(0.05)  # for the eye


def draw_order(pieces, order, path):
    """Draws a text in the colours of the steps that wrote its tokens; what was given is grey.

    pieces: the text of each token. order: the step of each, from 1 on, or 0 where it was given.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    letters = [(c, step) for text, step in zip(pieces, order) for c in text]
    places, rows = [], [0]  # (column, row) of each letter; length of each row so far
    for letter, _ in letters:
        places.append((rows[-1], len(rows) - 1))
        rows[-1] += 1
        if letter == "\n" or rows[-1] == 80:
            rows.append(0)
    width = max(2.5, 0.11 * max(rows))
    figure, axes = plt.subplots(figsize=(width, 0.24 * len(rows) + 0.8), dpi=150, layout="constrained")
    colours = plt.get_cmap("coolwarm")
    for (letter, step), (x, y) in zip(letters, places):
        colour = "#888888" if step == 0 else colours(step / max(order))
        shown = SHOWN.get(letter, letter if letter.isprintable() else "\N{REPLACEMENT CHARACTER}")
        axes.text(x, -y, shown, color=colour, family="monospace", fontsize=8)
    axes.set(
        xlim=(-1, max(rows) + 1), ylim=(-len(rows), 1), title=f"{sum(s > 0 for s in order)} tokens, {max(order)} steps"
    )
    axes.axis("off")
    with replacing(path) as temporary:
        figure.savefig(temporary, format="png")
    plt.close(figure)


# ---- 5. the command -------------------------------------------------------------------------------------------------


def main(argv=None):
    """Prints the samples; speed goes to stderr. Returns the exit status: 0 done, 2 a mistake, 130 interrupted."""
    about = "Continues text with a trained model."
    config = SampleConfig(**parse(SampleConfig, prog="sample.py", about=about, argv=argv))
    try:
        model, tokenizer, prompt, stop = load(config)
        if isinstance(model, MaskedDiffusionLM):
            fill(config, model, tokenizer, prompt)
        else:
            go_on(config, model, tokenizer, prompt, stop)
        return 0
    except (ValueError, OSError) as error:
        return fail(error)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return fail("no memory is left; take a smaller --num_samples or --max_new_tokens, or a shorter prompt")
    except KeyboardInterrupt:
        print()
        return 130


if __name__ == "__main__":
    sys.exit(main())
