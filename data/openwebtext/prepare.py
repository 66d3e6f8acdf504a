"""
OpenWebText (Gokaslan & Cohen, 2019): 8,013,769 documents, 9.04B tokens of GPT-2's, 18 GB. Read
straight from the Hugging Face hub, of which nothing else is stored, or from files fetched before.

    python data/openwebtext/prepare.py [--source=FOLDER_OR_PATTERN_OR_URL]

The validation documents are nanoGPT's where the number of rows is known, as it is for parquet;
otherwise 1 document in 2000 by the hash of its text.
"""
import math
import os
import sys

import numpy as np

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tokenize_to_bin import prepare_arguments, split_by_hash, write_bins  # noqa: E402, I001

from script import run_script  # noqa: E402
from documents import Files, hub_files  # noqa: E402

HUB = "Skylion007/openwebtext"
VAL_FRACTION, SEED = 0.0005, 2357
# Of nanoGPT's val.bin: as published, and since the data set at the hub was revised.
VAL_TOKENS = {4_434_897: "the original", 4_434_606: "the revised"}


def split_like_nanogpt(rows):
    """The rows that train_test_split(test_size=0.0005, seed=2357) of `datasets` puts into val."""
    val = np.random.default_rng(SEED).permutation(rows)[:math.ceil(VAL_FRACTION * rows)]
    val = set(val.tolist())
    return lambda index, utf8: "val" if index in val else "train"


def main(argv):
    parser = prepare_arguments(__doc__, "gpt2")
    parser.add_argument("--source", help="parquet, jsonl or txt files (.gz, .zst), instead of the "
                        "hub's: a folder, a pattern or a URL")
    args = parser.parse_args(argv)
    source = Files(args.source or hub_files(HUB))
    split = split_like_nanogpt(source.rows) if source.rows else split_by_hash(VAL_FRACTION)
    tokens = write_bins(args, source, split)["val_tokens"]
    if args.tokenizer == "gpt2" and not args.source:
        known = VAL_TOKENS.get(tokens, "neither the original nor the revised")
        print(f"val.bin is of {known} OpenWebText, by its number of tokens")


if __name__ == "__main__":
    run_script(main)
