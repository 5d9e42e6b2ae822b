"""PPO iterations of TRL's experimental PPOTrainer (trl 1.12, the last release that has it).

Its `gradient_accumulation_steps` times the micro-batch is both the rollout batch and what one optimiser step takes, so
minibatches make no further steps when it is above 1 (huggingface/trl issue 5645). With the whole batch as one
"micro-batch" and accumulation 1 every minibatch is a step, which the count of steps in the result shows.
"""

from __future__ import annotations

import os
import tempfile
import time

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

from benchmarks.measure import Order, read_order, report


class Clock(TrainerCallback):
    """Time at the start and after every iteration."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_step_end(self, *_: object, **__: object) -> None:
        self.times.append(time.perf_counter())

    on_train_begin = on_step_end


def settings(order: Order, folder: str) -> PPOConfig:
    """The order in TRL's words."""
    return PPOConfig(
        output_dir=folder,
        per_device_train_batch_size=order["batch"],
        gradient_accumulation_steps=1,
        num_mini_batches=order["batch"] // order["minibatch"],
        num_ppo_epochs=1,
        total_episodes=order["batch"] * order["iterations"],
        local_rollout_forward_batch_size=order["batch"],
        response_length=order["response_tokens"],
        stop_token=None,
        temperature=1.0,
        learning_rate=order["lr"],
        lr_scheduler_type="constant",
        adam_beta2=order["adam_beta2"],
        weight_decay=0.0,
        cliprange=order["clip"],
        cliprange_value=order["clip"],
        vf_coef=1.0,
        kl_coef=order["kl_coef"],
        gamma=1.0,
        lam=order["lam"],
        whiten_rewards=False,
        num_sample_generations=0,
        gradient_checkpointing=False,
        bf16=False,  # the weights' own type decides, as on our side
        use_cpu=True,
        seed=order["seed"],
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def main() -> None:
    """Train for the ordered number of iterations and report each one's seconds."""
    order = read_order()
    dtype = getattr(torch, order["dtype"])
    tokenizer = AutoTokenizer.from_pretrained(order["model"], padding_side="left")

    def policy() -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(order["model"], dtype=dtype)

    def scorer() -> torch.nn.Module:
        return AutoModelForSequenceClassification.from_pretrained(order["reward_model"], dtype=dtype, num_labels=1)

    rollouts: list[float] = []
    generate = ppo_trainer.batch_generation

    def timed_generation(*args: object, **options: object) -> object:
        begin = time.perf_counter()
        result = generate(*args, **options)
        rollouts.append(time.perf_counter() - begin)
        assert result[0].shape == (order["batch"], args[1].shape[1] + order["response_tokens"])
        return result

    ppo_trainer.batch_generation = timed_generation
    rows = Dataset.from_dict({"input_ids": order["prompts"]})
    clock, steps = Clock(), 0
    with tempfile.TemporaryDirectory() as folder:
        trainer = PPOTrainer(
            args=settings(order, folder),
            processing_class=tokenizer,
            model=policy(),
            ref_model=policy(),
            reward_model=scorer(),
            value_model=scorer(),
            train_dataset=rows,
            eval_dataset=rows.select(range(1)),
            callbacks=[clock],
        )

        def count(*_: object) -> None:
            nonlocal steps
            steps += 1

        trainer.optimizer.optimizer.register_step_post_hook(count)
        trainer.train()
    seconds = [after - before for before, after in zip(clock.times, clock.times[1:], strict=False)]
    report(iterations=seconds, rollouts=rollouts, optimiser_steps=steps / len(seconds))


if __name__ == "__main__":
    main()
