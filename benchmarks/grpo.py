"""python -m benchmarks.grpo: how fast a GPU samples 1,024 answers at once; writes assets/bench/grpo.json.

The model is new and hardly ever ends an answer, so all rows go on to the last token. `rollout_tokens_per_s` in the
log.jsonl of a run is the rate with answers that end.
"""

import json
import time
from dataclasses import replace

import numpy as np
import torch

from benchmarks.harness import ROOT, provenance
from common.data import Tokenizer
from common.tasks import environment, sample_task
from decoding import DecodeSession
from grpo import PRESETS
from nano_hybrid import Hybrid
from rollouts import sample_answers

LENGTHS = (16, 48, 128, 512)  # tokens of an answer, at most


def rollout_rate(model, tokenizer, prompts, max_new_tokens, repeats=5):
    """Returns the median of tokens per second over `repeats` calls of sample_answers, the first call left out."""
    rates, session = [], DecodeSession()
    for _ in range(repeats + 1):  # the first compiles
        torch.cuda.synchronize()
        began = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16):
            answers = sample_answers(model, tokenizer, prompts, max_new_tokens, session=session)
        rates.append(answers.mask.sum().item() / (time.perf_counter() - began))
    return sorted(rates[1:])[repeats // 2]


def main(n_prompts=128, G=8):
    """Prints tokens per second by length, and writes the record."""
    if not torch.cuda.is_available():
        raise SystemExit("benchmarks.grpo: there is no CUDA device")
    rng, source, rows = np.random.default_rng(0), provenance(), []
    sizes = dict(hidden_size=384, num_attention_heads=6, num_key_value_heads=6, intermediate_size=1536)
    model = Hybrid(replace(PRESETS["grpo"], vocab_size=320, mamba_num_heads=12, **sizes)).to("cuda")
    prompts = [sample_task(environment("tool"), rng).prompt for _ in range(n_prompts) for _ in range(G)]
    print(f"{model.num_parameters() / 1e6:.1f}M parameters, {len(prompts)} answers, bfloat16; all of `sample_answers`")
    for length in LENGTHS:
        rate = rollout_rate(model, Tokenizer("bytes"), prompts, length)
        rows.append(dict(max_new_tokens=length, tokens_per_s=rate, **source))
        print(f"up to {length:4} tokens: {rate:12,.0f} tokens/s")
    record = dict(source, answers=len(prompts), rollouts=rows)
    (ROOT / "assets" / "bench" / "grpo.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
