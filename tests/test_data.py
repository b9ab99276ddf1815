"""common/data.py: tokenizers, documents, token files, batches."""


import numpy as np
import pytest

from common.data import (
    Corpus,
    Tokenizer,
    find_documents,
    load_corpus,
    map_tokens,
    read_text,
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
