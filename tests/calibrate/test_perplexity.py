"""Perplexity and logit distance against their definitions."""

from __future__ import annotations

import math
import weakref
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qoqc.calibrate import perplexity
from qoqc.calibrate.perplexity import compare, evaluate
from qoqc.calibrate.windows import Windows, cut_windows
from qoqc.errors import Unsupported
from qoqc.testing import tiny_model

MODEL = Path(__file__).resolve().parents[2] / "examples" / "models" / "llama-stories-4m"
TEXT = (
    "Once upon a time, there was a little girl called Zo\u00eb. She had a caf\u00e9 \u2014 and a "
    'naughty \U0001f436 dog! "Come here," she said. The dog ran to the park and played all day.\n\n'
) * 3


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(MODEL)


@pytest.fixture(scope="module")
def model() -> Any:
    return AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).eval()


class FromTable(torch.nn.Module):
    """Predicts from the current token alone: row t of a table of logits."""

    def __init__(self, table: torch.Tensor) -> None:
        super().__init__()
        self.table = table
        self.device = table.device

    def forward(self, input_ids: torch.Tensor, use_cache: bool) -> Any:
        assert use_cache is False
        return SimpleNamespace(logits=self.table[input_ids])


def random_table(vocabulary: int = 11, seed: int = 0) -> torch.Tensor:
    return torch.randn(vocabulary, vocabulary, generator=torch.Generator().manual_seed(seed))


def random_windows(count: int = 3, seq: int = 9, vocabulary: int = 11) -> Windows:
    tokens = torch.randint(vocabulary, (count, seq), generator=torch.Generator().manual_seed(1))
    return Windows(tokens, (20,) * count, "none")


# scores


def test_perplexity_is_exp_of_the_mean_over_all_predicted_tokens() -> None:
    table, windows = random_table(), random_windows()
    log_p = table.double().log_softmax(-1)
    inputs, targets = windows.tokens[:, :-1].flatten(), windows.tokens[:, 1:].flatten()
    nll = -log_p[inputs, targets]
    score = evaluate(FromTable(table), windows)
    assert score.tokens == 24
    assert score.perplexity == pytest.approx(math.exp(float(nll.mean())), rel=1e-6)
    assert score.bits_per_byte == pytest.approx(float(nll.sum()) / math.log(2) / 60, rel=1e-6)


def test_a_uniform_model_has_the_vocabulary_for_a_perplexity() -> None:
    score = evaluate(FromTable(torch.zeros(11, 11)), random_windows())
    assert score.perplexity == pytest.approx(11, rel=1e-6)


def test_it_is_the_loss_of_the_model_itself(model: Any, tokenizer: Any) -> None:
    windows = cut_windows(TEXT, tokenizer, 40)
    with torch.no_grad():
        losses = [float(model(input_ids=w[None], labels=w[None]).loss) for w in windows.tokens]
    expected = math.exp(sum(losses) / len(losses))
    assert evaluate(model, windows).perplexity == pytest.approx(expected, rel=1e-5)


def test_positions_are_only_split_for_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    one, other = FromTable(random_table()), FromTable(random_table(seed=1))
    windows = random_windows()
    whole = compare(one, other, windows)
    monkeypatch.setattr(perplexity, "POSITIONS", 3)
    split = compare(one, other, windows)
    assert split.model.nll == pytest.approx(whole.model.nll, rel=1e-6)
    assert split.kl == pytest.approx(whole.kl, rel=1e-6)
    assert split.agreement == whole.agreement


def test_a_model_that_breaks_is_nan_or_infinite_not_an_error() -> None:
    table = random_table()
    table[3] = math.nan
    assert math.isnan(evaluate(FromTable(table), random_windows()).perplexity)
    certain = torch.full((11, 11), -1e30)
    certain[:, 0] = 0
    assert evaluate(FromTable(certain), random_windows()).perplexity == math.inf


# comparison


def test_kl_and_agreement_are_those_of_the_distributions() -> None:
    ours, theirs, windows = random_table(), random_table(seed=1), random_windows()
    p, q = theirs.double().softmax(-1), ours.double().softmax(-1)
    per_token = (p * (p / q).log()).sum(-1)
    inputs = windows.tokens[:, :-1].flatten()
    found = compare(FromTable(ours), FromTable(theirs), windows)
    assert found.kl == pytest.approx(float(per_token[inputs].mean()), rel=1e-5)
    same = (ours.argmax(-1) == theirs.argmax(-1))[inputs].double().mean()
    assert found.agreement == pytest.approx(float(same))
    assert found.model.nll == pytest.approx(evaluate(FromTable(ours), windows).nll)
    assert found.baseline.nll == pytest.approx(evaluate(FromTable(theirs), windows).nll)
    ratio = found.model.perplexity / found.baseline.perplexity
    assert found.increase == pytest.approx(100 * (ratio - 1))


def test_a_model_is_no_distance_from_itself() -> None:
    model = FromTable(random_table())
    found = compare(model, model, random_windows())
    assert found.kl == pytest.approx(0, abs=1e-7)
    assert found.agreement == 1
    assert found.increase == 0


def test_vocabularies_must_agree() -> None:
    with pytest.raises(Unsupported, match="vocabulary has 11 entries, the baseline's 12"):
        compare(FromTable(random_table()), FromTable(random_table(12)), random_windows())


def test_progress_counts_windows() -> None:
    calls: list[tuple[int, int]] = []
    model, windows = FromTable(random_table()), random_windows()
    evaluate(model, windows, lambda done, total: calls.append((done, total)))
    compare(model, model, windows, lambda done, total: calls.append((done, total)))
    assert calls == [(1, 3), (2, 3), (3, 3)] * 2


def test_logits_of_one_window_at_a_time_are_alive() -> None:
    alive: list[int] = []
    model = tiny_model("llama")
    tokens = torch.randint(300, (4, 12), generator=torch.Generator().manual_seed(0))
    kept: list[Any] = []

    original = model.forward

    def forward(**kwargs: Any) -> Any:
        output = original(**kwargs)
        alive.append(sum(ref() is not None for ref in kept))
        kept.append(weakref.ref(output.logits))
        return output

    model.forward = forward
    evaluate(model, Windows(tokens, (1,) * 4, "none"))
    assert alive == [0, 0, 0, 0]
