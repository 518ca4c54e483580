"""A model's own code is asked what its decode steps get; what the loop cannot give is named."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import GenerationConfig, LlamaForCausalLM, LogitsProcessorList
from transformers.generation.stopping_criteria import MaxLengthCriteria, StoppingCriteriaList
from transformers.masking_utils import create_causal_mask, create_masks_for_generate

from qoqc.decode.inputs import StepInputs, step_inputs
from qoqc.decode.request import Request
from qoqc.runtime.kv_cache import KV4Cache
from qoqc.testing import tiny_model

PROMPT, LAST = 10, 40


def request(model: Any, padding: int = 0, **more: Any) -> Request:
    """Two prompts of PROMPT tokens, the first with padding in front, up to LAST tokens."""
    mask = torch.ones(2, PROMPT, dtype=torch.long)
    mask[0, :padding] = 0
    kwargs = {
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0),
        "past_key_values": KV4Cache(model.config, 64),
        "use_cache": True,
        **more,
    }
    criteria = StoppingCriteriaList([MaxLengthCriteria(LAST)])
    ids = torch.full((2, PROMPT), 7)
    config = GenerationConfig()
    return Request(model, ids, LogitsProcessorList(), criteria, config, None, kwargs)


def llama(**members: Any) -> Any:
    """A tiny Llama whose class has further members."""
    model = tiny_model("llama")
    model.__class__ = type("Own", (type(model),), members)
    return model


def prepare(change: Callable[[dict[str, Any], int], Any]) -> dict[str, Any]:
    """A class that changes what transformers prepares; `change` gets the number of tokens, too."""

    def own(self: Any, input_ids: torch.Tensor, **kwargs: Any) -> dict[str, Any]:
        transformers: Any = LlamaForCausalLM.prepare_inputs_for_generation
        made: dict[str, Any] = transformers(self, input_ids, **kwargs)
        change(made, input_ids.shape[1])
        return made

    return {"prepare_inputs_for_generation": own}


def later(made: dict[str, Any], tokens: int) -> None:
    made["position_ids"] = made["position_ids"] + 1


def test_what_transformers_prepares_is_known() -> None:
    found = step_inputs(request(tiny_model("llama"), logits_to_keep=1))
    assert isinstance(found, StepInputs)
    assert (found.padded, found.arguments) == (False, {"logits_to_keep": 1})
    assert found.position is not None
    assert found.position.tolist() == [[PROMPT], [PROMPT]]


@pytest.mark.parametrize("padding", [0, 3])
def test_positions_are_the_models(padding: int) -> None:
    """PaliGemma counts from one."""
    found = step_inputs(request(llama(**prepare(later)), padding, logits_to_keep=1))
    assert isinstance(found, StepInputs)
    assert found.position is not None
    assert found.position.tolist() == [[PROMPT - padding + 1], [PROMPT + 1]]
    assert found.padded == (padding > 0)
    assert found.arguments == {"logits_to_keep": 1}


def test_a_forward_without_positions_gets_none() -> None:
    own = prepare(lambda made, tokens: made.pop("position_ids"))
    found = step_inputs(request(llama(**own)))
    assert isinstance(found, StepInputs)
    assert found.position is None


def at(length: int, name: str, value: Any) -> Callable[[dict[str, Any], int], None]:
    def change(made: dict[str, Any], tokens: int) -> None:
        if tokens == length:
            made[name] = value

    return change


CHANGES: dict[str, tuple[Callable[[dict[str, Any], int], Any], str]] = {
    "cache": (lambda made, tokens: made.pop("past_key_values"), "the cache is not used"),
    "tokens": (
        lambda made, tokens: made.update(input_ids=torch.zeros(2, 3, dtype=torch.long)),
        "more than the newest token",
    ),
    "3-D positions": (
        lambda made, tokens: made.update(position_ids=made["position_ids"].expand(3, 2, 1)),
        "more than one position",
    ),
    "tensors": (
        lambda made, tokens: made.update(image=torch.ones(2)),
        "changes from step to step: image",
    ),
    "positions that stand still": (
        lambda made, tokens: made.update(position_ids=torch.zeros(2, 1, dtype=torch.long)),
        "positions that are not counted",
    ),
    "other tokens": (
        lambda made, tokens: made.update(input_ids=made["input_ids"] + 1),
        "positions that are not counted",
    ),
    "at the last step": (at(LAST - 1, "scale", 2.0), "other arguments at 39 tokens than at 11"),
    # a number of the config: 32 is the size of a head
    "at a length that the config names": (at(33, "scale", 2.0), "other arguments at 33 tokens"),
    "an error": (lambda made, tokens: made["nothing"], "raises KeyError"),
}


@pytest.mark.parametrize(("change", "reason"), CHANGES.values(), ids=list(CHANGES))
def test_steps_that_are_not_all_alike(
    change: Callable[[dict[str, Any], int], Any], reason: str
) -> None:
    model = llama(**prepare(change))
    assert model.config.head_dim == 32
    found = step_inputs(request(model))
    assert isinstance(found, str)
    assert found.startswith("Own prepares the inputs of a step by itself: ")
    assert reason in found


def plain(**kwargs: Any) -> Any:
    return create_masks_for_generate(**kwargs)


def two_dimensional(attention_mask: Any, past_key_values: Any, **kwargs: Any) -> Any:
    """BLOOM's, as long as the cache."""
    if attention_mask is None:
        return None
    more = past_key_values.get_max_length() - attention_mask.shape[1]
    return torch.nn.functional.pad(attention_mask, (0, more))


def other_kinds(**kwargs: Any) -> Any:
    return {"conv": create_masks_for_generate(**kwargs)}


def without_the_fifth(
    config: Any,
    inputs_embeds: torch.Tensor,
    attention_mask: Any,
    past_key_values: Any,
    position_ids: Any = None,
    **_: Any,
) -> Any:
    return create_causal_mask(
        config,
        inputs_embeds,
        attention_mask,
        past_key_values,
        position_ids,
        and_mask_function=lambda b, h, q, k: k != 5,
    )


@pytest.mark.parametrize("padding", [0, 3])
@pytest.mark.parametrize(
    ("masks", "reason"),
    [
        (plain, None),
        (two_dimensional, None),
        (other_kinds, "of other kinds than transformers'"),
        (without_the_fifth, "masks that are not transformers'"),
    ],
)
def test_masks_of_a_models_own(masks: Any, reason: str | None, padding: int) -> None:
    model = llama(create_masks_for_generate=staticmethod(masks))
    found = step_inputs(request(model, padding))
    if reason is None:
        assert isinstance(found, StepInputs)
        assert found.padded == (padding > 0)
    else:
        assert isinstance(found, str)
        assert reason in found


def with_types(token_type_ids: Any = None, **kwargs: Any) -> Any:
    return create_masks_for_generate(**kwargs)


def test_token_types_are_for_masks_where_the_mask_function_takes_them() -> None:
    types = {"token_type_ids": torch.zeros(2, PROMPT, dtype=torch.long)}
    model = llama(create_masks_for_generate=staticmethod(with_types))
    found = step_inputs(request(model, **types))
    assert isinstance(found, StepInputs)
    assert found.arguments == {}
    found = step_inputs(request(tiny_model("llama"), **types))
    assert isinstance(found, str)
    assert "changes from step to step: token_type_ids" in found


def test_what_only_the_prompt_gets_is_no_hindrance() -> None:
    found = step_inputs(request(tiny_model("llama"), pixel_values=torch.zeros(1, 3, 4, 4)))
    assert isinstance(found, StepInputs)


def test_a_mask_of_pairs_is_not_carried_on() -> None:
    given = torch.ones(2, 1, PROMPT, PROMPT, dtype=torch.bool)
    assert "not one of tokens" in str(
        step_inputs(request(tiny_model("llama"), attention_mask=given))
    )


def test_phi3_switches_its_rotary_embedding() -> None:
    """There it computes the whole sequence anew: transformers' loop can do that."""
    model = tiny_model("phi3", original_max_position_embeddings=25)
    assert "the cache is not used" in str(step_inputs(request(model)))
    model = tiny_model("phi3", original_max_position_embeddings=60)
    assert isinstance(step_inputs(request(model)), StepInputs)


def test_a_length_is_asked_about_once() -> None:
    asked: list[int] = []
    own = prepare(lambda made, tokens: asked.append(tokens))
    model = llama(**own)
    found = [step_inputs(request(model)) for _ in range(2)]
    assert all(isinstance(each, StepInputs) for each in found)
    first, *others = sorted(set(asked))
    assert first == PROMPT + 1
    assert {PROMPT + 2, 33, LAST - 1} <= set(others)
    assert asked == [first, *others, first]
    asked.clear()
    step_inputs(request(model, 3))  # padded: other masks
    assert asked == [first, *others]
    asked.clear()
    for _ in range(2):
        step_inputs(request(model, pixel_values=torch.zeros(1)))
    assert asked == [first, *others] * 2
