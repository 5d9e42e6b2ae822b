"""Small random models with the traits of public families: architecture, end of a turn, BOS, padded vocabularies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import trl
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, PretrainedConfig

from rlhf.models import tiny

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
MARKS = {"<|start_header_id|>", "<|end_header_id|>", "<start_of_turn>", "<|user|>", "<|assistant|>"}  # of the templates
MARKS |= {"<|START_OF_TURN_TOKEN|>", "<|USER_TOKEN|>", "<|CHATBOT_TOKEN|>"}
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512}
LLAMA_LIKE = SIZES | {"intermediate_size": 64, "num_key_value_heads": 2}
GEMMA = LLAMA_LIKE | {"head_dim": 8, "query_pre_attn_scalar": 8}
GEMMA_TOKENS = {"end": "<end_of_turn>", "eos": "<eos>", "bos": "<bos>"}


@dataclass(frozen=True)
class Family:
    """How a family's models are made."""

    config: str  # the class of transformers
    sizes: dict[str, Any] = field(default_factory=lambda: LLAMA_LIKE)
    template: str = ""  # a file of TRL's, else the plain format
    end: str = ""  # the token that the template ends a turn with; empty: the EOS
    eos: str = "<|endoftext|>"
    bos: str = ""  # begins every text
    attention: str = "sdpa"
    packing: bool = True  # whether packed documents are kept apart
    padding: int = 0  # rows of the embedding beyond the last token


FAMILIES = {
    "Llama 3": Family(
        "LlamaConfig", template="llama3", end="<|eot_id|>", eos="<|end_of_text|>", bos="<|begin_of_text|>"
    ),
    "Qwen 2.5": Family("Qwen2Config", template="qwen2_5", end="<|im_end|>", padding=64),
    "Qwen 3": Family("Qwen3Config", LLAMA_LIKE | {"head_dim": 8}, template="qwen3", end="<|im_end|>", padding=64),
    "Gemma 2": Family(
        "Gemma2Config",
        GEMMA | {"final_logit_softcapping": 5.0},
        template="gemma",
        **GEMMA_TOKENS,
        attention="eager",
    ),
    "Gemma 3 (text)": Family(
        "Gemma3TextConfig",
        GEMMA | {"sliding_window": 512},
        template="gemma3",
        **GEMMA_TOKENS,
    ),
    "Phi-3": Family("Phi3Config", template="phi3", end="<|end|>"),
    "Mistral": Family("MistralConfig", LLAMA_LIKE | {"sliding_window": None}, eos="</s>", bos="<s>"),
    "OLMo 2": Family("Olmo2Config"),
    "GPT-NeoX": Family("GPTNeoXConfig", SIZES | {"intermediate_size": 64}),
    "GPT-2": Family("GPT2Config", {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 512}),
    "OPT": Family("OPTConfig", SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32}, eos="</s>", packing=False),
    "BLOOM": Family(
        "BloomConfig", {"hidden_size": 32, "n_layer": 2, "n_head": 4}, eos="</s>", attention="eager", packing=False
    ),
    "Falcon": Family("FalconConfig", SIZES | {"num_kv_heads": 4, "new_decoder_architecture": True}, packing=False),
    "Granite": Family("GraniteConfig", LLAMA_LIKE | {"logits_scaling": 4.0}, eos="<|end_of_text|>"),
    "Cohere": Family(
        "CohereConfig",
        LLAMA_LIKE | {"logit_scale": 0.25},
        template="cohere",
        end="<|END_OF_TURN_TOKEN|>",
        eos="<EOS>",
        bos="<BOS_TOKEN>",
    ),
    "Mixtral": Family(
        "MixtralConfig", LLAMA_LIKE | {"num_local_experts": 4, "sliding_window": None}, eos="</s>", bos="<s>"
    ),
    "Qwen 3 MoE": Family(
        "Qwen3MoeConfig",
        LLAMA_LIKE | {"head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
        template="qwen3",
        end="<|im_end|>",
    ),
    "Gemma 3 (with images)": Family(
        "Gemma3Config",
        {"text_config": GEMMA | {"sliding_window": 512}},
        template="gemma3",
        **GEMMA_TOKENS,
    ),
}


# Settings of the recipe `tiny` under which a small model runs through every stage in seconds.
SMALL_RECIPE = [
    "tracking.wandb=disabled",
    "run.device=cpu",
    "run.name=run",
    "run.dir=runs",
    "data.max_prompt_tokens=64",
]
SMALL_RECIPE += ["data.max_response_tokens=24", "sft.max_tokens=128", "sft.batch_size=8", "sft.micro_batch_size=8"]
SMALL_RECIPE += [
    "sft.epochs=0.5",
    "rank.prompts=8",
    "rank.outputs_per_prompt=3",
    "rank.tie_margin=0",
    "reward.batch_size=4",
    "reward.max_tokens=96",
]
SMALL_RECIPE += [
    "ppo.episodes=16",
    "ppo.batch_size=8",
    "ppo.minibatch_size=8",
    "ppo.micro_batch_size=4",
    "ppo.epochs=1",
]
SMALL_RECIPE += ["ppo.ptx_examples_per_episode=1", "ppo.ratio_tolerance=1e-4", "evaluate.prompts=4"]
SMALL_RECIPE += ["evaluate.cloze_questions=2"]


def make_family(name: str, folder: Path) -> Path:
    """Write the model of a family with its tokenizer to a folder, and return it."""
    family, tokenizer = FAMILIES[name], tiny.train_tokenizer()
    names = {family.end, family.eos, family.bos, *MARKS} - {""}
    new = sorted(names - set(tokenizer.get_vocab()))
    tokenizer.add_special_tokens({"additional_special_tokens": new})
    tokenizer.eos_token, tokenizer.bos_token = family.eos, family.bos or None
    tokenizer.chat_template = (TEMPLATES / f"{family.template}.jinja").read_text() if family.template else None
    if family.bos:
        bos = (family.bos, tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            single=f"{family.bos} $A", pair=f"{family.bos} $A $B", special_tokens=[bos]
        )
    torch.manual_seed(7)
    make: Callable[..., PretrainedConfig] = getattr(transformers, family.config)
    ids = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": tokenizer.bos_token_id}
    ids |= {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer) + family.padding}
    sizes = dict(family.sizes)
    if "text_config" in sizes:
        sizes["text_config"] = sizes["text_config"] | ids
        ids.pop("vocab_size")
    config = make(**sizes, **ids)
    text = config.get_text_config()
    if hasattr(text, "initializer_range"):
        text.initializer_range = 0.2  # distributions far from uniform, in which a mistake shows
    model = AutoModelForCausalLM.from_config(config)
    if model.generation_config is not None and family.end:
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(family.end)]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
