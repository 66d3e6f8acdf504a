# A 0.9M-parameter GPT on the source code of Python's standard library, byte by byte: minutes on a
# laptop's CPU. Data, batches, schedule and evaluation are the same in every quickstart_*.py.
out_dir = "out/quickstart-adamw"
dataset = "pystdlib"
n_layer = 4
n_head = 4
n_embd = 128
block_size = 256
batch_size = 8
total_batch_size = 8   # 2,048 tokens per step
max_iters = 1200
warmup_iters = 300     # a quarter of all steps
eval_interval = 200
eval_iters = 32        # 256 windows, 65,536 tokens
log_interval = 20
compile = False        # starts at once, without a compiler
optimizer = "adamw"
learning_rate = 4e-3   # the best of 1e-3, 2e-3 and 4e-3, with 100 steps of warmup
