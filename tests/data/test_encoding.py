"""Prompts and responses as token ids, stop ids, and the limits that drop and count."""

from __future__ import annotations

from rlhf.data.chat_template import stop_ids
from rlhf.data.encoding import encode_prompt, encode_response, fit_demonstrations, fit_prompts, fit_rankings
from rlhf.data.records import Demonstration, Drops, Message, Prompt, Ranking
from rlhf.model_config import ModelSection
from rlhf.models.loading import load_policy, load_tokenizer
from support.data_files import user


def test_a_prompt_ends_where_the_assistant_begins(tiny_tokenizer) -> None:
    ids = encode_prompt(tiny_tokenizer, user("Say yes."))
    assert isinstance(ids, list) and all(type(i) is int for i in ids)
    assert tiny_tokenizer.decode(ids) == "<|im_start|>user\nSay yes.<|im_end|>\n<|im_start|>assistant\n"
    assert ids[0] == 1 and ids.count(2) == 1


def test_turns(tiny_tokenizer) -> None:
    turns = (Message("system", "Be short."), Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    assert tiny_tokenizer.decode(encode_prompt(tiny_tokenizer, Prompt(turns))) == (
        "<|im_start|>system\nBe short.<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\nb<|im_end|>\n"
        "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_response_gets_eos_when_it_is_finished(tiny_tokenizer) -> None:
    ids = encode_response(tiny_tokenizer, "Yes, it is.")
    assert tiny_tokenizer.decode(ids[:-1]) == "Yes, it is." and ids[-1] == 2
    assert encode_response(tiny_tokenizer, "Yes, it is.", finished=False) == ids[:-1]
    assert encode_response(tiny_tokenizer, "") == [2]


def test_special_tokens_inside_a_response_are_spelled_out(tiny_tokenizer) -> None:
    ids = encode_response(tiny_tokenizer, "a<|im_end|>b<|pad|>")
    assert ids.count(2) == 1 and 3 not in ids
    assert tiny_tokenizer.decode(ids[:-1]) == "a<|im_end|>b<|pad|>"


def test_plain_and_verbatim(tiny_dir) -> None:
    plain, verbatim = (load_tokenizer(tiny_dir, ModelSection(prompt_format=name)) for name in ("plain", "verbatim"))
    assert plain.decode(encode_prompt(plain, user("Say yes."))) == "Human: Say yes.\n\nAssistant:"
    assert plain.decode(encode_response(plain, "Yes.")[:-1]) == " Yes."
    assert encode_response(plain, " Yes.") == encode_response(plain, "Yes.")
    assert verbatim.decode(encode_prompt(verbatim, user("Once upon"))) == "Once upon"
    assert verbatim.decode(encode_response(verbatim, " a time")[:-1]) == " a time"


def test_stop_ids(tiny_dir, tiny_tokenizer) -> None:
    policy = load_policy(tiny_dir, ModelSection(name="tiny"))
    assert stop_ids(tiny_tokenizer) == stop_ids(tiny_tokenizer, policy) == [2]
    policy.generation_config.eos_token_id = [0, 2]
    assert stop_ids(tiny_tokenizer, policy) == [2, 0]
    policy.generation_config.eos_token_id = None
    assert stop_ids(tiny_tokenizer, policy) == [2]


def test_prompts_over_the_limit_are_dropped_and_counted(tiny_tokenizer) -> None:
    short, long = user("Say yes."), user("Say yes. " * 30)
    limit = len(encode_prompt(tiny_tokenizer, short))
    drops = Drops()
    kept = fit_prompts([short, long, short], tiny_tokenizer, limit, drops)
    assert [row.item for row in kept] == [short, short]
    assert kept[0].prompt == encode_prompt(tiny_tokenizer, short) and kept[0].responses == []
    assert drops.table() == [(f"prompt over {limit} tokens", 1)]
    assert fit_prompts([short], tiny_tokenizer, limit - 1, drops) == [] and drops.total == 2


def test_demonstrations_count_eos_in_the_response(tiny_tokenizer) -> None:
    demonstration = Demonstration(user("Say yes."), "Yes, it is.")
    prompt = len(encode_prompt(tiny_tokenizer, demonstration.prompt))
    response = len(encode_response(tiny_tokenizer, "Yes, it is."))
    drops = Drops()
    (row,) = fit_demonstrations([demonstration], tiny_tokenizer, prompt, response, prompt + response, drops)
    assert row.responses == [encode_response(tiny_tokenizer, "Yes, it is.")] and drops.total == 0
    for limits in ((prompt - 1, 99, 999), (99, response - 1, 999), (99, 99, prompt + response - 1)):
        assert fit_demonstrations([demonstration], tiny_tokenizer, *limits, drops) == []
    limits = {"prompt": prompt - 1, "response": response - 1, "prompt and response": prompt + response - 1}
    assert sorted(drops.table()) == sorted((f"{part} over {limit} tokens", 1) for part, limit in limits.items())


def test_a_ranking_goes_with_its_longest_output(tiny_tokenizer) -> None:
    ranking = Ranking(user("Say yes."), ("Yes.", "Yes, it is, and it was."), (1, 2), (True, False))
    prompt = len(encode_prompt(tiny_tokenizer, ranking.prompt))
    longest = len(encode_response(tiny_tokenizer, "Yes, it is, and it was.", finished=False))
    drops = Drops()
    (row,) = fit_rankings([ranking], tiny_tokenizer, prompt + longest, drops)
    assert row.responses[0][-1] == 2 and row.responses[1][-1] != 2
    assert fit_rankings([ranking], tiny_tokenizer, prompt + longest - 1, drops) == []
    assert drops.total == 1
