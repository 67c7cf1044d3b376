"""v2flow: pictures as words of a language model.

    image -> latents -> soft vocabulary -> token ids -> LLM -> token ids -> context -> velocity -> latents -> image

The rooms, in reading order (an import never turns back):
errors <- runtime, recipe <- tokenizer, store <- llm <- jobs <- training <- bench <- cli. Start with
``tokenizer/v2flow.py``.
"""

__version__ = "0.1.0"
