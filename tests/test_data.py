"""common/data.py: tokenizers, documents, token files, batches."""

import gzip
import os
import random
import socket
import sys
import tracemalloc
from types import SimpleNamespace

import numpy as np
import pytest

import train
from common import data as data_module
from common.data import (
    LONGEST_VALIDATION,
    VALIDATION_SHARE,
    Corpus,
    Tokenizer,
    load_corpus,
    place,
    split_documents,
)
from common.files import READ_AT_ONCE, find_documents, map_tokens, read_document, shown

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
        (lambda p: p.write_text(""), 8, "is empty: 0 training tokens in 1 file"),
        (lambda p: p.write_text("word"), 2, "leaves 0 tokens for validation"),
        (lambda p: p.write_text("word " * 20), 500, "training tokens .* smaller --context"),
    ],
)
def test_a_corpus_that_is_missing_empty_or_short_is_explained(make, context, message, tmp_path):
    make(tmp_path / "corpus")
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        load_corpus(str(tmp_path / "corpus"), "bytes", context, tmp_path / "c")


def text_of(corpus):
    """Returns the bytes that a corpus of one training array reads."""
    return corpus.tokenizer.text_bytes(corpus.train[0]) + corpus.tokenizer.text_bytes(corpus.val)


def one_line(error):
    """Returns the message of a caught exception, which has to be one line that can be printed."""
    message = str(error.value)
    assert message.isprintable() and len(message) < 400
    return message


# ---- encodings ----

POSIX = pytest.mark.skipif(os.name != "posix", reason="Windows has no pipes among its files, and links need rights")

STORY = "Ünïcode, 日本語 and 🙂.\r\nNext line\rthe same\n" * 40


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_a_text_with_a_mark_is_read_as_what_it_is(encoding, tmp_path):
    mark = "\ufeff" if encoding in ("utf-16-le", "utf-16-be") else ""
    (tmp_path / "a.txt").write_bytes((mark + STORY).encode(encoding))
    corpus = load_corpus(str(tmp_path / "a.txt"), "bytes", 8, tmp_path / "c")
    assert text_of(corpus).decode() == STORY  # no mark, no other line ends
    assert not any("left out" in note for note in corpus.notes)


NOT_TEXT = {
    "latin1.txt": ("café au lait".encode("latin-1"), "is not UTF-8: byte 0xe9 at 3; .* convert it: iconv"),
    "shift-jis.txt": ("日本語".encode("shift-jis"), "is not UTF-8: byte 0x93 at 0"),
    "cut.txt": ("abc🙂".encode()[:-1], "is not UTF-8: byte 0xf0 at 3"),
    "utf16.txt": ("no mark".encode("utf-16-le"), "is not text but binary: it holds NUL bytes"),
    "odd.txt": ("mark".encode("utf-16")[:-1], "is not UTF-16"),
    "surrogate.txt": b"\xff\xfe\x00\xd8a\0", "zip.zip": None,
    "nul.txt": (b"text\0text", "is not text but binary: it holds NUL bytes"),
    "a.txt.gz": (gzip.compress(b"text" * 50), r"is packed \(gzip\): unpack it"),
}  # fmt: skip
NOT_TEXT["surrogate.txt"] = (NOT_TEXT["surrogate.txt"], "is not UTF-16")
NOT_TEXT["zip.zip"] = (b"PK\x03\x04 and more", r"is packed \(zip\)")


@pytest.mark.parametrize("name", NOT_TEXT)
def test_what_is_not_text_is_named_and_refused(name, tmp_path):
    content, message = NOT_TEXT[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_corpus(str(tmp_path / name), "bytes", 2, tmp_path / "c")
    assert name in one_line(error) and not (tmp_path / "c").exists()


def test_in_a_folder_what_is_not_text_is_left_out_and_counted(corpus_dir, tmp_path):
    clean = load_corpus(str(corpus_dir), "bytes", 8, tmp_path / "c")
    for name, (content, _) in NOT_TEXT.items():
        (corpus_dir / name).write_bytes(content)
    corpus = load_corpus(str(corpus_dir), "bytes", 8, tmp_path / "c")
    assert np.array_equal(corpus.train[0], clean.train[0]) and np.array_equal(corpus.val, clean.val)
    assert "\ufffd".encode() not in text_of(corpus)
    (note,) = [note for note in corpus.notes if note.startswith("left out")]
    for reason in (
        "3 not UTF-8 (",
        "2 not UTF-16 (",
        "2 not text but binary (",
        "1 packed (gzip) (",
        "1 packed (zip) (",
    ):
        assert reason in note
    assert not [note for note in clean.notes if note.startswith("left out")]


def test_a_folder_without_text_says_what_is_there(tmp_path):
    (tmp_path / "x").mkdir()
    for i in range(5):
        (tmp_path / "x" / f"{i}.png").write_bytes(b"\x89PNG\r\n")
    with pytest.raises(ValueError, match=r"has no text: 5 not UTF-8 \(.*0.png, .*1.png, .*2.png, \.\.\.\)") as error:
        load_corpus(str(tmp_path / "x"), "bytes", 8, tmp_path / "c")
    one_line(error)


def test_what_is_wrong_is_found_wherever_it_stands(tmp_path):
    for place_of_fault in (READ_AT_ONCE - 1, READ_AT_ONCE, 2 * READ_AT_ONCE + 5):
        content = bytearray(b"a" * (2 * READ_AT_ONCE + 10))
        content[place_of_fault] = 0xE9
        (tmp_path / "a.txt").write_bytes(content)
        with pytest.raises(ValueError, match=f"byte 0xe9 at {place_of_fault:,}"):
            load_corpus(str(tmp_path / "a.txt"), "bytes", 8, tmp_path / "c")
    whole = "a" + "é" * READ_AT_ONCE  # a character across each two blocks
    (tmp_path / "a.txt").write_text(whole, encoding="utf-8")
    document = read_document("a.txt", tmp_path / "a.txt")
    assert document.length == len(whole) and "".join(document.pieces(0, document.length)) == whole
    assert "".join(document.pieces(100_000, 300_001)) == whole[100_000:300_001]


@pytest.mark.parametrize("tokenizer", ["bytes", "python4k"])
def test_the_memory_for_a_file_does_not_grow_with_it(tokenizer, tmp_path, monkeypatch):
    peaks = []
    monkeypatch.setattr(data_module, "ENCODED_AT_ONCE", 2**18)
    monkeypatch.setattr(data_module, "LONGEST_VALIDATION", 2**10)
    for megabytes in (2, 4):
        (tmp_path / "big.txt").write_text("x = 1\n" * (megabytes * 2**20 // 6))
        tracemalloc.start()
        load_corpus(str(tmp_path / "big.txt"), tokenizer, 8, tmp_path / f"{megabytes}")
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.1 * peaks[0]


def test_a_file_that_changes_while_it_is_read_is_named_and_nothing_is_kept(corpus_dir, tmp_path, monkeypatch):
    read = data_module.split_texts

    def and_shorten(documents):
        (corpus_dir / "3.txt").write_text("short")
        return read(documents)

    monkeypatch.setattr(data_module, "split_texts", and_shorten)
    with pytest.raises(ValueError, match="3.txt changed while it was read"):
        load_corpus(str(corpus_dir), "bytes", 8, tmp_path / "c")
    assert not list((tmp_path / "c").iterdir())


@pytest.mark.parametrize("tokenizer", ["bytes", "python4k"])
def test_the_text_of_a_special_token_is_plain_text_and_that_is_said_once(corpus_dir, tokenizer, tmp_path):
    for name in ("3.txt", "4.txt"):
        (corpus_dir / name).write_text("one<|endoftext|>two<|endoftext|>")
    corpus = load_corpus(str(corpus_dir), tokenizer, 8, tmp_path / "c")
    notes = [note for note in corpus.notes if "<|endoftext|>" in note]
    assert notes == ["<|endoftext|> in 2 documents is read as plain characters, not as a special token"]
    n = sum((tokens == corpus.tokenizer.end_of_text).sum() for tokens in (corpus.train[0], corpus.val))
    assert n == 30 and b"one<|endoftext|>two<|endoftext|>" in text_of(corpus)
    again = load_corpus(str(corpus_dir), tokenizer, 8, tmp_path / "c")  # from the cache
    assert again.notes == corpus.notes


def test_a_special_token_across_two_blocks_is_found(tmp_path):
    (tmp_path / "a.txt").write_text("a" * (READ_AT_ONCE - 5) + "<|endoftext|>")
    assert read_document("a.txt", tmp_path / "a.txt", {"<|endoftext|>", "<|x|>"}).special == {"<|endoftext|>"}


# ---- what is found ----


def names(data, left_out=None):
    """Returns the names of the documents of a corpus."""
    return [name for name, _ in find_documents(str(data), left_out)]


@pytest.fixture
def tree(tmp_path):
    """A folder of folders."""
    for name in ("a.txt", "b.md", "one/a.txt", "one/two/a.txt", "one/two/c.md", "x[1].txt", ".git/config", "é 1.txt"):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"text of {name}")
    return tmp_path / "tree"


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("", ["a.txt", "b.md", "one/a.txt", "one/two/a.txt", "one/two/c.md", "x[1].txt", "é 1.txt"]),
        ("*.txt", ["a.txt", "x[1].txt", "é 1.txt"]),
        ("*/a.txt", ["one/a.txt"]),
        ("**/a.txt", ["a.txt", "one/a.txt", "one/two/a.txt"]),
        ("**", ["a.txt", "b.md", "one/a.txt", "one/two/a.txt", "one/two/c.md", "x[1].txt", "é 1.txt"]),
        ("**/two/**/*.md", ["one/two/c.md"]),
        ("**/**/**/**/*.md", ["b.md", "one/two/c.md"]),
        ("o?e", ["one/a.txt", "one/two/a.txt", "one/two/c.md"]),
        ("[ab].*", ["a.txt", "b.md"]),
        ("x[1].txt", ["x[1].txt"]),
        (".git/*", ["config"]),
    ],
)
def test_a_glob_finds_what_a_shell_would(tree, pattern, found):
    assert names(os.path.join(tree, pattern)) == found


@POSIX
def test_what_is_not_followed_is_noted(tree):
    (tree / "one" / "up").symlink_to(tree)
    (tree / "broken.txt").symlink_to(tree / "nothing")
    os.mkfifo(tree / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(tree / "socket"))
    (tree / "run").mkdir()
    (tree / "run" / "trainer.pt").write_text("")
    (tree / "run" / "log.jsonl").write_text("")
    left_out = {}
    assert len(names(tree, left_out)) == 7
    assert {reason: sorted(os.path.relpath(p, tree) for p in paths) for reason, paths in left_out.items()} == {
        "hidden": [".git"],
        "behind links to folders": ["one/up"],
        "that cannot be opened: No such file or directory": ["broken.txt"],
        "not a file but a device, pipe or socket": ["pipe.txt", "socket"],
        "written by train.py": ["run"],
    }
    assert names(tree / "one" / "up" / "*.md") == ["b.md"]  # a link that is named is followed


def test_a_folder_that_nobody_may_open_is_noted(tree, monkeypatch):
    listdir = os.listdir

    def denied(path):
        if str(path).endswith("two"):
            raise PermissionError(13, "Permission denied", path)
        return listdir(path)

    monkeypatch.setattr(os, "listdir", denied)
    left_out = {}
    assert "one/a.txt" in names(tree, left_out) and "one/two/a.txt" not in names(tree)
    assert left_out["that cannot be opened: Permission denied"] == [str(tree / "one" / "two")]


@POSIX
def test_links_in_circles_end(tree):
    for a in "pqr":
        for b in "pqr":
            (tree / a).mkdir(exist_ok=True)
            (tree / a / f"to-{b}").symlink_to(tree / b)
    assert len(names(tree / "**" / "*.txt")) == 5
    assert len(names(tree)) == 7


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="needs Linux's /proc")
@pytest.mark.parametrize(
    "data", ["/proc/self", "/proc/self/status", "/proc/**", "/sys", "/proc/uptime", "/proc/*/maps"]
)
def test_the_kernels_files_are_not_data(data):
    with pytest.raises(ValueError, match="has nothing to read: .* of the operating system, not stored") as error:
        find_documents(data)
    one_line(error)


@pytest.mark.parametrize("data", ["", "\0", "a\0b", "\ud800", "a\nb", "no/such/*.txt", "~nobody/x", "[", "/dev/zero"])
def test_a_path_that_is_none_gets_one_line(data):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        find_documents(data)
    assert "--data=" in one_line(error)


def test_a_tilde_is_the_home_folder(tree, monkeypatch):
    monkeypatch.setenv("HOME", str(tree))
    monkeypatch.setenv("USERPROFILE", str(tree))
    assert names("~/*.md") == ["b.md"] and names("~/a.txt") == ["a.txt"]


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' names are Unicode")
def test_names_that_are_not_utf8_or_hold_line_breaks_are_read_and_shown(tmp_path):
    for name in (b"latin-\xe9.txt", b"two\nlines.txt"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(b"word " * 100)
    corpus = load_corpus(str(tmp_path), "bytes", 8, tmp_path / "c")
    assert text_of(corpus) == b"word " * 200
    assert all(note.isprintable() for note in corpus.notes)
    assert shown("latin-\udce9\n") == r"latin-\udce9\n"
    with pytest.raises(ValueError, match=r"tokens .* smaller --context") as error:
        load_corpus(os.fsdecode(os.path.join(os.fsencode(tmp_path), b"latin-\xe9.txt")), "bytes", 10**6, tmp_path / "c")
    one_line(error)


@POSIX
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda p: (p / "d").write_bytes("été".encode("latin-1") * 500), "not UTF-8"),
        (lambda p: (p / "d").write_bytes(gzip.compress(os.urandom(5000))), "packed (gzip)"),
        (lambda p: os.mkfifo(p / "d"), "1 not a file but a device, pipe or socket"),
        (lambda p: (p / "d").symlink_to("/proc/self"), "has nothing to read"),
        (lambda p: (p / "d").symlink_to(p / "d"), "cannot be opened"),
    ],
)
def test_train_ends_with_one_line_and_status_2(make, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    for data in ("d", "**"):
        assert train.main([f"--data={data}", "--device=cpu", "--steps=1"]) == 2
        error = capsys.readouterr().err.strip()
        assert message in error and error.count("\n") == 0 and "Traceback" not in error
    assert [p.name for p in tmp_path.iterdir()] == ["d"]


# ---- splits ----


def side(documents):
    """Returns name -> 0 for training, 1 for validation."""
    return {d[0]: i for i, part in enumerate(split_documents(documents)) for d in part}


def test_a_document_that_comes_or_goes_moves_no_other():
    rng = random.Random(0)
    for _ in range(300):
        documents = [(f"{rng.randrange(10**6)}.txt", "") for _ in range(rng.randint(1, 40))]
        new = [(f"{rng.randrange(10**6)}.md", "")]
        assert side(documents).items() <= side(documents + new).items()
        assert all(part == sorted(part, key=lambda d: place(d[0])) for part in split_documents(documents)[1:])


def test_a_second_folder_in_a_glob_moves_no_file(tmp_path):
    for folder in "ab":
        (tmp_path / folder).mkdir()
    for i in range(100):
        (tmp_path / "a" / f"{i}.txt").write_text("x")
    before = side(find_documents(str(tmp_path / "*" / "*.txt")))
    assert {0, 1} == set(before.values())
    for i in range(100):
        (tmp_path / "b" / f"{i}.txt").write_text("x")
    after = side(find_documents(str(tmp_path / "*" / "*.txt")))
    assert before.items() < after.items()
    assert after == side(find_documents(str(tmp_path))) == side(find_documents(str(tmp_path / "**" / "*.txt")))


def test_places_are_at_least_0_and_less_than_1(monkeypatch):
    for byte, value in ((b"\x00", 0), (b"\xff", 1 - 2**-53)):
        monkeypatch.setattr(
            data_module.hashlib, "sha256", lambda b, byte=byte: SimpleNamespace(digest=lambda: byte * 32)
        )
        assert place("x") == value < 1
    monkeypatch.undo()
    assert place("caf\u00e9.txt") == place("cafe\u0301.txt") != place("cafe.txt")
    share = np.mean([place(str(i)) < VALIDATION_SHARE for i in range(20_000)])
    assert abs(share - VALIDATION_SHARE) < 0.005


def named(validation, n=0):
    """Returns the n-th file's name that the hash puts into validation, or not."""
    candidates = (f"{i}.txt" for i in range(1000))
    return [name for name in candidates if (place(name) < VALIDATION_SHARE) == validation][n]


def test_the_split_is_of_files_that_can_be_read(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / named(True)).write_bytes(b"\xe9\xe9\xe9")
    for i in range(3):
        (folder / named(False, i)).write_text(f"{i} " * 200)
    corpus = load_corpus(str(folder), "bytes", 8, tmp_path / "c")
    assert len(corpus.val) == 3 * (40 + 1)  # a tenth of each, each after an end of text
    assert (
        corpus.notes[0]
        == "validation is the end of each of the 3 documents: with more documents it would be whole ones"
    )
    text = corpus.tokenizer.text_bytes(corpus.val)
    assert text == b"0 " * 20 + b"1 " * 20 + b"2 " * 20 and len(text_of(corpus)) == 1200


def test_a_validation_part_of_one_document_or_of_few_tokens_is_said(tmp_path):
    folder = tmp_path / "x"
    folder.mkdir()
    (folder / named(True)).write_text("v" * 500)
    for i in range(30):
        (folder / named(False, i)).write_text(f"{i} " * 200)
    (folder / named(False, 0)).write_text("v" * 500)
    corpus = load_corpus(str(folder), "bytes", 8, tmp_path / "c")
    assert f"validation is one document, {named(True)}: more files would make it a fairer measure" in corpus.notes
    assert "validation is short, 501 tokens: val_loss is known to about +-0.11 nats" in corpus.notes
    assert any("1 also training documents, word for word" in note for note in corpus.notes)


def test_names_that_say_validation_do_not_split_texts_and_that_is_said(corpus_dir, tmp_path):
    for name in ("stories-train.txt", "stories-valid.txt"):
        (corpus_dir / name).write_text(name * 100)
    corpus = load_corpus(str(corpus_dir), "bytes", 8, tmp_path / "c")
    assert any("by a hash whatever their names say: 1 named validation (stories-valid.txt)" in n for n in corpus.notes)


def test_the_default_corpus_has_no_notes():
    assert load_corpus("python", "python4k", 8).notes == []


# ---- token files ----


def llm_c(tokens, magic=20240520, version=1, count=None):
    """Returns the bytes of a file as llm.c's write_datafile makes it."""
    header = np.zeros(256, np.int32)
    header[:3] = magic, version, len(tokens) if count is None else count
    return header.tobytes() + tokens.tobytes()


TOKENS = np.random.default_rng(0).integers(0, 4096, 3000)


def test_token_files_of_every_kind_are_read(tmp_path):
    np.save(tmp_path / "a.npy", TOKENS.astype(np.uint16))
    np.save(tmp_path / "big-endian.npy", TOKENS.astype(">i4"))
    (tmp_path / "b.npy").write_bytes(TOKENS.astype(np.uint16).tobytes())  # OLMo's have no header
    (tmp_path / "nanogpt.bin").write_bytes(TOKENS.astype(np.uint16).tobytes())
    (tmp_path / "u32.bin").write_bytes(TOKENS.astype(np.uint32).tobytes())
    (tmp_path / "gpt2.bin").write_bytes(llm_c(TOKENS.astype(np.uint16)))
    (tmp_path / "llama3.bin").write_bytes(llm_c(TOKENS.astype(np.uint32), 20240801, 7))
    wide = TOKENS + 100_000 * (TOKENS % 2)
    (tmp_path / "wide.bin").write_bytes(wide.astype(np.uint32).tobytes())
    for path in sorted(tmp_path.iterdir()):
        assert np.array_equal(map_tokens(path), wide if path.name == "wide.bin" else TOKENS), path.name
    assert map_tokens(tmp_path / "u32.bin").dtype == np.uint32
    corpus = load_corpus(str(tmp_path / "u32.bin"), "python4k", 16)
    assert np.array_equal(np.concatenate([corpus.train[0], corpus.val]), TOKENS)
    assert corpus.notes[0] == "uint32 token ids: 1 file to train on, the end of each for validation"
    (tmp_path / "empty.bin").write_bytes(b"")
    (tmp_path / "none.bin").write_bytes(llm_c(TOKENS[:0]))
    assert len(map_tokens(tmp_path / "empty.bin")) == len(map_tokens(tmp_path / "none.bin")) == 0


@pytest.mark.parametrize("value", [0, 3, 15, 16, 300, 65535])
def test_uint16_of_few_kinds_stays_uint16(value, tmp_path):
    for tokens in ([value] * 200, [value, 0] * 100, [0, value] * 100, [value] * 201):
        np.array(tokens, np.uint16).tofile(tmp_path / "a.bin")
        wide = tokens == [value, 0] * 100 and value > 0  # as uint32 these are 100 equal ids
        assert map_tokens(tmp_path / "a.bin").tolist() == ([value] * 100 if wide else tokens)


BAD_TOKENS = {
    "odd": (b"123", "3 bytes do not divide"),
    "cut": (llm_c(TOKENS.astype(np.uint16))[:-2], "holds 2,999 tokens where its header says 3,000; it was cut short"),
    "count": (llm_c(TOKENS.astype(np.uint16), count=-1), "header says -1"),
    "dtype": (llm_c(TOKENS.astype(np.uint16), 20240801, 7), "holds 1,500 tokens where its header says 3,000"),
    "weights": (llm_c(TOKENS.astype(np.uint16), 20240326, 3), r"not of tokens \(magic 20240326, version 3\)"),
    "version": (llm_c(TOKENS.astype(np.uint16), 20240520, 2), "version 2"),
    "zip": (b"PK\x03\x04" + b"\1\2" * 600, r"is packed \(zip\)"),
    "text": (b"Once upon a time, " * 100, "is text, not token ids; rename it to .txt"),
    "npy": (b"\x93NUMPY\x01\x00\x76\x00{" + b" " * 200, "is not a whole .npy file"),
}


@pytest.mark.parametrize("name", BAD_TOKENS)
def test_other_files_and_damaged_ones_are_refused(name, tmp_path):
    content, message = BAD_TOKENS[name]
    (tmp_path / "a.bin").write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_corpus(str(tmp_path / "a.bin"), "python4k", 8)
    assert "a.bin" in one_line(error)


def test_arrays_of_another_shape_type_or_length_are_refused(tmp_path):
    cases = [
        (np.ones((2, 3), np.uint16), "shape"),
        (np.ones(500, np.float32), "float32"),
        (np.array([{}]), "whole .npy"),
        (np.array([1, -5, 3]), "token id -5 at 1"),
    ]
    for array, message in cases:
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(ValueError, match=message) as error:
            load_corpus(str(tmp_path / "a.npy"), "bytes", 1)
        one_line(error)
    np.save(tmp_path / "a.npy", np.arange(5000))
    (tmp_path / "a.npy").write_bytes((tmp_path / "a.npy").read_bytes()[:-8])
    with pytest.raises(ValueError, match="not a whole .npy file"):
        load_corpus(str(tmp_path / "a.npy"), "bytes", 8)


@pytest.mark.parametrize("place_of_fault", [0, 99_999, 100_000, READ_AT_ONCE + 17, 2 * READ_AT_ONCE - 1])
@pytest.mark.parametrize("name", ["a_train.bin", "a_val.bin"])
def test_a_token_beyond_the_vocabulary_is_found_wherever_it_is(name, place_of_fault, tmp_path):
    tokens = np.zeros(2 * READ_AT_ONCE, np.uint16)
    tokens[:200].tofile(tmp_path / "b_train.bin")
    tokens[place_of_fault] = 257
    tokens.tofile(tmp_path / name)
    message = f"{name} has token id 257 at {place_of_fault:,}, beyond the 257 of --tokenizer=bytes; name the tokenizer"
    with pytest.raises(ValueError, match=message) as error:
        load_corpus(str(tmp_path / "*.bin"), "bytes", 8)
    one_line(error)


def test_ids_far_below_the_vocabulary_are_said(tmp_path):
    (TOKENS % 65).astype(np.uint16).tofile(tmp_path / "a.bin")
    notes = load_corpus(str(tmp_path / "a.bin"), "python4k", 8).notes
    known = "the largest token id is 64, of the 4,096 of --tokenizer=python4k: was it written by another tokenizer?"
    assert known in notes
    TOKENS.astype(np.uint16).tofile(tmp_path / "a.bin")
    assert not any("another" in note for note in load_corpus(str(tmp_path / "a.bin"), "python4k", 8).notes)


def test_a_folder_of_token_files_is_found(tmp_path):
    for name in ("train.bin", "val.bin"):
        (TOKENS % 257).astype(np.uint16).tofile(tmp_path / name)
    for data in (tmp_path, f"{tmp_path}/*.bin", f"{tmp_path}/**"):
        corpus = load_corpus(str(data), "bytes", 8)
        assert [len(t) for t in corpus.train] == [3000] and len(corpus.val) == 3000
    (tmp_path / "prepare.py").write_text("import numpy\n" * 100)  # as in nanoGPT's folders
    (tmp_path / "meta.pkl").write_bytes(b"\x80\x04.")
    corpus = load_corpus(str(tmp_path), "bytes", 8)
    assert len(corpus.val) == 3000 and any("left out: 2 not token files" in note for note in corpus.notes)


def test_a_folder_of_texts_with_some_bin_file_is_one_of_texts(corpus_dir, tmp_path):
    clean = load_corpus(str(corpus_dir), "bytes", 8, tmp_path / "c")
    (corpus_dir / "firmware.bin").write_bytes(b"a\0b")
    (corpus_dir / "deep").mkdir()
    (corpus_dir / "deep" / "train.bin").write_bytes(b"a\0b\0")
    corpus = load_corpus(str(corpus_dir), "bytes", 8, tmp_path / "c")
    assert np.array_equal(corpus.train[0], clean.train[0])
    assert any("left out: 2 not text but binary" in note for note in corpus.notes)


@pytest.mark.parametrize(
    ("name", "validation"),
    [
        ("val.bin", True), ("fineweb_val_000000.bin", True), ("tiny-valid.bin", True), ("Validation 1.bin", True),
        ("VAL0.bin", True), ("val/000.bin", True),
        ("medieval.bin", False), ("retrieval_train_0.bin", False), ("evaluation.bin", False), ("value.bin", False),
        ("intervals_7.bin", False), ("invalid.bin", False), ("medieval/000.bin", False),
    ],
)  # fmt: skip
def test_val_is_a_word_of_the_name(name, validation, tmp_path):
    np.arange(257, dtype=np.uint16).tofile(tmp_path / "zz.bin")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    np.full(100, 7, np.uint16).tofile(tmp_path / name)
    corpus = load_corpus(str(tmp_path / "**" / "*.bin"), "bytes", 8)
    assert np.array_equal(corpus.val, [7] * 100) == validation
    assert sum(map(len, corpus.train)) + len(corpus.val) == 357
    assert len(corpus.train) == 2 - validation


def test_every_validation_file_counts(tmp_path):
    np.full(500, 5, np.uint16).tofile(tmp_path / "train_0.bin")
    for i in range(3):
        np.full(100 + i, i, np.uint16).tofile(tmp_path / f"val_{i}.bin")
    assert np.bincount(load_corpus(str(tmp_path), "bytes", 8).val).tolist() == [100, 101, 102]
    for i in range(3):
        np.full(LONGEST_VALIDATION, i, np.uint16).tofile(tmp_path / f"val_{i}.bin")
    corpus = load_corpus(str(tmp_path), "bytes", 8)
    assert np.bincount(corpus.val).tolist() == [LONGEST_VALIDATION // 3] * 3
    assert "validation reads 1,048,575 of the 3,145,728 tokens held out" in corpus.notes


def test_a_further_shard_moves_no_token_of_the_others(tmp_path):
    for i in range(3):
        (np.arange(2000) % 100 + 50 * i).astype(np.uint16).tofile(tmp_path / f"{i}.bin")
        corpus = load_corpus(str(tmp_path), "bytes", 8)
        assert [len(t) for t in corpus.train] == [1900] * (i + 1)
        ends = [np.arange(100) + 50 * j for j in range(i + 1)]
        assert np.array_equal(corpus.val, np.concatenate(ends))


def test_files_without_training_tokens_or_shorter_than_a_window_are_said(tmp_path):
    (TOKENS % 257).astype(np.uint16).tofile(tmp_path / "val_0.bin")
    with pytest.raises(ValueError, match="only files for validation, by their names"):
        load_corpus(str(tmp_path), "bytes", 8)
    (TOKENS % 257).astype(np.uint16).tofile(tmp_path / "train_0.bin")
    (TOKENS[:40] % 257).astype(np.uint16).tofile(tmp_path / "train_1.bin")
    corpus = load_corpus(str(tmp_path), "bytes", 64)
    assert [len(t) for t in corpus.train] == [3000]
    assert "not trained on: 1 file shorter than --context, 40 tokens" in corpus.notes


def test_validation_tokens_that_stand_for_no_text_are_refused(tmp_path):
    np.full(2000, 256, np.uint16).tofile(tmp_path / "a.bin")
    with pytest.raises(ValueError, match="tokens for validation, of no text"):
        load_corpus(str(tmp_path / "a.bin"), "bytes", 8)


def test_notes_are_printed_by_the_first_process(tmp_path, monkeypatch, capsys):
    TOKENS.astype(np.uint16).tofile(tmp_path / "a.bin")
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        notes = load_corpus(str(tmp_path), "python4k", 8).notes
        assert capsys.readouterr().out.splitlines() == [f"data: {note}" for note in notes if rank == "0"]


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


@pytest.mark.parametrize("dtype", [np.uint16, np.uint32, np.uint64, np.int64])
@pytest.mark.parametrize("largest", [4, 256, 50_000])
def test_the_width_of_ids_without_a_header_is_seen_in_the_file(tmp_path, dtype, largest):
    ids = np.random.default_rng(0).integers(0, largest, 1000)
    ids.astype(dtype).tofile(tmp_path / "a.bin")
    tokens = map_tokens(tmp_path / "a.bin")
    assert len(tokens) == 1000 and np.array_equal(tokens.astype(np.int64), ids)
    if dtype != np.uint16:
        (tmp_path / "cut.bin").write_bytes(ids.astype(dtype).tobytes()[:-2])
        with pytest.raises(ValueError, match=f"holds ids of {np.dtype(dtype).itemsize} bytes and was cut short"):
            map_tokens(tmp_path / "cut.bin")
