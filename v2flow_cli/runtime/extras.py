"""Packages that only some commands need, and the sentence that names the extra where one is missing."""

from __future__ import annotations

import importlib
from typing import Any

from v2flow_cli.errors import V2FlowError

EXTRAS = {"pyarrow": "parquet"}  # package as it is imported -> extra of this project that brings it


class MissingExtra(V2FlowError):
    """A package that the plain install leaves out."""


def require(module: str, what: str) -> Any:
    """The imported ``module``, such as ``pyarrow.parquet``; ``what`` needs it.

    Raises:  MissingExtra, which names the extra, where the package is not installed.
    """
    package = module.partition(".")[0]
    try:
        importlib.import_module(package)
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != package:  # the package is there, and something that it needs is not
            raise
        raise MissingExtra(
            f"{what} needs the package {package}, which is not installed. Install it with: "
            f"pip install 'v2flow[{EXTRAS[package]}]'"
        ) from None
