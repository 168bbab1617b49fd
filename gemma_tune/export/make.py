"""One function a format: fills an empty folder with everything that may be given away, and says what it found."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from gemma_tune import console
from gemma_tune.errors import AccessError, UserError
from gemma_tune.export.gguf.write import Kind as GgufKind
from gemma_tune.export.gguf.write import write_gguf
from gemma_tune.export.memory import return_freed_memory
from gemma_tune.export.merge import (
    Base,
    check_room,
    merged_weights,
    tokenizer_source,
    write_checkpoint,
    write_surroundings,
    write_tokenizer,
)
from gemma_tune.export.papers import Kind, change_of, make_papers, origin_of, presentable, write_papers
from gemma_tune.export.proof import Proof, check_proof, loaded_reference, prompt_rows, prove
from gemma_tune.export.subject import Subject
from gemma_tune.export.updates import Updates, adapter_names
from gemma_tune.export.verify import (
    LlamaSpeaker,
    Reference,
    TransformersSpeaker,
    Verification,
    check_verification,
    listen,
    summary_of,
    verify,
)
from gemma_tune.export.weights import CheckpointFiles
from gemma_tune.gemma import licences
from gemma_tune.models.card import CARD
from gemma_tune.models.tokenizer import GemmaEncoder, open_tokenizer
from gemma_tune.train import provenance

Format = Literal["safetensors", "gguf", "lora-gguf", "ollama", "adapter"]
RECORD = "export.json"
"""What was made of what, and what the proofs found: in every folder that merge or export writes."""
OWN_TYPES = get_args(GgufKind)
"""GGUF types that need no llama.cpp."""


@dataclass(frozen=True, slots=True)
class Order:
    """What is wanted.

    Attributes:
        format: see `Format`.
        base: into which base adapters are merged.
        dtype: type of a safetensors file; None keeps the base's.
        quantize: type of a GGUF file, e.g. `q4_k_m`; None is `q8_0`.
        verify: let the artefact answer prompts, and compare with base + adapter.
    """

    format: Format
    base: Base = "original"
    dtype: str | None = None
    quantize: str | None = None
    verify: bool = False

    @property
    def type(self) -> str:
        """Of a GGUF file."""
        return self.quantize or "q8_0"

    def check(self) -> None:
        """Refuse what would do nothing in this format.

        Raises:
            UserError: it would.
        """
        whole, gguf = self.format == "safetensors", self.format in ("gguf", "ollama")
        for set_, used, option in (
            (self.dtype, whole, "--dtype"),
            (self.quantize, gguf, "--quantize"),
            (self.base == "dequantized", whole or gguf, "--base dequantized"),
        ):
            if set_ and not used:
                raise UserError(f"it does nothing in --format {self.format}", where=option, fix=f"leave {option} out")


@dataclass(frozen=True, slots=True)
class Result:
    """What was found: the proof of a merge, and each verification. `file` is the name of a single file."""

    kind: Kind
    proof: Proof | None = None
    verified: tuple[Verification, ...] = ()
    file: str | None = None
    notes: tuple[str, ...] = ()

    def facts(self) -> dict[str, Any]:
        """For a card."""
        found: dict[str, Any] = {}
        if self.file:
            found["file"] = self.file
        if self.proof is not None:
            found["proof of the merge"] = {
                "base": self.proof.base,
                "largest_logit_difference_fp32": self.proof.arithmetic.largest_logit,
                "positions": self.proof.arithmetic.positions,
            }
            if self.kind == "merged":  # else the proof is of the weights that went into a file of another kind
                rounded = {"dtype": self.proof.dtype, "mean_kl_of_the_file": self.proof.file.mean_kl}
                found["proof of the merge"] |= rounded
        return found | {f"verified with {engine}": figures for engine, figures in summary_of(self.verified).items()}


def make(subject: Subject, folder: Path, order: Order) -> Result:
    """Fill `folder`, prove what is in it, and write its papers and its record.

    Args:
        subject: what leaves.
        folder: empty, and not yet under its final name.
        order: what is wanted.

    Raises:
        UserError: nothing to export in this format, an adapter that does not fit, or a type that does not exist.
        GemmaTuneError: the result is not the adapter.
        AccessError: no room on the disk, or a package is missing.
    """
    makers: dict[Format, Callable[[Subject, Path, Order], Result]] = {
        "safetensors": _safetensors,
        "gguf": _gguf,
        "ollama": _gguf,
        "lora-gguf": _lora_gguf,
        "adapter": _adapter,
    }
    order.check()
    return_freed_memory()
    result = makers[order.format](subject, folder, order)
    for found in result.verified:
        check_verification(found, subject.target)
    write_papers(folder, subject, kind=result.kind, facts=result.facts())
    (folder / RECORD).write_text(json.dumps(_record(subject, order, result), indent=2) + "\n", encoding="utf-8")
    return result


def _record(subject: Subject, order: Order, result: Result) -> dict[str, Any]:
    """What stands in export.json; no path of a machine is in it."""
    adapters: list[Mapping[str, Any]] = [
        {"name": name, "weight": one.weight, "content": provenance.fingerprint(one.folder)}
        for name, one in zip(adapter_names(subject.adapters), subject.adapters, strict=True)
    ]
    origin = origin_of(subject)
    return {
        "format": order.format,
        "base": {
            "name": origin.shown,
            "revision": origin.revision or provenance.fingerprint(subject.source.path),
            "merged_into": order.base if subject.adapters and order.format not in ("adapter", "lora-gguf") else None,
        },
        "adapters": adapters,
        "proof": result.proof.to_json() if result.proof else None,
        "verified": [one.to_json() for one in result.verified],
        "notes": list(result.notes),
        "versions": provenance.versions(),
    }


def _rows(subject: Subject) -> list[list[int]]:
    encoder = GemmaEncoder(open_tokenizer(tokenizer_source(subject), subject.family), subject.family)
    return prompt_rows(subject.family, encoder)


def _reference(subject: Subject, base: Base) -> Reference:
    """What base + adapter write; it lies in memory as a whole only while this works."""
    return listen(loaded_reference(subject, base), subject.family, _rows(subject))


# --- safetensors


def _safetensors(subject: Subject, folder: Path, order: Order) -> Result:
    files, weights = merged_weights(subject, order.base)
    if subject.adapters and not weights.moved():
        console.note("every B of the adapter is zero: nothing was trained, and the result is the base")
    check_room(weights, folder, order.dtype)
    write_checkpoint(weights, files, folder, order.dtype)
    write_surroundings(subject, weights, folder, order.dtype)
    proof = None
    if subject.adapters:
        proof = prove(subject, order.base, weights, CheckpointFiles(folder), _rows(subject))
        check_proof(proof, subject.target)
    verified: tuple[Verification, ...] = ()
    if order.verify:
        reference = _reference(subject, order.base)
        kind = proof.dtype if proof else str(weights.dtype(weights.names()[0])).removeprefix("torch.")
        verified = (_heard(reference, _opened(folder, subject), subject, "the safetensors files", kind),)
    return Result("merged", proof, verified)


def _opened(folder: Path, subject: Subject) -> Any:
    """A written model, as anybody opens it, in fp32."""
    from gemma_tune.models.saved import load_run

    changes = {"dtype": "float32", "text_only": subject.trained is not subject.family}
    return load_run(folder, **changes)[0]


def _heard(reference: Reference, model: Any, subject: Subject, artefact: str, kind: str) -> Verification:
    speaker = TransformersSpeaker(model, subject.family)
    return verify(reference, speaker, artefact=artefact, engine="transformers", kind=kind)


# --- GGUF


def _gguf(subject: Subject, folder: Path, order: Order) -> Result:
    name = f"{subject.name}-{order.type.upper()}.gguf"
    proof, notes = _write_gguf(subject, folder / name, order)
    write_tokenizer(subject, folder)  # transformers rebuilds no tokenizer of Gemma 2 from a GGUF
    kind: Kind = "gguf"
    if order.format == "ollama":
        from gemma_tune.export.ollama import write_modelfile

        kind = "ollama"
        licence = "\n\n".join(text for file, text in make_papers(subject, kind=kind, facts={}).items() if file != CARD)
        write_modelfile(folder, name, subject.family, licence=licence)
    verified = _verify_gguf(subject, folder / name, order) if order.verify else ()
    return Result(kind, proof, verified, name, notes)


def _write_gguf(subject: Subject, file: Path, order: Order) -> tuple[Proof | None, tuple[str, ...]]:
    from gemma_tune.export.llama import QUANTS, llama_cpp

    quantize = order.type
    if quantize not in (*OWN_TYPES, *QUANTS):
        known = ", ".join(dict.fromkeys((*OWN_TYPES, *QUANTS)))
        raise UserError(f"unknown type '{quantize}'", where="--quantize", fix=f"use one of {known}")
    own = quantize in OWN_TYPES
    if not own:
        llama_cpp()  # missing is said before the work
    files, weights = merged_weights(subject, order.base)
    proof = None
    if subject.adapters:
        proof = prove(subject, order.base, weights, None, _rows(subject))
        check_proof(proof, subject.target)
    written = file if own else file.with_name(".f32.gguf")
    kind: Any = quantize if own else "f32"
    found = write_gguf(
        weights,
        files.folder,
        tokenizer_source(subject).path,
        written,
        family=subject.family,
        kind=kind,
        about=_about(subject),
        tied=weights.tied,
    )
    if not own:
        from gemma_tune.export.llama import quantize as requantise

        requantise(written, file, quantize)
        written.unlink()
    if found.left_out:
        return proof, (f"{found.left_out} tensors of image and audio towers are not in the GGUF: it is text only",)
    return proof, ()


def _verify_gguf(subject: Subject, file: Path, order: Order) -> tuple[Verification, ...]:
    """transformers where it reads this generation's GGUF, llama.cpp where it is installed; at least one of them."""
    from gemma_tune.export.llama import has_llama_cpp, open_gguf
    from gemma_tune.models.gguf_files import open_gguf as open_with_transformers
    from gemma_tune.models.gguf_files import transformers_reads

    read = transformers_reads(subject.family)
    if not read and not has_llama_cpp():
        raise AccessError(
            f"transformers reads no GGUF of {subject.family.label}, and llama-cpp-python is not installed",
            where="--verify",
            fix='pip install "gemma-tune[llamacpp]"',
        )
    reference = _reference(subject, order.base)
    found: list[Verification] = []
    if read:
        model = open_with_transformers(file, {"dtype": "float32"})[0]
        found.append(_heard(reference, model, subject, file.name, order.type))
    if has_llama_cpp():
        with open_gguf(file) as opened:
            found.append(
                verify(reference, LlamaSpeaker(opened), artefact=file.name, engine="llama.cpp", kind=order.type)
            )
    return tuple(found)


def _lora_gguf(subject: Subject, folder: Path, order: Order) -> Result:
    from gemma_tune.export.gguf.lora import write_lora_gguf

    if len(subject.adapters) != 1:
        raise UserError(
            "a LoRA GGUF holds one adapter", where=subject.target, fix="name one run; --format gguf merges several"
        )
    name = f"{subject.name}-lora.gguf"
    one = subject.adapters[0]
    Updates(subject.adapters, CheckpointFiles(subject.source.path))  # refuses what does not fit the base
    write_lora_gguf(
        one.folder,
        subject.source.path,
        folder / name,
        family=subject.family,
        about=_about(subject),
        weight=one.weight,
    )
    verified: tuple[Verification, ...] = ()
    if order.verify:
        from gemma_tune.export.llama import llama_cpp, open_gguf

        llama_cpp()
        reference = _reference(subject, "original")
        with _base_gguf(subject, folder) as base, open_gguf(base, lora=folder / name) as opened:
            verified = (verify(reference, LlamaSpeaker(opened), artefact=name, engine="llama.cpp", kind="f32"),)
    return Result("lora-gguf", None, verified, name)


@contextmanager
def _base_gguf(subject: Subject, folder: Path) -> Iterator[Path]:
    """The base alone as an F32 GGUF, for as long as it is needed."""
    file = folder / ".base.gguf"
    files = CheckpointFiles(subject.source.path)
    kind: GgufKind = "f32"
    tokenizer = tokenizer_source(subject).path
    write_gguf(files, files.folder, tokenizer, file, family=subject.family, kind=kind, about=_about(subject))
    try:
        yield file
    finally:
        file.unlink()


# --- an adapter for servers


def _adapter(subject: Subject, folder: Path, order: Order) -> Result:
    from gemma_tune.export.adapter import server_adapter

    check = server_adapter(subject, folder)
    notes = (f"{check.renamed} modules were renamed to the names of the class that servers load",) * bool(check.renamed)
    verified: tuple[Verification, ...] = ()
    if order.verify:
        from gemma_tune.models.load import load_base
        from gemma_tune.models.lora import open_adapter

        reference = _reference(subject, "original")
        chosen = {"name": subject.source.name, "revision": subject.hub_revision(), "dtype": "float32"}
        model = open_adapter(load_base(chosen, {}, subject.family), folder)
        verified = (_heard(reference, model, subject, "the adapter on its base", "float32"),)
    return Result("adapter", None, verified, None, notes)


# --- names


def _about(subject: Subject) -> dict[str, Any]:
    """`general.*` of a GGUF file (ggml, docs/gguf.md): name, base, and what its licence wants to be said in every copy.

    A GGUF file is handed on by itself, without the papers beside it.
    """
    texts = licences.make_papers(subject.family.licence, change_of(subject))
    policy = (
        f" See also the Gemma Prohibited Use Policy: {licences.POLICY}" if subject.family.licence == "gemma" else ""
    )
    about: dict[str, Any] = {
        "name": subject.name,
        "description": presentable(" ".join(texts[licences.NOTICE_FILE].split()) + policy),
        "license": subject.family.licence,
        "license_link": f"https://{licences.TERMS if subject.family.licence == 'gemma' else licences.APACHE}",
    }
    origin = origin_of(subject)
    if origin.hub is None:
        about["base_models"] = [{"name": origin.shown}]
    else:
        organisation, _, name = origin.hub.partition("/")
        repository = f"https://huggingface.co/{origin.hub}"
        about["base_models"] = [{"name": name, "organization": organisation, "repo_url": repository}]
    return about
