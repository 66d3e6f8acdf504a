"""
Tokenize your own text.

    python data/custom/prepare.py --source=book.txt --tokenizer=bytes --out_dir=data/book
    python train.py config/quickstart_sophiag.py --dataset=book --out_dir=out/book

--source: a file, folder, pattern or URL (s3://, hf://datasets/...), or - for txt from standard
input. Formats: parquet, or jsonl and txt, also as .gz or .zst. In txt, <|endoftext|> separates
documents, and documents over 64 KiB are cut, at the end of a line if possible.

A hash of the text chooses the validation documents. If there are few, val is the end of the text.
"""
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # the repository root

from data.documents import Files, read_stdin
from data.tokenize_to_bin import make_parser, split_by_hash, write_bins
from script import UserError, run_script
from tokenizer import get_tokenizer

VAL_TOKENS = 2**17   # approximate; enough for two evaluations of config/quickstart_*.py
VAL_DOCUMENTS = 10   # with fewer, the size of val would depend on chance


def main(argv):
    parser = make_parser(__doc__, "gpt2")
    parser.add_argument("--source", required=True)
    parser.add_argument("--field", default="text",
                        help="parquet column or jsonl key (default: %(default)s)")
    parser.add_argument("--val_fraction", type=float,
                        help="share of val (default: enough for an evaluation, 0.01 to 0.1)")
    args = parser.parse_args(argv)
    source = read_stdin() if args.source == "-" else Files(args.source, args.field)
    if source.ignored:
        print(f"ignored {len(source.ignored)} files with other suffixes:", *source.ignored[:3])
    if args.val_fraction is None:
        tokens = source.text_bytes * get_tokenizer(args.tokenizer).tokens_per_byte
        args.val_fraction = round(min(0.1, max(0.01, VAL_TOKENS / max(tokens, 1))), 4)
    if not 0 < args.val_fraction < 1:
        raise UserError(f"val_fraction must be between 0 and 1, got {args.val_fraction}")
    percent = f"{100 * args.val_fraction:.3g}%"
    enough = math.ceil(VAL_DOCUMENTS / args.val_fraction)
    if source.count(enough) == enough:
        print(f"val: {percent} of the documents, chosen by a hash of their text")
        write_bins(args, source, split_by_hash(args.val_fraction))
    else:
        print(f"val: the last {percent} of the tokens (fewer than {enough} documents)")
        write_bins(args, source, lambda index, utf8: "train", val_tail=args.val_fraction)


if __name__ == "__main__":
    run_script(main)
