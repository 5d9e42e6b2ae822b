"""Try on a small random copy of an architecture whether it keeps the documents of a packed row apart.

SFT packs several documents into one row with positions that begin anew at each, and without a mask
(rlhf/training/sft_trainer.py). Most architectures of transformers derive from the positions who may attend to whom.
OPT, BLOOM, Falcon and GPT-OSS do not, and train each document with the ones before it in sight.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from rlhf.model_config import ModelSection
from rlhf.models.layers import kv_heads
from rlhf.system.quiet import quiet_transformers

DOCUMENTS = (11, 13)  # tokens
VOCABULARY = 64
HEADS, WIDTH = 4, 128  # of a narrow copy; WIDTH is that of its MLPs
MLP_WIDTHS = (
    *("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner"),
    *("moe_intermediate_size", "shared_expert_intermediate_size"),
)
EXPERTS = 16  # of a narrow copy, at most
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
MOST_PARAMETERS = 300_000_000  # of a copy: 1.2 GB
TOLERANCE = 1e-3  # of the logits' standard deviation; rounding is below 1e-5, a leak above 0.1


def keeps_documents_apart(config: PretrainedConfig, model: ModelSection) -> bool | None:
    """Return whether packed documents get the logits that they get alone; None if no small copy could be made and run.

    Runs on the CPU in float32. FlashAttention has no kernel there, and reads the ends of documents in a way of its own,
    so that nothing is known of it (None). The random stream and the given config are left as they were.
    """
    if model.attention == "flash_attention_2":
        return None
    for copied in small_copies(config, model):
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), quiet_transformers():
                torch.manual_seed(1)
                documents = [torch.randint(4, VOCABULARY, (1, length)) for length in DOCUMENTS]
                alone = torch.cat([copied(input_ids=ids, use_cache=False).logits[0] for ids in documents])
        except Exception:  # an architecture that cannot be cut like this: any part of it may say so
            continue
        try:
            with torch.no_grad():
                packed = copied(**packed_row(documents), use_cache=False).logits[0]
        except (TypeError, ValueError, RuntimeError):  # it takes no packed rows
            return False
        return bool((packed - alone).abs().max() <= TOLERANCE * alone.std())
    return None


def packed_row(documents: list[Tensor]) -> dict[str, Tensor | int]:
    """Return documents [1, L] as one row, with what TRL's collator gives a model for it."""
    lengths = torch.tensor([ids.shape[1] for ids in documents], dtype=torch.int32)
    bounds = torch.cat([lengths.new_zeros(1), lengths.cumsum(0, dtype=torch.int32)])
    longest = int(lengths.max())
    return {
        "input_ids": torch.cat(documents, 1),
        "position_ids": torch.cat([torch.arange(int(length)) for length in lengths])[None],
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": longest,
        "max_length_k": longest,
        "seq_idx": torch.repeat_interleave(torch.arange(len(documents), dtype=torch.int32), lengths)[None],
    }


def small_copies(config: PretrainedConfig, model: ModelSection) -> Iterator[PreTrainedModel]:
    """Yield small random models of an architecture, the smallest first; a forward pass of each may still fail.

    The random stream and the given config are left as they were.
    """
    for small in small_configs(config):
        try:
            with torch.random.fork_rng(devices=[]), torch.no_grad(), quiet_transformers():
                copied = random_copy(small, model)
        except Exception:  # an architecture that cannot be cut like this: any part of it may say so
            continue
        if copied is not None:
            yield copied


def small_configs(config: PretrainedConfig) -> Iterator[PretrainedConfig]:
    """Yield cut copies of a config, the smallest first; not each of them need make a model.

    A layer of every kind is kept, and the width of a head, on which rotary positions depend.
    """
    for narrow in (True, False):
        try:
            small = _few_layers(copy.deepcopy(config.get_text_config()))
            if narrow:
                _narrow(small)
        except Exception:  # configs check themselves, each in its own way
            continue
        small.vocab_size, small.pad_token_id = VOCABULARY, None
        yield small


def random_copy(config: PretrainedConfig, model: ModelSection) -> PreTrainedModel | None:
    """Return a model with loud random weights, which hide no attention; None if it would be large."""
    options = {"dtype": torch.float32, "attn_implementation": model.attention}
    options["trust_remote_code"] = model.trust_remote_code
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config, **options)
    if sum(parameter.numel() for parameter in shapes.parameters()) > MOST_PARAMETERS:
        return None
    made = AutoModelForCausalLM.from_config(config, **options).eval()
    torch.manual_seed(0)
    for parameter in made.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return made


def _few_layers(config: PretrainedConfig) -> PretrainedConfig:
    """Keep the first layer of every kind, at least two layers, and their entries in lists of as many entries."""
    names = ("layer_types", "layers_block_type", "attention_layers")
    kinds = next((kinds for name in names if (kinds := getattr(config, name, None))), None)
    count = config.num_hidden_layers
    if kinds and not any(vars(config).get(name) for name in names):
        return config  # computed from other fields, which say what a layer is by its number
    kept = {kinds.index(kind) for kind in set(kinds)} if kinds else set()
    kept |= set([i for i in range(count) if i not in kept][: max(0, 2 - len(kept))])
    cut = {
        name: [value[i] for i in sorted(kept)]
        for name, value in vars(config).items()
        if isinstance(value, list) and len(value) == count
    }
    config.num_hidden_layers = len(kept)
    for name, value in cut.items():
        setattr(config, name, value)
    return config


def _narrow(config: PretrainedConfig) -> None:
    """Make a config narrow: few heads of the same width, small MLPs and few experts."""
    heads, (kv, width) = config.num_attention_heads, kv_heads(config)
    if heads > HEADS:
        config.num_attention_heads = HEADS
        if getattr(config, "num_key_value_heads", None):
            config.num_key_value_heads = HEADS if kv == heads else 1 if kv == 1 else 2
        config.hidden_size = HEADS * width
        if getattr(config, "word_embed_proj_dim", None):  # OPT's
            config.word_embed_proj_dim = HEADS * width
    most = dict.fromkeys(MLP_WIDTHS, WIDTH) | dict.fromkeys(EXPERT_COUNTS, EXPERTS)
    for name, limit in most.items():
        if isinstance(size := getattr(config, name, None), int):
            setattr(config, name, min(size, limit))
