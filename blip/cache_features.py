"""`python -m blip.cache_features --cfg NAME [key=value ...]`: write the features of a frozen tower once.

For each dataset that the configuration trains on, the tower's states of all pictures are written below
`run.output_dir` (`output/features/<recipe>`); training with `datasets.NAME.features=FOLDER/NAME` then reads
them, and neither decodes pictures nor runs the tower. Continued where it was stopped; several processes share
the work.
"""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from blip import dist
from blip.batch import to_device
from blip.build import build_model, joined, require_frozen, train_sets
from blip.cli import run_command
from blip.config.schema import Config
from blip.data.catalog.table import names
from blip.data.datasets import PairDataset
from blip.data.features import complete, cut, fingerprint, origin_of, part_name, read_part, write_part
from blip.data.samples import BadRecord, SampleMaker, read_image
from blip.data.skips import SkipLog
from blip.engine.parallel import Parallel
from blip.errors import ConfigError

log = logging.getLogger("blip.cache_features")  # `__name__` is `__main__` in a command


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command; see `blip.cli.run_command`."""
    return run_command(
        lambda config, args: cache(config, args.dry_run),
        argv,
        "Write the states that a frozen tower gives of the training pictures, to train without it.",
        prog="blip cache_features",
        known_datasets=names,
    )


def cache(config: Config, dry: bool = False) -> None:
    """Write the features of every dataset that the configuration trains on.

    Args:
        dry: look at one picture of each, say how much there would be, and write nothing.

    Raises:
        BlipError: files are missing, the tower is trained, or pictures are changed at random.
    """
    with joined(config):
        sets = {name: train_sets(config, name) for name in config.datasets}  # before weights are loaded
        parallel = Parallel(config.run)
        model = build_model(config, parallel.device).eval()
        require_frozen(model, "blip cache_features")
        tower = fingerprint(model.vision.state_dict())
        output = Path(config.run.output_dir or f"output/features/{config.name}")
        for name, data in sets.items():
            if data:
                _Writer(config, parallel, model, output / name, tower).write(name, data, dry)


class _Writer:
    """Writes one store."""

    def __init__(self, config: Config, parallel: Parallel, model: Any, folder: Path, tower: str) -> None:
        self.config, self.parallel, self.model, self.folder = config, parallel, model, folder
        self.tower = tower
        self.bad: list[BadRecord] = []

    def write(self, name: str, data: Sequence[Any], dry: bool = False) -> None:
        """All pictures of a dataset, each once; every rank writes its share of the parts."""
        pictures = _pictures(name, data)
        processor = data[0].maker.vis_processor
        each = self._bytes_each(pictures, processor)
        if dry:
            log.info("%s: %d pictures, %.2f GB", name, len(pictures), len(pictures) * each / 1e9)
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        origin = origin_of(self.tower, processor)
        parts = cut(pictures, each)
        started, done = time.perf_counter(), 0
        for number, part in enumerate(parts):
            if number % dist.world_size() != dist.rank():
                continue
            file = self.folder / part_name(number)
            done += self._part(file, {key: pictures[key] for key in part}, processor, origin)
            log.info("%s: part %d of %d, %s", name, number + 1, len(parts), _rate(done, started))
        bad = dist.gather_lists(self.bad)
        SkipLog(self.folder, self.config.run.max_bad_ratio).judge_all(
            name, bad, len(bad), len(pictures), "pictures"
        )
        if dist.is_main():
            complete(self.folder, origin, len(parts))
            size = sum(file.stat().st_size for file in self.folder.glob("part-*.safetensors"))
            log.info(
                "%s: %d pictures, %.2f GB, left out %d; train with datasets.%s.features=%s",
                *(name, len(pictures) - len(bad), size / 1e9, len(bad), name, self.folder),
            )
        dist.barrier()

    def _part(self, file: Path, pictures: dict[str, str], processor: Any, origin: dict[str, Any]) -> int:
        """Number of pictures of a part that were computed: none where it is there already."""
        there = read_part(file)
        if there == (list(pictures), origin):
            return 0
        found, states = [], []
        for keys, some in self._states(pictures, processor):
            found += keys
            states.append(some)
        write_part(file, found, torch.cat(states) if states else torch.empty(0, 0, 0), origin)
        return len(found)

    def _states(self, pictures: dict[str, str], processor: Any) -> Iterator[tuple[list[str], torch.Tensor]]:
        """Names and states (n, P, D) of pictures, in batches; those that cannot be read are noted as bad."""
        run = self.config.run
        loader: Any = DataLoader(
            _Pixels(list(pictures.items()), processor),
            batch_size=run.batch_size_eval,
            num_workers=run.num_workers,
            collate_fn=list,
        )
        norm = processor.norm()
        for rows in loader:
            self.bad += [row for row in rows if isinstance(row, BadRecord)]
            good = [row for row in rows if not isinstance(row, BadRecord)]
            if not good:
                continue
            image = torch.stack([pixels for _, pixels in good])
            batch = {"image": image, "image_norm": norm.expand(len(good), -1, -1)}
            batch = to_device(batch, self.parallel.device)
            with torch.inference_mode(), self.parallel.autocast():
                states = self.model.image_states(batch)
            yield [key for key, _ in good], states.cpu()

    def _bytes_each(self, pictures: dict[str, str], processor: Any) -> int:
        """Size of the states of one picture."""
        for key, path in pictures.items():
            for _, states in self._states({key: path}, processor):
                self.bad.clear()
                return states.nbytes
        return 1


class _Pixels(Dataset[Any]):
    """(name, pixels) of each picture, or what is wrong with it."""

    def __init__(self, pictures: list[tuple[str, str]], processor: Any) -> None:
        self._pictures, self._processor = pictures, processor

    def __len__(self) -> int:
        return len(self._pictures)

    def __getitem__(self, index: int) -> Any:
        key, path = self._pictures[index]
        try:
            return key, self._processor.pixels(read_image(path, key))
        except BadRecord as error:
            return error


def _pictures(name: str, data: Sequence[Any]) -> dict[str, str]:
    """Name -> path of all different pictures, in the order of the records.

    Raises:
        ConfigError: pictures that are no files, videos, or pictures that are changed at random.
    """
    found: dict[str, str] = {}
    for part in data:
        if not isinstance(part, PairDataset):
            raise ConfigError(f"datasets.{name}: pictures in shards have no features; name other files")
        maker: SampleMaker = part.maker
        if maker.of_videos:
            raise ConfigError(f"datasets.{name}: there are features of pictures only, not of videos")
        if getattr(maker.vis_processor, "random", True):
            raise ConfigError(
                f"datasets.{name}.vis_processor.train: it changes pictures at random, and features are of one"
                " view; use {name: blip_image_eval} or clip_image_eval"
            )
        for number in range(len(part.records)):
            try:
                entries = maker.places(part.records[number], "")
            except BadRecord:
                continue  # training counts it
            for entry in entries:
                if isinstance(entry, str):
                    found.setdefault(Path(entry).as_posix(), str(part.records.picture(number, entry)))
    if not found:
        raise ConfigError(f"datasets.{name}: no picture is a file of its own")
    return found


def _rate(count: int, started: float) -> str:
    return f"{count / max(time.perf_counter() - started, 1e-9):.0f} pictures/s"


if __name__ == "__main__":
    sys.exit(main())
