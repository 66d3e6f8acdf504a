# GPT-2 large (770M), OpenWebText, Muon, untested: 100k steps of 480 x 1024 tokens, AdamW's rates.
out_dir = "out/gpt2-large-muon"
wandb_log = True
optimizer = "muon"
n_layer = 36
n_head = 20
n_embd = 1280
learning_rate = 2e-4
min_lr = 1e-5
lr_decay_iters = 100_000   # keeps the schedule if --max_iters is lower
