"""Language models that draw (section 2.4): vocabulary, training sequences, losses, sampling.

Read ``vocabulary.py`` first (where visual tokens sit among the LLM's own), then ``sequences.py`` (what a
training sample and a prompt look like) and ``sample.py``. Their training is in ``training/objectives/drawing.py`` and
``training/objectives/language_model.py``.
"""
