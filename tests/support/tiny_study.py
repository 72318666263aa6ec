"""The clipping study at a size for tests."""

from __future__ import annotations

from common.small_qwen import Settings

TINY = Settings(
    hidden=16,
    layers=1,
    vocab=300,
    max_prompt=8,
    max_length=40,
    public_records=200,
    public_steps=3,
    records=64,
    heldout=8,
    batch=16,
    steps=2,
    physical=8,
)
