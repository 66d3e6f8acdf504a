# GPT-2 small (125M) on OpenWebText with AdamW: 100k steps of 480 x 1024 tokens,
# the setting of arXiv 2305.14342. What is not here is a default of configurator.py.
out_dir = "out/gpt2-small-adamw"
wandb_log = True
optimizer = "adamw"
min_lr = 3e-5   # official config
lr_decay_iters = 100_000   # stays, should --max_iters stop the run early
