"""From a configuration to the parts of a run: model, data, evaluations, runner."""

from __future__ import annotations

import logging
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from blip import dist, keyed
from blip.config.files import tiny_recipe
from blip.config.schema import Config, DatasetConfig
from blip.data.catalog.table import CATALOG
from blip.data.features import fingerprint, view_of
from blip.data.loader import EvalLoader, LoaderConfig, TrainLoader
from blip.data.locate import MissingData, available_splits, require_files
from blip.data.makers import Defaults
from blip.data.skips import SkipLog
from blip.data.sources import build_dataset
from blip.data.streams.shards import ShardDataset
from blip.engine.cached import Cacheable
from blip.engine.checkpoint import Checkpoints, load_model, read_part, read_state
from blip.engine.dry_run import dry_run
from blip.engine.parallel import Parallel, pick_device
from blip.engine.recompute import apply_recompute
from blip.engine.runner import Runner
from blip.engine.tracker import Tracker
from blip.errors import BlipError, CheckpointError, ConfigError, DataError, Stopped, TrainingError, hint
from blip.expected import expected
from blip.formats.load import load_any
from blip.registry import MODELS, TASKS
from blip.together import on_all
from blip.weights import load_into

log = logging.getLogger(__name__)

SPLIT_KEYS = ("train_splits", "valid_splits", "test_splits")


def execute(config: Config, dry: bool = False) -> None:
    """Carry out a run, in the process group that the environment describes, if any.

    Args:
        dry: build everything, take one step per objective and one evaluation batch, leave nothing behind.

    Raises:
        BlipError: something that the configuration names is missing, unreadable or does not fit; or another
            process of the run has ended.
        Stopped: a stop signal came; the state is saved.
    """
    require_training(config)
    with joined(config):
        (_try if dry else train)(config)


def require_training(config: Config) -> None:
    """Raise where the task is none that trains or evaluates, but has a command of its own.

    Raises:
        ConfigError: naming the command.
    """
    if command := getattr(TASKS.get(config.run.task), "command", None):
        raise ConfigError(f"run.task: {config.run.task} is what 'blip {command} --cfg ...' carries out")


def train(config: Config) -> None:
    """As `execute`, in the process group that the caller has joined."""
    with build_run(config) as runner:
        runner.run()


def _try(config: Config) -> None:
    begun = begun_from(config, config.run.output_dir)
    with tempfile.TemporaryDirectory() as folder:
        place = replace(config.run, output_dir=folder, resume=None, tensorboard=False, wandb=None)
        with build_run(replace(config, run=place), config.run.batch_size_eval, begun) as runner:
            dry_run(runner)


@contextmanager
def joined(config: Config) -> Iterator[None]:
    """The process group that the environment describes, if any; what uses it must not outlive the block.

    Raises:
        TrainingError: another process has ended.
    """
    device = pick_device(config.run.device)
    dist.init("nccl" if device.type == "cuda" else "gloo", config.run.timeout_s)
    try:
        yield
    except (BlipError, Stopped) as error:
        if dist.initialized():  # frames hold the run, which holds the group
            traceback.clear_frames(error.__traceback__)
        raise
    except RuntimeError as error:
        if dist.world_size() > 1 and "by peer" in str(error):
            raise TrainingError(
                "another process of this run has ended, and its own message says why; continue with"
                " run.resume=auto from the last checkpoint"
            ) from error
        raise
    finally:
        dist.shutdown()


def build_run(config: Config, limit: int | None = None, begun: Path | None = None) -> Runner:
    """All parts of a run, wired; the caller has joined the process group. Missing files are found first.

    Args:
        limit: for a dry run: samples of each evaluation set.
        begun: for a dry run: the checkpoint that the real one would go on from.

    Raises:
        BlipError: something that the configuration names is missing, unreadable or does not fit.
    """
    splits = _used_splits(config)
    wanted = [(name, config.datasets[name], split) for split, names in splits.items() for name in names]
    on_all(lambda: _require_files(config, wanted))
    task = TASKS.get(config.run.task)(config.run)
    deciding = config.run.valid_splits[:1] if not config.run.evaluate else []
    _check_monitor(config, task, {name: None for split in deciding for name in splits[split]})
    expected(config, task, None, False)  # what is wrong with it is said before anything is read
    parallel = Parallel(config.run)
    tracker = Tracker(config)
    try:
        begun = begun_from(config, tracker.folder) or begun
        model = build_model(config, parallel.device, begun)
        task.check(model)
        if config.run.accum_mode == "cached" and not isinstance(model, Cacheable):
            raise ConfigError(
                f"run.accum_mode: model.arch {config.model.arch!r} has no loss of a whole batch to cache; use"
                " mean"
            )
        skips = SkipLog(tracker.folder, config.run.max_bad_ratio)
        loader, makers = (
            (None, []) if config.run.evaluate else build_loader(config, model, parallel.device, skips)
        )
        evaluations = {
            split: [build_evaluation(config, name, split, skips, limit) for name in splits[split]]
            for split in splits
            if split in (*config.run.valid_splits, *config.run.test_splits)
        }
        for data in (data for several in evaluations.values() for data in several):
            task.check_data(data)
        _check_monitor(config, task, {data.name: data for split in deciding for data in evaluations[split]})
        beside = expected(config, task, start_of(config), begun is not None or not config.run.evaluate)
        runner = Runner(config, model, task, parallel, loader, evaluations, tracker, skips, beside)
        if config.run.evaluate and (limit is None or begun is not None):
            runner.progress.step = load_evaluated(config, model, begun)
            model.on_step(sys.maxsize)  # what is frozen on the way has been frozen by now
        elif limit is not None and begun is not None:
            log.info("%s", on_all(lambda: load_model(begun, model)).text())
        for maker in makers:  # only now the tower has its weights, also where a run goes on
            _check_features(model, maker)
    except BaseException:
        tracker.abandon()
        raise
    return runner


def begun_from(config: Config, folder: str | Path | None) -> Path | None:
    """The checkpoint that a run goes on from, or whose weights it evaluates; None: it begins.

    Args:
        config: `run.resume` names a checkpoint or, with `auto`, the newest one of the run folder; for an
            evaluation the best one, if there is one.
        folder: the run folder, if it is known.

    Raises:
        CheckpointError: there is none at the path that is named.
    """
    resume = config.run.resume
    if resume is None or (resume == "auto" and folder is None):
        return None
    checkpoints = Checkpoints(Path(folder or ".").expanduser())
    found = checkpoints.find(resume)
    if found is not None and resume == "auto" and config.run.evaluate:
        return checkpoints.best or found
    return found


def build_model(config: Config, device: torch.device, begun: Path | None = None) -> Any:
    """The model with the weights it starts from, on its device.

    Random weights depend on `run.seed` alone. A model starts from `init_from`, else `finetuned`, else
    `pretrained`; where none is given, its parts (tower, BERT) start from what is named for them.

    Args:
        begun: a checkpoint that is loaded later. Then only the frozen parts that it leaves out are loaded
            here, so that a run can go on, or be evaluated, where its start weights are not at hand.

    Raises:
        CheckpointError: weights that are missing or do not fit.
    """
    keyed.seed_torch(config.run.seed, "init")
    model: Any = MODELS.get(config.model.arch).build(config.model, config.run.data_root)
    for line in on_all(lambda: _load_start(model, config, begun)):
        log.info("%s", line)
    for section in config.datasets.values():
        if section.vis_processor and section.text_processor:
            model.processors = {
                "vis_processor": section.vis_processor,
                "text_processor": section.text_processor,
            }
            break
    model = model.to(device)  # first: a language model without values gets its layers here
    for part in model.recompute():
        apply_recompute(*part)
    return model


def start_of(config: Config) -> str | None:
    """Where the whole model's weights come from at the start of a run; None: nowhere."""
    model = config.model
    if model.init_from:
        return model.init_from
    if model.load_finetuned and model.finetuned:
        return model.finetuned
    return model.pretrained if model.load_pretrained and model.pretrained else None


def _load_start(model: Any, config: Config, begun: Path | None) -> list[str]:
    source, root = start_of(config), config.run.data_root
    if begun is not None:
        return model.load_frozen(list(read_state(begun)["frozen"]), root)
    if source is None:
        return model.load_parts(root)
    try:
        report = load_any(model, source, root)
        model.begin()
        return report
    except CheckpointError as error:
        keys = ("init_from", "finetuned", "pretrained")
        key = next(key for key in keys if getattr(config.model, key) == source)
        raise CheckpointError(f"model.{key}: {error}") from error


def load_evaluated(config: Config, model: Any, found: Path | None) -> int:
    """Put the weights that are to be evaluated into the model; returns the training step they are of.

    With `run.ema_decay` a checkpoint's averaged weights are meant, as in training.

    Args:
        found: the checkpoint; None: the model has started from what is to be evaluated.

    Raises:
        CheckpointError: a checkpoint that does not fit, or has no averages where `run.ema_decay` is given.
        ConfigError: nothing says which weights.
    """
    if found is not None:
        log.info("%s", on_all(lambda: load_model(found, model)).text())
        if config.run.ema_decay is not None:  # evaluated as in training, and exported
            averages = on_all(lambda: read_part(found, "ema"))["averages"]
            on_all(lambda: load_into(model, averages, source=f"'{found}'", allow_missing=["*"]))
        return int(on_all(lambda: read_state(found))["step"])
    if start_of(config) is None:
        raise ConfigError(
            "model.init_from: nothing says which weights to evaluate; give model.init_from=RUN_FOLDER or a"
            " weight file, or run.resume=CHECKPOINT"
        )
    return 0


def train_sets(config: Config, name: str) -> list[Any]:
    """The training data of one dataset, one part per split that it has; pictures, not features.

    Raises:
        BlipError: something is missing or does not fit.
    """
    plain = replace(config, datasets={name: replace(config.datasets[name], features=None)})
    splits = [split for split in config.run.train_splits if name in _datasets_with(config, split)]
    on_all(lambda: _require_files(config, [(name, plain.datasets[name], split) for split in splits]))
    return [on_all(partial(_dataset, plain, name, split, train=True)) for split in splits]


def build_loader(
    config: Config, model: Any, device: torch.device, skips: SkipLog | None
) -> tuple[TrainLoader, list[Any]]:
    """The training data of all datasets and `train_splits`, mixed; and what makes their samples."""
    run = config.run
    datasets: dict[str, Any] = {}
    ratios: dict[str, float | None] = {}
    for split in run.train_splits:
        for name in _datasets_with(config, split):
            key = name if len(run.train_splits) == 1 else f"{name}-{split}"
            data = datasets[key] = on_all(partial(_dataset, config, name, split, train=True))
            if skips is not None and isinstance(data, ShardDataset):
                damaged = data.damaged()
                skips.judge_all(name, damaged, len(damaged), data.num_probed, "shards")
            ratios[key] = config.datasets[name].sample_ratio
    settings = LoaderConfig(
        batch_size=run.batch_size_train,
        accum=run.accum_grad_iters,
        seed=run.seed,
        num_workers=run.num_workers,
        drop_last=run.drop_last,
        whole_steps=run.accum_mode == "cached",
        sampling=run.sampling,
        pad_id=model.pad_id,
        pin_memory=device.type == "cuda",
    )
    columns = model.text_columns().items()
    tokenize = {column: partial(model.word_pieces, max_length=longest) for column, longest in columns}
    loader = TrainLoader(datasets, settings, ratios, tokenize, skips)
    if skips is not None:
        skips.epoch_rows = loader.rows_per_epoch
    return loader, [data.maker for data in datasets.values()]


def _check_features(model: Any, maker: Any) -> None:
    """Raise where features of the training data are not what the model's tower would give."""
    store = maker.features
    if store is None:
        return
    require_frozen(model, store.key)
    store.check(on_all(lambda: fingerprint(model.vision.state_dict())), view_of(maker.vis_processor))


def require_frozen(model: Any, key: str) -> None:
    """Raise where features would not stay true: the tower is trained.

    Raises:
        ConfigError: saying how to freeze it.
    """
    if not model.vision.frozen:
        own = "model.freeze_vit" if hasattr(model.config, "freeze_vit") else "model.vit.freeze"
        raise ConfigError(
            f"{key}: features are of a tower that stays as it is, and this one is trained; set {own}: true,"
            " without steps that train it first"
        )


def build_evaluation(
    config: Config, name: str, split: str, skips: SkipLog | None = None, limit: int | None = None
) -> EvalLoader:
    """One dataset's evaluation split, in batches; what cannot be read is left out and listed."""
    section = config.datasets[name]
    if limit is not None:
        section = replace(section, max_samples=min(section.max_samples or limit, limit))
    data = _dataset(replace(config, datasets={name: section}), name, split, train=False)
    if skips is not None:
        skips.judge_all(
            name, [*data.bad, *data.damaged], data.lost, data.total, f"{data.unit} of split {split}"
        )
    return EvalLoader(data, config.run.batch_size_eval, config.run.num_workers)


def _defaults(config: Config) -> Defaults:
    """The model's own processors, and its prompt: captions begin with it, where questions do not fill it."""
    own = MODELS.get(config.model.arch).default_processors["vis_processor"]
    size, prompt = (getattr(config.model, key, None) for key in ("image_size", "prompt"))
    begins = prompt and "{}" not in prompt and TASKS.get(config.run.task).data_kind != "instruct"
    return Defaults(size, own["train"]["name"], own["eval"]["name"], str(prompt) if begins else "")


def _dataset(config: Config, name: str, split: str, train: bool) -> Any:
    size = getattr(config.model, "image_size", None)
    wanted = TASKS.get(config.run.task).data_kind
    section, root = config.datasets[name], config.run.data_root
    data: Any = build_dataset(name, section, split, root, train, _defaults(config), wanted)
    given = getattr(data.maker.vis_processor, "image_size", size)
    if size is not None and given != size:
        stage = "train" if train else "eval"
        raise ConfigError(
            f"datasets.{name}.vis_processor.{stage}.image_size: {given}, where model.image_size is {size};"
            " set both to the same value"
        )
    classes, heads = getattr(data.maker, "classes", ()), getattr(config.model, "num_classes", None)
    if heads is not None and len(classes) > heads:
        raise ConfigError(
            f"model.num_classes: {heads}, where datasets.{name} has {len(classes)} classes"
            f" ({', '.join(classes[:5])}{', ...' if len(classes) > 5 else ''}); set it to {len(classes)}"
        )
    return data


def _require_files(config: Config, wanted: list[tuple[str, DatasetConfig, str]]) -> None:
    """Raise where files are missing; the message names a recipe that needs none of them."""
    try:
        require_files(wanted, config.run.data_root)
    except MissingData as error:
        public = any(name in CATALOG and not CATALOG[name].embedded for name in error.names)
        tiny = tiny_recipe(config.model.arch, config.run.task) if public else None
        if tiny is None:
            raise
        train = "blip train " if config.run.evaluate else ""
        raise DataError(
            f"{error}; {train}--cfg tiny/{tiny} runs now, on what 'blip data make scenes' makes"
        ) from error


def _datasets_with(config: Config, split: str) -> list[str]:
    """The datasets that have a split."""
    root = config.run.data_root
    return [name for name, part in config.datasets.items() if split in available_splits(name, part, root)]


def _check_monitor(config: Config, task: Any, datasets: dict[str, Any]) -> None:
    """Raise ConfigError where the evaluation that is to decide the best checkpoint has no such metric.

    Or where it has, but the worst checkpoint would be taken for the best.

    Args:
        datasets: of that evaluation, by name; None in place of one that has not been read yet.
    """
    if not datasets or not task.scores():
        return
    scores = {name: task.scores(data) for name, data in datasets.items()}
    several = len(scores) > 1
    known = [f"{name}/{score}" if several else score for name, own in scores.items() for score in own]
    where = f" on {' and '.join(scores)}" if any(data is not None for data in datasets.values()) else ""
    monitor = config.run.monitor
    if monitor is None:  # the runner takes the first dataset's
        if known and not any(score.rpartition("/")[2] == task.monitor for score in known):
            raise ConfigError(
                f"run.monitor: the evaluation{where} gives no {task.monitor!r}, by which run.task"
                f" {config.run.task} decides unless told otherwise{hint(task.monitor, known)}"
            )
        return
    open_ended = tuple(score.removesuffix("*") for score in known if score.endswith("*"))
    if monitor not in known and not (open_ended and monitor.startswith(open_ended)):
        text = hint(monitor, known) if known else "; there is nothing to compare with"
        raise ConfigError(f"run.monitor: the evaluation{where} gives no {monitor!r}{text}")
    if config.run.monitor_mode == "max" and task.less_is_better(monitor.rpartition("/")[2]):
        raise ConfigError(
            f"run.monitor_mode: max, but of {monitor!r} less is better; set run.monitor_mode=min"
        )


def _used_splits(config: Config) -> dict[str, list[str]]:
    """The splits that the run reads, each with the datasets that have it.

    Raises:
        ConfigError: a split that no dataset has, or none at all.
    """
    run = config.run
    if not config.datasets:
        raise ConfigError("datasets: there is none; name at least one, such as datasets.scenes={}")
    wanted = [*run.train_splits, *run.valid_splits, *run.test_splits]
    if run.evaluate:
        wanted = run.test_splits or run.valid_splits
    if not wanted:
        raise ConfigError(
            "run.test_splits: nothing to evaluate on; name a split, as in run.test_splits=[test]"
        )
    splits = {split: _datasets_with(config, split) for split in wanted}
    known = {s for n, d in config.datasets.items() for s in available_splits(n, d, run.data_root)}
    if absent := [split for split, names in splits.items() if not names]:
        keys = [key for key in SPLIT_KEYS if set(absent) & set(getattr(run, key))]
        split = next(split for split in absent if split in getattr(run, keys[0]))
        advice = f"name its files, as in datasets.{next(iter(config.datasets))}.path: {{{split}: ...}}"
        if "train_splits" not in keys and not run.evaluate:
            advice += f", or do without: {' '.join(f'run.{key}=[]' for key in keys)}"
        raise ConfigError(
            f"run.{keys[0]}: no dataset has a split {split!r}; there are"
            f" {', '.join(sorted(known)) or 'none'}; {advice}"
        )
    return splits
