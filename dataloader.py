"""
Batches from token files, a pure function of (seed, stream, step). The batch of a step does not
depend on world size, micro-batch size or restarts, so a resumed run needs only the step.

data/NAME/{train,val}.bin hold little-endian uint16 or uint32 token ids. meta.json names their
tokenizer. Bins without it are nanoGPT's, in uint16: characters if there is a meta.pkl, else GPT-2
tokens.
"""
import functools
import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import torch

from script import ROOT, RankError, UserError

STREAMS = ("train", "hessian")   # each shuffles train.bin independently
GPT2_META = {"vocab_size": 50257, "tokenizer": "gpt2", "dtype": "uint16", "eot_id": 50256,
             "note": "gpt2 is assumed, because there is no meta.json or meta.pkl"}


class PlainUnpickler(pickle._Unpickler):   # the one in C allocates any size that a file asks for
    def find_class(self, module, name):
        raise pickle.UnpicklingError(f"it names {module}.{name}, so loading it could run code")


def read_characters(path):
    """What load_meta returns, from the meta.pkl of nanoGPT's character data: a dict with vocab_size
    and itos, {token id: character}. tokenizer is the list of characters. Raises UserError."""
    try:
        with open(path, "rb") as file:
            meta = PlainUnpickler(file).load()
        size, itos = meta["vocab_size"], meta["itos"]
        characters = [itos[i] for i in range(size)]
        if not (type(size) is int and all(type(c) is str for c in characters)
                and len({*characters}) == len(itos) > 0):
            raise ValueError("itos does not map token ids to distinct characters")
    except Exception as error:   # a damaged pickle can raise anything
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise UserError(f"{path} is refused, since it is not nanoGPT's for characters "
                        f"({reason})") from None
    return {"vocab_size": size, "tokenizer": characters, "dtype": "uint16", "eot_id": None,
            "note": f"{size} characters, from meta.pkl"}


def load_meta(data_dir):
    """The data set's meta.json: vocab_size, tokenizer, dtype, eot_id... Without it, the same of
    nanoGPT's data, with a note for the user. Raises UserError."""
    if not os.path.isdir(data_dir):
        known = sorted(path.parent.name for path in Path(ROOT, "data").glob("*/prepare.py"))
        raise UserError(f"no data set {data_dir}; choose {', '.join(known)} or give a path")
    path = os.path.join(data_dir, "meta.json")
    if not os.path.exists(path):
        characters = os.path.join(data_dir, "meta.pkl")
        return read_characters(characters) if os.path.exists(characters) else GPT2_META
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        if not (type(meta["vocab_size"]) is int and 0 < meta["vocab_size"] < 2**31
                and meta["dtype"] in ("uint16", "uint32") and type(meta["tokenizer"]) is str
                and type(meta["eot_id"]) is int and 0 <= meta["eot_id"] < meta["vocab_size"]
                and all(type(meta.get(f"{s}_tokens", 0)) is int for s in ("train", "val"))):
            raise ValueError("invalid values")
        return meta
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); "
                        f"run prepare.py again") from None


class TokenFile:
    """A .bin file. It is read, not memory-mapped, so that resident memory stays constant."""

    def __init__(self, data_dir, split, meta):
        self.path = os.path.join(data_dir, f"{split}.bin")
        self.dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        self.vocab_size = meta["vocab_size"]
        try:
            self.file = open(self.path, "rb", buffering=0)
        except OSError as error:
            prepare = os.path.relpath(os.path.join(data_dir, "prepare.py"))
            how = f"run: python {prepare}" if os.path.exists(prepare) else "check --dataset"
            raise UserError(f"cannot read {self.path}: {error.strerror}; {how}") from None
        size = os.fstat(self.file.fileno()).st_size
        self.count = size // self.dtype.itemsize
        expected = meta.get(f"{split}_tokens", self.count)
        if size % self.dtype.itemsize or self.count != expected:
            raise UserError(f"{self.path} has {size:,} bytes, not {expected:,} tokens of "
                            f"{meta['dtype']}: truncated or changed; run prepare.py again")

    def fingerprint(self):
        """Number of tokens and a hash of the first MiB, to tell data sets apart."""
        self.file.seek(0)
        start = hashlib.sha256(self.file.read(2**20)).hexdigest()
        return f"{self.count} tokens, sha256 {start[:16]}"

    def windows(self, starts, length):
        """int64 array (len(starts), length): the tokens from each start."""
        out = np.empty((len(starts), length), self.dtype)
        for row, start in zip(out, starts):
            self.file.seek(int(start) * self.dtype.itemsize)
            if self.file.readinto(memoryview(row).cast("B")) != row.nbytes:
                raise RankError(f"{self.path} ends before token {start + length:,}: "
                                f"it was truncated under this run")
        if out.size and out.max() >= self.vocab_size:
            raise RankError(f"{self.path} holds token id {out.max()}, beyond the vocabulary of "
                            f"{self.vocab_size}: wrong meta.json or damaged file")
        return out.astype(np.int64)


class DataLoader:
    """Batches of this rank, on its device: token ids x and next token ids y (int64), noise u
    (float32), all (sequences of this rank, block_size). Ranks take contiguous parts of a batch."""

    def __init__(self, cfg, world):
        self.cfg, self.world = cfg, world
        self.meta = load_meta(cfg.data_dir)
        self.tokens = TokenFile(cfg.data_dir, "train", self.meta)
        self.val_tokens = TokenFile(cfg.data_dir, "val", self.meta)
        # A window has block_size + 1 tokens and shares its last token with the next window.
        # One training window is given up, because windows start at a random phase < block_size.
        self.windows = self.tokens.count // cfg.block_size - 1
        self.val_windows = (self.val_tokens.count - 1) // cfg.block_size
        for tokens, windows in (self.tokens, self.windows), (self.val_tokens, self.val_windows):
            if windows < 1:
                raise UserError(f"block_size={cfg.block_size} is too large for {tokens.path} with "
                                f"{tokens.count:,} tokens")
        self._epoch = functools.lru_cache(maxsize=4)(self._epoch)   # two epochs of two streams

    def _epoch(self, stream, epoch):
        """Phase and shuffled window numbers of an epoch."""
        rng = np.random.default_rng([self.cfg.seed, STREAMS.index(stream), epoch])
        phase = rng.integers(self.cfg.block_size)
        order = np.arange(self.windows, dtype=np.min_scalar_type(self.windows))
        rng.shuffle(order)
        return int(phase), order

    def _samples(self, batch, batch_size):
        """This rank's samples in a batch, numbered from 0 over all epochs of a stream."""
        share = batch_size // self.world.size
        first = batch * batch_size + self.world.rank * share
        return range(first, first + share)

    def _starts(self, stream, samples):
        """Positions of samples in train.bin."""
        for sample in samples:
            epoch, i = divmod(sample, self.windows)
            phase, order = self._epoch(stream, epoch)
            yield phase + int(order[i]) * self.cfg.block_size

    def _to_device(self, array):
        tensor = torch.from_numpy(array)
        if self.world.device.type == "cuda":
            return tensor.pin_memory().to(self.world.device, non_blocking=True)
        return tensor.to(self.world.device)

    def _read(self, tokens, starts):
        """x, y of the sequences at these positions of a TokenFile."""
        data = self._to_device(tokens.windows(starts, self.cfg.block_size + 1))
        return data[:, :-1], data[:, 1:]

    def train(self, step):
        """x, y of optimizer step `step`, from 0."""
        samples = self._samples(step, self.cfg.total_batch_size)
        return self._read(self.tokens, list(self._starts("train", samples)))

    def hessian(self, update):
        """x, y, u of Hessian update `update`, from 0. The model samples labels with u, uniform in
        [0, 1). The u of a sample does not depend on the world size."""
        samples = self._samples(update, self.cfg.hessian_batch_size)
        x, y = self._read(self.tokens, list(self._starts("hessian", samples)))
        u = np.stack([np.random.default_rng([self.cfg.seed, len(STREAMS), i])
                      .random(self.cfg.block_size, dtype=np.float32) for i in samples])
        return x, y, self._to_device(u)

    def direction(self, update, like):
        """Hutchinson's random vector for Hessian update `update`: a standard normal tensor per
        tensor of `like`, the same on every rank."""
        key = np.random.SeedSequence([self.cfg.seed, len(STREAMS) + 1, update]).generate_state(1)
        generator = torch.Generator(self.world.device).manual_seed(int(key[0]))
        return [torch.randn(t.shape, generator=generator, device=t.device, dtype=t.dtype)
                for t in like]

    def val(self, batch_size):
        """Yield this rank's share of the evaluation in micro-batches x, y. All evaluations read the
        same windows: eval_iters * total_batch_size, evenly spread over val.bin, or every window if
        eval_iters is 0 or val.bin has fewer."""
        wanted = self.cfg.eval_iters * self.cfg.total_batch_size or self.val_windows
        count = min(wanted, self.val_windows)
        windows = np.arange(count) * self.val_windows // count
        starts = windows[self.world.rank::self.world.size] * self.cfg.block_size
        for i in range(0, len(starts), batch_size):
            yield self._read(self.val_tokens, starts[i:i + batch_size])
