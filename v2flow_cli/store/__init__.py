"""Everything on disk: image files, WebDataset shards, the training stream, token files.

Read ``images.py`` first, then ``shards.py`` and ``stream.py``; ``token_file.py`` and
``token_manifest.py`` have the files that ``encode`` writes and ``decode`` reads. Bytes become checked values, or a DataError or TokenFileError.
"""
