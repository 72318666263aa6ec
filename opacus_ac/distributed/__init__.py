"""The same private step on several processes: reducers, the draw that all ranks share."""

from opacus_ac._lazy import lazy_names

__all__, __getattr__, __dir__ = lazy_names(
    __name__,
    {
        "LOCAL": "reducers",
        "LocalReducer": "reducers",
        "Reducer": "reducers",
        "ReplicatedReducer": "reducers",
        "ShardedReducer": "sharded",
    },
)
