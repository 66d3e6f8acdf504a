#!/usr/bin/env bash
# Every run of the study, in order, two at a time on one thread each. A sweep that is in runs.csv
# is passed over, so that the study can be made in pieces; to begin anew:
# rm -r results/*.csv out/study
#   results/run.sh            all
#   results/run.sh small/lr   sweeps whose names begin so
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-.venv/bin/python}
jobs=${JOBS:-2}
export OMP_NUM_THREADS=$jobs   # sweep.py shares them out: one for each run
only=${1:-}

due() {   # name of a sweep
    [[ $1 == "$only"* ]] && ! grep -qs "^$1," results/runs.csv
}

sweep() {   # name, words of sweep.py
    local name=$1; shift
    due "$name" || return 0
    $python sweep.py "$@" --out_dir="out/study/$name" --jobs="$jobs"
    $python results/collect.py "$name"
}

shared_noise() {   # name, words of train.py; on three seeds
    local name=$1; shift
    due "$name" || return 0
    for seed in 2 3 4; do
        OMP_NUM_THREADS=1 $python results/shared_noise.py "$@" --seed=$seed --init_from=auto \
            --out_dir="out/study/$name/seed=$seed" > /dev/null &
    done
    wait
    jobs=0 sweep "$name" "$@" --seed=2,3,4   # the table
}

small=results/small.py
adamw=--optimizer=adamw
lion=--optimizer=lion
sophiag=--optimizer=sophiag
steered="--optimizer=sophiag --target_win_rate=0.3"

# Time of a step, on a machine that does nothing else.
sweep small/speed $small --seed=1,2,3 --optimizer=adamw,lion,sophiag --max_iters=300 --eval_interval=300

# Learning rates: factors of 2, on seed 1; more where the best was at an edge.
sweep small/lr-adamw $small --seed=1 $adamw --learning_rate=2e-3,4e-3,8e-3,1.6e-2,3.2e-2
sweep small/lr-lion $small --seed=1 $lion --learning_rate=1e-4,2e-4,4e-4,8e-4,1.6e-3
sweep small/lr-sophiag $small --seed=1 $sophiag --learning_rate=5e-5,1e-4,2e-4,4e-4,8e-4
sweep small/lr-steered $small --seed=1 $steered --learning_rate=5e-5,1e-4,2e-4,4e-4,8e-4

# The best of these, on three other seeds.
sweep small/final-adamw $small --seed=2,3,4 $adamw --learning_rate=8e-3
sweep small/final-lion $small --seed=2,3,4 $lion --learning_rate=2e-4
sweep small/final-sophiag $small --seed=2,3,4 $sophiag --learning_rate=4e-4
sweep small/final-steered $small --seed=2,3,4 $steered --learning_rate=4e-4

# Half of that, at which no seed diverges: from here on SophiaG is compared with itself.
half=--learning_rate=2e-4
sweep small/half-sophiag $small --seed=2,3,4 $sophiag $half
sweep small/rho-sophiag $small --seed=1 $sophiag $half --rho=5e-3,0.5,5
sweep small/rho-steered $small --seed=1 $steered $half --rho=5e-3,0.5,5

# Other estimators at the same win_rate; no Hessian at all; an AdamW whose loss is not divided by
# its 6 micro-steps, which is the same as a clipping threshold of a sixth.
sweep small/half-steered $small --seed=2,3,4 $steered $half
sweep small/half-fisher $small --seed=2,3,4 $steered $half --hessian_estimator=empirical_fisher
sweep small/half-hutchinson $small --seed=2,3,4 $steered $half --hessian_estimator=hutchinson
sweep small/half-sign $small --seed=2,3,4 $sophiag $half --hessian_interval=1000000
sweep small/clip-adamw $small --seed=2,3,4 $adamw --learning_rate=8e-3 --grad_clip=0.16667

# Labels drawn with one noise for all sequences, as by ranks that are seeded alike.
shared_noise small/half-shared $small $sophiag $half

# Steering to lower targets, at which more is clipped.
sweep small/target-0.15 $small --seed=1 $sophiag $half --target_win_rate=0.15 --rho=5e-3,0.05,0.5,5
sweep small/target-0.1 $small --seed=1 $sophiag $half --target_win_rate=0.1 --rho=5e-3,0.05,0.5,5
sweep small/half-target $small --seed=2,3,4 $sophiag $half --target_win_rate=0.1

# The interval k; five times the warmup.
sweep small/half-k1 $small --seed=2,3,4 $sophiag $half --hessian_interval=1
sweep small/half-k100 $small --seed=2,3,4 $sophiag $half --hessian_interval=100
sweep small/warm-sophiag $small --seed=2,3,4 $sophiag --learning_rate=4e-4 --warmup_iters=500

# Five times the warmup, for every arm; ρ is steered to 0.1 from here on.
warm="$small --warmup_iters=500"
steered="--optimizer=sophiag --target_win_rate=0.1"
sweep warm/lr-adamw $warm --seed=1 $adamw --learning_rate=2e-3,4e-3,8e-3,1.6e-2,3.2e-2
sweep warm/lr-lion $warm --seed=1 $lion --learning_rate=1e-4,2e-4,4e-4,8e-4,1.6e-3
sweep warm/lr-sophiag $warm --seed=1 $sophiag --learning_rate=1e-4,2e-4,4e-4,8e-4,1.6e-3
sweep warm/lr-steered $warm --seed=1 $steered --learning_rate=1e-4,2e-4,4e-4,8e-4,1.6e-3
sweep warm/final-adamw $warm --seed=2,3,4 $adamw --learning_rate=8e-3
sweep warm/final-lion $warm --seed=2,3,4 $lion --learning_rate=8e-4
sweep warm/final-sophiag $warm --seed=2,3,4 $sophiag --learning_rate=8e-4
sweep warm/final-steered $warm --seed=2,3,4 $steered --learning_rate=8e-4

# As long as SophiaG's 2,000 steps take, which are 9% slower; twice and four times the steps. Each on
# a full schedule of its own, a quarter of it warmup.
equal_time="$warm --max_iters=2180 --warmup_iters=545 --eval_interval=218"
twice="$warm --max_iters=4000 --warmup_iters=1000 --eval_interval=400"
four="$warm --max_iters=8000 --warmup_iters=2000 --eval_interval=800"
sweep warm/time-adamw $equal_time --seed=2,3,4 $adamw --learning_rate=8e-3
sweep warm/twice-adamw $twice --seed=2,3,4 $adamw --learning_rate=8e-3
sweep warm/twice-sophiag $twice --seed=2,3,4 $sophiag --learning_rate=8e-4
sweep warm/four-adamw $four --seed=2,3,4 $adamw --learning_rate=8e-3
sweep warm/four-sophiag $four --seed=2,3,4 $sophiag --learning_rate=8e-4
# Whether other learning rates are better at that length.
sweep warm/four-lr-adamw $four --seed=2 $adamw --learning_rate=4e-3,1.6e-2
sweep warm/four-lr-sophiag $four --seed=2 $sophiag --learning_rate=4e-4,1.6e-3
sweep warm/low-adamw $four --seed=2,3,4 $adamw --learning_rate=4e-3

# ρ, estimators and faults as above, at the learning rate that is SophiaG's best here.
best=--learning_rate=8e-4
sweep warm/rho-sophiag $warm --seed=1 $sophiag $best --rho=5e-3,0.5,5
sweep warm/rho-steered $warm --seed=1 $steered $best --rho=5e-3,0.5,5
sweep warm/target-0.3 $warm --seed=1 $sophiag $best --target_win_rate=0.3 --rho=5e-3,0.05,0.5,5
# The best of these, and 0.3 as the target, on the seeds of the finals.
sweep warm/tuned-sophiag $warm --seed=2,3,4 $sophiag $best --rho=0.5
sweep warm/starts-low $warm --seed=2,3,4 $sophiag $best --target_win_rate=0.3 --rho=5e-3,0.05
sweep warm/starts-high $warm --seed=2,3,4 $sophiag $best --target_win_rate=0.3 --rho=0.5,5
# SophiaG's finals on the machine of what is compared with it below.
sweep warm/again-sophiag $warm --seed=2,3,4 $sophiag $best
sweep warm/sign $warm --seed=2,3,4 $sophiag $best --hessian_interval=1000000
sweep warm/k1 $warm --seed=2,3,4 $sophiag $best --hessian_interval=1
sweep warm/k100 $warm --seed=2,3,4 $sophiag $best --hessian_interval=100
sweep warm/fisher $warm --seed=2,3,4 $steered $best --hessian_estimator=empirical_fisher
sweep warm/hutchinson $warm --seed=2,3,4 $steered $best --hessian_estimator=hutchinson
sweep warm/clip $warm --seed=2,3,4 $adamw --learning_rate=8e-3 --grad_clip=0.16667
shared_noise warm/shared $warm $sophiag $best

# Half of all steps are warmup.
long="$small --warmup_iters=1000"
sweep long/lr-adamw $long --seed=1 $adamw --learning_rate=8e-3,1.6e-2
sweep long/lr-lion $long --seed=1 $lion --learning_rate=8e-4,1.6e-3
sweep long/lr-sophiag $long --seed=1 $sophiag --learning_rate=8e-4,1.6e-3

# Four times the batch, so four times the tokens: 8.2M, 25 for each parameter. The rest is the same.
batch="$small --batch_size=32 --total_batch_size=32 --eval_iters=16"
sweep batch/lr-adamw $batch --seed=1 $adamw --learning_rate=2e-3,4e-3,8e-3,1.6e-2,3.2e-2
sweep batch/lr-lion $batch --seed=1 $lion --learning_rate=1e-4,2e-4,4e-4,8e-4,1.6e-3
sweep batch/lr-sophiag $batch --seed=1 $sophiag --learning_rate=1e-4,2e-4,4e-4,8e-4,1.6e-3
sweep batch/final-adamw $batch --seed=2,3,4 $adamw --learning_rate=8e-3
sweep batch/final-sophiag $batch --seed=2,3,4 $sophiag --learning_rate=4e-4

# 3.1M parameters without embeddings, half the steps, a quarter of them warmup.
medium="$small --n_layer=4 --n_head=4 --n_embd=256 --max_iters=1000 --warmup_iters=250 --eval_interval=100"
sweep medium/speed $medium --seed=1,2,3 --optimizer=adamw,lion,sophiag --max_iters=100 --warmup_iters=25
sweep medium/lr-adamw $medium --seed=1 $adamw --learning_rate=1e-3,2e-3,4e-3,8e-3,1.6e-2
sweep medium/lr-lion $medium --seed=1 $lion --learning_rate=1e-4,2e-4,4e-4,8e-4,1.6e-3
sweep medium/lr-sophiag $medium --seed=1 $sophiag --learning_rate=1e-4,2e-4,4e-4,8e-4,1.6e-3
sweep medium/lr-steered $medium --seed=1 $steered --learning_rate=1e-4,2e-4,4e-4,8e-4,1.6e-3
sweep medium/final-adamw $medium --seed=2,3,4 $adamw --learning_rate=2e-3
sweep medium/final-lion $medium --seed=2,3,4 $lion --learning_rate=2e-4
sweep medium/final-sophiag $medium --seed=2,3,4 $sophiag --learning_rate=2e-4
sweep medium/final-steered $medium --seed=2,3,4 $steered --learning_rate=2e-4
four="$medium --max_iters=4000 --warmup_iters=1000 --eval_interval=400"
sweep medium/four-adamw $four --seed=2,3 $adamw --learning_rate=2e-3
sweep medium/four-sophiag $four --seed=2,3 $sophiag --learning_rate=2e-4

# GPT-2's tokens, at the learning rates of the small model's bytes; the data are made by
# python data/pystdlib/prepare.py --tokenizer=gpt2 --out_dir=data/pystdlib_gpt2
bpe="$small --dataset=data/pystdlib_gpt2 --max_iters=500 --warmup_iters=125 --eval_interval=100 --eval_iters=32"
sweep bpe/speed $bpe --seed=1,2,3 --optimizer=adamw,lion,sophiag --max_iters=50 --warmup_iters=12 --eval_interval=50
sweep bpe/final-adamw $bpe --seed=2,3,4 $adamw --learning_rate=8e-3
sweep bpe/final-lion $bpe --seed=2,3,4 $lion --learning_rate=8e-4
sweep bpe/final-sophiag $bpe --seed=2,3,4 $sophiag --learning_rate=8e-4
sweep bpe/final-steered $bpe --seed=2,3,4 $steered --learning_rate=8e-4
# Whether other learning rates are better there.
sweep bpe/lr-adamw $bpe --seed=2 $adamw --learning_rate=4e-3,1.6e-2
sweep bpe/lr-sophiag $bpe --seed=2 $sophiag --learning_rate=4e-4,1.6e-3,3.2e-3

# The quickstart, with a quarter of its steps as warmup.
sweep quickstart/lr-sophiag config/quickstart_sophiag.py --warmup_iters=300 --seed=1 --learning_rate=4e-4,8e-4
sweep quickstart/warmup-adamw config/quickstart_adamw.py --seed=1 --learning_rate=4e-3 --warmup_iters=100,300
