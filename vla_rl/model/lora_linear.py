"""A linear layer with LoRA whose product runs in the precision of its input; its weights stay float32.

    y = W x + (alpha / rank) B A x

peft's own layer (peft 0.21.2, peft/tuners/lora/layer.py, Linear.forward) casts x to the adapter's precision, multiplies
and adds in it: on a bfloat16 base that is float32, without tensor cores, half of a forward's time on an H100. Here A and
B are cast to x's precision instead, and the product is added to W x by one matrix product. Their gradients arrive in
float32, summed over micro-batches in float32. In a float32 model this layer is peft's own, bit for bit.

Not here: which layers get one, how it is saved (vla_rl.model.adapter).
"""

from __future__ import annotations

import peft
import torch
from peft.tuners import lora
from torch import Tensor


class LoraLinear(lora.Linear):
    """peft's layer with another forward: peft puts it in, saves, loads, switches off and merges it as its own.

    Names: `base_layer` (W, frozen), `lora_A.default.weight` [rank, in] and `lora_B.default.weight` [out, rank], float32.
    One adapter, without dropout, bias or variant.
    """

    def __init__(self, base_layer: torch.nn.Module, adapter_name: str, config: peft.LoraConfig, **kwargs):
        super().__init__(base_layer, adapter_name, config=config, **kwargs)
        assert not (config.lora_dropout or config.lora_bias or self.lora_variant), "only plain LoRA is implemented"

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out], in x's precision."""
        if x.dtype == torch.float32 or self.merged:
            return super().forward(x)
        rows = x.reshape(-1, x.shape[-1])
        result = self.base_layer(rows)
        if not self.disable_adapters:
            (name,) = self.active_adapters
            a, b = self.lora_A[name].weight.to(x.dtype), self.lora_B[name].weight.to(x.dtype)
            # Into the base's own output where nothing is recorded: the same numbers without a copy of it. Where gradients
            # are, checkpointing may keep that output, so it must not change.
            add = torch.addmm if torch.is_grad_enabled() else Tensor.addmm_
            result = add(result, rows @ a.T, b.T, alpha=self.scaling[name])
        return result.reshape(*x.shape[:-1], self.out_features)


def add_adapters(network: torch.nn.Module, config: peft.LoraConfig) -> peft.PeftModel:
    """`peft.get_peft_model` with this layer in the place of peft's own. Adapters are cast to float32."""
    config._register_custom_module({torch.nn.Linear: LoraLinear})  # peft's way in; no part of what it saves
    return peft.get_peft_model(network, config)
