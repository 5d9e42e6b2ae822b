"""`rlhf label RUN`: serve the labelling page without the pipeline, export the rankings so far, and revoke links.

The rank stage decides which outputs are ranked and for whom it waits, and it may be waiting while this runs. So nothing
here takes a labeler from those for whom it waits, or gives it other outputs.
"""

from __future__ import annotations

import time
from pathlib import Path

from rlhf.config import Recipe
from rlhf.data.records import Drops, write_jsonl
from rlhf.errors import UserError
from rlhf.labeling.outputs import read_outputs
from rlhf.labeling.page.collect import LABELS, OUTPUTS, open_store, report_set_aside, serve_page, wait_for_rankings
from rlhf.labeling.page.store import LabelStore
from rlhf.labeling.page.stored_ranking import labelled_row
from rlhf.recipe import load_recipe
from rlhf.run.folder import RunFolder, live_owner
from rlhf.system.console import console, show_drops

RANKINGS = "rank/rankings.jsonl"


def settings(run: Path, labelers: str | None = None, host: str | None = None, port: int | None = None) -> Recipe:
    """Return the run's recipe with the page's settings; raise UserError for an invalid name of a labeler."""
    names = f"[{labelers}]" if labelers is not None else None
    given = {"label.labelers": names, "label.host": host, "label.port": port}
    overrides = [f"{name}={value}" for name, value in given.items() if value is not None]
    own = run / "recipe.yaml"  # a folder made by hand has no recipe: the defaults of the label section serve
    return load_recipe(str(own) if own.is_file() else "demo", overrides)


def serve(run: Path, recipe: Recipe) -> None:
    """Serve the page until Ctrl-C, for `label.labelers` and for those who are invited already.

    Raises UserError when there are no outputs, they cannot be read, or the page cannot be served.
    """
    outputs_of(run)  # raises before the labels are opened, which would create their file
    with open_store(run, recipe.label, recipe.run.seed) as store:
        prepare(run, store)
        try:
            with serve_page(store, run.resolve().name):
                if RunFolder(run).is_done("rank"):
                    console.print(what_next(run, recipe), markup=False, soft_wrap=True)
                wait_for_rankings(store.counts, lambda: False)
                console.print(
                    "All rankings that are wanted are in: `rlhf run` continues with them. Ctrl-C ends the page."
                )
                while True:
                    time.sleep(3600)
        finally:
            console.print(f"{store.counts().rankings} rankings are in", markup=False)


def outputs_of(run: Path) -> Path:
    """Return the file of outputs to rank: those for people, else those another labeler ranked; else raise UserError."""
    for path in (run / OUTPUTS, run / RANKINGS):
        if path.is_file():
            return path
    raise UserError(
        "the run has no outputs to rank",
        str(run / OUTPUTS),
        "sample them: `rlhf run RECIPE run.name=NEW rank.labeler=human`; or put a file of prompts and responses there",
    )


def what_next(run: Path, recipe: Recipe) -> str:
    """Return a sentence on how rankings are used that come in after the rank stage has ended."""
    if recipe.rank.labeler == "human":
        return "The rank stage has ended: it uses further rankings when it is done again (--from rank)"
    return (
        f"This run was ranked by {recipe.rank.labeler}. To train on what is ranked here: `rlhf label {run} --export "
        "mine.jsonl`, and a new run with rank.labeler=file 'data.rankings=[mine.jsonl]' evaluate.labeler=reward_model"
    )


def prepare(run: Path, store: LabelStore) -> None:
    """Invite the store's labelers beside the others, and set the tasks; raise UserError for unreadable outputs."""
    # While the rank stage runs, the tasks are the ones that it waits for. Otherwise the file may have changed.
    if live_owner(run) is None or not store.has_tasks():
        drops = Drops()
        outputs = read_outputs([str(outputs_of(run))], drops)
        show_drops(drops.table())
        store.set_tasks(outputs)
    store.invite(store.label.labelers, besides=True)
    report_set_aside(store)


def revoke_links(run: Path, recipe: Recipe, names: str) -> None:
    """Make all links of some labelers (`names`, separated by commas) invalid, even on a page that is being served.

    Their rankings count. Raises UserError when the run has no labels, and for an unknown labeler.
    """
    revoked = [name.strip() for name in names.split(",") if name.strip()]
    with open_store(_labels(run), recipe.label, recipe.run.seed) as store:
        known = store.known()
        if unknown := [name for name in revoked if name not in known] or ([] if revoked else [names]):
            fix = f"name some of {', '.join(known)}" if known else "nobody has a link yet"
            raise UserError(f"no labeler is called {', '.join(map(repr, unknown))}", str(run / LABELS), fix)
        store.revoke(revoked)
    who = ", ".join(revoked)
    console.print(
        f"The links of {who} are no longer valid. Their rankings stay, and a run that waits for them still does:"
        f" `rlhf label {run} --labelers {','.join(revoked)}` prints new links.",
        markup=False,
        soft_wrap=True,
    )


def export_rankings(run: Path, recipe: Recipe, file: Path) -> None:
    """Write the rankings of the current outputs so far, as rows of a file of rankings.

    Raises UserError when the run has no labels, and when the file exists or cannot be written.
    """
    if file.exists():
        raise UserError("the file exists already, and is not overwritten", str(file), "name another, or delete it")
    with open_store(_labels(run), recipe.label, recipe.run.seed) as store:
        report_set_aside(store)
        rows = [labelled_row(item) for item in store.rankings()]
    try:
        write_jsonl(file, rows)
    except OSError as error:
        raise UserError(f"the file cannot be written: {error}", str(file), "check the folder") from None
    console.print(f"{file}: {len(rows)} rankings", markup=False, soft_wrap=True)


def _labels(run: Path) -> Path:
    """Return the run if it has labels; otherwise raise UserError, since opening them would create the file."""
    if not (run / LABELS).is_file():
        raise UserError("nobody has ranked anything in this run", str(run / LABELS), "serve the page: `rlhf label RUN`")
    return run
