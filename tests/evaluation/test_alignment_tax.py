"""Pretraining loss and cloze accuracy of a tiny model against explicit loops over its logits."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rlhf.data.records import Cloze
from rlhf.data.text_blocks import encode_question, token_blocks
from rlhf.errors import UserError
from rlhf.evaluation.alignment_tax import cloze_accuracy, pretraining_loss


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for each byte, except that " t" and "he" are merged."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, "Ġt", "he"])}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=[("Ġ", "t"), ("h", "e")]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.fixture(scope="module")
def model() -> PreTrainedModel:
    torch.manual_seed(0)
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(vocab_size=258, hidden_size=32, intermediate_size=64, **layers)
    # Wide logits: a fresh model is close to uniform and would hide a wrong position.
    network = LlamaForCausalLM(config).eval()
    torch.nn.init.normal_(network.lm_head.weight, std=1.0)
    return network


def loop_logprobs(model: PreTrainedModel, ids: list[int]) -> list[float]:
    """log p(ids[t] | ids[:t]) for t from 1, one unpadded row at a time."""
    with torch.no_grad():
        logp = torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)
    return [float(logp[t - 1, ids[t]]) for t in range(1, len(ids))]


def test_blocks_cut_documents_and_drop_short_rests(tokenizer: PreTrainedTokenizerFast) -> None:
    texts = ["x" * 20, "y" * 27, "z" * 28, "short", "eight ab"]
    rows = token_blocks(texts, tokenizer, 10)
    # 20 = 10 + 10; 27 = 10 + 10 + 7 (dropped); 28 = 10 + 10 + 8; 5 dropped; 8 kept.
    assert [len(row) for row in rows] == [10, 10, 10, 10, 10, 10, 8, 8]
    assert tokenizer.decode(rows[-1]) == "eight ab"
    assert [len(row) for row in token_blocks(["abcdefgh"], tokenizer, 4)] == [4, 4]


@pytest.mark.parametrize("tokens_per_batch", [16, 64, 4096])
def test_pretraining_loss_is_the_mean_over_all_tokens(model: PreTrainedModel, tokens_per_batch: int) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = [torch.randint(0, 258, (n,), generator=generator).tolist() for n in (9, 30, 2, 17, 17)]
    expected = [logp for row in rows for logp in loop_logprobs(model, row)]
    loss, count = pretraining_loss(model, rows, tokens_per_batch)
    assert count == 8 + 29 + 1 + 16 + 16
    assert loss == pytest.approx(-sum(expected) / count, abs=1e-5)


def test_pretraining_loss_needs_text(model: PreTrainedModel) -> None:
    with pytest.raises(UserError, match="data.pretraining_heldout"):
        pretraining_loss(model, [[1]])


def test_encode_question_splits_after_the_context(tokenizer: PreTrainedTokenizerFast) -> None:
    for context in ("On", "On "):  # " the" becomes " t" + "he", also after a context that ends in a space
        pairs = encode_question(tokenizer, Cloze(context, ("the mat", "a hat"), 0))
        assert [tokenizer.decode(prompt) for prompt, _ in pairs] == ["On", "On"]
        assert [tokenizer.decode(choice) for _, choice in pairs] == [" the mat", " a hat"]


def test_cloze_accuracy_equals_an_explicit_loop(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    words = ["red", "αβγδεζ", "tea", "ΩΩ", "blue sky", "λ"]
    choices = [tuple(words[(i + j) % 6] for j in range(4)) for i in range(12)]
    questions = [Cloze(f"Question {i}: the colour is", choices[i], i % 4) for i in range(12)]
    right = right_sum = right_characters = 0
    for question in questions:
        sums = []
        for choice in question.choices:
            ids = tokenizer(f"{question.context} {choice}")["input_ids"]
            start = len(tokenizer(question.context)["input_ids"])
            sums.append(sum(loop_logprobs(model, ids)[start - 1 :]))
        per_byte = [s / len(c.encode("utf-8")) for s, c in zip(sums, question.choices, strict=True)]
        right += max(range(4), key=lambda i: per_byte[i]) == question.answer
        right_sum += max(range(4), key=lambda i: sums[i]) == question.answer
        per_character = [s / len(c) for s, c in zip(sums, question.choices, strict=True)]
        right_characters += max(range(4), key=lambda i: per_character[i]) == question.answer
    done: list[int] = []
    result = cloze_accuracy(model, tokenizer, questions, tokens_per_batch=200, advance=done.append)
    assert result.n == 12
    assert result.accuracy.mean == pytest.approx(right / 12)
    assert result.accuracy_sum.mean == pytest.approx(right_sum / 12)
    assert right not in (right_sum, right_characters)  # the questions tell the rules apart
    assert result.accuracy.low < result.accuracy.mean < result.accuracy.high
    assert sum(done) == 48


def test_cloze_accuracy_needs_questions(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(UserError, match="data.cloze"):
        cloze_accuracy(model, tokenizer, [])
