"""data.py: tokenizers, documents, token files, batches, tasks with a verifier."""

import pickle
import threading
import time
import warnings
from fractions import Fraction

import numpy as np
import pytest

from data import (
    ENVIRONMENTS,
    FIRST_FILLER,
    KEY_MARK,
    MOST_HUNG,
    PASSKEY_VOCAB,
    QUERY_MARK,
    THINK_END,
    Corpus,
    Countdown,
    Task,
    Tokenizer,
    cut_trace,
    environment,
    find_documents,
    is_held_out,
    load_corpus,
    map_tokens,
    passkey_batch,
    read_text,
    sample_task,
    score,
    score_all,
    split_documents,
)

TEXTS = [
    "",
    "?",
    "a",
    "\n\n\n",
    "def f(x):\n    return x  # ü 🙂\n",
    "\t mixed \r\n line\n\n    ends",
    "1234567890" * 3,
    "<|endoftext|>",
]


@pytest.mark.parametrize("name", ["python4k", "bytes"])
@pytest.mark.parametrize("text", TEXTS)
def test_decode_inverts_encode(name, text):
    tokenizer = Tokenizer(name)
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert all(0 <= i < tokenizer.n_vocab and i != tokenizer.end_of_text for i in ids)
    assert "".join(tokenizer.stream(iter(ids))) == text
    assert tokenizer.bytes_per_token[ids].sum() == len(text.encode()) if ids else text == ""
    assert tokenizer.text_bytes(np.array(ids, dtype=np.int64)) == text.encode()


def test_the_shipped_vocabulary_has_4096_tokens_and_fits_python():
    tokenizer = Tokenizer()
    assert tokenizer.n_vocab == 4096 and tokenizer.end_of_text == 4095
    assert tokenizer.bytes_per_token[tokenizer.end_of_text] == 0
    corpus = load_corpus()
    assert sum(tokenizer.bytes_per_token[corpus.val]) / len(corpus.val) > 3.2  # bytes of text a token stands for
    assert Tokenizer("bytes").n_vocab == 257


def test_a_character_is_streamed_only_when_it_is_whole():
    tokenizer = Tokenizer("bytes")
    parts = list(tokenizer.stream("é🙂".encode()))
    assert parts == ["", "é", "", "", "", "🙂", ""]
    assert tokenizer.decode([0xF0, 0x9F]) == "\ufffd"
    assert tokenizer.decode([300, -1, 65]) == "\ufffd\ufffdA"


@pytest.mark.parametrize("text", [" " * 3_000_000, "=" * 300_000, "\t \n" * 100_000, "a" * 300_000])
def test_texts_that_break_a_regular_expression_are_encoded(text):
    tokenizer = Tokenizer()
    assert tokenizer.text_bytes(np.array(tokenizer.encode(text))) == text.encode()


def test_an_unknown_tokenizer_is_named():
    with pytest.raises(ValueError, match="unknown tokenizer 'gpt5'; known: python4k, bytes, gpt2"):
        Tokenizer("gpt5")


def test_a_tokenizer_that_cannot_be_downloaded_is_explained(monkeypatch):
    import tiktoken

    def offline(name):
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(ValueError, match="downloaded on first use, and that failed"):
        Tokenizer("gpt2")


# ---- documents ----


def test_the_python_corpus_is_the_standard_library_without_tests():
    names = {name for name, _ in find_documents("python")}
    assert {"argparse.py", "json/decoder.py"} <= names
    assert not {"test", "tests", "site-packages"} & {folder for name in names for folder in name.split("/")}


def test_documents_keep_their_place_when_others_come(corpus_dir):
    before = find_documents(str(corpus_dir))
    (corpus_dir / "new.txt").write_text("new")
    after = find_documents(str(corpus_dir))
    for split in (0, 1):
        kept = [d for d in split_documents(after)[split] if d[0] != "new.txt"]
        assert kept == split_documents(before)[split]
    train, val = split_documents(after)
    assert len(train) + len(val) == 31 and not set(train) & set(val) and val


def test_a_glob_a_folder_and_a_file_are_corpora(corpus_dir, tmp_path):
    folder, pattern = (load_corpus(d, "bytes", 8, tmp_path / "c") for d in (str(corpus_dir), f"{corpus_dir}/*.txt"))
    assert np.array_equal(folder.train[0], pattern.train[0])
    file = load_corpus(str(corpus_dir / "3.txt"), "bytes", 8, tmp_path / "c")
    text = (corpus_dir / "3.txt").read_bytes()
    assert file.tokenizer.text_bytes(file.train[0]) + file.tokenizer.text_bytes(file.val) == text
    assert len(file.val) == pytest.approx(len(text) / 10, rel=0.1)


def test_hidden_files_and_folders_are_left_out(corpus_dir):
    (corpus_dir / ".git").mkdir()
    (corpus_dir / ".git" / "config").write_text("x")
    (corpus_dir / "deeper").mkdir()
    (corpus_dir / "deeper" / "a.txt").write_text("x")
    (corpus_dir / ".hidden").write_text("x")
    names = [name for name, _ in find_documents(str(corpus_dir))]
    assert len(names) == 31 and "deeper/a.txt" in names


def test_every_byte_of_every_document_is_there_once(corpus_dir, tmp_path):
    corpus = load_corpus(str(corpus_dir), "python4k", 8, tmp_path / "c")
    train, val = split_documents(find_documents(str(corpus_dir)))
    for tokens, documents in ((corpus.train[0], train), (corpus.val, val)):
        assert corpus.tokenizer.text_bytes(tokens) == b"".join(p.read_bytes() for _, p in documents)
        assert (tokens == corpus.tokenizer.end_of_text).sum() == len(documents)


def test_binary_files_are_left_out(tmp_path):
    (tmp_path / "x.bin").write_bytes(b"a\0b")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    assert read_text(tmp_path / "x.bin") == ""
    assert read_text(tmp_path / "latin.txt") == "caf\ufffd"


def test_tokens_are_encoded_once_and_again_when_the_text_changes(corpus_dir, tmp_path):
    def files():
        return {p.name: p.stat().st_mtime_ns for p in (tmp_path / "c").iterdir()}

    load_corpus(str(corpus_dir), "bytes", 8, tmp_path / "c")
    first = files()
    load_corpus(str(corpus_dir), "bytes", 8, tmp_path / "c")
    assert files() == first and len(first) == 2
    (corpus_dir / "1.txt").write_text("other")
    load_corpus(str(corpus_dir), "bytes", 8, tmp_path / "c")
    assert len(files()) == 4


@pytest.mark.parametrize(
    ("make", "context", "message"),
    [
        (lambda p: None, 8, "no such file, folder or glob"),
        (lambda p: p.mkdir(), 8, "no such file, folder or glob"),
        (lambda p: p.write_text(""), 8, "0 training tokens .* fewer than one window"),
        (lambda p: p.write_text("word"), 2, "leaves 0 tokens for validation"),
        (lambda p: p.write_text("word " * 20), 500, "training tokens .* smaller --context"),
    ],
)
def test_a_corpus_that_is_missing_empty_or_short_is_explained(make, context, message, tmp_path):
    make(tmp_path / "corpus")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_corpus(str(tmp_path / "corpus"), "bytes", context, tmp_path / "c")


# ---- token shards ----


def test_token_shards_are_read_with_and_without_a_header(tmp_path):
    tokens = np.arange(3000, dtype=np.uint16) % 257
    tokens.tofile(tmp_path / "train_000.bin")
    header = np.zeros(256, np.int32)
    header[:3] = 20240520, 1, 3000
    (tmp_path / "train_001.bin").write_bytes(header.tobytes() + tokens.tobytes())
    corpus = load_corpus(str(tmp_path / "*.bin"), "bytes", 16)
    assert np.array_equal(corpus.train[0], tokens)
    assert np.array_equal(np.concatenate([corpus.train[1], corpus.val]), tokens) and len(corpus.val) == 150
    tokens[:100].tofile(tmp_path / "val_000.bin")
    corpus = load_corpus(str(tmp_path / "*.bin"), "bytes", 16)
    assert len(corpus.val) == 100 and [len(t) for t in corpus.train] == [3000, 3000]


def test_shards_of_another_tokenizer_or_size_are_refused(tmp_path):
    np.full(100, 50000, np.uint16).tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match="beyond the 257 of --tokenizer=bytes"):
        load_corpus(str(tmp_path / "a.bin"), "bytes", 8)
    (tmp_path / "b.bin").write_bytes(b"123")
    with pytest.raises(ValueError, match="3 bytes do not divide"):
        map_tokens(tmp_path / "b.bin")


# ---- batches ----


def counting_corpus(*lengths):
    starts = np.cumsum([0, *lengths])
    return Corpus("", Tokenizer("bytes"), [np.arange(a, b) for a, b in zip(starts, starts[1:])], np.arange(50))


def test_targets_are_ids_one_later():
    ids, targets = counting_corpus(1000).batch(range(5), 16)
    assert ids.shape == targets.shape == (5, 16) and ids.dtype == np.int64
    assert np.array_equal(targets, ids + 1)


def test_a_batch_depends_on_seed_and_rows_only():
    corpus = counting_corpus(1000, 500)
    ids, _ = corpus.batch(range(40), 16, seed=3)
    corpus.batch(range(7), 16, seed=4)
    again = np.concatenate([corpus.batch(range(i, i + 10), 16, seed=3)[0] for i in (0, 10, 20, 30)])
    assert np.array_equal(ids, again)
    assert not np.array_equal(ids, corpus.batch(range(40), 16, seed=4)[0])


def test_an_epoch_shows_every_window_once_and_the_next_cuts_elsewhere():
    corpus = counting_corpus(1000, 500)
    windows = (1000 - 1) // 16 - 1 + (500 - 1) // 16 - 1
    firsts = [sorted(corpus.batch(range(e * windows, (e + 1) * windows), 16)[0][:, 0]) for e in (0, 1)]
    for starts in firsts:
        assert len(set(starts)) == windows and min(np.diff(starts)) >= 16
    assert firsts[0] != firsts[1]


def test_a_text_of_one_window_is_enough():
    ids, targets = counting_corpus(17).batch(range(3), 16)
    assert np.array_equal(ids, np.tile(np.arange(16), (3, 1))) and targets[0, -1] == 16


def test_validation_covers_every_token_once():
    corpus = counting_corpus(100)
    blocks = list(corpus.val_batches(context=8, batch_size=2))
    targets = np.concatenate([t.ravel() for _, t in blocks])
    assert np.array_equal(targets[targets >= 0], np.arange(1, 50))
    for ids, t in blocks:
        assert np.array_equal(t[t >= 0], ids[t >= 0] + 1)


def test_compressors_are_bits_per_byte():
    corpus = counting_corpus(100)
    corpus.val = np.array(corpus.tokenizer.encode("abc" * 10_000))
    assert all(0 < value < 0.1 for value in corpus.compressors().values())
    corpus.val = np.random.default_rng(0).integers(0, 256, 10_000)
    assert all(8 < value < 8.2 for value in corpus.compressors().values())


# ---- passkeys ----


@pytest.mark.parametrize(("depth", "place"), [(0, 0), (0.5, 7), (1, 14), (None, None)])
def test_a_passkey_text_asks_for_the_key_after_its_mark(depth, place):
    ids, targets = passkey_batch(np.random.default_rng(0), 50, 21, depth, digits=3)
    assert ids.shape == targets.shape == (50, 21) and ids.dtype == targets.dtype == np.int64
    assert (targets[:, :-3] == -100).all() and (targets[:, -3:] < 10).all()
    assert (ids[:, -2:] == targets[:, -3:-1]).all() and (ids[:, -3] == QUERY_MARK).all()
    rows, places = np.nonzero(ids == KEY_MARK)
    assert (rows == np.arange(50)).all()
    assert set(places) == {place} if place is not None else set(places) == set(range(15))
    for row, at in enumerate(places):
        assert (ids[row, at + 1 : at + 4] == targets[row, -3:]).all()
        filler = np.delete(ids[row, :-3], range(at, at + 4))
        assert (filler >= FIRST_FILLER).all() and (filler < PASSKEY_VOCAB).all()


def test_the_shortest_passkey_text_is_all_key_and_question():
    ids, _ = passkey_batch(np.random.default_rng(0), 4, 7, digits=3)
    assert (ids[:, [0, 4]] == [KEY_MARK, QUERY_MARK]).all() and (ids < FIRST_FILLER).all()


@pytest.mark.parametrize(
    ("length", "depth", "message"),
    [(10, None, "length=10 is too short"), (30, 1.5, "depth=1.5 must be"), (30, -0.1, "depth=-0.1 must be")],
)
def test_a_passkey_text_that_cannot_be_is_refused(length, depth, message):
    with pytest.raises(ValueError, match=message):
        passkey_batch(np.random.default_rng(0), 1, length, depth)


# ---- tasks with a verifier ----

SPECS = [
    *ENVIRONMENTS,
    "chain:4:off",
    "add:3:on",
    "add:off",
    "countdown:3",
    "json:5",
    "instruct:5",
    "tool:4",
    "lookup:60",
]
HOSTILE = [
    "", " ", "\n", "\0", " 5", "5 ", "05", "+5", "-5", "1_000", "1e9", "0x5", "\u00b2", "\u0663", "3+\u0665", "\ud800",
    "NaN", "null", "[]", "{", '"', "()", "(" * 120 + ")" * 120, "[" * 250, '{"a":' * 40, "9" * 250, "9**9**9",
    "get()", "get(get(get(", "nosuch(anna,age)", "get(zed,age)", "get(anna,__class__)", "__import__('os')", "add(1,2)",
    "-" * 250, THINK_END, THINK_END * 2, "<think>", "<think></think>", "</think>\n", "x" + THINK_END + "\0", "lambda:0",
    "3(5)", "(yield)", "a=1", "#", "\\", '"""', "%s{}", "A b", "no  no", "no no", "?!", "1" * 70_000, "x" * 1_000_000,
    "(" * 1_000_000, "\0" * 1_000_000, THINK_END * 200_000,
]  # fmt: skip


def tasks(spec, n=200, seed=0):
    env, rng = environment(spec), np.random.default_rng(seed)
    return [env.sample(rng) for _ in range(n)]


def with_answer(task, answer):
    """The task's demo with another answer."""
    thought, closed, _ = task.demo.rpartition(THINK_END)
    return thought + closed + answer


def answer_of(task):
    return task.demo.rpartition(THINK_END)[2]


@pytest.mark.parametrize("spec", SPECS)
def test_a_demo_is_right_short_and_ascii(spec):
    env = environment(spec)
    for task in tasks(spec):
        assert task.env == env.name and task.prompt.isascii() and task.demo.isascii()
        assert 0 < len(task.demo) < env.max_new_tokens  # room for the end-of-text token
        reward = task.verify(task.demo)
        assert type(reward) is float and reward == 1 or env.name.startswith("countdown") and reward == 0
        assert score(task, task.demo) == (reward, None)
        assert "\n" not in answer_of(task) and type(task.prompt) is type(task.demo) is str


@pytest.mark.parametrize("spec", SPECS)
def test_a_text_that_is_no_answer_scores_0_and_never_raises(spec):
    start = time.perf_counter()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for task in tasks(spec, 5):
            for text in HOSTILE:
                if text != answer_of(task):
                    assert task.verify(text) == 0, text[:50]
                    assert task.verify(with_answer(task, text)) == 0, text[:50]
    assert time.perf_counter() - start < 10


@pytest.mark.parametrize("spec", SPECS)
def test_a_right_answer_with_anything_around_it_is_wrong(spec):
    for task in tasks(spec, 50):
        answer = answer_of(task)
        for wrong in (answer[:-1], answer + "\0", answer + "\u0663", "~" + answer, answer + "#", answer + answer):
            assert task.verify(with_answer(task, wrong)) == 0 or task.env == "instruct" and wrong == answer[:-1]
        assert task.verify(task.demo + "x" * 300) == 0


@pytest.mark.parametrize("spec", SPECS)
def test_random_texts_are_judged_in_0_to_1(spec):
    rng = np.random.default_rng(1)
    for task in tasks(spec, 20):
        alphabet = list(task.demo + task.prompt + "()+-*/,09az")
        for _ in range(50):  # the task's own characters, so that some come close
            text = "".join(rng.choice(alphabet, rng.integers(1, 12)))
            assert task.verify(text) in (0, 1)


@pytest.mark.parametrize("spec", SPECS)
def test_a_task_is_a_function_of_the_generator(spec):
    first, again, other = ([(t.prompt, t.demo) for t in tasks(spec, 30, seed)] for seed in (0, 0, 1))
    assert first == again != other
    assert len({prompt for prompt, _ in first}) > 20


@pytest.mark.parametrize("spec", SPECS)
def test_a_task_can_be_sent_to_another_process(spec):
    task = tasks(spec, 1)[0]
    sent = pickle.loads(pickle.dumps(task))
    assert sent.prompt == task.prompt and sent.verify(task.demo) == task.verify(task.demo)


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_the_size_makes_prompts_longer_and_is_checked(name):
    cls = ENVIRONMENTS[name]
    easy, hard = cls.sizes[0], cls.sizes[-1]
    mean = [np.mean([len(t.prompt) for t in tasks(f"{name}:{size}", 50)]) for size in (easy, (easy + hard) // 2, hard)]
    assert mean == sorted(mean) and mean[0] < mean[2]
    assert all(t.verify(t.demo) == 1 or name == "countdown" for t in tasks(f"{name}:{hard}", 20))
    assert all(len(t.demo) < cls(hard).max_new_tokens and len(answer_of(t)) <= 256 for t in tasks(f"{name}:{hard}", 20))
    for size in (easy - 1, hard + 1):
        with pytest.raises(ValueError, match=rf"{name}:{size}: the size goes from {easy} \(easy\) to {hard} \(hard\)"):
            cls(size)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("sorting", "unknown environment 'sorting'; known: sort, countdown, add, chain, brackets, json, instruct"),
        ("", "unknown environment ''; known: sort"),
        ("sort:big", "'big' is neither a size nor on or off; write sort:4, say"),
        ("sort:-3", "'-3' is neither"),
        ("sort:", "'' is neither"),
        ("sort:1000", "sort:1000: the size goes from 2"),
        ("sort:4:on", "sort has no thinking to turn on or off"),
    ],
)
def test_an_environment_that_is_not_there_is_explained_in_one_line(spec, message):
    with pytest.raises(ValueError, match=message) as error:
        environment(spec)
    assert "\n" not in str(error.value)


def test_a_spec_sets_size_and_thinking():
    assert environment("sort:10").size == 10 and environment("countdown:3").size == 3
    assert environment("chain").think is True and environment("chain:off").think is False
    assert environment("add").think is None and environment("add:7:on").size == 7
    assert environment("chain:6:off").max_new_tokens < environment("chain:6").max_new_tokens


# ---- each environment's own rules ----


def test_countdown_takes_every_expression_that_hits_and_no_other():
    task = Task("countdown", "c3,5,2>16=", "", lambda answer: Countdown(3).hits(["3", "5", "2"], Fraction(16), answer))
    for right in ("(3+5)*2", "2*(3+5)", "(2*(5+3))", "2*((3+5))"):
        assert task.verify(right) == 1
    for wrong in ("3*5+1", "3+5*2", "(3+5)*2*2/2", "8*2", "2*(3+5", "2(3+5)", "2**(3+5)", "3+5", "+2*(3+5)", "16"):
        assert task.verify(wrong) == 0
    hits = Countdown(4).hits
    assert hits(["8", "3", "8", "3"], Fraction(24), "8/(3-8/3)")  # an exact fraction on the way
    assert not hits(["8", "3", "8", "3"], Fraction(24), "8/(3-3)*8") and not hits(["1", "1"], Fraction(1), "11")
    assert not Countdown(2).hits(["5", "5"], Fraction(1), "5//5")


def test_countdown_can_always_be_hit_and_its_demos_do_not_know_the_target():
    for task in tasks("countdown:2", 300):
        numbers, target = task.prompt[1:-1].split(">")
        a, b = numbers.split(",")
        tries = [f"{x}{sign}{y}" for x, y in ((a, b), (b, a)) for sign in "+-*/"]
        assert any(task.verify(text) for text in tries) and 0 <= int(target) <= 99
        assert task.demo in tries  # well-formed
    assert 0.1 < np.mean([t.verify(t.demo) for t in tasks("countdown:2", 500)]) < 0.4
    assert np.mean([t.verify(t.demo) for t in tasks("countdown:4", 500)]) < 0.1


@pytest.mark.parametrize("spec", ["add:1", "add:5", "add:20", "add:4:on"])
def test_sums_are_written_from_the_lowest_digit_up(spec):
    for task in tasks(spec):
        x, y = task.prompt.partition("=")[0][1:].split("+")
        assert int(answer_of(task)[::-1]) == int(x[::-1]) + int(y[::-1])
        assert x[-1] != "0" != y[-1] and answer_of(task)[-1] != "0"


def test_a_chain_has_no_precedence_and_its_thought_is_its_steps():
    for task in tasks("chain:7"):
        question = task.prompt.partition("=")[0][1:]
        value = int(question[0])
        *steps, answer = task.demo.split("\n")
        for i, step in enumerate(steps):
            sign, operand = question[1 + 2 * i], int(question[2 + 2 * i])
            result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % 7
            assert step == f"{value}{sign}{operand}={result}" and 0 < operand < 7
            value = result
        assert answer == f"</think>{value}" and len(steps) == 7
        assert [task.verify(with_answer(task, str(v))) for v in range(7)] == [v == value for v in range(7)]


def test_thinking_is_read_only_where_the_prompt_opens_it():
    for on, off in zip(tasks("chain:3"), tasks("chain:3:off")):
        assert on.prompt.endswith("=<think>\n") and off.prompt.endswith("=<think></think>")
        assert on.prompt.partition("<")[0] == off.prompt.partition("<")[0]
        answer = off.demo
        assert on.demo.endswith(THINK_END + answer) and "\n" in on.demo
        assert on.verify(THINK_END + answer) == 1  # an empty thought is a thought
        assert on.verify("\ufffd \0" + THINK_END + "9" + THINK_END + answer) == 1  # the last one counts
        assert on.verify(answer) == on.verify("<think>" + answer) == 0  # never closed
        assert off.verify(answer) == 1 and off.verify(on.demo) == off.verify(THINK_END + answer) == 0
        assert is_held_out(on) == is_held_out(off)


def test_a_cut_trace_keeps_whole_lines_and_the_answer():
    task = tasks("chain:4", 1)[0]
    lines = task.demo.splitlines(keepends=True)
    assert cut_trace(task.demo, 0) == lines[-1] and cut_trace(task.demo, 2) == "".join(lines[:2]) + lines[-1]
    assert cut_trace(task.demo, 9) == cut_trace(task.demo, 4) == task.demo
    assert all(task.verify(cut_trace(task.demo, n)) == 1 for n in range(6))
    assert cut_trace("113459", 1) == "113459"


def test_missing_brackets_close_the_last_opened_first():
    pairs = {"(": ")", "[": "]", "{": "}", "<": ">"}
    for task in tasks("brackets:12"):
        opened = []
        for bracket in task.prompt[1:-1] + task.demo:
            if bracket in pairs:
                opened.append(pairs[bracket])
            else:
                assert opened.pop() == bracket
        assert opened == []
        assert task.verify(task.demo + "()") == 0  # balanced, and more than is missing


def test_a_json_object_has_exactly_the_fields_and_types():
    fits = environment("json").fits
    schema = {"ab": str, "cd": int}
    assert fits(schema, '{"ab":"","cd":-5}') and fits(schema, '{ "cd": 7, "ab": "x" }')
    for wrong in (
        '{"ab":"x"}', '{"ab":"x","cd":7,"ef":1}', '{"ab":"x","cd":7,"cd":8}', '[["ab","x"],["cd",7]]',
        '{"ab":"x","cd":"7"}', '{"ab":"x","cd":7.0}', '{"ab":"x","cd":true}', '{"ab":"x","cd":1e3}',
        '{"ab":"x","cd":05}', '{"ab":"x","cd":NaN}', '{"ab":null,"cd":7}', '{"ab":"x","cd":{}}',
        '{"ab":"x","cd":7}{}', "{'ab':'x','cd':7}",
    ):  # fmt: skip
        assert not fits(schema, wrong), wrong
    assert fits({"a": bool, "b": list}, '{"a":false,"b":[{}]}') and not fits({"b": list}, '{"b":{"c":1}}')
    assert not fits({"a": bool}, '{"a":0}')


@pytest.mark.parametrize(
    ("rule", "right", "wrong"),
    [
        ("w2", "cat sun", "cat"),
        ("w1", "cat.", "cat sun."),
        ("^b", "bat cat", "cat bat"),
        ("+k", "oak", "oat"),
        ("-e", "cat", "the cat"),
        ("$!", "cat!", "cat?"),
    ],
)
def test_every_rule_can_be_kept_and_broken(rule, right, wrong):
    keeps = environment("instruct").keeps
    assert keeps([rule], right) and not keeps([rule], wrong)
    assert not any(keeps([rule], right.replace("a", a)) for a in ("A", "1", "\n", "  ")) and not keeps([rule], "")
    assert not keeps([rule, rule[0] + "z" if rule[0] != "w" else "w9"], wrong)


def test_a_looked_up_key_is_there_once():
    for task in tasks("lookup:600", 5):
        pairs, _, asked = task.prompt[1:-1].partition("?")
        pairs = [pair.split(":") for pair in pairs.split(",")]
        assert len(dict(pairs)) == len(pairs) == 600 and dict(pairs)[asked] == task.demo
        others = {value for _, value in pairs} - {task.demo}
        assert not any(task.verify(value) for value in others)


def test_a_tool_call_is_judged_by_its_result():
    env = environment("tool")
    wanted = env.database["anna"]["age"] + env.database["bert"]["room"]
    for right in ("add(get(anna,age),get(bert,room))", "add(get(bert,room),get(anna,age))"):
        assert env.finds(wanted, right)
    for wrong in (
        "get(anna,age)", "add(get(anna,age),get(bert,age))", "add(get(anna,age)get(bert,room))", "add(get(anna,age))",
        "sum(get(anna,age),get(bert,room))", "add(get(anna,age),get(zed,room))", "add(get(anna,age),get(bert,town))",
        "add(get(anna,age),get(bert,room)", "get(anna,age),get(bert,room)", "add", "add(add,add)",
        "get(get(anna,age),age)", "add(get(anna,age),add(get(bert,room)))", "get(*anna)", "get(if,age)", "(get,add)",
    ):  # fmt: skip
        assert not env.finds(wanted, wrong), wrong
    assert not env.finds(11, "11") and not env.finds(1, "age")


# ---- the split ----


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_one_prompt_in_eight_is_held_out_and_never_sampled_for_training(name):
    env, rng = environment(name), np.random.default_rng(0)
    train, held = ([sample_task(env, rng, side) for _ in range(100)] for side in (False, True))
    assert all(map(is_held_out, held)) and not any(map(is_held_out, train))
    assert not {task.key or task.prompt for task in train} & {task.key or task.prompt for task in held}
    keys = {task.key or task.prompt: task for task in tasks(name, 2000)}
    assert 0.05 < np.mean([is_held_out(task) for task in keys.values()]) < 0.2


def test_the_split_is_the_same_everywhere():
    held = [p for p in (f"s{i}=" for i in range(40)) if is_held_out(Task("sort", p, "", None))]
    assert held == ["s2=", "s10=", "s17=", "s22="]


def test_countdown_s_numbers_may_stand_in_any_order_on_one_side_of_the_split():
    seen = {}
    for task in tasks("countdown", 3000):
        numbers, target = task.prompt[1:-1].split(">")
        seen.setdefault((tuple(sorted(numbers.split(","))), target), []).append(task)
    twice = [same for same in seen.values() if len({task.prompt for task in same}) > 1]
    assert len(twice) > 20 and all(len({is_held_out(task) for task in same}) == 1 for same in twice)


def test_too_few_prompts_are_explained():
    class Single:
        name = "single"

        def sample(self, rng):
            return Task("single", "s2=", "", bool)

    assert sample_task(Single(), None, held_out=True).prompt == "s2="
    with pytest.raises(ValueError, match="single made no training prompt in 256 samples: too few are possible"):
        sample_task(Single(), None)


# ---- verifiers of one's own ----


def judged_by(check):
    return Task("mine", "p", "", check)


@pytest.mark.parametrize(
    ("verdict", "reward", "problem"),
    [
        (0.25, 0.25, None),
        (True, 1.0, None),
        (np.float32(0.5), 0.5, None),
        (float("nan"), 0.0, "verify returned nan"),
        (float("inf"), 0.0, "verify returned inf"),
        (1.5, 1.0, "verify returned 1.5, outside of [0, 1]"),
        (-2, 0.0, "verify returned -2.0, outside of [0, 1]"),
        (None, 0.0, "TypeError: float() argument must be a string or a real number, not 'NoneType'"),
        ("yes", 0.0, "ValueError: could not convert string to float: 'yes'"),
    ],
)
def test_a_reward_is_a_number_from_0_to_1(verdict, reward, problem):
    assert score(judged_by(lambda text: verdict), "x") == (reward, problem)
    assert score_all([judged_by(lambda text: verdict)] * 3, "xyz") == [(reward, problem)] * 3


@pytest.mark.parametrize("error", [KeyError("no"), RecursionError("deep"), SystemExit(3), AssertionError("x" * 999)])
def test_a_verifier_that_raises_costs_its_sample(error):
    def check(text):
        raise error

    reward, problem = score(judged_by(check), "x")
    assert reward == 0 and problem.startswith(type(error).__name__) and len(problem) <= 200
    good = judged_by(lambda text: 1)
    assert score_all([good, judged_by(check), good], "xyz") == [(1.0, None), (reward, problem), (1.0, None)]


def test_many_are_judged_in_order():
    tasks = [judged_by(lambda text, i=i: i / 100) for i in range(100)]
    assert score_all(tasks, ["x"] * 100) == [(i / 100, None) for i in range(100)] and score_all([], []) == []


def wait_for_hung_verifiers():
    for thread in threading.enumerate():
        if thread.name.startswith("hung verifier"):
            thread.join(10)
            assert not thread.is_alive()


def test_a_verifier_that_loops_costs_its_sample_and_ends():
    def check(text):
        while text == "loop":
            pass
        return 1

    texts = ["", "loop", "loop", "", "loop"]
    assert score_all([judged_by(check)] * 5, texts, 0.05) == [
        (0.0, "no verdict in 0.05 s") if text else (1.0, None) for text in texts
    ]
    wait_for_hung_verifiers()  # they are told to exit, and do


def test_verifiers_that_cannot_be_ended_do_not_pile_up():
    asked, release, other = [], threading.Event(), Task("other", "p", "", lambda text: 1)

    def check(text):
        asked.append(text)
        release.wait()

    hanging = [judged_by(check)] * (MOST_HUNG + 5)
    found = score_all([*hanging, other], ["x"] * len(hanging) + ["y"], 0.02)
    assert len(asked) == MOST_HUNG and [problem for _, problem in found[MOST_HUNG:]] == [
        *["not asked: 8 earlier verifiers still hang"] * 5, None
    ]  # fmt: skip
    assert found[-1] == (1.0, None)  # the others go on
    release.set()
    wait_for_hung_verifiers()
    assert score_all([judged_by(lambda text: 1)], ["x"], 5) == [(1.0, None)]  # and so does it, when they have ended
