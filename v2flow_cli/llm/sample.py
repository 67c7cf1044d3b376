"""An LLM that draws: prompts to image tokens, without any other token between them (section 2.4)."""

from __future__ import annotations

import contextlib
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
from v2flow_cli.llm.load import context_length, load_llm, without_tied
from v2flow_cli.llm.sampling import DEFAULT_LLM, stored_sampling
from v2flow_cli.llm.sequences import caption_ids, caption_prompt_ids, prompt_ids
from v2flow_cli.llm.static_step import StaticStep, last_logits, logits_options
from v2flow_cli.llm.vocabulary import VisualVocabulary
from v2flow_cli.recipe.schema import DrawSampling
from v2flow_cli.runtime.batch_invariant import each_row_alone, on_single_threads
from v2flow_cli.runtime.device import tf32
from v2flow_cli.runtime.digest import weights_digest

CACHES = ("static", "dynamic")  # of keys and values; the static one is preferred, because it is never copied to grow
PROMPT_MULTIPLE = 32  # prompts are padded to a multiple of this width, so a row's padding depends on its prompt alone
END_CHECK_STEPS = 16  # positions between two tests, on a GPU, of whether all images have ended
STOPPED = -1  # after the end of an image of flexible length


class DrawingLM:
    """An LLM that draws, and captions if it was trained for that.

    Departs (D13): it draws exactly the visual tokens of an image, and no other tokens.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        text_tokenizer: PreTrainedTokenizerBase,
        vocabulary: VisualVocabulary,
        name: str,
        sampling: DrawSampling | None = None,
    ) -> None:
        self.sampling = sampling or DrawSampling()  # the defaults of ``generate``
        self.model, self.text_tokenizer, self.vocabulary, self.name = model, text_tokenizer, vocabulary, name
        compiled = model.device.type == "cuda" and vocabulary.cache == "static"
        self._static_step = StaticStep(model) if compiled else None

    @property
    def digest(self) -> str:
        """16 hex digits over the LLM's weights, which pictures carry.

        Computed anew each time, so that it is never that of weights that have changed: keep it where it is asked for
        often.
        """
        return weights_digest(without_tied(self.model, self.model.state_dict()))

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
        Raises:  ModelError for a folder without a causal LM, or one that was not trained to draw.
        """
        name = str(DEFAULT_LLM if path_or_id is None else path_or_id)
        hub = dict(revision=revision, token=token, cache_dir=cache_dir, local_files_only=local_files_only)
        model, text_tokenizer = load_llm(name, dtype, **hub)
        vocabulary = VisualVocabulary.of(model.config, name)
        return cls(model.to(device).eval(), text_tokenizer, vocabulary, name, stored_sampling(name, **hub))

    def prompt(self, text: str) -> list[int]:
        """Prompt ids of ``text``; the empty text is the unconditional prompt.

        Raises:  DataError if prompt and image do not fit the LLM's context.
        """
        words = caption_ids(self.text_tokenizer, text)
        room = context_length(self.model.config) - len(prompt_ids(self.vocabulary, ()))
        room -= self.vocabulary.tokens_per_image + 2
        if len(words) > room:
            raise DataError(
                f"the prompt {text[:40]!r}... has {len(words):,} tokens; {self.name} has room for {int(room):,} "
                "beside the image. Use a shorter prompt."
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
        fixed_ids: Tensor | None = None,
        tick: Callable[[], None] = lambda: None,
    ) -> Tensor:
        """Image tokens (B, L) int64 in [0, K), one row for each prompt, for ``V2FlowTokenizer.decode``.

        If the vocabulary is flexible a row may end early: its first 1 to L entries are tokens, the rest STOPPED.

        Args:    seeds, one for each prompt, or the first of consecutive ones; temperature, one for each or one for all,
                 0 takes the most likely token; top_k 0 and top_p 1 exclude nothing; guidance is
                 uncond + scale (cond - uncond) on logits, with the empty prompt as uncond; None takes the LLM's own
                 value (``sampling``); num_tokens, L, the most tokens of a picture if the vocabulary is flexible
                 (default: as many as it can have); fixed_ids (B, L), tokens that are not drawn, and STOPPED where one
                 is drawn; tick is called after every position of the first row.

        A row depends only on its own prompt, seed and settings; on a CPU it is bit-equal alone and in any batch.
        Raises:  DataError for no prompt, a prompt that is too long, another number of seeds or temperatures, and a
                 number of tokens that the LLM cannot draw.
        """
        defaults = self.sampling
        temperature = defaults.temperature if temperature is None else temperature
        top_k, top_p = defaults.top_k if top_k is None else top_k, defaults.top_p if top_p is None else top_p
        guidance_scale = defaults.guidance_scale if guidance_scale is None else guidance_scale
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
            index = rows.to(device)
            fixed = None if fixed_ids is None else fixed_ids.to(device)[index]

            def choose(scores: Tensor, step: int) -> Tensor:
                token = pick(scores, uniforms[index, step], row_temperatures[index], top_k, top_p)
                return token if fixed is None else torch.where(fixed[:, step] >= 0, fixed[:, step], token)

            row_tick = tick if 0 in rows else lambda: None
            row_prompts = [encoded[row] for row in rows.tolist()]
            return self._draw_rows(row_prompts, empty, widths[rows[0]], length, choose, guidance_scale, row_tick)

        token_ids = torch.full(uniforms.shape, STOPPED, device=device)
        with each_row_alone(self.model):
            for width in sorted(set(widths)):
                rows = torch.tensor([row for row, row_width in enumerate(widths) if row_width == width])
                if device.type == "cpu":
                    rows_per_thread = -(-len(rows) // torch.get_num_threads())
                    token_ids[rows] = torch.cat(on_single_threads(draw_rows, rows, rows_per_thread))
                else:
                    token_ids[rows.to(device)] = draw_rows(rows)
        return token_ids

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
        """Image tokens (B, L) of prompt ids, all padded to ``width``; with guidance if ``empty`` holds prompt ids."""
        v, device = self.vocabulary, self.model.device
        start, end = v.visual_token_offset, v.end_image_id - v.visual_token_offset
        unique = list(dict.fromkeys(map(tuple, prompts)))
        rows = [unique.index(tuple(prompt)) for prompt in prompts]
        if empty is not None:
            rows += [len(unique)] * len(prompts)
            unique.append(tuple(empty))
        # A compiled step has one cache size, that of the longest picture.
        room = length if self._static_step is None else v.tokens_per_image
        cache, logits, mask, positions = self._prefill(unique, width, width + room)
        # Samples of one prompt share its prefill: the cache is computed once a prompt and then copied to its rows.
        select = torch.tensor(rows, device=device)
        static, check_steps = self._static_step, 1 if device.type == "cpu" else END_CHECK_STEPS
        with contextlib.nullcontext() if static is None else static.lock:
            if static is None:
                cache.reorder_cache(select)
            else:
                cache = static.spread(cast(StaticCache, cache), select)
            logits, mask, positions = logits[select], mask[select], positions[select]
            if isinstance(cache, StaticCache):  # the mask covers the whole cache; attention is causal
                mask = F.pad(mask, (0, room), value=1)
            token_ids = torch.full((len(prompts), length), STOPPED, device=device)
            unfinished = torch.ones(len(prompts), dtype=torch.bool, device=device)
            for step in range(length):
                scores = logits[:, start : start + end + 1].float()  # visual ids and the two marks
                if empty is not None:
                    cond, uncond = scores.chunk(2)
                    scores = uncond + guidance_scale * (cond - uncond)
                if v.flexible and step:
                    index = torch.arange(end + 1, device=device)  # begin-of-image is not allowed
                    scores = scores.masked_fill((index >= v.codebook_size) & (index < end), -torch.inf)
                else:
                    scores = scores[:, : v.codebook_size]
                token = choose(scores, step)
                unfinished = unfinished & (token < v.codebook_size)
                token_ids[:, step] = torch.where(unfinished, token, STOPPED)
                tick()
                # The test makes the host wait for the GPU, so it is made at few positions.
                if step + 1 == length or (v.flexible and (step + 1) % check_steps == 0 and not unfinished.any()):
                    break
                token = (token + start).repeat(1 if empty is None else 2)[:, None]
                positions = positions + 1
                if not isinstance(cache, StaticCache):
                    mask = F.pad(mask, (0, 1), value=1)
                if static is None:
                    logits = self._last_logits(token, mask, positions, cache)
                else:
                    logits = static(token, mask, positions, cast(StaticCache, cache))
        return token_ids

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
            logits.append(self._last_logits(ids[one], mask[one], positions[one], caches[-1]))
        cache = caches[0]
        for layer, *others in zip(*(c.layers for c in caches)):
            layer.keys = torch.cat([layer.keys, *(other.keys for other in others)])
            layer.values = torch.cat([layer.values, *(other.values for other in others)])
        return cache, torch.cat(logits), mask, positions[:, -1:]

    def _last_logits(self, token_ids: Tensor, mask: Tensor, positions: Tensor, cache: Cache) -> Tensor:
        """Logits (B, V) after the last of token_ids (B, T), which the cache then holds."""
        advice = "Fine-tune it again with this version of v2flow, which tests that before the training."
        with foreign_errors(f"{self.name}: {type(self.model).__name__} cannot draw token by token", advice):
            return last_logits(self.model, logits_options(self.model), token_ids, mask, positions, cache)

    @torch.inference_mode()
    @tf32(False)
    def caption(self, token_ids: Tensor, *, seed: int = 0, temperature: float = 0.0, max_tokens: int = 64) -> str:
        """A caption of the image ``token_ids`` (L,); temperature 0 takes the most likely word each time.

        Raises:  ModelError for an LLM that was not trained on image to text.
        """
        if not self.vocabulary.captions:
            raise ModelError(
                f"{self.name} was not trained to caption. Fine-tune it with data.image_to_text_share above 0."
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
    """An empty key-value cache of a ``kind`` in CACHES, for ``length`` positions."""
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
        cut = ordered.cumsum(-1) - ordered >= top_p  # the tokens before them have the mass already
        probs = probs.scatter(-1, order, ordered.masked_fill(cut, 0.0))
    total = probs.double().cumsum(-1)
    index = torch.searchsorted(total, (uniforms * total[:, -1])[:, None], right=True)[:, 0]
    return torch.where(temperatures > 0, index.clamp_max(scores.shape[-1] - 1), best)


class ImageTokensOnly(LogitsProcessor):
    """For ``model.generate``: the image's visual ids after the prompt, then end-of-image, then EOS.

    There are exactly ``tokens_per_image`` of them, or 1 to that many if the vocabulary is flexible.

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
    """For ``model.generate``: no visual id, begin-of-image or end-of-image."""

    def __init__(self, vocabulary: VisualVocabulary) -> None:
        self.vocabulary = vocabulary

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, self.vocabulary.visual_token_offset : self.vocabulary.end_image_id + 1] = -torch.inf
        return scores


def _left_pad(prompts: Sequence[Sequence[int]], width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, each (B, width), of prompts padded on the left."""
    ids = [[0] * (width - len(p)) + list(p) for p in prompts]
    mask = [[0] * (width - len(p)) + [1] * len(p) for p in prompts]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)
