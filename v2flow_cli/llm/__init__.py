"""Language models that draw (section 2.4): a small one from text, fine-tuning of any causal LM, sampling.

Read ``vocabulary.py`` first (where visual tokens sit among the LLM's own), then ``sequences.py`` (what a
training sample and a prompt look like), ``finetune.py`` and ``sample.py``. ``pretrain.py`` makes the small LM of
the embedded model; ``trainer.py`` holds what both trainings share. Model classes, optimisers and the loop are
transformers' own.
"""
