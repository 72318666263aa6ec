"""``DPOTrainer`` of TRL with differential privacy."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from opacus_ac.integrations.trl.checks import refused_dpo
from opacus_ac.integrations.trl.library import DataCollatorForPreference, DPOConfig
from opacus_ac.integrations.trl.loading import without_dropout
from opacus_ac.integrations.trl.rows import PreferenceRow, Row, TokenRows
from opacus_ac.integrations.trl.trainer import RowsTrainer
from opacus_ac.models.pairs import log_probabilities, run_pairs

_REFERENCE = ("ref_chosen_logps", "ref_rejected_logps")


class PairCollate:
    """Makes of a collator of TRL, which puts all preferred replies first, one with a pair per record.

    Args:
        collate: the collator of TRL.
    """

    def __init__(self, collate: Callable[[list[Any]], Mapping[str, Tensor]]) -> None:
        self.collate = collate

    def __call__(self, rows: list[Any]) -> dict[str, Tensor]:
        """Return ids and masks ``[B, 2, T]``, and log-probabilities of the reference ``[B]`` where they are known."""
        made = self.collate(rows)
        return {n: torch.stack(v.chunk(2), 1) if v.dim() == 2 else v for n, v in made.items()}


class PrivateDPOTrainer(RowsTrainer):
    """TRL's ``DPOTrainer`` with differential privacy, on the core of :class:`PrivateTrainer`.

    A record is a preference pair: a prompt, a preferred and a rejected reply, as text or dialogue. The gradients of
    both rows of a pair are added up before they are clipped. The reference is the model before training: with adapters
    switched off where ``peft_config`` makes new ones, else by log-probabilities that are computed once
    (``precompute_ref_log_probs``) and stay in memory.

    Args:
        model: a language model, its name, or its folder.
        ref_model: not available.
        args: ``DPOConfig``; a copy of it is used.
        privacy: privacy settings. The default ``loss_bound`` is 4 log 2, because a loss by chance is log 2.
        data_collator: collator in the layout of TRL's, which is the default.
        train_dataset: the private pairs, a ``datasets.Dataset`` or a list.
        eval_dataset: public pairs, or a mapping of names to them.
        processing_class: tokenizer; by default the model's.
        peft_config: configuration of adapters, which are then trained alone.
        quantization_config: quantisation of a base model that is named.
        noise_generator: seeded CPU generator for tests.
        **kwargs: the other arguments of ``Trainer``.

    Guarantees:
        Those of :class:`PrivateTrainer`. Rewards, margins, accuracies and log-probabilities, which TRL logs, are
        neither logged nor written. A pair that keeps no reply after truncation stays, with a gradient of zero.

    Raises:
        ValueError: If the settings cannot be made private, or a record is of another format. The message lists all
            reasons against the settings, and nothing was changed.
        ImportError: If TRL is not installed.

    References:
        arXiv 2305.18290, arXiv 2510.05288.
    """

    config = DPOConfig
    ending = "DPO"

    def __init__(self, model: Any = None, ref_model: Any = None, args: Any = None, **kwargs: Any) -> None:
        super().__init__(model, args, ref_model=ref_model, **kwargs)
        if self.args.disable_dropout:
            without_dropout(self.model)
        run_pairs(self.model)
        if self.args.precompute_ref_log_probs:
            datasets = self.eval_dataset if isinstance(self.eval_dataset, Mapping) else {"": self.eval_dataset}
            for rows in (self.train_dataset, *datasets.values()):
                self._precompute(rows)

    def _refused(self, args: Any, given: Mapping[str, Any]) -> list[str]:
        found = super()._refused(args, given)
        return found or refused_dpo(args, given)

    def _encoder(self, args: Any, tokenizer: Any, given: Mapping[str, Any]) -> Callable[[dict[str, Any]], Row]:
        self._new_adapters = given["peft_config"] is not None
        return PreferenceRow(tokenizer)

    def _collator(self, args: Any, tokenizer: Any, given: Callable[..., Any] | None) -> Callable[..., Any]:
        return PairCollate(
            given
            or DataCollatorForPreference(
                tokenizer.pad_token_id,
                max_length=args.max_length,
                truncation_mode=args.truncation_mode,
                pad_to_multiple_of=args.pad_to_multiple_of,
            )
        )

    def _classes(self) -> int | None:
        return 2 if self.args.loss_type[0] == "sigmoid" else None

    # ---------------------------------------------------------------- the reference

    @contextmanager
    def _without_adapters(self) -> Iterator[None]:
        """Return a context in which the model is as it was before training."""
        trained = [(p, p.requires_grad) for p in self.model.parameters()]
        try:
            with self.model.disable_adapter():
                yield
        finally:
            for parameter, before in trained:  # peft switches on what the user may have frozen
                parameter.requires_grad = before

    def _reference(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the reference's log-probabilities of the pairs, ``[B, 2]``."""
        if _REFERENCE[0] in inputs:
            return torch.stack([inputs[name] for name in _REFERENCE], 1)
        with torch.no_grad(), self._without_adapters() if self._new_adapters else nullcontext():
            return self._policy(model, inputs)

    def _policy(self, model: Any, inputs: Mapping[str, Tensor]) -> Tensor:
        """Return the model's log-probabilities of the pairs, ``[B, 2]``."""
        output = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"], use_cache=False)
        return log_probabilities(output.logits, inputs["input_ids"], inputs["completion_mask"])

    def _precompute(self, rows: TokenRows | None) -> None:
        if rows is None or rows.reference is not None:
            return
        size = self.args.precompute_ref_batch_size or self.args.per_device_train_batch_size
        was_training, found = self.model.training, []
        self.model.to(self.args.device).eval()
        for start in range(0, len(rows), size):
            batch = self.data_collator([rows[i] for i in range(start, min(start + size, len(rows)))])
            with self.compute_loss_context_manager():
                found.append(self._reference(self.model, self._prepare_inputs(batch)).double().cpu())
        rows.reference = torch.cat(found)
        self.model.train(was_training)

    # ---------------------------------------------------------------- the loss

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Tensor:
        """Return the loss of a batch, the mean over pairs.

        Raises:
            ValueError: If outputs are asked for as well.
        """
        if return_outputs:
            raise ValueError("compute_loss of PrivateDPOTrainer returns the loss alone: ask for no outputs")
        reference = self._reference(model, inputs)
        losses = self._losses(self._policy(model, inputs) - reference, inputs["completion_mask"])
        if torch.is_grad_enabled() and self.private_optimizer is not None:
            self.private_optimizer.record_losses(losses)
        return losses.mean()

    def _losses(self, ratios: Tensor, counted: Tensor) -> Tensor:
        """Return the losses of pairs ``[B]``.

        Args:
            ratios: log-ratios of the model to the reference, ``[B, 2]``.
            counted: ``[B, 2, T]``, nonzero where a token belongs to a reply.
        """
        beta, kind = self.args.beta, self.args.loss_type[0]
        if kind == "ipo":
            ratios = ratios / counted.sum(2).clamp(min=1)
            return (ratios[:, 0] - ratios[:, 1] - 1 / (2 * beta)).square()
        margins = beta * (ratios[:, 0] - ratios[:, 1])
        return torch.relu(1 - margins) if kind == "hinge" else -F.logsigmoid(margins)

    def prediction_step(
        self, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        """Return the loss of a batch of public pairs."""
        with torch.no_grad(), self.compute_loss_context_manager():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None

    def evaluate(self, eval_dataset: Any = None, *args: Any, **kwargs: Any) -> dict[str, float]:
        """Evaluate on public pairs, raw or as token rows.

        Raises:
            ValueError: If the data were not declared public, contain pairs of the training data, or come too late for a
                reference that is computed beforehand.
        """
        data = self._checked(eval_dataset, "evaluation")
        if self.args.precompute_ref_log_probs and isinstance(data, TokenRows | Mapping):
            for rows in data.values() if isinstance(data, Mapping) else [data]:
                if rows.reference is None and self.state.global_step and not self._new_adapters:
                    raise ValueError(
                        "the reference was the model before training, which is gone: pass these data as eval_dataset "
                        "when you make the trainer"
                    )
                self._precompute(rows)
        return super().evaluate(data, *args, **kwargs)
