"""The work of the commands without the command line, for notebooks too.

``encode.py``, ``decode.py``, ``shard.py`` and ``generate.py`` do the work of the commands of these names;
``prefixes.py`` chooses how many tokens an image gets, ``shard_sources.py`` lists the images to pack.
"""
