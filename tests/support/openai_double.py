"""A small real HTTP server with the chat endpoint of OpenAI's API, on a transformers model in this process.

It answers one token with the likeliest tokens' log-probabilities, or several greedily. `fault` makes it misbehave.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from support.http_double import listening


@dataclass
class Double:
    """The server's state and its answers."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    bias: Mapping[str, float] = field(default_factory=dict)  # added to the logits of these tokens
    fault: str = ""  # key, quotes, page, busy, model, slow, bare, empty or long
    patience: int = 10**9  # number of requests after which every key is refused
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)  # Authorization headers
    lock: threading.Lock = field(default_factory=threading.Lock)

    def answer(self, path: str, body: dict[str, Any], headers: Mapping[str, str]) -> tuple[int, Any]:
        """Return the HTTP status and JSON for a request."""
        with self.lock:
            self.bodies.append(body)
            self.keys.append(headers.get("authorization", ""))
            if path != "/v1/chat/completions" or self.fault == "model":
                return 404, _error(f"The model {body.get('model')} does not exist")
            if self.fault == "key" or len(self.bodies) > self.patience:
                return 401, _error("Incorrect API key provided")
            if self.fault == "quotes":
                return 401, _error(f"bad key {headers.get('authorization')}")
            if self.fault == "page":
                return 200, "<html>welcome</html>"
            if self.fault == "long":
                return 400, _error("This model's maximum context length is 4096 tokens")
            if self.fault == "busy" and len(self.bodies) == 1:
                return 429, _error("Rate limit reached")
            if self.fault == "slow":
                time.sleep(1.5)
            return 200, self.complete(body)

    def distribution(self, messages: list[dict[str, str]], said: list[int]) -> torch.Tensor:
        """Return log-probabilities [V] of the next token."""
        ids = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        with torch.no_grad():
            logits = self.model(torch.tensor([[*ids, *said]])).logits[0, -1].double()
        for token, extra in self.bias.items():
            logits[self.tokenizer.convert_tokens_to_ids(token)] += extra
        return torch.log_softmax(logits, -1)

    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        """Return a chat completion in OpenAI's layout."""
        said: list[int] = []
        content: list[dict[str, Any]] = []
        while len(said) < body["max_tokens"] and self.tokenizer.eos_token_id not in said:
            logp = self.distribution(body["messages"], said)
            said.append(int(logp.argmax()))
            top = logp.topk(body.get("top_logprobs", 1))
            named = [(self.tokenizer.decode([int(i)]), float(p)) for p, i in zip(top.values, top.indices, strict=True)]
            likeliest = [{"token": token, "logprob": p, "bytes": None} for token, p in named]
            content.append({**likeliest[0], "top_logprobs": likeliest})
        message = {"role": "assistant", "content": self.tokenizer.decode(said, skip_special_tokens=True)}
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": "length", "logprobs": None}
        if body.get("logprobs") and self.fault != "bare":
            choice["logprobs"] = {"content": content}
        choices = [] if self.fault == "empty" else [choice]
        return {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"], "choices": choices}


def _error(message: str) -> dict[str, Any]:
    return {"error": {"message": message, "type": "x", "code": None}}


@contextmanager
def serving(double: Double) -> Iterator[Double]:
    """Serve the double on a free port while the block lasts; its `url` ends in /v1."""
    with listening(double.answer) as url:
        double.url = f"{url}/v1"
        yield double
