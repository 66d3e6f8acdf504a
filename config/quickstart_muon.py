# The quickstart with Muon: only the optimizer differs from quickstart_sophiag.py.
out_dir = "out/quickstart-muon"
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
optimizer = "muon"
learning_rate = 8e-3
warmup_iters = 240
beta2 = 0.9            # AdamW's part: 10 steps
