"""What the private trainers of TRL's settings have in common."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.utils import is_torch_bf16_gpu_available

from opacus_ac.integrations.public_rows import PrivateRows
from opacus_ac.integrations.trainer.arguments import PrivacyArguments
from opacus_ac.integrations.trainer.checks import raise_for, refusals, refused_evaluation
from opacus_ac.integrations.trainer.trainer import PrivateTrainer
from opacus_ac.integrations.trl.loading import load_model, load_tokenizer, model_name
from opacus_ac.integrations.trl.rows import Row, TokenRows


class RowsTrainer(PrivateTrainer):
    """A :class:`PrivateTrainer` that loads the model, and makes token rows of raw records.

    A subclass says which settings it refuses, and how it encodes and collates a record.
    """

    args: Any
    config: type
    """Class of the settings."""
    ending: str
    """End of the name of the default output folder."""

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        *,
        privacy: PrivacyArguments,
        data_collator: Callable[..., Any] | None = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        processing_class: Any = None,
        peft_config: Any = None,
        quantization_config: Any = None,
        noise_generator: torch.Generator | None = None,
        **kwargs: Any,
    ) -> None:
        args = self._settings(model) if args is None else copy.copy(args)
        own: dict[str, Any] = {n: kwargs.pop(n) for n in ("formatting_func", "ref_model") if n in kwargs}
        parts = {"model": model, "train_dataset": train_dataset, "eval_dataset": eval_dataset}
        given: dict[str, Any] = {
            **parts, **own, "processing_class": processing_class, "peft_config": peft_config,
            "quantization_config": quantization_config,
        }  # fmt: skip
        self._raw_rows = PrivateRows(train_dataset)
        found = self._refused(args, given)
        options = {"data_collator": data_collator, **kwargs}
        found += refusals(args=args, privacy=privacy, options=options, rows=self._raw_rows, **parts)
        raise_for(found, "this fine-tuning")
        model = load_model(model, args, peft_config, quantization_config)
        tokenizer = load_tokenizer(model, args, processing_class)
        self._encode = self._encoder(args, tokenizer, {**given, "model": model})
        self._max_length: int | None = args.max_length
        args.remove_unused_columns = False  # the rows have nothing else
        super().__init__(
            model, args, privacy=privacy, data_collator=self._collator(args, tokenizer, data_collator),
            train_dataset=self._token_rows(train_dataset), eval_dataset=self._eval_rows(eval_dataset),
            processing_class=tokenizer, noise_generator=noise_generator, **kwargs,
        )  # fmt: skip

    def _settings(self, model: Any) -> Any:
        """Return the settings of who gives none. TRL's default of bfloat16 is an error where no accelerator has it."""
        return self.config(output_dir=f"{model_name(model)}-{self.ending}", bf16=is_torch_bf16_gpu_available())

    def _refused(self, args: Any, given: Mapping[str, Any]) -> list[str]:
        """Return the reasons against the settings."""
        if isinstance(args, self.config):
            return []
        return [f"args is {type(args).__name__}: pass a {self.config.__name__} of TRL"]

    def _encoder(self, args: Any, tokenizer: Any, given: Mapping[str, Any]) -> Callable[[dict[str, Any]], Row]:
        """Return what makes the token row of a record."""
        raise NotImplementedError

    def _collator(self, args: Any, tokenizer: Any, given: Callable[..., Any] | None) -> Callable[..., Any]:
        """Return what makes a batch of token rows, from the collator of the caller if there is one."""
        raise NotImplementedError

    def _token_rows(self, records: Any) -> TokenRows:
        return records if isinstance(records, TokenRows) else TokenRows(records, self._encode, self._max_length)

    def _eval_rows(self, data: Any) -> Any:
        """Return the token rows of evaluation data, or of each of several."""
        if isinstance(data, Mapping):
            return {name: self._token_rows(records) for name, records in data.items()}
        return data if data is None or isinstance(data, str) else self._token_rows(data)

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate on public data, raw or as token rows.

        Raises:
            ValueError: If the data were not declared public, or contain records of the training data.
        """
        return super().evaluate(self._checked(eval_dataset, "evaluation"), *args, **kwargs)

    def predict(self, test_dataset: Any, *args: Any, **kwargs: Any) -> Any:
        """Predict on public data, raw or as token rows.

        Raises:
            ValueError: If :meth:`evaluate` would refuse the data.
        """
        return super().predict(self._checked(test_dataset, "prediction"), *args, **kwargs)

    def _checked(self, data: Any, what: str) -> Any:
        if data is not None and not isinstance(data, str | TokenRows):
            # As raw records, because truncation may hide that two records are one.
            raise_for(refused_evaluation(self.privacy, self._raw_rows, data), what)
        return self._eval_rows(data)
