"""What happened to the data: every row read, repaired and dropped, with the first place of each kind."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from gemma_tune.data.canaries import Planted


@dataclass(frozen=True, slots=True)
class PairFigures:
    """The answers of the training pairs. A length that gives the better answer away is soon all that is learnt.

    Attributes:
        chosen_tokens, rejected_tokens: mean tokens of the answers, their end token counted.
        chosen_longer: share of pairs whose chosen answer is the longer one; a pair of equal lengths counts one half.
    """

    chosen_tokens: float
    rejected_tokens: float
    chosen_longer: float


@dataclass(frozen=True, slots=True)
class JudgedFigures:
    """The judged answers that are trained.

    Attributes:
        good, bad: how many of either kind.
        good_tokens, bad_tokens: mean tokens of an answer, its end token counted; None where there is none.
    """

    good: int
    bad: int
    good_tokens: float | None
    bad_tokens: float | None


@dataclass(frozen=True, slots=True)
class PromptFigures:
    """The prompts that are answered in the training.

    Attributes:
        tokens: mean tokens of a prompt, the opening of the model's turn counted.
        longest: tokens of the longest one.
    """

    tokens: float
    longest: int


@dataclass(frozen=True, slots=True)
class DataReport:
    """The data of a run in numbers.

    Attributes:
        read: rows read by source.
        repaired: repairs by name. A row can have several.
        dropped: dropped rows by reason.
        noted: rows by peculiarity that changes nothing (text that looks like a control token).
        first: name of a repair, drop or note -> the first row that had it.
        remarks: one sentence each.
        held_out: conversations and plain texts that are held out; a text that was split counts by its pieces. Pairs,
            judged answers or prompts, where the rows are such.
        documents: those that are trained, counted alike; like all that follows, None where they are streamed.
        rows: training rows: packs, or documents where packing is off.
        tokens: tokens in the training rows, padding not counted. Of a pair: in its two sequences, so that the prompt
            counts twice.
        trained_tokens: those of them that carry loss. Of a pair: those of its answers. Of a prompt: none.
        fill: tokens / (rows * max_length); how full the packs are. None where the rows are pairs, judged answers or
            prompts.
        pairs: None where the rows are no pairs.
        judged: None where the rows are no judged answers.
        prompts: None where the rows are no prompts.
        canaries: made-up secrets among the training rows; None where there are none.
    """

    read: Mapping[str, int]
    repaired: Mapping[str, int]
    dropped: Mapping[str, int]
    noted: Mapping[str, int]
    first: Mapping[str, str]
    remarks: tuple[str, ...]
    held_out: int
    documents: int | None = None
    rows: int | None = None
    tokens: int | None = None
    trained_tokens: int | None = None
    fill: float | None = None
    pairs: PairFigures | None = None
    judged: JudgedFigures | None = None
    prompts: PromptFigures | None = None
    canaries: Planted | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, found: Mapping[str, Any]) -> DataReport:
        """The inverse of `to_json`."""
        kinds = {"pairs": PairFigures, "judged": JudgedFigures, "prompts": PromptFigures}
        figures: dict[str, Any] = {name: kind(**found[name]) for name, kind in kinds.items() if found[name] is not None}
        if found.get("canaries") is not None:
            figures["canaries"] = Planted.from_json(found["canaries"])
        return cls(**{**found, "remarks": tuple(found["remarks"]), **figures})

    def lines(self) -> Iterator[str]:
        """For people, one fact a line."""
        for label, count in self.read.items():
            yield f"{count:,} rows read from {label}"
        for what, counts in (("repaired", self.repaired), ("dropped", self.dropped), ("noted", self.noted)):
            for name, count in counts.items():
                yield f"{count:,} {what}: {name} (first: {self.first[name]})"
        if self.rows is None:
            yield f"{self.held_out:,} held out; the training rows are read as a stream"
        elif self.pairs is not None:
            yield f"{self.rows:,} training pairs, {self.held_out:,} held out"
            yield f"{self.tokens:,} tokens in two sequences a pair, {self.trained_tokens:,} of them in the answers"
            figures = self.pairs
            yield (
                f"answers on average: chosen {figures.chosen_tokens:.1f} tokens, rejected "
                f"{figures.rejected_tokens:.1f}; the chosen one is longer in {figures.chosen_longer:.0%} of the pairs"
            )
        elif self.judged is not None:
            kinds = self.judged
            yield f"{self.rows:,} training answers: {kinds.good:,} good, {kinds.bad:,} bad; {self.held_out:,} held out"
            yield f"{self.tokens:,} tokens, {self.trained_tokens:,} of them in the answers"
            means = {"good": kinds.good_tokens, "bad": kinds.bad_tokens}
            shown = ", ".join(f"{name} {mean:.1f} tokens" for name, mean in means.items() if mean is not None)
            yield f"answers on average: {shown}"
        elif self.prompts is not None:
            yield f"{self.rows:,} training prompts, {self.held_out:,} held out"
            mean, longest = self.prompts.tokens, self.prompts.longest
            yield f"{self.tokens:,} tokens in the prompts: {mean:.1f} on average, {longest:,} in the longest"
        else:
            yield (
                f"{self.documents:,} documents in {self.rows:,} training rows ({self.fill:.0%} full), "
                f"{self.held_out:,} held out"
            )
            yield f"{self.tokens:,} tokens, {self.trained_tokens:,} of them trained"
        if self.canaries is not None:
            yield self.canaries.line()
        yield from self.remarks


@dataclass
class Tally:
    """Counts while the data is read. One name, one count, and where it was first met."""

    read: dict[str, int] = field(default_factory=dict)
    repaired: dict[str, int] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)
    noted: dict[str, int] = field(default_factory=dict)
    first: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)

    def row(self, label: str) -> None:
        self.read[label] = self.read.get(label, 0) + 1

    def repair(self, name: str, where: str) -> None:
        self._count(self.repaired, name, where)

    def drop(self, name: str, where: str) -> None:
        self._count(self.dropped, name, where)

    def note(self, name: str, where: str) -> None:
        self._count(self.noted, name, where)

    def _count(self, counts: dict[str, int], name: str, where: str) -> None:
        counts[name] = counts.get(name, 0) + 1
        self.first.setdefault(name, where)

    def report(self, held_out: int, **numbers: Any) -> DataReport:
        """The counts as they are now, with the numbers of the training rows."""
        counts = (dict(self.read), dict(self.repaired), dict(self.dropped), dict(self.noted), dict(self.first))
        return DataReport(*counts, tuple(self.remarks), held_out, **numbers)

    def why_empty(self) -> str:
        """What each filter removed, for the error that nothing is left."""
        removed = ", ".join(f"{name}: {count:,}" for name, count in self.dropped.items())
        return f"of {sum(self.read.values()):,} rows read, dropped {removed or 'none'}"
