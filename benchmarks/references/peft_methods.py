"""Other ways to train few parameters, from PEFT: LoRA, SHiRA and Super-Tuning at the same trained count."""

from __future__ import annotations

from typing import Any

from torch import nn

RANK = 16


def lora(model: Any) -> nn.Module:
    """LoRA of rank 16 on every linear layer but the head, which is trained whole."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=RANK, lora_dropout=0.0, **_targets(model)))


def shira(model: Any) -> nn.Module:
    """SHiRA, whose rank 16 trains as many entries as LoRA's."""
    from peft import ShiraConfig, get_peft_model

    return get_peft_model(model, ShiraConfig(r=RANK, random_seed=0, **_targets(model)))


def super_tuning(model: Any) -> nn.Module:
    """Super-Tuning of the largest weights, as many as LoRA trains."""
    from peft import SupertuningConfig, get_peft_model

    linear = list(_linear(model).values())
    wanted = sum(RANK * (module.in_features + module.out_features) for module in linear)
    share = wanted / sum(module.weight.numel() for module in linear)
    return get_peft_model(model, SupertuningConfig(sparsity=1 - share, **_targets(model)))


PEFT_METHODS = {"PEFT LoRA r=16": lora, "PEFT SHiRA": shira, "PEFT Super-Tuning": super_tuning}


def _linear(model: nn.Module) -> dict[str, nn.Linear]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not name.startswith("classifier")
    }


def _targets(model: nn.Module) -> dict[str, Any]:
    return {"target_modules": list(_linear(model)), "modules_to_save": ["classifier"]}
