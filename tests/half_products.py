"""Products of half precision as tensor cores make them, on a CPU: operands in fp16, sums in fp32, the result in fp16.

A CPU without instructions for fp16 may take a hundred times longer for the same numbers. Here operands are turned into
fp32, which is exact, multiplied there, and the result is rounded once. Everything else stays in fp16, as it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_ATEN = torch.ops.aten
_PRODUCTS = {
    _ATEN.mm.default,
    _ATEN.addmm.default,
    _ATEN.bmm.default,
    _ATEN.baddbmm.default,
}
_ATTENTION = {
    _ATEN._scaled_dot_product_flash_attention_for_cpu.default,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward.default,
}
HALVES = (torch.float16, torch.bfloat16)
_LARGE = 2**26
"""Elements from which an operand is turned into fp32 once: the matrix of a real head, which never changes here."""


class HalfProducts(TorchDispatchMode):
    """Inside of it, products of 16-bit tensors on a CPU are computed in fp32 and rounded once.

    Attributes:
        products: how many were.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products = 0
        self._large: dict[tuple[Any, ...], tuple[torch.Tensor, torch.Tensor]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func not in _PRODUCTS and func not in _ATTENTION:
            return func(*args, **kwargs)
        dtype = args[0].dtype
        if dtype not in HALVES:
            return func(*args, **kwargs)
        self.products += 1
        wide = self._wide
        found = func(*tree_map_only(torch.Tensor, wide, args), **tree_map_only(torch.Tensor, wide, kwargs))
        if func is _ATEN._scaled_dot_product_flash_attention_for_cpu.default:
            return found[0].to(dtype), found[1]  # the second are sums, in fp32 with any type
        return tree_map_only(torch.Tensor, lambda tensor: tensor.to(dtype), found)

    def _wide(self, tensor: torch.Tensor) -> torch.Tensor:
        if tensor.dtype not in HALVES:
            return tensor
        if tensor.numel() < _LARGE:
            return tensor.float()
        key = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor._version)
        if key not in self._large:
            self._large[key] = (tensor, tensor.float())  # with the tensor, whose address nobody else gets meanwhile
        return self._large[key][1]
