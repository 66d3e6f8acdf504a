"""
Tiny Shakespeare (1.1 MB, from Karpathy's char-rnn): the first 90% to train on, the rest to
evaluate, as in nanoGPT.

    python data/shakespeare/prepare.py [--tokenizer=gpt2|bytes] [--source=input.txt]
"""
import hashlib
import os
import sys
import urllib.request

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tokenize_to_bin import SPLITS, prepare_arguments, write_bins  # noqa: E402, I001

from script import UserError, run_script  # noqa: E402
from documents import Texts  # noqa: E402

URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def read_text(source):
    """The play text, downloaded or from a local file; its checksum must be right."""
    try:
        if source is None:
            with urllib.request.urlopen(URL, timeout=30) as response:
                raw = response.read()
        else:
            with open(source, "rb") as file:
                raw = file.read()
    except OSError as error:
        raise UserError(f"cannot get {source or URL}: {error}; fetch the file on another machine "
                        f"and pass --source=FILE, or use data/pystdlib, which needs no network"
                        ) from None
    if hashlib.sha256(raw).hexdigest() != SHA256:
        raise UserError(f"{source or URL} is not tiny Shakespeare, or only a part of it: its "
                        f"checksum is wrong. For another text use data/custom/prepare.py")
    return raw.decode("utf-8")


def main(argv):
    parser = prepare_arguments(__doc__, "gpt2")
    parser.add_argument("--source", help="a local copy of input.txt, instead of the download")
    args = parser.parse_args(argv)
    text = read_text(args.source)
    cut = int(len(text) * 0.9)
    write_bins(args, Texts([text[:cut], text[cut:]]), lambda index, utf8: SPLITS[index])


if __name__ == "__main__":
    run_script(main)
