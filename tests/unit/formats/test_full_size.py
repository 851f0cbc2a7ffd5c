"""Official weights at full size, on the meta device: every name and every shape, in LAVIS's layout and in
transformers'; what a file is shows without any hint."""

from __future__ import annotations

import socket
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import blip
from blip.formats import hf, lavis
from blip.formats.source import Source, open_source, recognise
from blip.models.published import model_zoo
from blip.zoo import identify
from tests.reference import official_keys as official
from tests.reference.official_keys import BASE, CLIP, EVA, LARGE, Shapes, under

META = torch.device("meta")
TOWER, LLM = "vision.", "llm.model."


class File(NamedTuple):
    """A file that was published, or may be written by LAVIS."""

    arch: str
    model_type: str
    shapes: Callable[[], Shapes]
    lacks: tuple[str, ...] = ()
    """Prefixes of our names that it leaves out."""


def with_tower(parts: Callable[[], Shapes], tower: Callable[[], Shapes]) -> Callable[[], Shapes]:
    return lambda: parts() | under("visual_encoder.", tower())


def tuned(projection: str, width: int) -> Callable[[], Shapes]:
    """Stage 2 tuned with its tower, at 364 pixels."""
    return with_tower(lambda: official.stage2(EVA, projection, width), lambda: official.eva(364))


def complete(trained: Callable[[], Shapes], llm: str, words: Callable[[], Shapes]) -> Callable[[], Shapes]:
    """With the frozen tower and the frozen language model, which LAVIS's runner leaves out."""
    return lambda: with_tower(trained, lambda: official.eva(224))() | under(f"{llm}_model.", words())


FILES: dict[str, File] = {
    # BLIP
    "model_base": File("blip_pretrain", "base", lambda: official.blip_pretrain(BASE), ("queue.ids",)),
    "model_large": File("blip_pretrain", "large", lambda: official.blip_pretrain(LARGE), ("queue.ids",)),
    "model_base_retrieval_coco": File(
        "blip_retrieval", "coco", lambda: official.blip_retrieval(BASE, pointer="ptr_queue")
    ),
    "blip_coco_retrieval": File("blip_retrieval", "coco", lambda: official.blip_retrieval(BASE)),
    "model_large_retrieval_coco": File(
        "blip_retrieval", "large_coco", lambda: official.blip_retrieval(LARGE, pointer="ptr_queue")
    ),
    "blip_coco_caption_base": File("blip_caption", "base_coco", lambda: official.blip_caption(BASE)),
    "model_large_caption": File("blip_caption", "large_coco", lambda: official.blip_caption(LARGE)),
    "model_base_vqa_capfilt_large": File("blip_vqa", "vqav2", official.blip_vqa),
    "model_base_nlvr": File("blip_nlvr", "nlvr", official.blip_nlvr),
    "LAVIS's classification": File("blip_classification", "base", lambda: official.blip_classification(3)),
    "LAVIS's features": File("blip_feature_extractor", "base", official.blip_features),
    "LAVIS's matching, base": File("blip_image_text_matching", "base", lambda: official.blip_matching(BASE)),
    "LAVIS's matching, large": File(
        "blip_image_text_matching", "large", lambda: official.blip_matching(LARGE)
    ),
    # BLIP-2
    "blip2_pretrained": File("blip2", "pretrain", lambda: official.stage1(EVA), (TOWER,)),
    "blip2_pretrained_vitL": File("blip2", "pretrain_vitL", lambda: official.stage1(CLIP), (TOWER,)),
    "blip2_finetune_coco": File(
        "blip2", "coco", with_tower(lambda: official.stage1(EVA), lambda: official.eva(364))
    ),
    "stage 1 with CLIP's tower": File(
        "blip2", "pretrain_vitL", with_tower(lambda: official.stage1(CLIP), official.clip)
    ),
    "blip2_pretrained_opt2.7b": File(
        "blip2_opt", "pretrain_opt2.7b", lambda: official.stage2(EVA, "opt_proj", 2560), (TOWER, LLM)
    ),
    "blip2_pretrained_opt6.7b": File(
        "blip2_opt", "pretrain_opt6.7b", lambda: official.stage2(EVA, "opt_proj", 4096), (TOWER, LLM)
    ),
    "blip2_caption_opt2.7b": File("blip2_opt", "caption_coco_opt2.7b", tuned("opt_proj", 2560), (LLM,)),
    "blip2_caption_opt6.7b": File("blip2_opt", "caption_coco_opt6.7b", tuned("opt_proj", 4096), (LLM,)),
    "blip2_pretrained_flant5xl": File(
        "blip2_t5", "pretrain_flant5xl", lambda: official.stage2(EVA, "t5_proj", 2048), (TOWER, LLM)
    ),
    "blip2_pretrained_flant5xl_vitL": File(
        "blip2_t5", "pretrain_flant5xl_vitL", lambda: official.stage2(CLIP, "t5_proj", 2048), (TOWER, LLM)
    ),
    "blip2_pretrained_flant5xxl": File(
        "blip2_t5", "pretrain_flant5xxl", lambda: official.stage2(EVA, "t5_proj", 4096), (TOWER, LLM)
    ),
    "blip2_caption_flant5xl": File("blip2_t5", "caption_coco_flant5xl", tuned("t5_proj", 2048), (LLM,)),
    "ViT-g with OPT-6.7B": File(
        "blip2_opt",
        "pretrain_opt6.7b",
        complete(lambda: official.stage2(EVA, "opt_proj", 4096), "opt", lambda: official.opt(4096)),
    ),
    "ViT-g with FlanT5-XXL": File(
        "blip2_t5",
        "pretrain_flant5xxl",
        complete(lambda: official.stage2(EVA, "t5_proj", 4096), "t5", lambda: official.t5(4096, 10240, 64)),
    ),
    # InstructBLIP
    "instruct_blip_flanxl_trimmed": File(
        "blip2_t5_instruct", "flant5xl", lambda: official.instruct("t5_proj", 2048), (TOWER, LLM)
    ),
    "instruct_blip_flanxxl_trimmed": File(
        "blip2_t5_instruct", "flant5xxl", lambda: official.instruct("t5_proj", 4096), (TOWER, LLM)
    ),
    "instruct_blip_vicuna7b_trimmed": File(
        "blip2_vicuna_instruct", "vicuna7b", lambda: official.instruct("llm_proj", 4096), (TOWER, LLM)
    ),
    "instruct_blip_vicuna13b_trimmed": File(
        "blip2_vicuna_instruct", "vicuna13b", lambda: official.instruct("llm_proj", 5120), (TOWER, LLM)
    ),
    "ViT-g with Vicuna-13B": File(
        "blip2_vicuna_instruct",
        "vicuna13b",
        complete(
            lambda: official.instruct("llm_proj", 5120),
            "llm",
            lambda: official.llama(5120, 13824, 40, waves=True),
        ),
    ),
}


def on_meta(shapes: Shapes) -> dict[str, Tensor]:
    """Tensors without memory; numbers of pictures, of positions and of the queue's next place are whole."""
    whole = ("idx_queue", "ptr_queue", "queue_ptr", "position_ids")
    return {
        name: torch.empty(shape, device=META, dtype=torch.int64 if name.endswith(whole) else torch.float32)
        for name, shape in shapes.items()
    }


def shapes_of(state: Mapping[str, Tensor]) -> Shapes:
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


@cache
def model(arch: str, model_type: str, **sizes: Any) -> Any:
    return blip.load_model(arch, model_type, pretrained=False, device=META, **sizes)


def of(file: File) -> Any:
    """Our model of a file, by its name alone; LAVIS's classification has as many classes as its data."""
    sizes = {"num_classes": 3} if file.arch == "blip_classification" else {}
    return model(file.arch, file.model_type, **sizes)


def expected(file: File) -> Shapes:
    """Names and shapes of our model, but for what the file lacks."""
    found = shapes_of(of(file).state_dict())
    assert all(any(name.startswith(prefix) for name in found) for prefix in file.lacks)
    return {name: shape for name, shape in found.items() if not name.startswith(file.lacks)}


# LAVIS's layout


@pytest.mark.parametrize("name", FILES)
def test_a_file_maps_with_nothing_left_over_and_back(name: str) -> None:
    file = FILES[name]
    theirs = file.shapes()
    table = lavis.table(file.arch, getattr(of(file).config, "vit_model", ""))
    ours = table.to_ours(on_meta(theirs))
    assert shapes_of(ours.state) == expected(file)
    assert {key for line in ours.report for key in line.source} == theirs.keys()
    written = {name.replace("ptr_queue", "queue_ptr"): shape for name, shape in theirs.items()}
    for name in list(written):  # what follows from the sizes is not written where nothing of ours tells it
        reads = "Qformer.bert.embeddings.word_embeddings.weight" in theirs
        if "inv_freq" in name or (name == "Qformer.bert.embeddings.position_ids" and not reads):
            del written[name]
    assert shapes_of(table.to_theirs(ours.state).state) == written


@pytest.mark.parametrize("name", FILES)
def test_what_a_file_is_shows_without_any_hint(name: str) -> None:
    file = FILES[name]
    known = identify(Source(name, Path(name)), on_meta(file.shapes()), None, None, META, {})
    assert (known.config.arch, known.config.model_type) == (file.arch, file.model_type)
    assert known.cls is type(of(file))
    assert shapes_of(known.weights.tensors) == expected(file)
    found, wanted = asdict(known.config), asdict(of(file).config)
    differing = {key for key in wanted if found[key] != wanted[key] and wanted[key] is not None}
    assert differing <= {"load_llm"}  # without weights, a model starts from no part


def test_a_language_model_with_more_words_shows_them() -> None:
    """And keeps what the preset says of it."""
    words = official.opt(2560)
    words = {name: (50304, 2560) if shape == (50272, 2560) else shape for name, shape in words.items()}
    shapes = complete(lambda: official.stage2(EVA, "opt_proj", 2560), "opt", lambda: words)()
    known = identify(Source("x", Path("x")), on_meta(shapes), None, None, META, {})
    assert (known.config.model_type, known.config.llm.end) == ("pretrain_opt2.7b", "\n")
    with META:
        built = known.cls.build(known.config)
    assert shapes_of(known.weights.tensors) == shapes_of(built.state_dict())


FILES_OF = {
    "model_base_capfilt_large": "model_base",
    "blip_flickr_retrieval": "blip_coco_retrieval",
    "model_large_retrieval_flickr": "model_large_retrieval_coco",
    "blip_okvqa": "model_base_vqa_capfilt_large",
    "blip_aokvqa": "model_base_vqa_capfilt_large",
}
"""Further files of the same layout and sizes."""
PUBLISHED = [
    (arch, kind, entry.file.removesuffix(".pth"))
    for arch, kinds in model_zoo
    for kind in kinds
    if (entry := model_zoo[arch, kind]).file
]


@pytest.mark.parametrize(("arch", "kind", "name"), PUBLISHED)
def test_what_is_published_for_a_model_fits_it(arch: str, kind: str, name: str) -> None:
    """Also where the file is of a relative: matching is done with the weights of retrieval."""
    file = FILES[FILES_OF.get(name, name)]
    weights = recognise(on_meta(file.shapes()), arch)
    ours = model(arch, kind)
    wanted = shapes_of(ours.state_dict())
    taken = ours.adopt(dict(weights.tensors))
    assert shapes_of(taken.tensors).items() <= wanted.items()
    lacking = wanted.keys() - taken.tensors.keys()
    assert all(key.startswith(file.lacks) for key in lacking)
    assert taken.kept == []
    if arch == file.arch:
        assert taken.left_out == {}
    else:
        assert {key.split(".")[0] for key in taken.left_out} <= RELATIVES[file.arch, arch]


RELATIVES = {
    ("blip_retrieval", "blip_image_text_matching"): {"temp", "twin", "queue"},
    ("blip_pretrain", "blip_feature_extractor"): {"text", "lm_head", "itm_head", "twin", "queue"},
    ("blip2", "blip2_feature_extractor"): set(),
    ("blip2", "blip2_image_text_matching"): set(),
}
"""(Model that a file is of, model that it is published for) -> parts that the second has no place for."""


# Sizes


def test_parameters_are_as_many_as_were_counted() -> None:
    """Counts of the papers and of the released models, in millions."""
    assert millions(official.vit(BASE, 224)) == 85.798656
    assert millions(official.vit(LARGE, 224)) == 303.301632
    no_key_bias = official.EVA_LAYERS * EVA / 1e6  # transformers counts that, which is zero
    tower = millions(official.eva(224) | official.norm("ln_vision", EVA)) + no_key_bias
    assert round(tower, 2) == 985.95
    queries = 32 * 768 / 1e6
    stage1, stage2 = model("blip2", "pretrain"), model("blip2_opt", "pretrain_opt2.7b")
    instruct = model("blip2_vicuna_instruct", "vicuna7b")
    assert round(parameters(stage1, "vision.", "ln_vision.") + no_key_bias, 2) == 985.95
    assert round(parameters(stage2, "qformer.") - queries, 2) == 105.14
    assert round(parameters(instruct, "qformer.") - queries, 2) == 185.66
    assert round(parameters(stage1) - parameters(stage1, TOWER)) == 187
    assert round(parameters(stage2) - parameters(stage2, TOWER, LLM)) == 107
    paired = model("blip_pretrain", "base")
    assert round(parameters(paired) - parameters(paired, "twin.")) == 252
    assert round(parameters(model("blip_image_text_matching", "base")), 2) == 223.74
    assert round(parameters(model("blip_caption", "base_coco")), 2) == 223.97
    assert round(parameters(model("blip_vqa", "vqav2", image_size=384)), 2) == 361.23


def parameters(of: Any, *parts: str) -> float:
    """Millions of them in all, or in some parts; tied ones count once."""
    return sum(p.numel() for name, p in of.named_parameters() if name.startswith(parts or "")) / 1e6


def millions(shapes: Shapes) -> float:
    return sum(prod(shape) for shape in shapes.values()) / 1e6


def test_nothing_is_read_and_nobody_is_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the hub could be reached, too, and with no vocabulary and no language model on the machine."""
    asked: list[Any] = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *rest, **more: asked.append(host))
    monkeypatch.setattr(socket.socket, "connect", lambda self, address: asked.append(address))
    for arch, kind in (
        ("blip2", "pretrain"),
        ("blip_pretrain", "large"),
        ("blip2_vicuna_instruct", "vicuna13b"),
    ):
        built = blip.load_model(arch, kind, pretrained=False, device="meta")
        assert all(tensor.is_meta for tensor in built.state_dict().values())
    assert asked == []


# transformers' layout


class Theirs(NamedTuple):
    """A class of transformers at an official size."""

    arch: str
    model_type: str
    build: Callable[[], Any]
    sizes: Mapping[str, Any] = {}
    """What differs from our preset."""


def blip_model(name: str, width: int = BASE, pixels: int = 384) -> Callable[[], Any]:
    def build() -> Any:
        import transformers

        depth, heads = (12, 12) if width == BASE else (24, 16)
        vision = transformers.BlipVisionConfig(
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=depth,
            num_attention_heads=heads,
            image_size=pixels,
            layer_norm_eps=1e-6,
        )
        text = transformers.BlipTextConfig(
            vocab_size=30524, encoder_hidden_size=width, num_attention_heads=12
        )
        config = transformers.BlipConfig(vision_config=vision, text_config=text, image_text_hidden_size=256)
        return getattr(transformers, name)(config)

    return build


def blip2_model(llm: Callable[[], Any] | None, pixels: int = 224, reads: bool = False) -> Callable[[], Any]:
    """`reads`: InstructBLIP; no language model: stage 1."""

    def build() -> Any:
        import transformers as hub

        kind = "InstructBlip" if reads else "Blip2"
        qformer: dict[str, Any] = {"vocab_size": 30523} if reads or llm is None else {}
        qformer |= {"use_qformer_text_input": True} if llm is None else {}
        config = getattr(hub, f"{kind}Config")(
            vision_config=getattr(hub, f"{kind}VisionConfig")(image_size=pixels),
            qformer_config=getattr(hub, f"{kind}QFormerConfig")(**qformer),
            **({"text_config": llm()} if llm else {}),
        )
        name = "ForImageTextRetrieval" if llm is None else "ForConditionalGeneration"
        return getattr(hub, kind + name)(config)

    return build


def opt_config(width: int) -> Callable[[], Any]:
    def build() -> Any:
        from transformers import OPTConfig

        sizes = {"hidden_size": width, "word_embed_proj_dim": width, "ffn_dim": 4 * width}
        return OPTConfig(vocab_size=50272, num_hidden_layers=32, num_attention_heads=32, **sizes)

    return build


def t5_config(width: int, mlp: int, heads: int) -> Callable[[], Any]:
    def build() -> Any:
        from transformers import T5Config

        return T5Config(
            vocab_size=32128,
            d_model=width,
            d_ff=mlp,
            num_heads=heads,
            num_layers=24,
            feed_forward_proj="gated-gelu",
            tie_word_embeddings=False,
        )

    return build


def llama_config(width: int, mlp: int, depth: int) -> Callable[[], Any]:
    def build() -> Any:
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=32001,
            hidden_size=width,
            intermediate_size=mlp,
            num_hidden_layers=depth,
            num_attention_heads=depth,
        )

    return build


XL, XXL = t5_config(2048, 5120, 32), t5_config(4096, 10240, 64)
SMALL_OPT, LARGE_OPT = opt_config(2560), opt_config(4096)
CAPTION, MATCH, VQA = (
    f"BlipFor{name}" for name in ("ConditionalGeneration", "ImageTextRetrieval", "QuestionAnswering")
)
HUB: dict[str, Theirs] = {
    "blip-image-captioning-base": Theirs("blip_caption", "base_coco", blip_model(CAPTION)),
    "blip-image-captioning-large": Theirs("blip_caption", "large_coco", blip_model(CAPTION, LARGE)),
    "blip-itm-base-coco": Theirs("blip_image_text_matching", "base", blip_model(MATCH)),
    "blip-itm-large-coco": Theirs("blip_image_text_matching", "large", blip_model(MATCH, LARGE)),
    "blip-vqa-base": Theirs("blip_vqa", "vqav2", blip_model(VQA), {"image_size": 384}),
    "blip2-itm-vit-g": Theirs("blip2_image_text_matching", "pretrain", blip2_model(None)),
    "blip2-itm-vit-g-coco": Theirs("blip2_image_text_matching", "coco", blip2_model(None, 364)),
    "blip2-opt-2.7b": Theirs("blip2_opt", "pretrain_opt2.7b", blip2_model(SMALL_OPT)),
    "blip2-opt-6.7b": Theirs("blip2_opt", "pretrain_opt6.7b", blip2_model(LARGE_OPT)),
    "blip2-opt-2.7b-coco": Theirs("blip2_opt", "caption_coco_opt2.7b", blip2_model(SMALL_OPT, 364)),
    "blip2-opt-6.7b-coco": Theirs("blip2_opt", "caption_coco_opt6.7b", blip2_model(LARGE_OPT, 364)),
    "blip2-flan-t5-xl": Theirs("blip2_t5", "pretrain_flant5xl", blip2_model(XL)),
    "blip2-flan-t5-xxl": Theirs("blip2_t5", "pretrain_flant5xxl", blip2_model(XXL)),
    "blip2-flan-t5-xl-coco": Theirs("blip2_t5", "caption_coco_flant5xl", blip2_model(XL, 364)),
    "instructblip-flan-t5-xl": Theirs("blip2_t5_instruct", "flant5xl", blip2_model(XL, reads=True)),
    "instructblip-flan-t5-xxl": Theirs("blip2_t5_instruct", "flant5xxl", blip2_model(XXL, reads=True)),
    "instructblip-vicuna-7b": Theirs(
        "blip2_vicuna_instruct", "vicuna7b", blip2_model(llama_config(4096, 11008, 32), reads=True)
    ),
    "instructblip-vicuna-13b": Theirs(
        "blip2_vicuna_instruct", "vicuna13b", blip2_model(llama_config(5120, 13824, 40), reads=True)
    ),
}


def test_every_repository_of_the_table_has_a_class() -> None:
    named = {model_zoo[arch, kind].hub_id for arch, kinds in model_zoo for kind in kinds}
    known = {f"Salesforce/{name}" for name in HUB}
    assert named - known == {None, "Salesforce/blip-itm-large-flickr"}  # the sizes of the one of COCO


@pytest.mark.parametrize("name", HUB)
def test_transformers_classes_map_with_nothing_left_over_and_back(name: str, tmp_path: Path) -> None:
    case = HUB[name]
    with META:
        theirs = case.build()
    state, table = theirs.state_dict(), hf.table(case.arch)
    ours = table.to_ours(state)
    own = model(case.arch, case.model_type, **case.sizes).state_dict()
    training = {key for key in own if key == "temp" or key.startswith("lm_head.")}
    training = training if "blip2_image" in case.arch else set()
    assert shapes_of(ours.state) == {key: s for key, s in shapes_of(own).items() if key not in training}
    assert {key for line in ours.report for key in line.source} == state.keys()
    assert shapes_of(table.to_theirs(own).state) == shapes_of(state)

    theirs.config.architectures = [type(theirs).__name__]
    theirs.config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").touch()
    known = identify(open_source(tmp_path), state, None, None, META, {})
    assert (known.config.arch, known.config.model_type) == (case.arch, case.model_type)
    assert shapes_of(known.weights.tensors) == shapes_of(ours.state)
