"""Does every rank see the same text?"""

from __future__ import annotations

import json
from typing import NamedTuple

from ssr_deepspeed.preflight.equality import differences
from ssr_deepspeed.preflight.findings import Finding, judged
from ssr_deepspeed.preflight.job import Job
from ssr_deepspeed.pretrain import data
from ssr_deepspeed.pretrain.config import DataConfig


class Text(NamedTuple):
    """What a rank sees of the run's text."""

    fingerprint: str
    """Changes with the text, and with how it is made into tokens."""
    prepared: bool
    """It is tokenised already."""
    vocabulary: int
    """Tokens of its tokenizer; of one that is not trained yet, as many as are asked for."""


def check_text(job: Job, config: DataConfig) -> tuple[Finding, int]:
    """Every rank reads the source and finds the same; the vocabulary, to count the model with."""
    outcomes = job.attempt(lambda: _data_fingerprint(config))
    failures = [f"{problem}: make it visible on every host" for problem in job.problems(outcomes)]
    seen = [outcome.result for outcome in outcomes]
    if not failures:
        failures = [
            f"{sentence}: copy it once and completely to every host, or put it on a shared file system"
            for sentence in differences(job, [{"the fingerprint of the text": text.fingerprint} for text in seen])
        ]
    wanting = [rank for rank, text in enumerate(seen) if text and not text.prepared]
    warnings = []
    if wanting and len(set(job.hosts)) > 1 and not failures:
        warnings.append(f"{job.name(wanting)}: will tokenise the text at the start; do it once before, with ssr-prepare")
    fine = f"equal fingerprints, {seen[0].fingerprint if seen[0] else ''}"
    fine += "; will be tokenised at the start" if wanting else "; tokenised already"
    vocabulary = next((text.vocabulary for text in seen if text), config.vocabulary)
    return judged("text", fine, failures=failures, warnings=warnings), vocabulary


def _data_fingerprint(config: DataConfig) -> Text:
    fingerprint = data._fingerprint(config, data.read_documents(config))
    facts = data._cache_folder(config) / fingerprint / "corpus.json"
    if facts.is_file():
        return Text(fingerprint, True, json.loads(facts.read_text(encoding="utf-8"))["vocabulary"])
    return Text(fingerprint, False, 257 if config.tokenizer == "bytes" else config.vocabulary)
