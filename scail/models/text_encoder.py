"""Prompts: cleaning, tokens and the UMT5 encoder's states.

Source: zai-org/SCAIL, the umt5 tokenizer wrapper (cleaning mode `whitespace`) and encoder.
"""

from __future__ import annotations

import html
import re
from pathlib import Path

import ftfy
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import UMT5Config, UMT5EncoderModel

from scail.config import TextEncoderConfig
from scail.errors import CheckpointError

_PAD_TOKEN = "<pad>"


class TextEncoder(nn.Module):
    """UMT5's encoder, on the device of its input."""

    def __init__(self, config: TextEncoderConfig) -> None:
        super().__init__()
        library_config = UMT5Config(
            vocab_size=config.vocab_size,
            d_model=config.hidden_size,
            d_kv=config.attention_size // config.num_heads,
            d_ff=config.ffn_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            relative_attention_num_buckets=config.num_buckets,
        )
        # The stack alone: UMT5EncoderModel holds the embedding, 2 GB of umt5-xxl, under a second name as well.
        self.encoder = UMT5EncoderModel(library_config).encoder

    @classmethod
    def from_config(cls, config: TextEncoderConfig) -> TextEncoder:
        return cls(config)

    def forward(self, token_ids: Tensor, mask: Tensor) -> Tensor:
        """Text states.

        Args:
            token_ids: (B, L), integers.
            mask: (B, L), 1 for tokens and 0 for padding.

        Returns:
            (B, L, D) in the dtype of the weights; padded rows are exact zeros, which the transformer attends.
        """
        is_padding = mask.to(token_ids.device) == 0
        dtype = self.encoder.dtype
        # Written out, since of a plain mask the library asks whether it hides anything, and so waits for the device.
        hidden = torch.zeros(is_padding.shape, dtype=dtype, device=token_ids.device)
        hidden = hidden.masked_fill(is_padding, torch.finfo(dtype).min)[:, None, None]  # (B, 1, 1, L)
        table = self.encoder.embed_tokens  # where memory is short, on the host
        embeds = table(token_ids.to(table.weight.device)).to(token_ids.device)
        states = self.encoder(inputs_embeds=embeds, attention_mask=hidden).last_hidden_state
        return states.masked_fill(is_padding.unsqueeze(-1), 0.0)


class PromptTokenizer:
    """Token ids of a prompt, padded and truncated to one length.

    Reads `tokenizer.json` itself. transformers 5 rebuilds a tokenizer whose configuration names `T5Tokenizer`, as
    umt5's does, without that file's normalizer and byte fallback: rare characters then become `<unk>`.
    """

    def __init__(self, tokenizer_dir: Path, max_length: int) -> None:
        """Open a tokenizer folder.

        Raises:
            CheckpointError: If the folder has no readable `tokenizer.json`, or one without padding.
        """
        path = tokenizer_dir / "tokenizer.json"
        if not path.is_file():
            raise CheckpointError(f"{path} is missing; the tokenizer is google/umt5-xxl's.")
        try:
            self._tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise CheckpointError(f"{path} cannot be read as a tokenizer: {error}") from error
        pad_id = self._tokenizer.token_to_id(_PAD_TOKEN)
        if pad_id is None:
            raise CheckpointError(f"{path} has no {_PAD_TOKEN} token; umt5's has.")
        self._tokenizer.enable_truncation(max_length)
        self._tokenizer.enable_padding(length=max_length, pad_id=pad_id, pad_token=_PAD_TOKEN)

    @property
    def num_tokens(self) -> int:
        return self._tokenizer.get_vocab_size()

    def __call__(self, prompt: str) -> tuple[Tensor, Tensor]:
        """Ids and mask, each int64 (1, max_length); the prompt `None` is empty, as in the official script."""
        encoding = self._tokenizer.encode(clean_prompt("" if prompt == "None" else prompt))
        return torch.tensor([encoding.ids]), torch.tensor([encoding.attention_mask])


def clean_prompt(text: str) -> str:
    """Repaired encoding, HTML entities resolved twice, white space collapsed."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return re.sub(r"\s+", " ", text).strip()
