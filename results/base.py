# The study's base setting: 0.33M parameters without embeddings, on the source of Python's standard
# library, byte by byte. rules.py gives the optimizer, its settings and the seed.
dataset = "pystdlib"
n_layer = 3
n_head = 3
n_embd = 96
init_std = n_embd**-0.5   # 1 / sqrt(width), see RULES.md
block_size = 128
batch_size = 32
total_batch_size = 64   # 8,192 tokens a step
max_iters = 400         # 3.3M tokens, 10 a parameter
eval_interval = 100
eval_iters = 8          # 512 windows, 65,536 tokens
log_interval = 50
dtype = "float32"       # on a GPU too
compile = False         # no faster compiled at this size
