"""The quantization method "qoq" of vLLM. Imports vLLM: see register.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers.utils.hub import cached_file
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding

from qoqc.artifact.manifest import FORMAT, PATH, Manifest
from qoqc.config import verify_mode
from qoqc.errors import ArtifactError, Unsupported
from qoqc.log import get_logger
from qoqc.vllm_plugin.linear import QoqLinearMethod
from qoqc.vllm_plugin.parts import Part

log = get_logger("vllm_plugin")

METHOD = "qoq"
MIN_CAPABILITY = 80
"""What the kernels are made for: sm_80 and later."""


@register_quantization_config(METHOD)
class QoqQuantizationConfig(QuantizationConfig):
    """Tells for each layer of vLLM's model which packed weights of the artifact it is made of.

    vLLM makes it from config.json, then names the model (`maybe_update_config`), whose manifest
    lists the weights. It is pickled on its way to vLLM's other processes.
    """

    def __init__(self) -> None:
        """Of no model yet."""
        super().__init__()
        self._packed: dict[str, Part] = {}
        self._plain: dict[str, str] = {}
        self._model = ""

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> QoqQuantizationConfig:
        """From `quantization_config` in config.json; ArtifactError for another format version."""
        version = config.get("format")
        if version != FORMAT:
            raise ArtifactError(
                f"the model has artifact format {version!r}, this qoqc reads {FORMAT}; compile the "
                "model again"
            )
        log.info(
            "the KV cache is vLLM's: kv_bits=%s of the artifact has no effect (kv_cache_dtype has)",
            config.get("kv_bits"),
        )
        return cls()

    def get_name(self) -> str:
        """The name config.json has for it."""
        return METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Those of the kernels that vLLM has."""
        return [torch.bfloat16, torch.float16]

    @classmethod
    def get_min_capability(cls) -> int:
        """An A100, 80."""
        return MIN_CAPABILITY

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None: it is in config.json."""
        return []

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Read the manifest of `model_name`: a directory, or a repository on the Hub.

        A directory is compared with its checksums, as elsewhere (QOQC_VERIFY); a download has been
        by who made it. Raises ArtifactError if it is missing, damaged or of another version.
        """
        directory = Path(model_name)
        if directory.is_dir():
            manifest = Manifest.read(directory)
            manifest.verify(directory, verify_mode())
        else:
            manifest = Manifest.read(_downloaded(model_name, revision))
        self._model = model_name
        self._packed = {name: Part(name, entry) for name, entry in manifest.weights.items()}
        self._plain = {name: name for name in manifest.tensors}
        for alias, name in manifest.aliases.items():
            if name in manifest.weights:
                raise Unsupported(
                    f"{model_name}: {alias} shares the packed weight of {name}, which vLLM holds "
                    "twice; use qoqc serve for this model"
                )
            self._plain[alias] = name

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Rename the weights as vLLM renames modules, for models where the two differ."""
        self._packed = hf_to_vllm_mapper.apply_dict(self._packed)
        self._plain = hf_to_vllm_mapper.apply_dict(self._plain)

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """What computes `layer`, known to vLLM as `prefix`; None leaves it to vLLM (attention).

        Raises Unsupported for layers that cannot run on the packed weights, ArtifactError if the
        artifact has no weights for a linear.
        """
        if not self._model:
            raise Unsupported(
                "vLLM did not say which model it loads: qoqc has a plug-in for vLLM 0.32"
            )
        if isinstance(layer, LinearBase):
            return self._linear(prefix)
        if isinstance(layer, RoutedExperts):
            raise Unsupported(
                f"{prefix}: the plug-in of qoqc has no experts (mixture of experts); use qoqc "
                "serve for this model"
            )
        if isinstance(layer, VocabParallelEmbedding) and f"{prefix}.weight" in self._packed:
            raise Unsupported(
                f"{prefix} is packed, vLLM takes it in 16 bit; compile the model with lm_head=16"
            )
        return None

    def _linear(self, prefix: str) -> Any:
        above, _, leaf = prefix.rpartition(".")
        children = self.packed_modules_mapping.get(leaf, [leaf])
        names = [f"{above}.{child}.weight" if above else f"{child}.weight" for child in children]
        whole = f"{prefix}.weight"
        if whole in self._packed or whole in self._plain:
            names = [whole]  # made one before it was saved
        packed = [name for name in names if name in self._packed]
        if len(packed) == len(names):
            as_whole = self.packed_modules_mapping.get(leaf) == [leaf]
            return QoqLinearMethod(prefix, [self._packed[name] for name in names], as_whole)
        absent = [name for name in names if name not in self._packed and name not in self._plain]
        if absent:
            raise ArtifactError(
                f"{self._model} has no {absent[0]}, which vLLM wants for {prefix}; vLLM builds "
                "this model in a way the plug-in does not know, use qoqc serve"
            )
        if packed:
            left = next(name for name in names if name not in self._packed)
            raise Unsupported(
                f"{prefix}: vLLM makes one layer of {packed[0]}, which is packed, and {left}, "
                "which is in 16 bit; compile the model with both or neither excluded"
            )
        return UnquantizedLinearMethod()


def _downloaded(model_name: str, revision: str | None) -> Path:
    """The directory in the Hub's cache with the manifest of a repository; vLLM gets the rest."""
    try:
        path = cached_file(model_name, PATH, revision=revision)
    except OSError as error:
        raise ArtifactError(
            f"{model_name} is no directory and has no {PATH} on the Hub: it was not made by qoqc, "
            f"or not uploaded whole ({error})"
        ) from error
    return Path(str(path)).parents[1]
