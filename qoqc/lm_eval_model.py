"""The model type "qoqc" of lm_eval (pip install 'qoqc[eval]'): any task on a quantized model.

    import lm_eval, qoqc.lm_eval_model
    lm_eval.simple_evaluate("qoqc", model_args="pretrained=ARTIFACT", tasks=["arc_easy"])

pretrained is an artifact, or a model, which is quantized by rounding to nearest (plain=True leaves
it in 16 bit), or a model object as it is, with its tokenizer. Every forward sees quantized keys and
values: a cache's where it generates, rounded ones where it scores.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from qoqc.cli.eval import load_any
from qoqc.cli.source import choose_device, choose_dtype, load_config, load_tokenizer
from qoqc.errors import OptionError, Unsupported

Request = tuple[tuple[str, str], list[int], list[int]]
"""(context, continuation) as text, and the tokens of each."""

SAMPLING = ("do_sample", "temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""Generation arguments of a task that are handed on; its other ones belong to other backends."""


@register_model("qoqc")
class QoqcLM(TemplateLM):
    """A causal language model behind lm_eval's interface, one process, one device."""

    def __init__(
        self,
        pretrained: Any,
        tokenizer: Any = None,
        *,
        device: str | None = None,
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        plain: bool = False,
        **options: Any,
    ) -> None:
        """Load `pretrained`; `options` are those of qoqc.compile.

        max_batch_size, which lm_eval passes on, only matters to its "auto" batch size, which this
        model does not have: OptionError.
        """
        super().__init__()
        try:
            self.batch_size = int(batch_size)
        except ValueError:
            raise OptionError(f"batch_size={batch_size!r}: expected a number") from None
        if isinstance(pretrained, str):
            where = choose_device(device or "auto")
            load_config(pretrained)
            if tokenizer is None or isinstance(tokenizer, str):
                tokenizer = load_tokenizer(tokenizer or pretrained)
            chosen = {"prefill_kv": "quantized", **options}
            model = load_any(pretrained, where, choose_dtype(dtype), chosen, plain=plain)
        else:
            model = pretrained
        if tokenizer is None:
            raise Unsupported("this model comes without a tokenizer, and tasks are text; give one")
        self.model = model
        self.tokenizer = tokenizer
        self.max_gen_toks = max_gen_toks
        config = model.config.get_text_config(decoder=True)
        longest: int = getattr(config, "max_position_embeddings", 2048)
        self.max_length: int = max_length or longest
        self._device = model.device

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has no context."""
        first = self.tokenizer.bos_token_id
        return self.eot_token_id if first is None else int(first)

    @property
    def tokenizer_name(self) -> str:
        """Names the chat template in lm_eval's request cache."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as one string."""
        text: str = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return text

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Token ids; by default with the tokenizer's special tokens, unless they are there."""
        if add_special_tokens is None:
            bos = self.tokenizer.bos_token
            add_special_tokens = not (bos and string.startswith(bos))
        ids: list[int] = self.tokenizer(
            string, add_special_tokens=add_special_tokens, verbose=False
        )["input_ids"]
        return ids

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        """Log likelihood of each continuation, and whether greedy decoding would give it."""
        results: dict[int, tuple[float, bool]] = {}
        # the longest first: what does not fit into memory fails at once
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i][1] + requests[i][2]))
        for start in range(0, len(order), self.batch_size):
            numbers = order[start : start + self.batch_size]
            for number, result in zip(
                numbers, self._score([requests[i] for i in numbers]), strict=True
            ):
                results[number] = result
                self.cache_hook.add_partial("loglikelihood", requests[number][0], result)
        return [results[i] for i in range(len(requests))]

    def _score(self, batch: Sequence[Request]) -> Iterator[tuple[float, bool]]:
        """One forward; shorter inputs are padded on the right, where nothing looks back from."""
        inputs = [(context + cont)[-(self.max_length + 1) :][:-1] for _, context, cont in batch]
        width = max(map(len, inputs))
        padded = [ids + [self.eot_token_id] * (width - len(ids)) for ids in inputs]
        with torch.no_grad():
            tokens = torch.tensor(padded, device=self.model.device)
            logits = self.model(input_ids=tokens, use_cache=False).logits
        for row, ids, (_, _, continuation) in zip(logits, inputs, batch, strict=True):
            target = torch.tensor(continuation[-len(ids) :], device=logits.device)
            part = row[len(ids) - len(target) : len(ids)].float()
            likelihood = -F.cross_entropy(part, target, reduction="sum")
            yield float(likelihood), bool((part.argmax(-1) == target).all())

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Log likelihood of whole texts, each token predicted once."""
        totals = []
        for request in requests:
            (text,) = request.args
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(text, add_special_tokens=False),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            parts: list[Request] = [(("", ""), *make_disjoint_window(pair)) for pair in windows]
            scored = [
                result
                for start in range(0, len(parts), self.batch_size)
                for result in self._score(parts[start : start + self.batch_size])
            ]
            totals.append(sum(likelihood for likelihood, _ in scored))
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), totals[-1])
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """The text generated for each context, up to the first of its stop strings."""
        answers = []
        for request in requests:
            context, arguments = request.args
            answers.append(self._generate(context, dict(arguments)))
            self.cache_hook.add_partial("generate_until", (context, arguments), answers[-1])
        return answers

    def _generate(self, context: str, arguments: dict[str, Any]) -> str:
        until = arguments.get("until") or []
        stops = [until] if isinstance(until, str) else [stop for stop in until if stop]
        named = arguments.get("max_gen_toks") or arguments.get("max_new_tokens")
        room = int(named or self.max_gen_toks)
        if room >= self.max_length:
            raise OptionError(
                f"max_gen_toks={room}: the model takes {self.max_length} tokens in all"
            )
        # greedy is lm_eval's default, whatever the model's generation config says
        chosen = {name: arguments[name] for name in SAMPLING if name in arguments}
        if not chosen.get("do_sample") or chosen.get("temperature") == 0:
            chosen = {"do_sample": False}
        if stops:
            chosen |= {"stop_strings": stops, "tokenizer": self.tokenizer}
        ids = (self.tok_encode(context) or [self.prefix_token_id])[-(self.max_length - room) :]
        tokens = torch.tensor([ids], device=self.model.device)
        with torch.no_grad():
            output = self.model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                max_new_tokens=room,
                pad_token_id=self.eot_token_id,
                **chosen,
            )
        text: str = self.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
        # a stop string may end within a token
        return min((text.split(stop)[0] for stop in stops), key=len, default=text)
