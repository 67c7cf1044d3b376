"""Everything on disk: image files, WebDataset shards, the training stream, token files.

Read ``images.py`` first, then ``shards.py`` and ``stream.py``; ``token_file.py`` is what ``encode`` writes
and ``decode`` reads. A file here turns bytes into checked values, or raises a DataError or TokenFileError.
"""
