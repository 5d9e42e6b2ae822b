"""Is the embedded data what its datasheet says? `python tests/tools/data_check.py [--against FOLDER] [--data FOLDER]`

Checks keys and schema (by the readers that the stages use), counts and proportions, stray characters, duplicates,
runs of 13 words shared within and between the files (and with the files of FOLDER), how responses begin, and lengths.
Measures what a reward model could learn instead of the labels: rank against length and position. Prints the tables,
then every problem with its file and line; exits with 1 when there is one. `make data-check` runs it.
"""

from __future__ import annotations

import argparse
import difflib
import json
import re
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # this program is run by its path
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from rlhf.data.records import Drops, read_cloze, read_demonstrations, read_prompts, read_rankings, read_texts
from rlhf.errors import UserError
from rlhf.functional.ranking import ordered_pairs, tied_pairs
from rlhf.labeling.base import agreement
from rlhf.labeling.summary import centred_correlation
from rlhf.system.console import table
from support.paths import DATA
from tools.data_overlap import NGRAM, Text, content, ngrams, overlaps, similar, words

# InstructGPT, Table 1: the use cases of the API prompts, in percent.
TABLE_1 = {
    "generation": 45.6,
    "open_qa": 12.4,
    "brainstorming": 11.2,
    "chat": 8.4,
    "rewrite": 6.6,
    "summarization": 4.2,
    "classification": 3.5,
    "other": 3.5,
    "closed_qa": 2.6,
    "extract": 1.9,
}
USE_FILES = ("demonstrations", "prompts", "prompts_heldout", "rankings")
SAME_START = 0.03  # largest share of responses that may begin with the same four words


@dataclass(frozen=True)
class Spec:
    """What one file must be. `texts` are the fields whose words count for overlap and hygiene."""

    keys: tuple[str, ...]
    rows: int
    heldout: bool
    texts: tuple[str, ...]
    read: Callable[[list[str]], Sequence[Any]]
    tokens: int = 0


RANKED = ("prompt", "responses", "ranks", "finished", "use_case")
SPECS = {
    "demonstrations": Spec(
        ("prompt", "response", "use_case"),
        400,
        False,
        ("prompt", "response"),
        lambda p: read_demonstrations(p, Drops()),
    ),
    "prompts": Spec(("prompt", "use_case"), 300, False, ("prompt",), lambda p: read_prompts(p, Drops())),
    "prompts_heldout": Spec(("prompt", "use_case"), 128, True, ("prompt",), lambda p: read_prompts(p, Drops())),
    "rankings": Spec(RANKED, 150, False, ("prompt", "responses"), lambda p: read_rankings(p, Drops())),
    "rankings_second": Spec(RANKED, 40, False, ("prompt", "responses"), lambda p: read_rankings(p, Drops())),
    "corpus": Spec(("text", "kind", "title"), 100, False, ("text",), lambda p: read_texts(p, Drops()), 40_000),
    "corpus_heldout": Spec(("text", "kind", "title"), 15, True, ("text",), lambda p: read_texts(p, Drops()), 5_000),
    "cloze": Spec(("context", "choices", "answer"), 200, True, ("context",), read_cloze),
}
# Share their texts on purpose: a ranking's prompt is one of prompts.jsonl, the second pass is of rankings.jsonl.
SAME_TEXTS = {frozenset(pair) for pair in combinations(("prompts", "rankings", "rankings_second"), 2)}
# White space at the ends or doubled, control and invisible characters, and what a wrong decoding leaves.
STRAY = re.compile(
    r"^\s|\s$|[ \t]+\n|(?<=\S)  +(?=\S)"
    r"|[\x00-\x08\x0b-\x1f\x7f\u00ad\u200b-\u200f\ufeff\ufffd]|\u00e2\u20ac|\u00c3[\u0080-\u00bf]"
)


Rows = dict[str, list[dict[str, Any]]]


def texts_of(rows: Rows) -> list[Text]:
    """Every text of the files, responses one by one."""
    found = []
    for file, items in rows.items():
        for line, row in enumerate(items, start=1):
            for field in SPECS[file].texts:
                value = row.get(field, "")
                found += [Text(file, line, field, t) for t in (value if isinstance(value, list) else [value])]
    return found


def check_schema(folder: Path) -> tuple[Rows, list[str]]:
    """Rows of every file and the problems of its keys, its rows and their number; a file that fails is left out."""
    rows: Rows = {}
    unlisted = [path.name for path in folder.glob("*.jsonl") if path.stem not in SPECS]
    problems = [f"{name}: not listed in tests/tools/data_check.py" for name in unlisted]
    for name, spec in SPECS.items():
        path = folder / f"{name}.jsonl"
        try:
            items = spec.read([str(path)])
        except UserError as error:
            problems.append(str(error))
            continue
        rows[name] = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        for line, row in enumerate(rows[name], start=1):
            for key in row.keys() - set(spec.keys):
                near = difflib.get_close_matches(key, spec.keys, n=1)
                meant = f", meant {near[0]}?" if near else ""
                problems.append(f"{path.name}, line {line}: unknown key `{key}`{meant}")
            problems += [f"{path.name}, line {line}: no key `{key}`" for key in spec.keys if key not in row]
        if len(items) != len(rows[name]):
            problems.append(f"{path.name}: {len(rows[name]) - len(items)} exact duplicates")
        if len(items) < spec.rows:
            problems.append(f"{path.name}: {len(items)} rows, {spec.rows} are promised")
    return rows, problems


def check_proportions(file: str, rows: Sequence[dict[str, Any]]) -> list[str]:
    """Use cases that are more than one row away from the share of the paper's Table 1."""
    counts = Counter(row.get("use_case", "") for row in rows)
    problems = [f"{file}.jsonl: unknown use case `{name}`" for name in counts if name not in TABLE_1]
    total = sum(TABLE_1.values())
    for name, share in TABLE_1.items():
        want = share / total * len(rows)
        if abs(counts[name] - want) > 1:
            problems.append(f"{file}.jsonl: {counts[name]} rows of {name}, {want:.1f} by Table 1")
    return problems


def check_hygiene(texts: Iterable[Text]) -> list[str]:
    """Stray characters in what was written; sampled outputs are kept as the model gave them."""
    return [
        f"{text.place}: {found.group()!r} at character {found.start()}"
        for text in texts
        if text.field != "responses" and (found := STRAY.search(text.text))
    ]


def check_overlap(texts: Sequence[Text]) -> tuple[list[str], int]:
    """Problems of runs shared between or within files, and the number of pairs of sampled outputs that share one.

    Outputs that the model sampled may repeat one another inside rankings.jsonl: that is counted and not a problem.
    """
    problems, sampled = [], 0
    for a, b, gram in overlaps(texts):
        if a.file != b.file and frozenset((a.file, b.file)) in SAME_TEXTS:
            continue
        if a.file == b.file and "responses" in (a.field, b.field):
            sampled += 1
            continue
        problems.append(f"{a.place} and {b.place} share: {gram}")
    return problems, sampled


def check_near_prompts(rows: Rows) -> list[str]:
    """Prompts of different rows that are nearly the same, within and between the files of prompts."""
    prompts = [
        (f"{file}.jsonl, line {line}", row["prompt"], set(zip(w, w[1:], strict=False)), content(w))
        for file in ("demonstrations", "prompts", "prompts_heldout")
        for line, row in enumerate(rows.get(file, ()), start=1)
        if (w := words(str(row.get("prompt", ""))))
    ]
    problems = []
    for (place, prompt, a, about), (other, _, b, other_about) in combinations(prompts, 2):
        # Two prompts of one or two content words between them are too short to be told apart by those alone.
        if similar(a, b) or (len(about | other_about) > 2 and similar(about, other_about)):
            problems.append(f"{place} and {other}: nearly the same prompt: {prompt[:60]!r}")
    return problems


def check_starts(file: str, responses: Sequence[str]) -> list[str]:
    """Runs of four words with which more than 3 % of the responses begin."""
    starts = Counter(tuple(words(response)[:4]) for response in responses)
    return [
        f"{file}.jsonl: {count} of {len(responses)} responses begin with {' '.join(start)!r}"
        for start, count in starts.most_common()
        if count > max(1, SAME_START * len(responses))
    ]


def check_against(texts: Sequence[Text], folder: Path) -> list[str]:
    """Runs of 13 words that stand in a file of another data set; its short texts are too common to say anything."""
    ours: dict[tuple[str, ...], Text] = {}
    for text in texts:
        if text.field != "responses":
            ours |= {gram: text for gram in ngrams(text.text) if len(gram) == NGRAM}
    problems = {}
    for path in sorted(p for p in folder.rglob("*") if p.suffix in (".jsonl", ".txt")):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            for gram in ngrams(line if path.suffix == ".txt" else " ".join(strings(json.loads(line)))):
                if gram in ours:
                    place = (ours[gram].place, path.name, number)
                    problems.setdefault(place, f"{place[0]} shares with {path.name}, line {number}: {' '.join(gram)}")
    return list(problems.values())


def strings(value: Any) -> list[str]:
    """Every text in a JSON value."""
    if isinstance(value, str):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [text for part in parts for text in strings(part)]


def check_rankings(rows: Rows) -> tuple[list[str], list[tuple[str, Any]]]:
    """Problems of the two ranking files, and the figures of their labels."""
    first, second = rows.get("rankings", []), {row["prompt"]: row for row in rows.get("rankings_second", [])}
    problems = []
    prompts = {row["prompt"] for row in rows.get("prompts", [])}
    for line, row in enumerate(first, start=1):
        if row["prompt"] not in prompts:
            problems.append(f"rankings.jsonl, line {line}: the prompt is not in prompts.jsonl")
        if not 4 <= len(row["responses"]) <= 6:
            problems.append(f"rankings.jsonl, line {line}: {len(row['responses'])} outputs, 4 to 6 are promised")
        if sorted(set(row["ranks"])) != list(range(1, len(set(row["ranks"])) + 1)):
            problems.append(f"rankings.jsonl, line {line}: ranks {row['ranks']} leave a number out")
    by_prompt = {row["prompt"]: row for row in first}
    pairs = []
    for prompt, row in second.items():
        if by_prompt.get(prompt, {}).get("responses") != row["responses"]:
            problems.append(f"rankings_second.jsonl: not the outputs of rankings.jsonl for {prompt[:60]!r}")
        else:
            pairs.append(agreement(by_prompt[prompt]["ranks"], row["ranks"]))
    ranks = [row["ranks"] for row in first]
    lengths = [[len(words(text)) for text in row["responses"]] for row in first]
    positions = [range(len(r)) for r in ranks]
    tied, ordered = sum(len(tied_pairs(r)) for r in ranks), sum(len(ordered_pairs(r)) for r in ranks)
    agreeing, comparable = (sum(c) for c in zip(*pairs, strict=True)) if pairs else (0, 0)
    figures = [
        ("prompts, outputs", f"{len(ranks)}, {sum(map(len, ranks))}"),
        ("pairs in order, tied", f"{ordered}, {tied} ({tied / max(1, tied + ordered):.1%})"),
        ("finished outputs", f"{np.mean([f for row in first for f in row['finished']]):.1%}" if first else "none"),
        ("correlation of rank with length in words", centred_correlation(ranks, lengths) if first else None),
        ("correlation of rank with position", centred_correlation(ranks, positions) if first else None),
        ("second pass: prompts", len(pairs)),
        ("second pass: agreement on pairs untied in both", f"{agreeing / max(1, comparable):.1%} of {comparable}"),
    ]
    return problems, figures


def check_cloze(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Questions without four different choices; an answer's place that is much more frequent than another's."""
    unlike_four = [n for n, r in enumerate(rows, 1) if len(set(r["choices"])) != 4]
    problems = [f"cloze.jsonl, line {n}: not four different choices" for n in unlike_four]
    places = Counter(row["answer"] for row in rows)
    if rows and max(places.values()) > 0.32 * len(rows):
        problems.append(f"cloze.jsonl: the answers' places are {dict(sorted(places.items()))}")
    longest = sum(len(r["choices"][r["answer"]]) == max(map(len, r["choices"])) for r in rows)
    if longest > 0.45 * len(rows):
        problems.append(f"cloze.jsonl: the answer is the longest choice in {longest} of {len(rows)}")
    return problems


def check_lengths(rows: Rows, count: Callable[[str], int]) -> tuple[list[str], list[list[Any]]]:
    """Problems of sizes, and a table of the words of each field: smallest, quartiles, largest, and tokens in all."""
    lengths: dict[tuple[str, str], list[int]] = defaultdict(list)
    tokens: Counter[tuple[str, str]] = Counter()
    for text in texts_of(rows):
        lengths[text.file, text.field].append(len(text.text.split()))
        tokens[text.file, text.field] += count(text.text)
    problems = []
    for name, items in rows.items():
        if "text" in SPECS[name].texts and tokens[name, "text"] < SPECS[name].tokens:
            problems.append(f"{name}.jsonl: {tokens[name, 'text']} tokens, {SPECS[name].tokens} are promised")
        if name == "demonstrations":
            problems += [
                f"{name}.jsonl, line {line}: a response of {n} words, 5 to 150 are promised"
                for line, row in enumerate(items, start=1)
                if not 5 <= (n := len(row["response"].split())) <= 150
            ]
    out = []
    for (name, field), sizes in lengths.items():
        quartiles = [int(q) for q in np.quantile(sizes, (0, 0.25, 0.5, 0.75, 1))]
        out.append([name, field, len(sizes), *quartiles, tokens[name, field]])
    return problems, out


def check(folder: Path, against: Path | None, count: Callable[[str], int]) -> list[str]:
    """Every check; prints the figures and returns the problems."""
    rows, problems = check_schema(folder)
    texts = texts_of(rows)
    problems += check_hygiene(texts)
    for name in ("demonstrations", "prompts", "prompts_heldout"):
        problems += check_proportions(name, rows.get(name, ()))
    shared, sampled = check_overlap(texts)
    problems += shared + check_near_prompts(rows)
    problems += check_starts("demonstrations", [row["response"] for row in rows.get("demonstrations", ())])
    problems += check_starts("rankings", [text for row in rows.get("rankings", ()) for text in row["responses"]])
    problems += check_cloze(rows.get("cloze", ()))
    about_lengths, lengths = check_lengths(rows, count)
    about_ranks, ranks = check_rankings(rows)
    problems += about_lengths + about_ranks
    if against is not None:
        problems += check_against(texts, against)

    table("words of each text", ["file", "field", "texts", "min", "25 %", "50 %", "75 %", "max", "tokens"], lengths)
    files = [name for name in USE_FILES if name in rows]
    uses = [[use, *(sum(r["use_case"] == use for r in rows[name]) for name in files)] for use in TABLE_1]
    table("use cases", ["use case", *files], uses)
    ranks.append(("pairs of sampled outputs of different prompts that share 13 words", sampled))
    table("rankings", ["figure", "value"], ranks)
    return problems


def main() -> int:
    """Run the checks from the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="the folder to check")
    parser.add_argument("--against", type=Path, help="a folder of other data that nothing may be shared with")
    args = parser.parse_args()
    if args.against is not None and not args.against.is_dir():
        parser.error(f"--against {args.against}: no such folder")

    from rlhf.models.loading import load_tokenizer

    tokenizer = load_tokenizer("smollm2-135m")
    problems = check(args.data, args.against, lambda text: len(tokenizer(text, verbose=False)["input_ids"]))
    for problem in problems:
        print(problem)
    print(f"{len(problems)} problems" if problems else "data-check: clean")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
