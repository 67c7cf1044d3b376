"""Recipes: one YAML file per run, checked against one schema.

Read ``schema.py`` first: it is the single page of every key. ``rules.py`` ties keys together, ``load.py`` reads,
overrides, validates and dumps. Nothing here imports torch, so ``v2flow --help`` and ``train --dry-run`` stay quick.
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
