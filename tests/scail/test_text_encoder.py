from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from scail.config import SCAIL_TINY
from scail.errors import CheckpointError
from scail.models.text_encoder import PromptTokenizer, TextEncoder, clean_prompt

CLEANED = json.loads((Path(__file__).parent.parent / "golden" / "text_clean.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def encoder() -> TextEncoder:
    torch.manual_seed(0)
    return TextEncoder.from_config(SCAIL_TINY.text_encoder).eval().requires_grad_(False)


@pytest.fixture
def tokenizer_dir(tmp_path) -> Path:
    """As umt5's: unigrams with byte fallback, a normalizer, and a configuration that names T5Tokenizer."""
    symbols = ["<pad>", "</s>", "<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b"]
    vocab = [(symbol, -1.0) for symbol in symbols]
    tokenizer = Tokenizer(models.Unigram(vocab, unk_id=2, byte_fallback=True))
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "T5Tokenizer"}))
    return tmp_path


@pytest.mark.parametrize("example", CLEANED, ids=lambda example: repr(example["cleaned"]))
def test_prompts_are_cleaned_as_the_official_code_cleans_them(example):
    assert clean_prompt(example["text"]) == example["cleaned"]


def test_prompts_are_padded_to_one_length(tokenizer_dir):
    ids, mask = PromptTokenizer(tokenizer_dir, max_length=8)("a b")

    assert ids.tolist() == [[259, 260, 259, 261, 1, 0, 0, 0]]
    assert mask.tolist() == [[1, 1, 1, 1, 1, 0, 0, 0]]
    assert (ids.dtype, mask.dtype) == (torch.int64, torch.int64)


def test_a_long_prompt_is_cut_before_its_end_token(tokenizer_dir):
    ids, mask = PromptTokenizer(tokenizer_dir, max_length=4)("a b a b a b")

    assert ids.tolist() == [[259, 260, 259, 1]]
    assert mask.tolist() == [[1, 1, 1, 1]]


@pytest.mark.parametrize("prompt", ["", "  ", "None"])
def test_an_empty_prompt_is_its_end_token_alone(prompt, tokenizer_dir):
    ids, mask = PromptTokenizer(tokenizer_dir, max_length=4)(prompt)

    assert ids.tolist() == [[1, 0, 0, 0]]
    assert mask.tolist() == [[1, 0, 0, 0]]


def test_rare_characters_are_spelt_in_bytes_and_not_lost(tokenizer_dir):
    ids, _ = PromptTokenizer(tokenizer_dir, max_length=4)("é")

    assert ids.tolist() == [[259, 3 + 0xC3, 3 + 0xA9, 1]]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "tokenizer.json is missing"),
        ("{", "cannot be read as a tokenizer"),
        (Tokenizer(models.WordLevel({"a": 0}, unk_token="a")).to_str(), "has no <pad> token"),
    ],
    ids=["missing", "damaged", "without padding"],
)
def test_a_folder_without_a_usable_tokenizer_is_refused(content, message, tmp_path):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)

    with pytest.raises(CheckpointError, match=message):
        PromptTokenizer(tmp_path, max_length=8)


def test_padded_rows_are_exact_zeros(encoder):
    ids, mask = torch.tensor([[5, 6, 1, 0, 0], [7, 1, 0, 0, 0]]), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]])

    context = encoder(ids, mask)

    assert context.shape == (2, 5, 32)
    assert context[mask == 0].eq(0).all()
    assert context[mask == 1].ne(0).any(dim=-1).all()


def test_padding_changes_nothing_in_the_prompts_rows(encoder):
    ids = torch.tensor([[5, 6, 1]])

    short = encoder(ids, torch.ones_like(ids))
    padded = encoder(torch.cat((ids, torch.tensor([[9, 9]])), dim=1), torch.tensor([[1, 1, 1, 0, 0]]))

    torch.testing.assert_close(padded[:, :3], short, rtol=0, atol=1e-5)
