"""Parts of ``device_check.py``: its entries, the process that works on them, the file of results, the tables."""
