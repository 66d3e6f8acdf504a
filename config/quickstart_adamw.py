# A 0.9M-parameter GPT on the source of Python's standard library, byte by byte: a few minutes on a
# laptop's CPU. Same data, batches, windows and schedule for each quickstart_*.py; learning rates
# from a short search.
out_dir = "out/quickstart-adamw"
optimizer = "adamw"
dataset = "pystdlib"
n_layer = 4
n_head = 4
n_embd = 128
block_size = 256
batch_size = 8
total_batch_size = 8     # 2,048 tokens a step
max_iters = 1500
warmup_iters = 100
eval_interval = 250
eval_iters = 32          # 256 windows = 65,536 tokens
learning_rate = 3e-3
compile = False          # compiling would take longer than it saves here
