"""Answer a judge's questions by a rule in place of a model."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rlhf.data.prompt_template import Template
from rlhf.labeling.judge.local import Fields, LabelReading


class Rigged:
    """A `Reader` that answers with `rule(fields)`: log-odds of the first label, or log-probabilities of all labels."""

    def __init__(self, rule: Callable[[Fields], float | Sequence[float]], longest: int = 10**6) -> None:
        self.rule, self.longest = rule, longest
        self.asked: list[dict[str, str]] = []

    def question_fits(self, template: Template, fields: Fields) -> bool:
        return sum(map(len, fields.values())) <= self.longest

    def read(
        self,
        template: Template,
        questions: Sequence[Fields],
        advance: Callable[[int], None] | None = None,
        keep: Callable[[dict[int, LabelReading]], None] | None = None,
    ) -> list[LabelReading]:
        self.asked += [dict(q) for q in questions]
        found = [self.rule(q) for q in questions]
        # The labels have little of the probability; only their difference matters.
        return [LabelReading(tuple(f) if isinstance(f, Sequence) else (f / 2 - 9, -f / 2 - 9)) for f in found]


def by_length(bias: float = 0.0) -> Callable[[Fields], float]:
    """Return a rule whose log-odds are the difference of the lengths, and `bias` for whatever comes first."""
    return lambda q: len(q["first"]) - len(q["second"]) + bias
