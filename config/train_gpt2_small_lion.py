# GPT-2 small (125M) on OpenWebText with Lion: 100k steps of 480 x 1024 tokens,
# the setting of arXiv 2305.14342. What is not here is a default of configurator.py.
out_dir = "out/gpt2-small-lion"
wandb_log = True
optimizer = "lion"
learning_rate = 1e-4   # arXiv 2305.14342, its Lion baseline
lr_decay_iters = 100_000   # stays, should --max_iters stop the run early
