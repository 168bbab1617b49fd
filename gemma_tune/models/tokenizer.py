"""The tokenizer of a Gemma, with the official chat template of its generation; the encoder of the renderer."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from gemma_tune.errors import AccessError, UserError
from gemma_tune.gemma.control import protect_control_tokens
from gemma_tune.gemma.families import Family
from gemma_tune.models.reference import ModelSource, quiet_transformers, resolve

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase


def load_tokenizer(name: str, revision: str | None, family: Family) -> PreTrainedTokenizerBase:
    """The tokenizer of `name`, with the template of `family` whatever the repository holds.

    Base checkpoints come without a template, and the templates of fine-tuned copies differ; a run records the hash of
    the one that is used here.

    Raises:
        UserError: no tokenizer there, or one that is not of this generation, or one that pads with the end token.
        AccessError: the installed TRL holds another template than the one that this version was tested with.
    """
    return open_tokenizer(resolve(name, revision, need="tokenizer"), family)


def open_tokenizer(source: ModelSource, family: Family) -> PreTrainedTokenizerBase:
    """`load_tokenizer` for a model that was resolved already."""
    from transformers import AutoTokenizer

    if not (source.path / "tokenizer.json").is_file() and not (source.path / "tokenizer.model").is_file():
        raise UserError(
            "there is no tokenizer.json",
            where=source.name,
            fix="copy the tokenizer files of the base model there, or name its repository in model.tokenizer",
        )
    with quiet_transformers():
        tokenizer = AutoTokenizer.from_pretrained(str(source.path), local_files_only=True, trust_remote_code=False)
    _check(tokenizer, family, source.name)
    tokenizer.chat_template = official_template(family)
    return tokenizer


def _check(tokenizer: PreTrainedTokenizerBase, family: Family, where: str) -> None:
    """Compare the ids that training and stopping depend on with the facts of the generation."""
    if tokenizer.pad_token_id is not None and tokenizer.pad_token_id == tokenizer.eos_token_id:
        # The loss mask would hide every end token, and the model would never learn to stop.
        raise UserError(
            f"the tokenizer pads with its end token (id {tokenizer.eos_token_id})",
            where=where,
            fix='set "pad_token": "<pad>" in its tokenizer_config.json, or name the official one in model.tokenizer',
        )
    expected = {
        "<bos>": family.bos_id,
        "<eos>": family.eos_id,
        "<pad>": family.pad_id,
        family.turn_start: family.turn_start_id,
        family.turn_end: family.turn_end_id,
    }
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in expected}
    wrong = [f"{token} is {found[token]}, not {number}" for token, number in expected.items() if found[token] != number]
    if wrong:
        raise UserError(
            f"this tokenizer is not {family.label}'s: {'; '.join(wrong)}",
            where=where,
            fix="name the tokenizer of the base model in model.tokenizer",
        )
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = "<pad>"


def official_template(family: Family) -> str:
    """Google's chat template for the generation, from the copies that TRL ships. TRL itself is not imported.

    Raises:
        AccessError: the file is missing or has another hash than the one that the renderer was held to.
    """
    spec = importlib.util.find_spec("trl")
    folder = Path(next(iter(spec.submodule_search_locations or ())) if spec else "")
    file = folder / "chat_templates" / family.template_file
    fix = 'pip install "trl>=1.16,<1.17"'
    if spec is None or not file.is_file():
        raise AccessError("the official chat template is missing from the installed TRL", where=str(file), fix=fix)
    content = file.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    if digest != family.template_sha256:
        raise AccessError(
            f"the installed TRL has another chat template (sha256 {digest[:12]}..., expected "
            f"{family.template_sha256[:12]}...)",
            where=str(file),
            fix=fix,
        )
    return content.decode("utf-8")


class GemmaEncoder:
    """Plain text -> ids, for `gemma.chat`. No text becomes a control token, and no BOS is added.

    The tokenizer itself is left as it is: this works on a copy of its backend in which every control token counts as
    special and special tokens are not looked for in text.

    Attributes:
        sha256: of all that decides about the ids.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, family: Family) -> None:
        from tokenizers import Tokenizer

        document = json.loads(tokenizer.backend_tokenizer.to_str())
        text = json.dumps(protect_control_tokens(document, family.control_ids))
        self.sha256 = hashlib.sha256(text.encode()).hexdigest()
        self._backend: Tokenizer = Tokenizer.from_str(text)
        self._backend.encode_special_tokens = True
        self._backend.no_truncation()
        self._backend.no_padding()

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text, in order. An empty text has no ids.

        Lone surrogates, which JSON can carry and UTF-8 cannot, become U+FFFD.
        """
        clean = [text if _is_utf8(text) else _replace_surrogates(text) for text in texts]
        return [encoding.ids for encoding in self._backend.encode_batch(clean, add_special_tokens=False)]


def _is_utf8(text: str) -> bool:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        return False
    return True


def _replace_surrogates(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
