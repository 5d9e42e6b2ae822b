"""Sampling with vLLM's CPU build; its start-up, its compilation and a warm-up batch are not timed.

It is not asked for log-probabilities, which ours returns as well.
"""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GB; the default is half of the memory
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # in this process, so that its peak memory is the engine's

import torch
from vllm import LLM, SamplingParams
from vllm.inputs import TokensPrompt

from benchmarks.measure import read_order, report, seconds_of


def main() -> None:
    """Sample the ordered prompts `rounds` times."""
    order = read_order()
    longest = max(map(len, order["prompts"]))
    engine = LLM(
        order["model"],
        dtype=order["dtype"],
        max_model_len=longest + order["new_tokens"],
        max_num_seqs=len(order["prompts"]),
        enable_prefix_caching=False,  # the rounds repeat the prompts
        enforce_eager=not order["compile"],
        seed=order["seed"],
    )
    how = SamplingParams(temperature=1.0, max_tokens=order["new_tokens"], ignore_eos=True, detokenize=False)
    prompts = [TokensPrompt(prompt_token_ids=ids) for ids in order["prompts"]]

    def sample() -> None:
        for answer in engine.generate(prompts, how, use_tqdm=False):
            assert len(answer.outputs[0].token_ids) == order["new_tokens"]

    sample()
    report(seconds=[seconds_of(sample) for _ in range(order["rounds"])], threads=torch.get_num_threads())


if __name__ == "__main__":
    main()
