"""
The source of the running Python's standard library, as text to learn from: about 12 MB, on every
machine, nothing to download. Tests and installed packages are left out. About 1 file in 20 goes to
val.bin, chosen by the hash of its name.

    python data/pystdlib/prepare.py [--tokenizer=bytes|gpt2]
"""
import hashlib
import os
import sys
import sysconfig

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from tokenize_to_bin import prepare_arguments, write_bins  # noqa: E402, I001

from script import UserError, run_script  # noqa: E402
from documents import Texts  # noqa: E402

LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


def source_files(root):
    """Paths of the library's .py files relative to root, with '/', sorted."""
    names = []
    for folder, subfolders, files in os.walk(root):
        subfolders[:] = sorted(set(subfolders) - LEFT_OUT)
        names += [os.path.relpath(os.path.join(folder, f), root).replace(os.sep, "/")
                  for f in files if f.endswith(".py")]
    return sorted(names)


def in_val(name):
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % 20 == 0


def read(path):
    with open(path, encoding="utf-8", errors="replace") as file:
        return file.read()


def main(argv):
    args = prepare_arguments(__doc__, "bytes").parse_args(argv)
    root = sysconfig.get_paths()["stdlib"]
    names = source_files(root)
    if len(names) < 100:
        raise UserError(f"{root} has only {len(names)} source files: this Python comes without its "
                        f"standard library's source")
    write_bins(args, Texts([read(os.path.join(root, name)) for name in names]),
               lambda index, utf8: "val" if in_val(names[index]) else "train")


if __name__ == "__main__":
    run_script(main)
