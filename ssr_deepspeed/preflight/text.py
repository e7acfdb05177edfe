"""Does every rank see the same text?"""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import datasets

from ssr_deepspeed.preflight.equality import differences
from ssr_deepspeed.preflight.findings import Finding, judged
from ssr_deepspeed.preflight.job import Job
from ssr_deepspeed.pretrain.config import DataConfig
from ssr_deepspeed.pretrain.prepare import locate
from ssr_deepspeed.pretrain.shards import INDEX, check
from ssr_deepspeed.pretrain.text import describe, text_files


class Text(NamedTuple):
    """What a rank sees of the run's text."""

    tokens: str | None
    """Fingerprint of the prepared text; None where none is prepared yet."""
    source: dict[str, Any]
    """Number, sizes and names of the source's files, or the name of a dataset."""
    vocabulary: int
    """Tokens of its tokenizer; of one that is not trained yet, as many as are asked for."""


def check_text(job: Job, config: DataConfig) -> tuple[Finding, int]:
    """Every rank sees the same text, prepared or not; the vocabulary, to count the model with."""
    outcomes = job.attempt(lambda: _look(config, job.rank in job.leaders))
    if problems := job.problems(outcomes):
        alike = len({outcome.problem for outcome in outcomes}) == 1
        remedy = "" if alike else ": give every host the same text, or put it on a shared file system"
        return judged("text", "", failures=[problem + remedy for problem in problems]), _vocabulary(config)
    seen: list[Text] = [outcome.result for outcome in outcomes]
    wanting = [rank for rank, text in enumerate(seen) if text.tokens is None]
    if wanting:
        compared = [{f"data.source, its {name},": value for name, value in text.source.items()} for text in seen]
        fine = "the same files everywhere, to be tokenised at the start"
        if "dataset" in seen[0].source:
            fine = f"{config.source} is found, to be tokenised at the start unless the cache has its tokens"
    else:
        compared = [{"the fingerprint of the tokens": text.tokens} for text in seen]
        fine = f"the same tokens everywhere, with fingerprint {seen[0].tokens}"
    failures = [
        f"{sentence}: copy it once and completely to every host, or put it on a shared file system"
        for sentence in differences(job, compared)
    ]
    warnings = []
    if wanting and len(set(job.hosts)) > 1:
        warnings.append(f"{job.name(wanting)}: will tokenise the text at the start; use ssr-prepare once before")
    return judged("text", fine, failures=failures, warnings=warnings), seen[0].vocabulary


def _look(config: DataConfig, first_of_host: bool) -> Text:
    """This rank's sight of the text, of which nothing is tokenised or fetched for it.

    Raises:
        ValueError: the prepared text is not what the configuration asks for, or there is neither it nor a source.
    """
    if config.prepared is None and not text_files(config.source):
        # Where the cache has it only the dataset itself tells, and reading it here would fetch it.
        if first_of_host:
            datasets.load_dataset_builder(config.source, config.subset)
        return Text(None, {"dataset": config.source}, _vocabulary(config))
    folder = locate(config)
    if config.prepared or (folder / INDEX).exists():
        index = check(folder, config)
        return Text(index.fingerprint, index.source, len(index.bytes_per_token))
    unreadable = [file for file in text_files(config.source) if not os.access(file, os.R_OK)]
    if unreadable:
        raise ValueError(f"data.source = {config.source!r}: no right to read {unreadable[0]}")
    return Text(None, describe(config), _vocabulary(config))


def _vocabulary(config: DataConfig) -> int:
    return 257 if config.tokenizer == "bytes" else config.vocabulary
