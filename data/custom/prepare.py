"""
Text of your own.

    python data/custom/prepare.py --source='notes/*.txt' --out_dir=data/notes
    python train.py config/quickstart_sophiag.py --dataset=notes --out_dir=out/notes

--source is a file, a folder, a pattern or a URL (s3://, hf://datasets/...) of parquet or jsonl,
whose text is in --field, or of txt, in which <|endoftext|> separates documents and one longer than
64 KiB is cut at the end of a line. jsonl and txt may be .gz or .zst.
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tokenize_to_bin import prepare_arguments, split_by_hash, write_bins  # noqa: E402, I001

from configurator import UserError, run_script  # noqa: E402
from documents import Files  # noqa: E402


def main(argv):
    parser = prepare_arguments(__doc__, "gpt2")
    parser.add_argument("--source", required=True)
    parser.add_argument("--field", default="text", help="parquet column or jsonl key (now text)")
    parser.add_argument("--val_fraction", type=float, default=0.01, help="of the documents, chosen "
                        "by the hash of their text (now %(default)s)")
    args = parser.parse_args(argv)
    if not 0 < args.val_fraction < 1:
        raise UserError(f"val_fraction must be between 0 and 1, got {args.val_fraction}")
    write_bins(args, Files(args.source, args.field), split_by_hash(args.val_fraction))


if __name__ == "__main__":
    run_script(main)
