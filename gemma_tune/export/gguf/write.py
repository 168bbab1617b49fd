"""A model as one GGUF file, one tensor at a time."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.errors import AccessError
from gemma_tune.export.gguf.facts import Decoder, add_facts, read_decoder
from gemma_tune.export.gguf.tensors import Kind, encode, gguf_names, size_of, type_of
from gemma_tune.export.gguf.vocabulary import Vocabulary, read_vocabulary
from gemma_tune.export.weights import Weights
from gemma_tune.gemma.families import Family
from gemma_tune.models.remedies import is_tower
from gemma_tune.models.tokenizer import official_template
from gemma_tune.plan.facts import read_json

if TYPE_CHECKING:
    from collections.abc import Iterator

    from gguf import GGUFWriter

ABOUT = (
    *("name", "description", "author", "organization", "version", "finetune", "license", "license_name"),
    *("license_link", "url", "repo_url", "tags", "languages", "base_models"),
)
"""Keys of `about`: the `general.*` of the same names; `base_models` is a list of mappings with `name`, `organization`,
`version`, `url`, `repo_url`."""


@dataclass(frozen=True, slots=True)
class Written:
    """What a file holds.

    Attributes:
        file: where it is.
        tensors: how many.
        left_out: tensors of image and audio towers, which a text file has no place for.
        size: bytes.
    """

    file: Path
    tensors: int
    left_out: int
    size: int


def write_gguf(
    weights: Weights,
    model: Path,
    tokenizer: Path,
    file: Path,
    *,
    family: Family,
    kind: Kind,
    about: Mapping[str, Any],
    tied: bool | None = None,
) -> Written:
    """Write the text decoder of a model, with its tokenizer, template and stop ids.

    Memory: the vocabulary, one tensor, and that tensor's bytes in the file.

    Args:
        weights: names as in the checkpoint, of any class; what is merged may come in fp32.
        model: folder with config.json, and generation_config.json where there is one.
        tokenizer: folder with tokenizer.json.
        file: is overwritten.
        family: the row of the checkpoint.
        kind: type of the matrices. Vectors are F32 in all of them.
        about: see `ABOUT`.
        tied: whether the head is the embedding; None: as config.json says. An adapter may have trained them apart.

    Raises:
        UserError: llama.cpp would not compute what the model does, or not find its tokens; a tensor is missing or not
            finite.
        AccessError: the package `gguf` is missing.
    """
    check_gguf()
    decoder = read_decoder(model, family)
    if tied is not None:
        decoder = replace(decoder, tied=tied)
    names = gguf_names(weights.names(), decoder, str(model))
    vocabulary = read_vocabulary(tokenizer, _rows(weights, names), family)
    with writing(file, decoder) as writer:
        add_general(writer, about, "model")
        add_facts(writer, decoder)
        add_vocabulary(writer, vocabulary, family)
        _add_sampling(writer, model)
        _add_type(writer, kind)
        _add_size(writer, weights, names)
        _add_tensors(writer, weights, names, kind, decoder.facts.norm_offset)
    towers = sum(map(is_tower, weights.names()))
    return Written(file, len(names), towers, file.stat().st_size)


def check_gguf() -> None:
    """Raises AccessError where the package `gguf` is not installed."""
    try:
        import gguf  # noqa: F401
    except ImportError as exc:
        raise AccessError(
            "the package gguf, which writes GGUF files, is not installed",
            where="gguf",
            fix='pip install "gemma-tune[gguf]"',
        ) from exc


def _rows(weights: Weights, names: Mapping[str, str]) -> int:
    """Rows of the embedding: as many tokens as the file must list."""
    return next(weights.shape(name)[0] for name, found in names.items() if found == "token_embd.weight")


@contextmanager
def writing(file: Path, decoder: Decoder) -> Iterator[GGUFWriter]:
    """A writer for the architecture of `decoder`, closed when the body ends."""
    import gguf

    writer = gguf.GGUFWriter(file, decoder.facts.arch)
    try:
        yield writer
    finally:
        writer.close()


def add_general(writer: GGUFWriter, about: Mapping[str, Any], kind: str) -> None:
    """Write the keys `general.*`; `kind` is `model` or `adapter`."""
    if unknown := set(about) - set(ABOUT):
        raise KeyError(f"about: {sorted(unknown)}")
    writer.add_type(kind)
    for key in ABOUT:
        if key != "base_models" and about.get(key):
            getattr(writer, f"add_{key}")(about[key])
    bases: Sequence[Mapping[str, str]] = about.get("base_models", ())
    if bases:
        writer.add_base_model_count(len(bases))
    for number, base in enumerate(bases):
        for key, value in base.items():
            getattr(writer, f"add_base_model_{key}")(number, value)


def add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary, family: Family) -> None:
    """Write the keys `tokenizer.*`: the vocabulary, its special ids, and the official chat template."""
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(vocabulary.pieces)
    writer.add_token_scores(vocabulary.scores)
    writer.add_token_types(vocabulary.types)
    writer.add_bos_token_id(family.bos_id)
    writer.add_eos_token_id(family.eos_id)
    # The end of a turn stops llama.cpp as the end of the text does.
    writer.add_eot_token_id(family.turn_end_id)
    writer.add_unk_token_id(vocabulary.pieces.index("<unk>"))
    writer.add_pad_token_id(family.pad_id)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_add_space_prefix(False)
    writer.add_chat_template(official_template(family))


def _add_sampling(writer: GGUFWriter, model: Path) -> None:
    """What generation_config.json says of sampling, which llama.cpp takes as its defaults."""
    file = model / "generation_config.json"
    said = read_json(file) if file.is_file() else {}
    for key, name in (("temperature", "temp"), ("top_k", "top_k"), ("top_p", "top_p")):
        if said.get(key) is not None:
            getattr(writer, f"add_sampling_{name}")(said[key])


def _add_type(writer: GGUFWriter, kind: Kind) -> None:
    import gguf

    types = gguf.LlamaFileType
    known = {"f32": types.ALL_F32, "f16": types.MOSTLY_F16, "bf16": types.MOSTLY_BF16, "q8_0": types.MOSTLY_Q8_0}
    writer.add_file_type(known[kind])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)


def _add_size(writer: GGUFWriter, weights: Weights, names: Mapping[str, str]) -> None:
    import gguf

    writer.add_size_label(gguf.size_label(sum(math.prod(weights.shape(name)) for name in names), 0, 0, 0))


def _add_tensors(
    writer: GGUFWriter, weights: Weights, names: Mapping[str, str], kind: Kind, norm_offset: float
) -> None:
    import numpy as np

    for name, found in names.items():
        shape = weights.shape(name)
        stored = type_of(shape, kind)
        writer.add_tensor_info(found, shape, np.dtype(np.float32), size_of(shape, stored), raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name, found in names.items():
        offset = norm_offset if found.endswith("norm.weight") else 0.0
        tensor = weights.read(name)
        writer.write_tensor_data(encode(tensor, type_of(tensor.shape, kind), offset=offset, where=name))
