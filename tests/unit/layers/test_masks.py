import torch

from blip.layers.masks import causal_mask, padding_mask, qformer_mask

TEXT = torch.tensor([[True, True, False]])  # two tokens and one pad


def table(objective: str) -> list[list[int]]:
    return qformer_mask(objective, num_query=2, text_mask=TEXT)[0, 0].int().tolist()


def test_itc_queries_see_queries_and_text_sees_text() -> None:
    assert table("itc") == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 0],
        [0, 0, 1, 1, 0],
    ]


def test_itm_everyone_sees_everyone() -> None:
    assert table("itm") == [[1, 1, 1, 1, 0]] * 5


def test_itg_text_sees_the_queries_and_its_own_past() -> None:
    assert table("itg") == [
        [1, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [1, 1, 1, 0, 0],
        [1, 1, 1, 1, 0],
        [1, 1, 1, 1, 0],
    ]


def test_the_passes_use_blocks_of_the_same_tables() -> None:
    assert torch.equal(causal_mask(TEXT, 2), qformer_mask("itg", 2, TEXT)[:, :, 2:])
    assert torch.equal(padding_mask(TEXT).expand(1, 1, 3, 3), qformer_mask("itc", 2, TEXT)[:, :, 2:, 2:])
