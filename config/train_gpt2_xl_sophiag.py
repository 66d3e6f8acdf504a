# GPT-2 XL (1.56B), OpenWebText, SophiaG. Untested: the authors' 1.5B settings (official issue 15).
out_dir = "out/gpt2-xl-sophiag"
wandb_log = True
n_layer = 48
n_head = 25
n_embd = 1600
learning_rate = 2e-4
rho = 0.04
weight_decay = 0.15
lr_decay_iters = 100_000   # keeps the schedule if --max_iters is lower
