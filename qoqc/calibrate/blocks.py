"""A decoder as a chain of blocks: one runs at a time, with tensors it is given."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import Module

from qoqc.calibrate.calls import Call, first_of, hidden_of, moved, require_alike, to_fp32
from qoqc.calibrate.forward import Stop, fast_matmul, replaced, stopping
from qoqc.calibrate.recorder import Recorder
from qoqc.errors import Unsupported
from qoqc.quant.activation import quantize_act

See = Callable[[Tensor], Tensor | None]
"""Called with a linear's input; what it returns, if anything, is read instead."""


class Blocks:
    """The blocks of a Hugging Face decoder, found by name, run one by one on the compute device.

    Every window has the same length and no padding, so what a block gets beside the hidden state
    (positions, masks, rotary tables) is the same for all, and is captured once. The hidden state
    of a block is what the one before returned: both are checked, on the first two windows.
    """

    def __init__(
        self, model: Any, names: Sequence[str], windows: Tensor, device: torch.device | None = None
    ) -> None:
        """Capture the calls on windows int64 [W, S]. Raises Unsupported if it is no such chain.

        device  runs the blocks; None: where the model is
        """
        self.names = list(names)
        self.device: torch.device = model.device if device is None else device
        self.recorder = Recorder(model.config.get_text_config(decoder=True).num_hidden_layers)
        self._model = model
        self._modules: list[Module] = [model.get_submodule(name) for name in names]
        self._forwards: list[Callable[..., Any]] = [module.forward for module in self._modules]
        self._calls = self._capture(windows[:1])
        if len(windows) > 1:
            require_alike(self.names, self._calls, self._capture(windows[1:2]))

    @torch.no_grad()
    def embed(
        self, outside: Mapping[str, Tensor], windows: Tensor, home: torch.device | str = "cpu"
    ) -> list[Tensor]:
        """The hidden states fp32 [1, S, width] that enter the first block, put on `home`.

        outside  the model's tensors outside the blocks, on the device; those behind need not be
        """
        found: list[Tensor] = []

        def see(module: Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(hidden_of(args, kwargs)[0].float().to(home))
            raise Stop

        known = {name for name, _ in self._model.named_parameters()}
        given = {name: tensor for name, tensor in outside.items() if name in known}
        inside = tuple(f"{block}." for block in self.names)
        for name, buffer in self._model.named_buffers():
            if not name.startswith(inside):
                given[name] = buffer.to(self.device)
        hook = self._modules[0].register_forward_pre_hook(see, with_kwargs=True)
        try:
            for window in windows:
                with stopping():
                    functional_call(self._model, given, (), self._inputs(window[None], self.device))
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
        own |= {n: b.to(self.device) for n, b in self._modules[index].named_buffers()}
        x = hidden.to(self.device)
        args, kwargs = call.args, call.kwargs
        if call.named:
            kwargs = {**kwargs, "hidden_states": x}
        else:
            args = (x, *args)
        with fast_matmul():
            output = functional_call(self._modules[index], own, args, kwargs)
        return first_of(output)

    def call_order(
        self, index: int, names: Sequence[str], tensors: Mapping[str, Tensor], hidden: Tensor
    ) -> list[list[str]]:
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
            self.run(index, tensors, hidden)
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

    def _inputs(self, tokens: Tensor, device: torch.device) -> dict[str, Any]:
        tokens = tokens.to(device)
        return {"input_ids": tokens, "past_key_values": self.recorder, "use_cache": True}

    @torch.no_grad()
    def _capture(self, window: Tensor) -> list[Call]:
        """The blocks' calls in one forward of the model as it is; each block runs on the device."""
        calls: list[Call] = []
        state: list[Tensor] = []
        turns: list[int] = []

        def forward(index: int, *args: Any, **kwargs: Any) -> Any:
            x, named = hidden_of(args, kwargs)
            if state and x is not state[-1]:
                raise Unsupported(
                    f"{self.names[index]} does not read what {self.names[index - 1]} "
                    "returns, and only chains can be calibrated; use --recipe rtn"
                )
            turns.append(index)
            args, kwargs = moved(args, self.device), moved(kwargs, self.device)
            rest = {k: v for k, v in kwargs.items() if k != "hidden_states"}
            calls.append(Call(to_fp32(args if named else args[1:]), to_fp32(rest), named))
            output = moved(self._as_is(index, args, kwargs), self._model.device)
            state.append(first_of(output))
            return output

        with ExitStack() as stack:
            for index, module in enumerate(self._modules):
                stack.enter_context(replaced(module, functools.partial(forward, index)))
            self._model(**self._inputs(window, self._model.device))
        if turns != list(range(len(self.names))):
            raise Unsupported(
                f"the {len(self.names)} blocks from {self.names[0]} on are not called once each, "
                "in order, and only chains can be calibrated; use --recipe rtn"
            )
        return calls

    def _as_is(self, index: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run a block with its own tensors in their own dtype, moved to the device."""
        module = self._modules[index]
        own = dict((*module.named_parameters(), *module.named_buffers()))
        with replaced(module, self._forwards[index]):
            return functional_call(module, moved(own, self.device), args, kwargs)


def rounded_act(x: Tensor) -> Tensor:
    """`x` as the integer GEMM reads it: int8 per token, back in x's dtype."""
    xq, scale, _ = quantize_act(x)
    return (xq.float() * scale[..., None]).to(x.dtype)


def _pre_hook(see: See) -> Callable[[Module, tuple[Any, ...]], tuple[Any, ...] | None]:
    def hook(module: Module, args: tuple[Any, ...]) -> tuple[Any, ...] | None:
        other = see(args[0])
        return None if other is None else (other, *args[1:])

    return hook
