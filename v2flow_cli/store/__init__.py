"""Everything on disk: image files, WebDataset shards, the training stream, token files, checkpoints.

Read ``images.py`` first, then ``shards.py`` and ``stream.py``; ``token_file.py`` is what ``encode`` writes
and ``decode`` reads, ``encode_set.py``, ``decode_set.py`` and ``write_shards.py`` are what the commands of those
names do. A file here turns bytes into checked values, or raises a DataError or TokenFileError.
"""
