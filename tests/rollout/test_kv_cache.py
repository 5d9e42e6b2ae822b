"""The decode loop's cache: keys and values are those that were put in, wherever their row is now."""

from __future__ import annotations

import torch
from transformers import MistralConfig, MistralForCausalLM

from rlhf.rollout.kv_cache import MIN_GROWTH, PreallocatedLayer, compaction
from support.rollout_runs import PROMPTS, run


def test_rows_that_leave_are_replaced_by_the_last_that_stay():
    assert compaction([True, False, True, False, True]) == (3, [(1, 4)], [0, 4, 2])
    assert compaction([False, False, True, True]) == (2, [(0, 2), (1, 3)], [2, 3])
    assert compaction([True, True, False]) == (2, [], [0, 1])


def test_a_layer_holds_what_was_appended_while_it_grows_and_rows_leave():
    """Against tensors that are joined and selected anew each time."""
    generator = torch.Generator().manual_seed(0)
    layer, keys, values = PreallocatedLayer(), None, None
    for step in range(3 * MIN_GROWTH):
        rows, tokens = (7, 5) if keys is None else (len(keys), 1)
        new = torch.randn(2, rows, 2, tokens, 3, generator=generator)
        got = layer.update(new[0], new[1])
        keys = new[0] if keys is None else torch.cat([keys, new[0]], 2)
        values = new[1] if values is None else torch.cat([values, new[1]], 2)
        assert torch.equal(got[0], keys) and torch.equal(got[1], values)
        assert layer.get_seq_length() == keys.shape[2]
        if step in (3, 70, 71):
            rows, moves, order = compaction([i != step % len(keys) for i in range(len(keys))])
            layer.keep_rows(rows, moves)
            keys, values = keys[order], values[order]


def test_rows_are_taken_several_times_or_not_at_all():
    """Rows that were one tensor seen several times, as virtual tokens are, become rows of their own."""
    generator = torch.Generator().manual_seed(0)
    layer = PreallocatedLayer()
    one = torch.randn(2, 1, 2, 4, 3, generator=generator).expand(-1, 3, -1, -1, -1)
    layer.update(one[0], one[1])
    keys, values = one[0].clone(), one[1].clone()
    for tokens, picked in ((5, [2, 0, 2, 2]), (1, None), (1, [3, 1]), (MIN_GROWTH, [0, 1, 1]), (1, None)):
        new = torch.randn(2, len(keys), 2, tokens, 3, generator=generator)
        got = layer.update(new[0], new[1])
        keys, values = torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2)
        assert torch.equal(got[0], keys) and torch.equal(got[1], values)
        if picked is not None:
            layer.batch_select_indices(torch.tensor(picked))
            keys, values = keys[picked], values[picked]
            assert torch.equal(layer.keys, keys) and torch.equal(layer.values, values)
    layer.keep_rows(2, [(0, 2)])
    assert torch.equal(layer.keys, keys[[2, 1]]) and torch.equal(layer.values, values[[2, 1]])


def test_a_model_with_a_sliding_window_is_sampled_as_generate_does():
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MistralConfig(vocab_size=50, num_key_value_heads=2, sliding_window=4, **shape)
    model = MistralForCausalLM(config).eval()
    ours, theirs = (run(model, temperature=0.0, engine=engine) for engine in ("native", "generate"))
    assert [ours.response(i) for i in range(len(PROMPTS))] == [theirs.response(i) for i in range(len(PROMPTS))]
    assert torch.allclose(ours.logprobs, theirs.logprobs, atol=1e-4)
