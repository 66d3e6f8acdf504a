"""
FineWeb-Edu (Penedo et al., 2024), its sample of 10B tokens, read straight from the Hugging Face
hub; a 20 GB train.bin. Or from files fetched before.

    python data/fineweb_edu/prepare.py [--source=FOLDER_OR_PATTERN_OR_URL]
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tokenize_to_bin import prepare_arguments, split_by_hash, write_bins  # noqa: E402, I001

from script import run_script  # noqa: E402
from documents import Files, hub_files  # noqa: E402


def main(argv):
    parser = prepare_arguments(__doc__, "gpt2")
    parser.add_argument("--source", help="its files, instead of the hub's: a folder, a pattern or "
                        "a URL")
    args = parser.parse_args(argv)
    source = Files(args.source or hub_files("HuggingFaceFW/fineweb-edu", "sample-10BT"))
    write_bins(args, source, split_by_hash(0.0005))


if __name__ == "__main__":
    run_script(main)
