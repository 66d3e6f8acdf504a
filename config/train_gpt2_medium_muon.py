# GPT-2 medium (355M), OpenWebText, Muon, untested: 100k steps of 480 x 1024 tokens, AdamW's rates.
out_dir = "out/gpt2-medium-muon"
wandb_log = True
optimizer = "muon"
n_layer = 24
n_head = 16
n_embd = 1024
learning_rate = 3e-4
min_lr = 6e-5
lr_decay_iters = 100_000   # keeps the schedule if --max_iters is lower
