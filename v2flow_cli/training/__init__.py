"""Training of autoencoders, tokenizers and language models.

Read ``loop.py`` first, then ``objectives/``, which holds the losses; ``crops.py`` is the data, ``state.py`` the state
of a run. The two objectives of language models (``objectives/language_model.py``, ``objectives/drawing.py``) run in
transformers' Trainer: ``llm_trainer.py``.
"""
