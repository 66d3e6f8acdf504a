"""
The 10B-token sample of FineWeb-Edu (Penedo et al., 2024), read from the Hugging Face hub or from
files you downloaded. train.bin takes 20 GB.

    python data/fineweb_edu/prepare.py [--source=FOLDER_OR_PATTERN_OR_URL]
"""
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # the repository root

from data.documents import Files, hub_files
from data.tokenize_to_bin import make_parser, split_by_hash, write_bins
from script import run_script


def main(argv):
    parser = make_parser(__doc__, "gpt2")
    parser.add_argument("--source", help="folder, pattern or URL of the files (default: the hub)")
    args = parser.parse_args(argv)
    source = Files(args.source or hub_files("HuggingFaceFW/fineweb-edu", "sample-10BT"))
    write_bins(args, source, split_by_hash(0.0005))


if __name__ == "__main__":
    run_script(main)
