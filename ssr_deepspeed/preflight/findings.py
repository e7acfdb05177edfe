"""What the checks found, and the table that says it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class Status(StrEnum):
    """How a check ended; only a failure ends the command with an error."""

    OK = "ok"
    SKIPPED = "skipped"
    WARNING = "warning"
    FAILURE = "FAILURE"


@dataclass(frozen=True)
class Finding:
    """The result of one check, equal on all ranks."""

    check: str
    """Its name in the table."""
    status: Status
    sentences: tuple[str, ...]
    """What was found, where, and what to do; one line each."""

    @property
    def failed(self) -> bool:
        return self.status is Status.FAILURE


def ok(check: str, sentence: str) -> Finding:
    return Finding(check, Status.OK, (sentence,))


def skipped(check: str, reason: str) -> Finding:
    return Finding(check, Status.SKIPPED, (f"not checked: {reason}",))


def judged(check: str, fine: str, *, failures: Sequence[str] = (), warnings: Sequence[str] = ()) -> Finding:
    """The finding of a check: its failures and warnings, or the sentence for where there are none."""
    if failures:
        return Finding(check, Status.FAILURE, (*failures, *warnings))
    if warnings:
        return Finding(check, Status.WARNING, tuple(warnings))
    return ok(check, fine)


def table(findings: Sequence[Finding]) -> str:
    """One line a check, and one more for each further sentence."""
    width = max(len(finding.check) for finding in findings)
    lines = []
    for finding in findings:
        for number, sentence in enumerate(finding.sentences):
            status, check = ("", "") if number else (finding.status, finding.check)
            lines.append(f"{status:<8} {check:<{width}}  {sentence}")
    return "\n".join(lines)


def summary(findings: Sequence[Finding]) -> str:
    """How many checks ended how, in words."""
    counts = Counter(finding.status for finding in findings)
    words = {Status.FAILURE: "failed", Status.WARNING: "warned", Status.SKIPPED: "not checked", Status.OK: "ok"}
    return ", ".join(f"{counts[status]} {word}" for status, word in words.items() if counts[status])
