"""What the models learn from: tokenizers, corpora and batches.

Corpora     "python"    the source of the running Python's standard library, tests left out: on every machine already
            a path      a text file, a folder (read recursively) or a glob such as 'books/*.txt' or 'books/**/*.txt'
            *.bin       token ids as nanoGPT and llm.c write them, and .npy: files, a folder or a glob; memory-mapped
            Text is UTF-8, or UTF-16 or 32 with a byte order mark. Other files are left out, and that is said.
Tokenizers  "python4k"  byte-level BPE of 4,096 tokens, shipped in assets/ (`python -m common.data` made it)
            "bytes"     256 bytes and an end-of-text: nothing to download, nothing to train
            others      any of tiktoken's own: gpt2, cl100k_base, o200k_base, ...
Split       A document (file) goes to training or validation by a hash of its name below the folder that was named, so
            other files never move it across. A single file gives its last tenth to validation, as do few documents.
Batches     A batch is a function of (seed, row numbers) alone. Whoever knows the step knows the data: resuming needs no
            iterator state, and N processes read between them what one would.
Score       Losses in nats per token cannot be compared across tokenizers. Bits per byte can: total nats / ln 2 / bytes
            of the text predicted. `Corpus.compressors` gives gzip's and xz's figure for the same text.
"""

import base64
import codecs
import functools
import gzip
import hashlib
import itertools
import lzma
import os
import re
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tiktoken
import tiktoken.load
from tqdm import tqdm

from common.files import (
    LONGEST_PIECE,
    TOKEN_FILES,
    count,
    find_documents,
    largest_token,
    listed,
    map_tokens,
    read_documents,
    shown,
)

ASSETS = Path(__file__).resolve().parent.parent / "assets"
VALIDATION_SHARE = 0.05  # of the documents
LONGEST_VALIDATION = 1 << 20  # tokens; more would make each evaluation long and hardly more exact
LONGEST_END = 4 * LONGEST_VALIDATION  # characters that one file holds out: more would not be read
SHORT_VALIDATION = 10_000  # tokens; with fewer it is said how exact the loss is
ENCODED_AT_ONCE = 1 << 20  # characters
TRAIN, VALIDATION = (  # as words of a file's name: fineweb_val_000000.bin, but not retrieval.bin
    re.compile(rf"(?<![a-z])({words})(?![a-z])", re.IGNORECASE) for words in ("train|training", "val|valid|validation")
)

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
        if self.name == "bytes":
            return [self.encode(text) for text in texts]
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

    def __init__(self, path):
        try:
            from tokenizers import Tokenizer as FromFile
            from tokenizers.decoders import DecodeStream
        except ImportError:
            raise ValueError(f"{path} is read by a package that is not installed: pip install tokenizers") from None
        try:
            self.tokenizer = FromFile.from_buffer(Path(path).read_bytes())  # from_file takes no path beyond UTF-8
        except Exception as error:  # the package raises bare Exceptions
            raise ValueError(f"{path} is not a tokenizer.json ({error})") from None
        self.name, self.new_stream = str(path), DecodeStream
        self.end_of_text = None  # the folder's other files say it: `checkpoints.text_ends`
        self.n_vocab = max(self.tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1  # holes and all

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
    documents = read_documents("python", find_documents("python"), {})
    train, _ = split_documents(documents)
    trainer = trainers.BpeTrainer(vocab_size=vocab_size - 1, initial_alphabet=alphabet, show_progress=True)
    bpe.train_from_iterator(("".join(d.pieces(0, d.length)) for d in train), trainer)

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


# ---- 2. texts -------------------------------------------------------------------------------------------------------


def split_documents(documents):
    """Returns (train, validation) lists of documents, by a hash of the name: of each by itself, whatever else is there.

    Of few documents, either list may be empty.
    """
    places = {d[0]: place(d[0]) for d in documents}
    validation = sorted((d for d in documents if places[d[0]] < VALIDATION_SHARE), key=lambda d: places[d[0]])
    return [d for d in documents if places[d[0]] >= VALIDATION_SHARE], validation  # any beginning of it is a sample


def place(name):
    """Returns a number in [0, 1) that depends on a document's name alone."""
    name = unicodedata.normalize("NFC", name)  # macOS writes the same name in other code points
    return (int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:8], "big") >> 11) / 2**53  # all a float holds


def split_texts(documents):
    """Returns (train, validation, how): lists of (document, start, stop), and a line if the split is not by documents.

    Where documents are too few for whole ones on both sides, each gives its end to validation.
    """
    train, val = split_documents(documents)
    if train and val:
        return [(d, 0, d.length) for d in train], [(d, 0, d.length) for d in val], ""
    cuts = [(d, d.length - min(d.length // 10, LONGEST_END)) for d in documents]
    whose = shown(documents[0].name) if len(documents) == 1 else f"each of the {len(documents)} documents"
    how = f"validation is the end of {whose}: with more documents it would be whole ones"
    return [(d, 0, cut) for d, cut in cuts], [(d, cut, d.length) for d, cut in cuts if cut < d.length], how


def encode_texts(splits, tokenizer, cache):
    """Returns a token array of each split, memory-mapped. Texts are encoded once and kept in the folder `cache`.

    splits: lists of (document, start, stop). The files' name is a hash of the tokenizer and of all that is read, so
    stale tokens are never read.
    """
    key = hashlib.sha256(repr((tokenizer.name, tokenizer.vocabulary, SPLIT_PATTERN, LONGEST_PIECE)).encode())
    key.update(repr([[(d.digest, start, stop) for d, start, stop in parts] for parts in splits]).encode())
    dtype = np.uint16 if tokenizer.n_vocab <= 2**16 else np.uint32
    files = [Path(cache) / f"{key.hexdigest()[:16]}-{split}.bin" for split in ("train", "val")]
    for parts, file in zip(splits, files):
        if not file.is_file():
            Path(cache).mkdir(parents=True, exist_ok=True)
            write_tokens(parts, tokenizer, file, dtype)
    return [np.memmap(file, dtype, "r") if file.stat().st_size else np.zeros(0, dtype) for file in files]


def write_tokens(parts, tokenizer, file, dtype):
    """Writes (document, start, stop) as token ids, each after an end of text. Memory is bounded."""
    partial = file.with_suffix(f".{os.getpid()}")
    size = sum(stop - start for _, start, stop in parts)
    bar = tqdm(total=size, desc="encoding", unit=" characters", unit_scale=True, delay=1, leave=False)
    try:
        with open(partial, "wb") as out, bar:
            for batch in batches(parts):
                pieces = [piece for _, piece in batch]
                for (begins, piece), ids in zip(batch, tokenizer.encode_batch(pieces)):
                    np.array([tokenizer.end_of_text] * begins + ids, dtype).tofile(out)
                    bar.update(len(piece))
            out.flush()
            os.fsync(out.fileno())  # after a power cut the file is whole, or not there
        os.replace(partial, file)
    finally:
        partial.unlink(missing_ok=True)


def batches(parts):
    """Yields lists of (whether a document begins, piece of text), of about ENCODED_AT_ONCE characters."""
    batch, size = [], 0
    for document, start, stop in parts:
        for i, piece in enumerate(document.pieces(start, stop)):
            batch.append((i == 0, piece))
            size += len(piece)
            if size >= ENCODED_AT_ONCE:
                yield batch
                batch, size = [], 0
    if batch:
        yield batch


def load_texts(data, found, left_out, tokenizer, cache):
    """Returns (list of a train array, list of a validation array, notes) of the texts in `found`, [(name, path)]."""
    documents = read_documents(data, found, left_out, tokenizer.encoding.special_tokens_set)
    train, val, how = split_texts(documents)
    notes = [how] if how else []
    if left_out and data != "python":
        notes.append(f"left out: {listed(left_out)}")
    marked = [d for d in documents if d.special]
    if marked:
        which = ", ".join(sorted(frozenset().union(*(d.special for d in marked))))
        notes.append(f"{which} in {count(marked, 'document')} is read as plain characters, not as a special token")
    seen = {d.digest for d, *_ in train}
    twice = [d.name for d, start, _ in val if start == 0 and d.digest in seen]
    if twice:
        notes.append(f"of the validation documents, {listed({'also training documents, word for word': twice})}")
    named = [d.name for d in documents if VALIDATION.search(d.name)]
    if named and any(TRAIN.search(d.name) for d in documents):
        notes.append(f"texts are split by a hash whatever their names say: {listed({'named validation': named})}")
    train_tokens, val_tokens = encode_texts((train, val), tokenizer, cache)
    if not how and np.count_nonzero(val_tokens[:LONGEST_VALIDATION] == tokenizer.end_of_text) == 1:
        notes.append(f"validation is one document, {shown(val[0][0].name)}: more files would make it a fairer measure")
    return [train_tokens], [val_tokens], notes


# ---- 3. token files -------------------------------------------------------------------------------------------------


def find_shards(found, left_out):
    """Returns those of `found`, [(name, path)], that are token files; in a folder of texts there are none.

    A folder that holds train.bin, or the like, is one of token files: its others (nanoGPT's prepare.py) are left out.
    """
    shards = [(name, path) for name, path in found if path.suffix in TOKEN_FILES]
    if len(shards) < len(found):
        shards = [(name, path) for name, path in shards if "/" not in name]
        if not any(TRAIN.search(name) or VALIDATION.search(name) for name, _ in shards):
            return []  # they are left out with all that is not text
        left_out["not token files"] = sorted({path for _, path in found} - {path for _, path in shards})
    return shards


def load_shards(data, shards, left_out, tokenizer):
    """Returns (list of train arrays, list of validation arrays, notes) of token files. shards: [(name, path)]."""
    try:
        arrays = [(name, map_tokens(path)) for name, path in shards]
        largest = max(largest_token(name, tokens, tokenizer) for name, tokens in arrays)
    except ValueError as error:
        raise ValueError(f"--data={shown(data)}: {error}") from None
    train = [tokens for name, tokens in arrays if not VALIDATION.search(name)]
    val = [tokens for name, tokens in arrays if VALIDATION.search(name)]
    if not train:
        raise ValueError(f"--data={shown(data)} has only files for validation, by their names; name some to train on")
    kinds = " and ".join(sorted({tokens.dtype.name for _, tokens in arrays}))
    notes = [f"{kinds} token ids: {count(train, 'file')} to train on, {len(val) or 'the end of each'} for validation"]
    if left_out:
        notes.append(f"left out: {listed(left_out)}")
    if largest < 0.75 * tokenizer.n_vocab and tokenizer.name != "bytes":  # of which plain English has half
        known = f"{tokenizer.n_vocab:,} of --tokenizer={tokenizer.name}"
        notes.append(f"the largest token id is {largest:,}, of the {known}: was it written by another tokenizer?")
    if not val:  # of each, so that it stays where it is when files are added
        cuts = [len(tokens) - min(len(tokens) // 20, LONGEST_VALIDATION) for tokens in train]
        val = [tokens[cut:] for tokens, cut in zip(train, cuts)]
        train = [tokens[:cut] for tokens, cut in zip(train, cuts)]
    return train, val, notes


# ---- 4. the corpus --------------------------------------------------------------------------------------------------


@dataclass
class Corpus:
    """Token ids to train on and to validate with: [end of text, document, end of text, document, ...]."""

    name: str
    tokenizer: Tokenizer
    train: list  # of arrays of token ids
    val: np.ndarray
    notes: list = field(default_factory=list)  # lines about what was left out, cut or read in an unexpected way

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

    Of token files, those with the word "val" in their name are for validation, or else the end of each. The first
    process prints the notes. Raises FileNotFoundError or ValueError for a corpus that is not there, is not text, has
    tokens beyond the vocabulary, or is shorter than one `context`.
    """
    tokenizer, left_out = Tokenizer(tokenizer), {}
    found = find_documents(data, left_out)
    shards = find_shards(found, left_out)
    if shards:
        train, held_out, notes = load_shards(data, shards, left_out, tokenizer)
    else:
        train, held_out, notes = load_texts(data, found, left_out, tokenizer, cache)
    longest = max(map(len, train), default=0)
    if longest < context + 1:
        raise ValueError(
            f"--data={shown(data)} has {longest} training tokens in one piece, fewer than one window of context + 1 = "
            f"{context + 1}; give more text or a smaller --context"
        )
    short = [tokens for tokens in train if len(tokens) <= context]
    if short:
        notes.append(f"not trained on: {count(short, 'file')} shorter than --context, {sum(map(len, short)):,} tokens")
    val = np.concatenate([tokens[: LONGEST_VALIDATION // len(held_out)] for tokens in held_out])
    if len(val) < 2 or not tokenizer.bytes_per_token[val].any():
        raise ValueError(f"--data={shown(data)} leaves {len(val)} tokens for validation, of no text; give more text")
    if len(val) < sum(map(len, held_out)):
        notes.append(f"validation reads {len(val):,} of the {sum(map(len, held_out)):,} tokens held out")
    if len(val) < SHORT_VALIDATION:  # the losses of single tokens spread by about 2.5 nats
        error = 2.5 / len(val) ** 0.5
        notes.append(f"validation is short, {len(val):,} tokens: val_loss is known to about +-{error:.2f} nats")
    if os.environ.get("RANK", "0") == "0":
        for note in notes:
            tqdm.write(f"data: {note}")
    return Corpus(shown(data), tokenizer, [tokens for tokens in train if len(tokens) > context], val, notes)


if __name__ == "__main__":  # the shipped file was made by Python 3.11.7, from its standard library
    train_tokenizer(ASSETS / "python4k.tiktoken")
