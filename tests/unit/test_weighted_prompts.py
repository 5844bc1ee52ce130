r"""Prompt weights: brackets, escapes, and what weights do to an encoding."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from tests.pipelines.tiny import save_tokenizer

from kandinsky22 import InputError
from kandinsky22.inputs.weighted_prompts import apply_weights, parse, tokenize_weighted


def rounded(prompt: str) -> list[tuple[str, float]]:
    """Return the parts of a prompt, weights rounded to 4 decimals."""
    return [(part.text, round(part.weight, 4)) for part in parse("prompt", prompt)]


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("a red cat", [("a red cat", 1)]),
        ("", []),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("a (red:1.5) cat", [("a ", 1), ("red", 1.5), (" cat", 1)]),
        ("(red: .5 )", [("red", 0.5)]),
        ("(red:0)", [("red", 0)]),
        ("((red))", [("red", 1.21)]),
        ("[red]", [("red", 0.9091)]),
        ("([red])", [("red", 1)]),
        ("(a [red] cat:2)", [("a ", 2), ("red", 1.8182), (" cat", 2)]),
        ("((a:3) b:2)", [("a", 6), (" b", 2)]),
        ("(time: noon)", [("time: noon", 1.1)]),
        ("12:30, (12:30:1.2)", [("12:30, ", 1), ("12:30", 1.2)]),
        ("[red:0.5]", [("red:0.5", 0.9091)]),
        (r"a \(b\) \[c\] \\ d", [(r"a (b) [c] \ d", 1)]),
        (r"(\(b\):2)", [("(b)", 2)]),
        (r"back\slash", [(r"back\slash", 1)]),
        ("()", []),
        ("(:2)", []),
        ("(a\nb:2)", [("a\nb", 2)]),
    ],
)
def test_parts(prompt: str, parts: list[tuple[str, float]]) -> None:
    assert rounded(prompt) == parts


@pytest.mark.parametrize("prompt", ["(red", "red)", "(red]", "[red)", "(a [b) c]", ")(", "(" * 30 + "a" + ")" * 30])
def test_brackets_come_in_pairs(prompt: str) -> None:
    with pytest.raises(InputError, match=r"^prompt=.* is invalid: expected (brackets in pairs; write|at most 20)"):
        parse("prompt", prompt)


@pytest.mark.parametrize("prompt", ["(red:-1)", "(red:10.5)", "(red:" + "9" * 400 + ")", "((a:5):5)"])
def test_weights_have_limits(prompt: str) -> None:
    with pytest.raises(InputError, match=r"^a weight in prompt=.* is invalid: expected a number from 0 to 10"):
        parse("prompt", prompt)


def test_long_prompts_are_parsed_quickly() -> None:
    assert len(parse("prompt", "(a:2) b [c] " * 5000)) == 20000


def test_tokens_of_a_prompt_and_of_the_prompt_without_its_parts(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    weighted = tokenize_weighted(tokenizer, parse("prompt", "a (red:2) cat [on]"))
    expected = [tokenizer(text, padding="max_length").input_ids for text in ("a red cat on", "a cat on", "a red cat")]
    assert weighted.tokens.ids.tolist() == expected
    masks = [tokenizer(text, padding="max_length").attention_mask for text in ("a red cat on", "a cat on", "a red cat")]
    assert weighted.tokens.mask.int().tolist() == masks
    assert weighted.token_weights[:6].tolist() == pytest.approx([1, 1, 2, 1, 1 / 1.1, 1])
    assert weighted.part_weights.tolist() == pytest.approx([2, 1 / 1.1])


def test_long_prompts_are_cut_off_and_said_in_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = save_tokenizer(tmp_path)
    with caplog.at_level(logging.WARNING):
        weighted = tokenize_weighted(tokenizer, parse("prompt", "a " * 70 + "(b b b b b b red\ncat:2) (on on:3)"))
    assert weighted.tokens.ids.shape == (2, 77)  # the second part is cut off entirely
    assert (weighted.token_weights == 2).sum() == 5
    assert [record.getMessage() for record in caplog.records] == [
        "the prompt has 82 tokens, but CLIP reads 77: cut off is 'b red cat on on'"
    ]


def test_weights_scale_states_from_their_mean_and_shift_the_pooled_embedding(tmp_path: Path) -> None:
    tokenizer = save_tokenizer(tmp_path)
    weighted = tokenize_weighted(tokenizer, parse("prompt", "a (red:0) (cat:3)"))
    states, pooled = torch.randn(3, 77, 8), torch.randn(3, 8)
    new_states, new_pooled = apply_weights(weighted, states, pooled)
    mean = states[0, :5].mean(dim=0)  # start, three words, end
    assert torch.equal(new_states[[0, 1, 4]], states[0, [0, 1, 4]])
    assert torch.equal(new_states[5:], states[0, 5:])
    torch.testing.assert_close(new_states[2], mean)
    torch.testing.assert_close(new_states[3], mean + 3 * (states[0, 3] - mean))
    torch.testing.assert_close(new_pooled, pooled[0] - (pooled[0] - pooled[1]) + 2 * (pooled[0] - pooled[2]))
