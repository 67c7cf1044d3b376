"""An LLM that draws: prompts to image tokens, constrained so that text never leaks into a picture (section 2.4)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

import v2flow_cli
from v2flow_cli.errors import DataError, ModelError
from v2flow_cli.llm.finetune import context_length, load_llm
from v2flow_cli.llm.sequences import caption_ids, prompt_ids
from v2flow_cli.llm.vocabulary import VisualVocabulary

DEFAULT_LLM = Path(v2flow_cli.__file__).parent / "assets" / "default" / "llm"


class DrawingLM:
    """An LLM folder ready to draw. Holds the LLM with its output table cut to the visual rows, so do not save it."""

    def __init__(
        self, model: PreTrainedModel, text_tokenizer: PreTrainedTokenizerBase, vocabulary: VisualVocabulary, name: str
    ) -> None:
        self.model, self.text_tokenizer, self.vocabulary, self.name = model, text_tokenizer, vocabulary, name
        self.digest = model.config.v2flow.get("weights_digest", "")
        # No other word may be drawn, so no other logit is computed; what follows the table is elementwise.
        start = vocabulary.visual_token_offset
        table = model.get_output_embeddings()
        head = nn.Linear(table.in_features, vocabulary.codebook_size, bias=table.bias is not None, device="meta")
        head.weight = nn.Parameter(table.weight.detach()[start : start + vocabulary.codebook_size].clone())
        if table.bias is not None:
            head.bias = nn.Parameter(table.bias.detach()[start : start + vocabulary.codebook_size].clone())
        model.set_output_embeddings(head)

    @classmethod
    def from_pretrained(
        cls, name: str | Path | None = None, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
    ) -> DrawingLM:
        """The LLM in a folder or on the hub; None is the embedded default.

        Raises:  ModelError for a folder that is no causal LM, or one that was not taught to draw.
        """
        name = str(DEFAULT_LLM if name is None else name)
        model, text_tokenizer = load_llm(name, dtype)
        vocabulary = VisualVocabulary.of(model.config, name)
        return cls(model.to(device).eval(), text_tokenizer, vocabulary, name)

    def prompt(self, text: str) -> list[int]:
        """Prompt ids of ``text``; the empty text is the unconditional prompt.

        Raises:  DataError where prompt and image do not fit the LLM's context.
        """
        words = caption_ids(self.text_tokenizer, text)
        room = context_length(self.model.config) - len(prompt_ids(self.vocabulary, ()))
        room -= self.vocabulary.tokens_per_image + 2
        if len(words) > room:
            raise DataError(
                f"the prompt {text[:40]!r}... takes {len(words):,} tokens; {self.name} has room for {int(room):,} "
                "beside the image. Give a shorter prompt."
            )
        return prompt_ids(self.vocabulary, words)

    @torch.inference_mode()
    def draw(
        self,
        prompts: Sequence[str],
        *,
        seeds: Sequence[int],
        temperatures: Sequence[float],
        top_k: int = 0,
        top_p: float = 1.0,
        guidance_scale: float = 1.0,
        tick: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Image tokens (B, L) in [0, K), one row for each prompt with its seed and temperature.

        Args:  temperature 0 takes the likeliest token; top_k 0 and top_p 1 cut nothing; guidance follows
               uncond + scale (cond - uncond) on logits, the empty prompt being unconditional; ``tick`` is called
               after every position. A row depends on its own prompt, seed and settings, not on the batch.
        """
        length, device = self.vocabulary.tokens_per_image, self.model.device
        uniforms = torch.stack(
            [torch.rand(length, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        ).to(device)  # (B, L)
        heat = torch.tensor(temperatures, device=device, dtype=torch.float32)  # (B,)
        guided = guidance_scale != 1.0
        unique = list(dict.fromkeys(prompts))
        rows = [unique.index(prompt) for prompt in prompts] + [len(unique)] * (len(prompts) if guided else 0)
        ids, mask = _left_pad([self.prompt(p) for p in unique] + ([self.prompt("")] if guided else []), device)
        # Samples of one prompt share its prefill: the cache is computed once for each and then spread over the rows.
        select = torch.tensor(rows, device=device)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        out = self.model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=True)
        cache, logits = out.past_key_values, out.logits[:, -1][select]  # (R, K)
        cache.batch_select_indices(select)
        mask, positions = mask[select], positions[select, -1:]
        drawn = torch.empty(len(prompts), length, dtype=torch.long, device=device)
        for step in range(length):
            scores = logits.float()
            if guided:
                cond, uncond = scores.chunk(2)
                scores = uncond + guidance_scale * (cond - uncond)
            drawn[:, step] = pick(scores, uniforms[:, step], heat, top_k, top_p)
            tick()
            if step + 1 == length:
                return drawn
            token = (drawn[:, step] + self.vocabulary.visual_token_offset).repeat(2 if guided else 1)
            mask, positions = torch.cat([mask, mask[:, :1] * 0 + 1], 1), positions + 1
            out = self.model(
                input_ids=token[:, None],
                attention_mask=mask,
                position_ids=positions,
                past_key_values=cache,
                use_cache=True,
            )
            logits = out.logits[:, -1]
        raise ModelError(f"{self.name}: tokens_per_image is {length}; expected at least 1.")


def pick(scores: Tensor, uniforms: Tensor, temperatures: Tensor, top_k: int, top_p: float) -> Tensor:
    """One index a row (B,) of ``scores`` (B, K), drawn by inverting the distribution function at ``uniforms`` (B,)."""
    best = scores.argmax(-1)
    scores = scores / temperatures[:, None].clamp_min(1e-6)
    if 0 < top_k < scores.shape[-1]:
        scores = scores.masked_fill(scores < scores.topk(top_k).values[:, -1:], -torch.inf)
    probs = scores.softmax(-1)
    if top_p < 1:
        ordered, order = probs.sort(-1, descending=True)
        cut = ordered.cumsum(-1) - ordered >= top_p  # what precedes them has the mass already
        probs = probs.scatter(-1, order, ordered.masked_fill(cut, 0.0))
    total = probs.double().cumsum(-1)
    drawn = torch.searchsorted(total, (uniforms * total[:, -1])[:, None], right=True)[:, 0]
    return torch.where(temperatures > 0, drawn.clamp_max(scores.shape[-1] - 1), best)


class ImageTokensOnly(LogitsProcessor):
    """For ``model.generate``: exactly L visual ids after the prompt, then end-of-image, then EOS.

    Args:  vocabulary of the model; prompt_length, the width of the (left-padded) prompt ids.
    """

    def __init__(self, vocabulary: VisualVocabulary, prompt_length: int) -> None:
        self.vocabulary, self.prompt_length = vocabulary, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        v, done = self.vocabulary, input_ids.shape[1] - self.prompt_length
        if done < v.tokens_per_image:
            allowed = slice(v.visual_token_offset, v.visual_token_offset + v.codebook_size)
        else:
            only = v.end_image_id if done == v.tokens_per_image or v.eos_id is None else v.eos_id
            allowed = slice(only, only + 1)
        cut = torch.full_like(scores, -torch.inf)
        cut[:, allowed] = scores[:, allowed]
        return cut


def _left_pad(prompts: Sequence[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, each (B, T), of prompts that end together."""
    width = max(map(len, prompts))
    ids = [[0] * (width - len(p)) + p for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
