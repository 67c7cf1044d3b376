"""The live demo: a photo to tokens and back, a sentence to a picture. Needs the extra ``v2flow[demo]`` (Gradio)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from PIL import Image

from v2flow_cli.bench import similarity
from v2flow_cli.bench.codebook_use import token_bytes
from v2flow_cli.bench.coder import inference
from v2flow_cli.bench.report import illustrations
from v2flow_cli.bench.report.token_view import TokenView, token_view
from v2flow_cli.errors import V2FlowError
from v2flow_cli.llm.sample import DrawingLM
from v2flow_cli.runtime.device import pick_device, pick_dtype
from v2flow_cli.tokenizer import V2FlowTokenizer
from v2flow_cli.tokenizer.preprocess import to_uint8

if TYPE_CHECKING:
    import gradio

STRIP_WIDTH = 512  # pixels of the picture of the tokens


class Studio:
    """The models behind the app, and what its two buttons do."""

    def __init__(
        self, model: str | None = None, llm: str | None = None, device: str = "auto", decoder: str | None = None
    ) -> None:
        """Raises:  ModelError when a model is missing, or the two do not belong together."""
        target = pick_device(device)
        self.dtype = pick_dtype("auto", target)
        self.tokenizer = V2FlowTokenizer.from_pretrained(model, decoder=decoder).to(target)
        self.llm = DrawingLM.from_pretrained(llm, target, self.dtype)
        self.llm.vocabulary.check_tokenizer(self.tokenizer.token_digest, self.llm.name, "--model FOLDER")
        self.view: TokenView = token_view(self.tokenizer)
        self.size = self.tokenizer.config.image_size
        self.num_tokens = self.tokenizer.num_tokens(self.size, self.size)

    def reconstruct(
        self,
        photo: Image.Image | None,
        tokens: float,
        rounds: float,
        steps: float,
        guidance: float,
        seed: float,
        decoder: str | None = None,
    ) -> tuple[Image.Image, Image.Image, Image.Image, str]:
        """(the photo as it is encoded, what comes back, its tokens as a coloured grid, figures)."""
        if photo is None:
            raise V2FlowError("No photo yet: drop one in, or choose one of the examples.")
        processor = self.tokenizer.image_processor
        images = processor.preprocess_one(photo.convert("RGB"))[None]
        with inference(self.tokenizer, self.dtype):
            ids = self.tokenizer.encode(images.to(self.tokenizer.device))
        if self.tokenizer.flexible:
            ids = ids[:, : int(tokens)]
        decoded = self._decode(ids, rounds, steps, guidance, seed, decoder)
        reference, made = to_uint8(images), to_uint8(decoded)
        length, codes = ids.shape[1], self.tokenizer.config.codebook_size
        figures = (
            f"{length:,} tokens of {codes:,} codes: {token_bytes(length, codes):,} bytes. "
            f"PSNR {similarity.psnr(reference, made).item():.2f} dB, "
            f"SSIM {similarity.ssim(reference, made).item():.3f}."
        )
        rows, columns = illustrations.token_grid_shape(length)
        grid = Image.fromarray(self.view.colours[ids[0].cpu().numpy()].reshape(rows, columns, 3))
        width = STRIP_WIDTH // columns * columns
        grid = grid.resize((width, width * rows // columns), Image.Resampling.NEAREST)
        return processor.to_pil(images)[0], processor.to_pil(decoded)[0], grid, figures

    def draw(
        self,
        prompt: str,
        temperature: float,
        rounds: float,
        steps: float,
        guidance: float,
        seed: float,
        decoder: str | None = None,
    ) -> Image.Image:
        """The picture that the LLM writes for ``prompt``."""
        if not prompt.strip():
            raise V2FlowError('The prompt is empty; say what to draw, such as "a red fox".')
        ids = self.llm.generate(prompt, seeds=int(seed), temperature=temperature)
        return self.tokenizer.image_processor.to_pil(self._decode(ids, rounds, steps, guidance, seed, decoder))[0]

    def _decode(
        self, ids: torch.Tensor, rounds: float, steps: float, guidance: float, seed: float, decoder: str | None
    ) -> torch.Tensor:
        with inference(self.tokenizer, self.dtype):
            return self.tokenizer.decode(
                ids.to(self.tokenizer.device),
                height=self.size,
                width=self.size,
                num_mask_steps=int(rounds),
                num_flow_steps=int(steps),
                guidance_scale=guidance,
                seeds=[int(seed)],
                decoder=decoder,
            )


def build_app(studio: Studio) -> gradio.Blocks:
    """The page with both halves; its buttons are also endpoints, ``/reconstruct`` and ``/draw``."""
    import gradio as gr

    from v2flow_cli.assets import sample_photos

    names = studio.tokenizer.decoder_names

    def sampling(decoder: str) -> list[Any]:
        """Rounds, flow steps and guidance scale of a decoder's own settings."""
        own = studio.tokenizer.with_decoder(decoder).config.sampling or {}
        return [own.get("num_mask_steps", 1), own.get("num_flow_steps", 4), own.get("guidance_scale", 1.0)]

    def knobs() -> list[Any]:
        """Sliders of the decoder, at the model's own settings, and which decoder that is."""
        chosen = studio.tokenizer.decoder_name
        rounds, steps, scale = sampling(chosen)
        decoder = gr.Radio(names, value=chosen, label="Decoder", visible=len(names) > 1)
        sliders = [
            gr.Slider(1, 16, rounds, step=1, label="Rounds of unmasking"),
            gr.Slider(1, 50, steps, step=1, label="Flow steps in each round"),
            gr.Slider(0, 8, scale, step=0.1, label="Guidance scale, 1 is none"),
        ]
        decoder.change(sampling, [decoder], sliders, api_name=False)
        return [*sliders, gr.Number(0, precision=0, minimum=0, label="Seed"), decoder]

    def told(work: Any) -> Any:
        """``work`` with our own errors shown as a message instead of a failure."""

        def run(*inputs: Any) -> Any:
            try:
                return work(*inputs)
            except V2FlowError as error:
                raise gr.Error(str(error)) from None

        return run

    fixed = "" if studio.tokenizer.flexible else " (this model's length is fixed)"
    with gr.Blocks(title="v2flow") as app:
        gr.Markdown(
            f"# v2flow\nA photo is {studio.num_tokens:,} words of a language model, and back; a sentence becomes such "
            "words, and they a picture."
        )
        with gr.Tab("Photo to tokens and back"), gr.Row():
            with gr.Column():
                photo = gr.Image(type="pil", label="Photo", sources=["upload", "clipboard"])
                tokens = gr.Slider(
                    1,
                    studio.num_tokens,
                    studio.num_tokens,
                    step=1,
                    label=f"Tokens{fixed}",
                    interactive=studio.tokenizer.flexible,
                )
                settings = knobs()
                go = gr.Button("Encode and decode", variant="primary")
                gr.Examples([[image] for _, image in sample_photos()], [photo])
            with gr.Column():
                cropped = gr.Image(label="As it is encoded", format="png")
                back = gr.Image(label="What comes back", format="png")
                grid = gr.Image(label="Its tokens; near codes have near colours", format="png")
                figures = gr.Markdown()
            go.click(
                told(studio.reconstruct),
                [photo, tokens, *settings],
                [cropped, back, grid, figures],
                api_name="reconstruct",
            )
        with gr.Tab("Sentence to picture"), gr.Row():
            with gr.Column():
                prompt = gr.Textbox("a red fox", label="Prompt")
                temperature = gr.Slider(0, 2, 0.9, step=0.05, label="Temperature of the language model")
                settings = knobs()
                write = gr.Button("Draw", variant="primary")
            drawn = gr.Image(label="Drawn", format="png")
            inputs = [prompt, temperature, *settings]
            gr.on([write.click, prompt.submit], told(studio.draw), inputs, [drawn], api_name="draw")
    return app
