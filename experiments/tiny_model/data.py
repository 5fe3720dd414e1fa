"""The text and the tokenizer: the standard library's sources in, token arrays out.

Every Python installation has the text, so anybody can make the corpus again; the split is by a hash of the file's
path relative to the standard library, so it does not depend on the order of a directory listing.
"""

import hashlib
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

EOT = "<|endoftext|>"  # id 0: bos, eos and the separator between files
VOCAB_TOKENS = 2048
HELDOUT_PER_MILLE = 30
SHIPPED_HELDOUT_BYTES = 100_000  # heldout.txt stops before the file that would pass this

# Directories at any depth that are tests, other people's packages, or tables.
SKIP_DIRS = {
    "__pycache__", "test", "tests", "idle_test", "site-packages", "dist-packages", "ensurepip", "encodings",
    "pydoc_data", "lib-dynload",
}  # fmt: skip
SKIP_FILES = {"html/entities.py"}  # a table of 2,231 names
SKIP_PREFIXES = ("config-", "_sysconfigdata")  # written by each build; they hold that build's paths

# One piece a match: newlines with the indentation after them, an identifier with the space before it, one digit,
# a run of punctuation with the space before it, any other white space.
SPLIT = r"[\r\n]+[ \t]*| ?[\p{L}_]+|\p{N}| ?[^\s\p{L}\p{N}_]+|\s+"


@dataclass(frozen=True)
class Corpus:
    """Text of the files, sorted by path; a file is in exactly one of the two halves."""

    train: dict[str, str]  # relative path -> text
    heldout: dict[str, str]

    def facts(self) -> dict:
        """What the model card says about the data."""
        train, heldout = joined(self.train), joined(self.heldout)
        return {
            "python": platform.python_version(),
            "train_files": len(self.train),
            "train_bytes": len(train),
            "train_sha256": hashlib.sha256(train).hexdigest(),
            "heldout_files": len(self.heldout),
            "heldout_bytes": len(heldout),
            "heldout_sha256": hashlib.sha256(heldout).hexdigest(),
        }


def joined(files: dict[str, str]) -> bytes:
    """The files one after another, without separators."""
    return "".join(files.values()).encode()


def _wanted(path: Path) -> bool:
    return (
        not SKIP_DIRS.intersection(path.parts[:-1])
        and path.as_posix() not in SKIP_FILES
        and not any(part.startswith(SKIP_PREFIXES) for part in path.parts)
    )


def load_corpus() -> Corpus:
    """Read the standard library of the running Python; drops copies of a file and files that are not UTF-8."""
    root = Path(sysconfig.get_path("stdlib"))
    train: dict[str, str] = {}
    heldout: dict[str, str] = {}
    seen: set[bytes] = set()
    for path in sorted(root.rglob("*.py"), key=lambda p: p.relative_to(root).as_posix()):
        name = path.relative_to(root)
        if not _wanted(name):
            continue
        raw = path.read_bytes()
        digest = hashlib.sha256(raw).digest()
        if not raw.strip() or digest in seen:
            continue
        seen.add(digest)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            continue
        bucket = int.from_bytes(hashlib.sha256(name.as_posix().encode()).digest()[:4], "big") % 1000
        (heldout if bucket < HELDOUT_PER_MILLE else train)[name.as_posix()] = text
    return Corpus(train, heldout)


def shipped_heldout(corpus: Corpus) -> str:
    """About 100 KB of whole held-out files, in the order of a hash of their paths."""
    text = ""
    for name in sorted(corpus.heldout, key=lambda n: hashlib.sha256(("shipped " + n).encode()).digest()):
        if len((text + corpus.heldout[name]).encode()) <= SHIPPED_HELDOUT_BYTES:
            text += corpus.heldout[name]
    return text


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE of VOCAB_TOKENS entries: the separator, 256 bytes, and merges."""
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tok.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_TOKENS,
        special_tokens=[EOT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tok.train_from_iterator(texts, trainer)
    assert tok.get_vocab_size() == VOCAB_TOKENS
    assert tok.token_to_id(EOT) == 0
    assert all(tok.token_to_id(symbol) is not None for symbol in pre_tokenizers.ByteLevel.alphabet())
    return tok


def encode_files(tok: Tokenizer, files: dict[str, str]) -> list[np.ndarray]:
    """One array a file, [separator, tokens...]; asserts that decoding gives the file back byte for byte."""
    arrays = []
    for text, enc in zip(files.values(), tok.encode_batch(list(files.values())), strict=True):
        # A file that spells the separator out would encode it as id 0; decode keeps it, so the check still holds.
        assert tok.decode(enc.ids, skip_special_tokens=False) == text
        arrays.append(np.array([0, *enc.ids], dtype=np.int64))
    return arrays


class Windows:
    """Endless batches of (batch, length + 1) tokens; each epoch shuffles the files, the cut and the windows."""

    def __init__(self, files: list[np.ndarray], batch: int, length: int, seed: int):
        self.files, self.batch, self.length = files, batch, length
        self.rng = np.random.default_rng(seed)
        self.queue: list[np.ndarray] = []

    def next(self) -> np.ndarray:
        """(batch, length + 1) int64."""
        while len(self.queue) < self.batch:
            stream = np.concatenate([self.files[i] for i in self.rng.permutation(len(self.files))])
            start = int(self.rng.integers(self.length))
            count = (len(stream) - start - 1) // self.length
            self.queue += [
                stream[start + i * self.length : start + (i + 1) * self.length + 1] for i in self.rng.permutation(count)
            ]
        out, self.queue = self.queue[: self.batch], self.queue[self.batch :]
        return np.stack(out)
