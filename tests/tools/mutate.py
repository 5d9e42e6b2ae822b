"""Do the tests see a wrong formula? `python tests/tools/mutate.py [--quick] [--only TEXT] [--list]`

Changes one operator, constant, mask or argument at a time in the arithmetic of the objectives, runs the tests of that
file, and requires that at least one fails. Exits with 1 when a mutant survives, or when an entry of EQUIVALENT matches
none.

The mutants are made through ast, in memory: nothing on disk changes. torch is imported once; each mutant is a fork of
this process that puts its module into sys.modules before pytest imports the tests.
"""

from __future__ import annotations

import argparse
import ast
import copy
import gc
import importlib
import os
import signal
import sys
import tempfile
import time
import types
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # a fork of a process with a thread pool may hang
os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this program is run by its path
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import pytest
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from support.paths import ROOT, TESTS
from tools.mutations import Edit, edits

TARGETS = {
    "rlhf.functional.ppo": ["functional/test_ppo.py"],
    "rlhf.functional.ranking": ["functional/test_ranking.py"],
    "rlhf.rollout.experience": ["rollout/test_experience.py"],
    "stages.ppo": ["rollout/test_experience.py"],
    "rlhf.functional.judge_odds": ["functional/test_judge_odds.py"],
    "rlhf.functional.agreement": ["functional/test_agreement.py"],
    "rlhf.functional.statistics": ["functional/test_statistics.py"],
}
FORMULAS = {"stages.ppo": {"advantages"}}  # of a module whose other functions are no arithmetic
LIMIT_S = 60  # a mutant that hangs counts as seen
QUICK = 12

# Mutants that compute the same numbers, by (function, change), each with the reason; (2) is the second such change.
EQUIVALENT = {
    ("gae", "torch.where(mask, rewards, zeros)  ->  rewards"): "the running advantage is masked again at every step",
    (
        "gae",
        "torch.where(mask[:, t], delta + gamma * lam * running, torch.zeros_like(running))"
        "  ->  delta + gamma * lam * running",
    ): "rewards and values are zero on padding, so the running advantage stays zero there",
    ("gae", "torch.zeros_like(rewards)  ->  torch.ones_like(rewards) (2)"): "every column of the result is assigned",
    (
        "whiten",
        "mask.sum().to(torch.float64).clamp(min=1)  ->  mask.sum().to(torch.float64)",
    ): "without real tokens the whole result is masked, nan or not",
    ("whiten", "values.double() - mean  ->  mean - values.double()"): "squared",
    (
        "policy_loss",
        "masked_sum((clipped > plain).to(ratio.dtype), mask)  ->  (clipped > plain).to(ratio.dtype).sum()",
    ): "the ratio on padding is exactly 1, where neither branch is the larger",
    ("policy_loss", "ratio - 1  ->  1 - ratio"): "taken as an absolute value",
    ("value_loss", "torch.zeros_like(x)  ->  torch.ones_like(x)"): "any value that equals its target has no error",
    ("value_loss", "values - returns  ->  returns - values"): "squared",
    ("value_loss", "bounded - returns  ->  returns - bounded"): "squared",
    ("explained_variance", "int(mask.sum()) == 0  ->  int(mask.sum()) == 1"): "one return does not vary: 0 both ways",
    ("explained_variance", "returns - values  ->  values - returns"): "only its variance is used",
    (
        "explained_variance",
        "variance.clamp(min=1e-12)  ->  variance",
    ): "a variance of 0 is caught by the where around it",
    ("ema_update", "parameters[name].detach()  ->  parameters[name]"): "the function runs without gradients",
    ("tally", "a1 < b1  ->  a1 <= b1"): "ties are counted before",
    ("tally", "a2 < b2  ->  a2 <= b2"): "ties are counted before",
    ("ratio", "a - value * b  ->  value * b - a"): "squared",
    (
        "cluster_bootstrap",
        "max(means) - min(means) < 1e-12  ->  max(means) - min(means) <= 1e-12",
    ): "no gap is exactly that",
    ("cluster_bootstrap", "means[0]  ->  means[1]"): "all means are equal there",
    ("length_matched_win_rate", "a - b  ->  b - a"): "taken as an absolute value",
    ("ratio", "float(np.ptp(a / b)) < 1e-12  ->  float(np.ptp(a / b)) <= 1e-12"): "no gap is exactly that",
    ("alpha_ordinal", "for unit in units if len(unit) > 1  ->  for unit in units"): "a value alone is in no pair",
    ("alpha_ordinal", "len(unit) > 1  ->  len(unit) >= 1"): "a value alone is in no pair",
    ("alpha_ordinal", "coincidences.sum(0)  ->  coincidences.sum(1)"): "symmetric",
    ("alpha_ordinal", "totals.cumsum() - totals / 2  ->  totals / 2 - totals.cumsum()"): "distances are squared",
    ("alpha_ordinal", "middle[:, None] - middle[None, :]  ->  middle[None, :] - middle[:, None]"): "squared",
    ("alpha_ordinal", "expected > 0  ->  expected >= 0"): "0 / 0 is nan as well",
    ("ranking_loss", "strict=True  ->  strict=False"): "the split has one part for every group by construction",
    ("calibrated", "strict=True  ->  strict=False"): "both have an entry for each label",
    ("sigmoid", "x >= 0  ->  x > 0"): "at 0 both branches are one half",
    ("sigmoid", "x >= 0  ->  x >= 1"): "the two branches are one function; they differ in where they overflow",
    (
        "calibration_error",
        "row['accuracy'] - row['confidence']  ->  row['confidence'] - row['accuracy']",
    ): "taken as an absolute value",
}


@dataclass(frozen=True)
class Mutant:
    """One change: `edit` takes the node at position `index` of ast.walk(module) to its replacement."""

    module: str
    function: str
    line: int
    before: str
    after: str
    occurrence: int  # among equal changes in one function, from 1
    index: int
    edit: Edit

    @property
    def change(self) -> str:
        again = f" ({self.occurrence})" if self.occurrence > 1 else ""
        return f"{self.before}  ->  {self.after}{again}"


# --- making them ------------------------------------------------------------------------------------------------------


def source_of(module: str) -> Path:
    return ROOT / (module.replace(".", "/") + ".py")


def arithmetic(tree: ast.Module) -> Iterator[tuple[str, ast.AST]]:
    """(function, node) of every node in the body or the defaults of a function; annotations and texts are left out."""

    def walk(node: ast.AST) -> Iterator[ast.AST]:
        yield node
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            for child in value if isinstance(value, list) else [value]:
                # What an error says is no arithmetic.
                if isinstance(child, ast.AST) and not isinstance(child, (ast.Raise, ast.JoinedStr)):
                    yield from walk(child)

    def functions(parent: ast.AST, prefix: str) -> Iterator[tuple[str, ast.AST]]:
        for child in ast.iter_child_nodes(parent):
            if isinstance(child, ast.ClassDef):
                yield from functions(child, f"{child.name}.")
            elif isinstance(child, ast.FunctionDef):
                for node in walk(child):
                    yield prefix + child.name, node

    yield from functions(tree, "")


def make_mutants(module: str) -> list[Mutant]:
    tree = ast.parse(source_of(module).read_text())
    places = {id(node): i for i, node in enumerate(ast.walk(tree))}
    parents = {id(child): node for node in ast.walk(tree) for child in ast.iter_child_nodes(node)}
    mutants, seen, occurrences = [], set(), Counter()
    for function, node in arithmetic(tree):
        if isinstance(node, ast.FunctionDef) or function not in FORMULAS.get(module, {function}):
            continue
        for edit in edits(node):
            changed = edit(copy.deepcopy(node))
            # A number says little without what is around it.
            shown = parents[id(node)] if isinstance(node, ast.Constant) else node
            after = first_line(replaced(shown, node, changed))
            place, before = places[id(node)], first_line(shown)
            if (place, ast.dump(changed)) in seen:
                continue
            seen.add((place, ast.dump(changed)))
            occurrences[function, before, after] += 1
            n = occurrences[function, before, after]
            mutants.append(Mutant(module, function, line_of(node), before, after, n, place, edit))
    return mutants


def replaced(tree: ast.AST, node: ast.AST, by: ast.AST) -> ast.AST:
    """A copy of `tree` with `by` in the place of `node`."""
    index = next(i for i, x in enumerate(ast.walk(tree)) if x is node)
    tree = copy.deepcopy(tree)
    target = list(ast.walk(tree))[index]

    class Replace(ast.NodeTransformer):
        def visit(self, x: ast.AST) -> ast.AST:
            return by if x is target else self.generic_visit(x)

    return Replace().visit(tree)


def line_of(node: ast.AST) -> int:
    return getattr(node, "lineno", None) or node.target.lineno  # type: ignore[attr-defined]


def first_line(node: ast.AST) -> str:
    """The node as text, an if without its body."""
    return ast.unparse(ast.fix_missing_locations(node)).splitlines()[0].strip()


def mutated_module(mutant: Mutant) -> types.ModuleType:
    """The module with the change in it, executed and put in place of the real one."""
    path = source_of(mutant.module)
    tree = ast.parse(path.read_text())
    node = list(ast.walk(tree))[mutant.index]
    tree = replaced(tree, node, mutant.edit(copy.deepcopy(node)))
    module = types.ModuleType(mutant.module)
    module.__file__ = str(path)
    sys.modules[mutant.module] = module
    package, _, name = mutant.module.rpartition(".")
    setattr(importlib.import_module(package), name, module)
    exec(compile(ast.fix_missing_locations(tree), str(path), "exec"), module.__dict__)
    return module


# --- running them -----------------------------------------------------------------------------------------------------


class FirstFailure:
    """A pytest plugin that remembers the first test that failed."""

    def __init__(self) -> None:
        self.name = ""

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed and not self.name:
            self.name = report.nodeid.rpartition("::")[2]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed and not self.name:
            self.name = f"import of {Path(report.nodeid).name}"


def run_tests(module: str) -> str:
    """The name of the first failing test, or an empty string."""
    plugin = FirstFailure()
    files = [str(next(TESTS.rglob(name))) for name in TARGETS[module]]
    # Not the comparison with TRL: every mutant is to fall to numbers worked by hand.
    options = ["-x", "-q", "--tb=no", "--noconftest", "-k", "not trl", "-c", os.devnull]
    options += [f"-pno:{plugin}" for plugin in ("cacheprovider", "logging", "junitxml", "doctest", "unittest")]
    code = pytest.main([*options, f"--rootdir={ROOT}", *files], plugins=[plugin])
    if code and not plugin.name:
        return f"pytest ended with {code}"
    return plugin.name


def in_fork(module: str, mutant: Mutant | None) -> str:
    """Run a mutant (None: the module as it is) in a child process: what failed, or an empty string."""
    with tempfile.TemporaryFile("w+") as result:
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                signal.alarm(LIMIT_S)
                quiet = os.open(os.devnull, os.O_WRONLY)
                os.dup2(quiet, 1)
                os.dup2(quiet, 2)
                try:
                    if mutant:
                        mutated_module(mutant)
                    killer = run_tests(module)
                except Exception as error:
                    killer = f"import fails: {type(error).__name__}"
                result.write(killer)
                result.flush()
                status = 0
            finally:
                os._exit(status)
        _, status = os.waitpid(pid, 0)
        if status:
            return f"ended by signal {os.WTERMSIG(status)}" if os.WIFSIGNALED(status) else "child failed"
        result.seek(0)
        return result.read()


def preload() -> None:
    """Import what the tests import, other than the modules under test and what depends on them."""
    names = ["torch", "numpy", "transformers", "datasets", "rlhf.rollout.sampling", "rlhf.rollout.scoring"]
    for name in [*names, "rlhf.models.loading", "rlhf.models.tiny"]:
        importlib.import_module(name)
    import torch

    torch.set_num_threads(1)
    gc.freeze()  # a collection in a child would copy every page
    loaded = sorted(set(TARGETS) & set(sys.modules))
    if loaded:
        raise SystemExit(f"{loaded} are imported already: a mutant would not reach their users")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"about {QUICK} mutants, spread over all of them")
    parser.add_argument("--only", default="", help="mutants whose line in the table contains this text")
    parser.add_argument("--list", action="store_true", help="print the mutants and run nothing")
    arguments = parser.parse_args()
    console = Console(width=170)

    mutants = [mutant for module in TARGETS for mutant in make_mutants(module)]
    keys = {(m.function, m.change) for m in mutants}
    stale = [key for key in EQUIVALENT if key not in keys]
    live = [m for m in mutants if (m.function, m.change) not in EQUIVALENT]
    excused = len(mutants) - len(live)
    live = [m for m in live if arguments.only in f"{m.module} {m.function} {m.change}"]
    if arguments.quick:
        live = live[:: max(1, len(live) // QUICK)][:QUICK]
    if arguments.list:
        for m in live:
            print(f"{m.module.split('.')[1]}.py:{m.line}\t{m.function}\t{m.change}")
        return 0

    preload()
    for module in TARGETS:
        if failed := in_fork(module, None):
            console.print(f"the tests of {module} fail without any change ({failed}); mend that first", markup=False)
            return 1
    begin, survivors = time.perf_counter(), 0
    table = Table("place", "function", "mutant", "killed by")
    for i, mutant in enumerate(live, 1):
        killer = in_fork(mutant.module, mutant)
        survivors += not killer
        place = f"{mutant.module.split('.')[1]}.py:{mutant.line}"
        table.add_row(place, mutant.function, escape(mutant.change), escape(killer) or "[bold red]SURVIVES")
        if not killer or i % 25 == 0:
            console.print(f"{i}/{len(live)} {place} {'SURVIVES: ' + mutant.change if not killer else ''}", markup=False)
    console.print(table)
    seconds = time.perf_counter() - begin
    console.print(f"{len(live)} mutants in {seconds:.0f} s: {survivors} survive; {excused} equivalent ones left out")
    for key in stale:
        console.print(f"EQUIVALENT names a mutant that is no more: {key}", markup=False)
    return 1 if survivors or stale else 0


if __name__ == "__main__":
    raise SystemExit(main())
