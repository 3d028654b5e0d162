"""The language model's frozen linear layers in 4 bit (QLoRA, Dettmers et al. 2023, section 3): a base for 16 GB cards.

NF4: blocks of 64 weights, each weight one of 16 quantiles of a normal distribution times its block's largest; those
largest in 8 bit, in blocks of 256 ("double quantisation"). 4.13 bit a weight instead of 16.

bitsandbytes, an optional package, packs and unpacks. Its own layer is not used: it takes another kernel, of other
rounding, where no gradient is wanted (0.50.2 nn/modules.py, Linear4bit.forward), and a policy must act with the numbers
that it is scored with. Here the weights are unpacked and multiplied in the same way whatever is asked.

Not here: the adapters on top (vla_rl.model.lora_linear), reading files (vla_rl.model.prismatic).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vla_rl.run.failures import one_line
from vla_rl.run.settings import ConfigError


def check_quantization(quantization: str, device: torch.device | str | None = None) -> None:
    """Args: quantization: "none" or "nf4"; device: where it must work, tried on a few numbers; None only looks.

    Raises:
        ConfigError: bitsandbytes is not there or does not work there, or it is another quantization.
    """
    if quantization == "none":
        return
    if quantization != "nf4":
        raise ConfigError(f"policy.quantization={quantization!r:.40}; expected none or nf4")
    way_out = "run pip install -r requirements-4bit.txt in the environment, or set policy.quantization=none"
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"policy.quantization=nf4 needs bitsandbytes, which is not installed; {way_out}")
    if device is not None:
        try:
            unpack(*pack(torch.ones(8, 64, device=device)))
        except Exception as error:  # it may raise anything: no library for this CUDA, a card too old
            reason = f"{type(error).__name__}: {one_line(error)}"
            raise ConfigError(
                f"policy.quantization=nf4: bitsandbytes does not work on {device} ({reason}); {way_out}"
            ) from error


class Linear4bit(nn.Linear):
    """y = W x + b with W [out, in] in 4 bit, frozen.

    Attributes:
        weight: what is kept of W: uint8 [out * in / 2, 1].
        sample: up to 64 values of W as it was, see `sample_of`.
    """

    def __init__(self, layer: nn.Linear, weight: Tensor):
        """Args: layer: what it takes the place of; weight: W, in the precision in which it shall be multiplied."""
        super(nn.Linear, self).__init__()  # nn.Linear's own would take memory for W
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.register_parameter("bias", layer.bias)
        packed, self.quant_state = pack(weight)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.sample = sample_of(weight)

    def dequantize(self) -> Tensor:
        """W as it is multiplied: [out, in], in the precision that it was given in."""
        return unpack(self.weight, self.quant_state).view(self.out_features, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        return PackedProduct.apply(x, self.weight, self.quant_state, self.out_features, self.bias)


class PackedProduct(torch.autograd.Function):
    """F.linear that keeps the packed weight for the backward pass and unpacks it there again."""

    @staticmethod
    def forward(ctx, x: Tensor, packed: Tensor, quant_state: Any, out_features: int, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.quant_state, ctx.out_features = quant_state, out_features
        weight = unpack(packed, quant_state).view(out_features, -1).to(x.dtype)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        (packed,) = ctx.saved_tensors
        weight = unpack(packed, ctx.quant_state).view(ctx.out_features, -1).to(grad.dtype)
        return grad @ weight, None, None, None, None


def pack(weight: Tensor) -> tuple[Tensor, Any]:
    """Any shape -> uint8 [numel / 2, 1] and what bitsandbytes needs to unpack it.

    As one row: with rows that are no multiple of 64, bitsandbytes 0.50.2 on the CPU packs blocks across rows and unpacks
    them row by row, so that a quarter of the weights' size is error. Of longer rows the result is the same.
    """
    from bitsandbytes.functional import quantize_4bit

    return quantize_4bit(weight.reshape(1, -1), blocksize=64, compress_statistics=True, quant_type="nf4")


def unpack(packed: Tensor, quant_state: Any) -> Tensor:
    """[1, numel]."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(packed, quant_state)


# ---------------------------------------------------------------------- of a network that may have such layers


def packed_layer(network: nn.Module, name: str) -> Linear4bit | None:
    """The layer whose packed weight a parameter's name is of; None for any other parameter."""
    module_name, _, leaf = name.rpartition(".")
    module = network.get_submodule(module_name)
    return module if leaf == "weight" and isinstance(module, Linear4bit) else None


def dense_parameters(network: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """named_parameters, with 4-bit weights unpacked, one at a time: what the network computes with."""
    for name, parameter in network.named_parameters():
        layer = packed_layer(network, name)
        yield name, parameter if layer is None else layer.dequantize()


def count_weights(network: nn.Module) -> int:
    """Of all parameters, 4-bit ones too, of which a byte holds two."""
    layers = (packed_layer(network, name) for name, _ in network.named_parameters())
    packed = sum(layer.weight.numel() for layer in layers if layer is not None)
    return sum(p.numel() for p in network.parameters()) + packed


def sample_of(weight: Tensor) -> Tensor:
    """Up to 64 values, evenly spaced, rounded to bfloat16: float32 on the CPU."""
    values = weight.detach().flatten()
    return values[:: max(1, len(values) // 64)][:64].to(torch.bfloat16).float().cpu()
