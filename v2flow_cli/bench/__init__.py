"""The bench: reconstruction quality, bits and speed of tokenizers, beside image codecs and published figures.

Read ``metrics.py`` first, then ``evaluate.py``: one pass over the images that fills one row per system.
``protocol.py`` records how figures are measured; ``report/`` writes the HTML page.
"""
