# GPT-2 medium (355M) on OpenWebText with SophiaG: 100k steps of 480 x 1024 tokens,
# the setting of arXiv 2305.14342. What is not here is a default of configurator.py.
out_dir = "out/gpt2-medium-sophiag"
wandb_log = True
n_layer = 24
n_head = 16
n_embd = 1024
learning_rate = 7e-4   # published: arXiv 2305.14342
min_lr = 1e-5   # official config
rho = 0.08   # official config
lr_decay_iters = 100_000   # stays, should --max_iters stop the run early
