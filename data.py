"""What the models learn from: tokenizers, corpora, batches and tasks with a verifier.

Corpora     "python"    the source of the running Python's standard library, tests left out: on every machine already
            a path      a text file, a folder (read recursively) or a glob such as 'books/*.txt'
            *.bin       token ids, uint16, as nanoGPT and llm.c write them; memory-mapped
Tokenizers  "python4k"  byte-level BPE of 4,096 tokens, shipped in assets/ (`python data.py` made it)
            "bytes"     256 bytes and an end-of-text: nothing to download, nothing to train
            others      any of tiktoken's own: gpt2, cl100k_base, o200k_base, ...
Split       Documents (files) go to training or validation by a hash of their name, so adding files never moves one
            across. A single file gives its last tenth to validation.
Batches     A batch is a function of (seed, row numbers) alone. Whoever knows the step knows the data: resuming needs no
            iterator state, and N processes read between them what one would.
Score       Losses in nats per token cannot be compared across tokenizers. Bits per byte can: total nats / ln 2 / bytes
            of the text predicted. `Corpus.compressors` gives gzip's and xz's figure for the same text.
Passkeys    Made-up texts with something to be found again, to see how far back a model can look: `passkey_batch`.
Tasks       Made-up problems for reinforcement learning with exact verifiers: `environment("sort:6").sample(rng)`. One
            prompt in eight is held out, by its hash.
"""

import ast
import base64
import codecs
import collections
import ctypes
import functools
import glob
import gzip
import hashlib
import inspect
import itertools
import json
import lzma
import math
import operator
import os
import re
import string
import sysconfig
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import numpy as np
import tiktoken
import tiktoken.load
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
VALIDATION_SHARE = 0.05  # of the documents
BATCH_OF_DOCUMENTS = 64  # encoded between two updates of the progress bar
LONGEST_VALIDATION = 1 << 20  # tokens; more would make each evaluation long and hardly more exact
LONGEST_PIECE = 1 << 16  # characters encoded at once: tiktoken's regex overflows its stack on a megabyte of spaces

# ---- 1. tokenizers ----------------------------------------------------------------------------------------------

END_OF_TEXT = "<|endoftext|>"  # stands before every document, so a prompt can start from it alone

# How text is cut before byte pairs are merged (merges never cross a cut). GPT-4's pattern, but a line break takes the
# punctuation before it and the indentation after it along: in code "):\n        " is one thing. 6 % fewer tokens.
SPLIT_PATTERN = "|".join(
    (
        r" ?[^\s\p{L}\p{N}]*\s*\n[ \t]*",  # the end of a line and the start of the next
        r"[^\r\n\p{L}\p{N}]?\p{L}+",  # a word, with the space, dot or underscore before it
        r"\p{N}{1,3}",  # up to three digits
        r" ?[^\s\p{L}\p{N}]+",  # punctuation
        r"\s+(?!\S)|\s+",  # other white space
    )
)


class Tokenizer:
    """Text <-> token ids, by tiktoken.

    name: "python4k", "bytes" or one of tiktoken's encodings. Raises ValueError for a name nobody knows, or one whose
    vocabulary tiktoken could not download.
    """

    def __init__(self, name="python4k"):
        self.name = name
        if name == "bytes":
            ranks = {bytes([b]): b for b in range(256)}
            self.encoding = tiktoken.Encoding(
                name, pat_str=r"[\s\S]{1,64}", mergeable_ranks=ranks, special_tokens={END_OF_TEXT: 256}
            )
        elif name == "python4k":
            ranks = tiktoken.load.load_tiktoken_bpe(str(HERE / "assets" / "python4k.tiktoken"))
            self.encoding = tiktoken.Encoding(
                name, pat_str=SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={END_OF_TEXT: len(ranks)}
            )
        elif name in tiktoken.list_encoding_names():
            try:
                self.encoding = tiktoken.get_encoding(name)
            except OSError as error:  # requests' errors are OSErrors
                raise ValueError(
                    f"tokenizer {name!r} is downloaded on first use, and that failed ({type(error).__name__}); "
                    "connect once, or use --tokenizer=python4k or bytes"
                ) from None
        else:
            names = ", ".join(["python4k", "bytes"] + tiktoken.list_encoding_names())
            raise ValueError(f"unknown tokenizer {name!r}; known: {names}")
        self.n_vocab = self.encoding.n_vocab
        self.end_of_text = self.encoding.eot_token

    def encode(self, text):
        """Returns the token ids of `text`, special tokens read as plain text."""
        if self.name == "bytes":  # what tiktoken finds, too, in ten times the time
            return list(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace").encode())
        pieces = (text[i : i + LONGEST_PIECE] for i in range(0, len(text), LONGEST_PIECE))
        return [token for piece in pieces for token in self.encoding.encode_ordinary(piece)]

    def encode_batch(self, texts):
        """Returns a list of token ids for each text, computed on all cores."""
        pieces = [[t[i : i + LONGEST_PIECE] for i in range(0, len(t), LONGEST_PIECE)] for t in texts]
        flat = itertools.chain.from_iterable(pieces)
        encoded = iter(self.encoding.encode_ordinary_batch(list(flat), num_threads=os.cpu_count() or 1))
        return [list(itertools.chain.from_iterable(itertools.islice(encoded, len(p)))) for p in pieces]

    def decode(self, ids):
        """Returns the text of token ids; ids outside the vocabulary and broken characters become U+FFFD."""
        known, n = self.all_bytes, self.n_vocab
        return b"".join([known[i] if 0 <= i < n else b"\xff" for i in ids]).decode("utf-8", "replace")

    def stream(self, ids):
        """Yields text as ids come in: a character that spans two tokens is held back until it is whole."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for i in ids:
            yield decoder.decode(self.all_bytes[i] if 0 <= i < self.n_vocab else b"\xff")
        yield decoder.decode(b"", final=True)

    def _bytes_of(self, i):
        try:
            return self.encoding.decode_single_token_bytes(i)
        except KeyError:  # a hole in the numbering: some encodings have them
            return b""

    @functools.cached_property
    def all_bytes(self):
        """The bytes that each token is written as."""
        return [self._bytes_of(i) for i in range(self.n_vocab)]

    @functools.cached_property
    def vocabulary(self):
        """The bytes of text that each token stands for; end-of-text stands for none."""
        return [b"" if i == self.end_of_text else token for i, token in enumerate(self.all_bytes)]

    @functools.cached_property
    def bytes_per_token(self):
        """int64 [n_vocab]: how many bytes of text each token stands for."""
        return np.array([len(token) for token in self.vocabulary])

    def text_bytes(self, ids):
        """Returns the bytes of text that an array of ids stands for, without the end-of-text tokens."""
        return b"".join(self.vocabulary[i] for i in ids.tolist())


class ReleasedTokenizer:
    """Text <-> token ids by the tokenizer.json of a released model, with the methods of `Tokenizer` that writing needs.

    Raises ValueError if the package `tokenizers` is not installed, or cannot read the file.
    """

    def __init__(self, path, end_of_text):
        try:
            from tokenizers import Tokenizer as FromFile
            from tokenizers.decoders import DecodeStream
        except ImportError:
            raise ValueError(f"{path} is read by a package that is not installed: pip install tokenizers") from None
        try:
            self.tokenizer = FromFile.from_file(str(path))
        except Exception as error:  # the package raises bare Exceptions
            raise ValueError(f"{path} is not a tokenizer.json ({error})") from None
        self.name, self.end_of_text, self.new_stream = str(path), end_of_text, DecodeStream
        self.n_vocab = self.tokenizer.get_vocab_size(with_added_tokens=True)

    def encode(self, text):
        """Returns the token ids of `text`, without a start token."""
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids):
        """Returns the text of token ids; special tokens stay visible."""
        return self.tokenizer.decode([i for i in ids if 0 <= i < self.n_vocab], skip_special_tokens=False)

    def stream(self, ids):
        """Yields text as ids come in: a character that spans two tokens is held back until it is whole."""
        stream = self.new_stream(skip_special_tokens=False)
        for i in ids:
            yield stream.step(self.tokenizer, i) or ""


def train_tokenizer(path, vocab_size=4096):
    """Trains the shipped BPE on the python corpus and writes it in tiktoken's format: one "base64 rank" per line."""
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers
    from tokenizers import Tokenizer as Trainable

    alphabet = pre_tokenizers.ByteLevel.alphabet()  # 256 printable characters that stand for the 256 bytes
    bpe = Trainable(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    train, _ = split_documents(find_documents("python"))
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=True)
    bpe.train_from_iterator((read_text(p) for _, p in train), trainer)

    byte_of = {character: b for b, character in enumerate(_byte_level_characters())}
    merged = [t for t, _ in sorted(bpe.get_vocab().items(), key=lambda item: item[1]) if len(t) > 1]
    tokens = [bytes([b]) for b in range(256)] + [bytes(byte_of[c] for c in t) for t in merged]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens)]
    Path(path).write_text("".join(lines))


def _byte_level_characters():
    """Returns GPT-2's 256 stand-in characters, in order of the bytes they stand for."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = iter(range(0x100, 0x200))
    return [chr(b) if b in printable else chr(next(others)) for b in range(256)]


# ---- 2. documents -------------------------------------------------------------------------------------------------


def find_documents(data):
    """Returns [(name, path)] of the corpus, sorted; names are relative to the corpus, so they mean the same elsewhere.

    data: "python", a file, a folder or a glob. Raises FileNotFoundError if nothing is there.
    """
    if data == "python":
        root = Path(sysconfig.get_paths()["stdlib"])
        skip = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
        skip |= {"pydoc_data"}  # one generated file of reference manual, 6 % of the bytes and no source code
        paths = [p for p in root.rglob("*.py") if not skip & set(p.relative_to(root).parts)]
    elif Path(data).is_dir():
        root = Path(data)
        paths = [p for p in root.rglob("*") if p.is_file()]
        paths = [p for p in paths if not any(part.startswith(".") for part in p.relative_to(root).parts)]
    else:
        paths = [Path(p) for p in glob.glob(data, recursive=True) if Path(p).is_file()]
        root = Path(os.path.commonpath([p.parent for p in paths])) if paths else None
    if not paths:
        raise FileNotFoundError(f"--data={data}: no such file, folder or glob; 'python' is always there")
    return sorted((p.relative_to(root).as_posix(), p) for p in paths)


def split_documents(documents):
    """Returns (train, validation) lists of documents: by a hash of the name, at least one document in each."""

    def place(document):  # in [0, 1)
        return int.from_bytes(hashlib.sha256(document[0].encode()).digest()[:8], "big") / 2**64

    share = max(VALIDATION_SHARE, min(map(place, documents)))
    validation = sorted((d for d in documents if place(d) <= share), key=place)  # any beginning of it is a fair sample
    return [d for d in documents if place(d) > share], validation


def read_text(path):
    """Returns the text of a file, "" for one that is not text (a NUL byte); undecodable bytes become U+FFFD."""
    raw = Path(path).read_bytes()
    return "" if b"\0" in raw else raw.decode("utf-8", errors="replace")


# ---- 3. token files -------------------------------------------------------------------------------------------------


def encode_corpus(data, tokenizer, cache):
    """Returns (train, validation) token arrays of a text corpus, encoded once and kept in the folder `cache`.

    The file's name is a hash of the tokenizer and of every document, so stale tokens are never read.
    """
    documents = find_documents(data)
    key = hashlib.sha256(repr((tokenizer.name, tokenizer.vocabulary, SPLIT_PATTERN, VALIDATION_SHARE)).encode())
    for name, path in documents:
        key.update(name.encode() + hashlib.sha256(path.read_bytes()).digest())
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    files = [Path(cache) / f"{key.hexdigest()[:16]}-{split}.bin" for split in ("train", "val")]
    if not all(f.is_file() for f in files):
        if len(documents) > 1:
            parts = [[path for _, path in split] for split in split_documents(documents)]
            readers = [map(read_text, part) for part in parts]
        else:
            text = read_text(documents[0][1])
            cut = len(text) - len(text) // 10
            readers = [iter([text[:cut]]), iter([text[cut:]])]
        Path(cache).mkdir(parents=True, exist_ok=True)
        for texts, file in zip(readers, files):
            partial = file.with_suffix(f".{os.getpid()}")
            with open(partial, "wb") as out, tqdm(desc="encoding", unit=" documents", delay=1, leave=False) as bar:
                while batch := list(itertools.islice(texts, BATCH_OF_DOCUMENTS)):
                    for ids in tokenizer.encode_batch(batch):
                        if ids:
                            np.array([tokenizer.end_of_text] + ids, dtype=dtype).tofile(out)
                    bar.update(len(batch))
            os.replace(partial, file)
    return [map_tokens(f, dtype) for f in files]


def map_tokens(path, dtype=np.uint16):
    """Returns the token ids of a .bin file, memory-mapped. llm.c's header (1,024 bytes, magic 20240520) is skipped."""
    size = os.path.getsize(path)
    if size == 0:
        return np.zeros(0, dtype)
    header = np.fromfile(path, dtype=np.int32, count=1) if size >= 1024 else [0]
    offset = 1024 if header[0] == 20240520 else 0
    if (size - offset) % np.dtype(dtype).itemsize:
        raise ValueError(f"{path} is not a file of {np.dtype(dtype).name} token ids: {size} bytes do not divide")
    return np.memmap(path, dtype=dtype, mode="r", offset=offset)


# ---- 4. the corpus --------------------------------------------------------------------------------------------------


@dataclass
class Corpus:
    """Token ids to train on and to validate with: [end of text, document, end of text, document, ...]."""

    name: str
    tokenizer: Tokenizer
    train: list  # of arrays of token ids
    val: np.ndarray

    @property
    def n_train(self):
        """Tokens to train on."""
        return sum(map(len, self.train))

    def batch(self, rows, context, seed=0):
        """Returns (ids, targets), int64 [len(rows), context]: the rows' windows, targets one token ahead.

        rows: global row numbers; row r of epoch e sees another window than any other row of that epoch. Every epoch
        cuts the text at another offset and shuffles anew.
        """
        windows = [self._window(row, context, seed) for row in rows]
        block = np.stack(windows).astype(np.int64)  # [rows, context + 1]
        return block[:, :-1], block[:, 1:]

    def _window(self, row, context, seed):
        # One window less than fits (if more than one does) leaves room to move the cuts by up to a whole window.
        counts = [max((len(t) - 1) // context - 1, min((len(t) - 1) // context, 1)) for t in self.train]
        epoch, place = divmod(int(row), sum(counts))
        order, offset = _epoch_order(sum(counts), context, seed, epoch)
        window, shard = order[place], 0
        while window >= counts[shard]:
            window, shard = window - counts[shard], shard + 1
        tokens = self.train[shard]
        start = window * context + offset % (len(tokens) - counts[shard] * context)
        return tokens[start : start + context + 1]

    def val_batches(self, context, batch_size):
        """Yields (ids, targets), int64 [<= batch_size, context], that cover the validation tokens in order, once.

        Targets past the end are -100.
        """
        tokens = self.val.astype(np.int64)
        for start in range(0, len(tokens) - 1, batch_size * context):
            ids = tokens[start : start + batch_size * context]
            targets = tokens[start + 1 : start + 1 + batch_size * context]
            rows = -(-len(ids) // context)
            ids = np.pad(ids, (0, rows * context - len(ids)))
            targets = np.pad(targets, (0, rows * context - len(targets)), constant_values=-100)
            yield ids.reshape(rows, context), targets.reshape(rows, context)

    def compressors(self):
        """Returns {"gzip -9": bits per byte, "xz -9e": ...} of the validation text: what a model has to beat."""
        text = self.tokenizer.text_bytes(self.val)
        xz = lzma.compress(text, preset=9 | lzma.PRESET_EXTREME)
        return {"gzip -9": 8 * len(gzip.compress(text, 9)) / len(text), "xz -9e": 8 * len(xz) / len(text)}


@functools.lru_cache(maxsize=4)
def _epoch_order(n, context, seed, epoch):
    rng = np.random.default_rng([seed, epoch])
    return rng.permutation(n), int(rng.integers(context))


def load_corpus(data="python", tokenizer="python4k", context=1, cache="out/cache"):
    """Returns the Corpus `data` in tokens of `tokenizer`, with at most LONGEST_VALIDATION tokens to validate with.

    For .bin shards, files with "val" in their name are for validation, or else the last twentieth of the last file.
    Raises FileNotFoundError or ValueError for a corpus that is not there, is empty or is shorter than one `context`.
    """
    tokenizer = Tokenizer(tokenizer)
    if data.endswith(".bin"):
        shards = [(name, map_tokens(path)) for name, path in find_documents(data)]
        train = [tokens for name, tokens in shards if "val" not in name]
        val = [tokens for name, tokens in shards if "val" in name]
        if not val and train:
            cut = len(train[-1]) - len(train[-1]) // 20
            val, train[-1] = [train[-1][cut:]], train[-1][:cut]
        val = val[0] if val else np.zeros(0, np.uint16)
        for tokens in [*train, val]:  # a look at the start of each is enough to notice another tokenizer
            if len(tokens) and tokens[:100_000].max() >= tokenizer.n_vocab:
                raise ValueError(
                    f"--data={data} has token ids beyond the {tokenizer.n_vocab} of --tokenizer={tokenizer.name}; "
                    "name the tokenizer that wrote it"
                )
    else:
        train, val = encode_corpus(data, tokenizer, cache)
        train = [train]
    longest = max(map(len, train), default=0)
    if longest < context + 1:
        raise ValueError(
            f"--data={data} has {longest} training tokens in one piece, fewer than one window of context + 1 = "
            f"{context + 1}; give more text or a smaller --context"
        )
    if len(val) < 2:
        raise ValueError(f"--data={data} leaves {len(val)} tokens for validation; give more text")
    train = [tokens for tokens in train if len(tokens) > context]
    return Corpus(data, tokenizer, train, val[:LONGEST_VALIDATION])


# ---- 5. passkeys ----------------------------------------------------------------------------------------------------

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


# ---- 6. tasks with a verifier ---------------------------------------------------------------------------------------

# What reinforcement learning practises on. An environment is any object with
#
#     name              what rewards are listed under
#     max_new_tokens    bytes: its longest sensible completion, and a margin
#     sample(rng)       -> Task: a prompt, one good completion, and a judge of any other
#
# so yours is one more class of twenty lines, and one more row in ENVIRONMENTS. Ours write short ASCII for the "bytes"
# tokenizer, because models of a million parameters read it. A first letter tells one environment from another.
# The end-of-text token that ends a completion is no part of its text.

THINK_END = "</think>"
THINKING = {None: "", True: "<think>\n", False: "<think>" + THINK_END}  # how a prompt ends: plain, thinking on, off
LONGEST_COMPLETION, LONGEST_ANSWER = 1 << 16, 256  # characters; what is longer is wrong unread
MARGIN = 8  # bytes that a completion may be longer than we foresaw
HELD_OUT = 8  # one prompt in so many is never trained on
MOST_TRIES = 256  # samples to look for a prompt in; one in eight has then been missed with a chance of 1e-15
MOST_HUNG = 8  # threads that we leave to one environment's hanging verifiers


@dataclass(frozen=True)
class Task:
    """A prompt to complete, and how to tell whether a completion is right."""

    env: str  # name of the environment
    prompt: str
    demo: str  # a completion for the supervised warm start: right, or (countdown) only well-formed
    check: Callable  # answer -> bool, or a float in [0, 1]; the answer is ASCII of at most LONGEST_ANSWER characters
    key: str = ""  # the same for all prompts that ask the same (3+5, 5+3), for the held-out split; "": the prompt
    template: str = ""  # of a completion that is to be filled in: what is given of it, and BLANK for every other letter

    @property
    def thinks(self):
        """Whether the prompt opens a thought, which the completion has to close."""
        return self.prompt.endswith(THINKING[True])

    def parts(self, text):
        """Returns (thought, answer) of a completion. A thought that was never closed is all of it."""
        thought, closed, answer = text.rpartition(THINK_END)
        return (text, "") if self.thinks and not closed else (thought, answer)

    def verify(self, text):
        """Returns a reward in [0, 1] for any text; it raises only if a `check` of your own does.

        Where the prompt opens a thought, the answer is what follows the last </think>, and a thought that is never
        closed has none. Everywhere else all of the text is the answer.
        """
        _, closed, answer = text.rpartition(THINK_END)
        if len(text) > LONGEST_COMPLETION or len(answer) > LONGEST_ANSWER or not answer.isascii():
            return 0.0
        if bool(closed) != self.thinks:
            return 0.0
        return float(self.check(answer))


def checked_size(env, size):
    """Returns `size`, or raises ValueError if the environment has no such difficulty."""
    if size not in env.sizes:
        raise ValueError(f"{env.name}:{size}: the size goes from {env.sizes[0]} (easy) to {env.sizes[-1]} (hard)")
    return size


def random_keys(rng, n):
    """Returns n different keys of two letters."""
    letters = string.ascii_lowercase
    return [letters[i // 26] + letters[i % 26] for i in rng.choice(26 * 26, n, replace=False)]


OPERATIONS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
SIGNS = dict(zip("+-*/", OPERATIONS.values()))
MEANINGLESS = (SyntaxError, ValueError, TypeError, KeyError, ZeroDivisionError, RecursionError, MemoryError)


def evaluate(node, tools=()):
    """Returns what a syntax tree of + - * /, whole numbers (as Fractions), words and calls of tools is worth.

    tools: name -> function. Raises one of MEANINGLESS for anything else. Nothing is run but what stands here.
    """
    match node:
        case ast.BinOp(left, sign, right):
            return OPERATIONS[type(sign)](evaluate(left, tools), evaluate(right, tools))
        case ast.Constant(int(value)):
            return Fraction(value)
        case ast.Name(word):
            return word
        case ast.Call(ast.Name(word), arguments, []):
            return tools[word](*[evaluate(argument, tools) for argument in arguments])
    raise ValueError(f"{type(node).__name__} has no meaning here")


class Sort:
    """Digits in order: `s314159=` -> `113459`. size: digits."""

    name, sizes = "sort", range(2, 33)

    def __init__(self, size=6):
        self.size = checked_size(self, size)
        self.max_new_tokens = size + MARGIN

    def sample(self, rng):
        digits = [str(d) for d in rng.integers(10, size=self.size)]
        answer = "".join(sorted(digits))
        return Task(self.name, f"s{''.join(digits)}=", answer, partial(operator.eq, answer))


class Countdown:
    """An expression that makes a number of others, each used once: `c3,5>8=` -> `3+5`. size: numbers to use.

    It has + - * / and parentheses, no sign before a number, and exact fractions on the way. The demo is any expression
    over the numbers: it shows the form, and never looks at the target, so that hitting it is left to discover.
    Numbers go to 9, two of them to 20: of digits there are so few pairs that no held-out one follows from the rest.
    """

    name, sizes = "countdown", range(2, 7)

    def __init__(self, size=2):
        self.size, self.largest = checked_size(self, size), 20 if size == 2 else 9
        self.max_new_tokens = 4 * size - 5 + MARGIN  # numbers, operators, a pair of parentheses for all but the last

    def sample(self, rng):
        target = None
        while target is None or target.denominator > 1 or not 0 <= target <= 99:
            numbers = rng.integers(1, self.largest + 1, self.size).tolist()
            target = self.expression(numbers, rng)[1]
        numbers = [str(n) for n in numbers]
        prompt, key = (f"c{','.join(order)}>{target}=" for order in (numbers, sorted(numbers)))
        demo = self.expression(numbers, rng)[0]
        return Task(self.name, prompt, demo, partial(self.hits, numbers, target), key)

    def hits(self, numbers, target, answer):
        return len(answer) <= self.max_new_tokens and self.worth(numbers, answer) == target

    @staticmethod
    def expression(numbers, rng):
        """Returns (a random expression that uses each number once, its value; None if that divides by 0)."""
        random = iter(rng.random(3 * len(numbers)).tolist())
        parts = [(str(n), Fraction(n)) for n in sorted(numbers, key=lambda _: next(random))]
        while len(parts) > 1:  # neighbours are joined until one is left
            i, sign = int(next(random) * (len(parts) - 1)), "+-*/"[int(next(random) * 4)]
            (left, x), (right, y) = parts[i : i + 2]
            text = left + sign + right
            value = None if None in (x, y) or sign == "/" and y == 0 else SIGNS[sign](x, y)
            parts[i : i + 2] = [(f"({text})" if len(parts) > 2 else text, value)]
        return parts[0]

    @staticmethod
    def worth(numbers, text):
        """Returns the value of an expression that uses each number once, and None for any other text."""
        if not re.fullmatch(r"[-+*/()0-9]+", text) or sorted(re.findall(r"[0-9]+", text)) != sorted(numbers):
            return None
        try:
            return evaluate(ast.parse(text, mode="eval").body)
        except MEANINGLESS:
            return None


class Add:
    """A sum, every number written from its lowest digit up: `a54+78=` -> `231`, for 45 + 87 = 132. size: digits.

    So written, each digit follows from what stands before it. Thinking, it notes digit + digit + carry = digit, carry.
    """

    name, sizes = "add", range(1, 33)

    def __init__(self, size=5, think=None):
        self.size, self.think = checked_size(self, size), think
        self.max_new_tokens = size + 1 + (10 * size + len(THINK_END) if think else 0) + MARGIN

    def sample(self, rng):
        low, high = rng.integers(10, size=(2, self.size - 1)), rng.integers(1, 10, size=(2, 1))  # no leading zero
        x, y = np.concatenate([low, high], axis=1).tolist()
        thought, answer, carry = "", "", 0
        for a, b in zip(x, y):
            total = a + b + carry
            thought += f"{a}+{b}+{carry}={total % 10},{total // 10}\n"
            answer, carry = answer + str(total % 10), total // 10
        answer += "1" if carry else ""
        question = "a{}+{}=".format("".join(map(str, x)), "".join(map(str, y)))
        demo = thought + THINK_END + answer if self.think else answer
        return Task(self.name, question + THINKING[self.think], demo, partial(operator.eq, answer))


class Chain:
    """Arithmetic modulo 7, one operation after the other, no precedence: `m3+5*2-4=` -> `5`. size: operations.

    Thinking, it notes each result: `<think>` in the prompt, then `3+5=1`, `1*2=2`, `2-4=5` on a line each, `</think>5`.
    Seven is a prime and no operand is zero: no step forgets the one before it, and guessing is right one time in seven.
    """

    name, sizes = "chain", range(1, 33)

    def __init__(self, size=4, think=True):
        self.size, self.think = checked_size(self, size), think
        self.max_new_tokens = 1 + (6 * size + len(THINK_END) if think else 0) + MARGIN

    def sample(self, rng):
        value = int(rng.integers(7))
        question, thought = f"m{value}", ""
        for _ in range(self.size):
            sign, operand = "+-*"[rng.integers(3)], int(rng.integers(1, 7))
            result = {"+": value + operand, "-": value - operand, "*": value * operand}[sign] % 7
            question += f"{sign}{operand}"
            thought += f"{value}{sign}{operand}={result}\n"
            value = result
        demo = f"{thought}{THINK_END}{value}" if self.think else str(value)
        return Task(self.name, f"{question}={THINKING[self.think]}", demo, partial(operator.eq, str(value)))


class Brackets:
    """The closing brackets that are missing: `b([]{<=` -> `>})`. size: brackets in the prompt."""

    name, sizes = "brackets", range(4, 65)

    def __init__(self, size=8):
        self.size = checked_size(self, size)
        self.max_new_tokens = size + MARGIN

    def sample(self, rng):
        text, missing = "", ""
        for _ in range(self.size):
            if len(missing) > 1 and rng.random() < 0.5:  # the first one stays open: something is always missing
                text, missing = text + missing[0], missing[1:]
            else:
                opening, closing = ("()", "[]", "{}", "<>")[rng.integers(4)]
                text, missing = text + opening, closing + missing
        return Task(self.name, f"b{text}=", missing, partial(operator.eq, missing))


class Schema:
    """A JSON object with these fields of these types: `jab:s,cd:i=` -> `{"ab":"x","cd":7}`. size: fields.

    s string, i integer, b boolean, l list. What the values are is free, as in Nemotron 3's JSON environment.
    """

    name, sizes = "json", range(1, 9)
    types = {"s": str, "i": int, "b": bool, "l": list}

    def __init__(self, size=2):
        self.size = checked_size(self, size)
        self.max_new_tokens = 12 * size + 1 + MARGIN  # "ab":[1,2] and a comma at most, and the braces

    def sample(self, rng):
        schema = {key: "sibl"[rng.integers(4)] for key in random_keys(rng, self.size)}
        x, y = rng.integers(10, size=2).tolist()
        values = {"s": random_keys(rng, 1)[0], "i": 10 * x + y, "b": x < y, "l": [x, y]}
        demo = json.dumps({key: values[kind] for key, kind in schema.items()}, separators=(",", ":"))
        prompt = "j{}=".format(",".join(f"{key}:{kind}" for key, kind in schema.items()))
        return Task(self.name, prompt, demo, partial(self.fits, {k: self.types[t] for k, t in schema.items()}))

    @staticmethod
    def fits(schema, answer):
        try:
            fields = json.loads(answer, object_pairs_hook=tuple)  # a dict would hide a key that comes twice
        except (ValueError, RecursionError):
            return False
        return type(fields) is tuple and len(fields) == len(schema) and {k: type(v) for k, v in fields} == schema


class Instruct:
    """Words that keep rules: `iw2,-e,$!=` -> `cat sun!`. size: rules.

    w2 two words, ^b begins with b, +k has a k, -e has no e, $! ends with that mark. An answer is words of small letters
    with one space between, then at most one of . ! ?
    """

    name, sizes = "instruct", range(1, 6)
    rules = {
        "w": lambda answer, what: len(answer.split(" ")) == int(what),
        "^": str.startswith,
        "+": lambda answer, what: what in answer,
        "-": lambda answer, what: what not in answer,
        "$": str.endswith,
    }

    def __init__(self, size=3):
        self.size = checked_size(self, size)
        self.max_new_tokens = 18 + MARGIN  # four words of three letters, and three more letters or marks

    def sample(self, rng):
        first, has, lacks, *_ = letters = rng.permutation(list(string.ascii_lowercase)).tolist()  # never the same
        n, mark = int(rng.integers(1, 5)), ".!?"[rng.integers(3)]
        every = [f"w{n}", f"^{first}", f"+{has}", f"-{lacks}", f"${mark}"]
        rules = [every[i] for i in rng.permutation(5)[: self.size]]
        others = [letter for letter in letters if letter != lacks]
        words = ["".join(rng.choice(others, rng.integers(1, 4))) for _ in range(n)]
        demo = first + " ".join(words) + has + mark  # keeps the rules that were not asked for as well
        return Task(self.name, f"i{','.join(rules)}=", demo, partial(self.keeps, rules))

    @classmethod
    def keeps(cls, rules, answer):
        if not re.fullmatch(r"[a-z]+( [a-z]+)*[.!?]?", answer):
            return False
        return all(cls.rules[rule[0]](answer, rule[1:]) for rule in rules)


class Lookup:
    """The value of a key in a long context: `kab:17,qz:83?qz=` -> `83`. size: pairs, six bytes each."""

    name, sizes = "lookup", range(2, 601)

    def __init__(self, size=8):
        self.size = checked_size(self, size)
        self.max_new_tokens = 2 + MARGIN

    def sample(self, rng):
        keys, values = random_keys(rng, self.size), rng.integers(10, 100, self.size).tolist()
        asked = int(rng.integers(self.size))
        pairs = ",".join(f"{key}:{value}" for key, value in zip(keys, values))
        answer = str(values[asked])
        return Task(self.name, f"k{pairs}?{keys[asked]}=", answer, partial(operator.eq, answer))


PEOPLE = "anna bert cleo dora emil finn gina hugo iris jack kate lena mary nora omar paul".split()
FIELDS = ("age", "room", "year")


class Tool:
    """A call that finds what is asked in a dictionary the model cannot see. size: entries to add up.

    `tanna.age+bert.room=` -> `add(get(anna,age),get(bert,room))`. The call is run and its result compared, so another
    order is as good. A function, a person or a field that does not exist is worth nothing.
    """

    name, sizes = "tool", range(1, 6)
    # Powers of ten, so that no two different sums of up to nine entries agree: a right result is a right call.
    database = {p: {f: 10 ** (3 * i + j) for j, f in enumerate(FIELDS)} for i, p in enumerate(PEOPLE)}
    tools = {"get": lambda person, field: Tool.database[person][field], "add": operator.add}

    def __init__(self, size=2):
        self.size = checked_size(self, size)
        self.max_new_tokens = 14 * size + 6 * (size - 1) + MARGIN

    def sample(self, rng):
        asked = [(PEOPLE[rng.integers(len(PEOPLE))], FIELDS[rng.integers(len(FIELDS))]) for _ in range(self.size)]
        calls = [f"get({person},{field})" for person, field in asked]
        demo = functools.reduce(lambda left, right: f"add({left},{right})", calls)
        prompt = "t{}=".format("+".join(f"{person}.{field}" for person, field in asked))
        wanted = sum(self.database[person][field] for person, field in asked)
        return Task(self.name, prompt, demo, partial(self.finds, wanted))

    @classmethod
    def finds(cls, wanted, answer):
        if not re.fullmatch(r"[a-z(),]+", answer):
            return False
        try:
            return evaluate(ast.parse(answer, mode="eval").body, cls.tools) == wanted
        except MEANINGLESS:
            return False


ENVIRONMENTS = {c.name: c for c in (Sort, Countdown, Add, Chain, Brackets, Schema, Instruct, Lookup, Tool)}


# Two tasks to fill in, in any order, for models that can: mdlm_dultra.py. What is blank is ambiguous in both, and not
# in the same way: in a sudoku everything hangs on everything, in the progressions a group on itself alone.

BLANK = "_"


@functools.cache
def sudoku_grids():
    """Returns the 288 sudokus of 4 x 4, each 16 digits, row by row: no digit twice in a row, a column or a quarter."""
    units = [{4 * i + j for j in range(4)} for i in range(4)] + [{4 * j + i for j in range(4)} for i in range(4)]
    units += [{8 * i + 2 * j + k for k in (0, 1, 4, 5)} for i in range(2) for j in range(2)]
    peers = [set().union(*(unit for unit in units if cell in unit)) for cell in range(16)]
    grids = [""]
    for cell in range(16):
        before = sorted(p for p in peers[cell] if p < cell)
        grids = [g + d for g in grids for d in "1234" if d not in {g[p] for p in before}]
    return grids


class Sudoku:
    """A sudoku of 4 x 4: `__13______24____` -> any that has these clues. size: clues."""

    name, sizes = "sudoku", range(16)

    def __init__(self, size=4):
        self.size, self.grids = checked_size(self, size), frozenset(sudoku_grids())
        self.max_new_tokens = 16

    def sample(self, rng):
        grid = sudoku_grids()[rng.integers(288)]
        clues = set(rng.permutation(16)[: self.size].tolist())
        template = "".join(digit if cell in clues else BLANK for cell, digit in enumerate(grid))
        return Task(self.name, "", grid, self.grids.__contains__, template, template)


class Progressions:
    """Behind each digit s a group a, a + s, a + 2s modulo 10, a free: `3___7___` -> `30367852`. size: groups.

    Worth the share of the groups that are right. An ideal writer needs two steps, whatever the size: a digit of every
    group, then all the others.
    """

    name, sizes = "progressions", range(1, 65)

    def __init__(self, size=8):
        self.size = checked_size(self, size)
        self.max_new_tokens = 4 * size

    def sample(self, rng):
        steps, starts = rng.integers(10, size=(2, self.size, 1))
        groups = np.concatenate([steps, (starts + steps * np.arange(3)) % 10], 1)  # [size, 4]
        answer = "".join(map(str, groups.flatten().tolist()))
        template = "".join(f"{step}{3 * BLANK}" for step in steps[:, 0])
        return Task(self.name, "", answer, partial(self.right, template), template, template)

    @staticmethod
    def right(template, answer):
        if not re.fullmatch(template.replace(BLANK, "[0-9]"), answer):
            return False
        groups = list(zip(*(map(int, answer[i::4]) for i in range(4))))
        return sum((b - a - s) % 10 == (c - b - s) % 10 == 0 for s, a, b, c in groups) / len(groups)


FILL_INS = {c.name: c for c in (Sudoku, Progressions)}


def environment(spec, known=ENVIRONMENTS):
    """Returns the environment that a text asks for: name, name:size, or with "on" or "off" for thinking, "chain:6:off".

    Raises ValueError for a name, size or option that is not there, and names those that are.
    """
    name, *options = spec.split(":")
    if name not in known:
        raise ValueError(f"unknown environment {name!r}; known: {', '.join(known)}")
    keywords = {}
    for option in options:
        if option in ("on", "off"):
            keywords["think"] = option == "on"
        elif re.fullmatch(r"[0-9]{1,9}", option):
            keywords["size"] = int(option)
        else:
            raise ValueError(f"environment {spec!r}: {option!r} is neither a size nor on or off; write {name}:4, say")
    if "think" in keywords and "think" not in inspect.signature(known[name]).parameters:
        raise ValueError(f"environment {spec!r}: {name} has no thinking to turn on or off")
    env = known[name](**keywords)
    env.name = spec  # two sizes of one task are two columns
    return env


def is_held_out(task):
    """Returns whether a task is kept from training: one in HELD_OUT, by its key or prompt, thinking on or off alike."""
    asked = task.key or task.prompt
    for ending in THINKING.values():
        asked = asked.removesuffix(ending)
    return hashlib.sha256(asked.encode()).digest()[0] % HELD_OUT == 0


def sample_task(env, rng, held_out=False):
    """Returns a Task of `env` on one side of the split. Raises ValueError if MOST_TRIES samples have none there."""
    for _ in range(MOST_TRIES):
        task = env.sample(rng)
        if is_held_out(task) == held_out:
            return task
    side = "held-out" if held_out else "training"
    raise ValueError(
        f"{env.name} made no {side} prompt in {MOST_TRIES} samples: too few are possible, try a larger size"
    )


def score(task, text):
    """Returns (reward in [0, 1], None), or (reward, what is wrong with the verifier): it costs its sample, not the run.

    One that raises or gives no number is worth 0; a number outside of [0, 1] is clipped. Ours do none of that.
    """
    try:
        reward = float(task.verify(text))
    except (Exception, SystemExit) as error:
        return 0.0, f"{type(error).__name__}: {error}"[:200]
    if not math.isfinite(reward):
        return 0.0, f"verify returned {reward}"
    return min(max(reward, 0.0), 1.0), None if 0 <= reward <= 1 else f"verify returned {reward}, outside of [0, 1]"


def score_all(tasks, texts, timeout=10.0):
    """Returns the `score` of each of many texts. One without a verdict after `timeout` seconds is worth 0, too.

    A thread judges one after the other. If it hangs, it is told to exit, which ends a loop in Python, and another goes
    on behind. One that waits in C stays, and after MOST_HUNG of those the environment's texts are worth 0 unread. One
    that keeps Python's lock (10**10**9) cannot be stopped from inside its process.
    """
    found = []
    while len(found) < len(texts):
        verdicts, told, rest = [], threading.Event(), list(zip(tasks, texts))[len(found) :]
        hung = collections.Counter(thread.name for thread in threading.enumerate())

        def judge(verdicts=verdicts, told=told, rest=rest, hung=hung):
            for task, text in rest:
                many = hung[f"hung verifier of {task.env}"] >= MOST_HUNG
                unread = 0.0, f"not asked: {MOST_HUNG} earlier verifiers still hang"
                verdicts.append(unread if many else score(task, text))
                if told.is_set():  # `score` takes SystemExit for the verifier's own
                    return

        worker = threading.Thread(target=judge, daemon=True)
        worker.start()
        seen = -1
        while worker.is_alive() and len(verdicts) > seen:
            seen = len(verdicts)
            worker.join(timeout)
        found += verdicts[: len(rest)]
        if len(found) < len(texts):
            worker.name = f"hung verifier of {tasks[len(found)].env}"
            told.set()
            ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(worker.ident), ctypes.py_object(SystemExit))
            found.append((0.0, f"no verdict in {timeout} s"))
    return found


def without_thought(task):
    """Returns a thinking Task with its thinking turned off: it asks for the answer at once."""
    prompt = task.prompt.removesuffix(THINKING[True]) + THINKING[False]
    return replace(task, prompt=prompt, demo=task.parts(task.demo)[1])


def cut_trace(demo, lines):
    """Returns a demo with `lines` lines of its thought and the whole answer: it teaches to answer when cut short."""
    thought, closed, answer = demo.rpartition(THINK_END)
    return "".join(thought.splitlines(keepends=True)[:lines]) + closed + answer


if __name__ == "__main__":  # the shipped file was made by Python 3.11.7, from its standard library
    train_tokenizer(HERE / "assets" / "python4k.tiktoken")
