# GPT-2 medium (355M), OpenWebText, Lion: 100k steps of 480 x 1024 tokens (arXiv 2305.14342).
out_dir = "out/gpt2-medium-lion"
wandb_log = True
optimizer = "lion"
n_layer = 24
n_head = 16
n_embd = 1024
learning_rate = 1e-4   # arXiv 2305.14342, its Lion baseline
weight_decay = 0.3   # learning_rate * weight_decay as AdamW's; Lion's paper: 3-10 x AdamW's
lr_decay_iters = 100_000   # keeps the schedule if --max_iters is lower
