"""Recipes: one YAML file per run, checked against one schema.

Read ``schema.py`` first: it lists every key. ``rules.py`` checks keys against each other, ``load.py`` reads,
overrides, validates and dumps. Nothing here imports torch, so that ``v2flow --help`` starts fast.
"""

from v2flow_cli.recipe.load import dump_recipe, load_recipe
from v2flow_cli.recipe.schema import AutoencoderRecipe, FinetuneRecipe, LMRecipe, Recipe, TokenizerRecipe

__all__ = [
    "AutoencoderRecipe",
    "FinetuneRecipe",
    "LMRecipe",
    "Recipe",
    "TokenizerRecipe",
    "dump_recipe",
    "load_recipe",
]
