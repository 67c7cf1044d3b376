"""Pictures of an LLM during its training: OUTPUT/samples/step-00000100/a-red-fox.png."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, TrainerCallback

from v2flow_cli.jobs.generate import Settings, draw_pictures, plan_pictures
from v2flow_cli.llm.sample import DrawingLM
from v2flow_cli.llm.vocabulary import VisualVocabulary
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.training.llm_trainer import Log


class SamplePictures(TrainerCallback):
    """Draws ``prompts`` every ``every`` steps, each with seed 0 at temperature 1, by the first process."""

    def __init__(
        self,
        prompts: Sequence[str],
        every: int,
        output: str,
        image_tokenizer: V2FlowTokenizer,
        text_tokenizer: PreTrainedTokenizerBase,
        vocabulary: VisualVocabulary,
        log: Log,
    ) -> None:
        self.pictures = plan_pictures(prompts, seeds=[0], temperatures=[1.0])
        self.every, self.folder, self.image_tokenizer = every, Path(output, "samples"), image_tokenizer
        self.text_tokenizer, self.vocabulary, self.log = text_tokenizer, vocabulary, log

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if state.global_step % self.every or not state.is_world_process_zero:
            return
        folder = self.folder / f"step-{state.global_step:08d}"
        training, use_cache = model.training, model.config.use_cache
        model.eval()
        model.config.use_cache = True
        llm = DrawingLM(model, self.text_tokenizer, self.vocabulary, "the LLM in training")
        with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
            for _ in draw_pictures(llm, self.image_tokenizer, self.pictures, folder, Settings()):
                pass
        model.train(training)
        model.config.use_cache = use_cache
        self.log(f"step {state.global_step}: {len(self.pictures)} sample pictures in {folder}")
