# GPT-2 small (125M), OpenWebText, Lion: 100k steps of 480 x 1024 tokens (arXiv 2305.14342).
out_dir = "out/gpt2-small-lion"
wandb_log = True
optimizer = "lion"
learning_rate = 1e-4   # arXiv 2305.14342, its Lion baseline
lr_decay_iters = 100_000   # keeps the schedule if --max_iters is lower
