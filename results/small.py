# The study's small model: 0.33M parameters without embeddings, on the source of Python's standard
# library, byte by byte. Optimizer, learning rate and seed are given by run.sh.
dataset = "pystdlib"
n_layer = 3
n_head = 3
n_embd = 96
block_size = 128
batch_size = 8
total_batch_size = 8   # 1,024 tokens a step
max_iters = 2000       # 2.05M tokens
warmup_iters = 100
eval_interval = 200
eval_iters = 64        # 512 windows, 65,536 tokens
log_interval = 50
compile = False        # 16% faster compiled, less than compiling costs
