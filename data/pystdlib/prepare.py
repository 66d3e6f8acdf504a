"""
Source code of the running Python's standard library: about 12 MB, with nothing to download. Tests
and installed packages are left out. A hash of the file name puts 1 file in 20 into val.bin.

    python data/pystdlib/prepare.py [--tokenizer=bytes|gpt2]
"""
import hashlib
import sys
import sysconfig
from pathlib import Path

from datasets import Dataset

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))   # the repository root

from data.tokenize_to_bin import make_parser, write_bins
from script import run_script

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def in_val(name):
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 20 == 0


def main(argv):
    args = make_parser(__doc__, "bytes").parse_args(argv)
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = [path.relative_to(root) for path in root.rglob("*.py")]
    names = sorted(path.as_posix() for path in paths if not LEFT_OUT & set(path.parts[:-1]))
    texts = [(root / name).read_text(encoding="utf-8", errors="replace") for name in names]
    write_bins(args, Dataset.from_dict({"text": texts}).to_iterable_dataset(),
               lambda index, text: in_val(names[index]), len(texts))


if __name__ == "__main__":
    run_script(main)
