# GPT-2 small (125M), OpenWebText, Muon, untested: 100k steps of 480 x 1024 tokens, AdamW's rates.
out_dir = "out/gpt2-small-muon"
wandb_log = True
optimizer = "muon"
min_lr = 3e-5
lr_decay_iters = 100_000   # keeps the schedule if --max_iters is lower
