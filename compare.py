"""
Runs side by side: final and best validation loss, from their metrics.jsonl.

    python compare.py out/quickstart-sophiag out/quickstart-adamw
"""
import json
import os
import sys

from configurator import UserError, run_script
from metrics import read_metrics


def summary(run):
    """A run's last and best evaluation: dict of table cells."""
    path = os.path.join(run, "metrics.jsonl")
    records = read_metrics(path)
    evals = [r for r in records if "val/loss" in r]
    if not evals:
        raise UserError(f"{path} has no evaluation: not a run directory, or one just begun")
    with open(os.path.join(run, "config.json"), encoding="utf-8") as file:
        config = json.load(file)
    last, best = evals[-1], min(evals, key=lambda r: r["val/loss"])
    return {"run": os.path.basename(os.path.normpath(run)), "optimizer": config["optimizer"],
            "steps": f"{last['iter']:,}", "tokens": f"{last['tokens']:,}",
            "minutes": f"{last['seconds'] / 60:.1f}",
            "final val loss": f"{last['val/loss']:.4f} +- {last['val/loss_stderr']:.4f}",
            "best val loss": f"{best['val/loss']:.4f} at {best['iter']:,}"}


def main(argv):
    if not argv or any(word.startswith("-") for word in argv):
        print(__doc__.strip())
        sys.exit(0 if argv else 2)
    rows = [summary(run) for run in argv]
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in widths}, *rows]:
        print("  ".join(row[key].ljust(width) for key, width in widths.items()).rstrip())


if __name__ == "__main__":
    run_script(main)
