#!/usr/bin/env bash
# The whole study: data, every run that study.csv lacks, tables and figures. Stop it at any time and
# run it again to resume. `results/run.sh 8k/final` runs only what begins so.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
[ -f data/pystdlib/meta.json ] || $python data/pystdlib/prepare.py
for optimizer in sophiag lion muon; do   # times of a step: on an idle machine
    times=results/step-$optimizer.json
    [ -f $times ] || OMP_NUM_THREADS=1 $python bench.py results/base.py --optimizer=$optimizer \
        --warmup_iters=0 --only=step --repeat=20 --json=$times
done
$python results/study.py "$@"
$python results/report.py
