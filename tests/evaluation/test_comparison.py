"""Rows of a comparison of hand-made runs against values worked out by hand; runs that are unfinished or broken."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest

from rlhf.errors import UserError
from rlhf.evaluation.comparison import ArmResult, arm_results, finding
from rlhf.evaluation.comparison_file import Comparison
from rlhf.functional.statistics import Interval
from rlhf.run.folder import _started
from support.comparison_runs import BAD, by_arm, hand_made

SAMPLES, RESULTS = "evaluate/samples.jsonl", "evaluate/results.json"


@pytest.fixture
def comparison(tmp_path: Path) -> Comparison:
    """Three finished arms in hand-made run folders."""
    return hand_made(tmp_path)


# --- rows ------------------------------------------------------------------------------------------------------------


def test_rows_are_what_the_stages_wrote(comparison: Comparison) -> None:
    found = arm_results(comparison)
    assert [row.arm for row in found] == ["full", "lora", "prompt"] and {row.state for row in found} == {"done"}
    full, lora, prompt = found
    assert (full.trained, lora.trained, prompt.trained) == (150, 14, 4)
    assert (full.share, lora.share) == (1.0, pytest.approx(14 / (150 + 14)))
    adapter = comparison.folder / "lora" / "ppo-ptx" / "model" / "adapter_model.safetensors"
    assert lora.ppo_bytes == lora.sft_bytes == adapter.stat().st_size > 14 * 4
    assert (lora.method, lora.lr) == ("lora", (0.005, 0.0001)) and prompt.lr == (0.001, 0.01)
    assert (lora.sft_loss_before, lora.sft_loss) == (3.5, 3.25)
    assert (lora.train_score, lora.score, lora.score_sft, lora.kl) == (0.125, 0.75, 0.25, 1.5)
    assert (lora.sft_seconds, lora.ppo_seconds, lora.peak_gb, lora.prompts) == (60.0, 90.0, 2.5, 20)
    assert lora.win_rate == Interval(pytest.approx(0.7), 0.6, pytest.approx(0.8))


def test_gains_are_differences_prompt_by_prompt(comparison: Comparison) -> None:
    full, lora, prompt = arm_results(comparison)
    assert lora.gain == Interval(0.5, 0.5, 0.5) and prompt.gain == Interval(-0.25, -0.25, -0.25)
    assert full.gain is not None and full.gain.mean == 0
    # The mean of 20 values of +1 and -1 has a std of 1/sqrt(20) = 0.22, so its 95 % interval is about +-0.44.
    assert full.gain.low == pytest.approx(-0.44, abs=0.1) and full.gain.high == pytest.approx(0.44, abs=0.1)
    # Against the reference's SFT policy, 0.5 everywhere: 0.75 - 0.5 and 0.75 - 0.5.
    assert lora.gain_reference == Interval(0.25, 0.25, 0.25) and prompt.gain_reference == Interval(0.25, 0.25, 0.25)
    # Against its policy after PPO, of mean 0.5.
    assert lora.versus_reference is not None and lora.versus_reference.mean == pytest.approx(0.25)
    assert full.gain_reference == full.gain and full.versus_reference is None


def test_the_rubric_judges_an_arm_against_the_references_sft_policy(comparison: Comparison) -> None:
    full, lora, prompt = arm_results(comparison)
    # 20 of 20 prompts: the Wilson interval is 1 / (1 + 1.96^2 / 20) to 1.
    assert lora.win_rate_reference == Interval(1.0, pytest.approx(0.83887, abs=1e-5), 1.0)
    assert prompt.win_rate_reference is not None and prompt.win_rate_reference.mean == 0.5  # the same text: ties
    assert full.win_rate_reference == full.win_rate
    worse = comparison.folder / "prompt" / "evaluate" / "samples.jsonl"
    worse.write_text(worse.read_text().replace(BAD, ""))
    changed = by_arm(arm_results(comparison))["prompt"].win_rate_reference
    assert changed is not None and changed.mean == 0.0 and changed.high == pytest.approx(0.16113, abs=1e-5)


def test_words_claim_no_more_than_the_interval_allows(comparison: Comparison) -> None:
    full, lora, prompt = arm_results(comparison)
    assert (full.finding, lora.finding, prompt.finding) == ("learned nothing", "learned", "got worse")
    preferences = [arm.preference for arm in (full, lora, prompt)]
    assert preferences == ["no clear difference", "preferred", "SFT preferred"]
    assert (full.standing, lora.standing) == ("", "no clear difference")
    words = ("up", "none", "down")
    assert finding(Interval(0.2, 0.0, 0.4), 0.0, 20, words) == "none"  # it reaches the start
    assert finding(Interval(0.2, 0.1, 0.4), 0.0, 20, words) == "up"
    assert finding(Interval(0.2, 0.1, 0.4), 0.5, 20, words) == "down"
    assert finding(Interval(0.2, 0.1, 0.4), 0.0, 19, words) == "too few prompts to tell"
    assert finding(None, 0.0, 20, words) == ""


def test_prompts_that_differ_are_not_compared(comparison: Comparison) -> None:
    path = comparison.folder / "lora" / "evaluate" / "samples.jsonl"
    path.write_text(path.read_text().replace("town 3?", "town 33?"))
    lora = by_arm(arm_results(comparison))["lora"]
    assert lora.gain == Interval(0.5, 0.5, 0.5)  # its own policies still answer the same prompts
    assert lora.gain_reference is lora.versus_reference is lora.win_rate_reference is None


# --- runs that are not done, or broken -------------------------------------------------------------------------------


def test_a_failed_arm_has_its_reason(comparison: Comparison) -> None:
    record = {"state": "failed", "error": "UserError: KL reached 120 nats\n  where: ppo.max_kl", "metrics": {}}
    (comparison.folder / "lora" / "ppo-ptx" / "stage.json").write_text(json.dumps(record))
    (comparison.folder / "prompt" / "evaluate" / "stage.json").unlink()
    found = by_arm(arm_results(comparison))
    assert (found["lora"].state, found["lora"].reason) == ("failed", "ppo-ptx: KL reached 120 nats")
    assert found["lora"].sft_loss == 3.25 and found["prompt"].state == "unfinished" and found["prompt"].score is None
    found = by_arm(arm_results(comparison, {"prompt": "evaluate was killed (signal 9)"}))
    assert found["prompt"].reason == "evaluate was killed (signal 9)"


def test_states_of_an_unfinished_arm(comparison: Comparison) -> None:
    stage = comparison.folder / "lora" / "ppo-ptx" / "stage.json"
    stage.write_text(json.dumps({"state": "running"}))
    assert by_arm(arm_results(comparison))["lora"].state == "interrupted"
    assert by_arm(arm_results(comparison, {"lora": "ppo-ptx was killed"}))["lora"].state == "failed"
    owner = {"pid": os.getpid(), "host": socket.gethostname(), "started": _started(os.getpid())}
    (comparison.folder / "lora" / "lock").write_text(json.dumps(owner))
    assert by_arm(arm_results(comparison))["lora"].state == "running"
    stage.write_text(json.dumps({"state": "stopped"}))
    assert by_arm(arm_results(comparison))["lora"].reason == "ppo-ptx was stopped"
    (comparison.folder / "prompt").rename(comparison.folder / "elsewhere")
    assert by_arm(arm_results(comparison))["prompt"] == ArmResult("prompt", "prompt", (0.001, 0.01), "not run")


@pytest.mark.parametrize(
    ("file", "before", "after", "words"),
    [
        (SAMPLES, '"ppo-ptx": "Rain', '"ppo": "Rain', ["samples.jsonl, line 1", "no response of ppo-ptx"]),
        (SAMPLES, '"scores"', '"score', ["samples.jsonl, line 1", "not JSON"]),
        (RESULTS, '"b": "sft"', '"b": "x"', ["results.json", "no comparison of ppo-ptx with sft"]),
        (RESULTS, '"reward_score": 0.75', '"reward": 0.75', ["results.json", "(KeyError: 'reward_score')"]),
        (RESULTS, '{"labeler"', '{labeler"', ["results.json", "not JSON"]),
        ("ppo-ptx/metrics.jsonl", '"step": 32}', "32", ["metrics.jsonl, line 3", "not JSON"]),
        ("sft/model/adapter_model.safetensors", None, "x", ["adapter_model.safetensors", "weights cannot be read"]),
        ("sft/stage.json", None, "x", ["stage.json cannot be read"]),
    ],
)
def test_a_broken_file_is_named(
    comparison: Comparison, file: str, before: str | None, after: str, words: list[str]
) -> None:
    path = comparison.folder / "lora" / file
    path.write_text(after if before is None else path.read_text().replace(before, after, 1))
    with pytest.raises(UserError) as caught:
        arm_results(comparison)
    for word in words:
        assert word in str(caught.value)
