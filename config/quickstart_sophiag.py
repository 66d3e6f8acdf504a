# A 0.9M-parameter GPT on the source code of Python's standard library: minutes on a laptop's CPU.
out_dir = "out/quickstart-sophiag"
dataset = "pystdlib"
n_layer = n_head = 4
n_embd = 128
init_std = n_embd**-0.5
block_size = 256
batch_size = total_batch_size = 8   # 2,048 tokens per step
max_iters = 1200
eval_interval = 200
eval_iters = 32        # 256 windows, 65,536 tokens
log_interval = 20
compile = False        # starts at once, without a compiler
# Each optimizer got 8 tuning trials at this setting: results/RULES.md.
optimizer = "sophiag"
learning_rate = 1.6e-3
warmup_iters = 240
beta1 = 0.8            # averages over 5 steps
beta2 = 0.95           # h averages over 200 steps
target_win_rate = 0.25   # rho adapts
