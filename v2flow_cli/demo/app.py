"""The live demo's page: a photo to tokens and back, a drawing, and tokens to edit. Needs ``v2flow[demo]`` (Gradio)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import gradio as gr
from PIL import Image

from v2flow_cli.assets import sample_photos
from v2flow_cli.demo.studio import BY_LLM, ONE_CODE, RANDOM_CODES, DecoderSettings, Studio, sampling_of
from v2flow_cli.errors import V2FlowError

PROMPTS = ("a red fox", "a cat", "a sunflower", "a hamburger", "a watermelon", "a pig", "a red heart", "a tram")
TITLE = """# v2flow
The tokenizer encodes a photo to {count} tokens and decodes them to a photo."""
DRAWS = """ The language model writes such tokens for a prompt, and the tokenizer decodes them to a picture."""
EDITING = """Encode a photo or draw something, click two corners of a rectangle in the coloured tokens, and change
the tokens in it."""


def build_app(studio: Studio) -> gr.Blocks:
    """The page; its buttons are also endpoints: reconstruct and, with an LLM, draw, tokens, draw_tokens and edit."""
    with gr.Blocks(title="v2flow") as app:
        most = f"{studio.lengths[0]:,}"
        gr.Markdown(
            TITLE.format(count=f"1 to {most}" if studio.tokenizer.flexible else most) + (DRAWS if studio.draws else "")
        )
        with gr.Tab("Photo to tokens and back"):
            _photo_tab(studio)
        if studio.draws:
            with gr.Tab("Drawing"):
                _drawing_tab(studio)
            with gr.Tab("Editing tokens"):
                _editing_tab(studio)
    return app


def _photo_tab(studio: Studio) -> None:
    def reconstruct(photo: Image.Image | None, tokens: float, *settings: Any) -> tuple[Any, ...]:
        cropped = studio.crop(photo)
        ids = studio.encode(cropped, tokens)
        decoded = studio.decode(ids, DecoderSettings(*settings))
        return (
            studio.picture(cropped),
            studio.picture(decoded),
            studio.grid(ids),
            studio.figures(ids, cropped, decoded),
        )

    with gr.Row():
        with gr.Column():
            photo = _photo()
            tokens = _token_count(studio)
            settings = _decoder_settings(studio)
            go = gr.Button("Encode and decode", variant="primary")
            _photo_examples(photo)
        with gr.Column():
            cropped = gr.Image(label="Cropped for the encoder", format="png")
            back = gr.Image(label="Decoded from the tokens", format="png")
            grid = gr.Image(label="The tokens; near codes have similar colours", format="png")
            figures = gr.Markdown()
    outputs = [cropped, back, grid, figures]
    inputs = [photo, tokens, *settings]
    go.click(_show_errors(reconstruct), inputs, outputs, api_name="reconstruct")
    if studio.tokenizer.flexible:  # the slider updates the picture
        tokens.release(_show_errors(reconstruct), inputs, outputs, api_visibility="private")


def _drawing_tab(studio: Studio) -> None:
    def draw(prompt: str, temperature: float, *settings: Any) -> tuple[Image.Image, Image.Image, list[int]]:
        decoder = DecoderSettings(*settings)
        ids = studio.draw(prompt, temperature, decoder.seed)
        return studio.picture(studio.decode(ids, decoder)), studio.grid(ids), ids

    def shorten(ids: list[int] | None, count: float, *settings: Any) -> tuple[Image.Image, Image.Image]:
        """The first ``count`` tokens of a drawing."""
        if not ids:
            raise V2FlowError("No drawing: press Draw first.")
        first = ids[: int(count)]
        return studio.picture(studio.decode(first, DecoderSettings(*settings))), studio.grid(first)

    with gr.Row():
        with gr.Column():
            prompt, temperature = _prompt(studio)
            settings = _decoder_settings(studio)
            go = gr.Button("Draw", variant="primary")
            most = studio.llm.vocabulary.tokens_per_image
            count = gr.Slider(
                1, most, most, step=1, label="Tokens of the drawing", visible=studio.llm.vocabulary.flexible
            )
            gr.Examples([[text] for text in PROMPTS], [prompt], label="Prompts to start with")
        with gr.Column():
            picture = gr.Image(label="Picture", format="png")
            grid = gr.Image(label="The tokens that the language model wrote", format="png")
    inputs = [prompt, temperature, *settings]
    ids = gr.State(None)
    gr.on([go.click, prompt.submit], _show_errors(draw), inputs, [picture, grid, ids], api_name="draw")
    if studio.llm.vocabulary.flexible:
        count.release(_show_errors(shorten), [ids, count, *settings], [picture, grid], api_name="shorten")


def _editing_tab(studio: Studio) -> None:
    length = studio.llm.vocabulary.tokens_per_image  # the length that the LLM can resample
    rows, columns = studio.grid_shape(length)
    choices = [BY_LLM, ONE_CODE, RANDOM_CODES] if studio.can_resample else [ONE_CODE, RANDOM_CODES]

    def show(ids: list[int], rectangle: tuple[int, int, int, int], *settings: Any) -> tuple[Any, ...]:
        picture = studio.picture(studio.decode(ids, DecoderSettings(*settings)))
        return ids, studio.grid(ids, rectangle), picture

    def tokens(photo: Image.Image | None, a: float, b: float, c: float, d: float, *settings: Any) -> tuple[Any, ...]:
        ids = studio.encode(studio.crop(photo), length if studio.can_resample else None, refine_steps=0)
        return show(ids, (int(a), int(b), int(c), int(d)), *settings)

    def draw_tokens(
        prompt: str, temperature: float, a: float, b: float, c: float, d: float, *settings: Any
    ) -> tuple[Any, ...]:
        ids = studio.draw(prompt, temperature, DecoderSettings(*settings).seed)
        return show(ids, (int(a), int(b), int(c), int(d)), *settings)

    def edit(
        ids: list[int] | None,
        how: str,
        code: float,
        prompt: str,
        temperature: float,
        resample_seed: float,
        a: float,
        b: float,
        c: float,
        d: float,
        *settings: Any,
    ) -> tuple[Any, ...]:
        if not ids:
            raise V2FlowError("No tokens yet: encode a photo or draw something first.")
        rectangle = (int(a), int(b), int(c), int(d))
        edited = studio.edit(ids, rectangle, how, code=code, prompt=prompt, temperature=temperature, seed=resample_seed)
        return show(edited, rectangle, *settings)

    def click(ids: list[int] | None, second: bool, a: int, b: int, c: int, d: int, event: gr.SelectData) -> Any:
        """The first click selects one token, the second one the opposite corner of the rectangle."""
        if not ids:
            return None, False, a, b, c, d
        row, column = studio.token_at(ids, *event.index)
        rectangle = (a, b, row, column) if second else (row, column, row, column)
        return studio.grid(ids, rectangle), not second, *rectangle

    gr.Markdown(EDITING)
    ids, second = gr.State(None), gr.State(False)
    with gr.Row():
        with gr.Column():
            photo = _photo()
            encode = gr.Button("Encode the photo")
            _photo_examples(photo)
            prompt, temperature = _prompt(studio)
            draw = gr.Button("Draw")
            settings = _decoder_settings(studio)
        with gr.Column():
            grid = gr.Image(label="Tokens: click two corners", format="png", interactive=False)
            with gr.Row():
                corners = [
                    gr.Number(value, precision=0, minimum=0, label=label)
                    for label, value in (
                        ("First row", rows // 4),
                        ("First column", columns // 4),
                        ("Last row", rows // 2),
                        ("Last column", columns // 2),
                    )
                ]
            how = gr.Radio(choices, value=choices[0], label="Replace the tokens by")
            with gr.Row():
                code = gr.Number(0, precision=0, minimum=0, maximum=studio.codes - 1, label="Code")
                resample_seed = gr.Number(1, precision=0, minimum=0, label="Seed of the change")
            change = gr.Button("Change", variant="primary")
        with gr.Column():
            picture = gr.Image(label="Decoded", format="png", interactive=False)
            before = gr.Image(label="Before the last change", format="png", interactive=False)
    outputs = [ids, grid, picture]
    encode.click(_show_errors(tokens), [photo, *corners, *settings], outputs, api_name="tokens")
    draw.click(_show_errors(draw_tokens), [prompt, temperature, *corners, *settings], outputs, api_name="draw_tokens")
    inputs = [ids, how, code, prompt, temperature, resample_seed, *corners, *settings]
    change.click(lambda image: image, [picture], [before], api_name=False).then(  # type: ignore[arg-type]
        _show_errors(edit), inputs, outputs, api_name="edit"
    )
    grid.select(click, [ids, second, *corners], [grid, second, *corners], api_name=False)  # type: ignore[arg-type]


def _photo() -> Any:
    return gr.Image(type="pil", label="Photo", sources=["upload", "clipboard"])


def _photo_examples(photo: Any) -> None:
    gr.Examples([[image] for _, image in sample_photos()], [photo], label="Photos to start with")


def _prompt(studio: Studio) -> tuple[Any, Any]:
    """A prompt and the LLM's temperature."""
    prompt = gr.Textbox(PROMPTS[0], label="Prompt")
    return prompt, gr.Slider(
        0, 2, studio.llm.sampling.temperature, step=0.05, label="Temperature of the language model"
    )


def _token_count(studio: Studio) -> Any:
    """A slider for a flexible length, a choice of several lengths, hidden for a single length."""
    most = studio.lengths[0]
    if studio.tokenizer.flexible:
        return gr.Slider(1, most, most, step=1, label="Tokens")
    return gr.Radio(list(studio.lengths), value=most, label="Tokens", visible=len(studio.lengths) > 1)


def _decoder_settings(studio: Studio) -> list[Any]:
    """The inputs of DecoderSettings with the defaults of the decoder; a single decoder has no visible choice."""
    names, default = studio.tokenizer.decoder_names, studio.tokenizer.decoder_name
    rounds, steps, scale, noise = sampling_of(studio.tokenizer, default)
    decoder = gr.Radio(names, value=default, label="Decoder", visible=len(names) > 1)
    with gr.Accordion("Decoder settings", open=False):
        sliders = [
            gr.Slider(1, 16, rounds, step=1, label="Rounds of unmasking"),
            gr.Slider(1, 50, steps, step=1, label="Flow steps in each round"),
            gr.Slider(0, 8, scale, step=0.1, label="Guidance scale, 1 is none"),
        ]
        factor = gr.Slider(0, max(1, noise), noise, step=0.05, label="Noise of the flow, 0 gives the mean")
    seed = gr.Number(0, precision=0, minimum=0, label="Seed")
    changed = [*sliders, factor]
    decoder.change(lambda name: sampling_of(studio.tokenizer, name), [decoder], changed, api_visibility="private")
    return [*sliders, seed, decoder, factor]


def _show_errors(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function`` with every V2FlowError shown as a message on the page."""

    def run(*inputs: Any) -> Any:
        try:
            return function(*inputs)
        except V2FlowError as error:
            raise gr.Error(str(error)) from None

    return run
