# GPT-2 small (125M), OpenWebText, SophiaG: 100k steps of 480 x 1024 tokens (arXiv 2305.14342).
out_dir = "out/gpt2-small-sophiag"
wandb_log = True
min_lr = 1.5e-5   # official config
lr_decay_iters = 100_000   # keeps the schedule if --max_iters is lower
