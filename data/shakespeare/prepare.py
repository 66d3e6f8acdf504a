"""
Tiny Shakespeare (1.1 MB, from Karpathy's char-rnn). As in nanoGPT, the first 90% is train.bin and
the rest val.bin.

    python data/shakespeare/prepare.py [--tokenizer=gpt2|bytes] [--source=input.txt]
"""
import hashlib
import sys
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # the repository root

from data.documents import Texts
from data.tokenize_to_bin import SPLITS, make_parser, write_bins
from script import UserError, run_script

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def read_text(path):
    """Text of a local file, or of the download if path is None. Raises UserError."""
    try:
        with open(path, "rb") if path else urllib.request.urlopen(URL, timeout=30) as file:
            content = file.read()
    except OSError as error:
        raise UserError(f"cannot read {path or URL}: {error}; download it elsewhere and pass "
                        f"--source=FILE, or use data/pystdlib, which needs no network") from None
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise UserError(f"{path or URL} is not the whole of tiny Shakespeare: its checksum is "
                        f"wrong. For other texts use data/custom/prepare.py")
    return content.decode("utf-8")


def main(argv):
    parser = make_parser(__doc__, "gpt2")
    parser.add_argument("--source", help="local copy of input.txt (default: download it)")
    args = parser.parse_args(argv)
    text = read_text(args.source)
    boundary = int(len(text) * 0.9)
    write_bins(args, Texts([text[:boundary], text[boundary:]]), lambda index, utf8: SPLITS[index])


if __name__ == "__main__":
    run_script(main)
