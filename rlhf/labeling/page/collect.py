"""Serve the labelling page and wait for people: for `rank.labeler=human` in the rank stage, and for `rlhf label RUN`.

    runs/<name>/rank/outputs.jsonl    the outputs to rank      rlhf/labeling/outputs.py
    runs/<name>/labels.sqlite         the answers of people    rlhf/labeling/page/store.py

The rank stage and `rlhf label` may serve the page at the same time, each at its own address, from the same file. The
rank stage decides which outputs are ranked and for whom the run waits; `rlhf label` only adds labelers.
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
from rlhf.labeling.base import pooled_agreement
from rlhf.labeling.outputs import Outputs, RankResult, outputs_row
from rlhf.labeling.page.presence import Presence
from rlhf.labeling.page.store import Counts, LabelStore, task_key
from rlhf.labeling.page.stored_ranking import StoredRanking
from rlhf.system.console import Progress, console
from rlhf.system.phases import heartbeat, phase
from rlhf.system.ranks import is_main_process

if TYPE_CHECKING:
    from rlhf.run.stage import StageContext

LABELS = "labels.sqlite"
OUTPUTS = "rank/outputs.jsonl"
POLL_SECONDS = 0.5  # seconds between looks at the file
GRACE = 30.0  # seconds; an open page looks again every 15 s (POLL in static/page.js)


@contextmanager
def open_store(run: Path, label: LabelSection, seed: int) -> Iterator[LabelStore]:
    """Open the labels of a run while the block lasts."""
    store = LabelStore(run / LABELS, label, seed)
    try:
        yield store
    finally:
        store.close()


def report_set_aside(store: LabelStore) -> None:
    """Print the number of rankings of outputs that are not current, if there are any."""
    if aside := store.count_set_aside():
        console.print(f"{aside} rankings of other outputs stay in {store.path} and are not used", soft_wrap=True)


@contextmanager
def serve_page(store: LabelStore, title: str) -> Iterator[Presence]:
    """Serve the page while the block lasts, and print a link for each of `label.labelers`; yield who is at the page."""
    from rlhf.labeling.page.server import is_loopback, serving  # FastAPI takes long to import

    label, presence = store.label, Presence()
    with serving(store, title, label.host, label.port, presence) as address:
        console.print("The labelling page, a link for each labeler (earlier links stay valid):", soft_wrap=True)
        for name in label.labelers:
            console.print(f"  {name}  {address}#{store.new_token(name)}", markup=False, soft_wrap=True)
        if not is_loopback(label.host):
            console.print("It is open to the network, without encryption: whoever has a link can rank.")
        yield presence


def wait_for_rankings(look: Callable[[], Counts], stopped: Callable[[], bool]) -> bool:
    """Show how many rankings are in until all that are wanted are; return False if `stopped()` ended it before."""
    counts = look()
    with Progress("rank: people", total=counts.wanted, unit="rankings", initial=counts.rankings) as progress:
        while not counts.complete:
            if stopped():
                return False
            time.sleep(POLL_SECONDS)
            counts = look()
            heartbeat()  # the watchdog of a distributed run must not take the wait for a hang
            progress.total = counts.wanted  # falls when everybody has skipped a prompt
            if counts.rankings != progress.done:
                progress.advance(counts.rankings - progress.done)
    return True


def wait_until_notified(not_notified: Callable[[], bool], stopped: Callable[[], bool]) -> bool:
    """Wait until everybody knows that all rankings are in; return False if `stopped()` ended it before."""
    while not_notified():
        if stopped():
            return False
        time.sleep(POLL_SECONDS)
        heartbeat()
    return True


def rankings_by_people(ctx: StageContext, outputs: Sequence[Outputs], grace: float = GRACE) -> RankResult | None:
    """Have the outputs ranked on the page; return None when a stop is requested, and the rankings stay in the file.

    When all rankings that are wanted are in, the page stays, and takes more, until those who were at it lately know,
    for `grace` seconds at most. Of several processes the main one serves the page, and all return the same.
    """
    from rlhf.system.distributed import broadcast_from_main  # torch, which `rlhf label` does without

    recipe, main = ctx.recipe, is_main_process()
    phase("labelling")
    with ExitStack() as stack:
        store: Any = None
        if main:
            write_jsonl(ctx.run.path / OUTPUTS, [outputs_row(each) for each in outputs])
            store = stack.enter_context(open_store(ctx.run.path, recipe.label, recipe.run.seed))
            store.set_tasks(outputs)
            store.invite(recipe.label.labelers)
            report_set_aside(store)

        def look() -> Counts:
            return broadcast_from_main(lambda: store.counts())

        while not look().complete:
            with serve_page(store, recipe.run.name) if main else nullcontext() as presence:
                if not serve_until_notified(look, presence, grace, lambda: ctx.stop_requested):
                    return None
            # The page is closed, so nobody can take back a ranking any more, unless somebody did a moment ago.
        labelled, about_labels = broadcast_from_main(lambda: (store.rankings(), summary(store)))
    lengths = {each: each.lengths for each in outputs}
    return RankResult(
        [item.outputs.ranked(item.ranks) for item in labelled],
        [lengths[item.outputs] for item in labelled],
        {"noise_sigma": 0.0} | about_labels,
        [item.extras for item in labelled],
    )


def serve_until_notified(
    look: Callable[[], Counts], presence: Presence | None, grace: float, stopped: Callable[[], bool]
) -> bool:
    """Wait until all rankings are in and those at the page know it; return False if `stopped()` ended it before.

    A ranking that is taken back is waited for again; then the page stays for `grace` seconds at most. `look` returns
    the main process's counts, since all processes must take the same way; `presence` is None on the others.
    """
    from rlhf.system.distributed import broadcast_from_main

    while wait_for_rankings(look, stopped):
        end = time.monotonic() + grace

        def not_notified(end: float = end) -> bool:
            late = broadcast_from_main(
                lambda: presence is not None and time.monotonic() < end and bool(presence.not_notified())
            )
            return late and look().complete

        if not wait_until_notified(not_notified, stopped):
            return False
        if look().complete:
            return True
    return False


def summary(store: LabelStore) -> dict[str, Any]:
    """Return rankings by labeler, skips by reason, the pace, and the agreement on pairs that neither labeler ties."""
    labelled = store.rankings()
    by_task: dict[str, list[StoredRanking]] = {}
    for item in labelled:
        by_task.setdefault(task_key(item.outputs), []).append(item)
    return {
        "labelers": dict(Counter(item.labeler for item in labelled)),
        "skips": store.skips(),
        "seconds_per_ranking": median(item.details["seconds"] for item in labelled) if labelled else None,
        **pooled_agreement((a.ranks, b.ranks) for items in by_task.values() for a, b in combinations(items, 2)),
    }
