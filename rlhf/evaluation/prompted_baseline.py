"""Policies that answer under a template: the paper's baseline "GPT-3 (prompted)" (section 3.5), and chain-of-thought.

A template of kind `answer` (rlhf/data/prompt_template.py) puts worked examples before the dialogue as turns of their
own and its text around the last request. With chain-of-thought the policy first writes its reasoning and then, after
the cue, its answer; only the answer is its response. Both are sampled at the evaluation's temperature, so the answer is
a draw given a draw of the reasoning. The template's `stop` ends a response at the line where a model that knows no end
of turn, prompted in the plain format, begins the next turn. Responses without a template are never cut in this way.

The response is judged as one to the plain request. Its length is its own. Its KL to SFT is not defined, since it was
sampled under another prompt, with chain-of-thought even under one that the policy wrote.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import Recipe
from rlhf.data.chat_template import speaks_after_colon, stop_ids
from rlhf.data.encoding import encode_prompt, encode_response
from rlhf.data.prompt_template import Template, assistant_answer
from rlhf.data.records import Message, Prompt
from rlhf.evaluation.heldout import HeldOut
from rlhf.functional.seeding import row_seed
from rlhf.models.loading import check_context
from rlhf.rollout.sampling import Rollout, pad_rollout, sample
from rlhf.rollout.sampling_params import SamplingParams


class PromptedResponses(NamedTuple):
    """Responses as a rollout of the plain prompts; log-probabilities are 0, since those under them are not known."""

    rollout: Rollout
    texts: list[str]
    reasoning: list[str]  # empty texts without chain-of-thought


def prompted_messages(template: Template, prompt: Prompt) -> Prompt:
    """Return the prompt under the template: system message, examples, earlier turns, then the request in its text."""
    *before, last = prompt.messages
    system = before[:1] if before and before[0].role == "system" else []
    *examples, request = template.messages({"prompt": last.content})
    return Prompt((*system, *examples, *before[len(system) :], Message("user", request.content)))


def answer_prompted(
    recipe: Recipe,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    asked: HeldOut,
    advance: Callable[[int], None] | None = None,
) -> PromptedResponses:
    """Sample one response for each row of `asked` under the template; the rollout's prompts are the plain ones.

    `advance` is called with the number of texts finished: one per row, and one more if the template reasons. Raises
    UserError if template, prompt and response do not fit into the model's context.
    """
    cfg, limit = recipe.evaluate, recipe.data.max_response_tokens
    rows = [encode_prompt(tokenizer, prompted_messages(template, prompt)) for prompt in asked.row_prompts]
    reasoning_limit = cfg.reasoning_tokens + len(_reasoning_ids(tokenizer, template, "x")) if template.reasons else 0
    check_context(policy, max(map(len, rows)) + reasoning_limit + limit, "evaluate.prompted")
    params = SamplingParams.from_recipe(recipe, cfg.temperature, stop_ids(tokenizer, policy))
    thoughts = [""] * len(rows)
    if template.reasons:
        reasoning = replace(params, max_new_tokens=cfg.reasoning_tokens)
        seeds = [row_seed(seed, "reasoning") for seed in asked.seeds]
        drawn = sample(policy, tokenizer, rows, reasoning, seeds=seeds, advance=advance)
        thoughts = [_reasoning_text(tokenizer, template, text) for text in drawn.texts(tokenizer)]
        reasoned = [_reasoning_ids(tokenizer, template, thought) for thought in thoughts]
        rows = [[*row, *ids] for row, ids in zip(rows, reasoned, strict=True)]
    drawn = sample(policy, tokenizer, rows, params, seeds=asked.seeds, advance=advance)
    responses = _responses(tokenizer, template, drawn)
    rollout = pad_rollout(asked.ids, responses, int(tokenizer.pad_token_id), params.stop_ids)
    return PromptedResponses(rollout, rollout.texts(tokenizer), thoughts)


def _reasoning_text(tokenizer: PreTrainedTokenizerBase, template: Template, text: str) -> str:
    """Return the reasoning in a sampled text: what comes before the cue and before the template's `stop`."""
    thought = text.split(template.cue)[0].strip()
    before = _before_stop(tokenizer, template, thought)
    return thought if before is None else before


def _reasoning_ids(tokenizer: PreTrainedTokenizerBase, template: Template, thought: str) -> list[int]:
    """Return the token ids of a reasoning and the cue, after which the answer begins."""
    return encode_response(tokenizer, assistant_answer(thought, template.cue), finished=False)


def _responses(
    tokenizer: PreTrainedTokenizerBase, template: Template, drawn: Rollout
) -> list[tuple[list[int], list[float]]]:
    """Return the ids and log-probabilities (all 0) of the responses in sampled texts."""
    found = []
    for i, text in enumerate(drawn.texts(tokenizer)):
        ids = response_ids(tokenizer, template, drawn.response(i), text, bool(drawn.finished[i]))
        found.append((ids, [0.0] * len(ids)))
    return found


def response_ids(
    tokenizer: PreTrainedTokenizerBase, template: Template, ids: list[int], text: str, finished: bool
) -> list[int]:
    """Return the ids of the response alone: up to the template's `stop`, without the blank that follows a cue.

    The sampled ids are returned unchanged if nothing is cut off, or if cutting off the blank would leave nothing.
    """
    before = _before_stop(tokenizer, template, text)
    cut = before is not None
    words = before if before is not None else text.lstrip() if template.reasons else text
    if words == text or not (words or cut):
        return ids
    return encode_response(tokenizer, words, finished or cut)


def _before_stop(tokenizer: PreTrainedTokenizerBase, template: Template, text: str) -> str | None:
    """Return the text before the first line that begins with the template's `stop`; None if there is no such line.

    `stop` marks a turn in the plain prompt format only; under a chat template it is ordinary text.
    """
    if not template.stop or not speaks_after_colon(tokenizer):
        return None
    found = re.search(rf"^[ \t]*{re.escape(template.stop)}", text, re.MULTILINE)
    return text[: found.start()].strip() if found else None
