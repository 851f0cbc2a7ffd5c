"""Rounds of CapFilt: fine-tune captioner and filter, caption and judge, keep, and train anew.

FOLDER/config.yaml, env.json
FOLDER/round-1/captioner/, filter/    runs of fine-tuning, where there are recipes
FOLDER/round-1/scored/NAME/           journals: what was found about every picture
FOLDER/round-1/dataset/               what is kept
FOLDER/round-1/summary.json, report.html, skipped.jsonl
FOLDER/round-1/train.yaml             the recipe that trains on it
FOLDER/round-2/pretrain/              a further round begins with that
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from blip.atomic import PARTIAL, write_text
from blip.build import joined, train
from blip.capfilt.bootstrap import Bootstrap, Expert, bad_line, load_batches, load_expert
from blip.capfilt.journal import Journal
from blip.capfilt.next_recipe import next_recipe, passed_on
from blip.capfilt.output import Made, Provenance, in_shards, write_records, write_shard, write_sizes
from blip.capfilt.report import write_report
from blip.capfilt.select import Tally, Thresholds, choose, thresholds
from blip.capfilt.sharing import Claims, Progress
from blip.capfilt.units import RecordPool, ShardPool, Unit, open_pool
from blip.config.files import dump
from blip.config.load import load_config
from blip.config.schema import Config
from blip.data.locate import available_splits, require_files
from blip.data.samples import BadRecord
from blip.data.skips import SkipLog
from blip.engine.environment import describe
from blip.engine.parallel import Parallel
from blip.engine.run_folder import CONFIG_FILE, ENV_FILE, REPORT_FILE, open_folder
from blip.engine.signals import StopSignals
from blip.errors import ConfigError, DataError, Stopped, hint
from blip.tasks.capfilt import CapFiltRun, ExpertConfig
from blip.together import on_all, on_main
from blip.weights import MODEL_FOLDER

log = logging.getLogger("blip.capfilt")

SETTINGS_FILE = "settings.json"
SUMMARY_FILE = "summary.json"
RECIPE_FILE = "train.yaml"

Pool = RecordPool | ShardPool


class Work(NamedTuple):
    """A unit, and where what is found about it is written down."""

    pool: Pool
    unit: Any
    journal: Journal


def execute(config: Config, dry: bool = False) -> None:
    """Carry out all rounds, in the process group that the environment describes, if any.

    Args:
        dry: look at what the configuration names, caption and judge one batch, leave nothing behind.

    Raises:
        BlipError: something that the configuration names is missing, unreadable or does not fit.
        Stopped: a stop signal came; what is done is written.
    """
    if not isinstance(config.run, CapFiltRun):
        raise ConfigError(
            f"run.task: {config.run.task!r} is nothing for 'blip capfilt'; its configuration has run.task:"
            " capfilt, as tiny/capfilt.yaml has"
        )
    web = _web_sets(config)
    with joined(config):
        on_all(lambda: _check(config, web))
        if dry:
            _try(config, web)
            return
        folder = Path(on_main(lambda: str(_open(config))))
        start = config.model.init_from
        for number in range(1, config.run.rounds + 1):
            with StopSignals() as signals:
                one = Round(config, web, folder, number, signals)
                try:
                    start = one.carry_out(start)
                except Stopped as stop:
                    raise Stopped(
                        f"stopped by {signals.received or stop}; continue with run.resume=auto"
                        f" run.output_dir={folder}"
                    ) from None


class Round:
    """One round.

    Args:
        config: the configuration.
        web: names of the datasets that are cleaned, each with its splits.
        folder: of the whole run.
        number: of the round, from 1.
        signals: what asks to stop.
    """

    def __init__(
        self, config: Config, web: dict[str, list[str]], folder: Path, number: int, signals: StopSignals
    ) -> None:
        self.config, self.run, self.web, self.number = config, config.run, web, number
        self.signals = signals
        self.before = folder / f"round-{number - 1}"
        self.folder = folder / f"round-{number}"
        self.scored = self.folder / "scored"
        self.dataset = self.folder / "dataset"

    def carry_out(self, start: str | None) -> str | None:
        """All of it; returns what the captioner and filter of the next round start from.

        Args:
            start: what those of this round start from.
        """
        on_main(lambda: self.folder.mkdir(parents=True, exist_ok=True))
        if self.number > 1:
            start = self._train("pretrain", str(self.before / RECIPE_FILE), [])
        run = self.run
        captioner = self._made("captioner", run.captioner, start) if run.captions.num else None
        judge = self._made("filter", run.filter, start) if run.keep.needs_scores else None
        self._bootstrap(captioner, judge)
        return start

    def _made(self, name: str, expert: ExpertConfig, start: str | None) -> ExpertConfig:
        """Weights of the captioner or filter, fine-tuned where there is a recipe."""
        if expert.recipe is None:
            return expert
        begin = [f"model.init_from={json.dumps(start)}"] if start is not None else []
        return ExpertConfig(checkpoint=self._train(name, expert.recipe, [*begin, *expert.options]))

    def _train(self, name: str, recipe: str, options: Sequence[str]) -> str:
        """Run a recipe of `blip train` to its end, or go on with it; returns its folder."""
        place = self.folder / name
        if _finished(place):
            return str(place)
        log.info("round %d: %s by %s", self.number, name, recipe)
        own = [f"run.output_dir={json.dumps(str(place))}", "run.resume=auto", *passed_on(self.run)]
        train(load_config(recipe, [*options, *own]))
        if self.signals.received:
            raise Stopped(self.signals.received)
        return str(place)

    def _bootstrap(self, captioner: ExpertConfig | None, judge: ExpertConfig | None) -> None:
        run = self.run
        pools = open_pools(self.config, self.web)
        parallel = Parallel(run)
        experts = [
            None
            if captioner is None
            else on_all(partial(load_expert, "caption", captioner, parallel.device)),
            None if judge is None else on_all(partial(load_expert, "match", judge, parallel.device)),
        ]
        strap = _bootstrap_of(run, experts, parallel)
        settings = self._settings(strap, pools)
        work = self._work(pools)
        on_main(lambda: self._same_settings(settings))
        self._score(strap, work, pools)
        told = Provenance(settings["captioner"], settings["filter"], self.number)
        del strap, experts
        least = on_main(lambda: thresholds(run.keep, _lines(work)))
        made = self._write(work, pools, told, least)
        on_main(lambda: self._conclude(work, pools, settings, least, made))

    def _settings(self, strap: Bootstrap, pools: dict[str, Pool]) -> dict[str, Any]:
        """What journals depend on."""
        run = self.run
        return {
            "captioner": strap.captioner.id if strap.captioner else None,
            "filter": strap.judge.id if strap.judge else None,
            "captions": asdict(run.captions) if strap.captioner else None,
            "web_texts": run.web_texts,
            "seed": run.seed,
            "batch_size": run.batch_size_eval,
            "datasets": {name: pool.describe() for name, pool in pools.items()},
        }

    def _same_settings(self, settings: dict[str, Any]) -> None:
        """Note what the journals are made with, or compare.

        Raises:
            ConfigError: some were made otherwise.
        """
        place = self.scored / SETTINGS_FILE
        if not place.is_file():
            self.scored.mkdir(parents=True, exist_ok=True)
            write_text(place, json.dumps(settings, indent=1) + "\n")
            return
        known = json.loads(place.read_bytes())
        if differing := [key for key in settings if known.get(key) != settings[key]]:
            key = differing[0]
            raise ConfigError(
                f"run.output_dir: '{self.scored}' was begun with another {key} ({_short(known.get(key))}, now"
                f" {_short(settings[key])}); give another folder, or run.overwrite=true"
            )

    def _work(self, pools: dict[str, Pool]) -> list[Work]:
        return [
            Work(pool, unit, Journal(self.scored / name / f"{unit.label}.jsonl"))
            for name, pool in pools.items()
            for unit in pool.units()
        ]

    # Captions and scores

    def _score(self, strap: Bootstrap, work: list[Work], pools: dict[str, Pool]) -> None:
        """Write what is missing of the journals; the ranks take one unit after the other."""
        total = sum(pool.num_pictures for pool in pools.values())
        with Claims(self.scored) as claims, Progress(total) as progress:
            skips = SkipLog(None, self.run.max_bad_ratio)
            for one in work:
                if one.journal.done:
                    progress.skip(len(one.unit))
                elif claims.take(f"{one.pool.name}-{one.unit.label}"):
                    self._score_unit(strap, one, skips, progress)

    def _score_unit(self, strap: Bootstrap, one: Work, skips: SkipLog, progress: Progress) -> None:
        run, size = self.run, self.run.batch_size_eval
        start = one.journal.begin(size, len(one.unit))
        progress.skip(start)
        for pictures in load_batches(one.unit, strap.views, size, start, run.num_workers):
            lines = strap(pictures, f"{one.pool.name}/{self.number}")
            one.journal.add(lines)
            bad = [(one.pool.name, picture.bad) for picture in pictures if picture.bad is not None]
            skips.update(bad, len(pictures) - len(bad))
            skips.judge_own()
            progress.add(len(pictures))
            if self.signals.received:
                raise Stopped(self.signals.received)
        whole = one.unit.close()
        one.journal.end([{**bad_line(error), "whole": True} for error in whole], len(one.unit))

    # What is kept

    def _write(
        self, work: list[Work], pools: dict[str, Pool], told: Provenance, least: Thresholds
    ) -> dict[str, Made]:
        """The dataset of this round; in its place when it is complete."""
        run = self.run
        stamp: dict[str, Any] = {"round": told.round, "captioner": told.captioner, "filter": told.filter}
        stamp |= {"keep": asdict(run.keep), "thresholds": least}
        chosen = partial(choose, keep=run.keep, least=least)
        draft = self.folder / f"{PARTIAL}dataset"
        if on_main(lambda: self._stands(draft, stamp)):
            found = json.loads((self.dataset / SETTINGS_FILE).read_bytes())["made"]
            return {name: Made(*values) for name, values in found.items()}
        sizes: dict[str, dict[str, int]] = {name: {} for name in pools}
        with Claims(draft) as claims:
            for one in work:
                if not in_shards(one.pool):
                    continue
                counted = draft / f"{one.pool.name}-{one.unit.label}.count"
                if not counted.is_file() and claims.take(counted.name):
                    place = draft / one.pool.name
                    place.mkdir(parents=True, exist_ok=True)
                    count = write_shard(one.unit, one.journal, place, chosen, told)
                    write_text(counted, f"{count}\n")
                if self.signals.received:
                    raise Stopped(self.signals.received)
        return on_main(lambda: self._assemble(draft, work, pools, chosen, told, stamp, sizes))

    def _stands(self, draft: Path, stamp: dict[str, Any]) -> bool:
        """Whether the dataset is there; else its draft is begun, or gone on with if it is of the same."""
        place = self.dataset / SETTINGS_FILE
        if place.is_file() and _without(json.loads(place.read_bytes()), "made") == stamp:
            return True
        begun = draft / SETTINGS_FILE
        if not (begun.is_file() and json.loads(begun.read_bytes()) == stamp):
            shutil.rmtree(draft, ignore_errors=True)
            draft.mkdir(parents=True)
            write_text(begun, json.dumps(stamp, indent=1) + "\n")
        return False

    def _assemble(
        self,
        draft: Path,
        work: list[Work],
        pools: dict[str, Pool],
        chosen: Any,
        told: Provenance,
        stamp: dict[str, Any],
        sizes: dict[str, dict[str, int]],
    ) -> dict[str, Made]:
        """Annotation files, sizes of shards, and the whole into its place."""
        made: dict[str, Made] = {}
        for name, pool in pools.items():
            own = [one for one in work if one.pool is pool]
            if in_shards(pool):
                for one in own:
                    counted = draft / f"{name}-{one.unit.label}.count"
                    if count := int(counted.read_text()):
                        sizes[name][f"{one.unit.file}.tar"] = count
                    counted.unlink()
                write_sizes(draft / name, sizes[name])
                made[name] = Made(name, None, sum(sizes[name].values()))
                continue
            assert isinstance(pool, RecordPool)
            written = write_records(pool, [one.journal for one in own], draft / name, chosen, told)
            below = [written.path] if isinstance(written.path, str) else written.path
            paths = [f"{name}/{path}" for path in below]
            made[name] = written._replace(path=paths[0] if len(paths) == 1 else paths)
        if not any(one.texts for one in made.values()):
            raise DataError(
                f"run.keep: nothing is kept of any text; see the scores in '{self.scored}', and go on with"
                " other thresholds and run.resume=auto"
            )
        settings = stamp | {"made": {name: list(one) for name, one in made.items()}}
        write_text(draft / SETTINGS_FILE, json.dumps(settings, indent=1) + "\n")
        shutil.rmtree(self.dataset, ignore_errors=True)
        draft.rename(self.dataset)
        return made

    # What there is to tell

    def _conclude(
        self,
        work: list[Work],
        pools: dict[str, Pool],
        settings: dict[str, Any],
        least: Thresholds,
        made: dict[str, Made],
    ) -> None:
        """Summary, report, list of what cannot be read, and the recipe that trains on what is kept."""
        tallies: dict[str, Tally] = {}
        for name, pool in pools.items():
            tally = tallies[name] = Tally()
            bad: list[BadRecord] = []
            for one in work:
                if one.pool is not pool:
                    continue
                for line in one.journal.lines():
                    tally.add(line, choose(line, self.run.keep, least))
                    if "cause" in line:
                        bad.append(BadRecord(line["cause"], line["picture"], line["detail"]))
            skips = SkipLog(self.folder, self.run.max_bad_ratio)
            skips.judge_all(name, bad, len(bad), max(tally.pictures, 1), "pictures")
        summary = {
            "round": self.number,
            "captioner": settings["captioner"],
            "filter": settings["filter"],
            "thresholds": least,
            "datasets": {name: tally.values() for name, tally in tallies.items()},
        }
        write_text(self.folder / SUMMARY_FILE, json.dumps(summary, indent=1) + "\n")
        for name, tally in tallies.items():
            log.info("round %d: %s: %s", self.number, name, tally.line())
        named = {id(pool): name for name, pool in pools.items()}
        write_report(
            self.folder, summary, [(named[id(one.pool)], one.unit, one.journal) for one in work], least
        )
        recipe = next_recipe(self.config, self.run, self.dataset, made)
        if recipe is not None:
            write_text(self.folder / RECIPE_FILE, dump(recipe))
            log.info("train on it with: blip train --cfg %s", self.folder / RECIPE_FILE)
        else:
            for name, result in made.items():
                log.info("datasets.%s.path=%s", name, self.dataset / str(result.path))


def open_pools(config: Config, web: dict[str, list[str]]) -> dict[str, Pool]:
    """The web datasets as units of work; NAME, or NAME-SPLIT where one has several splits."""
    run, found = config.run, {}
    for name, splits in web.items():
        for split in splits:
            key = name if len(splits) == 1 else f"{name}-{split}"
            section = config.datasets[name]
            found[key] = on_all(partial(open_pool, name, section, split, run.part_size, run.data_root))
    return found


def _web_sets(config: Config) -> dict[str, list[str]]:
    """The datasets that are cleaned, each with those of its splits that are to be trained on.

    Raises:
        ConfigError: there is none, or a name of a human one that is none.
    """
    run = config.run
    for name in run.human:
        if name not in config.datasets:
            raise ConfigError(f"run.human: no dataset {name!r}{hint(name, config.datasets)}")
    web = {
        name: [s for s in run.train_splits if s in available_splits(name, section, run.data_root)]
        for name, section in config.datasets.items()
        if name not in run.human
    }
    if not web:
        raise ConfigError("datasets: there is none whose texts are not human, so nothing to clean; name one")
    if without := [name for name, splits in web.items() if not splits]:
        raise ConfigError(
            f"run.train_splits: datasets.{without[0]} has none of {', '.join(run.train_splits)}; name one"
        )
    return web


def _check(config: Config, web: dict[str, list[str]]) -> None:
    """Raise where files or recipes are missing, before anything is trained."""
    run = config.run
    require_files([(n, config.datasets[n], s) for n, splits in web.items() for s in splits], run.data_root)
    wanted = [run.captioner] * bool(run.captions.num) + [run.filter] * run.keep.needs_scores + [run.pretrain]
    for expert in wanted:
        if expert.recipe is not None:
            recipe = load_config(expert.recipe, [*expert.options, *passed_on(run)])
            splits = [
                (name, section, split)
                for name, section in recipe.datasets.items()
                for split in recipe.run.train_splits
                if split in available_splits(name, section, recipe.run.data_root)
            ]
            require_files(splits, recipe.run.data_root)


def _open(config: Config) -> Path:
    """The run folder, with what this run is made of."""
    folder = open_folder(config)
    if config.run.overwrite and config.run.resume is None:
        for leftover in folder.glob("round-*"):
            shutil.rmtree(leftover)
    write_text(folder / CONFIG_FILE, dump(config))
    write_text(folder / ENV_FILE, json.dumps(describe(), indent=2, ensure_ascii=False) + "\n")
    return folder


def _finished(place: Path) -> bool:
    """Whether a training run has come to its end: its report is the last that it writes."""
    return (place / REPORT_FILE).is_file() and (place / MODEL_FOLDER).is_dir()


def _bootstrap_of(run: CapFiltRun, experts: Sequence[Expert | None], parallel: Parallel) -> Bootstrap:
    captioner, judge = experts
    strap = Bootstrap(
        captioner,
        judge,
        run.captions,
        parallel.device,
        parallel.autocast,
        run.seed,
        run.batch_size_eval,
        run.web_texts,
    )
    if strap.shares_tower:
        log.info("captioner and filter see the same: their tower looks once")
    return strap


def _try(config: Config, web: dict[str, list[str]]) -> None:
    """A dry run: data, and one batch of what can be done without training."""
    run = config.run
    pools = open_pools(config, web)
    for name, pool in pools.items():
        log.info("%s: %d pictures in %d units of work", name, pool.num_pictures, len(pool.units()))
    parallel = Parallel(run)
    wanted = [run.captioner if run.captions.num else None, run.filter if run.keep.needs_scores else None]
    there = [None if one is None or one.recipe is not None else one for one in wanted]
    for one in wanted:
        if one is not None and one.recipe is not None:
            log.info("%s would be trained from %s", one.recipe, config.model.init_from or "its own start")
    captioner, judge = there
    experts = [
        None if captioner is None else load_expert("caption", captioner, parallel.device),
        None if judge is None else load_expert("match", judge, parallel.device),
    ]
    if not any(experts):
        return
    strap = _bootstrap_of(run, experts, parallel)
    pool = next(iter(pools.values()))
    unit: Unit = pool.units()[0]
    for pictures in load_batches(unit, strap.views, run.batch_size_eval, 0, 0):
        for line in strap(pictures, f"{pool.name}/1")[:8]:
            log.info("%s", json.dumps(line))
        break
    if torch.cuda.is_available():
        log.info("%.1f GB of GPU memory at most", torch.cuda.max_memory_allocated() / 1e9)


def _lines(work: Sequence[Work]) -> Iterator[dict[str, Any]]:
    for one in work:
        yield from one.journal.lines()


def _without(values: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in values.items() if name != key}


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) < 120 else f"{text[:117]}..."
