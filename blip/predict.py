"""`python -m blip.predict {caption,vqa,match,features,chat} IMAGE...`: one-off inference from the shell.

    blip predict caption photos/ --checkpoint output/RUN
    blip predict vqa photo.jpg --question "what color is it?" --model blip_vqa
    blip predict match photo.jpg --text "a dog" --text "a cat" --checkpoint blip2_pretrained.pth
    blip predict features photos/ --output features.safetensors --checkpoint output/RUN
    blip predict chat photo.jpg --checkpoint FOLDER

Weights of any of the three layouts are read (`--checkpoint`), or those that LAVIS publishes for `--model`;
what their tensors cannot tell is given by `--set key=value`. A picture that cannot be read is named and
skipped.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from blip.cli import guard, import_modules, set_up_logging
from blip.config.typed import model_overrides
from blip.data.samples import BadRecord, read_image
from blip.errors import DataError, UsageError
from blip.registry import MODELS
from blip.weights import save_safetensors, some
from blip.zoo import from_pretrained, load_model, load_preprocess

log = logging.getLogger("blip.predict")  # `__name__` is `__main__` in a command

PICTURES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff")
DEFAULTS = {
    "caption": "blip_caption",
    "vqa": "blip_vqa",
    "match": "blip_image_text_matching",
    "features": "blip_feature_extractor",
    "chat": "blip2_vicuna_instruct",
}
"""Task -> the model that does it, where neither model nor checkpoint is given."""
NEEDS = {
    "caption": "generate",
    "vqa": "predict_answers",
    "match": "forward",
    "features": "extract_features",
    "chat": "chat",
}
"""Task -> the method that a model needs for it."""
RELATIVES = {
    ("blip_pretrain", "caption"): "blip_caption",
    ("blip_pretrain", "match"): "blip_image_text_matching",
    ("blip_retrieval", "match"): "blip_image_text_matching",
    ("blip_pretrain", "features"): "blip_feature_extractor",
    ("blip_retrieval", "features"): "blip_feature_extractor",
    ("blip2", "match"): "blip2_image_text_matching",
    ("blip2_feature_extractor", "match"): "blip2_image_text_matching",
}
"""Model and task -> the model that does it with the same weights, all of whose parts are among them."""

UNUSED = ("temp", "twin.", "queue.")
"""What training alone needs."""


def main(argv: Sequence[str] | None = None) -> int:
    """Exit code of the command: 0 done, 2 nothing could be done."""
    args = _parser().parse_args(argv)
    set_up_logging()
    return guard(lambda: _run(args), debug=args.debug)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="blip predict", description="Captions, answers, matches, features.")
    common = argparse.ArgumentParser(add_help=False)
    add = common.add_argument
    add("images", nargs="+", metavar="IMAGE", help="picture, or folder of pictures")
    add("--model", metavar="NAME", help="registry name; default: that of the checkpoint, else the task's")
    add("--model-type", metavar="TYPE", help="such as base_coco or pretrain_opt2.7b")
    add("--checkpoint", metavar="WEIGHTS", help="run folder, LAVIS's .pth, Hugging Face folder or hub id")
    text = "key of the section model that tensors cannot tell, such as vit.heads=12; may be repeated"
    add("--set", dest="overrides", action="append", default=[], metavar="KEY=VALUE", help=text)
    add("--device", help="default: cuda if there is one, else cpu")
    add("--batch-size", type=int, default=8, help="pictures at once; default: 8")
    add("--json", action="store_true", help="one JSON object a line")
    add("--import", dest="imports", action="append", default=[], metavar="MODULE", help="registers models")
    add("--debug", action="store_true", help="show tracebacks")
    tasks = parser.add_subparsers(dest="task", required=True, metavar="{" + ",".join(NEEDS) + "}")

    def task(name: str, text: str) -> Callable[..., Any]:
        return tasks.add_parser(name, help=text, description=text, parents=[common]).add_argument

    writes: dict[str, dict[str, Any]] = {
        "--num-beams": {"type": int, "help": "default: the model's"},
        "--max-length": {"type": int, "help": "in tokens; default: the model's"},
        "--min-length": {"type": int, "help": "in tokens; default: the model's"},
        "--top-p": {"type": float, "help": "draw words from the likeliest that have this share"},
        "--seed": {"type": int, "help": "of what is drawn"},
    }
    add = task("caption", "describe pictures")
    add("--prompt", help="how captions begin; default: the model's")
    add("--num-captions", type=int, default=1, help="for each picture; default: 1")
    for flag, how in writes.items():
        add(flag, **how)
    add = task("vqa", "answer a question about pictures")
    add("--question", required=True, action="append", help="may be repeated: each is asked of each picture")
    add("--answer", action="append", help="one of the possible answers, which are then ranked; repeat it")
    add("--prompt", help="with {} for the question; default: the model's")
    add("--num-beams", type=int, help="default: the model's")
    add = task("match", "tell how well pictures and texts fit")
    add("--text", required=True, action="append", help="may be repeated")
    add("--head", choices=["itm", "itc"], default="itm", help="itm: probability; itc: cosine; default: itm")
    add = task("features", "write features of pictures, of texts, or of both")
    add("--text", action="append", help="one for all pictures, or one for each")
    add("--mode", choices=["image", "text", "multimodal"], help="default: multimodal with a text, else image")
    add("--output", required=True, metavar="FILE", help="a .safetensors to write")
    add = task("chat", "talk about a picture; what is said is read line by line")
    add("--message", action="append", help="instead of reading lines; may be repeated")
    for flag, how in writes.items():
        add(flag, **how)
    return parser


def _run(args: argparse.Namespace) -> None:
    import_modules(args.imports)
    files = list(_files(args.images))
    _check(args, files)
    taken = {*signature(from_pretrained).parameters, *signature(load_model).parameters}
    overrides = model_overrides(args.overrides, taken)
    model = model_for(args.task, args.model, args.model_type, args.checkpoint, args.device, **overrides)
    _Job(args, model, files).run()


def _check(args: argparse.Namespace, files: Sequence[Path]) -> None:
    """Raise UsageError for what cannot be done, before anything large is read."""
    if args.batch_size < 1:
        raise UsageError(f"--batch-size: {args.batch_size} is below 1")
    if args.task == "chat" and len(files) != 1:
        raise UsageError(f"chat: one picture, not {len(files)}")
    if args.task == "features":
        texts = args.text or ()
        if len(texts) not in (0, 1, len(files)):
            raise UsageError(
                f"--text: {len(texts)} texts; give one, or one for each of the {len(files)} pictures"
            )
        if args.mode in ("text", "multimodal") and not texts:
            raise UsageError(f"--mode {args.mode} needs --text")
        twice = next((file for number, file in enumerate(files) if file in files[:number]), None)
        if twice is not None:
            raise UsageError(f"features: '{twice}' is given twice; features are named by their pictures")
        if not Path(args.output).absolute().parent.is_dir():
            raise UsageError(f"--output {args.output}: there is no such folder; make it first")


def model_for(
    task: str,
    name: str | None = None,
    model_type: str | None = None,
    checkpoint: str | None = None,
    device: str | None = None,
    **overrides: Any,
) -> Any:
    """The model for a task; weights that were trained for another one become that of its relative.

    Args:
        task: one of `NEEDS`.
        name, model_type: registry name and preset; None: those of the checkpoint, else the task's own.
        checkpoint: as `from_pretrained` takes it; None: the published weights.
        device: None: a GPU if there is one.
        **overrides: configuration values, as of `from_pretrained`.

    Raises:
        UsageError: the model cannot do it.
        CheckpointError, ConfigError: as of `from_pretrained` and `load_model`.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if checkpoint is None:
        model = load_model(name or DEFAULTS[task], model_type, True, device, **overrides)
    else:
        model = from_pretrained(checkpoint, device, True, name, model_type, **overrides)
        other = RELATIVES.get((model.config.arch, task))
        if name is None and other and not _can(model, task):
            model = from_pretrained(checkpoint, device, True, other, model_type, **overrides)
    if not _can(model, task):
        able = [known for known in MODELS.names() if _can(MODELS.get(known), task)]
        raise UsageError(
            f"{task}: {model.config.arch} cannot do that; give weights (--checkpoint) or the name (--model)"
            f" of one that can: {', '.join(able)}"
        )
    if lacking := [name for name in model.unknown if not name.startswith(UNUSED)]:
        raise UsageError(
            f"--model {model.config.arch}: the weights have no {some(lacking)}, which would be random; give"
            " weights of that model, or leave --model out"
        )
    return model


def _can(model: Any, task: str) -> bool:
    method = getattr(model, NEEDS[task], None)
    # Every model has a `forward`; that of a judge of pairs chooses a head, others train.
    return method is not None and (task != "match" or "match_head" in signature(method).parameters)


def _files(given: Sequence[str]) -> Iterator[Path]:
    """The pictures that were named; those of a folder in the order of their names.

    Raises:
        DataError: no such file or folder, or a folder without pictures.
    """
    for name in given:
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(p for p in path.iterdir() if p.suffix.lower() in PICTURES and p.is_file())
            if not found:
                raise DataError(f"'{name}': no pictures in this folder ({', '.join(PICTURES)})")
            yield from found
        elif path.is_file():
            yield path
        else:
            raise DataError(f"'{name}': no such file or folder")


class _Job:
    """One task on some pictures."""

    def __init__(self, args: argparse.Namespace, model: Any, files: list[Path]) -> None:
        self.args, self.model, self.files = args, model, files
        self.pictures, self.texts = load_preprocess(model)
        self.skipped = 0

    def run(self) -> None:
        """Do it; what is found is printed or written."""
        getattr(self, f"_{self.args.task}")()
        if self.skipped:
            log.warning("%d of %d pictures could not be read", self.skipped, len(self.files))
        if self.skipped == len(self.files):
            raise DataError("none of the pictures could be read")

    def _batches(self, size: int | None = None) -> Iterator[tuple[list[Path], dict[str, Any]]]:
        """Some files, and the sample dictionary of their pictures."""
        found: list[tuple[Path, int, Tensor]] = []
        for number, file in enumerate(self.files):
            try:
                # As training reads them: 16-bit greys are scaled, and no format is read that runs programs.
                found.append((file, number, self.pictures["eval"](read_image(file, str(file)))))
            except BadRecord as error:
                self.skipped += 1
                log.warning("'%s' is skipped: %s (%s)", file, error.cause, error.detail)
            full = len(found) == (size or self.args.batch_size)
            if found and (full or number + 1 == len(self.files)):
                files, numbers, pictures = zip(*found, strict=True)
                # What is drawn for a picture depends on its number, not on its place in the batch.
                index = torch.tensor(numbers)
                yield list(files), {"image": torch.stack(pictures).to(self.model.device), "index": index}
                found = []

    def _say(self, file: Path, **found: Any) -> None:
        if self.args.json:
            print(json.dumps({"image": str(file), **found}, ensure_ascii=False), flush=True)
        else:
            shown = (f"{v:.4f}" if isinstance(v, float) else str(v) for v in found.values())
            print("\t".join([str(file), *shown]), flush=True)

    def _writing(self) -> dict[str, Any]:
        """Arguments of `generate` that were given."""
        args = self.args
        keys = ("num_beams", "max_length", "min_length", "top_p", "seed")
        given = {key: getattr(args, key) for key in keys if getattr(args, key) is not None}
        return given | ({"use_nucleus_sampling": True} if args.top_p is not None else {})

    def _caption(self) -> None:
        count = self.args.num_captions
        given = self._writing() | {"num_captions": count}
        for files, samples in self._batches():
            if self.args.prompt is not None:
                samples["prompt"] = self.args.prompt
            texts = self.model.generate(samples, **given)
            for number, text in enumerate(texts):
                self._say(files[number // count], caption=text)

    def _vqa(self) -> None:
        args = self.args
        how: dict[str, Any] = {"inference_method": "rank" if args.answer else "generate"}
        how |= {"answer_list": args.answer} if args.answer else {}
        how |= {"prompt": args.prompt} if args.prompt is not None else {}
        how |= {"num_beams": args.num_beams} if args.num_beams is not None else {}
        for files, samples in self._batches():
            for question in args.question:
                asked = {**samples, "text_input": [self.texts["eval"](question)] * len(files)}
                for file, answer in zip(files, self.model.predict_answers(asked, **how), strict=True):
                    self._say(file, question=question, answer=answer)

    @torch.no_grad()
    def _match(self) -> None:
        for files, samples in self._batches():
            for text in self.args.text:
                pair = {**samples, "text_input": [self.texts["eval"](text)] * len(files)}
                found = self.model(pair, match_head=self.args.head)
                if self.args.head == "itm":
                    scores = found.softmax(dim=1)[:, 1].tolist()
                else:  # BLIP gives all pairs, BLIP-2 one score for each
                    scores = (found.diagonal() if found.shape[1] == len(files) else found[:, 0]).tolist()
                for file, score in zip(files, scores, strict=True):
                    self._say(file, text=text, score=score)

    def _features(self) -> None:
        args = self.args
        texts = list(args.text or ())
        mode = args.mode or ("multimodal" if texts else "image")
        if len(texts) == 1:
            texts *= len(self.files)
        of = dict(zip(self.files, texts, strict=True)) if texts else {}
        found: dict[str, Tensor] = {}
        for files, samples in self._batches(1):
            if of:
                samples["text_input"] = [self.texts["eval"](of[file]) for file in files]
            output = self.model.extract_features(samples, mode=mode)
            for name, value in output.items():
                if isinstance(value, Tensor):
                    found[f"{files[0]}/{name}"] = value[0].float()
        if not found:
            return
        save_safetensors(found, args.output, {"mode": mode, "arch": self.model.config.arch})
        for name, tensor in found.items():
            file, _, feature = name.rpartition("/")
            if args.json:
                self._say(Path(file), feature=feature, shape=list(tensor.shape))
            else:
                print(f"{name}\t{tuple(tensor.shape)}")

    def _chat(self) -> None:
        given = self._writing()
        for _, samples in self._batches():
            history: list[tuple[str, str]] = []
            for message in self.args.message or _lines():
                reply, history = self.model.chat(samples, message, history, **given)
                if self.args.json:
                    self._say(self.files[0], message=message, reply=reply)
                else:
                    print(reply, flush=True)


def _lines() -> Iterator[str]:
    """What is typed, or comes through a pipe, until it ends."""
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            return
        if line.strip():
            yield line.strip()


if __name__ == "__main__":
    sys.exit(main())
