"""
Documents -> train.bin, val.bin and meta.json, the format that dataloader.py reads.
"""
import hashlib
import json
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from configurator import ArgumentParser, UserError, run_script  # noqa: E402, F401
from tokenizer import get_tokenizer  # noqa: E402


def write_bins(data_dir, tokenizer_name, **splits):
    """
    Write data_dir/SPLIT.bin for each split, an iterable of texts (documents), each followed by the
    end-of-text id, and meta.json. Files appear whole or not at all. Returns meta.
    """
    tokenizer = get_tokenizer(tokenizer_name)
    try:
        os.makedirs(data_dir, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make {data_dir}: {error.strerror}") from None
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    meta = {"tokenizer": tokenizer.name, "vocab_size": tokenizer.vocab_size,
            "eot_id": tokenizer.eot_id, "dtype": dtype.name}
    for split, documents in splits.items():
        path = os.path.join(data_dir, f"{split}.bin")
        count, digest = 0, hashlib.sha256()
        with open(path + ".tmp", "wb") as file:
            for text in documents:
                ids = np.array([*tokenizer.encode(text), tokenizer.eot_id], dtype)
                digest.update(ids)
                file.write(ids)
                count += len(ids)
        if not count:
            raise UserError(f"no documents for {path}")
        os.replace(path + ".tmp", path)
        meta[f"{split}_tokens"], meta[f"{split}_sha256"] = count, digest.hexdigest()
        print(f"{os.path.relpath(path)}: {count:,} tokens")
    with open(os.path.join(data_dir, "meta.json"), "w", encoding="utf-8") as file:
        json.dump(meta, file, indent=2)
    return meta


def prepare_arguments(doc, tokenizer):
    """The options that every prepare.py has: --tokenizer, --out_dir."""
    parser = ArgumentParser(doc)
    parser.add_argument("--tokenizer", default=tokenizer, help="bytes or gpt2 (now %(default)s)")
    parser.add_argument("--out_dir", default=os.path.dirname(os.path.abspath(sys.argv[0])),
                        help="where the bins go (default: beside this script)")
    return parser
