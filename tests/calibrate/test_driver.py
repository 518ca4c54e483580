"""The whole recipe on tiny random models: what is decided is what runs, every time the same."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

import qoqc
from qoqc.artifact.survey import survey
from qoqc.calibrate import driver
from qoqc.calibrate.checkpoint import Checkpoints, key_of
from qoqc.calibrate.driver import calibrate
from qoqc.calibrate.layer_weights import weights_step
from qoqc.calibrate.perplexity import Comparison, compare
from qoqc.calibrate.recipe import Recipe, Record
from qoqc.calibrate.windows import Windows
from qoqc.config import Options
from qoqc.errors import Unsupported
from qoqc.quant.weight import dequantize_weight, quantize_weight
from qoqc.runtime.weights import STORE
from qoqc.testing import VOCAB, tiny_model

WINDOWS = torch.randint(VOCAB, (32, 64), generator=torch.Generator().manual_seed(3))
JUDGED = torch.randint(VOCAB, (4, 48), generator=torch.Generator().manual_seed(4))
RTN = Recipe(
    rotate=False,
    rotate_values=False,
    smooth_attention=False,
    smooth_output=False,
    reorder=False,
    correct=False,
    method="rtn",
)

CHANGES: dict[str, dict[str, float]] = {
    # its defaults of 1 leave attention without a scale and the multipliers without a test
    "granite": {
        "attention_multiplier": 32**-0.5,
        "residual_multiplier": 0.4,
        "embedding_multiplier": 6.0,
        "logits_scaling": 2.0,
    }
}


@pytest.fixture(autouse=True)
def _own_compiled_code() -> None:
    torch._dynamo.reset()


def calibrated(model: Any, recipe: Recipe, **kwargs: Any) -> Record:
    """Calibrate `model` on random tokens, as the command does."""
    options = Options.parse({"group_size": recipe.group_size, "kv_bits": recipe.kv_bits})
    return calibrate(model, WINDOWS, survey(model, options).weights, recipe, **kwargs)


def judged(model: Any, record: Record, baseline: Any) -> Comparison:
    """The real quantized graph next to the model it was made from, on other random tokens."""
    recipe = record.recipe
    qoqc.compile(
        model,
        group_size=recipe.group_size,
        kv_bits=recipe.kv_bits,
        kv_layers=record.kv_layers(),
        prefill_kv="quantized",
        glue="eager",
    )
    return compare(model, baseline, Windows(JUDGED, (1,) * len(JUDGED), "none"))


def packed_values(model: Any) -> dict[str, torch.Tensor]:
    found = {n: STORE.packed(p) for n, p in model.named_parameters()}
    return {n: dequantize_weight(p) for n, p in found.items() if p is not None}


@pytest.mark.slow
@pytest.mark.parametrize("group_size", [128, -1])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_it_is_nearer_than_rounding(family: str, group_size: Any) -> None:
    """On random weights, without outliers, it is GPTQ and the searches that do it."""
    baseline = tiny_model(family)
    found = {}
    for name, recipe in (("rtn", RTN), ("qoq", Recipe())):
        torch._dynamo.reset()
        model = tiny_model(family)
        record = calibrated(model, dataclasses.replace(recipe, group_size=group_size))
        found[name] = judged(model, record, baseline).kl
    assert found["qoq"] < 0.85 * found["rtn"]


def test_the_control_is_rounding_to_nearest() -> None:
    model = tiny_model("llama")
    calibrated(model, RTN)
    for name, values in packed_values(model).items():
        plain = tiny_model("llama").get_parameter(name)
        assert torch.equal(values, dequantize_weight(quantize_weight(plain.detach(), 128))), name


@pytest.mark.slow
@pytest.mark.parametrize(
    "family",
    [
        *("qwen3", "gemma2", "gemma3_text", "phi3", "gpt_neox", "opt", "falcon", "olmo2"),
        *("mixtral", "granite", "cohere", "starcoder2"),
    ],
)
def test_families(family: str) -> None:
    """Whatever a family's structure allows: all layers are done, and the result is no worse."""
    baseline, control, model = (tiny_model(family, **CHANGES.get(family, {})) for _ in range(3))
    plain = judged(control, calibrated(control, RTN), baseline)
    torch._dynamo.reset()
    record = calibrated(model, Recipe())
    found = judged(model, record, baseline)
    assert len(record.layers) == 2
    assert all(layer.sqnr is not None and layer.sqnr > 8 for layer in record.layers)
    assert found.kl < plain.kl


@pytest.mark.slow
def test_same_arguments_same_bits() -> None:
    first, again = tiny_model("llama"), tiny_model("llama")
    records = [calibrated(first, Recipe()), calibrated(again, Recipe())]
    assert records[0] == records[1]
    ours, theirs = packed_values(first), packed_values(again)
    assert len(ours) == 14
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    other = tiny_model("llama")
    calibrated(other, Recipe(seed=1))
    assert not any(torch.equal(x, ours[name]) for name, x in packed_values(other).items())


def test_the_model_holds_what_the_packed_weights_stand_for() -> None:
    model = tiny_model("llama")
    calibrated(model, Recipe())
    for name, values in packed_values(model).items():
        assert torch.equal(model.get_parameter(name).detach(), values)


@pytest.mark.slow
def test_killed_and_taken_up_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tiny_model("llama")
    expected = calibrated(whole, Recipe())

    class Killed(Checkpoints):
        def save(self, index: int, finished: Any) -> None:
            super().save(index, finished)
            raise KeyboardInterrupt

    model = tiny_model("llama")
    key = key_of(model, WINDOWS, Recipe(), ["w"], {})
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(KeyboardInterrupt):
        calibrated(model, Recipe(), checkpoints=Killed(tmp_path, key))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    done: list[str] = []
    real = weights_step

    def counting(work: Any, *args: Any) -> Any:
        done.append(work.record.name)
        return real(work, *args)

    monkeypatch.setattr(driver, "weights_step", counting)
    record = calibrated(model, Recipe(), checkpoints=Checkpoints(tmp_path, key))
    assert done == ["model.layers.1"], "a finished layer is not done again"
    assert record == expected
    ours, theirs = packed_values(whole), packed_values(model)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for name, param in whole.named_parameters():
        assert torch.equal(param, model.get_parameter(name)), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("amount", "channels", "bits"),
    [(300.0, [7, 8, 23, 24], 8), (3000.0, [15, 14, 31, 30], 16)],
)
def test_kv_bits_where_a_bias_ruins_four(amount: float, channels: list[int], bits: int) -> None:
    """Key biases far above the signal in the first layer only: it alone gets more bits."""
    model, baseline = tiny_model("qwen2"), tiny_model("qwen2")
    for each in (model, baseline):
        bias = each.model.layers[0].self_attn.k_proj.bias
        with torch.no_grad():
            bias.view(2, 32)[:, channels] += amount
    record = calibrated(model, Recipe(kv_average=0))
    assert record.kv_layers() == (bits, 4)
    assert record.kv_mean() == (bits + 4) / 2
    assert "with KV4" in (record.layers[0].kv or {})["reason"]
    found = judged(model, record, baseline)
    torch._dynamo.reset()
    again, plain = tiny_model("qwen2"), dataclasses.replace(record, layers=())
    with torch.no_grad():
        again.model.layers[0].self_attn.k_proj.bias.view(2, 32)[:, channels] += amount
    assert found.kl < 0.7 * judged(again, plain, baseline).kl, "and that is what it takes"


@pytest.mark.slow
def test_bits_are_spent_up_to_the_average() -> None:
    record = calibrated(tiny_model("llama"), Recipe(kv_average=6))
    assert sorted(record.kv_layers()) == [4, 8]
    worst = max(record.layers, key=lambda x: (x.kv or {})["errors"]["4"])
    assert (worst.kv or {})["bits"] == 8
    assert calibrated(tiny_model("llama"), Recipe(kv_average=0)).kv_layers() == ()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("what", ["mlp.up_proj", "self_attn.k_proj"])
def test_nan_names_the_layer_and_changes_nothing(what: str, value: float) -> None:
    model = tiny_model("llama")
    weights = survey(model, Options()).weights
    with torch.no_grad():
        model.get_parameter(f"model.layers.1.{what}.weight")[3, 5] = value
    kept = model.model.embed_tokens.weight.detach().clone()
    with pytest.raises(Unsupported, match=r"layers?[. ]1.*NaN or infinity"):
        calibrate(model, WINDOWS, weights, Recipe())
    assert torch.equal(model.model.embed_tokens.weight, kept)


def test_progress_counts_layers() -> None:
    seen: list[tuple[int, int]] = []
    calibrated(tiny_model("llama"), RTN, progress=lambda *done: seen.append(done))
    assert seen == [(1, 2), (2, 2)]


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_a_gpu_does_what_the_cpu_does(where: str) -> None:
    """Wherever the model is: it stays there, and the errors are those of the CPU."""
    expected = calibrated(tiny_model("llama", torch.bfloat16), Recipe())
    model = tiny_model("llama", torch.bfloat16)
    weights = survey(model, Options()).weights
    model.to(where)
    record = calibrate(model, WINDOWS, weights, Recipe(), device="cuda")
    for ours, theirs in zip(record.layers, expected.layers, strict=True):
        # sums in another order make other codes, of the same quality
        for name, error in theirs.errors.items():
            assert ours.errors[name] == pytest.approx(error, rel=0.15), name
        assert ours.sqnr == pytest.approx(theirs.sqnr, abs=1)
    for ref in weights:
        packed = STORE.packed(ref.param)
        assert packed is not None
        assert packed.qweight.device == ref.param.device
        assert ref.param.device.type == where
        assert torch.equal(ref.param, dequantize_weight(packed).to(ref.param.dtype)), ref.name
