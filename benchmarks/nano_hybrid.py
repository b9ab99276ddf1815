"""python -m benchmarks.nano_hybrid: how fast hybrids decode and read prompts on a GPU, beside bounds and peers."""

import itertools
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import torch

from decoding import generate
from experiments.nano_hybrid import attention_baseline, decode_speed, state_bytes
from nano_hybrid import PRESETS, Hybrid, HybridConfig

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
    n_sequences = int(room / state_bytes(config, read + write + 36, 2))
    lengths = [read, read + write // 2, read + write - 36]
    steps = []
    for length in lengths:
        steps.append(decode_speed(model, n_sequences, length, n_tokens=8)[0])
        torch.cuda.empty_cache()
    ids = torch.randint(config.vocab_size, (2, read), device="cuda")
    reading = seconds_of(lambda: model.model(ids, model.new_cache()), 2) / 2 * n_sequences
    writing = write * (steps[0] + 4 * steps[1] + steps[2]) / 6  # Simpson's rule
    return dict(texts=n_sequences, tokens_per_s=n_sequences * write / (reading + writing), reading_s=reading,
                writing_s=writing, step_ms=[1e3 * s for s in steps], parameters=model.num_parameters())  # fmt: skip


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
    states = state_bytes(config, length, 2) + state_bytes(config, 0, 2)  # states are read and written
    ids = torch.randint(config.vocab_size, (1, length), device="cuda")
    greedy, sampled = (seconds_a_token(generate(model, ids, 404, temperature)) for temperature in (0, 1))
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
        seconds_of(lambda n=n: generate(model, ids, min_new_tokens=n, max_new_tokens=n, **options), 1)
        for n in (n_tokens + 1, 1)
    )
    return dict(tokens_per_s=n_tokens / (all_ - first))


@torch.inference_mode()
def bench_reading(config, n_sequences=64, length=1024):
    """Returns tokens/s of reading prompts, and of the forward half of a training step, which is compiled."""
    model, ids = on_gpu(config), torch.randint(config.vocab_size, (n_sequences, length), device="cuda")
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
    for _ in generate(model, torch.randint(config.vocab_size, (1, length)), 65, temperature=0, prefill_size=piece):
        torch.cuda.synchronize()
        times.append(time.perf_counter())
    later = statistics.median(b - a for a, b in zip(times[2:], times[3:]))
    return dict(reading_s=times[1] - times[0], tokens_per_s=1 / later,
                peak_gb=(torch.cuda.max_memory_allocated() - before) / 1e9,
                predicted_gb=state_bytes(config, length, 2) / 1e9)  # fmt: skip


def bench():
    """Measures all of that on this GPU, prints it, and writes assets/bench/writing.json."""
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.nano_hybrid times a GPU; there is none here")
    small = PRESETS["small"]
    rows = {
        "1B, 8K in, 16K out": partial(bench_long_answers, BILLION),
        "its attention-only baseline": partial(bench_long_answers, attention_baseline(BILLION)),
        "small, one text": partial(bench_one_text, small),
        "the same through transformers": partial(bench_transformers, small),
        "1B, one text": partial(bench_one_text, BILLION),
        "small, reading": partial(bench_reading, small),
        "small, a million tokens": partial(bench_million, small),
    }
    record = dict(
        machine=f"{torch.cuda.get_device_name()}, torch {torch.__version__}", command="python -m benchmarks.nano_hybrid"
    )
    path = Path(__file__).parent.parent / "assets" / "bench" / "writing.json"
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


if __name__ == "__main__":
    bench()
