"""The failures a user can fix. Everything else is a bug and keeps its traceback.

A message says what failed, where, what was found, what was expected, and what to try.
"""


class V2FlowError(Exception):
    """A failure the user can fix; the command line prints its message alone and exits with 1."""


class RecipeError(V2FlowError):
    """A recipe that cannot be read, or whose keys or values do not fit the schema."""


class DataError(V2FlowError):
    """Images, captions or shards that are missing, unreadable or unsafe."""


class TokenFileError(V2FlowError):
    """A token file or manifest that cannot be read, or does not belong to the tokenizer at hand."""


class ModelError(V2FlowError):
    """A model folder or checkpoint that is missing, damaged or of another shape than expected."""


class SharedError(V2FlowError):
    """What one process of a launch met with and told all others, who stop with the same message."""
