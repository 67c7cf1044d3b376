"""Training of autoencoders and tokenizers: one loop, one state, two objectives.

Read ``loop.py`` first; ``autoencoder.py`` and ``tokenizer.py`` hold what is minimised, ``crops.py`` the data,
``state.py`` all progress.
"""
