"""
Token files -> batches, as a pure function of (seed, stream, step): the batch of step t does not
depend on ranks, micro-batch size or restarts, and to resume needs only the step.

data/NAME/{train,val}.bin: little-endian uint16 (or uint32) token ids. meta.json beside them says
which tokenizer made them; bins without one are taken as nanoGPT's GPT-2 BPE.
"""
import functools
import hashlib
import json
import os

import numpy as np
import torch

from script import ROOT, RankError, UserError

STREAMS = ("train", "hessian")   # independent orders over train.bin
GPT2_META = {"vocab_size": 50257, "tokenizer": "gpt2", "dtype": "uint16", "eot_id": 50256}


def load_meta(data_dir):
    """The data set's meta.json: vocab_size, tokenizer, dtype, eot_id, ... Raises UserError."""
    if not os.path.isdir(data_dir):
        folder = os.path.join(ROOT, "data")
        known = sorted(n for n in os.listdir(folder)
                       if os.path.exists(os.path.join(folder, n, "prepare.py")))
        raise UserError(f"no data set {data_dir}; there are {', '.join(known)}, or give a path")
    path = os.path.join(data_dir, "meta.json")
    if not os.path.exists(path):
        return GPT2_META
    try:
        with open(path, encoding="utf-8") as file:
            meta = json.load(file)
        fits = (type(meta["vocab_size"]) is int and 0 < meta["vocab_size"] < 2**31
                and meta["dtype"] in ("uint16", "uint32") and type(meta["tokenizer"]) is str
                and type(meta["eot_id"]) is int and 0 <= meta["eot_id"] < meta["vocab_size"]
                and all(type(meta.get(f"{s}_tokens", 0)) is int for s in ("train", "val")))
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); "
                        f"run prepare.py again") from None
    if not fits:
        raise UserError(f"{path} holds values that cannot be; run prepare.py again")
    return meta


class Tokens:
    """One .bin file. Windows are read, not mapped, so resident memory does not grow with use."""

    def __init__(self, data_dir, split, meta):
        self.path = os.path.join(data_dir, f"{split}.bin")
        self.dtype = np.dtype(meta["dtype"]).newbyteorder("<")
        self.vocab_size = meta["vocab_size"]
        try:
            self.file = open(self.path, "rb", buffering=0)
        except OSError as error:
            prepare = os.path.relpath(os.path.join(data_dir, "prepare.py"))
            how = f"run: python {prepare}" if os.path.exists(prepare) else "wrong dataset?"
            raise UserError(f"cannot read {self.path}: {error.strerror}; {how}") from None
        size = os.fstat(self.file.fileno()).st_size
        self.count = size // self.dtype.itemsize
        expected = meta.get(f"{split}_tokens", self.count)
        if size % self.dtype.itemsize or self.count != expected:
            raise UserError(f"{self.path} has {size:,} bytes, which is not {expected:,} tokens of "
                            f"{meta['dtype']}: truncated or changed; run prepare.py again")

    def fingerprint(self):
        """Tells one file from another: size and a hash of the beginning."""
        self.file.seek(0)
        start = hashlib.sha256(self.file.read(2**20)).hexdigest()
        return f"{self.count} tokens, sha256 {start[:16]}"

    def windows(self, starts, length):
        """int64 array (len(starts), length) of the tokens that follow each start."""
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
    """
    Batches for one rank.

    train(step) and hessian(update) give (x, y) and (x, y, u) on the device: x, y int64, u float32,
    all (sequences of this rank, block_size). Rank r of n gets the r-th n-th of the batch.
    """

    def __init__(self, cfg, world):
        self.cfg, self.world = cfg, world
        self.meta = load_meta(cfg.data_dir)
        self.tokens = Tokens(cfg.data_dir, "train", self.meta)
        self.val_tokens = Tokens(cfg.data_dir, "val", self.meta)
        # A window is block_size + 1 tokens and shares its last with the next window's first.
        # Windows start at a random phase below block_size, so one is given up for that.
        self.windows = self.tokens.count // cfg.block_size - 1
        self.val_windows = (self.val_tokens.count - 1) // cfg.block_size
        for tokens, windows in (self.tokens, self.windows), (self.val_tokens, self.val_windows):
            if windows < 1:
                raise UserError(f"block_size={cfg.block_size} is too large for {tokens.path} with "
                                f"{tokens.count:,} tokens")
        self._order = functools.lru_cache(maxsize=4)(self._order)   # two epochs of two streams

    def _order(self, stream, epoch):
        """Start of every window of an epoch, in the order in which they are read."""
        rng = np.random.default_rng([self.cfg.seed, STREAMS.index(stream), epoch])
        phase = rng.integers(self.cfg.block_size)
        order = np.arange(self.windows, dtype=np.min_scalar_type(self.windows))
        rng.shuffle(order)
        return phase, order

    def start_of(self, stream, sample):
        """Position in train.bin of a stream's sample number: a pure function of the number."""
        epoch, i = divmod(sample, self.windows)
        phase, order = self._order(stream, epoch)
        return int(phase) + int(order[i]) * self.cfg.block_size

    def _samples(self, batch, batch_size):
        """Numbers of the samples that this rank takes of a stream's batch."""
        share = batch_size // self.world.size
        first = batch * batch_size + self.world.rank * share
        return range(first, first + share)

    def _to_device(self, array):
        tensor = torch.from_numpy(array)
        if self.world.device.type == "cuda":
            return tensor.pin_memory().to(self.world.device, non_blocking=True)
        return tensor.to(self.world.device)

    def train(self, step):
        """x, y: the sequences of optimizer step number `step`, from 0, and their next tokens."""
        samples = self._samples(step, self.cfg.total_batch_size)
        starts = [self.start_of("train", i) for i in samples]
        data = self._to_device(self.tokens.windows(starts, self.cfg.block_size + 1))
        return data[:, :-1], data[:, 1:]

    def hessian(self, update):
        """
        x, y, u: the sequences of Hessian update number `update`, from 0, their next tokens, and a
        uniform number in [0, 1) for each position, from which the model draws its label. The
        numbers depend on the sample alone, hence differ between ranks and do not change with their
        count.
        """
        samples = self._samples(update, self.cfg.hessian_batch_size)
        starts = [self.start_of("hessian", i) for i in samples]
        noise = np.stack([np.random.default_rng([self.cfg.seed, len(STREAMS), i])
                          .random(self.cfg.block_size, dtype=np.float32) for i in samples])
        data = self._to_device(self.tokens.windows(starts, self.cfg.block_size + 1))
        return data[:, :-1], data[:, 1:], self._to_device(noise)

    def direction(self, update, like):
        """
        Hutchinson's random vector of Hessian update number `update`: a standard normal tensor for
        each tensor of `like`, the same on all ranks.
        """
        key = np.random.SeedSequence([self.cfg.seed, len(STREAMS) + 1, update]).generate_state(1)
        generator = torch.Generator(self.world.device).manual_seed(int(key[0]))
        return [torch.randn(t.shape, generator=generator, device=t.device, dtype=t.dtype)
                for t in like]

    def val(self):
        """
        This rank's share of the evaluation windows, in micro-batches of (x, y). The windows are the
        same for every evaluation, run and optimizer: all of val.bin when eval_iters is 0, else
        eval_iters * total_batch_size of them (all, if there are fewer), evenly spread.
        """
        wanted = self.cfg.eval_iters * self.cfg.total_batch_size or self.val_windows
        count = min(wanted, self.val_windows)
        picks = np.arange(count) * self.val_windows // count
        starts = picks[self.world.rank::self.world.size] * self.cfg.block_size
        for i in range(0, len(starts), self.cfg.batch_size):
            chunk = starts[i:i + self.cfg.batch_size]
            data = self._to_device(self.val_tokens.windows(chunk, self.cfg.block_size + 1))
            yield data[:, :-1], data[:, 1:]
