"""Run the stages on a base model with a parameter-efficient method, for tests/stages/test_peft_stages.py."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.functional import linear, relu
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, PreTrainedModel

from rlhf.functional.seeding import shuffled_indices
from rlhf.model_config import KV_PREFIX_METHODS
from rlhf.models import tiny
from rlhf.models.peft.methods import trainable
from rlhf.recipe import load_recipe
from rlhf.rollout.batches import Pair, build_batch
from rlhf.rollout.experience import Experience
from rlhf.rollout.scoring import response_logprobs
from rlhf.training.ppo_state import Ppo
from stages import ppo, reward, sft
from support.adapter_files import stored_weights
from support.stage_runs import rows

SETTINGS = {  # of each method: the learning rate of SFT, of which the other stages take a part, and its sizes
    "lora": (1e-2, {"rank": 4, "alpha": 8}),
    "dora": (1e-2, {"rank": 4, "alpha": 8}),
    "prefix": (1e-2, {"virtual_tokens": 5, "hidden": 32}),
    "p_tuning": (1e-2, {"virtual_tokens": 5, "hidden": 32}),
    "p_tuning_v2": (0.2, {"virtual_tokens": 5}),
    "prompt": (0.2, {"virtual_tokens": 5}),
    "adapter": (1e-2, {"bottleneck": 8}),
    "ia3": (0.1, {}),
    "bitfit": (2e-2, {}),
}
LLAMA, GPT2 = "llama", "gpt2"
CELLS = [(base, method) for base in (LLAMA, GPT2) for method in SETTINGS if (base, method) != (LLAMA, "bitfit")]
STAGES = ("sft", "reward", "ppo", "ppo-ptx")
VARIANTS = ("ppo", "ppo-ptx")
TOKENS = 5  # virtual tokens

SMALL = ["tiny", "tracking.wandb=disabled", "run.device=cpu", "run.name=run", "data.validation_fraction=0.25"]
SMALL += ["data.max_prompt_tokens=48", "data.max_response_tokens=16", "sft.packing=false", "reward.max_tokens=96"]
# The checkpoint in the middle and the one at the end are the two that are kept.
SMALL += ["sft.epochs=3", "sft.batch_size=3", "sft.micro_batch_size=3", "sft.save_every=5"]
SMALL += ["reward.epochs=3", "reward.batch_size=6", "reward.save_every=3"]
SMALL += ["ppo.episodes=32", "ppo.batch_size=8", "ppo.minibatch_size=4", "ppo.micro_batch_size=4", "ppo.save_every=2"]
SMALL += ["ppo.ptx_examples_per_episode=1", "ppo.ratio_tolerance=1e-4"]

QUESTIONS = ["Why?", "Go on.", "Name a town.", "Is it cold?", "What is a river?", "Count to three, please."]
QUESTIONS += ["What is a bridge for?", "Who wrote this?", "How do I boil an egg?", "Say yes.", "What do they think?"]
QUESTIONS += ["Write a short story about a lighthouse keeper who finds a letter.", "What would you like to know?"]
QUESTIONS += ["Give me five ideas for a birthday present for my sister, who likes gardening."]
ANSWERS = ["Thank you, that was helpful!", "You are welcome. I think it is the old town."]
RANKED = ["Thank you, that was helpful!", "Thank you. The wind carries sand.", "The wind carries sand to the sea."]


@dataclass
class Stage:
    """What one stage of a cell began with, and its results; `models` are those that it trained."""

    folder: Path
    models: dict[str, PreTrainedModel] = field(default_factory=dict)
    start: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # trained weights by model, before training
    ppo: Ppo | None = None
    first: Experience | None = None  # before any step of PPO

    @property
    def weights(self) -> dict[str, Tensor]:
        model = self.models.get("reward") or self.models["policy"]
        return stored_weights(self.folder / "model", dict(model.named_parameters()))

    def column(self, name: str) -> list[float]:
        """Return a metric over the steps of the stage."""
        return [row[name] for row in rows(self.folder / "metrics.jsonl") if name in row]

    def headline(self, name: str) -> float:
        return json.loads((self.folder / "stage.json").read_text())["metrics"][name]


class Cell:
    """A base and a method, with its stages; each stage runs when a test first asks for it."""

    def __init__(self, kind: str, method: str, base: Path, data: list[str], runs: Path) -> None:
        lr, settings = SETTINGS[method]
        self.kind, self.method, self.base, self.runs = kind, method, base, runs
        self.arguments = [*SMALL, *data, f"model.name={base}", f"model.peft.method={method}", f"sft.lr={lr}"]
        self.arguments += [f"model.peft.{name}={value}" for name, value in settings.items()]
        self.arguments += [f"reward.lr={lr / 2}", f"ppo.lr={lr / 8}", f"ppo.value_lr={lr / 8}"]
        if kind == LLAMA:
            self.arguments.append("reward.keep_layers=2")
        self.section = load_recipe(self.arguments[0], self.arguments[1:]).model
        self.plain = load_file(base / "model.safetensors")
        self._done: dict[str, Stage] = {}

    def stage(self, name: str) -> Stage:
        """Run a stage, after those that it needs."""
        if name not in self._done:
            for needed in STAGES[: min(STAGES.index(name), 2)]:
                self.stage(needed)
            self._done[name] = stage = Stage(self.runs / "run" / name)
            with pytest.MonkeyPatch.context() as patch:
                watch(patch, stage, program_of(name))
                assert self.main(name, self.runs) == 0
        return self._done[name]

    def main(self, name: str, runs: Path) -> int:
        """The stage's program on the run in a folder of runs."""
        variant = ["--variant", name] if name in VARIANTS else []
        return program_of(name).main([*self.arguments, f"run.dir={runs}", *variant])

    def is_own(self, name: str) -> bool:
        """Return whether a weight belongs to the method: the base lacks it, or bitfit trains it."""
        return plain(name) not in self.plain or (self.method == "bitfit" and name.endswith(".bias"))


def program_of(stage: str) -> ModuleType:
    return {"sft": sft, "reward": reward}.get(stage, ppo)


def watch(patch: pytest.MonkeyPatch, stage: Stage, program: ModuleType) -> None:
    """Note what the program is about to train, and PPO's first experience, without changing what it does."""
    loop = "train_sft" if program is sft else "train"
    train, advantages = getattr(program, loop), getattr(program, "advantages", None)

    def noted(what: Any, *rest: Any) -> Any:
        if program is sft:
            stage.models = {"policy": what}
        elif program is reward:
            stage.models = {"reward": what.module.model}
        else:
            stage.ppo = what
            stage.models = {"policy": what.networks.policy, "value": what.networks.value}
        for name, model in stage.models.items():
            stage.start[name] = {key: weight.detach().clone() for key, weight in trainable(model).items()}
        return train(what, *rest)

    def scored(*given: Any) -> Experience:
        experience = advantages(*given)
        stage.first = stage.first or experience
        return experience

    patch.setattr(program, loop, noted)
    if program is ppo:
        patch.setattr(program, "advantages", scored)


def plain(name: str) -> str:
    """Return the name of a weight in the base; both peft and the bottleneck wrap modules of the base."""
    return name.replace("base_layer.", "")


def write_data(folder: Path) -> list[str]:
    """Write data files of a few lines with prompts of all lengths, and return them as arguments."""

    def write(name: str, lines: list[dict[str, Any]]) -> str:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return f"data.{name}=[{folder / name}.jsonl]"

    turned = [(q, 1 if i % 2 else -1) for i, q in enumerate(QUESTIONS)]
    return [
        write("demonstrations", [{"prompt": q, "response": ANSWERS[i % 2]} for i, q in enumerate(QUESTIONS)]),
        write("rankings", [{"prompt": q, "responses": RANKED[::way], "ranks": [1, 2, 3][::way]} for q, way in turned]),
        write("prompts", [{"prompt": q} for q in QUESTIONS]),
        write("pretraining", [{"text": text} for text in documents()]),
    ]


def documents() -> list[str]:
    return [" ".join(text.split()) for text in tiny.TEXT.split("\n\n")]


def make_bases(folder: Path) -> dict[str, Path]:
    """Return the folders of two base models: grouped queries and rotary positions; biases and learned positions."""
    tokenizer = tiny.train_tokenizer()
    ids = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    size = {"vocab_size": tiny.VOCABULARY, "initializer_range": 0.08, **ids}
    llama = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 6}
    llama |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "tie_word_embeddings": True}
    gpt2 = {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128}
    gpt2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    folders = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        models = {LLAMA: LlamaForCausalLM(LlamaConfig(**size, **llama))}
        models[GPT2] = GPT2LMHeadModel(GPT2Config(**size, **gpt2))
        for kind, model in models.items():
            pretrain(model, tokenizer)
            folders[kind] = folder / kind
            model.save_pretrained(folders[kind])
            tokenizer.save_pretrained(folders[kind])
    return folders


def pretrain(model: PreTrainedModel, tokenizer: Any) -> None:
    """Train a little on the tokenizer's own text: attention then matters, and some rows end before others."""
    sentences = [f"{part.strip()}." for text in documents() for part in text.split(".") if part.strip()]
    pairs = [([tokenizer.eos_token_id], [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]) for text in sentences]
    optimizer = torch.optim.Adam(model.parameters(), lr=5e-3)
    for step in range(80):
        some = [pairs[i] for i in shuffled_indices(len(pairs), 1, "sentences", 12 * step, 12)]
        batch = build_batch(some, tokenizer.pad_token_id)
        optimizer.zero_grad()
        (-response_logprobs(model, batch, 1.0)[0].mean()).backward()
        optimizer.step()


def tokens_by_hand(cell: Cell, weights: dict[str, Tensor]) -> Tensor:
    """Return what the stored weights make: embeddings [V, H], or keys and values layer after layer [V, 2 layers, C]."""
    w = {key.partition("encoder.")[2]: weight for key, weight in weights.items()}
    made = w["embedding.weight"]
    if cell.method == "prefix":
        hidden = torch.tanh(linear(made, w["transform.0.weight"], w["transform.0.bias"]))
        made = linear(hidden, w["transform.2.weight"], w["transform.2.bias"])
    if cell.method == "p_tuning":
        for i in (0, 2, 4):
            made = linear(relu(made) if i else made, w[f"mlp_head.{i}.weight"], w[f"mlp_head.{i}.bias"])
    channels = 16 if cell.kind == LLAMA else 48  # heads that hold keys, times their size of 8 or 12
    return made.view(TOKENS, -1, channels) if cell.method in KV_PREFIX_METHODS else made


def logprobs_by_hand(cell: Cell, base: PreTrainedModel, made: Tensor, pair: Pair) -> Tensor:
    """Return the log-probabilities of one row without padding by the plain model; its words begin at position V."""
    ids = torch.tensor([[*pair[0], *pair[1]]])
    if cell.method in KV_PREFIX_METHODS:
        cache, heads = DynamicCache(config=base.config), 2 if cell.kind == LLAMA else 4
        parts = made.unflatten(-1, (heads, -1)).transpose(0, 2)[None]  # [1, heads, 2 layers, V, D]
        for layer in range(base.config.num_hidden_layers):
            cache.update(parts[:, :, 2 * layer], parts[:, :, 2 * layer + 1], layer)
        positions = torch.arange(TOKENS, TOKENS + ids.shape[1])[None]
        logits = base(ids, position_ids=positions, past_key_values=cache).logits
    else:
        words = base.get_input_embeddings()(ids)
        logits = base(inputs_embeds=torch.cat([made[None], words], 1)).logits[:, TOKENS:]
    logp = logits[0].log_softmax(-1)
    return torch.stack([logp[len(pair[0]) - 1 + t, token] for t, token in enumerate(pair[1])])
