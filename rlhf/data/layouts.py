"""Read published layouts of ranking data as they were released.

A layout is recognised by its keys, in the first line of each; rank 1 is best and equal ranks are a tie.

    Anthropic HH-RLHF       chosen, rejected: both transcripts, and no prompt
    (arXiv 2204.05862)      the prompt is what both share, up to the last "Assistant:"; chosen 1, rejected 2
    OpenAI summarize-       info, summaries, choice
    from-feedback           "SUBREDDIT: r/.. TITLE: .. POST: .. TL;DR:", or "Article: .. TL;DR:" for news;
    (arXiv 2009.01325)      summaries[].text, the one at index `choice` 1, the other 2; `worker` is the labeler
    WebGPT comparisons      question, answer_0, answer_1, score_0, score_1
    (arXiv 2112.09332)      question.full_text; the higher score first, equal scores tie
    UltraFeedback           instruction, completions
    (arXiv 2310.01377)      completions[].response, by fine-grained_score where all have it, else by overall_score
                            (a bug of early releases turned 1 into 10: OpenBMB/UltraFeedback issue 8)
    Nectar                  prompt (a transcript), answers
    (Zhu et al. 2023)       answers[].answer, by answers[].rank
    OpenAssistant trees     prompt (an object)
    (arXiv 2304.07327)      one ranking for each prompter's message with ranked replies: the messages from the root
                            down to it, its replies by rank (0 is the best); replies without a rank are left out
    SHP                     history, human_ref_A, human_ref_B, labels
    (Ethayarajh 2022)       history; labels 1: A first, 0: B first

Exports of labelling tools are recognised in the same way; rlhf/data/label_studio.py and rlhf/data/argilla.py read them.

A missing field or one of the wrong type raises UserError. Rankings with known blemishes of the releases (empty
responses, equal texts ranked apart, too few responses, dialogues that differ before the last answer) are dropped and
counted by reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

from rlhf.data import argilla, label_studio
from rlhf.data.layout_fields import Counter, Layout, RawRanking, column, has, number, objects, text_or_empty
from rlhf.data.ranks import MAX_K, MIN_K, equal_texts_ranked_apart, ranks_of_scores
from rlhf.data.sources import SourceRow, check_object, check_text, check_whole

_MARKER = re.compile(r"(?:^|\n\n)(Human|Assistant):")


def split_transcript(text: str) -> list[tuple[str, str]] | None:
    """Split "Human: .. Assistant: .." into turns (speaker, stripped words); None if it does not begin with "Human:".

    A speaker's name counts if it begins the text or follows a blank line, and if the other speaker had the turn before:
    a second "Human:" in a row is part of the human's words, so that turns alternate and no character is lost.
    """
    text = text.strip()
    turns: list[list[Any]] = []  # [speaker, start of the words, end of the words]
    for marker in _MARKER.finditer(text):
        if not turns and (marker.start() > 0 or marker[1] != "Human"):
            return None
        if not turns or turns[-1][0] != marker[1]:
            if turns:
                turns[-1][2] = marker.start()
            turns.append([marker[1], marker.end(), len(text)])
    return [(speaker, text[start:end].strip()) for speaker, start, end in turns] or None


def find_layout(fields: dict[str, Any]) -> Layout | None:
    """Return the published layout of a row with these fields, or None."""
    return next((layout for layout in LAYOUTS if layout.matches(fields)), None)


def read_published(layout: Layout, row: SourceRow, drops: Counter) -> Iterator[RawRanking]:
    """Yield a published row's rankings; drop and count those with a known blemish. Raises UserError for a bad field."""
    for ranked in layout.read(row, drops):
        if reason := _blemish(ranked):
            drops.add(f"{layout.name}: {reason}")
        else:
            yield ranked


def _blemish(ranked: RawRanking) -> str | None:
    """Return the reason to drop a ranking, or None."""
    if len(ranked.responses) < MIN_K:
        return f"fewer than {MIN_K} ranked responses"
    if len(ranked.responses) > MAX_K:
        return f"more than {MAX_K} responses"
    if not all(response.strip() for response in ranked.responses):
        return "an empty response"
    if equal_texts_ranked_apart(ranked.responses, ranked.ranks):
        return "equal responses ranked apart"
    contents = [m["content"] for m in ranked.prompt] if isinstance(ranked.prompt, list) else [ranked.prompt]
    return None if all(content.strip() for content in contents) else "an empty prompt or turn"


def _hh(row: SourceRow, drops: Counter) -> Iterator[RawRanking]:
    heads, tails = [], []
    for field in ("chosen", "rejected"):
        turns = split_transcript(check_text(row, field, row.need(field)))
        if turns is None:
            what = f"there is no `prompt`, and `{field}` is not a dialogue that begins with Human:"
            raise row.fail(field, what, 'add `prompt`, or write "\\n\\nHuman: ... \\n\\nAssistant: ..."')
        if turns[-1][0] != "Assistant":
            drops.add("HH-RLHF: the dialogue does not end with the assistant")
            return
        heads.append(turns[:-1])
        tails.append(turns[-1][1])
    if heads[0] != heads[1]:
        drops.add("HH-RLHF: the dialogues part before the last answer")
        return
    yield RawRanking(_messages(heads[0]), tails, [1, 2])


def _messages(turns: Sequence[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": "user" if speaker == "Human" else "assistant", "content": words} for speaker, words in turns]


def _summarize(row: SourceRow, drops: Counter) -> Iterator[RawRanking]:
    info = check_object(row, "info", row.need("info"))
    if info.get("post") is not None:
        subreddit, title, post = (check_text(row, f"info.{k}", info.get(k)) for k in ("subreddit", "title", "post"))
        prompt = f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
    else:
        article = check_text(row, "info.article", info.get("article"))
        prompt = f"Article:\n{article}\n\nTL;DR:"
    # The texts begin with the blank that follows "TL;DR:".
    texts = [text.strip() for text in column(row, "summaries", "text")]
    choice = check_whole(row, "choice", row.need("choice"))
    if not 0 <= choice < len(texts):
        raise row.fail("choice", f"`choice` is {choice}, and there are {len(texts)} summaries", "count from 0")
    labeler = check_text(row, "worker", row.fields["worker"]) if "worker" in row.fields else ""
    yield RawRanking(prompt, texts, [1 if i == choice else 2 for i in range(len(texts))], labeler)


def _webgpt(row: SourceRow, drops: Counter) -> Iterator[RawRanking]:
    question = check_object(row, "question", row.need("question"))
    prompt = check_text(row, "question.full_text", question.get("full_text"))
    answers = [text_or_empty(row, field, row.need(field)) for field in ("answer_0", "answer_1")]
    scores = [number(row, field, row.need(field)) for field in ("score_0", "score_1")]
    yield RawRanking(prompt, answers, ranks_of_scores(scores))


def _ultrafeedback(row: SourceRow, drops: Counter) -> Iterator[RawRanking]:
    prompt = check_text(row, "instruction", row.need("instruction"))
    completions = objects(row, "completions", row.need("completions"))
    fine = all(item.get("fine-grained_score") is not None for _, item in completions)
    score = "fine-grained_score" if fine else "overall_score"
    scores = [number(row, f"{place}.{score}", item.get(score)) for place, item in completions]
    yield RawRanking(prompt, column(row, "completions", "response"), ranks_of_scores(scores))


def _nectar(row: SourceRow, drops: Counter) -> Iterator[RawRanking]:
    prompt = check_text(row, "prompt", row.need("prompt"))
    turns = split_transcript(prompt)
    answers = column(row, "answers", "answer")
    # The released ranks are floats, 1.0 to 7.0; only their order and equality matter.
    ranked = objects(row, "answers", row.need("answers"))
    ranks = [number(row, f"{place}.rank", item.get("rank")) for place, item in ranked]
    dialogue = _messages(turns[:-1]) if turns and turns[-1] == ("Assistant", "") else prompt
    yield RawRanking(dialogue, answers, ranks_of_scores([-rank for rank in ranks]))


def _oasst(row: SourceRow, drops: Counter) -> Iterator[RawRanking]:
    # A list of nodes in place of recursion: a thread may be deeper than Python's recursion limit.
    todo: list[tuple[str, dict[str, Any], list[dict[str, str]]]] = [("prompt", row.fields["prompt"], [])]
    while todo:
        place, node, above = todo.pop()
        text, role = text_or_empty(row, f"{place}.text", node.get("text")), node.get("role")
        if role not in ("prompter", "assistant"):
            raise row.fail(f"{place}.role", f"the role is {role!r}", "it is prompter or assistant")
        thread = [*above, {"role": "user" if role == "prompter" else "assistant", "content": text}]
        replies = objects(row, f"{place}.replies", node.get("replies") or [])
        ranked = [(where, r) for where, r in replies if r.get("rank") is not None and not r.get("deleted")]
        if role == "prompter" and ranked:
            texts = [text_or_empty(row, f"{where}.text", r.get("text")) for where, r in ranked]
            ranks = [check_whole(row, f"{where}.rank", r["rank"]) for where, r in ranked]
            yield RawRanking(thread, texts, [rank + 1 for rank in ranks])
        todo += [(where, reply, thread) for where, reply in reversed(replies)]


def _shp(row: SourceRow, drops: Counter) -> Iterator[RawRanking]:
    prompt = check_text(row, "history", row.need("history"))
    answers = [text_or_empty(row, field, row.need(field)) for field in ("human_ref_A", "human_ref_B")]
    label = check_whole(row, "labels", row.need("labels"))
    if label not in (0, 1):
        raise row.fail("labels", f"`labels` is {label}", "it is 1 when A is preferred and 0 when B is")
    yield RawRanking(prompt, answers, [1, 2] if label == 1 else [2, 1])


LAYOUTS = (
    *label_studio.LAYOUTS,
    *argilla.LAYOUTS,
    Layout("Nectar", has("prompt", "answers"), _nectar),
    Layout("UltraFeedback", has("instruction", "completions"), _ultrafeedback),
    Layout("summarize-from-feedback", has("info", "summaries"), _summarize),
    Layout("WebGPT", has("question", "answer_0", "answer_1"), _webgpt),
    Layout("SHP", has("history", "human_ref_A", "human_ref_B"), _shp),
    Layout("OpenAssistant", lambda fields: isinstance(fields.get("prompt"), dict), _oasst),
    Layout(
        "HH-RLHF",
        lambda f: "prompt" not in f and isinstance(f.get("chosen"), str) and isinstance(f.get("rejected"), str),
        _hh,
    ),
)
