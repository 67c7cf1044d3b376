"""An LLM that draws: prompts to image tokens, constrained so that text never leaks into a picture (section 2.4)."""

from __future__ import annotations

import contextlib
import inspect
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache, LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase, StaticCache
from transformers.cache_utils import Cache

from v2flow_cli.errors import DataError, ModelError, foreign_errors
from v2flow_cli.llm.load import context_length, load_llm
from v2flow_cli.llm.sampling import DEFAULT_LLM, stored_sampling
from v2flow_cli.llm.sequences import caption_ids, caption_prompt_ids, prompt_ids
from v2flow_cli.llm.static_step import StaticStep
from v2flow_cli.llm.vocabulary import VisualVocabulary
from v2flow_cli.recipe.schema import DrawSampling
from v2flow_cli.runtime.batch_invariant import each_row_alone, on_single_threads
from v2flow_cli.runtime.device import tf32

CACHES = ("static", "dynamic")  # of keys and values, the preferred first: it need not be copied as it grows
PROMPT_MULTIPLE = 32  # prompts are padded to a multiple of this width: a row's padding is a matter of its own prompt
LOOKS = 16  # positions between two looks, on a GPU, at whether all pictures have ended
STOPPED = -1  # after the end of a picture of flexible length


class DrawingLM:
    """An LLM folder ready to draw, and to caption where it was taught to.

    Departs (D13): as many visual tokens are drawn as a picture has, and no other words.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        text_tokenizer: PreTrainedTokenizerBase,
        vocabulary: VisualVocabulary,
        name: str,
        sampling: DrawSampling | None = None,
    ) -> None:
        self.sampling = sampling or DrawSampling()  # what ``generate`` does unless asked
        self.model, self.text_tokenizer, self.vocabulary, self.name = model, text_tokenizer, vocabulary, name
        self.digest = getattr(model.config, "v2flow", {}).get("weights_digest", "")
        compiled = model.device.type == "cuda" and vocabulary.cache == "static"
        self._static_step = StaticStep(model) if compiled else None

    @classmethod
    def from_pretrained(
        cls,
        path_or_id: str | Path | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
        *,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> DrawingLM:
        """The LLM in a folder or on the hub; None is the embedded default.

        Args:    revision, token, cache_dir, local_files_only: of a hub id, as ``runtime.hub.model_folder`` takes them.
        Raises:  ModelError for a folder that is no causal LM, or one that was not taught to draw.
        """
        name = str(DEFAULT_LLM if path_or_id is None else path_or_id)
        hub = dict(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        model, text_tokenizer = load_llm(name, dtype, **hub)
        vocabulary = VisualVocabulary.of(model.config, name)
        return cls(model.to(device).eval(), text_tokenizer, vocabulary, name, stored_sampling(name, **hub))

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

    def length(self, num_tokens: int | None) -> int:
        """The most tokens that a picture gets: ``num_tokens``, or as many as it can have.

        Raises:  DataError for a number that the LLM cannot draw.
        """
        whole = self.vocabulary.tokens_per_image
        if num_tokens is None or num_tokens == whole:
            return whole
        if not self.vocabulary.flexible:
            raise DataError(
                f"{num_tokens} tokens, but {self.name} always draws {whole}; shorter pictures need an LLM that was "
                "taught tokens of flexible length."
            )
        if not 1 <= num_tokens <= whole:
            raise DataError(f"{num_tokens} tokens, but {self.name} draws 1 to {whole}.")
        return num_tokens

    @torch.inference_mode()
    @tf32(False)
    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        seeds: int | Sequence[int] = 0,
        temperature: float | Sequence[float] | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float | None = None,
        num_tokens: int | None = None,
        kept: Tensor | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Image tokens (B, L) int64 in [0, K), one row for each prompt; ``V2FlowTokenizer.decode`` draws them.

        Where the vocabulary is flexible a row may stop early: its first 1 to L entries are tokens, the rest STOPPED.

        Args:    seeds, one for each prompt, or the first, from which the others count up; temperature, one for each
                 or one for all, 0 takes the likeliest token; top_k 0 and top_p 1 cut nothing; guidance follows
                 uncond + scale (cond - uncond) on logits, the empty prompt being unconditional; what is None is the
                 LLM's own (``sampling``); num_tokens, L, the most that a picture gets where the vocabulary is flexible
                 (default: as many as it can have); ``kept`` (B, L), tokens that stay as they are, and STOPPED where one
                 is drawn; ``tick`` is called after every position of the first row. A row depends on its own prompt,
                 seed and settings; on a CPU it is bit-equal alone and in any batch.
        Raises:  DataError for no prompt, one that is too long, another number of seeds or temperatures, and a number
                 of tokens that the LLM cannot draw.
        """
        own = self.sampling
        temperature = own.temperature if temperature is None else temperature
        top_k, top_p = own.top_k if top_k is None else top_k, own.top_p if top_p is None else top_p
        guidance_scale = own.guidance_scale if guidance_scale is None else guidance_scale
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        seeds = [seeds + i for i in range(len(prompts))] if isinstance(seeds, int) else list(seeds)
        temperatures = [temperature] * len(prompts) if isinstance(temperature, int | float) else list(temperature)
        if not prompts or not len(prompts) == len(seeds) == len(temperatures):
            raise DataError(
                f"{len(prompts)} prompts, {len(seeds)} seeds and {len(temperatures)} temperatures; expected at least "
                "one prompt, and one of each for every prompt."
            )
        if not all(0 <= t < math.inf for t in temperatures):
            raise DataError(f"temperature is {temperature}; expected numbers from 0 up.")
        device = self.model.device
        length, whole = self.length(num_tokens), self.vocabulary.tokens_per_image
        # Those of all tokens, so that a short picture begins as a long one does.
        uniforms = torch.stack(
            [torch.rand(whole, generator=torch.Generator().manual_seed(s), dtype=torch.float64) for s in seeds]
        )[:, :length].to(device)  # (B, L)
        row_temperatures = torch.tensor(temperatures, device=device, dtype=torch.float32)  # (B,)
        encoded = [self.prompt(prompt) for prompt in prompts]
        widths = [-(-len(ids) // PROMPT_MULTIPLE) * PROMPT_MULTIPLE for ids in encoded]
        empty = self.prompt("") if guidance_scale != 1.0 else None

        def draw_rows(rows: Tensor) -> Tensor:
            at = rows.to(device)
            own_uniforms, own_temperatures = uniforms[at], row_temperatures[at]
            own_kept = None if kept is None else kept.to(device)[at]

            def choose(scores: Tensor, step: int) -> Tensor:
                token = pick(scores, own_uniforms[:, step], own_temperatures, top_k, top_p)
                return token if own_kept is None else torch.where(own_kept[:, step] >= 0, own_kept[:, step], token)

            report = tick if 0 in rows else lambda: None
            of_rows = [encoded[row] for row in rows.tolist()]
            return self._draw_rows(of_rows, empty, widths[rows[0]], length, choose, guidance_scale, report)

        drawn = torch.full(uniforms.shape, STOPPED, device=device)
        with each_row_alone(self.model):
            for width in sorted(set(widths)):
                rows = torch.tensor([row for row, own in enumerate(widths) if own == width])
                if device.type == "cpu":
                    part = -(-len(rows) // torch.get_num_threads())
                    drawn[rows] = torch.cat(on_single_threads(draw_rows, rows, part))
                else:
                    drawn[rows.to(device)] = draw_rows(rows)
        return drawn

    def _draw_rows(
        self,
        prompts: Sequence[list[int]],
        empty: list[int] | None,
        width: int,
        length: int,
        choose: Callable[[Tensor, int], Tensor],
        guidance_scale: float,
        tick: Callable[[], None],
    ) -> Tensor:
        """Image tokens (B, L) of prompt ids that are all padded to ``width``; guided where ``empty`` ids are given."""
        v, device = self.vocabulary, self.model.device
        start, end = v.visual_token_offset, v.end_image_id - v.visual_token_offset
        unique = list(dict.fromkeys(map(tuple, prompts)))
        rows = [unique.index(tuple(prompt)) for prompt in prompts]
        if empty is not None:
            rows += [len(unique)] * len(prompts)
            unique.append(tuple(empty))
        # A compiled step is of one size of the cache, that of a whole picture.
        room = length if self._static_step is None else v.tokens_per_image
        cache, logits, mask, positions = self._prefill(unique, width, width + room)
        # Samples of one prompt share its prefill: the cache is computed once for each and then spread over the rows.
        select = torch.tensor(rows, device=device)
        static, looks = self._static_step, 1 if device.type == "cpu" else LOOKS
        with contextlib.nullcontext() if static is None else static.lock:
            if static is None:
                cache.reorder_cache(select)
            else:
                cache = static.spread(cast(StaticCache, cache), select)
            logits, mask, positions = logits[select], mask[select], positions[select]
            if isinstance(cache, StaticCache):  # over the whole cache: what comes later is hidden from what came before
                mask = F.pad(mask, (0, room), value=1)
            drawn = torch.full((len(prompts), length), STOPPED, device=device)
            going = torch.ones(len(prompts), dtype=torch.bool, device=device)
            for step in range(length):
                scores = logits[:, start : start + end + 1].float()  # visual ids and the two marks
                if empty is not None:
                    cond, uncond = scores.chunk(2)
                    scores = uncond + guidance_scale * (cond - uncond)
                if v.flexible and step:
                    places = torch.arange(end + 1, device=device)
                    scores = scores.masked_fill(
                        (places >= v.codebook_size) & (places < end), -torch.inf
                    )  # the first mark
                else:
                    scores = scores[:, : v.codebook_size]
                token = choose(scores, step)
                going = going & (token < v.codebook_size)
                drawn[:, step] = torch.where(going, token, STOPPED)
                tick()
                # Whether all rows have ended is a question that a GPU is asked only now and then.
                if step + 1 == length or (v.flexible and (step + 1) % looks == 0 and not going.any()):
                    break
                token = (token + start).repeat(1 if empty is None else 2)[:, None]
                positions = positions + 1
                if not isinstance(cache, StaticCache):
                    mask = F.pad(mask, (0, 1), value=1)
                if static is None:
                    given = dict(attention_mask=mask, position_ids=positions, past_key_values=cache)
                    logits = self._last(input_ids=token, **given).logits[:, -1]
                else:
                    logits = static(token, mask, positions, cast(StaticCache, cache))
        return drawn

    def _prefill(
        self, prompts: Sequence[Sequence[int]], width: int, max_length: int
    ) -> tuple[Cache, Tensor, Tensor, Tensor]:
        """(cache, last logits (U, V), mask (U, width), last positions (U, 1)) of U prompts, each computed alone."""
        caches, logits = [], []
        ids, mask = _left_pad(prompts, width, self.model.device)
        positions = (mask.cumsum(1) - 1).clamp_min(0)
        for row in range(len(prompts)):
            one = slice(row, row + 1)
            caches.append(new_cache(self.vocabulary.cache, self.model.config, max_length))
            given = dict(attention_mask=mask[one], position_ids=positions[one], past_key_values=caches[-1])
            out = self._last(input_ids=ids[one], **given)
            logits.append(out.logits[:, -1])
        cache = caches[0]
        for layer, *others in zip(*(c.layers for c in caches)):
            layer.keys = torch.cat([layer.keys, *(other.keys for other in others)])
            layer.values = torch.cat([layer.values, *(other.values for other in others)])
        return cache, torch.cat(logits), mask, positions[:, -1:]

    def _last(self, **inputs: Any) -> Any:
        """The model's outputs; its logits are of the last position alone where it can leave out the others."""
        kept = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(self.model.forward).parameters else {}
        advice = "Fine-tune it again with this version of v2flow, which tries that before the training."
        with foreign_errors(f"{self.name}: {type(self.model).__name__} cannot draw token by token", advice):
            return self.model(**inputs, use_cache=True, **kept)

    @torch.inference_mode()
    @tf32(False)
    def caption(self, token_ids: Tensor, *, seed: int = 0, temperature: float = 0.0, max_tokens: int = 64) -> str:
        """What the image ``token_ids`` (L,) shows, in words; temperature 0 takes the likeliest word each time.

        Raises:  ModelError for an LLM that was not taught image to text.
        """
        if not self.vocabulary.captions:
            raise ModelError(
                f"{self.name} was not taught to caption. Fine-tune with data.image_to_text_share above 0 for that."
            )
        prompt = torch.tensor([caption_prompt_ids(self.vocabulary, token_ids.cpu().numpy())], device=self.model.device)
        sampling = dict(do_sample=True, temperature=temperature, top_k=0) if temperature else dict(do_sample=False)
        with torch.random.fork_rng(devices=[prompt.device] if prompt.is_cuda else []):
            torch.manual_seed(seed)
            out = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=max_tokens,
                logits_processor=[TextOnly(self.vocabulary)],
                eos_token_id=self.vocabulary.eos_id,
                pad_token_id=self.vocabulary.eos_id,
                **sampling,
            )
        return " ".join(self.text_tokenizer.decode(out[0, prompt.shape[1] :], skip_special_tokens=True).split())


def new_cache(kind: str, config: Any, length: int) -> Cache:
    """An empty key-value cache of a ``kind`` of CACHES, for ``length`` positions."""
    return StaticCache(config=config, max_cache_len=length) if kind == "static" else DynamicCache(config=config)


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
    """For ``model.generate``: the picture's visual ids after the prompt, then end-of-image, then EOS.

    Exactly ``tokens_per_image`` of them, or 1 to that many where the vocabulary is flexible.

    Args:  vocabulary of the model; prompt_length, the width of the (left-padded) prompt ids.
    """

    def __init__(self, vocabulary: VisualVocabulary, prompt_length: int) -> None:
        self.vocabulary, self.prompt_length = vocabulary, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        v, answer = self.vocabulary, input_ids[:, self.prompt_length :]
        allowed = torch.zeros_like(scores, dtype=torch.bool)
        ended = (answer == v.end_image_id).any(1)  # (B,)
        drawing = ~ended & (answer.shape[1] < v.tokens_per_image)
        allowed[drawing, v.visual_token_offset : v.visual_token_offset + v.codebook_size] = True
        may_end = ~ended & (answer.shape[1] >= (1 if v.flexible else v.tokens_per_image))
        allowed[may_end, v.end_image_id] = True
        allowed[ended, v.end_image_id if v.eos_id is None else v.eos_id] = True
        return scores.masked_fill(~allowed, -torch.inf)


class TextOnly(LogitsProcessor):
    """For ``model.generate``: no visual id and neither of the marks."""

    def __init__(self, vocabulary: VisualVocabulary) -> None:
        self.vocabulary = vocabulary

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.vocabulary.visual_token_offset : self.vocabulary.end_image_id + 1] = -torch.inf
        return scores


def _left_pad(prompts: Sequence[Sequence[int]], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, each (B, width), of prompts that end together."""
    ids = [[0] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
