# GPT-2 XL (1.5B) with SophiaG. The authors gave this rate, rho and weight decay for their 1.5B run
# (official repository, issue 15), which used another code base; the rest is the setting of the
# smaller sizes: 100k steps of 480 x 1024 tokens. What is not here is a default of configurator.py.
out_dir = "out/gpt2-xl-sophiag"
wandb_log = True
batch_size = 4
n_layer = 48
n_head = 25
n_embd = 1600
learning_rate = 2e-4    # official repository, issue 15
rho = 0.04
weight_decay = 0.15
lr_decay_iters = 100_000   # stays, should --max_iters stop the run early
