"""
Tokenize documents into train.bin, val.bin and meta.json, the format that dataloader.py reads.

Threads tokenize in parallel, because tiktoken releases the GIL. The tokens do not depend on the
number of workers, and memory use does not grow with the source. Progress is saved after each batch:
run the same command again to resume after an interruption.
"""
import hashlib
import json
import math
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data.documents import read_batches, reading
from script import ArgumentParser, UserError, lock_file, write_atomically
from tokenizer import get_tokenizer

NOT_RECORDED = ("out_dir", "workers", "restart")   # not in meta.json: they do not change the tokens


def make_parser(doc, tokenizer):
    """Argument parser with the options that every prepare.py has."""
    parser = ArgumentParser(doc)
    parser.add_argument("--tokenizer", default=tokenizer,
                        help="bytes, gpt2 or another tiktoken encoding (default: %(default)s)")
    parser.add_argument("--out_dir", default=os.path.dirname(os.path.abspath(sys.argv[0])),
                        help="output folder (default: the folder of this script)")
    parser.add_argument("--workers", type=int, default=os.cpu_count(),
                        help="tokenizer threads (default: %(default)s)")
    parser.add_argument("--restart", action="store_true",
                        help="discard the progress of an interrupted run and start over")
    return parser


def split_by_hash(val_fraction):
    """Choose validation documents by the hash of their text alone."""
    def in_val(index, text):
        digest = hashlib.blake2b(text.encode(), digest_size=8).hexdigest()
        return int(digest, 16) < val_fraction * 2**64
    return in_val


def read_json(path):
    """Contents of a JSON file, or None if it does not exist. Raises UserError."""
    with reading(path):
        return json.loads(path.read_text("utf-8")) if path.exists() else None


def write_bins(args, documents, val_share, total=None):
    """
    Write the bins and meta.json to args.out_dir, which must not hold another data set. Documents
    without text are counted and left out. documents: an IterableDataset. val_share(index, text):
    True, False, or the share of a document, at its end, that goes to val. total: number of
    documents, for the progress bar. Raises UserError.
    """
    if args.workers < 1:
        raise UserError(f"workers must be at least 1, got {args.workers}")
    writer = BinWriter(args)
    try:
        writer.run(documents, val_share, total)
    except OSError as error:
        raise UserError(f"{args.out_dir}: {error}; fix this, then run the same command again to "
                        f"resume") from None
    print("train.bin: {train_tokens:,} tokens, val.bin: {val_tokens:,} tokens; left out: "
          "{left_out:,} of {documents:,} documents".format_map(writer.meta))
    print(f"train on this data set with --dataset={os.path.relpath(args.out_dir)}")


class BinWriter:
    """Writes {train,val}.bin.part and unfinished.json, from which an interrupted run resumes."""

    def __init__(self, args):
        self.folder, self.workers = Path(args.out_dir), args.workers
        self.finished, self.unfinished = self.folder / "meta.json", self.folder / "unfinished.json"
        self.tokenizer = get_tokenizer(args.tokenizer)
        self.dtype = np.dtype("<u2" if self.tokenizer.vocab_size <= 2**16 else "<u4")
        settings = {name: value for name, value in vars(args).items() if name not in NOT_RECORDED}
        found = read_json(self.finished) or (not args.restart and read_json(self.unfinished)) or {}
        if (found or (self.folder / "train.bin").exists()) and any(
                found.get(name) != value for name, value in settings.items()):
            raise UserError(f"{self.folder} holds another data set or other settings; choose "
                            f"another --out_dir, or pass --restart if it is unfinished")
        self.meta = found or {
            **settings, "vocab_size": self.tokenizer.vocab_size, "eot_id": self.tokenizer.eot_id,
            "dtype": self.dtype.name, "documents": 0, "left_out": 0, "train_tokens": 0,
            "val_tokens": 0}

    def run(self, documents, val_share, total):
        """Do what an interrupted run has left to do."""
        if not self.finished.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with self.open_part("train") as train, self.open_part("val") as val:
                self.tokenize(documents, val_share, total, train, val)
                self.add_sha256(train=train, val=val)
                self.save(self.finished, train, val)
        for part in self.folder.glob("*.bin.part"):
            part.replace(part.with_suffix(""))
        self.unfinished.unlink(missing_ok=True)

    def open_part(self, split):
        """Open and lock a part; truncate what was written after the last save."""
        file = open(self.folder / f"{split}.bin.part", "a+b")
        lock_file(file, f"another process is preparing {self.folder}; wait for it, or stop it")
        size = self.meta[f"{split}_tokens"] * self.dtype.itemsize
        if file.tell() < size:
            raise UserError(f"{file.name} is shorter than it was; pass --restart to start over")
        file.truncate(size)
        return file

    def tokenize(self, documents, val_share, total, train, val):
        meta = self.meta
        if "position" in meta:
            print(f"resuming after {meta['documents']:,} documents")
            documents.load_state_dict(meta["position"])
        with (ThreadPoolExecutor(self.workers) as pool,
              tqdm(desc="tokenize", initial=meta["documents"], total=total, unit=" documents",
                   unit_scale=True) as bar):
            for batch in read_batches(documents):
                for text, ids in zip(batch, pool.map(self.tokenizer.encode_to_numpy, batch)):
                    if text:
                        ids = np.append(ids, self.tokenizer.eot_id).astype(self.dtype)
                        in_val = math.ceil(val_share(meta["documents"], text) * len(ids))
                        in_train = len(ids) - in_val
                        train.write(ids[:in_train])
                        val.write(ids[in_train:])
                        meta["train_tokens"] += in_train
                        meta["val_tokens"] += in_val
                    meta["left_out"] += not text
                    meta["documents"] += 1
                meta["position"] = documents.state_dict()
                self.save(self.unfinished, train, val)
                bar.update(len(batch))

    def add_sha256(self, **files):
        for split, file in files.items():
            if not self.meta[f"{split}_tokens"]:
                raise UserError(f"no documents for {split}.bin ({self.meta['left_out']:,} had no "
                                f"text); pass --restart with other settings")
            file.seek(0)
            self.meta[f"{split}_sha256"] = hashlib.file_digest(file, "sha256").hexdigest()
        del self.meta["position"]

    def save(self, path, *files):
        for file in files:
            file.flush()
            os.fsync(file.fileno())
        write_atomically(str(path), json.dumps(self.meta, indent=2).encode())
