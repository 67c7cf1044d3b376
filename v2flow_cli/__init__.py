"""v2flow: images as tokens of a language model.

    image -> latents -> soft vocabulary -> token ids -> LLM -> token ids -> context -> velocity -> latents -> image

The packages, in reading order (a package imports only those to its left):
errors <- runtime, recipe <- tokenizer, store <- llm <- jobs <- training <- bench <- cli. Start with
``tokenizer/v2flow.py``.

``import v2flow_cli`` imports neither torch nor transformers. The three classes below are imported at their first use,
and registered with transformers' Auto classes when those are imported (``auto_classes.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from v2flow_cli import auto_classes

if TYPE_CHECKING:
    from v2flow_cli.llm.sample import DrawingLM
    from v2flow_cli.tokenizer import V2FlowImageProcessor, V2FlowTokenizer

__version__ = "0.1.0"
__all__ = ["DrawingLM", "V2FlowImageProcessor", "V2FlowTokenizer", "__version__"]

auto_classes.install()


def __getattr__(name: str) -> Any:
    """The public classes, imported at their first use (PEP 562)."""
    if name == "DrawingLM":
        from v2flow_cli.llm.sample import DrawingLM

        return DrawingLM
    if name in ("V2FlowImageProcessor", "V2FlowTokenizer"):
        from v2flow_cli import tokenizer

        return getattr(tokenizer, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
