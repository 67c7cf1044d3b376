"""Language models that draw (section 2.4): vocabulary, training sequences, losses, sampling.

Read ``vocabulary.py`` first (the ids of visual tokens among the LLM's own), then ``sequences.py`` (training samples
and prompts) and ``sample.py``. Their training is in ``training/objectives/drawing.py`` and
``training/objectives/language_model.py``.
"""
