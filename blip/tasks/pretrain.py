"""Pre-training on image-text pairs, judged by zero-shot retrieval on held-out ones."""

from __future__ import annotations

from blip.registry import TASKS
from blip.tasks.retrieval import Retrieval


@TASKS.register("image_text_pretrain")
class ImageTextPretrain(Retrieval):
    """Train with the model's own objectives; evaluate as retrieval does.

    LAVIS's task of this name has an empty evaluation, which leaves nothing to choose a checkpoint by.
    """
