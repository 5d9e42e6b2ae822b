"""Build the model `tiny`: 250 thousand random weights and a real BPE tokenizer, for tests and dry runs.

Nothing is downloaded and nothing depends on the data set, so every machine builds the same model.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from rlhf.models.plain_folder import write_model
from rlhf.models.smollm2 import CHATML
from rlhf.system.build_cache import build_once
from rlhf.system.quiet import quiet_transformers

NAME = "tiny"
BUILD = 1  # raise it when the saved folder changes
SEED = 20220304
VOCABULARY = 1024
EOS, PAD = "<|im_end|>", "<|pad|>"
SPECIAL = ["<|endoftext|>", "<|im_start|>", EOS, PAD]

TEXT = """\
A river starts as water that nobody notices. Rain falls on a hill, soaks into the ground, and comes out again lower
down as a spring. Several springs make a stream, several streams make a river, and the river carries sand and stones
to the sea. Where it is fast it cuts into its bed; where it is slow it lays down what it carried.

Write a short story about a lighthouse keeper who finds a letter. The keeper had lived on the rock for eleven years
when the letter came. It was not addressed to him, but it was not addressed to anyone else either, so he opened it.
"Please leave the light on tonight," it said. He always left the light on, and still he went up the stairs to check.

What is the difference between weather and climate? Weather is what happens outside today: the rain, the wind, the
heat of the afternoon. Climate is the pattern of the weather over many years. One cold week says little about the
climate of a country, in the same way that one slow day says little about how a person usually works.

How do I boil an egg? Bring a small pot of water to the boil, lower the egg into it with a spoon, and wait. Six
minutes give a soft yolk, eight minutes a firm one, ten minutes a hard one. Cool the egg in cold water before you peel
it.

Give me five ideas for a birthday present for my sister, who likes gardening. 1. A pair of good gloves. 2. Seeds of
old kinds of beans. 3. A book about bees. 4. A small watering can for the window. 5. An afternoon of your help with
the digging.

Rewrite this sentence so that it is easier to read. The committee will make a decision about the proposal at the
meeting on Tuesday. On Tuesday the committee will decide.

Summarize the following text in one sentence. The library will be closed in August because the roof is being repaired.
Books can be returned at the town hall, and loans that end in August are extended to the end of September without a
fee. Summary: The library is closed in August for repairs, books go back to the town hall, and loans are extended.

Classify the mood of the review as positive, negative or mixed. The room was clean and the people were kind, but the
music from the street kept us awake until three. Mixed.

Extract all the names of places from the text. Anna took the train from Vienna to Prague and then a bus to Dresden.
Vienna, Prague, Dresden.

The old town has three bridges. The oldest of them was built of wood, burned twice, and was then built again of stone.
In the evening people stand on it and watch the boats. The youngest bridge is for trains only, and nobody has ever
crossed it on foot, except for the workers who paint it every ten years and the cats that live under the station.

Numbers help when they are compared with something. A tower of ninety metres means little until you hear that a house
of three floors would fit into it nine times. 0 1 2 3 4 5 6 7 8 9 10 20 50 100 1000 and so on. (This is an aside; it
ends here.)

I think, you think, he thinks, she thinks, we think, they think. What would you like to know? Which of these is the
best answer? That depends on what you want to do with it. If you want to learn, take the long one. If you want to be
done, take the short one. Thank you, that was helpful! You are welcome. I'm sorry, but I don't know that. Here is what
I can tell you.

User: Who wrote this? Assistant: A person who wanted a small tokenizer to see common English words at least once or
twice, because words that were seen become single tokens, while words that were never seen are spelled in pieces.
"""


def tiny_dir() -> Path:
    """Return the folder of the tiny model: a Llama of 4 layers, hidden size 64, 4 heads and 2 key-value heads."""
    return build_once(f"{NAME}-{BUILD}", _build_llama)


def tiny_gpt2_dir(folder: Path) -> Path:
    """Write a tiny GPT-2 (absolute positions, biases, dropout in its config) to `folder`, and return the folder."""
    shape = {"vocab_size": VOCABULARY, "n_positions": 512, "n_embd": 64, "n_layer": 2, "n_head": 4}
    _save(folder, lambda ids: GPT2LMHeadModel(GPT2Config(**shape, **ids)))
    return folder


def train_tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE tokenizer of 1024 tokens, trained on TEXT, with ChatML and a pad token of its own."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token=PAD)
    fast.chat_template = CHATML
    return fast


def config(**ids: int | None) -> LlamaConfig:
    """Return the config of the model `tiny`, with the special ids of a tokenizer if they are given."""
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=176,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        **ids,
    )


def _build_llama(folder: Path) -> None:
    _save(folder, lambda ids: LlamaForCausalLM(config(**ids)))


def _save(folder: Path, make: Callable[[dict[str, int | None]], PreTrainedModel]) -> None:
    tokenizer = train_tokenizer()
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    # The caller's random stream is left as it was.
    with torch.random.fork_rng(devices=[]), quiet_transformers():
        torch.manual_seed(SEED)
        write_model(make(ids), tokenizer, folder)
