"""A dataset section -> dataset: what `datasets.NAME` of a configuration stands for."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from blip.config.schema import DatasetConfig
from blip.data.catalog import table as catalog
from blip.data.datasets import PairDataset
from blip.data.eval_instruct import EvalInstructions, EvalTold, outputs_by_type
from blip.data.evaluation import EvalCaptions, EvalData, EvalLabels, EvalPairs, EvalQuestions
from blip.data.features import FeatureStore
from blip.data.instruct import InstructMaker, chosen_templates
from blip.data.kinds import KINDS, TRUTH_VALUES, kind_of
from blip.data.locate import MissingData, Source, available_splits, locate
from blip.data.makers import NAMED, Defaults, make_maker
from blip.data.readers import Record, read_file
from blip.data.records import HfRecords, PackedRecords, SomeRecords, of_types, read_records, within_split
from blip.data.samples import BadRecord, SampleMaker
from blip.data.streams.shards import ShardDataset
from blip.data.truth import (
    SceneJudge,
    all_answers,
    all_labels,
    read_answer_list,
    read_official,
    read_relevance,
)
from blip.data.video import HOW_TO_READ, find_frames, installed_reader
from blip.errors import ConfigError, DataError
from blip.registry import PROCESSORS
from blip.templates import places

log = logging.getLogger(__name__)


Records = PackedRecords | HfRecords | SomeRecords
Data = PairDataset | ShardDataset | EvalPairs | EvalCaptions | EvalQuestions | EvalLabels | EvalInstructions


def build_dataset(
    name: str,
    config: DatasetConfig,
    split: str = "train",
    data_root: str | Path | None = None,
    train: bool = True,
    defaults: Defaults = NAMED,
    wanted: str | None = None,
) -> Data:
    """The dataset that a section describes. Call it on every rank.

    Args:
        name: of the section; a name of the catalogue fills in what is left out.
        config: the section.
        split: which of its splits.
        data_root: as `run.data_root`; see `catalog.data_root`.
        train: with the processors of training, one sample per caption; else for evaluation, without the
            pictures that cannot be read.
        defaults: what holds where the section names no processor.
        wanted: what the task evaluates, as `Task.data_kind`; None: what the kind of records suggests.

    Raises:
        DataError: files, columns or pictures are missing, or there is nothing in them.
        ConfigError: processors or settings that do not go together, or records of another kind than wanted.
    """
    stage = "train" if train else "eval"
    # What is wrong with it shows before files are read.
    maker = make_maker(name, config, stage, defaults, video=config.data_type == "videos")
    source = locate(name, config, split, data_root)
    if source.layout == "shards":
        if not train:
            raise ConfigError(
                f"datasets.{name}.path: shards are for training; evaluation needs a list of its pictures and"
                f" texts, as in path: {{{split}: {split}.json}}"
            )
        if config.features is not None:
            raise ConfigError(f"datasets.{name}.features: pictures in shards have none; name other files")
        if config.max_samples is not None:
            raise ConfigError(f"datasets.{name}.max_samples: shards are not cut; name fewer of them in path")
        _check_kind(name, "caption", wanted)
        maker = _told(name, config, source, maker, "caption", (), wanted, train) or maker
        maker.columns = source.columns  # records of other layouts are renamed when they are read
        return ShardDataset(name, source.shards, maker, config.lanes, config.window, config.image_ids)
    source.captioned = train or wanted not in ("caption", "instruct")
    records = read_source(name, source, config.max_samples, wanted)
    kind = found_kind(source, records, wanted)
    _check_kind(name, kind, wanted)
    classes = class_names(name, config, kind, source, records, data_root)
    video = shows_videos(config, records.columns)
    maker = make_maker(name, config, stage, defaults, kind, classes, video)
    _check_columns(name, config, stage, maker, records.columns)
    check_pictures(name, records, maker, source.named)
    told = _told(name, config, source, maker, kind, classes, wanted, train)
    if train:
        maker = told or maker
        maker.features = open_features(name, config, data_root)
        return PairDataset(name, records, maker, config.image_ids and kind == "caption" and told is None)
    if told is None:
        asked = wanted or KINDS[kind].serves[0]
        return _evaluation(name, config, source, records, maker, asked, data_root)
    if kind == "instruct":
        data = _scored(EvalTold(name, records, told), source).verify()
    else:
        data = _evaluation(name, config, source, records, maker, kind, data_root)
    return EvalInstructions(data, told, partial(_outputs, name, config, told, data_root))


def _told(
    name: str,
    config: DatasetConfig,
    source: Source,
    maker: SampleMaker,
    kind: str,
    classes: Sequence[str],
    wanted: str | None,
    train: bool,
) -> InstructMaker | None:
    """What makes instructions of records, with the processors of `maker`; None where they stay as they are.

    Raises:
        ConfigError: templates that do not fit the records.
        MissingData: the words that they show lie in a file that is not there.
    """
    given = config.templates or getattr(maker.text_processor, "templates", None)
    templates = chosen_templates(name, given, source.templates, kind, wanted, train)
    if templates is None:
        return None
    told = InstructMaker(
        maker.vis_processor,
        maker.text_processor,
        config.prompt,
        kind=kind,
        templates=templates,
        classes=classes,
    )
    told.answered, told.decoder = train, maker.decoder
    if source.ocr is not None and any("ocr" in places(template) for template in templates):
        if not source.ocr.is_file():
            problem = f"datasets.{name}.ocr_file: no file {str(source.ocr)!r}; empty goes without such words"
            raise MissingData(problem, source.named)
        told.ocr = read_official(source.ocr, "image_id")
    return told


def _outputs(
    name: str, config: DatasetConfig, maker: InstructMaker, data_root: str | Path | None
) -> dict[str, list[str]] | None:
    """The outputs of the training records by type, for ranking; None where there is no such split."""
    records = _training_records(name, config, data_root)
    return None if records is None else outputs_by_type(records, maker)


def open_features(
    name: str, config: DatasetConfig, data_root: str | Path | None = None
) -> FeatureStore | None:
    """The store that a section names; None where it names none.

    Raises:
        DataError: there is no complete one.
        ConfigError: of videos.
    """
    if config.features is None:
        return None
    key = f"datasets.{name}.features"
    if config.data_type == "videos":
        raise ConfigError(f"{key}: there are features of pictures only; leave it out for videos")
    place = Path(config.features)
    return FeatureStore(place if place.is_dir() else catalog.data_root(data_root) / place, key)


def _evaluation(
    name: str,
    config: DatasetConfig,
    source: Source,
    records: Records,
    maker: Any,
    wanted: str,
    data_root: str | Path | None,
) -> Data:
    if wanted == "retrieval":
        return EvalPairs(name, records, maker).verify()
    if wanted == "caption":
        official = read_official(source.official, "image_id") if source.official else None
        judged = source.judged if source.judged and source.judged.is_file() else None
        judge = SceneJudge(PackedRecords(read_file(judged, "json"))) if judged else None
        return EvalCaptions(name, records, maker, official, judge).verify()
    if wanted == "vqa":
        official = read_official(source.official, "question_id") if source.official else None
        candidates = partial(answer_candidates, name, config, source, data_root)
        data = EvalQuestions(name, records, maker, official, candidates)
        if source.relevance is not None and source.relevance.is_file():
            data.relevances = read_relevance(source.relevance)
        elif source.relevance is not None:
            log.info("datasets.%s: no file '%s', so there will be no NDCG", name, source.relevance)
        return _scored(data, source).verify()
    return _scored(EvalLabels(name, records, maker), source).verify()


def _scored(data: EvalData, source: Source) -> Any:
    """`data`, which knows what counts as right and who scores what is secret."""
    data.measure, data.server = source.measure, source.server
    return data


def _check_kind(name: str, kind: str, wanted: str | None) -> None:
    if wanted is not None and wanted not in KINDS[kind].serves:
        fitting = [other for other in KINDS if wanted in KINDS[other].serves]
        raise ConfigError(
            f"datasets.{name}.kind: its records are of kind {kind}, run.task needs {' or '.join(fitting)};"
            f" name other data, say what the columns are (datasets.{name}.kind, datasets.{name}.columns), or"
            " choose another task"
        )


def shows_videos(config: DatasetConfig, present: Sequence[str]) -> bool:
    """Whether records with these columns, by our names, are read as videos where no processor tells."""
    named = config.data_type == "videos" or ("video" in config.columns and "image" not in config.columns)
    return "video" in present and (named or "image" not in present)


def _check_columns(
    name: str, config: DatasetConfig, stage: str, maker: SampleMaker, present: Sequence[str]
) -> None:
    """Raise where the image processor is for videos and the records show pictures, or the other way round."""
    processor = next(
        (key for key in PROCESSORS.names() if PROCESSORS.get(key) is type(maker.vis_processor)), ""
    )
    if not maker.of_videos and "image" not in present and "images" not in present and "video" in present:
        size = getattr(maker.vis_processor, "image_size", 384)
        raise ConfigError(
            f"datasets.{name}.vis_processor.{stage}.name: {processor} is for pictures, and the records have"
            f" videos; use {{name: alpro_video_{stage}, n_frms: 8, image_size: {size}}}"
        )
    if (maker.of_videos or config.data_type == "videos") and "video" not in present:
        key = f"vis_processor.{stage}.name" if config.data_type != "videos" else "data_type"
        what = f"{processor} is for videos" if config.data_type != "videos" else "videos"
        raise ConfigError(
            f"datasets.{name}.{key}: {what}, and the records have no column 'video', only"
            f" {', '.join(present)}; name the one that holds folders of frames or video files:"
            f" datasets.{name}.columns: {{video: ...}}"
        )


def read_source(name: str, source: Source, limit: int | None = None, wanted: str | None = None) -> Records:
    """The records of a located split, with the columns that its kind needs.

    Args:
        name: of the dataset.
        source: its files.
        limit: number of records to read; None: all.
        wanted: see `build_dataset`.
    """

    def required(present: Sequence[str]) -> list[tuple[str, ...]]:
        kind = source.kind if source.kind != "auto" else kind_of(present, wanted)
        return [some for some in KINDS[kind].needs if source.captioned or some != ("caption",)]

    own = None if source.types or source.within else limit
    records: Records = read_records(
        source.paths, source.layout, source.columns, source.roots, name, own, required, source.suffix
    )
    if source.within:
        records = within_split(
            records, source.within, name, None if source.types else limit, source.within_column
        )
    return of_types(records, source.types, name, limit) if source.types else records


def found_kind(source: Source, records: Records, wanted: str | None = None) -> str:
    """What the records of a located split are, a key of `kinds.KINDS`."""
    return source.kind if source.kind != "auto" else kind_of(records.columns, wanted)


def class_names(
    name: str,
    config: DatasetConfig,
    kind: str,
    source: Source,
    records: Iterable[Record],
    data_root: str | Path | None = None,
    training: bool = True,
) -> Sequence[str]:
    """Labels in the order of their numbers; empty for kinds without any.

    Args:
        name: of the section.
        config: the section.
        kind: of the records.
        source: the files of a split.
        records: of that split; without a training split, their labels are taken where they are truth values.
        data_root: as `run.data_root`.
        training: whether the numbers matter; else labels of `records` will do where nothing else tells.

    Raises:
        ConfigError: nothing tells them.
        MissingData: the training split, which would, is not there.
    """
    if kind not in ("nlvr", "classification") or source.classes:
        return source.classes
    if kind == "nlvr":
        return TRUTH_VALUES
    learnt = _training_records(name, config, data_root)
    classes = all_labels(records if learnt is None else learnt)
    if learnt is None and {label.title() for label in classes} <= set(TRUTH_VALUES):
        return TRUTH_VALUES
    if training and (learnt is None or len(classes) < 2):
        classes = [] if learnt is None else classes
        raise ConfigError(
            f"datasets.{name}.classes: not given, and the training split has"
            f" {'only ' + repr(classes[0]) if classes else 'none'}; name them in the order of their numbers"
        )
    return classes


def answer_candidates(
    name: str, config: DatasetConfig, source: Source, data_root: str | Path | None = None
) -> list[str] | None:
    """The answers that may be ranked: a list of the section or the catalogue, else all of the training split.

    Raises:
        MissingData: the list of the catalogue is not there.
    """
    if source.answer_list is None:
        records = _training_records(name, config, data_root)
        return None if records is None else all_answers(records)
    if not source.answer_list.is_file():
        problem = f"datasets.{name}.answer_list: no file {str(source.answer_list)!r}"
        raise MissingData(problem, source.named)
    return read_answer_list(source.answer_list)


def _training_records(name: str, config: DatasetConfig, data_root: str | Path | None) -> Records | None:
    """All records of the training split; None where there is no such split."""
    if "train" not in available_splits(name, config, data_root):
        return None
    return read_source(name, locate(name, config, "train", data_root))


def check_pictures(name: str, records: Records, maker: SampleMaker, named: Iterable[str] = ()) -> None:
    """Raise where none of the first pictures or videos exists: that is a wrong folder, not damaged data.

    Raises:
        DataError: naming the first one, or what is needed to read video files.
    """
    what = "videos" if maker.of_videos else "pictures"
    places: list[Path] = []
    first: Any = None
    for i in range(min(len(records), 20)):
        try:
            entries = maker.places(records[i], "")
        except BadRecord:
            return  # it is counted later
        for one in entries:
            place = records.picture(i, one)
            if isinstance(place, bytes) or _exists(place, maker.of_videos, name):
                return
            places.append(Path(place))
            first = one if first is None else first
    problem = (
        f"datasets.{name}.images: none of the first {len(places)} {what} is there, not even"
        f" {str(places[0])!r}"
    )
    named = list(named)
    advice = f"set datasets.{name}.images to the folder that holds {first!r}"
    raise MissingData(problem, named, "" if named else advice)


def _exists(place: str, video: bool, name: str) -> bool:
    """Whether a picture or video is there, and there is what it takes to read it.

    Raises:
        DataError: it is a video file, and no reader is installed.
    """
    if not video:
        return Path(place).exists()
    try:
        found = find_frames([place])
    except OSError:
        return False
    if isinstance(found, str) and installed_reader() is None:
        raise DataError(f"datasets.{name}: {found} is a video file, which takes a reader: {HOW_TO_READ}")
    return True
