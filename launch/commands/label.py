"""`rlhf label RUN`: the labelling page without the pipeline, the rankings so far as a file, and the end of links.

What is to be ranked and whom the run waits for is the rank stage's to say, and the stage may be waiting at this moment:
nothing here takes a labeler from those that it waits for, or gives it other outputs.
"""

from __future__ import annotations

import time
from pathlib import Path

from rlhf.config import Recipe
from rlhf.data.records import Drops, write_jsonl
from rlhf.errors import UserError
from rlhf.labeling.outputs import read_outputs
from rlhf.labeling.page.collect import LABELS, OUTPUTS, open_store, report_set_aside, serve_page, wait_for_rankings
from rlhf.labeling.page.store import LabelStore, labelled_row
from rlhf.recipe import load_recipe
from rlhf.run.folder import RunFolder, live_owner
from rlhf.system.console import console, show_drops

RANKINGS = "rank/rankings.jsonl"


def settings(run: Path, labelers: str | None = None, host: str | None = None, port: int | None = None) -> Recipe:
    """The run's recipe with what the command line says about the page.

    Raises:
        UserError: for a bad name of a labeler.
    """
    given = {
        "label.labelers": f"[{labelers}]" if labelers is not None else None,
        "label.host": host,
        "label.port": port,
    }
    overrides = [f"{name}={value}" for name, value in given.items() if value is not None]
    own = run / "recipe.yaml"  # outputs put there by hand have none: every recipe's label section will do
    return load_recipe(str(own) if own.is_file() else "demo", overrides)


def serve(run: Path, recipe: Recipe) -> None:
    """Serve the page until Ctrl-C, for `label.labelers` beside those who are invited already.

    Raises:
        UserError: for outputs that are not there or cannot be read, and when the page cannot be served.
    """
    outputs_of(run)  # before the labels are opened, which makes their file
    with open_store(run, recipe.label, recipe.run.seed) as store:
        prepare(run, store)
        try:
            with serve_page(store, run.resolve().name):
                if RunFolder(run).is_done("rank"):
                    console.print(what_next(run, recipe), markup=False, soft_wrap=True)
                wait_for_rankings(store.counts, lambda: False)
                console.print(
                    "All rankings that are wanted are in: `rlhf run` goes on with them. Ctrl-C ends the page."
                )
                while True:
                    time.sleep(3600)
        finally:
            console.print(f"{store.counts().rankings} rankings are in", markup=False)


def outputs_of(run: Path) -> Path:
    """The file of what is to be ranked: what the rank stage gave out, else what another labeler has ranked there.

    Raises:
        UserError: when the run has neither.
    """
    for path in (run / OUTPUTS, run / RANKINGS):
        if path.is_file():
            return path
    raise UserError(
        "the run has no outputs to rank",
        str(run / OUTPUTS),
        "sample them: `rlhf run RECIPE run.name=NEW rank.labeler=human`; or put a file of prompts and responses there",
    )


def what_next(run: Path, recipe: Recipe) -> str:
    """What becomes of rankings that come in after the rank stage has ended."""
    if recipe.rank.labeler == "human":
        return "The rank stage has ended: it uses further rankings when it is done again (--from rank)"
    return (
        f"This run was ranked by {recipe.rank.labeler}. To train on what is ranked here: `rlhf label {run} --export "
        "mine.jsonl`, and a new run with rank.labeler=file 'data.rankings=[mine.jsonl]' evaluate.labeler=reward_model"
    )


def prepare(run: Path, store: LabelStore) -> None:
    """Invite the labelers of the store's settings besides the others, and see that there is something to rank.

    Raises:
        UserError: for outputs that cannot be read.
    """
    # The rank stage has set the outputs that it waits for; where it does not run, the file may have been changed.
    if live_owner(run) is None or not store.has_tasks():
        drops = Drops()
        outputs = read_outputs([str(outputs_of(run))], drops)
        show_drops(drops.table())
        store.set_tasks(outputs)
    store.invite(store.label.labelers, besides=True)
    report_set_aside(store)


def revoke_links(run: Path, recipe: Recipe, names: str) -> None:
    """End all links of some labelers, also on a page that is served at this moment; their rankings stay and count.

    Args:
        names: with commas between them.

    Raises:
        UserError: when the run has no labels, and for somebody whom they do not know.
    """
    gone = [name.strip() for name in names.split(",") if name.strip()]
    with open_store(_labels(run), recipe.label, recipe.run.seed) as store:
        known = store.known()
        if strange := [name for name in gone if name not in known] or ([] if gone else [names]):
            fix = f"name some of {', '.join(known)}" if known else "nobody has a link yet"
            raise UserError(f"no labeler is called {', '.join(map(repr, strange))}", str(run / LABELS), fix)
        store.revoke(gone)
    who = ", ".join(gone)
    console.print(
        f"The links of {who} are good no more. What they ranked stays, and a run that waits for them still does:"
        f" `rlhf label {run} --labelers {','.join(gone)}` prints new links.",
        markup=False,
        soft_wrap=True,
    )


def export_rankings(run: Path, recipe: Recipe, file: Path) -> None:
    """Write the rankings so far, in the ranking contract: those of the outputs that were ranked on the page last.

    Raises:
        UserError: when the run has no labels, and when the file is there already or cannot be written.
    """
    if file.exists():
        raise UserError("the file is there already, and is not overwritten", str(file), "name another, or delete it")
    with open_store(_labels(run), recipe.label, recipe.run.seed) as store:
        report_set_aside(store)
        rows = [labelled_row(item) for item in store.rankings()]
    try:
        write_jsonl(file, rows)
    except OSError as error:
        raise UserError(f"the file cannot be written: {error}", str(file), "check the folder") from None
    console.print(f"{file}: {len(rows)} rankings", markup=False, soft_wrap=True)


def _labels(run: Path) -> Path:
    """The run, which has labels: opening them must not make a file."""
    if not (run / LABELS).is_file():
        raise UserError("nobody has ranked anything in this run", str(run / LABELS), "serve the page: `rlhf label RUN`")
    return run
