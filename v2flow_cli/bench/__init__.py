"""The bench: what a tokenizer keeps of a picture, at what price, beside plain codecs and the published table.

Read ``metrics.py`` first, then ``evaluate.py``: one pass over the images that fills one row per system.
``protocol.py`` names what two figures must share to be compared; ``report/`` draws the HTML page.
"""
