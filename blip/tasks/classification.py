"""Classification of pictures with texts, NLVR2's pairs of pictures among them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch

from blip import dist
from blip.batch import EvalContext, to_device
from blip.config.schema import RunConfig
from blip.errors import ConfigError
from blip.metrics.retrieval import roc_auc
from blip.metrics.vqa import AnswerScores
from blip.registry import TASKS
from blip.tasks.base import EvalData, Evaluation, Prediction, Task


class LabelData(EvalData, Protocol):
    """Pictures and texts, each of one of several classes; batches hold their numbers under `label`."""

    classes: list[str]
    """Names of the classes, in the order of their numbers."""
    measure: str
    """`auc` where the area under the ROC curve of two classes counts, as `datasets.NAME.measure`."""

    def label(self, index: int) -> int:
        """Number of the right class."""
        ...

    def text(self, index: int) -> str:
        """The text as the model reads it."""
        ...


@dataclass
class ClassificationRun(RunConfig):
    """Run keys of classification."""

    per_class: bool = False
    """Also report the accuracy of each class."""


@TASKS.register("multimodal_classification")
class MultimodalClassification(Task):
    """`acc`, the percentage of samples whose class is found; `class_...` of each class where asked for.

    Where the dataset tells kinds of texts apart (`sentence_type`), each has its `type_...`. Where its measure
    is `auc`, as of HatefulMemes, `AUC`: the area under the ROC curve of the second of two, in percent.
    """

    run_config_class = ClassificationRun
    needs = ("predict",)
    monitor: ClassVar[str] = "acc"
    data_kind: ClassVar[str] = "classification"

    def scores(self, data: LabelData | None = None) -> list[str]:
        """The accuracy, and those of classes and kinds of texts."""
        if data is None:
            return ["acc", "type_*", *(["class_*"] if self.config.per_class else []), "AUC"]
        own = AnswerScores()
        for index in range(len(data)):
            own.add(0.0, *self._groups(data, index))
        several = data.measure == "auc" and len({data.label(index) for index in range(len(data))}) == 2
        return list(_means(own)) + (["AUC"] if several and len(data.classes) == 2 else [])

    def evaluate(self, model: Any, data: LabelData, context: EvalContext) -> Evaluation:
        """The class of every sample of this rank's share."""
        predictions: list[Prediction] = []
        for batch in data.batches():
            samples = to_device(dict(batch), context.device)
            with context.autocast():
                logits = model.predict(samples)["predictions"]
            if logits.shape[1] != len(data.classes):
                raise ConfigError(
                    f"model.num_classes: {logits.shape[1]}, but datasets.{data.name} has {len(data.classes)}"
                    f" classes ({', '.join(data.classes)}); set it to that"
                )
            score, found = torch.softmax(logits.float(), dim=1).max(dim=1)
            for i, row in enumerate(
                zip(batch["index"].tolist(), found.tolist(), score.tolist(), strict=True)
            ):
                predictions.append(_prediction(data, *row))
                if data.measure == "auc" and len(data.classes) == 2:
                    predictions[-1]["log_odds"] = float(logits[i, 1] - logits[i, 0])
        return Evaluation(predictions, lambda: self._metrics(data, predictions))

    def _metrics(self, data: LabelData, predictions: list[Prediction]) -> dict[str, float]:
        own = AnswerScores()
        for prediction in predictions:
            own.add(float(prediction["right"]), *self._groups(data, prediction["index"]))
        found = _means(AnswerScores(dist.gather_lists(own.rows)))
        odds = dist.gather_lists(
            (p["log_odds"], p["truth"] == data.classes[1]) for p in predictions if "log_odds" in p
        )
        if len({positive for _, positive in odds}) == 2:
            found["AUC"] = 100 * roc_auc(*zip(*odds, strict=True))
        return found

    def _groups(self, data: LabelData, index: int) -> tuple[str | None, str | None]:
        """The kind of a sample's text and its class, as far as they have accuracies of their own."""
        kind = getattr(data, "sentence_type", None)
        name = data.classes[data.label(index)] if self.config.per_class else None
        return kind(index) if kind is not None else None, name


def _means(own: AnswerScores) -> dict[str, float]:
    return own.means("acc", answers="class", questions="type")


def _prediction(data: LabelData, index: int, found: int, score: float) -> Prediction:
    """What is known of one sample; several pictures are all named."""
    label = data.label(index)
    pictures = getattr(data, "pictures", None)
    several = [path for path in pictures(index) if path] if pictures is not None else []
    return {
        "index": index,
        "instance_id": data.instance_id(index),
        "image": data.picture(index),
        **({"images": several} if len(several) > 1 else {}),
        "text": data.text(index),
        "predicted": data.classes[found],
        "truth": data.classes[label],
        "score": round(score, 4),
        "right": found == label,
    }
