"""The work of the commands without the command line: a notebook can call any of it.

``encode.py``, ``decode.py``, ``shard.py`` and ``generate.py`` each do what the command of that name does;
``prefixes.py`` finds how many tokens of an ordered sequence are enough, ``shard_sources.py`` lists what gets packed.
"""
