"""Finetune GPT-2 with SophiaG in Hugging Face's Trainer. Every TrainingArguments field is a flag.
    python examples/hf_trainer.py                  # a tiny new GPT-2 on README.md, no network
    python examples/hf_trainer.py --model=gpt2 --text=FILE --learning_rate=2e-5
    accelerate launch --multi_gpu --num_processes=2 examples/hf_trainer.py   # CPU: add --use_cpu"""
import gc
import sys
from pathlib import Path

import accelerate
import torch
import transformers as hf

sys.path.append(str(Path(__file__).resolve().parent.parent))   # for sophia.py
from sophia import SophiaG  # noqa: E402


class SophiaTrainer(hf.Trainer, hf.TrainerCallback):
    """After every k-th update, runs training_step on its inputs again to estimate the Hessian."""
    def __init__(self, *args, hessian_interval=10, **kwargs):
        super().__init__(*args, **kwargs)
        self.hessian_interval = hessian_interval
        self.add_callback(self)

    def get_batch_samples(self, *args):   # called once per update, for all its micro-batches
        found = self.micro_batches, _ = super().get_batch_samples(*args)
        return found

    def drawn_label_loss(self, outputs, labels, num_items_in_batch):
        """This micro-batch's share of the mean loss over an update's n predictions. DDP averages it
        later. sqrt(n / bs) keeps bs g*g unbiased if padding or the end of an epoch lowers n."""
        logits = outputs.logits[:, :-1].flatten(0, 1).float()
        drawn = torch.multinomial(logits.detach().softmax(-1), 1, generator=self.generator)[:, 0]
        drawn[labels[:, 1:].flatten() == -100] = -100   # ignore padding
        loss = torch.nn.functional.cross_entropy(logits, drawn, reduction="sum")
        return loss * self.args.world_size / (self.n * self.optimizer.param_groups[0]["bs"]) ** 0.5

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step % self.hessian_interval:
            return
        model = self.model_wrapped   # DDP's wrapper, which averages gradients over processes
        seed = hash((args.seed, state.global_step, args.process_index))   # differs by process
        self.generator = torch.Generator(args.device).manual_seed(seed)
        training_loss, self.compute_loss_func = self.compute_loss_func, self.drawn_label_loss
        n = sum((inputs["labels"][:, 1:] != -100).sum() for inputs in self.micro_batches)
        self.n = self.accelerator.reduce(n, "sum")
        for inputs in self.micro_batches[:-1]:
            with self.accelerator.no_sync(model):
                self.training_step(model, inputs)
        self.training_step(model, self.micro_batches[-1])
        self.compute_loss_func = training_loss
        if self.accelerator.scaler:   # fp16: unscale without changing the scaler's state
            grads = [p.grad for p in model.parameters() if p.grad is not None]
            torch._foreach_div_(grads, self.accelerator.scaler.get_scale())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), args.max_grad_norm or torch.inf)
        if norm.isfinite():
            self.optimizer.optimizer.update_hessian()   # SophiaG inside accelerate's wrapper
        model.zero_grad()

    def log(self, logs, *args, **kwargs):
        if "loss" in logs:   # training logs get win_rate, rho, and norms of theta, m, h
            logs.update({k: v.item() for k, v in self.optimizer.optimizer.statistics().items()})
        super().log(logs, *args, **kwargs)


def main():
    parser = hf.HfArgumentParser(hf.TrainingArguments)
    parser.add_argument("--model", help="a name on the Hub or a folder; default: a tiny GPT-2")
    parser.add_argument("--text", help="a text file", type=Path, default="README.md")
    parser.add_argument("--hessian_interval", help="in steps", type=int, default=10)
    parser.set_defaults(output_dir="out/hf", max_steps=100, learning_rate=3e-4, logging_steps=10)
    args, example = parser.parse_args_into_dataclasses()
    example.text.is_file() or sys.exit(f"{example.text} is not a file; choose one with --text")
    start = args.resume_from_checkpoint
    if start and not Path(start, "trainer_state.json").is_file():
        sys.exit(f"{start} is not a checkpoint of the Trainer, like out/hf/checkpoint-100")
    hf.set_seed(args.seed)
    if example.model:
        model = hf.AutoModelForCausalLM.from_pretrained(example.model)
        encode = hf.AutoTokenizer.from_pretrained(example.model).encode
    else:   # on bytes
        model = hf.GPT2LMHeadModel(hf.GPT2Config(vocab_size=256, n_positions=128, n_embd=128,
                                   n_layer=2, n_head=4, bos_token_id=None, eos_token_id=None))
        encode = str.encode
    tokens = torch.tensor(list(encode(example.text.read_text())))
    size = model.config.n_positions   # tokens in a sequence; the first is not predicted
    blocks = [{"input_ids": block, "labels": block} for block in tokens.split(size)[:-1]]
    if len(blocks) < 2:
        sys.exit(f"{example.text} has {len(tokens)} tokens; more than {2 * size} are needed")
    held_out = len(blocks) // 10 + 1
    bs = args.train_batch_size * args.gradient_accumulation_steps * args.world_size * (size - 1)
    sophiag = dict(lr=args.learning_rate, bs=bs, target_win_rate=0.3)
    trainer = SophiaTrainer(
        model, args, train_dataset=blocks[held_out:], eval_dataset=blocks[:held_out],
        hessian_interval=example.hessian_interval, optimizer_cls_and_kwargs=(SophiaG, sophiag))
    trainer.train(resume_from_checkpoint=start)
    trainer.log_metrics("eval", trainer.evaluate())


if __name__ == "__main__":
    main()
    gc.collect()   # frees DDP's wrapper; on CPUs, the exit may abort otherwise
    accelerate.PartialState().destroy_process_group()
