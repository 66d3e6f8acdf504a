# GPT-2 large (770M), OpenWebText, Lion: 100k steps of 480 x 1024 tokens (arXiv 2305.14342).
out_dir = "out/gpt2-large-lion"
wandb_log = True
optimizer = "lion"
n_layer = 36
n_head = 20
n_embd = 1280
learning_rate = 8e-5   # arXiv 2305.14342, its Lion baseline
weight_decay = 0.25   # learning_rate * weight_decay as AdamW's; Lion's paper: 3-10 x AdamW's
lr_decay_iters = 100_000   # keeps the schedule if --max_iters is lower
