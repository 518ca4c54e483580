"""A decoder as a chain of blocks: one runs at a time, with tensors it is given."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module

from qoqc.calibrate.calls import Call, hidden_of, require_alike, to_fp32
from qoqc.calibrate.recorder import Recorder
from qoqc.errors import Unsupported
from qoqc.quant.activation import quantize_act

See = Callable[[Tensor], Tensor | None]
"""Called with a linear's input; what it returns, if anything, is read instead."""


class Stop(Exception):
    """Ends a forward pass that has shown what was wanted."""


class Blocks:
    """The blocks of a Hugging Face decoder, found by name, run in fp32.

    Every window has the same length and no padding, so what a block gets beside the hidden state
    (positions, masks, rotary tables) is the same for all, and is captured once. The hidden state
    of a block is what the one before returned: both are checked, on the first two windows.
    """

    def __init__(self, model: Any, names: Sequence[str], windows: Tensor) -> None:
        """Capture the calls on windows int64 [W, S]. Raises Unsupported if it is no such chain."""
        self.names = list(names)
        self.recorder = Recorder(model.config.get_text_config(decoder=True).num_hidden_layers)
        self._model = model
        self._modules: list[Module] = [model.get_submodule(name) for name in names]
        self._calls = self._capture(windows[:1])
        if len(windows) > 1:
            require_alike(self.names, self._calls, self._capture(windows[1:2]))

    @torch.no_grad()
    def embed(self, tensors: Mapping[str, Tensor], windows: Tensor) -> list[Tensor]:
        """The hidden states fp32 [1, S, width] that enter the first block, on the CPU."""
        found: list[Tensor] = []

        def see(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(hidden_of(args, kwargs)[0].float().cpu())
            raise Stop

        own = dict(self._model.named_parameters())
        outside = {
            name: tensor
            for name, tensor in tensors.items()
            if name in own and not name.startswith(tuple(f"{block}." for block in self.names))
        }
        hook = self._modules[0].register_forward_pre_hook(see, with_kwargs=True)
        try:
            for window in windows:
                tokens = window[None].to(self._model.device)
                with _stopping():
                    functional_call(self._model, outside, (), self._inputs(tokens))
        finally:
            hook.remove()
        return found

    @torch.no_grad()
    def run(self, index: int, tensors: Mapping[str, Tensor], hidden: Tensor) -> Tensor:
        """What block `index` makes of `hidden` [1, S, width] with `tensors` for its parameters."""
        name, call = self.names[index], self._calls[index]
        self.recorder.name = name
        prefix = f"{name}."
        own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
        x = hidden.to(self._model.device)
        args, kwargs = call.args, call.kwargs
        if call.named:
            kwargs = {**kwargs, "hidden_states": x}
        else:
            args = (x, *args)
        output = functional_call(self._modules[index], own, args, kwargs)
        found: Tensor = output[0] if isinstance(output, tuple) else output
        return found

    def call_order(self, index: int, names: Sequence[str], hidden: Tensor) -> list[list[str]]:
        """Parameters `names` of linears in the order of their calls; one list for one input."""
        stages: list[list[str]] = []
        inputs: list[Tensor] = []

        def seer(name: str) -> See:
            def see(x: Tensor) -> None:
                if inputs and x is inputs[-1]:
                    stages[-1].append(name)
                else:
                    inputs.append(x)
                    stages.append([name])

            return see

        with self.watching({name: seer(name) for name in names}):
            self.run(index, _floats(self._modules[index], self.names[index]), hidden)
        return stages

    @contextmanager
    def watching(self, see: Mapping[str, See]) -> Iterator[None]:
        """While the block runs, show the inputs of the modules that own these parameters."""
        handles = []
        try:
            for name, function in see.items():
                module = self._model.get_submodule(name.rpartition(".")[0])
                handles.append(module.register_forward_pre_hook(_pre_hook(function)))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _inputs(self, tokens: Tensor) -> dict[str, Any]:
        return {"input_ids": tokens, "past_key_values": self.recorder, "use_cache": True}

    @torch.no_grad()
    def _capture(self, window: Tensor) -> list[Call]:
        calls: list[Call] = []
        state: list[Tensor] = []

        def before(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x, named = hidden_of(args, kwargs)
            if state and x is not state[-1]:
                raise Unsupported(
                    f"{self.names[len(calls)]} does not read what {self.names[len(calls) - 1]} "
                    "returns, and only chains can be calibrated; use --recipe rtn"
                )
            rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            calls.append(Call(to_fp32(args if named else args[1:]), to_fp32(rest), named))

        def after(module: Module, args: tuple[Any, ...], output: Any) -> None:
            state.append(output[0] if isinstance(output, tuple) else output)

        handles = []
        try:
            for module in self._modules:
                handles.append(module.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(module.register_forward_hook(after))
            self._model(**self._inputs(window.to(self._model.device)))
        finally:
            for handle in handles:
                handle.remove()
        if len(calls) != len(self.names):
            raise Unsupported(
                f"{len(calls)} calls of {len(self.names)} blocks in one forward, and only chains "
                "can be calibrated; use --recipe rtn"
            )
        return calls


def rounded_act(x: Tensor) -> Tensor:
    """`x` as the integer GEMM reads it: int8 per token, back in x's dtype."""
    xq, scale, _ = quantize_act(x)
    return (xq.float() * scale[..., None]).to(x.dtype)


@contextmanager
def _stopping() -> Iterator[None]:
    try:
        yield
    except Stop:
        return


def _pre_hook(see: See) -> Callable[[Module, tuple[Any, ...]], tuple[Any, ...] | None]:
    def hook(module: Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        other = see(args[0])
        return None if other is None else (other, *args[1:])

    return hook


def _floats(module: Module, name: str) -> dict[str, Tensor]:
    return {f"{name}.{n}": p.detach().float() for n, p in module.named_parameters()}
