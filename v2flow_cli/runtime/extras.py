"""Packages that only some commands need, and the sentence that names the extra where one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from v2flow_cli.errors import ModelError


class MissingExtra(ModelError):
    """A package that the plain install leaves out."""


@contextmanager
def extra(name: str, package: str, what: str) -> Iterator[None]:
    """Around ``import PACKAGE``, which the extra ``name`` of this project installs, and ``what`` needs.

    Raises:  MissingExtra, which names the extra, where the package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != package:  # the package is there, and something that it needs is not
            raise
        raise MissingExtra(
            f"{what} needs the package {package.replace('_', '-')}, which is not installed. Install it with: "
            f"pip install 'v2flow[{name}]'"
        ) from None
