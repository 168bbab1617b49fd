"""`gemma-tune export`: what servers load, in their formats, verified."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from gemma_tune import console

if TYPE_CHECKING:
    from gemma_tune.export.make import Format, Order, Result
    from gemma_tune.export.proof import Proof
    from gemma_tune.export.subject import Subject


def run(
    targets: Sequence[str],
    format: Format,
    out: str | None,
    base: Literal["original", "dequantized"],
    dtype: str | None,
    quantize: str | None,
    verify: bool,
    adapter: str | None,
    shares: Sequence[float],
    base_path: str | None,
) -> int:
    """Write a run, an adapter or a model in a format, and print how to serve it.

    Args:
        targets: as in `commands.merge.run`, or a model.
        format: `safetensors`, `gguf`, `lora-gguf`, `ollama` or `adapter`.
        out: folder to make; by default in the run, named after the format.
        base, dtype, adapter, shares, base_path: as in `commands.merge.run`.
        quantize: type of a GGUF file; None is q8_0.
        verify: let it answer prompts, and compare.
    """
    from gemma_tune.commands.train import quieten
    from gemma_tune.export.make import Order
    from gemma_tune.export.subject import find_subject

    quieten()
    subject = find_subject(targets, shares=shares, adapter=adapter, base=base_path)
    order = Order(format, base, dtype, quantize.lower() if quantize else None, verify)
    order.check()
    name = f"{format}-{order.type}" if format in ("gguf", "ollama") else format
    if base == "dequantized":
        name += "-dequantized"
    return export(subject, Path(out).expanduser() if out else None, name, order)


def export(subject: Subject, out: Path | None, name: str, order: Order) -> int:
    """Make it under a name that it gets when it is whole, then say what was found and how to serve it."""
    from gemma_tune.export.make import make
    from gemma_tune.export.serve import serve_commands
    from gemma_tune.export.staging import staged

    final = out or _place(subject) / name
    with staged(final) as folder:
        result = make(subject, folder, order)
    for line in _report(result, "base + adapter" if subject.adapters else "the model in fp32"):
        console.out(console.printable(line))
    console.out(f"wrote {console.printable(final)}")
    for note in result.notes:
        console.note(note)
    console.out("serve it with:")
    for label, command in serve_commands(final, result.kind, subject):
        console.out(f"  {label}: {console.printable(command)}")
    return 0


def _place(subject: Subject) -> Path:
    """Beside what it was made of: in the run, else in the working directory."""
    return subject.run_folder if subject.run_folder is not None else Path.cwd()


def _report(result: Result, reference: str) -> Iterator[str]:
    from gemma_tune.export.verify import lines_of

    if result.proof is not None:
        yield from _proof_lines(result.proof)
    for found in result.verified:
        yield from lines_of(found, reference)


def _proof_lines(proof: Proof) -> Iterator[str]:
    exact, file = proof.arithmetic, proof.file
    yield (
        f"merged into the {proof.base} base: in fp32 logits differ from base + adapter by at most "
        f"{exact.largest_logit:.2g} (allowed {exact.limit:.1g}; the largest logit is {exact.scale:.0f}), "
        f"KL {exact.mean_kl:.1g} nats a token, over {exact.positions} positions"
    )
    if file != exact:
        yield (
            f"rounded to {proof.dtype}: KL {file.mean_kl:.2g} nats a token on average, {file.largest_kl:.2g} at most; "
            f"the first choice is the same at {file.same_choice:.1%} of the positions"
        )
