#!/usr/bin/env bash
# The whole study: data, every run that study.csv lacks, tables and figures. Stop it at any time and
# run it again to resume. `results/run.sh 8k/final` runs only what begins so.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -f data/pystdlib/meta.json ] || $python data/pystdlib/prepare.py
$python results/study.py "$@"
$python results/report.py
