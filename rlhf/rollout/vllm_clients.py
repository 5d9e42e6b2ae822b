"""A vLLM server as sampling needs it: weights go in from a folder, and sampled responses come back."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from rlhf.errors import UserError
from rlhf.rollout.sampling_params import Response
from rlhf.system.phases import heartbeat

START = "VLLM_SERVER_DEV_MODE=1 vllm serve FOLDER --dtype DTYPE --logprobs-mode processed_logprobs"
NEEDS = f"use vLLM 0.32 or newer, started with {START}"


class Server:
    """A vLLM server over HTTP: completions by token ids, and the endpoints of its development mode.

    Every method raises UserError if the server cannot be reached, refuses the request or gives an unexpected answer.
    `timeout_s` is how many seconds without an answer make a request fail; `in_flight` of them are open at once.
    """

    def __init__(self, url: str, timeout_s: int, in_flight: int) -> None:
        self.url, self.timeout_s, self.in_flight = url.rstrip("/"), timeout_s, in_flight

    def require_ready(self, tokens: int) -> None:
        """Raise UserError unless the server takes weights, and rows of `tokens` tokens."""
        self.version()
        served = self._field("/v1/models", "data", 0)
        limit = served.get("max_model_len") if isinstance(served, dict) else None
        if isinstance(limit, int) and limit < tokens:
            what = f"the vLLM server takes rows of {limit} tokens, and the recipe has rows of {tokens}"
            raise UserError(what, self.url, f"start it with --max-model-len {tokens} or more")

    def on_cpu(self) -> bool:
        """Return whether the server computes on a CPU."""
        return "device_config=cpu" in str(self._field("/server_info", "vllm_config"))

    def load(self, folder: Path, version: str) -> None:
        """Have the server read the weights of a model folder, drop cached prefixes, and report `version` from then on.

        Raises UserError if another client is using the server.
        """
        # The version changes before the weights do: a run that samples here meanwhile must find its version gone.
        self._call("/update_weight_version", {"new_version": f"loading-{version}"})
        self._call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        if not self._field("/reset_prefix_cache", "success", body={}):
            what = "the vLLM server keeps prefixes of older weights: another client is using it"
            raise UserError(what, self.url, "have one run at a time use it")
        self._call("/update_weight_version", {"new_version": version})

    def version(self) -> str:
        """Return the version of the weights that the server samples from."""
        return str(self._field("/weight_info", "weight_version"))

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        requests: Sequence[dict[str, Any]],
        advance: Callable[[int], None] | None = None,
    ) -> list[Response]:
        """Return one response for each prompt, in their order: token ids, and log-probabilities in nats.

        `requests` are the other fields of each request. `advance` is called with 1 as each response arrives. Raises
        UserError if an answer is not one response with token ids and log-probabilities.
        """
        responses: list[Response] = [([], [])] * len(prompts)
        pool = ThreadPoolExecutor(self.in_flight)
        try:
            asked = enumerate(zip(prompts, requests, strict=True))
            jobs = {pool.submit(self._complete, list(prompt), request): i for i, (prompt, request) in asked}
            for job in as_completed(jobs):
                responses[jobs[job]] = job.result()
                heartbeat()
                if advance:
                    advance(1)
        finally:
            pool.shutdown(wait=False, cancel_futures=True)
        return responses

    def _complete(self, prompt: list[int], request: dict[str, Any]) -> Response:
        answer = self._call("/v1/completions", {"prompt": prompt, "return_token_ids": True, **request})
        try:
            (choice,) = answer["choices"]
            return [int(x) for x in choice["token_ids"]], [float(x) for x in choice["logprobs"]["token_logprobs"]]
        except (KeyError, TypeError, ValueError):
            what = f"the server's answer is not one response with token ids and log-probabilities: {str(answer)[:200]}"
            raise UserError(what, self.url, NEEDS) from None

    def _field(self, path: str, *keys: str | int, body: dict[str, Any] | None = None) -> Any:
        """Return what the answer to a request has at these keys; raise UserError if it has nothing there."""
        found: Any = self._call(path, body)
        answer = found
        try:
            for key in keys:
                found = found[key]
        except (KeyError, IndexError, TypeError):
            where = ".".join(map(str, keys))
            raise UserError(f"the answer has no {where}: {str(answer)[:200]}", self.url + path, NEEDS) from None
        return found

    def _call(self, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """Send a GET request, or a POST request if there is a body, and return the JSON of the answer."""
        data = None if body is None else json.dumps(body).encode()
        try:
            request = Request(self.url + path, data, {"Content-Type": "application/json"})
            with urlopen(request, timeout=self.timeout_s) as answer:
                text = answer.read()
        except HTTPError as error:
            if error.code == 404 and not path.startswith("/v1"):
                what, fix = "the vLLM server takes no weights", f"start it with {START}"
            else:
                said = b""
                with suppress(OSError, HTTPException):  # the connection may break before the reason is read
                    said = error.read()
                what = f"the vLLM server answers {path} with {error.code}: {said.decode(errors='replace')[:300]}"
                needs = "weights need the policy's shapes and a folder (launch.vllm_weights) that it can read"
                fix = f"see its log; {needs}"
            raise UserError(what, self.url, fix) from None
        except (URLError, OSError, HTTPException, ValueError) as error:  # ValueError: the URL is none
            reason = getattr(error, "reason", None) or error
            raise UserError(f"no vLLM server answers: {reason}", self.url + path, f"start it with {START}") from None
        try:
            found = json.loads(text or b"{}")
            if not isinstance(found, dict):
                raise ValueError("not a JSON object")
        except ValueError as error:
            said = text.decode(errors="replace")[:200]
            what = f"the server's answer is not a JSON object ({error}): {said}"
            raise UserError(what, self.url + path, NEEDS) from None
        return found
