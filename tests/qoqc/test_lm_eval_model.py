"""The lm_eval model: a local task from end to end, its scores against the model's own logits."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qoqc.errors import OptionError, Unsupported

lm_eval = pytest.importorskip("lm_eval", reason="the extra 'eval' is not installed")

from datasets import Dataset  # noqa: E402  comes with lm_eval, after the skip
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.api.registry import get_model  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from qoqc.lm_eval_model import QoqcLM  # noqa: E402

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "llama-stories-4m"
CONTEXTS = ("Once upon a time, there was a little", "The dog was happy because he", "")
CONTINUATIONS = (" girl", " had a big red ball and a small blue car", "The cat sat")


@pytest.fixture(scope="module")
def plain() -> Any:
    return QoqcLM(str(MODEL), device="cpu", dtype="fp32", plain=True, batch_size=2)


def requests(kind: str, arguments: list[tuple[Any, ...]]) -> list[Any]:
    return [
        Instance(request_type=kind, doc={}, arguments=given, idx=i)
        for i, given in enumerate(arguments)
    ]


def own_likelihood(lm: Any, ids: list[int], count: int) -> tuple[float, bool]:
    """Of the last `count` tokens, from one unbatched forward."""
    with torch.no_grad():
        logits = lm.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, :-1].double()
    target = torch.tensor(ids[1:])
    likelihood = logits.log_softmax(-1).gather(1, target[:, None])[-count:].sum()
    return float(likelihood), bool((logits.argmax(-1) == target)[-count:].all())


def test_it_is_registered() -> None:
    assert get_model("qoqc") is QoqcLM


def test_loglikelihood_is_that_of_the_model_whatever_the_batch(plain: Any) -> None:
    pairs = list(zip(CONTEXTS, CONTINUATIONS, strict=True))
    scores = plain.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)
    for (context, continuation), (likelihood, greedy) in zip(pairs, scores, strict=True):
        if context:
            ids = plain.tok_encode(context + continuation)
            count = len(ids) - len(plain.tok_encode(context))
        else:
            tail = plain.tok_encode(continuation, add_special_tokens=False)
            ids, count = [plain.prefix_token_id, *tail], len(tail)
        expected, first = own_likelihood(plain, ids, count)
        # fp32 logits of two batch shapes
        assert likelihood == pytest.approx(expected, abs=1e-3)
        assert greedy is first


def test_greedy_is_true_for_what_the_model_itself_says(plain: Any) -> None:
    ids = plain.tok_encode(CONTEXTS[0])
    with torch.no_grad():
        best = int(plain.model(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
    other = (best + 1) % 1000 + 10
    found = plain._loglikelihood_tokens([(("", ""), ids, [best]), (("", ""), ids, [other])])
    assert [greedy for _, greedy in found] == [True, False]
    assert found[0][0] > found[1][0]


def test_rolling_predicts_every_token_once(plain: Any) -> None:
    text = "Once upon a time there was a cat who liked to sleep on the soft mat all day."
    (found,) = plain.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    ids = plain.tok_encode(text, add_special_tokens=False)
    expected, _ = own_likelihood(plain, [plain.prefix_token_id, *ids], len(ids))
    assert found == pytest.approx(expected, abs=1e-3)
    # in windows of 6 the contexts are shorter, yet no token is counted twice or left out
    short = QoqcLM(plain.model, plain.tokenizer, max_length=6)
    (windowed,) = short.loglikelihood_rolling(requests("loglikelihood_rolling", [(text,)]))
    parts = [own_likelihood(plain, [plain.prefix_token_id, *ids[:6]], 6)[0]]
    for start in range(6, len(ids), 6):
        stop = min(start + 6, len(ids))
        parts.append(own_likelihood(plain, ids[stop - 7 : stop], stop - start)[0])
    assert windowed == pytest.approx(sum(parts), abs=1e-3)


def test_generation_stops_before_the_stop_string_and_at_the_limit(plain: Any) -> None:
    until = {"until": ["."], "max_gen_toks": 40}
    (sentence,) = plain.generate_until(requests("generate_until", [(CONTEXTS[0], until)]))
    assert sentence
    assert "." not in sentence
    limit = {"until": [], "max_gen_toks": 5}
    (cut,) = plain.generate_until(requests("generate_until", [(CONTEXTS[0], limit)]))
    ids = plain.tok_encode(CONTEXTS[0] + cut)
    assert len(ids) - len(plain.tok_encode(CONTEXTS[0])) <= 5
    assert (sentence + ".").startswith(cut) or cut.startswith(sentence)


def test_special_tokens_are_not_doubled(plain: Any) -> None:
    once = plain.tok_encode("Hello")
    assert plain.tok_encode(f"{plain.tokenizer.bos_token}Hello") == once
    assert once.count(plain.tokenizer.bos_token_id) == 1


def test_a_local_task_on_the_quantized_model() -> None:
    stories = [
        {"text": "Once upon a time, there was a little", "choices": [" girl", " of", " the"]},
        {"text": "The dog ran fast. The boy was very", "choices": [" in", " happy", " a"]},
        {"text": "They went to the", "choices": [" happily", " very", " park"]},
    ]
    answers = [0, 1, 2]

    def dataset(**_: Any) -> dict[str, Any]:
        rows = [{**s, "answer": a} for s, a in zip(stories, answers, strict=True)]
        return {"test": Dataset.from_list(rows)}

    task = {
        "task": "toy_stories",
        "custom_dataset": dataset,
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{text}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}],
    }
    result = lm_eval.simple_evaluate(
        "qoqc",
        model_args={"pretrained": str(MODEL), "device": "cpu", "glue": "eager"},
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),  # thousands of files otherwise
        bootstrap_iters=0,
    )
    assert result["results"]["toy_stories"]["acc,none"] == 1.0


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"batch_size": "auto"}, OptionError, "batch_size='auto'"),
        ({"kv_bits": 5}, OptionError, "kv_bits=5"),
        ({"device": "tpu"}, OptionError, "--device tpu"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        QoqcLM(str(MODEL), **{"device": "cpu", **arguments})


def test_a_model_without_tokenizer_is_refused(plain: Any) -> None:
    with pytest.raises(Unsupported, match="without a tokenizer"):
        QoqcLM(plain.model)


def test_more_to_generate_than_the_model_takes_is_refused(plain: Any) -> None:
    with pytest.raises(OptionError, match="max_gen_toks=100000"):
        plain.generate_until(requests("generate_until", [("x", {"max_gen_toks": 100000})]))
