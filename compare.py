"""
Runs side by side: final and best validation loss, from their metrics.jsonl.

    python compare.py out/quickstart-sophiag out/quickstart-adamw
"""
import json
import os

from configurator import ArgumentParser, UserError, run_script
from metrics import read_metrics


def summary(run):
    """A run's last and best evaluation: dict of table cells."""
    path = os.path.join(run, "metrics.jsonl")
    records = read_metrics(path)
    evals = [r for r in records if "val/loss" in r]
    if not evals:
        raise UserError(f"{path} has no evaluation: not a run directory, or one just begun")
    config_path = os.path.join(run, "config.json")
    try:
        with open(config_path, encoding="utf-8") as file:
            optimizer = json.load(file)["optimizer"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"cannot read {config_path} ({type(error).__name__})") from None
    last, best = evals[-1], min(evals, key=lambda r: r["val/loss"])
    return {"run": os.path.basename(os.path.normpath(run)), "optimizer": optimizer,
            "steps": f"{last['iter']:,}", "tokens": f"{last['tokens']:,}",
            "minutes": f"{last['seconds'] / 60:.1f}",
            "final val loss": f"{last['val/loss']:.4f} +- {last['val/loss_stderr']:.4f}",
            "best val loss": f"{best['val/loss']:.4f} at {best['iter']:,}"}


def main(argv):
    parser = ArgumentParser(__doc__)
    parser.add_argument("runs", nargs="+", help="run directories")
    rows = [summary(run) for run in parser.parse_args(argv).runs]
    widths = {key: max(len(key), *(len(row[key]) for row in rows)) for key in rows[0]}
    for row in [{key: key for key in widths}, *rows]:
        print("  ".join(row[key].ljust(width) for key, width in widths.items()).rstrip())


if __name__ == "__main__":
    run_script(main)
