"""Serve the labelling page and wait for people: for `rank.labeler=human` in the rank stage, and for `rlhf label RUN`.

    runs/<name>/rank/outputs.jsonl    what is to be ranked        rlhf/labeling/outputs.py
    runs/<name>/labels.sqlite         what people have said       rlhf/labeling/page/store.py

The rank stage and `rlhf label` may serve the page at the same time, each at an address of its own: the file is one.
What is to be ranked, and whom the run waits for, is the rank stage's to say: `rlhf label` only adds labelers.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from rlhf.config import LabelSection
from rlhf.data.records import write_jsonl
from rlhf.labeling.outputs import Outputs, outputs_row
from rlhf.labeling.page.presence import Presence
from rlhf.labeling.page.store import Counts, LabelStore, StoredRanking, task_key
from rlhf.system.console import Progress, console
from rlhf.system.distributed import is_main_process
from rlhf.system.phases import heartbeat, phase

if TYPE_CHECKING:
    from rlhf.run.stage import StageContext

LABELS = "labels.sqlite"
OUTPUTS = "rank/outputs.jsonl"
POLL_SECONDS = 0.5  # seconds between looks at the file
GRACE = 30.0  # seconds, twice what an open page takes to look again (POLL in static/page.js)


@contextmanager
def open_store(run: Path, label: LabelSection, seed: int) -> Iterator[LabelStore]:
    """The labels of a run, as they are."""
    store = LabelStore(run / LABELS, label, seed)
    try:
        yield store
    finally:
        store.close()


def report_set_aside(store: LabelStore) -> None:
    """Print how many rankings are of outputs that are not current."""
    if aside := store.set_aside():
        console.print(f"{aside} rankings of other outputs stay in {store.path} and are not used", soft_wrap=True)


@contextmanager
def serve_page(store: LabelStore, title: str) -> Iterator[Presence]:
    """Serve the page while the block lasts, and print a link for each of `label.labelers`; gives who is at it."""
    from rlhf.labeling.page.server import is_loopback, serving  # FastAPI: where nobody ranks, it is not imported

    label, audience = store.label, Presence()
    with serving(store, title, label.host, label.port, audience) as address:
        console.print("The labelling page, a link for each labeler (earlier links stay good):", soft_wrap=True)
        for name in label.labelers:
            console.print(f"  {name}  {address}#{store.new_token(name)}", markup=False, soft_wrap=True)
        if not is_loopback(label.host):
            console.print("It is open to the network, without encryption: a link is all that it takes to rank.")
        yield audience


def wait_for_rankings(look: Callable[[], Counts], stopped: Callable[[], bool]) -> bool:
    """Show how many rankings are in until all that are wanted are (True), or `stopped()` says so (False)."""
    counts = look()
    with Progress("rank: people", total=counts.wanted, unit="rankings", initial=counts.rankings) as progress:
        while not counts.complete:
            if stopped():
                return False
            time.sleep(POLL_SECONDS)
            counts = look()
            heartbeat()  # nobody's hanging: the watch over a distributed run need not end it
            progress.total = counts.wanted  # what everybody skips is wanted no more
            if counts.rankings != progress.done:
                progress.advance(counts.rankings - progress.done)
    return True


def wait_until_notified(not_notified: Callable[[], bool], stopped: Callable[[], bool]) -> bool:
    """Serve the page until everybody knows that all rankings are in; False if `stopped()` ended it before."""
    while not_notified():
        if stopped():
            return False
        time.sleep(POLL_SECONDS)
        heartbeat()
    return True


def rankings_by_people(
    ctx: StageContext, outputs: Sequence[Outputs], grace: float = GRACE
) -> tuple[list[StoredRanking], dict[str, Any]] | None:
    """Have the outputs ranked on the page; the rankings, and what rank/summary.json says of them.

    When all that are wanted are in, the page stays until those who were at it lately have been told, and what they
    submit meanwhile is taken as well. The first of several processes serves the page, and the others come to the same
    answer.

    Args:
        grace: seconds that the page stays at most when all is in.

    Returns:
        None when the stage was told to stop: what is in stays in the file.
    """
    from rlhf.system.distributed import broadcast_from_main

    recipe, first = ctx.recipe, is_main_process()
    phase("labelling")
    with ExitStack() as stack:
        store: Any = None
        if first:
            write_jsonl(ctx.run.path / OUTPUTS, [outputs_row(each) for each in outputs])
            store = stack.enter_context(open_store(ctx.run.path, recipe.label, recipe.run.seed))
            store.set_tasks(outputs)
            store.invite(recipe.label.labelers)
            report_set_aside(store)

        def look() -> Counts:
            return broadcast_from_main(lambda: store.counts())

        while not look().complete:
            with serve_page(store, recipe.run.name) if first else nullcontext() as audience:
                if not serve_until_notified(look, audience, grace, lambda: ctx.stop_requested):
                    return None
            # The page is closed, and nobody can take a ranking back any more: unless somebody just did, that is all.
        return broadcast_from_main(lambda: (store.rankings(), summary(store)))


def serve_until_notified(
    look: Callable[[], Counts], audience: Presence | None, grace: float, stopped: Callable[[], bool]
) -> bool:
    """Wait until all rankings are in and who is at the page knows it (True), or `stopped()` says so (False).

    A ranking that is taken back meanwhile is waited for again, on the same page.

    Args:
        look: asks the first process, as all that is asked here: several processes must go the same way.
        audience: of the first process; None on the others.
        grace: seconds that the page stays at most when all is in.
    """
    from rlhf.system.distributed import broadcast_from_main

    while wait_for_rankings(look, stopped):
        end = time.monotonic() + grace

        def not_notified(end: float = end) -> bool:
            late = broadcast_from_main(
                lambda: audience is not None and time.monotonic() < end and bool(audience.not_notified())
            )
            return late and look().complete

        if not wait_until_notified(not_notified, stopped):
            return False
        if look().complete:
            return True
    return False


def summary(store: LabelStore) -> dict[str, Any]:
    """Who ranked how much, how often prompts were skipped and why, and how far labelers agree on what they share.

    Agreement is over the pairs of outputs that two labelers have both left untied.
    """
    from rlhf.labeling.base import agreement  # imports torch, which `rlhf label` does without

    labelled = store.rankings()
    by_task: dict[str, list[StoredRanking]] = {}
    for item in labelled:
        by_task.setdefault(task_key(item.outputs), []).append(item)
    counts = [agreement(a.ranks, b.ranks) for items in by_task.values() for a, b in combinations(items, 2)]
    agreeing, pairs = sum(n for n, _ in counts), sum(n for _, n in counts)
    return {
        "labelers": dict(Counter(item.labeler for item in labelled)),
        "skips": store.skips(),
        "seconds_per_ranking": median(item.about["seconds"] for item in labelled) if labelled else None,
        "agreement": agreeing / pairs if pairs else None,
        "agreement_pairs": pairs,
    }
