"""
Tokenize your own text.

    python data/custom/prepare.py --source=book.txt --tokenizer=bytes --out_dir=data/book
    python train.py config/quickstart_sophiag.py --dataset=book --out_dir=out/book

--source: a file, folder, pattern or URL (s3://, hf://datasets/...). Formats: parquet, or jsonl
and txt, also as .gz or .zst. In txt, <|endoftext|> separates documents, and documents over 64K
characters are cut, at the end of a line if possible.

A hash of the text chooses the validation documents. If there are few, val is the end of each.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # the repository root

from data.documents import find_files, load_documents
from data.tokenize_to_bin import make_parser, split_by_hash, write_bins
from script import UserError, run_script

VAL_DOCUMENTS = 10   # with fewer, the size of val would depend on chance


def main(argv):
    parser = make_parser(__doc__, "gpt2")
    parser.add_argument("--source", required=True)
    parser.add_argument("--field", default="text",
                        help="parquet column or jsonl key (default: %(default)s)")
    parser.add_argument("--val_fraction", type=float,
                        help="share of val (default: 0.1, 0.01 of a source over 100 MB)")
    args = parser.parse_args(argv)
    files = find_files(args.source)
    args.source_bytes = sum(files.values())   # another size is another data set
    if args.val_fraction is None:
        args.val_fraction = 0.1 if args.source_bytes < 10**8 else 0.01
    if not 0 < args.val_fraction < 1:
        raise UserError(f"val_fraction must be between 0 and 1, got {args.val_fraction}")
    documents, total = load_documents(files, args.field)
    enough = math.ceil(VAL_DOCUMENTS / args.val_fraction)
    many = (total or sum(1 for _ in documents.take(enough))) >= enough
    print(f"val: {100 * args.val_fraction:.3g}% of the documents, chosen by a hash of their text"
          if many else f"val: the last {100 * args.val_fraction:.3g}% of each document")
    write_bins(args, documents, split_by_hash(args.val_fraction) if many
               else lambda index, text: args.val_fraction, total)


if __name__ == "__main__":
    run_script(main)
