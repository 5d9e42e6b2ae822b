"""`rlhf label RUN`: the labelling page without the pipeline, and the rankings so far as a file."""

from __future__ import annotations

import time
from pathlib import Path

from rlhf.config import Recipe
from rlhf.errors import UserError
from rlhf.label_store import labelled_row
from rlhf.label_wait import OUTPUTS, opened, page, wait
from rlhf.outputs import read_outputs
from rlhf.progress import console
from rlhf.recipe import load_recipe
from rlhf.records import Drops, write_jsonl
from rlhf.rundir import RunFolder


def settings(run: Path, labelers: str = "", host: str | None = None, port: int | None = None) -> Recipe:
    """The run's recipe with what the command line says about the page.

    Raises:
        UserError: for a folder without outputs to rank, and for a bad name of a labeler.
    """
    if not (run / OUTPUTS).is_file():
        raise UserError(
            "the run has no outputs to rank",
            str(run / OUTPUTS),
            "sample them with `rlhf run RECIPE rank.labeler=human`, or put a file of prompts and responses there",
        )
    given = {"label.labelers": f"[{labelers}]" if labelers else None, "label.host": host, "label.port": port}
    overrides = [f"{name}={value}" for name, value in given.items() if value is not None]
    own = run / "recipe.yaml"  # outputs put there by hand have none: every recipe's label section will do
    return load_recipe(str(own) if own.is_file() else "demo", overrides)


def serve(run: Path, recipe: Recipe, revoke: bool = False) -> None:
    """Serve the page until Ctrl-C.

    Args:
        revoke: whether the labelers' earlier links end.
    """
    outputs = read_outputs([str(run / OUTPUTS)], Drops())
    title = run.resolve().name
    with opened(run, recipe.label, recipe.run.seed, outputs) as store:
        if revoke:
            store.revoke(recipe.label.labelers)
        try:
            with page(store, title):
                if RunFolder(run).is_done("rank"):
                    console.print(
                        "The rank stage has ended: it uses further rankings when it is done again (--from rank)"
                    )
                wait(store.counts, lambda: False)
                console.print(
                    "All rankings that are wanted are in: `rlhf run` goes on with them. Ctrl-C ends the page."
                )
                while True:
                    time.sleep(3600)
        finally:
            console.print(f"{store.counts().rankings} rankings are in", markup=False)


def export(run: Path, recipe: Recipe, file: Path) -> None:
    """Write the rankings so far, in the ranking contract.

    Raises:
        UserError: when the file is there already.
    """
    if file.exists():
        raise UserError("the file is there already, and is not overwritten", str(file), "name another, or delete it")
    outputs = read_outputs([str(run / OUTPUTS)], Drops())
    with opened(run, recipe.label, recipe.run.seed, outputs) as store:
        rows = [labelled_row(item) for item in store.rankings()]
    write_jsonl(file, rows)
    console.print(f"{file}: {len(rows)} rankings", markup=False, soft_wrap=True)
