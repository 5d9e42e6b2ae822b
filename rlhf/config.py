"""The typed recipe: every option of every stage with its default, its range and its meaning.

A recipe is YAML with these sections; `rlhf/recipe.py` loads it. No value is read from the environment. Figures called
"paper" are from Ouyang et al. 2022 (arXiv 2203.02155), Appendix C.
"""

from __future__ import annotations

import re
from typing import Literal

from pydantic import Field, model_validator

from rlhf.model_config import KV_PREFIX_METHODS, UNMERGEABLE, VIRTUAL_TOKEN_METHODS, ModelSection, PeftSection, Section

Schedule = Literal["cosine", "linear", "constant"]
RolloutEngine = Literal["native", "generate", "vllm"]
LABELER_PATTERN = r"[\w.-]{1,40}"  # letters of any script


class RunSection(Section):
    """The run folder and the stages that run."""

    name: str = Field("demo", min_length=1, pattern=r"^[A-Za-z0-9._-]+$", description="name of the run folder")
    dir: str = Field("runs", min_length=1, description="folder that holds the run folders")
    seed: int = Field(1, ge=0, lt=2**31, description="seed of every random draw of the run")
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: a GPU if there is one")
    stages: list[Literal["sft", "rank", "reward", "ppo-ptx", "ppo", "evaluate"]] = Field(
        ["sft", "rank", "reward", "ppo-ptx", "evaluate"], min_length=1, description="stages of `rlhf run`, in order"
    )


class DataSection(Section):
    """Files (JSONL, parquet, .txt), Hub names, or `embedded:NAME` for the data shipped here."""

    demonstrations: list[str] = Field(["embedded:demonstrations"], min_length=1)
    prompts: list[str] = Field(["embedded:prompts"], description="prompts for rank and PPO")
    prompts_heldout: list[str] = Field(["embedded:prompts_heldout"], description="evaluate's prompts; never trained on")
    rankings: list[str] = Field([], description="ranking files for rank.labeler=file, or extra rankings for reward")
    pretraining: list[str] = Field(["embedded:corpus"], description="text for the ptx loss and the SFT mix")
    pretraining_heldout: list[str] = Field(["embedded:corpus_heldout"], description="text for the alignment tax")
    cloze: list[str] = Field(["embedded:cloze"], description="multiple-choice questions for the alignment tax")
    max_prompt_tokens: int = Field(64, ge=4, description="longer prompts are dropped and counted, never truncated")
    max_response_tokens: int = Field(40, ge=1, description="rollout length; longer demonstrations are dropped, counted")
    validation_fraction: float = Field(0.15, ge=0, lt=1, description="share of prompts held out by hash")


class SftSection(Section):
    """Supervised fine-tuning on demonstrations (paper section 3.5 and C.1)."""

    epochs: float = Field(2, gt=0)
    batch_size: int = Field(16, ge=1, description="sequences per optimiser step, over all processes")
    micro_batch_size: int = Field(8, ge=1, description="sequences per forward pass and process")
    lr: float = Field(9.65e-6, gt=0)
    schedule: Schedule = "cosine"
    final_lr_fraction: float = Field(0.1, ge=0, le=1, description="the schedule ends at this share of lr (paper: 10 %)")
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    packing: bool = Field(True, description="several demonstrations in a row; refused if the model sees across them")
    loss_on: Literal["last", "all"] = Field("last", description="the assistant's turns that are trained")
    max_tokens: int = Field(512, ge=8, description="tokens of a packed row; longer demonstrations are dropped, counted")
    pretraining_mix: float = Field(0.0, ge=0, lt=1, description="share of pretraining rows in the data (paper: 0.1)")
    dropout: float = Field(0.0, ge=0, lt=1, description="residual dropout, if the architecture has any (paper: 0.2)")
    save_every: int = Field(0, ge=0, description="optimiser steps between checkpoints; 0 saves at the end only")


class RankSection(Section):
    """Sampling of K outputs per prompt from the SFT policy, and their ranking (paper sections 3.4 and 3.5)."""

    labeler: Literal["rubric", "reward_model", "judge", "file", "human"] = "rubric"
    prompts: int = Field(0, ge=0, description="number of prompts to rank; 0: all")
    outputs_per_prompt: int = Field(4, ge=2, le=16, description="K (paper: 4 to 9)")
    temperature: float = Field(1.0, gt=0)
    batch_size: int = Field(64, ge=1, description="sequences decoded together")
    agreement: float = Field(0.73, gt=0.5, le=1, description="pair agreement of two simulated labelers (paper: 0.726)")
    tie_margin: float = Field(0.05, ge=0, description="outputs tie if their noisy scores differ by at most this")
    reward_model: str = Field("", description="folder or Hub name of the reward model for labeler=reward_model")


class JudgeSection(Section):
    """A language model as labeler: rank.labeler=judge, evaluate.labeler=judge, `rlhf judge-eval`."""

    model: str = Field("", description="local folder or Hub name, or the endpoint's name for it; empty: model.name")
    endpoint: str = Field(
        "", description="OpenAI-compatible API, as http://host:8000/v1, key in OPENAI_API_KEY; empty: a local model"
    )
    template: str = Field(
        "pair-zero-shot", min_length=1, description="name in rlhf/data/prompt_templates/judge, or the path of a file"
    )
    demonstrations: str = Field("", description="file of rankings that replace a few-shot template's demonstrations")
    shots: int = Field(4, ge=1, le=64, description="number of judge.demonstrations used, from the first")
    tie_margin: float = Field(
        0.02, ge=0, le=1, description="outputs tie if win probabilities, or shares of points, differ by at most this"
    )
    calibrate: bool = Field(False, description="contextual calibration (Zhao et al. 2021); points without reasoning")
    reasoning_tokens: int = Field(96, ge=1, le=8192, description="limit of the reasoning under chain-of-thought")
    max_tokens: int = Field(
        2048, ge=0, description="longer questions to a local judge are dropped, counted; 0: its context length"
    )
    batch_tokens: int = Field(4096, ge=16, description="tokens per forward pass of a local judge")
    top_logprobs: int = Field(20, ge=2, le=20, description="most likely tokens requested from an endpoint")
    concurrency: int = Field(4, ge=1, le=256, description="concurrent requests to an endpoint")
    timeout_s: float = Field(60.0, gt=0, description="seconds to wait for an endpoint's answer")


class LabelSection(Section):
    """The page on which people rank: `rank.labeler=human`, and `rlhf label RUN`."""

    labelers: list[str] = Field(["labeler"], min_length=1, description="people who rank; each one gets a link")
    rankings: int = Field(0, ge=0, description="rankings to wait for before the run continues; 0: all")
    overlap: float = Field(0.1, ge=0, le=1, description="share of prompts that several labelers rank")
    opinions: int = Field(2, ge=2, le=100, description="labelers for each of those prompts, at most all of them")
    claim_minutes: float = Field(60.0, gt=0, description="a labeler keeps a prompt this long, then others may get it")
    quality: Literal["required", "optional", "off"] = Field(
        "optional", description="ask for the overall quality of each output, 1 to 7 (paper, Table 3)"
    )
    flags: bool = Field(True, description="offer the yes/no flags of each output (paper, Table 3)")
    host: str = Field("127.0.0.1", min_length=1, description="address of the page; others open it to the network")
    port: int = Field(0, ge=0, le=65535, description="0: the port that the run used last, or any free one")

    @model_validator(mode="after")
    def _names(self) -> LabelSection:
        for name in self.labelers:
            if not re.fullmatch(LABELER_PATTERN, name):
                fix = "use 1 to 40 letters, digits or . _ - without blanks"
                raise ValueError(f"{name!r} cannot be the name of a labeler", fix)
            if self.labelers.count(name) > 1:
                raise ValueError(f"the labeler {name} is listed twice", "name each of them once")
        return self


class RewardPeftSection(Section):
    """The trained weights of the reward model, and of PPO's value model, which starts from it."""

    method: Literal["model", "none"] = Field(
        "model", description="model: model.peft, starting from SFT's adapter; none: all weights"
    )


class RewardSection(Section):
    """Training of the reward model on K-way rankings (paper section 3.5, equation 1, and C.2)."""

    model: str = Field("sft", min_length=1, description="start from: sft, a local folder or a Hub name")
    train: bool = Field(
        True, description="false: reward.model as it is; it is normalised, measured and its probe scores are taken"
    )
    keep_layers: int = Field(0, ge=0, description="keep the first N layers: a smaller model, as in the paper; 0: all")
    head_init: Literal["zero", "normal"] = Field(
        "zero", description="zero: the first loss is log 2; normal: N(0, 1/(d + 1)) as in arXiv 2403.17031"
    )
    peft: RewardPeftSection = RewardPeftSection()
    epochs: int = Field(1, ge=1)
    batch_size: int = Field(16, ge=1, description="prompts per optimiser step, each with all its outputs (paper: 64)")
    micro_tokens: int = Field(
        2048, ge=16, description="tokens per forward pass and process, counting the prompt with each output"
    )
    lr: float = Field(9e-6, gt=0)
    schedule: Schedule = "cosine"
    final_lr_fraction: float = Field(0.1, ge=0, le=1)
    warmup_steps: int = Field(0, ge=0)
    weight_decay: float = Field(0.0, ge=0)
    max_grad_norm: float = Field(1.0, gt=0)
    ties: Literal["drop", "half"] = Field("drop", description="drop tied pairs (paper), or train them towards 0.5")
    max_tokens: int = Field(512, ge=8, description="prompt and response together; longer rankings are dropped, counted")
    normalise_scale: bool = Field(True, description="also scale the scores of ranked outputs to unit variance")
    save_every: int = Field(0, ge=0, description="optimiser steps between checkpoints; 0 saves at the end only")


class PpoSection(Section):
    """PPO and PPO-ptx (paper section 3.5, equation 2, and C.4)."""

    episodes: int = Field(256, ge=1, description="sampled responses in total")
    batch_size: int = Field(64, ge=1, description="episodes per iteration, over all processes (paper: 512)")
    minibatch_size: int = Field(16, ge=1, description="episodes per optimiser step (paper: 64)")
    micro_batch_size: int = Field(8, ge=1, description="episodes per forward pass and process")
    epochs: int = Field(1, ge=1, description="passes over each batch (paper: 1)")
    temperature: float = Field(1.0, gt=0)
    rollout: RolloutEngine = Field(
        "native", description="engine that samples the responses; vllm: a server, see launch.vllm_url"
    )
    rollout_batch_size: int = Field(64, ge=1, description="sequences decoded together")
    score_tokens: int = Field(2048, ge=16, description="tokens per scoring forward pass")
    lr: float = Field(1e-5, gt=0, description="learning rate of the policy")
    value_lr: float = Field(9e-6, gt=0, description="learning rate of the value model")
    warmup_iterations: int = Field(10, ge=0, description="linear warm-up from a tenth of the learning rate (paper: 10)")
    schedule: Schedule = "constant"
    final_lr_fraction: float = Field(0.0, ge=0, le=1)
    max_grad_norm: float = Field(1.0, gt=0, description="gradient clipping, policy and value separately")
    adam_beta2: float = Field(0.95, gt=0, lt=1)
    adam_eps: float = Field(1e-8, gt=0)
    clip: float = Field(0.2, gt=0, lt=1)
    value_clip: float = Field(0.2, gt=0)
    vf_coef: float = Field(1.0, ge=0)
    gamma: float = Field(1.0, gt=0, le=1)
    lam: float = Field(0.95, ge=0, le=1)
    kl_control: Literal["fixed", "adaptive"] = "fixed"
    kl_coef: float = Field(0.02, ge=0, description="beta (paper: 0.02)")
    kl_target: float = Field(6.0, gt=0, description="adaptive: nats per response (Ziegler et al. 2019)")
    kl_horizon: int = Field(10000, ge=1, description="adaptive: episodes (Ziegler et al. 2019)")
    whiten_rewards: bool = Field(False, description="scale rewards to unit variance about their mean before GAE")
    missing_eos_penalty: float = Field(0.0, ge=0, description="subtracted from the score of a response without EOS")
    ptx_coef: float = Field(27.8, ge=0, description="gamma of equation 2, whose terms are means over tokens here")
    ptx_examples_per_episode: float = Field(8.0, ge=0, description="pretraining rows per episode (paper: 8)")
    ptx_tokens: int = Field(64, ge=4, description="tokens of a pretraining row")
    ema_decay: float = Field(0.992, ge=0, lt=1, description="0 keeps no average (paper: 0.992)")
    max_kl: float = Field(100.0, gt=0, description="stop if the mean KL per response exceeds this")
    ratio_tolerance: float = Field(1e-3, gt=0, description="tolerance of the first-minibatch check ratio = 1, KL = 0")
    max_skipped_steps: int = Field(3, ge=1, description="non-finite steps in a row before the run stops")
    save_every: int = Field(4, ge=0, description="iterations between checkpoints; 0 saves at the end only")
    samples_logged: int = Field(4, ge=0, description="rows of the samples table per iteration")


class EvaluateSection(Section):
    """Win rates, KL, length, diversity and the alignment tax on held-out prompts (paper section 4)."""

    labeler: Literal["rubric", "reward_model", "judge"] = Field(
        "rubric", description="reward_model: rank.reward_model if set, else the one of this run"
    )
    prompted: list[str] = Field(
        [],
        description="templates of prompted baselines (paper: GPT-3 prompted): names in "
        "rlhf/data/prompt_templates/generate, or paths",
    )
    prompted_policies: list[Literal["base", "sft"]] = Field(
        ["base"], min_length=1, description="policies to prompt; base: the model that SFT started from"
    )
    reasoning_tokens: int = Field(64, ge=1, le=8192, description="limit of the reasoning under chain-of-thought")
    prompts: int = Field(0, ge=0, description="number of held-out prompts; 0: all")
    samples_per_prompt: int = Field(1, ge=1, le=64)
    judgements: int = Field(1, ge=1, le=100, description="labelers per pair, each asked in both orders; averaged")
    temperature: float = Field(1.0, gt=0)
    bootstrap: int = Field(2000, ge=100, description="resamples of the 95 % interval")
    ema: bool = Field(False, description="also evaluate the averaged policy")
    cloze_questions: int = Field(0, ge=0, description="number of cloze questions; 0: all")


class TrackingSection(Section):
    """Tracking with wandb, besides the local metrics file."""

    wandb: Literal["auto", "online", "offline", "disabled"] = Field(
        "auto", description="auto: online with a key, else offline; failures never stop a run"
    )
    project: str = "rlhf"
    entity: str = ""


class LaunchSection(Section):
    """Processes, machines and memory; one process on a CPU needs no launcher."""

    processes: int = Field(1, ge=1, description="processes on this machine")
    hostfile: str = Field("", description="DeepSpeed hostfile for several machines")
    node_rank: int = Field(
        -1, ge=-1, description="index of this machine in the hostfile if each one starts `rlhf`; -1: start by ssh"
    )
    master_addr: str = Field("", description="address of the first machine; empty: from the hostfile")
    master_port: int = Field(29500, ge=1024, le=65500, description="first of six free ports there, one for each stage")
    timeout_s: int = Field(1800, ge=1, description="a process that dies or hangs ends the stage after this time")
    zero_stage: Literal[0, 1, 2, 3] = 0
    offload: bool = Field(False, description="optimiser state (ZeRO 2, 3) and weights (ZeRO 3) in host memory")
    deepspeed_config: str = Field("", description="DeepSpeed JSON in place of launch/deepspeed/zeroN.json")
    frozen: Literal["whole", "partitioned", "cpu"] = Field(
        "whole", description="models that a stage does not train: whole, in parts, or in host memory between passes"
    )
    gather: Literal["once", "by_layer"] = Field(
        "once", description="partitioned models gather for sampling and scoring: all layers at once, or one by one"
    )
    gradient_checkpointing: bool = False
    vllm_url: str = Field("", description="vLLM server for ppo.rollout=vllm, as http://host:8000")
    vllm_weights: str = Field(
        "/dev/shm", min_length=1, description="folder for the weights sent to vLLM; the server must see it too"
    )


class Recipe(Section):
    """The whole recipe."""

    run: RunSection = RunSection()
    model: ModelSection = ModelSection()
    data: DataSection = DataSection()
    sft: SftSection = SftSection()
    rank: RankSection = RankSection()
    judge: JudgeSection = JudgeSection()
    label: LabelSection = LabelSection()
    reward: RewardSection = RewardSection()
    ppo: PpoSection = PpoSection()
    evaluate: EvaluateSection = EvaluateSection()
    tracking: TrackingSection = TrackingSection()
    launch: LaunchSection = LaunchSection()

    @property
    def reward_peft(self) -> PeftSection:
        """Return the method of the reward model and the value model."""
        return self.model.peft if self.reward.peft.method == "model" else PeftSection()

    @property
    def reward_format(self) -> ModelSection:
        """Return how the run's reward model is loaded: one that is not trained has a format of its own."""
        return self.model if self.reward.train else self.model.in_its_own_format()

    @model_validator(mode="after")
    def _methods_fit(self) -> Recipe:
        method, launch = self.model.peft.method, self.launch
        if not self.reward.train and (self.reward.model == "sft" or self.reward.keep_layers):
            what = "reward.train is false, so reward.model is used as it is: "
            what += "it is sft, a policy" if self.reward.model == "sft" else "reward.keep_layers would cut it"
            raise ValueError(what, "name a trained reward model (a folder or a Hub name), with reward.keep_layers=0")
        if method in UNMERGEABLE and self.reward.peft.method == "none" and self.reward.model == "sft":
            start = f"SFT's weights, which {method} does not change"
            fix = "set reward.peft.method=model, or name another reward.model"
            raise ValueError(f"reward.peft.method is none: the reward model would start from {start}", fix)
        if self.reward_peft.on and 0 < self.reward.keep_layers < self.reward_peft.last_layers:
            raise ValueError(
                f"reward.keep_layers is {self.reward.keep_layers}, and model.peft.last_layers is "
                f"{self.reward_peft.last_layers}: the reward model would have fewer layers than it trains",
                "lower model.peft.last_layers, keep more layers, or set reward.peft.method=none",
            )
        if method in VIRTUAL_TOKEN_METHODS and self.sft.packing:
            what = f"sft.packing is true: with {method}, packed rows would share one set of virtual tokens"
            raise ValueError(what, "set sft.packing=false")
        if method in KV_PREFIX_METHODS and launch.gradient_checkpointing:
            dropped = f"the keys and values that {method} puts before every row"
            fix = "set launch.gradient_checkpointing=false, or take p_tuning or prompt"
            raise ValueError(f"launch.gradient_checkpointing is true: it drops {dropped}", fix)
        return self
