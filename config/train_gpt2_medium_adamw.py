# GPT-2 medium (355M), OpenWebText, AdamW: 100k steps of 480 x 1024 tokens (arXiv 2305.14342).
out_dir = "out/gpt2-medium-adamw"
wandb_log = True
optimizer = "adamw"
n_layer = 24
n_head = 16
n_embd = 1024
learning_rate = 3e-4   # published: arXiv 2305.14342
min_lr = 6e-5   # official config
lr_decay_iters = 100_000   # keeps the schedule if --max_iters is lower
