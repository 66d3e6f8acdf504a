"""
Text of your own.

    python data/custom/prepare.py --source=book.txt --tokenizer=bytes --out_dir=data/book
    python train.py config/quickstart_sophiag.py --dataset=book --out_dir=out/book

--source is a file, a folder, a pattern or a URL (s3://, hf://datasets/...) of parquet or jsonl,
whose text is in --field, or of txt, in which <|endoftext|> separates documents and one longer than
64 KiB is cut at the end of a line. jsonl and txt may be .gz or .zst. --source=- reads standard
input, as txt.

Of many documents, those in val are chosen by the hash of their text. Of few, val is the end.
"""
import math
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tokenize_to_bin import prepare_arguments, split_by_hash, write_bins  # noqa: E402, I001

from script import UserError, run_script  # noqa: E402
from documents import Files, standard_input  # noqa: E402
from tokenizer import get_tokenizer  # noqa: E402

VAL_TOKENS = 2**17   # two evaluations of config/quickstart_*.py: the number is an estimate
VAL_DOCUMENTS = 10   # with fewer, chance would decide how large val is


def main(argv):
    parser = prepare_arguments(__doc__, "gpt2")
    parser.add_argument("--source", required=True)
    parser.add_argument("--field", default="text", help="parquet column or jsonl key (now text)")
    parser.add_argument("--val_fraction", type=float, help="default: enough for an evaluation, "
                        "between 0.01 and 0.1")
    args = parser.parse_args(argv)
    source = standard_input() if args.source == "-" else Files(args.source, args.field)
    if source.passed_over:
        print(f"not read, because of the suffix ({len(source.passed_over)} files): "
              f"{', '.join(source.passed_over[:3])}")
    if args.val_fraction is None:
        tokens = source.text_bytes * get_tokenizer(args.tokenizer).tokens_per_byte
        args.val_fraction = round(min(0.1, max(0.01, VAL_TOKENS / max(tokens, 1))), 4)
    if not 0 < args.val_fraction < 1:
        raise UserError(f"val_fraction must be between 0 and 1, got {args.val_fraction}")
    share, enough = f"{100 * args.val_fraction:.3g}%", math.ceil(VAL_DOCUMENTS / args.val_fraction)
    if source.count(enough) == enough:
        print(f"val: {share} of the documents, chosen by the hash of their text")
        write_bins(args, source, split_by_hash(args.val_fraction))
    else:
        print(f"val: the last {share} of the tokens, since there are fewer than {enough} documents")
        write_bins(args, source, lambda index, utf8: "train", tail=args.val_fraction)


if __name__ == "__main__":
    run_script(main)
