"""Random batches of records for each step, and the loader that hands them to the training loop."""

from opacus_ac._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "BatchSizes": "plan",
        "FixedSizeBatchSampler": "samplers",
        "LogicalBatches": "loader",
        "PoissonBatchSampler": "samplers",
        "PrivateDataLoader": "loader",
        "SamplingPlan": "plan",
        "ShuffledBatchSampler": "samplers",
        "TruncatedPoissonBatchSampler": "samplers",
        "UserRows": "users",
        "private_loader": "loader",
    },
)
