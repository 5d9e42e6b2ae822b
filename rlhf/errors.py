"""The exception for mistakes that a user can correct: it says what is wrong, where, and what to do."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input: `what` is wrong, in one sentence, `where`, and what to do about it (`fix`).

    `where` is file, line and field, or the dotted name of a recipe field. The command line prints `str(error)` without
    a traceback and exits with 2.
    """

    def __init__(self, what: str, where: str | None = None, fix: str | None = None) -> None:
        self.what, self.where, self.fix = what, where, fix
        parts = [what]
        if where:
            parts.append(f"  where: {where}")
        if fix:
            parts.append(f"  fix:   {fix}")
        super().__init__("\n".join(parts))
