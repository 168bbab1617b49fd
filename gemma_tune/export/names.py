"""One name for a weight, whatever class its checkpoint was saved in.

The same tensor of a multimodal Gemma is `model.language_model.layers.0...` in the class of transformers,
`language_model.model.layers.0...` in files that were published before transformers 4.52, and `model.layers.0...` in the
text-only class that a run with `model.text_only` trains. Its core name is `layers.0...` in all three.
"""

from __future__ import annotations

import re

from gemma_tune.models.remedies import is_tower

_PEFT = re.compile(r"^base_model\.model\.")
_DECODER = re.compile(r"^(?:model\.language_model\.|language_model\.model\.|model\.|language_model\.(?=lm_head\.))")


def core_name(name: str) -> str:
    """`layers.0.mlp.up_proj.weight`, `embed_tokens.weight`, `norm.weight`, `lm_head.weight`; towers as they are.

    Args:
        name: of a tensor or module, in a checkpoint, in a model, or in an adapter of PEFT.
    """
    name = _PEFT.sub("", name)
    return name if is_tower(name) else _DECODER.sub("", name)
