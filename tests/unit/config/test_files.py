from __future__ import annotations

from pathlib import Path

import pytest

from blip.config import files
from blip.config.files import find_config, parse_overrides, read_yaml
from blip.errors import ConfigError


@pytest.fixture
def shelves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory and a package, each with recipes."""
    package = tmp_path / "site" / "blip"
    for name in ("blip2/pretrain_stage1", "tiny/pretrain_stage1", "tiny/vqa", "laptop/vqa", "tiny/only_tiny"):
        path = package / "configs" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("run: {}")
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(files.importlib.resources, "files", lambda _: package)
    return here


@pytest.mark.parametrize(
    ("arch", "task", "name"),
    [
        ("blip2", "image_text_pretrain", "pretrain_stage1"),
        ("blip2", "retrieval", "pretrain_stage1"),
        ("blip_pretrain", "image_text_pretrain", "blip_pretrain"),
        ("blip_caption", "captioning", "blip_caption"),
        ("blip_retrieval", "retrieval", "blip_retrieval"),
        ("blip_vqa", "vqa", "blip_vqa"),
        ("blip_vqa", "aok_vqa", "blip_vqa"),
        ("blip_nlvr", "multimodal_classification", "blip_nlvr"),
        ("blip_classification", "multimodal_classification", "blip_classification"),
        ("blip2_t5", "captioning", "pretrain_stage2"),
        ("blip2_opt", "vqa", "vqa_ft"),
        ("mine", "captioning", None),
    ],
)
def test_the_tiny_recipe_of_a_model_is_of_its_kind(arch: str, task: str, name: str | None) -> None:
    assert files.tiny_recipe(arch, task) == (None if name is None else f"{name}.yaml")


def test_an_unfinished_recipe_is_no_tiny_one(shelves: Path) -> None:
    mine = Path("configs/tiny")
    mine.mkdir(parents=True)
    for name, text in (("a", "run: {"), ("b", "model:"), ("c", "model: {arch: x}\nrun: {task: t}")):
        (mine / f"{name}.yaml").write_text(text)
    assert files.tiny_recipe("x", "t") == "c.yaml"


@pytest.mark.parametrize(
    ("spelling", "name"),
    [
        ("pretrain_stage1", "blip2/pretrain_stage1"),  # a paper's recipe wins over tiny/
        ("pretrain_stage1.yaml", "blip2/pretrain_stage1"),
        ("blip2/pretrain_stage1.yaml", "blip2/pretrain_stage1"),
        ("tiny/pretrain_stage1", "tiny/pretrain_stage1"),
        ("only_tiny", "tiny/only_tiny"),
    ],
)
def test_a_shipped_recipe_is_found_by_any_spelling(shelves: Path, spelling: str, name: str) -> None:
    recipe = find_config(spelling)
    assert (recipe.name, recipe.shown) == (name, f"{name}.yaml")


def test_two_small_recipes_of_one_name_are_ambiguous(shelves: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"several recipes have this name; choose from laptop/vqa, tiny/vqa"
    ):
        find_config("vqa")


def test_an_unknown_recipe_is_answered_with_the_nearest(shelves: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean .*blip2/pretrain_stage1"):
        find_config("pretrain_stage_1.yaml")
    with pytest.raises(ConfigError, match=r"choose from blip2/pretrain_stage1, laptop/vqa, tiny/only_tiny"):
        find_config("zzz")


def test_the_working_directory_comes_before_the_package(shelves: Path) -> None:
    mine = shelves / "configs" / "tiny" / "only_tiny.yaml"
    mine.parent.mkdir(parents=True)
    mine.write_text("run: {}")
    assert find_config("only_tiny").path.resolve() == mine
    assert find_config("only_tiny").shown == "configs/tiny/only_tiny.yaml"
    (shelves / "only_tiny.yaml").write_text("run: {}")
    assert find_config("only_tiny").path == Path("only_tiny.yaml")


def test_a_path_is_taken_as_it_is(shelves: Path, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere.yaml"
    path.write_text("run: {}")
    assert find_config(str(path)).name == "elsewhere"


def test_a_wheel_and_a_checkout_both_have_their_recipes() -> None:
    assert find_config("blip2/pretrain_stage1").name == "blip2/pretrain_stage1"


# Each section has nine times as many values as the one before.
MERGES = "a0: &a0 {x: 1}\n" + "".join(
    f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 9)}]}}\n" for i in range(1, 12)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("run:\n  seed: 1\n  task: x\n  seed: 2\n", "line 4: the key 'seed' stands twice.*first on line 2"),
        ("run: [", "line 1: not valid YAML"),
        ("run:\n\tseed: 1\n", "line 2: not valid YAML"),
        ("run: !!python/object/apply:os.getcwd []", "not valid YAML"),
        ("true: 1", "'true' is not text"),
        ("", "the file is empty"),
        ("- a\n- b\n", "found a list"),
        ("a: &a\n  b: *a\n", "aliases inside themselves"),
        ("a: " + "[" * 5000, "sections in sections"),
        ("a: &a {<<: *a}", "sections in sections"),
        (MERGES, "too many values put in by '<<'"),
        ("#" * (1 << 20) + "\n", "1048577 bytes, and 1048576 are the most"),
    ],
)
def test_what_is_no_plain_data_is_refused_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"^x.yaml.*{message}"):
        read_yaml(path, "x.yaml")


def test_binary_files_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_yaml(path, "x.yaml")


def test_numbers_are_numbers_and_dates_are_texts(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_text("a: 1e-4\nb: 1e6\nc: 2024-01-01\nd: '1e3'\ne: &e {x: 1}\nf: {<<: *e, y: 2}\n")
    tree = read_yaml(path, "x.yaml")
    assert tree == {
        "a": 1e-4,
        "b": 1e6,
        "c": "2024-01-01",
        "d": "1e3",
        "e": {"x": 1},
        "f": {"x": 1, "y": 2},
    }


def test_overrides_are_yaml_values_under_dotted_keys() -> None:
    given = [
        "run.max_iters=1e3",
        "run.output_dir=",
        "run.valid_splits=[val, test]",
        "model.prompt=a: b",
        "run.resume=null",
    ]
    assert parse_overrides(given) == [
        (("run", "max_iters"), 1000.0),
        (("run", "output_dir"), ""),
        (("run", "valid_splits"), ["val", "test"]),
        (("model", "prompt"), "a: b"),
        (("run", "resume"), None),
    ]


def test_overrides_may_be_pairs_as_in_lavis() -> None:
    assert parse_overrides(["run.seed", "3", "run.task", "x"]) == [
        (("run", "seed"), 3),
        (("run", "task"), "x"),
    ]


@pytest.mark.parametrize("item", ["run.seed", "=3", "run..seed=3"])
def test_what_is_no_override_is_refused(item: str) -> None:
    with pytest.raises(ConfigError, match="write key=value"):
        parse_overrides([item])
