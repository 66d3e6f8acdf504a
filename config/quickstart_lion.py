# A 0.9M-parameter GPT on the source of Python's standard library, byte by byte: minutes on a
# laptop's CPU. Data, batches, schedule and windows are the same in every quickstart_*.py.
out_dir = "out/quickstart-lion"
dataset = "pystdlib"
n_layer = 4
n_head = 4
n_embd = 128
block_size = 256
batch_size = 8
total_batch_size = 8   # 2,048 tokens per step
max_iters = 1200
warmup_iters = 300     # a quarter, for SophiaG and Lion; AdamW prefers 100 (results/README.md)
eval_interval = 200
eval_iters = 32        # 256 windows, 65,536 tokens
log_interval = 20
compile = False        # starts at once and needs no compiler
optimizer = "lion"
learning_rate = 3e-4   # the better of 1e-4 and 3e-4, with a warmup of 100
