"""``SFTTrainer`` of TRL with differential privacy."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from opacus_ac.integrations.trl.checks import refused_sft
from opacus_ac.integrations.trl.library import DataCollatorForLanguageModeling, SFTConfig
from opacus_ac.integrations.trl.loading import training_template
from opacus_ac.integrations.trl.rows import LanguageRow, Row
from opacus_ac.integrations.trl.trainer import RowsTrainer


class PrivateSFTTrainer(RowsTrainer):
    """TRL's ``SFTTrainer`` with differential privacy, on the core of :class:`PrivateTrainer`.

    It takes the arguments of ``SFTTrainer`` and raw records: texts, ``messages``, and prompts with completions, as text
    or dialogue. Each record is one row and is protected. The loss is the mean over records of each record's mean over
    its own labelled tokens.

    Args:
        model: a language model, its name, or its folder.
        args: ``SFTConfig``; a copy of it is used.
        privacy: privacy settings.
        data_collator: by default TRL's, with padding.
        train_dataset: the private records, a ``datasets.Dataset`` or a list.
        eval_dataset: public records of the same kinds, or a mapping of names to them.
        processing_class: tokenizer; by default the model's.
        peft_config: configuration of adapters, which are then trained alone.
        quantization_config: quantisation of a base model that is named.
        formatting_func: makes the text of a record.
        noise_generator: seeded CPU generator for tests.
        **kwargs: the other arguments of ``Trainer``.

    Guarantees:
        Those of :class:`PrivateTrainer`. Token accuracy, entropy and token counts, which TRL logs, are not computed.
        Token rows stay in memory. A record that loses all of its labels by truncation stays, with a loss of zero.

    Raises:
        ValueError: If the settings cannot be made private, or a record is of another format. The message lists all
            reasons against the settings, and nothing was changed.
        ImportError: If TRL is not installed.

    References:
        arXiv 2510.05288.
    """

    config = SFTConfig
    ending = "SFT"

    def _refused(self, args: Any, given: Mapping[str, Any]) -> list[str]:
        found = super()._refused(args, given)
        return found or refused_sft(args, given)

    def _encoder(self, args: Any, tokenizer: Any, given: Mapping[str, Any]) -> Callable[[dict[str, Any]], Row]:
        first = given["train_dataset"][0]
        only = args.completion_only_loss
        return LanguageRow(
            tokenizer,
            args,
            completion_only=("prompt" in first and "completion" in first) if only is None else only,
            template=training_template(tokenizer, args.assistant_only_loss),
            formatting_func=given.get("formatting_func"),
        )

    def _collator(self, args: Any, tokenizer: Any, given: Callable[..., Any] | None) -> Callable[..., Any]:
        if given is not None:
            return given
        return DataCollatorForLanguageModeling(tokenizer.pad_token_id, pad_to_multiple_of=args.pad_to_multiple_of)

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Return the loss of a batch, a mean over records."""
        return super().compute_loss(model, {**inputs, "use_cache": False}, *args, **kwargs)
