from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from blip.config.files import dump
from blip.config.load import load_config
from blip.config.schema import Config, DatasetConfig
from blip.errors import ConfigError
from blip.registry import MODELS, PROCESSORS, TASKS

Write = Callable[[str], str]

BASIC = """
model: {arch: blip2, model_type: coco, vit: {width: 64}}
datasets:
  mine:
    path: pairs.json
    vis_processor: {train: {name: blip_image_train, image_size: 96}}
run: {task: image_text_pretrain, max_iters: 10, init_lr: 3e-4}
"""


def problems(name: str, *overrides: str, known: list[str] | None = None) -> list[str]:
    """What is wrong with a configuration, one entry per problem."""
    with pytest.raises(ConfigError) as caught:
        load_config(name, overrides, known_datasets=known)
    head, *rest = str(caught.value).split("\n  ")
    return rest or [head]


def test_later_sources_win_and_every_value_knows_its_own(write: Write) -> None:
    config = load_config(write(BASIC), ["run.seed=7", "model.vit.width=32"])
    expected = MODELS.get("blip2").config_class(arch="blip2", model_type="coco", image_size=364)
    assert asdict(config.model) == asdict(expected) | {"vit": {"width": 32, "depth": 39}}
    assert (config.run.seed, config.run.init_lr, config.run.max_iters) == (7, 3e-4, 10)
    wanted = {
        "name": "default",
        "model.arch": "recipe.yaml",
        "model.image_size": "preset blip2/coco",
        "model.vit.depth": "preset blip2/coco",
        "model.vit.width": "command line",
        "model.dropout": "default",
        "datasets.mine.vis_processor.train.image_size": "recipe.yaml",
        "datasets.mine.lanes": "default",
        "run.init_lr": "recipe.yaml",
        "run.seed": "command line",
        "run.min_lr": "default",
    }
    assert {key: config.origins[key] for key in wanted} == wanted


def test_a_model_type_from_the_command_line_brings_its_own_preset(write: Write) -> None:
    config = load_config(write(BASIC), ["model.model_type=pretrain"])
    model: Any = config.model
    assert (model.model_type, model.image_size, model.vit.depth) == ("pretrain", 224, None)
    assert config.origins["model.model_type"] == "command line"


def test_without_a_model_type_the_first_preset_is_used(write: Write) -> None:
    config = load_config(write(BASIC.replace("model_type: coco, ", "")))
    assert (config.model.model_type, config.origins["model.model_type"]) == ("pretrain", "default")


def test_the_task_decides_which_run_keys_exist(write: Write) -> None:
    name = write(BASIC)
    config = load_config(name, ["run.task=retrieval", "run.k_test=16"])
    assert type(config.run) is TASKS.get("retrieval").run_config_class
    assert asdict(config.run)["k_test"] == 16


def test_whole_numbers_may_be_written_as_powers_and_numbers_as_text(write: Write) -> None:
    name = write(BASIC)
    overrides = ["run.max_iters=1e3", "run.min_lr='1e-6'", "model.vit.depth=2.0", "run.valid_splits=val"]
    config = load_config(name, overrides)
    assert (config.run.max_iters, type(config.run.max_iters)) == (1000, int)
    assert (config.run.min_lr, config.run.valid_splits) == (1e-6, ["val"])
    assert asdict(config.model)["vit"]["depth"] == 2


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        # misspelt
        ("run.max_iter=3", "run.max_iter (command line): no such key; did you mean run.max_iters?"),
        ("model.vit.dept=3", "model.vit.dept (command line): no such key; did you mean model.vit.depth?"),
        ("modell.dropout=0", "modell (command line): no such key; did you mean model?"),
        ("run.zzzz=1", "run.zzzz (command line): no such key; --print-config lists the keys"),
        ("model.vit.zzzz=1", "model.vit.zzzz (command line): no such key; choose from width, depth"),
        # right key, wrong section
        ("run.freeze_vit=true", "run.freeze_vit (command line): no such key; did you mean model.freeze_vit?"),
        ("model.max_iters=3", "model.max_iters (command line): no such key; did you mean run.max_iters?"),
        ("max_iters=3", "max_iters (command line): no such key; did you mean run.max_iters?"),
        ("model.depth=3", "model.depth (command line): no such key; did you mean model.vit.depth?"),
        ("run.freeze_vitt=1", "run.freeze_vitt (command line): no such key; did you mean model.freeze_vit?"),
        (
            "datasets.mine.min_scale=0.2",
            "datasets.mine.min_scale (command line): no such key;"
            " did you mean datasets.mine.vis_processor.train.min_scale?",
        ),
        # wrong type
        ("run.max_iters=lots", "run.max_iters (command line): 'lots' is not a whole number or null"),
        ("run.max_iters=1.5", "run.max_iters (command line): 1.5 is not a whole number or null"),
        ("run.seed=null", "run.seed (command line): None is not a whole number"),
        ("run.init_lr=[1]", "run.init_lr (command line): [1] is not a number"),
        ("run.init_lr=.nan", "run.init_lr (command line): nan is not a number"),
        ("run.drop_last=maybe", "run.drop_last (command line): 'maybe' is not true or false"),
        ("run.num_workers=true", "run.num_workers (command line): True is not a whole number"),
        ("run.resume=true", "run.resume (command line): True is not a text or null"),
        ("run.train_splits={a: 1}", "run.train_splits (command line): {'a': 1} is not a list of texts"),
        ("model.vit=3", "model.vit (command line): 3 is not a section of keys and values"),
        ("model=3", "model (command line): 3 is not a section of keys and values"),
        (
            "run.precision=bf61",
            "run.precision (command line): 'bf61' is not one of auto, bf16, fp16, fp32; did you mean 'bf16'?",
        ),
        (
            "run.device=tpu",
            "run.device (command line): 'tpu' is not one of auto, cuda, cpu; did you mean 'cpu'?",
        ),
        # unknown names
        ("model.arch=blip3", "model.arch (command line): unknown model 'blip3'; did you mean 'blip2'?"),
        (
            "run.task=retrievel",
            "run.task (command line): unknown task 'retrievel'; did you mean 'retrieval'?",
        ),
        (
            "model.model_type=cocoo",
            "model.model_type (command line): blip2 has no type 'cocoo'; did you mean 'coco'?",
        ),
        (
            "datasets.mine.vis_processor.train.name=blip_image_trian",
            "datasets.mine.vis_processor.train.name (command line): unknown processor 'blip_image_trian';"
            " did you mean 'blip_image_train'?",
        ),
        # processor options
        (
            "datasets.mine.vis_processor.train.img_size=96",
            "datasets.mine.vis_processor.train.img_size (command line): no such key;"
            " did you mean datasets.mine.vis_processor.train.image_size?",
        ),
        (
            "datasets.mine.vis_processor.train.image_size=big",
            "datasets.mine.vis_processor.train.image_size (command line): 'big' is not a whole number",
        ),
        (
            "datasets.mine.vis_processor.train.image_size=0",
            "datasets.mine.vis_processor.train.image_size (command line): 0 is below 1",
        ),
        # impossible combinations
        ("run.min_lr=1", "run.min_lr (command line): 1 is above init_lr (0.0003); lower it or raise init_lr"),
        ("model.vit.depth=0", "model.vit.depth (command line): 0 is below 1"),
        ("model.head.layers=0", "model.head.layers (command line): 0 is below 1"),
        ("datasets.mine.lanes=0", "datasets.mine.lanes (command line): 0 is below 1"),
        # data only
        (
            "run.output_dir=${oc.env:HOME}",
            "run.output_dir (command line): '${oc.env:HOME}' would be computed, and a recipe is data;"
            " write the value out",
        ),
        ("run.output_dir=???", "run.output_dir (command line): '???' stands for a missing value; give one"),
        (
            "datasets.other=a.csv",
            "datasets.other (command line): 'a.csv' is not a section of keys and values; write"
            " datasets.other.path=a.csv",
        ),
        ("datasets.other=3", "datasets.other (command line): 3 is not a section of keys and values"),
        ("name=[1]", "name (command line): [1] is not a text"),
    ],
)
def test_a_mistake_is_named_with_key_source_and_what_is_right(
    write: Write, override: str, problem: str
) -> None:
    assert problems(write(BASIC), override) == [problem]


def test_all_mistakes_are_reported_at_once_with_their_file(write: Write) -> None:
    name = write("""
    model: {arch: blip2, max_iters: 3, vit: {dept: 1}}
    datasets:
      mine: {path: x.json, formatt: json, vis_processor: {train: {name: blip_image_trian}}}
      scene: {}
    run: {task: image_text_pretrain, batch_size: 8, seed: [1], max_iters: 1}
    """)
    found = problems(name, "run.precision=double", known=["scenes"])
    assert [problem.split(": ")[0] for problem in found] == [
        "model.max_iters (recipe.yaml)",
        "model.vit.dept (recipe.yaml)",
        "run.batch_size (recipe.yaml)",
        "run.seed (recipe.yaml)",
        "run.precision (command line)",
        "datasets.mine.formatt (recipe.yaml)",
        "datasets.scene (recipe.yaml)",
    ]


def test_missing_arch_and_task_are_named_with_the_choice(write: Write) -> None:
    assert problems(write("model: {}\nrun: {max_iters: 1}\n")) == [
        "model.arch (recipe.yaml): missing; choose from blip2, blip2_t5_instruct, blip_caption",
        "run.task (recipe.yaml): missing; choose from captioning, image_text_pretrain, retrieval",
    ]


def test_a_dataset_needs_a_catalogue_name_or_a_path(write: Write) -> None:
    name = write(BASIC)
    assert (
        load_config(name, ["datasets.scenes={}"], known_datasets=["scenes"]).datasets["scenes"]
        == DatasetConfig()
    )
    assert problems(name, "datasets.scene={}", known=["scenes", "coco_caption"]) == [
        "datasets.scene (command line): has no path and is not in the catalogue; did you mean 'scenes'?"
    ]
    # An override for a dataset that the file does not have is most likely a misspelt name.
    assert "did you mean 'mine'" in problems(name, "datasets.mines.max_samples=3", known=["scenes"])[0]


def test_an_empty_dataset_section_means_the_catalogue_entry(write: Write) -> None:
    name = write("model: {arch: blip2}\ndatasets:\n  scenes:\nrun: {task: captioning, max_iters: 1}\n")
    assert load_config(name, known_datasets=["scenes"]).datasets == {"scenes": DatasetConfig()}


def test_the_command_line_leaves_a_dataset_out_with_null(write: Write) -> None:
    name, other = write(BASIC), ["datasets.other.path=b.json"]
    left = load_config(name, ["datasets.mine=null", *other]).datasets
    assert {key: section.path for key, section in left.items()} == {"other": "b.json"}
    assert left["other"].vis_processor == {}
    both = load_config(name, other).datasets
    assert {key: section.path for key, section in both.items()} == {"mine": "pairs.json", "other": "b.json"}
    assert load_config(name, ["datasets={mine: null, other: {path: b.json}}"]).datasets == left
    assert problems(name, "datasets.mein=null") == [
        "datasets.mein (command line): not in recipe.yaml, so it cannot be left out; did you mean 'mine'?"
    ]


def test_a_section_with_nothing_in_it_keeps_the_defaults(write: Write) -> None:
    config = load_config(
        write(BASIC), ["datasets.mine.build_info=null", "model.head=null", "model.vit.depth=3"]
    )
    assert config.datasets["mine"].build_info == {}
    assert asdict(load_config("recipe.yaml", ["model.vit=null", "model.model_type=pretrain"]).model)[
        "vit"
    ] == {
        "width": None,
        "depth": None,
    }


def test_sections_and_processors_merge_key_by_key(write: Write) -> None:
    config = load_config(
        write(BASIC),
        [
            "datasets.mine.vis_processor.train.min_scale=2e-1",
            "model.head.layers=2",
            "datasets.mine.columns={image: file}",
        ],
    )
    assert config.datasets["mine"].vis_processor == {
        "train": {"name": "blip_image_train", "image_size": 96, "min_scale": 0.2}
    }
    assert config.datasets["mine"].columns == {"image": "file"}
    assert asdict(config.model)["head"] == {"layers": 2}


def test_a_section_may_be_unset(write: Write) -> None:
    config = load_config(write(BASIC + "\n"), ["model.head.layers=2", "model.head=null"])
    assert asdict(config.model)["head"] is None


def test_processor_options_get_the_types_of_the_processor(write: Write) -> None:
    config = load_config(write(BASIC), ["datasets.mine.vis_processor.train.mean=[0, '1e-1', 1]"])
    options = config.datasets["mine"].vis_processor["train"]
    assert options["mean"] == [0.0, 0.1, 1.0]
    assert PROCESSORS.get(options.pop("name"))(**options).image_size == 96


@pytest.mark.parametrize("path", ["a.json", ["a.json", "b.json"], {"train": "a.json", "val": ["b.json"]}])
def test_a_path_is_one_several_or_one_per_split(write: Write, path: object) -> None:
    config = load_config(write(BASIC.replace("pairs.json", str(path))))
    assert config.datasets["mine"].path == path


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        [
            "run.output_dir='1e3'",
            "model.head.layers=3",
            "datasets.mine.prompt='a: photo #1 of\n'",
            "run.adam_eps=1e-12",
        ],
        [
            "datasets.mine.path={train: a, val: [b, c]}",
            "run.resume=auto",
            "run.wandb='null'",
            "model.scale=[0.1, 1]",
        ],
    ],
)
def test_what_is_dumped_loads_back_to_an_equal_configuration(write: Write, overrides: list[str]) -> None:
    config = load_config(write(BASIC), overrides)
    for origins in (False, True):
        Path("again.yaml").write_text(dump(config, origins))
        again = load_config("again.yaml")
        assert again == config
        assert again.notes == []


def test_the_printed_configuration_tells_each_origin(write: Write) -> None:
    lines = dump(load_config(write(BASIC), ["run.seed=7"]), origins=True).splitlines()
    found = {line.split(":")[0].strip(): line.partition("#")[2].strip() for line in lines if "#" in line}
    assert (found["seed"], found["image_size"], found["init_lr"]) == (
        "command line",
        "recipe.yaml",
        "recipe.yaml",
    )
    assert (found["beta2"], found["depth"], found["path"]) == ("default", "preset blip2/coco", "recipe.yaml")
    assert len(found) > 60


def test_nobody_sees_omegaconf_after_loading(write: Write) -> None:
    config: Config = load_config(write(BASIC), ["datasets.mine.path={train: [a]}"])
    assert type(config.datasets["mine"].path) is dict
    assert type(config.datasets["mine"].path["train"]) is list
    assert type(config.run.train_splits) is list
    model: Any = config.model
    assert type(model.vit).__name__ == "Tower"
