"""Parts of ``benchmark_step.py`` and ``benchmark_phases.py``: models, ways to take a step, processes that take turns, tables."""
