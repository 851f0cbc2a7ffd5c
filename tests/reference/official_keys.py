"""Names and shapes of the official weight files, written down from their layouts and from nothing of ours.

Every function gives name -> shape, of a part or of a whole file, as the original BLIP and LAVIS save them.
"""

from __future__ import annotations

from collections.abc import Iterable

Shapes = dict[str, tuple[int, ...]]

BASE, LARGE = 768, 1024
BERT, BERT_MLP, BERT_LAYERS, POSITIONS = 768, 3072, 12, 512
BLIP_WORDS, BLIP2_WORDS = 30524, 30523
PROJECTED, QUEUE, QUERIES = 256, 57600, 32
EVA, EVA_MLP, EVA_LAYERS = 1408, 6144, 39
CLIP, CLIP_LAYERS = 1024, 23


def linear(name: str, outputs: int, inputs: int, bias: bool = True) -> Shapes:
    return {f"{name}.weight": (outputs, inputs), **({f"{name}.bias": (outputs,)} if bias else {})}


def norm(name: str, width: int) -> Shapes:
    return {f"{name}.weight": (width,), f"{name}.bias": (width,)}


def merged(parts: Iterable[Shapes]) -> Shapes:
    found: Shapes = {}
    for part in parts:
        assert not found.keys() & part.keys()
        found |= part
    return found


def under(prefix: str, shapes: Shapes) -> Shapes:
    return {prefix + name: shape for name, shape in shapes.items()}


# Towers


def vit(width: int, pixels: int) -> Shapes:
    """BLIP's tower, of patches of 16 x 16."""
    tokens, depth = (pixels // 16) ** 2 + 1, 12 if width == BASE else 24
    shapes: Shapes = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
    }
    blocks = (
        [
            norm(f"blocks.{i}.norm1", width),
            linear(f"blocks.{i}.attn.qkv", 3 * width, width),
            linear(f"blocks.{i}.attn.proj", width, width),
            norm(f"blocks.{i}.norm2", width),
            linear(f"blocks.{i}.mlp.fc1", 4 * width, width),
            linear(f"blocks.{i}.mlp.fc2", width, 4 * width),
        ]
        for i in range(depth)
    )
    return merged([shapes, *(part for block in blocks for part in block), norm("norm", width)])


def eva(pixels: int) -> Shapes:
    """EVA-CLIP ViT-g/14 without its last block; keys have no bias."""
    shapes: Shapes = {
        "cls_token": (1, 1, EVA),
        "pos_embed": (1, (pixels // 14) ** 2 + 1, EVA),
        "patch_embed.proj.weight": (EVA, 3, 14, 14),
        "patch_embed.proj.bias": (EVA,),
    }
    for i in range(EVA_LAYERS):
        block = f"blocks.{i}"
        shapes |= norm(f"{block}.norm1", EVA) | norm(f"{block}.norm2", EVA)
        shapes |= {f"{block}.attn.q_bias": (EVA,), f"{block}.attn.v_bias": (EVA,)}
        shapes |= linear(f"{block}.attn.qkv", 3 * EVA, EVA, bias=False)
        shapes |= linear(f"{block}.attn.proj", EVA, EVA)
        shapes |= linear(f"{block}.mlp.fc1", EVA_MLP, EVA) | linear(f"{block}.mlp.fc2", EVA, EVA_MLP)
    return shapes


def clip() -> Shapes:
    """CLIP ViT-L/14 without its last block."""
    shapes: Shapes = {
        "class_embedding": (CLIP,),
        "positional_embedding": (257, CLIP),
        "conv1.weight": (CLIP, 3, 14, 14),
        **norm("ln_pre", CLIP),
    }
    for i in range(CLIP_LAYERS):
        block = f"transformer.resblocks.{i}"
        shapes |= {
            f"{block}.attn.in_proj_weight": (3 * CLIP, CLIP),
            f"{block}.attn.in_proj_bias": (3 * CLIP,),
        }
        shapes |= linear(f"{block}.attn.out_proj", CLIP, CLIP)
        shapes |= norm(f"{block}.ln_1", CLIP) | norm(f"{block}.ln_2", CLIP)
        shapes |= linear(f"{block}.mlp.c_fc", 4 * CLIP, CLIP) | linear(f"{block}.mlp.c_proj", CLIP, 4 * CLIP)
    return shapes


# Text transformers


def embeddings(rows: int) -> Shapes:
    return {
        "embeddings.word_embeddings.weight": (rows, BERT),
        "embeddings.position_embeddings.weight": (POSITIONS, BERT),
        **norm("embeddings.LayerNorm", BERT),
        "embeddings.position_ids": (1, POSITIONS),
    }


def attention(name: str, seen: int = BERT, copies: Iterable[str] = ("",)) -> Shapes:
    """Queries, keys, values and output; `seen` is the width of what is looked at."""
    shapes: Shapes = {}
    for n in copies:
        shapes |= linear(f"{name}.self{n}.query", BERT, BERT)
        shapes |= linear(f"{name}.self{n}.key", BERT, seen) | linear(f"{name}.self{n}.value", BERT, seen)
        shapes |= linear(f"{name}.output.dense{n}", BERT, BERT)
    return shapes | norm(f"{name}.output.LayerNorm", BERT)


def feed_forward(name: str, suffix: str = "") -> Shapes:
    return {
        **linear(f"{name}.intermediate{suffix}.dense", BERT_MLP, BERT),
        **linear(f"{name}.output{suffix}.dense", BERT, BERT_MLP),
        **norm(f"{name}.output{suffix}.LayerNorm", BERT),
    }


def med(seen: int, pictures: int = 1) -> Shapes:
    """BLIP's text transformer; with two pictures every layer looks at each by itself."""
    shapes = embeddings(BLIP_WORDS)
    copies = ("",) if pictures == 1 else ("0", "1")
    for i in range(BERT_LAYERS):
        layer = f"encoder.layer.{i}"
        shapes |= attention(f"{layer}.attention")
        shapes |= attention(f"{layer}.crossattention", seen, copies)
        if pictures == 2 and i >= 6:
            shapes |= linear(f"{layer}.crossattention.output.merge_layer", BERT, 2 * BERT)
        shapes |= feed_forward(layer)
    return shapes


def head(rows: int) -> Shapes:
    """BERT's head for words, in a model that writes."""
    return {
        "predictions.bias": (rows,),
        **linear("predictions.transform.dense", BERT, BERT),
        **norm("predictions.transform.LayerNorm", BERT),
        "predictions.decoder.weight": (rows, BERT),
        "predictions.decoder.bias": (rows,),
    }


def decoder(seen: int) -> Shapes:
    return under("text_decoder.bert.", med(seen)) | under("text_decoder.cls.", head(BLIP_WORDS))


# BLIP


def blip_caption(width: int, pixels: int = 384) -> Shapes:
    return merged([under("visual_encoder.", vit(width, pixels)), decoder(width)])


def blip_vqa(width: int = BASE, pixels: int = 480) -> Shapes:
    """The answer's decoder looks at the question."""
    tower, asked = vit(width, pixels), med(width)
    return merged([under("visual_encoder.", tower), under("text_encoder.", asked), decoder(BERT)])


def blip_features(width: int = BASE, pixels: int = 224) -> Shapes:
    """With LAVIS's temperature."""
    return merged([_encoder(width, pixels), _projections(width), {"temp": ()}])


def blip_matching(width: int, pixels: int = 384) -> Shapes:
    return merged([_encoder(width, pixels), _projections(width), linear("itm_head", 2, BERT)])


def blip_retrieval(width: int, pixels: int = 384, pointer: str = "queue_ptr") -> Shapes:
    """`pointer` is `ptr_queue` in the original code."""
    return merged(
        [blip_matching(width, pixels), _momentum(width, pixels), _queues(pointer), {"idx_queue": (1, QUEUE)}]
    )


def blip_pretrain(width: int, pixels: int = 224) -> Shapes:
    """Both views of the text transformer."""
    own = blip_matching(width, pixels)
    return merged([own, decoder(width), _momentum(width, pixels), _queues("queue_ptr")])


def blip_nlvr(pixels: int = 384) -> Shapes:
    text = under("text_encoder.", med(BASE, pictures=2))
    return merged([under("visual_encoder.", vit(BASE, pixels)), text, _classes("cls_head", 2)])


def blip_classification(classes: int, pixels: int = 384) -> Shapes:
    """With the momentum twin of its distillation."""
    own = {**_encoder(BASE, pixels), **_classes("cls_head", classes)}
    twin = {**_classes("cls_head_m", classes), **under("visual_encoder_m.", vit(BASE, pixels))}
    return merged([own, twin, under("text_encoder_m.", med(BASE))])


def _encoder(width: int, pixels: int) -> Shapes:
    return under("visual_encoder.", vit(width, pixels)) | under("text_encoder.", med(width))


def _projections(width: int, suffix: str = "") -> Shapes:
    vision, text = f"vision_proj{suffix}", f"text_proj{suffix}"
    return linear(vision, PROJECTED, width) | linear(text, PROJECTED, BERT)


def _momentum(width: int, pixels: int) -> Shapes:
    """What follows slowly, and what it sees and the loss reads: `temp`."""
    tower, text = under("visual_encoder_m.", vit(width, pixels)), under("text_encoder_m.", med(width))
    return merged([{"temp": ()}, tower, text, _projections(width, "_m")])


def _queues(pointer: str) -> Shapes:
    return {"image_queue": (PROJECTED, QUEUE), "text_queue": (PROJECTED, QUEUE), pointer: (1,)}


def _classes(name: str, count: int) -> Shapes:
    return linear(f"{name}.0", BERT, BERT) | linear(f"{name}.2", count, BERT)


# BLIP-2 and InstructBLIP


def qformer(seen: int, reads: bool) -> Shapes:
    """Queries and their transformer; `reads`: with what it has for texts. Position numbers always stay."""
    shapes: Shapes = {"query_tokens": (1, QUERIES, BERT), **norm("ln_vision", seen)}
    bert = embeddings(BLIP2_WORDS)
    if not reads:
        bert = {name: shape for name, shape in bert.items() if "_embeddings" not in name}
    for i in range(BERT_LAYERS):
        layer = f"encoder.layer.{i}"
        bert |= attention(f"{layer}.attention")
        if i % 2 == 0:
            bert |= attention(f"{layer}.crossattention", seen)
        bert |= feed_forward(layer, "_query") | (feed_forward(layer) if reads else {})
    return merged([shapes, under("Qformer.bert.", bert)])


def stage1(seen: int) -> Shapes:
    """All that was trained: no tower."""
    heads = merged([_projections(BERT), linear("itm_head", 2, BERT), {"temp": ()}])
    return merged([qformer(seen, reads=True), under("Qformer.cls.", head(BLIP2_WORDS)), heads])


def stage2(seen: int, projection: str, width: int) -> Shapes:
    """All that was trained: neither tower nor language model."""
    return merged([qformer(seen, reads=False), linear(projection, width, BERT)])


def instruct(projection: str, width: int) -> Shapes:
    return merged([qformer(EVA, reads=True), linear(projection, width, BERT)])


# Language models, as transformers names their tensors


def opt(width: int) -> Shapes:
    """OPT-2.7B and 6.7B: 32 layers; two more positions than there are tokens."""
    decoder: Shapes = {"embed_tokens.weight": (50272, width), "embed_positions.weight": (2050, width)}
    for i in range(32):
        for part in ("k", "v", "q", "out"):
            decoder |= linear(f"layers.{i}.self_attn.{part}_proj", width, width)
        decoder |= norm(f"layers.{i}.self_attn_layer_norm", width) | norm(
            f"layers.{i}.final_layer_norm", width
        )
        decoder |= linear(f"layers.{i}.fc1", 4 * width, width) | linear(f"layers.{i}.fc2", width, 4 * width)
    decoder |= norm("final_layer_norm", width)
    return {**under("model.decoder.", decoder), "lm_head.weight": (50272, width)}


def t5(width: int, mlp: int, heads: int) -> Shapes:
    """FlanT5-XL and XXL: 24 layers on each side, gated, heads of 64."""
    rows, inner = 32128, 64 * heads
    shapes: Shapes = {"shared.weight": (rows, width), "lm_head.weight": (rows, width)}
    for side, attentions in (
        ("encoder", ["SelfAttention"]),
        ("decoder", ["SelfAttention", "EncDecAttention"]),
    ):
        shapes |= {f"{side}.embed_tokens.weight": (rows, width), f"{side}.final_layer_norm.weight": (width,)}
        first = f"{side}.block.0.layer.0.SelfAttention.relative_attention_bias.weight"
        shapes[first] = (32, heads)
        for i in range(24):
            for number, name in enumerate(attentions):
                layer = f"{side}.block.{i}.layer.{number}"
                for part in "qkv":
                    shapes |= linear(f"{layer}.{name}.{part}", inner, width, bias=False)
                shapes |= linear(f"{layer}.{name}.o", width, inner, bias=False)
                shapes[f"{layer}.layer_norm.weight"] = (width,)
            layer = f"{side}.block.{i}.layer.{len(attentions)}"
            for part in ("wi_0", "wi_1"):
                shapes |= linear(f"{layer}.DenseReluDense.{part}", mlp, width, bias=False)
            shapes |= linear(f"{layer}.DenseReluDense.wo", width, mlp, bias=False)
            shapes[f"{layer}.layer_norm.weight"] = (width,)
    return shapes


def llama(width: int, mlp: int, depth: int, waves: bool = False) -> Shapes:
    """Vicuna with a row for its padding; `waves`: with the frequencies that older versions kept."""
    shapes: Shapes = {"model.embed_tokens.weight": (32001, width), "model.norm.weight": (width,)}
    for i in range(depth):
        layer = f"model.layers.{i}"
        for part in "qkvo":
            shapes |= linear(f"{layer}.self_attn.{part}_proj", width, width, bias=False)
        shapes |= linear(f"{layer}.mlp.gate_proj", mlp, width, bias=False)
        shapes |= linear(f"{layer}.mlp.up_proj", mlp, width, bias=False)
        shapes |= linear(f"{layer}.mlp.down_proj", width, mlp, bias=False)
        shapes |= {
            f"{layer}.{name}.weight": (width,) for name in ("input_layernorm", "post_attention_layernorm")
        }
        shapes |= {f"{layer}.self_attn.rotary_emb.inv_freq": (64,)} if waves else {}
    return {**shapes, "lm_head.weight": (32001, width)}
