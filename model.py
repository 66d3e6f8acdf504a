"""GPT-2: pre-LayerNorm, learned positions, tanh GELU, tied head. Parameter names are nanoGPT's."""
import math
from contextlib import nullcontext
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from script import UserError

NO_PLANS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class GPTConfig:
    vocab_size: int = 50257   # real classes
    block_size: int = 1024
    n_layer: int = 12
    n_head: int = 12
    n_embd: int = 768
    dropout: float = 0.0
    bias: bool = False
    init_std: float = 0.02    # standard deviation of initial weights
    scale_attn_by_inverse_layer_idx: bool = True
    vocab_multiple: int = 64   # pads the embedding, for full tensor-core tiles; 1: no padding

    @property
    def padded_vocab_size(self):
        return math.ceil(self.vocab_size / self.vocab_multiple) * self.vocab_multiple


class CausalSelfAttention(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.n_head = config.n_head
        self.dropout = config.dropout
        # A tensor, since torch.compile would make one graph per layer for different floats.
        scale = torch.tensor(1 / (layer_idx + 1))
        self.register_buffer("scale", scale if config.scale_attn_by_inverse_layer_idx else None,
                             persistent=False)

    def forward(self, x, cache=None, start=0):                                   # (B, T, C)
        """cache: keys and values (2, B, nh, positions, hs) of the first `start` positions."""
        B, T, C = x.shape
        q, k, v = (t.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
                   for t in self.c_attn(x).split(C, dim=2))                      # (B, nh, T, hs)
        if self.scale is not None:
            q = q * self.scale
        if cache is not None:
            cache[0, :, :, start:start + T], cache[1, :, :, start:start + T] = k, v
            k, v = cache[:, :, :, :start + T].to(q.dtype)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=start == 0,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.dropout, self.training)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)
        self.dropout = config.dropout

    def forward(self, x):
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout, self.training)


class Block(nn.Module):
    def __init__(self, config, layer_idx):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config, layer_idx)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x, cache=None, start=0):
        x = x + self.attn(self.ln_1(x), cache, start)
        return x + self.mlp(self.ln_2(x))


def apply_block(block, x, cache, start):
    return block(x, cache, start)


class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(dict(
            wte=nn.Embedding(config.padded_vocab_size, config.n_embd),
            wpe=nn.Embedding(config.block_size, config.n_embd),
            h=nn.ModuleList(Block(config, i) for i in range(config.n_layer)),
            ln_f=nn.LayerNorm(config.n_embd, bias=config.bias)))
        self.lm_head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.lm_head.weight = self.transformer.wte.weight
        self._apply_block, self._loss_and_gradient = apply_block, loss_and_gradient
        self.apply(self._init_weights)
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):   # residual projections, GPT-2 paper
                nn.init.normal_(p, std=config.init_std / math.sqrt(2 * config.n_layer))

    def _init_weights(self, module):
        if isinstance(module, (nn.Linear, nn.Embedding)):
            nn.init.normal_(module.weight, std=self.config.init_std)
        if isinstance(module, nn.Linear) and module.bias is not None:
            nn.init.zeros_(module.bias)

    def forward(self, idx, targets=None, label_noise=None):
        """
        idx: (B, T) int64. Returns
          without targets and label_noise:    logits (B, T, vocab_size);
          with targets (B, T) int64:          mean cross-entropy, 0-dim;
          with label_noise (B, T) in [0, 1):  mean cross-entropy, 0-dim, against labels sampled from
                                              the model's own softmax. The Gauss-Newton-Bartlett
                                              estimator squares the gradient of this loss.
        """
        if targets is None and label_noise is None:
            return F.linear(self._hidden(idx), self.lm_head.weight)[..., :self.config.vocab_size]
        h = self._hidden(idx, apply_block=self._apply_block).flatten(0, 1)
        return self.head_loss(h, *(None if t is None else t.flatten()
                                   for t in (targets, label_noise)))

    def head_loss(self, h, targets=None, label_noise=None):
        """Loss of hidden states h (N, C) against targets (N,) or sampled labels; see HeadLoss."""
        return HeadLoss.apply(h, self.lm_head.weight, targets, label_noise, self.config.vocab_size,
                              self._loss_and_gradient)

    def compile_for_training(self):
        """
        Compile a block, and the loss of a chunk of logits. All blocks share one graph, so compile
        time does not grow with depth. Gradients arrive block by block, so DDP's all-reduce overlaps
        the backward pass. Evaluation and sampling stay eager, because they have many shapes.
        """
        torch._dynamo.config.optimize_ddp = False   # it would split blocks at DDP's buckets
        self._apply_block = torch.compile(apply_block, dynamic=False)
        self._loss_and_gradient = torch.compile(loss_and_gradient, dynamic=False)

    def token_losses(self, idx, targets):
        """Cross-entropy of each token, (B, T) float32, for evaluation and second derivatives."""
        h = self._hidden(idx).flatten(0, 1)
        rows = rows_per_chunk(h, self.config.padded_vocab_size)
        losses = [F.cross_entropy(F.linear(h_i, self.lm_head.weight)[:, :self.config.vocab_size]
                                  .float(), y_i, reduction="none")
                  for h_i, y_i in zip(h.split(rows), targets.flatten().split(rows))]
        return torch.cat(losses).view(idx.shape)

    def directional_derivative(self, idx, targets, direction):
        """
        Inner product, 0-dim, of the mean cross-entropy's gradient and `direction`, one tensor per
        parameter. Its gradient is the Hessian times direction. This stores attention scores and
        logits, since flash attention and HeadLoss have no second derivative.
        """
        with sdpa_kernel(SDPBackend.MATH):
            losses = self.token_losses(idx, targets)
        # Gradients of the sum: those of the mean underflow in float16.
        with torch.autocast(idx.device.type, enabled=False):
            gradients = torch.autograd.grad(losses.sum(), list(self.parameters()),
                                            create_graph=True)
            products = [(g * d).sum() for g, d in zip(gradients, direction)]
            return sum(products) / losses.numel()

    def _hidden(self, idx, caches=None, start=0, apply_block=apply_block):       # (B, T, C)
        """With caches, idx is one token at position `start`, or start is 0."""
        positions = torch.arange(start, start + idx.shape[1], device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)
        x = F.dropout(x, self.config.dropout, self.training)
        # cuDNN's attention, which PyTorch prefers on Hopper, plans each new shape in 0.03 to 1 s.
        # Training has one or two shapes, evaluation and generation have many.
        with nullcontext() if torch.is_grad_enabled() else sdpa_kernel(NO_PLANS):
            for i, block in enumerate(self.transformer.h):
                x = apply_block(block, x, None if caches is None else caches[i], start)
        return self.transformer.ln_f(x)

    @torch.no_grad()
    def stream(self, idx, max_new_tokens, temperature=1.0, top_k=None, top_p=None, eot_id=None,
               generator=None):
        """
        Continue idx (B, T) int64: yields the next tokens (B,), up to max_new_tokens times, until
        every row has produced eot_id. A row that produces it earlier repeats it. temperature 0 is
        greedy. top_k and top_p keep the k most likely tokens and the most likely ones that make up
        probability p. Keys and values are cached until the context is full. Then the context slides
        and each token needs a full forward pass, since all learned positions change.
        """
        c = self.config
        length = min(idx.shape[1] + max_new_tokens, c.block_size)
        shape = (2, len(idx), c.n_head, length, c.n_embd // c.n_head)
        caches = [torch.empty(shape, device=idx.device) for _ in self.transformer.h]
        done = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        cached = 0
        for _ in range(max_new_tokens):
            if idx.shape[1] <= length:
                h = self._hidden(idx[:, cached:], caches, cached)
                cached = idx.shape[1]
            else:
                h = self._hidden(idx[:, -c.block_size:])
            logits = F.linear(h[:, -1], self.lm_head.weight)[:, :c.vocab_size].float()
            new = sample_next(logits, temperature, top_k, top_p, generator)
            if eot_id is not None:
                new = new.masked_fill(done, eot_id)
                done |= new == eot_id
            yield new
            if done.all():
                break
            idx = torch.cat((idx, new[:, None]), dim=1)

    def generate(self, idx, max_new_tokens, **options):
        """idx followed by the tokens of `stream`, (B, T + new tokens)."""
        new = list(self.stream(idx, max_new_tokens, **options))
        return torch.cat((idx, torch.stack(new, dim=1)), dim=1)

    def crop_block_size(self, block_size):
        """Shorten the context, e.g. of a pretrained model. Only the position embedding changes."""
        if block_size > self.config.block_size:
            raise UserError(f"block_size={block_size} is longer than the model's "
                            f"{self.config.block_size}")
        self.config = GPTConfig(**{**asdict(self.config), "block_size": block_size})
        wpe = self.transformer.wpe
        wpe.weight = nn.Parameter(wpe.weight[:block_size].detach().clone())
        wpe.num_embeddings = block_size

    def num_params(self):
        """Number of parameters; the tied head counts once."""
        return sum(p.numel() for p in self.parameters())

    def flops_per_token(self):
        """
        Floating point operations per token, forward and backward, counted as in PaLM (arXiv
        2204.02311, appendix B) and nanoGPT: 6 per parameter, without the position embedding, and
        12 L C T for attention, causal or not.
        """
        c = self.config
        weights = self.num_params() - self.transformer.wpe.weight.numel()
        return 6 * weights + 12 * c.n_layer * c.n_embd * c.block_size


def sample_next(logits, temperature, top_k, top_p, generator):
    """Sample a token for each row of logits (B, classes); see GPT.stream. Returns (B,) int64."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits / temperature
    if top_k is not None:
        kth = logits.topk(min(top_k, logits.shape[-1])).values[:, -1:]
        logits = logits.masked_fill(logits < kth, -torch.inf)
    probs, order = logits.softmax(-1).sort(descending=True)
    if top_p is not None:   # the token that crosses p is kept
        probs = probs.masked_fill(probs.cumsum(-1) - probs >= top_p, 0.0)
    return order.gather(1, torch.multinomial(probs, 1, generator=generator)).squeeze(1)


def rows_per_chunk(h, classes):
    """
    Rows of logits (rows, classes) in one chunk: a power of two that fills 512 MiB on a GPU. A CPU
    gets 1 MiB, about the L2 cache, but at least 512 rows: with GPT-2's classes the head took 5%
    longer with 256 rows and 15% longer with 128.
    """
    budget = 2**20 if h.device.type == "cpu" else 2**29
    return 2 ** int(math.log2(max(512, budget / (classes * h.element_size()))))


def sample_labels(probs, noise):
    """
    Sample a label for each row of probs (N, classes): the first class whose cumulative probability
    exceeds noise (N,), uniform in [0, 1). Returns (N,) int64.

    This needs one random number per label; Gumbel noise needs one per class. Since the noise is an
    input, labels do not depend on ranks, micro-batches or device. The cumulative sum has two
    levels, over blocks of 64 classes and within one block: less work and less rounding.
    """
    classes = probs.shape[-1]
    blocks = F.pad(probs, (0, -classes % 64)).unflatten(-1, (-1, 64))
    sums = blocks.sum(-1)
    cdf = sums.cumsum(-1)
    height = noise[:, None] * cdf[:, -1:]
    block = torch.searchsorted(cdf, height, right=True).clamp_(max=cdf.shape[-1] - 1)
    height = height - (cdf - sums).gather(1, block)
    cdf = blocks.take_along_dim(block[..., None], dim=1).squeeze(1).cumsum(-1)
    label = 64 * block + torch.searchsorted(cdf, height, right=True).clamp_(max=63)
    return label.squeeze(1).clamp_(max=classes - 1)


def loss_and_gradient(logits, targets, label_noise, vocab_size, precise):
    """Summed cross-entropy of logits (N, padded classes), 0-dim in dtype `precise`, and its
    gradient in logits' dtype. Against sampled labels if targets is None. See HeadLoss."""
    log_probs = F.log_softmax(logits, -1, dtype=precise)
    probs = log_probs.exp()
    labels = sample_labels(probs[:, :vocab_size], label_noise) if targets is None else targets
    is_label = torch.arange(probs.shape[1], device=probs.device) == labels[:, None]
    loss = -log_probs.gather(1, labels[:, None]).sum()
    return loss, (probs - is_label.to(precise)).to(logits.dtype)


class HeadLoss(torch.autograd.Function):
    """
    Mean cross-entropy of softmax(h weight^T) against targets (N,). If targets is None, against
    labels sampled with label_noise (N,) from the softmax over the first vocab_size classes.
    h: (N, C), weight: (padded classes, C). Returns a 0-dim tensor, float32 (float64 for float64).

    Forward computes loss, labels and gradients chunk by chunk and frees each chunk's logits. The
    (N, padded classes) matrix never exists, and no matmul is repeated. Padded classes have
    probability 0, so padding a model changes neither its loss nor its gradients.

    Loss, softmax and the weight's gradient are float32. F.linear_cross_entropy returns a bfloat16
    loss on bfloat16 input (4.84 for 4.86). On float16 input its gradients underflow before the
    GradScaler's scale reaches them. It cannot sample labels.

    Each chunk reads and writes the weight's gradient once: 309 MB for GPT-2. On a GPU 512 MiB hold
    4,096 rows in bfloat16, so 12 x 1,024 tokens take 3 chunks: 0.9 GB per micro-step.
    """

    @staticmethod
    def forward(ctx, h, weight, targets, label_noise, vocab_size, loss_and_gradient):
        if torch.is_autocast_enabled(h.device.type):
            h = h.to(torch.get_autocast_dtype(h.device.type))
        w = weight.to(h.dtype)
        precise = torch.promote_types(h.dtype, torch.float32)
        loss = torch.zeros((), dtype=precise, device=h.device)
        # Gradients of the summed loss: those of the mean underflow in float16.
        grad_h, grad_w = torch.empty_like(h), torch.zeros_like(weight)
        rows = rows_per_chunk(h, len(w))
        for i in range(0, len(h), rows):
            h_i = h[i:i + rows]
            targets_i, noise_i = (None if t is None else t[i:i + rows]
                                  for t in (targets, label_noise))
            logits = F.linear(h_i, w)
            logits[:, vocab_size:] = -torch.inf
            loss_i, grad_logits = loss_and_gradient(logits, targets_i, noise_i, vocab_size,
                                                    precise)
            loss += loss_i
            torch.mm(grad_logits, w, out=grad_h[i:i + rows])
            if h.dtype == weight.dtype:
                grad_w.addmm_(grad_logits.t(), h_i)
            elif h.is_cuda:   # accumulates in float32 without a copy
                torch.addmm(grad_w, grad_logits.t(), h_i, out_dtype=grad_w.dtype, out=grad_w)
            else:
                grad_w += grad_logits.t() @ h_i
        ctx.gradients = grad_h, grad_w
        return loss / len(h)

    @staticmethod
    def backward(ctx, grad_loss):
        (grad_h, grad_w), ctx.gradients = ctx.gradients, None   # scaled in place: backward once
        scale = grad_loss / len(grad_h)
        return grad_h.mul_(scale), grad_w.mul_(scale), None, None, None, None
