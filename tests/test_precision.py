"""Fewer bits where the processor can, and plain numbers, with a word, where it cannot."""

from contextlib import nullcontext

import pytest
import torch

from mmemo.core.state import SLOW_BF16, autocast_context, bf16_is_slow
from mmemo.experiments.recipe import load_recipe
from mmemo.experiments.run import run_notes


def processor(monkeypatch, machine, avx512, amx):
    monkeypatch.setattr("platform.machine", lambda: machine)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)


@pytest.mark.parametrize(
    "machine, avx512, amx, slow",
    [
        ("x86_64", False, False, True),
        ("AMD64", False, True, False),
        ("x86_64", True, False, False),
        ("arm64", False, False, False),
    ],
)
def test_bf16_is_computed_in_fp32_where_that_is_faster(monkeypatch, machine, avx512, amx, slow):
    cpu = torch.device("cpu")
    processor(monkeypatch, machine, avx512, amx)
    assert bf16_is_slow(cpu) == slow and not bf16_is_slow(torch.device("cuda"))
    expected = pytest.warns(UserWarning, match="slower than fp32") if slow else nullcontext()
    with expected, autocast_context("bf16", cpu):
        said = torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype
    assert said == (torch.float32 if slow else torch.bfloat16)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="an accelerator computes bf16")
@pytest.mark.parametrize("slow", [True, False])
def test_the_notes_of_a_run_say_so(monkeypatch, slow):
    processor(monkeypatch, "x86_64", not slow, False)
    notes = run_notes(load_recipe("end_to_end", "smoke"), "known-answer", {})
    assert (SLOW_BF16 in notes) == slow
    assert SLOW_BF16 not in run_notes(load_recipe("fine_tune", "smoke"), "known-answer", {})
