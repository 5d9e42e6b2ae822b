"""vLLM as rlhf/rollout/vllm_engine.py needs it: a server over HTTP, or `vllm.LLM` in this process."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import cache
from pathlib import Path
from typing import Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from rlhf.errors import UserError

Completion = tuple[list[int], list[float]]  # token ids of a response, and their log-probabilities
Advance = Callable[[int], None]

START = "VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --dtype DTYPE --logprobs-mode processed_logprobs"
GPU_SHARE = 0.3  # of the device's memory for vLLM in this process; training keeps the rest


class Sampler(Protocol):
    """What a rollout needs of vLLM, in a server or in this process."""

    def on_cpu(self) -> bool:
        """Whether it computes on a CPU."""

    def load(self, folder: Path, version: str) -> None:
        """Take the weights of a model folder, forget what was computed with others, and be at this version."""

    def version(self) -> str:
        """Of the weights that it samples from."""

    def generate(
        self, prompts: Sequence[Sequence[int]], params: list[dict[str, Any]], advance: Advance
    ) -> list[Completion]:
        """One response for each prompt; `advance` is called as they finish."""

    def release_memory(self) -> None:
        """Free what can be freed until the next push."""


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

    def on_cpu(self) -> bool:
        return "device_config=cpu" in self._call("/server_info")["vllm_config"]

    def load(self, folder: Path, version: str) -> None:
        # Before the weights change: a run that is at work here must find at its end that its version is gone.
        self._call("/update_weight_version", {"new_version": f"loading-{version}"})
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

    def generate(
        self, prompts: Sequence[Sequence[int]], params: list[dict[str, Any]], advance: Advance
    ) -> list[Completion]:
        rows: list[Completion] = [([], [])] * len(prompts)
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

    def release_memory(self) -> None:
        pass

    def _complete(self, prompt: list[int], params: dict[str, Any]) -> Completion:
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

    def on_cpu(self) -> bool:
        import torch

        return not torch.cuda.is_available()

    def load(self, folder: Path, version: str) -> None:
        if self.llm is None:
            from vllm import LLM

            self.llm = LLM(
                model=str(folder),
                dtype=self.dtype,
                logprobs_mode="processed_logprobs",
                gpu_memory_utilization=GPU_SHARE,
                enable_sleep_mode=not self.on_cpu(),
            )
        else:
            if not self.on_cpu():
                self.llm.wake_up()
            self.llm.collective_rpc("reload_weights", kwargs={"weights_path": str(folder)})
        self.llm.reset_prefix_cache()
        self.llm.update_weight_version(version)

    def version(self) -> str:
        return self.llm.get_weight_version()

    def generate(
        self, prompts: Sequence[Sequence[int]], params: list[dict[str, Any]], advance: Advance
    ) -> list[Completion]:
        from vllm import SamplingParams

        tokens = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        answers = self.llm.generate(tokens, [SamplingParams(**param) for param in params], use_tqdm=False)
        advance(len(answers))
        return [_row(answer.outputs[0]) for answer in answers]

    def release_memory(self) -> None:
        if not self.on_cpu():
            self.llm.sleep(level=2)  # the weights are pushed again before they are needed


def _row(output: Any) -> Completion:
    ids = list(output.token_ids)
    return ids, [step[token].logprob for token, step in zip(ids, output.logprobs, strict=True)]


@cache
def in_process(dtype: str) -> InProcess:
    return InProcess(dtype)
