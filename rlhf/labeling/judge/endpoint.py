"""Ask an OpenAI-compatible endpoint: labels are read off the likeliest first tokens of its answer.

An endpoint gives the log-probabilities of a few tokens (`top_logprobs`). A label that is not among them has at most the
probability of the last one, and at most the probability that all of them leave. The smaller of the two, an upper bound,
is used for it, and the answer is counted. Where no label of a pair is among them, the answer decides nothing. A chat
cannot make the model continue an answer that has been begun. So the cue ends the user's turn; after reasoning, which
the endpoint writes first, it is a turn of its own. The key is read from the environment's OPENAI_API_KEY alone.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import TYPE_CHECKING, Any

from rlhf.data.prompt_template import Template
from rlhf.errors import UserError
from rlhf.labeling.judge.local import Fields, LabelReading
from rlhf.system.distributed import gather_shards, processes, shard

if TYPE_CHECKING:
    from openai import OpenAI

KEY = "OPENAI_API_KEY"
MIN_PROBABILITY = 1e-9  # floor of every probability: endpoints round, and write a log-probability of -9999 for 0
MAX_UNLABELLED = 20  # stop after this many initial answers without a label
RETRIES = 4  # by the client, with growing pauses, after answers such as 429 and 503


class EndpointReader:
    """A `Reader` that asks an endpoint; the module's docstring says how labels are read."""

    def __init__(
        self,
        url: str,  # such as http://localhost:8000/v1
        model: str,
        reasoning_tokens: int = 96,  # at most, before the cue
        top_logprobs: int = 20,  # number of likeliest tokens to ask for; OpenAI allows 20
        concurrency: int = 4,  # questions under way at once
        timeout_s: float = 60.0,  # for each of them
    ) -> None:
        from openai import OpenAI  # takes a second to import

        self.url, self.model, self.concurrency = url, model, concurrency
        self.reasoning_tokens, self.top_logprobs = reasoning_tokens, top_logprobs
        self.answers, self.unlabelled = 0, 0  # number of all answers, and of those without any label
        key = os.environ.get(KEY) or "none"  # a local server needs no key, but the client does not start without one
        self.client: OpenAI = OpenAI(base_url=url, api_key=key, timeout=timeout_s, max_retries=RETRIES)

    def question_fits(self, template: Template, fields: Fields) -> bool:
        """Return True: only the endpoint knows its limit, and it refuses questions that are too long."""
        return True

    def read(
        self,
        template: Template,
        questions: Sequence[Fields],
        advance: Callable[[int], None] | None = None,
        keep: Callable[[dict[int, LabelReading]], None] | None = None,
    ) -> list[LabelReading]:
        """Read as `Reader.read` says, nothing for a question over the context. Answers are kept when another fails.

        Raises UserError when the endpoint cannot be reached, refuses, gives no log-probabilities, or never a label.
        """
        with ThreadPoolExecutor(self.concurrency) as pool:
            asked = {pool.submit(self._ask, template, questions[i]): i for i in shard(range(len(questions)))}
            waiting = set(asked)

            def take(future: Future[LabelReading]) -> None:
                waiting.remove(future)
                reading = future.result()
                if keep:
                    keep({asked[future]: reading})

            try:
                for future in as_completed(asked):
                    take(future)
                    if advance:
                        advance(processes())
            except BaseException:
                pool.shutdown(cancel_futures=True)  # waits for the questions under way, whose answers are paid for
                for future in list(waiting):
                    if future.done() and not future.cancelled() and future.exception() is None:
                        take(future)
                raise
        mine = [future.result() for future in asked]
        self._count(template, mine)
        return gather_shards(mine)

    def _count(self, template: Template, readings: Sequence[LabelReading]) -> None:
        """Raise UserError when the first MAX_UNLABELLED answers and all after them have no label."""
        self.answers += len(readings)
        self.unlabelled += sum(reading.bounded == len(template.labels) for reading in readings)
        if self.answers >= MAX_UNLABELLED and self.unlabelled == self.answers:
            labels = f"a label ({', '.join(template.labels)}) was among the likeliest tokens"
            what = f"in none of {self.answers} answers {labels}: every pair would tie"
            where = f"judge.template {template.name}, judge.endpoint {self.url}, model {self.model}"
            raise UserError(what, where, "take labels of one token, such as A and B, or another template or model")

    def _ask(self, template: Template, fields: Fields) -> LabelReading:
        try:
            return self._answer(template, fields)
        except TooLong:
            return LabelReading(())

    def _answer(self, template: Template, fields: Fields) -> LabelReading:
        messages, reasoning = chat(template, fields), ""
        if template.reasons:
            said = self._complete(messages, self.reasoning_tokens, {}).message.content or ""
            reasoning = said.split(template.cue)[0].strip()
            messages += [_turn("assistant", reasoning or "..."), _turn("user", template.cue)]
        choice = self._complete(messages, 1, {"logprobs": True, "top_logprobs": self.top_logprobs})
        tokens = choice.logprobs.content if choice.logprobs else None
        if not tokens or not tokens[0].top_logprobs:
            where = f"judge.endpoint {self.url}, model {self.model}"
            fix = "take a model that gives them (models that reason on their own do not)"
            raise UserError("the endpoint gave no log-probabilities of its answer", where, fix)
        logprobs, bounded = read_labels({t.token: t.logprob for t in tokens[0].top_logprobs}, template.labels)
        return LabelReading(logprobs, reasoning, bounded)

    def _complete(self, messages: list[Any], max_tokens: int, options: dict[str, Any]) -> Any:
        """Return the first choice of an answer of at most `max_tokens` tokens."""
        from openai import OpenAIError

        try:
            answer = self.client.chat.completions.create(
                model=self.model, messages=messages, max_tokens=max_tokens, temperature=0, **options
            )
        except OpenAIError as error:
            raise _explained(error, self.url, self.model) from None  # the text of the cause may hold the key
        choices = getattr(answer, "choices", None)  # an HTML page comes as a string
        if not choices:
            fix = "correct the URL, which mostly ends in /v1, or look at the server's log"
            raise UserError("the endpoint's answer has no choices", f"judge.endpoint {self.url}", fix)
        return choices[0]


class TooLong(Exception):
    """Raised for a question that is longer than the context of the endpoint's model."""


def chat(template: Template, fields: Fields) -> list[dict[str, str]]:
    """Return the turns of a question; the answer is a label, or the reasoning where the template asks for some."""
    asks = "" if template.reasons else template.cue
    turns = []
    for example in template.shown(fields):
        turns.append(_turn("user", _asking(template.question(example.fields), asks)))
        if template.reasons:
            turns += [_turn("assistant", example.reason), _turn("user", template.cue)]
        turns.append(_turn("assistant", example.answer))
    return [*turns, _turn("user", _asking(template.question(fields), asks))]


def read_labels(logprobs: Mapping[str, float], labels: Sequence[str]) -> tuple[tuple[float, ...], int]:
    """Return each label's log-probability from the likeliest tokens, stripped, and how many are only upper bounds."""
    shares = {label: [math.exp(logp) for token, logp in logprobs.items() if token.strip() == label] for label in labels}
    rest = 1 - sum(math.exp(logp) for logp in logprobs.values())
    bound = max(MIN_PROBABILITY, min(rest, math.exp(min(logprobs.values()))))
    found = tuple(math.log(max(MIN_PROBABILITY, sum(share) if share else bound)) for share in shares.values())
    return found, sum(1 for share in shares.values() if not share)


def _turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _asking(question: str, cue: str) -> str:
    return f"{question}\n\n{cue}" if cue else question


def _explained(error: Exception, url: str, model: str) -> UserError | TooLong:
    """Return the error with its remedy; the key is replaced where the server's message quotes it."""
    import openai

    where, what = f"judge.endpoint {url}, model {model}", str(error).splitlines()[0]
    if key := os.environ.get(KEY):
        what = what.replace(key, "***")
    if isinstance(error, openai.BadRequestError) and re.search(r"context.length|maximum context", str(error), re.I):
        return TooLong()
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return UserError(f"the endpoint refuses the key: {what}", where, f"export {KEY} with a key that it takes")
    if isinstance(error, openai.APITimeoutError):
        return UserError("the endpoint did not answer in time", where, "raise judge.timeout_s, or ask less at once")
    if isinstance(error, openai.APIConnectionError):
        return UserError(f"the endpoint cannot be reached: {what}", where, "start it, or correct the URL")
    if isinstance(error, openai.NotFoundError):
        fix = "correct judge.model, or the URL, which mostly ends in /v1"
        return UserError(f"the endpoint knows no such model or path: {what}", where, fix)
    return UserError(f"the endpoint does not answer: {what}", where, "see what it says; then run the same again")
