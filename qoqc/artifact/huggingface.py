"""The plug-in of transformers: `AutoModelForCausalLM.from_pretrained(ARTIFACT)` after import qoqc.

transformers reads config.json, builds the model on the meta device, lets the quantizer replace
its linears, fills parameters and buffers by name, and calls the quantizer again.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import tempfile
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi
from torch.nn import Module
from transformers import modeling_utils
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.hub import cached_file
from transformers.utils.quantization_config import QuantizationConfigMixin

from qoqc.artifact.manifest import (
    ASIDE,
    CARD,
    CONFIG,
    GENERATION,
    INDEX,
    PATH,
    WEIGHTS,
    Manifest,
    quantization_config,
    stored_name,
)
from qoqc.artifact.modules import open_modules, seal_modules
from qoqc.artifact.shards import MAX_SHARD, shards_in
from qoqc.artifact.write import complete
from qoqc.codegen.tuning import table
from qoqc.config import Options, verify_mode
from qoqc.errors import ArtifactError, Unsupported
from qoqc.runtime.packed_linear import PackedLinear

METHOD = "qoq"


@register_quantization_config(METHOD)
class QoqConfig(QuantizationConfigMixin):
    """`quantization_config` of an artifact's config.json; the manifest has what loading needs."""

    def __init__(self, **values: Any) -> None:
        """Keep the values as they are: see manifest.quantization_config."""
        self.__dict__.update(values)
        self.quant_method = METHOD


@register_quantizer(METHOD)
class QoqQuantizer(HfQuantizer):
    """Loads packed weights as they are; 16-bit ones never exist, not even for a moment."""

    requires_calibration = True

    def __init__(self, quantization_config: QoqConfig, **kwargs: Any) -> None:
        """See HfQuantizer."""
        super().__init__(quantization_config, **kwargs)
        self.manifest: Manifest | None = None
        self.directory: Path | None = None
        self._modules: dict[str, PackedLinear] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Raise Unsupported for a device map that would move weights while the model runs."""
        device_map = kwargs.get("device_map")
        places = set(device_map.values()) if isinstance(device_map, dict) else set()
        if "disk" in places or ("cpu" in map(str, places) and len(places) > 1):
            raise Unsupported(
                f"device_map {device_map}: packed weights are not offloaded; name GPUs only, or "
                "the CPU only"
            )

    def update_weight_conversions(self, conversions: Any, model: Any = None) -> list[Any]:
        """None: the names in an artifact are those of the model in memory."""
        return []

    def update_parallel_plan(self, model: Any, plan: dict[str, str]) -> None:
        """Nothing: plans name modules, whose names are as they were."""

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **kwargs: Any
    ) -> None:
        if not checkpoint_files:
            raise Unsupported(f"{METHOD} loads from an artifact's files only, not a state_dict")
        self.directory = Path(checkpoint_files[0]).parent
        _require_one_process(model.config, self.directory)
        self.manifest = _manifest(self.directory, model.config)
        foreign = {Path(name).name for name in checkpoint_files} ^ self.manifest.shards.keys()
        if foreign:
            raise ArtifactError(f"{self.directory}: {min(foreign)} is not one of its weight files")
        self.manifest.verify(self.directory, verify_mode())
        self._modules = open_modules(model, self.manifest, self.directory)
        left = self.manifest.weights.keys() - self._modules.keys()
        if left:
            raise Unsupported(
                f"{min(left)} belongs to a module with a forward of its own, which runs compiled "
                f"only; use qoqc.load({str(self.directory)!r})"
            )
        _require_complete(model, self.manifest, self.directory)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> None:
        assert self.manifest is not None and self.directory is not None
        _own_memory(model)
        seal_modules(self._modules)
        self._modules = {}
        attach(model.requires_grad_(False), self.manifest, self.directory, self)

    def is_serializable(self, **kwargs: Any) -> bool:
        """Yes: as an artifact."""
        return True

    @property
    def is_trainable(self) -> bool:
        """No: the backend is for inference."""
        return False

    @property
    def is_compileable(self) -> bool:
        """Yes, by any backend; "qoq" knows the weights."""
        return True


def attach(
    model: Any, manifest: Manifest, directory: Path, quantizer: QoqQuantizer | None = None
) -> None:
    """Make a loaded model one that transformers takes for quantized, and that can be saved.

    The tiles that were found for it are those of its kernels from now on.
    """
    table.adopt(directory, manifest.tuning_tables(directory))
    if quantizer is None:
        quantizer = QoqQuantizer(QoqConfig(**quantization_config(manifest.options)))
        quantizer.manifest, quantizer.directory = manifest, directory
        model.config.quantization_config = quantizer.quantization_config
        model.config._is_quantized = True
        model.hf_quantizer, model.is_quantized = quantizer, True
        model.quantization_method = METHOD
    model.qoqc_options = made_with(manifest)
    model.save_pretrained = types.MethodType(_save_pretrained, model)
    model.push_to_hub = types.MethodType(_push_to_hub, model)


def made_with(manifest: Manifest) -> Options:
    """The options of a manifest; a dump directory belongs to a process, not to a model."""
    return dataclasses.replace(Options.parse(manifest.options), dump=None)


def _save_pretrained(
    self: Any,
    save_directory: str | os.PathLike[str],
    *args: Any,
    push_to_hub: bool = False,
    max_shard_size: int | str = MAX_SHARD,
    **kwargs: Any,
) -> None:
    """PreTrainedModel.save_pretrained, and what makes an artifact of the directory."""
    manifest, source = self.hf_quantizer.manifest, self.hf_quantizer.directory
    if push_to_hub:
        hub = {"repo_id": kwargs.pop("repo_id", Path(save_directory).name)}
        for name in ("commit_message", "private", "token", "revision", "create_pr"):
            if name in kwargs:
                hub[name] = kwargs.pop(name)
    target = Path(save_directory)
    # while the files change it is no artifact; and a file of all weights, left from before, would
    # be read in place of several
    for name in (PATH, WEIGHTS, INDEX):
        (target / name).unlink(missing_ok=True)
    type(self).save_pretrained(self, target, *args, max_shard_size=max_shard_size, **kwargs)
    for folder in ASIDE:
        if (source / folder).is_dir() and (source / folder).resolve() != (
            target / folder
        ).resolve():
            shutil.copytree(source / folder, target / folder, dirs_exist_ok=True)
    manifest = dataclasses.replace(manifest, shards=shards_in(target))
    own = {CARD, CONFIG, GENERATION, INDEX, *manifest.shards}
    complete(manifest, target, lambda name: name in own or name.startswith(ASIDE))
    if push_to_hub:
        _upload(target, **hub)


def _push_to_hub(
    self: Any, repo_id: str, *, max_shard_size: int | str = MAX_SHARD, **kwargs: Any
) -> Any:
    """PreTrainedModel.push_to_hub for directories in directories, and with the artifact's card."""
    kwargs.pop("tags", None)  # the card has them
    with tempfile.TemporaryDirectory() as draft:
        self.save_pretrained(draft, max_shard_size=max_shard_size)
        return _upload(Path(draft), repo_id, **kwargs)


def _upload(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
) -> Any:
    api = HfApi(token=token)
    repo = api.create_repo(repo_id, private=private, exist_ok=True)
    return api.upload_folder(
        repo_id=repo.repo_id,
        folder_path=folder,
        commit_message=commit_message or "Upload an artifact of qoqc",
        commit_description=commit_description,
        revision=revision,
        create_pr=create_pr,
    )


def _guard(original: Callable[..., Any]) -> Callable[..., Any]:
    """get_hf_quantizer that does not let an artifact pass for a plain checkpoint.

    If config.json is damaged where it says quant_method, transformers finds no weights by the
    names it expects, fills the model with random ones, and warns.
    """

    @functools.wraps(original)
    def get_hf_quantizer(config: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(config, *args, **kwargs)
        source = Path(str(getattr(config, "_name_or_path", "") or os.devnull))
        if not isinstance(found[0], QoqQuantizer) and (source / PATH).is_file():
            raise ArtifactError(
                f"{source} is an artifact of qoqc, but its {CONFIG} does not say so: it is "
                "damaged; copy the artifact again"
            )
        return found

    return get_hf_quantizer


# transformers has no hook there; a test notices when the name moves
modeling_utils.get_hf_quantizer = _guard(modeling_utils.get_hf_quantizer)


def _manifest(directory: Path, config: Any) -> Manifest:
    """The manifest beside the weights; from the Hub, if they are in its cache without it."""
    if not (directory / PATH).is_file() and directory.parent.name == "snapshots":
        try:
            cached_file(
                config._name_or_path,
                PATH,
                revision=directory.name,
                cache_dir=directory.parents[2],
            )
        except OSError as error:
            raise ArtifactError(
                f"{config._name_or_path} has no {PATH}: it was not made by qoqc, or not uploaded "
                f"whole ({error})"
            ) from error
    return Manifest.read(directory)


def _require_one_process(config: Any, where: Path) -> None:
    """Raise Unsupported where transformers would cut up packed weights as if they were 16-bit."""
    distributed = getattr(config, "distributed_config", None)
    for name in ("tp_size", "fsdp_size", "pp_size"):
        size = getattr(distributed, name, None) or 1
        if size > 1:
            raise Unsupported(
                f"{where}: transformers cannot split packed weights ({name}={size}); use "
                f"qoqc.load({str(where)!r}, tp={size})"
            )


def _require_complete(model: Module, manifest: Manifest, where: Path) -> None:
    """Raise ArtifactError if transformers would fill a parameter with random values."""
    stored = {*manifest.tensors, *manifest.aliases}
    for name, entry in manifest.weights.items():
        stored |= {stored_name(name, field) for field in entry.expected()}
    missing = model.state_dict().keys() - stored
    if missing:
        raise ArtifactError(
            f"{where} has no values for {min(missing)}; {CONFIG} describes another model, or this "
            "transformers builds it differently"
        )


def _own_memory(model: Module) -> None:
    """Copy what is a view of a mapped file, which may be overwritten or cut short later.

    And a view is not aligned as an allocation is, which changes the order of some sums.
    """
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.device.type == "cpu":
            tensor.data = tensor.data.clone()
