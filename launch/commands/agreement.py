"""`rlhf agreement`: measure how far labelers agree; and `rlhf convert`. Both read all that data.rankings can name."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from rlhf.data.records import Drops, Ranking, ranking_row, read_rankings, write_jsonl
from rlhf.errors import UserError
from rlhf.functional.agreement import (
    CONVENTIONS,
    HEADLINE,
    AgreementEstimate,
    LabelerPair,
    alpha,
    kendall,
    labeler_pairs,
    pairs_of_labeler,
    pairwise,
    time_windows,
)
from rlhf.labeling.matched_rankings import MatchedRankings, match
from rlhf.system.console import console, show_drops, table

NAMES = {  # of the tie conventions in the table
    "untied": "agreement, tied pairs left out",
    "strict": "agreement, a tie agrees with a tie alone",
    "half": "agreement, a tie against an order is half",
}


def print_agreement(files: Sequence[str], parts: int = 5, seed: int = 0, as_json: bool = False) -> None:
    """Print the agreement of the labelers of some files, or write it as JSON to standard output.

    Raises UserError for a file that cannot be read, or when no outputs were ranked by two labelers.
    """
    drops = Drops()
    found = match(_named(files, drops))
    if not as_json:
        show_drops(drops.table())
    if not found.shared:
        raise _nothing_shared(files, found)
    result = report(found, parts, seed) | {"dropped": dict(drops.table())}
    if as_json:
        print(json.dumps(_plain(result), indent=1, ensure_ascii=False))
        return
    if found.repeats:
        console.print(f"dropped {found.repeats}: ranked again by the same labeler, whose last ranking counts")
    _tables(result)


def report(found: MatchedRankings, parts: int, seed: int) -> dict[str, Any]:
    """Return all measures of the labelers' agreement, which rlhf/functional/agreement.py explains."""
    compared = labeler_pairs(found.shared)
    names = sorted(found.rankings)
    return {
        "labelers": len(names),
        "outputs": found.outputs,
        "outputs_shared": len(found.shared),
        "repeats": found.repeats,
        "units": sum(len(next(iter(item.ranks.values()))) for item in found.shared),
        "pairwise": {ties: pairwise(compared, ties, seed) for ties in CONVENTIONS},
        "kendall_tau_b": kendall(compared, seed),
        "krippendorff_alpha": alpha(found.shared),
        "by_labeler": [_labeler(found, compared, name, parts, seed) for name in names],
        "by_pair": _pairs(compared),
        "over_time": _over_time(compared, parts, seed),
        "without_time": sum(c.time is None for c in compared),
    }


def _labeler(
    found: MatchedRankings, compared: Sequence[LabelerPair], name: str, parts: int, seed: int
) -> dict[str, Any]:
    own = pairs_of_labeler(compared, name)
    shared = [item.ranks[name] for item in found.shared if name in item.ranks]
    pairs = sum(len(ranks) * (len(ranks) - 1) // 2 for ranks in shared)
    ordered = sum(len([1 for a in ranks for b in ranks if a < b]) for ranks in shared)
    return {
        "labeler": name,
        "rankings": found.rankings[name],
        "shared": len(shared),
        "ties": 1 - ordered / pairs if pairs else math.nan,
        "agreement": pairwise(own, HEADLINE, seed),
        "kendall_tau_b": kendall(own, seed),
        "over_time": _over_time(own, parts, seed),
    }


def _pairs(compared: Sequence[LabelerPair]) -> list[dict[str, Any]]:
    """Return the counts of every two labelers, summed over the outputs that both ranked."""
    sums: dict[tuple[str, str], dict[str, int]] = {}
    for c in compared:
        counts = sums.setdefault((c.first, c.second), {"rankings": 0} | dict.fromkeys(c.tally._fields, 0))
        for name, n in {"rankings": 1, **c.tally._asdict()}.items():
            counts[name] += n
    return [{"first": first, "second": second} | counts for (first, second), counts in sorted(sums.items())]


def _over_time(compared: Sequence[LabelerPair], parts: int, seed: int) -> list[dict[str, Any]]:
    return [
        {"from": part[0].time, "to": part[-1].time, "comparisons": len(part), "agreement": pairwise(part, seed=seed)}
        for part in time_windows(compared, parts)
    ]


def convert_rankings(files: Sequence[str], out: Path) -> None:
    """Read rankings of any layout and write them as one JSONL file of the ranking contract.

    Raises UserError when `out` exists, has another ending or cannot be written, and for a file that cannot be read.
    """
    if out.suffix != ".jsonl":
        raise UserError("the file to write comes last and ends in .jsonl", str(out), "name it, such as rankings.jsonl")
    if out.exists():
        raise UserError("the file exists already, and is not overwritten", str(out), "name another, or delete it")
    drops = Drops()
    rankings = read_rankings(files, drops)
    show_drops(drops.table())
    if not rankings:
        raise UserError("no ranking is left", ", ".join(files), "see what was left out above")
    try:
        write_jsonl(out, [ranking_row(ranking) for ranking in rankings])
    except OSError as error:
        raise UserError(f"the file cannot be written: {error}", str(out), "check the folder") from None
    labelers = {ranking.labeler for ranking in rankings if ranking.labeler}
    prompts = len({ranking.prompt.key for ranking in rankings})
    console.print(f"{out}: {len(rankings)} rankings of {prompts} prompts, {len(labelers)} labelers", markup=False)


def _named(files: Sequence[str], drops: Drops) -> list[tuple[str, Ranking]]:
    """Return (labeler, ranking) pairs; a ranking without a labeler is by the labeler of its file."""
    return [(ranking.labeler or file, ranking) for file in files for ranking in read_rankings([file], drops)]


def _nothing_shared(files: Sequence[str], found: MatchedRankings) -> UserError:
    n = len(found.rankings)
    if n < 2:
        what = "all rankings are by one labeler" if n else "no ranking is left"
        fix = "give every ranking its `labeler`, or each labeler's rankings as a file of their own"
    else:
        what = f"no outputs were ranked by two of the {n} labelers"
        fix = "have some prompts ranked by several: the same prompt with the same responses, in any order"
    return UserError(f"nothing was ranked twice: {what}", ", ".join(files), fix)


def _tables(result: dict[str, Any]) -> None:
    shared = f"{result['outputs_shared']} of {result['outputs']} sets of outputs were ranked by more than one"
    title = f"Agreement of {result['labelers']} labelers: {shared}"
    rows = [[NAMES[ties], *_cells(e), f"{e.counted:,.0f} pairs"] for ties, e in result["pairwise"].items()]
    tau = result["kendall_tau_b"]
    rows.append(["Kendall tau-b", *_cells(tau, "{:.3f}"), f"{tau.counted:,.0f} comparisons"])
    units = f"{result['units']:,} outputs"
    rows.append(["Krippendorff alpha, ordinal", _cell(result["krippendorff_alpha"], "{:.3f}"), "", "", units])
    table(title, ["measure", "value", "95 % interval", "standard error", "of"], rows)
    console.print("The paper's labelers: 72.6 +- 1.5 % (training), 77.3 +- 1.3 % (held-out).", markup=False)
    columns = ["labeler", "rankings", "shared", "ties", "agreement", "95 % interval", "tau-b"]
    rows = [_labeler_row(r) for r in result["by_labeler"]]
    table("Each labeler against the others, tied pairs left out", columns, rows)
    if parts := result["over_time"]:
        rows = [[_time(r["from"]), _time(r["to"]), r["comparisons"], *_cells(r["agreement"])[:2]] for r in parts]
        columns = ["from", "to", "comparisons", "agreement", "95 % interval"]
        table("Over time, by the later of two rankings", columns, rows)
        if result["without_time"]:
            console.print(f"{result['without_time']} comparisons have no time and are in none of these parts.")


def _labeler_row(r: dict[str, Any]) -> list[Any]:
    return [
        r["labeler"], r["rankings"], r["shared"], _cell(r["ties"]), *_cells(r["agreement"])[:2],
        _cell(r["kendall_tau_b"].value, "{:.3f}"),
    ]  # fmt: skip


def _cells(estimate: AgreementEstimate, form: str = "{:.1%}") -> list[str]:
    """Return the value, the interval and the standard error as text."""
    low, high = _cell(estimate.low, form), _cell(estimate.high, form)
    return [_cell(estimate.value, form), low if low == "-" else f"{low} to {high}", _cell(estimate.error, form)]


def _cell(value: float, form: str = "{:.1%}") -> str:
    return "-" if math.isnan(value) else form.format(value)


def _time(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M")


def _plain(value: Any) -> Any:
    """Return the value as JSON has it: fields by name, times in ISO 8601, null for nan."""
    if isinstance(value, tuple) and hasattr(value, "_asdict"):
        return _plain(value._asdict())
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_plain(item) for item in value]
    if isinstance(value, datetime):
        return value.isoformat()
    return None if isinstance(value, float) and math.isnan(value) else value
