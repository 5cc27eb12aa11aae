"""Times optimizer steps of TRL's RLOOTrainer and GRPOTrainer, one at a time, on the CPU.

    steps = trl_steps("rloo", model, tokenizer, prompts)  # or "grpo"; trains a copy of the model
    next(steps)                                           # builds the trainer, and warms up
    wall, cpu = next(steps)                               # exactly one optimizer step, in seconds

`trainer.train()` runs in a thread that waits between two calls of next(), so that other things can
be timed in between. A step includes all that TRL does for it, from the data loader to AdamW.
"""

import queue
import random
import tempfile
import threading
import time
from collections.abc import Iterator

import torch
from datasets import Dataset
from transformers.trainer_callback import PrinterCallback, TrainerCallback


class Gate(TrainerCallback):
    """Lets `train()`, in another thread, make one optimizer step at a time."""

    def __init__(self):
        self.turns, self.ends = queue.Queue(), queue.Queue()

    def on_train_begin(self, args, state, control, **kwargs):
        self.turns.get()

    def on_step_end(self, args, state, control, **kwargs):
        self.ends.put(None)
        control.should_training_stop = not self.turns.get()

    def run(self, train) -> None:
        """The work of the thread; an error is passed on to `step`, which raises it."""
        try:
            train()
        except BaseException as error:
            self.ends.put(error)

    def step(self) -> tuple[float, float]:
        """Let the thread make one optimizer step; returns wall and CPU seconds."""
        wall, cpu = time.perf_counter(), time.process_time()
        self.turns.put(True)
        error = self.ends.get()
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        if error:
            raise error
        return wall, cpu


def trl_steps(
    kind: str, model, tokenizer, prompts: list[str], new_tokens=24, generations=8, micro_batch=64
) -> Iterator[tuple[float, float]]:
    """Yields (wall, CPU) seconds of one optimizer step on all prompts, without end; checks each."""
    lengths, gate = [], Gate()

    def reward(completion_ids, **kwargs):
        lengths[:] = map(len, completion_ids)
        return [random.random() for _ in completion_ids]

    trainer = build_trainer(
        kind, model, tokenizer, prompts, reward,
        num_generations=generations, max_completion_length=new_tokens, beta=0.05,
        generation_kwargs={"suppress_tokens": [tokenizer.eos_token_id]},  # no early end
        per_device_train_batch_size=micro_batch,
        gradient_accumulation_steps=len(prompts) * generations // micro_batch,
        max_steps=10**6, lr_scheduler_type="constant", learning_rate=1e-4,
        use_cpu=True, bf16=False, gradient_checkpointing=False, disable_tqdm=True,
        report_to="none", logging_strategy="no", save_strategy="no",
    )  # fmt: skip
    trainer.add_callback(gate)
    thread = threading.Thread(target=gate.run, args=(trainer.train,), daemon=True)
    thread.start()
    try:
        while True:
            before = [weight.detach().clone() for weight in trainer.model.parameters()]
            seconds = gate.step()
            assert lengths == [new_tokens] * len(prompts) * generations, "not all tokens sampled"
            assert not any(map(torch.equal, before, trainer.model.parameters())), "no step made"
            yield seconds
    finally:
        gate.turns.put(False)
        thread.join()


def build_trainer(kind: str, model, tokenizer, prompts: list[str], reward, **settings):
    """The trainer, with two copies of the model; TRL can read a reference only from a folder."""
    import trl

    name = {"rloo": "RLOO", "grpo": "GRPO"}[kind]
    settings["model_init_kwargs"] = {"attn_implementation": "eager"}  # keeps Gemma 2's softcap
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        config = getattr(trl, f"{name}Config")(folder, **settings)
        dataset, make = Dataset.from_dict({"prompt": prompts}), getattr(trl, f"{name}Trainer")
        trainer = make(folder, reward, config, dataset, processing_class=tokenizer)
    trainer.remove_callback(PrinterCallback)
    return trainer
