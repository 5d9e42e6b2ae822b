"""What a stage program does around its work: skipping, redoing, stopping, failing, and processes that must agree."""

from __future__ import annotations

import errno
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.recipe import load_recipe
from rlhf.run.fingerprints import depends_on, fingerprint
from rlhf.run.sealing import newest_sealed
from rlhf.run.stage import StageContext, parse_stage_args, run_stage
from rlhf.stage_table import STAGES
from rlhf.system.distributed import broadcast_from_main, pick_device
from rlhf.system.files import hash_path
from rlhf.system.signals import REPEAT_SECONDS
from support.paths import ROOT
from support.stage_runs import RECIPE, never, stage_json, train

pytestmark = pytest.mark.usefixtures("stage_folder")


def test_a_finished_stage_leaves_a_record(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage("sft", train, RECIPE) == 0
    record = stage_json()
    assert record["state"] == "done" and record["metrics"] == {"sft/loss": 0.5} and record["error"] is None
    assert record["outputs"] == {"model": len("sft 0.001")}
    assert record["attempts"] == 1 and 0 < record["seconds"] < 60
    assert not Path("runs/demo/lock").exists()
    assert load_recipe("runs/demo/recipe.yaml", []) == load_recipe(RECIPE[0], RECIPE[1:])
    shown = capsys.readouterr().out
    assert "sft/loss" in shown and "0.5" in shown and "runs/demo/sft" in shown


def test_metrics_that_json_cannot_hold_are_null() -> None:
    assert run_stage("sft", lambda ctx: {"a": float("nan"), "b": float("inf"), "c": 1}, RECIPE) == 0
    assert stage_json()["metrics"] == {"a": None, "b": None, "c": 1}


# --- skipped or done again -------------------------------------------------------------------------------------------


def test_a_finished_and_unchanged_stage_is_skipped(capsys: pytest.CaptureFixture[str]) -> None:
    run_stage("sft", train, RECIPE)
    assert run_stage("sft", never, RECIPE) == 0
    assert "sft: finished, recipe and inputs unchanged; skipped" in capsys.readouterr().out
    # Neither where it runs nor what only later stages read is a change.
    later = ["evaluate.bootstrap=300", "reward.lr=0.5", "data.cloze=[]", "run.stages=[sft]", "sft.lr=0.001"]
    assert run_stage("sft", never, [*RECIPE, *later]) == 0
    assert "bootstrap: 300" in Path("runs/demo/recipe.yaml").read_text()


def test_a_run_begun_while_a_field_still_existed_goes_on_after_it_was_retired() -> None:
    run_stage("sft", train, RECIPE)
    file = Path("runs/demo/recipe.yaml")
    before = file.read_text()
    # As it was written then: the line between its neighbours.
    old = before.replace("  vllm_url: ''\n", "  cuda_graphs: false\n  vllm_url: ''\n")
    assert old.count("  gradient_checkpointing: false\n  cuda_graphs: false\n  vllm_url: ''\n") == 1
    file.write_text(old)
    assert run_stage("sft", never, RECIPE) == 0
    assert file.read_text() == before
    file.write_text(old)
    assert run_stage("rank", train, [str(file)]) == 0  # as a stage is started alone, on the run's own recipe


def test_changed_data_sets_the_old_result_aside_and_starts_anew(capsys: pytest.CaptureFixture[str]) -> None:
    mine = Path("demonstrations.jsonl")
    assert run_stage("sft", train, RECIPE) == 0
    assert stage_json()["inputs"][str(mine.resolve())] == hash_path(mine)
    os.utime(mine, (1, 1))
    assert run_stage("sft", never, RECIPE) == 0  # content counts, not time
    mine.write_text('{"prompt": "a", "response": "c"}\n')

    def again(ctx: StageContext) -> dict[str, Any]:
        assert newest_sealed(ctx.dir / "checkpoints") is None  # of other data, nothing to go on from
        return train(ctx)

    assert run_stage("sft", again, RECIPE) == 0
    assert stage_json()["attempts"] == 1
    assert Path("runs/demo/sft.old/model/weights").exists() and not Path("runs/demo/sft.old/checkpoints").exists()
    shown = capsys.readouterr().out
    assert "demonstrations.jsonl" in shown and "kept in runs/demo/sft.old" in shown


def test_a_file_that_the_work_used_counts_too_but_not_one_that_is_gone() -> None:
    Path("base").mkdir()
    Path("base/weights").write_text("1")

    def work(ctx: StageContext) -> dict[str, Any]:
        assert ctx.use(Path("base")) == Path("base")
        return train(ctx)

    assert run_stage("sft", work, RECIPE) == 0
    Path("base/weights").rename("elsewhere")
    Path("base").rmdir()
    assert run_stage("sft", never, RECIPE) == 0
    Path("base").mkdir()
    Path("base/weights").write_text("2")
    done: list[str] = []
    assert run_stage("sft", lambda ctx: (done.append("again"), work(ctx))[1], RECIPE) == 0
    assert done == ["again"]


def test_using_a_file_that_is_not_there_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_stage("sft", lambda ctx: {"path": str(ctx.use(Path("missing")))}, RECIPE) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_a_new_result_upstream_or_a_lost_output_does_the_stage_again() -> None:
    done: list[str] = []

    def evaluate(ctx: StageContext) -> dict[str, Any]:
        done.append("evaluate")
        (ctx.dir / "results.json").write_text("{}")
        return {"evaluate/win_rate": 0.5}

    run_stage("sft", train, RECIPE)
    assert run_stage("evaluate", evaluate, RECIPE) == 0
    assert run_stage("evaluate", never, RECIPE) == 0
    assert stage_json("evaluate")["inputs"]["ppo/model"] == "absent"
    run_stage("ppo", train, RECIPE)  # a policy that evaluate has not seen
    assert run_stage("evaluate", evaluate, RECIPE) == 0
    assert run_stage("evaluate", never, RECIPE) == 0
    Path("runs/demo/evaluate/results.json").unlink()
    assert run_stage("evaluate", evaluate, RECIPE) == 0
    assert done == ["evaluate"] * 3


def test_a_moved_run_folder_is_still_finished() -> None:
    run_stage("sft", train, RECIPE)
    run_stage("rank", lambda ctx: {"n": 1}, RECIPE)
    Path("elsewhere").mkdir()
    Path("runs/demo").rename("elsewhere/other")
    assert run_stage("rank", never, [*RECIPE, "run.dir=elsewhere", "run.name=other"]) == 0


# --- a changed recipe ------------------------------------------------------------------------------------------------


def test_a_recipe_that_changes_a_finished_stage_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    run_stage("sft", train, RECIPE)
    before = Path("runs/demo/recipe.yaml").read_text()
    assert run_stage("rank", never, [*RECIPE, "sft.lr=0.5", "rank.prompts=3"]) == 2
    told = capsys.readouterr().err
    assert "sft.lr: 0.001 -> 0.5" in told and "run.name=" in told and "--from sft" in told
    assert "rank.prompts" not in told  # that one is free to change
    assert Path("runs/demo/recipe.yaml").read_text() == before
    assert run_stage("sft", train, [*RECIPE, "sft.lr=0.5", "run.name=other"]) == 0


def test_a_stopped_stage_binds_the_recipe_only_with_a_checkpoint() -> None:
    def fails(ctx: StageContext) -> dict[str, Any]:
        raise UserError("bad data")

    def fails_later(ctx: StageContext) -> dict[str, Any]:
        train(ctx)
        raise UserError("loss is nan")

    assert run_stage("sft", fails, RECIPE) == 2
    assert run_stage("sft", fails_later, [*RECIPE, "sft.lr=0.5"]) == 2
    assert stage_json()["error"] == "UserError: loss is nan"
    assert run_stage("sft", never, [*RECIPE, "sft.lr=0.25"]) == 2
    assert stage_json()["state"] == "failed" and stage_json()["attempts"] == 2
    assert run_stage("sft", train, [*RECIPE, "sft.lr=0.25", "--fresh"]) == 0


def test_fresh_redoes_a_stage_and_what_follows_is_done_again_when_run() -> None:
    run_stage("sft", train, RECIPE)
    run_stage("rank", lambda ctx: {"n": 1}, RECIPE)
    changed = [*RECIPE, "sft.lr=0.5"]
    assert run_stage("sft", train, [*changed, "--fresh"]) == 0
    assert Path("runs/demo/sft.old/model/weights").read_text() == "sft 0.001"
    done: list[str] = []
    assert run_stage("rank", lambda ctx: {"n": len(done), "m": done.append("rank")}, changed) == 0
    assert done == ["rank"]
    assert run_stage("sft", never, changed) == 0


def test_fresh_mends_a_record_that_cannot_be_read(capsys: pytest.CaptureFixture[str]) -> None:
    run_stage("sft", train, RECIPE)
    Path("runs/demo/sft/stage.json").write_text("")
    assert run_stage("sft", train, RECIPE) == 2
    assert "--fresh" in capsys.readouterr().err
    assert run_stage("sft", train, [*RECIPE, "--fresh"]) == 0


READ = re.compile(r"recipe\.((?:run|model|data|sft|rank|reward|ppo|evaluate)(?:\.[a-z_]+)+)")
FREE = {"run.device", "run.name", "run.dir", "run.stages"}  # where, not what


def sources(program: str) -> list[str]:
    """Return the text of a stage's program, and of what it imports of rlhf/training and the sampling parameters."""
    found: dict[Path, str] = {}
    waiting = [ROOT / "stages" / f"{program}.py"]
    while waiting:
        path = waiting.pop()
        if path not in found:
            found[path] = path.read_text()
            imported = re.findall(r"^from rlhf\.training\.(\w+) import", found[path], re.M)
            waiting += [ROOT / "rlhf" / "training" / f"{name}.py" for name in imported]
            if "SamplingParams.from_recipe" in found[path]:
                waiting.append(ROOT / "rlhf" / "rollout" / "sampling_params.py")
    return list(found.values())


@pytest.mark.parametrize("stage", [*STAGES])
def test_every_field_that_a_stage_program_names_is_among_its_dependencies(stage: str) -> None:
    program = STAGES[stage].program
    texts = sources(program)
    named = {name for text in texts for name in READ.findall(text)} - FREE
    if any("recipe.reward_peft" in text for text in texts):  # which comes from these two
        named |= {"reward.peft.method", "model.peft.method"}
    assert ("reward.peft.method" in named) == (program in ("reward", "ppo"))
    assert len(named) > 3
    missed = [name for name in named if not depends_on(stage, name) and not name.endswith(".model_dump")]
    assert not missed


def test_fingerprint_moves_with_the_stages_own_fields_only() -> None:
    base = fingerprint(Recipe(), "sft")
    for change, moves in (
        ({"sft": {"lr": 0.5}}, True),
        ({"run": {"seed": 5}}, True),
        ({"model": {"peft": {"rank": 4}}}, True),
        ({"data": {"max_prompt_tokens": 9}}, True),
        ({"ppo": {"lr": 0.5}}, False),
        ({"data": {"cloze": []}}, False),
        ({"launch": {"zero_stage": 2}}, False),
        ({"run": {"name": "other"}}, False),
    ):
        assert (fingerprint(Recipe.model_validate(change), "sft") != base) == moves, change


# --- failing and stopping --------------------------------------------------------------------------------------------


def test_a_failure_is_recorded_and_deletes_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    def work(ctx: StageContext) -> dict[str, Any]:
        train(ctx)
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        run_stage("sft", work, RECIPE)
    record = stage_json()
    assert record["state"] == "failed" and record["error"] == "ValueError: a bug"
    assert Path("runs/demo/sft/model/weights").exists() and newest_sealed(Path("runs/demo/sft/checkpoints"))
    assert not Path("runs/demo/lock").exists()


def test_a_user_error_is_told_once_without_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    def work(ctx: StageContext) -> dict[str, Any]:
        raise UserError("the loss is [nan]", "sft.lr", "lower it")

    assert run_stage("sft", work, RECIPE) == 2
    assert capsys.readouterr().err == "error: the loss is [nan]\n  where: sft.lr\n  fix:   lower it\n"
    assert stage_json()["state"] == "failed"
    assert run_stage("sft", work, ["tiny", "sft.learning=1"]) == 2
    assert "did you mean" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [OSError(errno.ENOSPC, "No space left on device", "w.bin"), RuntimeError("No space left on device")]
)
def test_a_full_disk_is_told_with_what_to_do(error: Exception, capsys: pytest.CaptureFixture[str]) -> None:
    def work(ctx: StageContext) -> dict[str, Any]:
        raise error

    assert run_stage("sft", work, RECIPE) == 2
    told = capsys.readouterr().err
    assert "the disk is full" in told and "free some space" in told


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_the_first_signal_lets_the_step_finish_and_the_next_run_goes_on(number: int, code: int) -> None:
    steps: list[int] = []

    def work(ctx: StageContext) -> dict[str, Any]:
        sealed = newest_sealed(ctx.dir / "checkpoints")
        step = int((sealed / "step").read_text()) if sealed else 0
        while step < 4:
            steps.append(step)
            if step == 1 and len(steps) == 2:
                os.kill(os.getpid(), number)
            step += 1
            if ctx.stop_requested:
                ctx.checkpoints.save(step, lambda staged, step=step: (staged / "step").write_text(str(step)))
                return {}
        return train(ctx)

    before = signal.getsignal(number)
    assert run_stage("sft", work, RECIPE) == code
    assert signal.getsignal(number) is before
    assert stage_json()["state"] == "stopped" and not Path("runs/demo/lock").exists()
    assert run_stage("sft", work, RECIPE) == 0
    assert steps == [0, 1, 2, 3]
    assert stage_json()["state"] == "done" and stage_json()["attempts"] == 2


def test_a_signal_after_the_last_step_does_not_undo_the_stage() -> None:
    def work(ctx: StageContext) -> dict[str, Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        assert ctx.stop_requested
        return train(ctx)

    assert run_stage("sft", work, RECIPE) == 143  # the pipeline still stops here
    assert stage_json()["state"] == "done"
    assert run_stage("sft", never, RECIPE) == 0


@pytest.mark.parametrize(("first", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_second_ctrl_c_stops_at_once(first: int, code: int) -> None:
    def work(ctx: StageContext) -> dict[str, Any]:
        os.kill(os.getpid(), first)
        time.sleep(2 * REPEAT_SECONDS)
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
        return {}

    begin = time.monotonic()
    assert run_stage("sft", work, RECIPE) == code
    assert time.monotonic() - begin < 30 and stage_json()["state"] == "stopped"


def test_copies_of_a_signal_and_a_schedulers_others_stop_nothing_at_once() -> None:
    """Slurm signals all processes of a job and `rlhf run` hands its own on; scancel's SIGTERM may follow SIGUSR1."""

    def work(ctx: StageContext) -> dict[str, Any]:
        for number in (signal.SIGINT, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        assert ctx.stop_requested
        time.sleep(2 * REPEAT_SECONDS)
        for number in (signal.SIGTERM, signal.SIGUSR1):
            os.kill(os.getpid(), number)
        ctx.checkpoints.save(1, lambda staged: (staged / "step").write_text("1"))
        return {}

    assert run_stage("sft", work, RECIPE) == 130
    assert stage_json()["state"] == "stopped" and newest_sealed(Path("runs/demo/sft/checkpoints"))


def test_one_variant_of_ppo_is_redone_without_the_other_in_the_way() -> None:
    for name in ("ppo", "ppo-ptx"):
        assert run_stage(name, train, RECIPE) == 0
    changed = [*RECIPE, "ppo.lr=0.002"]
    assert run_stage("ppo-ptx", never, changed) == 2
    assert run_stage("ppo-ptx", train, [*changed, "--fresh"]) == 0
    assert stage_json("ppo-ptx")["attempts"] == 1 and Path("runs/demo/ppo-ptx.old").is_dir()
    assert run_stage("ppo", train, changed) == 0  # its own fingerprint has it done again
    assert Path("runs/demo/ppo.old").is_dir()


# --- command line ----------------------------------------------------------------------------------------------------


def test_arguments_in_any_order() -> None:
    expected = ("demo", ["sft.lr=1e-5", "run.seed=2"])
    parsed = parse_stage_args(["demo", "sft.lr=1e-5", "--fresh", "run.seed=2"], "stages/sft.py")
    assert parsed == (*expected, {"fresh": True, "variant": None, "accept_change": []})
    parsed = parse_stage_args(["--variant", "ppo", "demo", "sft.lr=1e-5", "run.seed=2"], "stages/ppo.py")
    assert parsed == (*expected, {"fresh": False, "variant": "ppo", "accept_change": []})


@pytest.mark.parametrize("argv", [[], ["demo", "--variant", "ppo"], ["demo", "--frsh"]])
def test_usage_errors_exit_with_2(argv: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_stage_args(argv, "stages/sft.py")
    assert ended.value.code == 2 and "usage: python stages/sft.py" in capsys.readouterr().err


def test_help_is_one_paragraph(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parse_stage_args(["--help"], "stages/ppo.py")
    assert ended.value.code == 0
    assert "newest sealed checkpoint" in " ".join(capsys.readouterr().out.split())


def test_pick_device() -> None:
    assert pick_device(Recipe.model_validate({"run": {"device": "cpu"}})).type == "cpu"
    if not torch.cuda.is_available():
        assert pick_device(Recipe()).type == "cpu"
        with pytest.raises(UserError, match="no CUDA device"):
            pick_device(Recipe.model_validate({"run": {"device": "cuda"}}))


def test_a_process_without_a_gpu_of_its_own_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device(Recipe()) == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 2 of this machine has no GPU: there are 2"):
        pick_device(Recipe())


def test_an_error_that_counts_as_false_passes_through() -> None:
    class Falsy(Exception):
        def __bool__(self) -> bool:
            return False

    def fail() -> None:
        raise Falsy

    with pytest.raises(Falsy):
        broadcast_from_main(fail)
