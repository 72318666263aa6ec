"""Which models, heads, layers and PEFT methods get exact gradients: ``python -m opacus_ac.testing.coverage``.

Every case is a small model with random weights. One private step on padded records is compared with the clipped mean of
the gradients that plain autograd gives for each record alone (``comparison.py``). ``tiny.py`` makes small configs of
transformers; ``causal.py``, ``heads.py``, ``senses.py``, ``layers.py`` and ``adapters.py`` list the cases; ``run.py``
runs them in processes of their own, ``log.py`` keeps what was found, ``table.py`` prints it.
"""
