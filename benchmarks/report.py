"""Renders RESULTS.md from the records in assets/bench/*.json, and the `Files` lines of the paper files.

    python -m benchmarks.report            # writes RESULTS.md
    python -m benchmarks.report --files    # writes what a copier of each paper file takes along, and how many lines

A section is a function that returns its text. Every measured number in it comes from a record; what stands here in
words is how to read a table, and what it says of a paper's claim.
"""

import ast
import json
import re
import sys
import textwrap
from math import isnan
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
BENCH = ROOT / "assets" / "bench"

# ---- 1. what a copier takes along ------------------------------------------------------------------------

ENGINE = {"kernels", "expert_kernels", "decode_kernels", "decoding", "train", "sample"}  # at top level, and not papers
FILES_LINE = re.compile(r"^Files\s+(.+?):\s+([\d,]+)\s+lines\s+in\s+all", flags=re.M | re.S)


def is_main_block(node):
    """Returns whether a statement is `if __name__ == "__main__":`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'"


def imports(path):
    """Returns the set of files of ours that a file imports, within functions too, but not in its __main__ block.

    Raises ValueError at a relative import.
    """
    names = set()
    statements = [s for s in ast.parse(path.read_text(encoding="utf-8")).body if not is_main_block(s)]
    for node in (node for statement in statements for node in ast.walk(statement)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            if node.level:
                raise ValueError(f"{path.name}:{node.lineno}: a relative import")
            names.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])
    files = {ROOT / f"{name.replace('.', '/')}.py" for name in names}
    return {file for file in files if file.exists()} - {path}


def needed_files(path):
    """Returns the files that a copier of a paper file takes along: itself, what it imports, and what that imports."""
    found, new = [path], [path]
    while new:
        reached = {file for one in new for file in imports(one)}.difference(found)
        new = sorted(reached, key=lambda file: (file.parent != ROOT, file.name))
        found += new
    return [file for file in found if file.parent == ROOT] + [file for file in found if file.parent != ROOT]


def lines_of(paths):
    """Returns how many lines these files have together, as `wc -l` counts them."""
    return sum(path.read_bytes().count(b"\n") for path in paths)


def files_line(path):
    """Returns ([names], lines) of a paper file's docstring: `Files    ssd.py + kernels.py: 1,234 lines in all`.

    Raises ValueError if there is no such line.
    """
    found = FILES_LINE.search(ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or "")
    if not found:
        raise ValueError(f"{path.name}: no `Files` line in its docstring; run python -m benchmarks.report --files")
    return re.split(r"[\s+,]+", found[1]), int(found[2].replace(",", ""))


def write_files_line(path):
    """Writes the needed files and their true number of lines into a paper file's docstring."""
    text = path.read_text(encoding="utf-8")
    if not FILES_LINE.search(text):  # a new one is the last line of the docstring
        end = text.index('"""', text.index('"""') + 3)
        text = text[:end] + f"Files    {path.name}: 0 lines in all\n" + text[end:]
    names = [file.relative_to(ROOT).as_posix() for file in needed_files(path)]
    for _ in range(2):  # the first round may change the number of lines of this file itself
        line = f"Files    {' + '.join(names)}: {lines_of(needed_files(path)):,} lines in all"
        line = textwrap.fill(line, 116, subsequent_indent=" " * 9, break_long_words=False, break_on_hyphens=False)
        text = FILES_LINE.sub(lambda _, line=line: line, text, count=1)
        path.write_text(text, encoding="utf-8")
    print(line)


def papers():
    """Returns the paper files: what is at top level and no engine."""
    return [path for path in sorted(ROOT.glob("*.py")) if path.stem not in ENGINE]


# ---- 2. records and tables -------------------------------------------------------------------------------


def record(name):
    """Returns the record assets/bench/<name>.json."""
    return json.loads((BENCH / f"{name}.json").read_text(encoding="utf-8"))


def table(head, rows):
    """Returns a Markdown table of a list of headings and lists of cells; None is an empty cell."""
    lines = [head, ["---"] * len(head), *rows]
    cells = ([("" if cell is None else str(cell)).replace("|", "\\|") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def origin(*records):
    """Returns [command, card, torch, commit] of a record, "-" for what it does not say; a later record's fields win."""
    found = {key: value for one in records for key, value in one.items() if key in ("command", "machine", "commit")}
    card, _, versions = found.get("machine", "-").partition(", torch ")
    torch = re.match(r"[\w.+]*", versions)[0]
    commands = [f"`{command}`" for command in found.get("command", "-").split("; ")]
    return ["; ".join(commands), card, torch or "-", found.get("commit", "-")]


def sources(*records, **common):
    """Returns a line for each different origin among records: command, card, torch, commit; then their notes."""
    lines = dict.fromkeys("{}, {}, torch {}, commit {}".format(*origin(common, one)) for one in records)
    notes = dict.fromkeys(one["note"] for one in (common, *records) if "note" in one)
    return "Measured by " + "; ".join(lines) + "." + "".join(f" Note: {note}." for note in notes)


def spread(values, digits=3):
    """Returns "mean ± standard deviation" of the seeds' values."""
    return printed([mean(values), stdev(values) if len(values) > 1 else None], digits)


def printed(pair, digits=3):
    """Returns "mean ± spread" of a pair; a spread of None is left out."""
    return f"{pair[0]:.{digits}f}" + ("" if pair[1] is None else f" ± {pair[1]:.{digits}f}")


def short(x):
    """Returns a number with three significant digits, thousands with commas; "" for None."""
    return "" if x is None else f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def pair_ms(row):
    """Returns "forward / forward + backward" in ms."""
    return " / ".join(short(row[key]) for key in ("fwd_ms", "fwd_bwd_ms") if row.get(key) is not None)


def last(by_step):
    """Returns the value of the last step of {"250": value, ...}."""
    return by_step[max(by_step, key=int)]


# ---- 3. training -----------------------------------------------------------------------------------------


def training():
    """Returns the section on the runs that learn text: train.json."""
    runs = [run for run in record("train") if "val_bpb" in run]
    rows = []
    for run in runs:
        mfu, baselines = run.get("median_mfu"), run.get("baselines", {})
        rows.append([
            *origin(run), f"{run['steps']:,}", run.get("seconds"), f"{run['median_tokens_per_s']:,.0f}",
            f"{mfu:.1%}" if mfu else "", f"{last(run['val_bpb']):.3f}",
            baselines.get("gzip -9"), baselines.get("xz -9e"), run.get("note"),
        ])  # fmt: skip
    head = ["command", "card", "torch", "commit", "steps", "seconds", "tokens/s", "MFU", "bits per byte"]
    return f"""## Training

Bits per byte of the validation documents (a share of Python's standard library, chosen by a hash of the file name),
seed 0; compressors on the same text. [`train.json`](assets/bench/train.json).

{table([*head, "`gzip -9`", "`xz -9e`", "note"], rows)}

What limits the GPU run is the text, which it reads many times: `train.py` then raises dropout and weight decay by
itself and says so. What limits the CPU run is arithmetic: it ends before it has read the text once."""


def models():
    """Returns the section on the speed of training whole models: models.json."""
    found = record("models")
    rows = [
        [*origin(found, row), f"{row['tokens_per_s']:,}", f"{row['mfu']:.1%}" if row["mfu"] else "", row["peak_gib"]]
        for row in found["rows"]
    ]
    head = ["command", "card", "torch", "commit", "tokens/s", "MFU", "peak GiB"]
    return f"""## Whole models

Training speed of the preset `small` with GPT-2's vocabulary size, of `nano3`, and of the attention-only baseline,
whose pattern the command gives. [`models.json`](assets/bench/models.json): {found["note"]}.

{table(head, rows)}"""


# ---- 4. kernels ------------------------------------------------------------------------------------------

SIZES = {
    "causal_conv1d": "B, T, channels, width", "gated_rms_norm": "rows, C, group", "rms_norm": "rows, C",
    "linear_cross_entropy": "rows, C, V", "expert_mlp": "rows, C, F, E, K", "ssd": "B, T, H, P, G, N",
    "latent_experts": "rows, C, l, F, E, K",
}  # fmt: skip


def op_table(rows):
    """Returns a table of kernels beside their peers: one line for each peer of an op at its sizes."""
    ours = {(row["op"], *row["sizes"]): row for row in rows if row["who"] == "triton"}
    lines = []
    for key, mine in ours.items():
        op, sizes = mine["op"], mine["sizes"]
        letters = SIZES[op] + (", skew" if op == "expert_mlp" and len(sizes) == 6 else "")
        shape = f"{' x '.join(f'{size:,}' for size in sizes)} ({letters})"
        peers = [row for row in rows if row["who"] != "triton" and (row["op"], *row["sizes"]) == key] or [None]
        for peer in peers:
            beside = [None] * 4
            if peer:
                gain = " / ".join(f"{peer[k] / mine[k]:.2f}" for k in ("fwd_ms", "fwd_bwd_ms"))
                beside = [peer["who"], pair_ms(peer), short(peer["extra_mib"]), gain]
            lines.append([f"`{op}`", shape, pair_ms(mine), short(mine["extra_mib"]), *beside])
    head = ["op", "sizes", "Triton, ms", "MiB", "peer", "its ms", "its MiB", "peer's time / Triton's"]
    return table(head, lines)


def kernels():
    """Returns the section on primitives, the scan and the experts: kernels.json, ssd.json, latent_moe.json."""
    parts = []
    for name in ("kernels", "ssd", "latent_moe"):
        rows = record(name)["rows"]
        parts += [f"[`{name}.json`](assets/bench/{name}.json). {sources(*rows)}", op_table(rows)]
    body = "\n\n".join(parts)
    return f"""## Kernels

Every Triton kernel is checked against its definition in float64 and timed in bfloat16: forward / forward + backward.
MiB are those beside inputs and gradients. `torch.compile` compiles the definition; `grouped_mm` is torch's, with
sorting, gathering and summing around it. Rows with a last size "skew" have tokens crowding on some experts.

{body}

Misses: inside a compiled model the plain norm stays with the compiler, which is as fast; `latent_experts` gains
little with backward."""


def ssd_claims():
    """Returns the section on the claims of SSD's paper: ssd_claims.json, or nothing where it was not measured."""
    if not (BENCH / "ssd_claims.json").exists():
        return ""
    found = record("ssd_claims")
    lengths = sorted({int(T) for by in found["ms"].values() for T in by})
    rows = [[who, *(short(by.get(str(T))) for T in lengths)] for who, by in found["ms"].items()]
    return f"""## SSD's claims

The forms of the scan and softmax attention, forward. [`ssd_claims.json`](assets/bench/ssd_claims.json).
{sources(found)}

{table(["claim", "the paper, A100", "here"], found["claims"])}

Milliseconds by length:

{table(["", *(f"{T:,}" for T in lengths)], rows)}"""


def nvfp4_kernels():
    """Returns the section on the kernels of NVFP4: nvfp4_kernels.json, or nothing where it was not measured."""
    if not (BENCH / "nvfp4_kernels.json").exists():
        return ""
    rows, lines = record("nvfp4_kernels")["rows"], []
    sizes = {"packed": "rows, C", "both_views": "T, C", "packed_product": "M, N, K", "layer": "T, inputs, outputs"}
    for mine, peer in zip(rows[::2], rows[1::2]):
        op, shape = mine["op"], list(mine["sizes"])
        letters = sizes[op] + (", at random" if op in ("packed", "both_views") and shape.pop() else "")
        times = [[row[k] for k in ("fwd_ms", "fwd_bwd_ms") if not isnan(row[k])] for row in (mine, peer)]
        gain = " / ".join(f"{b / a:.2f}" for a, b in zip(*times))
        cells = (" / ".join(map(short, found)) for found in times)
        lines.append([f"`{op}`", f"{' x '.join(f'{n:,}' for n in shape)} ({letters})", next(cells), peer["who"],
                      next(cells), gain])  # fmt: skip
    return f"""## NVFP4's kernels

On a GPU without FP4. [`nvfp4_kernels.json`](assets/bench/nvfp4_kernels.json). {sources(*rows)}

{table(["op", "sizes", "Triton, ms", "peer", "its ms", "peer's time / Triton's"], lines)}

`packed` and `both_views`: the quantiser, both of its passes, rounding to nearest or at random; their peer moves as many
bytes, so that the last column is the share of the copy rate. `packed_product`: weights of 4 bits, for generation.
`layer`: the three products of a layer, emulated, forward / forward + backward."""


# ---- 5. decoding -----------------------------------------------------------------------------------------


def decoding():
    """Returns the section on generation: writing.json."""
    found = record("writing")
    rows = [[*origin(found, row), what, *decoding_cells(row)] for what, row in decoding_rows(found)]
    ours, theirs = found["1B, 8K in, 16K out"], found["its attention-only baseline"]
    head = ["command", "card", "torch", "commit", "what", "tokens/s", "remark"]
    return f"""## Decoding

bfloat16. "1B" is the pattern of Nano-9B-v2 at {ours["parameters"] / 1e9:.2f} B parameters. In its first two rows a
decoding step is timed at three lengths, and the whole time is put together from them, at the largest batch that fits
each model. The bound is weights and states over the rate of a large copy.
[`writing.json`](assets/bench/writing.json).

{table(head, rows)}

The hybrid decodes {ours["tokens_per_s"] / theirs["tokens_per_s"]:.2f} times the tokens/s of its attention-only
baseline; the paper's 9B model, up to 6.3 times. Miss: `small` stays well below its bound, because its kernels must
follow one another.

{drafting(found)}"""


def decoding_rows(found):
    """Returns [(what, row)] of the records of writing.json that are rates."""
    names = {
        "1B, 8K in, 16K out": "1B, 8,192 tokens in, 16,384 out",
        "its attention-only baseline": "its attention-only baseline",
        "small, one text": "`small`, one sequence, greedy", "the same through transformers": "the same, `transformers`",
        "1B, one text": "1B, one sequence, greedy", "small, reading": "`small`, prefill of 64 prompts of 1,024",
        "small, a million tokens": "`small`, one sequence after 1,000,000 tokens",
    }  # fmt: skip
    return [(names[key], found[key]) for key in names]


def decoding_cells(row):
    """Returns [tokens/s, remark] of a row of writing.json."""
    if "reading" in row:
        return [short(row["reading"]), f"forward of a compiled training step: {short(row['training_forward'])}"]
    remarks = [f"{row['texts']} sequences"] if "texts" in row else []
    if "of_bound" in row:
        remarks.append(f"{row['of_bound']:.0%} of the bound; sampled: {short(row['sampled_tokens_per_s'])} tokens/s")
    if "peak_gb" in row:
        remarks.append(
            f"prefill {row['reading_s']:.1f} s; {row['peak_gb']:.2f} GB, of which {row['predicted_gb']:.2f} as the "
            "pattern predicts"
        )
    return [short(row["tokens_per_s"]), "; ".join(remarks)]


def drafting(found):
    """Returns the table of drafts by multi-token prediction."""
    row = found["super3, drafting"]
    rows = [
        [f"`--draft={n}`", rate, ", ".join(f"{right:.0%}" for right in row["guesses_right"][n])]
        for n, rate in row["tokens_per_forward"].items()
    ]
    return f"""### Drafts by multi-token prediction

The recipe `super3`, greedy: the text is the same, in fewer forward passes.
{sources(row, machine=found["machine"])}

{table(["draft", "tokens per forward pass", "draft tokens accepted, by depth"], rows)}"""


def passkey():
    """Returns the section on lengths beyond training: passkey.json."""
    found = record("passkey")
    rows = [
        [f"{who} ({found['parameters'][who] / 1e6:.2f}M)", *(f"{mean(at):.2f}" for at in zip(*by_depth))]
        for who, by_depth in found["accuracy"].items()
    ]
    settings = found["settings"]
    return f"""## Long texts

![How often each model finds a key again, by length and depth](assets/passkey.png)

Models learn to repeat a five-digit key that stands somewhere in random filler, on sequences of up to
{settings["context"]} tokens, and are asked for it in longer ones: share of keys with all digits right, mean over
{len(found["depths"])} depths of {settings["texts"]} sequences, {len(found["seeds"])} seed, {found["seconds"]:.0f} s.
[`passkey.json`](assets/bench/passkey.json). {sources(found)}

{table(["tokens", *(f"{n:,}" for n in found["lengths"])], rows)}

The hybrid, whose attention has no positions, finds every key at every length. Rotary attention without scaling loses
them beyond the training length. Mamba alone forgets what is far back in the longest sequences."""


# ---- 6. local linear attention ---------------------------------------------------------------------------


def lla():
    """Returns the section on local linear attention: lla_demo.json and lla.json."""
    found = record("lla_demo")
    rows = []
    for row in found["rows"]:
        gain = f"{mean(row['softmax']) / mean(row['LLA']):.2f}" if row["claim"] == "lowest" else ""
        cells = [spread(row[who]) for who in ("softmax", "linear", "LLA")]
        rows.append([row["name"], *cells, gain, f"LLA {row['claim']}", "yes" if row["found"] else "no"])
    head = ["experiment", "softmax attention", "MesaNet", "LLA", "softmax / LLA", "the paper", "found"]
    return f"""## Local linear attention

![LLA's error within each segment, and its gain over softmax attention by width](assets/lla.png)

Pairs (x, y) of d numbers come in segments of S, each with its own linear map. Regression: squared error of the next
y, as a share of its mean square. Recall and tracking: share of right answers. MesaNet is least squares on all pairs.
Mean ± spread of {len(found["seeds"])} seeds, {found["seconds"]:.0f} s in all.
[`lla_demo.json`](assets/bench/lla_demo.json). {sources(found)}

{table(head, rows)}

The gain grows with d where the segments grow with it, but not at one S for all d. The paper's gain in context is the
largest at small S, ours the smallest.

{lla_speed()}

{lla_errors()}

{lla_step_and_memory()}"""


def lla_speed():
    """Returns the table of FlashLLA's times beside softmax attention's."""
    part = record("lla")["speed"]
    softmax = {tuple(row["shape"]): row for row in part["found"] if row["keys"] == "softmax"}
    rows = []
    for row in part["found"]:
        if row["keys"] != "softmax":
            beside, times = softmax[tuple(row["shape"])], (row["fwd_ms"], row["fwd_bwd_ms"])
            share = " / ".join(f"{bound / ms:.0%}" for bound, ms in zip(row["bounds_ms"], times))
            ratio = " / ".join(f"{row[k] / beside[k]:.1f}" for k in ("fwd_ms", "fwd_bwd_ms"))
            shape = " x ".join(f"{size:,}" for size in row["shape"])
            rows.append([shape, row["keys"], pair_ms(row), share, f"{row['steps'][0]:.1f}", pair_ms(beside), ratio])
    head = ["B x H x T x D", "keys", "LLA, ms", "of the bound", "steps", "softmax attention, ms", "LLA / softmax"]
    return f"""### FlashLLA: time

bfloat16, causal, ridge 1: forward / forward + backward. Steps are those of conjugate gradients for a row; the bound
is all products at the tensor cores' peak; softmax attention is torch's. [`lla.json`](assets/bench/lla.json).
{sources(part)}

{table(head, rows)}"""


def lla_errors():
    """Returns the table of FlashLLA's errors against float64."""
    part = record("lla")["errors"]
    cells = {}
    for row in part["found"]:
        text = " / ".join(f"{1e3 * error:.1f}" for error in row["errors"][:4])
        cells.setdefault(row["keys"], {})[f"D {row['D']}, ridge {row['ridge']:g}"] = text
    head = list(next(iter(cells.values())))
    rows = [[keys, *(by[column] for column in head)] for keys, by in cells.items()]
    return f"""### FlashLLA: error

Relative to float64 at {part["found"][0]["T"]:,} tokens, o / dq / dk / dv in units of 1e-3. "offset": keys far from
the origin; "sharp": four times the logits. {sources(part)}

{table(["keys", *head], rows)}"""


def lla_step_and_memory():
    """Returns the tables of one decoded token, and of memory by length."""
    step, memory = record("lla")["step"], record("lla")["memory"]
    rows = [
        [" x ".join(f"{size:,}" for size in row["shape"]), short(row["lla_step_us"]), short(row["softmax_us"]),
         short(row["floor_us"]), f"{row['lla_step_us'] / row['softmax_us']:.2f}"]
        for row in step["found"]
    ]  # fmt: skip
    lengths = [T for T, _ in memory["found"]["FlashLLA"]]
    sizes = [[who, *(short(dict(map(tuple, at)).get(T)) for T in lengths)] for who, at in memory["found"].items()]
    head = ["B x heads x key heads x T x D", "LLA, us", "softmax, us", "floor, us", "LLA / softmax"]
    return f"""### FlashLLA: one new token, and memory

One token on a cache of T, exact in one pass over it. {sources(step)}

{table(head, rows)}

Where query heads share a key head, attention reads a key once for all of them; LLA adds to a D x D matrix for each.

![Memory of FlashLLA, softmax attention and the definition](assets/lla_memory.png)

Peak memory in MiB by tokens, forward + backward. {sources(memory)}

{table(["", *(f"{T:,}" for T in lengths)], sizes)}"""


def latent_moe():
    """Returns the section on what mixtures of experts learn: latent_moe.json."""
    found = record("latent_moe")
    tables = "\n\n".join(latent_moe_table(found[key]) for key in ("demo", "demo_cpu") if key in found)
    return f"""## Mixtures of experts

A Transformer with the standard layer, and with LatentMoE layers of equal active parameters; validation loss, and its
difference from the standard layer seed by seed. [`latent_moe.json`](assets/bench/latent_moe.json).

{tables}

Among the latent layers the order on the GPU is the paper's: alpha 4 before alpha 8, and more experts before as many.
Miss: all of them are behind the standard layer, where the paper's, thousands of times larger, are ahead of it."""


def latent_moe_table(found):
    """Returns the table of one machine's mixtures of experts."""
    rows = []
    for who, (E, K, width, loss, std, gap, gap_std, ms, load) in found["rows"].items():
        beside = f"{gap:+.3f} ± {gap_std:.3f}" if gap else ""
        rows.append([who, f"{E}, {K}, {width}", printed([loss, std]), beside, f"{ms:.0f}", f"{load:.2f}"])
    head = ["layer", "experts, of them used, width", "loss, nats", "difference", "ms/step", "busiest expert / mean"]
    return f"{sources(found)}\n\n{table(head, rows)}"


def nvfp4_training():
    """Returns the section on training in four bits: nvfp4.json, or nothing where it was not measured."""
    if not (BENCH / "nvfp4.json").exists():
        return ""
    found, rows = record("nvfp4"), []
    for row in found["rows"]:
        cells = [verdict if isnan(center) else f"{center:+.2f} ± {error:.2f} {verdict}".rstrip()
                 for center, error, verdict in (row["gap"], row["beside_nvfp4"])]  # fmt: skip
        cells = {"BF16": ["", ""], "NVFP4": [cells[0], ""]}.get(row["arm"], cells)
        zeros, ms = f"{row['zeros'][-1]:.3%}", f"{row['ms_per_step']:.1f}"
        rows.append([row["arm"], f"{mean(row['losses']):.4f}", *cells, row["paper"], zeros, ms])
    head = ["arm", "loss, nats", "above BF16, %", "above NVFP4, points", "the papers", "zero gradients", "ms/step"]
    setting, errors = found["setting"], [row["gap"][1] for row in found["rows"] if not isnan(row["gap"][1])]
    by_arm = {row["arm"]: row for row in found["rows"]}
    zeros = [f"{mean(by_arm[name]['zeros']):.3%}" for name in ("BF16", "NVFP4")]
    return f"""## Training in four bits

![The loss of each arm above BF16's, and zero gradients over time](assets/nvfp4.png)

A hybrid of {found["parameters"] / 1e6:.1f}M parameters, {setting["steps"]:,} steps of {setting["batch_size"]} x
{setting["context"]} tokens, {found["seeds"]} seeds; all arms of a seed have the same first weights and the same texts.
Validation loss above BF16's, paired, mean ± standard error (largest: {max(errors):.2f} %). A null is what a t-test at
5 %, each arm by itself, does not tell from 0. [`nvfp4.json`](assets/bench/nvfp4.json). {sources(found)}

{table(head, rows)}

Zero gradients: share of the weights that NVFP4 quantises whose gradient is exactly 0, at the end. Its mean over the
run is {zeros[0]} in BF16 and {zeros[1]} in NVFP4; Nemotron 3 Super saw three times as many in NVFP4. ms/step: products
are emulated; hardware with FP4 would be faster than BF16."""


# ---- 7. rewards ------------------------------------------------------------------------------------------


def rewards():
    """Returns the section on GRPO: train.json, grpo_countdown.json, grpo.json."""
    found = record("grpo")
    rows = [[row["max_new_tokens"], short(row["tokens_per_s"])] for row in found["rollouts"]]
    runs = "\n\n".join(reward_table(run) for run in record("train") if "rewards" in run)
    return f"""## Rewards

![Five losses from the same warm start](assets/grpo.png)

Share of right answers to held-out prompts, sampled at temperature 1, one seed; the first row is after the
demonstrations. [`train.json`](assets/bench/train.json).

{runs}

Miss: on nine environments at once, countdown stops at about what always adding would reach. Groups whose answers
differ in reward become rare, and nothing is left to learn from.

{countdown()}

### Rollouts

{found["answers"]:,} answers at once; tokens before the end are counted. [`grpo.json`](assets/bench/grpo.json).
{sources(found)}

{table(["tokens of an answer, at most", "tokens/s"], rows)}"""


def reward_table(run):
    """Returns the table of a run's held-out rewards by step, from the last demonstrations on: at most ten steps."""
    steps = [step for step in run["rewards"] if int(step) >= run["warm_start"]]
    kept = [step for i, step in enumerate(steps) if i % (len(steps) // 9 + 1) == 0 or step == steps[-1]]
    names = [name for name in run["rewards"][steps[0]] if name != "reward"]
    rows = [[step, *(f"{run['rewards'][step][name]:.3f}" for name in names)] for step in kept]
    return f"{sources(run)} {run['seconds']} s.\n\n" + table(
        ["step", *(name.removeprefix("reward_") for name in names)], rows
    )


def countdown():
    """Returns the table of the runs on countdown alone."""
    runs = record("grpo_countdown")
    steps = ["100", "200", "300", "600", "900"]
    rows = []
    for run in runs:
        at = [run["held_out"].get(step) for step in steps]
        cells = [f"{x['countdown']:.2f} / {x['countdown:3']:.2f}" if x else "" for x in at]
        end = run.get("last_step") or run["last_60_steps"]
        rows.append([*origin(run), *cells, f"{end['informative']:.0%}"])
    head = ["command", "card", "torch", "commit", *(f"step {step}" for step in steps), "groups that differ, at the end"]
    return f"""### Countdown alone

Held-out countdown / countdown:3, one seed each; 128 prompts of each task are ± 0.04. The rows differ in more than one
setting, and no claim on any one of them follows. [`grpo_countdown.json`](assets/bench/grpo_countdown.json).

{table(head, rows)}"""


def studies():
    """Returns the section on five claims of Nemotron's: grpo_studies.json."""
    found = record("grpo_studies")
    parts = [joint(found["joint"]), curriculum(found["curriculum"]), staleness(found["staleness"])]
    parts += [length(found["length"]), budget(found["budget"])]
    return """## Studies of rewards

![Five studies](assets/grpo_studies.png)

Five claims of Nemotron's, each with three seeds, mean ± spread.
[`grpo_studies.json`](assets/bench/grpo_studies.json).

""" + "\n\n".join(parts)


def joint(part):
    """Returns the study of one task against all at once."""
    tasks = list(part["found"]["all"])
    names = {"warm start": "after the demonstrations", "all": "all at once, as many answers"}
    rows = [
        [names.get(who, f"rewards for {who} alone"), *(spread(by[task]) for task in tasks)]
        for who, by in part["found"].items()
    ]
    return f"""### One task, or all at once

Claim (Nemotron 3 Nano): training on one task makes a model forget the others; on all at once it does not. Found: all
at once has the best mean and forgets nothing; of the four specialists, one forgot. {sources(part)}

{table(["trained on", *tasks], rows)}"""


def curriculum(part):
    """Returns the study of prompts from easy to hard."""
    names = ["sort:4", "sort:8", "sort:12", "sort:16", "first prompts", "last prompts"]
    rows = [[who, *(printed(by[n]) if n in by else "" for n in names)] for who, by in part["printed"].items()]
    return f"""### From easy to hard

Claim (Nemotron 3 Nano): easy to hard is better than random order. Found: at 12 digits, yes; elsewhere the difference
is within the spread. The last two columns are pass rates in training. {sources(part)}

{table(["order", *names], rows)}"""


def staleness(part):
    """Returns the study of samplers that lag behind."""
    lags, kinds, cells = {}, {}, {}
    for key, by in part["found"].items():
        lag, kind = ast.literal_eval(key)
        lags[lag], kinds[kind], cells[lag, kind] = None, None, spread(by["sort:8"])
    rows = [["fresh" if lag == 1 else f"up to {lag - 1} old", *(cells.get((lag, k)) for k in kinds)] for lag in lags]
    head = {"none": "no correction", "clip": "PPO's clip", "tis": "TIS", "mask": "IcePop's mask"}
    return f"""### Stale samplers

Claim (Nemotron 3 Super): corrected, a stale sampler is as good as a fresh one. Found: one step old, clipping is; TIS
and the mask cannot be told from no correction. Many steps old, no; clipping loses least. Accuracy on sort:8.
{sources(part)}

{table(["steps", *(head.get(kind, f"{kind} mask") for kind in kinds)], rows)}"""


def length(part):
    """Returns the study of shorter thoughts."""
    rows = []
    for who, by in part["printed"].items():
        name = "after the demonstrations" if who == "warm start" else f"coefficient {float(who):g}"
        rows.append([name, printed(by["accuracy"]), printed(by["thought"], 1)])
    return f"""### Length control

Claim (Nemotron 3 Nano): thoughts become a third shorter at no loss. Found: yes. Demonstrations repeat half of their
lines; what is left at the end is what the task needs. {sources(part)}

{table(["", "accuracy", "characters of thought"], rows)}"""


def budget(part):
    """Returns the study of thinking budgets."""
    names = {"0.0": "whole thoughts only", "0.5": "half of the thoughts cut short"}
    sizes = [key.removeprefix("accuracy at ") for key in part["printed"]["0.0"] if key.startswith("accuracy")]
    rows = [
        [f"{words}, {names[cut]}", *(printed(by[f"{kind} at {size}"]) for size in sizes)]
        for kind, words in (("accuracy", "right"), ("in form", "well-formed"))
        for cut, by in part["printed"].items()
    ]
    return f"""### Thinking budgets

Claim (Nemotron Nano 2): cut thoughts teach a model to answer under a budget. Found: yes, at every budget below the
whole thought; with all of the thought, the difference is within the spread. {sources(part)} {part["seconds"]:,} s.

{table(["tokens of thought allowed", *sizes], rows)}"""


# ---- 8. masked diffusion ---------------------------------------------------------------------------------


def diffusion():
    """Returns the section on masked diffusion: mdlm_dultra.json, mdlm_text.json, mdlm_statistics.json."""
    found = record("mdlm_dultra")
    parts = [frontier(found, task, part) for task, part in found["studies"].items()]
    for task, part in found.get("earlier", {}).items():
        parts.append(frontier(found, f"{task}, steps as a prompt", part, by_seed=True))
    tables = "\n\n".join(parts)
    return f"""## Masked diffusion

![Accuracy against forward passes: rules, planner, planner and backbone](assets/mdlm_dultra.png)

Accuracy and forward passes (NFE) of every rule and planner, mean ± spread over the seeds. Sudoku: 4 x 4 with 4 clues.
Progressions: what is open is uncertain, and yet independent from group to group.
[`mdlm_dultra.json`](assets/bench/mdlm_dultra.json).

{tables}

Claim (dUltra): fewer forward passes than Fast-dLLM's rules, at no loss. Found: yes, on sudokus and on the
progressions that were trained to their end. Misses: on sudokus the planner alone needs more passes than the entropy
bound, and with the backbone one seed of three needs fewer; after joint training the rules alone are no longer right.

{diffusion_text()}

{statistics_kernel()}"""


def frontier(found, task, part, by_seed=False):
    """Returns the table of accuracy against forward passes on one task; settings with equal results share a row.

    by_seed: list the seeds' values instead of their mean and spread, as where one seed did not learn the task.
    """

    def cell(values, digits):
        return ", ".join(f"{x:.{digits}f}" for x in values) if by_seed else spread(values, digits)

    curves, rows = {}, {}
    for row in sorted(part["rows"], key=lambda row: row["seed"]):
        curves.setdefault((row["curve"], row["setting"]), []).append(row)
    for (curve, setting), at in curves.items():
        results = cell([row["accuracy"] for row in at], 3), cell([row["nfe"] for row in at], 2), len(at)
        rows.setdefault((curve, *results), []).append(setting)
    lines = [[curve, ", ".join(f"`{s}`" for s in settings), *results] for (curve, *results), settings in rows.items()]
    seconds = f" {part['seconds']:.0f} s." if "seconds" in part else ""
    return f"""### {task}

{sources(part, command=found["command"])}{seconds}

{table(["what decides", "setting", "right", "NFE", "seeds"], lines)}"""


def diffusion_text():
    """Returns the tables of masked diffusion on text beside an autoregressive model."""
    found = record("mdlm_text")
    trained = []
    for who, run in (*found["training"].items(), *((None, row) for row in found["cpu"]["rows"])):
        machine = {} if who else {"machine": found["cpu"]["machine"]}
        bpb = printed([run["val_bpb"], run.get("val_error")])
        trained.append([*origin(found, machine, run), bpb, run["seconds"], short(run.get("tokens_per_s"))])
    rates = [
        [row["rule"], row["sequences"], row["nfe"], row["tokens_per_forward"], row["tokens_per_s"]]
        for row in found["writing"]["rows"]
    ]
    rates += [
        ["autoregressive, cache and CUDA graphs", n, "", 1, x] for n, x in found["baseline"]["tokens_per_s"].items()
    ]
    head = ["command", "card", "torch", "commit", "bits per byte", "seconds", "tokens/s"]
    return f"""### Text

Masked diffusion (an upper bound on its bits per byte) and an autoregressive model of equal size, data and steps.
[`mdlm_text.json`](assets/bench/mdlm_text.json).

{table(head, trained)}

Sampling. {sources(found["writing"], found["baseline"], machine=found["machine"], commit=found["commit"])}

{table(["rule", "sequences", "NFE", "tokens per pass", "tokens/s"], rates)}

Miss: at this size masked diffusion is worse and slower. Its passes are over whole sequences, and a model that knows
little has little to unmask in parallel."""


def statistics_kernel():
    """Returns the table of the kernel that reads what every rule needs from the logits."""
    found = record("mdlm_statistics")
    share = f"{found['share_of_copy_rate']:.0%}"
    row = [short(found["kernel_ms"]), short(found["copy_ms"]), share, short(found["eager_ms"])]
    return f"""### Statistics of logits

Confidence, entropy, margin and token of bfloat16 logits [8 x 256, 126,464]: LLaDA's vocabulary.
[`mdlm_statistics.json`](assets/bench/mdlm_statistics.json). {sources(found)}

{table(["kernel, ms", "a copy of the logits, ms", "of the copy's rate", "PyTorch, ms"], [row])}"""


# ---- 9. benchmarks of models -----------------------------------------------------------------------------


def arena_hard():
    """Returns the section on benchmarks: arena_hard.json."""
    found = record("arena_hard")
    quality = [[name, *(f"{value:.4f}" for value in row.values())] for name, row in found["quality"].items()]
    picked, drawn = zip(*found["world"])
    rows = [[who, f"{mean(values):.1f}", " ".join(f"{x:.1f}" for x in values)]
            for who, values in (("picked by BenchBuilder", picked), ("drawn at random", drawn))]  # fmt: skip
    ahead = sum(a > b for a, b in found["world"])
    verbose = []
    for version in ("v0.1", "v2.0"):
        without, controlled = zip(*found[f"verbose, {version}"])
        verbose.append([version, spread(without, 0), spread(controlled, 0)])
    return f"""## Arena-Hard

[`arena_hard.json`](assets/bench/arena_hard.json). {sources(found)}

Benchmarks compared with Chatbot Arena by their released statistics: 20 models, the authors' figures to the last digit.

{table(["benchmark", *next(iter(found["quality"].values()))], quality)}

Claim (BenchBuilder): prompts that meet many criteria, from topics that do, separate models better. Found, in a world
of 12 models where harder prompts show more of a model's skill: yes, with {ahead} of {len(picked)} seeds. Share of
pairs of models separated by 120 prompts, in %.

{table(["prompts", "mean", "by seed"], rows)}

Claim (style control): a verbose model loses what its length won it. Found: yes. Elo of a verbose model above its true
place, mean of {len(without)} seeds, with a judge that likes long answers.

{table(["protocol", "without style control", "with it"], verbose)}

A bootstrap of 1,000 resamples, 20 models and 10,000 battles takes {found["bootstrap_seconds"]} s on
an idle machine with two cores."""


def ppe():
    """Returns the section on reward models: ppe.json."""
    found = record("ppe")
    studies, first = found["studies"], found["studies"][0]
    names, n = list(first["metrics"]), len(found["studies"])
    heads = [name.replace("human ", "").replace("best of K ", "K: ").replace("_", " ") for name in names]
    rows = [[model, *(f"{first['metrics'][name][model]:.3f}" for name in names), f"{elo:.0f}"]
            for model, elo in first["elo"].items()]  # fmt: skip
    counts = [[who, "{} of {}".format(*row["separability"]),
               " or ".join(f"{x:g} of {pairs}" for x, pairs in row["confidence_agreement"]), row["squared_ranks"]]
              for who, row in found["decoded"].items()]  # fmt: skip
    claims = []
    for name in names:
        of_seeds = [one["correlations"][name] for one in studies]
        low, high = of_seeds[0]["mean"]["ci"]
        seeds = [spread([one[kind]["r"] for one in of_seeds], 2) for kind in ("mean", "worst", "best")]
        claims.append([name.replace("_", " "), *seeds, f"{low:+.2f} to {high:+.2f}", f"{of_seeds[0]['mean']['p']:.4f}"])
    leads = [[one["lead"][name] for one in studies] for name in ("accuracy_over_spearman", "worst_over_best_domain")]
    rank, worst = (sum(lead > 0 for lead, _ in pairs) for pairs in leads)
    chances = [p for _, p in leads[0]]
    by_chance, least = f"{mean(chances):.2f}", f"{min(chances):.2f}"
    falls = {who: [max(one["curves"][who]) - one["curves"][who][-1] for one in studies] for who in ("oracle", "length")}
    length = first["curves"]["length"]
    best, typical = (spread([one["best"][name] for one in studies], 2) for name in ("best", "typical"))
    return f"""## Reward models

[`ppe.json`](assets/bench/ppe.json). {sources(found)}

The published table of PPE in counts: pairs of 20 models that a judge separates; pairs, of those that people separate,
on which it agrees with them (how many these are is not printed; all that fit are listed); the sum of squared rank
differences behind Spearman's rho. Its best correlation, {found["published_r"]} of nine reward models, has a 95 %
interval from {found["fisher"][0]:.2f} to {found["fisher"][1]:.2f}.

{table(["judge", "separates", "agrees", "squared ranks"], counts)}

Nine reward models in a small world of 12 domains, seed 0: metrics, mean over domains, and the Elo of the policy that
DPO trains with each.

{table(["reward model", *heads, "Elo"], rows)}

Claim: best of K shows where a reward is over-optimised. Found: yes. The best sample by a reward for length is right
with a chance of {max(length):.3f} for K = {1 + length.index(max(length))}, and {length[-1]:.3f} for K = {len(length)}.
With {n} seeds it ends {min(falls["length"]):.3f} to {max(falls["length"]):.3f} under its maximum, the oracle at most
{max(falls["oracle"]):.3f}.

Claim: accuracy foretells the policy better than rank correlation does. Found: its r is larger than Spearman's with
{rank} of {n} seeds. But of permuted ratings a share of {by_chance} has such a lead (mean over seeds; the least is
{least}): one study of nine reward models cannot show it. Claim: the worst domain foretells it better than the best.
Found: not here, accuracy's worst domain is ahead with {worst} of {n} seeds. But this world hardly tests it:
its trained reward models saw votes on all skills alike, so none is good at one and bad at another by design, and a
worst domain differs from the rest by noise or by how hard its slice is. What foretells it best here is the
best-of-K curve: DPO's chosen answers are the best of {first["tries"]}. Pearson's r with Elo, mean and deviation over
seeds; 95 % of resamples and permutation p of the mean over domains, seed 0.

{table(["metric", "mean over domains", "worst domain", "best domain", "interval", "p"], claims)}

Nine points and many columns: the best |r| of {first["best"]["columns"]} columns is {best}, and {typical} with
permuted ratings.

The seven metrics of 16,038 votes on 20 models, with 100 resamples, take {found["human_seconds"]} s."""


def mmmg():
    """Returns the section on evaluators of pictures and sound: mmmg.json."""
    found = record("mmmg")
    world = found["world"]
    heads = ["perfect", "grainy", "nothing", "extra", "wrong", "noisy", "drawn", "expected", "text only, published"]
    rows = [[f"`{task}`", *(f"{row[head]:.3f}" for head in heads)] for task, row in world.items()]
    off, chance = (max(abs(row["noisy"] - row[head]) for row in world.values()) for head in ("drawn", "expected"))
    mean = sum(row["noisy"] - row["expected"] for row in world.values()) / len(world)
    error = (1 / 5 * 4 / 5 / found["samples"]) ** 0.5  # of a share of a fifth
    near = sum(abs(row["noisy"] - row["expected"]) <= 0.03 for row in world.values())
    hurt = ", ".join(f"`{task}`" for task, row in world.items() if row["grainy"] < row["perfect"] - 1e-3)
    least, missed = min(row["perfect"] for row in world.values()), max(row["off"] for row in world.values())
    holes = [[what, f"{published:.2f}", f"{here:.2f}"] for what, published, here in found["loopholes"]]
    people = [[task, *("{:.3f} ({:.3f} to {:.3f})".format(*row[name]) for name in ("agreement", "kappa", "pearson"))]
              for task, row in found["alignment"]["tasks"].items()]  # fmt: skip
    return f"""## MMMG

[`mmmg.json`](assets/bench/mmmg.json). {sources(found)}

Evaluators in a closed world of {len(world)} tasks, {found["n"]} instructions each. The perfect renderer scores at
least {least:.4f}; a corruption misses its stated value by {missed:.4f} at most. The noisy renderer is wrong with
a probability of a fifth, {found["samples"]} answers a task. Its measured mean differs from the worth of what was
drawn by {100 * off:.2f} points at most. From what the rate says it differs by chance alone, with a standard error of
up to {100 * error:.1f} points: {100 * mean:+.2f} over all tasks, {100 * chance:.1f} at most, within 3 in {near} of
{len(world)}. A text-only generator ("nothing") is paid by the published rule of order alone.
"grainy": the perfect answer with noise of three levels of 255, and a thousandth of full scale.
Miss: SSIM sees what no eye does, in {hurt}.

{table(["task", *heads], rows)}

Loopholes of the published evaluators: the score that they pay, and the score here.

{table(["what", "published", "here"], holes)}

Simulated annotators, and their agreement with judges of known error; 95 % by a bootstrap over instructions. The
threshold of a similarity is found at {found["alignment"]["threshold"]:.2f}, on a grid of 100.

{table(["", "agreement", "kappa", "Pearson"], people)}"""


# ---- 10. the page ----------------------------------------------------------------------------------------

SECTIONS = (training, models, kernels, ssd_claims, nvfp4_kernels, decoding, passkey, lla, latent_moe,
            nvfp4_training, rewards, studies, diffusion, arena_hard, ppe, mmmg)  # fmt: skip


def render():
    """Returns the text of RESULTS.md."""
    head = """# Results

Every measured number of this repository, rendered from the records in [`assets/bench`](assets/bench) by
`python -m benchmarks.report`. A "-" stands for what a record does not say: the commit, mostly. Commands are spelt as
they are today.
"""
    return head + "\n" + "\n\n".join(filter(None, (section() for section in SECTIONS))) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--files"]:
        for _ in range(2):  # a line that was added changes the count of the files that need this one
            for paper in papers():
                write_files_line(paper)
    elif sys.argv[1:]:
        sys.exit("python -m benchmarks.report takes --files, or nothing")
    else:
        (ROOT / "RESULTS.md").write_text(render(), encoding="utf-8")
        print(f"RESULTS.md: {lines_of([ROOT / 'RESULTS.md'])} lines")
