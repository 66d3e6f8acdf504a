"""
OpenWebText (Gokaslan & Cohen, 2019): 8,013,769 documents, 9.04B GPT-2 tokens, 18 GB. Read from the
Hugging Face hub without storing the text, or from files you downloaded.

    python data/openwebtext/prepare.py [--source=FOLDER_OR_PATTERN_OR_URL]

From parquet, the validation documents are nanoGPT's: 4,434,897 tokens as published, 4,434,606 since
the hub's revision. From other formats, the hash of its text chooses 1 document in 2000.
"""
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # the repository root

from data.documents import Files, hub_files
from data.tokenize_to_bin import make_parser, split_by_hash, write_bins
from script import run_script

VAL_FRACTION, SEED = 0.0005, 2357


def split_like_nanogpt(rows):
    """Same rows in val as train_test_split(test_size=0.0005, seed=2357) of `datasets`."""
    order = np.random.default_rng(SEED).permutation(rows)
    val = set(order[:math.ceil(VAL_FRACTION * rows)].tolist())
    return lambda index, utf8: "val" if index in val else "train"


def main(argv):
    parser = make_parser(__doc__, "gpt2")
    parser.add_argument("--source", help="folder, pattern or URL of the files (default: the hub)")
    args = parser.parse_args(argv)
    source = Files(args.source or hub_files("Skylion007/openwebtext"))
    assign_split = split_like_nanogpt(source.rows) if source.rows else split_by_hash(VAL_FRACTION)
    write_bins(args, source, assign_split)


if __name__ == "__main__":
    run_script(main)
