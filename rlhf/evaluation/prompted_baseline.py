"""Policies that answer under a template: the paper's baseline "GPT-3 (prompted)" (section 3.5), and chain-of-thought.

A template of kind `answer` (rlhf/data/prompt_template.py) puts worked examples before the dialogue as turns of their
own and its text around the last request. With chain-of-thought the policy writes its reasoning first, and then, after
the cue, its answer; that alone is its response. Both are sampled at the evaluation's temperature, so the answer is a
draw given a draw of the reasoning. `stop` ends a response at a line where a model without an end of turn, prompted in
the plain format, goes on with the next one; policies that were trained to end theirs are not helped in this way.

The response is judged as one to the plain request. Its length is its own; its KL to SFT is not defined, for it was
sampled under another prompt, with chain-of-thought even under one that the policy wrote.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import Recipe
from rlhf.data.encoding import encode_prompt, encode_response, speaks_after_colon, stop_ids
from rlhf.data.prompt_template import Template, assistant_answer
from rlhf.data.records import Message, Prompt
from rlhf.functional.seeding import row_seed
from rlhf.models.loading import check_context
from rlhf.rollout.sampling import Rollout, pad_rollout, sample
from rlhf.rollout.sampling_params import SamplingParams


class PromptedResponses(NamedTuple):
    """Responses as a rollout of the plain prompts (log-probabilities 0: they are not those under the plain prompt)."""

    rollout: Rollout
    texts: list[str]
    reasoning: list[str]  # empty texts without chain-of-thought


def prompted_messages(template: Template, prompt: Prompt) -> Prompt:
    """The prompt under the template: a system message, the examples, earlier turns, the last request in its text."""
    *before, last = prompt.messages
    system = before[:1] if before and before[0].role == "system" else []
    *examples, request = template.messages({"prompt": last.content})
    return Prompt((*system, *examples, *before[len(system) :], Message("user", request.content)))


def answer_prompted(
    recipe: Recipe,
    policy: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
    prompts: Sequence[Prompt],
    plain: Sequence[Sequence[int]],
    seeds: Sequence[int],
    advance: Callable[[int], None] | None = None,
) -> PromptedResponses:
    """One response to each prompt under the template.

    Args:
        plain: ids of the prompts as they are, for which the rollout is made out.
        seeds: one for each row, as for a policy without a template.
        advance: called with the number of texts finished: one a row, and one more where the template reasons.

    Raises:
        UserError: when the model has no positions for template, prompt and response.
    """
    cfg, limit = recipe.evaluate, recipe.data.max_response_tokens
    rows = [encode_prompt(tokenizer, prompted_messages(template, prompt)) for prompt in prompts]
    cue = encode_response(tokenizer, assistant_answer("x", template.cue), finished=False) if template.reasons else []
    longest = max(map(len, rows)) + limit + (cfg.reasoning_tokens + len(cue) if template.reasons else 0)
    check_context(policy, longest, "evaluate.prompted")
    params = SamplingParams.from_recipe(recipe, cfg.temperature, stop_ids(tokenizer, policy))
    thoughts = [""] * len(rows)
    if template.reasons:
        reasoning = replace(params, max_new_tokens=cfg.reasoning_tokens)
        others = [row_seed(seed, "reasoning") for seed in seeds]
        drawn = sample(policy, tokenizer, rows, reasoning, seeds=others, advance=advance)
        for i, text in enumerate(drawn.texts(tokenizer)):
            thought = text.split(template.cue)[0].strip()
            before = _before_stop(tokenizer, template, thought)
            thoughts[i] = thought if before is None else before
        said = [
            encode_response(tokenizer, assistant_answer(thought, template.cue), finished=False) for thought in thoughts
        ]
        rows = [[*row, *ids] for row, ids in zip(rows, said, strict=True)]
    drawn = sample(policy, tokenizer, rows, params, seeds=seeds, advance=advance)
    responses = [
        response_ids(tokenizer, template, drawn.response(i), text, bool(drawn.finished[i]))
        for i, text in enumerate(drawn.texts(tokenizer))
    ]
    answers = [(ids, [0.0] * len(ids)) for ids in responses]
    rollout = pad_rollout(plain, answers, int(tokenizer.pad_token_id), set(params.stop_ids))
    return PromptedResponses(rollout, rollout.texts(tokenizer), thoughts)


def response_ids(
    tokenizer: PreTrainedTokenizerBase, template: Template, ids: list[int], text: str, finished: bool
) -> list[int]:
    """The response alone: up to where the template has it stop, without the blank that follows a cue.

    What was sampled stays as it is where nothing is taken off it, or where nothing else would be left.
    """
    before = _before_stop(tokenizer, template, text)
    cut = before is not None
    words = before if before is not None else text.lstrip() if template.reasons else text
    if words == text or not (words or cut):
        return ids
    return encode_response(tokenizer, words, finished or cut)


def _before_stop(tokenizer: PreTrainedTokenizerBase, template: Template, text: str) -> str | None:
    """The text before a line that begins with the template's `stop`; None where there is no such line.

    It is the mark of a turn of the plain prompt format; in a chat template the words are words like others.
    """
    if not template.stop or not speaks_after_colon(tokenizer):
        return None
    found = re.search(rf"^[ \t]*{re.escape(template.stop)}", text, re.MULTILINE)
    return text[: found.start()].strip() if found else None
