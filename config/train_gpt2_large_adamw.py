# GPT-2 large (770M), OpenWebText, AdamW: 100k steps of 480 x 1024 tokens (arXiv 2305.14342).
out_dir = "out/gpt2-large-adamw"
wandb_log = True
optimizer = "adamw"
n_layer = 36
n_head = 20
n_embd = 1280
learning_rate = 2e-4   # published: arXiv 2305.14342
min_lr = 1e-5   # official config
lr_decay_iters = 100_000   # keeps the schedule if --max_iters is lower
