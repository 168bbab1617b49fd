"""Open a GGUF file with transformers, to talk to it and to compare it. Files for llama.cpp need no llama.cpp then."""

from __future__ import annotations

import struct
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from gemma_tune.errors import AccessError, UserError
from gemma_tune.gemma.families import FAMILIES, Family
from gemma_tune.models import remedies
from gemma_tune.models.load import (
    check_report,
    device_map,
    dtype_named,
    dtype_of_machine,
    prepare,
    residual_exponent_of,
)
from gemma_tune.models.reference import ModelSource, forget_gguf, quiet_transformers, repair_gguf_tokenizer
from gemma_tune.models.tokenizer import open_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_LLAMA = "run it with llama.cpp: llama-cli -m {}"
# Value types of the format (ggml, docs/gguf.md) -> how `struct` reads them; 8 is text, 9 a list.
_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_TEXT, _LIST = 8, 9


@dataclass(frozen=True, slots=True)
class Header:
    """What a GGUF file says of itself.

    Attributes:
        facts: key -> value; lists of texts (the vocabulary) are left out.
        size: bytes that the file must have at least.
    """

    facts: Mapping[str, Any]
    size: int

    def of_model(self, key: str) -> Any:
        """A fact of the architecture, e.g. `rope.freq_base_swa`; None where the file does not say it."""
        return self.facts.get(f"{self.facts['general.architecture']}.{key}")


def find_gguf(target: str | Path) -> Path | None:
    """The GGUF file that is meant by its name, or by a folder that holds nothing else to load; None for other targets.

    Raises:
        UserError: there are several.
    """
    path = Path(target).expanduser()
    if path.is_file() and path.suffix.lower() == ".gguf":
        return path
    loadable = ("config.json", "adapter_config.json", "plan.json", "adapter", "model")
    if not path.is_dir() or any((path / name).exists() for name in loadable) or any(path.glob("*.safetensors")):
        return None
    files = sorted(path.glob("*.gguf"))
    if len(files) > 1:
        raise UserError(
            f"there are {len(files)} GGUF files: {', '.join(file.name for file in files[:5])}",
            where=str(path),
            fix=f"name one: {files[0]}",
        )
    return files[0] if files else None


def open_gguf(file: Path, changes: Mapping[str, Any]) -> tuple[Any, PreTrainedTokenizerBase, Family]:
    """The model of a GGUF file, dequantised, with its tokenizer.

    The tokenizer is tokenizer.json beside the file where there is one. Else it is rebuilt from the file where that is
    exact (`Family.gguf_tokenizer`).

    Args:
        file: of Gemma 2 or of the text model of Gemma 3.
        changes: `dtype` and `attn_implementation` in place of those of this machine.

    Returns:
        As `models.saved.load_run`.

    Raises:
        UserError: damaged or cut, an adapter, no Gemma, or one that transformers cannot read.
        AccessError: the package `gguf` is missing.
    """
    header = read_header(file)
    family = _family(header, file)
    attention = str(changes.get("attn_implementation") or family.attention[0])
    remedies.check_attention(attention, family)
    dtype = changes.get("dtype") or dtype_of_machine(family)
    tokenizer = _tokenizer(file, family)
    from transformers import AutoModelForCausalLM

    try:
        with quiet_transformers():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(file.parent),
                gguf_file=file.name,
                config=_config(file, header, family),
                dtype=dtype_named(dtype),
                attn_implementation=attention,
                output_loading_info=True,
                local_files_only=True,
                device_map=device_map(),
            )
    except NotImplementedError as exc:
        raise UserError(
            f"transformers cannot read a type of its tensors: {exc}", where=str(file), fix=_LLAMA.format(file)
        ) from exc
    model, report = loaded
    check_report(report, str(file), only_text=False)
    forget_gguf(model)
    prepare(model, family, residual_exponent_of(dtype, family))
    return model, tokenizer, family


def read_header(file: Path) -> Header:
    """Read what the file says of itself, without its tensors. Takes no second, where the official reader takes many.

    Raises:
        UserError: it is no GGUF file, or it is cut.
        AccessError: the package `gguf` is missing.
    """
    try:
        import gguf  # noqa: F401
    except ImportError as exc:
        raise AccessError(
            "the package gguf, which reads GGUF files, is not installed",
            where=str(file),
            fix='pip install "gemma-tune[gguf]"',
        ) from exc
    size = file.stat().st_size
    try:
        with file.open("rb") as handle:
            header = _read(handle, size)
    except (struct.error, UnicodeDecodeError, KeyError, ValueError, TypeError, ZeroDivisionError) as exc:
        raise _damaged(file, f"no GGUF file, or its beginning is damaged ({size:,} bytes)") from exc
    if size < header.size:
        raise _damaged(file, f"cut: it has {size:,} of {header.size:,} bytes")
    return header


def _damaged(file: Path, what: str) -> UserError:
    return UserError(f"this is {what}", where=str(file), fix="copy or download the file again, or export it again")


def _read(handle: BinaryIO, size: int) -> Header:
    def number(code: str) -> Any:
        return struct.unpack(f"<{code}", handle.read(struct.calcsize(f"<{code}")))[0]

    def count() -> int:
        """Of bytes or of things that take some: never more than the file has bytes."""
        found = int(number("Q"))
        if found > size:
            raise ValueError(found)
        return found

    def text() -> str:
        length = count()
        data = handle.read(length)
        if len(data) < length:
            raise ValueError(length)
        return data.decode("utf-8")

    def value(kind: int) -> Any:
        if kind == _TEXT:
            return text()
        if kind != _LIST:
            return number(_SCALARS[kind])
        inner, length = number("I"), count()
        if inner == _TEXT:
            for _ in range(length):
                handle.seek(count(), 1)
            return None
        code = f"<{length}{_SCALARS[inner]}"
        return list(struct.unpack(code, handle.read(struct.calcsize(code))))

    if handle.read(4) != b"GGUF" or number("I") not in (2, 3):
        raise ValueError("not GGUF")
    tensors, keys = count(), count()
    facts: dict[str, Any] = {}
    for _ in range(keys):
        key = text()
        facts[key] = value(number("I"))
    if not isinstance(facts.get("general.architecture"), str):
        raise ValueError("no architecture")
    ends = [0]
    for _ in range(tensors):
        text()
        shape = [number("Q") for _ in range(number("I"))]
        kind = number("I")
        ends.append(number("Q") + _bytes(shape, kind))
    alignment = int(facts.get("general.alignment", 32))
    if "split.count" in facts:
        facts["split.count"] = int(facts["split.count"])
    start = -(-handle.tell() // alignment) * alignment
    return Header({key: found for key, found in facts.items() if found is not None}, start + max(ends))


def _bytes(shape: list[int], kind: int) -> int:
    """Of a tensor of this type."""
    import math

    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
    return math.prod(shape) // block * size


def transformers_reads(family: Family) -> bool:
    """Whether transformers has a reader for GGUF files of this generation."""
    from transformers.modeling_gguf_pytorch_utils import GGUF_SUPPORTED_ARCHITECTURES

    return family.gguf is not None and family.gguf.arch in GGUF_SUPPORTED_ARCHITECTURES


def _family(header: Header, file: Path) -> Family:
    name = str(header.facts["general.architecture"])
    if header.facts.get("general.type") == "adapter":
        raise UserError(
            "this is a LoRA adapter, not a model",
            where=str(file),
            fix=f"put it on its base: llama-cli -m BASE.gguf --lora {file}",
        )
    if not name.startswith("gemma"):
        raise UserError(f"this is no Gemma: its architecture is '{name}'", where=str(file), fix=_LLAMA.format(file))
    found = (row for row in FAMILIES.values() if row.text_model_type is None and row.gguf and row.gguf.arch == name)
    family = next(found, None)
    if family is None or not transformers_reads(family) or header.facts.get("split.count", 1) > 1:
        what = "one part of a split file" if header.facts.get("split.count", 1) > 1 else f"architecture '{name}'"
        raise UserError(
            f"transformers does not read this GGUF file exactly ({what})", where=str(file), fix=_LLAMA.format(file)
        )
    return family


def _config(file: Path, header: Header, family: Family) -> Any:
    """The config of transformers, completed: it leaves facts out that the file states or llama.cpp knows.

    Defect: transformers up to at least 5.23 reads neither the RoPE scaling of Gemma 3 nor the second RoPE base, the
    soft caps, the pattern of the layers, nor the scale of the queries, which differs in the 27B models. It takes
    its own defaults, without a word.
    """
    from transformers import AutoConfig

    with quiet_transformers():
        config: Any = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
    facts = family.gguf
    assert facts is not None
    narrow = config.num_hidden_layers == facts.narrow_scale_layers
    config.query_pre_attn_scalar = config.hidden_size // config.num_attention_heads if narrow else config.head_dim
    if facts.period is not None:
        stated = header.of_model("attention.sliding_window_pattern")
        layers = range(config.num_hidden_layers)
        sliding = stated or [(layer + 1) % facts.period != 0 for layer in layers]
        config.layer_types = ["sliding_attention" if sliding[layer] else "full_attention" for layer in layers]
    config.attn_logit_softcapping = header.of_model("attn_logit_softcapping") or family.attention_softcap
    config.final_logit_softcapping = header.of_model("final_logit_softcapping") or family.final_softcap
    _complete_ropes(config, header)
    return config


def _complete_ropes(config: Any, header: Header) -> None:
    ropes = config.rope_parameters
    if "full_attention" not in ropes:
        return
    whole = dict(ropes["full_attention"]) | {"rope_theta": header.of_model("rope.freq_base")}
    if header.of_model("rope.scaling.type") == "linear":
        whole |= {"rope_type": "linear", "factor": header.of_model("rope.scaling.factor")}
    near = dict(ropes["sliding_attention"])
    if header.of_model("rope.freq_base_swa"):
        near["rope_theta"] = header.of_model("rope.freq_base_swa")
    config.rope_parameters = {"full_attention": whole, "sliding_attention": near}


def _tokenizer(file: Path, family: Family) -> PreTrainedTokenizerBase:
    if (file.parent / "tokenizer.json").is_file():
        return open_tokenizer(ModelSource(str(file.parent), file.parent, None), family)
    if not family.gguf_tokenizer:
        raise UserError(
            f"a GGUF file does not hold all of {family.label}'s tokenizer",
            where=str(file),
            fix="put tokenizer.json of its base beside it",
        )
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        rebuilt = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name, local_files_only=True)
        rebuilt.save_pretrained(folder)
        repair_gguf_tokenizer(Path(folder) / "tokenizer.json")
        return open_tokenizer(ModelSource(str(file), Path(folder), None), family)
