"""All that speaks to llama.cpp, through llama-cpp-python, which is optional: quantise, tokenise, generate.

Nothing else imports `llama_cpp`. What is asked of it is plain: fp32 keys and values, no flash attention, the arg max of
the logits, so that what differs from transformers is the file's doing.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gemma_tune.errors import AccessError, UserError

if TYPE_CHECKING:
    import numpy as np

QUANTS = ("q3_k_m", "q4_0", "q4_k_s", "q4_k_m", "q5_k_m", "q6_k", "q8_0")
"""What `quantize` can make, the smallest first. All are usable without an importance matrix."""

_FIX = 'pip install "gemma-tune[llamacpp]" (it is compiled on this machine: about 5 minutes)'


def llama_cpp() -> Any:
    """The module.

    Raises:
        AccessError: it is not installed, or its library does not load.
    """
    try:
        import llama_cpp as module
    except ImportError as exc:
        raise AccessError("llama-cpp-python is not installed", where="llama.cpp", fix=_FIX) from exc
    except (OSError, RuntimeError) as exc:
        raise AccessError(f"the library of llama-cpp-python does not load: {exc}", where="llama.cpp", fix=_FIX) from exc
    _hush(module)
    return module


def has_llama_cpp() -> bool:
    """Whether llama-cpp-python can be used here."""
    try:
        llama_cpp()
    except AccessError:
        return False
    return True


def quantize(source: Path, target: Path, kind: str) -> None:
    """A GGUF file in f32, f16 or bf16 -> a smaller one.

    Args:
        kind: one of `QUANTS`.

    Raises:
        UserError: an unknown kind.
        AccessError: llama-cpp-python is missing, or llama.cpp could not write.
    """
    if kind not in QUANTS:
        raise UserError(f"unknown quantisation '{kind}'", where="--quantize", fix=f"choose one of {', '.join(QUANTS)}")
    module = llama_cpp()
    params = module.llama_model_quantize_default_params()
    # llama.cpp writes the last letter large: Q4_K_M.
    params.ftype = getattr(module, f"LLAMA_FTYPE_MOSTLY_{kind.upper()}")
    params.nthread = _threads()
    failed = module.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    if failed:
        raise AccessError(
            f"llama.cpp could not quantise it to {kind}",
            where=str(target),
            fix="see that the disk has room, and that the source is f32, f16 or bf16",
        )


class LlamaModel:
    """A GGUF file that is open in llama.cpp. Made by `open_gguf`."""

    def __init__(self, module: Any, model: Any) -> None:
        self._module = module
        self._model = model
        self._vocab = module.llama_model_get_vocab(model.model)

    @property
    def rows(self) -> int:
        """How many tokens it knows."""
        return int(self._model.n_vocab())

    def tokenize(self, text: str, *, control: bool) -> list[int]:
        """Ids of a text, without BOS.

        Args:
            control: look for control tokens in the text, as a server does with what the template renders.
        """
        return [int(token) for token in self._model.tokenize(text.encode("utf-8"), add_bos=False, special=control)]

    def detokenize(self, ids: Sequence[int]) -> str:
        """What llama.cpp prints for these ids; control tokens print nothing."""
        # Defect: Llama.detokenize, up to at least 0.3.36, has 32 bytes for a token and loses a longer one.
        tokens = (self._module.llama_token * len(ids))(*ids)
        size = 0
        while True:
            text = ctypes.create_string_buffer(size)
            found = self._module.llama_detokenize(self._vocab, tokens, len(ids), text, size, False, False)
            if found >= 0:
                return text.raw[:found].decode("utf-8", errors="replace")
            size = -found

    def stops_at(self, token: int) -> bool:
        """Whether llama.cpp ends a generation at this token."""
        return bool(self._module.llama_vocab_is_eog(self._vocab, token))

    def log_probs(self, ids: Sequence[int]) -> np.ndarray:
        """Natural log-probabilities of the token behind `ids`, [rows], fp64.

        Args:
            ids: with BOS.
        """
        import numpy as np

        self._model.reset()
        self._model.eval(list(ids))
        logits = self._logits().astype(np.float64)
        return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())

    def greedy(self, ids: Sequence[int], count: int, stop_ids: Collection[int] = ()) -> list[int]:
        """Up to `count` tokens behind `ids`, each the most likely; the first of `stop_ids` is the last one."""
        made: list[int] = []
        self._model.reset()
        self._model.eval(list(ids))
        while True:
            made.append(int(self._logits().argmax()))
            if len(made) == count or made[-1] in stop_ids:
                return made
            self._model.eval(made[-1:])

    def _logits(self) -> np.ndarray:
        """Of the last token, [rows], fp32; valid until the next `eval`."""
        import numpy as np

        return np.ctypeslib.as_array(self._module.llama_get_logits_ith(self._model.ctx, -1), shape=(self.rows,))


@contextmanager
def open_gguf(
    file: Path, *, lora: Path | None = None, context: int = 2048, vocabulary_only: bool = False
) -> Iterator[LlamaModel]:
    """Open a GGUF file on the CPU.

    Args:
        lora: an adapter's GGUF file to put on it.
        context: the most tokens, prompt and answer together.
        vocabulary_only: read no tensor; only `tokenize`, `detokenize`, `rows` and `stops_at` work then.

    Raises:
        UserError: llama.cpp cannot read it.
        AccessError: llama-cpp-python is missing.
    """
    module = llama_cpp()
    for one in (file, lora):
        if one is not None and not one.is_file():
            raise UserError("no such file", where=str(one), fix="export it first")
    try:
        model = module.Llama(
            str(file),
            vocab_only=vocabulary_only,
            n_gpu_layers=0,
            n_ctx=context,
            n_batch=512,
            n_threads=_threads(),
            n_threads_batch=_threads(),
            type_k=module.GGML_TYPE_F32,
            type_v=module.GGML_TYPE_F32,
            flash_attn=False,
            verbose=False,
        )
    except (ValueError, RuntimeError) as exc:
        raise UserError(f"llama.cpp cannot read it: {exc}", where=str(file), fix="export it again") from exc
    try:
        if lora is not None:
            _put_on(module, model, lora)
        yield LlamaModel(module, model)
    finally:
        model.close()


def _put_on(module: Any, model: Any, lora: Path) -> None:
    """Put an adapter on the model, which frees it in the end.

    Defect: Llama(lora_path=...), up to at least 0.3.36, compares a null pointer with None, and so answers with the base
    alone where llama.cpp has refused the adapter.
    """
    adapter = module.llama_adapter_lora_init(model.model, str(lora).encode())
    one, scale = (module.llama_adapter_lora_p_ctypes * 1)(adapter), (ctypes.c_float * 1)(1.0)
    if not adapter or module.llama_set_adapters_lora(model.ctx, one, 1, scale):
        raise UserError(
            "llama.cpp refuses this adapter", where=str(lora), fix="put it on the GGUF file of its own base"
        )


def _threads() -> int:
    """OMP_NUM_THREADS where it is set, as torch has it: threads of llama.cpp that wait for a busy core cost minutes."""
    chosen = os.environ.get("OMP_NUM_THREADS", "")
    if chosen.isdigit() and int(chosen):
        return int(chosen)
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@cache
def _hush(module: Any) -> Any:
    """Stop llama.cpp's log, which goes to stderr by a callback. What fails is said by our errors.

    Returns:
        The callback, which has to live as long as the library.
    """
    silent = module.llama_log_callback(lambda level, text, data: None)
    module.llama_log_set(silent, ctypes.c_void_p(0))
    return silent
