"""Invented dialogues in two tones of voice, as a command and for the studies. The package has the grammar.

Example: ``python examples/studies/common/tone_dialogues.py --tone loving --n 10000 --out loving.jsonl``
"""

from opacus_ac.integrations.finetune.tone_dialogues import (
    TONES,
    Dialogue,
    dialogues,
    main,
    tone_score,
    train_and_heldout,
    write_jsonl,
)

__all__ = ["TONES", "Dialogue", "dialogues", "main", "tone_score", "train_and_heldout", "write_jsonl"]

if __name__ == "__main__":
    main()
