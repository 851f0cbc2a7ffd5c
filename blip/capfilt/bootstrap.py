"""Captions for pictures, and scores for texts about them: one batch at a time (BLIP, section 3.3).

Every picture is decoded once. Captioner and filter whose towers are the same share what it sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from blip.batch import to_device
from blip.capfilt.units import Unit, WebText, batches, number_of
from blip.data.features import fingerprint, view_of
from blip.data.samples import BadRecord, SampleMaker, read_image
from blip.errors import ConfigError, TrainingError, UsageError
from blip.predict import model_for
from blip.tasks.capfilt import CaptionsConfig, ExpertConfig
from blip.zoo import load_preprocess

Origin = Literal["web", "synthetic"]
DIGITS = 6
"""Of a score, behind the point."""


class Expert:
    """A model in eval mode, with its processors.

    Args:
        model: on its device.
        name: what reports call it.
    """

    def __init__(self, model: Any, name: str) -> None:
        self.model, self.name = model, name
        pictures, texts = load_preprocess(model)
        self.picture, self.text = pictures["eval"], texts["eval"]
        self.view = view_of(self.picture)
        self.id = f"{model.config.arch}:{fingerprint(model.state_dict())[:12]}"
        """Registry name and a hash of the weights: the provenance of what it writes."""
        vision = getattr(model, "vision", None)
        self.tower = fingerprint(vision.state_dict()) if vision is not None else None


def load_expert(task: Literal["caption", "match"], config: ExpertConfig, device: torch.device) -> Expert:
    """The captioner or the filter that a configuration names.

    Raises:
        BlipError: weights that are missing, or of a model that cannot do it.
    """
    try:
        model = model_for(task, config.arch, config.model_type, config.checkpoint, str(device))
    except UsageError as error:
        key = "captioner" if task == "caption" else "filter"
        where = f"run.{key}.{'checkpoint' if config.checkpoint is not None else 'arch'}"
        reason = str(error).replace("(--checkpoint)", f"(run.{key}.checkpoint)")
        reason = reason.replace("(--model)", f"(run.{key}.arch)").replace("--model", f"run.{key}.arch")
        raise ConfigError(f"{where}: {reason}") from error
    return Expert(model, config.checkpoint or f"{config.arch} {config.model_type or ''}".strip())


class Text(NamedTuple):
    """A text about a picture."""

    caption: str
    """As it stands, or as it was written."""
    origin: Origin
    record: int | None
    """Of a web text: the record that it stands in."""
    clean: str
    """As the filter reads it."""


@dataclass
class Loaded:
    """A picture as the models take it, and its web texts."""

    name: str
    views: tuple[Tensor, ...] = ()
    """uint8 (3, H, W), one for each image processor."""
    texts: list[Text] = field(default_factory=list)
    dropped: list[str] = field(default_factory=list)
    """Causes why texts were left out."""
    bad: BadRecord | None = None
    """Why there is no picture."""


@dataclass(frozen=True)
class Views:
    """Image processors, each once, and a text processor; picklable, for loader workers."""

    processors: tuple[Any, ...]
    maker: SampleMaker
    web_texts: bool = True

    def load(self, unit: Unit, number: int) -> Loaded:
        """Picture `number` of a unit, decoded once."""
        try:
            entry = unit.entry(number)
            image = read_image(entry.picture, entry.name)
            found = Loaded(entry.name, tuple(one.pixels(image) for one in self.processors))
        except BadRecord as error:
            return Loaded(unit.name(number), bad=error)
        for text in entry.texts if self.web_texts else ():
            self._take(text, found)
        return found

    def _take(self, text: WebText, found: Loaded) -> None:
        try:
            clean = self.maker.cleaned(text.caption, found.name)
        except BadRecord as error:
            found.dropped.append(error.cause)
            return
        add(found.texts, Text(text.caption, "web", text.record, clean), found.dropped)


def add(texts: list[Text], text: Text, dropped: list[str]) -> None:
    """Add a text, unless there is an equal one."""
    if any(text.clean == other.clean for other in texts):
        dropped.append(f"duplicate_{text.origin}")
    else:
        texts.append(text)


class UnitBatches(Dataset[list[Loaded]]):
    """The batches of a unit, for loader workers."""

    def __init__(self, unit: Unit, views: Views, batch_size: int, start: int) -> None:
        self._unit, self._views = unit, views
        self._batches = list(batches(unit, batch_size, start))

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, index: int) -> list[Loaded]:
        return [self._views.load(self._unit, number) for number in self._batches[index]]


def load_batches(unit: Unit, views: Views, batch_size: int, start: int, num_workers: int) -> Any:
    """The rest of a unit's batches, in order."""
    data = UnitBatches(unit, views, batch_size, start)
    workers = min(num_workers, len(data))
    return DataLoader(data, batch_size=None, num_workers=workers, prefetch_factor=2 if workers else None)


class Bootstrap:
    """Writes and judges.

    Args:
        captioner: None writes nothing.
        judge: the filter; None judges nothing.
        captions: how captions are written.
        device: of the models.
        autocast: context of forward passes.
        seed: of what is drawn.
        batch_size: pairs that are judged together.
        web_texts: whether the texts that the pictures come with are of interest.
    """

    def __init__(
        self,
        captioner: Expert | None,
        judge: Expert | None,
        captions: CaptionsConfig,
        device: torch.device,
        autocast: Callable[[], AbstractContextManager[Any]],
        seed: int = 42,
        batch_size: int = 64,
        web_texts: bool = True,
    ) -> None:
        self.captioner, self.judge, self.captions = captioner, judge, captions
        self.device, self.autocast, self.batch_size = device, autocast, batch_size
        self._generation = captions.generation(seed)
        experts = [one for one in (captioner, judge) if one is not None]
        assert experts, "nothing to do"
        views: list[dict[str, Any]] = []
        processors: list[Any] = []
        for one in experts:
            if one.view not in views:
                views.append(one.view)
                processors.append(one.picture)
        self._view = {id(one): views.index(one.view) for one in experts}
        maker = SampleMaker(cast(Any, None), (judge or experts[0]).text)  # it cleans texts only
        self.views = Views(tuple(processors), maker, web_texts)
        self.shares_tower = (
            captioner is not None
            and judge is not None
            and captioner.tower is not None
            and (captioner.tower, captioner.view) == (judge.tower, judge.view)
        )
        """Whether both see the same."""

    @torch.inference_mode()
    def __call__(self, pictures: Sequence[Loaded], source: str) -> list[dict[str, Any]]:
        """What is found about pictures: a line of the journal for each.

        Args:
            pictures: of a batch.
            source: name of the dataset, which keys what is drawn.
        """
        good = [one for one in pictures if one.bad is None]
        lines = {id(one): _bad_line(one) for one in pictures if one.bad is not None}
        if good:
            with self.autocast():
                states = self._see(self.judge, good) if self.judge is not None else {}
                self._write(good, source, states if self.shares_tower else {})
                scores = self._score(good, states)
            at = 0
            for one in good:
                lines[id(one)] = _line(one, scores[at : at + len(one.texts)])
                at += len(one.texts)
        return [lines[id(one)] for one in pictures]

    def _see(self, expert: Expert, pictures: list[Loaded]) -> dict[str, Tensor]:
        """A batch of pictures as a model takes it; of the filter, what its tower sees."""
        view = self._view[id(expert)]
        image = torch.stack([one.views[view] for one in pictures])
        norm = expert.picture.norm().expand(len(pictures), -1, -1)
        batch = to_device({"image": image, "image_norm": norm}, self.device)
        if expert is self.judge:
            return {"image_embeds": expert.model.image_states(batch)}
        return batch

    def _write(self, pictures: list[Loaded], source: str, seen: dict[str, Tensor]) -> None:
        """Add synthetic captions."""
        captioner, count = self.captioner, self.captions.num
        if captioner is None:
            return
        samples: dict[str, Any] = dict(seen or self._see(captioner, pictures))
        samples["index"] = torch.tensor([number_of(one.name) for one in pictures])
        samples["source"] = source
        if self.captions.prompt is not None:
            samples["prompt"] = self.captions.prompt
        texts = captioner.model.generate(samples, **self._generation)
        maker = self.views.maker
        for number, text in enumerate(texts):
            picture = pictures[number // count]
            text = text.strip()
            try:
                clean = maker.cleaned(text, picture.name)
            except BadRecord:
                picture.dropped.append("empty_synthetic")
                continue
            add(picture.texts, Text(text, "synthetic", None, clean), picture.dropped)

    def _score(self, pictures: list[Loaded], states: dict[str, Tensor]) -> list[tuple[float, float] | None]:
        """(matching probability, cosine) of all texts, in the order of the pictures; None: nobody judges.

        Raises:
            TrainingError: a score is no number.
        """
        owners = [i for i, one in enumerate(pictures) for _ in one.texts]
        if self.judge is None:
            return [None] * len(owners)
        model = self.judge.model
        texts = [text.clean for one in pictures for text in one.texts]
        if not texts:
            return []
        tokens = model.tokenize(texts)
        ids, mask = tokens["text_ids"], tokens["text_mask"]
        feats, seen = model.retrieval_images(states)
        keys = model.retrieval_keys(seen)
        lengths = mask.sum(dim=1)
        # Texts of similar length are judged together, so that little of it is padding.
        order = torch.argsort(lengths, stable=True)
        found = torch.empty(len(texts), 2)
        for rows in order.split(self.batch_size):
            longest = int(lengths[rows].max())
            some, real = ids[rows, :longest].to(self.device), mask[rows, :longest].to(self.device)
            of = torch.tensor([owners[row] for row in rows.tolist()], device=self.device)
            logits = model.itm_logits([(keys.select(of), 1)], some, real).float()
            cosines = model.retrieval_scores(feats, model.retrieval_texts(some, real)).float()
            own = cosines[of, torch.arange(len(of), device=self.device)]
            found[rows] = torch.stack([logits.softmax(dim=1)[:, 1], own], dim=1).cpu()
        if not found.isfinite().all():
            row = int((~found.isfinite().all(dim=1)).nonzero()[0])
            raise TrainingError(
                f"run.filter: its scores are no numbers, as of {texts[row]!r} and"
                f" '{pictures[owners[row]].name}'; its weights are damaged, or too large for fp16: try"
                " run.precision=bf16 or fp32"
            )
        return [cast(tuple[float, float], tuple(pair)) for pair in found.tolist()]


def _line(picture: Loaded, scores: Sequence[tuple[float, float] | None]) -> dict[str, Any]:
    texts = []
    for text, pair in zip(picture.texts, scores, strict=True):
        entry: dict[str, Any] = {"caption": text.caption, "origin": text.origin}
        if text.record is not None:
            entry["record"] = text.record
        if pair is not None:
            entry |= {"itm": round(pair[0], DIGITS), "itc": round(pair[1], DIGITS)}
        texts.append(entry)
    line: dict[str, Any] = {"picture": picture.name, "texts": texts}
    return line | ({"dropped": picture.dropped} if picture.dropped else {})


def _bad_line(picture: Loaded) -> dict[str, Any]:
    return bad_line(cast(BadRecord, picture.bad))


def bad_line(error: BadRecord) -> dict[str, Any]:
    """The line of what cannot be read."""
    return {"picture": error.name, "cause": error.cause, "detail": error.detail}
