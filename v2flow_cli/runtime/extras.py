"""Packages that only some commands need, and the error that names the extra if one is missing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from v2flow_cli.errors import ModelError


class MissingExtra(ModelError):
    """A missing package that is not part of the plain install."""


@contextmanager
def extra(name: str, package: str, what: str) -> Iterator[None]:
    """A context around ``import PACKAGE``, a package of the extra ``name`` that ``what`` needs.

    Raises:  MissingExtra, which names the extra, if the package is not installed.
    """
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[
            0
        ] != package:  # the package is installed, but not one of its own dependencies
            raise
        raise MissingExtra(
            f"{what} needs the package {package.replace('_', '-')}, which is not installed. Install it with: "
            f"pip install 'v2flow[{name}]'"
        ) from None
