"""Settings: the options of the backend and the environment switches. Read nowhere else.

| name         | meaning                                                               |
|--------------|-----------------------------------------------------------------------|
| QOQC_DUMP    | directory for numbered graphs, generated kernels and the report       |
| QOQC_CACHE   | directory for generated kernel sources (default: ~/.cache/qoqc)       |
| QOQC_LOG     | level for the `qoqc` logger (DEBUG, INFO, WARNING; default WARNING)    |
| QOQC_VERIFY  | checks when an artifact is loaded: full (default), or lazy = of weight |
|              | files only size and header                                            |
| QOQC_CHECK_PAGES | 1 = block tables are checked before each launch on a GPU, but for those |
|              | captured in CUDA graphs: slow (default 0)                              |
| QOQC_RECORDS | 0 = trace a loaded artifact's calls, even those that an earlier       |
|              | process traced and compiled: docs/artifacts.md (default 1)            |
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast, get_args, get_type_hints

from qoqc.errors import OptionError

Verify = Literal["full", "lazy"]

LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of `torch.compile(model, backend="qoq", options={...})`.

    group_size    weights per level-2 group along the input channels; -1 = one group per channel.
    kv_bits       bits of the KV cache made by `qoqc.compile`; 16 leaves the model's own cache.
    kv_layers     bits of each layer's part of the cache, first to last, in place of kv_bits.
    prefill_kv    what the tokens of a prefill chunk attend to among themselves: their "exact"
                  16-bit keys and values, or the "quantized" ones a later read would give.
                  With "quantized" a forward without a cache quantizes too (perplexity runs).
    lm_head       the output head: "16" leaves it in 16 bit; "w8a8" and "w4a8" quantize it. Of one
                  that is tied to the embedding they pack a copy, and the embedding stays.
    exclude       fnmatch patterns of module names whose linears stay in 16 bit.
    strict        a linear or attention left in 16 bit is an error, not a line of the report.
    tune          tile choice of the generated kernels: "heuristic", or "search" on the device.
    mode          Inductor's mode; "reduce-overhead" turns its CUDA graphs on. An option, because
                  torch takes its own `mode` argument only where there are no options.
    graphs        generate() of a model that qoqc.compile compiled replays whole decode steps as
                  CUDA graphs, in the place of Inductor's (GPUs, and caches of qoqc's).
    glue          who compiles what is left of the graph: "inductor", or "eager" (debugging).
    release       drop the 16-bit storage of the packed weights after packing.
    artifact      directory of a compiled model whose packed weights are used instead of packing.
    dump          directory for numbered graphs, kernels and the report (or QOQC_DUMP).
    require_cached  an error if a graph or a kernel is not in the caches of compiled code.
    """

    group_size: Literal[128, -1] = 128
    kv_bits: Literal[4, 8, 16] = 4
    kv_layers: tuple[Literal[4, 8, 16], ...] = ()
    prefill_kv: Literal["exact", "quantized"] = "exact"
    lm_head: Literal["16", "w8a8", "w4a8"] = "16"
    exclude: tuple[str, ...] = ()
    strict: bool = False
    tune: Literal["heuristic", "search"] = "heuristic"
    mode: Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"] = (
        "default"
    )
    graphs: bool = True
    glue: Literal["inductor", "eager"] = "inductor"
    release: bool = False
    artifact: str | None = None
    dump: str | None = None
    require_cached: bool = False

    @classmethod
    def parse(cls, raw: Mapping[str, Any] | None) -> Options:
        """Check a plain dict (torch.compile's `options`) and fill in defaults.

        Raises OptionError naming the option, the value and the allowed set.
        """
        known = {field.name: field for field in dataclasses.fields(cls)}
        hints = get_type_hints(cls)
        values: dict[str, Any] = {}
        for name, value in (raw or {}).items():
            if name not in known:
                raise OptionError(f"unknown option {name!r}; qoqc knows {', '.join(sorted(known))}")
            values[name] = _checked(name, value, hints[name])
        if values.get("kv_layers") and values.get("kv_bits") == 16:
            raise OptionError("kv_bits=16 means no cache of qoqc's: it takes no kv_layers")
        values.setdefault("dump", os.environ.get("QOQC_DUMP") or None)
        return cls(**values)

    def layer_bits(self, layers: int) -> tuple[Literal[4, 8, 16], ...]:
        """KV bits of each of `layers` layers. Raises OptionError if kv_layers has another count."""
        if self.kv_layers and len(self.kv_layers) != layers:
            raise OptionError(
                f"kv_layers names the bits of {len(self.kv_layers)} layers, the model has {layers}"
            )
        return self.kv_layers or (self.kv_bits,) * layers


def _checked(name: str, value: Any, hint: Any) -> Any:
    """`value` if the annotation `hint` admits it, else OptionError."""
    allowed = get_args(hint)
    if name == "exclude":
        items = [value] if isinstance(value, str) else value
        if not isinstance(items, (list, tuple)) or not all(isinstance(i, str) for i in items):
            raise OptionError(f"option exclude={value!r}: expected a list of name patterns")
        return tuple(items)
    if name == "kv_layers":
        choices = [(type(choice), choice) for choice in get_args(allowed[0])]
        items = value if isinstance(value, (list, tuple)) else [None]
        if not all((type(item), item) in choices for item in items):
            raise OptionError(
                f"option kv_layers={value!r}: expected a list with 4, 8 or 16 for each layer"
            )
        return tuple(items)
    if hint is bool:
        if not isinstance(value, bool):
            raise OptionError(f"option {name}={value!r}: expected True or False")
        return value
    if type(None) in allowed:
        if value is not None and not isinstance(value, (str, os.PathLike)):
            raise OptionError(f"option {name}={value!r}: expected a directory path")
        return None if value is None else os.fspath(value)
    for choice in allowed:
        # types must agree too: True == 1 and 4.0 == 4, but neither is a number of bits
        if type(value) is type(choice) and value == choice:
            return choice
    raise OptionError(f"option {name}={value!r}: expected one of {', '.join(map(repr, allowed))}")


def cache_dir() -> Path:
    """The directory for generated kernels and tuning tables."""
    return Path(os.environ.get("QOQC_CACHE") or Path.home() / ".cache" / "qoqc")


def log_level() -> str:
    """The level of the `qoqc` logger; raises OptionError for an unknown one."""
    level = os.environ.get("QOQC_LOG", "WARNING").upper()
    if level not in LOG_LEVELS:
        raise OptionError(f"QOQC_LOG={level!r}: expected one of {', '.join(LOG_LEVELS)}")
    return level


def records_enabled() -> bool:
    """Whether compiled calls are recorded and replayed; OptionError for an unknown value."""
    return _switch("QOQC_RECORDS", default="1")


def checks_pages() -> bool:
    """Whether block tables are checked before each launch; OptionError for an unknown value."""
    return _switch("QOQC_CHECK_PAGES", default="0")


def _switch(name: str, default: str) -> bool:
    value = os.environ.get(name, default)
    if value not in ("0", "1"):
        raise OptionError(f"{name}={value!r}: expected 0 or 1")
    return value == "1"


def verify_mode() -> Verify:
    """How much of an artifact is compared with its checksums at load; OptionError if unknown."""
    mode = os.environ.get("QOQC_VERIFY", "full")
    for choice in get_args(Verify):
        if mode == choice:
            return cast("Verify", choice)
    raise OptionError(f"QOQC_VERIFY={mode!r}: expected one of {', '.join(get_args(Verify))}")


def private_cache_dir(name: str) -> Path:
    """The directory `name` of the cache, made if need be, which only its owner can write to.

    For what is executed: Triton reads a kernel's source from its file. Raises OptionError if
    others could have put something there.
    """
    root = cache_dir()
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    (root / name).mkdir(mode=0o700, exist_ok=True)
    for path in (root, root / name):
        status = path.stat()
        if status.st_mode & 0o022:
            raise OptionError(
                f"{path} is writable by others, and code in it is executed; chmod go-w {path}, or "
                "set QOQC_CACHE to another directory"
            )
        if os.getuid() not in (0, status.st_uid) and status.st_uid != 0:
            raise OptionError(
                f"{path} belongs to another user, and code in it is executed; set QOQC_CACHE to "
                "another directory"
            )
    return root / name
