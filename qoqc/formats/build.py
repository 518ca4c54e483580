"""A model with the weights of a quantized checkpoint, and the tensors of QServe's from a model."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM

from qoqc.errors import Unsupported
from qoqc.formats import qserve
from qoqc.formats.source import Source
from qoqc.quant.weight import dequantize_weight
from qoqc.runtime.packed_linear import named_tensors
from qoqc.runtime.weights import STORE, WeightRef

LOADING_ERRORS = (OSError, ValueError, RuntimeError, KeyError)
"""What transformers raises for tensors that do not fit the model."""


def build_model(source: Source, config: Any, dtype: torch.dtype) -> tuple[Any, list[str]]:
    """The transformers model of `config` with the source's weights, on the CPU.

    Its quantized weights wait packed in STORE, so that nothing rounds them again, and are there
    in `dtype` too, for what the passes leave in 16 bit. Returns the names of quantized weights
    that the model has no Parameter for (merged experts), which are there in `dtype` only.
    Raises Unsupported for tensors that are missing, too many or of another shape.
    """
    kind = AutoModelForCausalLM._model_mapping[type(config)]
    state = dict(source.tensors)
    for name, packed in source.packed.items():
        state[name] = dequantize_weight(packed).to(dtype)
    try:
        model, info = kind.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    except LOADING_ERRORS as error:
        first = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise Unsupported(
            f"the tensors do not fit {kind.__name__} as config.json describes it: {first[0]}"
        ) from error
    for name in sorted(info["missing_keys"]):
        param = model.get_parameter(name)
        if source.kind != "qserve" or "norm" not in name:
            raise Unsupported(f"the checkpoint lacks {name}; download it again")
        with torch.no_grad():
            param.fill_(1)  # as QServe does, which skips the tensors of norms
    for name in sorted(info["unexpected_keys"]):
        # AutoGPTQ gives every linear a bias, zeros where the model has none
        if not name.endswith(".bias") or state[name].any():
            raise Unsupported(
                f"the checkpoint holds {name}, for which {kind.__name__} has no place; "
                "its weights would be wrong without it"
            )
    params = dict(model.named_parameters())
    left = []
    for name, packed in source.packed.items():
        param = params.get(name)
        if param is None:
            left.append(name)
            continue
        STORE.adopt(WeightRef(param, False, name), packed)
    return model.eval().requires_grad_(False), left


def qserve_tensors(model: Any) -> dict[str, torch.Tensor]:
    """A packed Llama model as the tensors of a QServe checkpoint; 16-bit ones as fp16.

    Raises Unsupported for what QServe cannot run: other kinds of model, linears of the blocks
    left in 16 bit, norm weights other than 1, sizes its tiles do not take.
    """
    if model.config.model_type != "llama":
        raise Unsupported(f"QServe runs Llama models; this is {model.config.model_type}")
    tensors: dict[str, torch.Tensor] = {}
    plain: dict[str, torch.Tensor] = {}
    for name, value in named_tensors(model):
        packed = STORE.packed(value) if isinstance(value, torch.nn.Parameter) else None
        module = name.removesuffix(".weight")
        if packed is not None:
            written = qserve.write(name, packed)
            tensors.update({f"{module}.{suffix}": t for suffix, t in written.items()})
        elif module.endswith("_proj"):
            raise Unsupported(f"{name} is in 16 bit, and QServe takes it in 4 only; do not exclude")
        else:
            # a clone: QServe wants a tied output head as a tensor of its own
            plain[name] = value.detach().to(torch.float16, copy=True)
            if not torch.isfinite(plain[name]).all():
                raise Unsupported(f"{name} overflows fp16, which QServe computes in")
    qserve.require_unit_norms("the model", plain)
    return {**tensors, **plain}
