"""Entry point of the Privacy tab. Whatever goes wrong in it, TensorBoard starts."""

from __future__ import annotations

import logging
from typing import Any

from tensorboard.plugins import base_plugin

logger = logging.getLogger(__name__)


class PrivacyLoader(base_plugin.TBLoader):
    """Loads the Privacy tab, or leaves it out and says why: TensorBoard itself imports plugins without a guard."""

    def load(self, context: Any) -> Any:
        """Return the plugin, or None when it cannot be loaded."""
        try:
            from opacus_ac.tensorboard.plugin import PrivacyPlugin

            return PrivacyPlugin(context)
        except Exception as error:
            logger.warning("the Privacy tab of opacus_ac is left out: %s: %s", type(error).__name__, error)
            return None
