"""Rounds of CapFilt: fine-tune captioner and filter, caption and judge, keep, and train anew.

FOLDER/config.yaml, env.json
FOLDER/round-1/captioner/, filter/    runs of fine-tuning, where there are recipes
FOLDER/round-1/scored/NAME/           journals: what was found about every picture
FOLDER/round-1/dataset/, made.json    what is kept
FOLDER/round-1/summary.json, report.html, skipped.jsonl
FOLDER/round-1/train.yaml             the recipe that trains on it
FOLDER/round-2/start.json, pretrain/  a further round begins with that
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch

from blip import dist
from blip.atomic import PARTIAL, write_text
from blip.build import joined
from blip.capfilt.bootstrap import Bootstrap, bad_line, load_batches, load_expert
from blip.capfilt.dataset import Dataset
from blip.capfilt.next_recipe import next_recipe, passed_on
from blip.capfilt.output import Made, Provenance, in_shards
from blip.capfilt.report import write_report
from blip.capfilt.select import Tally, Thresholds, choose, thresholds
from blip.capfilt.sharing import Claims, Progress
from blip.capfilt.truth import truth_of
from blip.capfilt.tuning import short, trained
from blip.capfilt.work import Pool, Work, check, lines_of, open_pools, web_sets, work_of
from blip.config.files import dump
from blip.config.schema import Config
from blip.data.samples import BadRecord
from blip.data.skips import SKIPPED_FILE, SkipLog
from blip.engine.environment import describe
from blip.engine.parallel import Parallel
from blip.engine.run_folder import CONFIG_FILE, ENV_FILE, open_folder
from blip.engine.signals import StopSignals
from blip.errors import ConfigError, DataError, Stopped
from blip.tasks.capfilt import CapFiltRun, ExpertConfig
from blip.together import on_all, on_main

log = logging.getLogger("blip.capfilt")

SETTINGS_FILE = "settings.json"
START_FILE = "start.json"
"""Of a further round: what the dataset was made with that its model is trained on."""
SUMMARY_FILE = "summary.json"
RECIPE_FILE = "train.yaml"


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
    web = web_sets(config)
    with joined(config):
        on_all(lambda: check(config, web))
        if dry:
            _try(config, web)
            return
        on_main(lambda: _look_at_experts(config.run))
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
                except BaseException:
                    if dist.is_main():
                        _abandon(folder)
                    raise


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
        self.before, self.after = folder / f"round-{number - 1}", folder / f"round-{number + 1}"
        self.folder = folder / f"round-{number}"
        self.scored = self.folder / "scored"

    def carry_out(self, start: str | None) -> str | None:
        """All of it; returns what the captioner and filter of the next round start from.

        Args:
            start: what those of this round start from.
        """
        on_main(self._begin)
        if self.number > 1:
            on_main(self._same_start)
            start = self._train("pretrain", str(self.before / RECIPE_FILE), [])
        run = self.run
        captioner = self._made("captioner", run.captioner, start) if run.captions.num else None
        judge = self._made("filter", run.filter, start) if run.keep.needs_scores else None
        self._bootstrap(captioner, judge)
        return start

    def _begin(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(f"{PARTIAL}*.*"):  # of a process that was killed
            leftover.unlink()

    def _same_start(self) -> None:
        """Note what the dataset that this round begins with was made with, or compare.

        Raises:
            ConfigError: it was another one.
        """
        place, now = self.folder / START_FILE, (self.before / "dataset" / SETTINGS_FILE).read_text()
        if not place.is_file():
            write_text(place, now)
        elif place.read_text() != now:
            raise ConfigError(
                f"run.keep: '{self.folder}' was begun with what other rules have kept of round"
                f" {self.number - 1}; remove that folder, or give the rules of before"
            )

    def _made(self, name: str, expert: ExpertConfig, start: str | None) -> ExpertConfig:
        """Weights of the captioner or filter, fine-tuned where there is a recipe."""
        recipe = expert.tuned_by
        if recipe is None:
            return expert
        begin = [f"model.init_from={json.dumps(start)}"] if start is not None else []
        return ExpertConfig(checkpoint=self._train(name, recipe, [*begin, *expert.options]))

    def _train(self, name: str, recipe: str, options: Sequence[str]) -> str:
        """Run a recipe of `blip train`, if that has not been done; returns its folder."""
        place = trained(self.folder / name, recipe, [*options, *passed_on(self.run)])
        if self.signals.received:
            raise Stopped(self.signals.received)
        return place

    def _bootstrap(self, captioner: ExpertConfig | None, judge: ExpertConfig | None) -> None:
        run = self.run
        pools = open_pools(self.config, self.web)
        parallel = Parallel(run)
        strap = load_bootstrap(run, captioner, judge, parallel)
        settings = self._settings(strap, pools, parallel.precision)
        work = work_of(pools, self.scored)
        on_main(lambda: self._same_settings(settings))
        self._score(strap, work, pools)
        del strap
        on_main(lambda: self._list_unreadable(work, pools))
        least = on_main(lambda: thresholds(run.keep, lines_of(work)))
        told = Provenance(settings["captioner"], settings["filter"], self.number)
        dataset = Dataset(self.folder, run.keep, told, least, self._stopping)
        made = dataset.write(work, pools, self._meet)
        on_main(lambda: self._conclude(work, pools, told, least, made, dataset.place))

    def _settings(self, strap: Bootstrap, pools: list[Pool], precision: str) -> dict[str, Any]:
        """What journals depend on."""
        run = self.run
        return {
            "captioner": strap.captioner.id if strap.captioner else None,
            "filter": strap.judge.id if strap.judge else None,
            "captions": asdict(run.captions) if strap.captioner else None,
            "web_texts": run.web_texts,
            "seed": run.seed,
            "precision": precision,
            "batch_size": run.batch_size_eval,
            "datasets": {pool.name: pool.describe() for pool in pools},
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
                f"run.output_dir: '{self.scored}' was begun with another {key} ({short(known.get(key))}, now"
                f" {short(settings[key])}); give another folder, or run.overwrite=true"
            )

    # Captions and scores

    def _score(self, strap: Bootstrap, work: list[Work], pools: list[Pool]) -> None:
        """Write what is missing of the journals; the ranks take one unit after the other."""
        total = sum(pool.num_pictures for pool in pools)
        with Claims(self.scored) as claims, Progress(total) as progress:
            skips = SkipLog(None, self.run.max_bad_ratio)
            for one in work:
                if self._stopping():
                    break
                pictures = one.journal.pictures
                if pictures is not None and (not one.journal.lost or self._settled):
                    progress.skip(pictures)
                elif claims.take(one.name):
                    self._score_unit(strap, one, skips, progress)
            self._meet()

    def _score_unit(self, strap: Bootstrap, one: Work, skips: SkipLog, progress: Progress) -> None:
        run, size, unit, count = self.run, self.run.batch_size_eval, one.unit, len(one.unit)
        start = one.journal.begin(size, count)
        progress.skip(start)
        for pictures in load_batches(unit, strap.views, size, start, run.num_workers):
            one.journal.add(strap(pictures, f"{one.pool.name}/{self.number}"))
            bad = [(one.pool.name, picture.bad) for picture in pictures if picture.bad is not None]
            skips.update(bad, len(pictures) - len(bad))
            try:
                skips.judge_own()
            except DataError as error:
                raise self._told(error) from error
            progress.add(len(pictures))
            if self._stopping():
                return
        one.journal.end([bad_line(error) for error in unit.close()], count)

    @property
    def _settled(self) -> bool:
        """Whether a further round's model learns from what was found here."""
        return (self.after / START_FILE).is_file()

    def _stopping(self) -> bool:
        return self.signals.received is not None

    def _meet(self) -> None:
        """Wait for the other ranks, and stop if one of them is asked to."""
        if dist.any_flags([self._stopping()])[0]:
            raise Stopped(self.signals.received or "a signal on another rank")

    # What there is to tell

    def _list_unreadable(self, work: list[Work], pools: list[Pool]) -> None:
        """List bad pictures and shards in the round's folder, and judge their shares.

        Raises:
            DataError: too large a share is bad.
        """
        (self.folder / SKIPPED_FILE).unlink(missing_ok=True)  # it may list what could be read now
        for pool in pools:
            own = [one for one in work if one.pool is pool]
            bad: list[BadRecord] = []
            shards: list[BadRecord] = []
            total = 0
            for line in lines_of(own):
                total += not line.get("whole")
                if "cause" in line:
                    bad.append(BadRecord(line["cause"], line["picture"], line["detail"]))
                    shards += bad[-1:] if line.get("whole") else []
            if lost := [one.unit.file for one in own if one.journal.lost]:
                few = ", ".join(lost[:5]) + (", ..." if len(lost) > 5 else "")
                again = "" if self._settled else "; to go on with run.resume=auto tries them again"
                log.warning(
                    "%s: %d of %d shards could not be read (%s)%s", pool.name, len(lost), len(own), few, again
                )
            skips = SkipLog(self.folder, self.run.max_bad_ratio)
            try:
                skips.judge_all(pool.name, shards, len(shards), len(own), "shards")
                skips.judge_all(pool.name, bad, len(bad), max(total, 1), "pictures")
            except DataError as error:
                raise self._told(error) from error

    def _told(self, error: DataError) -> DataError:
        """With what to do so that pictures that have been mended are looked at again."""
        return DataError(
            f"{error}; then go on with run.resume=auto, which tries lost shards again, and mended pictures"
            f" where their unit's journal in '{self.scored}' has been removed"
        )

    def _conclude(
        self,
        work: list[Work],
        pools: list[Pool],
        told: Provenance,
        least: Thresholds,
        made: dict[str, Made],
        place: Path,
    ) -> None:
        """Summary, report, and the recipe that trains on what is kept."""
        tallies = {pool.name: Tally() for pool in pools}
        truths = {pool.name: truth_of(pool) for pool in pools}
        for one in work:
            for line in one.journal.lines():
                kept = choose(line, self.run.keep, least)
                tallies[one.pool.name].add(line, kept)
                truths[one.pool.name].add(line, kept)
        summary = {
            "round": self.number,
            "captioner": told.captioner,
            "filter": told.filter,
            "thresholds": least,
            "datasets": {n: tally.values() | truths[n].values() for n, tally in tallies.items()},
        }
        write_text(self.folder / SUMMARY_FILE, json.dumps(summary, indent=1) + "\n")
        for name, tally in tallies.items():
            log.info("round %d: %s: %s", self.number, name, tally.line())
        write_report(self.folder, summary, work, self.run.keep, least)
        before = {pool.name: _size(pool, tallies[pool.name]) for pool in pools}
        recipe = next_recipe(self.config, self.run, place, made, before)
        if recipe is not None:
            write_text(self.folder / RECIPE_FILE, dump(recipe))
            log.info("train on it with: blip train --cfg %s", self.folder / RECIPE_FILE)
        for name, one_made in made.items() if recipe is None else ():
            paths = json.dumps([str((place / path).resolve()) for path in one_made.paths])
            images = f" datasets.{name}.images={json.dumps(one_made.images)}" if one_made.images else ""
            log.info("train on it with datasets.%s.path=%s%s", name, paths, images)


def _size(pool: Pool, tally: Tally) -> int:
    """Texts, or samples of shards, before; pictures where there were no texts."""
    texts = tally.texts["web"] or tally.pictures
    return min(texts, tally.pictures) if in_shards(pool) else texts


def _open(config: Config) -> Path:
    """The run folder, with what this run is made of."""
    folder = open_folder(config)
    if config.run.overwrite and config.run.resume is None:
        for leftover in folder.glob("round-*"):
            shutil.rmtree(leftover)
    write_text(folder / CONFIG_FILE, dump(config))
    write_text(folder / ENV_FILE, json.dumps(describe(), indent=2, ensure_ascii=False) + "\n")
    return folder


def _abandon(folder: Path) -> None:
    """A run that failed before it found anything is in nobody's way."""
    if any(path.is_file() for path in folder.glob("round-*/**/*")):
        return
    for path in (*folder.glob("round-*"), folder / CONFIG_FILE, folder / ENV_FILE):
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def load_bootstrap(
    run: CapFiltRun, captioner: ExpertConfig | None, judge: ExpertConfig | None, parallel: Parallel
) -> Bootstrap:
    """Captioner and filter, on the device."""
    device = parallel.device
    writes = None if captioner is None else on_all(lambda: load_expert("caption", captioner, device))
    judges = None if judge is None else on_all(lambda: load_expert("match", judge, device))
    where = (parallel.device, parallel.autocast)
    strap = Bootstrap(writes, judges, run.captions, *where, run.seed, run.batch_size_eval, run.web_texts)
    if strap.shares_tower:
        log.info("captioner and filter see the same: their tower looks once")
    return strap


def _look_at_experts(run: CapFiltRun) -> None:
    """Raise where weights that are named cannot do it, before the other model is trained for hours."""
    wanted: list[tuple[Literal["caption", "match"], ExpertConfig]] = []
    wanted += [("caption", run.captioner)] * bool(run.captions.num)
    wanted += [("match", run.filter)] * run.keep.needs_scores
    if any(expert.tuned_by is not None for _, expert in wanted):
        for task, expert in wanted:
            if expert.tuned_by is None:
                load_expert(task, expert, torch.device("cpu"))


def _try(config: Config, web: dict[str, list[str]]) -> None:
    """A dry run: data, and one batch of what can be done without training."""
    run = config.run
    pools = open_pools(config, web)
    for pool in pools:
        log.info("%s: %d pictures in %d units of work", pool.name, pool.num_pictures, len(pool.units()))
    wanted = {"captioner": bool(run.captions.num), "filter": run.keep.needs_scores}
    there: dict[str, ExpertConfig | None] = dict.fromkeys(wanted)
    for name in (name for name, needed in wanted.items() if needed):
        expert: ExpertConfig = getattr(run, name)
        if expert.tuned_by is None:
            there[name] = expert
        else:
            log.info("%s: %s would make it", name, expert.tuned_by)
    if not any(there.values()):
        return
    strap = load_bootstrap(run, there["captioner"], there["filter"], Parallel(run))
    for pictures in load_batches(pools[0].units()[0], strap.views, run.batch_size_eval, 0, 0):
        for line in strap(pictures, f"{pools[0].name}/1")[:8]:
            log.info("%s", json.dumps(line))
        break
    if torch.cuda.is_available():
        log.info("%.1f GB of GPU memory at most", torch.cuda.max_memory_allocated() / 1e9)
