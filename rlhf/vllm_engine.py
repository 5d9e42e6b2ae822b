"""Sampling through vLLM: the policy's weights are pushed to it before every rollout, then each prompt is a request.

A server (`launch.vllm_url`) has an environment and devices of its own. It is started by hand, on any folder with the
policy's shape, such as the SFT model, and must take weights and give log-probabilities at the sampling temperature:

    VLLM_SERVER_DEV_MODE=1 vllm serve runs/NAME/sft/model --dtype bfloat16 --logprobs-mode processed_logprobs

Development mode opens the server to whoever reaches its port: keep it to the machine or to a private network. Without
a URL `vllm.LLM` works in this process, where vllm can be imported; that path has been run on a CPU only, not on a GPU.

A push is a plain model folder (adapters merged, partitioned weights gathered) that vLLM reads, after which cached
prefixes are dropped and the weights get a version of their own. The version is asked for again after the rollout: a
server that was restarted, or that another run pushed to, is an error and never a sample of other weights. vLLM's
kernels are not the training pass's, so that old log-probabilities are computed anew (rlhf/rescoring.py).
"""

from __future__ import annotations

import json
import secrets
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from itertools import count
from pathlib import Path
from typing import Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from torch import nn
from transformers import PreTrainedTokenizerBase

from rlhf.adapters import base_model
from rlhf.config import LaunchSection
from rlhf.errors import UserError
from rlhf.models import save_model
from rlhf.placement import whole_state
from rlhf.processes import from_first

Row = tuple[list[int], list[float]]  # token ids of a response, and their log-probabilities
Advance = Callable[[int], None]

START = "VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --dtype DTYPE --logprobs-mode processed_logprobs"
GPU_SHARE = 0.3  # of the device's memory for vLLM in this process; training keeps the rest
_process = secrets.token_hex(4)
_pushes = count(1)


class Sampler(Protocol):
    """What a rollout needs of vLLM, in a server or in this process."""

    def load(self, folder: Path, version: str) -> None:
        """Take the weights of a model folder, forget what was computed with others, and be at this version."""

    def version(self) -> str:
        """Of the weights that it samples from."""

    def generate(self, prompts: Sequence[Sequence[int]], params: list[dict[str, Any]], advance: Advance) -> list[Row]:
        """One response for each prompt; `advance` is called as they finish."""

    def rest(self) -> None:
        """Free what can be freed until the next push."""


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
) -> list[Row]:
    """Push the policy and sample a response for each prompt, as `rlhf.rollout.sample` describes it.

    All processes must call: each gives its parts of the weights, the first talks to vLLM, all get the rows.

    Args:
        batch_size: rows in flight at a server; vLLM makes batches of its own.

    Raises:
        UserError: on the first process, when vLLM cannot be reached, does not take the weights, or answers otherwise
            than asked. The others end with it.
    """
    weights = whole_state(policy)
    # The plain softmax, whatever defaults come with the model. EOS has no part of its own: only `stop_ids` end a row.
    common = {
        **{"n": 1, "max_tokens": max_new_tokens, "temperature": temperature, "logprobs": 0},
        **{"top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0},
        **{"presence_penalty": 0.0, "frequency_penalty": 0.0, "ignore_eos": True, "stop_token_ids": list(stop_ids)},
    }
    params = [common | {"seed": seed % 2**63} for seed in seeds]

    def push_and_sample() -> list[Row]:
        dtype = str(base_model(policy).dtype).removeprefix("torch.")
        sampler = Server(launch.vllm_url, launch.timeout_s, batch_size) if launch.vllm_url else _in_process(dtype)
        version = f"{_process}-{next(_pushes)}"
        place = Path(launch.vllm_weights).expanduser()
        if not place.is_dir():
            raise UserError(f"there is no folder {place}", "launch.vllm_weights", "name one that vLLM can read as well")
        folder = place.resolve() / f"rlhf-{version}"
        try:
            save_model(policy, tokenizer, folder / "model", weights)
            sampler.load(folder / "model", version)
        finally:
            shutil.rmtree(folder, ignore_errors=True)  # vLLM has copied them, and a memory disk is no place to leave it
        rows = sampler.generate(prompts, params, advance or (lambda n: None))
        if (now := sampler.version()) != version:
            raise UserError(
                f"vLLM was given weights {version} and ended the rollout with {now}",
                "launch.vllm_url",
                "one run at a time may use a server, and it must not be restarted during a rollout; run again",
            )
        sampler.rest()
        for row in rows:
            _check(row, max_new_tokens, set(stop_ids), base_model(policy).config.vocab_size)
        return rows

    return from_first(push_and_sample)


def check_server(launch: LaunchSection, tokens: int) -> None:
    """Raise UserError, before anything is loaded, unless the named server takes weights and rows of so many tokens."""
    if launch.vllm_url:
        from_first(lambda: Server(launch.vllm_url, launch.timeout_s, 1).ready(tokens))


def _check(row: Row, max_new_tokens: int, stops: set[int], vocabulary: int) -> None:
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


class Server:
    """A vLLM server over HTTP: completions by token ids, and the endpoints of its development mode."""

    def __init__(self, url: str, timeout_s: int, in_flight: int) -> None:
        self.url, self.timeout_s, self.in_flight = url.rstrip("/"), timeout_s, in_flight

    def ready(self, tokens: int) -> None:
        """Raise UserError unless a server answers that takes weights, and rows of so many tokens."""
        self.version()
        served = self._call("/v1/models")["data"][0]
        if (limit := served.get("max_model_len")) is not None and limit < tokens:
            raise UserError(
                f"the vLLM server takes rows of {limit} tokens, and the recipe has rows of {tokens}",
                self.url,
                f"start it with --max-model-len {tokens} or more",
            )

    def load(self, folder: Path, version: str) -> None:
        self._call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        if not self._call("/reset_prefix_cache", {})["success"]:
            raise UserError(
                "the vLLM server keeps prefixes of older weights: it is at work for somebody else",
                self.url,
                "have one run at a time use it",
            )
        self._call("/update_weight_version", {"new_version": version})

    def version(self) -> str:
        return str(self._call("/weight_info")["weight_version"])

    def generate(self, prompts: Sequence[Sequence[int]], params: list[dict[str, Any]], advance: Advance) -> list[Row]:
        rows: list[Row] = [([], [])] * len(prompts)
        pool = ThreadPoolExecutor(self.in_flight)
        try:
            jobs = {
                pool.submit(self._complete, list(prompt), param): i
                for i, (prompt, param) in enumerate(zip(prompts, params, strict=True))
            }
            for job in as_completed(jobs):
                rows[jobs[job]] = job.result()
                advance(1)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return rows

    def rest(self) -> None:
        pass

    def _complete(self, prompt: list[int], params: dict[str, Any]) -> Row:
        answer = self._call("/v1/completions", {"prompt": prompt, "return_token_ids": True, **params})
        try:
            (choice,) = answer["choices"]
            return list(choice["token_ids"]), [float(x) for x in choice["logprobs"]["token_logprobs"]]
        except (KeyError, TypeError, ValueError):
            raise UserError(
                "the server's answer is not one response with token ids and log-probabilities: " + str(answer)[:200],
                self.url,
                f"use vLLM 0.32 or newer, started with {START}",
            ) from None

    def _call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """GET, or POST where there is a body; the JSON that comes back."""
        data = None if body is None else json.dumps(body).encode()
        request = Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urlopen(request, timeout=self.timeout_s) as answer:
                return json.loads(answer.read() or b"{}")
        except HTTPError as error:
            if error.code == 404 and not path.startswith("/v1"):
                what, fix = "the vLLM server takes no weights", f"start it with {START}"
            else:
                what = (
                    f"the vLLM server answers {path} with {error.code}: {error.read().decode(errors='replace')[:300]}"
                )
                fix = (
                    "see its log; weights need the policy's shapes and a folder (launch.vllm_weights) that it can read"
                )
            raise UserError(what, self.url, fix) from None
        except (URLError, OSError, ValueError) as error:
            reason = getattr(error, "reason", error)
            raise UserError(f"no vLLM server answers: {reason}", self.url + path, f"start it with {START}") from None


class InProcess:
    """`vllm.LLM` in this process; between rollouts it gives its memory to the training where the device can."""

    def __init__(self, dtype: str) -> None:
        self.dtype, self.llm = dtype, None

    def load(self, folder: Path, version: str) -> None:
        import torch

        if self.llm is None:
            from vllm import LLM

            self.llm = LLM(
                model=str(folder),
                dtype=self.dtype,
                logprobs_mode="processed_logprobs",
                gpu_memory_utilization=GPU_SHARE,
                enable_sleep_mode=torch.cuda.is_available(),
            )
        else:
            if torch.cuda.is_available():
                self.llm.wake_up()
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self.llm.reset_prefix_cache()
        self.llm.update_weight_version(version)

    def version(self) -> str:
        return self.llm.get_weight_version()

    def generate(self, prompts: Sequence[Sequence[int]], params: list[dict[str, Any]], advance: Advance) -> list[Row]:
        from vllm import SamplingParams

        tokens = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        answers = self.llm.generate(tokens, [SamplingParams(**param) for param in params], use_tqdm=False)
        advance(len(answers))
        return [_row(answer.outputs[0]) for answer in answers]

    def rest(self) -> None:
        import torch

        if torch.cuda.is_available():
            self.llm.sleep(level=2)  # the weights are pushed again before they are needed


def _row(output: Any) -> Row:
    ids = list(output.token_ids)
    return ids, [step[token].logprob for token, step in zip(ids, output.logprobs, strict=True)]


@cache
def _in_process(dtype: str) -> InProcess:
    return InProcess(dtype)
