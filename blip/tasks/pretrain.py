"""Pre-training on image-text pairs, judged by zero-shot retrieval on held-out ones."""

from __future__ import annotations

from typing import Any

from blip.registry import TASKS
from blip.tasks.retrieval import Retrieval


@TASKS.register("image_text_pretrain")
class ImageTextPretrain(Retrieval):
    """Train with the model's own objectives; evaluate as retrieval does.

    LAVIS's task of this name has an empty evaluation, which leaves nothing to choose a checkpoint by. A model
    that cannot retrieve, such as BLIP-2's stage 2, trains with it as there, without evaluations.
    """

    def check(self, model: Any) -> None:
        """Only evaluations need methods of the model.

        Raises:
            ConfigError: there are some, and a method is missing.
        """
        if self.config.valid_splits or self.config.test_splits:
            super().check(model)
