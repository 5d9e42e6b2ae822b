"""The benchmarks' own arithmetic: operations, pairs, ratios, the table; and that a failing side fails alone."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks.bench import relative_growth, run, run_all
from benchmarks.flops import Shape, body_flops, policy_flops, update_flops, value_flops
from benchmarks.jobs import Job
from benchmarks.pairs import expand
from benchmarks.table import OURS, Line, as_json, memory_ratio, render, speedup
from rlhf.functional.ranking import ranking_loss
from support.paths import TESTS

PEERS = TESTS / "benchmarks" / "peers"
# 2 layers, hidden 4, MLP 6, 2 heads of 3 with 1 key-value head, 10 tokens.
SMALL = Shape(layers=2, hidden=4, intermediate=6, heads=2, kv_heads=1, head_dim=3, vocabulary=10)


def line(side: str, unit: str, values: list[float], peaks: list[float] | None = None) -> Line:
    return Line("part", "case", side, unit, values, peaks or [])


def test_operations_of_a_model_worked_out_by_hand() -> None:
    # q 4x6, k and v 4x3 each, o 6x4, three of 4x6
    assert SMALL.layer_weights == 24 + 12 + 12 + 24 + 72 == 144
    # 3 tokens: 2 x 144 x 3 a layer; they see 1, 2 and 3 keys, each 2 x 2 products of 2 heads x 3
    assert body_flops(SMALL, 3) == 2 * (864 + 4 * 6 * 6)
    # prompt 2, response 2: three tokens pass, the last one predicts nothing; two of them go through the 4x10 head
    assert policy_flops(SMALL, [(2, 2)]) == 2016 + 2 * 40 * 2
    assert value_flops(SMALL, [(2, 2)]) == 2016 + 2 * 4 * 2
    assert update_flops(SMALL, [(2, 2), (2, 2)]) == 2 * 3 * (2176 + 2032)


def test_shape_comes_from_a_config() -> None:
    sizes = {"num_hidden_layers": 2, "hidden_size": 4, "intermediate_size": 6, "vocab_size": 10}
    config = SimpleNamespace(**sizes, num_attention_heads=2, num_key_value_heads=1, head_dim=3)
    assert Shape.of(config) == SMALL
    assert Shape.of(SimpleNamespace(**(vars(config) | {"head_dim": None}))).head_dim == 2


def test_rankings_become_pairs_better_one_first() -> None:
    assert expand([1], [[2], [3], [4]], [2, 1, 2]) == [([1, 3], [1, 2]), ([1, 3], [1, 4])]
    assert len(expand([1], [[i] for i in range(9)], range(9))) == 36


def test_mean_over_pairs_is_the_loss_of_the_prompt() -> None:
    scores, ranks = torch.tensor([0.3, -1.0, 0.7, 0.1]), [2, 4, 1, 3]
    pairs = expand([], [[i] for i in range(4)], ranks)
    pairwise = torch.stack([-torch.nn.functional.logsigmoid(scores[a[0]] - scores[b[0]]) for a, b in pairs]).mean()
    assert torch.allclose(pairwise, ranking_loss(scores, [ranks]).loss)


def test_ratios_follow_the_unit() -> None:
    ours, theirs = line(OURS, "s", [2, 3, 10], [4.0]), line("peer", "s", [6, 7, 6], [8.0])
    assert (speedup(ours, theirs), memory_ratio(ours, theirs)) == (2.0, 0.5)
    assert speedup(line(OURS, "tokens/s", [300]), line("peer", "tokens/s", [100])) == 3.0
    assert speedup(ours, line("peer", "s", [])) is None
    assert memory_ratio(ours, line("peer", "s", [1])) is None


def test_table_shows_medians_ratios_and_reasons() -> None:
    failed = Line("part", "case", "other", "s", note="not run: no time was left")
    lines = [line(OURS, "s", [2, 3, 10], [4.0]), line("peer", "s", [6, 7, 6], [8.0]), failed]
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in render(lines).splitlines()]
    assert rows[2] == ["part", "case", OURS, "3", "2-10", "s", "", "4.00 GB", "", ""]
    assert rows[3] == ["part", "case", "peer", "6", "6-7", "s", "2.00x", "8.00 GB", "0.50x", ""]
    assert rows[4] == ["part", "case", "other", "-", "", "s", "", "", "", "not run: no time was left"]
    assert as_json(lines)[1]["speedup_of_ours"] == 2.0
    json.dumps(as_json(lines))


def test_growth_is_relative_to_the_smallest_of_its_kind() -> None:
    lines = [Line("growth", f"{p}, batch {n}", OURS, "s/TFLOP", [v]) for p, n, v in [("a", 8, 2.0), ("a", 64, 3.0)]]
    relative_growth(lines)
    assert [each.note for each in lines] == ["x1.00 of the smallest", "x1.50 of the smallest"]


def test_a_side_that_fails_has_a_reason_and_the_others_run(tmp_path: Path) -> None:
    def job(**changes: object) -> Job:
        options = {"part": "p", "case": "c", "side": "peer", "module": "measure", "order": {}, "reads": {}}
        return Job(**(options | changes))  # type: ignore[arg-type]

    jobs = [job(python="/nowhere/python"), job(module="nothing"), job(skip="not run: no such CPU"), job(module="pairs")]
    why = run_all(jobs[:3], 2, tmp_path, float("inf"))
    assert "environment is missing" in why[0]
    assert "No module named" in why[1]
    assert why[2] == "not run: no such CPU"
    assert run_all([job()], 1, tmp_path, 0.0)[0] == "not run: no time was left"
    assert "stopped after 0 s" in run(job(python=sys.executable, module="flops"), tmp_path, 1e-3)


@pytest.mark.parametrize("path", sorted(PEERS.glob("*.py")), ids=lambda path: path.stem)
def test_peers_do_not_import_ours(path: Path) -> None:
    imported = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module or "")
    known = ("benchmarks.measure", "benchmarks.pairs", "benchmarks.stepclock", "benchmarks.flops")
    assert not [name for name in imported if name.split(".")[0] in ("rlhf", "stages", "launch")]
    assert not [name for name in imported if name.startswith("benchmarks") and name not in known]
