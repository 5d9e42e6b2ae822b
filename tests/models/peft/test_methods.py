"""Parameter-efficient methods in place: what is trained, and that padding, masks and caches change no number.

Expected values are those of tests/support/peft_references.py, worked out without the functions under test.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig, FalconForCausalLM, GPTNeoConfig, MistralConfig, Qwen2Config

from rlhf.errors import UserError
from rlhf.model_config import VIRTUAL_TOKEN_METHODS, PeftSection
from rlhf.models.loading import check_context, recompute_activations
from rlhf.models.logit_map import verified_map
from rlhf.models.peft.methods import add_adapter, peft_of, trainable
from rlhf.models.peft.virtual_tokens import attention_window
from rlhf.rollout import sampling
from rlhf.rollout.batches import build_batch
from rlhf.rollout.decoding import ModelDecoding, pad
from rlhf.rollout.scoring import raw_scores, response_logprobs, response_values
from support import peft_references
from support.peft_references import CACHED, CASES, EMBEDDED, METHODS, VIRTUAL, adapted, case, plain, stir
from support.rollout_runs import PROMPTS, run
from support.small_models import EOS, PAIRS, by_hand

ROW = [5, 6, 7, 8, 9, 10, 11]
STARTS_AT_NO_CHANGE = ("lora", "dora", "adapter", "ia3", "bitfit")


def parts(error: UserError) -> list[str]:
    """What is wrong, where, and what to do; none of them empty."""
    assert error.what and error.where and error.fix
    return [error.what, error.where, error.fix]


# --- what is trained --------------------------------------------------------------------------------------------------

# Hidden size 32, two layers, V = 3 virtual tokens, networks 7 wide.
#   Llama   maps 32-32, 32-16, 32-16, 32-32, 32-48, 32-48, 48-32: inputs and outputs add up to 464, outputs to 224
#   GPT-2   maps 32-96, 32-32, 32-128, 128-32: 512 and 288; biases 32 + 96 + 32 in attention, 32 + 128 + 32 in the MLP
#   Qwen2   as Llama, with biases 32, 16, 16 on queries, keys and values
# Keys, or values, of a layer are 2 heads of 8 in Llama, 4 of 8 in GPT-2 and OPT.
COUNTS = {
    ("llama", "lora"): 2 * 3 * 464,
    ("gpt2", "lora"): 2 * 3 * 512,
    ("qwen2", "lora"): 2 * 3 * 464,
    ("llama", "dora"): 2 * (3 * 464 + 224),
    ("gpt2", "dora"): 2 * (3 * 512 + 288),
    ("qwen2", "dora"): 2 * (3 * 464 + 224),
    ("llama", "ia3"): 2 * (16 + 16 + 48),  # keys, values, inner activations
    ("gpt2", "ia3"): 2 * (96 + 128),  # queries, keys and values are one map
    ("qwen2", "ia3"): 2 * (16 + 16 + 48),
    ("gpt2", "bitfit"): 2 * (32 + 96 + 32 + 32 + 128 + 32) + 32,  # and the last norm
    ("qwen2", "bitfit"): 2 * (32 + 16 + 16),
    **{(kind, "adapter"): 2 * (32 * 5 + 5 + 5 * 32 + 32) for kind in ("llama", "gpt2")},
    **{(kind, "prompt"): 3 * 32 for kind in ("llama", "gpt2", "opt")},
    **{(kind, "p_tuning"): 3 * 32 + (32 * 7 + 7) + (7 * 7 + 7) + (7 * 32 + 32) for kind in ("llama", "gpt2", "opt")},
    ("llama", "prefix"): 3 * 16 + (16 * 7 + 7) + (7 + 1) * 2 * 2 * 16,
    **{(kind, "prefix"): 3 * 32 + (32 * 7 + 7) + (7 + 1) * 2 * 2 * 32 for kind in ("gpt2", "opt")},
    ("llama", "p_tuning_v2"): 3 * 2 * 2 * 16,
    **{(kind, "p_tuning_v2"): 3 * 2 * 2 * 32 for kind in ("gpt2", "opt")},
}


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_what_is_trained_is_counted_by_formula(kind: str, method: str) -> None:
    model, base = case(kind, method).model, plain(kind)
    trained = trainable(model)
    assert sum(weight.numel() for weight in trained.values()) == COUNTS[kind, method]
    own = {name: p for name, p in base.named_parameters() if not (method == "bitfit" and name.endswith("bias"))}
    frozen = {name.replace(".base_layer", ""): p for name, p in model.named_parameters() if name not in trained}
    assert frozen.keys() == own.keys()
    assert all(torch.equal(frozen[name], own[name]) for name in own), "the base is as it was"
    assert peft_of(model) == METHODS[method] and peft_of(base) is None


@pytest.mark.parametrize(("kind", "method"), [c for c in CASES if c[1] in STARTS_AT_NO_CHANGE])
def test_a_new_method_changes_nothing(kind: str, method: str) -> None:
    base, ids = plain(kind), torch.tensor([ROW])
    with torch.no_grad():
        expected = base(ids).logits
        assert torch.allclose(add_adapter(base, METHODS[method])(ids).logits, expected, atol=1e-5)
        stir(base)
        assert (base(ids).logits - expected).abs().max() > 0.1, "and what is trained has an effect"


@pytest.mark.parametrize("method", METHODS)
def test_new_weights_are_drawn_from_the_global_generator(method: str) -> None:
    weights = []
    for seed in (3, 3, 4):
        model = plain("gpt2")
        torch.manual_seed(seed)
        weights.append({name: w.detach().clone() for name, w in trainable(add_adapter(model, METHODS[method])).items()})
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    drawn = any(not torch.equal(weights[0][name], weights[2][name]) for name in weights[0])
    assert drawn == (method not in ("ia3", "bitfit"))


def test_prompt_tuning_starts_from_words_and_p_tuning_v2_as_low_as_they() -> None:
    model = add_adapter(plain("llama"), METHODS["prompt"])
    words = plain("llama").get_input_embeddings().weight
    (tokens,) = trainable(model).values()
    assert tokens.shape == (VIRTUAL, 32)
    assert all((words == token).all(1).any() for token in tokens)
    many = PeftSection(method="p_tuning_v2", virtual_tokens=500)
    (tokens,) = trainable(add_adapter(plain("llama"), many)).values()
    assert float(tokens.detach().std()) == pytest.approx(0.3, rel=0.02)  # initializer_range; of 32,000 draws


@pytest.mark.parametrize(("kind", "method"), [c for c in CASES if c[1] in STARTS_AT_NO_CHANGE])
def test_the_last_layers_alone(kind: str, method: str) -> None:
    model = adapted(kind, method, last_layers=1)
    names = trainable(model)
    assert names and all(".1." in name and ".0." not in name for name in names)
    last_norm = 32 if (kind, method) == ("gpt2", "bitfit") else 0  # which belongs to no layer
    assert sum(w.numel() for w in names.values()) == (COUNTS[kind, method] - last_norm) // 2
    with torch.no_grad():
        ours = getattr(model, model.base_model_prefix)(torch.tensor([ROW])).last_hidden_state[0]
    assert torch.allclose(ours.double(), peft_references.hidden_by_hand(kind, model)(ROW), atol=1e-5)


def test_a_reward_models_head_is_trained_too() -> None:
    for method in METHODS:
        model = add_adapter(plain("gpt2", scalar=True), METHODS[method])
        assert sum(w.numel() for w in trainable(model).values()) == COUNTS["gpt2", method] + 32
        assert trainable(model)["score.weight"] is model.score.weight


def test_a_second_method_is_refused() -> None:
    with pytest.raises(ValueError, match="method already"):
        add_adapter(adapted("gpt2", "ia3"), METHODS["lora"])


# --- what is computed -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_logits_and_padded_logprobs_are_those_worked_out_apart(kind: str, method: str) -> None:
    """One row without a mask; padded rows; with gradients and without."""
    given = case(kind, method)
    with torch.no_grad():
        assert torch.allclose(given.model(torch.tensor([ROW])).logits[0].double(), given.logits(ROW), atol=1e-5)
    expected = torch.tensor([x for prompt, response in PAIRS for x in given.logprobs(prompt, response)])
    batch = build_batch(PAIRS, EOS)
    for gradients in (False, True):
        with torch.set_grad_enabled(gradients):
            found, _ = response_logprobs(given.model, batch, 1.0)
        assert torch.allclose(found, expected, atol=1e-5), gradients
    assert verified_map(given.model).plain  # the head of virtual tokens' hidden states is nobody's logit


WAYS = [(kind, method, "sdpa") for kind, method in CASES]
WAYS += [(kind, method, "eager") for kind, method in CASES if method in (*EMBEDDED, *CACHED)]


@pytest.mark.parametrize(("kind", "method", "attention"), WAYS)
def test_decoded_logprobs_are_those_worked_out_apart(kind: str, method: str, attention: str) -> None:
    """Prompts of different lengths, two of them twice, rows that leave; eager attention takes masks [B, tokens]."""
    prompts, copies = PROMPTS[:3], [2, 0, 1, 2, 0]
    rows = [list(prompts[i]) for i in copies]
    found: list[list[Tensor]] = [[] for _ in rows]
    decoding = sampling.decoding_for(case(kind, method, attention).model, 8)
    places = list(range(5))
    with torch.no_grad():
        logits = decoding.prefill([list(p) for p in prompts], torch.tensor(copies), EOS)
        for step, leaving in enumerate([None, 1, None, 0, 2, None]):
            tokens = torch.tensor([10 + 3 * step + place for place in places])
            for place, token, each in zip(places, tokens.tolist(), logits, strict=True):
                found[place].append(each.double().log_softmax(-1))
                rows[place].append(token)
            if leaving is not None:
                order = decoding.drop_finished([i != leaving for i in range(len(places))])
                places, tokens = [places[i] for i in order], tokens[order]
            logits = decoding.step(tokens)
    assert sorted(map(len, found)) == [2, 4, 5, 6, 6]
    for row, each in zip(rows, found, strict=True):
        expected = case(kind, method).logits(row)[-1 - len(each) : -1].log_softmax(-1)
        assert torch.allclose(torch.stack(each), expected, atol=1e-5)
    covered = kind in ("llama", "qwen2") and method in ("lora", "bitfit") and attention == "sdpa"
    assert isinstance(decoding, ModelDecoding) != covered


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_greedy_sampling_is_the_same_with_every_engine(kind: str, method: str) -> None:
    model = case(kind, method).model
    ours, theirs = (run(model, temperature=0.0, engine=engine) for engine in ("native", "generate"))
    assert [ours.response(i) for i in range(5)] == [theirs.response(i) for i in range(5)]
    assert torch.allclose(ours.logprobs, theirs.logprobs, atol=1e-5)
    for i, prompt in enumerate(PROMPTS):
        expected = case(kind, method).logprobs(prompt, ours.response(i))
        assert ours.logprobs[i, : len(expected)].tolist() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("method", [*EMBEDDED, *CACHED])
def test_masks_of_every_kind_mean_the_same(kind: str, method: str) -> None:
    """Of real tokens alone: [B, tokens] of ones, [B, 1, queries, tokens] of booleans, or added to scores."""
    given = case(kind, method)
    body = getattr(given.model, given.model.base_model_prefix)
    ids, length, first = torch.tensor([ROW]), len(ROW), 4
    open_ = torch.ones(length, length, dtype=torch.bool).tril()[None, None]
    added = torch.zeros(open_.shape).masked_fill(~open_, -torch.inf)
    expected = given.hidden(ROW)

    def check(hidden: Tensor, start: int = 0) -> None:
        assert hidden.shape == (1, length - start, 32)
        assert torch.allclose(hidden[0].double(), expected[start:], atol=1e-5)

    with torch.no_grad():
        for mask in (None, torch.ones_like(ids), torch.ones_like(ids).bool()):
            check(body(ids, attention_mask=mask).last_hidden_state)
        check(body(inputs_embeds=body.get_input_embeddings()(ids)).last_hidden_state)
        for mask in (open_, added):
            if method in CACHED:
                check(body(ids, attention_mask=mask).last_hidden_state)
            else:  # what would the virtual tokens attend to?
                with pytest.raises(ValueError, match=r"a mask \[B, tokens\] alone"):
                    body(ids, attention_mask=mask)
        # The second of two passes, whose mask is of all tokens so far.
        for mask in (None, torch.ones_like(ids), open_[:, :, first:], added[:, :, first:]):
            held = transformers.DynamicCache(config=body.config)
            check_first = body(ids[:, :first], past_key_values=held, use_cache=True).last_hidden_state
            assert torch.allclose(check_first[0].double(), expected[:first], atol=1e-5)
            assert held.get_seq_length() == VIRTUAL + first
            check(body(ids[:, first:], attention_mask=mask, past_key_values=held).last_hidden_state, first)


@pytest.mark.parametrize("method", METHODS)
def test_scores_and_values_of_reward_models(method: str) -> None:
    kind = "gpt2" if method == "bitfit" else "llama"
    model = adapted(kind, method, scalar=True)
    model.config.reward_mean, model.config.reward_std = 0.5, 2.0
    by_hand, head = peft_references.hidden_by_hand(kind, model), model.score.weight[0].detach().double()
    batch = build_batch(PAIRS, 0)
    with torch.no_grad():
        scores, values = raw_scores(model, batch), batch.unflatten(response_values(model, batch), 5)
    for row, (prompt, response) in enumerate(PAIRS):
        along = by_hand(prompt + response) @ head
        assert scores[row].item() == pytest.approx(float(along[-1]), abs=1e-4)
        before = (along[len(prompt) - 1 : -1] - 0.5) / 2.0
        assert values[row, : len(response)].tolist() == pytest.approx(before.tolist(), abs=1e-4)


# --- gradients --------------------------------------------------------------------------------------------------------


def loss(model: torch.nn.Module) -> Tensor:
    return response_logprobs(model, build_batch(PAIRS, 0), 1.0)[0].sum()


def exact_loss(model: torch.nn.Module) -> Tensor:
    """A number that follows from the logits of the responses in left-padded rows, in the type of the model."""
    ids, mask = pad([prompt + response for prompt, response in PAIRS], 0, left=True)
    positions = (mask.long().cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=mask.long(), position_ids=positions).logits
    ends = [row[-len(response) - 1 : -1] for row, (_, response) in zip(logits, PAIRS, strict=True)]
    return torch.cat(ends).square().sum().log()


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_gradients_are_those_of_small_steps_and_reach_nothing_else(kind: str, method: str) -> None:
    """In float64, along one direction that moves every trained tensor."""
    model = peft_references.in_double(copy.deepcopy(case(kind, method).model))
    exact_loss(model).backward()
    trained = trainable(model)
    assert all(p.grad is None for name, p in model.named_parameters() if name not in trained)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in trained.values())
    generator = torch.Generator().manual_seed(1)
    # DoRA takes the norm that it divides by for a constant (section 4.3), so only its magnitudes' gradient is exact.
    moved = {name: p for name, p in trained.items() if method != "dora" or "magnitude" in name}
    along = {name: torch.randn(p.shape, generator=generator).double() for name, p in moved.items()}
    slope = sum(float((along[name] * p.grad).sum()) for name, p in moved.items())
    values, step = [], 1e-5
    with torch.no_grad():
        for size in (step, -2 * step):
            for name, p in moved.items():
                p += size * along[name]
            values.append(float(exact_loss(model)))
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


@pytest.mark.parametrize(("kind", "method"), [c for c in CASES if c[1] not in CACHED])
def test_recomputed_activations_give_the_same_gradients(kind: str, method: str) -> None:
    gradients = []
    for recompute in (False, True):
        model = copy.deepcopy(case(kind, method).model)
        if recompute:
            recompute_activations(model)
        loss(model).backward()
        gradients.append({name: p.grad for name, p in trainable(model).items()})
    torch.testing.assert_close(gradients[0], gradients[1])


# --- types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "method"), CASES)
def test_new_weights_are_float32_on_a_bfloat16_base(kind: str, method: str) -> None:
    exact = case(kind, method)
    for round_to_model_dtype in (False, True):
        model = add_adapter(plain(kind).to(torch.bfloat16), METHODS[method], round_to_model_dtype)
        expected = torch.bfloat16 if round_to_model_dtype or method == "bitfit" else torch.float32
        assert {p.dtype for p in trainable(model).values()} == {expected}
        assert {p.dtype for name, p in model.named_parameters() if name not in trainable(model)} == {torch.bfloat16}
        with torch.no_grad():
            for name, p in trainable(model).items():
                p.copy_(trainable(exact.model)[name])
            logits = model.eval()(torch.tensor([ROW])).logits
        assert logits.dtype == torch.bfloat16
        # Eight bits of mantissa through two layers, against what the method does.
        expected_logits, without = exact.logits(ROW), plain(kind)(torch.tensor([ROW])).logits[0].detach()
        error, effect = ((each - expected_logits).abs().mean() for each in (logits[0], without))
        assert error < effect / 5
        batch = build_batch(PAIRS, 0)
        response_logprobs(model, batch, 1.0)[0].sum().backward()
        assert all(p.grad.dtype == p.dtype for p in trainable(model).values())


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_bitfit_is_refused_without_biases() -> None:
    with pytest.raises(UserError) as error:
        add_adapter(plain("llama"), METHODS["bitfit"])
    what, where, fix = parts(error.value)
    assert "LlamaForCausalLM has none" in what and where == "model.peft.method=bitfit" and "GPT-2" in fix


def test_more_last_layers_than_there_are_are_refused() -> None:
    for method in STARTS_AT_NO_CHANGE:
        with pytest.raises(UserError) as error:
            adapted("gpt2", method, last_layers=3)
        what, where, _ = parts(error.value)
        assert what == "the last 3 layers are to be trained, and the model has 2" and where == "model.peft.last_layers"


def test_an_adapter_is_refused_behind_a_layer_without_a_module_for_it() -> None:
    with pytest.raises(UserError) as error:
        add_adapter(plain("opt"), METHODS["adapter"])
    what, where, fix = parts(error.value)
    assert "OPTDecoderLayer has no feed-forward layer" in what and where == "model.peft.method=adapter"
    assert fix.startswith("take lora")


SMALL = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
IA3_MAPS = [  # keys, values, the last of the MLP; with queries where they are one map
    (transformers.OPTConfig(word_embed_proj_dim=32, ffn_dim=48, **SMALL), {"k_proj": 32, "v_proj": 32, "fc2": 48}),
    (transformers.PhiConfig(intermediate_size=48, **SMALL), {"k_proj": 32, "v_proj": 32, "fc2": 48}),
    (transformers.Gemma2Config(intermediate_size=48, num_key_value_heads=2, head_dim=8, **SMALL),
     {"k_proj": 16, "v_proj": 16, "down_proj": 48}),
    (GPTNeoConfig(vocab_size=50, hidden_size=32, num_layers=1, num_heads=4, attention_types=[[["global"], 1]]),
     {"k_proj": 32, "v_proj": 32, "c_proj": 128}),
    (transformers.GPTNeoXConfig(intermediate_size=48, **SMALL), {"query_key_value": 96, "dense_4h_to_h": 48}),
    (BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4), {"query_key_value": 96, "dense_4h_to_h": 128}),
]  # fmt: skip


@pytest.mark.parametrize(("config", "maps"), IA3_MAPS, ids=lambda each: getattr(each, "model_type", ""))
def test_ia3_scales_keys_values_and_inner_activations_by_any_name(config, maps) -> None:
    model = add_adapter(AutoModelForCausalLM.from_config(config), METHODS["ia3"])
    assert {name.split(".")[-3]: weight.numel() for name, weight in trainable(model).items()} == maps


def test_a_bottleneck_is_refused_behind_an_mlp_that_adds_the_residual() -> None:
    model = AutoModelForCausalLM.from_config(BloomConfig(vocab_size=50, hidden_size=32, n_layer=1, n_head=4))
    with pytest.raises(UserError) as error:
        add_adapter(model, METHODS["adapter"])
    what, where, _ = parts(error.value)
    assert what.startswith("BloomMLP adds the residual itself") and where == "model.peft.method=adapter"


def test_a_bottleneck_goes_behind_experts_and_leaves_router_scores() -> None:
    """GPT-OSS's feed-forward layer gives (hidden states, scores)."""
    torch.manual_seed(0)
    sizes = {"intermediate_size": 32, "num_key_value_heads": 2, "head_dim": 8, "num_local_experts": 2}
    config = transformers.GptOssConfig(num_experts_per_tok=1, layer_types=["full_attention"], **sizes, **SMALL)
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor([ROW])
    with torch.no_grad():
        before = model(ids).logits
        add_adapter(model, METHODS["adapter"])
        assert torch.equal(model(ids).logits, before)
        stir(model)
        assert not torch.allclose(model(ids).logits, before, atol=1e-3)


@pytest.mark.parametrize("method", VIRTUAL_TOKEN_METHODS)
def test_virtual_tokens_are_refused_where_padding_counts_as_distance(method: str) -> None:
    model = AutoModelForCausalLM.from_config(transformers.MptConfig(vocab_size=50, d_model=32, n_heads=4, n_layers=1))
    with pytest.raises(UserError) as error:
        add_adapter(model, METHODS[method])
    what, where, _ = parts(error.value)
    assert what.startswith("MPT's attention counts padding") and where == f"model.peft.method={method}"


def test_ia3_is_refused_where_there_is_no_map_for_it() -> None:
    config = transformers.PhimoeConfig(intermediate_size=48, num_key_value_heads=2, num_local_experts=2, **SMALL)
    with pytest.raises(UserError) as error:
        add_adapter(AutoModelForCausalLM.from_config(config), METHODS["ia3"])
    what, where, fix = parts(error.value)
    assert "phimoe is known to make the feed-forward layer's output" in what
    assert where == "model.peft.method=ia3" and "Llama" in fix


def test_the_context_must_hold_virtual_tokens_too() -> None:
    for method in (*EMBEDDED, *CACHED):
        model = case("gpt2", method).model
        check_context(model, 61, "sft.max_tokens")
        with pytest.raises(UserError) as error:
            check_context(model, 62, "sft.max_tokens")
        what, where, _ = parts(error.value)
        assert what == "rows may have 62 tokens and 3 virtual ones, and gpt2 has positions for 64"
        assert where == "sft.max_tokens"
    check_context(case("gpt2", "lora").model, 64, "sft.max_tokens")


SHAPE = {"vocab_size": 50, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}


@pytest.mark.parametrize("method", [*EMBEDDED, *CACHED])
def test_windows_must_hold_virtual_tokens_and_rows(method: str) -> None:
    """Within the window left-padded decoding is a full forward of the row alone; beyond it is refused."""
    torch.manual_seed(0)
    config = MistralConfig(intermediate_size=48, num_key_value_heads=2, sliding_window=16, **SHAPE)
    model = transformers.MistralForCausalLM(config).eval()
    check_context(model, 100, "reward.max_tokens")
    stir(add_adapter(model, METHODS[method]))
    check_context(model, 13, "reward.max_tokens")
    with pytest.raises(UserError) as error:
        check_context(model, 14, "reward.max_tokens")
    what, where, _ = parts(error.value)
    assert what == "rows may have 14 tokens and 3 virtual ones, and layers of mistral see 16 alone"
    assert where == "reward.max_tokens"
    rolled = run(model, max_new_tokens=8, stop_ids=[])  # after a longest prompt of 5
    for i, prompt in enumerate(PROMPTS):
        assert rolled.logprobs[i].tolist() == pytest.approx(by_hand(model, prompt, rolled.response(i), 1.0), abs=1e-5)


MIXED = ["full_attention", "sliding_attention", "chunked_attention"]


@pytest.mark.parametrize(
    ("config", "window"),
    [
        (MistralConfig(), 4096),
        (MistralConfig(sliding_window=None), 0),
        (Qwen2Config(sliding_window=100), 0),  # use_sliding_window is false
        (Qwen2Config(sliding_window=100, use_sliding_window=True, max_window_layers=2), 100),
        (GPTNeoConfig(window_size=100), 100),
        (GPTNeoConfig(window_size=100, attention_types=[[["global"], 24]]), 0),
        (SimpleNamespace(layer_types=MIXED, sliding_window=8, attention_chunk_size=6), 6),
        (SimpleNamespace(layer_types=MIXED, sliding_window=8, attention_chunk_size=None), 8),
        (transformers.LlamaConfig(), 0),
        (transformers.GPT2Config(), 0),
    ],
)
def test_the_narrowest_window_of_an_architecture(config: object, window: int) -> None:
    assert attention_window(config) == window


def test_keys_and_values_are_refused_where_their_heads_are_not_known() -> None:
    for method in CACHED:
        with pytest.raises(UserError) as error:
            add_adapter(FalconForCausalLM(transformers.FalconConfig(**SHAPE)), METHODS[method])
        what, where, fix = parts(error.value)
        assert "falcon" in what and where == "model.peft.method" and "p_tuning" in fix
    for method in EMBEDDED:
        add_adapter(FalconForCausalLM(transformers.FalconConfig(**SHAPE)), METHODS[method])


# --- sampling engines -------------------------------------------------------------------------------------------------


def test_vllm_gives_way_to_the_native_engine_and_says_so_once(capsys, monkeypatch) -> None:
    monkeypatch.setattr(sampling, "_reported", set())
    for method in ("adapter", *EMBEDDED, *CACHED):
        model = case("llama", method).model
        taken = [sampling.engine_for(model, engine) for engine in ("vllm", "vllm", "generate", "native")]
        assert taken == ["native", "native", "generate", "native"]
        said = capsys.readouterr().err
        assert said.count("sampling with the native engine") == 1
        assert method in said
    for method in ("lora", "dora", "ia3"):
        assert sampling.engine_for(case("llama", method).model, "vllm") == "vllm"
    assert sampling.engine_for(plain("llama"), "vllm") == "vllm"
    assert capsys.readouterr().err == ""
