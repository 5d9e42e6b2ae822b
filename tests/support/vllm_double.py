"""A small real HTTP server with the endpoints of vLLM that we use, on a transformers model in this process.

It answers as vllm 0.32 was seen to: token ids and log-probabilities of one response per request, weights from a folder,
a version that is "default" until one is given. `fault` makes it misbehave for the tests of errors.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from rlhf.rollout.sampling import sample
from rlhf.rollout.sampling_params import SamplingParams
from support.http_double import listening


@dataclass
class Double:
    """State of the server."""

    folder: Path
    url: str = ""
    fault: str = ""  # no-dev, deaf, short, alien, bare, busy, cpu or restart
    version: str = "default"
    paths: list[str] = field(default_factory=list)  # of the requests, in order
    bodies: list[dict[str, Any]] = field(default_factory=list)  # of the completions
    lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        self.model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(self.folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(self.folder)

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        """HTTP status and JSON for a request; one at a time."""
        with self.lock:
            self.paths.append(path)
            if path == "/v1/models":
                return 200, {"data": [{"id": str(self.folder), "max_model_len": 512}]}
            if path == "/v1/completions":
                return self.complete(body)
            if self.fault == "no-dev":
                return 404, {"detail": "Not Found"}
            if path == "/server_info":
                return 200, {"vllm_config": f"device_config={'cpu' if self.fault == 'cpu' else 'cuda'}, ..."}
            if path == "/weight_info":
                return 200, {"weight_version": self.version}
            if path == "/reset_prefix_cache":
                return 200, {"success": self.fault != "busy"}
            if path == "/update_weight_version":
                self.version = body["new_version"]
                return 200, {"success": True}
            if path == "/collective_rpc" and body["method"] == "reload_weights":
                if self.fault != "deaf":
                    self.model = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).eval()
                return 200, {"results": [None]}
        return 404, {"detail": "Not Found"}

    def complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        """One response by our own loop."""
        self.bodies.append(body)
        if max(body["prompt"]) >= self.model.config.vocab_size:
            return 400, {"error": {"message": f"Token id {max(body['prompt'])} is out of vocabulary"}}
        params = SamplingParams(body["max_tokens"], body["temperature"], body["stop_token_ids"])
        out = sample(self.model, self.tokenizer, [body["prompt"]], params, seeds=[body["seed"]])
        ids, logprobs = out.response(0), out.logprobs[0].tolist()
        if self.fault == "restart":
            self.version = "default"
        if self.fault == "short":
            ids, logprobs = ids[:1], logprobs[:1]
        if self.fault == "alien":
            ids[0] = 5000
        choice = {"index": 0, "token_ids": ids, "logprobs": {"token_logprobs": logprobs}, "finish_reason": "stop"}
        if self.fault == "bare":
            del choice["token_ids"]
        return 200, {"choices": [choice]}


@contextmanager
def serving(folder: Path, fault: str = "") -> Iterator[Double]:
    """A server on a free port of this machine, on the model of `folder`."""
    double = Double(folder, fault=fault)
    with listening(lambda path, body, headers: double.answer(path, body)) as url:
        double.url = url
        yield double
