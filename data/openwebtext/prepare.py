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

from data.documents import find_files, hub_files, load_documents
from data.tokenize_to_bin import make_parser, split_by_hash, write_bins
from script import run_script

VAL_FRACTION, SEED = 0.0005, 2357


def split_like_nanogpt(rows):
    """Same rows in val as train_test_split(test_size=0.0005, seed=2357) of `datasets`."""
    order = np.random.default_rng(SEED).permutation(rows)
    val = set(order[:math.ceil(VAL_FRACTION * rows)].tolist())
    return lambda index, text: index in val


def main(argv):
    parser = make_parser(__doc__, "gpt2")
    parser.add_argument("--source", help="folder, pattern or URL of the files (default: the hub)")
    args = parser.parse_args(argv)
    files = find_files(args.source) if args.source else hub_files("Skylion007/openwebtext")
    args.source_bytes = sum(files.values())   # another size is another data set
    documents, rows = load_documents(files)
    in_val = split_like_nanogpt(rows) if rows else split_by_hash(VAL_FRACTION)
    write_bins(args, documents, in_val, rows)


if __name__ == "__main__":
    run_script(main)
