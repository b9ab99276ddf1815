"""sample.py: what it prints, how it streams, what it refuses."""

import json
import os
import threading
from pathlib import Path

import pytest
import torch

import sample
from conftest import TINY, scramble
from mdlm_dultra import MaskedDiffusionLM
from nano_hybrid import Hybrid, HybridConfig


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A folder out/a with a model of random weights and the bytes tokenizer."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = scramble(Hybrid(HybridConfig(**(TINY | dict(vocab_size=320)))))
    model.save_pretrained("out/a", nanopapers={"tokenizer": "bytes"})
    return tmp_path / "out" / "a"


def make(capsys, *flags):
    assert sample.main(["--max_new_tokens=12", "--device=cpu", *flags]) == 0
    out, err = capsys.readouterr()
    assert "tokens/s" in err
    return out


def test_the_prompt_is_continued_and_repeats_with_the_seed(run, capsys):
    first, second, other = (make(capsys, "--prompt=def ", f"--seed={s}") for s in (1, 1, 2))
    assert first == second != other
    assert first.startswith("def ") and len(first) > len("def ")


@pytest.fixture
def python4k(run):
    """The same with the tokenizer python4k, which has tokens for " return" and for "    "."""
    torch.manual_seed(0)
    model = scramble(Hybrid(HybridConfig(**(TINY | dict(vocab_size=4160)))))
    model.save_pretrained("out/a", nanopapers={"tokenizer": "python4k"})
    return model.eval()


@pytest.mark.parametrize("prompt", ["def ", "x =    "])
def test_a_prompt_that_ends_in_spaces_goes_on_with_a_token_that_begins_with_them(python4k, capsys, prompt):
    tokenizer, *_ = sample.load_tokenizer(sample.Path("out/a"))
    ids = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
    spaces = tokenizer.decode(ids[-1:])
    assert spaces.isspace()
    logits = python4k(torch.tensor([ids[:-1]]))[0, -1]
    allowed = [i for i in range(tokenizer.n_vocab) if tokenizer.decode([i]).startswith(spaces)]
    best = max(allowed, key=lambda i: logits[i])
    text = make(capsys, f"--prompt={prompt}", "--temperature=0", "--stream=false")
    assert text.startswith(prompt.removesuffix(spaces) + tokenizer.decode([best])) and len(allowed) > 5
    after = list(python4k.generate([ids[:-1] + [best]], 11, 0))  # 12 tokens in all
    assert text.rstrip("\n") == (tokenizer.decode(ids[1:-1] + [best] + torch.cat(after).tolist())).rstrip("\n")
    texts = make(capsys, f"--prompt={prompt}", "--num_samples=8", "--temperature=1.5").split("\n---\n")
    assert len(set(texts)) == 8 and all(text.startswith(prompt) for text in texts)
    assert make(capsys, f"--prompt={prompt}", "--stream", "--seed=3") == make(capsys, f"--prompt={prompt}", "--seed=3")


def test_ends_of_a_prompt_that_are_no_spaces_stay_as_they_are(python4k, capsys):
    tokenizer, *_ = sample.load_tokenizer(sample.Path("out/a"))
    generator = torch.Generator().manual_seed(0)
    for prompt in ("", "def", "def f():\n    ", "\n"):
        ids = [tokenizer.end_of_text, *tokenizer.encode(prompt)]
        kept, first = sample.heal(sample.SampleConfig(temperature=1.0), python4k, tokenizer, ids, generator)
        assert kept == ids and first.shape == (1, 0)


def test_every_token_with_a_line_break_can_end_a_thought(python4k):
    tokenizer, *_ = sample.load_tokenizer(sample.Path("out/a"))
    budget = sample.thinking_budget(sample.SampleConfig(think=3), tokenizer)
    assert set(budget.line_breaks) == {i for i, text in enumerate(tokenizer.all_bytes) if b"\n" in text}
    assert len(budget.line_breaks) > 150 and budget.grace == 500


def test_padding_of_the_vocabulary_is_never_printed(run, capsys):
    model, tokenizer, *_ = sample.load(sample.SampleConfig(device="cpu"))
    assert model.config.vocab_size == 320 and tokenizer.n_vocab == 257
    with torch.no_grad():
        model.lm_head.weight[:257] = 0  # each of the 63 rows of padding has a good chance to be above that
    model.save_pretrained("out/a", nanopapers={"tokenizer": "bytes"})
    assert make(capsys, "--prompt=x", "--temperature=0").rstrip("\n") == "x" + 12 * "\0"


def test_weights_of_four_bits_write_and_say_so(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    sizes = TINY | dict(vocab_size=320, hidden_size=32, intermediate_size=48, mamba_head_dim=8)
    Hybrid(HybridConfig(**sizes)).save_pretrained("out/a", nanopapers={"tokenizer": "bytes"})
    assert sample.main(["--prompt=x", "--max_new_tokens=5", "--device=cpu", "--precision=nvfp4"]) == 0
    assert "0.04M parameters, cpu, float32, 6 layers' matrices in nvfp4" in capsys.readouterr().err
    assert sample.main(["--prompt=x", "--device=cpu", "--precision=fp4"]) == 2
    assert "--precision=fp4 is unknown; use bf16 or" in capsys.readouterr().err


def test_memory_that_runs_out_is_one_line(run, monkeypatch, capsys):
    def running_out(*args):
        raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate")

    monkeypatch.setattr(sample, "go_on", running_out)
    assert sample.main(["--prompt=x", "--device=cpu"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: no memory is left; take a smaller --num_samples")
    monkeypatch.setattr(sample, "go_on", lambda *args: torch.ones(2) @ torch.ones(3))  # a mistake of ours
    with pytest.raises(RuntimeError, match="size"):
        sample.main(["--prompt=x", "--device=cpu"])


def test_a_stream_is_the_same_text(run, capsys):
    assert make(capsys, "--prompt=é", "--stream") == make(capsys, "--prompt=é", "--stream=false")


def test_a_thought_is_closed_for_who_thinks_too_long(run, capsys):
    for budget in (0, 3):  # no line ends in so few tokens: 3, and all of the grace
        text = make(capsys, "--prompt=m3=<think>\n", f"--think={budget}", "--max_new_tokens=600", "--stream=false")
        thought, closed, _ = text.removeprefix("m3=<think>\n").partition("</think>")
        assert closed and (thought == "" if budget == 0 else 0 < len(thought.encode()) and "\n" not in thought[3:-1])
    assert sample.main(["--prompt=x", "--think=-1", "--device=cpu"]) == 2
    assert "--think=-1 must be a whole number of at least 0" in capsys.readouterr().err


def test_local_linear_attention_writes(run, capsys):
    changes = dict(vocab_size=320, hybrid_override_pattern="ML-L")
    scramble(Hybrid(HybridConfig(**(TINY | changes)))).save_pretrained(run, nanopapers={"tokenizer": "bytes"})
    text = make(capsys, "--prompt=é", "--stream", "--temperature=0")
    assert make(capsys, "--prompt=é", "--num_samples=2", "--temperature=0").split("\n---\n")[1] == text
    make(capsys, "--prompt=é", "--dtype=bfloat16")


def test_half_precision_keeps_the_vectors_in_float32(run, capsys):
    text = make(capsys, "--prompt=def ", "--temperature=0")
    assert make(capsys, "--prompt=def ", "--temperature=0", "--dtype=bfloat16")[:6] == text[:6]
    model, *_ = sample.load(sample.SampleConfig(dtype="bfloat16", device="cpu"))
    assert {p.dtype for p in model.parameters() if p.dim() > 1} == {torch.bfloat16}
    assert {p.dtype for p in model.parameters() if p.dim() == 1} == {torch.float32}


def test_biases_go_with_their_matrices_in_half_precision(run, capsys):
    changes = dict(vocab_size=320, use_bias=True, mlp_bias=True)
    scramble(Hybrid(HybridConfig(**(TINY | changes)))).save_pretrained("out/a", nanopapers={"tokenizer": "bytes"})
    assert make(capsys, "--prompt=def ", "--dtype=bfloat16").startswith("def ")


def test_several_samples_differ(run, capsys):
    texts = make(capsys, "--prompt=x", "--num_samples=3", "--temperature=2").split("\n---\n")
    assert len(texts) == 3 and len(set(texts)) == 3 and all(t.startswith("x") for t in texts)


def test_a_prompt_from_a_file_and_a_run_by_path(run, capsys):
    (run / "prompt.txt").write_text("from a file", encoding="utf-8")
    assert make(capsys, f"--prompt_file={run / 'prompt.txt'}", f"--run={run}").startswith("from a file")
    assert make(capsys, "--temperature=0", "--prompt=a") == make(capsys, "--top_k=1", "--prompt=a", "--seed=5")


@pytest.mark.parametrize(
    ("flags", "spoil", "message"),
    [
        (["--run=b"], None, "neither out/b nor b is a folder"),
        ([], "empty", "run python train.py first"),
        (["--prompt=a", "--prompt_file=b"], None, "choose one"),
        (["--prompt_file=missing.txt"], None, "missing.txt"),
        (["--prompt_file=binary.txt"], None, "binary.txt is not UTF-16: "),
        (["--temperature=-1"], None, "--temperature=-1.0 must be a number from 0 to 100"),
        (["--top_p=2"], None, "--top_p=2.0 must be a number from 1e-06 to 1"),
        (["--top_p=0"], None, "--top_p=0.0 must be a number from 1e-06 to 1"),
        (["--num_samples=0"], None, "--num_samples=0 must be a whole number of at least 1"),
        (["--num_samples=1000000000000"], None, "must be a whole number from 1 to 65536"),
        (["--tempreture=1"], None, "unrecognized arguments"),
        ([], "weights", "model.safetensors is damaged or not a safetensors file"),
        ([], "config", "config.json is not valid JSON"),
        ([], "tokenizer", "names no tokenizer"),
        ([], "vocabulary", "320 tokens in the model, 4096 in python4k"),
    ],
)
def test_a_mistake_gets_one_line_and_exit_status_2(flags, spoil, message, run, capsys):
    (run.parent.parent / "binary.txt").write_bytes(b"\xff\xfe\0")
    config = json.loads((run / "config.json").read_text())
    if spoil == "empty":
        run.rename(run.parent.parent / "elsewhere")
    elif spoil == "weights":
        (run / "model.safetensors").write_bytes((run / "model.safetensors").read_bytes()[:500])
    elif spoil == "config":
        (run / "config.json").write_text("{")
    elif spoil == "tokenizer":
        (run / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "nanopapers"}))
    elif spoil == "vocabulary":
        (run / "config.json").write_text(json.dumps(config | {"nanopapers": {"tokenizer": "python4k"}}))
    try:
        status = sample.main(["--device=cpu", *flags])
    except SystemExit as stop:
        status = stop.code
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("out/a:")]
    assert status == 2 and len(error) == 1 and message in error[0]


def test_transformers_opens_what_was_trained(run):
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(run)
    assert model.config.hybrid_override_pattern == TINY["hybrid_override_pattern"]


def test_drafts_give_the_same_greedy_text(run, capsys):
    changes = dict(vocab_size=320, num_nextn_predict_layers=1, mtp_hybrid_override_pattern="*-")
    scramble(Hybrid(HybridConfig(**(TINY | changes)))).save_pretrained(run, nanopapers={"tokenizer": "bytes"})
    texts = [make(capsys, "--prompt=def ", "--temperature=0", *draft) for draft in ([], ["--draft=3"])]
    assert texts[0] == texts[1]
    assert sample.main(["--prompt=def ", "--draft=3", "--max_new_tokens=9"]) == 0
    assert "tokens a forward pass; draft tokens accepted, by depth: " in capsys.readouterr().err


def test_a_model_without_a_predictor_says_what_drafts_need(run, capsys):
    assert sample.main(["--draft=3"]) == 2
    assert "num_nextn_predict_layers=1" in capsys.readouterr().err


def test_a_released_checkpoint_is_written_with_its_own_tokenizer(run, capsys):
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.ByteLevelBPETokenizer()
    tokenizer.train_from_iterator(
        ["def f(x): return x", "été 🙂"], vocab_size=300, special_tokens=["<unk>", "<s>", "</s>"]
    )
    tokenizer.save(str(run / "tokenizer.json"))
    config = json.loads((run / "config.json").read_text())
    del config["nanopapers"]
    (run / "config.json").write_text(json.dumps(config | {"bos_token_id": 1, "eos_token_id": [2, 11]}))
    texts = [make(capsys, "--prompt=été 🙂", f"--stream={stream}", "--seed=3") for stream in ("true", "false")]
    assert texts[0] == texts[1] and texts[0].startswith("été 🙂")
    _, _, prompt, stop = sample.load(sample.SampleConfig(prompt="def", device="cpu"))
    assert prompt[0] == 1 and stop == [2, 11]
    for ends, expected in ((None, []), ([], []), (7, [7]), (-1, [])):
        (run / "config.json").write_text(json.dumps(config | {"bos_token_id": 1, "eos_token_id": ends}))
        assert sample.load(sample.SampleConfig(prompt="def", device="cpu"))[3] == expected
        assert make(capsys, "--prompt=def").startswith("def")
    (run / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    assert sample.load(sample.SampleConfig(prompt="def", device="cpu"))[3] == [2]
    (run / "config.json").write_text(json.dumps(config | {"eos_token_id": "two"}))
    assert sample.main([]) == 2 and "eos_token_id='two'; it must be an id" in capsys.readouterr().err
    (run / "config.json").write_text(json.dumps(config))
    (run / "tokenizer.json").write_text("{}")
    assert sample.main([]) == 2 and "not a tokenizer.json" in capsys.readouterr().err


# ---- masked diffusion ----

BOTH_WAYS = TINY | dict(vocab_size=320, hybrid_override_pattern="*-*-")


@pytest.fixture
def text_model(run):
    """out/a as a masked diffusion model of text."""
    model = scramble(MaskedDiffusionLM(HybridConfig(**BOTH_WAYS | dict(rotary_base=1e4))))
    model.save_pretrained(run, nanopapers={"tokenizer": "bytes"})
    return run


@pytest.fixture
def task_model(run):
    """out/a as a model of a task of 16 letters, with a planner."""
    model = scramble(MaskedDiffusionLM(HybridConfig(**BOTH_WAYS), positions=16, planner=True))
    model.save_pretrained(run, nanopapers={"tokenizer": "bytes"})
    return run


@pytest.mark.parametrize("rule", [[], ["--rule=threshold:0.1"], ["--rule=top_k:3", "--block_size=4"]])
def test_a_diffusion_model_goes_on_from_a_prompt_and_draws_the_order(text_model, rule, capsys):
    flags = ["--prompt=def ", *rule, "--max_new_tokens=12", "--device=cpu"]
    texts = []
    for seed in (1, 1):
        assert sample.main([*flags, f"--seed={seed}"]) == 0
        out, err = capsys.readouterr()
        texts.append(out)
        assert "NFE " in err and "tokens each" in err and (text_model / "order.png").stat().st_size > 1000
    assert texts[0] == texts[1] and texts[0].startswith("def ") and len(texts[0].encode()) > 12


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("cache", [None, "prefix", "dual"])
def test_a_cache_writes_what_decode_writes_with_it(text_model, capsys, cache, temperature):
    flags = ["--prompt=def ", "--rule=top_k:2", "--block_size=5", "--max_new_tokens=13", "--num_samples=2", "--seed=3"]
    flags += [f"--temperature={temperature}", *([f"--cache={cache}"] if cache else [])]
    text = make(capsys, *flags)
    model, tokenizer, prompt, _ = sample.load(sample.SampleConfig(prompt="def ", device="cpu"))
    ids = torch.tensor([prompt + [model.mask_id] * 13] * 2)
    generator, options = torch.Generator().manual_seed(3), dict(temperature=temperature, block_size=5, cache=cache)
    decoded = sample.decode(model, ids, sample.rule_of("top_k:2", model), generator=generator, **options)
    rows = [row[1:] for row in decoded.ids.tolist()]
    rows = [row[: row.index(256)] if 256 in row else row for row in rows]
    assert text.rstrip("\n") == "\n---\n".join(map(tokenizer.decode, rows)).rstrip("\n")
    whole = sample.decode(model, ids, sample.rule_of("top_k:2", model), block_size=5)
    assert (decoded.layer_forwards < whole.layer_forwards).all() == bool(cache)


def test_a_cache_serves_a_planner_in_half_precision(task_model, capsys):
    flags = ["--prompt=__13______24____", "--block_size=8", "--dtype=bfloat16", "--temperature=0"]
    for cache in ("prefix", "dual"):
        assert make(capsys, *flags, f"--cache={cache}")


def test_unmasking_is_shown_step_by_step_as_plain_text_where_it_is_no_terminal(text_model, capsys):
    flags = ["--prompt=def ", "--rule=top_k:4", "--max_new_tokens=12", "--device=cpu", "--temperature=0"]
    assert sample.main([*flags, "--stream=false"]) == 0
    text = capsys.readouterr().out
    assert sample.main([*flags, "--stream"]) == 0
    frames = capsys.readouterr().out
    assert "\x1b" not in frames and frames.startswith("def " + sample.MASKED * 12 + "\n") and frames.endswith(text)


def test_the_screen_takes_a_text_that_grows_shorter(capsys):
    """An end of text that is written early cuts off what stands behind it."""
    screen = sample.Screen(sample.Tokenizer("bytes"), 319)
    for ids in ([319] * 40, [65] * 30 + [319] * 10, [65] * 9, []):
        screen.show(ids)
    assert capsys.readouterr().out.splitlines()[-2] == "A" * 9


def test_a_planner_fills_in_the_blanks_and_leaves_the_rest(task_model, capsys):
    for prompt in ("__13______24____", "a54+78="):
        assert make(capsys, f"--prompt={prompt}", "--temperature=0")
    assert make(capsys, "--prompt=__13______24____", "--dtype=bfloat16")  # what a GPU takes by itself
    model, tokenizer, ids, _ = sample.load(sample.SampleConfig(prompt="__13______24____", device="cpu"))
    assert sample.main(["--prompt=__13______24____", "--rule=factor:1", "--num_samples=2", "--device=cpu"]) == 0
    assert model.planner is not None and len(capsys.readouterr().out) > 5


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--draft=3"], "--draft has no meaning here: out/a is a masked diffusion model"),
        (["--top_k=3"], "--top_k has no meaning here"),
        (["--rule=thresh:0.9"], "rule='thresh'"),
        (["--rule=threshold:much"], "threshold takes no 'much'"),
        (["--rule=planner:much"], "planner takes no 'much'"),
        (["--rule=ancestral:0"], "ancestral takes no '0'"),
        (["--think=0"], "--think has no meaning here"),
        (["--block_size=0"], "--block_size=0 must be a whole number of at least 1"),
        (["--block_size=0", "--cache=dual"], "--block_size=0 must be a whole number of at least 1"),
        (["--cache=dual"], "cache='dual' is of blocks: it needs a block_size"),
        (["--cache=both", "--block_size=4"], "cache='both', expected prefix or dual"),
        (["--temperature=-1"], "--temperature=-1.0 must be a number from 0 to 100"),
        (["--prompt=1234123412341234"], "nothing to fill in"),
        (["--prompt=" + "_" * 17], "the prompt has 17 letters, the model 16 positions"),
    ],
)
def test_what_a_diffusion_model_cannot_do_gets_one_line(task_model, flags, message, capsys):
    assert sample.main(["--device=cpu", *flags]) == 2
    error = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("out/a:")]
    assert len(error) == 1 and message in error[0]


def test_an_autoregressive_model_has_no_rules(run, capsys):
    assert sample.main(["--cache=dual", "--device=cpu"]) == 2
    assert "--cache has no meaning here: out/a is no masked diffusion model" in capsys.readouterr().err
    assert sample.main(["--rule=threshold:0.9", "--device=cpu"]) == 2
    assert "--rule has no meaning here: out/a is no masked diffusion model" in capsys.readouterr().err


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names")
def test_a_prompt_from_a_pipe_is_read(run, capsys):
    os.mkfifo("pipe")
    writer = threading.Thread(target=lambda: Path("pipe").write_bytes("class Foo(é".encode()))
    writer.start()
    text = make(capsys, "--prompt_file=pipe", "--temperature=0")
    writer.join()
    assert text.startswith("class Foo(é")
    if Path("/dev/zero").exists():
        assert sample.main(["--prompt_file=/dev/zero", "--device=cpu"]) == 2
        assert "--prompt_file=/dev/zero is longer than 16,777,216 bytes" in capsys.readouterr().err
