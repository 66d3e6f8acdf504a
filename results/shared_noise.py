"""
train.py with a fault of the official code: all ranks draw labels from the same random numbers. Here
each sequence stands for a rank: all sequences of a Hessian batch use the noise of its first.

    python results/shared_noise.py results/base.py --seed=1 ...     # words of train.py
"""
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
import train  # noqa: E402
from script import run_script  # noqa: E402


class SharedNoise(train.DataLoader):
    def hessian(self, update):
        x, y, noise = super().hessian(update)
        return x, y, noise[:1].expand_as(noise)


if __name__ == "__main__":
    train.DataLoader = SharedNoise
    run_script(train.main)
