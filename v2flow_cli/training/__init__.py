"""Training of autoencoders, tokenizers and language models.

Read ``loop.py`` first, then ``objectives/``, which holds what is minimised; ``crops.py`` is the data, ``state.py`` all
progress. The two objectives of language models (``objectives/language_model.py``, ``objectives/drawing.py``) run in
transformers' Trainer: ``llm_trainer.py``.
"""
