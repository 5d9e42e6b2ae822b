"""Derived numbers, by hand, and the refusals of recipes that do not divide."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.plan import as_launched, exact_div, plan_ppo, plan_rank, plan_reward, plan_sft, read_hosts
from rlhf.recipe import load_recipe
from rlhf.run.preflight import check, plan_rows


def recipe(*overrides: str) -> Recipe:
    return load_recipe("tiny", overrides)


def refusal(*overrides: str, stages: list[str] | None = None) -> str:
    with pytest.raises(UserError) as caught:
        check(recipe(*overrides), stages)
    return str(caught.value)


def test_paper_numbers() -> None:
    """Appendix C.4: 256k episodes in batches of 512 and minibatches of 64, 8 pretraining examples per episode."""
    plan = plan_ppo(load_recipe("instructgpt-1.3b"))
    assert plan.processes == 8
    assert plan.iterations == 500
    assert plan.batch_per_process == 64
    assert plan.minibatches == plan.steps_per_iteration == 8
    assert plan.minibatch_per_process == 8
    assert plan.micro_batches == 4  # of 2 episodes
    assert plan.steps == 4000
    assert plan.response_tokens == 512 * 1024
    assert plan.ptx_rows_per_minibatch == 512
    assert plan.ptx_rows_per_process == 64
    assert plan.ptx_micro_batches == 32


def test_inner_epochs_multiply_steps_and_nothing_else() -> None:
    plan = plan_ppo(load_recipe("tldr-pythia-1b"))
    assert (plan.iterations, plan.minibatches, plan.steps_per_iteration, plan.steps) == (1953, 1, 4, 7812)
    assert plan.ptx_rows_per_minibatch == plan.ptx_micro_batches == 0  # ptx_coef is 0


def test_other_stages() -> None:
    r = recipe(
        "sft.batch_size=24", "sft.micro_batch_size=4", "reward.batch_size=6",
        "rank.prompts=10", "rank.outputs_per_prompt=9", "launch.processes=2",
    )  # fmt: skip
    assert plan_sft(r).accumulation == 3  # 24 / 2 / 4
    assert plan_reward(r).batch_per_process == 3
    assert (plan_rank(r).responses, plan_rank(r).pairs_per_prompt) == (90, 36)
    assert plan_rank(recipe("rank.prompts=0")).responses == 0


def test_decimal_ptx_rows_are_exact() -> None:
    """0.1 x 30 is 3 rows, though not in binary floating point."""
    r = recipe("ppo.ptx_examples_per_episode=0.1", "ppo.episodes=30", "ppo.batch_size=30", "ppo.minibatch_size=30",
               "ppo.micro_batch_size=2")  # fmt: skip
    assert plan_ppo(r).ptx_rows_per_minibatch == 3
    assert plan_ppo(r).ptx_micro_batches == 2  # 2 rows, then 1


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["ppo.episodes=100"], ["ppo.episodes 100", "ppo.batch_size 16", "=96 or 112", "ppo.batch_size=10 or 20"]),
        (["ppo.minibatch_size=6"], ["ppo.batch_size 16", "ppo.minibatch_size 6", "ppo.minibatch_size=4 or 8"]),
        (["ppo.minibatch_size=32"], ["larger than ppo.batch_size"]),
        (["ppo.micro_batch_size=3"], ["ppo.micro_batch_size 3", "ppo.micro_batch_size=2 or 4"]),
        (["ppo.micro_batch_size=16"], ["ppo.micro_batch_size 16", "ppo.micro_batch_size=8"]),
        (["ppo.ptx_examples_per_episode=0.3"], ["2.4 pretraining rows", "ppo.ptx_examples_per_episode=0.25 or 0.375"]),
        (["ppo.ptx_examples_per_episode=0.1"], ["0.8 pretraining rows", "ppo.ptx_examples_per_episode=0.125"]),
        (
            ["launch.processes=2", "sft.micro_batch_size=8"],
            ["ppo.minibatch_size / processes 4", "micro_batch_size=4"],
        ),
        (["launch.processes=3", "sft.batch_size=16"], ["sft.batch_size 16", "processes 3"]),
        (["launch.processes=3", "sft.batch_size=18", "sft.micro_batch_size=6"], ["reward.batch_size 4", "processes 3"]),
    ],
)  # fmt: skip
def test_remainders_name_both_fields_and_the_nearest_values(overrides: list[str], words: list[str]) -> None:
    text = refusal(*overrides)
    for word in words:
        assert word in text


def test_exact_div_never_suggests_zero() -> None:
    assert exact_div("a", 12, "b", 4) == 3
    with pytest.raises(UserError) as caught:
        exact_div("a", 3, "b", 4)
    assert "a=4, or b=3" in str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["run.stages=[reward,sft]"], "run.stages=[sft,reward]"),
        (["run.stages=[evaluate,ppo-ptx]"], "run.stages=[ppo-ptx,evaluate]"),
        (["run.stages=[sft,sft]"], "listed twice"),
        (["rank.labeler=file"], "data.rankings is empty"),
        (["rank.labeler=reward_model"], "rank.reward_model"),
        (["ppo.ptx_coef=0"], "ppo-ptx needs ppo.ptx_coef above 0"),
        (["ppo.ptx_examples_per_episode=0"], "ppo.ptx_examples_per_episode above 0"),
        (["ppo.kl_control=adaptive", "ppo.kl_coef=0"], "0 stays 0"),
        (["data.prompts=[]"], "data.prompts is empty"),
        (["data.prompts_heldout=[]"], "data.prompts_heldout is empty"),
        (["data.pretraining=[]"], "data.pretraining is empty"),
        (["data.pretraining=[]", "sft.pretraining_mix=0.1", "run.stages=[sft]"], "sft.pretraining_mix"),
        (["launch.deepspeed_config=none.json"], "no such DeepSpeed file"),
        (["launch.hostfile=none"], "cannot read the hostfile"),
    ],
)
def test_rules_between_fields(overrides: list[str], words: str) -> None:
    assert words in refusal(*overrides)


def test_rules_bind_only_the_stages_that_run() -> None:
    check(recipe("rank.labeler=file", "ppo.episodes=100"), ["sft", "evaluate"])
    check(recipe("ppo.ptx_coef=0", "data.pretraining=[]"), ["ppo"])
    check(recipe("run.stages=[ppo,ppo-ptx]"))  # either order of the variants


def test_hostfile_counts_machines(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("# two nodes\nnode-a slots=4\n\nnode-b slots=4  # second\n", encoding="utf-8")
    assert read_hosts(str(hosts)) == ["node-a", "node-b"]
    r = recipe(
        f"launch.hostfile={hosts}", "launch.processes=4", "ppo.micro_batch_size=1", "ppo.ptx_examples_per_episode=2"
    )
    assert plan_ppo(r).processes == 8
    hosts.write_text("node-a 4\n", encoding="utf-8")
    with pytest.raises(UserError, match="line 1"):
        read_hosts(str(hosts))


def test_a_launcher_sets_the_process_count_and_the_recipe_must_else_agree(tmp_path: Path) -> None:
    assert as_launched(recipe(), None) == recipe() == as_launched(recipe(), 1)
    two = recipe("launch.processes=2")
    assert as_launched(two, 2) == two and as_launched(recipe(), 2) == two
    assert plan_sft(as_launched(recipe("sft.batch_size=16", "sft.micro_batch_size=4"), 2)).accumulation == 2
    with pytest.raises(UserError, match="does not divide by processes 3"):
        check(as_launched(recipe("sft.batch_size=16"), 3), ["sft"])
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=1\nb slots=1\n", encoding="utf-8")
    assert plan_sft(as_launched(recipe(f"launch.hostfile={hosts}", "sft.micro_batch_size=2"), 4)).processes == 4
    with pytest.raises(UserError, match="for 2 processes, and this program runs as one without a launcher"):
        as_launched(two, None)


def test_a_node_rank_is_a_place_in_the_hostfile(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("a slots=1\nb slots=1\n", encoding="utf-8")
    check(recipe(f"launch.hostfile={hosts}", "launch.node_rank=1", "sft.micro_batch_size=8"), ["sft"])
    with pytest.raises(UserError, match="2 machines"):
        check(recipe(f"launch.hostfile={hosts}", "launch.node_rank=2", "sft.micro_batch_size=8"), ["sft"])
    with pytest.raises(UserError, match="hostfile"):
        check(recipe("launch.node_rank=0"), ["sft"])


@pytest.mark.parametrize("name", ["demo", "tiny", "peft", "instructgpt-1.3b", "tldr-pythia-1b"])
def test_shipped_recipes_are_whole(name: str) -> None:
    r = load_recipe(name)
    check(r)
    assert all(what and how for what, how in plan_rows(r))


def test_a_judge_is_shown_with_its_questions_and_checked() -> None:
    judge = ("rank.labeler=judge", "rank.outputs_per_prompt=4")
    rows = [text for _, text in plan_rows(recipe(*judge), ["rank"])]
    assert "12 questions per prompt to tiny, template pair-zero-shot" in rows  # both orders of 6 pairs
    more = ("judge.template=points-zero-shot", "judge.endpoint=http://host/v1", "judge.model=m")
    assert "4 questions per prompt to m at http://host/v1, template points-zero-shot" in [
        text for _, text in plan_rows(recipe(*judge, *more), ["rank"])
    ]
    for stages, field in ((["rank"], "rank.labeler=judge"), (["evaluate"], "evaluate.labeler=judge")):
        with pytest.raises(UserError, match="did you mean pair-brief?"):
            check(recipe(field, "judge.template=pair-breif"), stages)
        check(recipe("judge.template=pair-breif"), stages)  # nobody asks it
