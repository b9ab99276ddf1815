"""What the models learn from: tokenizers, corpora and batches.

Corpora     "python"    the source of the running Python's standard library, tests left out: on every machine already
            a path      a text file, a folder (read recursively) or a glob such as 'books/*.txt'
            *.bin       token ids, uint16, as nanoGPT and llm.c write them; memory-mapped
Tokenizers  "python4k"  byte-level BPE of 4,096 tokens, shipped in assets/ (`python -m common.data` made it)
            "bytes"     256 bytes and an end-of-text: nothing to download, nothing to train
            others      any of tiktoken's own: gpt2, cl100k_base, o200k_base, ...
Split       Documents (files) go to training or validation by a hash of their name, so adding files never moves one
            across. A single file gives its last tenth to validation.
Batches     A batch is a function of (seed, row numbers) alone. Whoever knows the step knows the data: resuming needs no
            iterator state, and N processes read between them what one would.
Score       Losses in nats per token cannot be compared across tokenizers. Bits per byte can: total nats / ln 2 / bytes
            of the text predicted. `Corpus.compressors` gives gzip's and xz's figure for the same text.
"""

import base64
import codecs
import functools
import glob
import gzip
import hashlib
import itertools
import lzma
import os
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tiktoken
import tiktoken.load
from tqdm import tqdm

ASSETS = Path(__file__).resolve().parent.parent / "assets"
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
            ranks = tiktoken.load.load_tiktoken_bpe(str(ASSETS / "python4k.tiktoken"))
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
        stream, seen, sent = self.new_stream(skip_special_tokens=False), [], ""
        for i in ids:
            seen.append(i)
            sent += (piece := stream.step(self.tokenizer, i) or "")
            yield piece
        whole = self.decode(seen)
        if whole.startswith(sent):
            yield whole[len(sent) :]  # a character that was cut short


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


if __name__ == "__main__":  # the shipped file was made by Python 3.11.7, from its standard library
    train_tokenizer(ASSETS / "python4k.tiktoken")
