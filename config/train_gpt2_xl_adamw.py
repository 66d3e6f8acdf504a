# GPT-2 XL (1.56B), OpenWebText, AdamW. Untested: the authors' 1.5B settings (official issue 15).
out_dir = "out/gpt2-xl-adamw"
wandb_log = True
optimizer = "adamw"
n_layer = 48
n_head = 25
n_embd = 1600
learning_rate = 1.2e-4
lr_decay_iters = 100_000   # keeps the schedule if --max_iters is lower
