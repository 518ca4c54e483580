"""Recorded calls give the tokens that traced ones give; whatever changed is traced."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM
from transformers.models.llama import modeling_llama

import qoqc
from qoqc import generate
from qoqc.artifact.save import save
from qoqc.runtime.compile_count import count
from qoqc.runtime.kv_cache import KV4Cache
from qoqc.testing import tiny_model

pytestmark = pytest.mark.slow  # Inductor compiles for a CPU

GREEDY = {"do_sample": False, "pad_token_id": 0, "max_new_tokens": 4}


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A cache of qoqc's own: records are kept only there."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        patch.setenv("QOQC_CACHE", str(folder))
        patch.delenv("QOQC_RECORDS", raising=False)
        yield folder
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save(tiny_model("llama", num_hidden_layers=1), folder, overwrite=True)
    return folder


def prompts(batch: int, length: int) -> torch.Tensor:
    return torch.randint(3, 60, (batch, length), generator=torch.Generator().manual_seed(length))


def fresh(artifact: Path, **options: Any) -> Any:
    """The model as a new process has it: nothing traced, nothing packed."""
    torch._dynamo.reset()
    counters.clear()
    return qoqc.load(artifact, **options)


def traced() -> int:
    """Graphs that Dynamo has made since `fresh`."""
    return counters["stats"]["unique_graphs"]


def tokens(model: Any, batch: int = 1, length: int = 5, **arguments: Any) -> list[Any]:
    found: list[Any] = model.generate(prompts(batch, length), **GREEDY, **arguments).tolist()
    return found


def logits(model: Any) -> torch.Tensor:
    """Those of the first token."""
    arguments = {**GREEDY, "max_new_tokens": 1, "output_logits": True}
    found = model.generate(prompts(1, 5), return_dict_in_generate=True, **arguments)
    return torch.stack(found.logits)


@pytest.fixture(scope="module")
def expected(artifact: Path) -> dict[tuple[int, int], list[Any]]:
    """Tokens of traced calls, which are recorded by the way."""
    model = fresh(artifact)
    found = {(b, n): tokens(model, b, n) for b, n in ((1, 5), (1, 9), (3, 7))}
    assert traced() == 4
    return found


def records(cache: Path, kind: str = "*") -> list[Path]:
    return sorted(cache.glob(f"compiled/*/records/*.{kind}"))


def test_nothing_is_traced_again(
    artifact: Path, expected: dict[tuple[int, int], list[Any]], own_cache: Path
) -> None:
    assert len(records(own_cache, "json")) == len(records(own_cache, "code")) == 4
    model, before = fresh(artifact, require_cached=True), count()
    for (batch, length), each in expected.items():
        assert tokens(model, batch, length) == each
    assert traced() == 0
    made = count() - before
    assert (made.graphs, made.graphs_cached) == (0, 4)


def test_a_cache_goes_on(artifact: Path, expected: dict[tuple[int, int], list[Any]]) -> None:
    """The second prompt's chunk is a call of another kind: traced once, recorded, replayed."""
    answers = []
    for _ in range(2):
        model = fresh(artifact)
        cache = KV4Cache(model.config, max_cache_len=256)
        first = model.generate(prompts(1, 5), past_key_values=cache, **GREEDY)
        longer = torch.cat([first, prompts(1, 6)], 1)
        second = model.generate(longer, past_key_values=cache, **GREEDY)
        answers.append((first.tolist(), second.tolist()))
    assert answers[0] == answers[1]
    assert answers[0][0] == expected[1, 5]


def _hook(model: Any) -> None:
    model.model.norm.register_forward_hook(lambda module, args, output: output)


def _replace(model: Any) -> None:
    old = model.model.norm
    model.model.norm = torch.nn.Identity()
    model.model.norm.variance_epsilon, model.model.norm.weight = 1e-5, old.weight


def _scale(model: Any) -> None:
    model.model.layers[0].self_attn.scaling *= 2


def _epsilon(model: Any) -> None:
    model.model.norm.variance_epsilon = 0.5


def _dtype(model: Any) -> None:
    norm = model.model.norm
    norm.weight = torch.nn.Parameter(norm.weight.to(torch.bfloat16), requires_grad=False)


@pytest.mark.parametrize("change", [_hook, _replace, _scale, _epsilon, _dtype])
def test_a_changed_model_is_traced(
    artifact: Path,
    expected: dict[tuple[int, int], list[Any]],
    change: Callable[[Any], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = fresh(artifact)
    change(model)
    got = logits(model)
    assert traced() > 0
    monkeypatch.setattr(generate, "records_enabled", lambda: False)
    plain = fresh(artifact)
    change(plain)
    assert torch.equal(got, logits(plain))


def _other_half(x: torch.Tensor) -> torch.Tensor:
    first, second = x.chunk(2, -1)
    return torch.cat((second, -first), -1)


def test_a_patched_function_is_noticed(
    artifact: Path,
    expected: dict[tuple[int, int], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Of those that no forward calls itself, but one that it calls."""
    model = fresh(artifact)
    before = logits(model)
    assert traced() == 0
    monkeypatch.setattr(modeling_llama, "rotate_half", _other_half)
    got = logits(model)
    assert traced() > 0
    assert not torch.equal(got, before)
    monkeypatch.setattr(generate, "records_enabled", lambda: False)
    assert torch.equal(got, logits(fresh(artifact)))


def test_a_change_between_calls_is_noticed(
    artifact: Path, expected: dict[tuple[int, int], list[Any]]
) -> None:
    model = fresh(artifact)
    assert tokens(model) == expected[1, 5]
    assert traced() == 0
    _hook(model)
    assert tokens(model) == expected[1, 5]
    assert traced() > 0


@pytest.mark.parametrize("options", [{"kv_bits": 8}, {"prefill_kv": "quantized"}])
def test_other_options_have_other_records(
    artifact: Path, expected: dict[tuple[int, int], list[Any]], options: dict[str, Any]
) -> None:
    first = tokens(fresh(artifact, **options))
    assert traced() > 0
    assert tokens(fresh(artifact, **options)) == first
    assert traced() == 0


def test_another_artifact_has_other_records(
    expected: dict[tuple[int, int], list[Any]], tmp_path: Path
) -> None:
    torch.manual_seed(1)
    save(tiny_model("llama", num_hidden_layers=1, rms_norm_eps=0.01), tmp_path, overwrite=True)
    tokens(fresh(tmp_path))
    assert traced() > 0


def test_padded_prompts_are_traced(
    artifact: Path, expected: dict[tuple[int, int], list[Any]], own_cache: Path
) -> None:
    before = len(records(own_cache))
    mask = torch.ones(3, 7, dtype=torch.int64)
    mask[0, :2] = 0
    tokens(fresh(artifact), 3, 7, attention_mask=mask)
    assert traced() > 0
    assert len(records(own_cache)) == before


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize("damage", [_truncate, _flip])
@pytest.mark.parametrize("kind", ["json", "code"])
def test_damaged_records_are_traced_and_mended(
    artifact: Path,
    expected: dict[tuple[int, int], list[Any]],
    own_cache: Path,
    kind: str,
    damage: Callable[[Path], None],
    caplog: pytest.LogCaptureFixture,
) -> None:
    for path in records(own_cache, kind):
        damage(path)
    assert tokens(fresh(artifact)) == expected[1, 5]
    assert traced() == 2
    assert "is not used" in caplog.text
    assert tokens(fresh(artifact)) == expected[1, 5]
    assert traced() == 0


def test_swapped_records_are_traced(
    artifact: Path, expected: dict[tuple[int, int], list[Any]], own_cache: Path
) -> None:
    found = records(own_cache, "code")
    texts = [path.read_bytes() for path in found]
    for path, text in zip(found, [*texts[1:], texts[0]], strict=True):
        path.write_bytes(text)
    assert tokens(fresh(artifact)) == expected[1, 5]
    assert traced() == 2


def test_the_bundled_model(model_dir: Path, tmp_path: Path) -> None:
    save(AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32), tmp_path / "a")
    first = tokens(fresh(tmp_path / "a"))
    assert traced() == 2
    assert tokens(fresh(tmp_path / "a")) == first
    assert traced() == 0


def test_it_can_be_switched_off(
    artifact: Path,
    expected: dict[tuple[int, int], list[Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("QOQC_RECORDS", "0")
    assert tokens(fresh(artifact)) == expected[1, 5]
    assert traced() == 2


@pytest.mark.parametrize("lengths", [(5, 20), (20, 5)])
def test_prompts_within_and_beyond_a_window_are_not_confused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lengths: tuple[int, int]
) -> None:
    """Both are calls of one kind, and have graphs of their own: a record is for its sizes only."""
    save(tiny_model("mistral", num_hidden_layers=1, sliding_window=8), tmp_path / "a")
    for _ in range(2):
        model = fresh(tmp_path / "a")
        found = [tokens(model, 1, length) for length in lengths]
        last = traced()
    monkeypatch.setenv("QOQC_RECORDS", "0")
    plain = fresh(tmp_path / "a")
    assert found == [tokens(plain, 1, length) for length in lengths]
    # the step and one of the prompts are recorded, the other prompt is traced
    assert (last, traced()) == (1, 3)
